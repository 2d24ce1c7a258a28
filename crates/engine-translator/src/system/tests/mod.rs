//! Emulated instructions, by subject.
// Tables of cases are tables of tuples.
#![allow(clippy::type_complexity)]

mod control_regs;
mod decimal;
mod far;
mod fast_calls;
mod flags;
mod iret;
mod near;
mod random;
mod segments;
mod stack_ops;
