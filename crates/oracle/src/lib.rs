//! The oracle: the host's processor in ring 3 against the translator.
//!
//! Instructions and states are generated from seeds, run natively in a child process and under the translator (one
//! instruction at a time, in blocks with an empty TLB, in blocks with a full one), and compared: registers, flags
//! that are defined, memory, and the exception that ended it.

pub mod case;
pub mod check;
pub mod compare;
pub mod coverage;
pub mod generate;
pub mod host;
pub mod layout;
pub mod native;
pub mod reduce;
pub mod rng;
pub mod saved;
pub mod segments;
pub mod translated;
pub mod xsave;
