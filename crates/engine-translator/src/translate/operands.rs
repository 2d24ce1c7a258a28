//! Copied instructions: their memory operand goes through the address check, their registers to where the guest's are.

use iced_x86::{Code, Instruction, InstructionInfoOptions, MemorySize, Mnemonic, OpAccess, OpKind, Register};
use purlin_arch::x86_64::regs::seg;

use super::{
    asm::{Mem, reg},
    classify::Class,
    desc::AccessDesc,
    emit::{Access, Emitter, Insn, has_base},
    layout::{at, gpr, pinned},
    place::is_movable,
    source::AMD,
    spare,
};

/// A memory operand as the guest wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    base: Option<u8>,
    index: Option<(u8, u8)>,
    disp: i32,
    /// RIP-relative or absolute: the address itself.
    fixed: Option<u64>,
    /// RIP-relative in movable code: what `fixed` says is to be taken like an RIP there (see `place.rs`).
    movable: bool,
    /// Address size: 16, 32 or 64.
    bits: u32,
    /// Segment register, in the encoding's order.
    pub segment: usize,
}

impl Operand {
    /// The memory operand of `insn`.
    pub fn of(insn: &Instruction) -> Self {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let fixed = if insn.is_ip_rel_memory_operand() {
            Some(insn.ip_rel_memory_address())
        } else {
            // MOV with an absolute address of 64 bits.
            (insn.memory_displ_size() == 8 && base == Register::None && index == Register::None)
                .then(|| insn.memory_displacement64())
        };
        let size = [base, index]
            .into_iter()
            .find(|r| *r != Register::None)
            .map_or(insn.memory_displ_size(), |r| if r == Register::EIP { 4 } else { r.size() as u32 });
        let bits = match size {
            2 => 16,
            4 => 32,
            _ => 64,
        };
        let number = |r: Register| (r != Register::None).then(|| r.full_register().number() as u8);
        Self {
            base: if fixed.is_some() { None } else { number(base) },
            index: number(index).map(|i| (i, insn.memory_index_scale().trailing_zeros() as u8)),
            disp: insn.memory_displacement64() as i32,
            fixed,
            movable: insn.is_ip_rel_memory_operand() && is_movable(insn.ip()),
            bits,
            segment: insn.memory_segment().number(),
        }
    }

    /// `[base + disp]` in `segment`, of 64-bit code.
    pub fn register(base: u8, disp: i32, segment: usize) -> Self {
        Self { base: Some(base), index: None, disp, fixed: None, movable: false, bits: 64, segment }
    }

    /// The same with an address of so many bits.
    pub fn of_size(self, bits: u32) -> Self {
        Self { bits, ..self }
    }

    /// Whether its address has 64 bits.
    pub fn is_wide(&self) -> bool {
        self.bits == 64
    }

    /// Whether it is off the stack pointer alone, in 64-bit code, in a segment without a base.
    pub fn is_stack(&self) -> bool {
        let alone = self.index.is_none() && self.fixed.is_none();
        self.bits == 64 && self.base == Some(reg::RSP) && alone && !has_base(self.segment)
    }

    /// The base register.
    pub fn base(&self) -> Option<u8> {
        self.base
    }

    /// The index register and log2 of its scale.
    pub fn index(&self) -> Option<(u8, u8)> {
        self.index
    }

    /// Whether its address is relative to the page of movable code.
    pub fn is_movable(&self) -> bool {
        self.movable
    }

    /// What is added to the registers: all of the address where there are none.
    pub fn displacement(&self) -> i64 {
        self.fixed.map_or(i64::from(self.disp), |fixed| fixed as i64)
    }

    /// The same as an operand of the host's, where all its registers are in the host's.
    fn in_host(&self) -> Option<Mem> {
        if self.bits != 64 || self.fixed.is_some() || self.base.is_none() {
            return None;
        }
        let base = pinned(self.base?)?;
        let index = match self.index {
            Some((index, scale)) => Some((pinned(index)?, scale)),
            None => None,
        };
        Some(Mem { gs: false, base: Some(base), index, disp: self.disp })
    }

    /// The same registers with another [`Self::displacement`], if that can be said.
    pub fn moved(mut self, displacement: i64) -> Option<Self> {
        match &mut self.fixed {
            Some(fixed) => *fixed = displacement as u64,
            None => self.disp = i32::try_from(displacement).ok()?,
        }
        Some(self)
    }

    /// The same, relative to RSP after it has been raised by `by` (POP to memory).
    pub fn above_stack(mut self, by: i32) -> Self {
        if self.base == Some(reg::RSP) {
            self.disp = self.disp.wrapping_add(by);
        }
        self
    }
}

/// Registers that may be lent to an instruction that needs more than the scratch ones, and needs them without REX.
const LENDABLE: [u8; 7] = [reg::RBX, reg::RBP, reg::RSI, reg::RDI, reg::RCX, reg::RDX, reg::RAX];

impl Emitter<'_> {
    /// R10 = offset of `operand` in its segment, R11 is changed. No flags are.
    pub(super) fn address(&mut self, operand: &Operand) {
        if let Some(fixed) = operand.fixed.filter(|_| operand.movable) {
            self.movable_address(fixed, operand.bits);
            return;
        }
        if let Some(fixed) = operand.fixed {
            let fixed = if operand.bits == 32 { fixed & 0xffff_ffff } else { fixed };
            self.asm.mov_ri(reg::R10, fixed);
            return;
        }
        let base = operand.base.map(|b| self.in_register(b, reg::R10));
        let index = operand.index.map(|(i, scale)| (self.in_register(i, reg::R11), scale));
        let mem = Mem { gs: false, base, index, disp: operand.disp };
        match (base, index, operand.bits) {
            (None, None, 64) => self.asm.mov_ri(reg::R10, operand.disp as i64 as u64),
            (None, None, 32) => self.asm.mov_ri(reg::R10, u64::from(operand.disp as u32)),
            (None, None, _) => self.asm.mov_ri(reg::R10, u64::from(operand.disp as u16)),
            (Some(b), None, 64) if operand.disp == 0 => self.asm.mov_rr(reg::R10, b),
            (Some(b), None, 32) if operand.disp == 0 => self.asm.mov_rr32(reg::R10, b),
            (None, Some(_), bits) => self.index_only(operand.disp, index.unwrap_or((0, 0)), bits),
            (_, _, 64) => self.asm.lea(reg::R10, mem),
            (_, _, 32) => self.asm.lea32(reg::R10, mem),
            _ => {
                self.asm.lea32(reg::R10, mem);
                self.asm.movzx16(reg::R10, reg::R10);
            }
        }
    }

    /// R10 = the address that is called `placed` in movable code.
    fn movable_address(&mut self, placed: u64, bits: u32) {
        if bits == 32 {
            // The sum of EIP and displacement has 32 bits: that of its low half is all that is known.
            self.asm.load(reg::R10, at::CODE_PAGE);
            self.asm.lea32(reg::R10, Mem::at(reg::R10, placed as i32));
        } else {
            self.load_rip(reg::R10, placed);
        }
    }

    /// R10 = index << scale + disp.
    fn index_only(&mut self, disp: i32, index: (u8, u8), bits: u32) {
        self.asm.mov_ri(reg::R10, 0);
        let mem = Mem { gs: false, base: Some(reg::R10), index: Some(index), disp };
        if bits == 64 {
            self.asm.lea(reg::R10, mem)
        } else {
            self.asm.lea32(reg::R10, mem)
        }
        if bits == 16 {
            self.asm.movzx16(reg::R10, reg::R10);
        }
    }

    /// The host register that holds guest register `index`: its own, or `scratch` after a load.
    pub(super) fn in_register(&mut self, index: u8, scratch: u8) -> u8 {
        pinned(index).unwrap_or_else(|| {
            self.asm.load(scratch, gpr(index));
            scratch
        })
    }

    /// A copied instruction.
    pub(super) fn copy(&mut self, insn: &Insn, live_after: u32) {
        let memory = (0..insn.insn.op_count()).find(|&i| insn.insn.op_kind(i) == OpKind::Memory);
        let Some(memory) = memory else {
            if self.move_homeless(&insn.insn) {
                return;
            }
            self.flags_before(&insn.flags, live_after);
            self.substitute(insn, None);
            self.x87_pointers(insn, false);
            return;
        };
        if insn.insn.mnemonic() == Mnemonic::Lea {
            self.lea(insn);
            return;
        }
        let operand = Operand::of(&insn.insn);
        let size = operand_size(&insn.insn);
        if size == 0 || size > 64 || insn.insn.memory_size() == MemorySize::Unknown {
            debug_assert!(false, "memory operand of unknown size: {:?}", insn.insn.code());
        }
        let mut flags = access_flags(&insn.insn, memory);
        if matches!(insn.class, Class::Vector(needs) if needs.x87) && flags & AccessDesc::WRITE != 0 {
            // An unmasked exception keeps an x87 instruction from storing, without being raised at once.
            flags |= AccessDesc::READ;
        }
        flags |= peculiarities(insn, flags);
        if matches!(insn.insn.memory_size(), MemorySize::Float80 | MemorySize::Bcd) {
            flags |= match operand.bits {
                32 => AccessDesc::PARTS_32,
                16 => AccessDesc::PARTS_16,
                _ => 0,
            };
        }
        let access = Access { size, flags, segment: operand.segment };
        let uses = insn.flags;
        let pointers = matches!(insn.class, Class::Vector(needs) if needs.pointers);
        let bit_string = is_bit_string(&insn.insn);
        if !pointers && !bit_string {
            self.access(insn, &operand, access, &uses, live_after, &mut |this, mem| {
                this.substitute(insn, Some(mem));
                // (FLDCW's)
                this.x87_pointers(insn, true);
            });
            return;
        }
        self.free_flags(insn.live);
        self.address(&operand);
        if pointers {
            self.asm.store(at::TEMP, reg::R10);
        } else {
            self.bit_string_address(&insn.insn, operand.bits);
        }
        self.checked_access(insn, access, &uses, live_after, &mut |this, mem| {
            let mem = if bit_string { this.bit_string_base(mem) } else { mem };
            this.substitute(insn, Some(mem));
            this.x87_pointers(insn, true);
        });
    }

    /// MOV of all of a register, where one of the two is in memory: that is a load or a store.
    fn move_homeless(&mut self, insn: &Instruction) -> bool {
        if !matches!(insn.code(), Code::Mov_r64_rm64 | Code::Mov_rm64_r64) {
            return false;
        }
        let [to, from] = [insn.op0_register(), insn.op1_register()].map(|register| register.number() as u8);
        match (pinned(to), pinned(from)) {
            (Some(host), None) => self.asm.load(host, gpr(from)),
            (None, Some(host)) => self.asm.store(gpr(to), host),
            _ => return false,
        }
        true
    }

    /// LEA: no access, so no check.
    fn lea(&mut self, insn: &Insn) {
        let operand = Operand::of(&insn.insn);
        let register = insn.insn.op0_register();
        let (number, size) = (register.full_register().number() as u8, register.size());
        if let Some(host) = pinned(number)
            && let Some(mem) = operand.in_host()
            && size >= 4
        {
            if size == 8 {
                self.asm.lea(host, mem)
            } else {
                self.asm.lea32(host, mem)
            }
            return;
        }
        self.address(&operand);
        self.write_gpr(number, reg::R10, size);
    }

    /// BT and its kin with a register operand: R10 += the operand's whole part, in units of its size (SDM vol. 2, BT).
    /// The host's instruction will add the same again, so its negative is kept for [`Self::bit_string_base`].
    fn bit_string_address(&mut self, insn: &Instruction, bits: u32) {
        let register = insn.op1_register();
        let size = register.size();
        let number = register.full_register().number() as u8;
        let host = self.in_register(number, reg::R11);
        self.asm.movsx(reg::R11, host, size);
        let scale = size.trailing_zeros() as u8;
        self.asm.sar(reg::R11, 3 + scale);
        let sum = Mem { gs: false, base: Some(reg::R10), index: Some((reg::R11, scale)), disp: 0 };
        if bits == 64 {
            self.asm.lea(reg::R10, sum)
        } else {
            self.asm.lea32(reg::R10, sum)
        }
        if bits == 16 {
            self.asm.movzx16(reg::R10, reg::R10);
        }
        self.asm.shl(reg::R11, scale);
        self.asm.neg(reg::R11);
        self.asm.store(at::TEMP, reg::R11);
    }

    /// The operand from which the host's bit-string instruction reaches the byte that `mem` is.
    fn bit_string_base(&mut self, mem: Mem) -> Mem {
        self.asm.lea(reg::R10, mem);
        self.asm.load(reg::R11, at::TEMP);
        Mem::sum(reg::R10, reg::R11)
    }

    /// Encodes the instruction with its registers and memory operand replaced.
    fn substitute(&mut self, insn: &Insn, mem: Option<Mem>) {
        let mut host = legal_in_64_bit(&insn.insn);
        let high =
            (0..host.op_count()).any(|i| host.op_kind(i) == OpKind::Register && is_high_byte(host.op_register(i)));
        // Guest registers that need a host register for the occasion.
        let mut wanted = [0u8; 4];
        let mut count = 0;
        for i in 0..host.op_count() {
            if host.op_kind(i) == OpKind::Register && host.op_register(i).is_gpr() {
                let number = host.op_register(i).full_register().number() as u8;
                let homeless = pinned(number).is_none_or(|h| high && h >= 8);
                if homeless && !wanted[..count].contains(&number) {
                    wanted[count] = number;
                    count += 1;
                }
            }
        }
        let wanted = &wanted[..count];

        // Of the two scratch registers the operand has one, or both (it gives R11 up where a register is wanted).
        let mut scratch: &[u8] = match mem {
            _ if high => &[],
            Some(mem) if mem.base == Some(reg::R11) => &[reg::R10],
            Some(_) => &[reg::R11],
            None => &[reg::R10, reg::R11],
        };
        let mut lent = 0;
        let mut lend = |this: &mut Self| {
            let used = used_registers(&insn.insn);
            let free = LENDABLE.into_iter().filter(|r| used & (1 << r) == 0).nth(lent).unwrap_or(reg::RBX);
            this.asm.store(Mem::gs(at::LENT.disp + 8 * lent as i32), free);
            lent += 1;
            (free, lent - 1)
        };
        let mut returns = [(0u8, 0usize); 4];
        let mut returned = 0;

        if let Some(mut mem) = mem {
            if mem.index.is_some() && (high || !wanted.is_empty()) {
                self.asm.lea(reg::R10, mem);
                mem = Mem::at(reg::R10, 0);
            }
            if high {
                let (base, slot) = lend(self);
                returns[returned] = (base, slot);
                returned += 1;
                self.asm.lea(base, mem);
                mem = Mem::at(base, 0);
            }
            set_memory(&mut host, mem);
        }
        let (read, written) = if wanted.is_empty() { (0, 0) } else { register_accesses(&insn.insn) };
        let mut homes = [(0u8, 0u8); 4];
        for (i, &number) in wanted.iter().enumerate() {
            let home = match scratch.split_first() {
                Some((first, rest)) => {
                    scratch = rest;
                    self.hosts[usize::from(*first == reg::R11)] = None;
                    *first
                }
                None => {
                    let (home, slot) = lend(self);
                    returns[returned] = (home, slot);
                    returned += 1;
                    home
                }
            };
            homes[i] = (number, home);
            if read & 1 << number != 0 {
                self.read_gpr(home, number);
            }
        }
        let homes = &homes[..count];
        for i in 0..host.op_count() {
            if host.op_kind(i) == OpKind::Register && host.op_register(i).is_gpr() {
                let register = host.op_register(i);
                let number = register.full_register().number() as u8;
                let home = homes.iter().find(|(n, _)| *n == number).map(|(_, h)| *h).or_else(|| pinned(number));
                if !is_high_byte(register) {
                    host.set_op_register(i, sized(home.unwrap_or(number), register.size()));
                }
            }
        }
        let faults = matches!(host.mnemonic(), Mnemonic::Div | Mnemonic::Idiv | Mnemonic::Cmpxchg16b);
        if matches!(insn.class, Class::Vector(_)) || faults {
            self.may_fault(insn.rip());
        }
        self.encode(&host);
        for &(number, home) in homes.iter().filter(|(number, _)| written & 1 << number != 0) {
            match pinned(number) {
                Some(host) => self.asm.mov_rr(host, home),
                None => self.asm.store(gpr(number), home),
            }
        }
        for &(register, slot) in &returns[..returned] {
            self.asm.load(register, Mem::gs(at::LENT.disp + 8 * slot as i32));
        }
    }
}

/// Whether a copied instruction is certain to leave R10 and R11 alone, unless [`Emitter::hosts`] says so.
pub(super) fn keeps_hosts(insn: &Insn) -> bool {
    let memory = (0..insn.insn.op_count()).any(|i| insn.insn.op_kind(i) == OpKind::Memory);
    match insn.class {
        Class::Nothing | Class::Jump | Class::JumpIf => insn.onward.is_some() || insn.class == Class::Nothing,
        Class::Copy if insn.insn.mnemonic() == Mnemonic::Lea => {
            let pinned = pinned(insn.insn.op0_register().full_register().number() as u8).is_some();
            pinned && insn.insn.op0_register().size() >= 4 && Operand::of(&insn.insn).in_host().is_some()
        }
        Class::Copy => !memory,
        Class::Vector(needs) => !memory && !needs.x87,
        _ => false,
    }
}

fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// Bytes of the memory operand.
pub(super) fn operand_size(insn: &Instruction) -> usize {
    match insn.code() {
        // AMD's processors load all four bytes.
        Code::Movsxd_r16_rm16 if *AMD => 4,
        _ => insn.memory_size().size(),
    }
}

/// Whether the first operand is a string of bits, of which a register says which.
pub(super) fn is_bit_string(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && insn.op1_kind() == OpKind::Register
}

fn set_memory(insn: &mut Instruction, mem: Mem) {
    let name = |r: u8| sized(r, 8);
    insn.set_segment_prefix(Register::None);
    insn.set_memory_base(mem.base.map_or(Register::None, name));
    insn.set_memory_index(mem.index.map_or(Register::None, |(r, _)| name(r)));
    insn.set_memory_index_scale(1);
    insn.set_memory_displacement64(mem.disp as i64 as u64);
    // One byte where it fits.
    insn.set_memory_displ_size(u32::from(mem.disp != 0));
}

/// The general register `number` of `size` bytes.
fn sized(number: u8, size: usize) -> Register {
    use Register::*;
    const BYTES: [Register; 16] = [AL, CL, DL, BL, SPL, BPL, SIL, DIL, R8L, R9L, R10L, R11L, R12L, R13L, R14L, R15L];
    const WORDS: [Register; 16] = [AX, CX, DX, BX, SP, BP, SI, DI, R8W, R9W, R10W, R11W, R12W, R13W, R14W, R15W];
    const DWORDS: [Register; 16] =
        [EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI, R8D, R9D, R10D, R11D, R12D, R13D, R14D, R15D];
    const QWORDS: [Register; 16] = [RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15];
    let table = match size {
        1 => &BYTES,
        2 => &WORDS,
        4 => &DWORDS,
        _ => &QWORDS,
    };
    table[usize::from(number & 15)]
}

/// General registers of which an instruction needs what they hold, and those that it may write to, as bit masks.
pub(super) fn register_accesses(insn: &Instruction) -> (u32, u32) {
    use OpAccess::{CondWrite, ReadCondWrite, ReadWrite, Write};
    spare::with_factory(|factory| {
        let used = factory.info_options(insn, InstructionInfoOptions::NO_MEMORY_USAGE).used_registers();
        used.iter().filter(|used| used.register().is_gpr()).fold((0, 0), |(read, written), used| {
            let bit = 1 << used.register().full_register().number();
            // What is written of a register of four bytes replaces all eight.
            let replaces = used.access() == Write && used.register().size() >= 4;
            let writes = matches!(used.access(), Write | ReadWrite | CondWrite | ReadCondWrite);
            (read | if replaces { 0 } else { bit }, written | if writes { bit } else { 0 })
        })
    })
}

/// General registers that an instruction uses in any way, as a bit mask.
fn used_registers(insn: &Instruction) -> u32 {
    spare::with_factory(|factory| {
        let used = factory.info(insn).used_registers();
        let numbers = used.iter().filter(|u| u.register().is_gpr()).map(|u| u.register().full_register().number());
        numbers.fold(0, |mask, number| mask | 1 << number)
    })
}

/// What the memory operand is used for.
pub(super) fn access_flags(insn: &Instruction, operand: u32) -> u16 {
    let options = InstructionInfoOptions::NO_MEMORY_USAGE | InstructionInfoOptions::NO_REGISTER_USAGE;
    let (read, write) = (AccessDesc::READ, AccessDesc::WRITE);
    match spare::with_factory(|factory| factory.info_options(insn, options).op_access(operand)) {
        OpAccess::Write => write,
        // Part of it may be left alone: a bounced access has to know what was there.
        OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => read | write,
        _ => read,
    }
}

/// What Intel's processors do by themselves: [`AccessDesc::LATE`] and [`AccessDesc::MMX`], for before they store they have converted
/// to half precision, found an x87 exception, and set the x87's TOP to MMX's 0 (AMD's look at the memory first); and
/// [`AccessDesc::UNCHECKED`], for half precision.
fn peculiarities(insn: &Insn, flags: u16) -> u16 {
    let Class::Vector(needs) = insn.class else { return 0 };
    let stores = flags & AccessDesc::WRITE != 0;
    match insn.insn.mnemonic() {
        _ if *AMD => 0,
        Mnemonic::Vcvtps2ph => AccessDesc::LATE | AccessDesc::UNCHECKED,
        Mnemonic::Vcvtph2ps => AccessDesc::UNCHECKED,
        _ if needs.pointers && stores => AccessDesc::LATE,
        _ if needs.x87 && stores && insn.insn.op1_register().is_mm() => AccessDesc::MMX,
        _ => 0,
    }
}

/// Forms that 64-bit code lacks, in their longer equivalents.
fn legal_in_64_bit(insn: &Instruction) -> Instruction {
    use Code::*;
    let mut host = *insn;
    let code = match insn.code() {
        Inc_r16 => Inc_rm16,
        Inc_r32 => Inc_rm32,
        Dec_r16 => Dec_rm16,
        Dec_r32 => Dec_rm32,
        Mov_AL_moffs8 => Mov_r8_rm8,
        Mov_AX_moffs16 => Mov_r16_rm16,
        Mov_EAX_moffs32 => Mov_r32_rm32,
        Mov_RAX_moffs64 => Mov_r64_rm64,
        Mov_moffs8_AL => Mov_rm8_r8,
        Mov_moffs16_AX => Mov_rm16_r16,
        Mov_moffs32_EAX => Mov_rm32_r32,
        Mov_moffs64_RAX => Mov_rm64_r64,
        Add_rm8_imm8_82 => Add_rm8_imm8,
        Or_rm8_imm8_82 => Or_rm8_imm8,
        Adc_rm8_imm8_82 => Adc_rm8_imm8,
        Sbb_rm8_imm8_82 => Sbb_rm8_imm8,
        And_rm8_imm8_82 => And_rm8_imm8,
        Sub_rm8_imm8_82 => Sub_rm8_imm8,
        Xor_rm8_imm8_82 => Xor_rm8_imm8,
        Cmp_rm8_imm8_82 => Cmp_rm8_imm8,
        _ => return host,
    };
    host.set_code(code);
    host
}

/// Whether the operand of a stack access needs anything but SS.
pub(super) const STACK: usize = seg::SS;
