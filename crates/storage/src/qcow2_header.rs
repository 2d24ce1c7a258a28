//! What a qcow2 image says of itself, read and checked before imago opens it (QEMU's docs/interop/qcow2.txt).
//!
//! The checks bound what an image can make us allocate. Its tables are checked in `qcow2_tables.rs`.

use std::{fs::File, io, os::unix::fs::FileExt};

/// `QFI\xfb`, the first four bytes.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// The longest L1 table, in bytes: that of a disk of 16 TiB with clusters of 64 KiB is 256 KiB. QEMU's limit.
const MAX_L1_TABLE: u64 = 32 << 20;
/// The longest refcount table, in bytes. QEMU's limit.
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// The longest name of a backing file.
const MAX_BACKING_NAME: u32 = 1023;

/// Header extensions.
const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
/// The length of an entry in the table of feature names, in bytes.
const FEATURE_NAME: u64 = 48;

/// Incompatible features.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const KNOWN: u64 = DIRTY | CORRUPT | EXTERNAL_DATA;

/// The parts of a header that are of use here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub version: u32,
    /// Bytes.
    pub virtual_size: u64,
    /// Bytes.
    pub cluster_size: u64,
    pub backing: Option<Backing>,
    /// Where the L1 table is, in bytes, and how many entries it has.
    pub l1_table: (u64, u64),
    /// Where the refcount table is, in bytes, and how many entries it has.
    pub refcount_table: (u64, u64),
    /// The width of a refcount in bits, as a power of two.
    pub refcount_order: u32,
}

/// The reference to a file below.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Backing {
    /// As it is written in the image.
    pub name: String,
    pub format: Option<String>,
}

/// Whether the file begins as a qcow2 image does.
pub(crate) fn is_qcow2(file: &File) -> io::Result<bool> {
    let mut magic = [0; 4];
    match file.read_exact_at(&mut magic, 0) {
        Ok(()) => Ok(magic == MAGIC),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

impl Header {
    /// Reads and checks the header of an image file of `length` bytes. Errors say what is wrong in a few words.
    pub fn read(file: &File, length: u64) -> Result<Self, String> {
        let mut fields = [0; 104];
        let present = read_up_to(file, &mut fields)?;
        if fields[..4] != MAGIC {
            return Err("it does not begin as one: it has another format (say which), or was overwritten".into());
        }
        let version = u32_at(&fields, 4);
        let needed = match version {
            2 => 72,
            3 => 104,
            other => return Err(format!("it has version {other}, known are 2 and 3")),
        };
        if present < needed {
            return Err("it is cut off in its header: copy it again".into());
        }
        check_features(version, &fields)?;

        let cluster_bits = u32_at(&fields, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(format!("corrupt header: clusters of 2^{cluster_bits} bytes"));
        }
        let cluster_size = 1 << cluster_bits;
        let header = Self {
            version,
            virtual_size: u64_at(&fields, 24),
            cluster_size,
            backing: Self::backing(file, &fields, version, cluster_size)?,
            l1_table: (u64_at(&fields, 40), u32_at(&fields, 36).into()),
            refcount_table: (u64_at(&fields, 48), u64::from(u32_at(&fields, 56)) * (cluster_size / 8)),
            refcount_order: if version == 2 { 4 } else { u32_at(&fields, 96) },
        };
        header.check_tables(length)?;
        Ok(header)
    }

    fn check_tables(&self, length: u64) -> Result<(), String> {
        if self.refcount_order > 6 {
            return Err(format!("corrupt header: refcounts of 2^{} bits", self.refcount_order));
        }
        let [l1_length, refcount_length] = [self.l1_table.1 * 8, self.refcount_table.1 * 8];
        if l1_length > MAX_L1_TABLE || refcount_length > MAX_REFCOUNT_TABLE || refcount_length == 0 {
            return Err("corrupt header: a table of impossible size".into());
        }
        let per_table = self.cluster_size / 8 * self.cluster_size;
        if self.virtual_size.div_ceil(per_table) > self.l1_table.1 {
            return Err("corrupt header: its tables are too small for its size".into());
        }
        for (offset, size) in [(self.l1_table.0, l1_length), (self.refcount_table.0, refcount_length)] {
            if offset == 0 && size > 0 || !offset.is_multiple_of(self.cluster_size) {
                return Err("corrupt header: a table is not where one can be".into());
            }
            if offset.checked_add(size).is_none_or(|end| end > length.next_multiple_of(self.cluster_size)) {
                return Err("it is cut off: copy it again".into());
            }
        }
        Ok(())
    }

    fn backing(file: &File, fields: &[u8], version: u32, cluster_size: u64) -> Result<Option<Backing>, String> {
        let (offset, length) = (u64_at(fields, 8), u32_at(fields, 16));
        let start = if version == 2 { 72 } else { u32_at(fields, 100).into() };
        if offset == 0 || length == 0 {
            backing_format(file, start, cluster_size)?;
            return Ok(None);
        }
        if length > MAX_BACKING_NAME || offset.checked_add(length.into()).is_none_or(|end| end > cluster_size) {
            return Err("corrupt header: the backing file's name is not inside the first cluster".into());
        }
        let mut name = vec![0; length as usize];
        file.read_exact_at(&mut name, offset).map_err(|e| e.to_string())?;
        let name = String::from_utf8(name).map_err(|_| "the backing file's name is not UTF-8".to_owned())?;
        let format = backing_format(file, start, offset)?;
        Ok(Some(Backing { name, format }))
    }
}

fn check_features(version: u32, fields: &[u8]) -> Result<(), String> {
    if u32_at(fields, 32) != 0 {
        return Err("it is encrypted, which is not supported: 'qemu-img convert' can decrypt it".into());
    }
    if version == 2 {
        return Ok(());
    }
    let features = u64_at(fields, 72);
    if features & CORRUPT != 0 {
        return Err("it is marked corrupt: see 'qemu-img check -r all'".into());
    }
    if features & DIRTY != 0 {
        return Err("it was not closed cleanly: repair it with 'qemu-img check -r all'".into());
    }
    if features & EXTERNAL_DATA != 0 {
        return Err("its data is in another file, which is not supported: convert it with 'qemu-img convert'".into());
    }
    if features & !KNOWN != 0 {
        return Err(format!(
            "it needs features that are not known here ({:#x}): convert it with 'qemu-img convert'",
            features & !KNOWN
        ));
    }
    if !(104..=4096).contains(&u32_at(fields, 100)) {
        return Err(format!("corrupt header: it says to be {} bytes long", u32_at(fields, 100)));
    }
    Ok(())
}

/// Checks the header extensions, which are between `position` and `end`, and returns the backing file's format.
fn backing_format(file: &File, mut position: u64, end: u64) -> Result<Option<String>, String> {
    let mut format = None;
    while position + 8 <= end {
        let mut head = [0; 8];
        read_at_up_to(file, &mut head, position)?;
        let (kind, length) = (u32_at(&head, 0), u64::from(u32_at(&head, 4)));
        position += 8;
        if kind == EXTENSION_END {
            break;
        }
        if length > end - position || kind == EXTENSION_FEATURE_NAMES && !length.is_multiple_of(FEATURE_NAME) {
            return Err("corrupt header: an extension of impossible length".into());
        }
        if kind == EXTENSION_BACKING_FORMAT {
            let mut text = vec![0; length as usize];
            read_at_up_to(file, &mut text, position)?;
            format = Some(String::from_utf8_lossy(&text).into_owned());
        }
        position += length.next_multiple_of(8);
    }
    Ok(format)
}

fn read_up_to(file: &File, buffer: &mut [u8]) -> Result<usize, String> {
    read_at_up_to(file, buffer, 0)
}

/// Fills `buffer` as far as the file goes.
pub(crate) fn read_at_up_to(file: &File, buffer: &mut [u8], offset: u64) -> Result<usize, String> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.to_string()),
        }
    }
    Ok(done)
}

pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_be_bytes(field)
}

pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_be_bytes(field)
}
