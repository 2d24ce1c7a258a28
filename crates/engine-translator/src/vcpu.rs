//! The run loop of one vCPU: emitted code, emulated instructions, events, in turn.
#![allow(unsafe_code)]

use std::sync::{Arc, atomic::Ordering};

use iced_x86::Decoder;
use purlin_arch::x86_64::{
    regs::{cr4, gpr, rflags},
    state::{Activity, VcpuState},
};
use purlin_engine::{Bus, EngineError, Exit, Vcpu};

mod left;

use self::left::Left;
use crate::{
    cpu::{Block, Cpu},
    debug,
    decoded::DecodedCache,
    exception::{Exception, vector},
    interrupt::{self, Event, Shutdown},
    lapic,
    mailbox::{ATTENTION, Mailbox, request},
    profile::{Place, VcpuProfile},
    reset,
    system::emulate,
    timer::{SampleTimer, WakeTimer},
    translate::{AccessDesc, Context, ExitDesc, FaultPoint, LinkDesc, Stop, source::DECODER_OPTIONS},
    vm::{BlockPtr, Blocks, Shared},
    xstate,
};

/// One vCPU, taken by the thread that runs it.
pub struct TranslatedVcpu {
    block: BlockPtr,
    shared: Arc<Shared>,
    /// Keeps the block alive.
    _blocks: Arc<Blocks>,
    /// Whether supervisor code is to have the vector registers in the host's the next time it is entered.
    vectors: bool,
    /// Whether every block is to be one instruction, whatever the flags say.
    single: bool,
    /// Whether exceptions are for the caller.
    returns_exceptions: bool,
    timer: WakeTimer,
    decoded: DecodedCache,
    samples: SampleTimer,
    profile: Option<Arc<VcpuProfile>>,
}

// SAFETY: the block's `Cpu` belongs to whoever holds the vCPU, and all in it may move between threads.
unsafe impl Send for TranslatedVcpu {}

/// Why the inner loop stops.
enum Leave {
    /// The outer loop looks at requests, events and modes again; no instruction was completed for certain.
    Look,
    /// The same, after at least one instruction.
    Done,
    /// The next block can be entered at once: nothing but modes may have changed.
    GoOn,
    /// An exception is to be delivered.
    Raise(Exception),
    /// One could not be.
    ShutDown,
    /// The code cache is full.
    Full,
    /// The vCPU cannot go on.
    Fail(String),
}

impl TranslatedVcpu {
    /// Takes the vCPU that `block` is. Nobody else has.
    pub fn new(block: BlockPtr, shared: Arc<Shared>, blocks: Arc<Blocks>) -> Self {
        let profile = block.mailbox().profile.get().cloned();
        Self {
            block,
            shared,
            _blocks: blocks,
            vectors: false,
            returns_exceptions: false,
            single: false,
            timer: WakeTimer::default(),
            decoded: DecodedCache::default(),
            samples: SampleTimer::default(),
            profile,
        }
    }

    fn mailbox(&self) -> &'static Mailbox {
        // SAFETY: the block lives as long as `self.shared`, which is longer than any use within a method here.
        unsafe { &(*self.block.0.as_ptr()).mailbox }
    }

    fn cpu(&mut self) -> &mut Cpu {
        // SAFETY: this is the only handle on the vCPU, borrowed mutably.
        unsafe { &mut *(*self.block.0.as_ptr()).cpu.get() }
    }

    fn run_on(&mut self, bus: &dyn Bus) -> Result<Exit, EngineError> {
        // SAFETY: the lifetime is erased for the time of this call; it is cleared before it ends.
        let bus: *const dyn Bus = unsafe { std::mem::transmute::<&dyn Bus, &'static dyn Bus>(bus) };
        self.cpu().bus = Some(bus);
        crate::clock::refresh(self.cpu());
        set_gs_base(self.block.0.as_ptr() as u64);
        self.timer.start();
        self.samples.start(self.mailbox());
        self.cpu().emitted.delivers = true;
        let result = self.go();
        self.cpu().emitted.delivers = false;
        self.samples.stop();
        self.timer.stop();
        self.cpu().bus = None;
        result
    }

    fn go(&mut self) -> Result<Exit, EngineError> {
        loop {
            if self.mailbox().wants_attention() {
                let requests = self.mailbox().take();
                if self.handle(requests) {
                    return Ok(Exit::Kicked);
                }
            }
            self.arm_timer();
            let cpu = self.cpu();
            if std::mem::take(&mut cpu.leave) {
                return Ok(Exit::Kicked);
            }
            if let Some(event) = self.next_event() {
                if let Err(Shutdown) = self.deliver(event) {
                    return Ok(self.shut_down());
                }
                continue;
            }
            if self.cpu().activity != Activity::Running {
                let timeout = self
                    .cpu()
                    .lapic
                    .timer_deadline()
                    .map(|d| std::time::Duration::from_nanos(d.saturating_sub(crate::clock::monotonic_ns())));
                if timeout.is_some_and(|t| t.is_zero()) {
                    lapic::take_requests(self.cpu(), request::TIMER);
                } else {
                    self.samples.pause();
                    self.mailbox().sleep(timeout);
                    self.samples.go_on();
                }
                continue;
            }
            match self.execute() {
                Leave::Look | Leave::Done | Leave::GoOn => {}
                Leave::Full => self.clear_code(),
                Leave::Raise(exception) => {
                    if let Err(Shutdown) = self.deliver(Event::Exception(exception)) {
                        return Ok(self.shut_down());
                    }
                }
                Leave::ShutDown => return Ok(self.shut_down()),
                Leave::Fail(reason) => {
                    let rip = self.cpu().rip;
                    return Err(EngineError::Failed { engine: "translator", rip, reason });
                }
            }
        }
    }

    /// A triple fault. The processor stays shut down until it is reset.
    fn shut_down(&mut self) -> Exit {
        Exit::Shutdown { rip: self.cpu().rip }
    }

    /// Deals with what other threads have left. True if the run is to end.
    fn handle(&mut self, requests: u32) -> bool {
        // First: at a safe point another one may empty the code cache.
        if requests & request::SAMPLE != 0 {
            let place = self.shared.code.sampled(self.mailbox().sample.load(Ordering::Relaxed));
            if let (Some(profile), Some(place)) = (&self.shared.profile, place) {
                profile.sampled(place);
            }
        }
        if requests & request::SAFE_POINT != 0 {
            self.safe_point();
        }
        let cpu = self.cpu();
        lapic::take_requests(cpu, requests);
        if requests & request::NMI != 0 {
            cpu.nmi_pending = true;
        }
        if requests & request::INIT != 0 {
            reset::init(cpu);
        }
        if requests & request::SIPI != 0
            && let Some(vector) = lapic::startup(cpu)
        {
            reset::sipi(cpu, vector);
        }
        requests & request::KICK != 0
    }

    /// Others wait for this one to be outside of emitted code, where it is.
    fn safe_point(&mut self) {
        let _phase = self.mailbox().phase.during(Place::Waiting);
        // Whoever empties the code cache holds this.
        drop(self.shared.world.lock());
        let forbidden = std::mem::take(&mut *self.mailbox().forbidden.lock().unwrap_or_else(|e| e.into_inner()));
        let generation = self.shared.code.generation();
        let cpu = self.cpu();
        for host in forbidden {
            cpu.tlb.forbid_stores(host);
        }
        if generation != cpu.emitted.generation {
            cpu.emitted.generation = generation;
            cpu.emitted.forget_jumps();
        }
    }

    fn arm_timer(&mut self) {
        let deadline = self.cpu().lapic.timer_deadline();
        let mailbox: *const Mailbox = self.mailbox();
        self.timer.arm(deadline, mailbox);
    }

    /// The event that comes before the next instruction (SDM vol. 3A table 6-2).
    fn next_event(&mut self) -> Option<Event> {
        let extint = self.shared.extint.load(Ordering::Acquire);
        let cpu = self.cpu();
        if let Some(event) = cpu.injected.take() {
            return Some(event);
        }
        if cpu.activity == Activity::WaitForSipi {
            return None;
        }
        let open = !cpu.sti_shadow && !cpu.mov_ss_shadow;
        if cpu.nmi_pending && !cpu.nmi_masked && open {
            cpu.nmi_pending = false;
            return Some(Event::Nmi);
        }
        if cpu.rflags & rflags::IF == 0 || !open {
            return None;
        }
        // The 8259's line is wired to the bootstrap processor's LINT0 alone.
        if extint && cpu.index == 0 && cpu.lapic.accepts_extint() {
            return Some(Event::Interrupt(cpu.bus().acknowledge_interrupt()));
        }
        cpu.lapic.pending()?;
        Some(Event::Interrupt(cpu.lapic.acknowledge()))
    }

    fn deliver(&mut self, event: Event) -> Result<(), Shutdown> {
        let _phase = self.mailbox().phase.during(Place::Events);
        interrupt::deliver(self.cpu(), event)
    }

    /// Executes guest instructions until something else has to be looked at.
    fn execute(&mut self) -> Leave {
        let single = self.single;
        let alone = std::mem::take(&mut self.cpu().emitted.wants_world);
        let shadow = self.cpu().sti_shadow || self.cpu().mov_ss_shadow;
        let cpu = self.cpu();
        let trapping = cpu.rflags & rflags::TF != 0;
        let breakpoints = cpu.dr7 & 0xff != 0;
        // An event that a shadow holds back wants to come right after the next instruction.
        let held_back = shadow && (cpu.interrupt_waits() || cpu.nmi_pending);
        let step = trapping || breakpoints || held_back || cpu.pending_debug != 0 || single || alone;
        if breakpoints && let Some(exception) = debug::instruction_breakpoint(cpu) {
            return Leave::Raise(exception);
        }
        let context = self.next_context(step);
        let cpu = self.cpu();
        // The shadow ends with the instruction that comes now, unless that makes a new one.
        let rip = cpu.rip;
        let before = (std::mem::take(&mut cpu.sti_shadow), std::mem::take(&mut cpu.mov_ss_shadow));
        if !step {
            // It matters only where there are instruction breakpoints.
            cpu.rflags &= !rflags::RF;
        }
        let leave = if alone { self.run_alone(&context) } else { self.run_emitted(&context, step) };
        let cpu = self.cpu();
        match leave {
            Leave::Done => {
                let due = step || cpu.pending_debug != 0;
                if due && let Some(exception) = debug::trap_after(cpu, trapping) {
                    return Leave::Raise(exception);
                }
            }
            // No instruction was completed, or a loop is back here: an event that came in meanwhile still has to wait
            // for the end of one. (Between STI and HLT it would wake nobody.)
            Leave::Look | Leave::Full if cpu.rip == rip => (cpu.sti_shadow, cpu.mov_ss_shadow) = before,
            _ => {}
        }
        leave
    }

    /// The context that emitted code is entered in.
    fn next_context(&mut self, step: bool) -> Context {
        // User code keeps the vector registers in the host's once it has used them; supervisor code rarely uses them,
        // and has them until it next leaves emitted code: saving and loading them costs more than that exit.
        let user = self.cpu().cpl == 3;
        let vectors = if user { self.cpu().emitted.user_vectors } else { std::mem::take(&mut self.vectors) };
        self.cpu().context(vectors, step)
    }

    /// Executes one instruction while no other vCPU is in emitted code: a locked access to two pages, which is made in
    /// pieces.
    fn run_alone(&mut self, context: &Context) -> Leave {
        let shared = self.shared.clone();
        let index = self.cpu().index;
        let _world = shared.stop_world(index);
        self.cpu().emitted.has_world = true;
        let leave = self.run_emitted(context, true);
        self.cpu().emitted.has_world = false;
        leave
    }

    /// Enters emitted code at RIP, and again as long as it leaves only to find the next block, or for an instruction or
    /// an exception behind which nothing else is to be done.
    fn run_emitted(&mut self, context: &Context, step: bool) -> Leave {
        let mut context = *context;
        loop {
            match self.run_in(&context, step) {
                Leave::GoOn if !step => {}
                Leave::GoOn => return Leave::Done,
                Leave::Raise(exception) if !step && !self.returns_exceptions => {
                    if let Err(Shutdown) = self.deliver(Event::Exception(exception)) {
                        return Leave::ShutDown;
                    }
                    if self.is_disturbed() {
                        return Leave::GoOn;
                    }
                }
                leave => return leave,
            }
            context = self.next_context(false);
            self.cpu().rflags &= !rflags::RF;
        }
    }

    /// The same in one context, or those that emitted code goes to by itself (see `translate/transfers.rs`).
    fn run_in(&mut self, context: &Context, step: bool) -> Leave {
        let cpu = self.cpu();
        // An interrupt that waits for the flag: STI must not pass by. (What was emulated last may have made one deliverable.)
        cpu.emitted.waiting = cpu.rflags & rflags::IF == 0 && cpu.interrupt_waits();
        cpu.emitted.vectors = u32::from(context.mode.vectors());
        cpu.emitted.flag_word = to_flag_word(cpu.rflags);
        cpu.emitted.context = *context;
        let mut context = *context;
        let rip = cpu.rip;
        let mut known = cpu.emitted.jumps().and_then(|jumps| {
            jumps.enter(&context);
            jumps.get(context.mode.table(), rip)
        });
        loop {
            let rip = self.cpu().rip;
            let entry = match known.filter(|_| !step) {
                Some(entry) => entry,
                None => match self.cpu().block(&context, rip) {
                    Ok(found) => {
                        self.cpu().remember(&context, rip, found.target());
                        found.by_rip
                    }
                    Err(stop) => return self.stopped(stop),
                },
            };
            let left = self.enter(entry);
            let emitted = &mut self.cpu().emitted;
            if emitted.context != context {
                context = emitted.context;
                if let Some(jumps) = emitted.jumps() {
                    jumps.enter(&context);
                }
            }
            // The others' have been saved.
            emitted.vectors = u32::from(context.mode.vectors());
            match left {
                Left::NotEntered => return Leave::Look,
                Left::Miss(rip) => {
                    self.cpu().rip = rip;
                    if step {
                        self.look();
                        self.cpu().rflags &= !rflags::RF;
                        return Leave::Done;
                    }
                    known = None;
                }
                Left::Link { rip, flags, from, origin } => {
                    self.cpu().rip = rip;
                    if let Some(exception) = self.cpu().refill_fault() {
                        self.look();
                        return Leave::Raise(exception);
                    }
                    let ungrouped = flags & LinkDesc::UNGROUPED != 0;
                    let context = if ungrouped { context.ungrouped() } else { context };
                    match self.cpu().block(&context, rip) {
                        Ok(found) => {
                            let saved = flags & LinkDesc::SAVED != 0;
                            if let Some((from, conditional)) = from.filter(|_| found.linkable) {
                                let entry = if saved { found.saved_entry } else { found.entry };
                                self.shared.code.link(from, conditional, &origin, entry, &found);
                            }
                            known = Some(found.by_rip);
                        }
                        Err(stop) => return self.stopped(stop),
                    }
                }
                Left::Across { desc, at, movable, generation } => {
                    self.cpu().rip = desc.rip;
                    match self.cpu().block(&context, desc.rip) {
                        Ok(found) => {
                            self.cpu().remember(&context, desc.rip, found.target());
                            self.shared.code.link_across(at, desc.check(at), movable, generation, &found);
                            known = Some(found.by_rip);
                        }
                        Err(stop) => return self.stopped(stop),
                    }
                }
                other => return self.left(other),
            }
        }
    }

    /// The status flags go back to RFLAGS; the outer loop decides.
    fn look(&mut self) -> Leave {
        let cpu = self.cpu();
        cpu.rflags = from_flag_word(cpu.rflags, cpu.emitted.flag_word);
        Leave::Look
    }

    fn clear_code(&mut self) {
        let index = self.cpu().index;
        self.shared.clear_code(index);
        // (Another one may have done the same just before.)
        self.cpu().emitted.generation = self.shared.code.generation();
        self.cpu().emitted.forget_jumps();
    }

    fn stopped(&mut self, stop: Stop) -> Leave {
        self.look();
        match stop {
            Stop::Exception(exception) => Leave::Raise(exception),
            Stop::Full => Leave::Full,
            Stop::NotMemory(physical) => {
                Leave::Fail(format!("the guest executes at physical address {physical:#x}, where there is no memory"))
            }
        }
    }

    /// Emitted code was left for more than the next block.
    fn left(&mut self, left: Left) -> Leave {
        match left {
            Left::Emulate(desc) => {
                self.look();
                self.emulate(&desc)
            }
            Left::Astray(branch) => {
                self.look();
                let insn = Decoder::with_ip(64, &branch.bytes, branch.rip, *DECODER_OPTIONS).decode();
                let cpu = self.cpu();
                // It is the branch that faults, before it has done anything.
                cpu.rip = branch.rip;
                cpu.gpr[gpr::RSP] = cpu.gpr[gpr::RSP].wrapping_sub(insn.stack_pointer_increment() as u64);
                Leave::Raise(Exception::GP0)
            }
            Left::Fault(desc) => {
                self.look();
                let cpu = self.cpu();
                cpu.rip = desc.rip;
                match cpu.emitted.pending.take() {
                    Some(exception) => Leave::Raise(exception),
                    // It comes again, with the world stopped.
                    None => Leave::Look,
                }
            }
            Left::After(desc) => {
                let cpu = self.cpu();
                cpu.rip = desc.next;
                if desc.flags & AccessDesc::SAVED_AFTER == 0 {
                    cpu.emitted.flag_word = cpu.emitted.late_flag_word;
                }
                if let Some(late) = cpu.emitted.pending.take() {
                    cpu.rip = desc.rip;
                    self.look();
                    return Leave::Raise(late);
                }
                self.look();
                self.cpu().rflags &= !rflags::RF;
                Leave::Done
            }
            Left::Signal(point) => self.signalled(point),
            Left::NotEntered | Left::Miss(_) | Left::Link { .. } | Left::Across { .. } => Leave::Look,
        }
    }

    /// A copied instruction, or the poll of the mailbox, raised a host signal.
    fn signalled(&mut self, point: Option<FaultPoint>) -> Leave {
        let cpu = self.cpu();
        let (signal, trap, address, place) = cpu.emitted.signal;
        let unexpected = move || {
            Leave::Fail(format!(
                "signal {signal} (exception {trap}, address {place:#x}) in emitted code at {address:#x}"
            ))
        };
        let Some(point) = point else {
            self.look();
            return unexpected();
        };
        cpu.rip = point.rip.unwrap_or(cpu.rip);
        if !point.flags_saved {
            cpu.emitted.flag_word = cpu.emitted.late_flag_word;
        }
        self.look();
        if place == ATTENTION as u64 && signal == libc::SIGSEGV as u32 {
            return Leave::Look;
        }
        let cpu = self.cpu();
        match trap as u8 {
            vector::DE => Leave::Raise(Exception::DE),
            vector::MF => Leave::Raise(Exception::plain(vector::MF)),
            vector::XM if cpu.cr4 & cr4::OSXMMEXCPT != 0 => Leave::Raise(Exception::plain(vector::XM)),
            // A vector operand that is not aligned.
            vector::GP => Leave::Raise(Exception::GP0),
            vector::XM | vector::UD => Leave::Raise(Exception::UD),
            _ => unexpected(),
        }
    }

    /// Emulates one instruction.
    fn emulate(&mut self, desc: &ExitDesc) -> Leave {
        let bits = {
            let cpu = self.cpu();
            if cpu.code64() {
                64
            } else if cpu.seg[1].db() {
                32
            } else {
                16
            }
        };
        let decoded = self.decoded.get(desc, bits);
        let insn = decoded.insn;
        self.cpu().rip = desc.rip;
        if decoded.vector {
            return self.want_vectors(&insn);
        }
        use iced_x86::Mnemonic::{Int, Int1, Int3, Into, Syscall, Sysenter};
        if let Some(profile) = &self.profile {
            profile.emulates(insn.mnemonic());
        }
        // INTO with OF clear is none.
        let interrupts = matches!(insn.mnemonic(), Int | Int1 | Int3 | Syscall | Sysenter)
            || insn.mnemonic() == Into && self.cpu().rflags & rflags::OF != 0;
        let phase = &self.mailbox().phase;
        phase.emulating(insn.mnemonic());
        let emulated = emulate(self.cpu(), &insn);
        phase.set(Place::Loop);
        match emulated {
            // They clear TF, and there is no trap behind them (SDM vol. 3A 6.8.1).
            Ok(()) if self.may_go_on(insn.mnemonic()) => Leave::GoOn,
            Ok(()) if interrupts => Leave::Look,
            Ok(()) => Leave::Done,
            Err(exception) => Leave::Raise(exception),
        }
    }

    /// Whether nothing has to be looked at behind an instruction that was emulated without an exception, but which mode
    /// its successor is in.
    fn may_go_on(&mut self, mnemonic: iced_x86::Mnemonic) -> bool {
        use iced_x86::Mnemonic::{Hlt, In, Insb, Insd, Insw, Out, Outsb, Outsd, Outsw, Wrmsr};
        // Those that devices, timers or the run loop hear of.
        if matches!(mnemonic, Hlt | In | Insb | Insd | Insw | Out | Outsb | Outsd | Outsw | Wrmsr) {
            return false;
        }
        !self.is_disturbed()
    }

    /// Whether something else is to be done before the next instruction.
    fn is_disturbed(&mut self) -> bool {
        let armed = self.timer.armed();
        let cpu = self.cpu();
        // A string instruction may have stored to the local APIC.
        if cpu.lapic.timer_deadline() != armed {
            return true;
        }
        let shadow = cpu.sti_shadow || cpu.mov_ss_shadow;
        let interrupt = cpu.rflags & rflags::IF != 0 && cpu.interrupt_waits();
        shadow || cpu.event_waits() || interrupt || cpu.activity != Activity::Running
    }

    /// A vector instruction was met while the vector registers were not in the host's, or not to be used.
    fn want_vectors(&mut self, insn: &iced_x86::Instruction) -> Leave {
        let cpu = self.cpu();
        if let Err(exception) = xstate::check_fpu(cpu, insn) {
            return Leave::Raise(exception);
        }
        let cpu = self.cpu();
        if cpu.emitted.context.mode.vectors() {
            // All that it needs is there, and still it was not copied.
            return Leave::Raise(Exception::UD);
        }
        match cpu.cpl {
            3 => cpu.emitted.user_vectors = true,
            _ => self.vectors = true,
        }
        Leave::Look
    }

    /// Enters emitted code, of the context that [`Self::run_in`] has set.
    fn enter(&mut self, entry: u64) -> Left {
        let mailbox = self.mailbox();
        let emitted = &mut self.cpu().emitted;
        let table = emitted.context.mode.table();
        emitted.returns = emitted.jumps().map_or(0, |jumps| jumps.returns.pointer(table));
        let enter = self.shared.code.stubs.enter;
        mailbox.inside.fetch_add(1, Ordering::SeqCst);
        if mailbox.any() {
            mailbox.inside.fetch_add(1, Ordering::SeqCst);
            self.look();
            return Left::NotEntered;
        }
        mailbox.phase.set(if self.cpu().cpl == 3 { Place::User } else { Place::Kernel });
        // SAFETY: `enter` is the stub of that type; GS points at this vCPU's block, whose Cpu nobody refers to
        // meanwhile but the helpers that emitted code calls; `entry` leads to a block for this mode and RIP.
        unsafe {
            let enter: extern "C" fn(u64) = std::mem::transmute(enter);
            enter(entry);
        }
        mailbox.phase.set(Place::Loop);
        let left = self.how_left();
        let emitted = &mut self.cpu().emitted;
        let (table, returns) = (emitted.context.mode.table(), emitted.returns);
        if let Some(jumps) = emitted.jumps() {
            jumps.returns.set_pointer(table, returns);
        }
        mailbox.inside.fetch_add(1, Ordering::SeqCst);
        left
    }
}

/// What [`crate::subject`] drives.
impl TranslatedVcpu {
    /// The processor, between two instructions.
    pub(crate) fn state(&mut self) -> &mut Cpu {
        self.cpu()
    }

    /// What runs does not begin with the vector registers in the host's.
    pub(crate) fn forget_vectors(&mut self) {
        (self.vectors, self.cpu().emitted.user_vectors) = (false, false);
    }

    /// Runs until an exception, which is returned instead of being delivered. `single`: one instruction at a time,
    /// with `before` called before each, which ends the run by answering false. `None` if the run was ended.
    pub(crate) fn run_to_exception(
        &mut self,
        single: bool,
        before: &mut dyn FnMut(&Cpu) -> bool,
    ) -> Result<Option<Exception>, EngineError> {
        set_gs_base(self.block.0.as_ptr() as u64);
        (self.single, self.returns_exceptions) = (single, true);
        let end = loop {
            let requests = self.mailbox().take();
            if self.handle(requests) {
                break Ok(None);
            }
            if single && !before(self.cpu()) {
                break Ok(None);
            }
            match self.execute() {
                Leave::Look | Leave::Done | Leave::GoOn => {}
                Leave::Full => self.clear_code(),
                Leave::Raise(exception) => break Ok(Some(exception)),
                Leave::ShutDown => break Ok(None),
                Leave::Fail(reason) => {
                    break Err(EngineError::Failed { engine: "translator", rip: self.cpu().rip, reason });
                }
            }
        };
        (self.single, self.returns_exceptions) = (false, false);
        end
    }
}

/// RFLAGS' status flags as `lahf; seto al` would leave them in AX.
pub(crate) fn to_flag_word(flags: u64) -> u32 {
    ((flags & 0xd5) << 8 | (flags & rflags::OF) >> 11 | 0x200) as u32
}

pub(crate) fn from_flag_word(flags: u64, word: u32) -> u64 {
    flags & !rflags::STATUS | u64::from(word >> 8) & 0xd5 | u64::from(word & 1) << 11
}

impl Vcpu for TranslatedVcpu {
    fn run(&mut self, bus: &dyn Bus) -> Result<Exit, EngineError> {
        match self.profile.clone() {
            Some(profile) => profile.time(&self.mailbox().phase, bus, |bus| self.run_on(bus)),
            None => self.run_on(bus),
        }
    }

    fn save(&mut self) -> Result<VcpuState, EngineError> {
        let requests = self.mailbox().take();
        self.handle(requests & !request::KICK);
        if requests & request::KICK != 0 {
            self.mailbox().request(request::KICK);
        }
        Ok(crate::state::save(self.cpu()))
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        self.vectors = false;
        let cpu = self.cpu();
        cpu.emitted.user_vectors = false;
        crate::state::restore(cpu, state)?;
        crate::clock::refresh(cpu);
        Ok(())
    }
}

/// The components of the extended state that the host has and that a saved vCPU has room for.
fn host_components() -> u64 {
    use purlin_arch::x86_64::regs::xcr0;
    #[target_feature(enable = "xsave")]
    unsafe fn xgetbv() -> u64 {
        // SAFETY: the caller has found XSAVE.
        unsafe { std::arch::x86_64::_xgetbv(0) }
    }
    // SAFETY: every host that the engine accepts has XSAVE (see `TranslatorEngine::new`).
    unsafe { xgetbv() & (xcr0::X87 | xcr0::SSE | xcr0::AVX | xcr0::AVX512) }
}

/// Makes GS point at `base`.
fn set_gs_base(base: u64) {
    const ARCH_SET_GS: i32 = 0x1001;
    // SAFETY: nothing else in this process uses GS.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) };
    assert_eq!(result, 0, "arch_prctl(ARCH_SET_GS) failed");
}

/// Makes the zeroed memory at `block` a vCPU's block.
///
/// # Safety
/// `block` is valid for writes, zeroed, nobody else's, and stays where it is.
pub unsafe fn init_block(block: *mut Block, shared: &Arc<Shared>, cpu: Cpu) {
    use crate::{
        tlb::{Tlb, TlbHandle},
        translate::{JumpTables, ReturnStacks, helpers},
    };
    let returns = ReturnStacks::new(&shared.code.stubs.sentinels).expect("memory for stacks");
    // SAFETY: as the caller vouches.
    unsafe {
        (&raw mut (*block).mailbox).write(Mailbox::default());
        Tlb::init(&raw mut (*block).tlb);
        let returns_base = returns.base();
        JumpTables::init(&raw mut (*block).jumps, returns);
        (*block).cpu.get().write(cpu);
        let cpu = &mut *(*block).cpu.get();
        cpu.tlb = TlbHandle::at(std::ptr::NonNull::new_unchecked(&raw mut (*block).tlb));
        cpu.emitted.block = block as u64;
        cpu.emitted.helpers = helpers();
        cpu.emitted.jumps = &raw mut (*block).jumps;
        cpu.emitted.returns_base = returns_base;
        cpu.emitted.xsave_mask = host_components();
    }
}

#[cfg(test)]
mod tests {
    use purlin_engine::{VmConfig, memory};

    use super::*;
    use crate::engine::TranslatorEngine;

    /// `sti; hlt` must not become `sti`, interrupt, `hlt`, whenever the interrupt comes.
    #[test]
    fn a_request_before_the_next_instruction_leaves_the_shadow() {
        let memory = Arc::new(memory::create(&[(0xffff_0000, 0x1_0000)]).unwrap());
        let vm = TranslatorEngine::new().unwrap().create(VmConfig { memory, cpuid: vec![vec![]] }).unwrap();
        let mut vcpu = vm.take(0).unwrap();
        vcpu.cpu().sti_shadow = true;
        vcpu.mailbox().take();
        vcpu.mailbox().request(request::LAPIC);
        assert!(matches!(vcpu.execute(), Leave::Look));
        assert!(vcpu.cpu().sti_shadow);
        assert_eq!(vcpu.cpu().rip, 0xfff0, "nothing was executed");
    }

    /// Who leaves a request may be held up between its two stores, and the request be taken meanwhile.
    #[test]
    fn attention_drawn_late_does_not_stop_the_guest() {
        let memory = Arc::new(memory::create(&[(0xffff_0000, 0x1_0000)]).unwrap());
        // ud2 at the reset vector, without an IDT: a triple fault.
        vm_memory::Bytes::write_slice(&*memory, &[0x0f, 0x0b], vm_memory::GuestAddress(0xffff_fff0)).unwrap();
        let vm = TranslatorEngine::new().unwrap().create(VmConfig { memory, cpuid: vec![vec![]] }).unwrap();
        let mut vcpu = vm.take(0).unwrap();
        vcpu.cpu().idtr.limit = 0;
        vcpu.mailbox().take();
        vcpu.mailbox().poll.store(crate::mailbox::ATTENTION, Ordering::SeqCst);

        let kicker = purlin_engine::Vm::kicker(&vm, 0);
        let dog = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_secs(5));
            kicker.kick();
        });
        assert!(matches!(vcpu.run(&crate::mem::NoBus).unwrap(), Exit::Shutdown { .. }));
        drop(dog);
    }

    #[test]
    fn flag_words_round_trip() {
        for flags in 0..0x1000u64 {
            let flags = flags & rflags::STATUS;
            assert_eq!(from_flag_word(rflags::IF, to_flag_word(flags)), flags | rflags::IF);
        }
    }
}
