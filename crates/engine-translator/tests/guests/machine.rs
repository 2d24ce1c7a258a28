//! A small machine: memory, page tables that map it to itself, descriptor tables whose every vector ends the run, and
//! a bus that writes down what the guests do.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::Duration,
};

use iced_x86::{
    IcedError,
    code_asm::{CodeAssembler, eax},
};
use purlin_arch::x86_64::{
    cpuid::{CpuModel, Vendor, leaves},
    msr,
    regs::{
        cr0, cr4, efer,
        gpr::RSP,
        rflags,
        seg::{CS, SS},
    },
    state::{Activity, Msr, Segment, Table, VcpuState},
};
use purlin_engine::{
    After, Bus, Engine, Exit, Kick, Vcpu, Vm, VmConfig,
    memory::{self, GuestRam},
};
use purlin_engine_translator::TranslatorEngine;
use vm_memory::{Bytes, GuestAddress};

/// Bytes of memory, at physical address 0. What is above goes to the bus.
pub const MEMORY: u64 = 16 << 20;
/// The GDT; [`selector`] says what is in it.
pub const GDT: u64 = 0x1000;
/// The IDT.
pub const IDT: u64 = 0x2000;
/// The TSS of vCPU 0; the others' follow at intervals of [`TSS_SIZE`].
pub const TSS: u64 = 0x3000;
/// Bytes between two TSSs, I/O permission bitmap (all ports denied) included.
pub const TSS_SIZE: u64 = 0x100;
/// The code that each vector leads to until a test says otherwise, 16 bytes each: leaves, then returns.
const STUBS: u64 = 0x4000;
/// A page of real-mode vectors is at 0; code begins here.
pub const CODE: u64 = 0x1_0000;
/// Top of vCPU 0's stack; the others' follow at intervals of [`STACK_SIZE`].
pub const STACK: u64 = 0x8_0000;
/// Bytes of one stack.
pub const STACK_SIZE: u64 = 0x4000;
/// Top of the stack that vCPU 0's TSS names for ring 0; the others' follow as above.
pub const RING0_STACK: u64 = 0xa_0000;
/// The root of the page tables, and room for more of them.
pub const PAGES: u64 = 0x10_0000;
const PAGES_END: u64 = 0x20_0000;
/// Nothing is here.
pub const DATA: u64 = 0x20_0000;

/// A write to this port ends the run.
pub const DONE: u16 = 0xf4;
/// The handlers' own port.
const STUB_PORT: u16 = 0xf5;
/// A write here lets another thread of the host run.
pub const YIELD: u16 = 0xed;
/// What is written here is written down.
pub const LOG: u16 = 0xe9;

/// Selectors in the GDT.
#[allow(dead_code)]
pub mod selector {
    pub const CODE64: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const CODE32: u16 = 0x18;
    pub const CODE16: u16 = 0x20;
    pub const DATA16: u16 = 0x28;
    /// This one and the next two as SYSRET wants them.
    pub const USER_CODE32: u16 = 0x33;
    pub const USER_DATA: u16 = 0x3b;
    pub const USER_CODE64: u16 = 0x43;
    pub const TSS: u16 = 0x50;
    pub const FREE: u16 = 0x60;
}

/// Bits of a page-table entry.
#[allow(dead_code)]
pub mod pte {
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
}

/// Ends a guest; EAX is told.
pub fn done(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.out(u32::from(DONE), eax)
}

/// Assembles code for `address`.
pub fn assemble(bits: u32, address: u64, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(bits).expect("16, 32 or 64");
    code(&mut assembler).expect("an instruction");
    assembler.assemble(address).expect("code")
}

/// What guests did, and what they are answered.
#[derive(Default)]
pub struct Recorder {
    /// Values written to [`LOG`].
    pub log: Mutex<Vec<u32>>,
    /// Stores outside of memory: address and bytes.
    pub writes: Mutex<Vec<(u64, Vec<u8>)>>,
    /// What loads outside of memory find: byte by byte, all ones elsewhere.
    pub mmio: Mutex<BTreeMap<u64, u8>>,
    /// Loads outside of memory: address and size.
    pub reads: Mutex<Vec<(u64, usize)>>,
    /// The 8259's answers, in turn.
    pub vectors: Mutex<VecDeque<u8>>,
    /// Ends of level-triggered interrupts.
    pub ends: Mutex<Vec<u8>>,
    /// Called at an interrupt acknowledge.
    pub acknowledged: Mutex<Option<Box<dyn Fn() + Send>>>,
}

/// A lock that a panic elsewhere does not hide.
pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One vCPU's way to the bus: why it left.
struct Port {
    recorder: Arc<Recorder>,
    left: Mutex<Option<(u16, u32)>>,
}

impl Bus for Port {
    fn port_in(&self, _port: u16, size: u8) -> u32 {
        lock(&self.recorder.log).last().copied().unwrap_or(0) & (u64::MAX >> (64 - 8 * u32::from(size))) as u32
    }

    fn port_out(&self, port: u16, _size: u8, value: u32) -> After {
        match port {
            DONE | STUB_PORT => {
                *lock(&self.left) = Some((port, value));
                After::Leave
            }
            YIELD => {
                std::thread::yield_now();
                After::Continue
            }
            LOG => {
                lock(&self.recorder.log).push(value);
                After::Continue
            }
            _ => After::Continue,
        }
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        lock(&self.recorder.reads).push((address, data.len()));
        let mmio = lock(&self.recorder.mmio);
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = mmio.get(&(address + i as u64)).copied().unwrap_or(0xff);
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) -> After {
        lock(&self.recorder.writes).push((address, data.to_vec()));
        After::Continue
    }

    fn acknowledge_interrupt(&self) -> u8 {
        if let Some(hook) = &*lock(&self.recorder.acknowledged) {
            hook();
        }
        lock(&self.recorder.vectors).pop_front().unwrap_or(0xff)
    }

    fn end_of_interrupt(&self, vector: u8) {
        lock(&self.recorder.ends).push(vector);
    }
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The guest wrote this to [`DONE`].
    Done(u32),
    /// It took this vector, to which the test had given no handler of its own.
    Vector(u8, Frame),
    /// It was kicked.
    Kicked,
    /// A triple fault.
    Shutdown,
}

/// What the processor pushed for a handler in 64-bit mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    pub error: Option<u32>,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

impl Stop {
    /// Vector and error code, RIP at the instruction; anything else fails the test.
    #[track_caller]
    pub fn vector(self) -> (u8, Option<u32>, u64) {
        match self {
            Stop::Vector(vector, frame) => (vector, frame.error, frame.rip),
            other => panic!("{other:?} instead of an exception"),
        }
    }
}

fn host_cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    // Under a hypervisor each costs tens of microseconds.
    static KNOWN: Mutex<BTreeMap<(u32, u32), [u32; 4]>> = Mutex::new(BTreeMap::new());
    *lock(&KNOWN).entry((leaf, subleaf)).or_insert_with(|| {
        let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
        [r.eax, r.ebx, r.ecx, r.edx]
    })
}

/// Whether guests are AMD's processors, as the host is.
pub fn is_amd() -> bool {
    Vendor::of(host_cpuid(0, 0)) == Vendor::Amd
}

/// The engine that tests begin with. With `PURLIN_TEST_MOVABLE_CODE` their code is translated as what lies above 4 GiB is.
pub fn engine() -> TranslatorEngine {
    let engine = TranslatorEngine::new().expect("the translator");
    if std::env::var_os("PURLIN_TEST_MOVABLE_CODE").is_some() { engine.with_movable_code() } else { engine }
}

/// The machine.
pub struct Machine {
    pub memory: Arc<GuestRam>,
    pub vm: Arc<dyn Vm>,
    pub bus: Arc<Recorder>,
    pages: Mutex<u64>,
}

impl Machine {
    /// With this many vCPUs.
    pub fn new(cpus: u32) -> Self {
        Self::with_engine(cpus, engine())
    }

    /// With so little room for emitted code that it is used up again and again.
    pub fn with_small_code_cache(cpus: u32) -> Self {
        Self::with_engine(cpus, engine().with_code_cache(512 << 10))
    }

    /// With an engine of the test's own.
    pub fn with_engine(cpus: u32, engine: TranslatorEngine) -> Self {
        let memory = Arc::new(memory::create(&[(0, MEMORY)]).expect("guest memory"));
        let cpuid = (0..cpus).map(|i| leaves(CpuModel::Host, &host_cpuid, i, cpus, engine.tsc_khz())).collect();
        let vm = engine.create_vm(VmConfig { memory: memory.clone(), cpuid }).expect("VM");
        let machine = Self { memory, vm, bus: Arc::default(), pages: Mutex::new(PAGES + 0x1000) };
        machine.make_tables();
        machine
    }

    fn make_tables(&self) {
        let tss = |i: u64| {
            let base = TSS + TSS_SIZE * i;
            (TSS_SIZE - 1) | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base & 0xff00_0000) << 32
        };
        #[rustfmt::skip]
        let gdt: [u64; 12] = [
            0,
            0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_9b00_0000_ffff, 0x0000_9b00_0000_ffff,
            0x0000_9300_0000_ffff, 0x00cf_fb00_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff,
            0, tss(0), 0,
        ];
        for (i, entry) in gdt.into_iter().enumerate() {
            self.poke(GDT + 8 * i as u64, entry);
        }
        for vector in 0..=255u8 {
            let at = STUBS + 16 * u64::from(vector);
            let leave = [0xe6, STUB_PORT as u8];
            let back: &[u8] = if has_error(vector) { &[0x48, 0x83, 0xc4, 8, 0x48, 0xcf] } else { &[0x48, 0xcf] };
            self.load(at, &[&leave, back].concat());
            self.gate(vector, at);
        }
        for i in 0..16 {
            let base = TSS + TSS_SIZE * i;
            self.poke(base + 4, RING0_STACK + STACK_SIZE * i);
            self.poke(base + 0x66, 0x68u16);
            self.load(base + 0x68, &[0xff; (TSS_SIZE - 0x68) as usize]);
        }
        for page in (0..MEMORY).step_by(4096) {
            self.map(page, page, pte::P | pte::W);
        }
    }

    /// Maps one page for all address spaces that begin at [`PAGES`]. The bits of upper levels allow everything.
    pub fn map(&self, linear: u64, physical: u64, bits: u64) {
        self.map_in(PAGES, linear, physical, bits);
    }

    /// Maps one page in the tables at `root`.
    pub fn map_in(&self, root: u64, linear: u64, physical: u64, bits: u64) {
        self.poke(self.pte_in(root, linear), physical | bits);
    }

    /// Physical address of the page-table entry for `linear`.
    pub fn pte(&self, linear: u64) -> u64 {
        self.pte_in(PAGES, linear)
    }

    fn pte_in(&self, root: u64, linear: u64) -> u64 {
        let mut table = root;
        for level in (1..4).rev() {
            let at = table + (linear >> (12 + 9 * level) & 0x1ff) * 8;
            if self.peek::<u64>(at) == 0 {
                self.poke(at, self.new_table() | pte::P | pte::W | pte::U);
            }
            table = self.peek::<u64>(at) & 0xf_ffff_ffff_f000;
        }
        table + (linear >> 12 & 0x1ff) * 8
    }

    /// An empty page for page tables.
    pub fn new_table(&self) -> u64 {
        let mut next = lock(&self.pages);
        let page = *next;
        *next += 0x1000;
        assert!(page < PAGES_END, "too many page tables");
        page
    }

    /// Makes pages accessible for user code.
    pub fn user_pages(&self, start: u64, length: u64) {
        for page in (start..start + length).step_by(4096) {
            self.map(page, page, pte::P | pte::W | pte::U);
        }
    }

    /// Leads `vector` to 64-bit ring-0 code (an interrupt gate, which INT n may use from everywhere).
    pub fn gate(&self, vector: u8, handler: u64) {
        let at = IDT + 16 * u64::from(vector);
        let low = handler & 0xffff | u64::from(selector::CODE64) << 16 | 0xee << 40 | (handler & 0xffff_0000) << 32;
        self.poke(at, low);
        self.poke(at + 8, handler >> 32);
    }

    /// Assembles 64-bit code at `address`.
    pub fn code(&self, address: u64, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> u64 {
        self.code_of(64, address, address, code)
    }

    /// Assembles code of `bits` for `address`, to physical memory at `physical`. Returns the end's address.
    pub fn code_of(
        &self,
        bits: u32,
        address: u64,
        physical: u64,
        code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> u64 {
        let bytes = assemble(bits, address, code);
        self.load(physical, &bytes);
        address + bytes.len() as u64
    }

    /// Writes to memory, as a device would.
    pub fn load(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).expect("within memory");
    }

    /// Writes an integer.
    pub fn poke<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).expect("within memory");
    }

    /// Reads an integer.
    pub fn peek<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        self.memory.read_obj(GuestAddress(address)).expect("within memory")
    }

    /// vCPU `index` in 64-bit mode, ring 0, interrupts off, at [`CODE`]; `change` may change that.
    pub fn vcpu(&self, index: u32, change: impl FnOnce(&mut VcpuState)) -> Guest {
        let mut vcpu = self.vm.take_vcpu(index).expect("vCPU");
        let mut state = vcpu.save().expect("state after power-up");
        long_mode(&mut state, index);
        change(&mut state);
        vcpu.restore(&state).expect("a state");
        let port = Port { recorder: self.bus.clone(), left: Mutex::default() };
        Guest { vcpu, port, kicker: self.vm.kicker(index), memory: self.memory.clone() }
    }

    /// vCPU 0 runs code at [`CODE`] until it stops.
    pub fn run(&self, code: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> (Stop, VcpuState) {
        self.code(CODE, code);
        let mut guest = self.vcpu(0, |_| {});
        let stop = guest.run();
        (stop, guest.state())
    }
}

fn has_error(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

/// A flat segment: `kind` is type, S, DPL, P, L and D as [`Segment::access`] has them.
pub fn flat(selector: u16, kind: u32) -> Segment {
    Segment { selector: selector.into(), base: 0, limit: u32::MAX, access: kind | 0x8000 }
}

fn long_mode(state: &mut VcpuState, index: u32) {
    let (regs, system) = (&mut state.regs, &mut state.system);
    regs.rip = CODE;
    regs.rflags = rflags::FIXED;
    regs.gpr.fill(0);
    regs.gpr[RSP] = STACK + STACK_SIZE * u64::from(index);
    system.segments = vec![flat(selector::DATA, 0x4093); 6];
    system.segments[CS] = flat(selector::CODE64, 0x209b);
    system.tr =
        Segment { selector: selector::TSS.into(), base: TSS + TSS_SIZE * u64::from(index), limit: 0xff, access: 0x8b };
    system.gdtr = Table { base: GDT, limit: 0xfff };
    system.idtr = Table { base: IDT, limit: 0xfff };
    system.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
    system.cr3 = PAGES;
    system.cr4 = cr4::DE | cr4::PSE | cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    system.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    state.xcr0 = 7;
    state.activity = Activity::Running.into();
}

/// Makes a state one of user code in 64-bit mode.
pub fn user_mode(state: &mut VcpuState) {
    state.system.segments = vec![flat(selector::USER_DATA, 0x40f3); 6];
    state.system.segments[CS] = flat(selector::USER_CODE64, 0x20fb);
}

/// SYSCALL leads to `kernel`, with interrupts off.
pub fn take_syscalls(state: &mut VcpuState, kernel: u64) {
    state.msrs.retain(|m| ![msr::STAR, msr::LSTAR, msr::SFMASK].contains(&m.index));
    state.msrs.extend([
        Msr { index: msr::STAR, value: 0x0033_0008 << 32 },
        Msr { index: msr::LSTAR, value: kernel },
        Msr { index: msr::SFMASK, value: rflags::IF },
    ]);
}

/// Makes a state one of 32-bit code in compatibility mode, with the same privilege.
#[allow(dead_code)]
pub fn compatibility(state: &mut VcpuState) {
    let user = state.system.segments[SS].selector & 3 == 3;
    state.system.segments[CS] = if user { flat(selector::USER_CODE32, 0x40fb) } else { flat(selector::CODE32, 0x409b) };
}

/// A vCPU under test.
pub struct Guest {
    pub vcpu: Box<dyn Vcpu>,
    pub kicker: Arc<dyn Kick>,
    port: Port,
    memory: Arc<GuestRam>,
}

impl Guest {
    /// Runs until the guest stops. One that takes more than ten seconds fails the test.
    pub fn run(&mut self) -> Stop {
        let kicker = self.kicker.clone();
        watchdog(&[kicker], || self.run_unwatched())
    }

    /// [`Guest::run`] that ends, with [`Stop::Kicked`], after `time`.
    pub fn run_for(&mut self, time: Duration) -> Stop {
        let kicker = self.kicker.clone();
        let (over, wait) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                if wait.recv_timeout(time) == Err(mpsc::RecvTimeoutError::Timeout) {
                    kicker.kick();
                }
            });
            let stop = self.run_unwatched();
            drop(over);
            stop
        })
    }

    /// [`Guest::run`] for callers that watch by themselves.
    pub fn run_unwatched(&mut self) -> Stop {
        lock(&self.port.left).take();
        let exit = self.vcpu.run(&self.port).expect("run");
        let left = lock(&self.port.left).take();
        match (exit, left) {
            (Exit::Shutdown { .. }, _) => Stop::Shutdown,
            (Exit::Kicked, Some((DONE, value))) => Stop::Done(value),
            (Exit::Kicked, Some(_)) => self.vector(),
            (Exit::Kicked, None) => Stop::Kicked,
        }
    }

    fn vector(&mut self) -> Stop {
        let state = self.state();
        let vector = ((state.regs.rip - STUBS) / 16) as u8;
        // Test stacks lie where linear and physical addresses are the same.
        let mut rsp = state.regs.gpr[RSP];
        let mut pop = || {
            let value: u64 = self.memory.read_obj(GuestAddress(rsp)).expect("stack in memory");
            rsp += 8;
            value
        };
        let error = has_error(vector).then(|| pop() as u32);
        let frame = Frame { error, rip: pop(), cs: pop(), rflags: pop(), rsp: pop(), ss: pop() };
        Stop::Vector(vector, frame)
    }

    /// Its state.
    pub fn state(&mut self) -> VcpuState {
        self.vcpu.save().expect("state")
    }

    /// Changes its state.
    pub fn change(&mut self, change: impl FnOnce(&mut VcpuState)) {
        let mut state = self.state();
        change(&mut state);
        self.vcpu.restore(&state).expect("a state");
    }

    /// Takes back what its handler has done: the state is the one before the exception, at `rip`.
    pub fn resume(&mut self, frame: &Frame, rip: u64) {
        let frame = *frame;
        self.change(|s| {
            s.regs.rip = rip;
            s.regs.gpr[RSP] = frame.rsp;
            s.regs.rflags = frame.rflags & !rflags::RF;
        });
    }
}

/// Runs all guests at once until each has stopped.
pub fn run_all(guests: &mut [Guest]) -> Vec<Stop> {
    let kickers: Vec<_> = guests.iter().map(|g| g.kicker.clone()).collect();
    watchdog(&kickers, || {
        std::thread::scope(|scope| {
            let threads: Vec<_> = guests.iter_mut().map(|g| scope.spawn(|| g.run_unwatched())).collect();
            threads.into_iter().map(|t| t.join().expect("a vCPU's thread")).collect()
        })
    })
}

/// Runs `work`; kicks and panics if it takes longer than two minutes, which no loaded host makes of a test.
pub fn watchdog<T>(kickers: &[Arc<dyn Kick>], work: impl FnOnce() -> T) -> T {
    let (done, wait) = mpsc::channel::<()>();
    let kickers = kickers.to_vec();
    let dog = std::thread::spawn(move || {
        let late = wait.recv_timeout(Duration::from_secs(120)) == Err(mpsc::RecvTimeoutError::Timeout);
        if late {
            // More than once: a guest may be about to run again.
            for _ in 0..100 {
                kickers.iter().for_each(|k| k.kick());
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        late
    });
    let result = work();
    drop(done);
    assert!(!dog.join().expect("watchdog"), "the guest hung");
    result
}
