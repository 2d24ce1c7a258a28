//! The transport, with a device that gives back what it is given.

use std::{
    io,
    sync::{
        atomic::{AtomicU32, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::{
    Chain, Told, Wake, Workers, fill, nothing,
    testing::{Buffer, Driver, EVENT_IDX, INDIRECT, SLOT, VERSION_1, common as reg, page},
};

/// Copies what it reads to what it writes.
#[derive(Default)]
struct Echo {
    configuration: [u8; 8],
    /// How often it was activated, and reset.
    lives: Arc<(AtomicU32, AtomicU32)>,
    notifier: Arc<Mutex<Option<Arc<Notifier>>>>,
    /// Where the available index is that rises with each chain served: a driver that is always faster. 0 for none.
    refill: Arc<AtomicU64>,
}

impl VirtioDevice for Echo {
    fn name(&self) -> &str {
        "echo0"
    }
    fn device_type(&self) -> u16 {
        42
    }
    fn features(&self) -> u64 {
        0b101
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![64, 16]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::read_structure(&self.configuration, offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset as usize..).zip(data) {
            if let Some(to) = self.configuration.get_mut(at) {
                *to = *byte;
            }
        }
    }
    fn activate(&mut self, driver: Activation) -> io::Result<Box<dyn Running>> {
        self.lives.0.fetch_add(1, Ordering::SeqCst);
        *self.notifier.lock().unwrap() = Some(driver.notifier.clone());
        let mut workers = Workers::default();
        for queue in driver.queues {
            let index = queue.index();
            let (memory, refill) = (driver.memory.clone(), self.refill.clone());
            let serve = move |chain: Chain<'_>| {
                let at = refill.load(Ordering::SeqCst);
                if at != 0 {
                    let next = memory.read_obj::<u16>(GuestAddress(at)).unwrap().wrapping_add(1);
                    memory.write_obj(next, GuestAddress(at)).unwrap();
                }
                echo(chain)
            };
            let job = move |wake: &Wake| loop {
                match wake.wait(&[]) {
                    Told::Work => queue.serve(wake, &serve),
                    Told::Hold => {}
                    Told::End => return,
                }
            };
            workers.start("echo", &[index], None, Box::new(job))?;
        }
        Ok(Box::new(workers))
    }
    fn reset(&mut self) {
        self.lives.1.fetch_add(1, Ordering::SeqCst);
    }
    fn save(&self) -> Section {
        nothing(self.name())
    }
    fn restore(&mut self, _: &Section) -> Result<(), StateError> {
        Ok(())
    }
}

fn echo(mut chain: Chain<'_>) -> u32 {
    let mut data = vec![0; chain.readable_length()];
    chain.read(&mut data).unwrap();
    fill(&chain.writable, &data) as u32
}

fn driver() -> Driver {
    Driver::new(Box::<Echo>::default())
}

/// One exchange works.
fn works(driver: &mut Driver, queue: usize) {
    let (request, answer) = (driver.readable(b"hello"), driver.writable(8));
    assert_eq!(driver.request(queue, &[request, answer]).written, 5);
    assert_eq!(driver.content(answer), b"hello\xee\xee\xee");
}

#[test]
fn the_function_tells_what_it_is_and_where_its_structures_are() {
    let driver = driver();
    let mut id = [0; 4];
    driver.function.read_config(0, &mut id);
    assert_eq!(id, [0xf4, 0x1a, 0x40 + 42, 0x10]);
    let structures: Vec<(u8, u32, u32)> = driver
        .capabilities()
        .into_iter()
        .filter(|(id, _)| *id == 9)
        .map(|(_, at)| {
            let mut cap = [0; 16];
            (0..4).for_each(|i| driver.function.read_config(at + 4 * i, &mut cap[4 * usize::from(i)..][..4]));
            assert_eq!(cap[4], 0, "bar");
            let word = |at: usize| u32::from_le_bytes(cap[at..at + 4].try_into().unwrap());
            (cap[3], word(8), word(12))
        })
        .collect();
    assert_eq!(structures[..4], [(1, 0, 64), (3, 0x1000, 1), (4, 0x2000, 0x1000), (2, 0x3000, 8)]);
    assert_eq!(structures[4], (5, 0, 0));
    // MSI-X: three vectors, table and pending bits in register 0.
    let msix = driver.capability(0x11).unwrap();
    let mut cap = [0; 12];
    (0..3).for_each(|i| driver.function.read_config(msix + 4 * i, &mut cap[4 * usize::from(i)..][..4]));
    assert_eq!(cap[2..], [2, 0, 0, 0x40, 0, 0, 0, 0x50, 0, 0]);
    // One function, no interrupt pin.
    let mut header = [0; 4];
    driver.function.read_config(0x3c, &mut header);
    assert_eq!(header[1], 0);
}

#[test]
fn buffers_go_there_and_back_and_each_queue_has_its_vector() {
    let mut driver = driver();
    driver.initialize(0b001);
    works(&mut driver, 0);
    works(&mut driver, 1);
    // The driver sees the used ring before the interrupt: wait for the devices to stand.
    driver.function.hold();
    let mut messages = driver.messages.take();
    messages.sort();
    assert_eq!(messages, [(0xfee0_0000, 0x41), (0xfee0_0000, 0x42)]);
}

#[test]
fn indirect_tables_and_buffers_across_slots_work() {
    let mut driver = driver();
    driver.initialize(INDIRECT);
    let text = driver.readable(b"0123456789");
    let answer = Buffer { address: SLOT - 4, length: 10, writable: true };
    for indirect in [false, true] {
        let head = match indirect {
            true => driver.offer_indirect(0, &[text, answer]),
            false => driver.offer(0, &[text, answer]),
        };
        driver.notify(0);
        let used = driver.wait_used(0);
        assert_eq!((used.head, used.written), (head, 10));
        assert_eq!(driver.content(answer), b"0123456789");
        driver.memory.write_slice(&[0; 10], GuestAddress(SLOT - 4)).unwrap();
    }
}

#[test]
fn features_are_those_offered_or_not_ok() {
    let mut driver = driver();
    assert_eq!(driver.offered(), 0b101 | VERSION_1 | INDIRECT | EVENT_IDX);
    for (features, ok) in [(VERSION_1, true), (0b100, false), (VERSION_1 | 0b010, false), (VERSION_1 | 1 << 63, false)]
    {
        driver.negotiate(features);
        assert_eq!(driver.status(), if ok { 0xb } else { 0x3 }, "{features:#x}");
    }
    // Once settled they stay.
    driver.negotiate(VERSION_1);
    driver.write(reg::DRIVER_FEATURE, &[0; 4]);
    assert_eq!(driver.read::<4>(reg::DRIVER_FEATURE), 1);
    // There is nothing above bit 63.
    driver.write(reg::DEVICE_FEATURE_SELECT, &2u32.to_le_bytes());
    assert_eq!(driver.read::<4>(reg::DEVICE_FEATURE), 0);
}

#[test]
fn steps_out_of_order_do_nothing() {
    let mut driver = driver();
    // A queue before FEATURES_OK, the driver ready before that.
    driver.set_up_queue(0, 16);
    driver.enable_queue(0);
    assert_eq!(driver.read::<2>(reg::QUEUE_ENABLE), 0);
    driver.set_status(4);
    assert_eq!(driver.status(), 0);
    driver.notify(0);
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 16);
    driver.enable_queue(0);
    // An enabled queue's registers stay, and so does an enabled queue.
    driver.write(reg::QUEUE_SIZE, &8u16.to_le_bytes());
    driver.write(reg::QUEUE_DESC, &[0xff; 8]);
    driver.write(reg::QUEUE_ENABLE, &[0, 0]);
    assert_eq!((driver.read::<2>(reg::QUEUE_SIZE), driver.read::<2>(reg::QUEUE_ENABLE)), (16, 1));
    assert_eq!(driver.read::<8>(reg::QUEUE_DESC), driver.queues[0].rings[0]);
    driver.set_status(0xf);
    works(&mut driver, 0);
    // A queue after DRIVER_OK.
    driver.set_up_queue(1, 16);
    driver.enable_queue(1);
    assert_eq!(driver.read::<2>(reg::QUEUE_ENABLE), 0);
    // Status bits do not go but by a reset.
    driver.set_status(1);
    assert_eq!(driver.status(), 0xf);
    works(&mut driver, 0);
}

#[test]
fn registers_of_queues_and_vectors_that_there_are_not() {
    let driver = driver();
    driver.write(reg::QUEUE_SELECT, &2u16.to_le_bytes());
    for (at, value) in [(reg::QUEUE_SIZE, 0), (reg::QUEUE_VECTOR, 0xffff), (reg::QUEUE_ENABLE, 0)] {
        driver.write(at, &1u16.to_le_bytes());
        assert_eq!(driver.read::<2>(at), value, "{at:#x}");
    }
    driver.write(reg::QUEUE_SELECT, &1u16.to_le_bytes());
    for (size, read_back) in [(8u16, 8), (0, 8), (12, 8), (32, 8), (16, 16)] {
        driver.write(reg::QUEUE_SIZE, &size.to_le_bytes());
        assert_eq!(driver.read::<2>(reg::QUEUE_SIZE), read_back);
    }
    for (vector, read_back) in [(2u16, 2), (3, 0xffff)] {
        driver.write(reg::QUEUE_VECTOR, &vector.to_le_bytes());
        driver.write(reg::CONFIG_VECTOR, &vector.to_le_bytes());
        assert_eq!(driver.read::<2>(reg::QUEUE_VECTOR), read_back);
        assert_eq!(driver.read::<2>(reg::CONFIG_VECTOR), read_back);
    }
    assert_eq!((driver.read::<2>(reg::NUM_QUEUES), driver.read::<2>(reg::QUEUE_NOTIFY_OFF)), (2, 1));
}

#[test]
fn a_reset_ends_everything_and_a_driver_can_begin_again() {
    let lives = Arc::<(AtomicU32, AtomicU32)>::default();
    let mut driver = Driver::new(Box::new(Echo { lives: lives.clone(), ..Echo::default() }));
    for life in 1..4 {
        driver.initialize(0);
        assert_eq!(lives.0.load(Ordering::SeqCst), life);
        works(&mut driver, 0);
        driver.set_status(0);
        assert_eq!((driver.status(), driver.read::<2>(reg::QUEUE_ENABLE)), (0, 0));
        assert_eq!(driver.read::<2>(reg::CONFIG_VECTOR), 0xffff);
        // Nobody looks at what was left in the ring.
        driver.offer(0, &[]);
        driver.notify(0);
        driver.messages.take();
    }
    driver.function.reset();
    assert_eq!(driver.messages.take(), []);
}

#[test]
fn the_configuration_is_read_written_and_its_changes_are_told() {
    let echo = Echo::default();
    let notifier = echo.notifier.clone();
    let mut driver = Driver::new(Box::new(echo));
    driver.initialize(0);
    driver.write(page::DEVICE + 4, &[1, 2, 3, 4]);
    assert_eq!(driver.read::<8>(page::DEVICE), 0x0403_0201_0000_0000);
    assert_eq!(driver.read::<8>(page::DEVICE + 6), 0x0403);
    assert_eq!(driver.read::<8>(page::DEVICE + 0xff8), 0);
    let generation = driver.read::<1>(reg::GENERATION);
    let notifier = notifier.lock().unwrap().clone().unwrap();
    notifier.configuration_changed();
    assert_ne!(driver.read::<1>(reg::GENERATION), generation);
    assert_eq!(driver.messages.take(), [(0xfee0_0000, 0x40)]);
    // Without MSI-X the driver can only look; looking clears (4.1.4.5).
    driver.function.write_config(driver.capability(0x11).unwrap() + 2, &[0, 0]);
    notifier.configuration_changed();
    notifier.used_buffers(0);
    assert_eq!((driver.read::<1>(page::ISR), driver.read::<1>(page::ISR)), (3, 0));
    assert_eq!(driver.messages.take(), []);
}

/// Virtio 1.3, 2.7.7 and 2.7.8: the driver is interrupted when the used index passes `used_event`.
#[test]
fn event_indices_suppress_interrupts() {
    let mut driver = driver();
    driver.initialize(EVENT_IDX);
    let used_event = GuestAddress(driver.queues[0].rings[1] + 4 + 2 * 16);
    driver.memory.write_obj(2u16, used_event).unwrap();
    for expected in [0, 0, 1, 0] {
        works(&mut driver, 0);
        driver.function.hold();
        assert_eq!(driver.messages.take().len(), expected);
        driver.function.open();
    }
    // And without them, by the flag.
    driver.initialize(0);
    driver.memory.write_obj(1u16, GuestAddress(driver.queues[0].rings[1])).unwrap();
    works(&mut driver, 0);
    driver.function.hold();
    assert_eq!(driver.messages.take(), []);
}

#[test]
fn what_becomes_available_during_a_hold_is_served_after_it() {
    let mut driver = driver();
    driver.initialize(0);
    driver.function.hold();
    driver.messages.take();
    let (request, answer) = (driver.readable(b"late"), driver.writable(4));
    driver.offer(0, &[request, answer]);
    driver.notify(0);
    assert_eq!(driver.take_used(0), None);
    assert_eq!((driver.messages.take(), driver.content(answer)), (vec![], vec![0xee; 4]));
    driver.function.open();
    driver.wait_used(0);
    assert_eq!(driver.content(answer), b"late");
    // A device that the driver sets up during a hold waits, too.
    driver.function.hold();
    driver.initialize(0);
    let head = driver.offer(0, &[request, answer]);
    driver.notify(0);
    assert_eq!(driver.take_used(0), None);
    driver.function.open();
    assert_eq!(driver.wait_used(0).head, head);
}

/// A driver that makes a chain available for each one used: the queue never becomes empty.
#[test]
fn an_endless_supply_does_not_keep_a_device_from_being_held() {
    let echo = Echo::default();
    let refill = echo.refill.clone();
    let mut driver = Driver::new(Box::new(echo));
    driver.initialize(0);
    let (request, answer) = (driver.readable(b"more"), driver.writable(4));
    // Every entry of the ring is this chain.
    assert_eq!(driver.offer(0, &[request, answer]), 0);
    refill.store(driver.queues[0].rings[1] + 2, Ordering::SeqCst);
    driver.notify(0);
    (0..100).for_each(|_| assert_eq!(driver.wait_used(0).head, 0));
    let (held, done) = mpsc::channel();
    let function = driver.function.clone();
    thread::spawn(move || {
        function.hold();
        let _ = held.send(());
    });
    done.recv_timeout(Duration::from_secs(30)).expect("the device is held");
    let used = GuestAddress(driver.queues[0].rings[2] + 2);
    let before: u16 = driver.memory.read_obj(used).unwrap();
    thread::sleep(Duration::from_millis(2));
    assert_eq!(driver.memory.read_obj::<u16>(used).unwrap(), before);
    refill.store(0, Ordering::SeqCst);
}

#[test]
fn a_saved_device_goes_on_where_it_was() {
    let mut driver = driver();
    driver.initialize(EVENT_IDX | INDIRECT);
    for _ in 0..20 {
        works(&mut driver, 0);
    }
    driver.function.hold();
    let (request, answer) = (driver.readable(b"moved"), driver.writable(5));
    let head = driver.offer(0, &[request, answer]);
    driver.notify(0);
    let mut driver = driver.moved_to(Box::<Echo>::default());
    assert_eq!(driver.take_used(0), None);
    driver.function.open();
    // The notification was given before the move: nobody repeats it.
    assert_eq!(driver.wait_used(0).head, head);
    assert_eq!(driver.content(answer), b"moved");
    works(&mut driver, 1);
    // One that is in the middle of its set-up.
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 8);
    driver.enable_queue(0);
    driver.function.hold();
    let mut driver = driver.moved_to(Box::<Echo>::default());
    driver.function.open();
    driver.set_status(0xf);
    works(&mut driver, 0);
}

#[test]
fn a_state_that_makes_no_sense_is_refused() {
    let mut driver = driver();
    driver.initialize(0);
    driver.function.hold();
    let section = driver.function.save();
    let good: SavedVirtioPci = section.decode().unwrap();
    let refused = |change: &dyn Fn(&mut SavedVirtioPci)| {
        let mut saved = good.clone();
        change(&mut saved);
        driver.function.restore(&Section::named("echo0", &saved)).is_err()
    };
    assert!(!refused(&|_| {}));
    assert!(refused(&|s| s.queues.clear()));
    assert!(refused(&|s| s.common = SavedCommon::default()));
    assert!(refused(&|s| s.endpoint.msix = None));
}

#[test]
fn structures_are_reached_through_configuration_space_alone() {
    let driver = driver();
    let (_, window) = driver.capabilities().into_iter().rfind(|(id, _)| *id == 9).unwrap();
    let point = |offset: u32, length: u32| {
        driver.function.write_config(window + 4, &[0]);
        driver.function.write_config(window + 8, &offset.to_le_bytes());
        driver.function.write_config(window + 12, &length.to_le_bytes());
    };
    let data = || {
        let mut data = [0xaa; 4];
        driver.function.read_config(window + 16, &mut data);
        data
    };
    point(reg::NUM_QUEUES as u32, 2);
    assert_eq!(data(), [2, 0, 0, 0]);
    point(reg::STATUS as u32, 1);
    driver.function.write_config(window + 16, &[3, 0, 0, 0]);
    assert_eq!((driver.status(), data()), (3, [3, 0, 0, 0]));
    // Unaligned, too long, beyond the end, another register: nothing happens.
    for (offset, length) in [(1, 2), (0, 3), (0, 8), (0x8000, 1), (u32::MAX, 1)] {
        point(offset, length);
        driver.function.write_config(window + 16, &[0; 4]);
        assert_eq!((driver.status(), data()), (3, [0; 4]), "{offset:#x} {length}");
    }
}

/// What no driver does: the device goes out of service, says so, leaves memory alone, and works again after a reset.
#[test]
fn hostile_chains_put_the_device_out_of_service_and_nothing_else() {
    type Attack = fn(&mut Driver);
    let attacks: [(&str, Attack); 10] = [
        ("a loop", |d| {
            let b = d.writable(16);
            let table = d.queues[0].rings[0];
            d.put_descriptor(table, 0, b, 1, 1);
            d.put_descriptor(table, 1, b, 1, 0);
            d.make_available(0, 0);
        }),
        ("a successor outside the table", |d| {
            let b = d.writable(16);
            d.put_descriptor(d.queues[0].rings[0], 0, b, 1, 16);
            d.make_available(0, 0);
        }),
        ("a head outside the table", |d| d.make_available(0, 16)),
        ("a buffer outside memory", |d| {
            d.offer(0, &[Buffer { address: 2 * SLOT - 8, length: 16, writable: true }]);
        }),
        ("a buffer at the end of the address space", |d| {
            d.offer(0, &[Buffer { address: u64::MAX - 7, length: 16, writable: false }]);
        }),
        ("more than 4 GiB", |d| {
            let huge = Buffer { address: 0, length: u32::MAX, writable: false };
            d.offer(0, &[huge, huge]);
        }),
        ("reads behind writes", |d| {
            let (w, r) = (d.writable(4), d.readable(b"abcd"));
            d.offer(0, &[w, r]);
        }),
        ("an indirect table outside memory", |d| {
            let table = Buffer { address: 2 * SLOT, length: 32, writable: false };
            d.put_descriptor(d.queues[0].rings[0], 0, table, 4, 0);
            d.make_available(0, 0);
        }),
        ("an indirect table in itself", |d| {
            let at = d.allocate(16, 16);
            let table = Buffer { address: at, length: 16, writable: false };
            d.put_descriptor(at, 0, table, 4, 0);
            d.put_descriptor(d.queues[0].rings[0], 0, table, 4, 0);
            d.make_available(0, 0);
        }),
        ("an available index that runs ahead", |d| {
            d.memory.write_obj(40u16, GuestAddress(d.queues[0].rings[1] + 2)).unwrap();
        }),
    ];
    let mut driver = driver();
    for (name, attack) in attacks {
        driver.initialize(INDIRECT);
        works(&mut driver, 1);
        attack(&mut driver);
        driver.function.hold();
        driver.messages.take();
        driver.function.open();
        driver.notify(0);
        driver.wait_out_of_service();
        driver.function.hold();
        assert!(driver.messages.take().contains(&(0xfee0_0000, 0x40)), "{name}: the driver is not told");
        driver.function.open();
        assert_eq!(driver.take_used(0), None, "{name}");
        // The other queue rests as well.
        let (request, answer) = (driver.readable(b"x"), driver.writable(1));
        driver.offer(1, &[request, answer]);
        driver.notify(1);
        driver.function.hold();
        assert_eq!(driver.content(answer), [0xee], "{name}");
        // So it does after a move.
        driver = driver.moved_to(Box::<Echo>::default());
        driver.function.open();
        assert_eq!(driver.status() & 0x40, 0x40, "{name}");
        driver.set_status(0);
        driver.initialize(0);
        works(&mut driver, 0);
    }
}

#[test]
fn rings_outside_memory_or_unaligned_put_the_device_out_of_service() {
    for (ring, address) in [(0, 2 * SLOT), (0, 8), (1, 2 * SLOT - 8), (1, 1), (2, !3), (2, 2)] {
        let mut driver = driver();
        driver.negotiate(VERSION_1);
        driver.set_up_queue(0, 16);
        driver.write(reg::QUEUE_DESC + 8 * ring, &address.to_le_bytes());
        driver.enable_queue(0);
        driver.set_status(0xf);
        assert_eq!(driver.status(), 0x4f, "{ring} {address:#x}");
        driver.notify(0);
        driver.set_status(0);
        driver.initialize(0);
        works(&mut driver, 0);
    }
}

/// Rings over each other, over buffers, over everything: the driver hurts itself only.
#[test]
fn overlapping_rings_hurt_nobody_else() {
    let mut driver = driver();
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 16);
    for ring in 0..3 {
        driver.write(reg::QUEUE_DESC + 8 * ring, &0x10_0000u64.to_le_bytes());
    }
    driver.queues[0].rings = [0x10_0000; 3];
    driver.enable_queue(0);
    driver.set_status(0xf);
    for step in 0..64u16 {
        let to = Buffer { address: 0x10_0000, length: 64, writable: true };
        let from = Buffer { address: 0x10_0010, length: 64, writable: false };
        driver.offer(0, &[from, to]);
        driver.make_available(0, step);
        driver.notify(0);
    }
    driver.set_status(0);
    driver.initialize(0);
    works(&mut driver, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is written to the registers and the rings, nothing panics, and a reset mends it.
    #[test]
    fn a_hostile_guest_breaks_nothing(
        stores in prop::collection::vec((0u64..0x40, prop::sample::select(vec![1usize, 2, 4, 8]), any::<u64>()), 1..60),
        rubbish in prop::collection::vec((0usize..3, 0u64..256, any::<u64>()), 0..60),
        config in prop::collection::vec((0u16..256, any::<u32>()), 0..20),
    ) {
        let mut driver = driver();
        driver.initialize(INDIRECT | EVENT_IDX);
        for (ring, at, value) in rubbish {
            driver.memory.write_obj(value, GuestAddress(driver.queues[0].rings[ring] + at)).unwrap();
            driver.notify(0);
        }
        for (at, size, value) in stores {
            driver.write(at, &value.to_le_bytes()[..size]);
            driver.read::<8>(at);
            driver.notify(1);
        }
        for (register, value) in config {
            let at = register & !3;
            driver.function.write_config(at, &value.to_le_bytes());
            driver.function.read_config(at, &mut [0; 4]);
        }
        driver.set_status(0);
        driver.function.hold();
        driver.function.open();
        driver.initialize(0);
        works(&mut driver, 0);
    }
}
