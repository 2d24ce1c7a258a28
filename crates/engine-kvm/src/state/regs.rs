//! General registers, segments, tables, control and debug registers.

use kvm_bindings::{
    KVM_SREGS2_FLAGS_PDPTRS_VALID, kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_sregs2,
};
use kvm_ioctls::VcpuFd;
use purlin_arch::x86_64::{
    lapic::LapicState,
    regs::{cr0, cr4, efer, seg},
    state::{Regs, Segment, SystemRegs, Table, VcpuState},
};
use purlin_engine::EngineError;

use super::{Abilities, corrupt};
use crate::{host_error, ioctls};

/// The task-priority register in the local APIC's page, whose bits 7:4 are CR8.
const TPR: usize = 0x80;

pub(super) fn save(r: &kvm_regs) -> Regs {
    let gpr = vec![
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15,
    ];
    Regs { gpr, rip: r.rip, rflags: r.rflags }
}

fn general(saved: &Regs) -> Result<kvm_regs, EngineError> {
    let Ok([rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15]) =
        <[u64; 16]>::try_from(saved.gpr.as_slice())
    else {
        return Err(corrupt(format!("{} general registers, not 16", saved.gpr.len())));
    };
    let (rip, rflags) = (saved.rip, saved.rflags);
    Ok(kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags })
}

pub(super) fn system(fd: &VcpuFd, abilities: &Abilities) -> Result<SystemRegs, EngineError> {
    let s = get_sregs(fd, abilities)?;
    let debug = fd.get_debug_regs().map_err(host_error("KVM_GET_DEBUGREGS"))?;
    let mut segments = vec![Segment::default(); 6];
    for (index, segment) in
        [(seg::ES, s.es), (seg::CS, s.cs), (seg::SS, s.ss), (seg::DS, s.ds), (seg::FS, s.fs), (seg::GS, s.gs)]
    {
        segments[index] = segment_saved(&segment);
    }
    let has_pdptes = s.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0 && is_pae_paging(s.cr0, s.cr4, s.efer);
    Ok(SystemRegs {
        segments,
        ldtr: segment_saved(&s.ldt),
        tr: segment_saved(&s.tr),
        gdtr: Table { base: s.gdt.base, limit: u32::from(s.gdt.limit) },
        idtr: Table { base: s.idt.base, limit: u32::from(s.idt.limit) },
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        efer: s.efer,
        dr: debug.db.to_vec(),
        dr6: debug.dr6,
        dr7: debug.dr7,
        pdptes: if has_pdptes { s.pdptrs.to_vec() } else { Vec::new() },
    })
}

/// Sets all of them, and IA32_APIC_BASE, which KVM takes along.
pub(super) fn restore(
    fd: &VcpuFd,
    abilities: &Abilities,
    saved: &VcpuState,
    apic_base: Option<u64>,
) -> Result<(), EngineError> {
    let system = &saved.system;
    let now = get_sregs(fd, abilities)?;
    let sregs = system_to_kvm(system, &saved.lapic, apic_base.unwrap_or(now.apic_base))?;
    set_sregs(fd, abilities, &sregs)?;
    fd.set_regs(&general(&saved.regs)?).map_err(host_error("KVM_SET_REGS"))?;

    let Ok(db) = <[u64; 4]>::try_from(system.dr.as_slice()) else {
        return Err(corrupt(format!("{} debug registers, not 4", system.dr.len())));
    };
    let dr6 = system.dr6 | u64::from(saved.events.pending_debug);
    let debug = kvm_debugregs { db, dr6, dr7: system.dr7, ..Default::default() };
    fd.set_debug_regs(&debug).map_err(host_error("KVM_SET_DEBUGREGS"))
}

/// Makes KVM set up the vCPU's nested paging anew, by a change of CR4.
///
/// At a shutdown on AMD's processors KVM clears the vCPU's control block, nested page table pointer and all, and sets
/// that again only where the guest had paging on or a later change of a control register asks for it (seen on Linux
/// 6.1): a guest that triple-faults without paging would hang after its reset.
pub(super) fn renew_mmu(fd: &VcpuFd, abilities: &Abilities) -> Result<(), EngineError> {
    let mut sregs = get_sregs(fd, abilities)?;
    sregs.cr4 ^= cr4::PSE;
    set_sregs(fd, abilities, &sregs)?;
    sregs.cr4 ^= cr4::PSE;
    set_sregs(fd, abilities, &sregs)
}

fn system_to_kvm(system: &SystemRegs, lapic: &LapicState, apic_base: u64) -> Result<kvm_sregs2, EngineError> {
    if system.segments.len() != 6 {
        return Err(corrupt(format!("{} segment registers, not 6", system.segments.len())));
    }
    let segment = |index: usize| segment_to_kvm(&system.segments[index]);
    let pdptrs = <[u64; 4]>::try_from(system.pdptes.as_slice());
    Ok(kvm_sregs2 {
        es: segment(seg::ES),
        cs: segment(seg::CS),
        ss: segment(seg::SS),
        ds: segment(seg::DS),
        fs: segment(seg::FS),
        gs: segment(seg::GS),
        tr: segment_to_kvm(&system.tr),
        ldt: segment_to_kvm(&system.ldtr),
        gdt: table_to_kvm(&system.gdtr)?,
        idt: table_to_kvm(&system.idtr)?,
        cr0: system.cr0,
        cr2: system.cr2,
        cr3: system.cr3,
        cr4: system.cr4,
        cr8: lapic.regs.get(TPR).map_or(0, |tpr| u64::from(tpr >> 4)),
        efer: system.efer,
        apic_base,
        flags: if pdptrs.is_ok() { KVM_SREGS2_FLAGS_PDPTRS_VALID.into() } else { 0 },
        pdptrs: pdptrs.unwrap_or_default(),
    })
}

/// SDM vol. 3A 4.1.1.
fn is_pae_paging(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & cr0::PG != 0 && cr4 & cr4::PAE != 0 && efer & efer::LMA == 0
}

fn get_sregs(fd: &VcpuFd, abilities: &Abilities) -> Result<kvm_sregs2, EngineError> {
    if abilities.sregs2 {
        return ioctls::get_sregs2(fd).map_err(|e| EngineError::Host { what: "KVM_GET_SREGS2", source: e.into() });
    }
    let s = fd.get_sregs().map_err(host_error("KVM_GET_SREGS"))?;
    Ok(kvm_sregs2 {
        cs: s.cs,
        ds: s.ds,
        es: s.es,
        fs: s.fs,
        gs: s.gs,
        ss: s.ss,
        tr: s.tr,
        ldt: s.ldt,
        gdt: s.gdt,
        idt: s.idt,
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        flags: 0,
        pdptrs: [0; 4],
    })
}

fn set_sregs(fd: &VcpuFd, abilities: &Abilities, s: &kvm_sregs2) -> Result<(), EngineError> {
    if abilities.sregs2 {
        return ioctls::set_sregs2(fd, s).map_err(|e| EngineError::Host { what: "KVM_SET_SREGS2", source: e.into() });
    }
    // KVM loads the PAE page-directory pointers from memory then.
    let old = kvm_sregs {
        cs: s.cs,
        ds: s.ds,
        es: s.es,
        fs: s.fs,
        gs: s.gs,
        ss: s.ss,
        tr: s.tr,
        ldt: s.ldt,
        gdt: s.gdt,
        idt: s.idt,
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        interrupt_bitmap: [0; 4],
    };
    fd.set_sregs(&old).map_err(host_error("KVM_SET_SREGS"))
}

/// Bits of [`Segment::access`] (SDM vol. 3C 24.4.1).
fn segment_saved(s: &kvm_segment) -> Segment {
    let fields = [
        (s.type_, 0),
        (s.s, 4),
        (s.dpl, 5),
        (s.present, 7),
        (s.avl, 12),
        (s.l, 13),
        (s.db, 14),
        (s.g, 15),
        (s.unusable, 16),
    ];
    let access = fields.iter().fold(0, |access, &(value, shift)| access | u32::from(value) << shift);
    Segment { selector: s.selector.into(), base: s.base, limit: s.limit, access }
}

fn segment_to_kvm(s: &Segment) -> kvm_segment {
    let field = |shift: u32, mask: u32| (s.access >> shift & mask) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector as u16,
        type_: field(0, 0xf),
        s: field(4, 1),
        dpl: field(5, 3),
        present: field(7, 1),
        avl: field(12, 1),
        l: field(13, 1),
        db: field(14, 1),
        g: field(15, 1),
        unusable: field(16, 1),
        padding: 0,
    }
}

fn table_to_kvm(t: &Table) -> Result<kvm_dtable, EngineError> {
    let limit = u16::try_from(t.limit).map_err(|_| corrupt(format!("a table limit of {:#x}", t.limit)))?;
    Ok(kvm_dtable { base: t.base, limit, padding: [0; 3] })
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_segment;

    use super::{general, save, segment_saved, segment_to_kvm};
    use purlin_arch::x86_64::state::{Regs, Segment};

    /// A flat 64-bit code segment of ring 3 (SDM vol. 3C 24.4.1).
    #[test]
    fn access_rights_are_vmx_s() {
        let kvm = kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector: 0x33,
            type_: 0xb,
            present: 1,
            dpl: 3,
            db: 0,
            s: 1,
            l: 1,
            g: 1,
            avl: 0,
            unusable: 0,
            padding: 0,
        };
        let saved = segment_saved(&kvm);
        assert_eq!(saved, Segment { selector: 0x33, base: 0, limit: 0xffff_ffff, access: 0xa0fb });
        assert_eq!(segment_to_kvm(&saved), kvm);
    }

    #[test]
    fn general_registers_are_in_the_encodings_order() {
        let saved = Regs { gpr: (0..16).collect(), rip: 16, rflags: 2 };
        let kvm = general(&saved).expect("16 registers");
        assert_eq!([kvm.rax, kvm.rcx, kvm.rdx, kvm.rbx, kvm.rsp, kvm.rbp, kvm.rsi, kvm.rdi], [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(save(&kvm), saved);
        assert!(general(&Regs { gpr: vec![0; 15], ..saved }).is_err());
    }
}
