//! An initramfs: a cpio archive in the `newc` format (Linux, Documentation/driver-api/early-userspace/buffer-format).

use std::io::{self, Write};

use cpio::newc::{Builder, ModeFileType, trailer};

/// Writes an initramfs, entry by entry. A directory comes before what is in it.
pub struct Initramfs<W: Write> {
    out: W,
    inode: u32,
}

impl<W: Write> Initramfs<W> {
    /// An archive that goes to `out`.
    pub fn new(out: W) -> Self {
        Self { out, inode: 0 }
    }

    /// A directory, mode 0755.
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, |b| b.mode(0o755).set_mode_file_type(ModeFileType::Directory), &[])
    }

    /// A regular file, with its permission bits.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        self.entry(path, |b| b.mode(mode).set_mode_file_type(ModeFileType::Regular), data)
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, |b| b.mode(0o777).set_mode_file_type(ModeFileType::Symlink), target.as_bytes())
    }

    /// A character device, mode 0600.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        let device = |b: Builder| b.mode(0o600).set_mode_file_type(ModeFileType::Char);
        self.entry(path, |b| device(b).rdev_major(major).rdev_minor(minor), &[])
    }

    /// Ends the archive.
    pub fn finish(self) -> io::Result<W> {
        trailer(self.out)
    }

    fn entry(&mut self, path: &str, shape: impl FnOnce(Builder) -> Builder, data: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let size = u32::try_from(data.len()).map_err(|_| io::Error::other("file too large for an initramfs"))?;
        let mut writer = shape(Builder::new(path).ino(self.inode).nlink(1)).write(&mut self.out, size);
        writer.write_all(data)?;
        writer.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        process::{Command, Stdio},
    };

    use super::*;

    /// GNU cpio is the oracle.
    #[test]
    fn cpio_lists_what_was_written() {
        let mut archive = Initramfs::new(Vec::new());
        archive.directory("dev").unwrap();
        archive.character_device("dev/console", 5, 1).unwrap();
        archive.file("init", 0o755, b"#!/bin/sh\n").unwrap();
        archive.symlink("sh", "init").unwrap();
        let bytes = archive.finish().unwrap();

        let mut cpio = Command::new("cpio");
        cpio.args(["-itvn", "--quiet"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = cpio.spawn().expect("cpio is installed (cargo xtask test installs it)");
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let listing = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let lines: Vec<Vec<&str>> = listing.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!((lines[0][0], lines[0][8]), ("drwxr-xr-x", "dev"), "{listing}");
        assert_eq!((lines[1][0], lines[1][4], lines[1][5]), ("crw-------", "5,", "1"), "{listing}");
        assert_eq!((lines[2][0], lines[2][4], lines[2][8]), ("-rwxr-xr-x", "10", "init"), "{listing}");
        assert_eq!(&lines[3][8..], ["sh", "->", "init"], "{listing}");
    }
}
