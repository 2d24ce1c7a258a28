//! What the driver tells of the guest's memory (virtio 1.3, 5.5.6.4).

use prost::Message;

/// Bytes of `struct virtio_balloon_stat`: a tag and a value.
pub const STAT: usize = 10;

/// The guest's memory as its driver sees it; `None` where it did not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Bytes swapped in since the guest's start.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Page faults that had to wait for a disk.
    pub major_faults: Option<u64>,
    /// Page faults that had not.
    pub minor_faults: Option<u64>,
    /// Bytes not used for anything.
    pub free: Option<u64>,
    /// Bytes that the guest has in all, without those in the balloon.
    pub total: Option<u64>,
    /// Bytes that programs can get without swapping.
    pub available: Option<u64>,
    /// Bytes of caches that can be given up.
    pub caches: Option<u64>,
    /// Huge pages allocated.
    pub huge_page_allocations: Option<u64>,
    /// Huge pages that could not be.
    pub huge_page_failures: Option<u64>,
    /// How many times the driver has told; a higher one than before is news.
    pub updates: u64,
}

impl Statistics {
    /// The value with this tag (VIRTIO_BALLOON_S_*), if it is one that there is a place for.
    fn value(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free,
            5 => &mut self.total,
            6 => &mut self.available,
            7 => &mut self.caches,
            8 => &mut self.huge_page_allocations,
            9 => &mut self.huge_page_failures,
            _ => return None,
        })
    }

    /// Takes over what the driver tells: any number of structures.
    pub(super) fn update(&mut self, structures: &[u8]) {
        for stat in structures.chunks_exact(STAT) {
            let (tag, value) = stat.split_at(2);
            let tag = u16::from_le_bytes([tag[0], tag[1]]);
            let value = value.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
            if let Some(place) = self.value(tag) {
                *place = Some(value);
            }
        }
        self.updates = self.updates.wrapping_add(1);
    }

    pub(super) fn save(mut self) -> SavedStatistics {
        let stat = |tag: u16| self.value(tag).and_then(|v| *v).map(|value| SavedStat { tag: tag.into(), value });
        SavedStatistics { stats: (0..10).filter_map(stat).collect(), updates: self.updates }
    }

    pub(super) fn restored(saved: &SavedStatistics) -> Self {
        let mut statistics = Self { updates: saved.updates, ..Self::default() };
        for stat in &saved.stats {
            if let Some(place) = u16::try_from(stat.tag).ok().and_then(|tag| statistics.value(tag)) {
                *place = Some(stat.value);
            }
        }
        statistics
    }
}

/// The saved form.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct SavedStatistics {
    #[prost(message, repeated, tag = "1")]
    stats: Vec<SavedStat>,
    #[prost(uint64, tag = "2")]
    updates: u64,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct SavedStat {
    #[prost(uint32, tag = "1")]
    tag: u32,
    #[prost(uint64, tag = "2")]
    value: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_and_saved_form() {
        let stat = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        let mut statistics = Statistics::default();
        let all: Vec<u8> = (0..12).flat_map(|tag| stat(tag, (u64::from(tag) + 1) << 56 | 5)).collect();
        // A part of one at the end is none.
        statistics.update(&all[..all.len() - 1]);
        assert_eq!((statistics.swap_in, statistics.huge_page_failures), (Some(1 << 56 | 5), Some(10 << 56 | 5)));
        assert_eq!(statistics.updates, 1);
        statistics.update(&stat(4, 0));
        assert_eq!((statistics.free, statistics.total), (Some(0), Some(6 << 56 | 5)));
        assert_eq!(Statistics::restored(&statistics.save()), statistics);
        assert_eq!(Statistics::restored(&Statistics::default().save()), Statistics::default());
    }
}
