//! Files, from the host and to it.

use std::{
    ffi::OsStr,
    fs::{self, File, Metadata, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use purlin_agent::protocol::{self, AgentMessage, Empty, Failed, FailureKind, HostMessage, Pull, Push};
use rustix::fs::OFlags;

use crate::{
    link::{CHUNK, End, Link},
    users,
};

/// The mode of a new file.
const MODE: u32 = 0o644;

/// Takes a file of the host's.
pub fn push(link: &mut Link, push: &Push) -> Result<(), End> {
    let path = absolute(&push.path)?;
    let failed = |error: io::Error| End::from(failure("write", path, &error));
    let mut target = Target::open(path, push)?;
    link.send(AgentMessage::Ready(Empty {}))?;
    let mut size = 0;
    loop {
        match link.receive()? {
            HostMessage::Data(data) => {
                target.file.write_all(&data).map_err(failed)?;
                size += data.len() as u64;
            }
            HostMessage::DataEnd(_) => break,
            _ => return Err(End::protocol("this does not belong into a file")),
        }
    }
    target.finish().map_err(failed)?;
    link.send(AgentMessage::Stored(size))
}

/// Gives a file to the host.
pub fn pull(link: &mut Link, pull: &Pull) -> Result<(), End> {
    let path = absolute(&pull.path)?;
    let failed = |error: io::Error| End::from(failure("read", path, &error));
    let (mut file, metadata) = open_regular(path)?;
    link.send(AgentMessage::File(protocol::File {
        size: metadata.size(),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        modified: metadata.mtime(),
    }))?;
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return link.send(AgentMessage::DataEnd(Empty {})),
            Ok(count) => link.send(AgentMessage::Data(chunk[..count].to_vec()))?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Opens a regular file. To open others may do something already, or wait: what it is is seen before, and afterwards.
fn open_regular(path: &Path) -> Result<(File, Metadata), Failed> {
    let failed = |error: io::Error| failure("read", path, &error);
    let regular = |metadata: Metadata| if metadata.is_file() { Ok(metadata) } else { Err(no_file(path, &metadata)) };
    fs::metadata(path).map_err(failed).and_then(regular)?;
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed).and_then(regular)?;
    Ok((file, metadata))
}

/// What is being written.
struct Target {
    file: File,
    /// Where it is until it is complete; a device has no such place.
    temporary: Option<Temporary>,
}

impl Target {
    fn open(path: &Path, push: &Push) -> Result<Self, Failed> {
        let failed = |error: io::Error| failure("write", path, &error);
        let existing = match fs::metadata(path) {
            Ok(metadata) => Some(metadata),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        match &existing {
            Some(metadata) if is_device(metadata) => return Self::open_device(path).map_err(failed),
            // To write to a FIFO that nobody reads would take for ever.
            Some(metadata) if !metadata.is_file() => return Err(no_file(path, metadata)),
            None if path.as_os_str().as_bytes().ends_with(b"/") => {
                return Err(Failed::new(
                    FailureKind::IsADirectory,
                    format!("{} names a directory: name the file in it", shown(path)),
                ));
            }
            _ => {}
        }
        let (uid, gid) = owner(push, existing.as_ref())?;
        let mode = push.mode.unwrap_or_else(|| existing.as_ref().map_or(MODE, Metadata::mode)) & 0o7777;
        if let Some(directory) = path.parent().filter(|_| push.make_dirs && existing.is_none()) {
            fs::create_dir_all(directory).map_err(failed)?;
        }
        let (file, temporary) = Temporary::beside(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => no_directory(path),
            _ => failed(error),
        })?;
        // A change of the owner takes bits of the mode away.
        fchown(&file, Some(uid), Some(gid)).map_err(failed)?;
        file.set_permissions(Permissions::from_mode(mode)).map_err(failed)?;
        Ok(Self { file, temporary: Some(temporary) })
    }

    fn open_device(path: &Path) -> io::Result<Self> {
        // A terminal must not become the agent's own.
        let flags = OFlags::NOCTTY.bits() as i32;
        Ok(Self { file: OpenOptions::new().write(true).custom_flags(flags).open(path)?, temporary: None })
    }

    /// Puts it into its place.
    fn finish(self) -> io::Result<()> {
        self.temporary.map_or(Ok(()), Temporary::persist)
    }
}

fn is_device(metadata: &Metadata) -> bool {
    metadata.file_type().is_char_device() || metadata.file_type().is_block_device()
}

/// The numbers of the owner and the group.
fn owner(push: &Push, existing: Option<&Metadata>) -> Result<(u32, u32), Failed> {
    let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let (mut uid, mut gid) = existing.map_or(own, |metadata| (metadata.uid(), metadata.gid()));
    if !push.user.is_empty() {
        let user = users::find(&push.user)?;
        (uid, gid) = (user.uid, user.gid);
    }
    if !push.group.is_empty() {
        gid = users::group(&push.group)?;
    }
    Ok((uid, gid))
}

/// Replaces the content of a file, all at once; mode and owner stay, or are a new file's.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let existing = fs::metadata(path).ok();
    let (mut file, temporary) = Temporary::beside(path)?;
    let mode = existing.as_ref().map_or(MODE, Metadata::mode) & 0o7777;
    if let Some(existing) = existing {
        fchown(&file, Some(existing.uid()), Some(existing.gid()))?;
    }
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(content)?;
    match temporary.persist() {
        // Something is mounted there.
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => fs::write(path, content),
        persisted => persisted,
    }
}

/// A file that is not complete, beside its place. It is gone if it never is.
struct Temporary {
    path: PathBuf,
    place: PathBuf,
}

impl Temporary {
    /// Makes one, which only root can read, for the file at `place`, or where the symbolic link there leads.
    fn beside(place: &Path) -> io::Result<(File, Self)> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let place = fs::canonicalize(place).or_else(|_| followed(place))?;
        let (directory, name) = (place.parent(), place.file_name());
        let (Some(directory), Some(name)) = (directory, name) else { return Err(io::ErrorKind::IsADirectory.into()) };
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // Not longer than the longest name (255 bytes), whatever that is called.
        let name = &name.as_bytes()[..name.len().min(200)];
        let mut hidden = OsStr::new(".").to_owned();
        hidden.push(OsStr::from_bytes(name));
        hidden.push(format!(".purlin-{}-{number}", std::process::id()));
        let path = directory.join(hidden);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        Ok((file, Self { path, place }))
    }

    fn persist(self) -> io::Result<()> {
        fs::rename(&self.path, &self.place)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // It is not there if it is in its place.
        let _ = fs::remove_file(&self.path);
    }
}

/// Where a file would be made: a symbolic link may lead to where nothing is yet.
fn followed(path: &Path) -> io::Result<PathBuf> {
    match fs::read_link(path) {
        Ok(target) => {
            let target = path.parent().unwrap_or(path).join(target);
            // One link of links to nothing is followed; who makes more of them means nothing by it.
            if target.is_symlink() { Err(io::ErrorKind::NotFound.into()) } else { Ok(target) }
        }
        Err(_) => Ok(path.to_owned()),
    }
}

fn absolute(path: &[u8]) -> Result<&Path, Failed> {
    let path = Path::new(OsStr::from_bytes(path));
    match path.is_absolute() {
        true => Ok(path),
        false => Err(Failed::new(FailureKind::Invalid, format!("{} is no absolute path in the guest", shown(path)))),
    }
}

fn shown(path: &Path) -> String {
    format!("'{}'", path.as_os_str().as_bytes().escape_ascii())
}

fn no_directory(path: &Path) -> Failed {
    let directory = shown(path.parent().unwrap_or(path));
    Failed::new(FailureKind::NoSuchDirectory, format!("there is no directory {directory} in the guest"))
}

fn no_file(path: &Path, metadata: &Metadata) -> Failed {
    let path = shown(path);
    match metadata.is_dir() {
        true => {
            Failed::new(FailureKind::IsADirectory, format!("{path} is a directory in the guest: name the file in it"))
        }
        false => Failed::new(FailureKind::Other, format!("{path} is no regular file in the guest")),
    }
}

fn failure(action: &str, path: &Path, error: &io::Error) -> Failed {
    use io::ErrorKind as Kind;
    let kind = match error.kind() {
        Kind::NotFound => FailureKind::NoSuchFile,
        Kind::NotADirectory => FailureKind::NotADirectory,
        Kind::IsADirectory => FailureKind::IsADirectory,
        Kind::PermissionDenied | Kind::ReadOnlyFilesystem => FailureKind::Permission,
        Kind::StorageFull | Kind::QuotaExceeded => FailureKind::NoSpace,
        Kind::InvalidInput | Kind::InvalidFilename => FailureKind::Invalid,
        _ => FailureKind::Other,
    };
    let text = error.to_string();
    let reason = text.split(" (os error").next().unwrap_or(&text);
    Failed::new(kind, format!("cannot {action} {} in the guest: {reason}", shown(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replacing_keeps_the_mode_and_follows_links() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        fs::write(&file, "old").unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("file", &link).unwrap();
        replace(&link, b"new").unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(&file).unwrap(), b"new");
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o640);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_link_to_nothing_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("file", &link).unwrap();
        replace(&link, b"new").unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"new");
    }
}
