//! Emits a block: guest instructions in, host code out.
//!
//! Between two guest instructions the pinned registers hold the guest's, R10 and R11 are free, and the status flags
//! are in the host's, unless `flags_saved`: then they are in `flag_word`, because an address check has used the host's.

use iced_x86::{Encoder, Instruction, Mnemonic};

use super::{
    asm::{Asm, Label, Mem, Section, cc, reg},
    cache::Found,
    classify::{Class, needs_alignment, waits},
    desc::{AccessDesc, ExitDesc, LinkDesc, RefillDesc},
    flags::{FlagUse, STATUS},
    jumps::{Context, JumpEntry},
    layout::{at, gpr, jump_table, stack_page, tlb},
    masking::Masking,
    mode::Mode,
    operands::{Operand, keeps_hosts},
    place::{distance, is_movable, placed, resolve},
    plan::{Check, GROUPS, plan},
    source::{AMD, BMI2, MAX_INSN},
    spare,
    stubs::Stubs,
    trace::{SHORT_LOOK_AHEAD, ends_block},
};
use crate::{
    segment::is_canonical,
    tlb::{ENTRY_BITS, Entry, Privilege, SET_ENTRIES, StackPage},
};

/// One guest instruction of a block.
#[derive(Clone, Copy)]
pub struct Insn {
    /// As decoded.
    pub insn: Instruction,
    /// What is done with it.
    pub class: Class,
    /// What it does to the status flags.
    pub flags: FlagUse,
    /// The flags that are live before it.
    pub live: u32,
    /// Its bytes.
    pub bytes: [u8; 15],
    /// For a jump or call: where the block goes on, if it does.
    pub onward: Option<u64>,
}

impl Insn {
    /// Offset in CS.
    pub fn rip(&self) -> u64 {
        self.insn.ip()
    }

    /// Offset in CS of the next instruction.
    pub fn next(&self) -> u64 {
        self.insn.next_ip()
    }
}

/// A host instruction that may fault, and what the guest's state is then.
#[derive(Clone, Copy, Debug)]
pub struct FaultPoint {
    /// Offset of the host instruction in the block.
    pub offset: u32,
    /// The guest is at this offset in CS; `None` if R11 has it.
    pub rip: Option<u64>,
    /// Its flags are in `flag_word`, not in the host's.
    pub flags_saved: bool,
}

impl FaultPoint {
    /// With an RIP that is what it seems, while the page of movable code is the one at `code_page`.
    pub fn resolved(self, code_page: u64) -> Self {
        Self { rip: self.rip.map(|rip| resolve(rip, code_page)), ..self }
    }
}

/// A finished block.
pub struct Emitted {
    /// Has the code and descriptors.
    pub asm: Asm,
    /// Offset of the entry with the flags in the host's.
    pub entry: u32,
    /// Offset of the entry with the flags in `flag_word`.
    pub saved_entry: u32,
    /// Length of the code, without descriptors.
    pub code_len: u32,
    /// Where it may fault, by offset.
    pub faults: Vec<FaultPoint>,
    /// Offsets of the places behind calls, which the host's returns lead to.
    pub return_sites: Vec<u32>,
}

/// From the entry of movable code by RIP to the one with the flags in `flag_word`.
pub const ENTRY_BY_RIP: u32 = 16;

/// Nothing, in five bytes.
const NOP5: &[u8] = &[0x0f, 0x1f, 0x44, 0, 0];

/// Emits one block.
pub struct Emitter<'a> {
    pub(super) asm: Asm,
    pub(super) mode: Mode,
    pub(super) stubs: &'a Stubs,
    pub(super) flags_saved: bool,
    /// Whether it is to be fast; else it is to be short.
    pub(super) hot: bool,
    encoder: Encoder,
    faults: Vec<(Label, Option<u64>, bool)>,
    pub(super) return_sites: Vec<Label>,
    /// The blocks for RIPs on the same page that there are.
    known: &'a dyn Fn(u64) -> Option<Found>,
    /// The page (linear) of the block's first byte: jumps that stay on it are linked directly.
    page: u64,
    cs_base: u64,
    /// Its RIP, from which descriptors count.
    pub(super) rip: u64,
    /// How the access of the present instruction is checked.
    pub(super) check: Check,
    /// The present instruction is the block's last one.
    pub(super) last: bool,
    /// The instruction before the present one is STI: no interrupt may come in between.
    pub(super) behind_sti: bool,
    /// The groups whose host addresses R10 and R11 hold.
    pub(super) hosts: [Option<u8>; 2],
    /// For each group where its host address is stored, until it is loaded from there.
    pub(super) stores: [Option<usize>; GROUPS],
    /// Which of the two gives way to the next one.
    pub(super) next_host: usize,
}

impl<'a> Emitter<'a> {
    /// For a block that will lie at host address `origin`.
    pub fn new(
        origin: u64,
        stubs: &'a Stubs,
        known: &'a dyn Fn(u64) -> Option<Found>,
        context: &Context,
        rip: u64,
        hot: bool,
    ) -> Self {
        let (mode, cs_base) = (context.mode, context.cs_base);
        Self {
            asm: spare::asm(origin, stubs.enter),
            mode,
            stubs,
            known,
            flags_saved: false,
            hot,
            encoder: Encoder::new(64),
            faults: Vec::new(),
            return_sites: Vec::new(),
            page: cs_base.wrapping_add(rip) >> 12,
            cs_base,
            rip,
            check: Check::Alone,
            last: false,
            behind_sti: false,
            hosts: [None; 2],
            stores: [None; GROUPS],
            next_host: 0,
        }
    }

    /// Emits the block. `next` is where execution goes on if its last instruction does not say.
    pub fn block(mut self, insns: &[Insn], next: u64) -> Emitted {
        // The entry can be redirected while others pass through it: it begins with an instruction of five bytes.
        let entry = self.asm.label_here();
        self.asm.bytes(NOP5);
        let saved_entry = self.saved_entry(insns, entry);

        let checks = plan(insns, self.mode);
        let mut open = true;
        for (i, insn) in insns.iter().enumerate() {
            let live_after = insns.get(i + 1).map_or(STATUS, |n| n.live);
            self.check = checks[i];
            self.last = i + 1 == insns.len();
            self.behind_sti = i > 0 && insns[i - 1].class == Class::Sti;
            open = self.instruction(insn, live_after);
            if !open {
                break;
            }
        }
        if open {
            let backward = insns.last().is_some_and(|last| next <= last.rip());
            self.jump(next, backward);
        }
        self.finish([saved_entry, entry])
    }

    /// The entry with the flags in `flag_word`: the other one, if they do not matter. (Movable code has the one by RIP in
    /// front of it, so it is never the other one there.)
    fn saved_entry(&mut self, insns: &[Insn], entry: Label) -> Label {
        let killed = self.mode.bits() == 64 && kills_flags_soon(insns);
        let offset = distance(self.rip);
        if killed && offset.is_none() {
            return entry;
        }
        self.asm.section(Section::Cold);
        match offset {
            Some(offset) => self.entry_by_rip(offset as i32),
            None => self.asm.align_patch(),
        }
        let saved_entry = self.asm.label_here();
        if !killed && insns.first().is_none_or(|first| first.live != 0) {
            self.load_flags();
        }
        self.asm.jmp(entry);
        self.asm.section(Section::Hot);
        saved_entry
    }

    /// The entry of movable code with the RIP in R11 and the flags in `flag_word`: [`ENTRY_BY_RIP`] bytes.
    fn entry_by_rip(&mut self, offset: i32) {
        self.asm.align(8, 0);
        let start = self.asm.code().len();
        self.asm.lea(reg::R10, Mem::at(reg::R11, -offset));
        self.asm.store(at::CODE_PAGE, reg::R10);
        self.asm.align(8, 0);
        debug_assert_eq!(self.asm.code().len() - start, ENTRY_BY_RIP as usize);
    }

    fn finish(mut self, labels: [Label; 2]) -> Emitted {
        for group in 0..GROUPS {
            self.erase_store(group);
        }
        let code_len = self.asm.code_len();
        self.asm.finish();
        let mut faults: Vec<_> = self
            .faults
            .iter()
            .map(|&(label, rip, flags_saved)| FaultPoint { offset: self.asm.offset_of(label), rip, flags_saved })
            .collect();
        faults.sort_by_key(|f| f.offset);
        let [saved_entry, entry] = labels.map(|label| self.asm.offset_of(label));
        let return_sites = self.return_sites.iter().map(|&site| self.asm.offset_of(site)).collect();
        Emitted { saved_entry, entry, code_len, asm: self.asm, faults, return_sites }
    }

    /// Emits one instruction; false if it ends the block.
    fn instruction(&mut self, insn: &Insn, live_after: u32) -> bool {
        // Where this is not known to leave R10 and R11 alone, they hold nothing of use behind it.
        let keeps = keeps_hosts(insn) || !matches!(self.check, Check::Alone);
        if !keeps {
            self.hosts = [None; 2];
        }
        let open = self.emit_instruction(insn, live_after);
        if !keeps {
            self.hosts = [None; 2];
        }
        open
    }

    fn emit_instruction(&mut self, insn: &Insn, live_after: u32) -> bool {
        match insn.class {
            Class::Copy => self.copy(insn, live_after),
            Class::Vector(needs) => {
                let mode = self.mode;
                let ready = (!needs.x87 || mode.x87())
                    && (!needs.sse || mode.sse())
                    && (!needs.avx || mode.avx())
                    && (!needs.avx512 || mode.avx512());
                if !ready {
                    self.emulate(insn);
                    return false;
                }
                self.copy(insn, live_after);
            }
            Class::Nothing => {}
            Class::Push => self.push(insn),
            Class::Pop => self.pop(insn),
            Class::Leave => self.leave(insn),
            Class::Cli => self.cli(),
            Class::Sti => return self.sti(insn),
            Class::Swapgs => self.swapgs(),
            Class::Pushf => self.pushf(insn),
            Class::Own(own) => self.own(insn, own),
            Class::Emulate => {
                match self.transfer_word(&insn.insn) {
                    Some(word) => self.transfer(insn, word),
                    None => self.emulate(insn),
                }
                return false;
            }
            Class::Jump if insn.onward.is_some() => {}
            Class::Filler if insn.onward.is_some() => self.push_return(insn),
            Class::JumpIf if insn.onward.is_some() => self.side_exit(insn),
            Class::Call | Class::CallIndirect if insn.onward.is_some() => self.branch(insn),
            _ => {
                self.branch(insn);
                return false;
            }
        }
        true
    }

    /// The last-instruction pointers of the x87 are kept virtual: the host's hold the translator's addresses. They are
    /// those of the last instruction that raised nothing, so this comes behind it. R10 is changed.
    pub(super) fn x87_pointers(&mut self, insn: &Insn, memory: bool) {
        if insn.insn.mnemonic() == Mnemonic::Fninit {
            self.asm.mov_ri(reg::R10, 0);
            for field in [at::FIP, at::FDP, at::FOP, at::SETTLED_FDP, at::SETTLED_FOP] {
                self.asm.store(field, reg::R10);
            }
        }
        if insn.insn.mnemonic() == Mnemonic::Fldcw && !*AMD {
            // It may unmask an exception that came before; the pointers are not that one's.
            self.settled_pointer(at::SETTLED_FDP, at::FDP);
            self.settled_pointer(at::SETTLED_FOP, at::FOP);
        }
        if !matches!(insn.class, Class::Vector(needs) if needs.pointers) {
            return;
        }
        if memory {
            self.asm.load(reg::R10, at::TEMP);
            self.asm.store(at::FDP, reg::R10);
        } else if !*AMD {
            self.settled_pointer(at::SETTLED_FDP, at::FDP);
        }
        self.load_rip(reg::R10, insn.rip());
        self.asm.store(at::FIP, reg::R10);
        let at = insn.bytes.iter().position(|&b| (0xd8..=0xdf).contains(&b)).unwrap_or(0);
        let opcode = u32::from(insn.bytes[at] & 7) << 8 | u32::from(insn.bytes[(at + 1).min(14)]);
        self.asm.store_imm(at::FOP, opcode as i32, 4);
    }

    /// See `XState::settle_pointers`: the one of the last instruction but those that have raised nothing since. Changes R10.
    fn settled_pointer(&mut self, settled: Mem, field: Mem) {
        self.asm.load(reg::R10, settled);
        self.asm.store(field, reg::R10);
    }

    /// Leaves for the run loop to emulate `insn`.
    pub(super) fn emulate(&mut self, insn: &Insn) {
        let stub = if self.flags_saved { self.stubs.emulate_saved } else { self.stubs.emulate };
        self.asm.call_to(stub);
        self.exit_desc(insn);
    }

    /// The descriptor that says what `insn` is.
    pub(super) fn exit_desc(&mut self, insn: &Insn) {
        self.asm.code().extend(ExitDesc::packed(insn.rip(), &insn.bytes[..insn.insn.len()]));
    }

    /// Encodes a host instruction that iced knows.
    pub(super) fn encode(&mut self, insn: &Instruction) {
        let buffer = std::mem::take(self.asm.code());
        let len = buffer.len();
        self.encoder.set_buffer(buffer);
        let result = self.encoder.encode(insn, 0);
        *self.asm.code() = self.encoder.take_buffer();
        if result.is_err() {
            // A form that the classification should not have let through: the guest sees an undefined instruction.
            debug_assert!(false, "cannot encode {insn:?}: {result:?}");
            self.asm.code().truncate(len);
            self.asm.bytes(&[0x0f, 0x0b]);
        }
    }

    /// Marks the next host instruction as one that may fault.
    pub(super) fn may_fault(&mut self, rip: u64) {
        let label = self.asm.label_here();
        self.faults.push((label, Some(rip), self.flags_saved));
    }

    // --- flags

    /// The host's flags are about to be changed by the translator's own code, before `insn`.
    pub(super) fn free_flags(&mut self, live: u32) {
        if self.flags_saved || live == 0 {
            return;
        }
        self.save_flags();
    }

    /// Flags into `flag_word`. R10 is changed.
    pub(super) fn save_flags(&mut self) {
        self.hosts[0] = None;
        self.asm.mov_rr(reg::R10, reg::RAX);
        self.asm.flags_to_ax();
        self.asm.store_sized(at::FLAG_WORD, reg::RAX, 4);
        self.asm.mov_rr(reg::RAX, reg::R10);
        self.flags_saved = true;
    }

    /// Flags from `flag_word`; R10 and R11 are kept. It begins with an instruction of at least five bytes.
    fn load_flags(&mut self) {
        self.asm.store(at::LENT, reg::RAX);
        self.asm.load_sized(reg::RAX, at::FLAG_WORD, 4);
        self.asm.ax_to_flags();
        self.asm.load(reg::RAX, at::LENT);
    }

    /// Flags back in the host's, where everything expects them.
    pub(super) fn need_flags(&mut self) {
        if self.flags_saved {
            self.load_flags();
            self.flags_saved = false;
        }
    }

    /// What has to be done about flags before the copied instruction itself.
    pub(super) fn flags_before(&mut self, flags: &FlagUse, live_after: u32) {
        let keeps = live_after & !flags.kills;
        if flags.reads != 0 || flags.touches != 0 && keeps != 0 {
            self.need_flags();
        } else if flags.touches != 0 {
            // All that matters is written by the instruction.
            self.flags_saved = false;
        }
    }

    // --- leaving the block

    /// Loads from the address in the mailbox, which faults when the run loop is wanted. Keeps R11 and flags. `rip`: where
    /// the guest is then, if not R11 says that.
    pub(super) fn poll(&mut self, rip: Option<u64>, flags_saved: bool) {
        self.hosts[0] = None;
        self.asm.load(reg::R10, at::POLL);
        let label = self.asm.label_here();
        self.faults.push((label, rip, flags_saved));
        self.asm.load8(reg::R10, Mem::at(reg::R10, 0));
    }

    /// Jumps to `rip`. `backward`: the jump may close a loop.
    pub(super) fn jump(&mut self, rip: u64, backward: bool) {
        self.jump_from(rip, backward, None);
    }

    /// The same, where a conditional jump that ends at `behind` has led here.
    pub(super) fn jump_from(&mut self, rip: u64, backward: bool, mut behind: Option<Label>) {
        let same_page = self.stays(rip);
        // (A poll says where the guest is by the distance from the block, movable code by that from its page.)
        let near = (rip.wrapping_sub(self.rip) as i64).unsigned_abs() < (1 << 31) - 0x1000;
        // (In movable code that is longer, and takes an instruction that not all hosts have.)
        let movable = is_movable(self.rip);
        let linked = match movable {
            true => self.hot && *BMI2 && rip >> 12 != self.rip >> 12,
            false => is_canonical(rip) && !is_movable(placed(self.mode, rip)),
        };
        if self.mode.bits() == 64 && !self.mode.step() && !same_page && near && linked {
            self.free_flags(STATUS);
            if backward {
                self.poll(Some(rip), true);
            }
            self.jump_across(rip);
            return;
        }
        if self.mode.step() || !same_page {
            if self.mode.bits() == 64 && !is_canonical(rip) && !movable {
                self.asm.store_imm(at::BRANCH, 0, 8);
            }
            self.load_rip(reg::R11, rip);
            self.jump_r11();
            return;
        }
        if backward {
            self.poll(Some(rip), self.flags_saved);
            behind = None;
        }
        self.link(rip, if self.flags_saved { LinkDesc::SAVED } else { 0 }, behind);
    }

    /// Whether `rip` is on the same page, and so is what begins there: else no link leads there (see `CodeCache::link`).
    fn stays(&self, rip: u64) -> bool {
        let linear = self.cs_base.wrapping_add(rip);
        linear >> 12 == self.page && linear & 0xfff <= (0x1000 - MAX_INSN) as u64
    }

    /// Where a conditional jump to `rip` may lead at once, with the flags in the host's.
    pub(super) fn beyond(&self, rip: u64, backward: bool) -> Option<u64> {
        let at_once = !backward && !self.mode.step() && self.stays(rip);
        at_once.then(|| (self.known)(rip)).flatten().map(|known| known.entry)
    }

    /// A jump to the block for `rip`, on the same page. At first it is a call, which tells the run loop where from; that
    /// makes a jump of it, and has the conditional jump that ends at `behind` lead there, too.
    pub(super) fn link(&mut self, rip: u64, flags: u8, behind: Option<Label>) {
        self.asm.align_patch();
        let saved = flags & LinkDesc::SAVED != 0;
        // A conditional jump to a block that is known leads there by itself (see `beyond`).
        if flags & LinkDesc::UNGROUPED == 0
            && behind.is_none()
            && let Some(known) = (self.known)(rip)
        {
            self.asm.jmp_to(if saved { known.saved_entry } else { known.entry });
            return;
        }
        self.asm.call_to(if saved { self.stubs.link_saved } else { self.stubs.link });
        self.asm.link_desc(LinkDesc::new(self.rip, rip, flags), behind);
    }

    /// Jumps to the RIP in R11 by way of the jump table.
    pub(super) fn jump_r11(&mut self) {
        self.free_flags(STATUS);
        let (table, step) = (self.mode.table(), self.mode.step());
        if !self.hot || step {
            self.asm.jmp_to(if step { self.stubs.miss_saved } else { self.stubs.by_table[table] });
            return;
        }
        self.poll(None, true);
        let host = look_up_jump(&mut self.asm, table);
        self.asm.jcc_to(cc::NE, self.stubs.find);
        self.asm.jmp_mem(host);
    }

    // --- accesses

    /// Emits an access to memory at `operand`: `op` is called with the operand to use, maybe twice: for the hot path
    /// and for the slow one. R10 and R11 are in use then, as far as the operand needs them. `flags`: what the
    /// instruction in `op` does to them.
    pub(super) fn access(
        &mut self,
        insn: &Insn,
        operand: &Operand,
        access: Access,
        flags: &FlagUse,
        live_after: u32,
        op: &mut dyn FnMut(&mut Self, Mem),
    ) {
        let mem = match self.check {
            Check::Alone if self.on_stack(operand) => {
                self.free_flags(insn.live);
                self.stack_access(insn, operand, access, access.size as u16, access.flags & AccessDesc::WRITE != 0);
                Mem::at(reg::R11, 0)
            }
            Check::Alone => {
                self.free_flags(insn.live);
                self.address(operand);
                self.checked_access(insn, access, flags, live_after, op);
                return;
            }
            Check::Lead(lead) => {
                self.lead(insn, &lead, access);
                Mem::at(reg::R11, lead.offset)
            }
            Check::Member { group, offset } => Mem::at(self.host_of(group), offset),
        };
        self.flags_before(flags, live_after);
        op(self, mem);
    }

    /// An access that is checked by itself. R10 must hold the offset into its segment.
    pub(super) fn checked_access(
        &mut self,
        insn: &Insn,
        access: Access,
        flags: &FlagUse,
        live_after: u32,
        op: &mut dyn FnMut(&mut Self, Mem),
    ) {
        let before = self.flags_saved;
        let (read, write) = (access.flags & AccessDesc::READ != 0, access.flags & AccessDesc::WRITE != 0);
        debug_assert!(read || write);
        // With a base the two parts of an operand may be apart though they seem to be on one page.
        let parts = access.flags & (AccessDesc::PARTS_32 | AccessDesc::PARTS_16) != 0;
        if !self.mode.flat(access.segment) || parts && has_base(access.segment) {
            let mut desc = access.desc(insn);
            desc.flags |= AccessDesc::OFFSET;
            self.slow_access(desc, flags, live_after, op);
            return;
        }
        let beyond = (self.mode.bits() != 64 && has_base(access.segment)).then(|| {
            // The offset is within 4 GiB; the access may go beyond (the sum with the base would not tell).
            let label = self.asm.label();
            self.asm.cmp32_ri(reg::R10, -(access.size as i32));
            self.asm.jcc(cc::A, label);
            label
        });
        self.add_segment_base(access.segment);

        let tag = look_up(&mut self.asm, self.mode.privilege(), write, access.size as u32);
        let cold = self.asm.label();
        self.asm.jcc(cc::A, cold);
        self.load_host(write);
        if self.mode.compact() {
            let found = self.asm.label_here();
            let stub = self.stubs.refill[self.mode.privilege() as usize][usize::from(write)];
            self.refill(insn, [cold, found], access, access.size as u16, stub);
            self.flags_before(flags, live_after);
            op(self, Mem::sum(reg::R10, reg::R11));
            return;
        }
        self.flags_before(flags, live_after);
        op(self, Mem::sum(reg::R10, reg::R11));
        let back = self.asm.label_here();

        let after = self.flags_saved;
        self.flags_saved = before;
        self.asm.section(Section::Cold);
        self.asm.bind(cold);
        self.asm.add_mem(reg::R10, Mem::gs_at(reg::R11, tag));
        self.slow_access(access.desc(insn), flags, live_after, op);
        self.asm.jmp(back);
        debug_assert_eq!(self.flags_saved, after);
        if let Some(beyond) = beyond {
            self.flags_saved = before;
            self.asm.bind(beyond);
            let mut desc = access.desc(insn);
            desc.flags |= AccessDesc::OFFSET;
            self.slow_access(desc, flags, live_after, op);
            self.asm.jmp(back);
        }
        self.asm.section(Section::Hot);
        debug_assert_eq!(self.flags_saved, after);
    }

    /// R11: from the entry of the TLB to the host address of its page.
    pub(super) fn load_host(&mut self, write: bool) {
        let host = tlb(self.mode.privilege(), write, std::mem::offset_of!(Entry, host));
        self.asm.load(reg::R11, Mem::gs_at(reg::R11, host));
    }

    /// Whether what is at `operand` is probably on the page of the stack.
    pub(super) fn on_stack(&self, operand: &Operand) -> bool {
        self.mode.compact() && self.mode.flat(operand.segment) && operand.is_stack()
    }

    /// R11 = host address of an access that is probably to the page of the stack. Changes R10.
    pub(super) fn stack_access(&mut self, insn: &Insn, operand: &Operand, access: Access, size: u16, write: bool) {
        let privilege = self.mode.privilege();
        self.asm.lea(reg::R11, Mem::at(reg::R15, operand.displacement() as i32));
        self.asm.mov_rr(reg::R10, reg::R11);
        self.asm.sub_mem(reg::R10, stack_page(privilege, std::mem::offset_of!(StackPage, tag)));
        self.asm.cmp_ri(reg::R10, 0x1000 - i32::from(size));
        let cold = self.asm.label();
        self.asm.jcc(cc::A, cold);
        self.asm.add_mem(reg::R11, stack_page(privilege, std::mem::offset_of!(StackPage, distance)));
        let found = self.asm.label_here();
        self.refill(insn, [cold, found], access, size, self.stubs.stack[privilege as usize][usize::from(write)]);
    }

    /// What the TLB does not answer, at the first label: a call that fills it and goes on at the second one, behind the
    /// look-up. Where there is more to the access than that, the instruction comes again, in code in which each access is
    /// checked by itself and has a slow path.
    pub(super) fn refill(&mut self, insn: &Insn, labels: [Label; 2], access: Access, size: u16, stub: u64) {
        let group = matches!(self.check, Check::Lead(_));
        let desc = access.desc(insn);
        let special = AccessDesc::ALIGNED | AccessDesc::X87 | AccessDesc::LOCK | AccessDesc::LATE;
        let exact = group || desc.flags & special != 0 || desc.masking != Masking::default();
        let mut flags = if exact { RefillDesc::EXACT } else { 0 };
        flags |= if desc.flags & AccessDesc::WRITE != 0 { RefillDesc::STORE } else { 0 };
        flags |= if group { RefillDesc::LINKED } else { 0 };
        let section = self.asm.section(Section::Cold);
        self.asm.bind(labels[0]);
        self.asm.call_to(stub);
        self.asm.jmp(labels[1]);
        self.asm.bytes(&RefillDesc::new(self.rip, insn.rip(), size, flags).to_bytes());
        if group {
            // A loop may come here once on each page.
            self.link(insn.rip(), LinkDesc::SAVED | LinkDesc::UNGROUPED, None);
        }
        self.asm.section(section);
    }

    /// The access by way of Rust.
    fn slow_access(
        &mut self,
        mut desc: AccessDesc,
        flags: &FlagUse,
        live_after: u32,
        op: &mut dyn FnMut(&mut Self, Mem),
    ) {
        if self.flags_saved {
            desc.flags |= AccessDesc::SAVED_BEFORE;
        }
        // Whether they are saved afterwards is known only then: the descriptor is filled in below.
        let label = self.asm.label();
        self.asm.lea_label(reg::R11, label);
        self.asm.call_to(self.stubs.access);
        self.flags_before(flags, live_after);
        op(self, Mem::at(reg::R10, 0));
        if self.flags_saved {
            desc.flags |= AccessDesc::SAVED_AFTER;
        }
        if desc.flags & AccessDesc::WRITE != 0 {
            self.asm.lea_label(reg::R11, label);
            self.asm.call_to(self.stubs.commit);
        }
        let section = self.asm.section(Section::Data);
        self.asm.align(8, 0);
        self.asm.bind(label);
        self.asm.bytes(&desc.to_bytes());
        self.asm.section(section);
    }

    /// R10: from an offset to a linear address.
    pub(super) fn add_segment_base(&mut self, segment: usize) {
        if !has_base(segment) {
            return;
        }
        self.asm.load(reg::R11, super::layout::segment_base(segment));
        let sum = Mem::sum(reg::R10, reg::R11);
        if self.mode.bits() == 64 {
            self.asm.lea(reg::R10, sum);
        } else {
            self.asm.lea32(reg::R10, sum);
        }
    }

    // --- RIPs

    /// A host register = `rip`, whatever that is in movable code.
    pub(super) fn load_rip(&mut self, host: u8, rip: u64) {
        match distance(rip) {
            Some(distance) => self.load_code_address(host, distance),
            None => self.asm.mov_ri(host, rip),
        }
    }

    /// A host register = the linear address at that distance from the page of movable code.
    pub(super) fn load_code_address(&mut self, host: u8, distance: i64) {
        self.asm.load(host, at::CODE_PAGE);
        // A displacement of 32 bits, from somewhere on the page.
        let near = distance.clamp(i32::MIN.into(), i32::MAX.into());
        for part in [near, distance - near] {
            if part != 0 {
                self.asm.lea(host, Mem::at(host, part as i32));
            }
        }
    }

    // --- guest registers

    /// Guest register `index` = a host register, of `size` bytes (2, 4 or 8), which may be changed.
    pub(super) fn write_gpr(&mut self, index: u8, host: u8, size: usize) {
        match (super::layout::pinned(index), size) {
            (Some(home), 2) => self.asm.mov_rr16(home, host),
            (Some(home), 4) => self.asm.mov_rr32(home, host),
            (Some(home), _) => self.asm.mov_rr(home, host),
            (None, 4) => {
                self.asm.mov_rr32(host, host);
                self.asm.store(gpr(index), host);
            }
            (None, size) => self.asm.store_sized(gpr(index), host, size),
        }
    }

    /// Loads guest register `index` into a host register.
    pub(super) fn read_gpr(&mut self, host: u8, index: u8) {
        match super::layout::pinned(index) {
            Some(r) => self.asm.mov_rr(host, r),
            None => self.asm.load(host, gpr(index)),
        }
    }
}

/// Whether everybody who jumps here without saving the flags has seen that they do not matter. (So if that changes, the
/// jump's own block is no longer valid either, and none can come with flags that matter for what has replaced this one.)
fn kills_flags_soon(insns: &[Insn]) -> bool {
    let mut killed = 0;
    for insn in &insns[..insns.len().min(SHORT_LOOK_AHEAD)] {
        if insn.flags.reads & !killed != 0 || ends_block(insn.class) {
            return false;
        }
        killed |= insn.flags.kills;
        if killed == STATUS {
            return true;
        }
    }
    false
}

/// Looks the linear address in R10 up: compares so that it is found if the flags then say "not above". R10 becomes
/// the offset in the page, R11 points at the entry. Returns the place of the tag there.
pub fn look_up(asm: &mut Asm, privilege: Privilege, write: bool, size: u32) -> i32 {
    let tag = tlb(privilege, write, std::mem::offset_of!(Entry, tag));
    let shift = (12 - ENTRY_BITS) as u8;
    if *BMI2 {
        asm.rorx(reg::R11, reg::R10, shift);
    } else {
        asm.mov_rr(reg::R11, reg::R10);
        asm.shr(reg::R11, shift);
    }
    asm.and32(reg::R11, ((SET_ENTRIES - 1) << ENTRY_BITS) as u32);
    asm.sub_mem(reg::R10, Mem::gs_at(reg::R11, tag));
    asm.cmp_ri(reg::R10, 0x1000 - size as i32);
    tag
}

/// Looks the RIP in R11 up in a jump table: compares so that it is found if the flags then say "equal", in the place that
/// is the result. Changes R10.
pub fn look_up_jump(asm: &mut Asm, table: usize) -> Mem {
    let field = |offset: usize| Mem::gs_at(reg::R10, jump_table(table) + offset as i32);
    const _: () = assert!(size_of::<JumpEntry>() == 1 << 4);
    asm.movzx16(reg::R10, reg::R11);
    asm.shl(reg::R10, 4);
    asm.cmp_reg_mem(reg::R11, field(std::mem::offset_of!(JumpEntry, rip)));
    field(std::mem::offset_of!(JumpEntry, host))
}

/// Whether a segment that counts as flat (see [`Mode::flat`]) may have a base.
pub(super) fn has_base(segment: usize) -> bool {
    use purlin_arch::x86_64::regs::seg;
    segment == seg::FS || segment == seg::GS
}

/// An access to memory that an instruction makes.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// Bytes.
    pub size: usize,
    /// `AccessDesc::READ` and `AccessDesc::WRITE`.
    pub flags: u16,
    /// Segment register, in the encoding's order.
    pub segment: usize,
}

impl Access {
    pub(super) fn desc(&self, insn: &Insn) -> AccessDesc {
        let mut flags = self.flags;
        let mut masking = Masking::default();
        if let Class::Vector(needs) = insn.class {
            flags |= if needs.x87 && waits(insn.insn.mnemonic()) { AccessDesc::X87 } else { 0 };
            masking = Masking::of(&insn.insn);
        }
        if needs_alignment(&insn.insn) {
            flags |= AccessDesc::ALIGNED;
        }
        if insn.insn.has_lock_prefix() || insn.insn.mnemonic() == Mnemonic::Xchg {
            flags |= AccessDesc::LOCK;
        }
        AccessDesc::new(insn.rip(), insn.next(), self.size, flags, self.segment, masking)
    }
}
