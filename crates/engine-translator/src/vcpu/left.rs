//! How emitted code was left: from what it has stored to what the run loop has to do.
#![allow(unsafe_code)]

use super::TranslatedVcpu;
use crate::{
    mailbox::ATTENTION,
    segment::is_canonical,
    translate::{
        AccessDesc, AcrossDesc, ExitDesc, ExitKind, FaultPoint, LinkDesc, Origin, RefillDesc,
        place::{is_movable, resolve},
    },
};

/// How emitted code was left.
pub(super) enum Left {
    /// It was not entered: a request came in first.
    NotEntered,
    /// A jump to a RIP that no table knew.
    Miss(u64),
    /// This indirect branch led to an address that is not canonical.
    Astray(ExitDesc),
    /// A direct jump that is not linked yet.
    Link {
        /// Where it leads.
        rip: u64,
        /// See [`LinkDesc`].
        flags: u8,
        /// Where it is, and the place behind the conditional jump that leads there; `None` if it is to stay as it is.
        from: Option<(u64, Option<u64>)>,
        /// What it was translated from.
        origin: Origin,
    },
    /// A direct jump to another page that is not linked yet.
    Across {
        /// Its descriptor, and where that is.
        desc: AcrossDesc,
        /// See `desc`.
        at: u64,
        /// It is in movable code.
        movable: bool,
        /// How often the cache had been emptied.
        generation: u64,
    },
    /// An instruction to be emulated.
    Emulate(ExitDesc),
    /// An access raised an exception.
    Fault(AccessDesc),
    /// The run loop is wanted after the instruction.
    After(AccessDesc),
    /// A host signal, at a place that was expected to raise one or not.
    Signal(Option<FaultPoint>),
}

impl TranslatedVcpu {
    /// What emitted code left behind. Still counted as inside: what it points at in the code cache stays.
    pub(super) fn how_left(&mut self) -> Left {
        let code64 = self.cpu().code64();
        let emitted = &self.cpu().emitted;
        let (kind, value) = (ExitKind::from_raw(emitted.exit_kind), emitted.exit_value);
        let (_, _, address, place) = emitted.signal;
        let (branch, page) = (emitted.branch, emitted.code_page);
        // SAFETY: for these kinds emitted code passes the address of such a descriptor.
        let (exit_desc, access_desc) = unsafe {
            (|| ExitDesc::read(value as *const u8).resolved(page), || (*(value as *const AccessDesc)).resolved(page))
        };
        let enter = self.shared.code.stubs.enter;
        let missed = |rip: u64| match code64 && !is_canonical(rip) && branch != 0 {
            // SAFETY: emitted code has stored the descriptor's distance from the first stub on its way here.
            true => Left::Astray(unsafe { ExitDesc::read((enter + branch) as *const u8) }.resolved(page)),
            false => Left::Miss(rip),
        };
        if let Some(profile) = &self.profile {
            profile.left(kind);
        }
        let code = &self.shared.code;
        match kind {
            ExitKind::Miss => missed(value),
            // The poll on the way to a table.
            ExitKind::Signal if place == ATTENTION as u64 && code.is_stub(address) => missed(value),
            ExitKind::Link => {
                // SAFETY: such a descriptor follows the call of this exit, of five bytes.
                let desc = unsafe { LinkDesc::read(value as *const u8) };
                let origin = code.origin(value);
                let from = Some((value - 5, desc.conditional(value)));
                let rip = resolve(desc.rip(origin.rip), page);
                Left::Link { rip, flags: desc.flags(), from, origin }
            }
            ExitKind::Apart => {
                // SAFETY: such a descriptor follows the call of this exit.
                let desc = unsafe { RefillDesc::read(value as *const u8) };
                let origin = code.origin(value);
                let flags = LinkDesc::SAVED | LinkDesc::UNGROUPED;
                Left::Link { rip: resolve(desc.rip(origin.rip), page), flags, from: None, origin }
            }
            ExitKind::Across => {
                // SAFETY: such a descriptor follows the call of this exit.
                let mut desc = unsafe { AcrossDesc::read(value as *const u8) };
                let origin = code.origin(value);
                let movable = is_movable(origin.rip);
                desc.rip = desc.rip.wrapping_add(if movable { page } else { 0 });
                Left::Across { desc, at: value, movable, generation: origin.generation }
            }
            ExitKind::Dead => Left::Miss(resolve(code.origin(value).rip, page)),
            ExitKind::Emulate => Left::Emulate(exit_desc()),
            ExitKind::Fault => Left::Fault(access_desc()),
            ExitKind::After => Left::After(access_desc()),
            ExitKind::Signal => match code.fault_at(address) {
                Some(FaultPoint { rip: None, .. }) => missed(value),
                point => Left::Signal(point.map(|point| point.resolved(page))),
            },
        }
    }
}
