//! The journal, which is kept by machine ID: journalctl(1) looks below the machine's own.

use std::{fs, io, os::unix::fs::symlink, path::Path};

use super::{Problems, note};

/// Where it is kept, and where as long as there is no other place.
const PLACES: [&str; 2] = ["/var/log/journal", "/run/log/journal"];

/// What was kept under the ID `old` is the new one's. journald goes on by the ID with which it was started, and finds its files
/// behind a link. (To start it anew takes a quarter of a second, and writes more memory than all else that is done to a copy.)
pub fn follow(old: &str, new: &str, problems: &mut Problems) {
    if [old, new].contains(&"") || old == new {
        return;
    }
    for place in PLACES {
        note(problems, "the journal", follow_in(Path::new(place), old, new));
    }
}

fn follow_in(place: &Path, old: &str, new: &str) -> io::Result<()> {
    match fs::rename(place.join(old), place.join(new)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        renamed => renamed.and_then(|()| symlink(new, place.join(old))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_by_the_old_name_and_by_the_new() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        follow_in(dir.path(), "a", "b").unwrap();
        assert!(!path("a").exists() && !path("b").exists());
        fs::create_dir(path("a")).unwrap();
        fs::write(path("a/system.journal"), "x").unwrap();
        follow_in(dir.path(), "a", "b").unwrap();
        // The copy of a copy.
        follow_in(dir.path(), "b", "c").unwrap();
        assert!(fs::symlink_metadata(path("c")).unwrap().is_dir());
        for name in ["a", "b", "c"] {
            assert_eq!(fs::read(path(name).join("system.journal")).unwrap(), b"x", "{name}");
        }
    }
}
