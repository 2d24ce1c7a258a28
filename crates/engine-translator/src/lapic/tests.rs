//! Values are those of SDM vol. 3A chapter 11.

use std::sync::{Mutex, OnceLock};

use purlin_arch::x86_64::{msr, state::Activity};
use purlin_engine::{After, Bus};

use super::*;
use crate::{
    clock::monotonic_ns,
    mailbox::request,
    msr as registers,
    testing::{Mode, attach_bus, cpus},
};

const FIXED: u32 = 0;
const LEVEL_TRIGGERED: u32 = 1 << 15;
const ASSERT: u64 = 1 << 14;
const LOGICAL: u64 = 1 << 11;

/// Writes a register of the xAPIC's page.
fn set(cpu: &mut Cpu, register: u32, value: u32) {
    mmio_write(cpu, register, &value.to_le_bytes());
}

fn get(cpu: &mut Cpu, register: u32) -> u32 {
    let mut bytes = [0; 4];
    mmio_read(cpu, register, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// Processors whose APICs are enabled by software.
fn enabled(count: u32) -> Vec<Box<Cpu>> {
    let mut all = cpus(Mode::Long(0), count);
    for cpu in &mut all {
        set(cpu, reg::SVR, 0x1ff);
    }
    all
}

/// In x2APIC mode.
fn enabled_x2apic(count: u32) -> Vec<Box<Cpu>> {
    let mut all = enabled(count);
    for cpu in &mut all {
        let value = cpu.lapic.base() | base::EXTD;
        registers::write(cpu, msr::APIC_BASE, value).unwrap();
    }
    all
}

fn taken(cpu: &mut Cpu) -> u32 {
    let shared = cpu.shared.clone();
    let requests = shared.mailbox(cpu.index as usize).unwrap().take();
    take_requests(cpu, requests);
    requests
}

/// Which processors have vector `vector` pending.
fn who(all: &mut [Box<Cpu>], vector: u8) -> Vec<u32> {
    all.iter_mut()
        .filter_map(|cpu| {
            taken(cpu);
            (cpu.lapic.pending() == Some(vector)).then_some(cpu.index)
        })
        .collect()
}

#[test]
fn registers_after_power_up() {
    let mut all = cpus(Mode::Long(0), 2);
    let cpu = &mut all[1];
    let wanted = [
        (reg::ID, 1 << 24),
        (reg::VERSION, 0x0105_0014),
        (reg::TPR, 0),
        (reg::LDR, 0),
        (reg::DFR, 0xffff_ffff),
        (reg::SVR, 0xff),
        (reg::LVT_TIMER, 0x1_0000),
        (reg::LVT_LINT0, 0x1_0000),
        (reg::LVT_ERROR, 0x1_0000),
        (reg::DIVIDE, 0),
        (reg::CURRENT_COUNT, 0),
    ];
    for (register, value) in wanted {
        assert_eq!(get(cpu, register), value, "{register:#x}");
    }
    assert_eq!(registers::read(cpu, msr::APIC_BASE), Ok(0xfee0_0800));
    assert_eq!(registers::read(&mut all[0], msr::APIC_BASE), Ok(0xfee0_0900), "the bootstrap processor");
}

#[test]
fn priorities_decide_what_is_delivered() {
    let mut all = enabled(1);
    let cpu = &mut all[0];
    cpu.lapic.request(0x31, false);
    cpu.lapic.request(0x52, false);
    assert_eq!(cpu.lapic.pending(), Some(0x52));
    assert_eq!(cpu.lapic.acknowledge(), 0x52);
    assert_eq!((get(cpu, reg::ISR + 0x20), get(cpu, reg::PPR)), (1 << 0x12, 0x50));
    cpu.lapic.request(0x5f, false);
    assert_eq!(cpu.lapic.pending(), None, "the same class waits");
    cpu.lapic.request(0x60, false);
    assert_eq!(cpu.lapic.acknowledge(), 0x60, "a higher one does not");
    set(cpu, reg::EOI, 0);
    assert_eq!(get(cpu, reg::PPR), 0x50);
    set(cpu, reg::EOI, 0);
    set(cpu, reg::TPR, 0x55);
    assert_eq!((get(cpu, reg::PPR), cpu.lapic.pending()), (0x55, None));
    taken(cpu);
    set_tpr(cpu, 0x40);
    assert_eq!(taken(cpu) & request::LAPIC, request::LAPIC, "the run loop is told to look");
    assert_eq!((cpu.lapic.acknowledge(), cpu.lapic.pending()), (0x5f, None));
    set(cpu, reg::TPR, 0xf0);
    assert_eq!(cpu.lapic.acknowledge(), 0xff, "spurious");
    assert_eq!(get(cpu, reg::ISR + 0x70), 0, "which is not in service");
}

#[test]
fn physical_destinations() {
    let mut all = enabled(3);
    let shared = all[0].shared.clone();
    deliver_msi(&shared, 0xfee0_1000, FIXED | 0x41);
    assert_eq!(who(&mut all, 0x41), [1]);
    deliver_msi(&shared, 0xfeef_f000, FIXED | 0x42);
    assert_eq!(who(&mut all, 0x42), [0, 1, 2], "broadcast");
    deliver_msi(&shared, 0xfee0_9000, FIXED | 0x43);
    deliver_msi(&shared, 0xfed0_1000, FIXED | 0x43);
    assert!(who(&mut all, 0x43).is_empty(), "nobody has ID 9; not the APICs' addresses");
    set(&mut all[1], reg::ID, 9 << 24);
    deliver_msi(&shared, 0xfee0_9000, FIXED | 0x43);
    assert_eq!(who(&mut all, 0x43), [1]);
}

#[test]
fn logical_destinations_flat_and_in_clusters() {
    let mut all = enabled(3);
    let shared = all[0].shared.clone();
    let logical = |set: u64| 0xfee0_0000 | set << 12 | 1 << 2;
    for (i, cpu) in all.iter_mut().enumerate() {
        set(cpu, reg::LDR, 1 << (24 + i));
    }
    deliver_msi(&shared, logical(0b101), 0x51);
    assert_eq!(who(&mut all, 0x51), [0, 2]);
    for (i, cpu) in all.iter_mut().enumerate() {
        set(cpu, reg::DFR, 0x0fff_ffff);
        set(cpu, reg::LDR, [0x11, 0x12, 0x21][i] << 24);
    }
    deliver_msi(&shared, logical(0x13), 0x61);
    assert_eq!(who(&mut all, 0x61), [0, 1]);
    deliver_msi(&shared, logical(0xf1), 0x71);
    assert_eq!(who(&mut all, 0x71), [0, 2], "all clusters");
}

#[test]
fn lowest_priority_goes_to_one() {
    let mut all = enabled(3);
    let shared = all[0].shared.clone();
    for (i, cpu) in all.iter_mut().enumerate() {
        set(cpu, reg::LDR, 1 << (24 + i));
    }
    set(&mut all[1], reg::SVR, 0xff);
    for vector in 0x40..0x48 {
        deliver_msi(&shared, 0xfee0_7000 | 1 << 2, 1 << 8 | vector);
        let got = who(&mut all, vector as u8);
        assert!(got == [0] || got == [2], "one that is enabled: {got:?}");
    }
}

#[test]
fn interprocessor_interrupts() {
    let mut all = enabled(3);
    let icr = |cpu: &mut Cpu, high: u32, low: u64| {
        set(cpu, reg::ICR_HIGH, high << 24);
        set(cpu, reg::ICR, (low | ASSERT) as u32);
    };
    icr(&mut all[0], 2, 0x41);
    assert_eq!(who(&mut all, 0x41), [2]);
    icr(&mut all[1], 0, 0x42 | 1 << 18);
    assert_eq!(who(&mut all, 0x42), [1], "self");
    icr(&mut all[1], 0, 0x43 | 2 << 18);
    assert_eq!(who(&mut all, 0x43), [0, 1, 2], "all including self");
    icr(&mut all[1], 0, 0x44 | 3 << 18);
    assert_eq!(who(&mut all, 0x44), [0, 2], "all excluding self");
    icr(&mut all[0], 0, 0x45 | LOGICAL);
    assert!(who(&mut all, 0x45).is_empty());
    icr(&mut all[0], 1, 4 << 8);
    assert_eq!(taken(&mut all[1]) & request::NMI, request::NMI);
    assert_eq!(get(&mut all[0], reg::ICR_HIGH), 1 << 24);
}

#[test]
fn init_and_startup() {
    let mut all = enabled(2);
    let (bsp, ap) = all.split_at_mut(1);
    let (bsp, ap) = (&mut bsp[0], &mut ap[0]);
    set(ap, reg::TPR, 0x20);
    set(bsp, reg::ICR_HIGH, 1 << 24);
    set(bsp, reg::ICR, 0x0000_4500);
    assert_eq!(taken(ap) & request::INIT, request::INIT);
    crate::reset::init(ap);
    assert_eq!((ap.activity, get(ap, reg::TPR), get(ap, reg::SVR)), (Activity::WaitForSipi, 0, 0xff));
    // INIT level de-assert does nothing.
    set(bsp, reg::ICR, 0x0000_8500);
    assert_eq!(taken(ap) & request::INIT, 0);
    set(bsp, reg::ICR, 0x0000_4699);
    assert_eq!(taken(ap) & request::SIPI, request::SIPI);
    assert_eq!(startup(ap), Some(0x99));
    crate::reset::sipi(ap, 0x99);
    assert_eq!(startup(ap), None, "the second one is lost");
    // A SIPI that has not been taken does not outlive the INIT that follows it.
    set(bsp, reg::ICR, 0x0000_4677);
    set(bsp, reg::ICR, 0x0000_4500);
    assert_eq!(taken(ap) & (request::INIT | request::SIPI), request::INIT);
}

#[test]
fn a_disabled_apic_takes_no_vectors_but_nmi_and_init() {
    let mut all = cpus(Mode::Long(0), 1);
    let shared = all[0].shared.clone();
    deliver_msi(&shared, 0xfee0_0000, 0x41);
    assert!(who(&mut all, 0x41).is_empty());
    deliver_msi(&shared, 0xfee0_0000, 4 << 8);
    assert_eq!(taken(&mut all[0]) & request::NMI, request::NMI);
    set(&mut all[0], reg::LVT_TIMER, 0x40);
    assert_eq!(get(&mut all[0], reg::LVT_TIMER), 0x1_0040, "masked whatever is written");
}

struct EndOfInterrupt(Mutex<Vec<u8>>);

impl Bus for EndOfInterrupt {
    fn port_in(&self, _: u16, _: u8) -> u32 {
        0
    }
    fn port_out(&self, _: u16, _: u8, _: u32) -> After {
        After::Continue
    }
    fn mmio_read(&self, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: u64, _: &[u8]) -> After {
        After::Continue
    }
    fn acknowledge_interrupt(&self) -> u8 {
        0
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.0.lock().unwrap().push(vector);
    }
}

#[test]
fn the_end_of_a_level_triggered_interrupt_is_broadcast() {
    static BUS: OnceLock<EndOfInterrupt> = OnceLock::new();
    let bus = BUS.get_or_init(|| EndOfInterrupt(Mutex::default()));
    let mut all = enabled(1);
    attach_bus(&mut all[0], bus);
    let shared = all[0].shared.clone();
    let mut run = |data: u32| {
        deliver_msi(&shared, 0xfee0_0000, data);
        taken(&mut all[0]);
        let vector = all[0].lapic.acknowledge();
        set(&mut all[0], reg::EOI, 0);
        (vector, std::mem::take(&mut *bus.0.lock().unwrap()))
    };
    assert_eq!(run(LEVEL_TRIGGERED | 0x41), (0x41, vec![0x41]));
    assert_eq!(run(0x41), (0x41, vec![]), "the same vector, edge-triggered now");
    assert_eq!(run(LEVEL_TRIGGERED | 0x42), (0x42, vec![0x42]));
    set(&mut all[0], reg::SVR, 0x11ff);
    let mut run = |data: u32| {
        deliver_msi(&shared, 0xfee0_0000, data);
        taken(&mut all[0]);
        all[0].lapic.acknowledge();
        set(&mut all[0], reg::EOI, 0);
        std::mem::take(&mut *bus.0.lock().unwrap())
    };
    assert_eq!(run(LEVEL_TRIGGERED | 0x43), [], "suppressed");
}

#[test]
fn errors_show_after_a_write_to_esr() {
    let mut all = enabled(1);
    let cpu = &mut all[0];
    set(cpu, reg::LVT_ERROR, 0xfe);
    set(cpu, reg::ICR, 0x4_400f);
    assert_eq!(get(cpu, reg::ESR), 0, "not yet");
    set(cpu, reg::ESR, 0);
    assert_eq!(get(cpu, reg::ESR), esr::SEND_ILLEGAL);
    assert_eq!(cpu.lapic.acknowledge(), 0xfe);
    set(cpu, reg::EOI, 0);
    let shared = cpu.shared.clone();
    deliver_msi(&shared, 0xfee0_0000, 0x0e);
    taken(cpu);
    set(cpu, reg::ESR, 0);
    assert_eq!((get(cpu, reg::ESR), cpu.lapic.acknowledge()), (esr::RECEIVE_ILLEGAL, 0xfe));
}

#[test]
fn modes_of_the_apic_base() {
    let mut all = cpus(Mode::Long(0), 1);
    let cpu = &mut all[0];
    let (off, xapic, x2apic) = (0xfee0_0100, 0xfee0_0900, 0xfee0_0d00);
    let mut to = |value| registers::write(cpu, msr::APIC_BASE, value).is_ok();
    let transitions = [
        (0xfee0_0500, false), // x2APIC without being enabled
        (off, true),
        (x2apic, false),
        (xapic, true),
        (xapic | 1 << 63, false),
        (xapic | 1 << 9, false),
        (x2apic, true),
        (xapic, false),
        (x2apic, true),
        (off, true),
        (xapic, true),
        (0xfef0_0900, true),
    ];
    for (i, (value, allowed)) in transitions.into_iter().enumerate() {
        assert_eq!(to(value), allowed, "step {i}: {value:#x}");
    }
    assert_eq!(cpu.lapic.mmio_base(), Some(0xfef0_0000));
    registers::write(cpu, msr::APIC_BASE, off).unwrap();
    assert!(cpu.lapic.accepts_extint() && cpu.lapic.mmio_base().is_none());
}

#[test]
fn x2apic_registers() {
    let mut all = enabled_x2apic(18);
    assert_eq!(registers::read(&mut all[17], 0x802), Ok(17));
    assert_eq!(registers::read(&mut all[17], 0x80d), Ok(1 << 16 | 1 << 1), "logical: cluster 1, processor 1");
    let cpu = &mut all[0];
    for (index, value) in
        [(0x80b, 1), (0x808, 0x100), (0x802, 0), (0x80e, 0), (0x831, 0), (0x838, 1 << 32), (0x830, 1 << 20)]
    {
        assert_eq!(registers::write(cpu, index, value), Err(Exception::GP0), "write {index:#x} {value:#x}");
    }
    for index in [0x80b, 0x80e, 0x831, 0x83f, 0x8ff, 0x800] {
        assert_eq!(registers::read(cpu, index), Err(Exception::GP0), "read {index:#x}");
    }
    registers::write(cpu, 0x830, 5 << 32 | 0x4041).unwrap();
    assert_eq!(who(&mut all, 0x41), [5]);
    registers::write(&mut all[0], 0x830, (1 << 16 | 3) << 32 | LOGICAL | 0x42).unwrap();
    assert_eq!(who(&mut all, 0x42), [16, 17]);
    registers::write(&mut all[0], 0x83f, 0x43).unwrap();
    assert_eq!(who(&mut all, 0x43), [0]);
    registers::write(&mut all[3], 0x830, 0xffff_ffff << 32 | 0x44).unwrap();
    assert_eq!(who(&mut all, 0x44).len(), 18, "broadcast");
    // xAPIC's page is gone.
    assert_eq!(all[0].lapic.mmio_base(), None);
}

#[test]
fn lint0_passes_the_8259() {
    let mut all = enabled(1);
    let cpu = &mut all[0];
    assert!(!cpu.lapic.accepts_extint(), "masked after reset");
    set(cpu, reg::LVT_LINT0, 7 << 8);
    assert!(cpu.lapic.accepts_extint());
    set(cpu, reg::LVT_LINT0, 0x45);
    assert!(!cpu.lapic.accepts_extint());
    cpu.shared.extint.store(true, Ordering::SeqCst);
    take_requests(cpu, request::EXTINT);
    assert_eq!(cpu.lapic.acknowledge(), 0x45, "fixed mode: on its edge");
    set(cpu, reg::EOI, 0);
    take_requests(cpu, request::EXTINT);
    assert_eq!(cpu.lapic.pending(), None);
}

/// Waits for the timer's deadline.
fn sleep_to_deadline(cpu: &mut Cpu) {
    let deadline = cpu.lapic.timer_deadline().expect("armed");
    while monotonic_ns() <= deadline {
        std::hint::spin_loop();
    }
    take_requests(cpu, request::TIMER);
}

#[test]
fn one_shot_and_periodic() {
    let mut all = enabled(1);
    let cpu = &mut all[0];
    set(cpu, reg::LVT_TIMER, 0x40);
    set(cpu, reg::DIVIDE, 0b0011); // by 16
    let before = monotonic_ns();
    set(cpu, reg::INITIAL_COUNT, 100_000);
    let wait = cpu.lapic.timer_deadline().unwrap() - before;
    assert!((1_600_000..2_600_000).contains(&wait), "{wait} ns: 100,000 ticks of 16 ns");
    let count = get(cpu, reg::CURRENT_COUNT);
    assert!((1..=100_000).contains(&count));
    take_requests(cpu, request::TIMER);
    assert_eq!(cpu.lapic.pending(), None, "not yet");
    sleep_to_deadline(cpu);
    assert_eq!((cpu.lapic.pending(), cpu.lapic.timer_deadline(), get(cpu, reg::CURRENT_COUNT)), (Some(0x40), None, 0));

    cpu.lapic.acknowledge();
    set(cpu, reg::EOI, 0);
    set(cpu, reg::LVT_TIMER, 0x2_0041);
    set(cpu, reg::INITIAL_COUNT, 20_000);
    let first = cpu.lapic.timer_deadline().unwrap();
    sleep_to_deadline(cpu);
    let second = cpu.lapic.timer_deadline().unwrap();
    assert_eq!((second - first) % 320_000, 0, "periods are exact");
    assert_eq!(cpu.lapic.acknowledge(), 0x41);
    set(cpu, reg::INITIAL_COUNT, 0);
    assert_eq!(cpu.lapic.timer_deadline(), None, "stopped");
}

#[test]
fn dividers() {
    let divisors =
        [(0b0000, 2), (0b0001, 4), (0b0010, 8), (0b0011, 16), (0b1000, 32), (0b1001, 64), (0b1010, 128), (0b1011, 1)];
    for (code, divisor) in divisors {
        let mut all = enabled(1);
        let cpu = &mut all[0];
        set(cpu, reg::LVT_TIMER, 0x40);
        set(cpu, reg::DIVIDE, code);
        let before = monotonic_ns();
        set(cpu, reg::INITIAL_COUNT, 1_000_000_000);
        let wait = cpu.lapic.timer_deadline().unwrap() - before;
        let seconds = (wait + 100_000_000) / 1_000_000_000;
        assert_eq!(seconds, divisor, "{code:#b}");
    }
}

#[test]
fn tsc_deadline() {
    let mut all = enabled(1);
    let cpu = &mut all[0];
    registers::write(cpu, msr::TSC_DEADLINE, cpu.tsc() + 1_000_000).unwrap();
    assert_eq!(registers::read(cpu, msr::TSC_DEADLINE), Ok(0), "ignored in another mode");
    set(cpu, reg::LVT_TIMER, 0x4_0050);
    let deadline = cpu.tsc() + 2_000_000;
    registers::write(cpu, msr::TSC_DEADLINE, deadline).unwrap();
    assert_eq!(registers::read(cpu, msr::TSC_DEADLINE), Ok(deadline));
    set(cpu, reg::INITIAL_COUNT, 5);
    assert_eq!((get(cpu, reg::INITIAL_COUNT), get(cpu, reg::CURRENT_COUNT)), (0, 0));
    while cpu.lapic.timer_deadline().is_some() {
        take_requests(cpu, request::TIMER);
    }
    assert!(cpu.tsc() >= deadline, "never early");
    assert_eq!((cpu.lapic.acknowledge(), registers::read(cpu, msr::TSC_DEADLINE)), (0x50, Ok(0)));
    // One that has passed fires at once; 0 disarms.
    registers::write(cpu, msr::TSC_DEADLINE, u64::MAX).unwrap();
    assert!(cpu.lapic.timer_deadline().is_some());
    registers::write(cpu, msr::TSC_DEADLINE, 0).unwrap();
    assert_eq!(cpu.lapic.timer_deadline(), None);
    registers::write(cpu, msr::TSC_DEADLINE, 1).unwrap();
    assert!(cpu.lapic.timer_deadline().unwrap() <= monotonic_ns());
}

#[test]
fn a_saved_apic_goes_on() {
    let mut all = enabled_x2apic(2);
    let cpu = &mut all[1];
    let shared = cpu.shared.clone();
    registers::write(cpu, 0x832, 0x2_0040).unwrap();
    registers::write(cpu, 0x83e, 0xb).unwrap();
    registers::write(cpu, 0x838, 500_000_000).unwrap();
    registers::write(cpu, 0x808, 0x10).unwrap();
    cpu.lapic.request(0x61, true);
    cpu.lapic.acknowledge();
    deliver_msi(&shared, 0xfee0_1000, LEVEL_TRIGGERED | 0x72);
    let saved = save(cpu, request::SIPI);
    assert_eq!(saved.regs.len(), 1024);
    assert_eq!(saved.regs[0x20..0x24], [1, 0, 0, 0]);
    assert!(saved.timer_remaining_ns > 400_000_000);

    let mut fresh = cpus(Mode::Long(0), 2);
    let copy = &mut fresh[1];
    restore(copy, &saved, cpu.lapic.base()).unwrap();
    assert_eq!(taken(copy) & (request::SIPI | request::INIT), request::SIPI);
    assert_eq!(copy.lapic.pending(), Some(0x72));
    assert_eq!(registers::read(copy, 0x808), Ok(0x10));
    assert_eq!(copy.lapic.ppr(), 0x60);
    let left = copy.lapic.timer_deadline().unwrap() - monotonic_ns();
    assert!((300_000_000..=500_000_000).contains(&left), "{left}");
    let again = save(copy, request::SIPI);
    let mut same = saved.clone();
    same.timer_remaining_ns = again.timer_remaining_ns;
    same.regs[0x390..0x394].copy_from_slice(&again.regs[0x390..0x394]);
    assert_eq!(again, same);
}

#[test]
fn hostile_states_are_refused() {
    let mut all = cpus(Mode::Long(0), 1);
    let cpu = &mut all[0];
    let good = save(cpu, 0);
    let base = cpu.lapic.base();
    for length in [0, 1023, 1025, 4096] {
        let saved = purlin_arch::x86_64::lapic::LapicState { regs: vec![0xff; length], ..good.clone() };
        assert!(restore(cpu, &saved, base).is_err(), "{length}");
    }
    assert!(restore(cpu, &good, base & !base::EN | base::EXTD).is_err());
    let late = purlin_arch::x86_64::lapic::LapicState { sipi_plus_one: 257, ..good.clone() };
    assert!(restore(cpu, &late, base).is_err());
    // Everything set is odd, but harmless.
    let odd = purlin_arch::x86_64::lapic::LapicState { regs: vec![0xff; 1024], timer_remaining_ns: u64::MAX, ..good };
    restore(cpu, &odd, base).unwrap();
    take_requests(cpu, u32::MAX);
    assert_eq!(cpu.lapic.irr[0] & 0xffff, 0);
}
