//! Instructions that were emulated before, decoded: decoding takes longer than most of them.

use iced_x86::{Decoder, Instruction};

use crate::translate::{ExitDesc, classify, source::DECODER_OPTIONS};

/// Entries; those of an operating system's entry and exit paths are some dozens.
const ENTRIES: usize = 256;

/// An instruction, and what is to be known of it.
#[derive(Clone, Copy)]
pub struct Decoded {
    /// It.
    pub insn: Instruction,
    /// It is emulated only because it needs vector registers.
    pub vector: bool,
}

#[derive(Clone, Copy)]
struct Entry {
    rip: u64,
    bytes: [u8; 15],
    len: u8,
    bits: u32,
    decoded: Decoded,
}

/// By address. An entry is valid for what it was decoded from, so none is ever forgotten.
pub struct DecodedCache(Box<[Option<Entry>; ENTRIES]>);

impl Default for DecodedCache {
    fn default() -> Self {
        Self(Box::new([None; ENTRIES]))
    }
}

impl DecodedCache {
    /// The instruction of `desc`, in code of so many bits.
    pub fn get(&mut self, desc: &ExitDesc, bits: u32) -> Decoded {
        let slot = &mut self.0[(desc.rip ^ desc.rip >> 8) as usize % ENTRIES];
        if let Some(entry) = slot
            && entry.rip == desc.rip
            && entry.bytes == desc.bytes
            && entry.len == desc.len
            && entry.bits == bits
        {
            return entry.decoded;
        }
        let bytes = &desc.bytes[..usize::from(desc.len)];
        let insn = Decoder::with_ip(bits, bytes, desc.rip, *DECODER_OPTIONS).decode();
        let vector = matches!(classify::classify(&insn, bits), classify::Class::Vector(_));
        let decoded = Decoded { insn, vector };
        *slot = Some(Entry { rip: desc.rip, bytes: desc.bytes, len: desc.len, bits, decoded });
        decoded
    }
}
