//! The engine seam in software: a same-ISA binary translator.
#![deny(unsafe_code)]

pub mod clock;
pub mod cpu;
pub mod debug;
mod decoded;
pub mod descriptor;
pub mod engine;
pub mod exception;
pub mod features;
pub mod interrupt;
pub mod lapic;
pub mod mailbox;
pub mod mem;
pub mod msr;
pub mod mtrr;
pub mod operand;
pub mod paging;
pub mod profile;
pub mod ram;
pub mod reset;
pub mod segment;
pub mod stack;
pub mod state;
#[doc(hidden)]
pub mod subject;
pub mod system;
pub mod task;
#[cfg(test)]
mod testing;
mod timer;
pub mod tlb;
pub mod translate;
pub mod vcpu;
pub mod vm;
pub mod xstate;

pub use engine::TranslatorEngine;
