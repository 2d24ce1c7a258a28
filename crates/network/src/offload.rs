//! What a guest is able to receive beyond plain frames.

use bitflags::bitflags;

bitflags! {
    /// The forms of packets that a guest takes, beside complete frames of at most its MTU. The values are those of
    /// the kernel's `TUN_F_*` (linux/if_tun.h).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Offload: u32 {
        /// TCP and UDP checksums that cover only the pseudo-header.
        const CSUM = 1;
        /// TCP over IPv4 in segments of up to 64 KiB. Requires `CSUM`.
        const TSO4 = 2;
        /// TCP over IPv6 in segments of up to 64 KiB. Requires `CSUM`.
        const TSO6 = 4;
        /// Large segments with ECN's CWR flag. Requires `TSO4` or `TSO6`.
        const TSO_ECN = 8;
    }
}

impl Offload {
    /// Without what lacks its requirement: the kernel refuses such sets.
    pub fn consistent(self) -> Self {
        if !self.contains(Self::CSUM) {
            return Self::empty();
        }
        if self.intersects(Self::TSO4 | Self::TSO6) { self } else { self - Self::TSO_ECN }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_segments_need_partial_checksums() {
        assert_eq!((Offload::TSO4 | Offload::TSO6).consistent(), Offload::empty());
        assert_eq!((Offload::CSUM | Offload::TSO_ECN).consistent(), Offload::CSUM);
        assert_eq!(Offload::all().consistent(), Offload::all());
    }
}
