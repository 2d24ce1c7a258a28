//! Whatever a qcow2 image says, opening it and using it is an answer or an error: no panic, no endless loop, no more
//! memory than an image may take.
//!
//! The input is a list of changes to a sound image with all kinds of clusters: a length, an offset, and bytes. So the fuzzer
//! need not find out first what an image looks like.
#![no_main]

use std::{
    fs::File,
    os::{fd::AsRawFd, unix::fs::FileExt},
    sync::OnceLock,
};

use libfuzzer_sys::fuzz_target;
use purlin_storage::{Disk, DiskSpec, Format, NewImage, Request};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The sound image.
fn whole() -> &'static [u8] {
    static WHOLE: OnceLock<Vec<u8>> = OnceLock::new();
    WHOLE.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("purlin-fuzz-{}", std::process::id()));
        NewImage::empty(&path, Format::Qcow2, 4 * MIB).create().unwrap();
        let disk = Disk::open(&DiskSpec::new(&path).format(Format::Qcow2)).unwrap();
        let data = vec![0x5a; 300 * KIB as usize];
        disk.write_at(&data, 100 * KIB).unwrap();
        disk.write_at(&data, 2 * MIB).unwrap();
        disk.request::<()>(Request::WriteZeroes { offset: 2 * MIB, length: 128 * KIB, unmap: false }).unwrap();
        disk.request::<()>(Request::Discard { offset: 2 * MIB + 128 * KIB, length: 64 * KIB }).unwrap();
        drop(disk);
        let image = std::fs::read(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        image
    })
}

fuzz_target!(|input: &[u8]| {
    let Some((flags, changes)) = input.split_first() else { return };
    let image = whole();
    let file = File::from(rustix::fs::memfd_create(c"image", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(image, 0).unwrap();
    change(&file, image.len() as u64, changes);
    let read_only = flags & 1 != 0;
    let spec = DiskSpec::new(format!("/proc/self/fd/{}", file.as_raw_fd())).format(Format::Qcow2).standalone();
    match Disk::open(&DiskSpec { read_only, ..spec }) {
        Ok(disk) => use_it(&disk, read_only),
        Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
    }
});

fn change(file: &File, length: u64, mut changes: &[u8]) {
    while let [count, low, high, rest @ ..] = changes {
        // Half of an offset's values are the header, half are the starts of clusters: there the tables are.
        let place = u64::from(u16::from_le_bytes([*low, *high]));
        let offset = if place < 0x8000 { place % 128 } else { (place & 0xff) * 64 * KIB + ((place >> 8) & 0x7f) * 8 };
        let (bytes, rest) = rest.split_at(rest.len().min(usize::from(count % 9)));
        if *count == 0xff {
            file.set_len(offset).unwrap();
        } else if offset < length {
            file.write_all_at(bytes, offset).unwrap();
        }
        changes = rest;
    }
}

fn use_it(disk: &Disk, read_only: bool) {
    let size = disk.size().min(4 * MIB);
    let mut buffer = vec![0; 64 * KIB as usize];
    for offset in (0..size.saturating_sub(64 * KIB)).step_by(96 * KIB as usize) {
        let _ = disk.read_at(&mut buffer, offset);
        if !read_only {
            let _ = disk.write_at(&buffer[..8192], offset);
        }
    }
    let _ = disk.next_data(0);
    if !read_only {
        let _ = disk.request::<()>(Request::Discard { offset: 0, length: size / 2 });
        let _ = disk.request::<()>(Request::WriteZeroes { offset: size / 2, length: size / 4, unmap: true });
        let _ = disk.write_at(&buffer[..8192], size / 4 & !511);
    }
    let _ = disk.request::<()>(Request::Flush);
}
