//! The saved form: an XSAVE area in the standard format, laid out as the guest's CPUID leaf 0xD says.

use purlin_arch::x86_64::regs::xcr0;
use purlin_state::StateError;

use super::{
    AREA, IdlePointers, Layout, XState,
    layout::COMPONENTS,
    offset::{self, HEADER_END, XSTATE_BV},
};
use crate::cpu::Cpu;

/// The state of `cpu`.
pub fn save(cpu: &mut Cpu) -> Vec<u8> {
    let layout = cpu.features.xsave_layout;
    let state = &mut cpu.xstate;
    let mut area = vec![0; layout.standard_size(u64::MAX)];
    state.materialise_for_reading();
    if cpu.features.idle_pointers == IdlePointers::Kept {
        state.settle_pointers();
    }
    area[..offset::XMM].copy_from_slice(&state.area[..offset::XMM]);
    area[offset::FOP..offset::FOP + 2].copy_from_slice(&(state.fop as u16).to_le_bytes());
    area[offset::FIP..offset::FIP + 8].copy_from_slice(&state.fip.to_le_bytes());
    area[offset::FDP..offset::FDP + 8].copy_from_slice(&state.fdp.to_le_bytes());
    let mut present = state.in_use() & xcr0::X87;
    for component in (1..COMPONENTS).filter(|i| state.in_use() & 1 << i != 0) {
        let (Some(target), Some(source)) = (layout.range(component), Layout::host().range(component)) else { continue };
        area[target].copy_from_slice(&state.area[source]);
        present |= 1 << component;
    }
    area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&present.to_le_bytes());
    area[offset::MXCSR_MASK..offset::MXCSR_MASK + 4].copy_from_slice(&cpu.features.mxcsr.to_le_bytes());
    area
}

/// Takes over a saved area.
pub fn restore(cpu: &mut Cpu, area: &[u8]) -> Result<(), StateError> {
    let corrupt = |reason: &str| Err(StateError::corrupt("vcpu", reason));
    let layout = cpu.features.xsave_layout;
    if !(HEADER_END..=4 * AREA).contains(&area.len()) {
        return corrupt("the XSAVE area has an impossible size");
    }
    let word = |at: usize| u64::from_le_bytes(area[at..at + 8].try_into().unwrap_or_default());
    let present = word(XSTATE_BV);
    let mxcsr = word(offset::MXCSR) as u32;
    if present & !(cpu.features.xcr0 | xcr0::SSE) != 0 || area.len() < layout.standard_size(present) {
        return corrupt("the XSAVE area has components that the processor does not have");
    }
    if area[XSTATE_BV + 8..HEADER_END].iter().any(|b| *b != 0) {
        return corrupt("the XSAVE area is not in the standard format");
    }
    if mxcsr & !cpu.features.mxcsr != 0 {
        return corrupt("reserved bits of MXCSR are set");
    }
    let mut state = XState::default();
    if present & xcr0::X87 != 0 {
        state.materialise(0);
        state.area[..offset::FOP].copy_from_slice(&area[..offset::FOP]);
        state.area[offset::ST..offset::XMM].copy_from_slice(&area[offset::ST..offset::XMM]);
        state.set_pointers(word(offset::FIP), word(offset::FDP), word(offset::FOP) & 0x7ff);
    }
    for component in (1..COMPONENTS).filter(|i| present & 1 << i != 0) {
        let Some(source) = layout.range(component) else { continue };
        match state.component(component) {
            Some(bytes) => bytes.copy_from_slice(&area[source]),
            None => return corrupt("this host lacks a component of the XSAVE area"),
        }
    }
    state.set_mxcsr(mxcsr);
    cpu.xstate = state;
    Ok(())
}
