//! The fixed pieces of emitted code: how it is entered and left, and how it calls Rust.

use super::{
    asm::{Asm, Mem, cc, reg},
    desc::{AccessDesc, RefillDesc},
    emit::{look_up, look_up_jump},
    jumps::TABLES,
    layout::{ExitKind, at, gpr, pinned_pairs, second_level, stack_page, tlb},
};
use crate::tlb::{ENTRY_BITS, Entry, Privilege, SECOND_ENTRIES, SECOND_SHIFT, StackPage};

/// Addresses of the stubs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stubs {
    /// `extern "C" fn(entry)`: loads the guest's registers and jumps to `entry`, with RIP in R11 and the flags in `flag_word`.
    pub enter: u64,
    /// What all exits end with.
    pub exit: u64,
    /// Jumped to with the target RIP in R11, flags live.
    pub miss: u64,
    /// The same with the flags in `flag_word`.
    pub miss_saved: u64,
    /// Called in front of a `LinkDesc`, flags live; does not return.
    pub link: u64,
    /// The same with the flags in `flag_word`.
    pub link_saved: u64,
    /// Jumped to with a RIP in R11 that no table has, flags in `flag_word`; goes there if it is translated.
    pub find: u64,
    /// Called in front of an `AcrossDesc`, with the flags in `flag_word`; does not return.
    pub across: u64,
    /// By jump table: jumped to with a RIP in R11, flags in `flag_word`; goes where the table says.
    pub by_table: [u64; TABLES],
    /// By jump table: what returns lead to when they have run out, with the stack's pointer a word too high; the same.
    pub sentinels: [u64; TABLES],
    /// By jump table: what return sites of movable code that is dead lead to.
    pub dead_sites: [u64; TABLES],
    /// Called in front of a packed `ExitDesc`, flags live; does not return.
    pub emulate: u64,
    /// The same with the flags in `flag_word`.
    pub emulate_saved: u64,
    /// Called in front of a packed `ExitDesc`, with the flags in `flag_word`; R10 says which transfer it is (see
    /// `transfers.rs`). Goes where that leads; does not return.
    pub transfer: u64,
    /// Called with the linear address of a save area in R10, and in R11 which instruction it is (see `extended.rs`), with the
    /// flags in `flag_word`. Returns with R10 = 0 if it is to be emulated. Keeps all other registers.
    pub extended: u64,
    /// Called with a linear address in R10 and an `AccessDesc` in R11; returns the host address in R10. Keeps all
    /// other registers, not the flags. Does not return if the access faults.
    pub access: u64,
    /// By privilege, and whether it is for a store: called in front of a jump and a `RefillDesc`, with R10 and R11 as a
    /// look-up in the TLB leaves them that was in vain. Returns with R10 = 0 and R11 the host address. Keeps all other
    /// registers, not the flags. Otherwise it does not return.
    pub refill: [[u64; 2]; PRIVILEGES],
    /// What they have in common.
    pub refill_body: u64,
    /// Likewise, with a linear address in R11 that is not on the page of the stack, or not all of the access: that page is
    /// the one from then on, if the TLB has it.
    pub stack: [[u64; 2]; PRIVILEGES],
    /// Called from an entry of a dead block, flags live; does not return.
    pub dead: u64,
    /// The same with the flags in `flag_word`.
    pub dead_saved: u64,
    /// Called after the store of a slow access, `AccessDesc` in R11; keeps all registers and the flags but R10.
    pub commit: u64,
    /// Where the signal handler sends the thread.
    pub signal: u64,
}

impl Stubs {
    /// Where each piece begins, and its name; by address.
    pub fn names(&self) -> Vec<(u64, &'static str)> {
        let mut names = vec![
            (self.enter, "enter"),
            (self.exit, "exit"),
            (self.miss, "miss"),
            (self.miss_saved, "miss"),
            (self.link, "link"),
            (self.link_saved, "link"),
            (self.emulate, "emulate"),
            (self.emulate_saved, "emulate"),
            (self.transfer, "emulate"),
            (self.extended, "emulate"),
            (self.dead, "dead"),
            (self.dead_saved, "dead"),
            (self.across, "link"),
            (self.find, "find"),
            (self.sentinels[0], "jump"),
            (self.signal, "signal"),
            (self.access, "access"),
            (self.refill_body, "refill"),
            (self.commit, "commit"),
        ];
        names.extend(self.stack.iter().flatten().map(|&stack| (stack, "refill")));
        names.extend(self.refill.iter().flatten().map(|&refill| (refill, "refill")));
        names.sort_unstable();
        names
    }
}

/// `lea rsp, [rsp + 8]`, in five bytes, which can be patched.
pub const LEAVE_WORD: &[u8] = &[0x48, 0x8d, 0x64, 0x24, 8];

const PRIVILEGES: usize = 3;

/// Registers that a Rust function may change, but for the scratch registers.
const CALLER_SAVED: [u8; 7] = [reg::RAX, reg::RCX, reg::RDX, reg::RSI, reg::RDI, reg::R8, reg::R9];
/// Registers that `enter` must keep for its caller.
const CALLEE_SAVED: [u8; 6] = [reg::RBX, reg::RBP, reg::R12, reg::R13, reg::R14, reg::R15];

/// Assembles the stubs at the start of the code cache.
pub fn assemble(asm: &mut Asm) -> Stubs {
    let mut stubs = Stubs { enter: asm.here(), ..Stubs::default() };
    enter(asm);

    // Exits: `late` has the flags in `late_flag_word`'s or `flag_word`'s place already.
    asm.align(16, 0);
    let live_tail = asm.here();
    stubs.exit = live_tail;
    asm.store(gpr(reg::RAX), reg::RAX);
    asm.flags_to_ax();
    asm.store_sized(at::FLAG_WORD, reg::RAX, 4);
    asm.load(reg::RAX, gpr(reg::RAX));
    let saved_tail = asm.here();
    exit(asm);

    let exit_stub = |asm: &mut Asm, kind: ExitKind, tail: u64| {
        asm.align(16, 0);
        let address = asm.here();
        asm.store_imm(at::EXIT_KIND, kind as i32, 4);
        asm.jmp_to(tail);
        address
    };
    stubs.miss = exit_stub(asm, ExitKind::Miss, live_tail);
    stubs.miss_saved = exit_stub(asm, ExitKind::Miss, saved_tail);
    // Those that are called: what the return address points at is their value.
    let call_stub = |asm: &mut Asm, kind: ExitKind, tail: u64| {
        asm.align(16, 0);
        let address = asm.here();
        asm.pop(reg::R11);
        asm.store_imm(at::EXIT_KIND, kind as i32, 4);
        asm.jmp_to(tail);
        address
    };
    stubs.link = call_stub(asm, ExitKind::Link, live_tail);
    stubs.link_saved = call_stub(asm, ExitKind::Link, saved_tail);
    stubs.across = call_stub(asm, ExitKind::Across, saved_tail);
    stubs.emulate = call_stub(asm, ExitKind::Emulate, live_tail);
    stubs.emulate_saved = call_stub(asm, ExitKind::Emulate, saved_tail);
    stubs.dead = call_stub(asm, ExitKind::Dead, live_tail);
    stubs.dead_saved = call_stub(asm, ExitKind::Dead, saved_tail);

    asm.align(16, 0);
    stubs.find = asm.here();
    find(asm, stubs.miss_saved);
    for table in 0..TABLES {
        asm.align(16, 0);
        stubs.sentinels[table] = asm.here();
        asm.lea(reg::RSP, Mem::at(reg::RSP, -8));
        stubs.by_table[table] = asm.here();
        by_table(asm, table, stubs.find);
        asm.align(16, 0);
        stubs.dead_sites[table] = asm.here();
        asm.bytes(LEAVE_WORD);
        asm.jmp_to(stubs.by_table[table]);
    }

    asm.align(16, 0);
    stubs.signal = asm.here();
    asm.store(at::TEMP, reg::RAX);
    asm.flags_to_ax();
    asm.store_sized(at::LATE_FLAG_WORD, reg::RAX, 4);
    asm.load(reg::RAX, at::TEMP);
    asm.store_imm(at::EXIT_KIND, ExitKind::Signal as i32, 4);
    asm.jmp_to(saved_tail);

    asm.align(16, 0);
    stubs.transfer = asm.here();
    transfer(asm, saved_tail);

    asm.align(16, 0);
    stubs.extended = asm.here();
    extended(asm);

    asm.align(16, 0);
    stubs.access = asm.here();
    access(asm);
    asm.align(16, 0);
    stubs.refill_body = asm.here();
    let refills = [false, true].map(|write| refill(asm, write, saved_tail));
    for privilege in [Privilege::User, Privilege::Supervisor, Privilege::SupervisorAc] {
        for (write, body) in refills.into_iter().enumerate() {
            let tag = tlb(privilege, write == 1, std::mem::offset_of!(Entry, tag));
            asm.align(16, 0);
            stubs.refill[privilege as usize][write] = asm.here();
            asm.add_mem(reg::R10, Mem::gs_at(reg::R11, tag));
            let unknown = asm.here();
            second_look_up(asm, privilege, write == 1, body);
            asm.align(16, 0);
            stubs.stack[privilege as usize][write] = asm.here();
            turn_to_stack(asm, privilege, unknown);
        }
    }
    asm.align(16, 0);
    stubs.commit = asm.here();
    commit(asm);
    stubs
}

/// Jumps to the block for the RIP in R11, if the table has it. The poll is for the jump itself: R11 says where the guest is.
fn by_table(asm: &mut Asm, table: usize, miss: u64) {
    asm.load(reg::R10, at::POLL);
    asm.load8(reg::R10, Mem::at(reg::R10, 0));
    let host = look_up_jump(asm, table);
    asm.jcc_to(cc::NE, miss);
    asm.jmp_mem(host);
}

fn enter(asm: &mut Asm) {
    for r in CALLEE_SAVED {
        asm.push(r);
    }
    // Seven words are on the stack with the return address: one more makes RSP a multiple of 16, as calls want it.
    asm.lea(reg::RSP, Mem::at(reg::RSP, -8));
    asm.store(at::HOST_RSP, reg::RSP);
    asm.store(at::ENTRY, reg::RDI);
    restore_vectors(asm);
    for (guest, host) in pinned_pairs() {
        asm.load(host, gpr(guest));
    }
    asm.load(reg::RSP, at::RETURNS);
    asm.load(reg::R11, at::RIP);
    asm.jmp_mem(at::ENTRY);
}

/// `find(block, rip) -> host address, or 0`, for the RIP in R11, with the flags in `flag_word`.
fn find(asm: &mut Asm, miss: u64) {
    for r in CALLER_SAVED {
        asm.store(gpr(r), r);
    }
    to_host_stack(asm);
    asm.push(reg::R11);
    asm.push(reg::R11);
    call_lean(asm, at::HELPER_FIND, reg::R10, |asm| asm.mov_rr(reg::RSI, reg::R11));
    asm.pop(reg::R11);
    to_returns(asm);
    for r in CALLER_SAVED {
        asm.load(r, gpr(r));
    }
    asm.test_rr(reg::R10);
    asm.jcc_to(cc::E, miss);
    asm.jmp_reg(reg::R10);
}

/// `transfer(block, R10, desc) -> host address, or 0`: if the latter the instruction is emulated.
fn transfer(asm: &mut Asm, exit: u64) {
    asm.pop(reg::R11);
    for (guest, host) in changed_by_transfers() {
        asm.store(gpr(guest), host);
    }
    to_host_stack(asm);
    asm.push(reg::R11);
    asm.push(reg::R11);
    call_lean(asm, at::HELPER_TRANSFER, reg::R10, |asm| {
        asm.mov_rr(reg::RSI, reg::R10);
        asm.mov_rr(reg::RDX, reg::R11);
    });
    asm.pop(reg::R11);
    to_returns(asm);
    asm.test_rr(reg::R10);
    let (emulate, ready) = (asm.label(), asm.label());
    asm.jcc(cc::E, emulate);
    asm.cmp8_mem(at::LOAD_VECTORS, 0);
    asm.jcc(cc::E, ready);
    asm.store_imm(at::VECTORS, 1, 4);
    restore_vectors(asm);
    asm.bind(ready);
    for (guest, host) in changed_by_transfers() {
        asm.load(host, gpr(guest));
    }
    asm.load(reg::R11, at::RIP);
    asm.jmp_reg(reg::R10);

    asm.bind(emulate);
    for (guest, host) in changed_by_transfers() {
        asm.load(host, gpr(guest));
    }
    asm.store_imm(at::EXIT_KIND, ExitKind::Emulate as i32, 4);
    asm.jmp_to(exit);
}

/// `extended_state(block, R10, R11) -> nonzero if it is done`, which says by `vectors` whether they are to be loaded.
fn extended(asm: &mut Asm) {
    for r in CALLER_SAVED {
        asm.store(gpr(r), r);
    }
    save_vectors(asm);
    to_host_stack(asm);
    asm.load(reg::RDI, at::BLOCK);
    asm.mov_rr(reg::RSI, reg::R10);
    asm.mov_rr(reg::RDX, reg::R11);
    asm.call_mem(at::HELPER_EXTENDED);
    asm.mov_rr(reg::R10, reg::RAX);
    to_returns(asm);
    restore_vectors(asm);
    for r in CALLER_SAVED {
        asm.load(r, gpr(r));
    }
    asm.ret();
}

/// `fault(block, refill, rip) -> host address, or 0`, for the page fault that a helper has found, in a stub that emitted code has
/// called. R11 points at so many bytes before a `RefillDesc`, or at an `AccessDesc`. Goes on behind this, with nothing
/// changed but R10, R11 and flags, if it has to be delivered otherwise.
fn fault(asm: &mut Asm, refill: Option<i32>) {
    let undone = asm.label();
    // Without the return to the code that has called.
    asm.lea(reg::R10, Mem::at(reg::RSP, 8));
    asm.store(at::RETURNS, reg::R10);
    for (guest, host) in changed_by_transfers() {
        asm.store(gpr(guest), host);
    }
    // (Two words there may be the caller's.)
    asm.load(reg::RSP, at::HOST_RSP);
    asm.lea(reg::RSP, Mem::at(reg::RSP, -16));
    call_lean(asm, at::HELPER_FAULT, reg::R10, |asm| match refill {
        Some(distance) => asm.lea(reg::RSI, Mem::at(reg::R11, distance)),
        None => {
            asm.mov_ri(reg::RSI, 0);
            asm.load(reg::RDX, Mem::at(reg::R11, std::mem::offset_of!(AccessDesc, rip) as i32));
        }
    });
    to_returns(asm);
    for (guest, host) in changed_by_transfers() {
        asm.load(host, gpr(guest));
    }
    asm.test_rr(reg::R10);
    asm.jcc(cc::E, undone);
    asm.load(reg::R11, at::RIP);
    asm.jmp_reg(reg::R10);

    asm.bind(undone);
    asm.lea(reg::RSP, Mem::at(reg::RSP, -8));
    asm.store(at::RETURNS, reg::RSP);
}

/// Guest registers that a Rust function, or the transfer itself, may change, with the host's.
fn changed_by_transfers() -> impl Iterator<Item = (u8, u8)> {
    pinned_pairs().filter(|(guest, host)| *guest == reg::RSP || CALLER_SAVED.contains(host))
}

/// From the stack of returns to the host's, for Rust code.
fn to_host_stack(asm: &mut Asm) {
    asm.store(at::RETURNS, reg::RSP);
    asm.load(reg::RSP, at::HOST_RSP);
}

/// And back.
fn to_returns(asm: &mut Asm) {
    asm.load(reg::RSP, at::RETURNS);
}

/// Leaves: R11 is the exit value, flags have been saved, all pinned registers hold guest values.
fn exit(asm: &mut Asm) {
    asm.store(at::RETURNS, reg::RSP);
    for (guest, host) in pinned_pairs() {
        asm.store(gpr(guest), host);
    }
    asm.store(at::EXIT_VALUE, reg::R11);
    leave(asm);
}

/// Leaves with the guest's registers saved already.
fn leave(asm: &mut Asm) {
    save_vectors(asm);
    asm.load(reg::RSP, at::HOST_RSP);
    asm.lea(reg::RSP, Mem::at(reg::RSP, 8));
    for r in CALLEE_SAVED.into_iter().rev() {
        asm.pop(r);
    }
    asm.ret();
}

/// XSAVE if the vector registers are the guest's. Changes RAX, RDX and flags.
fn save_vectors(asm: &mut Asm) {
    let done = asm.label();
    asm.cmp8_mem(at::VECTORS, 0);
    asm.jcc(cc::E, done);
    asm.load_sized(reg::RAX, at::XSAVE_MASK, 4);
    asm.load_sized(reg::RDX, at::XSAVE_MASK_HIGH, 4);
    asm.xsave(&[0x0f, 0xae], 4, at::XSTATE.disp);
    asm.ldmxcsr(at::HOST_MXCSR.disp);
    asm.bind(done);
}

/// XRSTOR if the vector registers are the guest's. Changes RAX, RDX and flags.
fn restore_vectors(asm: &mut Asm) {
    let done = asm.label();
    asm.cmp8_mem(at::VECTORS, 0);
    asm.jcc(cc::E, done);
    asm.load_sized(reg::RAX, at::XSAVE_MASK, 4);
    asm.load_sized(reg::RDX, at::XSAVE_MASK_HIGH, 4);
    asm.xsave(&[0x0f, 0xae], 5, at::XSTATE.disp);
    asm.bind(done);
}

/// `access(block, linear, desc) -> host address, or 0 for a fault`; the quick one first, which says 0 if it is not the
/// one to ask.
fn access(asm: &mut Asm) {
    for r in CALLER_SAVED {
        asm.store(gpr(r), r);
    }
    to_host_stack(asm);
    asm.push(reg::R10);
    asm.push(reg::R11);
    call_lean(asm, at::HELPER_QUICK, reg::R10, |asm| {
        asm.mov_rr(reg::RSI, reg::R10);
        asm.mov_rr(reg::RDX, reg::R11);
    });
    asm.test_rr(reg::R10);
    let (nothing, slow, done) = (asm.label(), asm.label(), asm.label());
    asm.jcc(cc::E, nothing);
    asm.bind(done);
    to_returns(asm);
    for r in CALLER_SAVED {
        asm.load(r, gpr(r));
    }
    asm.ret();

    asm.bind(nothing);
    asm.cmp8_mem(at::FAULTED, 0);
    asm.jcc(cc::E, slow);
    asm.load(reg::R11, Mem::at(reg::RSP, 0));
    to_returns(asm);
    for r in CALLER_SAVED {
        asm.load(r, gpr(r));
    }
    fault(asm, None);
    asm.load(reg::RSP, at::HOST_RSP);
    asm.lea(reg::RSP, Mem::at(reg::RSP, -16));

    asm.bind(slow);
    save_vectors(asm);
    asm.load(reg::R11, Mem::at(reg::RSP, 0));
    asm.load(reg::RSI, Mem::at(reg::RSP, 8));
    asm.load(reg::RDI, at::BLOCK);
    asm.mov_rr(reg::RDX, reg::R11);
    asm.call_mem(at::HELPER_ACCESS);
    asm.load(reg::R11, Mem::at(reg::RSP, 0));
    asm.mov_rr(reg::R10, reg::RAX);
    asm.test_rr(reg::R10);
    let fault = asm.label();
    asm.jcc(cc::E, fault);
    restore_vectors(asm);
    asm.jmp(done);

    asm.bind(fault);
    asm.store_imm(at::EXIT_KIND, ExitKind::Fault as i32, 4);
    leave_from_helper(asm);
}

/// The length of the jump between a call of a refill and its descriptor.
const JUMP: i32 = 5;

/// What refills of loads, or of those that store, have in common.
#[derive(Clone, Copy)]
struct Refill {
    /// For the linear address in R10, of an access that lies on one page.
    start: u64,
    /// Where there is more to it.
    apart: u64,
}

/// Goes on with the access to the linear address in R10 where the second level of the TLB says, or else by way of a refill.
fn second_look_up(asm: &mut Asm, privilege: Privilege, write: bool, Refill { start, apart }: Refill) {
    let host = tlb(privilege, write, std::mem::offset_of!(Entry, host));
    // Whether it lies on one page.
    asm.store(gpr(reg::RAX), reg::RAX);
    asm.load(reg::R11, Mem::at(reg::RSP, 0));
    asm.load16(reg::RAX, Mem::at(reg::R11, JUMP));
    asm.and32(reg::RAX, u32::from(RefillDesc::SIZE));
    asm.mov_rr32(reg::R11, reg::R10);
    asm.and32(reg::R11, 0xfff);
    asm.lea32(reg::RAX, Mem::sum(reg::RAX, reg::R11));
    asm.cmp32_ri(reg::RAX, 0x1000);
    asm.load(reg::RAX, gpr(reg::RAX));
    asm.jcc_to(cc::A, apart);

    second_entry(asm, privilege, write);
    asm.jcc_to(cc::A, start);
    asm.load(reg::R11, Mem::gs_at(reg::R11, host));
    asm.mov_rr(reg::RAX, reg::R10);
    asm.and32(reg::RAX, 0xfff);
    asm.lea(reg::R11, Mem::sum(reg::R11, reg::RAX));
    asm.load(reg::RAX, gpr(reg::RAX));
    asm.mov_ri(reg::R10, 0);
    asm.ret();
}

/// Looks the linear address in R10 up in the second level of the TLB: it is found if the flags then say "not above". R11
/// leads to the entry as one of the first level does.
fn second_entry(asm: &mut Asm, privilege: Privilege, write: bool) {
    let tag = tlb(privilege, write, std::mem::offset_of!(Entry, tag));
    asm.mov_rr(reg::R11, reg::R10);
    asm.shr(reg::R11, SECOND_SHIFT as u8);
    asm.store(at::STACK_ADDRESS, reg::R10);
    asm.shr(reg::R10, 12);
    asm.lea(reg::R11, Mem::sum(reg::R11, reg::R10));
    asm.and32(reg::R11, SECOND_ENTRIES as u32 - 1);
    asm.shl(reg::R11, ENTRY_BITS as u8);
    asm.lea(reg::R11, Mem::at(reg::R11, second_level(privilege, write)));
    asm.load(reg::R10, at::STACK_ADDRESS);
    asm.sub_mem(reg::R10, Mem::gs_at(reg::R11, tag));
    asm.cmp_ri(reg::R10, 0xfff);
    asm.load(reg::R10, at::STACK_ADDRESS);
}

/// The page of the stack is that of the linear address in R11 from now on, if it may be stored to.
fn turn_to_stack(asm: &mut Asm, privilege: Privilege, refill: u64) {
    let [tag, distance] = [std::mem::offset_of!(StackPage, tag), std::mem::offset_of!(StackPage, distance)]
        .map(|field| stack_page(privilege, field));
    let [entry_tag, entry_host] = [std::mem::offset_of!(Entry, tag), std::mem::offset_of!(Entry, host)]
        .map(|field| Mem::gs_at(reg::R11, tlb(privilege, true, field)));
    let (unknown, first) = (asm.label(), asm.label());
    asm.store(at::STACK_ADDRESS, reg::R11);
    asm.mov_rr(reg::R10, reg::R11);
    look_up(asm, privilege, true, 1);
    asm.jcc(cc::BE, first);
    asm.load(reg::R10, at::STACK_ADDRESS);
    second_entry(asm, privilege, true);
    asm.jcc(cc::A, unknown);
    asm.bind(first);
    asm.load(reg::R10, entry_tag);
    asm.store(tag, reg::R10);
    asm.load(reg::R11, entry_host);
    asm.sub_rr(reg::R11, reg::R10);
    asm.store(distance, reg::R11);

    // Whether it lies on one page.
    asm.load(reg::R11, Mem::at(reg::RSP, 0));
    asm.load16(reg::R10, Mem::at(reg::R11, JUMP));
    asm.and32(reg::R10, u32::from(RefillDesc::SIZE));
    asm.load_sized(reg::R11, at::STACK_ADDRESS, 4);
    asm.and32(reg::R11, 0xfff);
    asm.lea32(reg::R10, Mem::sum(reg::R10, reg::R11));
    asm.cmp32_ri(reg::R10, 0x1000);
    asm.jcc(cc::A, unknown);
    asm.load(reg::R11, at::STACK_ADDRESS);
    asm.add_mem(reg::R11, distance);
    asm.ret();

    asm.bind(unknown);
    asm.load(reg::R10, at::STACK_ADDRESS);
    asm.jmp_to(refill);
}

/// `refill(block, linear, desc, write) -> host address, or 0`, for the linear address in R10.
fn refill(asm: &mut Asm, write: bool, exit: u64) -> Refill {
    asm.align(16, 0);
    let (start, more) = (asm.here(), asm.label());
    for r in CALLER_SAVED {
        asm.store(gpr(r), r);
    }
    asm.load(reg::RDX, Mem::at(reg::RSP, 0));
    to_host_stack(asm);
    call_lean(asm, at::HELPER_REFILL, reg::R11, |asm| {
        asm.mov_rr(reg::RSI, reg::R10);
        asm.lea(reg::RDX, Mem::at(reg::RDX, JUMP));
        asm.mov_ri(reg::RCX, u64::from(write));
    });
    to_returns(asm);
    for r in CALLER_SAVED {
        asm.load(r, gpr(r));
    }
    let nowhere = asm.label();
    asm.test_rr(reg::R11);
    asm.jcc(cc::E, nowhere);
    asm.mov_ri(reg::R10, 0);
    asm.ret();

    asm.bind(nowhere);
    asm.cmp8_mem(at::FAULTED, 0);
    asm.jcc(cc::E, more);
    asm.load(reg::R11, Mem::at(reg::RSP, 0));
    fault(asm, Some(JUMP));

    asm.bind(more);
    let (apart, linked) = (asm.here(), asm.label());
    asm.pop(reg::R11);
    asm.lea(reg::R11, Mem::at(reg::R11, JUMP));
    asm.load8(reg::R10, Mem::at(reg::R11, 1));
    asm.cmp32_ri(reg::R10, i32::from(RefillDesc::LINKED >> 8) - 1);
    asm.jcc(cc::A, linked);
    asm.store_imm(at::EXIT_KIND, ExitKind::Apart as i32, 4);
    asm.jmp_to(exit);
    asm.bind(linked);
    asm.lea(reg::R11, Mem::at(reg::R11, RefillDesc::LEN));
    asm.jmp_reg(reg::R11);
    Refill { start, apart }
}

/// `result` = `helper(block, …)`, which saves no vectors: `arguments` puts the others where they belong. The stack is the
/// host's, and what Rust code may change has been saved.
fn call_lean(asm: &mut Asm, helper: Mem, result: u8, arguments: impl FnOnce(&mut Asm)) {
    keep_xmm(asm, Asm::store_xmm);
    asm.load(reg::RDI, at::BLOCK);
    arguments(asm);
    asm.call_mem(helper);
    asm.mov_rr(result, reg::RAX);
    keep_xmm(asm, Asm::load_xmm);
}

/// Stores or loads the low halves of the sixteen vector registers of SSE, if they are the guest's. Changes flags.
fn keep_xmm(asm: &mut Asm, each: fn(&mut Asm, u8, Mem)) {
    let done = asm.label();
    asm.cmp8_mem(at::VECTORS, 0);
    asm.jcc(cc::E, done);
    for i in 0..16 {
        each(asm, i, Mem::gs(at::XMM.disp + 16 * i32::from(i)));
    }
    asm.bind(done);
}

/// `commit(block, desc) -> nonzero to leave`
fn commit(asm: &mut Asm) {
    for r in CALLER_SAVED {
        asm.store(gpr(r), r);
    }
    asm.flags_to_ax();
    asm.store_sized(at::LATE_FLAG_WORD, reg::RAX, 4);
    save_vectors(asm);
    to_host_stack(asm);
    asm.push(reg::R11);
    asm.push(reg::R11);
    asm.load(reg::RDI, at::BLOCK);
    asm.mov_rr(reg::RSI, reg::R11);
    asm.call_mem(at::HELPER_COMMIT);
    asm.pop(reg::R11);
    to_returns(asm);
    asm.test_rr(reg::RAX);
    let out = asm.label();
    asm.jcc(cc::NE, out);
    restore_vectors(asm);
    asm.load_sized(reg::RAX, at::LATE_FLAG_WORD, 4);
    asm.ax_to_flags();
    for r in CALLER_SAVED {
        asm.load(r, gpr(r));
    }
    asm.ret();

    asm.bind(out);
    asm.store_imm(at::EXIT_KIND, ExitKind::After as i32, 4);
    leave_from_helper(asm);
}

/// Leaves after a helper: what it may have changed was saved before; if the vectors were the guest's they have been
/// saved too, and must not be saved again.
fn leave_from_helper(asm: &mut Asm) {
    // Without the return to the code that has called.
    asm.load(reg::R10, at::RETURNS);
    asm.lea(reg::R10, Mem::at(reg::R10, 8));
    asm.store(at::RETURNS, reg::R10);
    for r in CALLER_SAVED {
        asm.load(r, gpr(r));
    }
    for (guest, host) in pinned_pairs() {
        asm.store(gpr(guest), host);
    }
    asm.store(at::EXIT_VALUE, reg::R11);
    asm.load(reg::RSP, at::HOST_RSP);
    asm.lea(reg::RSP, Mem::at(reg::RSP, 8));
    for r in CALLEE_SAVED.into_iter().rev() {
        asm.pop(r);
    }
    asm.ret();
}
