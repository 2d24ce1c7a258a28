//! Requests through a queue, on guest memory.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use purlin_storage::{Disk, DiskSpec, Format, NewImage, Queue, Request};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    bitmap::{AtomicBitmap, Bitmap},
};

type Memory = GuestMemoryMmap<AtomicBitmap>;

const MIB: u64 = 1 << 20;

fn raw(directory: &Path, size: u64) -> DiskSpec {
    let path = directory.join("disk.raw");
    fs::File::create(&path).unwrap().set_len(size).unwrap();
    DiskSpec::new(path)
}

fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), MIB as usize)]).unwrap()
}

#[test]
fn scattered_buffers_go_to_the_disk_and_back() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk::open(&raw(directory.path(), MIB)).unwrap();
    let memory = memory();
    memory.write_slice(&[1; 4096], GuestAddress(0)).unwrap();
    memory.write_slice(&[2; 512], GuestAddress(0x3000)).unwrap();
    let slice = |address, length| memory.get_slice(GuestAddress(address), length).unwrap();
    Queue::scope(&disk, |queue| {
        queue.submit(7, Request::Write { offset: 1024, buffers: vec![slice(0, 4096), slice(0x3000, 512)] });
        let done = queue.wait().unwrap();
        assert_eq!((done.tag, done.result), (7, Ok(())));
        queue.submit(8, Request::Read { offset: 4608, buffers: vec![slice(0x8000, 512), slice(0x9000, 512)] });
        assert_eq!(queue.wait().unwrap().result, Ok(()));
        assert_eq!(queue.wait(), None);
    })
    .unwrap();
    let mut read = [0; 512];
    memory.read_slice(&mut read, GuestAddress(0x8000)).unwrap();
    assert_eq!(read, [1; 512]);
    memory.read_slice(&mut read, GuestAddress(0x9000)).unwrap();
    assert_eq!(read, [2; 512]);
    let dirty = |address| memory.find_region(GuestAddress(0)).unwrap().bitmap().dirty_at(address);
    assert!(dirty(0x8000) && dirty(0x9000) && !dirty(0xa000) && !dirty(0x7fff));
    let file = fs::read(directory.path().join("disk.raw")).unwrap();
    assert_eq!(file[1023..1025], [0, 1]);
    assert_eq!(file[5119..5121], [1, 2]);
    assert_eq!(Format::of_name(&disk.path()), Some(Format::Raw));
}

/// More than the ring has room for, of what goes through the ring: flushes, and reads that are not cached.
#[test]
fn thousands_at_once() {
    const COUNT: u64 = 2000;
    let directory = tempfile::tempdir().unwrap();
    let spec = raw(directory.path(), 8 * MIB);
    let content: Vec<u8> = (0..8 * MIB).map(|i| (i / 512) as u8).collect();
    fs::write(&spec.path, &content).unwrap();
    let file = fs::File::open(&spec.path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let disk = Disk::open(&spec).unwrap();
    let memory = memory();
    Queue::scope(&disk, |queue| {
        for tag in 0..COUNT {
            let slice = memory.get_slice(GuestAddress(tag * 512), 512).unwrap();
            let offset = (COUNT - tag) * 4096;
            let request = if tag % 16 == 0 { Request::Flush } else { Request::Read { offset, buffers: vec![slice] } };
            queue.submit(tag, request);
        }
        assert_eq!(queue.in_flight(), COUNT as usize);
        let mut done: Vec<u64> = std::iter::from_fn(|| queue.wait())
            .map(|completion| {
                assert_eq!(completion.result, Ok(()));
                completion.tag
            })
            .collect();
        done.sort_unstable();
        assert_eq!(done, (0..COUNT).collect::<Vec<_>>());
    })
    .unwrap();
    for tag in (0..COUNT).filter(|tag| tag % 16 != 0) {
        let mut read = [0; 512];
        memory.read_slice(&mut read, GuestAddress(tag * 512)).unwrap();
        assert_eq!(read[..], content[((COUNT - tag) * 4096) as usize..][..512], "request {tag}");
    }
}

#[test]
fn a_queue_that_is_left_waits_for_what_is_in_flight() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk::open(&raw(directory.path(), MIB)).unwrap();
    let memory = memory();
    memory.write_slice(&[9; 4096], GuestAddress(0)).unwrap();
    let left = catch_unwind(AssertUnwindSafe(|| {
        Queue::scope(&disk, |queue| {
            let slice = memory.get_slice(GuestAddress(0), 4096).unwrap();
            queue.submit(1, Request::Write { offset: 0, buffers: vec![slice] });
            (2..100).for_each(|tag| queue.submit::<()>(tag, Request::Flush));
            panic!("as a device might");
        })
    }));
    assert!(left.is_err());
    let mut read = [0; 4096];
    disk.read_at(&mut read, 0).unwrap();
    assert_eq!(read, [9; 4096]);
}

#[test]
fn empty_requests_are_done_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let memory = memory();
    for format in [Format::Raw, Format::Qcow2] {
        let path = directory.path().join(format.to_string());
        NewImage::empty(&path, format, MIB).create().unwrap();
        let disk = Disk::open(&DiskSpec::new(path).format(format)).unwrap();
        Queue::scope(&disk, |queue| {
            let empty = || memory.get_slice(GuestAddress(0), 0).unwrap();
            let full = memory.get_slice(GuestAddress(0), 512).unwrap();
            queue.submit::<()>(1, Request::Read { offset: MIB, buffers: vec![] });
            queue.submit(2, Request::Write { offset: 0, buffers: vec![empty()] });
            queue.submit(3, Request::Read { offset: 0, buffers: vec![empty(), full, empty()] });
            queue.submit::<()>(4, Request::Discard { offset: MIB, length: 0 });
            queue.submit::<()>(5, Request::WriteZeroes { offset: 0, length: 0, unmap: true });
            let done: Vec<_> = std::iter::from_fn(|| queue.wait()).collect();
            assert_eq!(done.len(), 5);
            assert!(done.iter().all(|completion| completion.result == Ok(())), "{done:?}");
        })
        .unwrap();
    }
}
