//! Images that are in use, broken or not what they seem: one clear line each, and never a panic.

mod common;

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use common::{KIB, MIB, qemu_img, qemu_img_ok, text};
use purlin_storage::{Disk, DiskSpec, Format, NewImage, OpenError, Request};

/// What opening it says; exactly one line.
fn refused(spec: &DiskSpec) -> String {
    let line = Disk::open(spec).expect_err("it is to be refused").to_string();
    assert!(!line.contains('\n'), "{line}");
    line
}

#[track_caller]
fn assert_refused(spec: &DiskSpec, why: &str) {
    let line = refused(spec);
    assert!(line.contains(why), "{line}");
    assert!(line.contains(spec.path.file_name().unwrap().to_str().unwrap()), "{line} does not name the file");
}

fn qcow2(directory: &Path) -> PathBuf {
    let path = directory.join("disk.qcow2");
    NewImage::empty(&path, Format::Qcow2, 8 * MIB).create().unwrap();
    path
}

#[test]
fn an_image_is_written_by_one_only() {
    let directory = tempfile::tempdir().unwrap();
    let path = qcow2(directory.path());
    let writer = Disk::open(&DiskSpec::new(&path)).unwrap();
    assert_refused(&DiskSpec::new(&path), "in use");
    assert_refused(&DiskSpec::new(&path).read_only(), "in use");
    let (status, said) = qemu_img(&["check", text(&path)]);
    assert!(status != 0 && said.contains("lock"), "{said}");
    drop(writer);

    let reader = Disk::open(&DiskSpec::new(&path).read_only()).unwrap();
    let _another = Disk::open(&DiskSpec::new(&path).read_only()).unwrap();
    assert_refused(&DiskSpec::new(&path), "in use");
    qemu_img_ok(&["check", text(&path)]);
    let (status, said) = qemu_img(&["resize", text(&path), "16M"]);
    assert!(status != 0 && said.contains("lock"), "{said}");
    drop(reader);
}

#[test]
fn an_image_below_is_not_written() {
    let directory = tempfile::tempdir().unwrap();
    let base = qcow2(directory.path());
    let overlay = directory.path().join("overlay.qcow2");
    NewImage::overlay(&overlay, &base, Format::Qcow2).create().unwrap();
    let _first = Disk::open(&DiskSpec::new(&overlay)).unwrap();
    assert_refused(&DiskSpec::new(&base), "in use");
    // Two overlays of one image are what it is for.
    let second = directory.path().join("second.qcow2");
    NewImage::overlay(&second, &base, Format::Qcow2).create().unwrap();
    Disk::open(&DiskSpec::new(&second)).unwrap();
}

/// qemu-io with the image open, until it is dropped.
struct QemuIo(Child);

impl QemuIo {
    fn open(path: &Path, options: &[&str]) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(options).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("qemu-io (package qemu-utils) is needed");
        // It answers when the image is open.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut answer = [0; 1];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut answer).unwrap();
        Self(child)
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_image_that_qemu_uses() {
    let directory = tempfile::tempdir().unwrap();
    let path = qcow2(directory.path());
    let writer = QemuIo::open(&path, &["-f", "qcow2"]);
    assert_refused(&DiskSpec::new(&path), "in use");
    assert_refused(&DiskSpec::new(&path).read_only(), "in use");
    drop(writer);
    let reader = QemuIo::open(&path, &["-f", "qcow2", "-r"]);
    assert_refused(&DiskSpec::new(&path), "in use");
    Disk::open(&DiskSpec::new(&path).read_only()).unwrap();
    drop(reader);
    Disk::open(&DiskSpec::new(&path)).unwrap();
}

#[test]
fn no_image_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let in_directory = |name: &str| directory.path().join(name);
    assert_refused(&DiskSpec::new(in_directory("missing.raw")), "No such file");
    fs::create_dir(in_directory("directory.raw")).unwrap();
    assert_refused(&DiskSpec::new(in_directory("directory.raw")), "directory");
    assert_refused(&DiskSpec::new(in_directory("directory.raw")).read_only(), "neither a regular file nor a block");
    assert_refused(&DiskSpec::new("/dev/null"), "neither a regular file nor a block device");
    for name in ["empty.raw", "empty.qcow2"] {
        File::create(in_directory(name)).unwrap();
        assert_refused(&DiskSpec::new(in_directory(name)), "is empty");
    }
    fs::write(in_directory("odd.img"), [0; 1000]).unwrap();
    assert_refused(&DiskSpec::new(in_directory("odd.img")), "no multiple of 512");
}

#[test]
fn a_format_is_never_guessed() {
    let directory = tempfile::tempdir().unwrap();
    let nameless = directory.path().join("disk");
    File::create(&nameless).unwrap().set_len(MIB).unwrap();
    assert_refused(&DiskSpec::new(&nameless), "format=raw or format=qcow2");
    Disk::open(&DiskSpec::new(&nameless).format(Format::Raw)).unwrap();

    let guest_made = directory.path().join("disk.img");
    fs::rename(qcow2(directory.path()), &guest_made).unwrap();
    assert_refused(&DiskSpec::new(&guest_made), "say format=qcow2");
    let raw = Disk::open(&DiskSpec::new(&guest_made).format(Format::Raw)).unwrap();
    assert_eq!(raw.size(), fs::metadata(&guest_made).unwrap().len());
    drop(raw);
    assert_eq!(Disk::open(&DiskSpec::new(&guest_made).format(Format::Qcow2)).unwrap().size(), 8 * MIB);
    assert_refused(&DiskSpec::new(&nameless).format(Format::Qcow2), "does not begin as one");
}

#[test]
fn serial_numbers_that_no_guest_could_see() {
    let directory = tempfile::tempdir().unwrap();
    let path = qcow2(directory.path());
    for serial in ["123456789012345678901", "a b", "é", "a\n"] {
        let line = refused(&DiskSpec { serial: Some(serial.into()), ..DiskSpec::new(&path) });
        assert!(line.contains("20 printable"), "{line}");
    }
    let serial = Some("12345678901234567890".to_owned());
    assert_eq!(Disk::open(&DiskSpec { serial, ..DiskSpec::new(&path) }).unwrap().serial(), "12345678901234567890");
}

/// Writes big-endian `value` at `offset`.
fn patch(path: &Path, offset: u64, value: &[u8]) {
    File::options().write(true).open(path).unwrap().write_all_at(value, offset).unwrap();
}

#[test]
fn broken_headers() {
    let directory = tempfile::tempdir().unwrap();
    let path = qcow2(directory.path());
    let whole = fs::read(&path).unwrap();
    // Offsets of fields: docs/interop/qcow2.txt.
    let cases: [(u64, &[u8], &str); 11] = [
        (4, &9_u32.to_be_bytes(), "version 9"),
        (20, &40_u32.to_be_bytes(), "clusters of 2^40"),
        (24, &u64::MAX.to_be_bytes(), "too small for its size"),
        (32, &1_u32.to_be_bytes(), "encrypted"),
        (36, &u32::MAX.to_be_bytes(), "impossible size"),
        (40, &1_u64.to_be_bytes(), "not where one can be"),
        (40, &(1_u64 << 40).to_be_bytes(), "cut off"),
        (56, &u32::MAX.to_be_bytes(), "impossible size"),
        (72, &1_u64.to_be_bytes(), "not closed cleanly"),
        (72, &4_u64.to_be_bytes(), "in another file"),
        (72, &(1_u64 << 60).to_be_bytes(), "not known here"),
    ];
    for (offset, value, why) in cases {
        fs::write(&path, &whole).unwrap();
        patch(&path, offset, value);
        assert_refused(&DiskSpec::new(&path), why);
        assert_refused(&DiskSpec::new(&path).read_only(), why);
    }
    for length in [3, 50, 100, 70_000] {
        fs::write(&path, &whole[..length]).unwrap();
        refused(&DiskSpec::new(&path));
    }
}

#[test]
fn a_truncated_image() {
    let directory = tempfile::tempdir().unwrap();
    let path = qcow2(directory.path());
    let disk = Disk::open(&DiskSpec::new(&path)).unwrap();
    disk.write_at(&vec![7; 2 * MIB as usize], MIB).unwrap();
    drop(disk);
    let length = fs::metadata(&path).unwrap().len();
    File::options().write(true).open(&path).unwrap().set_len(length - 500 * KIB).unwrap();
    assert_refused(&DiskSpec::new(&path), "cut off");
}

#[test]
fn backing_files() {
    let directory = tempfile::tempdir().unwrap();
    let in_directory = |name: &str| directory.path().join(name);
    let base = qcow2(directory.path());
    let overlay = in_directory("overlay.qcow2");
    let make = |path: &Path, backing: &str, options: &[&str]| {
        let arguments = [&["create", "-q", "-u", "-f", "qcow2", "-b", backing], options, &[text(path), "8M"]].concat();
        let _ = fs::remove_file(path);
        qemu_img_ok(&arguments);
    };
    // Relative names are relative to the image that has them.
    make(&overlay, "disk.qcow2", &["-F", "qcow2"]);
    Disk::open(&DiskSpec::new(&overlay)).unwrap();
    let line = refused(&DiskSpec::new(&overlay).standalone());
    assert!(line.contains("depends on another file"), "{line}");

    fs::rename(&base, in_directory("moved.qcow2")).unwrap();
    let line = refused(&DiskSpec::new(&overlay));
    assert!(line.contains("disk.qcow2', the backing file of") && line.contains("overlay.qcow2"), "{line}");
    fs::rename(in_directory("moved.qcow2"), &base).unwrap();

    make(&overlay, "nbd://host/disk", &["-F", "raw"]);
    assert_refused(&DiskSpec::new(&overlay), "is no file's name");
    make(&overlay, "disk.vmdk", &["-F", "vmdk"]);
    assert_refused(&DiskSpec::new(&overlay), "has the format 'vmdk'");

    // A loop of two, by each other's name.
    let other = in_directory("other.qcow2");
    make(&overlay, "other.qcow2", &["-F", "qcow2"]);
    make(&other, "overlay.qcow2", &["-F", "qcow2"]);
    assert_refused(&DiskSpec::new(&overlay), "through a loop");
}

#[test]
fn a_backing_file_without_a_format() {
    let directory = tempfile::tempdir().unwrap();
    let overlay = directory.path().join("overlay.qcow2");
    NewImage::overlay(&overlay, qcow2(directory.path()), Format::Qcow2).create().unwrap();
    // The extension's type, where it says that it is the backing format, becomes an unknown one.
    let image = fs::read(&overlay).unwrap();
    let extension = image.windows(4).position(|w| w == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    patch(&overlay, extension as u64, &[1, 2, 3, 4]);
    assert_refused(&DiskSpec::new(&overlay), "does not say which format");
}

#[test]
fn chains_of_64_and_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let mut top = qcow2(directory.path());
    for depth in 2..=64 {
        let overlay = directory.path().join(format!("{depth}.qcow2"));
        NewImage::overlay(&overlay, &top, Format::Qcow2).create().unwrap();
        top = overlay;
    }
    Disk::open(&DiskSpec::new(&top)).unwrap();
    let one_more = directory.path().join("65.qcow2");
    qemu_img_ok(&["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", text(&top), text(&one_more), "8M"]);
    assert_refused(&DiskSpec::new(&one_more), "more than 64 images");
}

#[test]
fn requests_that_do_not_fit() {
    let directory = tempfile::tempdir().unwrap();
    let path = qcow2(directory.path());
    let disk = Disk::open(&DiskSpec::new(&path)).unwrap();
    let invalid = rustix::io::Errno::INVAL;
    assert_eq!(disk.write_at(&[1; 1024], 8 * MIB - 512).unwrap_err().errno(), invalid);
    assert_eq!(disk.read_at(&mut [0; 512], u64::MAX - 100).unwrap_err().errno(), invalid);
    let discard: Request<'_> = Request::Discard { offset: MIB, length: u64::MAX };
    assert_eq!(disk.request(discard).unwrap_err().errno(), invalid);
    drop(disk);
    let disk = Disk::open(&DiskSpec::new(&path).read_only()).unwrap();
    assert_eq!(disk.write_at(&[1; 512], 0).unwrap_err().errno(), rustix::io::Errno::ROFS);
    assert_eq!(disk.request::<()>(Request::Flush), Ok(()));
}

#[test]
fn a_new_image_takes_nobodys_place() {
    let directory = tempfile::tempdir().unwrap();
    let path = qcow2(directory.path());
    let before = fs::read(&path).unwrap();
    let error = NewImage::empty(&path, Format::Raw, MIB).create().unwrap_err();
    assert!(matches!(error, OpenError::Host { what: "create", .. }), "{error}");
    assert_eq!(fs::read(&path).unwrap(), before);
    let odd = directory.path().join("odd.raw");
    assert!(NewImage::empty(&odd, Format::Raw, 1000).create().is_err());
    assert!(!odd.exists());
}
