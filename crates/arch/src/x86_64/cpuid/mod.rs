//! What CPUID tells a guest: processor models.
//!
//! [`leaves`] makes the table for one vCPU. It is the same for every engine, and it is saved with the vCPU, so that a
//! guest never sees its processor change. A few bits mirror control registers (OSXSAVE, the APIC's enable bit, the
//! size of the XSAVE area for the current XCR0): the table has their static form, the engine puts in the current one.

mod features;
mod leaves;
mod model;
mod names;

use std::fmt;

use prost::Message;

pub use features::{PCID, lacking, unsupported};
pub use leaves::leaves;
pub use model::{CpuModel, UnknownModel};
pub use names::{Word, of as names_of};

/// One CPUID leaf.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct CpuidEntry {
    /// EAX on input.
    #[prost(uint32, tag = "1")]
    pub leaf: u32,
    /// ECX on input, for leaves that have sub-leaves.
    #[prost(uint32, optional, tag = "2")]
    pub subleaf: Option<u32>,
    /// Results.
    #[prost(fixed32, tag = "3")]
    pub eax: u32,
    /// Results.
    #[prost(fixed32, tag = "4")]
    pub ebx: u32,
    /// Results.
    #[prost(fixed32, tag = "5")]
    pub ecx: u32,
    /// Results.
    #[prost(fixed32, tag = "6")]
    pub edx: u32,
}

/// A result register of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl Register {
    /// All of them, in the order in which CPUID's results are told.
    pub const ALL: [Self; 4] = [Self::Eax, Self::Ebx, Self::Ecx, Self::Edx];
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(["EAX", "EBX", "ECX", "EDX"][*self as usize])
    }
}

/// What CPUID answers on the host: a leaf and a sub-leaf in, EAX, EBX, ECX, EDX out.
pub type HostCpuid<'a> = &'a dyn Fn(u32, u32) -> [u32; 4];

/// Who made a processor, as far as it makes a difference to software.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// `GenuineIntel`, and whoever follows the SDM.
    Intel,
    /// `AuthenticAMD` or `HygonGenuine`: whoever follows the APM.
    Amd,
}

impl Vendor {
    /// The vendor of leaf 0's EAX, EBX, ECX, EDX.
    pub fn of([_, ebx, ecx, edx]: [u32; 4]) -> Self {
        match (ebx, edx, ecx) {
            (0x6874_7541, 0x6974_6e65, 0x444d_4163) | (0x6f67_7948, 0x6e65_476e, 0x656e_6975) => Self::Amd,
            _ => Self::Intel,
        }
    }
}

/// What a table answers for a leaf and a sub-leaf: EAX, EBX, ECX, EDX; all zero if the leaf is not in it.
pub fn lookup(table: &[CpuidEntry], leaf: u32, subleaf: u32) -> [u32; 4] {
    table
        .iter()
        .find(|e| e.leaf == leaf && e.subleaf.is_none_or(|s| s == subleaf))
        .map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
}

/// The vendor of a table's processor.
pub fn vendor(table: &[CpuidEntry]) -> Vendor {
    Vendor::of(lookup(table, 0, 0))
}

/// The number of bits in a physical address (MAXPHYADDR), 36 if the table does not say (SDM vol. 3A 4.1.4); 32 to 52
/// whatever it says.
pub fn physical_bits(table: &[CpuidEntry]) -> u32 {
    match lookup(table, 0x8000_0008, 0)[0] & 0xff {
        0 => 36,
        bits => bits.clamp(32, 52),
    }
}
