//! Boot methods: how a kernel file comes into memory, what it is told, and where the first processor starts.
//!
//! One file for each method. [`load`] looks at the kernel's content to choose one; a new method is a module with a
//! `recognise` and a `load`, and one line here.

mod bda;
mod bzimage;
mod describe;
mod elf;
mod entry;
pub mod image;
mod multiboot;
mod placement;
mod pvh;

use purlin_engine::memory::GuestRam;

pub use entry::{Entry, enable_caching};
use placement::Target;

use crate::{config::BootConfig, error::MachineError};

/// Loads the kernel and what goes with it into `ram`, of a machine with `memory` bytes.
///
/// The firmware tables must be there already: kernels are told where.
pub fn load(boot: &BootConfig, ram: &GuestRam, memory: u64) -> Result<Entry, MachineError> {
    let target = Target { ram, memory };
    let kernel = boot.kernel.read()?;
    if boot.cmdline.contains('\0') {
        return Err(MachineError::CmdlineNul);
    }
    bda::write(ram)?;
    if bzimage::recognise(&kernel) {
        bzimage::load(boot, &kernel, &target)
    } else if let Some(header) = multiboot::recognise(&kernel) {
        multiboot::load(boot, &kernel, header, &target)
    } else if let Some(elf) = pvh::recognise(&kernel) {
        pvh::load(boot, &elf, &target)
    } else {
        Err(boot.kernel.not_a_kernel(describe::refusal(&kernel)))
    }
}

#[cfg(test)]
pub(crate) mod tests;
