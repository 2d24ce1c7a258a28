//! The chipset as a guest meets it: through ports and registers, with a vCPU's side that records what arrives.

use std::time::{SystemTime, UNIX_EPOCH};

use purlin_devices::GuestEvent;
use purlin_engine::{Engine, VmConfig, memory};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{
    boot::tests::config,
    layout::{self, MIB},
    testing::{ScriptedEngine, ScriptedVm},
};

/// PIT counts in a tick of 10 ms.
const TEN_MS: u16 = 11932;

struct Pc {
    chipset: Chipset,
    vm: Arc<ScriptedVm>,
    clock: Arc<Clock>,
    memory: Arc<GuestRam>,
    output: Sink,
}

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        lock(&self.0).extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Pc {
    fn new() -> Self {
        let mut config = config(16 * MIB, 1);
        config.devices = [OptionalDevice::DebugExit, OptionalDevice::Debugcon, OptionalDevice::Rng].into();
        let engine = ScriptedEngine::new(|run| run.halt());
        let memory = Arc::new(memory::create(&layout::slots(config.memory)).unwrap());
        let vm: Arc<dyn Vm> = engine.create_vm(VmConfig { memory: memory.clone(), cpuid: vec![Vec::new()] }).unwrap();
        let (clock, output) = (Arc::new(Clock::default()), Sink::default());
        let chipset = Chipset::new(&config, &memory, &vm, clock.clone(), Box::new(output.clone())).unwrap();
        chipset.reset();
        Self { chipset, vm: engine.vm(), clock, memory, output }
    }

    fn out(&self, port: u16, value: u8) -> After {
        self.chipset.port_out(port, 1, value.into())
    }

    fn outs(&self, writes: &[(u16, u8)]) {
        for &(port, value) in writes {
            assert_eq!(self.out(port, value), After::Continue, "{port:#x}");
        }
    }

    fn inb(&self, port: u16) -> u8 {
        self.chipset.port_in(port, 1) as u8
    }

    /// Lets time pass, as the deadlines' thread does.
    fn pass(&self, ns: u64) {
        self.clock.set(self.clock.now() + ns);
        self.chipset.devices.advance_due();
    }

    /// The 8259s as Linux sets them up, with these interrupts unmasked (2 is the slave's).
    fn set_up_pic(&self, unmasked: u16) {
        let [low, high] = (!unmasked).to_le_bytes();
        self.outs(&[(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, low)]);
        self.outs(&[(0xa0, 0x11), (0xa1, 0x28), (0xa1, 2), (0xa1, 1), (0xa1, high)]);
    }

    /// Channel 0 as a rate generator. Setting it up makes its output rise, as on the chip: to be done before what it
    /// interrupts listens.
    fn set_up_timer(&self) {
        let [low, high] = TEN_MS.to_le_bytes();
        self.outs(&[(0x43, 0x34), (0x40, low), (0x40, high)]);
    }

    /// Writes an I/O APIC redirection entry.
    fn route(&self, pin: u8, entry: u64) {
        for (register, value) in [(0x11 + 2 * pin, (entry >> 32) as u32), (0x10 + 2 * pin, entry as u32)] {
            let _ = self.chipset.mmio_write(IOAPIC, &u32::from(register).to_le_bytes());
            let _ = self.chipset.mmio_write(IOAPIC + 0x10, &value.to_le_bytes());
        }
    }
}

#[test]
fn a_timer_tick_reaches_the_processor_through_the_8259() {
    let pc = Pc::new();
    pc.set_up_timer();
    pc.set_up_pic(1 << 0);
    assert!(!pc.vm.extint());
    pc.pass(9_000_000);
    assert!(!pc.vm.extint());
    pc.pass(1_100_000);
    assert!(pc.vm.extint());
    assert_eq!(pc.chipset.acknowledge_interrupt(), 0x20);
    assert!(!pc.vm.extint());
    // The next one waits for the end of this one.
    pc.pass(10_000_000);
    assert!(!pc.vm.extint());
    pc.outs(&[(0x20, 0x20)]);
    assert!(pc.vm.extint());
}

#[test]
fn a_timer_tick_reaches_the_processor_as_a_message_from_pin_2() {
    let pc = Pc::new();
    pc.set_up_timer();
    pc.route(2, 1 << 56 | 0x31);
    // Pin 0 is not the timer's, whatever a guest that ignores the override thinks.
    pc.route(0, 0x32);
    pc.pass(10_100_000);
    pc.pass(10_000_000);
    assert_eq!(pc.vm.take_messages(), [(0xfee0_1000, 0x31), (0xfee0_1000, 0x31)]);
}

#[test]
fn a_character_arrives_with_its_interrupt_and_leaves_for_the_output() {
    let pc = Pc::new();
    pc.set_up_pic(1 << 4);
    // 115200 8N1, FIFO on, OUT2, interrupt on received data.
    pc.outs(&[(0x3fb, 0x83), (0x3f8, 1), (0x3f9, 0), (0x3fb, 3), (0x3fa, 1), (0x3fc, 0xb), (0x3f9, 1)]);
    let serial = pc.chipset.serial.as_ref().unwrap();
    assert_eq!(pc.chipset.devices.with(serial, |s| s.push_input(b"x")), 1);
    pc.pass(1_000_000);
    assert!(pc.vm.extint());
    assert_eq!(pc.chipset.acknowledge_interrupt(), 0x24);
    assert_eq!(pc.inb(0x3f8), b'x');
    pc.outs(&[(0x3f8, b'y'), (0xe9, b'z')]);
    let output = pc.output.clone();
    drop(pc);
    assert_eq!(*lock(&output.0), b"yz");
}

#[test]
fn level_interrupts_come_again_after_their_end_while_they_last() {
    let pc = Pc::new();
    let line = pc.chipset.interrupts.isa(SCI);
    // Level-triggered, active high.
    pc.route(SCI, 1 << 15 | 0x41);
    line.set(true);
    assert_eq!(pc.vm.take_messages().len(), 1);
    pc.chipset.end_of_interrupt(0x40);
    assert!(pc.vm.take_messages().is_empty());
    pc.chipset.end_of_interrupt(0x41);
    assert_eq!(pc.vm.take_messages().len(), 1);
    line.set(false);
    pc.chipset.end_of_interrupt(0x41);
    assert!(pc.vm.take_messages().is_empty());
}

#[test]
fn each_way_to_end_a_run_or_reset_it_is_a_request() {
    let ways: [(u16, u8, u32, Request); 5] = [
        (ports::PM1_CONTROL, 2, u32::from(AcpiPm::SLEEP_TYPE_S5) << 10 | 1 << 13, Request::PowerOff),
        (ports::RESET, 1, 6, Request::Reset),
        (0x64, 1, 0xfe, Request::Reset),
        (0x92, 1, 1, Request::Reset),
        (0xf4, 1, 0x10, Request::Exit(0x21)),
    ];
    for (port, size, value, request) in ways {
        let pc = Pc::new();
        assert_eq!(pc.chipset.request(), None);
        assert_eq!(pc.chipset.port_out(port, size, value), After::Leave, "{port:#x}");
        assert_eq!(pc.chipset.request(), Some(request));
        // The first one counts, until a reset.
        let _ = pc.out(0xf4, 0);
        assert_eq!(pc.chipset.request(), Some(request));
        pc.chipset.reset();
        assert_eq!(pc.chipset.request(), None);
    }
}

#[test]
fn a_guest_that_has_panicked_says_so_and_goes_on() {
    let pc = Pc::new();
    assert_eq!(pc.inb(ports::PVPANIC), 7);
    let heard = Arc::new(Mutex::new(Vec::new()));
    let ears = heard.clone();
    pc.chipset.events.listen(Box::new(move |event| lock(&ears).push(event)));
    assert_eq!(pc.out(ports::PVPANIC, 1), After::Continue);
    assert_eq!((pc.chipset.request(), &*lock(&heard)), (None, &vec![GuestEvent::Panicked]));
}

#[test]
fn a_new_generation_id_interrupts_once_the_machine_runs() {
    let pc = Pc::new();
    pc.route(GENERATION_IRQ, 0x51);
    let id = || pc.memory.read_obj::<[u8; 16]>(GuestAddress(GENERATION_ID)).unwrap();
    let first = id();
    assert_ne!(first, [0; 16]);
    pc.chipset.renew_generation().unwrap();
    let second = id();
    assert_ne!(first, second);
    // The deadlines' thread stands still while the machine does.
    assert_eq!(pc.vm.take_messages(), []);
    pc.pass(0);
    assert_eq!(pc.vm.take_messages().len(), 1);
    pc.chipset.reset();
    pc.pass(1);
    assert_eq!((id(), pc.vm.take_messages()), (second, vec![]), "the same machine");
}

#[test]
fn pci_configuration_addresses_do_not_hit_the_reset_control_among_them() {
    let pc = Pc::new();
    // Device 0, function 6: the byte at 0xcf9 would be a reset.
    assert_eq!(pc.chipset.port_out(0xcf8, 4, 0x8000_0600), After::Continue);
    assert_eq!(pc.chipset.port_in(0xcf8, 4), 0x8000_0600);
    assert_eq!(pc.chipset.port_in(0xcfc, 4), 0xffff_ffff);
    assert_eq!(pc.chipset.port_out(0xcf8, 4, 0x8000_0008), After::Continue);
    assert_eq!(pc.chipset.port_in(0xcfe, 2), 0x0600);
}

#[test]
fn a_function_on_the_pci_bus_is_mapped_by_firmware_and_goes_where_the_guest_puts_it() {
    let pc = Pc::new();
    let read = |address: u64| {
        let mut data = [0; 4];
        pc.chipset.mmio_read(address, &mut data);
        u32::from_le_bytes(data)
    };
    let write = |address: u64, value: u32| {
        assert_eq!(pc.chipset.mmio_write(address, &value.to_le_bytes()), After::Continue);
    };
    // virtio-rng in slot 1, by either mechanism.
    let config = ECAM + (1 << 15);
    assert_eq!(read(config), 0x1044_1af4);
    assert_eq!(pc.chipset.port_out(0xcf8, 4, 0x8000_0800), After::Continue);
    assert_eq!(pc.chipset.port_in(0xcfc, 4), 0x1044_1af4);
    // Its base address, in the window and decoded; there, the number of queues.
    assert_eq!((read(config + 0x10), read(config + 4) & 2), (PCI_WINDOW as u32, 2));
    assert_eq!(read(PCI_WINDOW + 0x10) >> 16, 1);
    write(config + 0x10, 0xd000_0000);
    assert_eq!(read(PCI_WINDOW + 0x10), u32::MAX);
    assert_eq!(read(0xd000_0010) >> 16, 1);
    // A reset of the machine puts it back.
    pc.chipset.reset();
    assert_eq!(read(0xd000_0010), u32::MAX);
    assert_eq!(read(PCI_WINDOW + 0x10) >> 16, 1);
}

#[test]
fn the_power_button_raises_the_sci() {
    let pc = Pc::new();
    pc.set_up_pic(1 << SCI | 1 << 2);
    // PM1 enable: PWRBTN_EN; control: SCI_EN.
    assert_eq!(pc.chipset.port_out(ports::PM1_EVENT + 2, 2, 1 << 8), After::Continue);
    assert_eq!(pc.chipset.port_out(ports::PM1_CONTROL, 2, 1), After::Continue);
    assert!(!pc.vm.extint());
    pc.chipset.devices.with(&pc.chipset.power, |power| power.press_power_button());
    assert!(pc.vm.extint());
    assert_eq!(pc.chipset.acknowledge_interrupt(), 0x29);
}

#[test]
fn the_real_time_clock_shows_the_hosts_time_also_after_the_machine_stood_still() {
    let pc = Pc::new();
    let decimal = |register: u8| {
        pc.outs(&[(0x70, register)]);
        let bcd = pc.inb(0x71);
        u64::from(bcd >> 4) * 10 + u64::from(bcd & 15)
    };
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() % 86_400;
    let shown = || {
        let time = [4, 2, 0].map(decimal);
        time[0] * 3600 + time[1] * 60 + time[2]
    };
    // Within two seconds of each other, also round midnight.
    let close = |a: u64, b: u64| (a + 86_402 - b) % 86_400 <= 4;
    pc.chipset.set_wall_clock();
    assert!(close(shown(), now()), "{} {}", shown(), now());
    // An hour on the machine's clock that was none on the wall: a restored machine.
    pc.pass(3_600_000_000_000);
    assert!(!close(shown(), now()));
    pc.chipset.set_wall_clock();
    assert!(close(shown(), now()), "{} {}", shown(), now());
}

#[test]
fn firmware_leaves_the_sci_level_triggered() {
    let pc = Pc::new();
    assert_eq!((pc.inb(0x4d0), pc.inb(0x4d1)), (0, 2));
}

#[test]
fn a_restored_chipset_is_the_one_that_was_saved() {
    let pc = Pc::new();
    pc.set_up_timer();
    pc.set_up_pic(1 << 0 | 1 << 4);
    pc.route(2, 0x31);
    pc.pass(10_100_000);
    assert!(pc.vm.extint());
    pc.vm.take_messages();
    let mut saved = Default::default();
    pc.chipset.devices.save(&mut saved);

    let other = Pc::new();
    other.clock.set(pc.clock.now());
    other.chipset.devices.restore(&saved).unwrap();
    // Nothing is sent twice, and the wire is as high as it was.
    assert_eq!(other.vm.take_messages(), []);
    assert!(other.vm.extint());
    let mut again = Default::default();
    other.chipset.devices.save(&mut again);
    assert_eq!(saved, again);

    for pc in [&pc, &other] {
        assert_eq!(pc.chipset.acknowledge_interrupt(), 0x20);
        pc.pass(9_000_000);
        assert_eq!(pc.vm.take_messages(), []);
        pc.pass(1_000_000);
        assert_eq!(pc.vm.take_messages(), [(0xfee0_0000, 0x31)]);
    }
}

/// Whatever a guest does to the ports and registers, nothing panics and nothing blocks.
#[test]
fn a_hostile_guest_breaks_nothing() {
    let pc = Pc::new();
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    for step in 0..300_000u32 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(step.into());
        let (port, size, value) = ((random >> 20) as u16 & 0x0fff, [1, 2, 4][step as usize % 3], (random >> 32) as u32);
        match step % 8 {
            7 => {
                let address = [ECAM + (random & 0xffff), PCI_WINDOW + (random & 0xffff)][step as usize / 8 % 2];
                let after = pc.chipset.mmio_write(address, &value.to_le_bytes()[..size as usize]);
                assert_eq!(after, After::Continue);
            }
            0 | 1 => drop(pc.chipset.port_in(port, size)),
            2 => pc.chipset.mmio_read(IOAPIC + (random & 0xfff), &mut [0; 8][..size as usize]),
            3 => drop(pc.chipset.mmio_write(IOAPIC + (random >> 8 & 0x1f), &value.to_le_bytes())),
            4 => pc.pass(random >> 38),
            5 => drop((pc.chipset.acknowledge_interrupt(), pc.chipset.end_of_interrupt(value as u8))),
            _ => drop(pc.chipset.port_out(port, size, value)),
        }
    }
    pc.chipset.reset();
    let mut saved = Default::default();
    pc.chipset.devices.save(&mut saved);
    assert!(saved.sections.len() > 10);
}
