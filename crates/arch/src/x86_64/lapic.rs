//! The saved state of a local APIC (SDM vol. 3A chapter 11).

use prost::Message;

/// A local APIC. IA32_APIC_BASE and IA32_TSC_DEADLINE are among the vCPU's MSRs.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct LapicState {
    /// The register page, 1 KiB: each 32-bit register at its xAPIC offset (ID at 0x20, TPR at 0x80 … divide
    /// configuration at 0x3e0), little-endian. In x2APIC mode the ID register holds the whole 32-bit ID, and ICR's
    /// high half is at 0x310.
    #[prost(bytes = "vec", tag = "1")]
    pub regs: Vec<u8>,
    /// Nanoseconds until the timer fires (one-shot and periodic mode), 0 if it is not armed.
    #[prost(uint64, tag = "2")]
    pub timer_remaining_ns: u64,
    /// The SIPI vector plus one that waits to be taken, 0 for none.
    #[prost(uint32, tag = "3")]
    pub sipi_plus_one: u32,
    /// An INIT waits to be taken.
    #[prost(bool, tag = "4")]
    pub init_pending: bool,
}
