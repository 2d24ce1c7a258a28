//! How many host instructions common guest sequences become: a translation that gets slower shows here. The counts are
//! of the path that is taken when all accesses are found, from a block's entry to the jump that leaves it.

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, IcedError, code_asm::*};

use purlin_arch::x86_64::regs::cr4;

use crate::{
    cpu::Cpu,
    testing::{self, CODE, Mode},
};

type Guest = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// What is translated, with the guest's instructions and the host's.
const SEQUENCES: &[(&str, usize, usize, Guest)] = &[
    ("registers", 3, 3, |a| {
        a.add(rax, rbx)?;
        a.lea(rcx, qword_ptr(rax + rbx * 4 + 8))?;
        a.xor(edx, edx)
    }),
    ("registers in memory", 1, 3, |a| a.add(r10, rax)),
    ("one load", 1, 8, |a| a.mov(rax, qword_ptr(rdi))),
    ("one store, flags live", 3, 20, |a| {
        a.cmp(rax, rbx)?;
        a.mov(qword_ptr(rdi), rax)?;
        a.sete(cl)
    }),
    ("four fields of a structure", 4, 12, |a| {
        a.mov(rax, qword_ptr(rdi))?;
        a.mov(rbx, qword_ptr(rdi + 8))?;
        a.add(rax, qword_ptr(rdi + 16))?;
        a.mov(qword_ptr(rdi + 24), rax)
    }),
    ("a copy of 32 bytes", 4, 22, |a| {
        a.movups(xmm0, xmmword_ptr(rsi))?;
        a.movups(xmmword_ptr(rdi), xmm0)?;
        a.movups(xmm1, xmmword_ptr(rsi + 16))?;
        a.movups(xmmword_ptr(rdi + 16), xmm1)
    }),
    ("a function's beginning", 4, 12, |a| {
        a.push(rbp)?;
        a.push(rbx)?;
        a.sub(rsp, 24)?;
        a.mov(qword_ptr(rsp + 8), rdi)
    }),
    ("a function's end", 3, 11, |a| {
        a.add(rsp, 24)?;
        a.pop(rbx)?;
        a.pop(rbp)
    }),
    ("interrupts off and on", 3, 18, |a| {
        a.cli()?;
        a.sti()?;
        a.xor(eax, eax)
    }),
    ("the kernel's GS", 1, 4, |a| a.swapgs()),
    ("the time stamp", 1, 8, |a| a.rdtsc()),
    ("a selector", 1, 2, |a| a.mov(eax, ds)),
    ("memory cleared", 1, 25, |a| a.rep().stosq()),
];

/// Host instructions from the entry of the block at [`CODE`] to its end; no-ops, which are for alignment, left out.
fn translated(cpu: &mut Cpu) -> usize {
    cpu.shared.code.set_all_hot(true);
    let context = cpu.context(true, false);
    let entry = cpu.block(&context, CODE).expect("there is a block").entry;
    // SAFETY: emitted code is readable, and a block is followed by others' room or its own cold code.
    #[allow(unsafe_code)]
    let bytes = unsafe { std::slice::from_raw_parts(entry as *const u8, 4096) };
    let mut decoder = Decoder::with_ip(64, bytes, entry, DecoderOptions::NONE);
    let instructions = decoder.iter().take_while(|i| {
        assert_ne!(i.code(), Code::INVALID);
        !matches!(i.flow_control(), FlowControl::UnconditionalBranch | FlowControl::Call)
    });
    // The TEST behind the sequence.
    let end = 1;
    instructions.filter(|i| !matches!(i.code(), Code::Nop_rm32 | Code::Nop_rm16 | Code::Nopd | Code::Nopw)).count()
        - end
}

#[test]
fn sequences_become_this_many_instructions() {
    let mut found = Vec::new();
    for &(name, guest, host, code) in SEQUENCES {
        let mut assembler = CodeAssembler::new(64).unwrap();
        code(&mut assembler).unwrap();
        let count = assembler.instructions().len();
        // The flags do not matter behind the sequence, unless it says so.
        assembler.test(rax, rax).unwrap();
        assembler.hlt().unwrap();
        let mut cpu = testing::cpu(Mode::Long(0));
        cpu.cr4 |= cr4::OSFXSR;
        testing::poke(&cpu, CODE, assembler.assemble(CODE).unwrap().as_slice());
        found.push((name, guest == count, host, translated(&mut cpu)));
    }
    let differ: Vec<_> = found.iter().filter(|(_, same, host, now)| !same || host != now).collect();
    assert!(differ.is_empty(), "name, guest instructions as said, host instructions as said, and now: {differ:#?}");
}
