//! The engine seam on /dev/kvm.
//!
//! KVM runs with a split irqchip: the kernel emulates the local APICs, the machine above owns the 8259 pair, the
//! I/O APIC and the PIT. From the top: [`KvmEngine`] makes a [`vm::KvmVm`], whose [`vcpu::KvmVcpu`]s run until
//! something happens that only the machine can deal with. [`mod@probe`] finds out whether this host's KVM is worth using.

mod cpuid;
mod device;
mod engine;
mod failure;
#[allow(unsafe_code, reason = "KVM's ioctls that kvm-ioctls does not wrap")]
mod ioctls;
#[allow(unsafe_code, reason = "signals sent to one thread")]
mod kick;
pub mod probe;
mod routes;
#[allow(unsafe_code, reason = "the page that the kernel shares with us")]
mod run_page;
mod state;
mod vcpu;
#[allow(unsafe_code, reason = "guest memory is handed to the kernel by host address")]
mod vm;

pub use device::{DeviceError, open as open_device};
pub use engine::KvmEngine;
pub use probe::{Obstacle, Probed, probe};

use purlin_engine::EngineError;

/// The engine's name ([`purlin_engine::Engine::name`]).
pub const NAME: &str = "kvm";

/// An ioctl's error as the seam's.
fn host_error(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> EngineError {
    move |e| EngineError::Host { what, source: std::io::Error::from_raw_os_error(e.errno()) }
}
