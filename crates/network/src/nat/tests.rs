use std::net::UdpSocket;

use super::{datagrams, fuzzing::Victim};
use crate::PacketHeader;

/// Frames of every kind that a guest sends, to be spoilt.
fn seeds() -> Vec<Vec<u8>> {
    let ethernet = |ethertype: u16, payload: &[u8]| {
        let head = [&[0x52, 0x55, 10, 0, 2, 2, 0x52, 0x54, 0, 1, 2, 3][..], &ethertype.to_be_bytes()].concat();
        [&PacketHeader::default().to_bytes(), &head[..], payload].concat()
    };
    let ipv4 = |protocol: u8, to: [u8; 4], payload: &[u8]| {
        let length = 20 + payload.len() as u16;
        let mut head = [0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 2, 15, to[0], to[1], to[2], to[3]];
        head[2..4].copy_from_slice(&length.to_be_bytes());
        let mut sum = super::checksum::Checksum::default();
        sum.add(&head);
        head[10..12].copy_from_slice(&sum.finish().to_be_bytes());
        ethernet(0x0800, &[&head, payload].concat())
    };
    let ipv6 = |next: u8, payload: &[u8]| {
        let mut head = [0; 40];
        (head[0], head[6], head[7]) = (0x60, next, 255);
        head[4..6].copy_from_slice(&(payload.len() as u16).to_be_bytes());
        head[8..24].copy_from_slice(&super::plan::PREFIX_V6.octets());
        head[23] = 15;
        head[24..40].copy_from_slice(&super::plan::GATEWAY_V6.octets());
        ethernet(0x86dd, &[&head, payload].concat())
    };
    let tcp = |flags: u8| {
        let mut segment = vec![0x10, 0, 0, 53, 0, 0, 0, 9, 0, 0, 0, 9, 0x80, flags, 0xff, 0xff, 0, 0, 0, 0];
        segment.extend([2, 4, 5, 0xb4, 1, 3, 3, 7, 4, 2, 1, 1]);
        segment.extend(b"data");
        segment
    };
    let udp = |port: u16, data: &[u8]| {
        let [high, low] = port.to_be_bytes();
        let length = (8 + data.len()) as u16;
        [&[0x10, 0, high, low][..], &length.to_be_bytes(), &[0, 0], data].concat()
    };
    let mut dhcp = vec![1, 1, 6, 0, 1, 2, 3, 4];
    dhcp.resize(236, 0);
    dhcp.extend([0x63, 0x82, 0x53, 0x63, 53, 1, 3, 50, 4, 10, 0, 2, 15, 12, 2, b'a', b'b', 255]);
    let arp = [0, 1, 8, 0, 6, 4, 0, 1, 0x52, 0x54, 0, 1, 2, 3, 10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2];
    let mut seeds = vec![
        ethernet(0x0806, &arp),
        ipv4(1, [10, 0, 2, 2], &[8, 0, 0, 0, 0, 1, 0, 1, 1, 2, 3]),
        ipv4(17, [10, 0, 2, 3], &udp(53, b"query")),
        ipv4(17, [255; 4], &udp(67, &dhcp)),
        ipv6(58, &[128, 0, 0, 0, 0, 1, 0, 1, 1, 2, 3]),
        ipv6(58, &[133, 0, 0, 0, 0, 0, 0, 0]),
        ipv6(6, &tcp(2)),
        ipv6(17, &udp(53, b"query")),
        vec![3, 0, 0, 0],
    ];
    seeds.extend([0x02, 0x10, 0x18, 0x11, 0x04, 0x14].map(|flags| ipv4(6, [10, 0, 2, 3], &tcp(flags))));
    seeds
}

/// Random numbers, the same in each run.
struct Source(u64);

impl Source {
    fn below(&mut self, limit: usize) -> usize {
        // Marsaglia's xorshift64.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// A seed, most of the time with some bytes changed, cut off or doubled.
fn spoil(seed: &[u8], source: &mut Source) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..source.below(4) {
        let at = source.below(bytes.len());
        match source.below(8) {
            0 => bytes.truncate(at.max(1)),
            1 => bytes.extend_from_within(at..),
            2 => bytes[at] = [0, 0xff, 0x7f, 0x80][source.below(4)],
            _ => bytes[at] = source.below(256) as u8,
        }
    }
    bytes
}

/// The checksum of an IPv4 header is made right again, or nothing behind it would ever be looked at.
fn mend(packet: &mut [u8]) {
    if let Some(header) = packet.get_mut(26..46)
        && header[0] == 0x45
    {
        header[10..12].fill(0);
        let mut sum = super::checksum::Checksum::default();
        sum.add(header);
        let sum = sum.finish();
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}

#[test]
fn a_hostile_guest_breaks_nothing_and_fills_nothing() {
    // Nobody answers there.
    let resolver = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut victim = Victim::new(resolver.local_addr().unwrap());
    let (seeds, mut source) = (seeds(), Source(0x9e37_79b9_7f4a_7c15));
    let mut answers = 0;
    for i in 0..60_000 {
        let mut packet = spoil(&seeds[source.below(seeds.len())], &mut source);
        if source.below(4) > 0 {
            mend(&mut packet);
        }
        victim.send(&packet);
        // At times the guest does not listen.
        if i / 5000 % 2 == 0 {
            answers += std::iter::from_fn(|| victim.receive()).count();
        }
    }
    assert!(answers > 1000, "{answers}");
    let (connections, bytes, flows) = victim.usage();
    assert!(connections <= 64 && bytes <= 64 << 20 && flows <= datagrams::LIMIT, "{connections} {bytes} {flows}");
    // It still does its work.
    std::iter::from_fn(|| victim.receive()).for_each(drop);
    victim.send(&seeds[0]);
    let answer = std::iter::from_fn(|| victim.receive()).find(|packet| packet[24..26] == [0x08, 0x06]);
    assert!(answer.is_some());
}
