//! virtio-balloon.
#![no_main]

use libfuzzer_sys::fuzz_target;
use purlin_devices::virtio::{
    VirtioDevice,
    balloon::{Balloon, BalloonConfig},
    testing::{EVENT_IDX, INDIRECT, abuse},
};

/// STATS_VQ, DEFLATE_ON_OOM, PAGE_POISON, REPORTING.
const FEATURES: u64 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5;

fn device() -> Box<dyn VirtioDevice> {
    Box::new(Balloon::new("balloon0", BalloonConfig::default()).expect("the balloon is made"))
}

fuzz_target!(|bytes: &[u8]| abuse(device, FEATURES | INDIRECT | EVENT_IDX, bytes));
