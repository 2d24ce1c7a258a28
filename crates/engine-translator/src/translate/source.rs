//! From RIP to a block: where the bytes are, what they decode to, and that nobody changes them unnoticed.

use std::{
    borrow::Cow,
    sync::{LazyLock, PoisonError},
};

use iced_x86::DecoderOptions;

use super::{
    cache::{Found, JumpTarget, Key, NotAdded},
    emit::{Emitter, Insn},
    jumps::Context,
    place::placed,
    spare,
    trace::{self, Trace},
};
use crate::{
    cpu::Cpu,
    exception::Exception,
    mem::{Access, Target, copy_from_guest},
    profile::Place,
    ram::Page,
};

/// Length of an instruction at most.
pub const MAX_INSN: usize = 15;

/// Why there is no block.
#[derive(Debug)]
pub enum Stop {
    /// The fetch raises an exception.
    Exception(Exception),
    /// The code cache is full: clear it, and try again.
    Full,
    /// The guest executes what is not memory, at this physical address.
    NotMemory(u64),
}

/// The host has BMI2.
pub static BMI2: LazyLock<bool> = LazyLock::new(|| std::is_x86_feature_detected!("bmi2"));

/// The processors of the two vendors decode some prefixes differently; the guest's is of the host's vendor.
pub static DECODER_OPTIONS: LazyLock<u32> =
    LazyLock::new(|| if *AMD { DecoderOptions::AMD } else { DecoderOptions::NONE });

/// The host is AMD's (or Hygon's).
pub static AMD: LazyLock<bool> = LazyLock::new(|| {
    let vendor = std::arch::x86_64::__cpuid(0).ebx.to_le_bytes();
    [*b"Auth", *b"Hygo"].contains(&vendor)
});

/// A piece of source: bytes that were read after their pages had begun to be watched.
pub struct Source<'a> {
    /// What it is the source of.
    pub key: Key,
    /// The block's first byte.
    pub start: usize,
    /// The page of that; behind it the beginning of the next one, if the block needs it.
    bytes: Cow<'a, [u8]>,
    /// Its pages: what they are, where, and how many stores to them there had been.
    pages: [Option<(Page, u64, u64)>; 2],
}

impl Source<'_> {
    /// All that is known.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Copies of pages that blocks were translated from lately: a page is often the source of many.
#[derive(Default)]
pub struct PageCopies(Vec<PageCopy>);

struct PageCopy {
    /// Its physical address, and how many stores to it there had been. It is valid as long as there are no more.
    of: Option<(u64, u64)>,
    bytes: [u8; 4096],
}

/// How many there are: by page number modulo this.
const COPIES: usize = 16;

impl PageCopies {
    /// The bytes of a page that is watched, and has been since there had been `stores` to it, if there are no more by now.
    fn get(&mut self, page: Page, physical: u64, stores: u64) -> &[u8] {
        if self.0.is_empty() {
            self.0.resize_with(COPIES, || PageCopy { of: None, bytes: [0; 4096] });
        }
        let copy = &mut self.0[(physical >> 12) as usize % COPIES];
        if copy.of != Some((physical, stores)) {
            copy.of = Some((physical, stores));
            copy_from_guest(page.host, &mut copy.bytes);
        }
        &copy.bytes
    }
}

impl Cpu {
    /// The block at `rip`, translated if need be.
    pub fn block(&mut self, context: &Context, rip: u64) -> Result<Found, Stop> {
        self.is_at(Place::Lookup);
        let found = self.find_or_translate(context, rip);
        self.is_at(Place::Loop);
        found
    }

    /// Says what the thread is doing.
    fn is_at(&self, place: Place) {
        if let Some(mailbox) = self.shared.mailbox(self.index as usize) {
            mailbox.phase.set(place);
        }
    }

    /// The entry of the block at `rip` in the context under way, if there is one and nothing out of the way is needed to
    /// find it.
    pub fn find_quickly(&mut self, rip: u64) -> Option<u64> {
        let context = self.emitted.context;
        let linear = self.fetch_address(&context, rip).ok()?;
        if linear & 0xfff > (4096 - MAX_INSN) as u64 || !self.emitted.jumps()?.has_room(context.mode.table()) {
            return None;
        }
        let (_, physical) = self.fetch_page(linear).ok()?;
        let key = Key { physical: physical | linear & 0xfff, rip: placed(context.mode, rip), second: 0, context };
        let generation = self.emitted.generation;
        let target = match self.recent.get(&key, generation) {
            Some(target) => target,
            None => {
                let target = self.shared.code.find(&key)?.target();
                self.recent.set(&key, target, generation);
                target
            }
        };
        self.remember(&context, rip, target);
        Some(target.by_rip)
    }

    /// Lets indirect jumps to `rip` find `target`, and direct ones to its page know that.
    pub fn remember(&mut self, context: &Context, rip: u64, target: JumpTarget) {
        let wide = context.mode.bits() == 64;
        let within = |linear: u64| if wide { linear } else { linear & 0xffff_ffff };
        let first = within(context.cs_base.wrapping_add(rip));
        let second = if target.page_id.is_some() { first } else { within((first & !0xfff).wrapping_add(0x1000)) };
        let privilege = context.mode.privilege();
        let global = [first, second].iter().all(|&linear| self.tlb.is_global_code(privilege, linear));
        if let Some(jumps) = self.emitted.jumps() {
            let table = context.mode.table();
            jumps.set(table, rip, [first, second], target.by_rip, global);
            if let Some(page_id) = target.page_id {
                jumps.set_page(table, first, page_id, global);
            }
        }
    }

    fn find_or_translate(&mut self, context: &Context, rip: u64) -> Result<Found, Stop> {
        let linear = self.fetch_address(context, rip)?;
        let first = self.fetch_page(linear)?;
        let placed = placed(context.mode, rip);
        let key = Key { physical: first.1 | linear & 0xfff, rip: placed, second: 0, context: *context };
        if let Some(found) = self.shared.code.find(&key) {
            self.recent.set(&key, found.target(), self.emitted.generation);
            return Ok(found);
        }
        if linear & 0xfff > (4096 - MAX_INSN) as u64 && self.shared.code.crosses(&key) {
            let second = self.fetch_page((linear & !0xfff).wrapping_add(0x1000) & address_mask(context))?;
            if let Some(found) = self.shared.code.find(&Key { second: second.1 + 1, ..key }) {
                return Ok(found);
            }
        }
        let hot = self.shared.code.is_hot(&key);
        self.is_at(Place::Translation);
        let mut copies = std::mem::take(&mut self.copies);
        let found = self.translate(key, context, linear, first, hot, &mut copies);
        self.copies = copies;
        if let Ok(found) = &found {
            self.recent.set(&key, found.target(), self.emitted.generation);
        }
        found
    }

    /// A new block for `key`, whose first byte is at `linear` on page `first`.
    fn translate(
        &mut self,
        mut key: Key,
        context: &Context,
        linear: u64,
        first: (Page, u64),
        hot: bool,
        copies: &mut PageCopies,
    ) -> Result<Found, Stop> {
        loop {
            let mut source = self.source(key, linear, first, None, copies);
            let mut trace = trace::trace(&source, context, hot);
            if trace.insns.is_empty() {
                // Not even one whole instruction on this page.
                let second = self.fetch_page((linear & !0xfff).wrapping_add(0x1000) & address_mask(context))?;
                key.second = second.1 + 1;
                if let Some(found) = self.shared.code.find(&key) {
                    return Ok(found);
                }
                source = self.source(key, linear, first, Some(second), copies);
                trace = trace::trace(&source, context, hot);
            }
            if let Some(end) = trace.insns.iter().position(|i| beyond_limit(i, context)) {
                if end == 0 {
                    return Err(Stop::Exception(Exception::GP0));
                }
                trace.insns.truncate(end);
                trace.next = trace.insns[end - 1].next();
            }
            if let Some(rip) = trace.closes {
                // What goes round there is hot as a whole; laid out from its beginning it closes on itself.
                let physical = key.physical & !0xfff | rip & 0xfff;
                self.shared.code.make_hot(Key { physical, rip, ..key });
            }
            let added = self.add(&source, context, &trace, hot);
            spare::return_insns(trace.insns);
            match added {
                Ok(found) => return Ok(found),
                Err(NotAdded::Full) => return Err(Stop::Full),
                Err(NotAdded::Stale) => {}
            }
        }
    }

    fn add(&self, source: &Source, context: &Context, trace: &Trace, hot: bool) -> Result<Found, NotAdded> {
        let rip = source.key.rip;
        let code = &self.shared.code;
        let emit = |origin, known: &dyn Fn(u64) -> Option<Found>| {
            let emitter = Emitter::new(origin, &code.stubs, known, context, rip, hot);
            let emitted = emitter.block(&trace.insns, trace.next);
            if let Some(profile) = &self.shared.profile {
                profile.translated(hot, emitted.asm.all().len());
            }
            emitted
        };
        let pages = || source.pages.iter().flatten();
        let stores: Vec<_> = pages().map(|&(_, physical, stores)| (physical, stores)).collect();
        let watched = || pages().all(|(page, ..)| self.shared.ram.is_watched(*page));
        code.add(source.key, trace.span, &stores, watched, emit)
    }

    /// The linear address of `rip`.
    fn fetch_address(&self, context: &Context, rip: u64) -> Result<u64, Stop> {
        if context.mode.bits() == 64 {
            let canonical = (rip as i64) << 16 >> 16 == rip as i64;
            return if canonical { Ok(rip) } else { Err(Stop::Exception(Exception::GP0)) };
        }
        if rip > u64::from(context.cs_limit) {
            return Err(Stop::Exception(Exception::GP0));
        }
        Ok(context.cs_base.wrapping_add(rip) & 0xffff_ffff)
    }

    /// The page of linear `address`, and its physical address.
    fn fetch_page(&mut self, address: u64) -> Result<(Page, u64), Stop> {
        let target = self.resolve(address, Access::Fetch, self.privilege()).map_err(Stop::Exception)?;
        let host = match target {
            Target::Ram(host) => host,
            Target::Mmio(physical) => return Err(Stop::NotMemory(physical)),
        };
        self.shared.ram.page_of_host(host).ok_or(Stop::NotMemory(0))
    }

    /// The bytes at `linear`. Their pages are watched before they are read.
    fn source<'a>(
        &mut self,
        key: Key,
        linear: u64,
        first: (Page, u64),
        second: Option<(Page, u64)>,
        copies: &'a mut PageCopies,
    ) -> Source<'a> {
        let pages = [Some(first), second].map(|page| {
            page.map(|(page, physical)| {
                // In this order: as long as there are no more stores, none has ended the watch either.
                let stores = self.shared.code.stores(physical);
                self.watch(page);
                (page, physical, stores)
            })
        });
        let (page, physical, stores) = (first.0, first.1, pages[0].map_or(0, |(.., stores)| stores));
        let mut bytes = Cow::Borrowed(copies.get(page, physical, stores));
        if let Some((page, _)) = second {
            let mut rest = [0; MAX_INSN];
            copy_from_guest(page.host, &mut rest);
            bytes.to_mut().extend(rest);
        }
        Source { key, start: (linear & 0xfff) as usize, bytes, pages }
    }

    /// From here on every store to `page` is noticed.
    fn watch(&mut self, page: Page) {
        let shared = self.shared.clone();
        // Who finds the page watched already must not go on before those who may still store to it have been heard.
        let _watching = shared.watching.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(writers) = shared.ram.watch(page) {
            self.tlb.forbid_stores(page.host as u64);
            shared.forbid_stores(writers, page.host as u64, self.index);
        }
    }
}

fn address_mask(context: &Context) -> u64 {
    if context.mode.bits() == 64 { u64::MAX } else { 0xffff_ffff }
}

fn beyond_limit(insn: &Insn, context: &Context) -> bool {
    context.mode.bits() != 64 && insn.rip() + insn.insn.len() as u64 - 1 > u64::from(context.cs_limit)
}
