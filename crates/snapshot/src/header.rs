//! The first page of a snapshot: what it is, and where its sections are. All numbers are little-endian.
//!
//! ```text
//!    0  magic, "PURLSNAP"
//!    8  u32 version
//!   12  u32 features that a reader must know
//!   16  four sections, 24 bytes each: u64 offset, u64 length, u32 CRC-32C, u32 zero
//!  112  zeroes
//! 4092  u32 CRC-32C of all that comes before
//! ```

/// The header's bytes.
pub const LENGTH: usize = 4096;

const MAGIC: &[u8; 8] = b"PURLSNAP";
const SECTIONS_AT: usize = 16;
const SECTION_BYTES: usize = 24;
const CHECKSUM_AT: usize = LENGTH - 4;

/// Where a section is. They follow each other, without gaps, behind the header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Section {
    pub offset: u64,
    pub length: u64,
    /// CRC-32C; 0 for memory, whose checksums are in the index.
    pub checksum: u32,
}

/// What the header says, beside magic and version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub features: u32,
    pub memory: Section,
    pub index: Section,
    pub manifest: Section,
    pub state: Section,
}

/// Why a page is no header.
#[derive(Debug, PartialEq, Eq)]
pub enum HeaderError {
    Magic,
    Version(u32),
    Checksum,
    /// The sections do not follow each other.
    Sections,
}

impl Header {
    pub fn encode(&self, version: u32) -> [u8; LENGTH] {
        let mut page = [0; LENGTH];
        page[..8].copy_from_slice(MAGIC);
        page[8..12].copy_from_slice(&version.to_le_bytes());
        page[12..16].copy_from_slice(&self.features.to_le_bytes());
        for (section, at) in self.sections().into_iter().zip((SECTIONS_AT..).step_by(SECTION_BYTES)) {
            page[at..at + 8].copy_from_slice(&section.offset.to_le_bytes());
            page[at + 8..at + 16].copy_from_slice(&section.length.to_le_bytes());
            page[at + 16..at + 20].copy_from_slice(&section.checksum.to_le_bytes());
        }
        let checksum = crc32c::crc32c(&page[..CHECKSUM_AT]);
        page[CHECKSUM_AT..].copy_from_slice(&checksum.to_le_bytes());
        page
    }

    /// The header of a version up to `known`.
    pub fn decode(page: &[u8; LENGTH], known: u32) -> Result<Self, HeaderError> {
        let (word, long) = (u32_at(page), u64_at(page));
        if !is_magic(page) {
            return Err(HeaderError::Magic);
        }
        // Before the checksum: a later version may have it elsewhere.
        if word(8) > known {
            return Err(HeaderError::Version(word(8)));
        }
        if word(8) == 0 || word(CHECKSUM_AT) != fingerprint(page) {
            return Err(HeaderError::Checksum);
        }
        let section = |number: usize| {
            let at = SECTIONS_AT + number * SECTION_BYTES;
            Section { offset: long(at), length: long(at + 8), checksum: word(at + 16) }
        };
        let [memory, index, manifest, state] = [0, 1, 2, 3].map(section);
        let header = Self { features: word(12), memory, index, manifest, state };
        if header.end().is_none() { Err(HeaderError::Sections) } else { Ok(header) }
    }

    /// Where the file ends, if its sections follow each other.
    pub fn end(&self) -> Option<u64> {
        self.sections().into_iter().try_fold(LENGTH as u64, |end, section| {
            if section.offset == end { end.checked_add(section.length) } else { None }
        })
    }

    fn sections(&self) -> [Section; 4] {
        [self.memory, self.index, self.manifest, self.state]
    }
}

/// Whether a file that begins with these bytes may be a snapshot, whole or not.
pub fn is_magic(start: &[u8]) -> bool {
    let length = start.len().min(MAGIC.len());
    length > 0 && start[..length] == MAGIC[..length]
}

/// The checksum of a header, which stands for the whole snapshot: all other checksums hang on it.
pub fn fingerprint(page: &[u8; LENGTH]) -> u32 {
    crc32c::crc32c(&page[..CHECKSUM_AT])
}

fn u32_at(page: &[u8; LENGTH]) -> impl Fn(usize) -> u32 {
    |at| page[at..at + 4].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn u64_at(page: &[u8; LENGTH]) -> impl Fn(usize) -> u64 {
    |at| page[at..at + 8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
