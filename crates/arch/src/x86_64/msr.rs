//! Model-specific registers (SDM vol. 4): the ones that are saved.
#![allow(missing_docs)]

pub const TSC: u32 = 0x10;
pub const APIC_BASE: u32 = 0x1b;
pub const TSC_ADJUST: u32 = 0x3b;
pub const SPEC_CTRL: u32 = 0x48;
pub const MTRR_CAP: u32 = 0xfe;
pub const SYSENTER_CS: u32 = 0x174;
pub const SYSENTER_ESP: u32 = 0x175;
pub const SYSENTER_EIP: u32 = 0x176;
pub const MISC_ENABLE: u32 = 0x1a0;
pub const PAT: u32 = 0x277;
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
pub const TSC_DEADLINE: u32 = 0x6e0;
pub const XSS: u32 = 0xda0;
pub const EFER: u32 = 0xc000_0080;
pub const STAR: u32 = 0xc000_0081;
pub const LSTAR: u32 = 0xc000_0082;
pub const CSTAR: u32 = 0xc000_0083;
pub const SFMASK: u32 = 0xc000_0084;
pub const FS_BASE: u32 = 0xc000_0100;
pub const GS_BASE: u32 = 0xc000_0101;
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
pub const TSC_AUX: u32 = 0xc000_0103;
/// kvmclock: guest-physical address of the wall clock structure.
pub const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
/// kvmclock: guest-physical address of the vCPU's time structure, bit 0 enables it.
pub const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;

/// The registers that a saved vCPU lists (beside those with fields of their own: EFER, FS and GS base, TSC).
/// MTRRs (fixed and variable ranges) are saved by the engines too, in their own numbers.
pub const SAVED: &[u32] = &[
    APIC_BASE,
    TSC_ADJUST,
    SPEC_CTRL,
    SYSENTER_CS,
    SYSENTER_ESP,
    SYSENTER_EIP,
    MISC_ENABLE,
    PAT,
    MTRR_DEF_TYPE,
    TSC_DEADLINE,
    STAR,
    LSTAR,
    CSTAR,
    SFMASK,
    KERNEL_GS_BASE,
    TSC_AUX,
    KVM_WALL_CLOCK,
    KVM_SYSTEM_TIME,
];
