//! The virtio transport, rings and chains, with the simplest device behind them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use purlin_devices::virtio::{
    rng::Rng,
    testing::{EVENT_IDX, INDIRECT, abuse},
};

fuzz_target!(|bytes: &[u8]| abuse(|| Box::new(Rng::new("rng0")), INDIRECT | EVENT_IDX, bytes));
