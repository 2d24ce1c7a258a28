//! Each boot method on this host's /dev/kvm, with kernels of a few bytes.

use std::{
    fs, io,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use purlin_arch::x86_64::cpuid::CpuModel;
use purlin_engine::Engine;
use purlin_engine_kvm::KvmEngine;
use purlin_engine_translator::TranslatorEngine;
use purlin_machine::testing::kernels::{BzImage, elf, multiboot_flat};
use purlin_vmm::{OptionalDevice, Outcome, RunConfig, Vmm};

/// `None` only where the tests are told to do without KVM.
fn engine() -> Option<Arc<dyn Engine>> {
    if std::env::var_os("PURLIN_TEST_NO_KVM").is_some() {
        return None;
    }
    let engine = KvmEngine::new().expect("these tests need /dev/kvm (PURLIN_TEST_NO_KVM=1 goes without)");
    Some(Arc::new(engine))
}

struct KernelFile(PathBuf);

impl KernelFile {
    fn new(name: &str, bytes: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("purlin-kvm-{name}-{}", std::process::id()));
        fs::write(&path, bytes).unwrap();
        Self(path)
    }
}

impl Drop for KernelFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn config(engine: Arc<dyn Engine>, kernel: &KernelFile) -> RunConfig {
    RunConfig {
        kernel: kernel.0.clone(),
        initrds: Vec::new(),
        cmdline: String::new(),
        memory: 16 << 20,
        cpus: 2,
        engine,
        cpu_model: CpuModel::V2,
        serial: true,
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

/// Code that ends the run with 0x15 where the flags after `compare` say equal, with 1 where not; the same bytes mean
/// the same in 32-bit and in 64-bit mode.
fn check(compare: &[u8]) -> Vec<u8> {
    let jump_if_different = [0x75, 5];
    let exit = |value| [0xb0, value, 0xe6, 0xf4, 0xf4];
    [compare, &jump_if_different, &exit(0x15), &exit(1)].concat()
}

/// mov eax, [rsi + 0x202]; cmp eax, "HdrS"
const BOOT_PARAMS: &[u8] = b"\x8b\x86\x02\x02\x00\x00\x3dHdrS";
/// cmp dword [ebx], XEN_HVM_START_MAGIC_VALUE
const START_INFO: &[u8] = b"\x81\x3b\x78\xc5\x6e\x33";
/// cmp eax, the loader's magic number
const MULTIBOOT: &[u8] = b"\x3d\x02\xb0\xad\x2b";

fn outcome(name: &str, kernel: &[u8]) -> Option<Outcome> {
    let file = KernelFile::new(name, kernel);
    Some(Vmm::start(config(engine()?, &file), Box::new(io::sink())).unwrap().wait())
}

const GOOD: Option<Outcome> = Some(Outcome::Exit(0x15 << 1 | 1));

#[test]
fn every_boot_method_enters_its_kernel_with_what_it_promises() {
    let wrong = check(MULTIBOOT);
    let kernels = [
        ("bz64", BzImage { code32: &wrong, code64: Some(&check(BOOT_PARAMS)), ..Default::default() }.build()),
        ("bz32", BzImage { code32: &check(BOOT_PARAMS), code64: None, ..Default::default() }.build()),
        ("pvh64", elf(64, 62, &check(START_INFO), true)),
        ("pvh32", elf(32, 3, &check(START_INFO), true)),
        ("multiboot", multiboot_flat(&check(MULTIBOOT))),
    ];
    for (name, kernel) in kernels {
        let outcome = outcome(name, &kernel);
        assert!(outcome.is_none() || outcome == GOOD, "{name}: {outcome:?}");
    }
}

#[test]
fn a_triple_fault_says_where() {
    // lidt of an empty table, then ud2 at 0x100028: #UD, #GP, shutdown.
    let code = b"\x0f\x01\x1d\x30\x00\x10\x00\x90\x0f\x0b\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    let Some(outcome) = outcome("triple", &multiboot_flat(code)) else { return };
    let Outcome::Crashed { vcpu: 0, message, .. } = &outcome else { panic!("{outcome:?}") };
    assert_eq!(message, "triple fault");
}

#[test]
fn a_guest_moved_in_mid_loop_counts_right() {
    let Some(kvm) = engine() else { return };
    arrives_with_the_exact_count(500_000, &[kvm]);
}

#[test]
fn a_guest_moved_from_engine_to_engine_counts_right() {
    let Some(kvm) = engine() else { return };
    // KVM first: there are hosts whose KVM offers less than their processor has.
    arrives_with_the_exact_count(50_000_000, &[kvm, Arc::new(TranslatorEngine::new().unwrap())]);
}

/// A loop that counts in memory is moved to a new machine again and again, each under the next of these engines.
fn arrives_with_the_exact_count(count: u32, engines: &[Arc<dyn Engine>]) {
    let number = count.to_le_bytes();
    // mov ecx, count; again: add dword [0x200000], 1; dec ecx; jnz again; cmp dword [0x200000], count
    let add = b"\x83\x05\x00\x00\x20\x00\x01\x49\x75\xf6\x81\x3d\x00\x00\x20\x00";
    let code = [&[0xb9], &number[..], add, &number].concat();
    let file = KernelFile::new(&count.to_string(), &multiboot_flat(&check(&code)));
    let config = config(engines[0].clone(), &file);
    let mut running = Vmm::start(config.clone(), Box::new(io::sink())).unwrap();
    let mut moves = 0;
    while running.pause().is_ok() {
        let state = running.save().unwrap();
        let copy = |to: &_| {
            copy_memory(&running.memory().unwrap(), to);
            Ok(())
        };
        moves += 1;
        let config = RunConfig { engine: engines[moves % engines.len()].clone(), ..config.clone() };
        let next = Vmm::restore(config, &state, copy, Box::new(io::sink())).unwrap();
        next.resume().unwrap();
        running = next;
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(running.wait(), Outcome::Exit(0x15 << 1 | 1));
    assert!(moves > 1, "{moves}");
}

/// Sets COM1 up by polling, then sends back each character that it receives, up to a `q`, which ends the run with 5.
const ECHO: &[u8] = b"\
    \x66\xba\xfb\x03\xb0\x83\xee\x66\xba\xf8\x03\xb0\x01\xee\x66\xba\xf9\x03\xb0\x00\xee\
    \x66\xba\xfb\x03\xb0\x03\xee\x66\xba\xfa\x03\xb0\x01\xee\x66\xba\xfc\x03\xb0\x03\xee\
    \x66\xba\xfd\x03\xec\xa8\x01\x74\xf7\x66\xba\xf8\x03\xec\x88\xc3\
    \x66\xba\xfd\x03\xec\xa8\x20\x74\xf7\x66\xba\xf8\x03\x88\xd8\xee\
    \x3c\x71\x75\xdc\xb0\x05\xe6\xf4\xf4";

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A reader that takes little at a time, and that slowly.
        let part = &bytes[..bytes.len().min(100)];
        std::thread::sleep(Duration::from_millis(1));
        self.0.lock().unwrap().extend(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn nothing_typed_or_printed_is_lost_through_pauses_and_slow_readers() {
    let Some(engine) = engine() else { return };
    let mut typed: Vec<u8> = (0..6000u32).map(|i| b'A' + (i % 26) as u8).collect();
    typed.push(b'q');
    let file = KernelFile::new("echo", &multiboot_flat(ECHO));
    let printed = Sink::default();
    let running = Vmm::start(config(engine, &file), Box::new(printed.clone())).unwrap();
    let input = running.serial_input();
    let typist = std::thread::spawn({
        let typed = typed.clone();
        move || input.push(&typed)
    });
    let mut pauses = 0;
    while running.pause().is_ok() {
        running.resume().unwrap();
        pauses += 1;
        std::thread::sleep(Duration::from_millis(30));
    }
    assert_eq!(running.wait(), Outcome::Exit(11));
    assert!(typist.join().unwrap(), "all was taken");
    assert!(*printed.0.lock().unwrap() == typed, "what came back is what was typed");
    assert!(pauses > 3, "{pauses}");
}

fn copy_memory(from: &purlin_engine::memory::GuestRam, to: &purlin_engine::memory::GuestRam) {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
    for region in from.iter() {
        let mut bytes = vec![0; region.len() as usize];
        let start = GuestAddress(region.start_addr().0);
        from.read_slice(&mut bytes, start).unwrap();
        to.write_slice(&bytes, start).unwrap();
    }
}
