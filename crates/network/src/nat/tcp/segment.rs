//! TCP segments: parsed, and made.

use std::net::SocketAddr;

use smoltcp::{
    phy::ChecksumCapabilities,
    wire::{IpProtocol, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber},
};

use crate::nat::link::{Link, Outgoing, Sent};

/// Where the checksum is in a TCP header.
const CHECKSUM: usize = 16;

/// Both ends of a connection, as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The guest's end.
    pub guest: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
}

/// A segment from the guest.
#[derive(Clone, Copy, Debug)]
pub struct Incoming<'a> {
    /// SEG.SEQ.
    pub seq: u32,
    /// SEG.ACK, with the flag.
    pub ack: Option<u32>,
    /// SEG.WND as it is in the header.
    pub window: u16,
    /// SYN, FIN, RST, or none of these. A combination is no segment.
    pub control: TcpControl,
    /// Option 2, in bytes.
    pub mss: Option<u16>,
    /// Option 3, at most 14.
    pub scale: Option<u8>,
    /// The data.
    pub payload: &'a [u8],
}

impl<'a> Incoming<'a> {
    /// Parses what is in an IP packet from `guest` to `remote`. The checksum is not looked at: what comes through
    /// memory has none yet, or a right one.
    pub fn parse(guest: std::net::IpAddr, remote: std::net::IpAddr, bytes: &'a [u8]) -> Option<(Key, Self)> {
        let packet = TcpPacket::new_checked(bytes).ok()?;
        let repr = TcpRepr::parse(&packet, &guest.into(), &remote.into(), &ChecksumCapabilities::ignored()).ok()?;
        let key = Key { guest: (guest, repr.src_port).into(), remote: (remote, repr.dst_port).into() };
        let segment = Self {
            seq: repr.seq_number.0.cast_unsigned(),
            ack: repr.ack_number.map(|n| n.0.cast_unsigned()),
            window: repr.window_len,
            control: repr.control,
            mss: repr.max_seg_size,
            scale: repr.window_scale.map(|scale| scale.min(14)),
            payload: repr.payload,
        };
        Some((key, segment))
    }

    /// SEG.LEN: data, SYN and FIN.
    pub fn len(&self) -> u32 {
        self.payload.len() as u32 + u32::from(matches!(self.control, TcpControl::Syn | TcpControl::Fin))
    }
}

/// A segment to the guest.
#[derive(Clone, Copy, Debug)]
pub struct Reply<'a> {
    /// SEG.SEQ.
    pub seq: u32,
    /// SEG.ACK.
    pub ack: Option<u32>,
    /// SEG.WND as it is in the header.
    pub window: u16,
    /// SYN, FIN, RST, PSH or none.
    pub control: TcpControl,
    /// Of a SYN: the largest segment taken, in bytes, and the scale of the windows to come.
    pub options: Option<(u16, Option<u8>)>,
    /// The data, in two pieces.
    pub payload: (&'a [u8], &'a [u8]),
    /// The largest segment that the guest takes where it takes no larger ones to cut, in bytes.
    pub mss: u16,
}

impl Reply<'_> {
    /// One without data.
    pub fn bare(control: TcpControl, seq: u32, ack: Option<u32>, window: u16) -> Self {
        Self { seq, ack, window, control, options: None, payload: (&[], &[]), mss: u16::MAX }
    }

    /// Sends it if there is room.
    pub fn send(&self, key: &Key, link: &mut Link) -> Sent {
        let mut header = [0; 60];
        link.send(&self.outgoing(key, &mut header))
    }

    /// Sends it, or lets it wait for room.
    pub fn send_or_wait(&self, key: &Key, link: &mut Link) {
        let mut header = [0; 60];
        link.send_or_wait(&self.outgoing(key, &mut header));
    }

    fn outgoing<'b>(&'b self, key: &Key, header: &'b mut [u8; 60]) -> Outgoing<'b> {
        let repr = TcpRepr {
            src_port: key.remote.port(),
            dst_port: key.guest.port(),
            control: self.control,
            seq_number: TcpSeqNumber(self.seq.cast_signed()),
            ack_number: self.ack.map(|ack| TcpSeqNumber(ack.cast_signed())),
            window_len: self.window,
            window_scale: self.options.and_then(|(_, scale)| scale),
            max_seg_size: self.options.map(|(mss, _)| mss),
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        };
        let (source, destination) = (key.remote.ip(), key.guest.ip());
        let header = &mut header[..repr.header_len()];
        let mut packet = TcpPacket::new_unchecked(&mut *header);
        repr.emit(&mut packet, &source.into(), &destination.into(), &ChecksumCapabilities::ignored());
        let is_large = self.payload.0.len() + self.payload.1.len() > self.mss.into();
        Outgoing {
            source,
            destination,
            protocol: IpProtocol::Tcp,
            header,
            payload: self.payload,
            checksum: Some(CHECKSUM),
            segment_size: is_large.then_some(self.mss),
        }
    }
}

/// The answer to a segment that belongs to no connection (RFC 9293 3.10.7.1).
pub fn refuse(key: &Key, segment: &Incoming<'_>, link: &mut Link) {
    if segment.control == TcpControl::Rst {
        return;
    }
    let reply = match segment.ack {
        Some(ack) => Reply::bare(TcpControl::Rst, ack, None, 0),
        None => Reply::bare(TcpControl::Rst, 0, Some(segment.seq.wrapping_add(segment.len())), 0),
    };
    reply.send_or_wait(key, link);
}
