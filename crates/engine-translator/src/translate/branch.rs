//! Control transfers and the stack.

use iced_x86::{Instruction, OpKind};

use super::{
    asm::{Asm, Label, Mem, Section, cc, reg},
    classify::Class,
    desc::AccessDesc,
    emit::{Access, Emitter, Insn, look_up_jump},
    flags::{FlagUse, STATUS},
    jumps::{PAGE_ENTRIES, PAGE_ENTRY_BITS, PageEntry},
    layout::{at, gpr, page_entries, page_id, pinned},
    operands::{Operand, STACK},
    place::{distance, is_movable},
    stubs::LEAVE_WORD,
};

/// Length of a direct call.
const CALL: usize = 5;

/// How a jump to another page is laid out: where what is patched is.
pub struct Across {
    /// From the check to the number of the page, a multiple of four bytes.
    pub id: u32,
    /// From the check to the jump behind it: within eight aligned bytes, as the check begins such eight.
    pub jump: u32,
}

impl Across {
    /// From one place to another.
    pub const FIXED: Self = Self { id: 8, jump: 18 };
    /// In movable code.
    pub const MOVABLE: Self = Self { id: 52, jump: 72 };
    /// From the descriptor to what goes by way of the jump table.
    pub const TABLE: u32 = 4;
    /// The number of no page.
    pub const NEVER: u32 = u32::MAX;
}

impl Emitter<'_> {
    /// A control transfer. The block may go on behind a call.
    pub(super) fn branch(&mut self, insn: &Insn) {
        let target = insn.insn.near_branch_target();
        let backward = target <= insn.rip();
        match insn.class {
            Class::Jump => self.jump(target, backward),
            Class::JumpIf => self.jump_if(insn, target, backward),
            Class::Loop => self.looping(insn, target, backward),
            Class::Call => {
                self.push_return(insn);
                self.call(insn, target, backward);
            }
            // As no call of the host's: that would be a guess for nobody.
            Class::Filler => {
                self.push_return(insn);
                self.jump(target, backward);
            }
            Class::CallIndirect => {
                self.target(insn);
                self.call_r11(insn);
            }
            Class::JumpIndirect => {
                self.target(insn);
                self.jump_indirect(insn);
            }
            _ => self.ret(insn),
        }
    }

    fn jump_if(&mut self, insn: &Insn, target: u64, backward: bool) {
        self.need_flags();
        let condition = insn.insn.condition_code() as u8 - 1;
        if let Some(entry) = self.beyond(target, backward) {
            self.asm.jcc_to(condition, entry);
            self.jump(insn.next(), false);
            return;
        }
        let taken = self.asm.label();
        self.asm.jcc(condition, taken);
        let behind = self.asm.label_here();
        self.jump(insn.next(), false);
        self.flags_saved = false;
        self.asm.bind(taken);
        self.jump_from(target, backward, Some(behind));
    }

    /// A conditional jump in the midst of the block.
    pub(super) fn side_exit(&mut self, insn: &Insn) {
        self.need_flags();
        let target = insn.insn.near_branch_target();
        let condition = insn.insn.condition_code() as u8 - 1;
        let (condition, exit) =
            if insn.onward == Some(target) { (condition ^ 1, insn.next()) } else { (condition, target) };
        if let Some(entry) = self.beyond(exit, exit <= insn.rip()) {
            self.asm.jcc_to(condition, entry);
            return;
        }
        let leave = self.asm.label();
        self.asm.jcc(condition, leave);
        let (hosts, behind) = (self.hosts, self.asm.label_here());
        self.asm.section(Section::Cold);
        self.asm.bind(leave);
        self.jump_from(exit, exit <= insn.rip(), Some(behind));
        self.asm.section(Section::Hot);
        (self.hosts, self.flags_saved) = (hosts, false);
    }

    /// LOOP and its kin as the host's own, over a jump.
    fn looping(&mut self, insn: &Insn, target: u64, backward: bool) {
        use iced_x86::Mnemonic;
        self.need_flags();
        let opcode = match insn.insn.mnemonic() {
            Mnemonic::Loopne => 0xe0,
            Mnemonic::Loope => 0xe1,
            Mnemonic::Loop => 0xe2,
            _ => 0xe3,
        };
        if counts_ecx(&insn.insn) {
            self.asm.bytes(&[0x67]);
        }
        let not_taken = self.asm.label();
        self.asm.bytes(&[opcode, 5]);
        self.asm.jmp(not_taken);
        self.jump(target, backward);
        self.flags_saved = false;
        self.asm.bind(not_taken);
        self.jump(insn.next(), false);
    }

    /// R11 = target of an indirect jump or call.
    fn target(&mut self, insn: &Insn) {
        let size = (self.mode.bits() / 8) as usize;
        if insn.insn.op0_kind() == OpKind::Register {
            let number = insn.insn.op0_register().full_register().number() as u8;
            self.read_gpr(reg::R11, number);
            self.narrow(reg::R11, size);
            return;
        }
        self.read_operand(insn, size);
    }

    /// R11 = the memory operand of `insn`, zero-extended.
    fn read_operand(&mut self, insn: &Insn, size: usize) {
        let operand = Operand::of(&insn.insn);
        let access = Access { size, flags: AccessDesc::READ, segment: operand.segment };
        self.access(insn, &operand, access, &FlagUse::default(), STATUS, &mut |this, mem| {
            this.hosts = [None; 2];
            this.asm.load_sized(reg::R11, mem, size);
            this.narrow(reg::R11, size);
        });
    }

    /// Zero-extends from `size` bytes where the load did not.
    fn narrow(&mut self, register: u8, size: usize) {
        match size {
            2 => self.asm.movzx16(register, register),
            4 => self.asm.mov_rr32(register, register),
            _ => {}
        }
    }

    /// Pushes the address of the next instruction.
    pub(super) fn push_return(&mut self, insn: &Insn) {
        let size = (self.mode.bits() / 8) as usize;
        let next = insn.next();
        self.stack_push(insn, size, &mut |this, mem| this.store_constant(mem, next, size));
    }

    fn store_constant(&mut self, mem: Mem, value: u64, size: usize) {
        if size < 8 || value as i64 == i64::from(value as i32) {
            self.asm.store_imm(mem, value as i32, size);
            return;
        }
        self.hosts = [None; 2];
        self.asm.lea(reg::R10, mem);
        self.load_rip(reg::R11, value);
        self.asm.store(Mem::at(reg::R10, 0), reg::R11);
    }

    fn ret(&mut self, insn: &Insn) {
        let size = (self.mode.bits() / 8) as usize;
        let extra = if insn.insn.op_count() == 1 { i32::from(insn.insn.immediate16()) } else { 0 };
        let access = Access { size, flags: AccessDesc::READ, segment: STACK };
        // Few calls, all of them forward, can make for any number of returns.
        if self.pairs_returns() && !self.behind_sti {
            self.poll(Some(insn.rip()), self.flags_saved);
        }
        self.access(insn, &self.stack_top(0), access, &FlagUse::default(), STATUS, &mut |this, mem| {
            this.hosts = [None; 2];
            this.asm.load_sized(reg::R11, mem, size);
            this.narrow(reg::R11, size);
        });
        self.move_stack(size as i32 + extra);
        if !self.pairs_returns() {
            self.jump_indirect(insn);
            return;
        }
        self.tell_branch(insn);
        self.free_flags(STATUS);
        self.asm.ret();
    }

    // --- calls and returns in pairs (see `returns.rs`)

    /// Whether the host's calls and returns stand for the guest's.
    fn pairs_returns(&self) -> bool {
        self.mode.bits() == 64 && !self.mode.step()
    }

    /// The call itself, once the return address is on the guest's stack.
    fn call(&mut self, insn: &Insn, target: u64, backward: bool) {
        if !self.pairs_returns() {
            self.jump(target, backward);
            return;
        }
        let way = self.asm.label();
        self.push_code_page();
        self.asm.align_patch_behind(CALL);
        self.asm.call(way);
        self.asm.section(Section::Cold);
        self.asm.bind(way);
        self.jump(target, backward);
        self.asm.section(Section::Hot);
        self.return_site(insn);
    }

    /// Where the return from a call leads: the guest's return address is in R11, the flags are in `flag_word`. If it is this
    /// call's, execution goes on behind it.
    fn return_site(&mut self, insn: &Insn) {
        let site = self.asm.label_here();
        self.return_sites.push(site);
        self.compare_return(insn.next());
        (self.hosts, self.flags_saved) = ([None; 2], true);
        if insn.onward.is_none() {
            self.jump(insn.next(), false);
        }
    }

    /// Goes where the jump table says if the RIP in R11 is not `rip`. The first instruction has at least five bytes.
    fn compare_return(&mut self, rip: u64) {
        let elsewhere = self.stubs.by_table[self.mode.table()];
        if let Some(offset) = distance(rip) {
            // What a movable call has pushed first: the page that it was on.
            self.asm.bytes(LEAVE_WORD);
            self.asm.lea(reg::R10, Mem::at(reg::R11, -(offset as i32)));
            self.asm.cmp_reg_mem(reg::R10, Mem::at(reg::RSP, -8));
            self.asm.jcc_to(cc::NE, elsewhere);
            self.asm.store(at::CODE_PAGE, reg::R10);
            return;
        }
        if rip as i64 == i64::from(rip as i32) {
            self.asm.cmp_ri(reg::R11, rip as i32);
        } else {
            self.asm.mov_ri(reg::R10, rip);
            self.asm.cmp_rr(reg::R11, reg::R10);
        }
        self.asm.jcc_to(cc::NE, elsewhere);
    }

    /// Movable code's calls leave a word beside the address of their return site: with that alone a return could not tell
    /// which of the pages that share a translation it leads to. Between this and the call nothing may leave the block.
    fn push_code_page(&mut self) {
        if is_movable(self.rip) {
            self.asm.push_mem(at::CODE_PAGE);
        }
    }

    // --- jumps to other pages

    /// A direct jump to another page, flags in `flag_word`: if that page is what it was when the jump was linked.
    pub(super) fn jump_across(&mut self, rip: u64) {
        let table = self.mode.table();
        self.asm.align(8, 0);
        let (check, other) = (self.asm.label_here(), self.asm.label());
        match distance(rip) {
            Some(distance) => self.check_movable_page(distance, other),
            None => {
                self.asm.cmp32_mem(page_id(table, rip), Across::NEVER);
                self.asm.jcc(cc::NE, other);
            }
        }
        self.asm.jmp(other);
        let section = self.asm.section(Section::Cold);
        self.asm.align_patch();
        self.asm.bind(other);
        self.asm.call_to(self.stubs.across);
        self.asm.offset_to(check);
        match distance(rip) {
            Some(distance) => {
                self.asm.mov_wide(reg::R11, distance as u64);
                self.asm.add_mem(reg::R11, at::CODE_PAGE);
            }
            None => self.asm.mov_wide(reg::R11, rip),
        }
        self.asm.jmp_to(self.stubs.by_table[table]);
        self.asm.section(section);
    }

    /// Makes the page at that distance the one under way, if it is the one whose number is to be filled in; else jumps to
    /// `other`.
    fn check_movable_page(&mut self, distance: i64, other: Label) {
        let table = self.mode.table();
        let field = |offset: usize| Mem::gs_at(reg::R10, page_entries(table, offset));
        let start = self.asm.code().len();
        self.asm.load(reg::R11, at::CODE_PAGE);
        self.asm.lea(reg::R11, Mem::at(reg::R11, (distance & !0xfff) as i32));
        self.asm.rorx(reg::R10, reg::R11, 12 - PAGE_ENTRY_BITS as u8);
        self.asm.and32(reg::R10, ((PAGE_ENTRIES - 1) << PAGE_ENTRY_BITS) as u32);
        self.asm.cmp_reg_mem(reg::R11, field(std::mem::offset_of!(PageEntry, linear)));
        self.asm.jcc(cc::NE, other);
        self.asm.align(4, 0);
        self.asm.cmp32_mem(field(std::mem::offset_of!(PageEntry, id)), Across::NEVER);
        debug_assert_eq!(self.asm.code().len() - start, Across::MOVABLE.id as usize + 4);
        self.asm.jcc(cc::NE, other);
        self.asm.store(at::CODE_PAGE, reg::R11);
        self.asm.align_patch();
        debug_assert_eq!(self.asm.code().len() - start, Across::MOVABLE.jump as usize);
    }

    /// The call of an indirect target, which is in R11.
    fn call_r11(&mut self, insn: &Insn) {
        self.asm.store(at::TEMP, reg::R11);
        if self.mode.bits() != 64 {
            self.push_return(insn);
        } else {
            // 0 or 1 if it is canonical. That is checked once it is known that the stack can be written, before it is.
            self.free_flags(insn.live);
            self.asm.sar(reg::R11, 47);
            self.asm.lea(reg::R11, Mem::at(reg::R11, 1));
            self.asm.store(at::LENT, reg::R11);
            let (next, astray) = (insn.next(), self.asm.label());
            self.stack_push(insn, 8, &mut |this, mem| {
                this.asm.cmp_mem(at::LENT, 1);
                this.asm.jcc(cc::A, astray);
                this.store_constant(mem, next, 8);
            });
            self.asm.section(Section::Cold);
            self.asm.bind(astray);
            self.emulate(insn);
            self.asm.section(Section::Hot);
        }
        self.asm.load(reg::R11, at::TEMP);
        if !self.pairs_returns() {
            self.jump_r11();
            return;
        }
        self.free_flags(STATUS);
        let table = self.mode.table();
        if !self.hot {
            self.push_code_page();
            self.asm.align_patch_behind(CALL);
            self.asm.call_to(self.stubs.by_table[table]);
            self.return_site(insn);
            return;
        }
        self.poll(None, true);
        let host = look_up_jump(&mut self.asm, table);
        let unknown = self.asm.label();
        self.asm.jcc(cc::NE, unknown);
        self.push_code_page();
        self.asm.align_patch_behind(Asm::CALL_GS);
        self.asm.call_mem(host);
        self.asm.section(Section::Cold);
        self.asm.bind(unknown);
        self.push_code_page();
        let site = self.asm.label();
        self.asm.lea_label(reg::R10, site);
        self.asm.push(reg::R10);
        self.asm.jmp_to(self.stubs.find);
        self.asm.section(Section::Hot);
        self.asm.bind(site);
        self.return_site(insn);
    }

    /// Jumps to the target of `insn` in R11. One that is not canonical is found where it is looked up, and then the
    /// instruction that led there has to be known.
    fn jump_indirect(&mut self, insn: &Insn) {
        if self.mode.bits() == 64 {
            self.tell_branch(insn);
        }
        self.jump_r11();
    }

    fn tell_branch(&mut self, insn: &Insn) {
        let section = self.asm.section(Section::Data);
        let desc = self.asm.label_here();
        self.exit_desc(insn);
        self.asm.section(section);
        self.asm.store_distance(at::BRANCH, desc);
    }

    // --- the stack

    /// What is at the stack pointer plus `delta`.
    fn stack_top(&self, delta: i32) -> Operand {
        Operand::register(reg::RSP, delta, STACK).of_size(self.mode.stack_bits())
    }

    /// The stack pointer += `delta`. R11 is kept.
    fn move_stack(&mut self, delta: i32) {
        let mem = Mem::at(reg::R15, delta);
        match self.mode.stack_bits() {
            64 => self.asm.lea(reg::R15, mem),
            32 => self.asm.lea32(reg::R15, mem),
            _ => {
                self.asm.lea32(reg::R10, mem);
                self.asm.mov_rr16(reg::R15, reg::R10);
            }
        }
    }

    /// A push of `size` bytes, which `op` stores.
    pub(super) fn stack_push(&mut self, insn: &Insn, size: usize, op: &mut dyn FnMut(&mut Self, Mem)) {
        let stay = if matches!(insn.class, Class::Push | Class::Pushf) { 0 } else { AccessDesc::STAY };
        let access = Access { size, flags: AccessDesc::WRITE | stay, segment: STACK };
        let operand = self.stack_top(-(size as i32));
        self.access(insn, &operand, access, &FlagUse::default(), STATUS, &mut |this, mem| {
            op(this, mem);
            // Before the commit of a slow store, which may be the last thing that is done here.
            this.move_stack(-(size as i32));
        });
    }

    /// PUSH.
    pub(super) fn push(&mut self, insn: &Insn) {
        let size = insn.insn.stack_pointer_increment().unsigned_abs() as usize;
        match insn.insn.op0_kind() {
            OpKind::Register => {
                let number = insn.insn.op0_register().full_register().number() as u8;
                self.stack_push(insn, size, &mut |this, mem| match pinned(number) {
                    Some(host) => this.asm.store_sized(mem, host, size),
                    None => this.store_from(mem, gpr(number), size),
                });
            }
            OpKind::Memory => {
                self.read_operand(insn, size);
                self.asm.store(at::TEMP, reg::R11);
                self.stack_push(insn, size, &mut |this, mem| this.store_from(mem, at::TEMP, size));
            }
            _ => {
                let value = insn.insn.immediate(0) as i32;
                self.stack_push(insn, size, &mut |this, mem| this.asm.store_imm(mem, value, size));
            }
        }
    }

    /// `[mem] = [from]`; changes R10 and R11.
    pub(super) fn store_from(&mut self, mem: Mem, from: Mem, size: usize) {
        self.hosts = [None; 2];
        self.asm.lea(reg::R10, mem);
        self.asm.load(reg::R11, from);
        self.asm.store_sized(Mem::at(reg::R10, 0), reg::R11, size);
    }

    /// POP.
    pub(super) fn pop(&mut self, insn: &Insn) {
        let size = insn.insn.stack_pointer_increment().unsigned_abs() as usize;
        let access = Access { size, flags: AccessDesc::READ, segment: STACK };
        let operand = self.stack_top(0);
        if insn.insn.op0_kind() == OpKind::Memory {
            self.access(insn, &operand, access, &FlagUse::default(), STATUS, &mut |this, mem| {
                this.asm.load_sized(reg::R11, mem, size);
                this.asm.store(at::TEMP, reg::R11);
            });
            self.pop_to_memory(insn, size);
            return;
        }
        let number = insn.insn.op0_register().full_register().number() as u8;
        self.access(insn, &operand, access, &FlagUse::default(), STATUS, &mut |this, mem| match pinned(number) {
            // The stack pointer is raised first, and what is popped replaces a part of it.
            Some(_) if number == reg::RSP && size == 2 => {
                this.hosts = [None; 2];
                this.asm.load_sized(reg::R11, mem, size);
                this.move_stack(2);
                this.asm.mov_rr16(reg::R15, reg::R11);
            }
            Some(host) => this.asm.load_sized(host, mem, size),
            None => {
                this.hosts = [None; 2];
                this.asm.load_sized(reg::R11, mem, size);
                // A load of four bytes has zero-extended.
                this.asm.store_sized(gpr(number), reg::R11, if size == 2 { 2 } else { 8 });
            }
        });
        if number != reg::RSP {
            self.move_stack(size as i32);
        }
    }

    /// The second half of POP to memory: the value is in `TEMP`.
    fn pop_to_memory(&mut self, insn: &Insn, size: usize) {
        let operand = Operand::of(&insn.insn).above_stack(size as i32);
        let access = Access { size, flags: AccessDesc::WRITE, segment: operand.segment };
        self.access(insn, &operand, access, &FlagUse::default(), STATUS, &mut |this, mem| {
            this.store_from(mem, at::TEMP, size);
            this.move_stack(size as i32);
        });
    }

    /// LEAVE: RSP = RBP, then POP RBP.
    pub(super) fn leave(&mut self, insn: &Insn) {
        let size = (self.mode.bits() / 8) as usize;
        let access = Access { size, flags: AccessDesc::READ, segment: STACK };
        let stack_bits = self.mode.stack_bits();
        let operand = Operand::register(reg::RBP, 0, STACK).of_size(stack_bits);
        self.access(insn, &operand, access, &FlagUse::default(), STATUS, &mut |this, mem| {
            this.hosts = [None; 2];
            this.asm.load_sized(reg::R11, mem, size);
            let top = Mem::at(reg::RBP, size as i32);
            match stack_bits {
                64 => this.asm.lea(reg::R15, top),
                32 => this.asm.lea32(reg::R15, top),
                _ => {
                    this.asm.lea32(reg::R10, top);
                    this.asm.mov_rr16(reg::R15, reg::R10);
                }
            }
            match size {
                2 => this.asm.mov_rr16(reg::RBP, reg::R11),
                4 => this.asm.mov_rr32(reg::RBP, reg::R11),
                _ => this.asm.mov_rr(reg::RBP, reg::R11),
            }
        });
    }
}

/// Whether LOOP or JCXZ counts ECX rather than RCX.
fn counts_ecx(insn: &Instruction) -> bool {
    use iced_x86::Code::*;
    matches!(
        insn.code(),
        Loop_rel8_64_ECX
            | Loop_rel8_32_ECX
            | Loop_rel8_16_ECX
            | Loope_rel8_64_ECX
            | Loope_rel8_32_ECX
            | Loope_rel8_16_ECX
            | Loopne_rel8_64_ECX
            | Loopne_rel8_32_ECX
            | Loopne_rel8_16_ECX
            | Jecxz_rel8_64
            | Jecxz_rel8_32
            | Jecxz_rel8_16
    )
}
