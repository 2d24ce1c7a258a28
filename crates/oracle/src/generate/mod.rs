//! Cases from seeds.

pub mod forms;
pub mod operands;
pub mod program;

use iced_x86::{Code, Instruction, OpKind, Register};
use purlin_arch::x86_64::regs::rflags;
use purlin_engine_translator::translate::classify::Class;

use crate::{case::Case, rng::Rng};
use forms::{Form, GROUPS, forms};
use operands::Operands;
use program::{Item, Link, Placement, Program};

/// Makes cases.
pub struct Generator {
    forms64: Vec<Form>,
    forms32: Vec<Form>,
}

/// A case, and the program that its code was assembled from.
#[derive(Clone, Debug)]
pub struct Generated {
    /// The case.
    pub case: Case,
    /// Its code.
    pub program: Program,
}

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
        Self { forms64: of(64), forms32: of(32) }
    }

    /// The forms that are used in code of `bits`.
    pub fn forms(&self, bits: u32) -> &[Form] {
        if bits == 64 { &self.forms64 } else { &self.forms32 }
    }

    /// The case of a seed. `None` for the few that come to nothing.
    pub fn generate(&self, seed: u64) -> Option<Generated> {
        let mut rng = Rng::new(seed);
        let bits = if self.forms32.is_empty() || !self.forms64.is_empty() && rng.chance(70) { 64 } else { 32 };
        let high = bits == 64 && rng.chance(30);
        let mut builder = Builder { bits, high, operands: Operands::new(bits, &mut rng), items: Vec::new() };
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
        let program = Program { bits, placement: Placement { high, across }, items: builder.items };
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
        let case = Case { bits, entry, code, gpr, rflags: flags, vectors: rng.bits(), memory: rng.bits() };
        Some(Generated { case, program })
    }
}

/// A program that grows.
struct Builder {
    bits: u32,
    high: bool,
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
            if self.items[before..].iter().all(|i| {
                program::encode(&i.insn, self.bits, 0x2000_0000 | if self.high { crate::layout::HIGH } else { 0 })
                    .is_some()
            }) {
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
        let wide = self.bits == 64;
        match form.class {
            Class::JumpIndirect | Class::CallIndirect => {
                let register = match insn.op0_kind() {
                    OpKind::Register => insn.op0_register(),
                    _ if wide => rng.pick(&[RAX, RDX, R9, R11]),
                    _ => rng.pick(&[EAX, EDX]),
                };
                if !(register.is_gpr64() && wide || register.is_gpr32() && !wide) {
                    return;
                }
                self.load_target(register);
                if insn.op0_kind() == OpKind::Memory {
                    let code = if wide { Code::Mov_rm64_r64 } else { Code::Mov_rm32_r32 };
                    let mut store = *insn;
                    store.set_code(code);
                    store.set_op1_kind(OpKind::Register);
                    store.set_op1_register(register);
                    self.push(store, Link::None);
                }
            }
            Class::Return => {
                let register = if wide { rng.pick(&[RAX, R10, R15]) } else { ECX };
                self.load_target(register);
                let code = if wide { Code::Push_r64 } else { Code::Push_r32 };
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
        let code = match index.size() {
            16 => {
                if wide {
                    EVEX_Vpmovzxbq_xmm_k1z_xmmm16
                } else {
                    EVEX_Vpmovzxbd_xmm_k1z_xmmm32
                }
            }
            32 => {
                if wide {
                    EVEX_Vpmovzxbq_ymm_k1z_xmmm32
                } else {
                    EVEX_Vpmovzxbd_ymm_k1z_xmmm64
                }
            }
            _ => {
                if wide {
                    EVEX_Vpmovzxbq_zmm_k1z_xmmm64
                } else {
                    EVEX_Vpmovzxbd_zmm_k1z_xmmm128
                }
            }
        };
        if let Ok(extend) = Instruction::with2(code, index, Register::XMM0 + rng.below(8) as u32) {
            self.push(extend, Link::None);
        }
    }

    fn load_target(&mut self, register: Register) {
        let code = if self.bits == 64 { Code::Mov_r64_imm64 } else { Code::Mov_r32_imm32 };
        let load = if self.bits == 64 {
            Instruction::with2(code, register, 0u64)
        } else {
            Instruction::with2(code, register, 0u32)
        };
        if let Ok(load) = load {
            // Aimed later: the items are not all there yet.
            self.push(load, Link::Immediate(usize::MAX));
        }
    }

    /// Gives branches their targets: any item, or the end.
    fn aim(&mut self, rng: &mut Rng) {
        let count = self.items.len();
        for i in 0..count {
            let forward = i + 1 + rng.below(count - i);
            let target = if rng.chance(85) { forward } else { rng.below(count + 1) };
            let item = &mut self.items[i];
            let branch =
                matches!(item.insn.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
                    && item.insn.op_count() > 0;
            if branch {
                item.link = Link::Branch(target);
            } else if item.link == Link::Immediate(usize::MAX) {
                item.link = Link::Immediate(target);
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
    fn both_modes_have_all_groups() {
        let generator = Generator::default();
        for bits in [32, 64] {
            let here = |group: &&Group| **group != Group::Avx512 || is_x86_feature_detected!("avx512f");
            for group in GROUPS.iter().filter(here) {
                assert!(generator.forms(bits).iter().any(|f| f.group == *group), "{group:?} in code of {bits} bits");
            }
        }
    }
}
