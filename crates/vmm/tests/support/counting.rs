//! A guest that counts, for an engine whose processors run closures.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use purlin_arch::x86_64::cpuid::CpuModel;
use purlin_engine::{EngineError, Exit};
use purlin_machine::testing::{Run, ScriptedEngine, kernels};
use purlin_vmm::{OptionalDevice, RunConfig, Running};
use vm_memory::{Bytes, GuestAddress};

/// Where the guest counts, two numbers that are always equal between two steps, on pages far from each other.
pub const COUNTS: [u64; 2] = [0x20_0000, 0x3f_f000];
/// Where a test tells it who it is.
pub const NAME: GuestAddress = GuestAddress(0x21_0000);
/// Where it writes that for each step, so that it changes most of its memory.
pub const NAMES: std::ops::Range<u64> = 0x22_0000..0x3f_0000;

fn guest(run: &mut Run<'_>) -> Result<Exit, EngineError> {
    while !run.take_kick() {
        let count: u64 = run.ram.read_obj(GuestAddress(COUNTS[0])).unwrap();
        let name: u64 = run.ram.read_obj(NAME).unwrap();
        let page = NAMES.start + count * 4096 % (NAMES.end - NAMES.start);
        for (address, value) in [(COUNTS[0], count + 1), (COUNTS[1], count + 1), (page, name)] {
            run.ram.write_obj(value, GuestAddress(address)).unwrap();
        }
    }
    Ok(Exit::Kicked)
}

/// The engine that runs it.
pub fn engine() -> ScriptedEngine {
    ScriptedEngine::new(guest)
}

/// A machine with this guest, whose kernel's file is made in `directory`.
pub fn config(directory: &Path) -> RunConfig {
    let kernel: PathBuf = directory.join("kernel");
    fs::write(&kernel, kernels::multiboot_flat(b"\xf4")).unwrap();
    RunConfig {
        kernel,
        initrds: Vec::new(),
        cmdline: String::new(),
        memory: 4 << 20,
        cpus: 1,
        engine: Arc::new(engine()),
        cpu_model: CpuModel::V2,
        serial: false,
        devices: vec![OptionalDevice::DebugExit],
        disks: Vec::new(),
        networks: Vec::new(),
        console: None,
        on_io_error: Default::default(),
        vsock: None,
        balloon: None,
        no_reboot: true,
    }
}

pub fn read(running: &Running, address: u64) -> u64 {
    running.memory().unwrap().read_obj(GuestAddress(address)).unwrap()
}

pub fn wait_for_steps(running: &Running, steps: u64) {
    let (start, from) = (Instant::now(), read(running, COUNTS[0]));
    while read(running, COUNTS[0]) < from + steps {
        assert!(start.elapsed() < Duration::from_secs(60), "it does not run");
        thread::sleep(Duration::from_millis(1));
    }
}
