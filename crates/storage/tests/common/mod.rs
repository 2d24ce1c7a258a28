//! What several tests need: random numbers that can be repeated, guest memory, and qemu-img as the oracle.
#![allow(dead_code, reason = "each test uses some of it")]

use std::{path::Path, process::Command};

use purlin_storage::{Disk, DiskSpec, Format, NewImage};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

/// xorshift64*: the same numbers each time.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let random = self.next().to_le_bytes();
            chunk.copy_from_slice(&random[..chunk.len()]);
        }
    }
}

/// Guest memory from address 0.
pub fn memory(size: u64) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size as usize)]).unwrap()
}

pub fn slice(memory: &GuestMemoryMmap, address: u64, length: u64) -> VolatileSlice<'_> {
    memory.get_slice(GuestAddress(address), length as usize).unwrap()
}

/// Runs qemu-img; returns its status and what it said.
pub fn qemu_img(arguments: &[&str]) -> (i32, String) {
    let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img (package qemu-utils) is needed");
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&said).into_owned())
}

pub fn qemu_img_ok(arguments: &[&str]) {
    let (status, said) = qemu_img(arguments);
    assert_eq!(status, 0, "qemu-img {arguments:?}: {said}");
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// qemu-img finds no error in the image, and the same content as in `expected`.
pub fn assert_image(path: &Path, format: Format, expected: &[u8]) {
    if format == Format::Qcow2 {
        qemu_img_ok(&["check", "-f", "qcow2", text(path)]);
    }
    let reference = path.with_extension("reference");
    std::fs::write(&reference, expected).unwrap();
    qemu_img_ok(&["compare", "-f", "raw", "-F", &format.to_string(), text(&reference), text(path)]);
    std::fs::remove_file(reference).unwrap();
}

/// Kinds of images that every load runs on.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Raw,
    Qcow2,
    /// qcow2 on qcow2 on raw, made by Purlin.
    Overlays,
    /// qcow2 of version 2, made by qemu-img, with clusters of 4 KiB.
    OldQcow2,
    /// qcow2 with the smallest clusters, 512 bytes: many tables, more than the caches hold.
    SmallClusters,
}

impl Kind {
    /// Makes such an image in `directory`; returns it and its content.
    pub fn create(self, directory: &Path, size: u64, rng: &mut Rng) -> (DiskSpec, Vec<u8>) {
        let mut content = vec![0; size as usize];
        let path = directory.join("disk");
        let format = match self {
            Self::Raw => {
                NewImage::empty(&path, Format::Raw, size).create().unwrap();
                Format::Raw
            }
            Self::Qcow2 => {
                NewImage::empty(&path, Format::Qcow2, size).create().unwrap();
                Format::Qcow2
            }
            Self::OldQcow2 | Self::SmallClusters => {
                let old = matches!(self, Self::OldQcow2);
                let options = if old { "compat=0.10,cluster_size=4k" } else { "cluster_size=512" };
                let options = ["create", "-q", "-f", "qcow2", "-o", options];
                qemu_img_ok(&[&options[..], &[text(&path), &size.to_string()]].concat());
                Format::Qcow2
            }
            Self::Overlays => {
                let base = directory.join("base.raw");
                // The base is shorter than what stands on it.
                let below = &mut content[..(size / 2) as usize];
                rng.fill(below);
                std::fs::write(&base, &*below).unwrap();
                let middle = directory.join("middle.qcow2");
                NewImage::overlay(&middle, &base, Format::Raw).size(size).create().unwrap();
                let disk = Disk::open(&DiskSpec::new(&middle)).unwrap();
                for _ in 0..20 {
                    let offset = rng.below(size / KIB - 100) * KIB;
                    let data = &mut content[offset as usize..][..(rng.below(100) * KIB) as usize];
                    rng.fill(data);
                    disk.write_at(data, offset).unwrap();
                }
                drop(disk);
                NewImage::overlay(&path, &middle, Format::Qcow2).create().unwrap();
                Format::Qcow2
            }
        };
        (DiskSpec::new(path).format(format), content)
    }
}
