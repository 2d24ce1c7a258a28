//! Emission of accesses that are checked together (see `plan.rs`).
//!
//! The host address of each group is kept behind GS, and in R10 or R11 for as long as nothing else needs them. What a
//! check has found holds until the block is left: guest memory stays where it is, and who forbids stores to a page or
//! forgets a translation does so outside of emitted code, or waits until this vCPU is.

use super::{
    asm::{Asm, Mem, cc, reg},
    emit::{Access, Emitter, Insn, look_up},
    layout::at,
    plan::Lead,
};

impl Emitter<'_> {
    /// R11 = host address of the lead's group. R10 is changed.
    pub(super) fn lead(&mut self, insn: &Insn, lead: &Lead, access: Access) {
        self.free_flags(insn.live);
        if self.on_stack(&lead.low) {
            self.stack_access(insn, &lead.low, access, lead.span as u16, lead.write);
        } else {
            self.look_up_lead(insn, lead, access);
        }
        self.erase_store(lead.group.into());
        let at = self.asm.code().len();
        self.asm.store(slot(lead.group), reg::R11);
        debug_assert_eq!(self.asm.code().len() - at, Asm::ERASED + 1);
        self.stores[usize::from(lead.group)] = Some(at);
        self.hosts = [None, Some(lead.group)];
    }

    fn look_up_lead(&mut self, insn: &Insn, lead: &Lead, access: Access) {
        self.address(&lead.low);
        self.add_segment_base(lead.low.segment);
        look_up(&mut self.asm, self.mode.privilege(), lead.write, lead.span);
        let cold = self.asm.label();
        self.asm.jcc(cc::A, cold);
        self.load_host(lead.write);
        let looked_up = self.asm.label_here();
        self.asm.lea(reg::R11, Mem::sum(reg::R10, reg::R11));
        let stub = self.stubs.refill[self.mode.privilege() as usize][usize::from(lead.write)];
        self.refill(insn, [cold, looked_up], access, lead.span as u16, stub);
    }

    /// The host address of a group was not loaded from where it is stored: there it is not needed.
    pub(super) fn erase_store(&mut self, group: usize) {
        let Some(erased) = self.stores[group].take() else { return };
        self.asm.erase(erased);
        for at in self.stores.iter_mut().flatten().filter(|at| **at > erased) {
            *at -= Asm::ERASED;
        }
    }

    /// The register that holds the host address of a group: R10 or R11.
    pub(super) fn host_of(&mut self, group: u8) -> u8 {
        let register = |i: usize| if i == 0 { reg::R10 } else { reg::R11 };
        if let Some(i) = self.hosts.iter().position(|held| *held == Some(group)) {
            return register(i);
        }
        let i = self.hosts.iter().position(Option::is_none).unwrap_or(self.next_host);
        self.next_host = 1 - i;
        self.hosts[i] = Some(group);
        self.stores[usize::from(group)] = None;
        self.asm.load(register(i), slot(group));
        register(i)
    }
}

fn slot(group: u8) -> Mem {
    Mem::gs(at::GROUPS.disp + 8 * i32::from(group))
}
