//! Several pairs of queues, and the queue that says how many are in use.

use std::cell::RefCell;

use proptest::{
    collection,
    prelude::{ProptestConfig, any, proptest},
};

use super::*;
use crate::virtio::testing::{abuse, common};

const MQ: u64 = feature(VIRTIO_NET_F_CTRL_VQ) | feature(VIRTIO_NET_F_MQ);
const PAIRS: usize = 3;
/// The control queue's number (5.1.2).
const CONTROL: usize = 2 * PAIRS;
const OK: u8 = 0;
const ERR: u8 = 1;

/// A driver of a device with three networks.
struct Several {
    driver: Driver,
    networks: Vec<OwnedFd>,
}

fn several_with(rate: Option<Rate>) -> (Net, Vec<OwnedFd>) {
    let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let (ours, networks): (Vec<_>, Vec<_>) = (0..PAIRS).map(|_| pair()).unzip();
    for network in &networks {
        set_socket_timeout(network, Timeout::Recv, Some(Duration::from_secs(60))).unwrap();
    }
    let backends = ours.into_iter().map(|socket| Arc::new(Backend::socket(socket).unwrap())).collect();
    (Net::new("net0", Network { config: CONFIG, backends, rate }), networks)
}

impl Several {
    fn new(features: u64) -> Self {
        Self::with(features, None)
    }

    fn with(features: u64, rate: Option<Rate>) -> Self {
        let (net, networks) = several_with(rate);
        let mut driver = Driver::new(Box::new(net));
        driver.initialize(features);
        Self { driver, networks }
    }

    /// The answer to a command.
    fn command_at(&mut self, queue: usize, command: &[u8]) -> u8 {
        let (command, answer) = (self.driver.readable(command), self.driver.writable(1));
        assert_eq!(self.driver.request(queue, &[command, answer]).written, 1);
        self.driver.content(answer)[0]
    }

    fn command(&mut self, command: &[u8]) -> u8 {
        self.command_at(CONTROL, command)
    }

    fn use_pairs(&mut self, count: u16) -> u8 {
        let [low, high] = count.to_le_bytes();
        self.command(&[4, 0, low, high])
    }

    /// Memory for a packet in a pair's receive queue.
    fn offer(&mut self, pair: usize) -> Buffer {
        let buffer = self.driver.writable(2000);
        self.driver.offer(2 * pair, &[buffer]);
        self.driver.notify(2 * pair);
        buffer
    }

    fn send_to(&self, pair: usize, packet: &[u8]) {
        send(&self.networks[pair], packet, SendFlags::NOSIGNAL).unwrap();
    }

    /// The packet that comes next into this buffer of a pair's.
    fn receive(&mut self, pair: usize, buffer: Buffer) -> Vec<u8> {
        let used = self.driver.wait_used(2 * pair);
        self.driver.content(buffer)[..used.written as usize].to_vec()
    }

    /// The next packet that a pair's network gets.
    fn sent(&self, pair: usize) -> Vec<u8> {
        let mut packet = vec![0; 70_000];
        loop {
            let (length, _) = recv(&self.networks[pair], &mut packet[..], RecvFlags::empty()).unwrap();
            // Four bytes say what the driver takes.
            if length != 4 {
                return packet[..length].to_vec();
            }
        }
    }

    /// Both ways through a pair.
    fn check(&mut self, pair: usize) {
        let buffer = self.offer(pair);
        self.send_to(pair, &plain(100 + pair));
        assert!(self.receive(pair, buffer) == plain(100 + pair), "pair {pair}");
        let packet = self.driver.readable(&plain(200 + pair));
        self.driver.request(2 * pair + 1, &[packet]);
        assert!(self.sent(pair) == plain(200 + pair), "pair {pair}");
    }
}

#[test]
fn one_pair_has_nothing_to_control() {
    let pair = Pair::new(0);
    assert_eq!(pair.driver.read::<2>(common::NUM_QUEUES), 2);
    assert_eq!(pair.driver.offered() & MQ, 0);
}

#[test]
fn the_driver_learns_how_many_there_are() {
    let several = Several::new(MQ);
    assert_eq!(several.driver.read::<2>(common::NUM_QUEUES), 7);
    assert_eq!(several.driver.read::<2>(page::DEVICE + 8), 3);
}

#[test]
fn packets_go_by_the_pairs_in_use() {
    let mut several = Several::new(MQ);
    several.check(0);
    // What comes for a pair that is not in use waits in its network, and what the driver sends there in its queue.
    let buffer = several.offer(1);
    several.send_to(1, &plain(77));
    let early = several.driver.readable(&plain(78));
    several.driver.offer(3, &[early]);
    several.driver.notify(3);
    assert_eq!(several.use_pairs(1), OK);
    several.check(0);
    assert_eq!((several.driver.take_used(2), several.driver.take_used(3)), (None, None));

    assert_eq!(several.use_pairs(3), OK);
    assert!(several.receive(1, buffer) == plain(77));
    several.driver.wait_used(3);
    assert!(several.sent(1) == plain(78));
    (0..PAIRS).for_each(|pair| several.check(pair));

    // 5.1.6.5.6.1: from the answer on, nothing comes by the others.
    let buffer = several.offer(2);
    assert_eq!(several.use_pairs(2), OK);
    several.send_to(2, &plain(90));
    (0..2).for_each(|pair| several.check(pair));
    assert_eq!(several.driver.take_used(4), None);
    assert_eq!(several.use_pairs(3), OK);
    assert!(several.receive(2, buffer) == plain(90));
}

#[test]
fn what_cannot_be_is_answered_so() {
    let mut several = Several::new(MQ);
    assert_eq!(several.use_pairs(2), OK);
    for count in [0, 4, 0x8000, 0xffff] {
        assert_eq!(several.use_pairs(count), ERR, "{count}");
    }
    // Another class, another command of this class, and a command that lacks its number.
    for command in [&[0, 0, 1][..], &[1, 1, 0, 0], &[4, 1, 1, 0], &[255, 255], &[4, 0], &[4, 0, 1]] {
        assert_eq!(several.command(command), ERR, "{command:?}");
    }
    (0..2).for_each(|pair| several.check(pair));
    // A longer one says nothing more.
    assert_eq!(several.command(&[4, 0, 3, 0, 9, 9]), OK);
    several.check(2);
}

#[test]
fn pairs_without_their_queues_cannot_be_used() {
    let (net, networks) = several_with(None);
    let mut several = Several { driver: Driver::new(Box::new(net)), networks };
    several.driver.negotiate(MQ | 1 << 32);
    for index in 0..7 {
        several.driver.set_up_queue(index, 16);
        if index != 4 {
            several.driver.enable_queue(index);
        }
    }
    several.driver.set_status(0xf);
    assert_eq!(several.use_pairs(3), ERR);
    assert_eq!(several.use_pairs(2), OK);
    several.check(1);
}

/// 5.1.2: without VIRTIO_NET_F_MQ the control queue follows the first pair.
#[test]
fn a_driver_that_knows_one_pair_only() {
    let mut several = Several::new(feature(VIRTIO_NET_F_CTRL_VQ));
    several.check(0);
    assert_eq!(several.command_at(2, &[4, 0, 1, 0]), OK);
    assert_eq!(several.command_at(2, &[4, 0, 2, 0]), ERR);
    assert_eq!(several.command_at(2, &[0, 0, 1]), ERR);
    let mut several = Several::new(0);
    several.check(0);
}

#[test]
fn a_reset_leaves_one_in_use() {
    let mut several = Several::new(MQ);
    assert_eq!(several.use_pairs(3), OK);
    several.check(2);
    several.driver.initialize(MQ);
    let buffer = several.offer(2);
    several.send_to(2, &plain(80));
    several.check(0);
    assert_eq!(several.driver.take_used(4), None);
    assert_eq!(several.use_pairs(3), OK);
    assert!(several.receive(2, buffer) == plain(80));
}

/// Each pair goes on where it stood, in mid-traffic: with packets received and packets yet to send.
#[test]
fn they_go_on_after_a_move() {
    let mut several = Several::new(MQ | MERGEABLE | EVENT_IDX);
    assert_eq!(several.use_pairs(2), OK);
    (0..2).for_each(|pair| several.check(pair));
    let buffers = [several.offer(0), several.offer(1), several.offer(2)];
    several.driver.function.hold();
    for pair in 0..2 {
        let packet = several.driver.readable(&plain(300 + pair));
        several.driver.offer(2 * pair + 1, &[packet]);
        several.driver.notify(2 * pair + 1);
    }
    let (net, networks) = several_with(None);
    let mut several = Several { driver: several.driver.moved_to(Box::new(net)), networks };
    several.driver.function.open();
    for (pair, buffer) in buffers.into_iter().enumerate().take(2) {
        several.driver.wait_used(2 * pair + 1);
        assert!(several.sent(pair) == plain(300 + pair));
        several.send_to(pair, &plain(400 + pair));
        assert!(several.receive(pair, buffer) == plain(400 + pair));
    }
    (0..2).for_each(|pair| several.check(pair));
    several.send_to(2, &plain(500));
    several.check(0);
    assert_eq!(several.driver.take_used(4), None, "the third is in use");
    assert_eq!(several.use_pairs(3), OK);
    assert!(several.receive(2, buffers[2]) == plain(500));
}

#[test]
fn a_state_with_more_pairs_than_there_are_is_refused() {
    let mut net = several_with(None).0;
    let saved = |pairs| Section::named("net0", &SavedNet { mac: CONFIG.mac.to_vec(), mtu: 1400, pairs });
    assert!(net.restore(&saved(3)).is_ok());
    assert_eq!(net.save(), saved(3));
    for pairs in [4, 0x1_0001] {
        assert!(net.restore(&saved(pairs)).is_err(), "{pairs}");
    }
    // A state of before there were several.
    net.restore(&saved(0)).unwrap();
    assert_eq!(net.save(), saved(1));
}

#[test]
fn all_pairs_share_the_rate() {
    let mut several = Several::with(MQ, Some(Rate { per_second: 1_000_000, burst: 1 }));
    assert_eq!(several.use_pairs(2), OK);
    let start = Instant::now();
    for _ in 0..8 {
        for pair in 0..2 {
            let packet = several.driver.readable(&plain(10_000));
            several.driver.offer(2 * pair + 1, &[packet]);
            several.driver.notify(2 * pair + 1);
        }
    }
    for pair in 0..2 {
        (0..8).for_each(|_| assert!(several.sent(pair) == plain(10_000)));
    }
    // 160 kB, of which each thread may have let the last packet go unwaited for.
    assert!(start.elapsed() >= Duration::from_millis(130), "{:?}", start.elapsed());
}

#[test]
fn hostile_commands_stop_the_device_and_nothing_else() {
    let readable = |length| Buffer { address: 0x8000, length, writable: false };
    let answer = Buffer { address: 0x9000, length: 1, writable: true };
    let outside = Buffer { address: 2 * SLOT - 1, length: 64, writable: false };
    let chains: [&[Buffer]; 5] =
        [&[readable(4)], &[answer], &[readable(1), answer], &[outside, answer], &[answer, readable(4)]];
    for chain in chains {
        let mut several = Several::new(MQ);
        several.driver.offer(CONTROL, chain);
        several.driver.notify(CONTROL);
        several.driver.wait_out_of_service();
        several.driver.initialize(MQ);
        assert_eq!(several.use_pairs(2), OK);
        several.check(1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_a_driver_does_is_survived(bytes in collection::vec(any::<u8>(), 0..400)) {
        // The networks of the last device; those before are gone as their devices are.
        let networks = RefCell::new(Vec::new());
        let make = || -> Box<dyn VirtioDevice> {
            let (net, far) = several_with(None);
            *networks.borrow_mut() = far;
            Box::new(net)
        };
        abuse(make, MQ | MERGEABLE | LARGE, &bytes);
    }
}
