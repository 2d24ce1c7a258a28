//! Code that changes any part of an instruction of its own: the next one, the loop that it is in, wherever pages meet.

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::regs::gpr::RBX;

use crate::{machine::*, smc_torture::random};

type Result = std::result::Result<(), IcedError>;

/// Code that changes itself as EBP (any number), R14D (its lowest bit), R8D (the EBP of the round before) and RBX
/// (numbers in memory, 0 to 15, of eight bytes each) say, and goes to the label if it was not executed so.
type Piece = fn(&mut CodeAssembler, CodeLabel) -> Result;

/// EAX = `even` or `odd`, as R14D says.
fn choose(a: &mut CodeAssembler, even: u32, odd: u32) -> Result {
    a.mov(eax, r14d)?;
    a.neg(eax)?;
    a.and(eax, (even ^ odd) as i32)?;
    a.xor(eax, even as i32)
}

fn expect(a: &mut CodeAssembler, wrong: CodeLabel, register: AsmRegister32, value: AsmRegister32) -> Result {
    a.cmp(register, value)?;
    a.jne(wrong)
}

const PIECES: [(&str, Piece); 12] = [
    ("the next instruction", |a, wrong| {
        let mut here = a.create_label();
        a.lea(rdi, ptr(here))?;
        a.mov(dword_ptr(rdi + 1), ebp)?;
        a.set_label(&mut here)?;
        a.mov(eax, 0)?;
        expect(a, wrong, eax, ebp)
    }),
    ("the next block", |a, wrong| {
        let (mut here, mut between) = (a.create_label(), a.create_label());
        a.lea(rdi, ptr(here))?;
        a.mov(dword_ptr(rdi + 1), ebp)?;
        a.jmp(between)?;
        a.ud2()?;
        a.set_label(&mut between)?;
        a.nop()?;
        a.set_label(&mut here)?;
        a.mov(eax, 0)?;
        expect(a, wrong, eax, ebp)
    }),
    ("an earlier instruction of the block", |a, wrong| {
        let mut here = a.create_label();
        a.nop()?;
        a.set_label(&mut here)?;
        a.mov(eax, 0)?;
        expect(a, wrong, eax, r8d)?;
        a.lea(rdi, ptr(here))?;
        a.mov(dword_ptr(rdi + 1), ebp)
    }),
    ("the opcode", |a, wrong| {
        let mut here = a.create_label();
        a.lea(rdi, ptr(here))?;
        choose(a, 0x01, 0x29)?;
        a.mov(byte_ptr(rdi), al)?;
        a.mov(eax, 100)?;
        a.mov(ecx, 7)?;
        a.set_label(&mut here)?;
        a.db(&[0x01, 0xc8])?; // add or sub eax, ecx
        a.mov(edx, eax)?;
        choose(a, 107, 93)?;
        expect(a, wrong, edx, eax)
    }),
    ("the condition of a jump", |a, wrong| {
        let mut here = a.create_label();
        a.lea(rdi, ptr(here))?;
        choose(a, 0x74, 0x75)?;
        a.mov(byte_ptr(rdi), al)?;
        a.mov(ecx, 1)?;
        a.cmp(r14d, r14d)?;
        a.set_label(&mut here)?;
        a.db(&[0x74, 5])?; // je or jne, over the next
        a.mov(ecx, 0)?;
        choose(a, 1, 0)?;
        expect(a, wrong, ecx, eax)
    }),
    ("where a jump leads", |a, wrong| {
        let mut here = a.create_label();
        a.lea(rdi, ptr(here))?;
        a.mov(ecx, ebp)?;
        a.shr(ecx, 3)?;
        a.and(ecx, 3)?;
        a.imul_3(edx, ecx, 7)?;
        a.mov(byte_ptr(rdi + 1), dl)?;
        a.set_label(&mut here)?;
        a.db(&[0xeb, 0])?;
        for i in 0..4 {
            a.db(&[0xb8, i, 0, 0, 0, 0xeb, 7 * (3 - i)])?; // mov eax, i; jmp behind all of these
        }
        expect(a, wrong, eax, ecx)
    }),
    ("where a call leads", |a, wrong| {
        let (mut here, mut functions, mut over) = (a.create_label(), a.create_label(), a.create_label());
        a.lea(rdi, ptr(here))?;
        choose(a, 0, 6)?;
        a.lea(rdx, ptr(functions))?;
        a.add(rdx, rax)?;
        a.sub(rdx, rdi)?;
        a.sub(rdx, 5)?;
        a.mov(dword_ptr(rdi + 1), edx)?;
        a.set_label(&mut here)?;
        a.db(&[0xe8, 0, 0, 0, 0])?;
        a.jmp(over)?;
        a.set_label(&mut functions)?;
        a.db(&[0xb8, 1, 0, 0, 0, 0xc3, 0xb8, 2, 0, 0, 0, 0xc3])?; // mov eax, 1 or 2; ret
        a.set_label(&mut over)?;
        a.mov(edx, eax)?;
        choose(a, 1, 2)?;
        expect(a, wrong, edx, eax)
    }),
    ("a jump or nothing", |a, wrong| {
        let mut here = a.create_label();
        a.lea(rdi, ptr(here))?;
        choose(a, 0x0f, 0xe9)?;
        a.mov(byte_ptr(rdi), al)?;
        choose(a, 0x0000_441f, 5)?;
        a.mov(dword_ptr(rdi + 1), eax)?;
        a.mov(ecx, 1)?;
        a.set_label(&mut here)?;
        a.db(&[0x0f, 0x1f, 0x44, 0, 0])?; // NOP of five bytes, or jmp over the next
        a.mov(ecx, 0)?;
        expect(a, wrong, ecx, r14d)
    }),
    ("the end of a function", |a, wrong| {
        let (mut here, mut function, mut over) = (a.create_label(), a.create_label(), a.create_label());
        a.lea(rdi, ptr(here))?;
        choose(a, 0x9066, 0xc0ff)?;
        a.mov(word_ptr(rdi), ax)?;
        a.call(function)?;
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.mov(eax, 10)?;
        a.set_label(&mut here)?;
        a.db(&[0x66, 0x90, 0xc3])?; // NOP of two bytes, or inc eax; ret
        a.set_label(&mut over)?;
        a.sub(eax, 10)?;
        expect(a, wrong, eax, r14d)
    }),
    ("a prefix", |a, wrong| {
        let mut here = a.create_label();
        a.lea(rdi, ptr(here))?;
        choose(a, 0x90, 0x48)?;
        a.mov(byte_ptr(rdi), al)?;
        a.mov(rcx, 0x1_0000_0005u64)?;
        a.set_label(&mut here)?;
        a.db(&[0x90, 0x89, 0xc8])?; // nop; mov eax, ecx, or mov rax, rcx
        a.shr(rax, 32)?;
        expect(a, wrong, eax, r14d)
    }),
    ("the displacement of an access among others", |a, wrong| {
        let mut here = a.create_label();
        a.lea(rdi, ptr(here))?;
        a.mov(ecx, ebp)?;
        a.shr(ecx, 5)?;
        a.and(ecx, 15)?;
        a.lea(edx, rcx * 8)?;
        a.mov(byte_ptr(rdi + 2), dl)?;
        a.mov(edx, dword_ptr(rbx + 8))?;
        a.set_label(&mut here)?;
        a.db(&[0x8b, 0x43, 0])?; // mov eax, [rbx + disp8]
        a.add(edx, dword_ptr(rbx + 16))?;
        expect(a, wrong, eax, ecx)?;
        a.cmp(edx, 3)?;
        a.jne(wrong)
    }),
    ("the loop that it is in", |a, wrong| {
        let mut here = a.create_label();
        a.lea(rdi, ptr(here))?;
        a.mov(byte_ptr(rdi + 2), 7)?;
        a.xor(eax, eax)?;
        a.mov(ecx, 3)?;
        a.set_label(&mut here)?;
        a.db(&[0x83, 0xc0, 0])?; // add eax, imm8
        a.mov(byte_ptr(rdi + 2), cl)?;
        a.dec(ecx)?;
        a.jnz(here)?;
        a.cmp(eax, 7 + 3 + 2)?;
        a.jne(wrong)
    }),
];

/// All pieces in a loop of R12 rounds. EAX is 0 in the end, or the piece that went wrong.
fn pieces(a: &mut CodeAssembler) -> Result {
    let (mut again, mut wrong) = (a.create_label(), a.create_label());
    a.nop()?;
    a.set_label(&mut again)?;
    random(a)?;
    a.mov(r14d, ebp)?;
    a.and(r14d, 1)?;
    for (i, (_, piece)) in PIECES.into_iter().enumerate() {
        a.mov(esi, i as u32)?;
        piece(a, wrong)?;
    }
    a.mov(r8d, ebp)?;
    a.dec(r12d)?;
    a.jnz(again)?;
    a.xor(eax, eax)?;
    done(a)?;
    a.set_label(&mut wrong)?;
    a.lea(eax, rsi + 1)?;
    done(a)
}

#[test]
fn any_part_of_an_instruction_wherever_pages_meet() {
    const ROUNDS: u64 = 60;
    let m = Machine::new(1);
    for i in 0..16 {
        m.poke(DATA + 8 * i, i);
    }
    let mut guest = m.vcpu(0, |_| {});
    let start = guest.state();
    let length = assemble(64, CODE, pieces).len() as u64;
    // A page begins somewhere in the code: seventeen bytes further each time.
    for before in (0..length).step_by(17) {
        let at = CODE + 0x1000 - before;
        m.code(at, pieces);
        let mut state = start.clone();
        state.regs.rip = at;
        (state.regs.gpr[RBX], state.regs.gpr[12], state.regs.gpr[13]) = (DATA, ROUNDS, before);
        guest.vcpu.restore(&state).unwrap();
        match guest.run() {
            Stop::Done(0) => {}
            Stop::Done(n) => panic!("{before} bytes before a page: {}", PIECES[n as usize - 1].0),
            other => panic!("{before} bytes before a page: {other:?}"),
        }
    }
}
