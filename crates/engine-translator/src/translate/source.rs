//! From RIP to a block: where the bytes are, what they decode to, and that nobody changes them unnoticed.

use std::sync::{LazyLock, PoisonError};

use iced_x86::{Decoder, DecoderError, DecoderOptions};

use super::{
    cache::{Found, Key, NotAdded},
    classify::{Class, classify},
    emit::{Emitter, Insn},
    flags::{flag_use, live_before},
    jumps::Context,
};
use crate::{
    cpu::Cpu,
    exception::Exception,
    mem::{Access, Target, copy_from_guest, page_rest},
    ram::Page,
};

/// Instructions in a block at most.
const MAX_INSNS: usize = 48;
/// Bytes that are looked at for a block at most.
const MAX_BYTES: usize = 512;
/// Length of an instruction at most.
const MAX_INSN: usize = 15;

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
static BMI2: LazyLock<bool> = LazyLock::new(|| std::is_x86_feature_detected!("bmi2"));

/// The processors of the two vendors decode some prefixes differently; the guest's is of the host's vendor.
pub static DECODER_OPTIONS: LazyLock<u32> =
    LazyLock::new(|| if *AMD { DecoderOptions::AMD } else { DecoderOptions::NONE });

/// The host is AMD's (or Hygon's).
pub static AMD: LazyLock<bool> = LazyLock::new(|| {
    let vendor = std::arch::x86_64::__cpuid(0).ebx.to_le_bytes();
    [*b"Auth", *b"Hygo"].contains(&vendor)
});

/// A piece of source: bytes that were read after their pages had begun to be watched.
struct Source {
    key: Key,
    bytes: [u8; MAX_BYTES],
    len: usize,
    /// Its pages: what they are, where, and how many stores to them there had been.
    pages: [Option<(Page, u64, u64)>; 2],
}

impl Cpu {
    /// The block at `rip`, translated if need be.
    pub fn block(&mut self, context: &Context, rip: u64) -> Result<Found, Stop> {
        let linear = self.fetch_address(context, rip)?;
        let first = self.fetch_page(linear)?;
        let mut key = Key { physical: first.1 | linear & 0xfff, rip, second: 0, context: *context };
        if let Some(found) = self.shared.code.find(&key) {
            return Ok(found);
        }
        loop {
            let mut source = self.source(key, linear, first, None);
            let mut insns = decode(&source, context);
            if insns.is_empty() {
                // Not even one whole instruction on this page.
                let second = self.fetch_page((linear & !0xfff).wrapping_add(0x1000) & address_mask(context))?;
                key.second = second.1 + 1;
                if let Some(found) = self.shared.code.find(&key) {
                    return Ok(found);
                }
                source = self.source(key, linear, first, Some(second));
                insns = decode(&source, context);
                insns.truncate(1);
            }
            if let Some(end) = insns.iter().position(|i| beyond_limit(i, context)) {
                if end == 0 {
                    return Err(Stop::Exception(Exception::GP0));
                }
                insns.truncate(end);
            }
            let next = insns.last().map_or(rip, Insn::next);
            match self.add(&source, context, &insns, next) {
                Ok(found) => return Ok(found),
                Err(NotAdded::Full) => return Err(Stop::Full),
                Err(NotAdded::Stale) => {}
            }
        }
    }

    fn add(&self, source: &Source, context: &Context, insns: &[Insn], next: u64) -> Result<Found, NotAdded> {
        let rip = source.key.rip;
        let len = next.wrapping_sub(rip) as u32;
        let code = &self.shared.code;
        let emit = |origin| {
            let emitter = Emitter::new(origin, &code.stubs, context.mode, context.cs_base, rip, *BMI2);
            emitter.block(rip, insns, next)
        };
        let pages = || source.pages.iter().flatten();
        let stores: Vec<_> = pages().map(|&(_, physical, stores)| (physical, stores)).collect();
        let watched = || pages().all(|(page, ..)| self.shared.ram.is_watched(*page));
        code.add(source.key, len, &stores, watched, emit)
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
    fn source(&mut self, key: Key, linear: u64, first: (Page, u64), second: Option<(Page, u64)>) -> Source {
        let pages = [Some(first), second].map(|page| {
            page.map(|(page, physical)| {
                self.watch(page);
                (page, physical, self.shared.code.stores(physical))
            })
        });
        let mut source = Source { key, bytes: [0; MAX_BYTES], len: page_rest(linear).min(MAX_BYTES), pages };
        let start = first.0.host.wrapping_add((linear & 0xfff) as usize);
        copy_from_guest(start, &mut source.bytes[..source.len]);
        if let Some((page, _)) = second {
            copy_from_guest(page.host, &mut source.bytes[source.len..source.len + MAX_INSN]);
            source.len += MAX_INSN;
        }
        source
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

/// Decodes up to the first instruction that ends a block.
fn decode(source: &Source, context: &Context) -> Vec<Insn> {
    let bits = context.mode.bits();
    let bytes = &source.bytes[..source.len];
    let mut decoder = Decoder::with_ip(bits, bytes, source.key.rip, *DECODER_OPTIONS);
    let max = if context.mode.step() { 1 } else { MAX_INSNS };
    let mut insns: Vec<Insn> = Vec::with_capacity(16);
    while insns.len() < max && decoder.can_decode() {
        let at = decoder.position();
        let insn = decoder.decode();
        if decoder.last_error() == DecoderError::NoMoreBytes && source.len - at < MAX_INSN {
            break;
        }
        let class = classify(&insn, bits);
        let mut copy = [0; MAX_INSN];
        copy[..insn.len()].copy_from_slice(&bytes[at..at + insn.len()]);
        let flags = flag_use(&insn, class);
        let flags = if context.mode.step() { flags.exact() } else { flags };
        insns.push(Insn { insn, class, flags, live: 0, bytes: copy });
        if ends_block(class) {
            break;
        }
    }
    let uses: Vec<_> = insns.iter().map(|i| i.flags).collect();
    for (insn, live) in insns.iter_mut().zip(live_before(&uses)) {
        insn.live = live;
    }
    insns
}

fn ends_block(class: Class) -> bool {
    !matches!(class, Class::Copy | Class::Vector(_) | Class::Nothing | Class::Push | Class::Pop | Class::Leave)
}
