//! Cases from seeds.

pub mod extended;
pub mod far;
pub mod forms;
pub mod hidden;
pub mod memory;
pub mod operands;
pub mod program;
pub mod reasons;

use std::sync::LazyLock;

use iced_x86::{Code, Instruction, OpKind, Register};
use purlin_arch::x86_64::regs::rflags;
use purlin_engine_translator::translate::classify::Class;

use crate::{
    case::Case,
    layout::{self, CODE, HIGH},
    rng::Rng,
    segments::{DATA32, STACK16},
};
use forms::{Form, GROUPS, forms};
use operands::Operands;
use program::{Item, Link, Placement, Program};

/// Makes cases.
pub struct Generator {
    forms64: Vec<Form>,
    forms32: Vec<Form>,
    forms16: Vec<Form>,
}

/// A case, and the program that its code was assembled from.
#[derive(Clone, Debug)]
pub struct Generated {
    /// The case.
    pub case: Case,
    /// Its code.
    pub program: Program,
}

/// A link to any item, to be chosen when all are there.
pub const ANY: usize = program::END - 1;

static AVX512: LazyLock<bool> = LazyLock::new(|| is_x86_feature_detected!("avx512f"));

/// Instructions in a program at most, but for what leads up to a branch.
const LENGTH: usize = 8;

impl Default for Generator {
    fn default() -> Self {
        Self::new(|_| true)
    }
}

impl Generator {
    /// Of the forms that `wanted` says.
    pub fn new(wanted: impl Fn(Code) -> bool) -> Self {
        let of = |bits| forms(bits).into_iter().filter(|f| wanted(f.code)).collect();
        Self { forms64: of(64), forms32: of(32), forms16: of(16) }
    }

    /// Whether it can make no case at all.
    pub fn is_empty(&self) -> bool {
        forms::SIZES.iter().all(|&bits| self.forms(bits).is_empty())
    }

    /// The forms that are used in code of `bits`.
    pub fn forms(&self, bits: u32) -> &[Form] {
        match bits {
            64 => &self.forms64,
            32 => &self.forms32,
            _ => &self.forms16,
        }
    }

    /// The size of a case's code: one that has forms.
    fn bits(&self, rng: &mut Rng) -> Option<u32> {
        let first = match rng.below(100) {
            0..60 => 64,
            60..84 => 32,
            _ => 16,
        };
        [first, 64, 32, 16].into_iter().find(|bits| !self.forms(*bits).is_empty())
    }

    /// The case of a seed. `None` for the few that come to nothing.
    pub fn generate(&self, seed: u64) -> Option<Generated> {
        let mut rng = Rng::new(seed);
        let bits = self.bits(&mut rng)?;
        let base = base(bits, &mut rng);
        let ss = stack_segment(bits, &mut rng);
        let stack_bits = if ss == STACK16 { 16 } else { bits.max(32) };
        let mut builder =
            Builder { bits, base, operands: Operands::new(bits, stack_bits, &mut rng), items: Vec::new() };
        let length = 1 + rng.below(LENGTH);
        let groups = [rng.pick(&GROUPS), rng.pick(&GROUPS), rng.pick(&GROUPS[..2])];
        for _ in 0..length {
            let group = rng.pick(&groups);
            let of_group: Vec<_> = self.forms(bits).iter().filter(|f| f.group == group).collect();
            let form = if of_group.is_empty() {
                *self.forms(bits).get(rng.below(self.forms(bits).len()))?
            } else {
                *rng.pick(&of_group)
            };
            builder.add(form, &mut rng);
        }
        builder.aim(&mut rng);
        let across = rng.chance(15).then(|| 1 + rng.below(20) as u64);
        let program = Program { bits, placement: Placement { base, across }, items: builder.items };
        let (entry, code) = program.assemble()?;
        let mut flags = rflags::FIXED | rflags::IF | rng.bits() & rflags::STATUS;
        if rng.chance(10) {
            flags |= rflags::DF;
        }
        if rng.chance(2) {
            flags |= rflags::AC;
        }
        if rng.chance(1) {
            flags |= rflags::TF;
        }
        let gpr = builder.operands.registers(&mut rng);
        let case = Case { bits, ss, entry, code, gpr, rflags: flags, vectors: rng.bits(), memory: rng.bits() };
        Some(Generated { case, program })
    }
}

/// Which copy of the code a case runs in: code of 16 bits in the one that it can reach.
fn base(bits: u32, rng: &mut Rng) -> u64 {
    match rng.below(100) {
        _ if bits == 16 => layout::CODE16,
        0..30 if bits == 64 => HIGH + CODE,
        30..36 => layout::CODE16,
        _ => CODE,
    }
}

/// Code of 16 bits rather has a stack of its size.
fn stack_segment(bits: u32, rng: &mut Rng) -> u16 {
    let percent = match bits {
        64 => 0,
        32 => 5,
        _ => 60,
    };
    if rng.chance(percent) { STACK16 } else { DATA32 }
}

/// A program that grows.
struct Builder {
    bits: u32,
    base: u64,
    operands: Operands,
    items: Vec<Item>,
}

impl Builder {
    fn add(&mut self, form: Form, rng: &mut Rng) {
        for _ in 0..20 {
            let before = self.items.len();
            let Some(insn) = self.operands.instruction(form.code, rng) else { continue };
            if rng.chance(70) {
                self.lead_up(form, &insn, rng);
            }
            self.push(insn, Link::None);
            hidden::throw_away(&insn).into_iter().for_each(|hides| self.push(hides, Link::Hides));
            let encodes = |item: &Item| program::encode(&program::near(&item.insn, self.base), self.bits, self.base);
            if self.items[before..].iter().all(|item| encodes(item).is_some()) {
                return;
            }
            self.items.truncate(before);
        }
    }

    fn push(&mut self, insn: Instruction, link: Link) {
        self.operands.executed(&insn);
        self.items.push(Item { insn, link });
    }

    /// What makes it likely that `insn` gets somewhere: a target for an indirect branch, a dividend that is small.
    fn lead_up(&mut self, form: Form, insn: &Instruction, rng: &mut Rng) {
        use Register::*;
        for (insn, link) in far::lead_up(insn, self.bits, rng).into_iter().chain(extended::lead_up(insn, rng)) {
            self.push(insn, link);
        }
        match form.class {
            Class::JumpIndirect | Class::CallIndirect => {
                let register = match insn.op0_kind() {
                    OpKind::Register => insn.op0_register(),
                    _ => self.scratch(rng),
                };
                if register.size() as u32 * 8 != self.bits {
                    return;
                }
                self.load_target(register);
                if insn.op0_kind() == OpKind::Memory {
                    let mut store = *insn;
                    store.set_code(self.of_size(Code::Mov_rm64_r64, Code::Mov_rm32_r32, Code::Mov_rm16_r16));
                    store.set_op1_kind(OpKind::Register);
                    store.set_op1_register(register);
                    self.push(store, Link::None);
                }
            }
            Class::Return => {
                let register = self.scratch(rng);
                self.load_target(register);
                let code = self.of_size(Code::Push_r64, Code::Push_r32, Code::Push_r16);
                if let Ok(push) = Instruction::with1(code, register) {
                    self.push(push, Link::None);
                }
            }
            _ if insn.is_vsib() => self.small_indices(insn, rng),
            _ if matches!(insn.mnemonic(), iced_x86::Mnemonic::Div | iced_x86::Mnemonic::Idiv) => {
                let clear = if rng.chance(50) {
                    Instruction::with2(Code::Xor_r32_rm32, EDX, EDX)
                } else {
                    Instruction::with2(Code::Movzx_r32_rm8, EAX, AL)
                };
                if let Ok(clear) = clear {
                    self.push(clear, Link::None);
                }
            }
            _ => {}
        }
    }

    /// Makes the elements of a vector of indices bytes.
    fn small_indices(&mut self, insn: &Instruction, rng: &mut Rng) {
        use Code::*;
        let index = insn.memory_index();
        let wide = insn.is_vsib64();
        let code = match (index.size(), wide, *AVX512) {
            (16, true, true) => EVEX_Vpmovzxbq_xmm_k1z_xmmm16,
            (16, false, true) => EVEX_Vpmovzxbd_xmm_k1z_xmmm32,
            (32, true, true) => EVEX_Vpmovzxbq_ymm_k1z_xmmm32,
            (32, false, true) => EVEX_Vpmovzxbd_ymm_k1z_xmmm64,
            (16, true, false) => VEX_Vpmovzxbq_xmm_xmmm16,
            (16, false, false) => VEX_Vpmovzxbd_xmm_xmmm32,
            (32, true, false) => VEX_Vpmovzxbq_ymm_xmmm32,
            (32, false, false) => VEX_Vpmovzxbd_ymm_xmmm64,
            (_, true, _) => EVEX_Vpmovzxbq_zmm_k1z_xmmm64,
            (_, false, _) => EVEX_Vpmovzxbd_zmm_k1z_xmmm128,
        };
        if let Ok(extend) = Instruction::with2(code, index, Register::XMM0 + rng.below(8) as u32) {
            self.push(extend, Link::None);
        }
    }

    fn load_target(&mut self, register: Register) {
        let load = match self.bits {
            64 => Instruction::with2(Code::Mov_r64_imm64, register, 0u64),
            32 => Instruction::with2(Code::Mov_r32_imm32, register, 0u32),
            _ => Instruction::with2(Code::Mov_r16_imm16, register, 0u32),
        };
        if let Ok(load) = load {
            // Aimed later: the items are not all there yet.
            self.push(load, Link::Immediate(ANY));
        }
    }

    /// A register as wide as the code.
    fn scratch(&self, rng: &mut Rng) -> Register {
        use Register::*;
        match self.bits {
            64 => rng.pick(&[RAX, RDX, R9, R11]),
            32 => rng.pick(&[EAX, EDX]),
            _ => rng.pick(&[AX, DX]),
        }
    }

    fn of_size(&self, of64: Code, of32: Code, of16: Code) -> Code {
        match self.bits {
            64 => of64,
            32 => of32,
            _ => of16,
        }
    }

    /// Gives branches their targets: any item, or the end.
    fn aim(&mut self, rng: &mut Rng) {
        let count = self.items.len();
        for i in 0..count {
            let forward = i + 1 + rng.below(count - i);
            let target = if rng.chance(85) { forward } else { rng.below(count + 1) };
            let item = &mut self.items[i];
            let kind = if item.insn.op_count() > 0 { item.insn.op0_kind() } else { OpKind::Register };
            match (kind, item.link) {
                (OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64, _) => {
                    item.link = Link::Branch(target);
                }
                (OpKind::FarBranch16 | OpKind::FarBranch32, _) => {
                    let to_end = item.insn.far_branch32() != 0;
                    item.link = Link::Branch(if to_end { program::END } else { target });
                }
                (_, Link::Immediate(ANY)) => item.link = Link::Immediate(target),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{forms::Group, *};

    #[test]
    fn a_seed_is_a_case() {
        let (one, other) = (Generator::default(), Generator::default());
        let cases = |g: &Generator| (0..50).map(|s| g.generate(s).map(|g| g.case)).collect::<Vec<_>>();
        assert_eq!(cases(&one), cases(&other));
        assert!(cases(&one).iter().flatten().count() > 40);
    }

    #[test]
    fn without_forms_there_is_nothing_to_run() {
        assert!(Generator::new(|_| false).is_empty());
        assert!(!Generator::default().is_empty());
    }

    #[test]
    fn both_modes_have_all_groups() {
        let generator = Generator::default();
        for bits in forms::SIZES {
            let here = |group: &&Group| **group != Group::Avx512 || is_x86_feature_detected!("avx512f");
            for group in GROUPS.iter().filter(here) {
                assert!(generator.forms(bits).iter().any(|f| f.group == *group), "{group:?} in code of {bits} bits");
            }
        }
    }
}
