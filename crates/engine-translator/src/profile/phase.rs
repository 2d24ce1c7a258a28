//! What a vCPU's thread is doing, for samples that are taken of it.
//!
//! The run loop says it at all times, by plain stores to a word of the mailbox: that costs less than asking whether anybody
//! wants to know. What emitted code calls says nothing: where the sample finds the thread is enough (see
//! [`super::vcpu`]).

use std::sync::atomic::{AtomicU32, Ordering};

use iced_x86::Mnemonic;

/// Where a vCPU's time goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Place {
    /// The run loop, where it is none of the others.
    Loop,
    /// Translated code of user mode.
    User,
    /// Translated code of other modes.
    Kernel,
    /// The stubs by which translated code is entered and left.
    Stubs,
    /// What translated code calls for accesses that the TLB does not answer.
    Helpers,
    /// Finding the block for an address.
    Lookup,
    /// Making a block: decoding, emitting.
    Translation,
    /// Instructions that are not translated.
    Emulation,
    /// Interrupts and exceptions on their way into the guest.
    Events,
    /// What the vCPU asks of devices.
    Devices,
    /// Waiting for other vCPUs to stand outside of translated code.
    Waiting,
}

impl Place {
    /// All, in the order in which they are shown.
    pub const ALL: [Self; 11] = [
        Self::User,
        Self::Kernel,
        Self::Stubs,
        Self::Helpers,
        Self::Lookup,
        Self::Translation,
        Self::Emulation,
        Self::Events,
        Self::Devices,
        Self::Waiting,
        Self::Loop,
    ];

    /// A name for programs.
    pub fn key(self) -> &'static str {
        match self {
            Self::Loop => "run_loop",
            Self::User => "user_code",
            Self::Kernel => "kernel_code",
            Self::Stubs => "stubs",
            Self::Helpers => "helpers",
            Self::Lookup => "lookup",
            Self::Translation => "translation",
            Self::Emulation => "emulation",
            Self::Events => "events",
            Self::Devices => "devices",
            Self::Waiting => "waiting",
        }
    }

    /// A name for people.
    pub fn label(self) -> &'static str {
        match self {
            Self::Loop => "the run loop, going to sleep",
            Self::User => "translated code, user mode",
            Self::Kernel => "translated code, kernel mode",
            Self::Stubs => "entering and leaving translated code",
            Self::Helpers => "helpers: TLB refills, slow accesses",
            Self::Lookup => "misses: finding the next block",
            Self::Translation => "translation",
            Self::Emulation => "emulated instructions",
            Self::Events => "delivery of interrupts and exceptions",
            Self::Devices => "devices, as far as a vCPU waits for them",
            Self::Waiting => "waiting for other vCPUs",
        }
    }

    fn from_raw(raw: u8) -> Self {
        Self::ALL.into_iter().find(|&place| place as u8 == raw).unwrap_or(Self::Loop)
    }
}

/// Where a vCPU's thread is; only that thread, and the signal handler on top of it, use this. It is a [`Place`], and above
/// that the mnemonic of the instruction that is emulated.
#[derive(Debug)]
pub struct Phase(AtomicU32);

impl Default for Phase {
    fn default() -> Self {
        Self(AtomicU32::new(Place::Loop as u32))
    }
}

const MNEMONIC_SHIFT: u32 = 8;

impl Phase {
    /// The thread is at `place` until something else is said.
    pub fn set(&self, place: Place) {
        self.0.store(place as u32, Ordering::Relaxed);
    }

    /// It emulates such an instruction.
    pub fn emulating(&self, mnemonic: Mnemonic) {
        self.0.store(Place::Emulation as u32 | (mnemonic as u32) << MNEMONIC_SHIFT, Ordering::Relaxed);
    }

    /// The thread is at `place` until the result is dropped; then again where it was.
    pub fn during(&self, place: Place) -> During<'_> {
        let before = self.0.load(Ordering::Relaxed);
        self.set(place);
        During { phase: self, before }
    }

    /// Where the thread is; with [`Place::Emulation`] the number of the mnemonic.
    pub fn now(&self) -> (Place, usize) {
        let word = self.0.load(Ordering::Relaxed);
        (Place::from_raw(word as u8), (word >> MNEMONIC_SHIFT) as usize)
    }
}

/// See [`Phase::during`].
#[must_use]
pub struct During<'a> {
    phase: &'a Phase,
    before: u32,
}

impl Drop for During<'_> {
    fn drop(&mut self) {
        self.phase.0.store(self.before, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inner_phase_gives_way_to_the_outer_one() {
        let phase = Phase::default();
        assert_eq!(phase.now(), (Place::Loop, 0));
        phase.emulating(Mnemonic::Outsb);
        {
            let _devices = phase.during(Place::Devices);
            assert_eq!(phase.now(), (Place::Devices, 0));
        }
        assert_eq!(phase.now(), (Place::Emulation, Mnemonic::Outsb as usize));
        phase.set(Place::Loop);
        assert_eq!(phase.now(), (Place::Loop, 0));
    }

    #[test]
    fn every_place_is_listed_once() {
        for (i, place) in Place::ALL.into_iter().enumerate() {
            assert_eq!(Place::from_raw(place as u8), place);
            assert!(Place::ALL[..i].iter().all(|&p| p != place && p.key() != place.key()));
        }
    }
}
