//! Clones of a running machine, with an engine whose processors run closures.

use std::{
    fs, io,
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use purlin_arch::x86_64::cpuid::CpuModel;
use purlin_engine::Exit;
use purlin_machine::testing::{Run, ScriptedEngine, kernels};
use purlin_vmm::{FreezeSpec, Frozen, OptionalDevice, RunConfig, Running, Vmm};
use vm_memory::{Bytes, GuestAddress};

/// Where the guest counts, two numbers that are always equal between two steps, on pages far from each other.
const COUNTS: [u64; 2] = [0x20_0000, 0x3f_f000];
/// Where a test tells it who it is.
const NAME: GuestAddress = GuestAddress(0x21_0000);
/// Where it writes that for each step, so that it changes most of its memory.
const NAMES: std::ops::Range<u64> = 0x22_0000..0x3f_0000;

fn guest(run: &mut Run<'_>) -> Result<Exit, purlin_engine::EngineError> {
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

fn config(name: &str) -> (RunConfig, PathBuf) {
    let kernel = std::env::temp_dir().join(format!("purlin-vmm-fork-{name}-{}", std::process::id()));
    fs::write(&kernel, kernels::multiboot_flat(b"\xf4")).unwrap();
    let config = RunConfig {
        kernel: kernel.clone(),
        initrds: Vec::new(),
        cmdline: String::new(),
        memory: 4 << 20,
        cpus: 1,
        engine: Arc::new(ScriptedEngine::new(guest)),
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
    };
    (config, kernel)
}

fn read(running: &Running, address: u64) -> u64 {
    running.memory().unwrap().read_obj(GuestAddress(address)).unwrap()
}

fn wait_for_steps(running: &Running, steps: u64) {
    let (start, from) = (Instant::now(), read(running, COUNTS[0]));
    while read(running, COUNTS[0]) < from + steps {
        assert!(start.elapsed() < Duration::from_secs(60), "it does not run");
        thread::sleep(Duration::from_millis(1));
    }
}

fn clone_of(config: &RunConfig, frozen: &Frozen) -> Running {
    Vmm::restore_from(config.clone(), &frozen.state, &frozen.memory, Box::new(io::sink())).unwrap()
}

#[test]
fn ten_clones_go_on_each_by_itself() {
    let (config, kernel) = config("ten");
    let parent = Vmm::start(config.clone(), Box::new(io::sink())).unwrap();
    let mut clones = Vec::new();
    for name in 1..=10u64 {
        // Longer than the memory that it writes: that is what the last clone's layer has.
        wait_for_steps(&parent, 1000);
        let frozen = parent.fork(&FreezeSpec::default()).unwrap();
        let clone = clone_of(&config, &frozen);
        let counts = COUNTS.map(|at| read(&clone, at));
        assert!(counts[0] == counts[1] && counts[0] >= 1000 * name, "{counts:?} is no one moment");
        let memory = clone.memory().unwrap();
        NAMES.step_by(4096).for_each(|at| assert_eq!(memory.read_obj::<u64>(GuestAddress(at)).unwrap(), 0));
        memory.write_obj(name, NAME).unwrap();
        clone.resume().unwrap();
        clones.push(clone);
    }
    // A clone of a clone.
    let frozen = clones[4].fork(&FreezeSpec::default()).unwrap();
    clones.push(clone_of(&config, &frozen));
    clones[10].memory().unwrap().write_obj(11u64, NAME).unwrap();
    clones[10].resume().unwrap();
    for (running, name) in clones.iter().chain([&parent]).zip((1..=11).chain([0])) {
        wait_for_steps(running, 1000);
        running.pause().unwrap();
        let memory = running.memory().unwrap();
        let wrong = NAMES.step_by(4096).find(|at| memory.read_obj::<u64>(GuestAddress(*at)).unwrap() != name);
        assert_eq!(wrong, None, "the memory of {name}");
    }
    fs::remove_file(kernel).unwrap();
}

#[test]
fn a_paused_machine_is_forked_and_stays_paused() {
    let (config, kernel) = config("paused");
    let parent = Vmm::start(config.clone(), Box::new(io::sink())).unwrap();
    wait_for_steps(&parent, 10);
    parent.pause().unwrap();
    let (state, count) = (parent.save().unwrap(), read(&parent, COUNTS[0]));
    let frozen = parent.fork(&FreezeSpec::default()).unwrap();
    assert_eq!((&frozen.state, frozen.pause), (&state, Duration::ZERO));
    assert_eq!((parent.save().unwrap(), read(&parent, COUNTS[0])), (state, count));
    let clone = clone_of(&config, &frozen);
    assert_eq!(clone.save().unwrap(), frozen.state);
    // The saved state is of another machine than this memory.
    let half = RunConfig { memory: 8 << 20, ..config.clone() };
    let other = Vmm::start(half.clone(), Box::new(io::sink())).unwrap();
    let other = other.fork(&FreezeSpec::default()).unwrap();
    let refused = Vmm::restore_from(half, &frozen.state, &other.memory, Box::new(io::sink()));
    assert!(refused.err().unwrap().to_string().contains("not of one moment"));
    fs::remove_file(kernel).unwrap();
}
