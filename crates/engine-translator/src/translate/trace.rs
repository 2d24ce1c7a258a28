//! Which instructions a block is made of: those up to the next jump, or, where the code is hot, the path that the guest
//! probably takes from the first one.
//!
//! A path stays on its page. It goes on behind conditional jumps that lead forward, with direct jumps forward and behind
//! calls, and goes round a loop that closes at its beginning several times. So what is found out about an instruction (which
//! flags matter, that an address is on a page that may be accessed) serves many of those behind it.

use iced_x86::{Decoder, DecoderError};

use super::{
    classify::{Class, classify, fills_returns, inlined},
    emit::Insn,
    flags::{FlagUse, STATUS, flag_use},
    jumps::Context,
    source::{BMI2, DECODER_OPTIONS, MAX_INSN, Source},
    spare,
};

/// Instructions in a block at most.
const MAX_INSNS: usize = 64;
/// How often a loop is laid out one time after the other at most.
const MAX_ROUNDS: usize = 8;
/// Instructions behind a jump that are looked at for what they do to the flags.
const LOOK_AHEAD: usize = 8;
/// The same where the code is not hot.
pub const SHORT_LOOK_AHEAD: usize = 4;

/// The instructions of a block.
pub struct Trace {
    /// In the order of execution.
    pub insns: Vec<Insn>,
    /// Where execution goes on if the last one does not say.
    pub next: u64,
    /// Of hot code: the beginning of a loop that closes at its end, if that is not its own.
    pub closes: Option<u64>,
    /// Offsets in the first page of the first byte that the block depends on, and of the one behind the last.
    pub span: (u32, u32),
}

/// Finds the path from the source's first byte. It is empty if there is not even one whole instruction.
pub fn trace(source: &Source, context: &Context, hot: bool) -> Trace {
    Tracer::new(source, context, hot).run()
}

struct Tracer<'a> {
    source: &'a Source<'a>,
    context: &'a Context,
    hot: bool,
    decoder: Decoder<'a>,
    trace: Trace,
    /// The flags that are live behind the last instruction if it does not leave the block.
    live: u32,
}

impl<'a> Tracer<'a> {
    fn new(source: &'a Source<'a>, context: &'a Context, hot: bool) -> Self {
        let bytes = source.bytes();
        let decoder = Decoder::with_ip(context.mode.bits(), bytes, source.key.rip, *DECODER_OPTIONS);
        let start = source.start as u32;
        let trace = Trace { insns: spare::insns(), next: source.key.rip, closes: None, span: (start, start) };
        Self { source, context, hot, decoder, trace, live: STATUS }
    }

    fn run(mut self) -> Trace {
        self.go_to(self.source.key.rip);
        let single = self.context.mode.step() || self.source.key.second != 0;
        let max = if single { 1 } else { MAX_INSNS };
        let mut rounds = 1;
        while self.trace.insns.len() < max {
            let Some(mut insn) = self.decode() else { break };
            self.trace.next = insn.next();
            insn.onward = self.onward(&insn, &mut rounds);
            self.settle_flags(&mut insn);
            self.trace.insns.push(insn);
            match insn.onward {
                Some(rip) => self.go_to(rip),
                None if ends_block(insn.class) => {
                    self.trace.closes = self.closes(&insn);
                    return self.finish();
                }
                None => {}
            }
        }
        if !single && let Some(last) = self.trace.insns.last() {
            let next = last.onward.unwrap_or(last.next());
            self.trace.next = next;
            self.live = self.live_at(next);
        }
        self.finish()
    }

    fn finish(mut self) -> Trace {
        let mut live = self.live;
        for insn in self.trace.insns.iter_mut().rev() {
            live = live & !insn.flags.kills | insn.flags.reads;
            insn.live = live;
        }
        self.trace
    }

    /// Position in the source of what lies on the block's page.
    fn position(&self, rip: u64) -> Option<usize> {
        let offset = rip.wrapping_sub(self.source.key.rip) as i64 + self.source.start as i64;
        usize::try_from(offset).ok().filter(|&offset| offset < 4096)
    }

    fn go_to(&mut self, rip: u64) {
        if let Some(position) = self.position(rip)
            && self.decoder.set_position(position).is_ok()
        {
            self.decoder.set_ip(rip);
        }
    }

    /// The next instruction, if all of it is there.
    fn decode(&mut self) -> Option<Insn> {
        if !self.decoder.can_decode() {
            return None;
        }
        let bytes = self.source.bytes();
        let at = self.decoder.position();
        let insn = self.decoder.decode();
        if self.decoder.last_error() == DecoderError::NoMoreBytes && bytes.len() - at < MAX_INSN {
            return None;
        }
        let class = self.class(&insn, &bytes[at..]);
        let mut copy = [0; MAX_INSN];
        copy[..insn.len()].copy_from_slice(&bytes[at..at + insn.len()]);
        let end = (at + insn.len()).min(4096) as u32;
        self.trace.span = (self.trace.span.0.min(at as u32), self.trace.span.1.max(end));
        Some(Insn { insn, class, flags: flag_use(&insn, class), live: 0, bytes: copy, onward: None })
    }

    fn class(&self, insn: &iced_x86::Instruction, code: &[u8]) -> Class {
        let mode = self.context.mode;
        let plain = mode.bits() == 64 && !mode.step();
        let own = (plain && *BMI2).then(|| inlined(insn, mode)).flatten();
        match own.unwrap_or_else(|| classify(insn, mode.bits())) {
            Class::Call if plain && fills_returns(code) => Class::Filler,
            class => class,
        }
    }

    /// Where the path goes on behind a jump; `None` if it ends there.
    fn onward(&self, insn: &Insn, rounds: &mut usize) -> Option<u64> {
        // Limits of code segments are checked by whoever asked, for a path without jumps.
        if !self.hot || self.context.mode.bits() != 64 || self.context.mode.step() || self.source.key.second != 0 {
            return None;
        }
        let target = insn.insn.near_branch_target();
        let forward = target > insn.rip() && self.position(target).is_some();
        match insn.class {
            Class::Jump | Class::Filler if forward => Some(target),
            Class::Call | Class::CallIndirect => self.position(insn.next()).map(|_| insn.next()),
            Class::JumpIf if target > insn.rip() => self.position(insn.next()).map(|_| insn.next()),
            Class::Jump | Class::JumpIf if target == self.source.key.rip => {
                let round = (self.trace.insns.len() + 1) / *rounds;
                let room = self.trace.insns.len() + 1 + round <= MAX_INSNS;
                (room && *rounds < MAX_ROUNDS && self.context.mode.grouped()).then(|| {
                    *rounds += 1;
                    target
                })
            }
            _ => None,
        }
    }

    /// The beginning of a loop that the last instruction closes, if that is elsewhere on the page.
    fn closes(&self, last: &Insn) -> Option<u64> {
        let target = last.insn.near_branch_target();
        let jump = matches!(last.class, Class::Jump | Class::JumpIf);
        let elsewhere = target != self.source.key.rip && self.position(target).is_some();
        (self.hot && jump && target <= last.rip() && elsewhere).then_some(target)
    }

    /// What the instruction needs of the flags, where it leads to included.
    fn settle_flags(&mut self, insn: &mut Insn) {
        if self.context.mode.step() {
            insn.flags = insn.flags.exact();
            return;
        }
        let target = insn.insn.near_branch_target();
        match (insn.class, insn.onward) {
            // All flags are passed on; but the callee's block may have but one entry because of what its bytes say.
            (Class::Call, _) => {
                self.live_at(target);
            }
            (Class::Jump | Class::Filler, Some(_)) => insn.flags = FlagUse::default(),
            (Class::Jump | Class::Filler, None) => insn.flags.reads = self.live_at(target),
            (Class::JumpIf, Some(onward)) => {
                let other = if onward == target { insn.next() } else { target };
                insn.flags.reads = insn.insn.rflags_read() & STATUS | self.live_at(other);
            }
            (Class::JumpIf | Class::Loop, None) => {
                let both = self.live_at(target) | self.live_at(insn.next());
                insn.flags.reads = insn.insn.rflags_read() & STATUS | both;
            }
            _ => {}
        }
    }

    /// The flags that are live at `rip`, as far as it is known.
    fn live_at(&mut self, rip: u64) -> u32 {
        if self.context.mode.bits() != 64 || self.position(rip).is_none() {
            return STATUS;
        }
        let (position, ip) = (self.decoder.position(), self.decoder.ip());
        self.go_to(rip);
        let (mut live, mut killed) = (0, 0);
        for _ in 0..if self.hot { LOOK_AHEAD } else { SHORT_LOOK_AHEAD } {
            let Some(insn) = self.decode() else { break };
            live |= insn.flags.reads & !killed;
            killed |= insn.flags.kills;
            if ends_block(insn.class) || killed == STATUS {
                break;
            }
        }
        // Back to where the path is: that was a valid position.
        let _ = self.decoder.set_position(position);
        self.decoder.set_ip(ip);
        live | STATUS & !killed
    }
}

/// Whether nothing behind the instruction is executed unless a jump leads there.
pub fn ends_block(class: Class) -> bool {
    use Class::{Cli, Copy, Leave, Nothing, Own, Pop, Push, Pushf, Sti, Swapgs, Vector};
    !matches!(class, Copy | Vector(_) | Nothing | Push | Pop | Leave | Cli | Sti | Swapgs | Pushf | Own(_))
}
