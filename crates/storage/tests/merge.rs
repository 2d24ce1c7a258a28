//! Overlays made one, with qemu-img as the oracle.

mod common;

use std::{fs, path::Path};

use common::{KIB, MIB, Rng, qemu_img_ok, text};
use purlin_storage::{Disk, DiskSpec, Format, Merge, MergeError, NewImage, OpenError, Request};

const SIZE: u64 = 8 * MIB + 512;

/// Writes, zeroes and discards here and there, also at the end.
fn change(path: &Path, rng: &mut Rng) {
    let disk = Disk::open(&DiskSpec::new(path)).unwrap();
    for round in 0..30 {
        let offset = rng.below(SIZE / KIB - 200) * KIB;
        let length = (1 + rng.below(199)) * KIB;
        match round % 3 {
            0 => {
                let mut data = vec![0; length as usize];
                rng.fill(&mut data);
                disk.write_at(&data, offset).unwrap();
            }
            1 => disk.request::<()>(Request::WriteZeroes { offset, length, unmap: rng.below(2) == 0 }).unwrap(),
            _ => disk.request::<()>(Request::Discard { offset, length }).unwrap(),
        }
    }
    if rng.below(2) == 0 {
        disk.write_at(&[7; 512], SIZE - 512).unwrap();
    }
}

fn overlay(path: &Path, below: &Path, format: Format) {
    NewImage::overlay(path, below, format).create().unwrap();
}

#[test]
fn two_overlays_become_one_whatever_is_above_and_below() {
    for seed in 0..12 {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let mut rng = Rng::new(seed);
        let format = if seed % 2 == 0 { Format::Raw } else { Format::Qcow2 };
        let base = at("base");
        let mut content = vec![0; SIZE as usize];
        rng.fill(&mut content);
        NewImage::empty(&base, format, SIZE).create().unwrap();
        Disk::open(&DiskSpec::new(&base).format(format)).unwrap().write_at(&content, 0).unwrap();
        let [lower, upper, top, merged] = ["lower.qcow2", "upper.qcow2", "top.qcow2", "merged"].map(at);
        overlay(&lower, &base, format);
        change(&lower, &mut rng);
        overlay(&upper, &lower, Format::Qcow2);
        change(&upper, &mut rng);
        overlay(&top, &upper, Format::Qcow2);
        change(&top, &mut rng);
        for (image, copy) in [(&upper, "upper.raw"), (&top, "top.raw")] {
            qemu_img_ok(&["convert", "-O", "raw", text(image), text(&at(copy))]);
        }

        // A machine has it open meanwhile.
        let running = Disk::open(&DiskSpec::new(&top)).unwrap();
        let merge = Merge { upper: upper.clone(), lower: lower.clone(), below: base.clone() };
        assert!(!merge.is_done().unwrap());
        merge.run(&merged, &|| true).unwrap();
        fs::rename(&merged, &upper).unwrap();
        fs::remove_file(&lower).unwrap();
        let mut bytes = vec![0; SIZE as usize];
        running.read_at(&mut bytes, 0).unwrap();
        assert!(bytes == fs::read(at("top.raw")).unwrap(), "{seed}: the machine sees another disk");
        drop(running);

        assert!(merge.is_done().unwrap());
        for (image, copy) in [(&upper, "upper.raw"), (&top, "top.raw")] {
            qemu_img_ok(&["check", "-f", "qcow2", text(image)]);
            qemu_img_ok(&["compare", "-f", "qcow2", "-F", "raw", text(image), text(&at(copy))]);
        }
    }
}

#[test]
fn what_is_no_pair_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let [base, other, lower, upper, target] = ["base.raw", "other.raw", "lower.qcow2", "upper.qcow2", "target"].map(at);
    for raw in [&base, &other] {
        NewImage::empty(raw, Format::Raw, SIZE).create().unwrap();
    }
    overlay(&lower, &base, Format::Raw);
    overlay(&upper, &lower, Format::Qcow2);
    let good = Merge { upper: upper.clone(), lower: lower.clone(), below: base.clone() };
    for merge in [
        Merge { below: other.clone(), ..good.clone() },
        Merge { lower: other.clone(), ..good.clone() },
        Merge { upper: lower.clone(), ..good.clone() },
    ] {
        assert!(merge.run(&target, &|| true).is_err(), "{merge:?}");
        assert!(!target.exists());
    }
    assert!(matches!(good.run(&target, &|| false), Err(MergeError::GivenUp)));
    // What is there is not written over, and what is not there any more is no reason to panic.
    fs::write(&target, "mine").unwrap();
    assert!(good.run(&target, &|| true).is_err());
    assert_eq!(fs::read(&target).unwrap(), b"mine");
    fs::remove_file(&target).unwrap();
    // Somebody writes to it.
    let writer = Disk::open(&DiskSpec::new(&upper)).unwrap();
    assert!(matches!(good.run(&target, &|| true), Err(MergeError::Open(OpenError::InUse { .. }))));
    drop(writer);
    // A link may lead anywhere.
    fs::rename(&lower, at("elsewhere.qcow2")).unwrap();
    std::os::unix::fs::symlink(at("elsewhere.qcow2"), &lower).unwrap();
    assert!(matches!(good.run(&target, &|| true), Err(MergeError::Open(OpenError::Host { .. }))));
    assert!(!target.exists());
}
