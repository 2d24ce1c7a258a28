//! The local APIC's timer (SDM vol. 3A 11.5.4): one-shot, periodic, TSC deadline. Counts are computed from the host's
//! monotonic clock; nothing ticks.

use super::{Lapic, TIMER, lvt};
use crate::{clock::monotonic_ns, cpu::Cpu, mailbox::request};

/// The modes, as bits 18:17 of the LVT entry.
mod mode {
    pub const SHIFT: u32 = 17;
    pub const PERIODIC: u32 = 1;
    pub const TSC_DEADLINE: u32 = 2;
}

/// A tick of the undivided clock: 1 GHz, as CPUID says.
const TICK_NS: u64 = 1;

/// A guest that asks for a shorter period would get nothing done.
const MIN_PERIOD_NS: u64 = 100_000;

/// The timer's registers beside its LVT entry.
#[derive(Clone, Debug, Default)]
pub(super) struct Timer {
    initial_count: u32,
    divide: u32,
    /// When it expires, on the host's monotonic clock, if it is armed.
    deadline_ns: Option<u64>,
    /// IA32_TSC_DEADLINE, 0 if not armed.
    tsc_deadline: u64,
}

impl Timer {
    /// The divider: bits 3, 1 and 0 of the divide configuration register are 0 for 2, 1 for 4 … 7 for 1.
    fn divider(&self) -> u64 {
        let code = self.divide >> 1 & 4 | self.divide & 3;
        1 << ((code + 1) & 7)
    }

    fn count_ns(&self) -> u64 {
        self.divider() * TICK_NS
    }

    fn period_ns(&self) -> u64 {
        u64::from(self.initial_count) * self.count_ns()
    }

    pub fn initial_count(&self) -> u32 {
        self.initial_count
    }

    pub fn divide(&self) -> u32 {
        self.divide
    }

    pub fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// The current count: 0 when not armed, and in TSC-deadline mode.
    pub fn current_count(&self) -> u32 {
        match self.deadline_ns {
            Some(deadline) if self.tsc_deadline == 0 => {
                let left = deadline.saturating_sub(monotonic_ns()).div_ceil(self.count_ns());
                left.min(u64::from(self.initial_count)) as u32
            }
            _ => 0,
        }
    }

    /// Nanoseconds until it expires in one-shot or periodic mode, 0 if it is not armed.
    pub fn remaining_ns(&self, now: u64) -> u64 {
        match self.deadline_ns {
            Some(deadline) if self.tsc_deadline == 0 => deadline.saturating_sub(now).max(1),
            _ => 0,
        }
    }

    /// Takes over saved registers.
    pub fn restored(initial_count: u32, divide: u32, remaining_ns: u64) -> Self {
        let mut timer = Self { initial_count, divide: divide & 0xb, deadline_ns: None, tsc_deadline: 0 };
        if initial_count != 0 && remaining_ns != 0 {
            timer.deadline_ns = Some(monotonic_ns() + remaining_ns.min(timer.period_ns().max(MIN_PERIOD_NS)));
        }
        timer
    }
}

impl Lapic {
    /// When the timer next wants [`request::TIMER`], on the host's monotonic clock in nanoseconds. Changes of it are
    /// announced by that request too. While the timer is masked nobody needs to know.
    pub fn timer_deadline(&self) -> Option<u64> {
        if self.lvt[TIMER] & lvt::MASKED != 0 {
            return None;
        }
        self.timer.deadline_ns
    }

    fn timer_mode(&self) -> u32 {
        self.lvt[TIMER] >> mode::SHIFT & 3
    }
}

/// Lets the timer expire if its time has come.
pub(super) fn elapse(cpu: &mut Cpu) {
    let Some(deadline) = cpu.lapic.timer.deadline_ns else { return };
    let now = monotonic_ns();
    if now < deadline {
        return;
    }
    if cpu.tsc() < cpu.lapic.timer.tsc_deadline {
        // The host slews its monotonic clock, not its TSC: the guest must not be woken early.
        return tsc_changed(cpu);
    }
    let lapic = &mut cpu.lapic;
    lapic.timer.tsc_deadline = 0;
    lapic.timer.deadline_ns = None;
    if lapic.timer_mode() == mode::PERIODIC {
        let period = lapic.timer.period_ns().max(MIN_PERIOD_NS);
        // Periods that were missed altogether are lost: their interrupts would have merged in IRR.
        let missed = (now - deadline) / period;
        lapic.timer.deadline_ns = Some(deadline + (missed + 1) * period);
    }
    lapic.raise_lvt(TIMER);
}

pub(super) fn set_initial_count(cpu: &mut Cpu, count: u32) {
    elapse(cpu);
    if cpu.lapic.timer_mode() & mode::TSC_DEADLINE != 0 {
        return;
    }
    let timer = &mut cpu.lapic.timer;
    timer.initial_count = count;
    timer.deadline_ns = (count != 0).then(|| monotonic_ns() + timer.period_ns());
    cpu.request_of_self(request::TIMER);
}

/// A change of the divider while the timer counts stretches what is left of the count.
pub(super) fn set_divide(cpu: &mut Cpu, value: u32) {
    elapse(cpu);
    let timer = &mut cpu.lapic.timer;
    let left = u64::from(timer.current_count());
    timer.divide = value & 0xb;
    if timer.deadline_ns.is_some() && timer.tsc_deadline == 0 {
        timer.deadline_ns = Some(monotonic_ns() + left * timer.count_ns());
    }
    cpu.request_of_self(request::TIMER);
}

/// Writes the timer's LVT entry. A switch between TSC-deadline mode and the others disarms it (SDM vol. 3A 11.5.4.1).
pub(super) fn set_lvt(cpu: &mut Cpu, value: u32) {
    elapse(cpu);
    let lapic = &mut cpu.lapic;
    let old = lapic.timer_mode();
    lapic.lvt[TIMER] = lapic.allowed_lvt(TIMER, value);
    if (old ^ lapic.timer_mode()) & mode::TSC_DEADLINE != 0 {
        lapic.timer.deadline_ns = None;
        lapic.timer.tsc_deadline = 0;
        lapic.timer.initial_count = 0;
    }
    cpu.request_of_self(request::TIMER);
}

/// Writes IA32_TSC_DEADLINE, which does nothing outside of TSC-deadline mode.
pub(super) fn set_tsc_deadline(cpu: &mut Cpu, deadline: u64) {
    elapse(cpu);
    if cpu.lapic.timer_mode() != mode::TSC_DEADLINE {
        return;
    }
    cpu.lapic.timer.tsc_deadline = deadline;
    tsc_changed(cpu);
}

/// Works out anew when the TSC reaches the deadline.
pub(super) fn tsc_changed(cpu: &mut Cpu) {
    if cpu.lapic.timer_mode() != mode::TSC_DEADLINE {
        return;
    }
    let deadline = cpu.lapic.timer.tsc_deadline;
    let wait = cpu.shared.clock.ns_of_ticks(deadline.saturating_sub(cpu.tsc()));
    cpu.lapic.timer.deadline_ns = (deadline != 0).then(|| monotonic_ns().saturating_add(wait));
    cpu.request_of_self(request::TIMER);
}
