//! Limits as a queue keeps them. The rates themselves are tested in `src/limit.rs`, without a clock.

mod common;

use common::{KIB, MIB, memory, slice};
use purlin_storage::{
    Disk, DiskSpec, Format, NewImage, Queue, Request,
    limit::{Limits, Rate},
};
use std::{sync::Arc, time::Instant};

fn disk(directory: &tempfile::TempDir, limits: Limits) -> Arc<Disk> {
    let path = directory.path().join("disk.raw");
    NewImage::empty(&path, Format::Raw, MIB).create().unwrap();
    Disk::open(&DiskSpec { limits, ..DiskSpec::new(path) }).unwrap()
}

#[test]
fn requests_beyond_the_burst_wait_for_their_time() {
    let directory = tempfile::tempdir().unwrap();
    // 5 at once (and the one that overdraws), then one in 20 ms.
    let operations = Some(Rate { per_second: 50, burst: 5 });
    let disk = disk(&directory, Limits { operations, bytes: None });
    let memory = memory(64 * KIB);
    Queue::scope(&disk, |queue| {
        let start = Instant::now();
        for tag in 0..10 {
            queue.submit(tag, Request::Read { offset: 0, buffers: vec![slice(&memory, tag * KIB, KIB)] });
        }
        let order: Vec<u64> = std::iter::from_fn(|| queue.wait()).map(|done| done.tag).collect();
        let elapsed = start.elapsed();
        assert_eq!(order, (0..10).collect::<Vec<_>>());
        // Tag 6 to 9 come at 20, 40, 60 and 80 ms, never before.
        assert!(elapsed.as_millis() >= 80, "{elapsed:?}");
    })
    .unwrap();
}

#[test]
fn a_pause_does_not_wait_for_limits() {
    let directory = tempfile::tempdir().unwrap();
    // The second request would come in an hour.
    let bytes = Some(Rate { per_second: 1, burst: 1 });
    let disk = disk(&directory, Limits { operations: None, bytes });
    let memory = memory(64 * KIB);
    Queue::scope(&disk, |queue| {
        for tag in 0..4 {
            queue.submit(tag, Request::Read { offset: 0, buffers: vec![slice(&memory, tag * KIB, KIB)] });
        }
        assert_eq!(queue.in_flight(), 4);
        // A flush is not limited, and overtakes.
        queue.submit::<()>(99, Request::Flush);
        while queue.wait().unwrap().tag != 99 {}
        let held = queue.in_flight();
        assert!(held >= 2);
        queue.drain();
        let done = std::iter::from_fn(|| queue.completed()).count();
        assert_eq!((done, queue.in_flight()), (held, 0));
    })
    .unwrap();
}
