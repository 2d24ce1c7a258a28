//! What the driver is told of the disk: features and configuration (virtio 1.3, 5.2.3 and 5.2.4).

use purlin_storage::Disk;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::QUEUE_SIZE;
use crate::virtio::feature;

/// The unit of the protocol in bytes, whatever the block size.
pub const SECTOR: u64 = 512;

/// The most ranges of a discard or write-zeroes request.
pub const MOST_RANGES: usize = 16;
/// The most sectors of one such range: 2 GiB.
pub const MOST_RANGE_SECTORS: u32 = 4 << 20;

/// Bytes of `struct virtio_blk_config` up to the fields of write-zeroes.
const LENGTH: usize = 60;
/// Physical blocks have 2^3 logical ones: 4 KiB, so that guests align to what hosts' disks and caches have.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;

/// The features.
pub fn features(disk: &Disk) -> u64 {
    let always =
        [VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_MQ];
    let writable: &[u32] = &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];
    let by_mode = if disk.read_only() { &[VIRTIO_BLK_F_RO] } else { writable };
    always.iter().chain(by_mode).fold(0, |features, bit| features | feature(*bit))
}

/// `struct virtio_blk_config`.
pub fn structure(disk: &Disk, queues: u16) -> [u8; LENGTH] {
    let mut bytes = [0; LENGTH];
    let mut put = |at: usize, value: &[u8]| bytes[at..][..value.len()].copy_from_slice(value);
    let block = disk.block_size();
    let alignment = (block >> 9 << PHYSICAL_BLOCK_EXPONENT) as u32;
    put(0, &(disk.size() / SECTOR).to_le_bytes());
    // seg_max: a chain has a header and a status beside the data.
    put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
    put(20, &(block as u32).to_le_bytes());
    // topology: exponent, alignment offset, minimal I/O in blocks; no optimal one.
    put(24, &[PHYSICAL_BLOCK_EXPONENT, 0]);
    put(26, &(1u16 << PHYSICAL_BLOCK_EXPONENT).to_le_bytes());
    put(34, &queues.to_le_bytes());
    if !disk.read_only() {
        put(36, &MOST_RANGE_SECTORS.to_le_bytes());
        put(40, &(MOST_RANGES as u32).to_le_bytes());
        put(44, &alignment.to_le_bytes());
        put(48, &MOST_RANGE_SECTORS.to_le_bytes());
        put(52, &(MOST_RANGES as u32).to_le_bytes());
        // write_zeroes_may_unmap
        put(56, &[1]);
    }
    bytes
}
