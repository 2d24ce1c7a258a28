//! The translator: guest instructions to host instructions.

mod asm;
mod branch;
mod cache;
pub mod classify;
mod desc;
mod emit;
mod extended;
mod flags;
mod groups;
mod helpers;
mod interrupt_flag;
mod jumps;
mod layout;
mod masking;
mod memory;
mod mode;
pub mod offered;
mod operands;
#[cfg(test)]
mod pinned;
pub mod place;
mod plan;
mod recent;
mod registers;
mod returns;
mod signals;
pub mod source;
mod spare;
mod strings;
mod stubs;
mod trace;
mod transfers;

pub use cache::{CodeCache, Content, Ends, Found, GuestPlace, JumpTarget, Moment, Origin, Piece, prepare};
pub use desc::{AccessDesc, AcrossDesc, ExitDesc, LinkDesc, RefillDesc};
pub use emit::FaultPoint;
pub use helpers::helpers;
pub use jumps::{Context, JumpTables};
pub use layout::{EmittedState, ExitKind};
pub use memory::Backing;
pub use recent::RecentBlocks;
pub use returns::ReturnStacks;
pub use signals::in_emitted_code;
pub use source::{PageCopies, Stop};
