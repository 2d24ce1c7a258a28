use prost::Message;
use purlin_arch::x86_64::regs::gpr::RAX;

use super::*;
use crate::mailbox::request;
use crate::testing::{Mode, cpus, poke, step};

const MODES: [Mode; 6] =
    [Mode::Real, Mode::Protected(0), Mode::Protected(3), Mode::V86, Mode::Compatibility(3), Mode::Long(0)];

/// A processor with something in every field.
fn interesting(mode: Mode) -> Box<Cpu> {
    let mut cpu = cpus(mode, 1).remove(0);
    for (i, register) in cpu.gpr.iter_mut().enumerate() {
        *register = 0x1111_1111_1111_1111 * i as u64;
    }
    cpu.rflags |= rflags::CF | rflags::OF | rflags::DF;
    cpu.cr2 = 0xdead_beef;
    cpu.dr = [1, 2, 3, 4];
    cpu.dr7 |= 1;
    cpu.seg[seg::FS].base = 0x7fff_0000;
    cpu.nmi_masked = true;
    cpu.nmi_pending = true;
    cpu.sti_shadow = true;
    cpu.pending_debug = 1 << 14;
    cpu.activity = Activity::Halted;
    for (index, value) in [
        (msr::STAR, 0x0023_0010_0000_0000),
        (msr::LSTAR, 0xffff_ffff_8100_0000),
        (msr::KERNEL_GS_BASE, 0xffff_8880_0000_0000),
        (msr::PAT, 0x0606_0606_0606_0606),
        (0x26f, 0x0606_0606_0606_0606),
        (msr::TSC_ADJUST, 12345),
        (msr::KVM_SYSTEM_TIME, 0x5001),
    ] {
        registers::write(&mut cpu, index, value).unwrap();
    }
    cpu.xstate.set_vector(3, &[0x33; 16]);
    cpu.xstate.fip = 0xffff_ffff_8000_0000;
    cpu
}

/// The time goes on between two looks.
fn without_time(mut state: VcpuState) -> VcpuState {
    state.tsc = 0;
    state
}

#[test]
fn a_restored_processor_is_the_one_that_was_saved() {
    for mode in MODES {
        let mut cpu = interesting(mode);
        let saved = save(&mut cpu);
        let bytes = saved.encode_to_vec();
        let decoded = VcpuState::decode(bytes.as_slice()).unwrap();
        let mut fresh = cpus(Mode::Real, 1).remove(0);
        restore(&mut fresh, &decoded).unwrap_or_else(|e| panic!("{mode:?}: {e}"));
        assert_eq!(fresh.cpl, cpu.cpl, "{mode:?}");
        let again = save(&mut fresh);
        assert!((saved.tsc..saved.tsc + 10_000_000_000).contains(&again.tsc), "the TSC goes on");
        assert_eq!(without_time(again), without_time(saved), "{mode:?}");
    }
}

#[test]
fn processors_restored_one_after_the_other_count_alike() {
    let mut all = cpus(Mode::Long(0), 2);
    let states: Vec<VcpuState> = all.iter_mut().map(|cpu| VcpuState { tsc: 1 << 40, ..save(cpu) }).collect();
    all[0].shared.clock.set_ns(7);
    let mut offsets = Vec::new();
    for (cpu, state) in all.iter_mut().zip(&states) {
        std::thread::sleep(std::time::Duration::from_millis(1));
        restore(cpu, state).unwrap();
        offsets.push(cpu.clock.tsc_offset);
    }
    assert_eq!(offsets[0], offsets[1]);
    assert!(all[0].tsc() > 1 << 40);
}

#[test]
fn a_state_written_back_in_mid_run_makes_no_step_in_the_tsc() {
    let twenty_ms = 20 * u64::from(crate::clock::host_tsc_khz());
    let mut cpu = interesting(Mode::Long(0));
    crate::clock::refresh(&mut cpu);
    std::thread::sleep(std::time::Duration::from_millis(20));
    let saved = save(&mut cpu);
    restore(&mut cpu, &saved).unwrap();
    let step = cpu.tsc() - saved.tsc;
    assert!(step < twenty_ms, "{step} ticks: the time of the run counts once");
}

/// After a reset there is something else where the guest once had its time structure.
#[test]
fn a_restore_forgets_where_the_time_was_told_before() {
    let mut cpu = cpus(Mode::Long(0), 1).remove(0);
    let fresh = save(&mut cpu);
    registers::write(&mut cpu, msr::KVM_SYSTEM_TIME, 0x5001).unwrap();
    for at in (0x5000..0x5020).step_by(8) {
        poke(&cpu, at, 0x5a5a_5a5a_5a5a_5a5au64);
    }
    cpu.shared.clock.set_ns(1);
    restore(&mut cpu, &fresh).unwrap();
    crate::clock::refresh(&mut cpu);
    for at in (0x5000..0x5020).step_by(8) {
        assert_eq!(crate::testing::peek(&cpu, at), 0x5a5a_5a5a_5a5a_5a5a);
    }
}

/// Wherever the deadline falls in a save, it is saved as such or as the interrupt that it has become.
#[test]
fn no_tsc_deadline_is_lost_in_a_save() {
    const VECTOR: u32 = 0x41;
    let mut cpu = cpus(Mode::Long(0), 1).remove(0);
    registers::write(&mut cpu, msr::APIC_BASE, 0xfee0_0d00).unwrap();
    registers::write(&mut cpu, 0x80f, 0x1ff).unwrap();
    registers::write(&mut cpu, 0x832, u64::from(VECTOR | 2 << 17)).unwrap();
    let interrupt = |state: &VcpuState| state.lapic.regs[0x200 + 16 * 2] & 1 << (VECTOR % 32) != 0;
    let (mut early, mut late) = (0, 0);
    for ticks in (0..40_000).cycle().step_by(7).take(30_000) {
        let deadline = cpu.tsc() + ticks;
        registers::write(&mut cpu, msr::TSC_DEADLINE, deadline).unwrap();
        let state = save(&mut cpu);
        let saved = state.msrs.iter().find(|m| m.index == msr::TSC_DEADLINE).unwrap().value;
        assert!(saved == deadline || interrupt(&state), "{ticks} ticks");
        let count = if interrupt(&state) { &mut early } else { &mut late };
        *count += 1;
        if interrupt(&state) {
            assert_eq!(cpu.lapic.acknowledge(), VECTOR as u8);
            registers::write(&mut cpu, 0x80b, 0).unwrap();
        }
    }
    assert!(early > 0 && late > 0, "{early} {late}");
}

/// A LINT0 that passes on the 8259's line as an interrupt of its own does so once.
#[test]
fn a_line_that_was_high_has_not_risen_in_a_restore() {
    let mut cpu = cpus(Mode::Long(0), 1).remove(0);
    registers::write(&mut cpu, msr::APIC_BASE, 0xfee0_0d00).unwrap();
    registers::write(&mut cpu, 0x80f, 0x1ff).unwrap();
    registers::write(&mut cpu, 0x835, 0x42).unwrap();
    cpu.shared.extint.store(true, std::sync::atomic::Ordering::SeqCst);
    lapic::take_requests(&mut cpu, request::EXTINT);
    assert_eq!(cpu.lapic.acknowledge(), 0x42);
    registers::write(&mut cpu, 0x80b, 0).unwrap();
    let saved = save(&mut cpu);

    let mut fresh = cpus(Mode::Real, 1).remove(0);
    fresh.shared.extint.store(true, std::sync::atomic::Ordering::SeqCst);
    restore(&mut fresh, &saved).unwrap();
    lapic::take_requests(&mut fresh, request::EXTINT);
    assert_eq!(fresh.lapic.pending(), None);
}

#[test]
fn requests_of_the_life_before_do_not_reach_the_one_restored() {
    let mut cpu = cpus(Mode::Long(0), 1).remove(0);
    let saved = save(&mut cpu);
    let mailbox = cpu.shared.clone();
    let mailbox = mailbox.mailbox(0).unwrap();
    mailbox.request(request::INIT | request::SIPI | request::NMI | request::KICK);
    restore(&mut cpu, &saved).unwrap();
    let requests = mailbox.take();
    assert_eq!(requests & (request::INIT | request::SIPI | request::NMI), 0);
    assert_ne!(requests & request::KICK, 0, "whoever kicked still waits");
}

#[test]
fn it_goes_on_executing() {
    let mut cpu = interesting(Mode::Long(0));
    let saved = save(&mut cpu);
    let mut fresh = cpus(Mode::Real, 1).remove(0);
    let page_tables: Vec<(u64, u64)> = (0..3)
        .map(|i| (crate::testing::PAGES + 0x1000 * i, crate::testing::peek(&cpu, crate::testing::PAGES + 0x1000 * i)))
        .collect();
    for (at, entry) in page_tables {
        poke(&fresh, at, entry);
    }
    restore(&mut fresh, &saved).unwrap();
    poke(&fresh, 0x30000, 42u64);
    fresh.gpr[RAX] = 0x30000;
    // lods through the restored page tables, downwards as DF says
    fresh.gpr[6] = 0x30000;
    step(&mut fresh, &[0x48, 0xad]).unwrap();
    assert_eq!((fresh.gpr[RAX], fresh.gpr[6]), (42, 0x2fff8));
    crate::clock::refresh(&mut fresh);
    assert_ne!(crate::testing::peek(&fresh, 0x5000), 0, "kvmclock is told again");
}

#[test]
fn an_event_on_its_way_is_kept() {
    let mut cpu = cpus(Mode::Protected(0), 1).remove(0);
    for event in [
        Event::Interrupt(0xff),
        Event::Interrupt(0),
        Event::Exception(Exception::with_error(13, 0x18)),
        Event::Exception(Exception::plain(3)),
    ] {
        cpu.injected = Some(event);
        let saved = save(&mut cpu);
        let mut fresh = cpus(Mode::Real, 1).remove(0);
        restore(&mut fresh, &saved).unwrap();
        assert_eq!(fresh.injected, Some(event));
    }
}

#[test]
fn hostile_states_are_refused_not_believed() {
    let good = save(&mut interesting(Mode::Long(0)));
    type Change = Box<dyn Fn(&mut VcpuState)>;
    let mut changes: Vec<(&str, Change)> = Vec::new();
    macro_rules! change {
        ($what:literal, $change:expr) => {
            changes.push(($what, Box::new($change)));
        };
    }
    change!("gpr", |s: &mut VcpuState| s.regs.gpr.truncate(15));
    change!("rip", |s: &mut VcpuState| s.regs.rip = 1 << 60);
    change!("segments", |s: &mut VcpuState| s.system.segments.clear());
    change!("selector", |s: &mut VcpuState| s.system.segments[0].selector = 0x1_0000);
    change!("base", |s: &mut VcpuState| s.system.ldtr.base = 1 << 50);
    change!("access", |s: &mut VcpuState| s.system.tr.access = u32::MAX);
    change!("gdtr", |s: &mut VcpuState| s.system.gdtr.limit = 0x1_0000);
    change!("dr", |s: &mut VcpuState| s.system.dr.push(0));
    change!("pdptes", |s: &mut VcpuState| s.system.pdptes = vec![0; 4]);
    change!("pg without pe", |s: &mut VcpuState| s.system.cr0 &= !cr0::PE);
    change!("cr0", |s: &mut VcpuState| s.system.cr0 |= 1 << 40);
    change!("no pae", |s: &mut VcpuState| s.system.cr4 &= !cr4::PAE);
    change!("cr4", |s: &mut VcpuState| s.system.cr4 |= 1 << 13);
    change!("cr3", |s: &mut VcpuState| s.system.cr3 |= 1 << 51);
    change!("efer", |s: &mut VcpuState| s.system.efer |= 1 << 12);
    change!("lma", |s: &mut VcpuState| s.system.efer &= !efer::LMA);
    change!("v86", |s: &mut VcpuState| s.regs.rflags |= rflags::VM);
    change!("xcr0", |s: &mut VcpuState| s.xcr0 = 0);
    change!("xcr0 without sse", |s: &mut VcpuState| s.xcr0 = 5);
    change!("xcr0 pkru", |s: &mut VcpuState| s.xcr0 |= 1 << 9);
    change!("short xsave", |s: &mut VcpuState| s.xsave.truncate(575));
    change!("no xsave", |s: &mut VcpuState| s.xsave.clear());
    change!("mxcsr", |s: &mut VcpuState| s.xsave[27] = 0xff);
    change!("xstate_bv", |s: &mut VcpuState| s.xsave[513] = 0xff);
    change!("compacted", |s: &mut VcpuState| s.xsave[527] = 0x80);
    change!("activity", |s: &mut VcpuState| s.activity = 9);
    change!("exception", |s: &mut VcpuState| s.events.exception_plus_one = 33);
    change!("interrupt", |s: &mut VcpuState| s.events.interrupt_plus_one = 257);
    change!("two events", |s: &mut VcpuState| {
        (s.events.interrupt_plus_one, s.events.exception_plus_one) = (1, 1);
    });
    change!("apic base", |s: &mut VcpuState| s.msrs.retain(|m| m.index != msr::APIC_BASE));
    change!("msr", |s: &mut VcpuState| s.msrs.push(Msr { index: 0x1234_5678, value: 0 }));
    change!("msr value", |s: &mut VcpuState| s.msrs.push(Msr { index: msr::LSTAR, value: 1 << 47 }));
    change!("lapic", |s: &mut VcpuState| s.lapic.regs.clear());
    change!("cpuid", |s: &mut VcpuState| s.cpuid = vec![Default::default(); 1000]);
    for (what, change) in changes {
        let mut state = good.clone();
        change(&mut state);
        let mut cpu = cpus(Mode::Real, 1).remove(0);
        assert!(restore(&mut cpu, &state).is_err(), "{what}");
    }
    // A processor without any CPUID leaf has no features: what the state uses is missing.
    let mut state = good.clone();
    state.cpuid.clear();
    assert!(restore(&mut cpus(Mode::Real, 1)[0], &state).is_err());
    assert!(restore(&mut cpus(Mode::Real, 1)[0], &VcpuState::default()).is_err());
}
