//! Operands: registers, immediates, and memory operands that lead somewhere.
//!
//! A memory operand is to reach a place that was chosen before, through any addressing form. The registers in it get
//! their values from that: as long as nobody has written to a register, its value at the start is still free.

use iced_x86::{
    Code, EncodingKind, Instruction, InstructionInfoFactory, MemorySize, Mnemonic, OpAccess, OpCodeOperandKind as Kind,
    OpKind, Register, RoundingControl,
};

use super::far::{Target, destination};
use crate::{
    check::LINUX,
    layout::{DATA, DATA16, FS_BASE, GS_BASE, HIGH, PAGE, TOP},
    rng::Rng,
};

/// What is known of the general registers while a program grows.
pub struct Operands {
    bits: u32,
    /// The value at the start, where it has been settled.
    start: [Option<u64>; 16],
    /// Written to by the program.
    written: [bool; 16],
}

const GPR64: [Register; 16] = {
    use Register::*;
    [RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15]
};

const RSP: usize = 4;
const RBP: usize = 5;

impl Operands {
    /// For a new program in code of `bits`: the stack pointer, of `stack_bits`, leads into the data.
    pub fn new(bits: u32, stack_bits: u32, rng: &mut Rng) -> Self {
        let mut this = Self { bits, start: [None; 16], written: [false; 16] };
        let mut stack = this.place(8, stack_bits, rng);
        if rng.chance(70) {
            stack &= !7;
        }
        this.start[RSP] = Some(stack);
        this
    }

    /// The general registers at the start; what is still free becomes random.
    pub fn registers(&self, rng: &mut Rng) -> [u64; 16] {
        let mask = if self.bits == 64 { u64::MAX } else { u64::from(u32::MAX) };
        let count = if self.bits == 64 { 16 } else { 8 };
        std::array::from_fn(|i| if i < count { self.start[i].unwrap_or_else(|| any_value(rng)) & mask } else { 0 })
    }

    /// Takes note of the registers that `insn` writes.
    pub fn executed(&mut self, insn: &Instruction) {
        let mut factory = InstructionInfoFactory::new();
        for used in factory.info(insn).used_registers() {
            let writes = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None);
            if writes && used.register().is_gpr() {
                self.written[used.register().full_register().number()] = true;
            }
        }
        // What the stack pointer is after a push or a pop does not keep it from leading into the data.
        self.written[RSP] &= !(insn.is_stack_instruction());
    }

    /// Settles the start value of `register` unless it is settled or written to.
    fn settle(&mut self, register: usize, value: u64) {
        if !self.written[register] && self.start[register].is_none() {
            self.start[register] = Some(value);
        }
    }

    /// A random instruction of the form `code`.
    pub fn instruction(&mut self, code: Code, rng: &mut Rng) -> Option<Instruction> {
        let info = code.op_code();
        let mut insn = Instruction::default();
        insn.set_code(code);
        let kinds = info.op_kinds();
        let memory = kinds.iter().any(|k| is_memory(*k)) && rng.chance(65) || kinds.iter().any(|k| only_memory(*k));
        self.decorate(&mut insn, memory, rng);
        for (i, kind) in kinds.iter().enumerate() {
            self.operand(&mut insn, i as u32, *kind, memory, rng)?;
        }
        if info.can_use_lock_prefix() && insn.op0_kind() == OpKind::Memory && rng.chance(30) {
            insn.set_has_lock_prefix(true);
        }
        if info.can_use_rep_prefix() && rng.chance(40) {
            insn.set_has_rep_prefix(true);
        } else if info.can_use_repne_prefix()
            && info.can_use_rep_prefix()
            && insn.is_string_instruction()
            && rng.chance(30)
        {
            insn.set_has_repne_prefix(true);
        }
        self.implied(&insn, rng);
        Some(insn)
    }

    /// Masks, zeroing, broadcast and rounding of EVEX.
    fn decorate(&mut self, insn: &mut Instruction, memory: bool, rng: &mut Rng) {
        let info = insn.code().op_code();
        if info.require_op_mask_register() || info.can_use_op_mask_register() && rng.chance(50) {
            insn.set_op_mask(rng.pick(&MASKS));
            if info.can_use_zeroing_masking() && rng.chance(40) {
                insn.set_zeroing_masking(true);
            }
        }
        if memory {
            insn.set_is_broadcast(info.can_broadcast() && rng.chance(40));
        } else if info.can_use_rounding_control() && rng.chance(40) {
            use RoundingControl::*;
            insn.set_rounding_control(rng.pick(&[RoundToNearest, RoundDown, RoundUp, RoundTowardZero]));
        } else if info.can_suppress_all_exceptions() && rng.chance(40) {
            insn.set_suppress_all_exceptions(true);
        }
    }

    fn operand(&mut self, insn: &mut Instruction, i: u32, kind: Kind, memory: bool, rng: &mut Rng) -> Option<()> {
        use Register::*;
        let extended = insn.code().op_code().encoding() == EncodingKind::EVEX;
        let count = match (self.bits, extended) {
            (64, true) => 32,
            (64, false) => 16,
            _ => 8,
        };
        let general = if self.bits == 64 { 16 } else { 8 };
        let register = match kind {
            Kind::r8_or_mem | Kind::r16_or_mem | Kind::r32_or_mem | Kind::r64_or_mem if memory => {
                return self.memory(insn, i, rng);
            }
            Kind::mm_or_mem | Kind::xmm_or_mem | Kind::ymm_or_mem | Kind::zmm_or_mem | Kind::k_or_mem if memory => {
                return self.memory(insn, i, rng);
            }
            Kind::mem => return self.memory(insn, i, rng),
            Kind::mem_offs => return self.memory_offset(insn, i, rng),
            Kind::r8_or_mem | Kind::r8_reg | Kind::r8_opcode => self.byte_register(rng),
            Kind::r16_or_mem | Kind::r16_reg | Kind::r16_reg_mem | Kind::r16_rm | Kind::r16_opcode => {
                AX + rng.below(general) as u32
            }
            Kind::r32_or_mem | Kind::r32_reg | Kind::r32_reg_mem | Kind::r32_rm | Kind::r32_opcode | Kind::r32_vvvv => {
                EAX + rng.below(general) as u32
            }
            Kind::r64_or_mem | Kind::r64_reg | Kind::r64_reg_mem | Kind::r64_rm | Kind::r64_opcode | Kind::r64_vvvv => {
                RAX + rng.below(16) as u32
            }
            Kind::k_or_mem | Kind::k_reg | Kind::k_rm | Kind::k_vvvv => K0 + rng.below(8) as u32,
            Kind::mm_or_mem | Kind::mm_reg | Kind::mm_rm => MM0 + rng.below(8) as u32,
            Kind::xmm_or_mem | Kind::xmm_reg | Kind::xmm_rm | Kind::xmm_vvvv => XMM0 + rng.below(count) as u32,
            Kind::ymm_or_mem | Kind::ymm_reg | Kind::ymm_rm | Kind::ymm_vvvv => YMM0 + rng.below(count) as u32,
            Kind::zmm_or_mem | Kind::zmm_reg | Kind::zmm_rm | Kind::zmm_vvvv => ZMM0 + rng.below(count) as u32,
            Kind::xmm_is4 | Kind::xmm_is5 => XMM0 + rng.below(count.min(16)) as u32,
            Kind::ymm_is4 | Kind::ymm_is5 => YMM0 + rng.below(count.min(16)) as u32,
            Kind::al => AL,
            Kind::cl => CL,
            Kind::ax => AX,
            Kind::dx => DX,
            Kind::eax => EAX,
            Kind::rax => RAX,
            Kind::st0 => ST0,
            Kind::sti_opcode => ST0 + rng.below(8) as u32,
            Kind::br16_1 | Kind::br32_1 | Kind::br64_1 | Kind::br16_2 | Kind::br32_4 | Kind::br64_4 => {
                insn.set_op_kind(i, branch_kind(kind));
                return Some(());
            }
            Kind::seg_rSI => {
                return self.string_operand(insn, i, [OpKind::MemorySegRSI, OpKind::MemorySegESI, OpKind::MemorySegSI]);
            }
            Kind::es_rDI => {
                return self.string_operand(insn, i, [OpKind::MemoryESRDI, OpKind::MemoryESEDI, OpKind::MemoryESDI]);
            }
            Kind::seg_rDI => {
                return self.string_operand(insn, i, [OpKind::MemorySegRDI, OpKind::MemorySegEDI, OpKind::MemorySegDI]);
            }
            Kind::mem_vsib32x | Kind::mem_vsib64x => return self.vsib(insn, i, XMM0 + rng.below(count) as u32, rng),
            Kind::mem_vsib32y | Kind::mem_vsib64y => return self.vsib(insn, i, YMM0 + rng.below(count) as u32, rng),
            Kind::mem_vsib32z | Kind::mem_vsib64z => return self.vsib(insn, i, ZMM0 + rng.below(count) as u32, rng),
            Kind::seg_rBX_al => {
                insn.set_op_kind(i, OpKind::Memory);
                insn.set_memory_base(match self.bits {
                    64 => RBX,
                    32 => EBX,
                    _ => BX,
                });
                insn.set_memory_index(AL);
                return Some(());
            }
            Kind::es | Kind::cs | Kind::ss | Kind::ds | Kind::fs | Kind::gs => fixed_segment(kind),
            Kind::seg_reg => rng.pick(&[ES, SS, DS, FS, GS]),
            Kind::cr_reg => rng.pick(&[CR0, CR2, CR3, CR4, CR8]),
            Kind::dr_reg => DR0 + rng.below(8) as u32,
            Kind::farbr2_2 | Kind::farbr4_2 => return far_branch(insn, i, kind, self.bits, rng),
            _ => return immediate(insn, i, kind, rng),
        };
        insn.set_op_kind(i, OpKind::Register);
        insn.set_op_register(i, register);
        Some(())
    }

    fn byte_register(&self, rng: &mut Rng) -> Register {
        use Register::*;
        if self.bits != 64 || rng.chance(40) {
            return rng.pick(&[AL, CL, DL, BL, AH, CH, DH, BH]);
        }
        rng.pick(&[AL, CL, DL, BL, SPL, BPL, SIL, DIL, R8L, R9L, R10L, R11L, R12L, R13L, R14L, R15L])
    }

    fn string_operand(&mut self, insn: &mut Instruction, i: u32, kinds: [OpKind; 3]) -> Option<()> {
        let [of64, of32, of16] = kinds;
        insn.set_op_kind(
            i,
            match self.bits {
                64 => of64,
                32 => of32,
                _ => of16,
            },
        );
        Some(())
    }

    /// Registers that are an operand without being written in the instruction.
    fn implied(&mut self, insn: &Instruction, rng: &mut Rng) {
        use iced_x86::Mnemonic::*;
        let mut lead = |register: usize, rng: &mut Rng| {
            let place = self.place(8, self.bits, rng);
            self.settle(register, place);
        };
        match insn.mnemonic() {
            Leave | Enter => lead(RBP, rng),
            Maskmovq | Maskmovdqu | Vmaskmovdqu => lead(7, rng),
            Xlatb => lead(3, rng),
            _ if insn.is_string_instruction() => {
                lead(6, rng);
                lead(7, rng);
                let count = if rng.chance(90) { rng.below(40) as u64 } else { rng.bits() >> 30 };
                self.settle(1, count);
            }
            _ => {}
        }
    }

    // --- memory

    /// A linear address to be accessed, of `size` bytes, within reach of addresses of `bits`.
    fn place(&self, size: u64, bits: u32, rng: &mut Rng) -> u64 {
        let base = match bits {
            16 => DATA16,
            64 if rng.chance(30) => HIGH + DATA,
            _ if rng.chance(3) => return TOP + PAGE - size.min(64) - rng.below(8) as u64,
            _ => DATA,
        };
        let page = |i: u64| base + i * PAGE;
        // Where pages meet: so that some of the bytes are on each side.
        let across = |i: u64, rng: &mut Rng| page(i) - 1 - rng.below(size.max(2) as usize - 1) as u64;
        match rng.below(100) {
            0..6 => across(1, rng),
            6..9 => across(2, rng),
            9..12 => across(3, rng),
            12..14 => across(4, rng),
            14..16 => across(0, rng),
            16..18 => page(4) + rng.below(64) as u64,
            18..20 => rng.bits() >> if bits == 64 { rng.below(40) } else { 64 - bits as usize },
            _ => {
                let at = page(rng.pick(&[0, 0, 1, 1, 2, 3, 3])) + rng.below((PAGE - size.min(PAGE)) as usize) as u64;
                if rng.chance(60) { at & !(size.next_power_of_two() - 1) } else { at }
            }
        }
    }

    /// A MOV with an absolute address.
    fn memory_offset(&mut self, insn: &mut Instruction, i: u32, rng: &mut Rng) -> Option<()> {
        let other = if self.bits == 32 { 16 } else { 32 };
        let bits = if rng.chance(80) { self.bits } else { other };
        insn.set_op_kind(i, OpKind::Memory);
        let place = self.place(8, bits, rng);
        insn.set_memory_displacement64(place);
        insn.set_memory_displ_size(bits / 8);
        Some(())
    }

    fn memory(&mut self, insn: &mut Instruction, i: u32, rng: &mut Rng) -> Option<()> {
        insn.set_op_kind(i, OpKind::Memory);
        let size = memory_size(insn);
        let bits = match self.bits {
            64 if rng.chance(10) => 32,
            32 if rng.chance(8) => 16,
            16 if rng.chance(40) => 32,
            bits => bits,
        };
        let mut place = self.place(size, bits, rng);
        if rng.chance(10) {
            let (prefix, base) = rng.pick(&[(Register::FS, FS_BASE), (Register::GS, GS_BASE)]);
            insn.set_segment_prefix(prefix);
            place = place.wrapping_sub(base);
        } else if self.bits != 64 && rng.chance(6) {
            insn.set_segment_prefix(rng.pick(&[Register::ES, Register::SS, Register::CS]));
        }
        let offset = place & mask(bits);
        for _ in 0..12 {
            let before = self.start;
            if self.try_form(insn, offset, bits, rng).is_some() {
                return Some(());
            }
            self.start = before;
        }
        None
    }

    /// A vector of addresses off one base register, the elements of `index` apart.
    fn vsib(&mut self, insn: &mut Instruction, i: u32, index: Register, rng: &mut Rng) -> Option<()> {
        insn.set_op_kind(i, OpKind::Memory);
        let base = self.register(if self.bits == 64 { 16 } else { 8 }, rng);
        let near = rng.bits() as i8 as u64;
        let place = self.place(64, self.bits.max(32), rng).wrapping_sub(near);
        self.settle(base, place);
        insn.set_memory_base(if self.bits == 64 { GPR64[base] } else { Register::EAX + base as u32 });
        insn.set_memory_index(index);
        insn.set_memory_index_scale(1 << rng.below(4));
        displacement(insn, near, self.bits.max(32))
    }

    /// One addressing form, at random, that leads to `offset`.
    fn try_form(&mut self, insn: &mut Instruction, offset: u64, bits: u32, rng: &mut Rng) -> Option<()> {
        insn.set_memory_base(Register::None);
        insn.set_memory_index(Register::None);
        insn.set_memory_index_scale(1);
        if bits == 16 {
            return self.form16(insn, offset, rng);
        }
        let name = |r: usize| if bits == 64 { GPR64[r] } else { Register::EAX + r as u32 };
        let number = if self.bits == 64 { 16 } else { 8 };
        let form = rng.below(10);
        if form == 0 {
            return self.no_register(insn, offset, bits, rng);
        }
        let scale = rng.below(4);
        let index = (form >= 5).then(|| rng.below(number)).filter(|r| *r != RSP);
        let base = (form < 9).then(|| self.register(number, rng));
        let mut rest = offset;
        if let Some(index) = index.filter(|i| Some(*i) != base) {
            let value = self.value(index, rng)?;
            rest = rest.wrapping_sub(value << scale);
            insn.set_memory_index(name(index));
            insn.set_memory_index_scale(1 << scale);
        }
        if let Some(base) = base {
            let near = rest.wrapping_sub(any_displacement(rng));
            let value = self.value_or(base, near, rng)?;
            rest = rest.wrapping_sub(value);
            insn.set_memory_base(name(base));
        }
        displacement(insn, rest, bits)
    }

    /// A base register: rather one whose value is known.
    fn register(&self, number: usize, rng: &mut Rng) -> usize {
        let mut chosen = rng.below(number);
        for _ in 0..4 {
            if self.written[chosen] {
                chosen = rng.below(number);
            }
        }
        chosen
    }

    /// The value of `register`; settled at random if it is still free. `None` if nobody knows, but for a few cases.
    fn value(&mut self, register: usize, rng: &mut Rng) -> Option<u64> {
        let value = match rng.below(4) {
            0 => rng.bits(),
            1 => (rng.bits() as i64 >> rng.below(64)) as u64,
            _ => rng.below(256) as u64,
        };
        self.value_or(register, value, rng)
    }

    fn value_or(&mut self, register: usize, value: u64, rng: &mut Rng) -> Option<u64> {
        if self.written[register] {
            return rng.chance(10).then_some(value);
        }
        self.settle(register, value);
        self.start[register]
    }

    /// Absolute, or relative to RIP.
    fn no_register(&mut self, insn: &mut Instruction, offset: u64, bits: u32, rng: &mut Rng) -> Option<()> {
        if self.bits == 64 && rng.chance(60) {
            insn.set_memory_base(if bits == 64 { Register::RIP } else { Register::EIP });
            insn.set_memory_displ_size(bits / 8);
            insn.set_memory_displacement64(offset);
            return Some(());
        }
        insn.set_memory_displ_size(bits / 8);
        insn.set_memory_displacement64(offset);
        (bits != 64 || offset as i64 == i64::from(offset as i32)).then_some(())
    }

    /// The addressing forms of 16 bits (SDM vol. 2 table 2-1).
    fn form16(&mut self, insn: &mut Instruction, offset: u64, rng: &mut Rng) -> Option<()> {
        use Register::*;
        let none = (None, None);
        let (base, index) =
            rng.pick(&[(BX, SI), (BX, DI), (BP, SI), (BP, DI), (SI, None), (DI, None), (BP, None), (BX, None), none]);
        let mut rest = offset;
        for register in [base, index].into_iter().filter(|r| *r != None) {
            let value = self.value(register.full_register().number(), rng)?;
            rest = rest.wrapping_sub(value);
        }
        insn.set_memory_base(base);
        insn.set_memory_index(index);
        insn.set_memory_displ_size(2);
        insn.set_memory_displacement64(rest & 0xffff);
        Some(())
    }
}

/// Bytes of the memory operand; where that depends on the processor, enough.
fn memory_size(insn: &Instruction) -> u64 {
    match insn.memory_size() {
        MemorySize::Xsave | MemorySize::Xsave64 => 1024,
        size => (size.size() as u64).max(1),
    }
}

fn fixed_segment(kind: Kind) -> Register {
    match kind {
        Kind::es => Register::ES,
        Kind::cs => Register::CS,
        Kind::ss => Register::SS,
        Kind::ds => Register::DS,
        Kind::fs => Register::FS,
        _ => Register::GS,
    }
}

/// A far branch; where in its segment it goes is settled later.
fn far_branch(insn: &mut Instruction, i: u32, kind: Kind, bits: u32, rng: &mut Rng) -> Option<()> {
    let (selector, target) = destination(bits, rng);
    insn.set_op_kind(i, if kind == Kind::farbr2_2 { OpKind::FarBranch16 } else { OpKind::FarBranch32 });
    insn.set_far_branch_selector(selector);
    // Which of the two, until the program is aimed.
    insn.set_far_branch32(u32::from(target == Target::End));
    Some(())
}

const MASKS: [Register; 7] = {
    use Register::*;
    [K1, K2, K3, K4, K5, K6, K7]
};

fn is_memory(kind: Kind) -> bool {
    use Kind::*;
    matches!(
        kind,
        r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem | mm_or_mem | xmm_or_mem | ymm_or_mem | zmm_or_mem | k_or_mem
    )
}

fn only_memory(kind: Kind) -> bool {
    matches!(kind, Kind::mem | Kind::mem_offs)
}

fn mask(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}

/// What is left of an address, as a displacement.
fn displacement(insn: &mut Instruction, rest: u64, bits: u32) -> Option<()> {
    let signed = if bits == 64 { rest as i64 } else { i64::from(rest as i32) };
    if bits == 64 && signed != i64::from(signed as i32) {
        return None;
    }
    let size = match signed {
        0 => 0,
        -128..128 => 1,
        _ => bits / 8,
    };
    insn.set_memory_displ_size(size);
    insn.set_memory_displacement64(if bits == 64 { signed as u64 } else { u64::from(signed as u32) });
    Some(())
}

fn any_displacement(rng: &mut Rng) -> u64 {
    match rng.below(3) {
        0 => 0,
        1 => rng.bits() as i8 as u64,
        _ => rng.bits() as i32 as u64,
    }
}

/// A value for a register.
fn any_value(rng: &mut Rng) -> u64 {
    const CORNERS: [u64; 12] = [
        0,
        1,
        2,
        0x7f,
        0x80,
        0xff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x7fff_ffff_ffff_ffff,
        0x8000_0000_0000_0000,
        u64::MAX,
    ];
    match rng.below(4) {
        0 => rng.pick(&CORNERS),
        1 => rng.below(70) as u64,
        2 => (rng.bits() as i64 >> rng.below(64)) as u64,
        _ => rng.bits(),
    }
}

fn branch_kind(kind: Kind) -> OpKind {
    match kind {
        Kind::br16_1 | Kind::br16_2 => OpKind::NearBranch16,
        Kind::br32_1 | Kind::br32_4 => OpKind::NearBranch32,
        _ => OpKind::NearBranch64,
    }
}

/// INT with the vector that Linux answers.
fn calls_linux(insn: &Instruction, value: u64) -> bool {
    insn.mnemonic() == Mnemonic::Int && value as u8 == LINUX
}

fn immediate(insn: &mut Instruction, i: u32, kind: Kind, rng: &mut Rng) -> Option<()> {
    let value = any_value(rng);
    let second = (0..i).any(|n| insn.op_kind(n) == OpKind::Immediate8 || insn.op_kind(n) == OpKind::Immediate16);
    let op_kind = match kind {
        Kind::imm8 if second => OpKind::Immediate8_2nd,
        Kind::imm8 | Kind::imm8_const_1 => OpKind::Immediate8,
        Kind::imm8sex16 => OpKind::Immediate8to16,
        Kind::imm8sex32 => OpKind::Immediate8to32,
        Kind::imm8sex64 => OpKind::Immediate8to64,
        Kind::imm16 => OpKind::Immediate16,
        Kind::imm32 => OpKind::Immediate32,
        Kind::imm32sex64 => OpKind::Immediate32to64,
        Kind::imm64 => OpKind::Immediate64,
        _ => return None,
    };
    insn.set_op_kind(i, op_kind);
    match op_kind {
        OpKind::Immediate8_2nd => insn.set_immediate8_2nd(value as u8),
        OpKind::Immediate8 if kind == Kind::imm8_const_1 => insn.set_immediate8(1),
        OpKind::Immediate8 => insn.set_immediate8(if calls_linux(insn, value) { 0 } else { value as u8 }),
        OpKind::Immediate8to16 => insn.set_immediate8to16((value as i8).into()),
        OpKind::Immediate8to32 => insn.set_immediate8to32((value as i8).into()),
        OpKind::Immediate8to64 => insn.set_immediate8to64((value as i8).into()),
        OpKind::Immediate16 => insn.set_immediate16(value as u16),
        OpKind::Immediate32 => insn.set_immediate32(value as u32),
        OpKind::Immediate32to64 => insn.set_immediate32to64((value as i32).into()),
        _ => insn.set_immediate64(value),
    }
    Some(())
}
