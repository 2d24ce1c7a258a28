//! The lifecycle, with an engine whose processors run closures.

use std::{
    fs, io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use purlin_arch::x86_64::cpuid::CpuModel;
use purlin_engine::{After, EngineError, Exit};
use purlin_machine::testing::{Run, ScriptedEngine, kernels};
use purlin_vmm::{
    BalloonConfig, GuestEvent, GuestMemory, LifecycleError, OptionalDevice, Outcome, RunConfig, Running, Vmm,
    vsock::{HostSocket, VsockConfig},
};
use vm_memory::{Bytes, GuestAddress};

/// A kernel file that is gone with the value.
struct KernelFile(PathBuf);

impl KernelFile {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("purlin-vmm-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::write(&path, kernels::multiboot_flat(b"\xf4")).unwrap();
        Self(path)
    }
}

impl Drop for KernelFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

type Step = Result<Exit, EngineError>;

fn config(cpus: u32, script: impl Fn(&mut Run<'_>) -> Step + Send + Sync + 'static) -> (RunConfig, KernelFile) {
    let kernel = KernelFile::new();
    let config = RunConfig {
        kernel: kernel.0.clone(),
        initrds: Vec::new(),
        cmdline: String::new(),
        memory: 4 << 20,
        cpus,
        engine: Arc::new(ScriptedEngine::new(script)),
        cpu_model: CpuModel::V2,
        serial: true,
        // Asked for twice, it is there once.
        devices: vec![OptionalDevice::DebugExit, OptionalDevice::DebugExit],
        disks: Vec::new(),
        networks: Vec::new(),
        console: None,
        on_io_error: Default::default(),
        vsock: None,
        balloon: None,
        no_reboot: false,
    };
    (config, kernel)
}

fn start(config: &RunConfig) -> Running {
    Vmm::start(config.clone(), Box::new(io::sink())).unwrap()
}

/// Writes to a port as a guest does.
fn out(run: &Run<'_>, port: u16, value: u32) -> Step {
    assert_eq!(run.bus.port_out(port, 1, value), After::Leave);
    Ok(Exit::Kicked)
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what} never happened");
        thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn the_guest_ends_the_run() {
    let (config, _kernel) = config(2, |run| if run.index == 1 { out(run, 0xf4, 5) } else { run.halt() });
    // The status that debug-exit makes of 5 is the device's business; that it arrives is ours.
    assert!(matches!(start(&config).wait(), Outcome::Exit(_)));
}

#[test]
fn a_reset_starts_the_kernel_again_with_every_vcpu_as_after_power_up() {
    let boots = Arc::new(AtomicU32::new(0));
    let seen = boots.clone();
    let (config, _kernel) = config(2, move |run| {
        if run.index == 1 {
            // An application processor that a reset does not stop would be found here.
            assert_eq!((run.state.regs.rip, run.state.activity), (0xfff0, 2));
            run.state.regs.rip = 0x1234;
            let result = run.halt();
            run.state.regs.rip = 0xfff0;
            return result;
        }
        // The boot protocol's state, anew each time.
        assert_eq!(run.state.regs.gpr[0], 0x2bad_b002);
        assert_eq!(run.state.regs.rip, u64::from(kernels::CODE) + 32);
        run.state.regs.gpr[0] = 0;
        // The kernel's first byte is there again though the guest wrote over it.
        let code = GuestAddress(u64::from(kernels::CODE) + 32);
        assert_eq!(run.ram.read_obj::<u8>(code).unwrap(), 0xf4);
        run.ram.write_obj(0u8, code).unwrap();
        if seen.fetch_add(1, Ordering::SeqCst) < 3 { out(run, 0xcf9, 6) } else { Ok(Exit::Shutdown { rip: 0 }) }
    });
    let running = start(&config);
    eventually("the fifth boot", || boots.load(Ordering::SeqCst) >= 5);
    running.stop();
    assert_eq!(running.wait(), Outcome::Quit);
}

#[test]
fn no_reboot_ends_the_run_instead() {
    let (mut config, _kernel) = config(1, |run| out(run, 0xcf9, 6));
    config.no_reboot = true;
    assert_eq!(start(&config).wait(), Outcome::Reset);
}

#[test]
fn a_triple_fault_with_no_reboot_is_a_crash_that_says_where() {
    let (mut config, _kernel) = config(3, |run| match run.index {
        2 => Ok(Exit::Shutdown { rip: 0xdead }),
        _ => run.halt(),
    });
    config.no_reboot = true;
    let outcome = start(&config).wait();
    assert_eq!(outcome, Outcome::Crashed { vcpu: 2, rip: 0xdead, message: "triple fault".into() });
    assert_eq!(outcome.to_string(), "vCPU 2 stopped at rip 0xdead: triple fault");
}

#[test]
fn a_failed_engine_is_a_crash_that_says_where() {
    let (config, _kernel) =
        config(1, |_| Err(EngineError::Failed { engine: "scripted", rip: 0x42, reason: "no such luck".into() }));
    let message = "the scripted engine failed: no such luck".into();
    assert_eq!(start(&config).wait(), Outcome::Crashed { vcpu: 0, rip: 0x42, message });
}

#[test]
fn a_panicking_vcpu_thread_ends_the_run() {
    let (config, _kernel) = config(2, |run| if run.index == 1 { panic!("on purpose") } else { run.halt() });
    assert!(matches!(start(&config).wait(), Outcome::Crashed { vcpu: 1, .. }));
}

#[test]
fn paused_vcpus_stand_still_and_resume_where_they_were() {
    let steps = Arc::new(AtomicU64::new(0));
    let counter = steps.clone();
    let (config, _kernel) = config(4, move |run| {
        while !run.take_kick() {
            run.state.regs.gpr[3] += 1;
            counter.fetch_add(1, Ordering::SeqCst);
        }
        Ok(Exit::Kicked)
    });
    let running = start(&config);
    for _ in 0..20 {
        let before = steps.load(Ordering::SeqCst);
        eventually("a step", || steps.load(Ordering::SeqCst) > before);
        running.pause().unwrap();
        let paused = steps.load(Ordering::SeqCst);
        thread::sleep(Duration::from_millis(1));
        assert_eq!(steps.load(Ordering::SeqCst), paused);
        running.pause().unwrap();
        running.resume().unwrap();
        running.resume().unwrap();
    }
    running.stop();
    assert_eq!(running.wait(), Outcome::Quit);
    assert!(matches!(running.pause(), Err(LifecycleError::Stopped)));
}

#[test]
fn a_request_during_a_pause_is_not_lost() {
    let inside = Arc::new(AtomicU32::new(0));
    let signal = inside.clone();
    let (config, _kernel) = config(1, move |run| {
        signal.store(1, Ordering::SeqCst);
        while !run.take_kick() {
            thread::yield_now();
        }
        // The kick of the pause and the end of the run fall together.
        out(run, 0xf4, 0)
    });
    let running = start(&config);
    eventually("the vCPU", || inside.load(Ordering::SeqCst) == 1);
    assert!(matches!(running.pause(), Err(LifecycleError::Stopped)));
    assert!(matches!(running.wait(), Outcome::Exit(_)));
}

/// One that runs may send interrupts, which those who take over a state forget.
#[test]
fn no_vcpu_runs_before_all_have_taken_over_their_states() {
    let (config, _kernel) = config(4, |run| {
        assert_eq!(run.restored, 4);
        run.halt()
    });
    let running = start(&config);
    for _ in 0..5 {
        running.pause().unwrap();
        running.resume().unwrap();
    }
    running.stop();
    assert_eq!(running.wait(), Outcome::Quit);
}

/// A timer that is due while the vCPUs are being stopped interrupts before their states are taken, not after.
#[test]
fn a_paused_machine_sends_no_interrupt() {
    let armed = Arc::new(AtomicU32::new(0));
    let signal = armed.clone();
    let engine = Arc::new(ScriptedEngine::new(move |run| {
        // The timer (MADT: at input 2) as vector 0x31, 1000 times a second.
        const IOAPIC: u64 = 0xfec0_0000;
        for (offset, value) in [(0, 0x14u32), (0x10, 0x31)] {
            assert_eq!(run.bus.mmio_write(IOAPIC + offset, &value.to_le_bytes()), After::Continue);
        }
        for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
            assert_eq!(run.bus.port_out(port, 1, value), After::Continue);
        }
        signal.fetch_add(1, Ordering::SeqCst);
        let kicked = run.halt();
        // It takes its time to stop.
        thread::sleep(Duration::from_millis(10));
        kicked
    }));
    let (mut config, _kernel) = config(1, |_| unreachable!());
    config.engine = engine.clone();
    let running = start(&config);
    for round in 1..=5 {
        eventually("the timer", || armed.load(Ordering::SeqCst) >= round);
        running.pause().unwrap();
        assert!(!engine.vm().take_messages().is_empty(), "the timer came");
        running.save().unwrap();
        assert_eq!(engine.vm().take_messages(), []);
        running.resume().unwrap();
    }
    running.stop();
    assert_eq!(running.wait(), Outcome::Quit);
}

#[test]
fn a_saved_machine_goes_on_in_a_new_one() {
    let script = |run: &mut Run<'_>| {
        while !run.take_kick() {
            run.state.regs.gpr[3] += 1;
            run.ram.write_obj(run.state.regs.gpr[3], GuestAddress(0x20_0000 + 8 * u64::from(run.index))).unwrap();
            if run.state.regs.gpr[3] > 200_000 && run.state.regs.gpr[5] != 0 {
                return out(run, 0xf4, 1);
            }
        }
        // From here on it is the second life.
        run.state.regs.gpr[5] = 1;
        Ok(Exit::Kicked)
    };
    let (config, _kernel) = config(2, script);
    let first = start(&config);
    assert!(matches!(first.save(), Err(LifecycleError::NotPaused)));
    let has_run = |vcpu: u64| {
        let memory = first.memory().unwrap();
        let count: u64 = memory.read_obj(GuestAddress(0x20_0000 + 8 * vcpu)).unwrap();
        count > 0
    };
    while !(has_run(0) && has_run(1)) {
        thread::sleep(Duration::from_millis(1));
    }
    first.pause().unwrap();
    let state = first.save().unwrap();
    assert_eq!(state, first.save().unwrap(), "a paused machine does not change");

    let copy = |to: &purlin_engine::memory::GuestRam| {
        let mut bytes = vec![0; (4 << 20) - 0x10_0000];
        first.memory().unwrap().read_slice(&mut bytes, GuestAddress(0x10_0000)).unwrap();
        to.write_slice(&bytes, GuestAddress(0x10_0000)).unwrap();
        Ok(())
    };
    let second = Vmm::restore(config.clone(), &state, copy, Box::new(io::sink())).unwrap();
    assert_eq!(second.save().unwrap(), state, "a restored machine is the one that was saved");
    for vcpu in 0..2u64 {
        let count: u64 = second.memory().unwrap().read_obj(GuestAddress(0x20_0000 + 8 * vcpu)).unwrap();
        assert!(count > 0, "vCPU {vcpu} had not run");
    }
    second.resume().unwrap();
    assert!(matches!(second.wait(), Outcome::Exit(_)));
    drop(first);
}

/// Where the generation ID is (`purlin_machine::layout`).
const GENERATION_ID: GuestAddress = GuestAddress(0xf_f000);

#[test]
fn a_copy_has_another_generation_id_and_a_moved_machine_the_same() {
    let (config, _kernel) = config(1, |run| run.halt());
    let id = |running: &Running| running.memory().unwrap().read_obj::<[u8; 16]>(GENERATION_ID).unwrap();
    let first = start(&config);
    first.pause().unwrap();
    let (state, first_id) = (first.save().unwrap(), id(&first));
    let again = || {
        let copy = |to: &purlin_engine::memory::GuestRam| Ok(to.write_obj(first_id, GENERATION_ID)?);
        Vmm::restore(config.clone(), &state, copy, Box::new(io::sink())).unwrap()
    };
    let moved = again();
    assert_eq!((id(&moved), moved.save().unwrap()), (first_id, state.clone()));
    let copies = [again(), again()];
    copies.iter().for_each(|copy| copy.renew_generation().unwrap());
    let [second_id, third_id] = [id(&copies[0]), id(&copies[1])];
    assert!(first_id != second_id && second_id != third_id && first_id != third_id);
    // A state of the copy is the copy's.
    let state = copies[0].save().unwrap();
    let load = |to: &purlin_engine::memory::GuestRam| Ok(to.write_obj(second_id, GENERATION_ID)?);
    let later = Vmm::restore(config.clone(), &state, load, Box::new(io::sink())).unwrap();
    assert_eq!((id(&later), later.save().unwrap()), (second_id, state));
}

#[test]
fn a_guest_that_says_that_it_has_panicked_is_heard_and_goes_on() {
    let is_heard = Arc::new(AtomicU32::new(0));
    let listens = is_heard.clone();
    let (config, _kernel) = config(1, move |run| {
        while listens.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        assert_eq!(run.bus.port_out(0x505, 1, 1), After::Continue);
        out(run, 0xf4, 5)
    });
    let running = start(&config);
    let (sender, events) = std::sync::mpsc::channel();
    running.on_guest_event(move |event| sender.send(event).unwrap());
    is_heard.store(1, Ordering::SeqCst);
    assert!(matches!(running.wait(), Outcome::Exit(_)));
    assert_eq!(events.try_iter().collect::<Vec<_>>(), [GuestEvent::Panicked]);
}

#[test]
fn a_saved_state_that_makes_no_sense_is_refused() {
    let (config, _kernel) = config(1, |run| run.halt());
    let running = start(&config);
    running.pause().unwrap();
    let good = running.save().unwrap();
    for index in 0..good.sections.len() {
        let mut state = good.clone();
        let name = state.sections.remove(index).name;
        let error = Vmm::restore(config.clone(), &state, |_| Ok(()), Box::new(io::sink())).err().unwrap();
        assert_eq!(error.to_string(), format!("saved state has no section '{name}'"));

        let mut state = good.clone();
        state.sections[index].version += 1000;
        let error = Vmm::restore(config.clone(), &state, |_| Ok(()), Box::new(io::sink())).err().unwrap();
        assert!(error.to_string().contains("this program knows up to"), "{error}");
    }
}

/// The first dword of the configuration space of the device in this slot.
fn identity(run: &Run<'_>, slot: u64) -> u32 {
    let mut data = [0; 4];
    run.bus.mmio_read(0xe000_0000 + (slot << 15), &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn a_machine_with_a_balloon_and_a_vsock_goes_on_with_both() {
    let seen = Arc::new(AtomicU32::new(0));
    let guest = seen.clone();
    let (mut config, _kernel) = config(1, move |run| {
        assert_eq!((identity(run, 3), identity(run, 4)), (0x1045_1af4, 0x1053_1af4));
        guest.fetch_add(1, Ordering::SeqCst);
        run.halt()
    });
    let dir = tempfile::tempdir().unwrap();
    let socket = HostSocket::bind(&dir.path().join("vsock")).unwrap();
    config.vsock = Some(VsockConfig { guest_cid: 5, socket: Arc::new(socket) });
    config.balloon = Some(BalloonConfig { size: 1 << 20, deflate_on_oom: false, free_page_reporting: true });
    let first = start(&config);
    eventually("the guest", || seen.load(Ordering::SeqCst) > 0);
    let balloon = first.balloon().unwrap();
    assert_eq!((balloon.target(), balloon.actual()), (1 << 20, 0));
    let memory = |running: &Running| running.guest_memory().unwrap();
    assert_eq!(memory(&first), GuestMemory { most: 4 << 20, wanted: 3 << 20, now: 4 << 20 });
    first.set_guest_memory(u64::MAX);
    assert_eq!(memory(&first).wanted, 4 << 20);
    first.set_guest_memory(2 << 20);
    assert_eq!((memory(&first).wanted, balloon.target()), (2 << 20, 2 << 20));
    first.pause().unwrap();
    let state = first.save().unwrap();
    drop(first);

    // What the state says counts for the balloon.
    let given = RunConfig { balloon: None, ..config.clone() };
    let second = Vmm::restore(given, &state, |_| Ok(()), Box::new(io::sink())).unwrap();
    assert_eq!(second.save().unwrap(), state);
    assert_eq!(memory(&second), GuestMemory { most: 4 << 20, wanted: 2 << 20, now: 4 << 20 });
    drop(second);

    let without = RunConfig { vsock: None, ..config.clone() };
    let error = Vmm::restore(without, &state, |_| Ok(()), Box::new(io::sink())).err().unwrap();
    assert_eq!(
        error.to_string(),
        "the saved machine had a vsock device and is given no vsock device: give it the same"
    );
    drop(config);
    assert!(!dir.path().join("vsock").exists(), "the socket stays behind");
}

#[test]
fn bad_input_is_refused_before_anything_runs() {
    let (good, _kernel) = config(1, |_| unreachable!("it must not start"));
    let refuse = |change: &dyn Fn(&mut RunConfig)| {
        let mut config = good.clone();
        change(&mut config);
        Vmm::start(config, Box::new(io::sink())).err().expect("it must be refused").to_string()
    };
    let cases = [
        (refuse(&|c| c.kernel = "/no/such/kernel".into()), "cannot read the kernel '/no/such/kernel': No such file"),
        (refuse(&|c| c.kernel = "/".into()), "cannot read the kernel '/': it is neither a regular file nor a pipe"),
        (refuse(&|c| c.kernel = "/dev/zero".into()), "cannot read the kernel '/dev/zero': it is neither"),
        (refuse(&|c| c.initrds = vec!["/no/such/initrd".into()]), "cannot read the initrd '/no/such/initrd'"),
        (refuse(&|c| c.memory = 0), "0 bytes of memory is too little"),
        (refuse(&|c| c.memory = 1 << 50), "1024 TiB of memory is more than this host has"),
        (
            refuse(&|c| c.balloon = Some(BalloonConfig { size: 4 << 20, ..BalloonConfig::default() })),
            "a balloon of 4 MiB leaves nothing of 4 MiB of memory",
        ),
        (refuse(&|c| c.cpus = 0), "a machine cannot have 0 processors"),
        (refuse(&|c| c.cpus = 10_000), "a machine cannot have 10000 processors"),
    ];
    for (message, expected) in cases {
        assert!(message.starts_with(expected), "{message}");
        assert!(!message.contains('\n'));
    }
}

#[test]
fn dropping_a_run_ends_it() {
    let (config, _kernel) = config(2, |run| run.halt());
    let running = start(&config);
    let input = running.serial_input();
    drop(running);
    assert!(!input.push(b"x"), "input for a run that is over is turned away");
}
