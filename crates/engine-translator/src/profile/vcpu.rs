//! What is counted of one vCPU, by its own thread and by the signal handler on top of that.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use iced_x86::Mnemonic;
use purlin_engine::{After, Bus};

use super::phase::{Phase, Place};
use crate::translate::{CodeCache, ExitKind};

/// The counts of one vCPU. Only its thread writes them.
#[derive(Debug)]
pub struct VcpuProfile {
    code: CodeRanges,
    samples: [AtomicU64; Place::ALL.len()],
    exits: [AtomicU64; ExitKind::COUNT],
    /// By mnemonic: samples, and how often such an instruction was emulated.
    emulated: Box<[[AtomicU64; 2]]>,
    cpu_ns: AtomicU64,
}

/// What is where in the code cache.
#[derive(Clone, Debug)]
struct CodeRanges {
    cache: Range<u64>,
    /// The stubs that call helpers.
    helpers: Range<u64>,
    blocks: u64,
}

impl CodeRanges {
    /// Where a thread is whose instruction pointer is `rip`, and that was at `phase` when it last said so.
    fn place(&self, rip: u64, phase: Place) -> Place {
        match phase {
            Place::User | Place::Kernel if !self.cache.contains(&rip) || self.helpers.contains(&rip) => Place::Helpers,
            Place::User | Place::Kernel if rip < self.blocks => Place::Stubs,
            other => other,
        }
    }
}

/// An addition that no other thread makes, and that no signal handler makes to the same counter.
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed) + n, Ordering::Relaxed);
}

impl VcpuProfile {
    /// Of a vCPU that executes from `code`.
    pub fn new(code: &CodeCache) -> Self {
        let code = CodeRanges { cache: code.range(), helpers: code.helper_stubs(), blocks: code.first_block() };
        Self {
            code,
            samples: Default::default(),
            exits: Default::default(),
            emulated: Mnemonic::values().map(|_| Default::default()).collect(),
            cpu_ns: AtomicU64::new(0),
        }
    }

    /// A sample of the calling thread, which is the vCPU's, at host address `rip`. For the signal handler.
    pub fn sampled(&self, rip: u64, phase: &Phase) {
        let (phase, mnemonic) = phase.now();
        let place = self.code.place(rip, phase);
        add(&self.samples[place as usize], 1);
        if place == Place::Emulation
            && let Some([samples, _]) = self.emulated.get(mnemonic)
        {
            add(samples, 1);
        }
    }

    /// Emitted code was left.
    pub fn left(&self, kind: ExitKind) {
        add(&self.exits[kind as usize], 1);
    }

    /// An instruction is emulated.
    pub fn emulates(&self, mnemonic: Mnemonic) {
        if let Some([_, count]) = self.emulated.get(mnemonic as usize) {
            add(count, 1);
        }
    }

    /// Runs the vCPU on a bus that says when the thread is with it, and counts the time of the processor that it takes.
    pub fn time<T>(&self, phase: &Phase, bus: &dyn Bus, run: impl FnOnce(&dyn Bus) -> T) -> T {
        let begin = thread_ns();
        let result = run(&PhasedBus { bus, phase });
        add(&self.cpu_ns, thread_ns().saturating_sub(begin));
        result
    }

    /// How many samples found it at `place`.
    pub fn samples(&self, place: Place) -> u64 {
        self.samples[place as usize].load(Ordering::Relaxed)
    }

    /// How often emitted code was left so.
    pub fn exits(&self, kind: ExitKind) -> u64 {
        self.exits[kind as usize].load(Ordering::Relaxed)
    }

    /// Samples and count of an emulated instruction.
    pub fn emulated(&self, mnemonic: Mnemonic) -> [u64; 2] {
        self.emulated[mnemonic as usize].each_ref().map(|n| n.load(Ordering::Relaxed))
    }

    /// Time of the host's processors that its runs took, those that are over.
    pub fn cpu_ns(&self) -> u64 {
        self.cpu_ns.load(Ordering::Relaxed)
    }
}

/// The processor's time of the calling thread.
fn thread_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A bus whose time is that of [`Place::Devices`].
struct PhasedBus<'a> {
    bus: &'a dyn Bus,
    phase: &'a Phase,
}

impl Bus for PhasedBus<'_> {
    fn port_in(&self, port: u16, size: u8) -> u32 {
        let _phase = self.phase.during(Place::Devices);
        self.bus.port_in(port, size)
    }

    fn port_out(&self, port: u16, size: u8, value: u32) -> After {
        let _phase = self.phase.during(Place::Devices);
        self.bus.port_out(port, size, value)
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        let _phase = self.phase.during(Place::Devices);
        self.bus.mmio_read(address, data);
    }

    fn mmio_write(&self, address: u64, data: &[u8]) -> After {
        let _phase = self.phase.during(Place::Devices);
        self.bus.mmio_write(address, data)
    }

    fn acknowledge_interrupt(&self) -> u8 {
        let _phase = self.phase.during(Place::Devices);
        self.bus.acknowledge_interrupt()
    }

    fn end_of_interrupt(&self, vector: u8) {
        let _phase = self.phase.during(Place::Devices);
        self.bus.end_of_interrupt(vector);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn emitted_code_is_told_from_what_it_calls() {
        let ranges = CodeRanges { cache: 0x1000..0x9000, helpers: 0x1800..0x1c00, blocks: 0x2000 };
        for (rip, phase, place) in [
            (0x2000, Place::User, Place::User),
            (0x8fff, Place::Kernel, Place::Kernel),
            (0x1000, Place::User, Place::Stubs),
            (0x1c00, Place::Kernel, Place::Stubs),
            (0x1800, Place::Kernel, Place::Helpers),
            // Rust, called by emitted code.
            (0x9000, Place::User, Place::Helpers),
            (0x10, Place::Kernel, Place::Helpers),
            // Rust that has said what it does.
            (0x10, Place::Devices, Place::Devices),
            (0x10, Place::Loop, Place::Loop),
            (0x10, Place::Translation, Place::Translation),
        ] {
            assert_eq!(ranges.place(rip, phase), place, "{rip:#x} {phase:?}");
        }
    }

    #[test]
    fn a_sample_is_one_of_the_place_and_the_instruction() {
        let code = CodeCache::default();
        let (vcpu, phase) = (VcpuProfile::new(&code), Phase::default());
        phase.set(Place::Kernel);
        vcpu.sampled(code.first_block(), &phase);
        vcpu.sampled(code.stubs.enter, &phase);
        vcpu.sampled(code.stubs.access, &phase);
        vcpu.sampled(code.stubs.refill[2][1], &phase);
        phase.emulating(Mnemonic::Cpuid);
        vcpu.emulates(Mnemonic::Cpuid);
        vcpu.sampled(thread_ns as *const () as u64, &phase);
        let counts = Place::ALL.map(|place| vcpu.samples(place));
        assert_eq!(counts, [0, 1, 1, 2, 0, 0, 1, 0, 0, 0, 0]);
        assert_eq!(vcpu.emulated(Mnemonic::Cpuid), [1, 1]);
        assert_eq!(vcpu.emulated(Mnemonic::Hlt), [0, 0]);
    }

    #[test]
    fn the_bus_is_a_place_of_its_own() {
        #[derive(Default)]
        struct Asks(Phase);
        impl Bus for Asks {
            fn port_in(&self, _port: u16, _size: u8) -> u32 {
                self.0.now().0 as u32
            }
            fn port_out(&self, _port: u16, _size: u8, _value: u32) -> After {
                After::Continue
            }
            fn mmio_read(&self, _address: u64, data: &mut [u8]) {
                data.fill(self.0.now().0 as u8);
            }
            fn mmio_write(&self, _address: u64, _data: &[u8]) -> After {
                After::Continue
            }
            fn acknowledge_interrupt(&self) -> u8 {
                self.0.now().0 as u8
            }
            fn end_of_interrupt(&self, _vector: u8) {}
        }
        let vcpu = VcpuProfile::new(&CodeCache::default());
        let asks = Asks::default();
        let told = vcpu.time(&asks.0, &asks, |bus| {
            let mut data = [0];
            bus.mmio_read(0, &mut data);
            [bus.port_in(0, 1) as u8, data[0], bus.acknowledge_interrupt()]
        });
        assert_eq!(told, [Place::Devices as u8; 3]);
        assert_eq!(asks.0.now().0, Place::Loop);
    }
}
