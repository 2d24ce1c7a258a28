//! Images that somebody has tampered with: whatever they say, opening and using them is an answer or an error.

mod common;

use std::{fs, path::Path};

use common::{KIB, MIB, Rng};
use purlin_storage::{Disk, DiskSpec, Format, NewImage, Request};

/// An image of all kinds of clusters.
fn image(path: &Path, rng: &mut Rng) -> Vec<u8> {
    NewImage::empty(path, Format::Qcow2, 4 * MIB).create().unwrap();
    let disk = Disk::open(&DiskSpec::new(path).format(Format::Qcow2)).unwrap();
    let mut data = vec![0; 300 * KIB as usize];
    rng.fill(&mut data);
    disk.write_at(&data, 100 * KIB).unwrap();
    disk.write_at(&data, 2 * MIB).unwrap();
    disk.request::<()>(Request::WriteZeroes { offset: 2 * MIB, length: 128 * KIB, unmap: false }).unwrap();
    disk.request::<()>(Request::Discard { offset: 2 * MIB + 128 * KIB, length: 64 * KIB }).unwrap();
    drop(disk);
    fs::read(path).unwrap()
}

/// Where an image's tables are: anything else is data. Header, refcount table and block, L1, L2.
fn interesting(image: &[u8], rng: &mut Rng) -> usize {
    let cluster = 64 * KIB as usize;
    match rng.below(4) {
        0 => rng.below(112) as usize,
        // The first entries of any cluster.
        1 | 2 if image.len() >= cluster => {
            rng.below((image.len() / cluster) as u64) as usize * cluster + rng.below(128) as usize
        }
        _ => rng.below(image.len() as u64) as usize,
    }
}

fn tamper(image: &mut Vec<u8>, rng: &mut Rng) {
    for _ in 0..1 + rng.below(4) {
        let at = interesting(image, rng);
        match rng.below(4) {
            0 => image[at] ^= 1 << rng.below(8),
            1 => image[at] = rng.next() as u8,
            2 => {
                let at = (at & !7).min(image.len() - 8);
                let values = [0, 1, u64::MAX, 1 << 63, (1 << 62) | 0x1_0000, 0x2_0000, rng.below(8) << 16, rng.next()];
                let value = values[rng.below(values.len() as u64) as usize];
                image[at..at + 8].copy_from_slice(&value.to_be_bytes());
            }
            _ if rng.below(8) == 0 => image.truncate(at.max(16)),
            _ => {}
        }
        if image.len() < 1024 {
            return;
        }
    }
}

fn use_it(path: &Path, read_only: bool) {
    let spec = DiskSpec { read_only, ..DiskSpec::new(path).format(Format::Qcow2).standalone() };
    match Disk::open(&spec) {
        Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
        Ok(disk) => {
            let size = disk.size().min(4 * MIB);
            let mut buffer = vec![0; 64 * KIB as usize];
            for offset in (0..size.saturating_sub(64 * KIB)).step_by(48 * KIB as usize) {
                let _ = disk.read_at(&mut buffer, offset);
                if !read_only {
                    let _ = disk.write_at(&buffer[..8192], offset);
                }
            }
            if !read_only {
                let _ = disk.request::<()>(Request::Discard { offset: 0, length: size / 2 });
                let _ = disk.request::<()>(Request::WriteZeroes { offset: size / 2, length: size / 4, unmap: true });
            }
            let _ = disk.request::<()>(Request::Flush);
        }
    }
}

#[test]
fn nothing_that_an_image_says_is_believed() {
    // In memory if it can be: there are many flushes.
    let memory = Path::new("/dev/shm");
    let directory = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let path = directory.path().join("disk");
    let whole = image(&path, &mut Rng::new(1));
    for seed in 0..1500 {
        let mut rng = Rng::new(seed);
        let mut image = whole.clone();
        tamper(&mut image, &mut rng);
        fs::write(&path, &image).unwrap();
        let used = std::panic::catch_unwind(|| {
            use_it(&path, true);
            use_it(&path, false);
        });
        assert!(used.is_ok(), "seed {seed}");
    }
}
