//! The header before each frame: `struct virtio_net_hdr` of virtio 1.3 5.1.6.

/// The longest packet: header, Ethernet header with a VLAN tag, and the longest IP packet.
pub const MAX_PACKET: usize = PacketHeader::LENGTH + 18 + 65535;

/// What is not yet done to a frame: its checksum, its segmentation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketHeader {
    /// `NEEDS_CSUM`, `DATA_VALID`.
    pub flags: u8,
    /// `GSO_*`.
    pub gso_type: u8,
    /// Bytes of the frame's headers, to be repeated before each segment.
    pub hdr_len: u16,
    /// Bytes of payload in each segment.
    pub gso_size: u16,
    /// Where the bytes to be summed begin, counted from the start of the frame.
    pub csum_start: u16,
    /// Where the checksum goes, counted from `csum_start`.
    pub csum_offset: u16,
    /// Descriptor chains that the packet is spread over: the device's business, ignored on a [`crate::Backend`].
    pub num_buffers: u16,
}

impl PacketHeader {
    /// Bytes.
    pub const LENGTH: usize = 12;

    /// The checksum at `csum_offset` covers only the pseudo-header.
    pub const NEEDS_CSUM: u8 = 1;
    /// The checksum is known to be right.
    pub const DATA_VALID: u8 = 2;

    /// Not segmented.
    pub const GSO_NONE: u8 = 0;
    /// TCP over IPv4.
    pub const GSO_TCPV4: u8 = 1;
    /// TCP over IPv6.
    pub const GSO_TCPV6: u8 = 4;
    /// With the CWR flag set in the first segment: an addition to the two above.
    pub const GSO_ECN: u8 = 0x80;

    /// The header in its little-endian form.
    pub fn to_bytes(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers];
        for (to, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The header from its little-endian form.
    pub fn from_bytes(bytes: [u8; Self::LENGTH]) -> Self {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_the_standards() {
        let header = PacketHeader {
            flags: PacketHeader::NEEDS_CSUM,
            gso_type: PacketHeader::GSO_TCPV6,
            hdr_len: 0x0102,
            gso_size: 0x0304,
            csum_start: 0x0506,
            csum_offset: 0x0708,
            num_buffers: 0x090a,
        };
        assert_eq!(header.to_bytes(), [1, 4, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9]);
        assert_eq!(PacketHeader::from_bytes(header.to_bytes()), header);
    }
}
