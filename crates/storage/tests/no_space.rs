//! A host without room: the request says so, nothing else is lost, and it can be made again.

mod common;

use std::{env, fs, path::Path, process::Command};

use common::{KIB, MIB, qemu_img_ok, text};
use purlin_storage::{Disk, DiskSpec, Format, NewImage, Request};

const DIRECTORY: &str = "PURLIN_TEST_SMALL_DIRECTORY";
const SIZE: u64 = 16 * MIB;

/// The rest of this file runs where a file system of 6 MiB can be mounted without being root.
#[test]
fn out_of_space() {
    let directory = tempfile::tempdir().unwrap();
    let mount = "mount -t tmpfs -o size=6m none \"$0\" && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", mount]).arg(directory.path());
    command.arg(env::current_exe().unwrap()).args(["--exact", "on_a_small_file_system", "--ignored", "--nocapture"]);
    let output = command.env(DIRECTORY, directory.path()).output().expect("unshare (package util-linux) is needed");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "out_of_space runs it on a small file system"]
fn on_a_small_file_system() {
    let directory = env::var(DIRECTORY).expect("it is run by out_of_space");
    for format in [Format::Raw, Format::Qcow2] {
        full_and_again(Path::new(&directory), format);
    }
}

fn full_and_again(directory: &Path, format: Format) {
    let ballast = directory.join("ballast");
    fs::write(&ballast, vec![1; 2 * MIB as usize]).unwrap();
    let path = directory.join("disk");
    NewImage::empty(&path, format, SIZE).create().unwrap();
    let disk = Disk::open(&DiskSpec::new(&path).format(format)).unwrap();
    let mut content = vec![0; SIZE as usize];
    let block = |number: u64| vec![number as u8 + 1; 100 * KIB as usize];

    let failed = (0..100).find(|number| {
        let offset = number * block(0).len() as u64;
        match disk.write_at(&block(*number), offset) {
            Ok(()) => content[offset as usize..][..block(0).len()].copy_from_slice(&block(*number)),
            Err(error) => {
                assert!(error.is_out_of_space(), "{error}");
                return true;
            }
        }
        false
    });
    let failed = failed.expect("6 MiB are not enough for 10 MB");
    assert!(failed > 5);
    // What fits nowhere new still can be overwritten and read.
    disk.write_at(&[99; 512], 4096).unwrap();
    content[4096..4096 + 512].fill(99);
    let mut read = vec![0; failed as usize * block(0).len()];
    disk.read_at(&mut read, 0).unwrap();
    assert!(read == content[..read.len()]);

    fs::remove_file(ballast).unwrap();
    let offset = failed * block(0).len() as u64;
    disk.write_at(&block(failed), offset).unwrap();
    content[offset as usize..][..block(0).len()].copy_from_slice(&block(failed));
    disk.request::<()>(Request::Flush).unwrap();
    drop(disk);

    if format == Format::Qcow2 {
        qemu_img_ok(&["check", "-f", "qcow2", text(&path)]);
    }
    let disk = Disk::open(&DiskSpec::new(&path).format(format).read_only()).unwrap();
    let mut read = vec![0; SIZE as usize];
    disk.read_at(&mut read, 0).unwrap();
    assert!(read == content);
    drop(disk);
    fs::remove_file(path).unwrap();
}
