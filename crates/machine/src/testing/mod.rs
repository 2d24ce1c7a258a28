//! For tests: an engine whose processors run a closure instead of guest code, and kernels made by hand.

pub mod kernels;

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
};

use purlin_arch::x86_64::{
    cpuid::CpuidEntry,
    state::{Activity, VcpuState},
};
use purlin_engine::{Bus, Engine, EngineError, Exit, Kick, Vcpu, Vm, VmConfig, memory::GuestRam};

use crate::bus::lock;

/// What a processor does in one [`Vcpu::run`].
pub type Script = dyn Fn(&mut Run<'_>) -> Result<Exit, EngineError> + Send + Sync;

/// What a script sees.
pub struct Run<'a> {
    /// Number of the vCPU.
    pub index: u32,
    /// Its state.
    pub state: &'a mut VcpuState,
    /// The machine's memory.
    pub ram: &'a GuestRam,
    /// The rest of the machine.
    pub bus: &'a dyn Bus,
    /// How many processors have taken over a state since the machine's clock was set.
    pub restored: u32,
    kicked: &'a AtomicBool,
}

impl Run<'_> {
    /// Whether the vCPU was kicked; asking takes the kick.
    pub fn take_kick(&self) -> bool {
        self.kicked.swap(false, Ordering::SeqCst)
    }

    /// Sleeps until a kick, as HLT with interrupts off does.
    pub fn halt(&self) -> Result<Exit, EngineError> {
        while !self.take_kick() {
            std::thread::park_timeout(std::time::Duration::from_micros(200));
        }
        Ok(Exit::Kicked)
    }
}

/// An engine whose processors run a script.
pub struct ScriptedEngine {
    script: Arc<Script>,
    last: Mutex<Option<Arc<ScriptedVm>>>,
    lacks: Vec<String>,
}

impl ScriptedEngine {
    /// All processors run this; it sees which one it is by [`Run::index`].
    pub fn new(script: impl Fn(&mut Run<'_>) -> Result<Exit, EngineError> + Send + Sync + 'static) -> Self {
        Self { script: Arc::new(script), last: Mutex::new(None), lacks: Vec::new() }
    }

    /// One on a host that lacks this feature of every processor.
    pub fn without(mut self, feature: &str) -> Self {
        self.lacks.push(feature.to_owned());
        self
    }

    /// The machine made last.
    pub fn vm(&self) -> Arc<ScriptedVm> {
        lock(&self.last).clone().expect("a machine was made")
    }
}

impl Engine for ScriptedEngine {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn lacks(&self, _cpuid: &[CpuidEntry]) -> Vec<String> {
        self.lacks.clone()
    }

    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>, EngineError> {
        let kicked = config.cpuid.iter().map(|_| Arc::new(AtomicBool::new(false))).collect();
        let vm = Arc::new(ScriptedVm {
            config,
            script: self.script.clone(),
            kicked,
            messages: Mutex::default(),
            extint: AtomicBool::new(false),
            clock: AtomicU64::new(0),
            restored: Arc::default(),
        });
        *lock(&self.last) = Some(vm.clone());
        Ok(vm)
    }
}

/// The processors of a [`ScriptedEngine`].
pub struct ScriptedVm {
    config: VmConfig,
    script: Arc<Script>,
    kicked: Vec<Arc<AtomicBool>>,
    messages: Mutex<Vec<(u64, u32)>>,
    extint: AtomicBool,
    clock: AtomicU64,
    restored: Arc<AtomicU32>,
}

impl ScriptedVm {
    /// The messages delivered since the last call.
    pub fn take_messages(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut lock(&self.messages))
    }

    /// The level of the 8259's wire.
    pub fn extint(&self) -> bool {
        self.extint.load(Ordering::SeqCst)
    }
}

impl Vm for ScriptedVm {
    fn take_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        let state = power_up(index, &self.config);
        let (script, kicked) = (self.script.clone(), self.kicked[index as usize].clone());
        let (ram, restored) = (self.config.memory.clone(), self.restored.clone());
        Ok(Box::new(ScriptedVcpu { index, state, script, kicked, ram, restored }))
    }

    fn deliver_msi(&self, address: u64, data: u32) {
        lock(&self.messages).push((address, data));
    }

    fn set_extint(&self, high: bool) {
        self.extint.store(high, Ordering::SeqCst);
    }

    fn nmi(&self, _index: u32) {}

    fn kicker(&self, index: u32) -> Arc<dyn Kick> {
        Arc::new(ScriptedKick(self.kicked[index as usize].clone()))
    }

    fn clock_ns(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn set_clock_ns(&self, ns: u64) {
        self.clock.store(ns, Ordering::SeqCst);
        self.restored.store(0, Ordering::SeqCst);
    }

    fn tsc_khz(&self) -> u32 {
        1_000_000
    }
}

fn power_up(index: u32, config: &VmConfig) -> VcpuState {
    let mut state = VcpuState { cpuid: config.cpuid[index as usize].clone(), ..VcpuState::default() };
    state.regs.gpr = vec![0; 16];
    state.regs.rip = 0xfff0;
    state.regs.rflags = 2;
    state.system.segments = vec![Default::default(); 6];
    state.system.cr0 = 0x6000_0010;
    state.lapic.regs = vec![0; 1024];
    state.activity = if index == 0 { Activity::Running } else { Activity::WaitForSipi } as i32;
    state
}

struct ScriptedKick(Arc<AtomicBool>);

impl Kick for ScriptedKick {
    fn kick(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

struct ScriptedVcpu {
    index: u32,
    state: VcpuState,
    script: Arc<Script>,
    kicked: Arc<AtomicBool>,
    ram: Arc<GuestRam>,
    restored: Arc<AtomicU32>,
}

impl Vcpu for ScriptedVcpu {
    fn run(&mut self, bus: &dyn Bus) -> Result<Exit, EngineError> {
        if self.kicked.swap(false, Ordering::SeqCst) {
            return Ok(Exit::Kicked);
        }
        let (index, kicked) = (self.index, &*self.kicked);
        let restored = self.restored.load(Ordering::SeqCst);
        (self.script)(&mut Run { index, state: &mut self.state, ram: &self.ram, bus, restored, kicked })
    }

    fn save(&mut self) -> Result<VcpuState, EngineError> {
        Ok(self.state.clone())
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        // Whoever runs too early is caught at it.
        std::thread::sleep(std::time::Duration::from_millis(self.index.into()));
        self.state = state.clone();
        self.restored.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}
