//! A driver that does whatever a string of bytes says: for property tests and fuzzing.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use vm_memory::{Bytes, GuestAddress};

use super::{Buffer, Driver, SLOT, page};
use crate::{pci::PciFunction, virtio::VirtioDevice};

/// A string of bytes, read from the front; behind its end there are zeroes.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let count = N.min(self.0.len());
        let (head, tail) = self.0.split_at(count);
        bytes[..count].copy_from_slice(head);
        self.0 = tail;
        bytes
    }

    fn byte(&mut self) -> u8 {
        u8::from_le_bytes(self.bytes())
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    /// An address: mostly in the first 64 KiB of memory, where everything is; or round a slot's end; or anywhere.
    fn address(&mut self) -> u64 {
        match self.byte() % 8 {
            0 => u64::from_le_bytes(self.bytes()),
            1 => 2 * SLOT - u64::from(self.byte()),
            2 => SLOT - u64::from(self.byte()),
            _ => u64::from(self.word()),
        }
    }

    /// A length: mostly one that devices like.
    fn length(&mut self) -> u32 {
        match self.byte() % 6 {
            0 => 16,
            1 => 1,
            2 => 512 * u32::from(self.byte() % 16),
            3 => u32::from(self.byte()),
            4 => u32::from(self.word()),
            _ => u32::from_le_bytes(self.bytes()),
        }
    }
}

/// Drives a device, which `make` makes, as `bytes` say: registers, configuration space, rings and memory; pauses, saves
/// and restores it in between. Nothing panics, nothing hangs, and in the end the device works after a reset.
///
/// Before another device is made for a restore, the last one is gone.
pub fn abuse(make: impl Fn() -> Box<dyn VirtioDevice>, features: u64, bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut driver = Driver::new(make());
    driver.initialize(features);
    while !input.0.is_empty() {
        driver = step(driver, &make, features, &mut input);
    }
    driver.set_status(0);
    driver.initialize(features);
    assert_eq!(driver.status(), 0xf);
}

fn step(mut driver: Driver, make: &impl Fn() -> Box<dyn VirtioDevice>, features: u64, input: &mut Input<'_>) -> Driver {
    let queue = usize::from(input.byte()) % driver.queues.len();
    match input.byte() % 12 {
        0 => {
            let (at, size) = (u64::from(input.byte() % 0x40), 1 << (input.byte() % 4));
            driver.write(at, &input.bytes::<8>()[..size]);
            driver.read::<8>(at);
        }
        1 => {
            let (ring, at) = (usize::from(input.byte() % 3), u64::from(input.byte()));
            poke(&driver, driver.queues[queue].rings[ring] + at, &input.bytes::<2>());
        }
        2 | 3 => {
            let (index, flags, next) = (input.byte() % 16, input.byte() % 8, input.byte() % 18);
            let buffer = Buffer { address: input.address(), length: input.length(), writable: false };
            let table = if input.byte().is_multiple_of(4) { input.address() } else { driver.queues[queue].rings[0] };
            let [address, length] = [buffer.address.to_le_bytes(), u64::from(buffer.length).to_le_bytes()];
            let rest = [flags, 0, next, 0];
            poke(&driver, table.wrapping_add(16 * u64::from(index)), &[&address[..], &length[..4], &rest].concat());
        }
        4 => driver.make_available(queue, u16::from(input.byte() % 18)),
        5 => driver.notify(queue),
        6 => {
            // A chain as drivers make it, of any buffers.
            let mut buffer = |writable| Buffer { address: input.address(), length: input.length(), writable };
            let buffers = [buffer(false), buffer(false), buffer(true), buffer(true)];
            let count = 1 + usize::from(input.byte() % 4);
            driver.offer(queue, &buffers[4 - count..]);
            driver.notify(queue);
        }
        7 => {
            let at = input.address();
            let data = input.bytes::<16>();
            poke(&driver, at, &data);
        }
        8 => {
            let (at, size) = (u64::from(input.byte()), 1 << (input.byte() % 4));
            driver.read::<8>(page::DEVICE + at);
            driver.write(page::DEVICE + at, &input.bytes::<8>()[..size]);
        }
        9 => {
            let register = u16::from(input.byte()) & !3;
            driver.function.write_config(register, &input.bytes::<4>());
            driver.function.read_config(register, &mut [0; 4]);
        }
        10 => {
            driver.function.hold();
            if input.byte().is_multiple_of(4) {
                let (saved, memory) = (driver.function.save(), driver.memory.clone());
                let side = driver.detach();
                driver = Driver::restored(memory, make(), &saved, side);
            }
            driver.function.open();
        }
        _ => {
            driver.set_status(0);
            driver.initialize(features);
        }
    }
    driver
}

/// Writes to memory, where there is some.
fn poke(driver: &Driver, address: u64, data: &[u8]) {
    // Beyond its end a driver cannot write.
    let _ = driver.memory.write_slice(data, GuestAddress(address));
}

/// Offers a chain of these buffers again and again, as fast as the device gives it back, and holds the device meanwhile:
/// that comes to an end, and nothing is used after it.
pub fn is_held_in_a_flood(driver: Driver, buffers: &[Buffer]) {
    is_held_in_a_flood_of(driver, 0, buffers);
}

/// The same with another queue.
pub fn is_held_in_a_flood_of(mut driver: Driver, queue: usize, buffers: &[Buffer]) {
    driver.offer(queue, buffers);
    let (memory, over) = (driver.memory.clone(), AtomicBool::new(false));
    let [_, available, used] = driver.queues[queue].rings.map(|ring| GuestAddress(ring + 2));
    let index = |at: GuestAddress| memory.load::<u16>(at, Ordering::SeqCst).expect("the ring is in memory");
    thread::scope(|scope| {
        // Every entry of the ring is the head 0.
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                let ahead = index(used).wrapping_add(8);
                memory.store(ahead, available, Ordering::SeqCst).expect("the ring is in memory");
            }
        });
        for _ in 0..10 {
            driver.notify(queue);
            thread::sleep(Duration::from_millis(2));
            driver.function.hold();
            let held_at = index(used);
            thread::sleep(Duration::from_millis(1));
            assert_eq!(index(used), held_at);
            driver.function.open();
        }
        driver.function.hold();
        over.store(true, Ordering::SeqCst);
    });
    assert_eq!(driver.status(), 0xf);
    assert_ne!(index(used), 0, "nothing was served");
}
