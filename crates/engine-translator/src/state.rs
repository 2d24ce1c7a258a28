//! A vCPU's saved state: [`Cpu`] to and from `purlin_arch`'s engine-neutral form.

use std::sync::Arc;

use purlin_arch::x86_64::{
    msr,
    regs::{cr0, cr4, efer, rflags, seg, xcr0},
    state::{self as saved, Activity, Events, Msr, Regs, SystemRegs, VcpuState},
};
use purlin_state::StateError;

use crate::{
    cpu::{Cpu, Segment, Table, access},
    debug::{dr6, dr7},
    exception::Exception,
    features::Features,
    interrupt::Event,
    lapic, msr as registers,
    mtrr::Mtrrs,
    segment::is_canonical,
    xstate::{self, Layout},
};

/// The state between two instructions. What other threads have asked for has been acted on.
pub fn save(cpu: &mut Cpu) -> VcpuState {
    // The local APIC last: a TSC deadline that comes between the two is then in both, which makes one interrupt. The
    // other way round it would be in neither.
    let msrs = save_msrs(cpu);
    let lapic = lapic::save(cpu, 0);
    VcpuState {
        regs: Regs { gpr: cpu.gpr.to_vec(), rip: cpu.rip, rflags: cpu.rflags },
        system: SystemRegs {
            segments: cpu.seg.iter().map(save_segment).collect(),
            ldtr: save_segment(&cpu.ldtr),
            tr: save_segment(&cpu.tr),
            gdtr: save_table(cpu.gdtr),
            idtr: save_table(cpu.idtr),
            cr0: cpu.cr0,
            cr2: cpu.cr2,
            cr3: cpu.cr3,
            cr4: cpu.cr4,
            efer: cpu.efer,
            dr: cpu.dr.to_vec(),
            dr6: cpu.dr6,
            dr7: cpu.dr7,
            pdptes: if is_pae(cpu.cr0, cpu.cr4, cpu.efer) { cpu.pdptes.to_vec() } else { Vec::new() },
        },
        msrs,
        xcr0: cpu.xcr0,
        xsave: xstate::save(cpu),
        lapic,
        activity: cpu.activity as i32,
        events: save_events(cpu),
        tsc: cpu.tsc(),
        cpuid: cpu.cpuid.to_vec(),
    }
}

fn save_segment(segment: &Segment) -> saved::Segment {
    let Segment { base, limit, access, selector } = *segment;
    saved::Segment { selector: selector.into(), base, limit, access }
}

fn save_table(Table { base, limit }: Table) -> saved::Table {
    saved::Table { base, limit: limit.into() }
}

fn save_msrs(cpu: &mut Cpu) -> Vec<Msr> {
    let indices = msr::SAVED.iter().copied().chain(Mtrrs::indices()).collect::<std::collections::BTreeSet<_>>();
    // A register that this processor does not have faults, and is left out.
    indices.into_iter().filter_map(|index| Some(Msr { index, value: registers::read(cpu, index).ok()? })).collect()
}

fn save_events(cpu: &Cpu) -> Events {
    let (exception, interrupt) = match cpu.injected {
        Some(Event::Exception(exception)) => (Some(exception), None),
        Some(Event::Interrupt(vector)) => (None, Some(vector)),
        _ => (None, None),
    };
    Events {
        exception_plus_one: exception.map_or(0, |e| u32::from(e.vector) + 1),
        error_code: exception.and_then(|e| e.error),
        interrupt_plus_one: interrupt.map_or(0, |vector| u32::from(vector) + 1),
        nmi_pending: cpu.nmi_pending || cpu.injected == Some(Event::Nmi),
        nmi_masked: cpu.nmi_masked,
        sti_shadow: cpu.sti_shadow,
        mov_ss_shadow: cpu.mov_ss_shadow,
        pending_debug: cpu.pending_debug as u32,
    }
}

fn is_pae(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & cr0::PG != 0 && cr4 & cr4::PAE != 0 && efer & efer::LMA == 0
}

/// Takes over a state. Nothing of it is trusted: what no processor could be in is refused. On an error the vCPU is in
/// no state to be run.
pub fn restore(cpu: &mut Cpu, state: &VcpuState) -> Result<(), StateError> {
    check(state)?;
    cpu.set_cpuid(Arc::new(state.cpuid.clone()));
    check_features(&cpu.features, state)?;

    let system = &state.system;
    cpu.gpr.copy_from_slice(&state.regs.gpr);
    cpu.rip = state.regs.rip;
    cpu.rflags = state.regs.rflags & RFLAGS | rflags::FIXED;
    for (segment, saved) in cpu.seg.iter_mut().zip(&system.segments) {
        *segment = restore_segment(saved)?;
    }
    cpu.ldtr = restore_segment(&system.ldtr)?;
    cpu.tr = restore_segment(&system.tr)?;
    cpu.gdtr = restore_table(system.gdtr)?;
    cpu.idtr = restore_table(system.idtr)?;
    (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4) = (system.cr0, system.cr2, system.cr3, system.cr4);
    cpu.efer = system.efer;
    cpu.dr.copy_from_slice(&system.dr);
    cpu.dr6 = system.dr6 & dr6::WRITABLE | dr6::FIXED;
    cpu.dr7 = system.dr7 & dr7::WRITABLE | dr7::FIXED;
    cpu.pdptes = system.pdptes.as_slice().try_into().unwrap_or_default();
    cpu.cpl = privilege_level(cpu);
    cpu.xcr0 = state.xcr0;
    xstate::restore(cpu, &state.xsave)?;
    restore_events(cpu, &state.events, state.activity)?;
    restore_msrs(cpu, state)?;
    cpu.flush_tlb_all();
    Ok(())
}

fn corrupt<T>(reason: impl Into<String>) -> Result<T, StateError> {
    Err(StateError::corrupt("vcpu", reason))
}

/// The bits that RFLAGS can have.
const RFLAGS: u64 = 0x3f_7fd7;

/// What does not depend on the processor's model.
fn check(state: &VcpuState) -> Result<(), StateError> {
    let system = &state.system;
    let lengths = [
        ("general registers", state.regs.gpr.len(), 16),
        ("segment registers", system.segments.len(), 6),
        ("debug registers", system.dr.len(), 4),
    ];
    for (what, found, wanted) in lengths {
        if found != wanted {
            return corrupt(format!("{found} {what} instead of {wanted}"));
        }
    }
    if state.cpuid.len() > 512 {
        return corrupt("too many CPUID leaves");
    }
    let on = |register: u64, bit: u64| register & bit != 0;
    let (pg, pe) = (on(system.cr0, cr0::PG), on(system.cr0, cr0::PE));
    let (lme, lma, pae) = (on(system.efer, efer::LME), on(system.efer, efer::LMA), on(system.cr4, cr4::PAE));
    let code64 = lma && system.segments[seg::CS].access & access::L != 0;
    let v86 = state.regs.rflags & rflags::VM != 0;
    let impossible = [
        (pg && !pe, "paging without protected mode"),
        (system.cr0 >> 32 != 0, "bits in the upper half of CR0"),
        (on(system.cr0, cr0::NW) && !on(system.cr0, cr0::CD), "write-through without caches disabled"),
        (lma != (lme && pg), "long mode in disagreement with paging"),
        (lma && !pae, "long mode without PAE"),
        (v86 && (lma || !pe), "virtual-8086 mode outside of protected mode"),
        (!code64 && state.regs.rip >> 32 != 0, "an instruction pointer beyond the code segment"),
        (code64 && !is_canonical(state.regs.rip), "a non-canonical instruction pointer"),
        (system.pdptes.len() != if is_pae(system.cr0, system.cr4, system.efer) { 4 } else { 0 }, "PAE pointers"),
        (system.dr6 >> 32 != 0 || system.dr7 >> 32 != 0, "bits in the upper half of DR6 or DR7"),
    ];
    match impossible.iter().find(|(found, _)| *found) {
        Some((_, what)) => corrupt(*what),
        None => Ok(()),
    }
}

/// What does.
fn check_features(features: &Features, state: &VcpuState) -> Result<(), StateError> {
    let system = &state.system;
    const EFER: u64 = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    let xcr0_consistent = state.xcr0 & xcr0::X87 != 0
        && (state.xcr0 & xcr0::AVX == 0 || state.xcr0 & xcr0::SSE != 0)
        && (state.xcr0 & xcr0::AVX512 == 0 || state.xcr0 & xcr0::AVX512 == xcr0::AVX512 && state.xcr0 & xcr0::AVX != 0);
    let impossible = [
        (system.cr4 & !features.cr4 != 0, "bits of CR4 that the processor does not have"),
        (system.efer & !EFER != 0, "bits of EFER that the processor does not have"),
        (system.cr3 & features.reserved_physical() != 0, "CR3 beyond physical memory"),
        (features.xcr0 & !Layout::host().components() != 0, "vector registers that this host does not have"),
        (state.xcr0 & !features.xcr0 != 0 || !xcr0_consistent, "an impossible XCR0"),
    ];
    match impossible.iter().find(|(found, _)| *found) {
        Some((_, what)) => corrupt(*what),
        None => Ok(()),
    }
}

fn restore_segment(segment: &saved::Segment) -> Result<Segment, StateError> {
    let saved::Segment { selector, base, limit, access } = *segment;
    match u16::try_from(selector) {
        Ok(selector) if is_canonical(base) && access < 1 << 17 => Ok(Segment { base, limit, access, selector }),
        _ => corrupt("an impossible segment"),
    }
}

fn restore_table(table: saved::Table) -> Result<Table, StateError> {
    match u16::try_from(table.limit) {
        Ok(limit) if is_canonical(table.base) => Ok(Table { base: table.base, limit }),
        _ => corrupt("an impossible descriptor table"),
    }
}

fn privilege_level(cpu: &Cpu) -> u8 {
    match (cpu.protected(), cpu.v86()) {
        (false, _) => 0,
        (true, true) => 3,
        (true, false) => cpu.seg[seg::SS].dpl(),
    }
}

fn restore_events(cpu: &mut Cpu, events: &Events, activity: i32) -> Result<(), StateError> {
    cpu.activity = match Activity::try_from(activity) {
        Ok(activity) => activity,
        Err(_) => return corrupt("an unknown activity"),
    };
    cpu.injected = match (events.exception_plus_one, events.interrupt_plus_one) {
        (0, 0) => None,
        (vector @ 1..=32, 0) => {
            // CR2 or DR6 has its value already where one goes with the exception.
            let payload = if vector == 15 { cpu.cr2 } else { 0 };
            Some(Event::Exception(Exception { vector: (vector - 1) as u8, error: events.error_code, payload }))
        }
        (0, vector @ 1..=256) => Some(Event::Interrupt((vector - 1) as u8)),
        _ => return corrupt("impossible pending events"),
    };
    cpu.nmi_pending = events.nmi_pending;
    cpu.nmi_masked = events.nmi_masked;
    cpu.sti_shadow = events.sti_shadow;
    cpu.mov_ss_shadow = events.mov_ss_shadow;
    cpu.pending_debug = u64::from(events.pending_debug) & dr6::WRITABLE;
    Ok(())
}

/// The time stamp counter goes on from where it was, with the adjustment that was saved; the local APIC comes before
/// its deadline; kvmclock is told to the guest by [`crate::clock::refresh`].
fn restore_msrs(cpu: &mut Cpu, state: &VcpuState) -> Result<(), StateError> {
    let value = |wanted: u32| state.msrs.iter().find(|m| m.index == wanted).map(|m| m.value);
    let Some(apic_base) = value(msr::APIC_BASE) else { return corrupt("no IA32_APIC_BASE") };
    lapic::restore(cpu, &state.lapic, apic_base)?;
    cpu.msrs = Default::default();
    cpu.resume_tsc(state.tsc);
    for Msr { index, value } in &state.msrs {
        match *index {
            msr::APIC_BASE | msr::TSC | msr::TSC_DEADLINE => {}
            msr::TSC_ADJUST => cpu.clock.tsc_adjust = *value,
            msr::KVM_SYSTEM_TIME => cpu.clock.system_time = *value,
            msr::KVM_WALL_CLOCK => cpu.clock.wall_clock = *value,
            // Engines that have it save it; here it is not offered.
            msr::SPEC_CTRL | msr::TSC_AUX if *value == 0 => {}
            index => {
                if registers::write(cpu, index, *value).is_err() {
                    return corrupt(format!("MSR {index:#x} cannot have the value {value:#x}"));
                }
            }
        }
    }
    if let Some(deadline) = value(msr::TSC_DEADLINE) {
        lapic::set_tsc_deadline(cpu, deadline);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
