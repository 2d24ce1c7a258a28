//! What a profile says of a guest.

use std::{sync::Arc, time::Duration};

use iced_x86::code_asm::*;
use purlin_engine_translator::profile::{Content, ExitKind, Place, Profile, Report};

use crate::machine::{CODE, Guest, Machine, STACK, STACK_SIZE, Stop, YIELD, engine, user_mode, watchdog};

/// A machine with a profile.
fn machine(cpus: u32) -> (Machine, Arc<Profile>) {
    let profile = Arc::new(Profile::default());
    let engine = engine().with_profile(profile.clone());
    (Machine::with_engine(cpus, engine), profile)
}

/// Runs until `enough` is said of the profile.
fn run_until(guest: &mut Guest, profile: &Profile, enough: impl Fn(&Report) -> bool + Send) {
    let kicker = guest.kicker.clone();
    let kickers = [kicker.clone()];
    let stop = watchdog(&kickers, || {
        std::thread::scope(|scope| {
            let (over, wait) = std::sync::mpsc::channel::<()>();
            scope.spawn(move || {
                while !enough(&profile.report()) {
                    if wait.recv_timeout(Duration::from_millis(2))
                        == Err(std::sync::mpsc::RecvTimeoutError::Disconnected)
                    {
                        return;
                    }
                }
                kicker.kick();
            });
            let stop = guest.run_unwatched();
            drop(over);
            stop
        })
    });
    assert_eq!(stop, Stop::Kicked);
}

/// The machine's first page of code, with a loop in it, whose address is returned.
fn endless_loop(machine: &Machine) -> u64 {
    const LOOP: u64 = CODE + 0x40;
    machine.code(CODE, |a| a.jmp(LOOP));
    machine.code(LOOP, |a| {
        a.add(rax, 1)?;
        a.imul_3(rcx, rax, 3)?;
        a.jmp(LOOP)
    });
    LOOP
}

fn samples(report: &Report, place: Place) -> u64 {
    report.places.iter().find(|(p, _)| *p == place).map_or(0, |(_, n)| *n)
}

#[test]
fn a_loop_is_what_is_hottest_in_its_mode() {
    for user in [false, true] {
        let (machine, profile) = machine(1);
        let address = endless_loop(&machine);
        machine.user_pages(CODE, 0x1000);
        machine.user_pages(STACK - STACK_SIZE, STACK_SIZE);
        let mut guest = machine.vcpu(0, |state| {
            if user {
                user_mode(state);
            }
        });
        run_until(&mut guest, &profile, |report| report.hottest.first().is_some_and(|hot| hot.samples >= 10));
        let report = profile.report();
        let hottest = report.hottest[0];
        assert!(hottest.place.linear.is_none_or(|linear| linear == address));
        assert_eq!((hottest.place.physical, hottest.place.user), (address, user));
        let (here, there) = if user { (Place::User, Place::Kernel) } else { (Place::Kernel, Place::User) };
        assert!(samples(&report, here) >= hottest.samples);
        assert_eq!(samples(&report, there), 0);
        assert_eq!(report.vcpus, 1);
        assert!(report.cpu_ns > 0);
        assert!(report.translation.cold >= 1 && report.translation.hot >= 1, "{:?}", report.translation);

        // What was in the code cache is known once the VM is gone.
        assert!(profile.pieces().is_empty());
        drop((guest, machine));
        let pieces = profile.pieces();
        let blocks: Vec<_> = pieces.iter().filter(|p| p.content == Content::Block(hottest.place)).collect();
        assert!(blocks.len() >= 2, "a cold block and a hot one: {pieces:x?}");
        assert!(pieces.iter().any(|p| p.content == Content::Stub("enter")));
        assert!(profile.report().translation.replaced >= 1);
    }
}

#[test]
fn emulated_instructions_and_devices_are_told_apart() {
    let (machine, profile) = machine(1);
    machine.code(CODE, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.out(u32::from(YIELD), eax)?;
        a.jmp(again)
    });
    let mut guest = machine.vcpu(0, |_| {});
    run_until(&mut guest, &profile, |report| samples(report, Place::Devices) >= 3);
    let report = profile.report();
    let out = report.emulated.iter().find(|e| e.name == "out").expect("it was emulated");
    assert!(out.count > 0);
    assert!(report.exits.contains(&(ExitKind::Emulate, out.count)), "{:?} {:?}", out, report.exits);
}
