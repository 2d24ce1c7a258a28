//! What is known of an image, in a file beside its disk.

use std::{fmt, fs, io, path::Path, time::SystemTime};

use purlin_storage::Format;
use serde::{Deserialize, Serialize};

/// The file's name in the image's directory.
const FILE: &str = "image.json";
/// Of the file's form. A reader refuses what is newer.
const VERSION: u32 = 1;

/// What `purlin image info` shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    version: u32,
    /// `raw` or `qcow2`: the format of the disk.
    format: String,
    /// The size of the disk as a guest sees it, in bytes.
    pub virtual_size: u64,
    /// The size of the disk's file, in bytes.
    pub file_size: u64,
    /// The checksum of the disk's file, in hexadecimal.
    pub sha256: String,
    /// Where it is from.
    pub origin: Origin,
    /// Of an image that was built: what the recipe was, as [`Recipe::digest`](crate::build::Recipe::digest) tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<String>,
    /// When it came into the store: RFC 3339, UTC.
    pub created: String,
}

/// Where an image is from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// Made of a distribution's packages: `Debian 12, kernel …`.
    Built(String),
    /// A file or a URL.
    Imported(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Built(what) => write!(f, "built: {what}"),
            Self::Imported(from) => write!(f, "imported from {from}"),
        }
    }
}

impl Metadata {
    /// That of the disk at `disk`, now.
    pub fn of_disk(disk: &Path, format: Format, virtual_size: u64, origin: Origin) -> io::Result<Self> {
        Ok(Self {
            version: VERSION,
            format: format.to_string(),
            virtual_size,
            file_size: fs::metadata(disk)?.len(),
            sha256: purlin_debian::cache::checksum(disk)?,
            origin,
            recipe: None,
            created: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        })
    }

    /// The disk's format.
    pub fn format(&self) -> Result<Format, String> {
        self.format.parse().map_err(|_| format!("its format is '{}'", self.format.escape_debug()))
    }

    /// Reads that of the image in `dir`.
    pub fn read(dir: &Path) -> Result<Self, String> {
        let text = fs::read_to_string(dir.join(FILE)).map_err(|e| format!("{FILE}: {e}"))?;
        let read: Self = serde_json::from_str(&text).map_err(|e| format!("{FILE}: {e}"))?;
        match read.version {
            VERSION => Ok(read),
            newer => Err(format!("{FILE} has the version {newer}, of another Purlin")),
        }
    }

    /// Writes it into `dir`.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        fs::write(dir.join(FILE), text)
    }
}
