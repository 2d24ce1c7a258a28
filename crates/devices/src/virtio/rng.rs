//! The entropy device (virtio 1.3, 5.4): fills buffers with the host's random bytes.

use std::{io, sync::Arc};

use purlin_sandbox::Role;
use purlin_state::{Section, StateError};
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::{Activation, Chain, Running, Told, VirtioDevice, Virtqueue, Wake, Workers, fill, nothing};
use crate::stateless::Nothing;

/// The most bytes that one request gets. The driver is told how many they are; Linux asks for 64 at a time.
const MOST: usize = 64 << 10;

/// The device.
pub struct Rng {
    name: String,
}

impl Rng {
    /// A device with this instance's name.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned() }
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        VIRTIO_ID_RNG as u16
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, driver: Activation) -> io::Result<Box<dyn Running>> {
        let mut workers = Workers::default();
        for queue in driver.queues {
            workers.start(
                &self.name,
                &[queue.index()],
                Some(Role::Device),
                Box::new(move |wake: &Wake| run(&queue, wake)),
            )?;
        }
        Ok(Box::new(workers))
    }

    fn save(&self) -> Section {
        nothing(&self.name)
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        Nothing::check(saved)
    }
}

fn run(queue: &Arc<Virtqueue>, wake: &Wake) {
    loop {
        match wake.wait(&[]) {
            Told::Work => queue.serve(wake, random),
            Told::Hold => {}
            Told::End => return,
        }
    }
}

/// Fills a request; returns how many bytes it got.
fn random(chain: Chain<'_>) -> u32 {
    let mut bytes = vec![0; chain.writable_length().min(MOST)];
    let mut done = 0;
    while done < bytes.len() {
        // The host's pool was ready long ago; all that may happen is a signal.
        done += getrandom(&mut bytes[done..], GetRandomFlags::empty()).unwrap_or(0);
    }
    fill(&chain.writable, &bytes) as u32
}

#[cfg(test)]
mod tests {
    use proptest::{
        collection,
        prelude::{ProptestConfig, any, proptest},
    };

    use super::*;
    use crate::{
        pci::PciFunction,
        virtio::testing::{Buffer, Driver, INDIRECT, abuse, is_held_in_a_flood},
    };

    fn driver() -> Driver {
        let mut driver = Driver::new(Box::new(Rng::new("rng0")));
        driver.initialize(0);
        driver
    }

    #[test]
    fn buffers_are_filled_each_with_other_bytes() {
        let mut driver = driver();
        let (first, second, third) = (driver.writable(64), driver.writable(64), driver.writable(16));
        assert_eq!(driver.request(0, &[first, third]).written, 80);
        assert_eq!(driver.request(0, &[second]).written, 64);
        let (first, second) = (driver.content(first), driver.content(second));
        assert_ne!(first, second);
        assert!(first.iter().filter(|b| **b == 0xee).count() < 16);
        assert_ne!(driver.content(third), [0xee; 16]);
    }

    #[test]
    fn a_request_for_everything_gets_a_part_and_one_for_nothing_nothing() {
        let mut driver = driver();
        let huge = Buffer { address: 0x20_0000, length: 4 << 20, writable: true };
        assert_eq!(driver.request(0, &[huge]).written as usize, MOST);
        let readable = driver.readable(b"not for writing");
        assert_eq!(driver.request(0, &[readable]).written, 0);
        assert_eq!(driver.content(readable), b"not for writing");
    }

    #[test]
    fn a_flood_does_not_keep_it_from_being_held() {
        let mut driver = driver();
        let buffer = driver.writable(64);
        is_held_in_a_flood(driver, &[buffer]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_hostile_driver_breaks_nothing(bytes in collection::vec(any::<u8>(), 0..600)) {
            abuse(|| Box::new(Rng::new("rng0")), INDIRECT, &bytes);
        }
    }

    #[test]
    fn it_goes_on_after_a_move() {
        let mut driver = driver();
        let buffer = driver.writable(32);
        driver.request(0, &[buffer]);
        driver.function.hold();
        let mut driver = driver.moved_to(Box::new(Rng::new("rng0")));
        driver.function.open();
        assert_eq!(driver.request(0, &[buffer]).written, 32);
    }
}
