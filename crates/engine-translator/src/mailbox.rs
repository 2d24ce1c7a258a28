//! What other threads leave for a vCPU, and how they get its attention.
//!
//! Emitted code never tests a flag: at loop back edges and indirect jumps it loads from the address in
//! [`Mailbox::poll`]. Who wants attention stores an address there that faults.

use std::{
    sync::{
        Arc, Condvar, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::profile::{Phase, VcpuProfile};

/// Requests, as bits.
pub mod request {
    #![allow(missing_docs)]
    /// `Vcpu::run` is to return.
    pub const KICK: u32 = 1 << 0;
    /// The local APIC has news (see the `lapic` module).
    pub const LAPIC: u32 = 1 << 1;
    /// The 8259's line changed.
    pub const EXTINT: u32 = 1 << 2;
    pub const NMI: u32 = 1 << 3;
    pub const INIT: u32 = 1 << 4;
    pub const SIPI: u32 = 1 << 5;
    /// The timer of the local APIC may have expired.
    pub const TIMER: u32 = 1 << 6;
    /// Stores to some page must be noticed from now on, or the code cache is to be flushed: pass a safe point.
    pub const SAFE_POINT: u32 = 1 << 7;
    /// A sample was taken of what emitted code executes.
    pub const SAMPLE: u32 = 1 << 8;
}

/// Loads from here fault: the first page of the address space is never mapped.
pub const ATTENTION: usize = 0x10;

/// One vCPU's mailbox.
#[repr(C, align(64))]
pub struct Mailbox {
    /// The address that emitted code loads from.
    pub poll: AtomicUsize,
    requests: AtomicU32,
    /// Requested vectors of the local APIC by vector, set by any thread, taken over by the vCPU's own.
    pub irr: [AtomicU32; 8],
    /// For the bits in [`Mailbox::irr`]: level-triggered.
    pub level: [AtomicU32; 8],
    /// Who the local APIC is to others.
    pub address: crate::lapic::Address,
    /// The vector of a SIPI.
    pub sipi_vector: AtomicU32,
    /// Even while the vCPU is outside of emitted code, odd inside; only its own thread writes it.
    pub inside: AtomicU64,
    /// Where in the code cache the last sample was taken; with [`request::SAMPLE`].
    pub sample: AtomicU64,
    /// What the vCPU's thread is doing.
    pub phase: Phase,
    /// Where samples are counted, if they are; set before the vCPU runs.
    pub profile: OnceLock<Arc<VcpuProfile>>,
    /// Host pages that may no longer be stored to unnoticed; with [`request::SAFE_POINT`].
    pub forbidden: Mutex<Vec<u64>>,
    asleep: Mutex<bool>,
    wake: Condvar,
    target: u64,
}

impl Default for Mailbox {
    fn default() -> Self {
        Self {
            poll: AtomicUsize::new(ATTENTION),
            requests: AtomicU32::new(0),
            irr: Default::default(),
            level: Default::default(),
            address: Default::default(),
            sipi_vector: AtomicU32::new(0),
            inside: AtomicU64::new(0),
            sample: AtomicU64::new(0),
            phase: Phase::default(),
            profile: OnceLock::new(),
            forbidden: Mutex::default(),
            asleep: Mutex::new(false),
            wake: Condvar::new(),
            target: 0,
        }
    }
}

impl Mailbox {
    /// Leaves requests; the vCPU sees them soon.
    pub fn request(&self, bits: u32) {
        self.requests.fetch_or(bits, Ordering::SeqCst);
        self.poll.store(ATTENTION, Ordering::SeqCst);
        let asleep = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        if *asleep {
            self.wake.notify_all();
        }
    }

    /// [`Mailbox::request`] for a signal handler on the vCPU's own thread: takes no lock. (A thread that sleeps is woken
    /// by the signal itself or by its timeout.)
    pub fn request_from_signal(&self, bits: u32) {
        self.requests.fetch_or(bits, Ordering::SeqCst);
        self.poll.store(ATTENTION, Ordering::SeqCst);
    }

    /// Takes back requests that have not been seen yet.
    pub fn withdraw(&self, bits: u32) {
        self.requests.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Takes all requests; from here on `poll` is quiet until the next one. The vCPU's own thread only.
    pub fn take(&self) -> u32 {
        self.poll.store(&raw const self.target as usize, Ordering::SeqCst);
        self.requests.swap(0, Ordering::SeqCst)
    }

    /// Whether [`Mailbox::take`] is called for: there is a request, or one has been taken whose sender stored to `poll`
    /// only after that. Left there, it would stop emitted code at its first poll for ever.
    pub fn wants_attention(&self) -> bool {
        self.any() || self.poll.load(Ordering::SeqCst) == ATTENTION
    }

    /// Whether there is any request.
    pub fn any(&self) -> bool {
        self.requests.load(Ordering::SeqCst) != 0
    }

    /// Sleeps until there is a request, or for `timeout` at most.
    pub fn sleep(&self, timeout: Option<Duration>) {
        let mut asleep = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        if self.any() {
            return;
        }
        *asleep = true;
        asleep = match timeout {
            Some(timeout) => self.wake.wait_timeout(asleep, timeout).unwrap_or_else(PoisonError::into_inner).0,
            None => self.wake.wait(asleep).unwrap_or_else(PoisonError::into_inner),
        };
        *asleep = false;
    }
}
