//! virtio-blk with two queues, on a raw disk of 1 MiB.
#![no_main]

use std::{fs::File, path::PathBuf, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use purlin_devices::virtio::{
    VirtioDevice,
    block::{Block, OnIoError},
    testing::{EVENT_IDX, INDIRECT, abuse},
};
use purlin_storage::{Disk, DiskSpec};

/// FLUSH, DISCARD, WRITE_ZEROES, MQ.
const FEATURES: u64 = 1 << 9 | 1 << 13 | 1 << 14 | 1 << 12;
const SIZE: u64 = 1 << 20;

static IMAGE: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = std::env::temp_dir().join(format!("purlin-fuzz-{}.img", std::process::id()));
    let file = File::create(&path).expect("the image is made");
    file.set_len(SIZE).expect("the image has its size");
    path
});

fn device() -> Box<dyn VirtioDevice> {
    let disk = Disk::open(&DiskSpec::new(&*IMAGE)).expect("the image opens");
    Box::new(Block::new("disk0", disk, 2, OnIoError::Report))
}

fuzz_target!(|bytes: &[u8]| {
    abuse(device, FEATURES | INDIRECT | EVENT_IDX, bytes);
    let length = std::fs::metadata(&*IMAGE).expect("the image is there").len();
    assert_eq!(length, SIZE, "the disk has grown or shrunk");
});
