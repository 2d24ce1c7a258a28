//! Files that are there as a whole or not at all.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::{Result, anyhow};
use tempfile::NamedTempFile;

/// Where a file at `path` is to be written: links are followed. Fails if it cannot be.
pub fn check(path: &Path) -> Result<PathBuf> {
    // What is not there yet has no other name.
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    if fs::metadata(&target).is_ok_and(|m| !m.is_file()) {
        return Err(refused(path, "it is not a regular file"));
    }
    if target.file_name().is_none() {
        return Err(refused(path, "it names no file"));
    }
    temporary(&target).map_err(|error| refused(path, &error.to_string()))?;
    Ok(target)
}

fn refused(path: &Path, why: &str) -> anyhow::Error {
    anyhow!(
        "cannot write the profile to '{}': {why}: give --profile a file in a directory that you may write to",
        path.display()
    )
}

/// Puts `text` in the place of whatever is at `path`.
pub fn replace(path: &Path, text: &str) -> Result<()> {
    let write = || {
        let mut file = temporary(path)?;
        file.write_all(text.as_bytes())?;
        file.persist(path)?;
        Ok(())
    };
    write().map_err(|error: io::Error| anyhow!("cannot write '{}': {error}", path.display()))
}

/// A new file in the directory of `path`, that is deleted unless it gets a name.
fn temporary(path: &Path) -> io::Result<NamedTempFile> {
    let directory = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Opened by ourselves: errors are then the host's own, without the temporary file's name, which says nothing to anybody.
    let create = |path: &Path| File::options().write(true).create_new(true).open(path);
    tempfile::Builder::new().prefix(".purlin-").make_in(directory, create)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_and_a_link_stays_one() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let target = check(&link).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "old", "checking changes nothing");
        replace(&target, "new").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left");
    }

    #[test]
    fn what_cannot_be_replaced_is_refused() {
        for path in ["/", "/dev/null", "/no/such/directory/file", "..", ""] {
            let error = check(Path::new(path)).expect_err(path).to_string();
            assert!(error.starts_with(&format!("cannot write the profile to '{path}': ")), "{error}");
            assert!(!error.contains(".purlin-"), "{error}");
        }
    }
}
