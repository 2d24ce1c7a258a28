//! Debug registers and single-stepping (SDM vol. 3B chapter 17).

use purlin_arch::x86_64::regs::rflags;

use crate::{cpu::Cpu, exception::Exception, mem::Access, segment::is_canonical};

/// Bits of DR6.
pub mod dr6 {
    #![allow(missing_docs)]
    /// A debug register is accessed while DR7.GD is set.
    pub const BD: u64 = 1 << 13;
    /// Single step.
    pub const BS: u64 = 1 << 14;
    /// A task switch to a task with its T bit set.
    pub const BT: u64 = 1 << 15;
    /// The bits that can be set.
    pub const WRITABLE: u64 = 0xe00f;
    /// The bits that always are; DR6 after power-up.
    pub const FIXED: u64 = 0xffff_0ff0;
}

/// Bits of DR7.
pub mod dr7 {
    #![allow(missing_docs)]
    pub const GD: u64 = 1 << 13;
    /// L0 to L3: enabled for the current task.
    pub const LOCAL: u64 = 0x55;
    /// Bit 10 is always set; DR7 after power-up.
    pub const FIXED: u64 = 1 << 10;
    /// Bits that can be set or clear.
    pub const WRITABLE: u64 = 0xffff_23ff;
}

/// What a breakpoint is for: its R/W field in DR7.
const INSTRUCTION: u64 = 0;
const STORES: u64 = 1;
const LOADS_AND_STORES: u64 = 3;

impl Cpu {
    /// R/W field of breakpoint `n`.
    fn breakpoint_kind(&self, n: usize) -> u64 {
        self.dr7 >> (16 + 4 * n) & 3
    }

    /// Length in bytes of breakpoint `n`.
    fn breakpoint_size(&self, n: usize) -> u64 {
        [1, 2, 8, 4][(self.dr7 >> (18 + 4 * n)) as usize & 3]
    }

    fn breakpoint_enabled(&self, n: usize) -> bool {
        self.dr7 >> (2 * n) & 3 != 0
    }
}

/// The #DB fault of an instruction breakpoint at CS:RIP, which comes before everything else the instruction does.
/// None while RFLAGS.RF is set, and right after a load of SS.
pub fn instruction_breakpoint(cpu: &Cpu) -> Option<Exception> {
    if cpu.dr7 & 0xff == 0 || cpu.rflags & rflags::RF != 0 || cpu.mov_ss_shadow {
        return None;
    }
    let rip = match cpu.code64() {
        true => cpu.rip,
        false => cpu.seg[purlin_arch::x86_64::regs::seg::CS].base.wrapping_add(cpu.rip) & 0xffff_ffff,
    };
    let hits = (0..4)
        .filter(|&n| cpu.breakpoint_enabled(n) && cpu.breakpoint_kind(n) == INSTRUCTION && cpu.dr[n] == rip)
        .fold(0, |hits, n| hits | 1 << n);
    (hits != 0).then(|| Exception::debug(hits))
}

/// Notes data breakpoints that an access hits; the trap waits in [`Cpu::pending_debug`] for the instruction's end.
///
/// The bits of breakpoints that match but are not enabled are told too, if an enabled one matches (SDM vol. 3B
/// 17.2.3).
pub fn data_breakpoints(cpu: &mut Cpu, linear: u64, size: usize, access: Access) {
    let (mut hits, mut enabled) = (0, false);
    for n in 0..4 {
        let watched = match cpu.breakpoint_kind(n) {
            STORES => access == Access::Write,
            LOADS_AND_STORES => access != Access::Fetch,
            _ => false,
        };
        let length = cpu.breakpoint_size(n);
        let start = cpu.dr[n] & !(length - 1);
        let overlap = linear.wrapping_sub(start) < length || start.wrapping_sub(linear) < size as u64;
        if watched && overlap && is_canonical(start) {
            hits |= 1 << n;
            enabled |= cpu.breakpoint_enabled(n);
        }
    }
    if enabled {
        cpu.pending_debug |= hits;
    }
}

/// To be called when an instruction has completed, before the next: the #DB trap that is due, if any. `stepping`:
/// RFLAGS.TF was set when the instruction began. INT n and SYSCALL clear it without a trap; POPF and IRET leave theirs
/// in [`Cpu::pending_debug`].
///
/// A load of SS holds a data breakpoint's trap back until the end of the next instruction, and drops a single-step
/// trap (SDM vol. 3A 6.8.3).
pub fn trap_after(cpu: &mut Cpu, stepping: bool) -> Option<Exception> {
    if cpu.mov_ss_shadow {
        return None;
    }
    if stepping && cpu.rflags & rflags::TF != 0 {
        cpu.pending_debug |= dr6::BS;
    }
    let bits = std::mem::take(&mut cpu.pending_debug);
    (bits != 0).then(|| Exception::debug(bits))
}

#[cfg(test)]
mod tests;
