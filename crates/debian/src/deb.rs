//! Files out of a `.deb`.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{ChildStdout, Command, Stdio},
};

use crate::Error;

/// Writes the first regular file of `deb` whose path within the package (`boot/vmlinuz-6.1.0-1`) is `wanted` to `to`.
/// `name` says what it is, for the error.
pub fn extract(deb: &Path, name: &'static str, wanted: impl Fn(&Path) -> bool, to: &Path) -> Result<(), Error> {
    match with_files(deb, |archive| copy_first(archive, wanted, to))? {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::Contents { package: file_name(deb), wanted: name }),
        Err(error) => Err(Error::file("write", to)(error)),
    }
}

/// Writes every regular file of `deb` whose path within the package is `wanted` into the directory `to`, under its own
/// name. There may be none.
pub fn extract_all(deb: &Path, wanted: impl Fn(&Path) -> bool, to: &Path) -> Result<(), Error> {
    with_files(deb, |archive| copy_all(archive, wanted, to))?.map_err(Error::file("write into", to))
}

/// Hands the package's files over, as a tar archive.
fn with_files<T>(deb: &Path, act: impl FnOnce(ChildStdout) -> T) -> Result<T, Error> {
    let mut unpacker = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(deb)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|_| Error::NotDebian("dpkg-deb"))?;
    let stdout = unpacker.stdout.take().expect("stdout was asked to be a pipe");
    let result = act(stdout);
    // It may not have been read to its end, and die of the closed pipe: its status tells nothing.
    let _ = unpacker.wait();
    Ok(result)
}

fn copy_first(archive: impl io::Read, wanted: impl Fn(&Path) -> bool, to: &Path) -> io::Result<bool> {
    for entry in tar::Archive::new(archive).entries()? {
        let mut entry = entry?;
        if is_file(&entry, &path_of(&entry)?, &wanted) {
            copy(&mut entry, to)?;
            return Ok(true);
        }
    }
    Ok(false)
}

fn copy_all(archive: impl io::Read, wanted: impl Fn(&Path) -> bool, to: &Path) -> io::Result<()> {
    for entry in tar::Archive::new(archive).entries()? {
        let mut entry = entry?;
        let path = path_of(&entry)?;
        if is_file(&entry, &path, &wanted) {
            copy(&mut entry, &to.join(path.file_name().unwrap_or_default()))?;
        }
    }
    Ok(())
}

/// Where it is within the package.
fn path_of(entry: &tar::Entry<'_, impl io::Read>) -> io::Result<PathBuf> {
    Ok(entry.path()?.components().skip_while(|c| c.as_os_str() == ".").collect())
}

fn is_file(entry: &tar::Entry<'_, impl io::Read>, path: &Path, wanted: impl Fn(&Path) -> bool) -> bool {
    entry.header().entry_type().is_file() && wanted(path)
}

fn copy(entry: &mut tar::Entry<'_, impl io::Read>, to: &Path) -> io::Result<()> {
    let size = entry.size();
    let copied = io::copy(entry, &mut File::create(to)?)?;
    // At the end of a truncated archive the crate ends the entry without an error.
    if copied == size { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Unpacks all of `deb` into the directory `to`, which is made if need be.
pub fn unpack(deb: &Path, to: &Path) -> Result<(), Error> {
    fs::create_dir_all(to).map_err(Error::file("create", to))?;
    let output = Command::new("dpkg-deb").arg("-x").arg(deb).arg(to).output();
    let output = output.map_err(|_| Error::NotDebian("dpkg-deb"))?;
    if output.status.success() {
        return Ok(());
    }
    let reason = String::from_utf8_lossy(&output.stderr);
    Err(Error::file("unpack into", to)(match reason.contains("No space left on device") {
        true => io::ErrorKind::StorageFull.into(),
        false => io::Error::other(reason.trim().to_owned()),
    }))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, data) in [("./boot/System.map-1", &b"map"[..]), ("./boot/vmlinuz-1", b"kernel")] {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, path, data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn takes_the_file_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("vmlinuz");
        assert!(copy_first(&archive()[..], |p| p.starts_with("boot") && p.ends_with("vmlinuz-1"), &to).unwrap());
        assert_eq!(fs::read(&to).unwrap(), b"kernel");
        assert!(!copy_first(&archive()[..], |p| p.ends_with("initrd"), &to).unwrap());
    }

    #[test]
    fn takes_all_files_that_are_wanted() {
        let dir = tempfile::tempdir().unwrap();
        copy_all(&archive()[..], |path| path.starts_with("boot"), dir.path()).unwrap();
        for (name, content) in [("System.map-1", &b"map"[..]), ("vmlinuz-1", b"kernel")] {
            assert_eq!(fs::read(dir.path().join(name)).unwrap(), content);
        }
        let none = tempfile::tempdir().unwrap();
        copy_all(&archive()[..], |path| path.starts_with("lib"), none.path()).unwrap();
        assert_eq!(fs::read_dir(none.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_truncated_package_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let whole = archive();
        let cut = &whole[..1024 + 512 + 3];
        assert!(copy_first(cut, |p| p.ends_with("vmlinuz-1"), &dir.path().join("x")).is_err());
    }
}
