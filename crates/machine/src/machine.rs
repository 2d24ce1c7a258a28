//! The machine: memory, processors, devices and clocks, made from one configuration.

use std::{
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use prost::Message;
use purlin_arch::x86_64::{cpuid::CpuidEntry, state::VcpuState};
use purlin_engine::{
    Bus, Code, Engine, SavedCode, Vcpu, Vm, VmConfig,
    memory::{self, GuestRam},
};
use purlin_state::{Saved, SavedState, Section};
use purlin_storage::Disk;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::{
    acpi, boot,
    chipset::{Chipset, Request},
    clock::Clock,
    config::{BalloonHandle, ConsoleSize, MachineConfig, SavedConfig},
    deadlines::DeadlineThread,
    error::MachineError,
    events::Listener,
    input::{GuestInput, InputGate, InputPort},
    layout, processor,
};

/// A machine. Its vCPUs belong to the threads that run them; everything else is here.
///
/// It is made standing still. [`Machine::reset`] gives the vCPUs' states to start from.
pub struct Machine {
    config: MachineConfig,
    ram: Arc<GuestRam>,
    vm: Arc<dyn Vm>,
    chipset: Chipset,
    clock: Arc<Clock>,
    /// What kvmclock reads while the machine stands still.
    vm_clock: AtomicU64,
    deadlines: DeadlineThread,
    input: Arc<InputGate>,
    /// Each vCPU's state after power-up.
    power_up: Vec<VcpuState>,
}

/// A machine's clocks.
#[derive(Clone, PartialEq, Eq, Message)]
struct SavedClock {
    /// [`Clock::now`].
    #[prost(uint64, tag = "1")]
    machine_ns: u64,
    /// What kvmclock shows.
    #[prost(uint64, tag = "2")]
    vm_ns: u64,
}

impl Saved for SavedClock {
    const NAME: &'static str = "clock";
    const VERSION: u32 = 1;
}

/// A machine's vCPUs, to be handed to their threads.
pub type Vcpus = Vec<Box<dyn Vcpu>>;

impl Machine {
    /// Makes a machine as it is before its first [`Machine::reset`]. What the guest writes to its serial port goes to
    /// `serial_out`.
    pub fn new(
        config: MachineConfig,
        engine: &dyn Engine,
        serial_out: Box<dyn Write + Send>,
    ) -> Result<(Self, Vcpus), MachineError> {
        config.validate(host_memory())?;
        let cpuid = processor::cpuid(&config, engine.tsc_khz());
        let ram = memory::create(&layout::slots(config.memory))?;
        Self::build(config, ram, cpuid, engine, serial_out)
    }

    /// Makes the machine that was saved, standing still where it was, with this memory, or without its content. Returns
    /// the states of its vCPUs too.
    pub fn restore(
        config: MachineConfig,
        ram: Option<GuestRam>,
        saved: &SavedState,
        engine: &dyn Engine,
        serial_out: Box<dyn Write + Send>,
    ) -> Result<(Self, Vcpus, Vec<VcpuState>), MachineError> {
        config.validate(host_memory())?;
        let ram = match ram {
            Some(ram) => ram,
            None => memory::create(&layout::slots(config.memory))?,
        };
        let slots = ram.iter().map(|slot| (slot.start_addr().0, slot.len()));
        if !slots.eq(layout::slots(config.memory)) {
            return Err(MachineError::MemoryMismatch { saved: config.memory });
        }
        let states = processors(saved, config.cpus)?;
        check_engine(&states, engine)?;
        let cpuid = states.iter().map(|s| s.cpuid.clone()).collect();
        let (machine, vcpus) = Self::build(config, ram, cpuid, engine, serial_out)?;

        let clock: SavedClock = saved.decode(SavedClock::NAME)?;
        machine.clock.set(clock.machine_ns);
        machine.vm_clock.store(clock.vm_ns, Ordering::Relaxed);
        machine.chipset.devices.restore(saved)?;
        Ok((machine, vcpus, states))
    }

    fn build(
        config: MachineConfig,
        ram: GuestRam,
        cpuid: Vec<Vec<CpuidEntry>>,
        engine: &dyn Engine,
        serial_out: Box<dyn Write + Send>,
    ) -> Result<(Self, Vcpus), MachineError> {
        let ram = Arc::new(ram);
        let vm = engine.create_vm(VmConfig { memory: ram.clone(), cpuid })?;
        let mut vcpus = (0..config.cpus).map(|i| vm.take_vcpu(i)).collect::<Result<Vcpus, _>>()?;
        let mut power_up = vcpus.iter_mut().map(|vcpu| vcpu.save()).collect::<Result<Vec<_>, _>>()?;
        processor::align_tsc(&mut power_up);
        let clock = Arc::new(Clock::default());
        let input = Arc::default();
        let chipset = Chipset::new(&config, &ram, &vm, clock.clone(), serial_out)?;
        let deadlines = DeadlineThread::start(chipset.devices.clone())
            .map_err(|source| MachineError::Host { what: "start a thread", source })?;
        let vm_clock = AtomicU64::new(0);
        let machine = Self { config, ram, vm, chipset, clock, vm_clock, deadlines, input, power_up };
        Ok((machine, vcpus))
    }

    /// Puts everything but memory's content in its state after power-up, loads firmware tables and kernel, and returns
    /// the states in which the vCPUs start. The machine stands still.
    ///
    /// As on hardware, memory keeps its content where nothing is loaded.
    pub fn reset(&self) -> Result<Vec<VcpuState>, MachineError> {
        self.chipset.reset();
        acpi::write(&self.config, &self.ram)?;
        let entry = boot::load(&self.config.boot, &self.ram, self.config.memory)?;
        let mut states = self.power_up.clone();
        states.iter_mut().for_each(boot::enable_caching);
        entry.apply(&mut states[0]);
        Ok(states)
    }

    /// The state of a machine that stands still, given those of its vCPUs; without its memory's content.
    pub fn save(&self, vcpus: &[VcpuState]) -> SavedState {
        let clock = SavedClock { machine_ns: self.clock.now(), vm_ns: self.vm_clock.load(Ordering::Relaxed) };
        let mut state = SavedState::default();
        state.sections.push(Section::new(&self.config.saved()));
        state.sections.push(Section::new(&clock));
        state.sections.extend((0..).zip(vcpus).map(|(i, vcpu)| Section::named(&vcpu_section(i), vcpu)));
        self.chipset.devices.save(&mut state);
        state
    }

    /// What the engine has made of the guest's code, for copies of a machine that stands still. Without it they go on as well.
    pub fn code(&self) -> Option<Arc<dyn Code>> {
        self.vm.code()
    }

    /// Begins, before it runs, with what there was of the machine that this is a copy of.
    pub fn restore_code(&self, code: &SavedCode) {
        if let Err(error) = self.vm.restore_code(code) {
            tracing::warn!("the clone begins without translated code: {error}");
        }
    }

    /// Step 1 of a stop: no deadline is served and no input taken any more, and no device's thread works: each request
    /// that a device has taken from its queues is done when this returns.
    pub fn hold(&self) {
        self.input.hold();
        self.deadlines.pause();
        self.chipset.devices.hold();
    }

    /// The clocks stop, and the devices do what was due by then: as long as the clocks stand they do nothing more. No
    /// vCPU runs, and none has been saved: an interrupt would be lost.
    pub fn stop_clocks(&self) {
        self.vm_clock.store(self.vm.clock_ns(), Ordering::Relaxed);
        self.clock.stop();
        self.chipset.devices.advance();
    }

    /// The clocks go on from where they stopped. No vCPU runs yet.
    pub fn start_clocks(&self) {
        self.vm.set_clock_ns(self.vm_clock.load(Ordering::Relaxed));
        self.chipset.set_wall_clock();
        self.clock.start();
    }

    /// Devices' threads work, deadlines are served and input is taken.
    pub fn open(&self) {
        self.chipset.devices.open();
        self.deadlines.resume();
        self.input.open();
    }

    /// The run is over: no more input is taken, and none is on its way when this returns.
    pub fn end(&self) {
        self.input.end();
    }

    /// The guest's memory.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Bytes of memory that it was made with.
    pub fn memory(&self) -> u64 {
        self.config.memory
    }

    /// The disks, by number.
    pub fn disks(&self) -> &[Arc<Disk>] {
        &self.config.disks
    }

    /// The processors.
    pub fn vm(&self) -> &dyn Vm {
        &*self.vm
    }

    /// What the vCPUs reach the devices by.
    pub fn bus(&self) -> &dyn Bus {
        &self.chipset
    }

    /// What the guest asked for with a write to a device, and the machine has not done yet.
    pub fn request(&self) -> Option<Request> {
        self.chipset.request()
    }

    /// Where input for one of its ports goes.
    pub fn input(self: &Arc<Self>, port: InputPort) -> GuestInput {
        GuestInput::new(self.input.clone(), Arc::downgrade(self), port)
    }

    /// The terminal at the console (virtio-console) has another size; the guest learns of it while it runs.
    pub fn resize_console(&self, size: ConsoleSize) {
        self.config.console.iter().for_each(|console| console.resize(size));
    }

    /// Presses the power button, as somebody who wants the guest to shut down. The machine runs.
    pub fn press_power_button(&self) {
        self.chipset.devices.with(&self.chipset.power, |power| power.press_power_button());
    }

    /// What steers the memory balloon, if there is one.
    pub fn balloon(&self) -> Option<&BalloonHandle> {
        self.chipset.balloon.as_ref()
    }

    /// Says who is to hear what the guest says has happened to it: on the thread of a vCPU, so it must not wait.
    pub fn listen(&self, listener: Listener) {
        self.chipset.events.listen(listener);
    }

    /// The machine is another one from here on, as one that goes on from another one's state beside it: it has a new
    /// generation ID, of which the guest is told as soon as it runs.
    pub fn renew_generation(&self) -> Result<(), MachineError> {
        self.chipset.renew_generation()
    }

    /// Gives input to a port, which takes as much as it has room for. `None` if there is no such port.
    pub(crate) fn push_input(&self, port: InputPort, bytes: &[u8]) -> Option<usize> {
        match port {
            InputPort::Serial => {
                let serial = self.chipset.serial.as_ref()?;
                Some(self.chipset.devices.with(serial, |serial| serial.push_input(bytes)))
            }
            InputPort::Console => Some(self.config.console.as_ref()?.push_input(bytes)),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Nobody may wait for a machine that is gone.
        self.end();
    }
}

/// Whether a saved machine can go on under this engine on this host, as far as its processors are concerned.
pub fn check_processors(saved: &SavedState, engine: &dyn Engine) -> Result<(), MachineError> {
    let config: SavedConfig = saved.decode(SavedConfig::NAME)?;
    check_engine(&processors(saved, config.cpus)?, engine)
}

/// The states of its vCPUs.
fn processors(saved: &SavedState, cpus: u32) -> Result<Vec<VcpuState>, MachineError> {
    Ok((0..cpus).map(|index| saved.decode(&vcpu_section(index))).collect::<Result<_, _>>()?)
}

fn check_engine(states: &[VcpuState], engine: &dyn Engine) -> Result<(), MachineError> {
    match states.iter().map(|state| engine.lacks(&state.cpuid)).find(|missing| !missing.is_empty()) {
        Some(missing) => Err(MachineError::Processor { engine: engine.name(), missing: missing.join(", ") }),
        None => Ok(()),
    }
}

fn vcpu_section(index: u32) -> String {
    format!("vcpu{index}")
}

/// Bytes of RAM and swap that this host has.
pub fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    let units = (info.totalram as u64).saturating_add(info.totalswap as u64);
    units.saturating_mul(info.mem_unit.into())
}
