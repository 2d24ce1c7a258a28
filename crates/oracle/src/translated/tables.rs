//! The system's tables in guest memory: what Linux has in its GDT and LDT as far as user code can tell, gates for the
//! traps of INT1, INT3 and INTO, and a task for their stack.

use purlin_arch::x86_64::regs::seg;
use purlin_engine_translator::{
    cpu::{Cpu, Segment, Table, access},
    exception::vector,
};

use crate::{
    layout::PAGE,
    segments::{LDT, gdt},
};

/// Where the supervisor finds them.
pub const LINEAR: u64 = 0xffff_8000_0000_0000;
/// The tables, and the supervisor's stack.
pub const PAGES: u64 = 2;
/// Handlers lie here, 16 bytes for each vector, where nothing is mapped.
const HANDLERS: u64 = LINEAR + (1 << 20);

const LDT_AT: u64 = 0x200;
const IDT_AT: u64 = 0x400;
const TSS_AT: u64 = 0x800;
/// Vectors that have gates.
const GATES: u64 = 5;
const STACK_TOP: u64 = PAGES * PAGE;
const KERNEL_CS: u64 = 0x10;

/// Writes the tables.
pub fn write(memory: &mut [u8], processor: u32) {
    let mut put = |at: u64, value: u64| memory[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
    gdt(processor).iter().enumerate().for_each(|(i, descriptor)| put(8 * i as u64, *descriptor));
    LDT.iter().enumerate().for_each(|(i, entry)| put(LDT_AT + 8 * i as u64, entry.descriptor()));
    for i in 0..GATES {
        let from_user = i == u64::from(vector::BP) || i == u64::from(vector::OF);
        let (low, high) = gate(HANDLERS + 16 * i, if from_user { 3 } else { 0 });
        put(IDT_AT + 16 * i, low);
        put(IDT_AT + 16 * i + 8, high);
    }
    put(TSS_AT + 4, LINEAR + STACK_TOP);
    // No map of ports.
    memory[TSS_AT as usize + 0x66..][..2].copy_from_slice(&0xffffu16.to_le_bytes());
}

/// An interrupt gate of long mode (SDM vol. 3A 6.14.1).
fn gate(handler: u64, dpl: u64) -> (u64, u64) {
    let access = 0x8e | dpl << 5;
    (handler & 0xffff | KERNEL_CS << 16 | access << 40 | (handler >> 16 & 0xffff) << 48, handler >> 32)
}

/// Points the table registers at them.
pub fn load(cpu: &mut Cpu) {
    cpu.gdtr = Table { base: LINEAR, limit: gdt(0).len() as u16 * 8 - 1 };
    cpu.idtr = Table { base: LINEAR + IDT_AT, limit: GATES as u16 * 16 - 1 };
    let system = |base, limit, kind, selector| Segment { base, limit, access: access::P | kind, selector };
    cpu.ldtr = system(LINEAR + LDT_AT, LDT.len() as u32 * 8 - 1, 2, 0x50);
    cpu.tr = system(LINEAR + TSS_AT, 0x67, 0xb, 0x40);
}

/// The segment that a selector of the tables names, for a register.
pub fn segment(selector: u16) -> Segment {
    let index = usize::from(selector >> 3);
    let low = if selector & 4 != 0 { LDT[index].descriptor() } else { gdt(0)[index] };
    let access = (low >> 40) as u32 & 0xf0ff;
    let limit = (low & 0xffff | (low >> 48 & 0xf) << 16) as u32;
    let limit = if access & access::G != 0 { limit << 12 | 0xfff } else { limit };
    Segment { base: low >> 16 & 0xff_ffff | low >> 56 << 24, limit, access, selector }
}

/// The vector whose handler was entered, and the stack that it was entered with.
pub fn entered(cpu: &Cpu) -> Option<(u8, u64)> {
    let handler = cpu.rip.checked_sub(HANDLERS)?;
    let known = cpu.cpl == 0 && cpu.seg[seg::CS].selector == KERNEL_CS as u16 && handler < 16 * GATES;
    known.then_some(((handler / 16) as u8, cpu.gpr[4].wrapping_sub(LINEAR)))
}
