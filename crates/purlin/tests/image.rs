//! `purlin image`, with a store of its own.

mod support;

use std::{fs, path::PathBuf, process::Output};

use support::{assert_one_line, purlin, stderr};
use tempfile::TempDir;

/// A home with an image `debian-12`, which is imported instead of built.
struct Home {
    dir: TempDir,
}

impl Home {
    fn new() -> Self {
        let home = Self { dir: tempfile::tempdir().unwrap() };
        fs::write(home.path("disk.raw"), vec![1; 1 << 20]).unwrap();
        home.succeed(&["import", &home.text("disk.raw"), "--name", "debian-12"]);
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn image(&self, arguments: &[&str]) -> Output {
        purlin().arg("image").args(arguments).env("PURLIN_HOME", self.path("home")).output().unwrap()
    }

    #[track_caller]
    fn succeed(&self, arguments: &[&str]) -> String {
        let output = self.image(arguments);
        assert_eq!(output.status.code(), Some(0), "{:#?}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// What is where images are.
    fn store(&self) -> usize {
        fs::read_dir(self.path("home/data/images")).unwrap().count()
    }
}

#[test]
fn an_image_is_known_by_what_it_is_built_as() {
    let home = Home::new();
    for name in ["debian", "debian:12", "debian-12"] {
        assert!(home.succeed(&["info", name]).contains("debian-12"), "{name}");
        let copy = home.text(&format!("{name}.raw"));
        home.succeed(&["convert", name, &copy]);
        assert_eq!(fs::read(copy).unwrap(), vec![1; 1 << 20]);
    }
    home.succeed(&["delete", "debian"]);
    assert_one_line(&home.image(&["info", "debian"]), 1, &["no image 'debian'"]);
    assert_one_line(&home.image(&["delete", "debian"]), 1, &["no image 'debian'"]);
}

#[test]
fn no_lock_stays_behind() {
    let home = Home::new();
    assert_eq!(home.store(), 1, "the image");
    assert_eq!(home.image(&["import", &home.text("nosuch.raw")]).status.code(), Some(1));
    assert_eq!(home.store(), 1);
    home.succeed(&["delete", "debian-12"]);
    assert_eq!(home.store(), 0);
}

#[test]
fn what_cannot_be_imported_or_converted() {
    let home = Home::new();
    let page = home.text("page.qcow2");
    fs::write(&page, "<html>").unwrap();
    let words = ["its name says qcow2, but it does not begin as one", "--format raw"];
    assert_one_line(&home.image(&["import", &page]), 1, &words);
    assert_one_line(&home.image(&["import", "ftp://x.test/disk.img"]), 2, &["only http and https", "ftp://x.test"]);
    assert_one_line(&home.image(&["convert", "debian", &page]), 1, &["page.qcow2", "there already", "another file"]);
    assert_eq!(fs::read_to_string(page).unwrap(), "<html>");
}
