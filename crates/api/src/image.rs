//! Images: what machines are made of.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::DiskFormat;

/// An image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// The format of its disk.
    pub format: DiskFormat,
    /// The size of its disk as a guest sees it, in bytes.
    pub virtual_size: u64,
    /// The size of its disk's file, in bytes.
    pub file_size: u64,
    /// The SHA-256 checksum of that file, in hexadecimal.
    pub sha256: String,
    /// Where it is from.
    pub origin: ImageOrigin,
    /// When it was made: RFC 3339, UTC.
    pub created: String,
    /// Its disk's file, on the daemon's host.
    #[schema(value_type = String)]
    pub disk: PathBuf,
}

/// Where an image is from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ImageOrigin {
    /// Made of a distribution's packages.
    Built(String),
    /// A file or a URL.
    Imported(String),
}

/// All images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Images {
    /// Those that machines can be made of, in the order of their names.
    pub images: Vec<Image>,
    /// Of each that is damaged, what is wrong, in words.
    pub damaged: Vec<String>,
}

/// An image to be made. (One that is sent is put at its name.)
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "from", rename_all = "lowercase", deny_unknown_fields)]
pub enum NewImage {
    /// Of an image that the daemon fetches.
    Url {
        /// Its name.
        #[schema(pattern = "^[a-z0-9][a-z0-9._-]{0,62}$")]
        name: String,
        /// Where it is, by http or https.
        #[schema(pattern = "^[Hh][Tt][Tt][Pp][Ss]?://")]
        url: String,
        /// Its format; what its content says if left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        format: Option<ImageFormat>,
        /// The SHA-256 checksum that it must have, in hexadecimal.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schema(pattern = "^[0-9A-Fa-f]{64}$")]
        sha256: Option<String>,
    },
    /// Of a distribution's packages, from the sources that the daemon's host has.
    Build {
        /// What: `debian` or `debian:12`.
        what: String,
        /// Its name; `debian-12` if left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schema(pattern = "^[a-z0-9][a-z0-9._-]{0,62}$")]
        name: Option<String>,
        /// Anew, if it is there already.
        #[serde(default)]
        rebuild: bool,
    },
}

/// The format of an image from elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// The disk's bytes.
    Raw,
    /// QEMU's.
    Qcow2,
    /// VMware's.
    Vmdk,
    /// Microsoft's older one.
    Vhd,
    /// Hyper-V's.
    Vhdx,
    /// VirtualBox's.
    Vdi,
}
