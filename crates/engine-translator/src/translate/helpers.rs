//! What emitted code calls: accesses that the TLB does not answer.
#![allow(unsafe_code)]

use purlin_arch::x86_64::regs::seg;

use super::{
    desc::{AccessDesc, RefillDesc},
    place::resolve,
};
use crate::{
    cpu::{Block, Cpu},
    exception::Exception,
    mem::{Access, Target, page_rest},
    xstate::XState,
};

/// The functions behind `EmittedState::helpers`.
pub fn helpers() -> [u64; COUNT] {
    [
        access as *const () as u64,
        commit as *const () as u64,
        quick_access as *const () as u64,
        refill as *const () as u64,
        find as *const () as u64,
        super::transfers::transfer as *const () as u64,
        super::transfers::fault as *const () as u64,
        super::extended::extended_state as *const () as u64,
    ]
}

/// How many there are.
pub const COUNT: usize = 8;

/// Where the copied instruction of `desc` is to make its access; null if it raises `pending`, or is to come again with
/// the world stopped.
///
/// `address` is a linear address, or an offset into the segment.
extern "C" fn access(block: *mut Block, address: u64, desc: *const AccessDesc) -> *mut u8 {
    // SAFETY: called by emitted code on the thread that runs the vCPU, with its own block and a descriptor in the code
    // cache; no other reference to the Cpu exists while emitted code runs.
    let (cpu, desc) = unsafe { (&mut *(*block).cpu.get(), &*desc) };
    match cpu.slow_access(address, desc) {
        Ok(Some(host)) => host,
        Ok(None) => {
            cpu.emitted.wants_world = true;
            std::ptr::null_mut()
        }
        Err(exception) => {
            cpu.emitted.pending = Some(exception);
            std::ptr::null_mut()
        }
    }
}

/// [`access`] for the plain case, a translation that the TLB does not have: null if there is more to it.
///
/// Of the vector registers only the low halves of the sixteen of SSE are saved around this function. Code for the
/// baseline processor changes no others, but libc's copying does: no bus, no allocation, no large moves in here.
extern "C" fn quick_access(block: *mut Block, address: u64, desc: *const AccessDesc) -> *mut u8 {
    // SAFETY: as in `access`.
    let (cpu, desc) = unsafe { (&mut *(*block).cpu.get(), &*desc) };
    let canonical = (address as i64) << 16 >> 16 == address as i64;
    let plain = desc.flags & AccessDesc::OFFSET == 0 && cpu.dr7 & 0xff == 0 && cpu.tlb.has_room();
    if !canonical || !plain || usize::from(desc.size) > page_rest(address) {
        return std::ptr::null_mut();
    }
    let access = if desc.flags & AccessDesc::WRITE != 0 { Access::Write } else { Access::Read };
    let target = cpu.resolve_leanly(address, access);
    // Others may come before a page fault.
    if desc.flags & (AccessDesc::ALIGNED | AccessDesc::X87 | AccessDesc::LATE) == 0 && desc.masking.register == 0 {
        cpu.note_fault(&target);
    }
    let Ok(Target::Ram(host)) = target else { return std::ptr::null_mut() };
    (cpu.emitted.bounce_for, cpu.emitted.late) = (None, None);
    cpu.emitted.slow_host = host;
    host
}

/// The host address of linear `address`, for an access that lies on one page, whose [`RefillDesc`] is at `desc`; null if
/// there is more to it. `write`: for the access itself or others, the page must be one that may be stored to. The same restrictions as in [`quick_access`].
extern "C" fn refill(block: *mut Block, address: u64, desc: *const u8, write: u64) -> *mut u8 {
    // SAFETY: as in `access`.
    let (cpu, desc) = unsafe { (&mut *(*block).cpu.get(), RefillDesc::read(desc)) };
    let canonical = (address as i64) << 16 >> 16 == address as i64;
    if !canonical || cpu.dr7 & 0xff != 0 || !cpu.tlb.has_room() {
        return std::ptr::null_mut();
    }
    let (access, privilege) = (if desc.stores() { Access::Write } else { Access::Read }, cpu.privilege());
    let target = cpu.resolve_leanly(address, access);
    if desc.is_plain() {
        cpu.note_fault(&target);
    }
    match target {
        // A store that has to be noticed has more to it.
        Ok(Target::Ram(host)) if write == 0 || cpu.tlb.may_store(privilege, address) => return host,
        Err(exception) if desc.is_plain() => {
            let known = (!cpu.emitted.walk_cut).then_some(exception);
            cpu.emitted.refill_failed = Some((address, desc.stores(), known));
        }
        _ => {}
    }
    std::ptr::null_mut()
}

/// The host address of the block for `rip`, if there is one, which the jump table then has, too; else 0. The same
/// restrictions as in [`quick_access`].
extern "C" fn find(block: *mut Block, rip: u64) -> u64 {
    // SAFETY: as in `access`.
    let cpu = unsafe { &mut *(*block).cpu.get() };
    cpu.emitted.lean = true;
    let found = cpu.find_quickly(rip);
    cpu.emitted.lean = false;
    found.unwrap_or(0)
}

/// Completes a store that [`access`] prepared. Nonzero if the run loop is wanted before the next instruction.
extern "C" fn commit(block: *mut Block, desc: *const AccessDesc) -> u64 {
    // SAFETY: as in `access`.
    let (cpu, desc) = unsafe { (&mut *(*block).cpu.get(), &*desc) };
    let wanted = cpu.commit(desc);
    u64::from(wanted && desc.flags & AccessDesc::STAY == 0)
}

/// What a store raises that the instruction comes before.
pub struct LateFault {
    fault: Exception,
    /// The extended state that an x87 instruction leaves as it was.
    before: Option<Box<XState>>,
    /// Linear address of what is stored all the same.
    first_part: Option<u64>,
}

/// The processor accesses an x87 operand of ten bytes in two parts; this is the first one's size. The second's offset is
/// cut to the address size, as the first's is (seen on AMD's processors; SDM vol. 3A 5.3 leaves it open).
const FIRST_PART: usize = 8;

impl Cpu {
    /// Where an access goes that lies on one page, as far as that can be said in here.
    fn resolve_leanly(&mut self, address: u64, access: Access) -> Result<Target, Exception> {
        self.emitted.lean = true;
        self.emitted.walk_cut = false;
        let target = self.resolve(address, access, self.privilege());
        self.emitted.lean = false;
        target
    }

    /// Takes note if a page fault is what the access raises for certain. The stub that has asked delivers it.
    fn note_fault(&mut self, target: &Result<Target, Exception>) {
        if let Err(fault) = target
            && self.emitted.delivers
            && !self.emitted.walk_cut
        {
            (self.emitted.fault, self.emitted.faulted) = (*fault, 1);
        }
    }

    /// The page fault that ended a refill, if it was one. If restrictions cut the walk short it is made again without.
    pub fn refill_fault(&mut self) -> Option<Exception> {
        let (address, stores, known) = self.emitted.refill_failed.take()?;
        if known.is_some() {
            return known;
        }
        let access = if stores { Access::Write } else { Access::Read };
        self.resolve(address, access, self.privilege()).err()
    }

    /// `None`: a locked access to two pages, and other vCPUs may be in emitted code.
    fn slow_access(&mut self, address: u64, desc: &AccessDesc) -> Result<Option<*mut u8>, Exception> {
        self.rip = resolve(desc.rip, self.emitted.code_page);
        if desc.flags & AccessDesc::X87 != 0 {
            crate::xstate::check_pending_x87(self)?;
        }
        // What an earlier one held back, and an exception of the instruction's own has kept from being raised.
        self.emitted.late = None;
        let prepared = self.prepare(address, desc);
        if prepared.is_err() && desc.flags & AccessDesc::MMX != 0 {
            self.xstate.enter_mmx_by_half();
        }
        match prepared {
            Err(fault) if desc.flags & AccessDesc::LATE != 0 => Ok(Some(self.hold(fault, address, desc))),
            other => other,
        }
    }

    /// The instruction goes on with a copy, and `fault` is raised afterwards: see [`Self::raise_late`].
    fn hold(&mut self, fault: Exception, address: u64, desc: &AccessDesc) -> *mut u8 {
        let x87 = desc.flags & AccessDesc::X87 != 0;
        let first_part = match usize::from(desc.size) {
            10 => self.first_part(address, desc).ok(),
            _ => None,
        };
        let before = x87.then(|| Box::new(self.xstate.clone()));
        self.emitted.late = Some(LateFault { fault, before, first_part });
        self.emitted.bounce.as_mut_ptr()
    }

    /// Where the first part of an operand of ten bytes is stored, though the second is not.
    fn first_part(&mut self, address: u64, desc: &AccessDesc) -> Result<u64, Exception> {
        let (_, offset) = self.place(address, desc);
        let linear = self.linear(desc.segment.into(), offset, FIRST_PART, Access::Write)?;
        self.probe(linear, FIRST_PART, Access::Write, self.privilege())?;
        Ok(linear)
    }

    /// Finds the place, or makes a copy. `None`: as for [`Self::slow_access`].
    fn prepare(&mut self, address: u64, desc: &AccessDesc) -> Result<Option<*mut u8>, Exception> {
        if desc.masking.register != 0 {
            return self.masked_access(address, desc).map(Some);
        }
        let size = usize::from(desc.size);
        let access = if desc.flags & AccessDesc::WRITE != 0 { Access::Write } else { Access::Read };
        let (start, offset) = self.place(address, desc);
        self.check_aligned(start, desc)?;
        if desc.wraps_behind(FIRST_PART, offset) {
            return self.access_in_two(offset, desc, access).map(Some);
        }
        let linear = match desc.flags & AccessDesc::UNCHECKED {
            0 => self.linear(desc.segment.into(), offset, size, access)?,
            _ => self.element_linear(desc.segment.into(), offset, 0, size, access)?,
        };
        if self.dr7 & 0xff != 0 {
            crate::debug::data_breakpoints(self, linear, size, access);
        }
        self.emitted.bounce_for = None;
        let privilege = self.privilege();
        if size <= page_rest(linear) {
            match self.resolve(linear, access, privilege)? {
                Target::Ram(host) => {
                    self.emitted.slow_host = host;
                    return Ok(Some(host));
                }
                Target::Mmio(_) => {}
            }
        }
        // Not memory, or on two pages: the instruction works on a copy, at an address of the same alignment.
        self.probe(linear, size, access, privilege)?;
        if desc.flags & AccessDesc::LOCK != 0 && size > page_rest(linear) && !self.emitted.has_world {
            return Ok(None);
        }
        let at = (linear & 63) as usize;
        let mut data = [0; 64];
        if desc.flags & AccessDesc::READ != 0 {
            self.read_as(linear, &mut data[..size], privilege)?;
        }
        self.emitted.bounce[at..at + size].copy_from_slice(&data[..size]);
        self.emitted.bounce_for = Some(linear);
        Ok(Some(self.emitted.bounce[at..].as_mut_ptr()))
    }

    /// An operand of the x87's of ten bytes, the last two of which are at the beginning of the segment.
    fn access_in_two(&mut self, offset: u64, desc: &AccessDesc, access: Access) -> Result<*mut u8, Exception> {
        let (segment, privilege) = (usize::from(desc.segment), self.privilege());
        let mut parts = [(offset, FIRST_PART), (0, usize::from(desc.size) - FIRST_PART)];
        for (at, size) in &mut parts {
            *at = self.linear(segment, *at, *size, access)?;
            self.probe(*at, *size, access, privilege)?;
        }
        if self.dr7 & 0xff != 0 {
            parts.iter().for_each(|&(at, size)| crate::debug::data_breakpoints(self, at, size, access));
        }
        let mut data = [0; 64];
        if desc.flags & AccessDesc::READ != 0 {
            self.read_as(parts[0].0, &mut data[..FIRST_PART], privilege)?;
            self.read_as(parts[1].0, &mut data[FIRST_PART..usize::from(desc.size)], privilege)?;
        }
        let at = (parts[0].0 & 63) as usize;
        self.emitted.bounce[at..at + data.len()].copy_from_slice(&data);
        self.emitted.bounce_for = Some(parts[0].0);
        Ok(self.emitted.bounce[at..].as_mut_ptr())
    }

    /// #GP for an operand that has to be aligned, unless MXCSR says that it need not (APM vol. 1 4.11.2: MM, bit 17).
    fn check_aligned(&self, start: u64, desc: &AccessDesc) -> Result<(), Exception> {
        const MISALIGNED_MODE: u32 = 1 << 17;
        let misaligned = start & u64::from(desc.size.max(1) - 1) != 0;
        if desc.flags & AccessDesc::ALIGNED != 0 && misaligned && self.xstate.mxcsr() & MISALIGNED_MODE == 0 {
            return Err(Exception::GP0);
        }
        Ok(())
    }

    /// An access of which a mask says what is accessed: the instruction works on a copy of that.
    fn masked_access(&mut self, address: u64, desc: &AccessDesc) -> Result<*mut u8, Exception> {
        let size = usize::from(desc.size);
        let access = if desc.flags & AccessDesc::WRITE != 0 { Access::Write } else { Access::Read };
        let (start, first) = self.place(address, desc);
        let mask = self.xstate.opmask(desc.masking.register.into());
        let privilege = self.privilege();
        let mut data = [0; 64];
        let by_ends = access == Access::Write && desc.masking.lanes > 1 && !self.features.amd;
        let mut ends = None;
        for (offset, part) in desc.masking.pieces(mask, size) {
            self.check_aligned(start, desc)?;
            let linear = self.element_linear(desc.segment.into(), first, offset, part, access)?;
            // Of an element on AMD's processors, of the operand on Intel's.
            let (checked, bytes) = if self.features.amd { (linear, part) } else { (start, size) };
            if desc.flags & AccessDesc::UNCHECKED == 0 {
                self.check_alignment(checked, bytes, privilege)?;
            }
            if by_ends {
                let (lowest, _) = ends.unwrap_or((linear, 0));
                ends = Some((lowest, linear.wrapping_add(part as u64 - 1)));
                continue;
            }
            self.probe(linear, part, access, privilege)?;
            if desc.flags & AccessDesc::READ != 0 {
                self.read_as(linear, &mut data[offset..offset + part], privilege)?;
            }
        }
        if let Some((lowest, last)) = ends {
            self.probe_ends(lowest, last)?;
        }
        let at = (start & 63) as usize;
        self.emitted.bounce[at..at + size].copy_from_slice(&data[..size]);
        self.emitted.bounce_for = Some(start);
        self.emitted.bounce_mask = mask;
        Ok(self.emitted.bounce[at..].as_mut_ptr())
    }

    /// The linear address that emitted code asks for, and its offset in the segment.
    fn place(&self, address: u64, desc: &AccessDesc) -> (u64, u64) {
        let base = self.segment_base(desc);
        if desc.flags & AccessDesc::OFFSET != 0 {
            (self.wrap(address.wrapping_add(base)), address)
        } else {
            (address, self.wrap(address.wrapping_sub(base)))
        }
    }

    fn segment_base(&self, desc: &AccessDesc) -> u64 {
        let based = matches!(usize::from(desc.segment), seg::FS | seg::GS) || !self.code64();
        if based { self.seg[usize::from(desc.segment)].base } else { 0 }
    }

    /// Linear addresses have 32 bits outside of 64-bit mode.
    fn wrap(&self, linear: u64) -> u64 {
        if self.code64() { linear } else { linear & 0xffff_ffff }
    }

    /// What the store raises, now that the instruction has done what it does beside it. Whether it raises anything: not if an
    /// x87 exception keeps it from storing. Else an x87 instruction has done nothing, but stored what it could.
    fn raise_late(&mut self, late: LateFault) -> bool {
        if let Some(before) = late.before {
            if self.xstate.keeps_from_storing() {
                return false;
            }
            self.xstate = *before;
        }
        if let Some(linear) = late.first_part {
            let mut data = [0; FIRST_PART];
            data.copy_from_slice(&self.emitted.bounce[..FIRST_PART]);
            let _ = self.write_as(linear, &data, self.privilege());
        }
        self.emitted.pending = Some(late.fault);
        true
    }

    fn commit(&mut self, desc: &AccessDesc) -> bool {
        if let Some(late) = self.emitted.late.take() {
            return self.raise_late(late);
        }
        let size = usize::from(desc.size);
        let Some(linear) = self.emitted.bounce_for.take() else {
            let host = self.emitted.slow_host;
            return self.wrote_ram(host, size);
        };
        let at = (linear & 63) as usize;
        let mut data = [0; 64];
        data[..size].copy_from_slice(&self.emitted.bounce[at..at + size]);
        if desc.masking.register != 0 {
            for (offset, size) in desc.masking.pieces(self.emitted.bounce_mask, size) {
                let address = self.wrap(linear.wrapping_add(offset as u64));
                let _ = self.write_as(address, &data[offset..offset + size], self.privilege());
            }
            return true;
        }
        // Every page of it was checked before the instruction; if another processor has taken one away since, this
        // store is as if it had come later.
        let base = self.segment_base(desc);
        let apart = desc.wraps_behind(FIRST_PART, self.wrap(linear.wrapping_sub(base)));
        let (first, second) = data[..size].split_at(if apart { FIRST_PART } else { size });
        let _ = self.write_as(linear, first, self.privilege());
        if apart {
            let _ = self.write_as(base, second, self.privilege());
        }
        true
    }
}
