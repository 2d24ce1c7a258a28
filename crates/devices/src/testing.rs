//! What the devices' tests share.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
};

use proptest::prelude::*;

pub use crate::virtio::testing::Messages;
use crate::{Device, Effect, IrqLine, Space};

/// The far end of an interrupt line.
#[derive(Clone, Default)]
pub struct Probe(Arc<Mutex<(bool, u32)>>);

impl Probe {
    /// A line that leads here.
    pub fn line(&self) -> IrqLine {
        let state = self.0.clone();
        IrqLine::new(move |high| {
            let mut state = state.lock().unwrap();
            state.1 += u32::from(high && !state.0);
            state.0 = high;
        })
    }

    pub fn is_high(&self) -> bool {
        self.0.lock().unwrap().0
    }

    /// How often the line rose since the last call.
    pub fn take_rises(&self) -> u32 {
        std::mem::take(&mut self.0.lock().unwrap().1)
    }
}

/// A sink that keeps what it gets.
#[derive(Clone, Default)]
pub struct Collect(Arc<Mutex<Vec<u8>>>);

impl Collect {
    pub fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

impl Write for Collect {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One byte from a port of the device's range `range`.
pub fn inb(device: &mut dyn Device, range: u8, offset: u64) -> u8 {
    let mut data = [0];
    device.read(Space::Port { range }, offset, &mut data);
    data[0]
}

/// One byte to a port of the device's range `range`.
pub fn outb(device: &mut dyn Device, range: u8, offset: u64, value: u8) -> Effect {
    device.write(Space::Port { range }, offset, &[value])
}

/// One thing that can happen to a device.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    Read {
        range: usize,
        offset: u64,
        size: usize,
    },
    Write {
        range: usize,
        offset: u64,
        size: usize,
        value: u64,
    },
    /// Time passes, ns.
    Wait(u64),
    /// Something from outside the guest, of the device's own kind.
    Poke(u64),
}

/// Random steps.
pub fn steps() -> impl Strategy<Value = Vec<Step>> {
    let size = prop::sample::select(vec![1usize, 1, 1, 2, 4, 8]);
    let value = prop_oneof![any::<u64>(), 0u64..256, (0u32..64).prop_map(|bit| 1 << bit)];
    // Mostly short waits, some that jump over many periods of everything.
    let wait = prop_oneof![0u64..5_000, 0u64..5_000_000, 0u64..5_000_000_000_000];
    let step = prop_oneof![
        4 => (any::<usize>(), any::<u64>(), size.clone()).prop_map(|(range, offset, size)| {
            Step::Read { range, offset, size }
        }),
        8 => (any::<usize>(), any::<u64>(), size, value).prop_map(|(range, offset, size, value)| {
            Step::Write { range, offset, size, value }
        }),
        4 => wait.prop_map(Step::Wait),
        4 => any::<u64>().prop_map(Step::Poke),
    ];
    prop::collection::vec(step, 1..120)
}

/// A device, its clock, and what it answered.
struct Driven<'a, D> {
    device: D,
    now: u64,
    ranges: &'a [(Space, u64)],
    poke: &'a dyn Fn(&mut D, u64),
    log: Vec<(Vec<u8>, Option<Effect>, Option<u64>)>,
}

impl<D: Device> Driven<'_, D> {
    fn step(&mut self, step: Step) {
        self.device.advance(self.now);
        let mut data = vec![0; 8];
        let mut effect = None;
        match step {
            Step::Read { range, offset, size } => {
                let (space, offset, size) = self.place(range, offset, size);
                data.truncate(size);
                self.device.read(space, offset, &mut data);
            }
            Step::Write { range, offset, size, value } => {
                let (space, offset, size) = self.place(range, offset, size);
                effect = Some(self.device.write(space, offset, &value.to_le_bytes()[..size]));
            }
            Step::Wait(ns) => {
                // The deadline is kept, as the machine keeps it.
                let end = self.now + ns;
                for _ in 0..50 {
                    match self.device.deadline() {
                        Some(at) if at < end => {
                            self.now = self.now.max(at);
                            self.device.advance(self.now);
                        }
                        _ => break,
                    }
                }
                self.now = end;
                self.device.advance(end);
            }
            Step::Poke(value) => (self.poke)(&mut self.device, value),
        }
        self.log.push((data, effect, self.device.deadline()));
    }

    fn place(&self, range: usize, offset: u64, size: usize) -> (Space, u64, usize) {
        let (space, length) = self.ranges[range % self.ranges.len()];
        let offset = offset % length;
        (space, offset, size.min((length - offset) as usize))
    }
}

/// Random accesses do not panic, and a device restored from a saved state goes on like the one that was saved.
pub fn goes_on_after_restore<D: Device>(
    make: impl Fn() -> D,
    ranges: &[(Space, u64)],
    poke: impl Fn(&mut D, u64),
    before: &[Step],
    after: &[Step],
) {
    let mut first = Driven { device: make(), now: 0, ranges, poke: &poke, log: Vec::new() };
    before.iter().for_each(|&step| first.step(step));
    let saved = first.device.save();
    assert_eq!(saved.name, first.device.name());

    let mut second = Driven { device: make(), now: first.now, ranges, poke: &poke, log: Vec::new() };
    second.device.restore(&saved).expect("a saved state is valid");
    assert_eq!(second.device.save(), saved);
    assert_eq!(second.device.deadline(), first.device.deadline());
    first.log.clear();
    after.iter().for_each(|&step| first.step(step));
    after.iter().for_each(|&step| second.step(step));
    assert_eq!(first.log, second.log);
}
