//! The local APIC's page.
//!
//! KVM's page has the registers where the saved form has them; they differ in how the timer's progress is told.

use kvm_bindings::kvm_lapic_state;
use kvm_ioctls::VcpuFd;
use purlin_arch::x86_64::lapic::LapicState;
use purlin_engine::EngineError;

use super::corrupt;
use crate::host_error;

/// Offsets in the page (SDM vol. 3A table 11-1).
const ID: usize = 0x20;
const ISR: usize = 0x100;
const TMR: usize = 0x180;
const IRR: usize = 0x200;
const LVT_TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
const DIVIDE: usize = 0x3e0;

/// Local vector table: masked; timer modes one-shot and periodic (SDM vol. 3A 11.5.1).
const LVT_MASKED: u32 = 1 << 16;
const TIMER_MODE: u32 = 3 << 17;
const TIMER_ONE_SHOT: u32 = 0;
const TIMER_PERIODIC: u32 = 1 << 17;

/// IA32_APIC_BASE: x2APIC mode.
const BASE_X2APIC: u64 = 1 << 10;

/// KVM's local APIC timer counts at 1 GHz before the divider (KVM_CAP_X86_APIC_BUS_CYCLES_NS, which is not changed).
const NS_PER_TICK: u64 = 1;

const PAGE: usize = 1024;

pub(super) fn save(kvm: &kvm_lapic_state) -> LapicState {
    let regs: Vec<u8> = kvm.regs.iter().map(|byte| byte.cast_unsigned()).collect();
    let timer_remaining_ns = remaining_ns(&regs);
    LapicState { regs, timer_remaining_ns, sipi_plus_one: 0, init_pending: false }
}

/// Time until the timer fires in one-shot and periodic mode.
///
/// A one-shot count of zero may be one that has fired, or one that has run out since the vCPU last ran and that KVM
/// has yet to turn into an interrupt: it does not tell. A timer interrupt more does no harm, one less stops a kernel; so it fires (again) after a restore.
fn remaining_ns(regs: &[u8]) -> u64 {
    let timer = register(regs, LVT_TIMER);
    let counts = matches!(timer & TIMER_MODE, TIMER_ONE_SHOT | TIMER_PERIODIC) && register(regs, INITIAL_COUNT) != 0;
    if !counts || (timer & LVT_MASKED != 0 && register(regs, CURRENT_COUNT) == 0) {
        return 0;
    }
    (u64::from(register(regs, CURRENT_COUNT)) * divisor(regs) * NS_PER_TICK).max(1)
}

pub(super) fn restore(fd: &VcpuFd, saved: &LapicState) -> Result<(), EngineError> {
    if saved.regs.len() != PAGE {
        return Err(corrupt(format!("a local APIC page of {} bytes, not {PAGE}", saved.regs.len())));
    }
    let mut regs = saved.regs.clone();
    set_timer(&mut regs, saved.timer_remaining_ns);
    let mut kvm = kvm_lapic_state::default();
    for (to, from) in kvm.regs.iter_mut().zip(regs) {
        *to = from.cast_signed();
    }
    fd.set_lapic(&kvm).map_err(host_error("KVM_SET_LAPIC"))
}

/// KVM starts the timer from the current count; where that is zero it fires at once, unless the initial count is too.
fn set_timer(regs: &mut [u8], remaining_ns: u64) {
    let ticks = remaining_ns.div_ceil(divisor(regs) * NS_PER_TICK);
    set_register(regs, CURRENT_COUNT, u32::try_from(ticks).unwrap_or(u32::MAX));
    if remaining_ns == 0 && register(regs, LVT_TIMER) & TIMER_MODE == TIMER_ONE_SHOT {
        set_register(regs, INITIAL_COUNT, 0);
    }
}

/// The timer's divider (SDM vol. 3A figure 11-10): bits 3, 1 and 0; 0b111 divides by 1, the others by 2 to 128.
fn divisor(regs: &[u8]) -> u64 {
    let value = register(regs, DIVIDE);
    let exponent = (value & 3 | value >> 1 & 4) + 1;
    1 << (exponent & 7)
}

/// The APIC's ID, in whichever mode it is.
pub(super) fn id(saved: &LapicState, apic_base: Option<u64>) -> u32 {
    let id = register(&saved.regs, ID);
    if apic_base.unwrap_or(0) & BASE_X2APIC != 0 { id } else { id >> 24 }
}

/// The level-triggered vectors that are requested or in service: their EOI goes to the I/O APIC (SDM vol. 3A 11.8.5).
pub(super) fn level_vectors(saved: &LapicState) -> impl Iterator<Item = u8> {
    let bit = |base: usize, vector: u8| {
        register(&saved.regs, base + usize::from(vector / 32) * 0x10) >> (vector % 32) & 1 != 0
    };
    (0..=u8::MAX).filter(move |&v| bit(TMR, v) && (bit(ISR, v) || bit(IRR, v)))
}

fn register(regs: &[u8], offset: usize) -> u32 {
    regs.get(offset..offset + 4).map_or(0, |bytes| u32::from_le_bytes(bytes.try_into().expect("four bytes")))
}

fn set_register(regs: &mut [u8], offset: usize, value: u32) {
    regs[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(registers: &[(usize, u32)]) -> Vec<u8> {
        let mut regs = vec![0; PAGE];
        for &(offset, value) in registers {
            set_register(&mut regs, offset, value);
        }
        regs
    }

    /// SDM vol. 3A figure 11-10.
    #[test]
    fn divider() {
        let by = |value| divisor(&page(&[(DIVIDE, value)]));
        assert_eq!([0, 1, 2, 3, 8, 9, 10, 11].map(by), [2, 4, 8, 16, 32, 64, 128, 1]);
    }

    #[test]
    fn a_running_timer_goes_on_where_it_was() {
        let mut regs =
            page(&[(LVT_TIMER, TIMER_PERIODIC | 0x30), (DIVIDE, 3), (INITIAL_COUNT, 1000), (CURRENT_COUNT, 600)]);
        assert_eq!(remaining_ns(&regs), 9600);
        set_register(&mut regs, CURRENT_COUNT, 0);
        set_timer(&mut regs, 9600);
        assert_eq!((register(&regs, CURRENT_COUNT), register(&regs, INITIAL_COUNT)), (600, 1000));
    }

    #[test]
    fn a_timer_that_is_not_armed_stays_so() {
        let mut regs = page(&[(LVT_TIMER, 0x30), (INITIAL_COUNT, 1000)]);
        set_timer(&mut regs, 0);
        assert_eq!(register(&regs, INITIAL_COUNT), 0, "KVM would let it fire at once");
        assert_eq!(remaining_ns(&page(&[(LVT_TIMER, 0x30)])), 0);
    }

    #[test]
    fn a_one_shot_timer_at_zero_is_not_lost() {
        assert_eq!(remaining_ns(&page(&[(LVT_TIMER, 0x30), (INITIAL_COUNT, 1000)])), 1);
        assert_eq!(remaining_ns(&page(&[(LVT_TIMER, LVT_MASKED | 0x30), (INITIAL_COUNT, 1000)])), 0);
    }

    #[test]
    fn deadline_mode_has_no_count() {
        let deadline = 2 << 17;
        assert_eq!(remaining_ns(&page(&[(LVT_TIMER, deadline | 0x30), (INITIAL_COUNT, 5), (CURRENT_COUNT, 5)])), 0);
    }

    #[test]
    fn level_triggered_vectors_in_flight_are_found() {
        // 0x31 in service and level, 0x52 requested and level, 0x53 requested and edge, 0x71 level but idle.
        let regs = page(&[
            (ISR + 0x10, 1 << 0x11),
            (IRR + 0x20, 1 << 0x12 | 1 << 0x13),
            (TMR + 0x10, 1 << 0x11),
            (TMR + 0x20, 1 << 0x12),
            (TMR + 0x30, 1 << 0x11),
        ]);
        let saved = LapicState { regs, ..Default::default() };
        assert_eq!(level_vectors(&saved).collect::<Vec<_>>(), [0x31, 0x52]);
    }

    #[test]
    fn the_id_is_where_the_mode_has_it() {
        let saved = LapicState { regs: page(&[(ID, 0x0300_0000)]), ..Default::default() };
        assert_eq!(id(&saved, Some(0xfee0_0800)), 3);
        assert_eq!(id(&saved, Some(0xfee0_0c00)), 0x0300_0000);
    }
}
