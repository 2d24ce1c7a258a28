//! What XSAVE and FXSAVE store, where processors are free to store one thing or another.

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register, UsedMemory};
use purlin_arch::x86_64::regs::rflags;

use crate::{
    case::{Case, Outcome},
    compare::decode,
    layout::{DATA_FRAMES, PAGE, mappings},
    translated::Step,
    xsave::{AREA, OTHERS, at, components},
};

/// Whether all that differs in memory is what an executed instruction of the XSAVE family was free to store:
/// - XSTATE_BV tells of a component in its initial state that it is in use, or not (SDM vol. 1 13.6). A Zen 5 has it in use from
///   the first SSE instruction on that writes an XMM register: for AVX's, though the upper halves stay zero. The
///   translator's own accesses save and restore XMM registers, so that it tells so more often;
/// - XSAVEC and XSAVEOPT save such a component, or not;
/// - without REX.W the selectors that belong to the x87's pointers are stored, while an exception waits. Processors have
///   stopped keeping them (CPUID.7.0:EBX bit 13), and the translator does not.
pub fn differently(case: &Case, native: &Outcome, translated: &Outcome, steps: &[Step]) -> bool {
    let free: Vec<Free> = steps.iter().filter_map(|step| Free::of(case, native, steps, step)).collect();
    let differing = native.memory.iter().zip(&translated.memory).enumerate().filter(|(_, (a, b))| a != b);
    let mut bytes = differing.map(|(at, _)| at).peekable();
    bytes.peek().is_some() && bytes.all(|at| free.iter().any(|free| free.covers(at)))
}

/// Whether an instruction has read what an instruction of the XSAVE family before it was free to store: anything may
/// differ from there on.
pub fn is_read(case: &Case, native: &Outcome, steps: &[Step]) -> bool {
    let mut info = InstructionInfoFactory::new();
    let mut free: Vec<Free> = Vec::new();
    steps.iter().any(|step| {
        let Some(insn) = decode(case, step.rip, step.bits) else { return false };
        let read = info.info(&insn).used_memory().iter().filter_map(|memory| Read::of(memory, &insn, step));
        // Where a gather reads, its registers would say.
        let gathers = insn.is_vsib() && insn.op0_kind() == OpKind::Register && free.iter().any(Free::is_there);
        let found = gathers || read.into_iter().any(|read| free.iter().any(|free| read.overlaps(free)));
        free.extend(Free::of(case, native, steps, step));
        found
    })
}

/// Whether an instruction has asked for components that the host has and a guest has not: it has written more, or stumbled
/// over less, from there on.
pub fn asks_for_others(case: &Case, steps: &[Step]) -> bool {
    use Mnemonic::*;
    let is_such =
        |mnemonic| matches!(mnemonic, Xsave | Xsave64 | Xsavec | Xsavec64 | Xsaveopt | Xsaveopt64 | Xrstor | Xrstor64);
    let low = |register: u64| register & u64::from(u32::MAX);
    steps
        .iter()
        .filter(|step| (low(step.gpr[2]) << 32 | low(step.gpr[0])) & *OTHERS != 0)
        .any(|step| decode(case, step.rip, step.bits).is_some_and(|insn| is_such(insn.mnemonic())))
}

/// Bytes that an instruction reads.
struct Read {
    /// Linear address of the first.
    start: u64,
    count: u64,
}

impl Read {
    /// Those of one of its operands, all repetitions included.
    fn of(memory: &UsedMemory, insn: &Instruction, step: &Step) -> Option<Self> {
        use OpAccess::{CondRead, Read, ReadCondWrite, ReadWrite};
        if !matches!(memory.access(), Read | CondRead | ReadWrite | ReadCondWrite) {
            return None;
        }
        let start = memory.virtual_address(0, |register, _, _| value(register, step))?;
        let repeats = insn.is_string_instruction() && (insn.has_rep_prefix() || insn.has_repne_prefix());
        let size = if repeats { insn.memory_size() } else { memory.memory_size() };
        let size = size.size() as u64;
        let count = if repeats { step.gpr[1].saturating_mul(size).min(1 << 32) } else { size };
        let down = repeats && step.rflags & rflags::DF != 0;
        Some(Self { start: if down { start.wrapping_sub(count - size) } else { start }, count })
    }

    fn overlaps(&self, free: &Free) -> bool {
        let covered = (0..DATA_FRAMES * PAGE as usize).filter(|at| free.covers(*at));
        covered.flat_map(places).any(|linear| linear.wrapping_sub(self.start) & free.mask < self.count)
    }
}

/// The linear addresses of byte `at` of the data.
fn places(at: usize) -> impl Iterator<Item = u64> {
    let (frame, byte) = (at / PAGE as usize, at as u64 % PAGE);
    mappings().into_iter().filter(move |m| m.frame == frame).map(move |m| m.linear + byte)
}

/// The bytes of one area that may differ.
struct Free {
    /// Linear address of the area.
    address: u64,
    /// The bits of an address.
    mask: u64,
    in_use: bool,
    components: bool,
    selectors: bool,
}

impl Free {
    /// Those of the area that `step` has stored; `None` if it was another instruction.
    fn of(case: &Case, native: &Outcome, steps: &[Step], step: &Step) -> Option<Self> {
        use Mnemonic::*;
        let insn = decode(case, step.rip, step.bits)?;
        let initial = may_be_initial(case, steps);
        let narrow = matches!(insn.mnemonic(), Fxsave | Xsave | Xsavec | Xsaveopt);
        let (in_use, components) = match insn.mnemonic() {
            Fxsave => (false, false),
            Xsave | Xsave64 => (initial, false),
            Xsavec | Xsavec64 | Xsaveopt | Xsaveopt64 => (initial, initial),
            _ => return None,
        };
        let mask = if step.bits == 64 { u64::MAX } else { u64::from(u32::MAX) };
        let selectors = narrow && native.x87_exception_waits();
        Some(Self { address: address(&insn, step)?, mask, in_use, components, selectors })
    }

    /// Whether there are any.
    fn is_there(&self) -> bool {
        self.in_use || self.components || self.selectors
    }

    /// Whether byte `at` of the data is among them.
    fn covers(&self, at: usize) -> bool {
        places(at).any(|linear| self.holds(linear.wrapping_sub(self.address) & self.mask))
    }

    /// Whether the byte `offset` into the area is among them.
    fn holds(&self, offset: u64) -> bool {
        const FCS: u64 = at::FIP as u64 + 4;
        const FCS_END: u64 = FCS + 1;
        const FDS: u64 = at::FDP as u64 + 4;
        const FDS_END: u64 = FDS + 1;
        const HEADER: u64 = at::HEADER as u64;
        const HEADER_END: u64 = HEADER + 8;
        match offset {
            FCS | FCS_END | FDS | FDS_END if self.selectors => true,
            HEADER..HEADER_END => self.in_use,
            offset => self.components && offset < AREA as u64,
        }
    }
}

/// Whether some component is in its initial state at the start, or may have become so.
fn may_be_initial(case: &Case, steps: &[Step]) -> bool {
    use Mnemonic::{Vzeroall, Vzeroupper, Xrstor, Xrstor64};
    let initialises = |insn: Instruction| matches!(insn.mnemonic(), Vzeroupper | Vzeroall | Xrstor | Xrstor64);
    components() & !case.area().u64(at::HEADER) != 0
        || steps.iter().filter_map(|step| decode(case, step.rip, step.bits)).any(initialises)
}

/// The linear address of the memory operand.
fn address(insn: &Instruction, step: &Step) -> Option<u64> {
    insn.virtual_address(0, 0, |register, _, _| value(register, step))
}

/// What `register` was before `step`: of a segment register the base.
fn value(register: Register, step: &Step) -> Option<u64> {
    match register {
        Register::ES | Register::CS | Register::SS | Register::DS if step.bits == 64 => Some(0),
        _ if register.is_segment_register() => step.bases.get(register.number()).copied(),
        _ if !register.is_gpr() => None,
        _ => {
            let whole = *step.gpr.get(register.full_register().number())?;
            Some(if register.size() < 8 { whole & ((1 << (8 * register.size())) - 1) } else { whole })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::DATA;

    const ENTRY: u64 = 0x2000_1000;

    fn case(code: &[u8], vectors: u64, gpr: [u64; 16]) -> Case {
        Case { bits: 64, ss: 0x2b, entry: ENTRY, code: code.to_vec(), gpr, rflags: 0x202, vectors, memory: 1 }
    }

    fn outcome(case: &Case) -> Outcome {
        let memory = vec![0; DATA_FRAMES * PAGE as usize];
        let (rip, rflags, selectors, bases) = (0, 0, [0; 6], [0; 2]);
        let (gpr, area) = (case.gpr, case.area());
        Outcome { gpr, rip, rflags, selectors, bases, fault: Default::default(), area, memory }
    }

    #[test]
    fn an_area_with_what_guests_have_not_is_the_hosts_own() {
        // (A host without such components has nothing to be asked for.)
        let xsave: &[u8] = &[0x48, 0x0f, 0xae, 0x23];
        let asks = |code: &[u8], mask: u64| {
            let mut gpr = [0; 16];
            (gpr[0], gpr[2], gpr[3]) = (mask & 0xffff_ffff, mask >> 32, DATA);
            let case = case(code, 1, gpr);
            asks_for_others(&case, &[Step { rip: ENTRY, gpr, rflags: 0, bases: [0; 6], bits: 64 }])
        };
        assert!(!asks(xsave, components()));
        assert_eq!(asks(xsave, u64::MAX), *OTHERS != 0);
        assert!(!asks(&[0x90], u64::MAX));
    }

    /// Whether a difference in byte `at` of the data passes behind one instruction off `[rbx]`, RBX being the data's first
    /// page.
    fn passes(code: &[u8], vectors: u64, at: usize) -> bool {
        let mut gpr = [0; 16];
        gpr[3] = DATA;
        let case = case(code, vectors, gpr);
        let step = Step { rip: ENTRY, gpr, rflags: 0, bases: [0; 6], bits: 64 };
        let native = outcome(&case);
        let mut translated = native.clone();
        translated.memory[at] = 4;
        differently(&case, &native, &translated, &[step])
    }

    /// A seed of registers among which all components are in use, or one is not.
    fn seed(initial: bool) -> u64 {
        (1..).find(|seed| (components() & !crate::xsave::Area::random(*seed).u64(at::HEADER) != 0) == initial).unwrap()
    }

    #[test]
    fn what_reads_it_is_found() {
        // xsave64 [rbx], then one more with RSI at the area's header.
        let read_by = |second: &[u8], rsi: u64, rcx: u64, rflags: u64| {
            let code = [&[0x48, 0x0f, 0xae, 0x23], second].concat();
            let mut gpr = [0; 16];
            (gpr[1], gpr[3], gpr[6]) = (rcx, DATA, rsi);
            let case = case(&code, seed(true), gpr);
            let step = |by| Step { rip: ENTRY + by, gpr, rflags, bases: [0; 6], bits: 64 };
            is_read(&case, &outcome(&case), &[step(0), step(4)])
        };
        let (header, load, movsb) = (DATA + at::HEADER as u64, [0x48, 0x8b, 0x06], [0xf3, 0xa4]);
        assert!(read_by(&load, header + 7, 0, 0));
        assert!(!read_by(&load, header + 8, 0, 0));
        assert!(read_by(&movsb, header - 9, 10, 0));
        assert!(!read_by(&movsb, header - 9, 9, 0));
        assert!(read_by(&movsb, header + 9, 3, rflags::DF));
        assert!(!read_by(&movsb, header + 9, 2, rflags::DF));
        assert!(!read_by(&[0x48, 0x89, 0x06], header, 0, 0), "a store");
        assert!(read_by(&[0xc4, 0xe2, 0x61, 0x90, 0x0c, 0x90], 0, 0, 0), "a gather, wherever");
    }

    #[test]
    fn only_what_is_free_passes() {
        let (xsave64, xsavec64, nop): (&[u8], &[u8], &[u8]) =
            (&[0x48, 0x0f, 0xae, 0x23], &[0x48, 0x0f, 0xc7, 0x23], &[0x0f, 0x1f, 0x03]);
        let (initial, in_use) = (seed(true), seed(false));
        assert!(passes(xsave64, initial, at::HEADER));
        assert!(!passes(xsave64, in_use, at::HEADER));
        assert!(!passes(xsave64, initial, at::XMM));
        assert!(passes(xsavec64, initial, at::HEADER + 64));
        assert!(!passes(xsavec64, initial, AREA));
        assert!(!passes(nop, initial, at::HEADER));
    }
}
