//! Segmentation (SDM vol. 3A chapters 3 and 5): from a segment and an offset to a linear address, and what loading a
//! segment register checks.

use purlin_arch::x86_64::regs::{
    cr0, rflags,
    seg::{CS, DS, ES, FS, GS, SS},
};

use crate::{
    cpu::{Cpu, Segment, access},
    descriptor::{Descriptor, is_null, rpl},
    exception::Exception,
    mem::Access,
    tlb::Privilege,
};

/// Whether a linear address is canonical for 48 bits (SDM vol. 1 3.3.7.1).
pub fn is_canonical(address: u64) -> bool {
    (address << 16) as i64 >> 16 == address as i64
}

impl Segment {
    /// Whether an access of `size` bytes at `offset` is within the segment's limit and, if `typed` (protected mode),
    /// allowed by its type.
    pub fn permits(&self, offset: u32, size: usize, access: Access, typed: bool) -> bool {
        if self.unusable() || typed && !self.type_permits(access) {
            return false;
        }
        let Some(last) = offset.checked_add(size.saturating_sub(1) as u32) else { return false };
        if self.is_expand_down() {
            let top = if self.db() { u32::MAX } else { 0xffff };
            offset > self.limit && last <= top
        } else {
            last <= self.limit
        }
    }

    fn type_permits(&self, wanted: Access) -> bool {
        let code = self.access & access::CODE != 0;
        let rw = self.access & access::RW != 0;
        match wanted {
            Access::Read => !code || rw,
            Access::Write => !code && rw,
            Access::Fetch => code,
        }
    }

    fn is_expand_down(&self) -> bool {
        self.access & (access::CODE | access::DC | access::S) == access::DC | access::S
    }

    /// A segment register after a null selector was loaded. Base and limit are cleared, as on processors with "null
    /// selector clears base" (APM vol. 3, CPUID Fn8000_0021).
    pub fn null(selector: u16) -> Self {
        Self { base: 0, limit: 0, access: access::UNUSABLE, selector }
    }
}

impl Cpu {
    /// Linear address of an access of `size` bytes at `offset` in segment register `seg`, with all checks that come
    /// before paging: #GP(0) or #SS(0) for type, limit and canonical form, #AC(0) for alignment.
    pub fn linear(&mut self, seg: usize, offset: u64, size: usize, access: Access) -> Result<u64, Exception> {
        let fault = if seg == SS { Exception::SS0 } else { Exception::GP0 };
        let segment = &self.seg[seg];
        let address = if self.code64() {
            let address = if seg == FS || seg == GS { segment.base.wrapping_add(offset) } else { offset };
            let last = address.wrapping_add(size.saturating_sub(1) as u64);
            if !is_canonical(address) || !is_canonical(last) {
                return Err(fault);
            }
            address
        } else {
            if !self.permits(segment, offset as u32, size, access) {
                return Err(fault);
            }
            segment.base.wrapping_add(offset) & 0xffff_ffff
        };
        if access != Access::Fetch {
            self.check_explicit(address, size, access, self.privilege())?;
        }
        Ok(address)
    }

    /// Whether `segment` holds `size` bytes at `offset` and its type allows the access. On Intel's processors there is no end to a
    /// flat one: behind 4 GiB an access goes on at address 0 (SDM vol. 3A 5.3 leaves that open).
    pub fn permits(&self, segment: &Segment, offset: u32, size: usize, access: Access) -> bool {
        let typed = self.protected() && !self.v86();
        let endless = !self.features.amd && segment.base == 0 && segment.limit == u32::MAX && !segment.is_expand_down();
        segment.permits(offset, if endless { size.min(1) } else { size }, access, typed)
    }

    /// Linear address of `size` bytes that are accessed by themselves, `by` bytes into an operand at `offset`: an element
    /// under a mask. An operand does not go round the address space: what is accessed of it beyond 4 GiB is beyond the
    /// segment, but not on Intel's processors. (The SDM leaves that open, vol. 3A 5.3.) Its alignment is not checked.
    pub fn element_linear(
        &mut self,
        seg: usize,
        offset: u64,
        by: usize,
        size: usize,
        access: Access,
    ) -> Result<u64, Exception> {
        let at = offset.wrapping_add(by as u64);
        if self.features.amd && !self.code64() && at > u64::from(u32::MAX) {
            return Err(if seg == SS { Exception::SS0 } else { Exception::GP0 });
        }
        let checked = self.rflags;
        self.rflags &= !rflags::AC;
        let linear = self.linear(seg, at, size, access);
        self.rflags = checked;
        linear
    }

    /// What an instruction's own data accesses are subject to beside segmentation and paging: the alignment check
    /// and data breakpoints.
    pub fn check_explicit(
        &mut self,
        address: u64,
        size: usize,
        access: Access,
        privilege: Privilege,
    ) -> Result<(), Exception> {
        self.check_alignment(address, size, privilege)?;
        if self.dr7 & 0xff != 0 {
            crate::debug::data_breakpoints(self, address, size, access);
        }
        Ok(())
    }

    /// #AC for an access of `size` bytes. It comes before a page fault, whatever table 6-2 of the SDM's vol. 3A says.
    pub fn check_alignment(&self, address: u64, size: usize, privilege: Privilege) -> Result<(), Exception> {
        let checked = privilege == Privilege::User && self.alignment_checked();
        if checked && address & (self.alignment(size) - 1) != 0 { Err(Exception::AC0) } else { Ok(()) }
    }

    /// Whether misaligned accesses at CPL 3 raise #AC (SDM vol. 3A 6.15, interrupt 17).
    pub fn alignment_checked(&self) -> bool {
        self.cr0 & cr0::AM != 0 && self.rflags & rflags::AC != 0
    }

    /// What an access of `size` bytes is aligned to (SDM vol. 3A table 6-7). Of whole vectors Intel's processors check nothing.
    fn alignment(&self, size: usize) -> u64 {
        match size {
            0 | 1 => 1,
            2 => 2,
            4 | 6 => 4,
            16 | 32 | 64 if self.features.amd => 16,
            16 | 32 | 64 => 1,
            14 | 94 if !self.features.amd => 2,
            28 | 108 if !self.features.amd => 4,
            _ => 8,
        }
    }

    /// Loads a segment register other than CS, with all checks of the mode.
    pub fn load_segment(&mut self, seg: usize, selector: u16) -> Result<(), Exception> {
        if !self.protected() || self.v86() {
            self.seg[seg] = self.real_segment(seg, selector);
            return Ok(());
        }
        self.seg[seg] = match seg {
            SS => self.checked_stack_segment(selector, self.cpl, self.code64(), Exception::gp)?,
            _ => self.checked_data_segment(selector, Exception::gp)?,
        };
        Ok(())
    }

    /// What a load in real mode makes of a segment register: the limit stays as it was ("unreal mode"). In
    /// virtual-8086 mode the rest is fixed anyway.
    pub fn real_segment(&self, seg: usize, selector: u16) -> Segment {
        let old = self.seg[seg];
        let base = u64::from(selector) << 4;
        if self.v86() {
            return Segment::v86(selector);
        }
        let kind = if seg == CS { access::CODE } else { 0 };
        let sticky = old.access & (access::DB | access::G);
        Segment {
            base,
            limit: if old.unusable() { 0xffff } else { old.limit },
            access: sticky | access::P | access::S | access::RW | access::ACCESSED | kind,
            selector,
        }
    }

    /// The segment that `selector` names, checked for SS at privilege level `cpl`, of 64-bit code or not. `fault` is
    /// what a bad selector raises: #GP for MOV and POP, #TS for a stack taken from a TSS.
    pub fn checked_stack_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        code64: bool,
        fault: fn(u16) -> Exception,
    ) -> Result<Segment, Exception> {
        if is_null(selector) {
            // Only 64-bit code below ring 3 has a null SS, with the RPL of its level.
            if code64 && cpl < 3 && rpl(selector) == cpl {
                return Ok(Segment::null_stack(selector));
            }
            return Err(fault(0));
        }
        let mut descriptor = self.descriptor(selector, fault(selector))?;
        if rpl(selector) != cpl || !descriptor.is_writable() || descriptor.dpl() != cpl {
            return Err(fault(selector));
        }
        if !descriptor.present() {
            return Err(Exception::ss(selector));
        }
        self.set_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// The segment that `selector` names, checked for DS, ES, FS or GS.
    pub fn checked_data_segment(&mut self, selector: u16, fault: fn(u16) -> Exception) -> Result<Segment, Exception> {
        if is_null(selector) {
            return Ok(Segment::null(selector));
        }
        let mut descriptor = self.descriptor(selector, fault(selector))?;
        if !descriptor.is_readable() || !self.reachable(&descriptor, selector) {
            return Err(fault(selector));
        }
        if !descriptor.present() {
            return Err(Exception::np(selector));
        }
        self.set_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// Whether the privilege check for data lets CPL and RPL at a segment (SDM vol. 3A 5.6).
    pub fn reachable(&self, descriptor: &Descriptor, selector: u16) -> bool {
        descriptor.is_conforming() || descriptor.dpl() >= self.cpl.max(rpl(selector))
    }

    /// CS becomes the segment of `descriptor`, at privilege level `cpl`.
    pub fn set_cs(&mut self, descriptor: &Descriptor, selector: u16, cpl: u8) {
        self.seg[CS] = descriptor.segment(selector & !3 | u16::from(cpl));
        self.cpl = cpl;
    }

    /// After a return to an outer level: data segments that it may not reach become null (SDM vol. 3A 5.8.6), and the
    /// selectors of those that are null already become 0. (Their bases stay: 64-bit code may have set them.)
    pub fn drop_inner_segments(&mut self) {
        for seg in [ES, DS, FS, GS] {
            let segment = &mut self.seg[seg];
            if is_null(segment.selector) {
                segment.selector = 0;
            }
            let conforming = access::CODE | access::DC;
            if segment.dpl() < self.cpl && segment.access & conforming != conforming && !segment.unusable() {
                *segment = Segment::null(0);
            }
        }
    }
}

impl Segment {
    /// A segment in virtual-8086 mode (SDM vol. 3C 26.3.1.2: the fixed values).
    pub fn v86(selector: u16) -> Self {
        let access = access::P | access::DPL | access::S | access::RW | access::ACCESSED;
        Self { base: u64::from(selector) << 4, limit: 0xffff, access, selector }
    }

    /// A null SS in 64-bit mode: its DPL still is the privilege level.
    pub fn null_stack(selector: u16) -> Self {
        let dpl = u32::from(rpl(selector)) << access::DPL_SHIFT;
        Self { base: 0, limit: 0, access: access::UNUSABLE | access::DB | dpl, selector }
    }
}

#[cfg(test)]
mod tests;
