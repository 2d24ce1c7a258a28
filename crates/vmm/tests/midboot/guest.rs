//! A guest that goes from machine to machine.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use prost::Message;
use purlin_arch::x86_64::{cpuid::CpuModel, msr, state::VcpuState};
use purlin_engine::{
    Engine, VmConfig,
    memory::{self, GuestRam},
};
use purlin_engine_translator::TranslatorEngine;
use purlin_state::SavedState;
use purlin_vmm::{FreezeSpec, Outcome, Pages, RunConfig, Running, SnapshotSpec, Vmm};

use crate::{
    Files,
    console::{Console, Typist},
    support::copy_memory,
    transcript::{CLOCK_END, CLOCK_START, PROMPT, SCRIPT, Transcript},
    wait_for,
};

/// Far more than a boot takes, also on a loaded host.
const PATIENCE: Duration = Duration::from_secs(120);

/// The guest, in the machine where it is now.
pub struct Guest {
    config: RunConfig,
    console: Console,
    typist: Typist,
    machine: Running,
    /// For snapshots.
    directory: tempfile::TempDir,
    /// From when to when it ran, in each machine but this one.
    earlier: Vec<Range<Instant>>,
    /// Since when it runs in this one.
    since: Instant,
}

impl Guest {
    /// Starts it in its first machine.
    pub fn start(files: &Files, cpus: u32) -> Self {
        let config = RunConfig {
            kernel: files.kernel.clone(),
            initrds: vec![files.initrd.clone()],
            cmdline: "console=ttyS0".into(),
            memory: 256 << 20,
            cpus,
            engine: Arc::new(TranslatorEngine::new().unwrap()),
            cpu_model: CpuModel::Host,
            serial: true,
            devices: Vec::new(),
            disks: Vec::new(),
            networks: Vec::new(),
            console: None,
            on_io_error: Default::default(),
            vsock: None,
            balloon: None,
            no_reboot: true,
        };
        let console = Console::default();
        let since = Instant::now();
        let machine = Vmm::start(config.clone(), Box::new(console.clone())).unwrap();
        let typist = Typist::start(console.clone(), PROMPT, SCRIPT, machine.serial_input());
        let directory = tempfile::tempdir().unwrap();
        Self { config, console, typist, machine, directory, earlier: Vec::new(), since }
    }

    /// Lets it run until it has run for `time` since its start. False if it ends before.
    pub fn run_until(&self, time: Duration) -> bool {
        let wait = time.saturating_sub(self.ran_until(Instant::now()));
        !wait_for(wait, || self.machine.has_ended())
    }

    /// Saves it, makes a new machine of it and ends the old one. False if it has ended before.
    pub fn move_to_a_new_machine(&mut self) -> bool {
        if self.machine.pause().is_err() {
            return false;
        }
        self.earlier.push(self.since..Instant::now());
        let state = self.machine.save().unwrap();
        let decoded = <SavedState as Message>::decode(state.encode_to_vec().as_slice()).unwrap();
        assert_eq!(decoded, state, "what is decoded is what was encoded");

        let new = self.another(&decoded);
        assert_stable(&*self.config.engine, &state, &new.save().unwrap());
        // With its end the old machine has written out all that the guest had sent.
        drop(std::mem::replace(&mut self.machine, new));
        self.typist.plug_into(self.machine.serial_input());
        self.since = Instant::now();
        self.machine.resume().unwrap();
        true
    }

    /// A new machine with the state and the memory of the old one: copied, by layers, or from a file, in turn.
    fn another(&self, state: &SavedState) -> Running {
        let (old, config) = (&self.machine, self.config.clone());
        let (moves, out) = (self.earlier.len(), Box::new(self.console.clone()));
        match moves % 3 {
            0 => {
                let memory = old.memory().unwrap();
                let copy = |new: &GuestRam| {
                    copy_memory(&memory, new);
                    Ok(())
                };
                Vmm::restore(config, state, copy, out).unwrap()
            }
            1 => {
                let frozen = old.fork(&FreezeSpec::default()).unwrap();
                Vmm::restore_from(config, state, &frozen.memory, frozen.saved_code().as_ref(), out).unwrap()
            }
            _ => {
                let path = self.directory.path().join(moves.to_string());
                let (machine, disks) = ("midboot".into(), FreezeSpec::default());
                // What it stands on is the snapshot that the old machine went on from, if it did.
                old.snapshot(&SnapshotSpec { path: path.clone(), machine, disks, incremental: true }).unwrap();
                Vmm::restore_snapshot(config, &path, Pages::Mapped, out).unwrap()
            }
        }
    }

    /// Lets it run to its end.
    pub fn finish(self) -> Transcript {
        let ended = wait_for(PATIENCE, || self.machine.has_ended());
        assert!(ended, "it hangs; its console:\n{}", self.console.text());
        let outcome = self.machine.wait();
        let ran = self.ran_until(Instant::now());
        let text = self.console.text();
        assert_eq!(outcome, Outcome::PowerOff, "its console:\n{text}");
        let time_of = |text| Some(self.ran_until(self.console.time_of(text)?));
        let measured = time_of(CLOCK_START).zip(time_of(CLOCK_END)).map(|(start, end)| end.saturating_sub(start));
        self.typist.finish();
        Transcript { text, ran, measured }
    }

    /// For how long it had run then, without the pauses.
    fn ran_until(&self, time: Instant) -> Duration {
        let earlier = self.earlier.iter().map(|ran| time.min(ran.end).saturating_duration_since(ran.start));
        earlier.sum::<Duration>() + time.saturating_duration_since(self.since)
    }
}

/// What was restored and is saved again is what it was, byte for byte: the devices in their new machine, the
/// processors (which a machine restores only as it resumes) on their own.
fn assert_stable(engine: &dyn Engine, saved: &SavedState, again: &SavedState) {
    assert_eq!(saved.sections.len(), again.sections.len());
    for (saved, again) in saved.sections.iter().zip(&again.sections) {
        assert_eq!(saved, again, "section '{}'", saved.name);
    }
    let states = (0..).map_while(|i| saved.decode::<VcpuState>(&format!("vcpu{i}")).ok()).collect::<Vec<_>>();
    let memory = Arc::new(memory::create(&[(0, 1 << 20)]).unwrap());
    let cpuid = states.iter().map(|state| state.cpuid.clone()).collect();
    let vm = engine.create_vm(VmConfig { memory, cpuid }).unwrap();
    for (index, state) in (0..).zip(states) {
        let mut vcpu = vm.take_vcpu(index).unwrap();
        vcpu.restore(&state).unwrap();
        let again = without_time(vcpu.save().unwrap()).encode_to_vec();
        let state = without_time(state);
        if again != state.encode_to_vec() {
            // The difference in a form that can be read.
            assert_eq!(VcpuState::decode(again.as_slice()).unwrap(), state, "vCPU {index}");
            panic!("vCPU {index}: the same message in other bytes");
        }
    }
}

/// What goes on between two looks: the TSC, and the local APIC's timer, which may fire.
fn without_time(mut state: VcpuState) -> VcpuState {
    const LVT_TIMER: usize = 0x320;
    const IRR: usize = 0x200;
    const CURRENT_COUNT: usize = 0x390;
    state.tsc = 0;
    state.msrs.iter_mut().filter(|m| m.index == msr::TSC_DEADLINE).for_each(|m| m.value = 0);
    state.lapic.timer_remaining_ns = 0;
    let page = &mut state.lapic.regs;
    page[CURRENT_COUNT..CURRENT_COUNT + 4].fill(0);
    let vector = usize::from(page[LVT_TIMER]);
    page[IRR + vector / 32 * 16 + vector % 32 / 8] &= !(1 << (vector % 8));
    state
}
