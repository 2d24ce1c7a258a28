//! What to run, and how a run ended.

use std::{fmt, path::PathBuf, sync::Arc};

use purlin_arch::x86_64::cpuid::CpuModel;
use purlin_engine::Engine;
use purlin_machine::config::{BalloonConfig, ConsolePort, Network, OnFailure, OptionalDevice, VsockConfig};
use purlin_storage::DiskSpec;

/// Everything that a run needs to know.
#[derive(Clone)]
pub struct RunConfig {
    /// Kernel file: bzImage, ELF with a PVH note, or multiboot.
    pub kernel: PathBuf,
    /// Initial RAM disks, in order; modules for a multiboot kernel.
    pub initrds: Vec<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// What executes the guest's instructions.
    pub engine: Arc<dyn Engine>,
    /// The processor that the guest sees.
    pub cpu_model: CpuModel,
    /// Whether the machine has a serial port.
    pub serial: bool,
    /// Devices beside those that every machine has.
    pub devices: Vec<OptionalDevice>,
    /// Disks, in order: /dev/vda and so on.
    pub disks: Vec<DiskSpec>,
    /// Networks, in order: eth0 and so on.
    pub networks: Vec<Network>,
    /// What the console on virtio-console is connected to, if the machine has one. What the guest has written there is
    /// written out when the last handle on it is gone.
    pub console: Option<Arc<ConsolePort>>,
    /// What comes of a disk's request that the host cannot carry out: it is out of space, or its disk fails.
    pub on_io_error: OnIoError,
    /// Sockets between guest and host.
    pub vsock: Option<VsockConfig>,
    /// A memory balloon.
    pub balloon: Option<BalloonConfig>,
    /// End the run where the guest resets itself, instead of starting it again.
    pub no_reboot: bool,
}

/// What comes of a disk's request that the host cannot carry out.
#[derive(Clone, Default)]
pub enum OnIoError {
    /// The guest gets the error.
    #[default]
    Report,
    /// The machine is paused; when it is resumed, the request is made again. The function is told the image and the error,
    /// on a disk's thread, which must not wait: maybe several times until the machine stands.
    Pause(OnFailure),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered the machine off.
    PowerOff,
    /// The guest reset the machine, and [`RunConfig::no_reboot`] was set.
    Reset,
    /// The guest ended the run with this exit status, through debug-exit.
    Exit(u8),
    /// [`Running::stop`](crate::Running::stop) was called.
    Quit,
    /// The guest cannot go on: a triple fault with [`RunConfig::no_reboot`] set, or the engine failed.
    Crashed {
        /// The vCPU that it happened on.
        vcpu: u32,
        /// Where that vCPU was; 0 if that is not known.
        rip: u64,
        /// What happened.
        message: String,
    },
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest reset the machine"),
            Self::Exit(status) => write!(f, "the guest ended the run with status {status}"),
            Self::Quit => f.write_str("the machine was stopped"),
            Self::Crashed { vcpu, rip, message } => write!(f, "vCPU {vcpu} stopped at rip {rip:#x}: {message}"),
        }
    }
}
