//! Why something cannot be done with an image.

use std::{io, path::PathBuf};

use purlin_debian::Error as HostError;
use purlin_storage::{ConvertError, IoError, OpenError, SourceFormat};

/// What failed, why, and what to do: one line each.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of ours, the host's apt, a cancellation.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A disk cannot be opened or made.
    #[error(transparent)]
    Disk(#[from] OpenError),
    /// A disk cannot be read.
    #[error("cannot read the image's disk: {0}")]
    Read(#[from] IoError),
    /// A disk cannot be converted.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// No image can have this name.
    #[error(
        "'{0}' is no name for an image: it is up to 63 lower-case letters, digits, '-', '.' and '_', and begins with a \
         letter or digit"
    )]
    Name(String),
    /// There is no such image.
    #[error(
        "there is no image '{0}': 'purlin image list' shows those there are, and 'debian' is built when it is first run"
    )]
    NoImage(String),
    /// There is such an image.
    #[error("there is an image '{0}' already: delete it with 'purlin image delete {0}', or choose another --name")]
    Exists(String),
    /// A running machine stands on the image.
    #[error("the image '{0}' is in use: stop the machines that run on it first")]
    InUse(String),
    /// Its description or its disk is not what was put there.
    #[error("the image '{name}' is damaged ({reason}): delete it with 'purlin image delete {name}' and make it anew")]
    Damaged {
        /// Which.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The file to be made is there.
    #[error("'{}' is there already, and is not overwritten: remove it, or name another file", .0.display())]
    TargetExists(PathBuf),
    /// A disk cannot be made smaller than its image.
    #[error("--disk-size {} is less than the image's own {}: say more, or leave it out", mebibytes(*wanted), mebibytes(*image))]
    DiskSize {
        /// What the user asked for, in bytes.
        wanted: u64,
        /// What the image has.
        image: u64,
    },
    /// Nothing of this name can be built.
    #[error("'{0}' cannot be built: what can is 'debian' or 'debian:12'")]
    UnknownBuild(String),
    /// Programs that a build takes are missing, and this process may not install them.
    #[error(
        "building an image takes {programs}, which this host lacks: install it as root with 'apt-get install {packages}'"
    )]
    MissingTools {
        /// The programs.
        programs: String,
        /// The packages, separated by blanks.
        packages: String,
    },
    /// A user without an ssh key, and none can be made.
    #[error("guests let in whoever has your ssh key; you have none, and none can be made: {reason}; {advice}")]
    SshKey {
        /// Why.
        reason: String,
        /// What to do.
        advice: &'static str,
    },
    /// The host gives an unprivileged process no way to make a root directory.
    #[error(
        "this user cannot make a root directory here: user namespaces with subordinate ids do not work, nor is fakechroot \
         installed; install it as root with 'apt-get install fakechroot fakeroot'"
    )]
    NoIsolation,
    /// The host's package sources do not have the release.
    #[error(
        "none of the package sources in /etc/apt offers Debian 12 (bookworm): add Debian's archive to them, or import an \
         image with 'purlin image import'"
    )]
    NoRelease,
    /// A program of the build failed.
    #[error("cannot build the image: {reason}; {advice}")]
    Build {
        /// What it said.
        reason: String,
        /// What to do.
        advice: &'static str,
    },
    /// A program could not be started.
    #[error("cannot start {program}: {source}; see that it is installed")]
    Start {
        /// Its name.
        program: String,
        /// The system's answer.
        source: io::Error,
    },
    /// Not fetched.
    #[error("cannot fetch {url}: {reason}; check the address, and the network (and https_proxy, if you need one)")]
    Download {
        /// What.
        url: String,
        /// Why.
        reason: String,
    },
    /// Not received.
    #[error("the image did not arrive: {reason}; nothing was kept")]
    Upload {
        /// Why.
        reason: String,
    },
    /// Fetched by nothing here.
    #[error("'{0}' cannot be fetched: only http and https are; fetch it with another program, then import the file")]
    Scheme(String),
    /// Asked for as a checksum, but none.
    #[error("'{}' is no SHA-256 checksum: that is 64 hexadecimal digits, as sha256sum writes them", .0.escape_debug())]
    NoChecksum(String),
    /// A file that is not what it is called.
    #[error(
        "'{source_name}' is no {format} image: its name says {format}, but it does not begin as one; fetch it anew, or \
         say --format raw if it is a raw disk"
    )]
    Misnamed {
        /// File or URL.
        source_name: String,
        /// What its name says.
        format: SourceFormat,
    },
    /// Not what the user expected.
    #[error(
        "{what} has the SHA-256 checksum {found}, not {wanted}: it is damaged or another version; nothing was kept"
    )]
    Checksum {
        /// File or URL.
        what: String,
        /// In hexadecimal.
        found: String,
        /// In hexadecimal.
        wanted: String,
    },
    /// Compressed images are not taken.
    #[error("'{}' is compressed with {format}: unpack it first, for example with '{tool}'", path.display())]
    Compressed {
        /// The file.
        path: PathBuf,
        /// gzip …
        format: &'static str,
        /// The program that unpacks it.
        tool: &'static str,
    },
    /// An image is not bootable by its own kernel.
    #[error("cannot boot from {disk}: {reason}")]
    Boot {
        /// The image's name or the disk's path.
        disk: String,
        /// What is missing, or wrong, and what to do.
        reason: String,
    },
    /// The user's own file cannot be read.
    #[error("cannot open '{}': {source}", path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file for cloud-init makes no sense.
    #[error("{} is no user-data for cloud-init: {reason}", path.display())]
    UserData {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A host name makes no sense.
    #[error(
        "'{0}' is no host name: it is up to 63 letters, digits and '-', and begins and ends with a letter or digit"
    )]
    HostName(String),
}

/// `512M`, as sizes are given on the command line; rounded down.
fn mebibytes(bytes: u64) -> String {
    format!("{}M", bytes >> 20)
}
