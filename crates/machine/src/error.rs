//! Why a machine could not be made: one line each, saying what, why and what to do.

use std::path::PathBuf;

use purlin_arch::x86_64::cpuid::CpuModel;
use purlin_engine::{EngineError, memory::MemoryError};
use purlin_state::StateError;

use crate::layout::{MAX_CPUS, MAX_DISKS, MAX_NETWORKS, MIN_MEMORY};

/// Why a machine could not be made, booted or restored.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Less memory than any kernel needs.
    #[error("{} of memory is too little: give the machine at least {}", size(*asked), size(MIN_MEMORY))]
    MemoryTooSmall {
        /// Bytes asked for.
        asked: u64,
    },
    /// Not a multiple of a page.
    #[error("{asked} bytes of memory is not a multiple of 4096: round it")]
    MemoryUnaligned {
        /// Bytes asked for.
        asked: u64,
    },
    /// More than the host could ever back.
    #[error("{} of memory is more than this host has in RAM and swap ({}): give the machine less", size(*asked), size(*host))]
    MemoryTooLarge {
        /// Bytes asked for.
        asked: u64,
        /// Bytes of the host's RAM and swap.
        host: u64,
    },
    /// No or too many processors.
    #[error("a machine cannot have {asked} processors: give it 1 to {MAX_CPUS}")]
    CpuCount {
        /// Processors asked for.
        asked: u32,
    },
    /// More disks than there are slots for.
    #[error("a machine cannot have {asked} disks: give it at most {MAX_DISKS}")]
    TooManyDisks {
        /// Disks asked for.
        asked: usize,
    },
    /// More network devices than there are slots for.
    #[error("a machine cannot have {asked} networks: give it at most {MAX_NETWORKS}")]
    TooManyNetworks {
        /// Networks asked for.
        asked: usize,
    },
    /// A saved machine is to go on with memory of other slots.
    #[error("the saved machine had {} of memory and is given something else: its state and memory are not of one moment", size(*saved))]
    MemoryMismatch {
        /// Bytes that it had.
        saved: u64,
    },
    /// A saved machine is to go on with other networks.
    #[error("the saved machine had {saved} networks and is given {given}: give it as many, in the same order")]
    NetworkCount {
        /// What it had.
        saved: u32,
        /// What it is given.
        given: usize,
    },
    /// A saved machine is to go on with a console that it did not have, or without the one that it had.
    #[error(
        "the saved machine had {} console on virtio-console: give it {}",
        if *saved { "a" } else { "no" },
        if *saved { "one" } else { "none" }
    )]
    Console {
        /// Whether it had one.
        saved: bool,
    },
    /// A saved machine is to go on with other disks.
    #[error("the saved machine had {saved} disks and is given {given}: give it the same ones in the same order")]
    DiskCount {
        /// What it had.
        saved: u32,
        /// What it is given.
        given: usize,
    },
    /// A balloon that would take all memory.
    #[error("a balloon of {} leaves nothing of {} of memory: make it smaller", size(*asked), size(*memory))]
    BalloonTooLarge {
        /// Bytes asked for.
        asked: u64,
        /// Bytes of the machine's memory.
        memory: u64,
    },
    /// A saved machine is to go on with, or without, a virtio-vsock.
    #[error("the saved machine had {} and is given {}: give it the same", vsock(*saved), vsock(!saved))]
    VsockMismatch {
        /// Whether it had one.
        saved: bool,
    },
    /// The host's processor is not one of that level.
    #[error("this host cannot be {model}: its processor lacks {missing}; take a lower level, or host")]
    CpuModel {
        /// The model asked for.
        model: CpuModel,
        /// What is lacking, by name.
        missing: String,
    },
    /// A saved machine's processor is more than the engine can be on this host.
    #[error(
        "the saved machine's processor has {missing}, which the {engine} engine does not offer on this host: let it go on \
         under another engine or on another host"
    )]
    Processor {
        /// The engine.
        engine: &'static str,
        /// What is lacking, by name.
        missing: String,
    },
    /// A file could not be read.
    #[error("cannot read the {what} '{}': {source}", path.display())]
    Read {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: std::io::Error,
    },
    /// The kernel file is not one that can be booted.
    #[error("cannot boot '{}': {reason}", path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What it is instead, or what is wrong with it, and what would do.
        reason: String,
    },
    /// The kernel does not fit.
    #[error("the kernel '{}' does not fit: {reason}", path.display())]
    KernelTooLarge {
        /// The file.
        path: PathBuf,
        /// What it needs against what there is.
        reason: String,
    },
    /// The initrds do not fit.
    #[error("the initrd ({}) does not fit beside the kernel, there is room for {}: give the machine more memory", size(*need), size(*room))]
    InitrdTooLarge {
        /// Bytes of all initrds.
        need: u64,
        /// Bytes free where they may be.
        room: u64,
    },
    /// More modules than the hand-over area has room for.
    #[error("{count} modules are too many: give the kernel at most {most}")]
    TooManyModules {
        /// Modules asked for.
        count: usize,
        /// The most.
        most: usize,
    },
    /// The command line is longer than the kernel takes.
    #[error("the command line has {length} bytes, this kernel takes {most}: shorten it")]
    CmdlineTooLong {
        /// Bytes.
        length: usize,
        /// The most.
        most: usize,
    },
    /// The command line has a NUL in it.
    #[error("the command line has a NUL byte in it: remove it")]
    CmdlineNul,
    /// Guest memory could not be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Guest memory could not be written. (A boot method checks before it writes: this is a defect.)
    #[error("cannot write guest memory: {0}")]
    Write(#[from] vm_memory::GuestMemoryError),
    /// The host refused something.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        source: std::io::Error,
    },
    /// A saved machine of a type that this program does not know.
    #[error("the saved machine is a '{name}', which this version does not know: use a newer one")]
    UnknownType {
        /// The type's name.
        name: String,
    },
    /// A saved state cannot be taken over.
    #[error(transparent)]
    State(#[from] StateError),
    /// The engine refused.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

fn vsock(there: bool) -> &'static str {
    if there { "a vsock device" } else { "no vsock device" }
}

/// `bytes` for a person: in the largest unit that divides it, else with one decimal.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match UNITS.into_iter().find(|&(unit, _)| bytes >= unit) {
        Some((unit, name)) if bytes.is_multiple_of(unit) => format!("{} {name}", bytes / unit),
        Some((unit, name)) => format!("{:.1} {name}", bytes as f64 / unit as f64),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_read_well() {
        assert_eq!(size(0), "0 bytes");
        assert_eq!(size(512 << 20), "512 MiB");
        assert_eq!(size(3 << 29), "1.5 GiB");
        assert_eq!(size(u64::MAX), "16777216.0 TiB");
    }
}
