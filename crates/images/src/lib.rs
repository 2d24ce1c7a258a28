//! Images of guests: kept in a [`store::Store`], [built](build) from Debian's packages, [imported](import), and
//! [made ready for a run](prepare): a thin overlay, the kernel that the image itself has ([`boot`]), and what cloud-init
//! is to know ([`seed`]).
//!
//! An image is never written once it is in the store.
#![forbid(unsafe_code)]

pub mod boot;
pub mod build;
pub mod convert;
mod error;
pub mod import;
mod metadata;
pub mod prepare;
pub mod seed;
pub mod ssh;
pub mod store;

pub use error::Error;
pub use metadata::{Metadata, Origin};
