//! What the NAT says on the wire, frame by frame; UDP; and floods.

use std::{
    fs,
    io::Read,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    thread,
    time::Duration,
};

use crate::guest::{DNS, GATEWAY, GATEWAY_V6, GUEST, GUEST_MAC, GUEST_V6, Guest, Wire, config};
use purlin_network::{
    Backend, Offload, PacketHeader,
    nat::{self, NatConfig},
};
use rustix::net::{AddressFamily, SocketType};
use smoltcp::{
    phy::ChecksumCapabilities,
    socket::udp,
    wire::{
        ArpOperation, ArpPacket, ArpRepr, DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress, EthernetFrame,
        EthernetProtocol, Icmpv4Packet, Icmpv4Repr, Icmpv6Packet, Icmpv6Repr, IpProtocol, Ipv4Packet, Ipv4Repr,
        Ipv6Packet, Ipv6Repr, NdiscNeighborFlags, NdiscRepr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket,
        UdpRepr,
    },
};

fn wire(config: &NatConfig) -> (Wire, nat::NatProcess) {
    let (backend, nat) = nat::start(config).unwrap();
    (Wire::new(backend), nat)
}

fn next(wire: &mut Wire) -> (PacketHeader, Vec<u8>) {
    for _ in 0..1000 {
        if let Some(packet) = wire.receive_packet() {
            return packet;
        }
        wire.flush();
        wire.wait(Duration::from_millis(100));
    }
    panic!("the NAT says nothing");
}

fn ethernet(destination: EthernetAddress, ethertype: EthernetProtocol, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 14];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes);
    frame.set_src_addr(EthernetAddress(GUEST_MAC));
    frame.set_dst_addr(destination);
    frame.set_ethertype(ethertype);
    [&bytes, payload].concat()
}

/// An IPv4 packet in a frame.
fn ipv4(src_addr: Ipv4Addr, dst_addr: Ipv4Addr, next_header: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let repr = Ipv4Repr { src_addr, dst_addr, next_header, payload_len: payload.len(), hop_limit: 64 };
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(&mut Ipv4Packet::new_unchecked(&mut bytes[..]), &ChecksumCapabilities::default());
    ethernet(EthernetAddress::BROADCAST, EthernetProtocol::Ipv4, &[&bytes, payload].concat())
}

fn ipv6(src_addr: Ipv6Addr, dst_addr: Ipv6Addr, next_header: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let repr = Ipv6Repr { src_addr, dst_addr, next_header, payload_len: payload.len(), hop_limit: 255 };
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(&mut Ipv6Packet::new_unchecked(&mut bytes[..]));
    ethernet(EthernetAddress::BROADCAST, EthernetProtocol::Ipv6, &[&bytes, payload].concat())
}

fn udp_datagram(src: SocketAddr, dst: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let repr = UdpRepr { src_port: src.port(), dst_port: dst.port() };
    let mut bytes = vec![0; 8 + payload.len()];
    let mut packet = UdpPacket::new_unchecked(&mut bytes[..]);
    let fill = |to: &mut [u8]| to.copy_from_slice(payload);
    repr.emit(&mut packet, &src.ip().into(), &dst.ip().into(), payload.len(), fill, &ChecksumCapabilities::default());
    bytes
}

/// What is in an IPv4 packet, whose checksum is checked.
fn in_ipv4(frame: &[u8]) -> (Ipv4Addr, Ipv4Addr, IpProtocol, Vec<u8>) {
    let frame = EthernetFrame::new_checked(frame).unwrap();
    assert_eq!(frame.ethertype(), EthernetProtocol::Ipv4);
    let packet = Ipv4Packet::new_checked(frame.payload()).unwrap();
    assert!(packet.verify_checksum());
    (packet.src_addr(), packet.dst_addr(), packet.next_header(), packet.payload().to_vec())
}

#[test]
fn dhcp_gives_the_address() {
    let (mut wire, _nat) = wire(&NatConfig { hostname: "box".into(), mtu: 1400, ..config() });
    let mut ask = |message_type, requested_ip: Option<Ipv4Addr>, ciaddr: Ipv4Addr| {
        let repr = DhcpRepr {
            message_type,
            transaction_id: 0x1234_5678,
            secs: 0,
            client_hardware_address: EthernetAddress(GUEST_MAC),
            client_ip: ciaddr,
            your_ip: Ipv4Addr::UNSPECIFIED,
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: None,
            subnet_mask: None,
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: false,
            requested_ip,
            client_identifier: None,
            server_identifier: None,
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        };
        let mut message = vec![0; repr.buffer_len()];
        repr.emit(&mut DhcpPacket::new_unchecked(&mut message[..])).unwrap();
        let (from, to) = ("0.0.0.0:68".parse().unwrap(), "255.255.255.255:67".parse().unwrap());
        let datagram = udp_datagram(from, to, &message);
        wire.send_frame(&ipv4(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, IpProtocol::Udp, &datagram));

        let (_, frame) = next(&mut wire);
        let (source, destination, protocol, payload) = in_ipv4(&frame);
        assert_eq!((source, destination, protocol), (GATEWAY, Ipv4Addr::BROADCAST, IpProtocol::Udp));
        let packet = UdpPacket::new_checked(&payload[..]).unwrap();
        assert!(packet.verify_checksum(&source.into(), &destination.into()));
        assert_eq!((packet.src_port(), packet.dst_port()), (67, 68));
        packet.payload().to_vec()
    };

    for (request, answer) in
        [(DhcpMessageType::Discover, DhcpMessageType::Offer), (DhcpMessageType::Request, DhcpMessageType::Ack)]
    {
        let message = ask(request, Some(GUEST), Ipv4Addr::UNSPECIFIED);
        let packet = DhcpPacket::new_checked(&message[..]).unwrap();
        let reply = DhcpRepr::parse(&packet).unwrap();
        assert_eq!((reply.message_type, reply.transaction_id), (answer, 0x1234_5678));
        assert_eq!((reply.your_ip, reply.router), (GUEST, Some(GATEWAY)));
        assert_eq!(reply.subnet_mask, Some(Ipv4Addr::new(255, 255, 255, 0)));
        assert_eq!(reply.dns_servers.unwrap()[..], [DNS]);
        assert_eq!(reply.lease_duration, Some(86400));
        let option = |kind| packet.options().find(|o| o.kind == kind).map(|o| o.data.to_vec());
        assert_eq!(option(12), Some(b"box".to_vec()));
        assert_eq!(option(26), Some(1400u16.to_be_bytes().to_vec()));
    }
    // An address of another network is not confirmed.
    let message = ask(DhcpMessageType::Request, Some(Ipv4Addr::new(192, 168, 1, 7)), Ipv4Addr::UNSPECIFIED);
    let packet = DhcpPacket::new_checked(&message[..]).unwrap();
    let reply = DhcpRepr::parse(&packet).unwrap();
    assert_eq!((reply.message_type, reply.your_ip), (DhcpMessageType::Nak, Ipv4Addr::UNSPECIFIED));
    // A renewal names the address as the client's.
    let message = ask(DhcpMessageType::Request, None, GUEST);
    let packet = DhcpPacket::new_checked(&message[..]).unwrap();
    let reply = DhcpRepr::parse(&packet).unwrap();
    assert_eq!(reply.message_type, DhcpMessageType::Ack);
}

/// An ARP request.
fn who_has(target_protocol_addr: Ipv4Addr) -> Vec<u8> {
    let request = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: EthernetAddress(GUEST_MAC),
        source_protocol_addr: GUEST,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr,
    };
    let mut bytes = [0; 28];
    request.emit(&mut ArpPacket::new_unchecked(&mut bytes[..]));
    ethernet(EthernetAddress::BROADCAST, EthernetProtocol::Arp, &bytes)
}

#[test]
fn arp_for_the_gateways_addresses_only() {
    let (mut wire, _nat) = wire(&config());
    // The first two are not the gateway's: an answer would come first.
    for address in [Ipv4Addr::new(10, 0, 2, 99), GUEST, GATEWAY, DNS] {
        wire.send_frame(&who_has(address));
    }
    for address in [GATEWAY, DNS] {
        let (_, frame) = next(&mut wire);
        let frame = EthernetFrame::new_checked(&frame[..]).unwrap();
        assert_eq!(frame.dst_addr(), EthernetAddress(GUEST_MAC));
        let ArpRepr::EthernetIpv4 {
            operation, source_hardware_addr, source_protocol_addr, target_protocol_addr, ..
        } = ArpRepr::parse(&ArpPacket::new_checked(frame.payload()).unwrap()).unwrap()
        else {
            panic!()
        };
        assert_eq!((operation, source_protocol_addr, target_protocol_addr), (ArpOperation::Reply, address, GUEST));
        assert_eq!(source_hardware_addr, frame.src_addr());
    }
}

/// A neighbour discovery message, and the NAT's answer.
fn discover(source: Ipv6Addr, destination: Ipv6Addr, message: NdiscRepr<'_>) -> (Ipv6Addr, Ipv6Addr, Vec<u8>) {
    let (mut wire, _nat) = wire(&config());
    let repr = Icmpv6Repr::Ndisc(message);
    let mut bytes = vec![0; repr.buffer_len()];
    let mut packet = Icmpv6Packet::new_unchecked(&mut bytes[..]);
    repr.emit(&source, &destination, &mut packet, &ChecksumCapabilities::default());
    wire.send_frame(&ipv6(source, destination, IpProtocol::Icmpv6, &bytes));
    let (_, frame) = next(&mut wire);
    let frame = EthernetFrame::new_checked(&frame[..]).unwrap();
    let packet = Ipv6Packet::new_checked(frame.payload()).unwrap();
    assert_eq!(packet.hop_limit(), 255);
    (packet.src_addr(), packet.dst_addr(), packet.payload().to_vec())
}

#[test]
fn a_router_is_advertised() {
    let (link_local, all_routers) = ("fe80::1234".parse().unwrap(), "ff02::2".parse().unwrap());
    let (source, destination, payload) = discover(link_local, all_routers, NdiscRepr::RouterSolicit { lladdr: None });
    assert_eq!((source, destination), ("fe80::2".parse().unwrap(), "ff02::1".parse().unwrap()));
    let packet = Icmpv6Packet::new_checked(&payload[..]).unwrap();
    let repr = Icmpv6Repr::parse(&source, &destination, &packet, &ChecksumCapabilities::default()).unwrap();
    assert!(matches!(repr, Icmpv6Repr::Ndisc(NdiscRepr::RouterAdvert { mtu: Some(1500), .. })), "{repr:?}");
    // RFC 8106 5.1, the last option: type, length, reserved, lifetime, server.
    let name_server: Ipv6Addr = "fd70:7572:6c69:2::3".parse().unwrap();
    let option = [&[25, 3, 0, 0][..], &1800u32.to_be_bytes(), &name_server.octets()].concat();
    assert!(payload.ends_with(&option));
}

#[test]
fn neighbours_learn_the_gateways_ethernet_address() {
    let solicited_node = "ff02::1:ff00:2".parse().unwrap();
    let message = NdiscRepr::NeighborSolicit { target_addr: GATEWAY_V6, lladdr: None };
    let (source, destination, payload) = discover(GUEST_V6, solicited_node, message);
    assert_eq!((source, destination), (GATEWAY_V6, GUEST_V6));
    let packet = Icmpv6Packet::new_checked(&payload[..]).unwrap();
    let repr = Icmpv6Repr::parse(&source, &destination, &packet, &ChecksumCapabilities::default()).unwrap();
    let Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert { flags, target_addr, lladdr: Some(_) }) = repr else {
        panic!("{repr:?}")
    };
    assert_eq!(target_addr, GATEWAY_V6);
    assert!(flags.contains(NdiscNeighborFlags::SOLICITED));
}

#[test]
fn the_gateway_answers_an_echo() {
    let (mut wire, _nat) = wire(&config());
    let request = Icmpv4Repr::EchoRequest { ident: 7, seq_no: 9, data: b"odd" };
    let mut bytes = vec![0; request.buffer_len()];
    request.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes[..]), &ChecksumCapabilities::default());
    // Nobody but the guest is answered.
    wire.send_frame(&ipv4(Ipv4Addr::new(10, 0, 2, 16), GATEWAY, IpProtocol::Icmp, &bytes));
    wire.send_frame(&ipv4(GUEST, GATEWAY, IpProtocol::Icmp, &bytes));
    let (_, frame) = next(&mut wire);
    let (source, destination, _, payload) = in_ipv4(&frame);
    assert_eq!((source, destination), (GATEWAY, GUEST));
    let packet = Icmpv4Packet::new_checked(&payload[..]).unwrap();
    let reply = Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()).unwrap();
    assert_eq!(reply, Icmpv4Repr::EchoReply { ident: 7, seq_no: 9, data: b"odd" });
}

/// Says that this program runs in a network namespace of [`beyond_the_gateway`]'s.
const INSIDE: &str = "PURLIN_TEST_NAMESPACE";

/// In a namespace whose whole world is one address, where everybody may ping: this program runs the next test there.
#[test]
fn beyond_the_gateway() {
    let set_up = "ip link set lo up && ip address add 203.0.113.9/32 dev lo \
                  && echo 0 0 >/proc/sys/net/ipv4/ping_group_range || exit 77; exec \"$0\" --exact wire::inside --nocapture";
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--net", "sh", "-c", set_up]).arg(program).env(INSIDE, "1");
    let Ok(output) = command.output() else {
        eprintln!("skipped: there is no unshare");
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    if output.status.code() == Some(77) || text.is_empty() {
        eprintln!("skipped: this user cannot make a network namespace");
        return;
    }
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "{text}");
}

/// See [`beyond_the_gateway`].
#[test]
fn inside() {
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    let (mut wire, _nat) = wire(&NatConfig { isolated: false, ..config() });
    let (there, nowhere) = (Ipv4Addr::new(203, 0, 113, 9), Ipv4Addr::new(203, 0, 113, 10));
    assert!(nat::icmp_allowed());
    for seq_no in [1, 2] {
        let request = Icmpv4Repr::EchoRequest { ident: 7, seq_no, data: b"odd" };
        let mut bytes = vec![0; request.buffer_len()];
        request.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes[..]), &ChecksumCapabilities::default());
        wire.send_frame(&ipv4(GUEST, there, IpProtocol::Icmp, &bytes));
        let (source, destination, _, payload) = in_ipv4(&next(&mut wire).1);
        assert_eq!((source, destination), (there, GUEST));
        let packet = Icmpv4Packet::new_checked(&payload[..]).unwrap();
        let reply = Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()).unwrap();
        assert_eq!(reply, Icmpv4Repr::EchoReply { ident: 7, seq_no, data: b"odd" });
    }
    // There is no way to the other one, and the guest learns of it.
    let datagram = udp_datagram((GUEST, 4000).into(), (nowhere, 9).into(), b"x");
    for frame in [ipv4(GUEST, nowhere, IpProtocol::Udp, &datagram), {
        let syn = segment(9, TcpControl::Syn, 1000, None, &[]);
        ipv4(GUEST, nowhere, IpProtocol::Tcp, &syn[34..])
    }] {
        wire.send_frame(&frame);
        let (source, _, protocol, payload) = in_ipv4(&next(&mut wire).1);
        assert_eq!((source, protocol), (GATEWAY, IpProtocol::Icmp));
        let packet = Icmpv4Packet::new_checked(&payload[..]).unwrap();
        let Icmpv4Repr::DstUnreachable { reason, header, data } =
            Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()).unwrap()
        else {
            panic!()
        };
        assert_eq!(reason, smoltcp::wire::Icmpv4DstUnreachable::NetUnreachable);
        assert_eq!((header.src_addr, header.dst_addr), (GUEST, nowhere));
        assert_eq!(data[..4], frame[34..38]);
    }
}

/// A resolver that sends every query back. It ends with the process.
fn resolver() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut query) {
            let _ = socket.send_to(&query[..length], from);
        }
    });
    address
}

#[test]
fn names_are_asked_of_the_hosts_resolver() {
    let mut guest = Guest::new(&NatConfig { resolvers: vec![resolver()], ..config() });
    let handle = guest.udp(5000);
    let server = |ip: IpAddr| (smoltcp::wire::IpAddress::from(ip), 53);
    for ip in [DNS.into(), "fd70:7572:6c69:2::3".parse().unwrap()] {
        guest.sockets.get_mut::<udp::Socket>(handle).send_slice(b"query", server(ip)).unwrap();
        guest.run_until(|sockets| sockets.get::<udp::Socket>(handle).can_recv());
        let (answer, from) = guest.sockets.get_mut::<udp::Socket>(handle).recv().unwrap();
        assert_eq!((answer, IpAddr::from(from.endpoint.addr)), (&b"query"[..], ip));
    }
}

#[test]
fn a_resolver_that_is_not_there_gives_way() {
    let nobody = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut guest = Guest::new(&NatConfig { resolvers: vec![nobody, resolver()], ..config() });
    let handle = guest.udp(5000);
    let mut sent = 0;
    guest.run_until(|sockets| {
        let socket = sockets.get_mut::<udp::Socket>(handle);
        // As resolvers do, the guest asks again.
        if socket.send_queue() == 0 && !socket.can_recv() {
            sent += 1;
            socket.send_slice(b"query", (DNS, 53)).unwrap();
        }
        socket.can_recv()
    });
    assert!(sent >= 2, "the first resolver answered");
}

#[test]
fn a_storm_of_queries_is_bounded_and_passes() {
    let mut guest = Guest::new(&NatConfig { resolvers: vec![resolver()], ..config() });
    for i in 0..20_000u32 {
        let from = SocketAddr::from((GUEST, 1024 + i as u16 % 50_000));
        let datagram = udp_datagram(from, (DNS, 53).into(), &i.to_be_bytes());
        guest.wire.send_frame(&ipv4(GUEST, DNS, IpProtocol::Udp, &datagram));
        while guest.wire.receive_packet().is_some() {}
    }
    let descriptors = fs::read_dir(format!("/proc/{}/fd", guest.nat.id())).unwrap().count();
    assert!(descriptors < 300, "{descriptors} descriptors");
    let handle = guest.udp(999);
    let mut tries = 0;
    guest.run_until(|sockets| {
        let socket = sockets.get_mut::<udp::Socket>(handle);
        if socket.send_queue() == 0 && !socket.can_recv() {
            tries += 1;
            socket.send_slice(b"after", (DNS, 53)).unwrap();
        }
        socket.can_recv()
    });
    assert_eq!(guest.sockets.get_mut::<udp::Socket>(handle).recv().unwrap().0, b"after");
}

#[test]
fn a_published_udp_port() {
    let mut guest = Guest::new(&NatConfig { publish: vec!["127.0.0.1:0:7/udp".parse().unwrap()], ..config() });
    let handle = guest.udp(7);
    let address = guest.nat.published()[0];
    let clients = [UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap()];
    for client in &clients {
        client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        client.send_to(b"to the guest", address).unwrap();
        guest.run_until(|sockets| sockets.get::<udp::Socket>(handle).can_recv());
        let socket = guest.sockets.get_mut::<udp::Socket>(handle);
        let (request, from) = socket.recv().map(|(data, from)| (data.to_vec(), from)).unwrap();
        assert_eq!((&request[..], from.endpoint.addr), (&b"to the guest"[..], GATEWAY.into()));
        let answer = client.local_addr().unwrap().port().to_be_bytes();
        socket.send_slice(&answer, from.endpoint).unwrap();
        guest.run_until(|sockets| sockets.get::<udp::Socket>(handle).send_queue() == 0);
        let mut received = [0; 100];
        let (length, from) = client.recv_from(&mut received).unwrap();
        assert_eq!((&received[..length], from), (&answer[..], address));
    }
}

#[test]
fn nobody_at_a_udp_port_is_told() {
    let nobody = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (mut wire, _nat) = wire(&config());
    let datagram = udp_datagram((GUEST, 4000).into(), (GATEWAY, nobody).into(), b"x");
    wire.send_frame(&ipv4(GUEST, GATEWAY, IpProtocol::Udp, &datagram));
    let (_, frame) = next(&mut wire);
    let (source, destination, protocol, payload) = in_ipv4(&frame);
    assert_eq!((source, destination, protocol), (GATEWAY, GUEST, IpProtocol::Icmp));
    let packet = Icmpv4Packet::new_checked(&payload[..]).unwrap();
    let Icmpv4Repr::DstUnreachable { reason, header, data } =
        Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()).unwrap()
    else {
        panic!()
    };
    assert_eq!(reason, smoltcp::wire::Icmpv4DstUnreachable::PortUnreachable);
    assert_eq!((header.src_addr, header.dst_addr, header.next_header), (GUEST, GATEWAY, IpProtocol::Udp));
    assert_eq!(data[..4], datagram[..4]);
}

/// A TCP segment of the guest's in a frame; its checksum is left to others, as GSO does.
fn segment(port: u16, control: TcpControl, seq: u32, ack: Option<u32>, payload: &[u8]) -> Vec<u8> {
    let repr = TcpRepr {
        src_port: 3000,
        dst_port: port,
        control,
        seq_number: TcpSeqNumber(seq as i32),
        ack_number: ack.map(|ack| TcpSeqNumber(ack as i32)),
        window_len: 65535,
        window_scale: (control == TcpControl::Syn).then_some(4),
        max_seg_size: (control == TcpControl::Syn).then_some(1460),
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload,
    };
    let mut bytes = vec![0; repr.buffer_len()];
    let mut packet = TcpPacket::new_unchecked(&mut bytes[..]);
    repr.emit(&mut packet, &GUEST.into(), &GATEWAY.into(), &ChecksumCapabilities::ignored());
    ipv4(GUEST, GATEWAY, IpProtocol::Tcp, &bytes)
}

/// The sequence number and acknowledgement of a segment from the NAT.
fn numbers((_, frame): (PacketHeader, Vec<u8>)) -> (TcpControl, u32, Option<u32>) {
    let (source, destination, protocol, bytes) = in_ipv4(&frame);
    assert_eq!(protocol, IpProtocol::Tcp);
    let packet = TcpPacket::new_checked(&bytes[..]).unwrap();
    let repr = TcpRepr::parse(&packet, &source.into(), &destination.into(), &ChecksumCapabilities::ignored()).unwrap();
    (repr.control, repr.seq_number.0 as u32, repr.ack_number.map(|ack| ack.0 as u32))
}

/// TCP segments that come while the NAT is asked other things, so often that it has had a turn for each connection.
fn segments_meanwhile(wire: &mut Wire) -> Vec<(TcpControl, u32, Option<u32>)> {
    let mut segments = Vec::new();
    for _ in 0..70 {
        wire.send_frame(&who_has(GATEWAY));
        loop {
            let packet = next(wire);
            match EthernetFrame::new_checked(&packet.1[..]).unwrap().ethertype() {
                EthernetProtocol::Arp => break,
                _ => segments.push(numbers(packet)),
            }
        }
    }
    segments
}

#[test]
fn a_guest_that_remembers_an_earlier_connection_is_told_of_the_new_one() {
    let publish = vec!["127.0.0.1:0:3000".parse().unwrap()];
    let (mut wire, nat) = wire(&NatConfig { publish, ..config() });
    let client = TcpStream::connect(nat.published()[0]).unwrap();
    let (control, first, _) = numbers(next(&mut wire));
    assert_eq!(control, TcpControl::Syn);
    // TIME-WAIT's answer (RFC 9293 3.10.7.4), and the one to it (3.10.7.3).
    let (port, earlier) = (client.local_addr().unwrap().port(), first.wrapping_add(100_000));
    let (reset, syn) = ((TcpControl::Rst, earlier, None), (TcpControl::Syn, first, None));
    wire.send_frame(&segment(port, TcpControl::None, 7, Some(earlier), b""));
    assert_eq!(segments_meanwhile(&mut wire), [reset, syn]);
    // One that does not forget is not asked again and again.
    wire.send_frame(&segment(port, TcpControl::None, 7, Some(earlier), b""));
    assert_eq!(segments_meanwhile(&mut wire), [reset]);
    // What could be an answer and is none says nothing.
    wire.send_frame(&segment(port, TcpControl::None, 7, Some(first.wrapping_add(1)), b""));
    assert_eq!(segments_meanwhile(&mut wire), []);
}

#[test]
fn numbers_of_later_connections_between_the_same_ends_are_beyond_those_of_earlier_ones() {
    let publish = vec!["127.0.0.1:0:3000".parse().unwrap()];
    let (mut wire, nat) = wire(&NatConfig { publish, ..config() });
    let mut port = 0;
    let mut connect = || {
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&socket, &SocketAddr::from(([127, 0, 0, 1], port))).unwrap();
        rustix::net::connect(&socket, &nat.published()[0]).unwrap();
        let client = TcpStream::from(socket);
        client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        port = client.local_addr().unwrap().port();
        let (control, first, _) = numbers(next(&mut wire));
        assert_eq!(control, TcpControl::Syn);
        // The guest has nobody there; so the host remembers nothing of it.
        wire.send_frame(&segment(port, TcpControl::Rst, 0, Some(first.wrapping_add(1)), b""));
        assert_eq!((&client).read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
        first
    };
    let numbers: Vec<u32> = (0..16).map(|_| connect()).collect();
    assert!(numbers.is_sorted_by(|a, b| b.wrapping_sub(*a).cast_signed() > 0), "{numbers:?}");
}

/// A connection to a server that sends `greeting` and reads `expected`, by a guest that takes `offload`: the largest
/// segments with their headers.
fn large_segments(offload: Offload, length: usize) -> Vec<(PacketHeader, Vec<u8>)> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        use std::io::{Read, Write};
        let (mut stream, _) = listener.accept().unwrap();
        let mut received = vec![0; 60_000];
        stream.read_exact(&mut received).unwrap();
        assert!(received.iter().all(|&b| b == 0x5a));
        stream.write_all(&vec![0xa5; length]).unwrap();
    });
    let (mut wire, _nat) = wire(&config());
    wire.backend.set_offload(offload).unwrap();
    wire.send_frame(&segment(port, TcpControl::Syn, 1000, None, &[]));
    let (_, _, _, payload) = in_ipv4(&next(&mut wire).1);
    let answer = TcpPacket::new_checked(&payload[..]).unwrap();
    assert!(answer.syn() && answer.ack() && answer.ack_number().0 == 1001);
    let mut ack = (answer.seq_number().0 as u32).wrapping_add(1);
    wire.send_frame(&segment(port, TcpControl::Psh, 1001, Some(ack), &[0x5a; 60_000]));
    let (mut segments, mut received) = (Vec::new(), 0);
    while received < length {
        let (header, frame) = next(&mut wire);
        let (_, _, _, payload) = in_ipv4(&frame);
        let packet = TcpPacket::new_checked(&payload[..]).unwrap();
        let data = packet.payload();
        assert!(data.iter().all(|&b| b == 0xa5));
        if data.is_empty() || packet.seq_number().0 as u32 != ack {
            continue;
        }
        received += data.len();
        ack = ack.wrapping_add(data.len() as u32);
        wire.send_frame(&segment(port, TcpControl::None, 61_001, Some(ack), &[]));
        segments.push((header, frame));
    }
    server.join().unwrap();
    segments
}

#[test]
fn a_guest_that_takes_large_segments_gets_them() {
    let segments = large_segments(Offload::CSUM | Offload::TSO4, 1 << 20);
    let (header, frame) = segments.iter().max_by_key(|(_, frame)| frame.len()).unwrap();
    assert!(frame.len() > 1514, "{}", frame.len());
    assert_eq!((header.flags, header.gso_type), (PacketHeader::NEEDS_CSUM, PacketHeader::GSO_TCPV4));
    assert_eq!((header.gso_size, header.hdr_len), (1460, 54));
    assert_eq!((header.csum_start, header.csum_offset), (34, 16));
    // What the field holds is the sum over the pseudo-header: addresses, protocol, length.
    let (_, _, _, payload) = in_ipv4(frame);
    let words = [0x0a00, 0x0202, 0x0a00, 0x020f, 6, payload.len() as u32];
    let sum: u32 = words.iter().sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    assert_eq!(u32::from(TcpPacket::new_checked(&payload[..]).unwrap().checksum()), sum);
}

#[test]
fn a_guest_that_does_not_gets_whole_frames() {
    for (header, frame) in large_segments(Offload::empty(), 100_000) {
        assert!(frame.len() <= 1514);
        assert_eq!(header, PacketHeader::default());
        let (source, destination, _, payload) = in_ipv4(&frame);
        let packet = TcpPacket::new_checked(&payload[..]).unwrap();
        assert!(packet.verify_checksum(&source.into(), &destination.into()));
    }
}

fn resident_bytes(process: u32) -> usize {
    let statm = fs::read_to_string(format!("/proc/{process}/statm")).unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn floods_take_no_memory() {
    let (mut wire, nat) = wire(&config());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let before = resident_bytes(nat.id());
    for i in 0..100_000u32 {
        // SYNs from every port, and data that belongs to nothing.
        let mut frame = if i % 2 == 0 {
            segment(port, TcpControl::Syn, i, None, &[])
        } else {
            segment(port, TcpControl::Psh, i, Some(1), &[1; 1000])
        };
        frame[34..36].copy_from_slice(&((i / 2 % 60_000) as u16 + 1).to_be_bytes());
        wire.send_frame(&frame);
        while wire.receive_packet().is_some() {}
    }
    let grown = resident_bytes(nat.id()).saturating_sub(before);
    assert!(grown < 16 << 20, "grown by {grown} bytes");
    // It lives.
    wire.send_frame(&who_has(GATEWAY));
    while EthernetFrame::new_unchecked(next(&mut wire).1).ethertype() != EthernetProtocol::Arp {}
    drop(listener);
}

#[test]
fn the_process_ends_with_the_other_end() {
    let (backend, nat) = nat::start(&config()).unwrap();
    let status = format!("/proc/{}/stat", nat.id());
    drop::<Backend>(backend);
    for _ in 0..600 {
        // A zombie until its parent has asked for its status.
        if fs::read_to_string(&status).unwrap().contains(") Z ") {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("the process is still there");
}
