//! The arguments of `purlin image`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use purlin_images::import::is_sha256;
use purlin_storage::{Format, SourceFormat};

/// Build, import and keep the images that machines are made of
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct ImageArgs {
    #[command(subcommand)]
    pub what: Do,
}

impl ImageArgs {
    /// Whether it is about files of this host, whichever daemon is asked.
    pub fn is_of_this_host(&self) -> bool {
        matches!(self.what, Do::Convert(_))
    }
}

const EXAMPLES: &str = "\
Examples:
  purlin image build debian
  purlin image import disk.vmdk --name web
  purlin image import https://example.org/cloud.qcow2 --sha256 3b1c…
  purlin image list --json
  purlin image convert debian-12 copy.raw

Images are kept in $PURLIN_HOME/data/images, or else in ~/.local/share/purlin/images. A machine never writes its image.
With --host they are those of the other host: a file is sent there, and what a URL leads to is fetched there.";

#[derive(Subcommand)]
pub enum Do {
    Build(Build),
    Import(ImportArgs),
    List(List),
    Info(Info),
    Delete(Delete),
    Convert(Convert),
}

/// Build an image from the package mirror that this host is set up with; needs no root
#[derive(Args)]
#[command(after_help = "Examples:\n  purlin image build debian\n  purlin image build debian:12 --name base --rebuild")]
pub struct Build {
    /// What to build: 'debian' or 'debian:12'
    pub what: String,

    /// The image's name [default: debian-12]
    #[arg(long)]
    pub name: Option<String>,

    /// Build it anew if it is there already
    #[arg(long)]
    pub rebuild: bool,
}

/// Import an image from a file or a URL: raw, qcow2, VMDK, VHD, VHDX or VDI
#[derive(Args)]
#[command(
    after_help = "Examples:\n  purlin image import disk.vhdx\n  purlin image import https://example.org/cloud.img \
                        --name cloud --sha256 3b1c…"
)]
pub struct ImportArgs {
    /// A file, or a URL with http or https
    #[arg(value_name = "FILE|URL")]
    pub source: String,

    /// The image's name [default: made of the source's]
    #[arg(long)]
    pub name: Option<String>,

    /// The source's format: raw, qcow2, vmdk, vhd, vhdx or vdi [default: what its content says]
    #[arg(long)]
    pub format: Option<SourceFormat>,

    /// The SHA-256 checksum that the source must have
    #[arg(long, value_name = "HEX", value_parser = parse_sha256)]
    pub sha256: Option<String>,
}

/// List the images
#[derive(Args)]
#[command(after_help = "Examples:\n  purlin image list\n  purlin image list --json")]
pub struct List {
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// Show what is known of an image
#[derive(Args)]
#[command(after_help = "Examples:\n  purlin image info debian-12\n  purlin image info debian-12 --json")]
pub struct Info {
    /// The image's name (what is built as 'debian' goes by that, too)
    pub name: String,

    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// Delete images
#[derive(Args)]
#[command(after_help = "Example:\n  purlin image delete debian-12")]
pub struct Delete {
    /// The images' names (what is built as 'debian' goes by that, too)
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// Write an image of the store, or an image's file, to a new file in another format
#[derive(Args)]
#[command(
    after_help = "Examples:\n  purlin image convert debian-12 copy.raw\n  purlin image convert disk.vmdk disk.qcow2"
)]
pub struct Convert {
    /// An image's name, or a file
    #[arg(value_name = "NAME|FILE")]
    pub source: String,

    /// The file to make
    #[arg(value_name = "FILE")]
    pub target: PathBuf,

    /// raw or qcow2 [default: what the new file's name says, or else qcow2]
    #[arg(long)]
    pub format: Option<Format>,
}

fn parse_sha256(text: &str) -> Result<String, String> {
    if is_sha256(text) {
        Ok(text.to_owned())
    } else {
        Err("it is 64 hexadecimal digits, as sha256sum writes them".into())
    }
}

/// `https://x/Some_Disk.qcow2?y` → `some_disk`. Whether it can be a name is seen later.
pub fn name_of_source(source: &str) -> String {
    let is_url = source.contains("://");
    let path = if is_url { source.split(['?', '#']).next().unwrap_or_default() } else { source };
    let file = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_lowercase();
    let extensions = [".qcow2", ".img", ".raw", ".vmdk", ".vhdx", ".vhd", ".vdi"];
    let stem = extensions.iter().find_map(|extension| file.strip_suffix(extension)).unwrap_or(&file);
    stem.replace(|c: char| !c.is_ascii_alphanumeric() && !"-._".contains(c), "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_sources() {
        assert_eq!(name_of_source("https://x.test/a/Some_Disk.qcow2?token=a/b"), "some_disk");
        assert_eq!(name_of_source("/tmp/my disk.VMDK"), "my-disk");
        assert_eq!(name_of_source("debian-12-generic-amd64.raw"), "debian-12-generic-amd64");
    }

    #[test]
    fn checksums() {
        assert!(parse_sha256(&"a1".repeat(32)).is_ok());
        assert!(parse_sha256("a1").is_err() && parse_sha256(&"g".repeat(64)).is_err());
    }
}
