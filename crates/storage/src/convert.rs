//! An image in another format, holes and all.

use std::{fs, path::Path, process::Command, sync::Arc};

use crate::{
    create::NewImage,
    disk::Disk,
    error::{IoError, OpenError},
    info::{self, SourceFormat},
    open::host,
    spec::{DiskSpec, Format},
};

/// How much is copied at a time, in bytes.
const CHUNK: u64 = 2 << 20;
/// Zeroes are left out in units of this: a cluster of a new qcow2 image, in bytes.
const GRAIN: usize = 64 << 10;

/// Why an image could not be converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The source cannot be opened or the target not be made.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A read or a write failed.
    #[error("cannot {what} '{}' at byte {offset}: {source}", path.display())]
    Io {
        /// `read` or `write`.
        what: &'static str,
        /// Which of the two.
        path: std::path::PathBuf,
        /// Where on the disk.
        offset: u64,
        /// The host's reason.
        source: IoError,
    },
    /// The format takes a tool that is not there.
    #[error("converting {format} images takes qemu-img, which is not installed: install the package 'qemu-utils'")]
    NoTool {
        /// The source's format.
        format: SourceFormat,
    },
    /// The tool says no.
    #[error("qemu-img cannot convert '{}': {reason}", path.display())]
    Tool {
        /// The source.
        path: std::path::PathBuf,
        /// The last line that it said.
        reason: String,
    },
    /// The image's data is in other files, which it names.
    #[error(
        "'{}' only names the files that the data is in, and such an image is not taken from elsewhere: convert it \
         where it was made", path.display()
    )]
    OtherFiles {
        /// The source.
        path: std::path::PathBuf,
    },
}

/// One image to be made of another.
#[derive(Clone, Debug)]
pub struct Conversion<'a> {
    /// The image to read, and its format.
    pub source: (&'a Path, SourceFormat),
    /// The image to make, and its format; nothing must be there yet.
    pub target: (&'a Path, Format),
    /// Whether the source may name other files that are read as well: yes for the user's own images, no for a stranger's.
    pub other_files: bool,
}

impl Conversion<'_> {
    /// Makes the new image, without anything below it; it is on the host's disk when this returns. `progress` is told
    /// how many bytes of how many are done. What was begun is removed after an error.
    pub fn run(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<(), ConvertError> {
        match self.source.1 {
            SourceFormat::Disk(format) => self.copy(format, progress),
            _ => self.by_tool(),
        }
    }

    fn copy(&self, format: Format, progress: &mut dyn FnMut(u64, u64)) -> Result<(), ConvertError> {
        let spec = DiskSpec { backing: self.other_files, ..DiskSpec::new(self.source.0).format(format).read_only() };
        let source = Disk::open(&spec)?;
        let (path, format) = self.target;
        NewImage::empty(path, format, source.size()).create()?;
        let target = Disk::open(&DiskSpec::new(path).format(format));
        target.map_err(ConvertError::from).and_then(|target| copy_data(&source, &target, progress)).inspect_err(|_| {
            let _ = fs::remove_file(path);
        })
    }

    fn by_tool(&self) -> Result<(), ConvertError> {
        let ((source, format), (target, target_format)) = (self.source, self.target);
        let absolute = |path: &Path| std::path::absolute(path).map_err(|source| host("open", path, source));
        // qemu-img would overwrite it, and we would remove it.
        if target.try_exists().map_err(|error| host("create", target, error))? {
            return Err(host("create", target, std::io::ErrorKind::AlreadyExists.into()).into());
        }
        let names_others = info::is_vmdk_descriptor(source).map_err(|error| host("open", source, error))?;
        if names_others && !self.other_files {
            return Err(ConvertError::OtherFiles { path: source.to_owned() });
        }
        // Absolute names: one such as 'nbd:x' would mean something else.
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", format.qemu_name(), "-O", &target_format.to_string()]);
        command.args([absolute(source)?, absolute(target)?]);
        let output = match command.output() {
            Ok(output) => output,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(ConvertError::NoTool { format }),
            Err(e) => return Err(ConvertError::Tool { path: source.to_owned(), reason: e.to_string() }),
        };
        if !output.status.success() {
            let _ = fs::remove_file(target);
            let said = String::from_utf8_lossy(&output.stderr);
            let reason = said.lines().next_back().unwrap_or("it does not say why").to_owned();
            return Err(ConvertError::Tool { path: source.to_owned(), reason });
        }
        let synced = fs::File::open(target).and_then(|file| file.sync_all());
        Ok(synced.map_err(|error| host("write", target, error))?)
    }
}

/// Copies what is not zero.
fn copy_data(source: &Arc<Disk>, target: &Arc<Disk>, progress: &mut dyn FnMut(u64, u64)) -> Result<(), ConvertError> {
    let size = source.size();
    let failed = |what, disk: &Disk, offset| {
        let path = disk.path();
        move |source| ConvertError::Io { what, path, offset, source }
    };
    let mut buffer = vec![0; CHUNK as usize];
    let mut offset = 0;
    while let Some(data) = source.next_data(offset).map_err(failed("read", source, offset))? {
        offset = data.start;
        while offset < data.end {
            // Up to the next multiple, so that grains are clusters.
            let end = data.end.min((offset / CHUNK + 1) * CHUNK);
            let buffer = &mut buffer[..(end - offset) as usize];
            source.read_at(buffer, offset).map_err(failed("read", source, offset))?;
            write_nonzero(target, buffer, offset).map_err(failed("write", target, offset))?;
            offset = end;
            progress(offset, size);
        }
    }
    target.request::<()>(crate::Request::Flush).map_err(failed("write", target, size))?;
    progress(size, size);
    Ok(())
}

fn write_nonzero(target: &Disk, data: &[u8], mut offset: u64) -> Result<(), IoError> {
    let head = GRAIN - (offset % GRAIN as u64) as usize;
    let (first, rest) = data.split_at(head.min(data.len()));
    for grain in std::iter::once(first).chain(rest.chunks(GRAIN)) {
        if grain.iter().any(|byte| *byte != 0) {
            target.write_at(grain, offset)?;
        }
        offset += grain.len() as u64;
    }
    Ok(())
}
