//! Where the file systems on a disk are: GPT (UEFI 2.10, 5.3), MBR with logical partitions, or the whole disk.

use std::{
    fmt,
    io::{BufReader, Read, Seek, SeekFrom},
    sync::Arc,
};

use gptman::{GPTHeader, GPTPartitionEntry};
use purlin_storage::{Disk, DiskReader};

use crate::Error;

/// The most partitions that are looked at.
const MOST: usize = 128;
const SECTOR: u64 = 512;

/// A part of the disk that may hold a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Where it begins, in bytes.
    pub start: u64,
    /// How large it is, in bytes.
    pub length: u64,
    /// The partition's number, `None` for the whole disk.
    pub number: Option<usize>,
}

impl fmt::Display for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number {
            Some(number) => write!(f, "partition {number}"),
            None => f.write_str("the disk"),
        }
    }
}

/// The volumes on `disk`, in the table's order; the whole disk if there is no table.
pub fn find(disk: &Arc<Disk>) -> Result<Vec<Volume>, Error> {
    let mut sector = [0; SECTOR as usize];
    if disk.size() < SECTOR {
        return Ok(vec![]);
    }
    disk.read_at(&mut sector, 0)?;
    let reader = || BufReader::new(DiskReader::new(disk.clone()));
    let partitions = match &sector[510..] {
        [0x55, 0xaa] => gpt(&mut reader()).or_else(|| mbr(&mut reader())).unwrap_or_default(),
        _ => vec![],
    };
    let fits = |v: &Volume| v.length > 0 && v.start.checked_add(v.length).is_some_and(|end| end <= disk.size());
    let mut volumes: Vec<_> = partitions.into_iter().filter(fits).take(MOST).collect();
    if volumes.is_empty() {
        volumes.push(Volume { start: 0, length: disk.size(), number: None });
    }
    Ok(volumes)
}

type Reader = BufReader<DiskReader>;

/// The crate checks the header; the entries are read here one by one, for its own way to read all of a table does not
/// expect one that somebody made to harm it.
fn gpt(reader: &mut Reader) -> Option<Vec<Volume>> {
    reader.seek(SeekFrom::Start(SECTOR)).ok()?;
    let header = GPTHeader::read_from(reader).ok()?;
    let table = header.partition_entry_lba.checked_mul(SECTOR)?;
    let entries = u64::from(header.number_of_partition_entries).min(MOST as u64);
    let entry = |number: u64, reader: &mut Reader| {
        reader.seek(SeekFrom::Start(table.checked_add(number * u64::from(header.size_of_partition_entry))?)).ok()?;
        GPTPartitionEntry::read_from(reader).ok()
    };
    let mut volumes = vec![];
    for number in 0..entries {
        let Some(partition) = entry(number, reader) else { break };
        let sectors = partition.ending_lba.checked_sub(partition.starting_lba).and_then(|last| last.checked_add(1));
        if let (true, Some(sectors)) = (partition.is_used(), sectors) {
            volumes.extend(volume(partition.starting_lba, sectors, number as usize + 1));
        }
    }
    Some(volumes)
}

/// The type of an extended partition, which holds a chain of tables; and its other name for large disks.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

fn mbr(reader: &mut Reader) -> Option<Vec<Volume>> {
    let primary = table(reader, 0)?;
    let mut volumes: Vec<_> = primary
        .iter()
        .enumerate()
        .filter(|(_, entry)| !EXTENDED.contains(&entry.kind))
        .filter_map(|(index, entry)| volume(entry.start, entry.sectors, index + 1))
        .collect();
    if let Some(extended) = primary.iter().find(|entry| EXTENDED.contains(&entry.kind)) {
        logical(reader, extended.start, &mut volumes);
    }
    Some(volumes)
}

/// Logical partitions: each table holds one and a link to the next, relative to the extended partition's start.
fn logical(reader: &mut Reader, extended: u64, volumes: &mut Vec<Volume>) {
    let mut at = extended;
    // The chain may be a loop.
    for number in 5..5 + MOST {
        let Some([partition, next, ..]) = table(reader, at) else { return };
        volumes.extend(volume(at + partition.start, partition.sectors, number));
        if !EXTENDED.contains(&next.kind) {
            return;
        }
        at = extended + next.start;
    }
}

/// An entry of a partition table; unused ones have no sectors.
#[derive(Clone, Copy)]
struct Entry {
    kind: u8,
    start: u64,
    sectors: u64,
}

/// The four entries at the end of a sector with a table's signature.
fn table(reader: &mut Reader, sector: u64) -> Option<[Entry; 4]> {
    let mut data = [0; SECTOR as usize];
    reader.seek(SeekFrom::Start(sector.checked_mul(SECTOR)?)).ok()?;
    reader.read_exact(&mut data).ok()?;
    let number = |at: usize| u64::from(u32::from_le_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]));
    let entry = |at: usize| match data[at + 4] {
        0 => Entry { kind: 0, start: 0, sectors: 0 },
        kind => Entry { kind, start: number(at + 8), sectors: number(at + 12) },
    };
    (data[510..] == [0x55, 0xaa]).then(|| [446, 462, 478, 494].map(entry))
}

fn volume(start: u64, sectors: u64, number: usize) -> Option<Volume> {
    let (start, length) = (start.checked_mul(SECTOR)?, sectors.checked_mul(SECTOR)?);
    (length > 0).then_some(Volume { start, length, number: Some(number) })
}
