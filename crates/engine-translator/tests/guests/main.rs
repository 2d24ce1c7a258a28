//! Whole guests through the engine seam: what needs emitted code, the run loop and several processors at once.
//!
//! Values are the SDM's. One file per subject; [`machine`] is the machine that they run on.

mod apic;
mod calls;
mod calls_between;
mod copies;
mod cross_modifying;
mod debugging;
mod deliverable;
mod extended;
mod faults;
mod fillers;
mod groups;
mod interrupts;
mod litmus;
mod machine;
mod modes;
mod movable;
mod own_code;
mod profile;
mod refills;
mod smc;
mod smc_pieces;
mod smc_torture;
mod smp;
mod stack_page;
mod storms;
mod transfers;
mod turns;
mod unmatched;
