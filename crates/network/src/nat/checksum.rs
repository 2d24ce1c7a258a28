//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

/// A sum under way; slices of any length, one after the other, as if they were one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checksum {
    sum: u64,
    /// Whether an odd number of bytes came so far.
    odd: bool,
}

impl Checksum {
    /// With the pseudo-header of a protocol over IP (RFC 793 3.1, RFC 8200 8.1): the two give the same sum.
    pub fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Self {
        let mut sum = Self::default();
        for address in [source, destination] {
            match address {
                IpAddr::V4(address) => sum.add(&address.octets()),
                IpAddr::V6(address) => sum.add(&address.octets()),
            }
        }
        sum.sum += u64::from(protocol) + length as u64;
        sum
    }

    /// Adds bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        let mut bytes = bytes;
        if self.odd
            && let Some((&low, rest)) = bytes.split_first()
        {
            self.sum += u64::from(low);
            self.odd = false;
            bytes = rest;
        }
        // 64 KiB of 32-bit words are far from filling 64 bits.
        let words = bytes.chunks_exact(4);
        let rest = words.remainder();
        self.sum += words.map(|w| u64::from(u32::from_be_bytes([w[0], w[1], w[2], w[3]]))).sum::<u64>();
        for pair in rest.chunks(2) {
            match *pair {
                [high, low] => self.sum += u64::from(u16::from_be_bytes([high, low])),
                [high] => {
                    self.sum += u64::from(high) << 8;
                    self.odd = true;
                }
                _ => {}
            }
        }
    }

    /// The sum itself, not inverted: what a partial checksum starts from.
    pub fn partial(self) -> u16 {
        let mut sum = self.sum;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    /// The checksum.
    pub fn finish(self) -> u16 {
        !self.partial()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn example_of_rfc_1071() {
        let mut sum = Checksum::default();
        sum.add(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.partial(), 0xddf2);
    }

    proptest! {
        #[test]
        fn pieces_make_the_same_sum(data: Vec<u8>, cuts in prop::collection::vec(0usize..40, 0..6)) {
            let mut whole = Checksum::default();
            whole.add(&data);
            let mut pieces = Checksum::default();
            let mut rest = &data[..];
            for cut in cuts {
                let (piece, tail) = rest.split_at(cut.min(rest.len()));
                pieces.add(piece);
                rest = tail;
            }
            pieces.add(rest);
            prop_assert_eq!(whole.finish(), pieces.finish());
            prop_assert_eq!(whole.finish(), smoltcp_sum(&data));
        }
    }

    fn smoltcp_sum(data: &[u8]) -> u16 {
        !smoltcp::wire::checksum::data(data)
    }
}
