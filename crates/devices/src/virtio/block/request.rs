//! From a descriptor chain to what is asked of the disk (virtio 1.3, 5.2.6).

use purlin_memory::LogSlice;
use purlin_storage::{Disk, Request};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::config::{MOST_RANGE_SECTORS, MOST_RANGES, SECTOR};
use crate::virtio::{Chain, Malformed, Slices, fill};

/// Bytes of a request's header: type, reserved, sector.
const HEADER: usize = 16;
/// Bytes of a range of a discard or write-zeroes request: sector, count, flags.
const RANGE: usize = 16;
/// Bytes of the serial number that a driver gets.
const SERIAL: usize = 20;

/// A request, taken apart.
pub struct Parsed<'m> {
    /// The chain that it came in.
    pub head: u16,
    /// Where its status goes: one byte.
    pub status: Slices<'m>,
    /// Bytes written to the chain in the end, with the status.
    pub written: u32,
    /// What to do, or the status to answer with at once.
    pub work: Result<Vec<Request<'m, LogSlice>>, u8>,
}

/// Takes a chain apart. One that has no room for a header or a status is no request at all.
pub fn parse<'m>(mut chain: Chain<'m>, disk: &Disk) -> Result<Parsed<'m>, Malformed> {
    let mut header = [0; HEADER];
    chain.read(&mut header)?;
    let status = chain.split_writable_end(1)?;
    let written = chain.writable_length() as u32 + 1;
    let head = chain.head();
    let [a, b, c, d, _, _, _, _, sector @ ..] = header;
    let work = work(u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector), chain, disk);
    Ok(Parsed { head, status, written, work })
}

fn work<'m>(kind: u32, sector: u64, chain: Chain<'m>, disk: &Disk) -> Result<Vec<Request<'m, LogSlice>>, u8> {
    match kind {
        VIRTIO_BLK_T_IN => {
            let offset = offset(sector, chain.writable_length())?;
            Ok(vec![Request::Read { offset, buffers: chain.writable }])
        }
        VIRTIO_BLK_T_OUT => {
            let offset = offset(sector, chain.readable_length())?;
            Ok(vec![Request::Write { offset, buffers: chain.readable }])
        }
        VIRTIO_BLK_T_FLUSH => Ok(vec![Request::Flush]),
        VIRTIO_BLK_T_GET_ID => {
            // Shorter ones end with a NUL (5.2.6.1).
            let mut serial = [0; SERIAL];
            serial.iter_mut().zip(disk.serial().bytes()).for_each(|(to, from)| *to = from);
            fill(&chain.writable, &serial);
            Ok(Vec::new())
        }
        VIRTIO_BLK_T_DISCARD => ranges(chain, |range| match range.flags {
            0 => Ok(Request::Discard { offset: range.offset, length: range.length }),
            _ => Err(UNSUPPORTED),
        }),
        VIRTIO_BLK_T_WRITE_ZEROES => ranges(chain, |range| match range.flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP {
            0 => Ok(Request::WriteZeroes { offset: range.offset, length: range.length, unmap: range.flags != 0 }),
            _ => Err(UNSUPPORTED),
        }),
        _ => Err(UNSUPPORTED),
    }
}

/// The disk refuses what is outside it; here is checked what it is never asked.
fn offset(sector: u64, length: usize) -> Result<u64, u8> {
    if !(length as u64).is_multiple_of(SECTOR) {
        return Err(FAILED);
    }
    sector.checked_mul(SECTOR).ok_or(FAILED)
}

/// One range of a discard or write-zeroes request, in bytes.
struct Range {
    offset: u64,
    length: u64,
    flags: u32,
}

fn ranges<'m>(
    mut chain: Chain<'m>,
    request: impl Fn(Range) -> Result<Request<'m, LogSlice>, u8>,
) -> Result<Vec<Request<'m, LogSlice>>, u8> {
    let length = chain.readable_length();
    if !length.is_multiple_of(RANGE) || !(1..=MOST_RANGES).contains(&(length / RANGE)) {
        return Err(FAILED);
    }
    let range = |_| {
        let mut bytes = [0; RANGE];
        chain.read(&mut bytes).map_err(|_| FAILED)?;
        let [a, b, c, d, e, f, g, h, i, j, k, l, flags @ ..] = bytes;
        let sectors = u32::from_le_bytes([i, j, k, l]);
        if sectors > MOST_RANGE_SECTORS {
            return Err(FAILED);
        }
        let offset = u64::from_le_bytes([a, b, c, d, e, f, g, h]).checked_mul(SECTOR).ok_or(FAILED)?;
        request(Range { offset, length: u64::from(sectors) * SECTOR, flags: u32::from_le_bytes(flags) })
    };
    (0..length / RANGE).map(range).collect()
}

const FAILED: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPPORTED: u8 = VIRTIO_BLK_S_UNSUPP as u8;
