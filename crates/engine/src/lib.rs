//! The seam between CPU engines and the rest of the machine: `Engine → Vm → Vcpu::run(bus) → Exit`.
//!
//! An engine knows guest physical memory ([`memory::GuestRam`]) and a [`Bus`], nothing else. It owns the processors
//! and their local APICs; the machine owns the 8259 pair, the I/O APIC and the PIT ("split irqchip"). Interrupts
//! reach an engine as messages ([`Vm::deliver_msi`]) and as the 8259's one wire ([`Vm::set_extint`]).
#![forbid(unsafe_code)]

pub use purlin_memory as memory;

use std::{fmt, fs::File, io, sync::Arc};

use purlin_arch::x86_64::{cpuid::CpuidEntry, state::VcpuState};

/// A way to execute guest instructions.
pub trait Engine: Send + Sync {
    /// `kvm` or `translator`.
    fn name(&self) -> &'static str;

    /// Frequency of the TSC that this engine's guests see, in kHz, for the CPUID leaves that tell it (0x15, 0x16,
    /// 0x4000_0010); 0 where that is known only once there is a VM: these leaves are then left out.
    fn tsc_khz(&self) -> u32 {
        0
    }

    /// The features of a processor with these CPUID leaves that this engine cannot give to a guest on this host, by name.
    /// A saved machine that has any cannot go on here: its guest uses what it has found.
    fn lacks(&self, cpuid: &[CpuidEntry]) -> Vec<String>;

    /// A new machine's processors, not yet running.
    ///
    /// vCPU 0 is the bootstrap processor; the others wait for SIPI. All are in the state after power-up
    /// (SDM vol. 3A table 9-1).
    fn create_vm(&self, config: VmConfig) -> Result<Arc<dyn Vm>, EngineError>;
}

/// What an engine is told of a machine.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// Guest physical memory. What is not in it goes to the bus.
    pub memory: Arc<memory::GuestRam>,
    /// The CPUID leaves of each vCPU, by vCPU: as many as there are vCPUs. The initial APIC ID is the vCPU's number.
    pub cpuid: Vec<Vec<CpuidEntry>>,
}

/// The processors of one machine.
pub trait Vm: Send + Sync {
    /// Takes vCPU number `index`; each can be taken once.
    fn take_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError>;

    /// Delivers a message-signalled interrupt: `address` and `data` as a device or the I/O APIC sends them
    /// (SDM vol. 3A 11.11; 0xfee0_0000 and up). A message that no vCPU takes is lost, as on the bus.
    fn deliver_msi(&self, address: u64, data: u32);

    /// The state of the 8259's INTR output. While it is high and the bootstrap processor's LINT0 takes ExtINT (or its
    /// APIC is disabled), the engine calls [`Bus::acknowledge_interrupt`] and delivers the vector that it returns.
    fn set_extint(&self, high: bool);

    /// Raises an NMI on vCPU `index`.
    fn nmi(&self, index: u32);

    /// A handle that makes [`Vcpu::run`] of vCPU `index` return.
    fn kicker(&self, index: u32) -> Arc<dyn Kick>;

    /// The clock that kvmclock shows: nanoseconds since the VM started, running.
    fn clock_ns(&self) -> u64;

    /// Sets that clock; to be done while no vCPU runs, before the first resumes. Whatever the vCPUs' states say of
    /// time counts on from this moment if they are restored after it: all TSCs alike.
    fn set_clock_ns(&self, ns: u64);

    /// Frequency of the guest's TSC in kHz.
    fn tsc_khz(&self) -> u32;

    /// What the engine has made of the guest's code so far, for copies of the machine as it is now; to be asked while no vCPU runs.
    /// `None` where a copy has no use for it.
    fn code(&self) -> Option<Arc<dyn Code>> {
        None
    }

    /// Begins with what the engine has made of the code of the machine that this is a copy of: memory is what it was at that
    /// moment, and no vCPU has run. What does not fit is left alone.
    fn restore_code(&self, _code: &SavedCode) -> io::Result<()> {
        Ok(())
    }
}

/// What an engine has made of a guest's code at one moment.
pub trait Code: Send + Sync {
    /// For copies of the machine at that moment, while it goes on itself. `None` if it is not there any more.
    fn save(&self) -> io::Result<Option<SavedCode>>;

    /// What takes long, for copies of later moments: to be called when there is time.
    fn refresh(&self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for dyn Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Code")
    }
}

/// Code for copies of a machine, some of which share the file. It is trusted with all that the process can do which uses it.
#[derive(Clone, Debug)]
pub struct SavedCode {
    /// A sealed file, for the same program on the same host.
    pub file: Arc<File>,
    /// How it is to become that of the right moment.
    pub changes: CodeChanges,
}

/// What of a file of code was not valid at a moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CodeChanges {
    /// Pieces from this one on.
    pub blocks: u32,
    /// These.
    pub died: Vec<u32>,
}

/// One processor. It belongs to the thread that runs it.
pub trait Vcpu: Send {
    /// Runs guest instructions until something happens that the engine does not deal with itself. HLT and waiting
    /// for SIPI are dealt with here, by sleeping.
    fn run(&mut self, bus: &dyn Bus) -> Result<Exit, EngineError>;

    /// The whole state, between two instructions.
    fn save(&mut self) -> Result<VcpuState, EngineError>;

    /// Takes over a state.
    fn restore(&mut self, state: &VcpuState) -> Result<(), EngineError>;
}

/// Makes a vCPU's [`Vcpu::run`] return [`Exit::Kicked`], from any thread.
pub trait Kick: Send + Sync {
    /// The run under way returns soon; if there is none, the next one returns at once (once).
    fn kick(&self);
}

/// Why [`Vcpu::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Somebody asked for it ([`Kick::kick`]), or a bus access answered [`After::Leave`].
    Kicked,
    /// A triple fault (SDM vol. 3A 6.15, interrupt 8): the processor shut down. `rip` is where it was.
    Shutdown {
        /// Linear address of the instruction that could not be completed.
        rip: u64,
    },
}

/// What an engine may ask of the rest of the machine. Value in, value out; called from any vCPU's thread.
pub trait Bus: Send + Sync {
    /// IN from `port`; `size` is 1, 2 or 4 bytes. Nobody there: all ones.
    fn port_in(&self, port: u16, size: u8) -> u32;

    /// OUT to `port`; `size` is 1, 2 or 4 bytes.
    fn port_out(&self, port: u16, size: u8, value: u32) -> After;

    /// A load from guest physical `address`, outside memory; 1 to 8 bytes. Nobody there: all ones.
    fn mmio_read(&self, address: u64, data: &mut [u8]);

    /// A store to guest physical `address`, outside memory (or to read-only memory); 1 to 8 bytes.
    fn mmio_write(&self, address: u64, data: &[u8]) -> After;

    /// The 8259's interrupt-acknowledge cycle: the vector to deliver (7 or 15 of its base where it was spurious).
    fn acknowledge_interrupt(&self) -> u8;

    /// A local APIC's end of interrupt for a level-triggered `vector` reaches the I/O APIC.
    fn end_of_interrupt(&self, vector: u8);
}

/// Whether a vCPU goes on after a bus write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum After {
    /// It does.
    Continue,
    /// [`Vcpu::run`] returns [`Exit::Kicked`] before the next instruction: the machine wants to act (power-off,
    /// reset).
    Leave,
}

/// What went wrong in an engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The engine cannot work on this host. The text says why and what to do.
    #[error("{0}")]
    Unavailable(String),
    /// The host refused something.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        source: std::io::Error,
    },
    /// The guest did what the engine cannot do. The VM cannot go on.
    #[error("the {engine} engine failed at rip {rip:#x}: {reason}")]
    Failed {
        /// The engine.
        engine: &'static str,
        /// Where the guest was.
        rip: u64,
        /// Why.
        reason: String,
    },
    /// A saved state cannot be taken over.
    #[error(transparent)]
    State(#[from] purlin_state::StateError),
}
