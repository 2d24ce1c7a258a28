//! Model-specific registers: RDMSR and WRMSR (SDM vol. 4; AMD's from 0xc001_0000 on: APM vol. 2 appendix A).
//!
//! A register that is not listed faults, as on the processor: kernels probe with that.

use purlin_arch::x86_64::{
    cpuid::{self, Vendor, lookup},
    msr::*,
    regs::{cr0, efer, seg},
};

use crate::{
    clock,
    cpu::Cpu,
    exception::Exception,
    lapic,
    mtrr::{self, Mtrrs},
};

/// Model-specific registers without a field of their own in [`Cpu`].
#[derive(Clone, Debug)]
pub struct Msrs {
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub sfmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u32,
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// IA32_DEBUGCTL: single-stepping on branches (bit 1) alone.
    pub debugctl: u64,
    /// IA32_MCG_STATUS.
    pub mcg_status: u64,
    /// Memory type ranges.
    pub mtrrs: Mtrrs,
    /// AMD: SYSCFG.
    pub syscfg: u64,
    /// AMD: HWCR.
    pub hwcr: u64,
}

/// The memory types after power-up: WB, WT, UC-, UC, twice (SDM vol. 3A 12.12.4).
const PAT_DEFAULT: u64 = 0x0007_0406_0007_0406;
/// Fast strings on; branch trace store and precise event sampling are not there.
const MISC_ENABLE_DEFAULT: u64 = 1 << 0 | 1 << 11 | 1 << 12;
/// What a guest can change of it: fast strings, and the limit of CPUID and the execute-disable bit, which have no
/// effect.
const MISC_ENABLE_WRITABLE: u64 = 1 << 0 | 1 << 22 | 1 << 34;
/// The TSC counts at the frequency of P0: kernels complain otherwise.
const HWCR_DEFAULT: u64 = 1 << 24;
/// SYSCFG: the MTRR bits, and whether TOM2 is used.
const SYSCFG_WRITABLE: u64 = 0x7c_0000;
const DEBUGCTL_BTF: u64 = 1 << 1;

impl Default for Msrs {
    fn default() -> Self {
        Self {
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            pat: PAT_DEFAULT,
            misc_enable: MISC_ENABLE_DEFAULT,
            debugctl: 0,
            mcg_status: 0,
            mtrrs: Mtrrs::default(),
            syscfg: 0,
            hwcr: HWCR_DEFAULT,
        }
    }
}

/// Registers that are not saved, by number.
mod index {
    pub const P5_MC_ADDR: u32 = 0x0;
    pub const P5_MC_TYPE: u32 = 0x1;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const EBL_CR_POWERON: u32 = 0x2a;
    pub const BIOS_UPDATE_TRIGGER: u32 = 0x79;
    /// BIOS_SIGN_ID; AMD: PATCH_LEVEL.
    pub const MICROCODE: u32 = 0x8b;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const LAST_BRANCH_FROM: u32 = 0x1db;
    pub const LAST_INT_TO: u32 = 0x1de;

    pub const SYSCFG: u32 = 0xc001_0010;
    pub const HWCR: u32 = 0xc001_0015;
    pub const IORR_FIRST: u32 = 0xc001_0016;
    pub const IORR_LAST: u32 = 0xc001_0019;
    pub const TOP_MEM: u32 = 0xc001_001a;
    pub const TOP_MEM2: u32 = 0xc001_001d;
    pub const NB_CFG: u32 = 0xc001_001f;
    pub const PATCH_LOADER: u32 = 0xc001_0020;
    pub const INT_PENDING: u32 = 0xc001_0055;
    pub const MMIO_CONF_BASE: u32 = 0xc001_0058;
    pub const TSEG_ADDR: u32 = 0xc001_0112;
    pub const TSEG_MASK: u32 = 0xc001_0113;
    pub const OSVW_ID_LENGTH: u32 = 0xc001_0140;
    pub const OSVW_STATUS: u32 = 0xc001_0141;
    pub const CPUID_7_FEATURES: u32 = 0xc001_1002;
    pub const CPUID_EXT_FEATURES: u32 = 0xc001_100d;
    pub const LS_CFG: u32 = 0xc001_1020;
    pub const DC_CFG: u32 = 0xc001_1022;
    pub const BU_CFG: u32 = 0xc001_1023;
    pub const DE_CFG: u32 = 0xc001_1029;
    pub const BU_CFG2: u32 = 0xc001_102a;
}

/// What a microcode revision reads as: that of KVM and QEMU's guests.
const MICROCODE_AMD: u64 = 0x0100_0065;
const MICROCODE_INTEL: u64 = 0x1_0000_0000;
/// DE_CFG: LFENCE waits for all instructions before it.
const LFENCE_SERIALIZING: u64 = 1 << 1;
/// OSVW: errata 0 to 3 are described, and not present.
const OSVW_KNOWN: u64 = 4;

/// RDMSR: ECX's register into EDX:EAX. Privilege is the caller's to check.
pub fn read(cpu: &mut Cpu, index: u32) -> Result<u64, Exception> {
    Ok(match index {
        TSC => cpu.tsc(),
        TSC_ADJUST => cpu.clock.tsc_adjust,
        APIC_BASE => cpu.lapic.base(),
        TSC_DEADLINE => lapic::tsc_deadline(cpu),
        EFER => cpu.efer,
        STAR => cpu.msrs.star,
        LSTAR => cpu.msrs.lstar,
        CSTAR => cpu.msrs.cstar,
        SFMASK => cpu.msrs.sfmask,
        FS_BASE => cpu.seg[seg::FS].base,
        GS_BASE => cpu.seg[seg::GS].base,
        KERNEL_GS_BASE => cpu.msrs.kernel_gs_base,
        TSC_AUX if has_tsc_aux(cpu) => u64::from(cpu.msrs.tsc_aux),
        SYSENTER_CS => cpu.msrs.sysenter_cs,
        SYSENTER_ESP => cpu.msrs.sysenter_esp,
        SYSENTER_EIP => cpu.msrs.sysenter_eip,
        PAT => cpu.msrs.pat,
        MISC_ENABLE => cpu.msrs.misc_enable,
        MTRR_CAP => mtrr::CAP,
        KVM_SYSTEM_TIME => cpu.clock.system_time,
        KVM_WALL_CLOCK => cpu.clock.wall_clock,
        index::MCG_STATUS => cpu.msrs.mcg_status,
        index::DEBUGCTL => cpu.msrs.debugctl,
        index::MCG_CAP
        | index::P5_MC_ADDR
        | index::P5_MC_TYPE
        | index::EBL_CR_POWERON
        | index::LAST_BRANCH_FROM..=index::LAST_INT_TO => 0,
        index::MICROCODE if is_amd(cpu) => MICROCODE_AMD,
        index::MICROCODE => MICROCODE_INTEL,
        index::PLATFORM_ID | index::PLATFORM_INFO if !is_amd(cpu) => 0,
        _ if lapic::is_x2apic_msr(index) => lapic::read_msr(cpu, index)?,
        _ if is_amd(cpu) && (0xc001_0000..0xc001_2000).contains(&index) => read_amd(cpu, index)?,
        _ => match cpu.msrs.mtrrs.read(index) {
            Some(value) => value,
            None => return unknown("read", index),
        },
    })
}

fn read_amd(cpu: &Cpu, index: u32) -> Result<u64, Exception> {
    Ok(match index {
        index::SYSCFG => cpu.msrs.syscfg,
        index::HWCR => cpu.msrs.hwcr,
        index::OSVW_ID_LENGTH if has_osvw(cpu) => OSVW_KNOWN,
        index::OSVW_STATUS if has_osvw(cpu) => 0,
        index::DE_CFG => LFENCE_SERIALIZING,
        index::IORR_FIRST..=index::IORR_LAST
        | index::TOP_MEM
        | index::TOP_MEM2
        | index::NB_CFG
        | index::INT_PENDING
        | index::MMIO_CONF_BASE
        | index::TSEG_ADDR
        | index::TSEG_MASK
        | index::CPUID_7_FEATURES..=index::CPUID_EXT_FEATURES
        | index::LS_CFG
        | index::DC_CFG
        | index::BU_CFG
        | index::BU_CFG2 => 0,
        _ => return unknown("read", index),
    })
}

/// WRMSR: EDX:EAX into ECX's register. Privilege is the caller's to check.
pub fn write(cpu: &mut Cpu, index: u32, value: u64) -> Result<(), Exception> {
    match index {
        TSC => cpu.set_tsc(value),
        TSC_ADJUST => cpu.set_tsc_adjust(value),
        APIC_BASE => lapic::set_base(cpu, value)?,
        TSC_DEADLINE => lapic::set_tsc_deadline(cpu, value),
        EFER => write_efer(cpu, value)?,
        STAR => cpu.msrs.star = value,
        LSTAR => cpu.msrs.lstar = canonical(value)?,
        CSTAR => cpu.msrs.cstar = canonical(value)?,
        SFMASK => cpu.msrs.sfmask = value & 0xffff_ffff,
        FS_BASE => cpu.seg[seg::FS].base = canonical(value)?,
        GS_BASE => cpu.seg[seg::GS].base = canonical(value)?,
        KERNEL_GS_BASE => cpu.msrs.kernel_gs_base = canonical(value)?,
        TSC_AUX if has_tsc_aux(cpu) => cpu.msrs.tsc_aux = value as u32,
        SYSENTER_CS => cpu.msrs.sysenter_cs = value & 0xffff,
        SYSENTER_ESP => cpu.msrs.sysenter_esp = sysenter_address(cpu, value)?,
        SYSENTER_EIP => cpu.msrs.sysenter_eip = sysenter_address(cpu, value)?,
        PAT => cpu.msrs.pat = checked_pat(value)?,
        MISC_ENABLE => {
            cpu.msrs.misc_enable = MISC_ENABLE_DEFAULT & !MISC_ENABLE_WRITABLE | value & MISC_ENABLE_WRITABLE;
        }
        KVM_SYSTEM_TIME => {
            cpu.clock.system_time = value;
            clock::publish(cpu);
        }
        KVM_WALL_CLOCK => {
            cpu.clock.wall_clock = value;
            clock::publish_wall_clock(cpu, value);
        }
        index::MCG_STATUS => cpu.msrs.mcg_status = value & 7,
        index::DEBUGCTL if value & !DEBUGCTL_BTF == 0 => cpu.msrs.debugctl = value,
        index::P5_MC_ADDR | index::P5_MC_TYPE | index::EBL_CR_POWERON | index::BIOS_UPDATE_TRIGGER => {}
        // Software writes 0 before it asks CPUID for the revision.
        index::MICROCODE => {}
        _ if lapic::is_x2apic_msr(index) => lapic::write_msr(cpu, index, value)?,
        _ if is_amd(cpu) && (0xc001_0000..0xc001_2000).contains(&index) => write_amd(cpu, index, value)?,
        _ => {
            let bits = cpuid::physical_bits(&cpu.cpuid);
            match cpu.msrs.mtrrs.write(index, value, bits) {
                Some(result) => result?,
                None => return unknown("write", index),
            }
        }
    }
    Ok(())
}

fn write_amd(cpu: &mut Cpu, index: u32, value: u64) -> Result<(), Exception> {
    match index {
        index::SYSCFG => cpu.msrs.syscfg = value & SYSCFG_WRITABLE,
        index::HWCR => cpu.msrs.hwcr = value & 0xffff_ffff | HWCR_DEFAULT,
        index::IORR_FIRST..=index::IORR_LAST
        | index::TOP_MEM
        | index::TOP_MEM2
        | index::NB_CFG
        | index::PATCH_LOADER
        | index::INT_PENDING
        | index::MMIO_CONF_BASE
        | index::CPUID_7_FEATURES..=index::CPUID_EXT_FEATURES
        | index::LS_CFG
        | index::DC_CFG
        | index::BU_CFG
        | index::DE_CFG
        | index::BU_CFG2 => {}
        index::OSVW_ID_LENGTH | index::OSVW_STATUS if has_osvw(cpu) => {}
        _ => return unknown("write", index),
    }
    Ok(())
}

fn unknown<T>(what: &str, index: u32) -> Result<T, Exception> {
    tracing::debug!("{what} of unknown MSR {index:#x}");
    Err(Exception::GP0)
}

fn is_amd(cpu: &Cpu) -> bool {
    cpuid::vendor(&cpu.cpuid) == Vendor::Amd
}

/// RDTSCP or RDPID is there.
fn has_tsc_aux(cpu: &Cpu) -> bool {
    lookup(&cpu.cpuid, 0x8000_0001, 0)[3] & 1 << 27 != 0 || lookup(&cpu.cpuid, 7, 0)[2] & 1 << 22 != 0
}

fn has_osvw(cpu: &Cpu) -> bool {
    lookup(&cpu.cpuid, 0x8000_0001, 0)[2] & 1 << 9 != 0
}

/// Whether a linear address is canonical (48 bits).
fn is_canonical(address: u64) -> bool {
    (address as i64) << 16 >> 16 == address as i64
}

fn canonical(address: u64) -> Result<u64, Exception> {
    if is_canonical(address) { Ok(address) } else { Err(Exception::GP0) }
}

/// AMD's processors keep 32 bits, since they have no SYSENTER in long mode.
fn sysenter_address(cpu: &Cpu, value: u64) -> Result<u64, Exception> {
    if is_amd(cpu) { Ok(value & 0xffff_ffff) } else { canonical(value) }
}

/// Each of the eight types must be UC, WC, WT, WP, WB or UC-.
fn checked_pat(value: u64) -> Result<u64, Exception> {
    if value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)) { Ok(value) } else { Err(Exception::GP0) }
}

/// IA32_EFER (SDM vol. 3A 2.2.1): LMA is the processor's own, LME cannot change under paging.
fn write_efer(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    let [_, _, _, edx] = lookup(&cpu.cpuid, 0x8000_0001, 0);
    let offered = [(11, efer::SCE), (20, efer::NXE), (29, efer::LME | efer::LMA)];
    let allowed = offered.iter().filter(|(bit, _)| edx & 1 << bit != 0).fold(0, |all, (_, bits)| all | bits);
    if value & !allowed != 0 {
        return Err(Exception::GP0);
    }
    let changed = value ^ cpu.efer;
    if changed & efer::LME != 0 && cpu.cr0 & cr0::PG != 0 {
        return Err(Exception::GP0);
    }
    cpu.efer = value & !efer::LMA | cpu.efer & efer::LMA;
    if changed & efer::NXE != 0 {
        cpu.flush_tlb_all();
    }
    Ok(())
}

#[cfg(test)]
mod tests;
