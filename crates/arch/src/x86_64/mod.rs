//! x86-64 guests.

pub mod cpuid;
pub mod lapic;
pub mod msr;
pub mod regs;
pub mod state;
