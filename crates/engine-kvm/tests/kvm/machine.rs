//! A machine of memory and a bus that writes down what the guest does.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use purlin_arch::x86_64::{
    cpuid::CpuidEntry,
    regs::{rflags, seg},
    state::VcpuState,
};
use purlin_engine::{
    After, Bus, Engine, Exit, Kick, Vcpu, Vm, VmConfig,
    memory::{self, GuestRam},
};
use purlin_engine_kvm::KvmEngine;
use vm_memory::{Bytes, GuestAddress};

/// Where the guests' code is loaded and begins.
pub const CODE: u64 = 0x1000;

/// A write to this port ends the run.
pub const DONE: u16 = 0xf4;

/// Size of guest memory.
const MEMORY: u64 = 2 << 20;

/// The engine, or `None` where the tests were told that there is none. Without that word a host without /dev/kvm
/// fails them: a test that did not run must not look like one that passed.
pub fn engine() -> Option<KvmEngine> {
    if std::env::var_os("PURLIN_TEST_NO_KVM").is_some_and(|v| v == "1") {
        eprintln!("skipped: PURLIN_TEST_NO_KVM=1");
        return None;
    }
    match KvmEngine::new() {
        Ok(engine) => Some(engine),
        Err(error) => panic!("these tests run guests on /dev/kvm (PURLIN_TEST_NO_KVM=1 leaves them out): {error}"),
    }
}

/// What a guest did on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// port, size, value
    Out(u16, u8, u32),
    /// port, size
    In(u16, u8),
    /// address, size, value
    Write(u64, usize, u64),
    /// address, size
    Read(u64, usize),
    Acknowledge,
    EndOfInterrupt(u8),
}

/// The bus: answers reads from a list (all ones when it is empty) and writes everything down.
#[derive(Default)]
pub struct Recorder {
    pub seen: Mutex<Vec<Access>>,
    pub answers: Mutex<VecDeque<u64>>,
    /// Called at an interrupt acknowledge: the vector.
    pub pic: Mutex<Option<Box<dyn FnMut() -> u8 + Send>>>,
}

impl Recorder {
    pub fn answering(answers: impl IntoIterator<Item = u64>) -> Self {
        Self { answers: Mutex::new(answers.into_iter().collect()), ..Self::default() }
    }

    /// What was seen since the last call.
    pub fn take(&self) -> Vec<Access> {
        std::mem::take(&mut *self.seen.lock().unwrap())
    }

    fn saw(&self, access: Access) {
        self.seen.lock().unwrap().push(access);
    }

    fn answer(&self) -> u64 {
        self.answers.lock().unwrap().pop_front().unwrap_or(!0)
    }
}

impl Bus for Recorder {
    fn port_in(&self, port: u16, size: u8) -> u32 {
        self.saw(Access::In(port, size));
        self.answer() as u32
    }

    fn port_out(&self, port: u16, size: u8, value: u32) -> After {
        self.saw(Access::Out(port, size, value));
        if port == DONE { After::Leave } else { After::Continue }
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.saw(Access::Read(address, data.len()));
        let answer = self.answer().to_le_bytes();
        data.copy_from_slice(&answer[..data.len()]);
    }

    fn mmio_write(&self, address: u64, data: &[u8]) -> After {
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        self.saw(Access::Write(address, data.len(), u64::from_le_bytes(value)));
        After::Continue
    }

    fn acknowledge_interrupt(&self) -> u8 {
        self.saw(Access::Acknowledge);
        self.pic.lock().unwrap().as_mut().expect("no 8259 in this test")()
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.saw(Access::EndOfInterrupt(vector));
    }
}

/// A machine with one or several vCPUs and 2 MiB of memory at 0.
pub struct Machine {
    pub memory: Arc<GuestRam>,
    pub vm: Arc<dyn Vm>,
    pub bus: Arc<Recorder>,
}

impl Machine {
    pub fn new(engine: &KvmEngine, cpus: u32) -> Self {
        let cpuid: Vec<CpuidEntry> = engine.supported_cpuid().to_vec();
        Self::with_cpuid(engine, vec![cpuid; cpus as usize])
    }

    pub fn with_cpuid(engine: &KvmEngine, cpuid: Vec<Vec<CpuidEntry>>) -> Self {
        let memory = Arc::new(memory::create(&[(0, MEMORY)]).expect("guest memory"));
        let vm = engine.create_vm(VmConfig { memory: memory.clone(), cpuid }).expect("VM");
        Self { memory, vm, bus: Arc::default() }
    }

    /// Loads `code` and takes vCPU 0, in real mode, about to execute it.
    pub fn boot(&self, code: &[u8]) -> Guest<'_> {
        self.load(CODE, code);
        let mut vcpu = self.vm.take_vcpu(0).expect("vCPU 0");
        let state = real_mode(vcpu.save().expect("state after power-up"));
        vcpu.restore(&state).expect("real mode");
        Guest { machine: self, vcpu }
    }

    pub fn load(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).expect("within memory");
    }

    /// An entry of the real-mode interrupt table.
    pub fn set_vector(&self, vector: u8, handler: u16) {
        self.load(u64::from(vector) * 4, &u32::from(handler).to_le_bytes());
    }
}

/// `state` with real-mode segments at 0, the stack below the code, at [`CODE`], interrupts off.
pub fn real_mode(mut state: VcpuState) -> VcpuState {
    let cs = &mut state.system.segments[seg::CS];
    (cs.selector, cs.base) = (0, 0);
    state.regs.rip = CODE;
    state.regs.gpr[purlin_arch::x86_64::regs::gpr::RSP] = CODE;
    state.regs.rflags = rflags::FIXED;
    state
}

/// A vCPU under test.
pub struct Guest<'a> {
    pub machine: &'a Machine,
    pub vcpu: Box<dyn Vcpu>,
}

impl Guest<'_> {
    /// Runs until the guest is done or somebody kicks it; a guest that hangs fails the test.
    pub fn run(&mut self) -> Exit {
        let kicker = self.machine.vm.kicker(0);
        watchdog(kicker, || self.vcpu.run(&*self.machine.bus)).expect("run")
    }
}

/// Runs `work`; kicks and panics if it takes longer than 10 s.
pub fn watchdog<T>(kicker: Arc<dyn Kick>, work: impl FnOnce() -> T) -> T {
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let dog = std::thread::spawn(move || {
        let late = wait.recv_timeout(Duration::from_secs(10)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
        if late {
            kicker.kick();
        }
        late
    });
    let result = work();
    drop(done);
    assert!(!dog.join().expect("watchdog"), "the guest hung");
    result
}
