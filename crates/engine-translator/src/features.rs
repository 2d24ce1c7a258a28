//! What CPUID offers, as the checks of control registers and page walks need it.

use std::{arch::x86_64::__cpuid_count, sync::Arc};

use purlin_arch::x86_64::{
    cpuid::CpuidEntry,
    regs::{cr4, xcr0},
};

use crate::{
    cpu::Cpu,
    xstate::{IdlePointers, Layout, idle_pointers, mxcsr_mask, pointer_sign_bits},
};

/// Facts drawn from the CPUID leaves once, because a search of the leaves at each page walk would cost too much.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// MAXPHYADDR.
    pub physical_bits: u32,
    /// 1 GiB pages.
    pub pages_1g: bool,
    /// The vendor is AMD (or Hygon): SYSENTER, SYSRET and a few more follow the APM.
    pub amd: bool,
    /// CMPS reads ES:RDI before RSI: Intel's processors, and AMD's before Zen 5.
    pub cmps_right_first: bool,
    /// INVPCID.
    pub invpcid: bool,
    /// RDTSCP, and with it TSC_AUX.
    pub rdtscp: bool,
    /// SYSENTER and SYSEXIT.
    pub sysenter: bool,
    /// XGETBV with ECX = 1.
    pub xgetbv1: bool,
    /// XSAVEOPT.
    pub xsaveopt: bool,
    /// XSAVEC.
    pub xsavec: bool,
    /// Where the components of the XSAVE area are.
    pub xsave_layout: Layout,
    /// Bits that MXCSR can have.
    pub mxcsr: u32,
    /// What becomes of the x87's pointers while no exception waits.
    pub idle_pointers: IdlePointers,
    /// The x87's pointers have no selectors: FCS and FDS are 0. (CPUID.7.0:EBX bit 13, the host's. AMD's processors with that bit
    /// keep what is loaded.)
    pub no_pointer_selectors: bool,
    /// Upper bits of the x87's pointers that repeat the one below: FXRSTOR makes them canonical.
    pub pointer_sign_bits: [u32; 2],
    /// Bits that CR4 can have.
    pub cr4: u64,
    /// Bits that XCR0 can have.
    pub xcr0: u64,
}

impl Features {
    /// Reads the leaves of one processor.
    pub fn new(leaves: &[CpuidEntry]) -> Self {
        let leaf = |leaf: u32, subleaf: u32| {
            leaves
                .iter()
                .find(|e| e.leaf == leaf && e.subleaf.unwrap_or(subleaf) == subleaf)
                .copied()
                .unwrap_or_default()
        };
        let (basic, features, extended) = (leaf(0, 0), leaf(1, 0), leaf(7, 0));
        let (amd_features, sizes) = (leaf(0x8000_0001, 0), leaf(0x8000_0008, 0));
        let (xsave, xsave1) = (leaf(0xd, 0), leaf(0xd, 1));
        // "AuthenticAMD" and "HygonGenuine" by their first four letters.
        let amd = [*b"Auth", *b"Hygo"].contains(&basic.ebx.to_le_bytes());
        let bit = |register: u32, bit: u32| register >> bit & 1 != 0;
        let offered = [
            (cr4::VME | cr4::PVI, bit(features.edx, 1)),
            (cr4::DE, bit(features.edx, 2)),
            (cr4::PSE, bit(features.edx, 3)),
            (cr4::TSD, bit(features.edx, 4)),
            (cr4::PAE, bit(features.edx, 6)),
            (cr4::MCE, bit(features.edx, 7)),
            (cr4::PGE, bit(features.edx, 13)),
            (cr4::OSFXSR, bit(features.edx, 24)),
            (cr4::OSXMMEXCPT, bit(features.edx, 25)),
            (cr4::PCIDE, bit(features.ecx, 17)),
            (cr4::OSXSAVE, bit(features.ecx, 26)),
            (cr4::FSGSBASE, bit(extended.ebx, 0)),
            (cr4::SMEP, bit(extended.ebx, 7)),
            (cr4::SMAP, bit(extended.ebx, 20)),
            (cr4::UMIP, bit(extended.ecx, 2)),
            (cr4::PCE, true),
        ];
        Self {
            physical_bits: match sizes.eax & 0xff {
                0 => 36,
                bits => bits.clamp(32, 52),
            },
            pages_1g: bit(amd_features.edx, 26),
            amd,
            cmps_right_first: !amd || family(features.eax) < ZEN_5,
            invpcid: bit(extended.ebx, 10),
            rdtscp: bit(amd_features.edx, 27),
            sysenter: bit(features.edx, 11),
            xgetbv1: bit(xsave1.eax, 2),
            xsaveopt: bit(xsave1.eax, 0),
            xsavec: bit(xsave1.eax, 1),
            xsave_layout: Layout::of(leaves),
            mxcsr: mxcsr_mask(leaves),
            idle_pointers: idle_pointers(leaves),
            no_pointer_selectors: !amd && bit(__cpuid_count(7, 0).ebx, 13),
            pointer_sign_bits: pointer_sign_bits(),
            cr4: offered.iter().filter(|(_, on)| *on).fold(0, |bits, (b, _)| bits | b),
            xcr0: u64::from(xsave.eax) | u64::from(xsave.edx) << 32 | xcr0::X87,
        }
    }

    /// The bits of a physical address from MAXPHYADDR up to 51.
    pub fn reserved_physical(&self) -> u64 {
        (1 << 52) - (1 << self.physical_bits)
    }
}

/// The family of AMD's Zen 5.
const ZEN_5: u32 = 0x1a;

/// The family that CPUID's leaf 1 tells in EAX (APM vol. 3, appendix E.3.2).
fn family(signature: u32) -> u32 {
    match signature >> 8 & 0xf {
        0xf => 0xf + (signature >> 20 & 0xff),
        base => base,
    }
}

impl Cpu {
    /// Gives the processor its CPUID leaves; [`Features`] follow from them.
    pub fn set_cpuid(&mut self, leaves: Arc<Vec<CpuidEntry>>) {
        self.features = Features::new(&leaves);
        self.cpuid = leaves;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_but_zen_5_compare_the_target_first() {
        let first = |vendor: &[u8; 4], signature| {
            let entry = |leaf, eax, ebx| CpuidEntry { leaf, eax, ebx, ..Default::default() };
            Features::new(&[entry(0, 1, u32::from_le_bytes(*vendor)), entry(1, signature, 0)]).cmps_right_first
        };
        assert!(first(b"Auth", 0x00a2_0f12), "Zen 3");
        assert!(first(b"Auth", 0x00a1_0f11), "Zen 4");
        assert!(!first(b"Auth", 0x00b0_0f21), "Zen 5");
        assert!(first(b"Genu", 0x0008_06f8), "Sapphire Rapids");
    }
}
