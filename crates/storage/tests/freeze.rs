//! Disks that go on with overlays, with qemu-img as the oracle.

mod common;

use std::{fs, path::Path};

use common::{KIB, Kind, MIB, Rng, assert_image, qemu_img, text};
use purlin_storage::{Disk, DiskSpec, Format, FrozenDisk, NewImage, OpenError, Request};

const SIZE: u64 = 8 * MIB;

fn write(disk: &Disk, content: &mut [u8], rng: &mut Rng) {
    for _ in 0..20 {
        let offset = rng.below(SIZE / KIB - 100) * KIB;
        let data = &mut content[offset as usize..][..(rng.below(100) * KIB) as usize];
        rng.fill(data);
        disk.write_at(data, offset).unwrap();
    }
    let (offset, length) = (rng.below(SIZE / KIB - 100) * KIB, 64 * KIB);
    disk.request::<()>(Request::WriteZeroes { offset, length, unmap: true }).unwrap();
    content[offset as usize..][..length as usize].fill(0);
}

fn freeze(disk: &Disk, overlay: &Path) -> FrozenDisk {
    let overlay = disk.overlay(overlay).unwrap();
    disk.switch(overlay).unwrap().make()
}

fn assert_content(disk: &Disk, content: &[u8]) {
    let mut bytes = vec![0; SIZE as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    assert!(bytes == content);
}

#[test]
fn the_image_stays_and_the_disk_goes_on() {
    for kind in [Kind::Raw, Kind::Qcow2, Kind::Overlays, Kind::OldQcow2, Kind::SmallClusters] {
        let directory = tempfile::tempdir().unwrap();
        let mut rng = Rng::new(kind as u64 + 7);
        let (spec, mut content) = kind.create(directory.path(), SIZE, &mut rng);
        let disk = Disk::open(&spec).unwrap();
        let mut moments = Vec::new();
        for round in 0..3 {
            write(&disk, &mut content, &mut rng);
            let overlay = directory.path().join(format!("overlay-{round}.qcow2"));
            let before = disk.path();
            let frozen = freeze(&disk, &overlay);
            assert_eq!((&frozen.path, disk.path()), (&before, overlay), "{kind:?}");
            moments.push((frozen, content.clone()));
            assert_content(&disk, &content);
        }
        write(&disk, &mut content, &mut rng);
        assert_content(&disk, &content);
        // Frozen images can be read while the disk is in use, by QEMU's tools too.
        for (frozen, content) in &moments {
            assert_image(&frozen.path, frozen.format, content);
        }
        disk.request::<()>(Request::Flush).unwrap();
        let path = disk.path();
        drop(disk);
        assert_image(&path, Format::Qcow2, &content);
    }
}

#[test]
fn clones_stand_on_a_frozen_image() {
    let directory = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(3);
    let (spec, mut content) = Kind::Qcow2.create(directory.path(), SIZE, &mut rng);
    let disk = Disk::open(&spec).unwrap();
    write(&disk, &mut content, &mut rng);
    let frozen = freeze(&disk, &directory.path().join("a.qcow2"));
    let clones = ["b.qcow2", "c.qcow2"].map(|name| {
        let path = directory.path().join(name);
        NewImage::overlay(&path, &frozen.path, frozen.format).create().unwrap();
        (Disk::open(&DiskSpec::new(path)).unwrap(), content.clone())
    });
    write(&disk, &mut content, &mut rng);
    for (clone, mut expected) in clones {
        assert_content(&clone, &expected);
        write(&clone, &mut expected, &mut rng);
        assert_content(&clone, &expected);
    }
    assert_content(&disk, &content);
}

#[test]
fn locks_follow() {
    let directory = tempfile::tempdir().unwrap();
    let (spec, _) = Kind::Qcow2.create(directory.path(), SIZE, &mut Rng::new(1));
    let disk = Disk::open(&spec).unwrap();
    assert_eq!(qemu_img(&["info", text(&spec.path)]).0, 1, "a writer keeps others out");
    let frozen = freeze(&disk, &directory.path().join("a.qcow2"));
    assert_eq!(qemu_img(&["info", text(&frozen.path)]).0, 0);
    assert!(matches!(Disk::open(&spec), Err(OpenError::InUse { .. })), "nobody writes to what others stand on");
    assert_eq!(qemu_img(&["resize", "-q", text(&frozen.path), "16M"]).0, 1);
    assert_eq!(qemu_img(&["info", text(&disk.path())]).0, 1);
    drop(disk);
    assert!(Disk::open(&spec).is_ok());
}

#[test]
fn a_freeze_that_fails_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut rng = Rng::new(5);
    for kind in [Kind::Raw, Kind::Qcow2] {
        let (spec, mut content) = kind.create(directory.path(), SIZE, &mut rng);
        let disk = Disk::open(&spec).unwrap();
        write(&disk, &mut content, &mut rng);
        let path = directory.path().join("overlay.qcow2");
        // One that somebody takes away.
        let overlay = disk.overlay(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(disk.switch(overlay).is_err());
        // One that is given up, as for another disk's failure.
        let overlay = disk.overlay(&path).unwrap();
        drop(disk.switch(overlay).unwrap());
        assert!(!path.exists());
        drop(disk.overlay(&path).unwrap());
        assert!(!path.exists());
        // A name that is taken, or in a directory that is not there.
        fs::write(&path, "mine").unwrap();
        assert!(disk.overlay(&path).is_err());
        assert!(disk.overlay(&directory.path().join("none/a.qcow2")).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        fs::remove_file(&path).unwrap();

        assert_eq!(disk.path(), spec.path);
        let reader = Disk::open(&spec.clone().read_only());
        assert!(matches!(reader, Err(OpenError::InUse { .. })), "it is locked as before");
        write(&disk, &mut content, &mut rng);
        drop(disk);
        assert_image(&spec.path, spec.format.unwrap(), &content);
        fs::remove_file(&spec.path).unwrap();
    }
    let (spec, _) = Kind::Raw.create(directory.path(), SIZE, &mut rng);
    let disk = Disk::open(&spec.read_only()).unwrap();
    assert!(disk.overlay(&directory.path().join("b.qcow2")).unwrap_err().to_string().contains("read-only"));
}

/// Prints how long a machine stands still for a disk: `cargo test --release -p purlin-storage --test freeze -- --ignored
/// --nocapture`.
#[test]
#[ignore = "it measures"]
fn costs() {
    let directory = tempfile::tempdir().unwrap();
    for gib in [1] {
        let path = directory.path().join(format!("{gib}.qcow2"));
        NewImage::empty(&path, Format::Qcow2, gib << 30).create().unwrap();
        let disk = Disk::open(&DiskSpec::new(&path)).unwrap();
        // A sector in each cluster: all tables are there.
        (0..gib << 14).for_each(|cluster| disk.write_at(&[1; 512], cluster << 16).unwrap());
        for number in 0..3 {
            let overlay = disk.overlay(&directory.path().join(format!("{gib}-{number}.qcow2"))).unwrap();
            let start = std::time::Instant::now();
            disk.switch(overlay).unwrap().make();
            println!("{gib} GiB, {number} overlays: {:.2?}", start.elapsed());
            disk.write_at(&[1; 512], 0).unwrap();
        }
    }
}
