//! What a boot method needs to know of an ELF file, 32-bit or 64-bit.

use object::{
    Endianness, FileKind,
    elf::{FileHeader32, FileHeader64, PT_LOAD, PT_NOTE},
    read::elf::{FileHeader, ProgramHeader},
};

use super::{image::Image, placement::Target};
use crate::error::MachineError;

/// `XEN_ELFNOTE_PHYS32_ENTRY`: the 32-bit physical entry point of PVH (Xen, docs/misc/pvh.pandoc).
const PHYS32_ENTRY: u32 = 18;

/// An ELF file for x86.
pub(super) struct Elf<'a> {
    /// The entry point.
    pub entry: u64,
    /// The entry point for PVH, if there is such a note.
    pub pvh_entry: Option<u64>,
    segments: Vec<Segment<'a>>,
}

struct Segment<'a> {
    physical: u64,
    /// Its start; the rest of `length` is zero.
    content: &'a [u8],
    length: u64,
}

impl<'a> Elf<'a> {
    /// Parses a little-endian ELF file; on an error says what is wrong with it.
    pub fn parse(file: &'a [u8]) -> Result<Self, String> {
        match FileKind::parse(file) {
            Ok(FileKind::Elf32) => Self::parse_as::<FileHeader32<Endianness>>(file),
            Ok(FileKind::Elf64) => Self::parse_as::<FileHeader64<Endianness>>(file),
            _ => Err("not an ELF file".into()),
        }
    }

    fn parse_as<H: FileHeader<Endian = Endianness>>(file: &'a [u8]) -> Result<Self, String> {
        let header = H::parse(file).map_err(text)?;
        let endian = header.endian().map_err(text)?;
        let mut elf = Self { entry: header.e_entry(endian).into(), pvh_entry: None, segments: Vec::new() };
        for program in header.program_headers(endian, file).map_err(text)? {
            match program.p_type(endian) {
                PT_LOAD => elf.segments.push(Self::segment(program, endian, file)?),
                PT_NOTE => elf.pvh_entry = elf.pvh_entry.or(Self::pvh_note(program, endian, file).map_err(text)?),
                _ => {}
            }
        }
        Ok(elf)
    }

    fn segment<P: ProgramHeader<Endian = Endianness>>(
        program: &P,
        endian: Endianness,
        file: &'a [u8],
    ) -> Result<Segment<'a>, String> {
        let content = program.data(endian, file).map_err(|()| "a segment goes past its end")?;
        let length = program.p_memsz(endian).into().max(content.len() as u64);
        Ok(Segment { physical: program.p_paddr(endian).into(), content, length })
    }

    fn pvh_note<P: ProgramHeader<Endian = Endianness>>(
        program: &P,
        endian: Endianness,
        file: &'a [u8],
    ) -> object::Result<Option<u64>> {
        let Some(mut notes) = program.notes(endian, file)? else { return Ok(None) };
        while let Some(note) = notes.next()? {
            if note.n_type(endian) == PHYS32_ENTRY && note.name() == b"Xen" {
                return Ok(note.desc().first_chunk().map(|d| u32::from_le_bytes(*d).into()));
            }
        }
        Ok(None)
    }

    /// Copies the segments to memory. Returns the end of the highest.
    pub fn load(&self, image: &Image, target: &Target) -> Result<u64, MachineError> {
        if self.segments.iter().all(|s| s.length == 0) {
            return Err(image.not_a_kernel("the ELF file has nothing to load: get the whole file"));
        }
        for segment in &self.segments {
            target.check_kernel(image, segment.physical, segment.length)?;
        }
        for segment in &self.segments {
            target.write(segment.physical, segment.content)?;
            target
                .zero(segment.physical + segment.content.len() as u64, segment.length - segment.content.len() as u64)?;
        }
        Ok(self.segments.iter().map(|s| s.physical + s.length).max().unwrap_or(0))
    }
}

fn text(error: object::Error) -> String {
    error.to_string()
}
