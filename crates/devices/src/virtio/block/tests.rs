//! The block device, driven through rings in memory onto image files.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use proptest::prelude::*;
use purlin_storage::{DiskSpec, Format};
use tempfile::TempDir;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ring::VRING_DESC_F_NEXT;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{
    pci::PciFunction,
    virtio::{
        testing::{Buffer, Driver, EVENT_IDX, INDIRECT, abuse, is_held_in_a_flood, page},
        worker::SLOW,
    },
};

/// The test disk: 1 MiB.
const SIZE: u64 = 1 << 20;
const OK: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;
const FLUSH: u64 = feature(VIRTIO_BLK_F_FLUSH);

/// An image whose sector `n` is full of the byte `n`.
fn image() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    fs::write(&path, (0..SIZE).map(|at| (at / 512) as u8).collect::<Vec<u8>>()).unwrap();
    (directory, path)
}

fn spec(path: &Path) -> DiskSpec {
    DiskSpec { serial: Some("S1".into()), ..DiskSpec::new(path).format(Format::Raw) }
}

fn block(spec: &DiskSpec, cpus: u32) -> Box<Block> {
    Box::new(Block::new("disk0", Disk::open(spec).unwrap(), cpus, OnIoError::Report))
}

/// A driver that is ready.
fn driver(spec: &DiskSpec, features: u64) -> Driver {
    let mut driver = Driver::new(block(spec, 1));
    driver.initialize(features);
    driver
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// The buffers of a request, and that of its status.
fn buffers(driver: &mut Driver, kind: u32, sector: u64, data: &[Buffer]) -> (Vec<Buffer>, Buffer) {
    let (header, status) = (driver.readable(&header(kind, sector)), driver.writable(1));
    let mut all = vec![header];
    all.extend(data);
    all.push(status);
    (all, status)
}

/// Makes a request and returns its status.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[Buffer]) -> u8 {
    let (all, status) = buffers(driver, kind, sector, data);
    let used = driver.request(0, &all);
    let read: u32 = data.iter().filter(|b| b.writable).map(|b| b.length).sum();
    assert_eq!(used.written, read + 1);
    driver.content(status)[0]
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn file(path: &Path, offset: u64, length: usize) -> Vec<u8> {
    let mut data = vec![0; length];
    fs::File::open(path).unwrap().read_exact_at(&mut data, offset).unwrap();
    data
}

#[test]
fn the_driver_learns_what_disk_it_is() {
    let (_directory, path) = image();
    let driver = Driver::new(block(&spec(&path), 9));
    let features = driver.offered();
    for (bit, there) in [
        (VIRTIO_BLK_F_FLUSH, true),
        (VIRTIO_BLK_F_MQ, true),
        (VIRTIO_BLK_F_DISCARD, true),
        (VIRTIO_BLK_F_WRITE_ZEROES, true),
        (VIRTIO_BLK_F_RO, false),
    ] {
        assert_eq!(features & feature(bit) != 0, there, "{bit}");
    }
    // Capacity in sectors, segments, block size, queues.
    assert_eq!(driver.read::<8>(page::DEVICE), SIZE / 512);
    assert_eq!(driver.read::<4>(page::DEVICE + 12), 254);
    assert_eq!(driver.read::<4>(page::DEVICE + 20), 512);
    assert_eq!(driver.read::<2>(page::DEVICE + 34), 4);
    assert_eq!(driver.read::<8>(page::DEVICE + 60), 0);

    drop(driver);
    let driver = Driver::new(block(&spec(&path).read_only(), 1));
    let features = driver.offered();
    assert_eq!(features & feature(VIRTIO_BLK_F_RO), feature(VIRTIO_BLK_F_RO));
    assert_eq!(features & (feature(VIRTIO_BLK_F_DISCARD) | feature(VIRTIO_BLK_F_WRITE_ZEROES)), 0);
}

#[test]
fn sectors_are_read_and_written() {
    let (_directory, path) = image();
    let mut driver = driver(&spec(&path), FLUSH);
    let (one, two) = (driver.writable(512), driver.writable(1024));
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_IN, 5, &[one, two]), OK);
    assert_eq!(driver.content(one), [5; 512]);
    assert_eq!(driver.content(two), [[6; 512], [7; 512]].concat());

    // Buffers need not be whole sectors each (5.2.6.2 asks that of their sum).
    let (start, end) = (driver.readable(&[0xaa; 500]), driver.readable(&[0xbb; 12]));
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_OUT, 9, &[start, end]), OK);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    assert_eq!(file(&path, 9 * 512, 513), [&[0xaa; 500][..], &[0xbb; 12], &[10]].concat());
    let back = driver.writable(512);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_IN, 9, &[back]), OK);
    assert_eq!(driver.content(back), [&[0xaa; 500][..], &[0xbb; 12]].concat());
}

/// A driver that cannot flush: each write is followed by a flush of the device's own, and answered once.
#[test]
fn without_flush_writes_go_through() {
    let (_directory, path) = image();
    let mut driver = driver(&spec(&path), 0);
    for sector in 0..10 {
        let data = driver.readable(&[0xab; 512]);
        assert_eq!(request(&mut driver, VIRTIO_BLK_T_OUT, sector, &[data]), OK);
    }
    let outside = driver.readable(&[0; 512]);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_OUT, 2048, &[outside]), FAILED);
    driver.function.hold();
    assert_eq!(driver.take_used(0), None);
    assert_eq!(file(&path, 0, 5121), [&[0xab; 5120][..], &[10]].concat());
}

/// Drivers may cut header, data and status as they like (2.7.4.1).
#[test]
fn framing_is_the_drivers_choice() {
    let (_directory, path) = image();
    let mut driver = driver(&spec(&path), FLUSH | INDIRECT);
    let header = header(VIRTIO_BLK_T_OUT, 3);
    let (a, b) = (driver.readable(&header[..7]), driver.readable(&[&header[7..], &[0x77; 512][..]].concat()));
    let status = driver.writable(1);
    driver.request(0, &[a, b, status]);
    assert_eq!(driver.content(status), [OK]);
    let (a, all) = (driver.readable(&self::header(VIRTIO_BLK_T_IN, 3)), driver.writable(513));
    driver.offer_indirect(0, &[a, all]);
    driver.notify(0);
    assert_eq!(driver.wait_used(0).written, 513);
    assert_eq!(driver.content(all), [&[0x77; 512][..], &[OK]].concat());
}

#[test]
fn the_serial_number_is_told() {
    let (_directory, path) = image();
    let mut driver = driver(&spec(&path), 0);
    let (id, short) = (driver.writable(20), driver.writable(1));
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_GET_ID, 0, &[id]), OK);
    assert_eq!(driver.content(id), *b"S1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_GET_ID, 0, &[short]), OK);
    assert_eq!(driver.content(short), *b"S");
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let (_directory, path) = image();
    let mut driver = driver(&spec(&path), FLUSH | feature(VIRTIO_BLK_F_DISCARD) | feature(VIRTIO_BLK_F_WRITE_ZEROES));
    let two = driver.readable(&[range(8, 8, 0), range(24, 1, 1)].concat());
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, &[two]), OK);
    assert_eq!(file(&path, 8 * 512, 8 * 512), [0; 8 * 512]);
    assert_eq!(file(&path, 23 * 512, 513), [&[23; 512][..], &[0]].concat());
    assert_eq!(file(&path, 25 * 512, 1), [25]);
    let one = driver.readable(&range(64, 8, 0));
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_DISCARD, 0, &[one]), OK);
    assert_eq!(file(&path, 72 * 512, 1), [72]);

    for (kind, ranges, status) in [
        (VIRTIO_BLK_T_DISCARD, range(0, 1, 1), UNSUPPORTED),
        (VIRTIO_BLK_T_WRITE_ZEROES, range(0, 1, 2), UNSUPPORTED),
        (VIRTIO_BLK_T_WRITE_ZEROES, range(2048, 1, 0), FAILED),
        (VIRTIO_BLK_T_WRITE_ZEROES, range(u64::MAX, 1, 0), FAILED),
        (VIRTIO_BLK_T_WRITE_ZEROES, range(0, u32::MAX, 0), FAILED),
        (VIRTIO_BLK_T_DISCARD, range(0, 1, 0)[..15].to_vec(), FAILED),
        (VIRTIO_BLK_T_DISCARD, range(0, 1, 0).repeat(17), FAILED),
    ] {
        let ranges = driver.readable(&ranges);
        assert_eq!(request(&mut driver, kind, 0, &[ranges]), status, "{kind} {ranges:?}");
    }
    assert_eq!(file(&path, 512, 1), [1]);
}

#[test]
fn what_cannot_be_done_is_answered() {
    let (_directory, path) = image();
    let mut driver = driver(&spec(&path), FLUSH);
    let (odd, sector) = (driver.writable(511), driver.writable(512));
    for (kind, at, data, status) in [
        (VIRTIO_BLK_T_IN, 0, vec![odd], FAILED),
        (VIRTIO_BLK_T_IN, 2048, vec![sector], FAILED),
        (VIRTIO_BLK_T_IN, 2047, vec![sector, sector], FAILED),
        (VIRTIO_BLK_T_IN, u64::MAX, vec![sector], FAILED),
        (VIRTIO_BLK_T_IN, u64::MAX / 512, vec![sector], FAILED),
        (VIRTIO_BLK_T_IN, 0, vec![], OK),
        (99, 0, vec![sector], UNSUPPORTED),
        (VIRTIO_BLK_T_IN, 2047, vec![sector], OK),
    ] {
        assert_eq!(request(&mut driver, kind, at, &data), status, "{kind} {at:#x}");
    }
    assert_eq!(driver.content(sector), [0xff; 512]);
}

#[test]
fn a_disk_for_reading_is_not_written() {
    let (_directory, path) = image();
    let mut driver = driver(&spec(&path).read_only(), FLUSH);
    let data = driver.readable(&[0xcc; 512]);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_OUT, 1, &[data]), FAILED);
    let range = driver.readable(&range(1, 1, 0));
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, 0, &[range]), FAILED);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    assert_eq!(file(&path, 512, 512), [1; 512]);
}

#[test]
fn requests_without_header_or_status_put_the_device_out_of_service() {
    let (_directory, path) = image();
    let mut driver = driver(&spec(&path), FLUSH);
    let (short, whole) = (driver.readable(&[0; 15]), driver.readable(&header(VIRTIO_BLK_T_FLUSH, 0)));
    let status = driver.writable(1);
    for bad in [vec![short, status], vec![whole], vec![status]] {
        driver.initialize(FLUSH);
        driver.offer(0, &bad);
        driver.notify(0);
        driver.wait_out_of_service();
        assert_eq!(driver.take_used(0), None);
    }
    driver.initialize(FLUSH);
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
}

/// A driver that never waits for what it offers gets no more under way than the queue has room for, and all of it done.
#[test]
fn a_flood_is_served_in_turns() {
    let (_directory, path) = image();
    let mut driver = driver(&spec(&path), FLUSH | EVENT_IDX);
    let sector = driver.writable(512);
    let (all, status) = buffers(&mut driver, VIRTIO_BLK_T_IN, 7, &[sector]);
    let head = driver.offer(0, &all);
    driver.notify(0);
    let (mut offered, mut used) = (1u32, 0u32);
    while used < 2000 {
        while offered < 2000 && offered - used < 16 {
            driver.make_available(0, head);
            driver.notify(0);
            offered += 1;
        }
        assert_eq!(driver.wait_used(0).head, head);
        used += 1;
    }
    assert_eq!((driver.content(status), driver.content(sector)), (vec![OK], vec![7; 512]));
}

#[test]
fn a_flood_does_not_keep_it_from_being_held() {
    let (_directory, path) = image();
    let mut driver = driver(&spec(&path), FLUSH);
    let sector = driver.writable(512);
    let (all, _) = buffers(&mut driver, VIRTIO_BLK_T_IN, 7, &[sector]);
    is_held_in_a_flood(driver, &all);
}

/// Several queues at once, each writing its own sectors; what a flush was answered for is in the file.
#[test]
fn queues_work_side_by_side() {
    let (_directory, path) = image();
    let mut driver = Driver::new(block(&spec(&path), 4));
    driver.initialize(FLUSH | feature(VIRTIO_BLK_F_MQ));
    assert_eq!(driver.queues.len(), 4);
    for round in 0..20u8 {
        let mut requests = Vec::new();
        for queue in 0..4usize {
            let data = driver.readable(&[round ^ queue as u8; 512]);
            let (all, status) = buffers(&mut driver, VIRTIO_BLK_T_OUT, 100 * queue as u64 + u64::from(round), &[data]);
            driver.offer(queue, &all);
            requests.push(status);
        }
        (0..4).for_each(|queue| driver.notify(queue));
        (0..4).for_each(|queue| assert_eq!(driver.wait_used(queue).written, 1));
        assert!(requests.iter().all(|status| driver.content(*status) == [OK]));
    }
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    for queue in 0..4u64 {
        for round in 0..20u64 {
            assert_eq!(file(&path, (100 * queue + round) * 512, 512), [(round ^ queue) as u8; 512]);
        }
    }
}

/// Saves in the midst of requests, again and again: each is answered once, and none is lost or done by halves.
#[test]
fn requests_are_answered_once_across_pauses_and_moves() {
    let (_directory, path) = image();
    let spec = spec(&path);
    let mut driver = driver(&spec, FLUSH | INDIRECT | EVENT_IDX);
    for round in 0..30u64 {
        // Five in the queue of 16 at once, of three descriptors each.
        let mut offered = Vec::new();
        for i in 0..5u64 {
            let data = driver.readable(&[round as u8 ^ 0x80; 512]);
            let (all, status) = buffers(&mut driver, VIRTIO_BLK_T_OUT, 5 * round + i, &[data]);
            offered.push((driver.offer(0, &all), status));
        }
        driver.notify(0);
        driver.function.hold();
        // As long as it is held, nothing moves.
        let before: Vec<_> = offered.iter().map(|(_, status)| driver.content(*status)).collect();
        driver.messages.take();
        std::thread::yield_now();
        assert_eq!(before, offered.iter().map(|(_, status)| driver.content(*status)).collect::<Vec<_>>());
        assert_eq!(driver.messages.take(), []);

        if round % 3 == 0 {
            // Another process opens the disk once this one has closed it.
            let saved = driver.function.save();
            let (memory, queues) = (driver.memory.clone(), driver.detach());
            driver = Driver::restored(memory, block(&spec, 1), &saved, queues);
        }
        driver.function.open();
        let mut heads: Vec<_> = (0..5).map(|_| driver.wait_used(0).head).collect();
        heads.sort();
        let mut expected: Vec<_> = offered.iter().map(|(head, _)| *head).collect();
        expected.sort();
        assert_eq!(heads, expected);
        assert_eq!(driver.take_used(0), None);
        assert!(offered.iter().all(|(_, status)| driver.content(*status) == [OK]));
    }
    assert_eq!(request(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    for sector in 0..150u64 {
        assert_eq!(file(&path, sector * 512, 512), [(sector / 5) as u8 ^ 0x80; 512]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_hostile_driver_breaks_nothing(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let (_directory, path) = image();
        let spec = spec(&path);
        abuse(|| block(&spec, 2), FLUSH | INDIRECT | EVENT_IDX, &bytes);
        assert_eq!(fs::metadata(&path).unwrap().len(), SIZE);
    }
}

#[test]
fn another_disk_is_not_taken_over() {
    let (_directory, path) = image();
    let driver = driver(&spec(&path), FLUSH);
    driver.function.hold();
    let saved = driver.function.save();
    drop(driver);
    fs::File::options().write(true).open(&path).unwrap().set_len(SIZE / 2).unwrap();
    let other = Driver::new(block(&spec(&path), 1));
    let error = other.function.restore(&saved).unwrap_err().to_string();
    assert!(error.contains("another size"), "{error}");
}

/// A request that waited when the device was saved is made anew, even if the device is opened again before the thread of
/// its queue has heard of having been held.
#[test]
fn what_waited_is_made_anew_by_a_slow_thread() {
    let (_directory, path) = image();
    let spec = spec(&path);
    let device = block(&spec, 1);
    let waiting = device.waiting[0].clone();
    let mut driver = Driver::new(device);
    driver.initialize(FLUSH);
    driver.function.hold();
    // As if it had been taken from the available ring, and failed.
    let data = driver.readable(&[0x5a; 512]);
    let (all, status) = buffers(&mut driver, VIRTIO_BLK_T_OUT, 7, &[data]);
    for (i, buffer) in (0u16..).zip(&all) {
        let flags = if usize::from(i) + 1 == all.len() { 0 } else { VRING_DESC_F_NEXT };
        driver.put_descriptor(driver.queues[0].rings[0], i, *buffer, flags, i + 1);
    }
    assert!(waiting.push(0, QUEUE_SIZE));
    let saved = driver.function.save();
    let (memory, queues) = (driver.memory.clone(), driver.detach());
    let slow = SLOW.write().unwrap();
    let mut driver = Driver::restored(memory, block(&spec, 1), &saved, queues);
    driver.function.open();
    drop(slow);
    assert_eq!(driver.wait_used(0).head, 0);
    assert_eq!((driver.content(status), file(&path, 7 * 512, 512)), (vec![OK], vec![0x5a; 512]));
    assert_eq!(driver.take_used(0), None);
}

#[test]
fn a_reset_waits_for_what_is_under_way() {
    let (_directory, path) = image();
    let mut driver = driver(&spec(&path), FLUSH);
    for round in 0..50u8 {
        let data = driver.readable(&[round; 512]);
        let (all, status) = buffers(&mut driver, VIRTIO_BLK_T_OUT, round.into(), &[data]);
        driver.offer(0, &all);
        driver.notify(0);
        driver.set_status(0);
        // Nothing comes after the reset: the memory is the driver's again.
        let now = driver.content(status);
        driver.memory.write_slice(&[0x5a], GuestAddress(status.address)).unwrap();
        driver.initialize(FLUSH);
        assert_eq!(request(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
        assert_eq!(driver.content(status), [0x5a]);
        // It was done, or not begun at all.
        let before = if now == [OK] { round } else { file(&path, u64::from(round) * 512, 1)[0] };
        assert_eq!(file(&path, u64::from(round) * 512, 512), [before; 512]);
    }
}
