//! Small guests on this machine's /dev/kvm: what they do on the bus, and what reaches them.
//!
//! They are in real mode and use only instructions that KVM's emulator knows, so that they run wherever /dev/kvm
//! opens.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use crate::machine::{Access, DONE, Machine, Recorder, engine};
use purlin_arch::x86_64::{
    cpuid::CpuidEntry,
    regs::{gpr, rflags},
};
use purlin_engine::{EngineError, Exit};

/// mov al, 0; out 0xf4, al: ends the run.
const FINISH: [u8; 4] = [0xb0, 0x00, 0xe6, DONE as u8];

fn code(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

/// The accesses without the one that ends the run.
fn without_done(mut seen: Vec<Access>) -> Vec<Access> {
    assert_eq!(seen.pop(), Some(Access::Out(DONE, 1, 0)), "the guest did not finish: {seen:x?}");
    seen
}

#[test]
fn ports_of_each_size() {
    let Some(engine) = engine() else { return };
    let mut machine = Machine::new(&engine, 1);
    machine.bus = Recorder::answering([0x5a, 0x1234, 0x89ab_cdef]).into();
    let mut guest = machine.boot(&code(&[
        &[0xba, 0x10, 0x02],       // mov dx, 0x210
        &[0xec, 0xee],             // in al, dx; out dx, al
        &[0xed, 0xef],             // in ax, dx; out dx, ax
        &[0x66, 0xed, 0x66, 0xef], // in eax, dx; out dx, eax
        &FINISH,
    ]));
    assert_eq!(guest.run(), Exit::Kicked);
    assert_eq!(
        without_done(machine.bus.take()),
        [
            Access::In(0x210, 1),
            Access::Out(0x210, 1, 0x5a),
            Access::In(0x210, 2),
            Access::Out(0x210, 2, 0x1234),
            Access::In(0x210, 4),
            Access::Out(0x210, 4, 0x89ab_cdef),
        ]
    );
}

#[test]
fn string_io_is_one_access_after_the_other() {
    let Some(engine) = engine() else { return };
    let mut machine = Machine::new(&engine, 1);
    machine.bus = Recorder::answering([0x1111, 0x2222, 0x3333]).into();
    let mut guest = machine.boot(&code(&[
        &[0xfc, 0xba, 0x10, 0x02],                   // cld; mov dx, 0x210
        &[0xbf, 0x00, 0x20, 0xb9, 3, 0, 0xf3, 0x6d], // mov di, 0x2000; mov cx, 3; rep insw
        &[0xbe, 0x00, 0x20, 0xb9, 6, 0, 0xf3, 0x6e], // mov si, 0x2000; mov cx, 6; rep outsb
        &FINISH,
    ]));
    guest.run();
    let seen = without_done(machine.bus.take());
    let bytes = [0x11, 0x11, 0x22, 0x22, 0x33, 0x33].map(|b| Access::Out(0x210, 1, b));
    assert_eq!(seen.iter().filter(|a| **a == Access::In(0x210, 2)).count(), 3, "{seen:x?}");
    assert_eq!(seen[3..], bytes);
}

#[test]
fn memory_that_is_not_there_goes_to_the_bus() {
    let Some(engine) = engine() else { return };
    let mut machine = Machine::new(&engine, 1);
    machine.bus = Recorder::answering([0xbeef]).into();
    // Real mode reaches 0x10ffef; the memory is 2 MiB. So take some away: 0xd0000 is not RAM in this machine.
    let memory = purlin_engine::memory::create(&[(0, 0xa_0000)]).expect("memory");
    machine.memory = memory.into();
    machine.vm = purlin_engine::Engine::create_vm(
        &engine,
        purlin_engine::VmConfig { memory: machine.memory.clone(), cpuid: vec![engine.supported_cpuid().to_vec()] },
    )
    .expect("VM");
    let mut guest = machine.boot(&code(&[
        &[0xb8, 0x00, 0xd0, 0x8e, 0xd8],       // mov ax, 0xd000; mov ds, ax
        &[0xa1, 0x10, 0x00],                   // mov ax, [0x10]
        &[0xa3, 0x20, 0x00],                   // mov [0x20], ax
        &[0xc6, 0x06, 0x30, 0x00, 0x77],       // mov byte [0x30], 0x77
        &[0x66, 0xb8, 0x78, 0x56, 0x34, 0x12], // mov eax, 0x12345678
        &[0x66, 0xa3, 0x40, 0x00],             // mov [0x40], eax
        &FINISH,
    ]));
    guest.run();
    assert_eq!(
        without_done(machine.bus.take()),
        [
            Access::Read(0xd_0010, 2),
            Access::Write(0xd_0020, 2, 0xbeef),
            Access::Write(0xd_0030, 1, 0x77),
            Access::Write(0xd_0040, 4, 0x1234_5678),
        ]
    );
}

#[test]
fn leaving_after_a_write_completes_the_instruction() {
    let Some(engine) = engine() else { return };
    let machine = Machine::new(&engine, 1);
    let mut guest = machine.boot(&code(&[&FINISH, &[0xb0, 0x42, 0xe6, 0x80], &FINISH]));
    assert_eq!(guest.run(), Exit::Kicked);
    assert_eq!(machine.bus.take(), [Access::Out(DONE, 1, 0)]);
    let state = guest.vcpu.save().expect("state");
    assert_eq!(state.regs.rip, crate::machine::CODE + FINISH.len() as u64, "the OUT is done");
    guest.run();
    assert_eq!(machine.bus.take(), [Access::Out(0x80, 1, 0x42), Access::Out(DONE, 1, 0)]);
}

#[test]
fn cpuid_is_what_was_asked_for() {
    let Some(engine) = engine() else { return };
    let mut leaves = engine.supported_cpuid().to_vec();
    leaves.retain(|e| e.leaf < 0x4000_0000);
    leaves.push(CpuidEntry {
        leaf: 0x4000_0000,
        subleaf: None,
        eax: 0x4000_0001,
        ebx: 0x4b4d_564b,
        ecx: 0x564b_4d56,
        edx: 0x4d,
    });
    leaves.push(CpuidEntry { leaf: 0x4000_0001, subleaf: None, eax: !0, ebx: 0, ecx: 0, edx: 0 });
    let machine = Machine::with_cpuid(&engine, vec![leaves]);
    let leaf = |n: u32| code(&[&[0x66, 0xb8], &n.to_le_bytes(), &[0x0f, 0xa2, 0xba, 0x10, 0x02]]); // mov eax, n; cpuid; mov dx, 0x210
    let mut guest = machine.boot(&code(&[
        &leaf(0x4000_0000),
        &[0x66, 0x93, 0x66, 0xef], // xchg eax, ebx; out dx, eax
        &leaf(0x4000_0001),
        &[0x66, 0xef], // out dx, eax
        &FINISH,
    ]));
    guest.run();
    assert_eq!(
        without_done(machine.bus.take()),
        [Access::Out(0x210, 4, 0x4b4d_564b), Access::Out(0x210, 4, 0x0100_0008),]
    );
}

/// Enables the local APIC through its page at 0xfee0_0000 and ends its interrupts: 32-bit addresses in real mode
/// need a segment limit that reaches them, so these guests run with an unreal DS.
mod apic {
    /// mov dword [0xfee000f0], 0x1ff
    pub const ENABLE: [u8; 12] = [0x66, 0x67, 0xc7, 0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0x00, 0x00];
    /// mov dword [0xfee000b0], 0
    pub const EOI: [u8; 12] = [0x66, 0x67, 0xc7, 0x05, 0xb0, 0x00, 0xe0, 0xfe, 0x00, 0x00, 0x00, 0x00];
}

/// cmp byte [0x500], 1; jne -7
const WAIT: [u8; 7] = [0x80, 0x3e, 0x00, 0x05, 1, 0x75, 0xf9];

/// Gives the guest a DS of 4 GiB.
fn unreal(guest: &mut crate::machine::Guest<'_>) {
    let mut state = guest.vcpu.save().expect("state");
    let ds = &mut state.system.segments[purlin_arch::x86_64::regs::seg::DS];
    ds.limit = 0xffff_ffff;
    ds.access |= 1 << 15;
    guest.vcpu.restore(&state).expect("unreal mode");
}

/// out 0x80, al with al = `value`
fn mark(value: u8) -> [u8; 4] {
    [0xb0, value, 0xe6, 0x80]
}

/// Guest that enables its APIC, says 1, halts until an interrupt, says 3; the handler at 0x3000 says 2 and ends the
/// interrupt.
fn waiting_guest(machine: &Machine, vector: u8) -> crate::machine::Guest<'_> {
    machine.set_vector(vector, 0x3000);
    machine.load(0x3000, &code(&[&mark(2), &apic::EOI, &[0xcf]])); // iret
    let mut guest = machine.boot(&code(&[&apic::ENABLE, &mark(1), &[0xfb, 0xf4], &mark(3), &FINISH])); // sti; hlt
    unreal(&mut guest);
    guest
}

/// Runs `guest` and does `action` once it has been halted for a while.
fn run_and(guest: &mut crate::machine::Guest<'_>, action: impl FnOnce() + Send) -> Exit {
    let bus = guest.machine.bus.clone();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let start = Instant::now();
            while !bus.seen.lock().unwrap().contains(&Access::Out(0x80, 1, 1)) {
                assert!(start.elapsed() < Duration::from_secs(60), "the guest did not begin");
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(20));
            action();
        });
        guest.run()
    })
}

const SAID: fn(u32) -> Access = |value| Access::Out(0x80, 1, value);

#[test]
fn a_message_wakes_a_halted_vcpu() {
    let Some(engine) = engine() else { return };
    let machine = Machine::new(&engine, 1);
    let mut guest = waiting_guest(&machine, 0x41);
    let exit = run_and(&mut guest, || machine.vm.deliver_msi(0xfee0_0000, 0x41));
    assert_eq!(exit, Exit::Kicked);
    assert_eq!(without_done(machine.bus.take()), [SAID(1), SAID(2), SAID(3)], "an edge has no EOI on the bus");
}

#[test]
fn a_level_triggered_message_ends_on_the_bus() {
    let Some(engine) = engine() else { return };
    let machine = Machine::new(&engine, 1);
    let mut guest = waiting_guest(&machine, 0x41);
    run_and(&mut guest, || machine.vm.deliver_msi(0xfee0_0000, 0xc041));
    assert_eq!(
        eoi_before_3(machine.bus.take()),
        [SAID(1), SAID(2), Access::EndOfInterrupt(0x41), SAID(3)],
        "SDM vol. 3A 11.8.5"
    );
}

/// What was seen, with 3 said last: a KVM that interprets real mode may tell of the EOI only when it leaves the guest for
/// something else, which is then what the guest says next.
fn eoi_before_3(seen: Vec<Access>) -> Vec<Access> {
    let mut seen = without_done(seen);
    seen.sort_by_key(|access| *access == SAID(3));
    seen
}

#[test]
fn a_level_triggered_interrupt_that_was_in_service_when_saved_ends_on_the_bus() {
    let Some(engine) = engine() else { return };
    let machine = Machine::new(&engine, 1);
    let mut guest = machine.boot(&code(&[&apic::EOI, &mark(3), &FINISH]));
    unreal(&mut guest);
    let mut state = guest.vcpu.save().expect("state");
    state.lapic.regs[0xf0..0xf2].copy_from_slice(&[0xff, 1]); // enabled
    // Vector 0x41: bit 1 of the third register of ISR and TMR; PPR is its class.
    for register in [0x120, 0x1a0] {
        state.lapic.regs[register] = 1 << 1;
    }
    state.lapic.regs[0xa0] = 0x40;
    guest.vcpu.restore(&state).expect("restored");
    guest.run();
    assert_eq!(eoi_before_3(machine.bus.take()), [Access::EndOfInterrupt(0x41), SAID(3)]);
}

#[test]
fn an_nmi_wakes_a_halted_vcpu_with_interrupts_off() {
    let Some(engine) = engine() else { return };
    let machine = Machine::new(&engine, 1);
    machine.set_vector(2, 0x3000);
    machine.load(0x3000, &code(&[&mark(2), &[0xcf]]));
    let mut guest = machine.boot(&code(&[&apic::ENABLE, &mark(1), &[0xf4], &mark(3), &FINISH]));
    unreal(&mut guest);
    run_and(&mut guest, || machine.vm.nmi(0));
    assert_eq!(without_done(machine.bus.take()), [SAID(1), SAID(2), SAID(3)]);
}

/// A fake 8259: its output falls when it is acknowledged.
fn with_pic(machine: &Machine, vector: u8) {
    let vm = machine.vm.clone();
    *machine.bus.pic.lock().unwrap() = Some(Box::new(move || {
        vm.set_extint(false);
        vector
    }));
}

#[test]
fn the_8259_wakes_a_halted_vcpu() {
    let Some(engine) = engine() else { return };
    let machine = Machine::new(&engine, 1);
    with_pic(&machine, 0x21);
    machine.set_vector(0x21, 0x3000);
    machine.load(0x3000, &code(&[&mark(2), &[0xcf]]));
    let mut guest = machine.boot(&code(&[&mark(1), &[0xfb, 0xf4], &mark(3), &FINISH]));
    run_and(&mut guest, || machine.vm.set_extint(true));
    assert_eq!(without_done(machine.bus.take()), [SAID(1), Access::Acknowledge, SAID(2), SAID(3)]);
}

#[test]
fn the_8259_waits_until_interrupts_are_enabled() {
    let Some(engine) = engine() else { return };
    let machine = Machine::new(&engine, 1);
    with_pic(&machine, 0x21);
    machine.set_vector(0x21, 0x3000);
    machine.load(0x3000, &code(&[&mark(2), &[0xc6, 0x06, 0x00, 0x05, 1, 0xcf]])); // mov byte [0x500], 1; iret
    let mut guest = machine.boot(&code(&[&mark(1), &[0xfb], &WAIT, &mark(3), &FINISH])); // sti
    machine.vm.set_extint(true);
    guest.run();
    assert_eq!(without_done(machine.bus.take()), [SAID(1), Access::Acknowledge, SAID(2), SAID(3)]);
}

#[test]
fn an_8259_line_that_was_high_before_the_halt_was_restored_wakes_it() {
    let Some(engine) = engine() else { return };
    let machine = Machine::new(&engine, 1);
    with_pic(&machine, 0x21);
    machine.set_vector(0x21, 0x3000);
    machine.load(0x3000, &code(&[&mark(2), &[0xcf]]));
    let mut guest = machine.boot(&code(&[&mark(3), &FINISH]));
    let mut state = guest.vcpu.save().expect("state");
    state.activity = purlin_arch::x86_64::state::Activity::Halted.into();
    state.regs.rflags |= rflags::IF;
    machine.vm.set_extint(true);
    guest.vcpu.restore(&state).expect("halted");
    guest.run();
    assert_eq!(without_done(machine.bus.take()), [Access::Acknowledge, SAID(2), SAID(3)]);
}

#[test]
fn an_interrupt_that_was_acknowledged_is_in_the_saved_state() {
    let Some(engine) = engine() else { return };
    let machine = Machine::new(&engine, 1);
    // The machine wants to leave just when the interrupt has been acknowledged.
    let (vm, kicker) = (machine.vm.clone(), machine.vm.kicker(0));
    *machine.bus.pic.lock().unwrap() = Some(Box::new(move || {
        vm.set_extint(false);
        kicker.kick();
        0x21
    }));
    machine.set_vector(0x21, 0x3000);
    let handler = code(&[&mark(2), &[0xcf]]);
    machine.load(0x3000, &handler);
    let program = code(&[&mark(1), &[0xfb, 0xf4], &mark(3), &FINISH]);
    let mut guest = machine.boot(&program);
    assert_eq!(run_and(&mut guest, || machine.vm.set_extint(true)), Exit::Kicked);
    let mut seen = machine.bus.take();
    let state = guest.vcpu.save().expect("state");

    let second = Machine::new(&engine, 1);
    second.set_vector(0x21, 0x3000);
    second.load(crate::machine::CODE, &program);
    second.load(0x3000, &handler);
    let mut guest = crate::machine::Guest { machine: &second, vcpu: second.vm.take_vcpu(0).expect("vCPU") };
    guest.vcpu.restore(&state).expect("restored");
    guest.run();
    seen.extend(without_done(second.bus.take()));
    assert_eq!(seen, [SAID(1), Access::Acknowledge, SAID(2), SAID(3)]);
}

#[test]
fn a_kick_before_the_run_makes_it_return_once() {
    let Some(engine) = engine() else { return };
    let machine = Machine::new(&engine, 1);
    let mut guest = machine.boot(&code(&[&mark(1), &FINISH]));
    machine.vm.kicker(0).kick();
    assert_eq!(guest.run(), Exit::Kicked);
    assert_eq!(machine.bus.take(), [], "no instruction was executed");
    guest.run();
    assert_eq!(without_done(machine.bus.take()), [SAID(1)]);
}

#[test]
fn no_kick_is_lost() {
    let Some(engine) = engine() else { return };
    let machine = Machine::new(&engine, 1);
    let mut guest = machine.boot(&[0xeb, 0xfe]); // jmp $
    let kicker = machine.vm.kicker(0);
    let (stop, returned) = (AtomicBool::new(false), AtomicBool::new(false));
    // As many as a second allows: a signal to a thread in the guest takes long where virtualisation is emulated.
    let (kicks, end) = (2000, Instant::now() + Duration::from_secs(1));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in (0..kicks).take_while(|n| *n < 20 || Instant::now() < end) {
                kicker.kick();
                // Each must make a run return: the next is sent only after that.
                while !returned.swap(false, Ordering::SeqCst) {
                    std::hint::spin_loop();
                    std::thread::yield_now();
                }
            }
            stop.store(true, Ordering::SeqCst);
            kicker.kick();
        });
        while !stop.load(Ordering::SeqCst) {
            assert_eq!(guest.run(), Exit::Kicked);
            returned.store(true, Ordering::SeqCst);
        }
    });
}

#[test]
fn a_halted_vcpu_is_kicked() {
    let Some(engine) = engine() else { return };
    let machine = Machine::new(&engine, 1);
    let mut guest = machine.boot(&code(&[&mark(1), &[0xf4]]));
    let kicker = machine.vm.kicker(0);
    assert_eq!(run_and(&mut guest, || kicker.kick()), Exit::Kicked);
    assert_eq!(guest.vcpu.save().expect("state").activity(), purlin_arch::x86_64::state::Activity::Halted);
}

#[test]
fn a_triple_fault_says_where() {
    let Some(engine) = engine() else { return };
    let machine = Machine::new(&engine, 1);
    let mut guest = machine.boot(&code(&[&[0x90, 0x90], &[0x0f, 0x0b]])); // ud2
    // Protected mode: in real mode KVM's emulator does not look at the interrupt table's limit.
    let good = guest.vcpu.save().expect("state");
    let mut state = good.clone();
    state.system.cr0 |= purlin_arch::x86_64::regs::cr0::PE;
    for (index, segment) in state.system.segments.iter_mut().enumerate() {
        let is_code = index == purlin_arch::x86_64::regs::seg::CS;
        (segment.selector, segment.limit) = (0x10, 0xffff_ffff);
        segment.access = if is_code { 0xc09b } else { 0xc093 };
    }
    state.system.idtr.limit = 0;
    guest.vcpu.restore(&state).expect("protected mode without an interrupt table");
    match guest.run() {
        Exit::Shutdown { rip } if rip == crate::machine::CODE + 2 => {}
        // AMD's processors reset the vCPU at a shutdown intercept: what was before is gone.
        Exit::Shutdown { rip: 0xffff_fff0 } if is_amd() => {}
        other => panic!("{other:x?}"),
    }
    // A machine that is reset then uses the same vCPU again.
    machine.load(crate::machine::CODE, &FINISH);
    guest.vcpu.restore(&good).expect("reset");
    assert_eq!(guest.run(), Exit::Kicked);
    assert_eq!(without_done(machine.bus.take()), []);
}

fn is_amd() -> bool {
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("AuthenticAMD"))
}

#[test]
fn a_state_goes_on_in_a_new_vm() {
    let Some(engine) = engine() else { return };
    let first = Machine::new(&engine, 1);
    let program = code(&[
        &[0x66, 0xb8, 0x78, 0x56, 0x34, 0x12], // mov eax, 0x12345678
        &[0xbb, 0x34, 0x12],                   // mov bx, 0x1234
        &[0xb9, 0x78, 0x56, 0x8e, 0xc1],       // mov cx, 0x5678; mov es, cx
        &[0x6a, 0x55, 0x9d],                   // push 0x55; popf
        &[0x66, 0xe7, DONE as u8],             // out 0xf4, eax
        &[0xba, 0x10, 0x02, 0x66, 0xef],       // mov dx, 0x210; out dx, eax
        &[0x93, 0xef],                         // xchg ax, bx; out dx, ax
        &[0x8c, 0xc0, 0xef],                   // mov ax, es; out dx, ax
        &[0x9c, 0x58, 0xef],                   // pushf; pop ax; out dx, ax
        &FINISH,
    ]);
    let mut guest = first.boot(&program);
    let exit = guest.run();
    assert_eq!((exit, first.bus.take()), (Exit::Kicked, vec![Access::Out(DONE, 4, 0x1234_5678)]));
    let mut state = guest.vcpu.save().expect("state");
    // Things that this guest does not touch itself.
    (state.system.dr[1], state.system.cr2) = (0x1234_5000, 0xdead_b000);
    state.regs.gpr[gpr::RBP] = 0x1111_2222_3333_4444;
    (state.lapic.regs[0x80], state.lapic.regs[0xa0]) = (0x30, 0x30); // TPR, and PPR which follows
    let msr = state.msrs.iter_mut().find(|m| m.index == purlin_arch::x86_64::msr::LSTAR).expect("LSTAR is saved");
    msr.value = 0xffff_8000_0000_1000;
    let xmm7 = 160 + 7 * 16;
    state.xsave[xmm7..xmm7 + 4].copy_from_slice(b"xmm7");
    state.xsave[512] |= 2; // XSTATE_BV: SSE

    let second = Machine::new(&engine, 1);
    second.load(crate::machine::CODE, &program);
    let mut guest = crate::machine::Guest { machine: &second, vcpu: second.vm.take_vcpu(0).expect("vCPU") };
    guest.vcpu.restore(&state).expect("restored");
    let again = guest.vcpu.save().expect("state");
    assert!(again.tsc >= state.tsc && again.tsc - state.tsc < 10_000_000_000, "the TSC goes on");
    assert_eq!(again.xsave[xmm7..xmm7 + 4], *b"xmm7");
    assert_eq!(comparable(again), comparable(state));
    guest.run();
    assert_eq!(
        without_done(second.bus.take()),
        [
            Access::Out(0x210, 4, 0x1234_5678),
            Access::Out(0x210, 2, 0x1234),
            Access::Out(0x210, 2, 0x5678),
            Access::Out(0x210, 2, 0x57), // bit 1 of RFLAGS is always set
        ]
    );
}

/// Without what runs on.
fn comparable(mut state: purlin_arch::x86_64::state::VcpuState) -> purlin_arch::x86_64::state::VcpuState {
    state.tsc = 0;
    state.xsave.clear();
    state
}

#[test]
fn what_makes_no_sense_is_refused() {
    let Some(engine) = engine() else { return };
    let machine = Machine::new(&engine, 1);
    let mut guest = machine.boot(&FINISH);
    let good = guest.vcpu.save().expect("state");
    let mut bad = |change: &dyn Fn(&mut purlin_arch::x86_64::state::VcpuState)| {
        let mut state = good.clone();
        change(&mut state);
        guest.vcpu.restore(&state).expect_err("refused").to_string()
    };
    assert!(bad(&|s| s.regs.gpr.truncate(15)).contains("15 general registers"));
    assert!(bad(&|s| s.system.segments.truncate(5)).contains("5 segment registers"));
    assert!(bad(&|s| s.system.dr.clear()).contains("0 debug registers"));
    assert!(bad(&|s| s.system.idtr.limit = 0x10000).contains("table limit of 0x10000"));
    assert!(bad(&|s| s.lapic.regs.clear()).contains("local APIC page of 0 bytes"));
    assert!(bad(&|s| s.xsave.truncate(100)).contains("XSAVE area of 100 bytes"));
    assert!(bad(&|s| s.activity = 9).contains("activity 9"));
    assert!(bad(&|s| s.events.interrupt_plus_one = 300).contains("vector 299"));
    let mut lacking = |change: &dyn Fn(&mut CpuidEntry)| {
        bad(&|s| {
            s.cpuid.iter_mut().filter(|e| e.leaf == 7 && e.subleaf == Some(0)).for_each(change);
        })
    };
    assert!(lacking(&|e| e.ebx = !0).contains("which the saved processor has"));
}

#[test]
fn a_processor_waits_for_init_and_sipi() {
    let Some(engine) = engine() else { return };
    let machine = Machine::new(&engine, 2);
    // INIT and SIPI with vector 3 (0x3000) to APIC 1, as the boot processor's ICR sends them.
    let icr = |low: u32| {
        code(&[
            &[0x66, 0x67, 0xc7, 0x05, 0x10, 0x03, 0xe0, 0xfe, 0x00, 0x00, 0x00, 0x01], // mov dword [0xfee00310], 1 << 24
            &[0x66, 0x67, 0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe],
            &low.to_le_bytes(), // mov dword [0xfee00300], low
        ])
    };
    machine.load(0x3000, &code(&[&mark(7), &FINISH]));
    let mut leaves = vec![0, 1].into_iter().map(|i| machine.vm.take_vcpu(i).expect("vCPU")).collect::<Vec<_>>();
    let mut ap = leaves.pop().expect("two");
    assert_eq!(ap.save().expect("state").activity(), purlin_arch::x86_64::state::Activity::WaitForSipi);
    machine.load(crate::machine::CODE, &code(&[&apic::ENABLE, &icr(0x4500), &icr(0x4603), &[0xf4]]));
    let mut guest = crate::machine::Guest { machine: &machine, vcpu: leaves.pop().expect("one") };
    let state = crate::machine::real_mode(guest.vcpu.save().expect("state"));
    guest.vcpu.restore(&state).expect("real mode");
    unreal(&mut guest);
    let bsp = machine.vm.kicker(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let exit = crate::machine::watchdog(machine.vm.kicker(1), || ap.run(&*machine.bus)).expect("run");
            assert_eq!(exit, Exit::Kicked);
            bsp.kick();
        });
        assert_eq!(guest.run(), Exit::Kicked);
    });
    assert_eq!(without_done(machine.bus.take()), [SAID(7)]);
}

#[test]
fn the_clock_runs_and_can_be_set() {
    let Some(engine) = engine() else { return };
    let machine = Machine::new(&engine, 1);
    machine.vm.set_clock_ns(5_000_000_000);
    let first = machine.vm.clock_ns();
    std::thread::sleep(Duration::from_millis(10));
    let second = machine.vm.clock_ns();
    assert!((5_000_000_000..6_000_000_000).contains(&first), "{first}");
    assert!(second - first >= 10_000_000, "{first} {second}");
    assert!(machine.vm.tsc_khz() > 100_000);
    assert_eq!(purlin_engine::Engine::tsc_khz(&engine), machine.vm.tsc_khz());
}

#[test]
fn a_vcpu_is_taken_once() {
    let Some(engine) = engine() else { return };
    let machine = Machine::new(&engine, 1);
    let _first = machine.vm.take_vcpu(0).expect("vCPU");
    assert!(matches!(machine.vm.take_vcpu(0), Err(EngineError::Unavailable(_))));
    assert!(matches!(machine.vm.take_vcpu(1), Err(EngineError::Unavailable(_))));
}
