use std::time::{Duration, Instant};

use proptest::{
    collection,
    prelude::{ProptestConfig, any, proptest},
};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::{
    pci::PciFunction,
    virtio::testing::{Buffer, Driver, EVENT_IDX, INDIRECT, SLOT, abuse, common, is_held_in_a_flood, page},
};

const INFLATEQ: usize = 0;
const DEFLATEQ: usize = 1;
const STATSQ: usize = 2;
/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

const ALL: u64 = feature(F_STATS_VQ) | feature(F_DEFLATE_ON_OOM) | feature(F_PAGE_POISON) | feature(F_REPORTING);

fn config() -> BalloonConfig {
    BalloonConfig { size: 1 << 20, ..BalloonConfig::default() }
}

fn driver(features: u64) -> (Driver, BalloonHandle) {
    let balloon = Balloon::new("balloon0", config()).unwrap();
    let handle = balloon.handle();
    let mut driver = Driver::new(Box::new(balloon));
    driver.initialize(features);
    (driver, handle)
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

/// A page of the driver's with this content.
fn write_page(driver: &Driver, number: u64, value: u8) {
    driver.memory.write_slice(&[value; PAGE as usize], GuestAddress(number * PAGE)).unwrap();
}

fn is_zero(driver: &Driver, number: u64) -> bool {
    let mut page = [0; PAGE as usize];
    driver.memory.read_slice(&mut page, GuestAddress(number * PAGE)).unwrap();
    page.iter().all(|byte| *byte == 0)
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{what} never happened");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Pages that nothing of the driver's is in.
const FREE: u64 = SLOT / PAGE + 512;

#[test]
fn features_and_configuration() {
    let (driver, handle) = driver(ALL);
    assert_eq!(driver.offered() & 0xff_ffff, ALL);
    assert_eq!(driver.read::<8>(page::DEVICE), (1 << 20) / PAGE);
    assert_eq!(driver.read::<8>(page::DEVICE + 8), 0);
    driver.write(page::DEVICE + ACTUAL, &7u32.to_le_bytes());
    assert_eq!(handle.actual(), 7 * PAGE);
    assert_eq!(driver.read::<4>(page::DEVICE + ACTUAL), 7);
    // What a driver does not write.
    driver.write(page::DEVICE, &9u32.to_le_bytes());
    driver.write(page::DEVICE + ACTUAL, &9u16.to_le_bytes());
    driver.write(page::DEVICE + ACTUAL + 2, &9u32.to_le_bytes());
    assert_eq!((handle.target(), handle.actual()), (1 << 20, 7 * PAGE));
    let plain = BalloonConfig { deflate_on_oom: false, free_page_reporting: false, size: 0 };
    assert_eq!(Balloon::new("balloon0", plain).unwrap().features(), feature(F_STATS_VQ));
}

#[test]
fn the_driver_is_told_of_a_new_target() {
    let (driver, handle) = driver(ALL);
    driver.messages.take();
    let generation = driver.read::<1>(common::GENERATION);
    handle.set_target(3 << 20);
    assert_eq!(driver.read::<4>(page::DEVICE), (3 << 20) / PAGE);
    eventually("the message", || driver.messages.take().contains(&(0xfee0_0000, 0x40)));
    assert_ne!(driver.read::<1>(common::GENERATION), generation);
    // Held, it tells nothing; afterwards it does.
    driver.function.hold();
    handle.set_target(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.messages.take(), []);
    driver.function.open();
    eventually("the message", || driver.messages.take().contains(&(0xfee0_0000, 0x40)));
    handle.set_target(u64::MAX);
    assert_eq!(driver.read::<4>(page::DEVICE), u64::from(u32::MAX));
}

#[test]
fn pages_that_are_given_back_are_gone_and_others_stay() {
    for features in [ALL, EVENT_IDX] {
        let (mut driver, _) = driver(features);
        let pages = [FREE, FREE + 1, FREE + 2, FREE + 9];
        (FREE..FREE + 12).for_each(|page| write_page(&driver, page, 0xaa));
        // In any order, more than once.
        let list = numbers(&[FREE as u32 + 9, FREE as u32 + 1, FREE as u32, FREE as u32 + 2, FREE as u32 + 1]);
        let buffers = [driver.readable(&list[..6]), driver.readable(&list[6..])];
        assert_eq!(driver.request(INFLATEQ, &buffers).written, 0);
        for page in FREE..FREE + 12 {
            assert_eq!(is_zero(&driver, page), pages.contains(&page), "{page:#x}");
        }
        // The guest takes one back and uses it.
        let one = driver.readable(&numbers(&[FREE as u32]));
        driver.request(DEFLATEQ, &[one]);
        write_page(&driver, FREE, 0x55);
        assert!(!is_zero(&driver, FREE));
    }
}

#[test]
fn pages_that_there_are_not_change_nothing() {
    let (mut driver, _) = driver(ALL);
    write_page(&driver, FREE, 0xaa);
    let list = numbers(&[(2 * SLOT / PAGE) as u32, u32::MAX, u32::MAX - 1, 1 << 20]);
    // Half a number is none.
    let buffers = [driver.readable(&list), driver.readable(&[1, 2, 3])];
    driver.request(INFLATEQ, &buffers);
    assert_eq!(driver.status(), 0xf);
    assert!(!is_zero(&driver, FREE));
}

#[test]
fn a_guest_that_gives_away_all_of_its_memory_harms_itself() {
    let (mut driver, _) = driver(ALL);
    let last = 2 * SLOT / PAGE;
    write_page(&driver, FREE, 0xaa);
    // Its rings, too: what the device does with those is all the same.
    let all = driver.readable(&numbers(&(0..last as u32).collect::<Vec<_>>()));
    driver.offer(INFLATEQ, &[all]);
    driver.notify(INFLATEQ);
    eventually("the end of all", || is_zero(&driver, FREE) && is_zero(&driver, last - 1));
    driver.initialize(ALL);
    let one = driver.readable(&numbers(&[FREE as u32]));
    driver.request(INFLATEQ, &[one]);
}

#[test]
fn a_request_that_is_too_long_stops_the_device() {
    let (mut driver, _) = driver(ALL);
    let long = Buffer { address: 0x1000, length: 4 << 20, writable: false };
    driver.offer(INFLATEQ, &[long]);
    driver.notify(INFLATEQ);
    driver.wait_out_of_service();
    driver.initialize(ALL);
    let long = Buffer { address: 0x1000, length: 641, writable: false };
    driver.offer(STATSQ, &[long]);
    driver.notify(STATSQ);
    driver.wait_out_of_service();
}

#[test]
fn free_pages_that_are_reported_are_gone() {
    for queue in [3, 4] {
        let (mut driver, _) = driver(ALL);
        (FREE..FREE + 40).for_each(|page| write_page(&driver, page, 0xaa));
        let range =
            |page: u64, pages: u64| Buffer { address: page * PAGE, length: (pages * PAGE) as u32, writable: true };
        // One begins in the midst of a page.
        let odd = Buffer { address: (FREE + 20) * PAGE + 1, length: 2 * PAGE as u32, writable: true };
        assert_eq!(driver.request(queue, &[range(FREE, 8), range(FREE + 10, 1), odd]).written, 0);
        let gone: Vec<_> = (FREE..FREE + 40).filter(|page| is_zero(&driver, *page)).collect();
        let expected: Vec<_> = (FREE..FREE + 8).chain([FREE + 10, FREE + 21]).collect();
        assert_eq!(gone, expected);
    }
}

#[test]
fn poisoned_pages_keep_their_poison() {
    let (mut driver, _) = driver(ALL);
    write_page(&driver, FREE, 0xaa);
    driver.write(page::DEVICE + POISON, &0xaaaa_aaaau32.to_le_bytes());
    let free = Buffer { address: FREE * PAGE, length: PAGE as u32, writable: true };
    driver.request(4, &[free]);
    assert!(!is_zero(&driver, FREE));
    driver.write(page::DEVICE + POISON, &[0; 4]);
    driver.request(4, &[free]);
    assert!(is_zero(&driver, FREE));
}

#[test]
fn without_the_feature_nothing_is_reported() {
    let (mut driver, _) = driver(0);
    write_page(&driver, FREE, 0xaa);
    let free = Buffer { address: FREE * PAGE, length: PAGE as u32, writable: true };
    driver.offer(4, &[free]);
    driver.notify(4);
    let one = driver.readable(&numbers(&[FREE as u32 + 1]));
    driver.request(INFLATEQ, &[one]);
    assert!(!is_zero(&driver, FREE) && driver.take_used(4).is_none());
}

fn stat(tag: u16, value: u64) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let (mut driver, handle) = driver(ALL);
    assert_eq!(handle.statistics(), Statistics::default());
    // Asked before the driver is so far.
    handle.ask_for_statistics();
    let buffer = driver.readable(&[stat(4, 1000), stat(5, 2000), stat(999, 1)].concat());
    assert_eq!(driver.request(STATSQ, &[buffer]).written, 0);
    assert_eq!((handle.statistics().free, handle.statistics().updates), (Some(1000), 1));
    // The driver fills it again, and the device keeps it until the next question.
    driver.memory.write_slice(&stat(4, 500), GuestAddress(buffer.address)).unwrap();
    driver.offer(STATSQ, &[buffer]);
    driver.notify(STATSQ);
    eventually("the update", || handle.statistics().updates == 2);
    assert_eq!((handle.statistics().free, handle.statistics().total), (Some(500), Some(2000)));
    assert!(driver.take_used(STATSQ).is_none());
    // A pause is no news.
    driver.function.hold();
    driver.function.open();
    handle.ask_for_statistics();
    driver.wait_used(STATSQ);
    assert_eq!(handle.statistics().updates, 2);
}

#[test]
fn a_reset_gives_the_driver_its_memory_again() {
    let (driver, handle) = driver(ALL);
    driver.write(page::DEVICE + ACTUAL, &7u32.to_le_bytes());
    driver.set_status(0);
    assert_eq!((handle.actual(), handle.target()), (0, 1 << 20));
    assert_eq!(handle.statistics(), Statistics::default());
}

#[test]
fn it_goes_on_after_a_move() {
    let (mut driver, handle) = driver(ALL);
    let buffer = driver.readable(&stat(4, 1000));
    driver.offer(STATSQ, &[buffer]);
    driver.notify(STATSQ);
    eventually("the update", || handle.statistics().free == Some(1000));
    driver.write(page::DEVICE + ACTUAL, &7u32.to_le_bytes());
    driver.write(page::DEVICE + POISON, &0xaau32.to_le_bytes());
    driver.function.hold();
    handle.set_target(5 << 20);
    let other = Balloon::new("balloon0", BalloonConfig { size: 0, ..config() }).unwrap();
    let handle = other.handle();
    let mut driver = driver.moved_to(Box::new(other));
    assert_eq!((handle.target(), handle.actual()), (5 << 20, 7 * PAGE));
    assert_eq!(handle.statistics().free, Some(1000));
    assert_eq!(driver.read::<4>(page::DEVICE + POISON), 0xaa);
    driver.messages.take();
    driver.function.open();
    // The target had not been told; and the statistics buffer is still the device's.
    eventually("the message", || driver.messages.take().contains(&(0xfee0_0000, 0x40)));
    handle.ask_for_statistics();
    driver.wait_used(STATSQ);
    write_page(&driver, FREE, 0xaa);
    let one = driver.readable(&numbers(&[FREE as u32]));
    driver.request(INFLATEQ, &[one]);
    assert!(is_zero(&driver, FREE));
}

#[test]
fn a_flood_does_not_keep_it_from_being_held() {
    let (mut driver, _) = driver(ALL);
    let buffer = driver.readable(&numbers(&[FREE as u32]));
    is_held_in_a_flood(driver, &[buffer]);
    // Statistics, of which the device keeps one buffer.
    let mut driver = self::driver(ALL).0;
    driver.queues.swap(0, STATSQ);
    let buffer = driver.readable(&stat(4, 1000));
    is_held_in_a_flood(driver, &[buffer]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_hostile_driver_breaks_nothing(bytes in collection::vec(any::<u8>(), 0..600)) {
        let make = || -> Box<dyn VirtioDevice> { Box::new(Balloon::new("balloon0", config()).unwrap()) };
        abuse(make, ALL | INDIRECT, &bytes);
    }
}

/// The memory is the host's again, not only zero.
#[test]
fn the_host_has_what_was_given_back() {
    let (mut driver, _) = driver(ALL);
    let second = SLOT / PAGE;
    (second..2 * second).for_each(|page| write_page(&driver, page, 0xaa));
    let memory = driver.memory.clone();
    let taken = || purlin_memory::usage(&memory).unwrap();
    let before = taken();
    let free = Buffer { address: SLOT + SLOT / 2, length: (SLOT / 2) as u32, writable: true };
    driver.request(4, &[free]);
    let pages: Vec<u32> = (second as u32..second as u32 + 100).collect();
    let buffer = driver.readable(&numbers(&pages));
    driver.request(INFLATEQ, &[buffer]);
    assert!(before - taken() >= SLOT / 2 + 99 * PAGE, "{before} {}", taken());
}
