//! DHCP (RFC 2131): one address, for whoever asks.

use std::net::{IpAddr, Ipv4Addr};

use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, IpProtocol};

use super::{
    link::{Link, Outgoing},
    plan::{DNS_V4, GATEWAY_V4, GUEST_V4, PREFIX_LENGTH_V4},
};

/// Ports of server and client.
pub const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
/// Seconds that the address is the guest's. It gets no other anyway.
const LEASE: u32 = 24 * 3600;
/// RFC 2132 3.14 and 5.1.
const OPTION_HOST_NAME: u8 = 12;
const OPTION_MTU: u8 = 26;

/// Answers what came to the server's port.
pub fn answer(request: &[u8], hostname: &str, mtu: u16, link: &mut Link) {
    let Ok(packet) = DhcpPacket::new_checked(request) else { return };
    let Ok(request) = DhcpRepr::parse(&packet) else { return };
    let Some(message_type) = answer_type(&request) else { return };

    let mtu = mtu.to_be_bytes();
    let mut options = vec![DhcpOption { kind: OPTION_MTU, data: &mtu }];
    if !hostname.is_empty() {
        options.push(DhcpOption { kind: OPTION_HOST_NAME, data: hostname.as_bytes() });
    }
    let is_lease = message_type != DhcpMessageType::Nak;
    // RFC 2131 4.3.5: no address for one who only asks for the parameters.
    let gives_address = is_lease && request.message_type != DhcpMessageType::Inform;
    let reply = DhcpRepr {
        message_type,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: request.client_ip,
        your_ip: if gives_address { GUEST_V4 } else { Ipv4Addr::UNSPECIFIED },
        server_ip: GATEWAY_V4,
        router: is_lease.then_some(GATEWAY_V4),
        subnet_mask: is_lease.then(|| Ipv4Addr::from_bits(u32::MAX << (32 - PREFIX_LENGTH_V4))),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(GATEWAY_V4),
        parameter_request_list: None,
        dns_servers: is_lease.then(|| [DNS_V4].into_iter().collect()),
        max_size: None,
        lease_duration: gives_address.then_some(LEASE),
        renew_duration: None,
        rebind_duration: None,
        additional_options: if is_lease { &options } else { &[] },
    };
    let mut message = vec![0; reply.buffer_len()];
    if reply.emit(&mut DhcpPacket::new_unchecked(&mut message[..])).is_ok() {
        send(&message, link);
    }
}

fn answer_type(request: &DhcpRepr<'_>) -> Option<DhcpMessageType> {
    let is_for_us = request.server_identifier.is_none_or(|server| server == GATEWAY_V4);
    match request.message_type {
        DhcpMessageType::Discover => Some(DhcpMessageType::Offer),
        DhcpMessageType::Inform => Some(DhcpMessageType::Ack),
        DhcpMessageType::Request if is_for_us => {
            let wanted = request.requested_ip.unwrap_or(request.client_ip);
            Some(if wanted == GUEST_V4 { DhcpMessageType::Ack } else { DhcpMessageType::Nak })
        }
        _ => None,
    }
}

/// To everybody on the link, as the client may have no address yet.
fn send(message: &[u8], link: &mut Link) {
    let mut header = [0; 8];
    header[..2].copy_from_slice(&SERVER_PORT.to_be_bytes());
    header[2..4].copy_from_slice(&CLIENT_PORT.to_be_bytes());
    header[4..6].copy_from_slice(&((8 + message.len()) as u16).to_be_bytes());
    link.send_or_wait(&Outgoing {
        source: IpAddr::V4(GATEWAY_V4),
        destination: IpAddr::V4(Ipv4Addr::BROADCAST),
        protocol: IpProtocol::Udp,
        header: &header,
        payload: (message, &[]),
        checksum: Some(6),
        segment_size: None,
    });
}
