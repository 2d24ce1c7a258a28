//! Copies of a running Debian, under the translator: each gets a generation ID of its own, at which its kernel makes new
//! randomness; a machine that is moved does not.
//!
//! `cargo xtask midboot` runs it; alone it needs `PURLIN_TEST_KERNEL` and `PURLIN_TEST_INITRD`: a kernel that has
//! CONFIG_VMGENID built in (Debian's linux-image-amd64) and the initramfs that `purlin run shell` boots.

mod support;

use std::{
    env,
    io::{self, Write},
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use purlin_arch::x86_64::cpuid::CpuModel;
use purlin_engine::memory::GuestRam;
use purlin_engine_translator::TranslatorEngine;
use purlin_vmm::{RunConfig, Running, Vmm};
use support::copy_memory;

/// Far more than anything here takes, also on a loaded host.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the shell says when it takes commands.
const PROMPT: &str = "root@purlin:~# ";

/// What Linux says as it reseeds for a copy (drivers/char/random.c).
const RESEEDED: &str = "crng reseeded due to virtual machine fork";

/// The guest's serial output.
#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Console {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }

    fn wait_for(&self, text: &str) {
        self.wait_for_again(text, 1);
    }

    /// Waits until it has been said `times` times.
    fn wait_for_again(&self, text: &str, times: usize) {
        let start = Instant::now();
        while self.text().matches(text).count() < times {
            assert!(start.elapsed() < PATIENCE, "not {times} times '{text}' in:\n{}", self.text());
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A machine with a guest that goes on from `first`, which is paused.
fn go_on(config: &RunConfig, first: &Running) -> (Running, Console) {
    let (console, memory) = (Console::default(), first.memory().unwrap());
    let load = |to: &GuestRam| {
        copy_memory(&memory, to);
        Ok(())
    };
    let running = Vmm::restore(config.clone(), &first.save().unwrap(), load, Box::new(console.clone())).unwrap();
    (running, console)
}

#[test]
#[ignore = "takes some seconds, and a Debian kernel, which `cargo xtask midboot` provides"]
fn a_copy_of_a_machine_makes_new_randomness() {
    let file = |name: &str| PathBuf::from(env::var_os(name).expect("`cargo xtask midboot` says which file"));
    let config = RunConfig {
        kernel: file("PURLIN_TEST_KERNEL"),
        initrds: vec![file("PURLIN_TEST_INITRD")],
        cmdline: "console=ttyS0".into(),
        memory: 512 << 20,
        cpus: 2,
        engine: Arc::new(TranslatorEngine::new().unwrap()),
        cpu_model: CpuModel::Host,
        serial: true,
        devices: Vec::new(),
        disks: Vec::new(),
        networks: Vec::new(),
        console: None,
        vsock: None,
        balloon: None,
        on_io_error: Default::default(),
        no_reboot: true,
    };
    let console = Console::default();
    let first = Vmm::start(config.clone(), Box::new(console.clone())).unwrap();
    console.wait_for(PROMPT);
    console.wait_for("random: crng init done");
    first.pause().unwrap();

    let (moved, console) = go_on(&config, &first);
    moved.resume().unwrap();
    assert!(moved.serial_input().push(b"echo asked; dmesg | grep -c 'machine fork'; echo answered\n"));
    console.wait_for("asked\r\n0\r\nanswered");
    drop(moved);

    for _ in 0..2 {
        let (copy, console) = go_on(&config, &first);
        copy.renew_generation().unwrap();
        copy.resume().unwrap();
        console.wait_for(RESEEDED);
        // A copy of the copy, while that runs.
        copy.renew_generation().unwrap();
        console.wait_for_again(RESEEDED, 2);
    }
}
