//! Copies of a running Debian, under the translator: each gets a generation ID of its own, at which its kernel makes new
//! randomness; a machine that is moved does not.
//!
//! `cargo xtask midboot` runs it; alone it needs `PURLIN_TEST_KERNEL` and `PURLIN_TEST_INITRD`: a kernel that has
//! CONFIG_VMGENID built in (Debian's linux-image-amd64) and the initramfs that `purlin run shell` boots.

mod support;

use std::{
    env, fs,
    io::{self, Write},
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use purlin_arch::x86_64::cpuid::CpuModel;
use purlin_engine::memory::{self, GuestRam};
use purlin_engine_translator::TranslatorEngine;
use purlin_vmm::{FreezeSpec, Pages, RunConfig, Running, SnapshotSpec, Vmm};
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

fn config() -> RunConfig {
    let file = |name: &str| PathBuf::from(env::var_os(name).expect("`cargo xtask midboot` says which file"));
    RunConfig {
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
    }
}

#[test]
#[ignore = "takes some seconds, and a Debian kernel, which `cargo xtask midboot` provides"]
fn a_copy_of_a_machine_makes_new_randomness() {
    let config = config();
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

/// What the kernel says of this process's memory that is its alone and was written, in KiB.
fn private_dirty() -> u64 {
    let rollup = fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Private_Dirty:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Ten clones of a Debian that runs: each has the memory of that moment, and goes on by itself. Prints what they cost.
#[test]
#[ignore = "takes some seconds, and a Debian kernel, which `cargo xtask midboot` provides"]
fn ten_clones_of_a_running_machine() {
    let memory = env::var("PURLIN_TEST_MEMORY").map_or(512, |mib| mib.parse().unwrap()) << 20;
    let config = RunConfig { memory, ..config() };
    let console = Console::default();
    let parent = Vmm::start(config.clone(), Box::new(console.clone())).unwrap();
    console.wait_for(PROMPT);
    let tell = |running: &Running, line: &str| assert!(running.serial_input().push(format!("{line}\n").as_bytes()));
    tell(&parent, "i=0; (while sleep 0.1; do i=$((i+1)); echo $i > /dev/shm/count; done) & echo go''ing");
    console.wait_for("going");
    let mut clones = Vec::new();
    for name in 0..10 {
        tell(&parent, &format!("echo {name} > /dev/shm/name; echo na''med {name}"));
        console.wait_for(&format!("named {name}"));
        let (console, start) = (Console::default(), Instant::now());
        let frozen = parent.fork(&FreezeSpec::default()).unwrap();
        let forked = start.elapsed();
        let out = Box::new(console.clone());
        let clone = Vmm::restore_from(config.clone(), &frozen.state, &frozen.memory, frozen.saved_code().as_ref(), out)
            .unwrap();
        let restored = start.elapsed() - forked;
        println!("clone {name}: fork {forked:.1?} (pause {:.1?}), restore {restored:.1?}", frozen.pause);
        clones.push((clone, console));
    }
    for (clone, _) in &clones {
        clone.renew_generation().unwrap();
        let start = Instant::now();
        clone.resume().unwrap();
        println!("resumed in {:.1?}", start.elapsed());
    }
    for (name, (clone, console)) in clones.iter().enumerate() {
        // It is the one of that moment, whatever the others have written, and what it writes is seen by nobody else.
        tell(clone, &format!("echo is $(cat /dev/shm/name); echo clone-{name} > /dev/shm/name; echo wr''itten"));
        console.wait_for(&format!("is {name}\r\n"));
        console.wait_for("written");
        let own = memory::usage(&clone.memory().unwrap()).unwrap() >> 10;
        println!("clone {name}: {own} KiB of its own");
    }
    for (name, (clone, console)) in clones.iter().enumerate() {
        tell(clone, "echo now $(cat /dev/shm/name)");
        console.wait_for(&format!("now clone-{name}\r\n"));
    }
    tell(&parent, "echo parent $(cat /dev/shm/name)");
    console.wait_for("parent 9\r\n");
    let own = memory::usage(&parent.memory().unwrap()).unwrap() >> 10;
    println!("parent: {own} KiB of its own; the process: {} KiB private and dirty", private_dirty());
}

/// Snapshots of a Debian with 1 GiB, as files, and machines that go on from them. Prints what they cost.
#[test]
#[ignore = "takes some seconds, and a Debian kernel, which `cargo xtask midboot` provides"]
fn snapshots_of_a_running_machine() {
    let directory = tempfile::tempdir().unwrap();
    let config = RunConfig { memory: 1 << 30, ..config() };
    let console = Console::default();
    let running = Vmm::start(config.clone(), Box::new(console.clone())).unwrap();
    console.wait_for(PROMPT);
    let tell = |running: &Running, line: &str| assert!(running.serial_input().push(format!("{line}\n").as_bytes()));
    tell(&running, "head -c 200m /dev/urandom > /dev/shm/ballast; sha1sum < /dev/shm/ballast; echo fi''lled");
    console.wait_for("filled");
    // Of what is in the ballast: sha1sum's line.
    let sum = console.text().lines().find_map(|line| line.strip_suffix("  -").map(str::to_owned)).unwrap();
    let spec = |name: u32| SnapshotSpec {
        path: directory.path().join(name.to_string()),
        machine: "test".into(),
        disks: FreezeSpec::default(),
        incremental: name > 0,
    };
    for name in 0..4 {
        tell(&running, &format!("echo {name} > /dev/shm/name; echo na''med {name}"));
        console.wait_for(&format!("named {name}"));
        let start = Instant::now();
        let taken = running.snapshot(&spec(name)).unwrap();
        let (pages, pause, all) = (taken.pages, taken.pause, start.elapsed());
        println!("snapshot {name}: {pages} pages, pause {pause:.1?}, {all:.1?} in all");
    }
    drop(running);
    for (name, pages) in (0..4).zip([Pages::Mapped, Pages::Copied, Pages::Unchecked, Pages::Mapped]) {
        let (console, start) = (Console::default(), Instant::now());
        let out = Box::new(console.clone());
        let again = Vmm::restore_snapshot(config.clone(), &spec(name).path, pages, out).unwrap();
        println!("restore {name}, {pages:?}: {:.1?}", start.elapsed());
        again.resume().unwrap();
        tell(&again, "echo is $(cat /dev/shm/name); sha1sum < /dev/shm/ballast; echo ch''ecked");
        console.wait_for(&format!("is {name}\r\n"));
        console.wait_for("checked");
        assert!(console.text().contains(&sum), "no {sum} in:\n{}", console.text());
    }
}
