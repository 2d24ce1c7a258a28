//! Whether this host's KVM runs kernels.
//!
//! That /dev/kvm opens says little: some hosts have a KVM that runs a guest's ring 0 in an interpreter, which lacks
//! instructions that every kernel uses and is a thousand times slower than the processor. So a guest is run, in ring
//! 0 and long mode, that executes such instructions and then a loop against the clock.

mod guest;

use std::{
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

use purlin_engine::{After, Bus, Engine, EngineError, Exit, VmConfig, memory, memory::GuestRam};

use crate::{DeviceError, KvmEngine, device};

/// A guest's loop may take this many times as long as the host's. Real KVM is at 1, also where virtualisation itself
/// is emulated; an interpreter is beyond 500.
const SLOWEST: f64 = 20.0;

/// A million iterations in all. The fastest round counts: others may have been interrupted by the rest of the host.
const ROUNDS: u32 = 1_000_000 / guest::ITERATIONS;

/// How long the guest may run in all: some 5 ms would do, but the host may be busy.
const PATIENCE: Duration = Duration::from_secs(1);

/// KVM here runs kernels.
#[derive(Clone, Copy, Debug)]
pub struct Probed {
    /// How many times as long as on the host the guest's loop took.
    pub slowdown: f64,
}

/// Why KVM cannot be used here: each a sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Obstacle {
    /// The device itself.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The probe guest could not be set up.
    #[error("KVM cannot set up a guest: {0}")]
    Setup(EngineError),
    /// A guest kernel cannot use this instruction.
    #[error("this host's KVM does not run kernels: it cannot execute `{instruction}` in ring 0")]
    Instruction {
        /// The instruction.
        instruction: &'static str,
        /// What KVM said of it.
        said: String,
    },
    /// The guest's instructions are not executed by the processor.
    #[error("this host's KVM interprets kernels: a loop in ring 0 takes {slowdown:.0} times as long as on the host")]
    Slow {
        /// How many times as long.
        slowdown: f64,
    },
    /// The guest did not get to the end in time.
    #[error("this host's KVM does not run kernels: the probe guest hung at `{instruction}`")]
    Hung {
        /// Where.
        instruction: &'static str,
    },
}

impl Obstacle {
    /// What a person can do about it: a sentence.
    #[must_use]
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Device(error) => error.advice(),
            Self::Setup(_) => "Look for kvm in the kernel's log (`dmesg`), and whether another hypervisor is running.",
            Self::Instruction { .. } | Self::Slow { .. } | Self::Hung { .. } => {
                "Use the translator here; for KVM use a physical machine, or a cloud machine type that offers nested \
                 virtualisation (VT-x or AMD-V)."
            }
        }
    }
}

/// Runs the probe guest. Takes a few milliseconds where KVM is usable, 0.3 s at most where it is not.
pub fn probe() -> Result<Probed, Obstacle> {
    let engine = KvmEngine::with(device::open()?).map_err(Obstacle::Setup)?;
    run_guest(&engine)
}

fn run_guest(engine: &KvmEngine) -> Result<Probed, Obstacle> {
    let memory = guest_memory().map_err(Obstacle::Setup)?;
    let cpuid = engine.supported_cpuid();
    let config = VmConfig { memory: memory.clone(), cpuid: vec![cpuid.to_vec()] };
    let vm = engine.create_vm(config).map_err(Obstacle::Setup)?;
    let mut vcpu = vm.take_vcpu(0).map_err(Obstacle::Setup)?;
    let state = vcpu.save().map_err(Obstacle::Setup)?;
    vcpu.restore(&guest::begin(state, cpuid)).map_err(Obstacle::Setup)?;

    let clock = RoundClock::new(native_round());
    let kicker = vm.kicker(0);
    let exit = with_deadline(PATIENCE, || kicker.kick(), || vcpu.run(&clock));
    verdict(exit, &clock, &memory)
}

/// What the end of the run says.
fn verdict(exit: Result<Exit, EngineError>, clock: &RoundClock, memory: &GuestRam) -> Result<Probed, Obstacle> {
    let instruction = guest::step(memory);
    let said = match exit {
        Ok(Exit::Kicked) => match clock.slowdown() {
            None => return Err(Obstacle::Hung { instruction }),
            Some(slowdown) if slowdown > SLOWEST => return Err(Obstacle::Slow { slowdown }),
            Some(slowdown) => return Ok(Probed { slowdown }),
        },
        Ok(Exit::Shutdown { .. }) => "a triple fault".into(),
        Err(EngineError::Failed { reason, .. }) => reason,
        Err(error) => error.to_string(),
    };
    Err(Obstacle::Instruction { instruction, said })
}

fn guest_memory() -> Result<Arc<GuestRam>, EngineError> {
    let failed = |e: Box<dyn std::error::Error + Send + Sync>| EngineError::Host {
        what: "the probe guest's memory",
        source: std::io::Error::other(e),
    };
    let memory = memory::create(&[(0, guest::MEMORY)]).map_err(|e| failed(e.into()))?;
    guest::load(&memory).map_err(|e| failed(e.into()))?;
    Ok(Arc::new(memory))
}

/// The fastest of a few rounds of the loop on the host.
fn native_round() -> Duration {
    let time = || {
        let start = Instant::now();
        guest::native_round();
        start.elapsed()
    };
    (0..5).map(|_| time()).min().unwrap_or_default().max(Duration::from_nanos(1))
}

/// Does `work`; `late` is called if that takes longer than `patience`.
fn with_deadline<T>(patience: Duration, late: impl FnOnce() + Send, work: impl FnOnce() -> T) -> T {
    let (done, wait) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if wait.recv_timeout(patience) == Err(mpsc::RecvTimeoutError::Timeout) {
                late();
            }
        });
        let result = work();
        drop(done);
        result
    })
}

/// The bus of the probe guest: a stopwatch.
struct RoundClock {
    native: Duration,
    rounds: Mutex<Rounds>,
}

#[derive(Default)]
struct Rounds {
    begun: Option<Instant>,
    done: u32,
    fastest: Option<Duration>,
}

impl RoundClock {
    fn new(native: Duration) -> Self {
        Self { native, rounds: Mutex::default() }
    }

    /// The fastest round so far as a multiple of the host's.
    fn slowdown(&self) -> Option<f64> {
        let rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        rounds.fastest.map(|fastest| fastest.as_secs_f64() / self.native.as_secs_f64())
    }
}

impl Bus for RoundClock {
    fn port_out(&self, port: u16, _size: u8, _value: u32) -> After {
        let now = Instant::now();
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        match (port, rounds.begun) {
            (guest::ROUND_BEGINS, _) => rounds.begun = Some(now),
            (guest::ROUND_ENDS, Some(begun)) => {
                let took = now - begun;
                rounds.fastest = Some(rounds.fastest.map_or(took, |fastest| fastest.min(took)));
                rounds.done += 1;
            }
            _ => {}
        }
        if rounds.done >= ROUNDS { After::Leave } else { After::Continue }
    }

    fn port_in(&self, _port: u16, _size: u8) -> u32 {
        !0
    }

    fn mmio_read(&self, _address: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn mmio_write(&self, _address: u64, _data: &[u8]) -> After {
        After::Continue
    }

    fn acknowledge_interrupt(&self) -> u8 {
        0xff
    }

    fn end_of_interrupt(&self, _vector: u8) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    fn memory_at_step(step: u8) -> Arc<GuestRam> {
        let memory = guest_memory().expect("memory");
        memory.write_obj(step, GuestAddress(0x8000)).expect("within memory");
        memory
    }

    fn clock(guest_us: &[u64]) -> RoundClock {
        let clock = RoundClock::new(Duration::from_micros(20));
        clock.rounds.lock().unwrap().fastest = guest_us.iter().min().map(|us| Duration::from_micros(*us));
        clock
    }

    #[test]
    fn the_fastest_round_counts() {
        let memory = memory_at_step(6);
        let probed = verdict(Ok(Exit::Kicked), &clock(&[10_000, 24]), &memory).expect("usable");
        assert!((probed.slowdown - 1.2).abs() < 0.01);
        let slow = verdict(Ok(Exit::Kicked), &clock(&[50_000, 52_000]), &memory).expect_err("too slow");
        assert_eq!(
            slow.to_string(),
            "this host's KVM interprets kernels: a loop in ring 0 takes 2500 times as long as on the host"
        );
    }

    #[test]
    fn what_failed_is_named() {
        let failed = EngineError::Failed { engine: "kvm", rip: 0x7003, reason: "bad (bytes cc)".into() };
        let obstacle = verdict(Err(failed), &clock(&[]), &memory_at_step(1)).expect_err("failed");
        assert_eq!(obstacle.to_string(), "this host's KVM does not run kernels: it cannot execute `int3` in ring 0");
        let shutdown = verdict(Ok(Exit::Shutdown { rip: 0 }), &clock(&[]), &memory_at_step(5)).expect_err("failed");
        assert!(shutdown.to_string().contains("`invpcid` in ring 0"));
        let hung = verdict(Ok(Exit::Kicked), &clock(&[]), &memory_at_step(2)).expect_err("hung");
        assert!(hung.to_string().ends_with("hung at `lock cmpxchg16b`"));
    }

    #[test]
    fn a_late_guest_is_kicked() {
        let (kick, kicked) = mpsc::channel();
        let value = with_deadline(
            Duration::from_millis(1),
            move || kick.send(()).unwrap(),
            || {
                kicked.recv_timeout(Duration::from_secs(5)).expect("kicked");
                7
            },
        );
        assert_eq!(value, 7);
        with_deadline(Duration::from_secs(60), || panic!("not late"), || ());
    }
}
