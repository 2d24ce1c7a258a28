//! Pauses, saves and restores in the midst of block requests, made by a scripted guest through PCI and a virtqueue.

use std::{
    env, fs, io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use purlin_arch::x86_64::cpuid::CpuModel;
use purlin_engine::{After, EngineError, Exit, memory::GuestRam};
use purlin_machine::testing::{Run, ScriptedEngine, kernels};
use purlin_state::SavedState;
use purlin_vmm::{
    FreezeError, FreezeSpec, LifecycleError, OnIoError, OptionalDevice, Outcome, RunConfig, Running, Vmm,
    storage::{Disk, DiskSpec, NewImage},
};
use vm_memory::{Bytes, GuestAddress};

/// Requests of the guest: each writes its own sector.
const REQUESTS: u64 = 2000;
/// So many are under way at once.
const BATCH: u64 = 16;

/// The configuration space of the first disk: bus 0, device 8.
const DISK: u64 = 0xe000_0000 + (8 << 15);
/// Where the guest keeps its rings, and for each request of a batch its header, data and status.
const DESCRIPTORS: u64 = 0x20_0000;
const AVAILABLE: u64 = 0x20_1000;
const USED: u64 = 0x20_2000;
const HEADERS: u64 = 0x20_3000;
const STATUSES: u64 = 0x20_4000;
const DATA: u64 = 0x21_0000;

/// General registers in which the guest remembers how far it is.
const BAR: usize = 1;
const OFFERED: usize = 2;
const DONE: usize = 3;

fn mmio_write(run: &Run<'_>, address: u64, data: &[u8]) {
    assert_eq!(run.bus.mmio_write(address, data), After::Continue);
}

fn mmio_read(run: &Run<'_>, address: u64) -> u64 {
    let mut data = [0; 4];
    run.bus.mmio_read(address, &mut data);
    u32::from_le_bytes(data).into()
}

fn store(run: &Run<'_>, address: u64, data: &[u8]) {
    run.ram.write_slice(data, GuestAddress(address)).unwrap();
}

/// Finds the disk where firmware put it, and sets up one queue of 64 with a vector.
fn set_up(run: &mut Run<'_>) {
    assert_eq!(mmio_read(run, DISK), 0x1042_1af4);
    let bar = mmio_read(run, DISK + 0x10);
    assert!((0xc000_0000..0xe000_0000).contains(&bar), "{bar:#x}");
    for (at, word) in (0..).step_by(4).zip([0xfee0_0000u32, 0, 0x51, 0]) {
        mmio_write(run, bar + 0x4010 + at, &word.to_le_bytes());
    }
    let capabilities = std::iter::successors(Some(mmio_read(run, DISK + 0x34) & 0xff), |at| {
        Some(mmio_read(run, DISK + at) >> 8 & 0xff).filter(|next| *next != 0)
    });
    let msix = capabilities.into_iter().find(|at| mmio_read(run, DISK + at) & 0xff == 0x11).unwrap();
    mmio_write(run, DISK + msix + 2, &0x8000u16.to_le_bytes());

    let registers: [(u64, &[u8]); 12] = [
        (0x14, &[0]),
        (0x14, &[1]),
        (0x14, &[3]),
        (0x08, &1u32.to_le_bytes()),
        (0x0c, &1u32.to_le_bytes()),
        (0x14, &[0xb]),
        (0x18, &64u16.to_le_bytes()),
        (0x1a, &1u16.to_le_bytes()),
        (0x20, &DESCRIPTORS.to_le_bytes()),
        (0x28, &AVAILABLE.to_le_bytes()),
        (0x30, &USED.to_le_bytes()),
        (0x1c, &1u16.to_le_bytes()),
    ];
    registers.iter().for_each(|(at, value)| mmio_write(run, bar + at, value));
    mmio_write(run, bar + 0x14, &[0xf]);
    assert_eq!(mmio_read(run, bar + 0x14) & 0xff, 0xf);
    run.state.regs.gpr[BAR] = bar;
    run.state.regs.gpr[OFFERED] = 0;
    run.state.regs.gpr[DONE] = 0;
}

/// Makes one more request: a write of its number to its sector.
fn offer(run: &mut Run<'_>, number: u64) {
    let place = number % BATCH;
    let (header, data, status) = (HEADERS + 16 * place, DATA + 512 * place, STATUSES + place);
    store(run, header, &[1u64.to_le_bytes(), number.to_le_bytes()].concat());
    store(run, data, &number.to_le_bytes().repeat(64));
    store(run, status, &[0xee]);
    let head = 3 * place as u16;
    let chain = [(header, 16u32, 1u16), (data, 512, 1), (status, 1, 2)];
    for (at, (address, length, flags)) in (head..).zip(chain) {
        let descriptor =
            [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &(at + 1).to_le_bytes()].concat();
        store(run, DESCRIPTORS + 16 * u64::from(at), &descriptor);
    }
    store(run, AVAILABLE + 4 + 2 * (number % 64), &head.to_le_bytes());
    run.ram.store(number as u16 + 1, GuestAddress(AVAILABLE + 2), Ordering::SeqCst).unwrap();
    run.state.regs.gpr[OFFERED] = number + 1;
    mmio_write(run, run.state.regs.gpr[BAR] + 0x3000, &[0, 0]);
}

/// The guest's program: batch after batch, and out.
fn guest(run: &mut Run<'_>) -> Result<Exit, EngineError> {
    guest_up_to(run, &AtomicU64::new(REQUESTS))
}

/// The same, which makes no more requests than it may.
fn guest_up_to(run: &mut Run<'_>, limit: &AtomicU64) -> Result<Exit, EngineError> {
    if run.state.regs.gpr[BAR] < 0xc000_0000 {
        set_up(run);
    }
    loop {
        if run.take_kick() {
            return Ok(Exit::Kicked);
        }
        let [offered, done] = [run.state.regs.gpr[OFFERED], run.state.regs.gpr[DONE]];
        let used: u16 = run.ram.load(GuestAddress(USED + 2), Ordering::SeqCst).unwrap();
        if used != done as u16 {
            // Each chain comes back once.
            let head: u32 = run.ram.read_obj(GuestAddress(USED + 4 + 8 * (done % 64))).unwrap();
            let status = GuestAddress(STATUSES + u64::from(head) / 3);
            assert_eq!(run.ram.read_obj::<u8>(status).unwrap(), 0, "request {done}, head {head}");
            run.ram.write_obj(0xddu8, status).unwrap();
            run.state.regs.gpr[DONE] = done + 1;
        } else if done == REQUESTS {
            assert_eq!(run.bus.port_out(0xf4, 1, 0), After::Leave);
            return Ok(Exit::Kicked);
        } else if offered < limit.load(Ordering::SeqCst) && offered < done / BATCH * BATCH + BATCH {
            offer(run, offered);
        } else {
            thread::yield_now();
        }
    }
}

struct Files(PathBuf);

impl Files {
    fn new(name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("purlin-vmm-{name}-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        make_files(&directory);
        Self(directory)
    }
}

fn make_files(directory: &Path) {
    fs::write(directory.join("kernel"), kernels::multiboot_flat(b"\xf4")).unwrap();
    fs::File::create(directory.join("disk.img")).unwrap().set_len(REQUESTS * 512).unwrap();
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn config(files: &Path, engine: &Arc<ScriptedEngine>) -> RunConfig {
    RunConfig {
        kernel: files.join("kernel"),
        initrds: Vec::new(),
        cmdline: String::new(),
        memory: 4 << 20,
        cpus: 1,
        engine: engine.clone(),
        cpu_model: CpuModel::V2,
        serial: false,
        devices: vec![OptionalDevice::DebugExit],
        disks: vec![DiskSpec::new(files.join("disk.img"))],
        networks: Vec::new(),
        console: None,
        on_io_error: Default::default(),
        vsock: None,
        balloon: None,
        no_reboot: true,
    }
}

/// Guest memory from 1 MiB up, where this guest has all that it has.
fn memory(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; 3 << 20];
    ram.read_slice(&mut bytes, GuestAddress(1 << 20)).unwrap();
    bytes
}

/// Ends the old machine, which frees the disk, and goes on in a new one.
fn moved(config: &RunConfig, old: Running) -> Running {
    let state: SavedState = old.save().unwrap();
    let content = memory(&old.memory().unwrap());
    drop(old);
    let load = |ram: &GuestRam| Ok(ram.write_slice(&content, GuestAddress(1 << 20))?);
    let new = Vmm::restore(config.clone(), &state, load, Box::new(io::sink())).unwrap();
    assert_eq!(new.save().unwrap().sections, state.sections);
    new
}

#[test]
fn requests_survive_pauses_and_moves_each_done_once() {
    let files = Files::new("requests");
    let engine = Arc::new(ScriptedEngine::new(guest));
    let config = config(&files.0, &engine);
    let mut running = Vmm::start(config.clone(), Box::new(io::sink())).unwrap();
    let (mut pauses, mut under_way) = (0, 0);
    while running.pause().is_ok() {
        pauses += 1;
        // Nobody touches memory or interrupts any more.
        let (before, vm) = (memory(&running.memory().unwrap()), engine.vm());
        vm.take_messages();
        thread::sleep(Duration::from_micros(300));
        assert!(memory(&running.memory().unwrap()) == before, "memory changes in a pause");
        assert_eq!(vm.take_messages(), []);
        let counter =
            |at: u64| u16::from_le_bytes([before[at as usize - (1 << 20)], before[at as usize - (1 << 20) + 1]]);
        under_way += u32::from(counter(AVAILABLE + 2) != counter(USED + 2));
        if pauses % 2 == 0 {
            running = moved(&config, running);
        }
        running.resume().unwrap();
        thread::sleep(Duration::from_micros(200));
    }
    assert!(matches!(running.wait(), Outcome::Exit(_)), "{:?}", running.wait());
    drop(running);
    println!("{pauses} pauses, {under_way} of them with requests in the queue");
    all_is_written(&files.0);
}

fn all_is_written(files: &Path) {
    let disk = fs::File::open(files.join("disk.img")).unwrap();
    for number in 0..REQUESTS {
        let mut sector = [0; 512];
        disk.read_exact_at(&mut sector, number * 512).unwrap();
        assert!(sector[..] == number.to_le_bytes().repeat(64), "sector {number}");
    }
}

/// Clones of a machine in the midst of requests: each ends all of them, on a disk of its own.
#[test]
fn forks_in_mid_requests_have_disks_of_their_own() {
    const FORKS: u64 = 6;
    let files = Files::new("forks");
    let limit = Arc::new(AtomicU64::new(0));
    let engine = Arc::new(ScriptedEngine::new({
        let limit = limit.clone();
        move |run: &mut Run<'_>| guest_up_to(run, &limit)
    }));
    let config = config(&files.0, &engine);
    let path = |name: &str, number| files.0.join(format!("{name}-{number}.qcow2"));
    let running = Vmm::start(config.clone(), Box::new(io::sink())).unwrap();
    let mut runs = Vec::new();
    for number in 0..FORKS {
        // By the time of the fork some of these are under way.
        limit.fetch_add(REQUESTS / FORKS / 2, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(1));
        let frozen = running.fork(&FreezeSpec { overlays: vec![Some(path("parent", number))] }).unwrap();
        let image = frozen.disks[0].clone().unwrap();
        NewImage::overlay(path("clone", number), &image.path, image.format).create().unwrap();
        let config = RunConfig { disks: vec![DiskSpec::new(path("clone", number))], ..config.clone() };
        let clone = Vmm::restore_from(
            config,
            &frozen.state,
            &frozen.memory,
            frozen.saved_code().as_ref(),
            Box::new(io::sink()),
        )
        .unwrap();
        if number % 2 == 0 {
            clone.resume().unwrap();
        }
        runs.push((clone, path("clone", number)));
    }
    runs.push((running, path("parent", FORKS - 1)));
    limit.store(REQUESTS, Ordering::SeqCst);
    for (running, disk) in runs {
        // It may be over already.
        let _ = running.resume();
        assert!(matches!(running.wait(), Outcome::Exit(_)), "{:?}", running.wait());
        drop(running);
        all_is_written_to(&DiskSpec::new(disk));
    }
}

fn all_is_written_to(spec: &DiskSpec) {
    let disk = Disk::open(&spec.clone().read_only()).unwrap();
    for number in 0..REQUESTS {
        let mut sector = [0; 512];
        disk.read_at(&mut sector, number * 512).unwrap();
        assert!(sector[..] == number.to_le_bytes().repeat(64), "sector {number} of {}", spec.path.display());
    }
}

#[test]
fn a_fork_that_fails_changes_nothing() {
    let files = Files::new("fork-fails");
    let engine = Arc::new(ScriptedEngine::new(guest));
    let config = config(&files.0, &engine);
    let running = Vmm::start(config, Box::new(io::sink())).unwrap();
    let fails = |overlays| running.fork(&FreezeSpec { overlays }).unwrap_err().to_string();
    assert!(fails(Vec::new()).contains("has 1 disks and is given 0"));
    assert!(fails(vec![None]).contains("given 0"));
    assert!(fails(vec![Some(files.0.join("disk.img"))]).contains("exists"));
    assert!(fails(vec![Some(files.0.join("none/a.qcow2"))]).contains("No such file"));
    assert!(matches!(running.wait(), Outcome::Exit(_)));
    assert!(matches!(running.fork(&FreezeSpec::default()), Err(FreezeError::Lifecycle(LifecycleError::Stopped))));
    drop(running);
    all_is_written(&files.0);
}

/// Set where [`waits_for_room`] is to run: a file system of 1,200 KiB.
const SMALL_DIRECTORY: &str = "PURLIN_TEST_SMALL_DIRECTORY";

/// The test itself runs where such a file system can be mounted without being root.
#[test]
fn a_full_host_pauses_the_machine_and_no_request_is_lost() {
    let files = Files::new("full");
    let mount = "mount -t tmpfs -o size=1200k none \"$0\" && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", mount]).arg(&files.0);
    command.arg(env::current_exe().unwrap()).args(["--exact", "waits_for_room", "--ignored", "--nocapture"]);
    let output = command.env(SMALL_DIRECTORY, &files.0).output().expect("unshare (package util-linux) is needed");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "a_full_host_pauses_the_machine_and_no_request_is_lost runs it on a small file system"]
fn waits_for_room() {
    const BALLAST: u64 = 5;
    let directory = PathBuf::from(env::var_os(SMALL_DIRECTORY).expect("it is run by another test"));
    make_files(&directory);
    let ballast = |number: u64| directory.join(format!("ballast-{number}"));
    (0..BALLAST).for_each(|number| fs::write(ballast(number), vec![1; 200 << 10]).unwrap());

    let engine = Arc::new(ScriptedEngine::new(guest));
    let (sender, failures) = mpsc::channel();
    let tell = move |path: &Path, error: purlin_vmm::storage::IoError| {
        // Whoever has ended no longer wants to hear.
        let _ = sender.send((path.to_owned(), error));
    };
    let on_io_error = OnIoError::Pause(Arc::new(tell));
    let config = RunConfig { on_io_error, ..config(&directory, &engine) };
    let mut running = Vmm::start(config.clone(), Box::new(io::sink())).unwrap();
    for number in 0..BALLAST {
        let (path, error) = failures.recv_timeout(Duration::from_secs(60)).expect("the file system is full");
        assert!(path.ends_with("disk.img") && error.is_out_of_space(), "{error}");
        // By now it stands or will at once: this is the second to ask.
        running.pause().unwrap();
        if number % 2 == 0 {
            // Without room it stops again.
            failures.try_iter().for_each(drop);
            running.resume().unwrap();
            failures.recv_timeout(Duration::from_secs(60)).expect("the file system is full still");
            running.pause().unwrap();
        } else {
            running = moved(&config, running);
        }
        failures.try_iter().for_each(drop);
        fs::remove_file(ballast(number)).unwrap();
        running.resume().unwrap();
    }
    assert!(matches!(running.wait(), Outcome::Exit(_)), "{:?}", running.wait());
    drop(running);
    all_is_written(&directory);
}

#[test]
fn a_saved_machine_wants_its_disks_back() {
    let files = Files::new("disks");
    let engine = Arc::new(ScriptedEngine::new(|run| run.halt()));
    let config = config(&files.0, &engine);
    let running = Vmm::start(config.clone(), Box::new(io::sink())).unwrap();
    running.pause().unwrap();
    let state = running.save().unwrap();
    let restore = |config: RunConfig| Vmm::restore(config, &state, |_| Ok(()), Box::new(io::sink()));
    let refused = |config: RunConfig| restore(config).err().unwrap().to_string();
    assert!(refused(RunConfig { disks: Vec::new(), ..config.clone() }).contains("had 1 disks and is given 0"));
    // The machine that is there still has it locked.
    assert!(refused(config.clone()).contains("in use"), "{}", refused(config.clone()));
    drop(running);
    assert!(restore(config).is_ok());
}
