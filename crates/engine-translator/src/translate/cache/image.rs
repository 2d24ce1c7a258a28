//! All translations of a machine at one moment, in a file: copies of the machine begin with them, and share the memory.
//!
//! The file is no format. It is for processes of the very same program on the same host, and says which that is. Whoever
//! made it is trusted: what is in it is executed.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    os::unix::fs::{FileExt, MetadataExt},
    sync::{Arc, OnceLock},
};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::list::Mapped;
use crate::translate::memory::{CodeMemory, Mapping};

const MAGIC: u64 = u64::from_le_bytes(*b"PURLCODE");
/// Sections begin at multiples of it.
const ALIGNMENT: u64 = 4096;
const SECTIONS: usize = 16;

/// Which file a program is. Its code, and so what it emits, is that of others of the same file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Program {
    device: u64,
    inode: u64,
    size: u64,
    modified: [i64; 2],
}

/// Which this one is; to be asked for the first time before a sandbox closes /proc.
fn program() -> Option<Program> {
    static PROGRAM: OnceLock<Option<Program>> = OnceLock::new();
    *PROGRAM.get_or_init(|| {
        let file = std::fs::metadata("/proc/self/exe").ok()?;
        Some(Program {
            device: file.dev(),
            inode: file.ino(),
            size: file.size(),
            modified: [file.mtime(), file.mtime_nsec()],
        })
    })
}

/// Notes which program this is, while that can be known.
pub fn prepare() {
    let _ = program();
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    magic: u64,
    program: Program,
    /// Bytes of the code, from [`CodeMemory::OFFSET`] on.
    used: u64,
    /// For each section where it begins, and its length in bytes.
    sections: [[u64; 2]; SECTIONS],
}

/// A file that is being written.
pub struct Writer {
    file: BufWriter<File>,
    header: Header,
    sections: usize,
    end: u64,
}

impl Writer {
    /// One with a copy of this code.
    pub fn with_copy(code: &[u8]) -> io::Result<Self> {
        let file = File::from(memfd_create("purlin-code", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
        file.write_all_at(code, CodeMemory::OFFSET)?;
        Self::with_code(file, code.len() as u64)
    }

    /// One in a file that has so many bytes of code already, and nothing behind them.
    pub fn with_code(file: File, used: u64) -> io::Result<Self> {
        let unknown = || io::Error::other("the program's own file is not known");
        let program = program().ok_or_else(unknown)?;
        let header = Header { magic: MAGIC, program, used, ..Header::new_zeroed() };
        let end = CodeMemory::OFFSET + used;
        let mut writer = Self { file: BufWriter::with_capacity(1 << 18, file), header, sections: 0, end };
        io::Seek::seek(&mut writer.file, io::SeekFrom::Start(end))?;
        Ok(writer)
    }

    /// Adds a section of all these values.
    pub fn section<'a, T: IntoBytes + Immutable + 'a>(
        &mut self,
        parts: impl IntoIterator<Item = &'a [T]>,
    ) -> io::Result<()> {
        self.align()?;
        let start = self.end;
        for part in parts {
            self.file.write_all(part.as_bytes())?;
            self.end += size_of_val(part) as u64;
        }
        self.header.sections[self.sections] = [start, self.end - start];
        self.sections += 1;
        Ok(())
    }

    fn align(&mut self) -> io::Result<()> {
        let gap = self.end.next_multiple_of(ALIGNMENT) - self.end;
        self.end += gap;
        self.file.write_all(&[0; ALIGNMENT as usize][..gap as usize])
    }

    /// The file, which does not change any more.
    pub fn finish(mut self) -> io::Result<File> {
        // What is mapped is whole pages.
        self.align()?;
        let file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.write_all_at(self.header.as_bytes(), 0)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL)?;
        Ok(file)
    }
}

/// A file that is being read. Sections come in the order in which they were written.
pub struct Reader {
    mapping: Arc<Mapping>,
    header: Header,
    sections: usize,
}

impl Reader {
    /// Maps it; `None` if it is another program's.
    pub fn new(file: &File) -> io::Result<Option<Self>> {
        let sealed = fcntl_get_seals(file)?.contains(SealFlags::SHRINK | SealFlags::WRITE);
        if !sealed {
            return Err(invalid());
        }
        let mapping = Arc::new(Mapping::new(file, file.metadata()?.len() as usize)?);
        let (header, _) = Header::read_from_prefix(mapping.bytes()).map_err(|_| invalid())?;
        if header.magic != MAGIC {
            return Err(invalid());
        }
        let is_own = program() == Some(header.program);
        Ok(is_own.then_some(Self { mapping, header, sections: 0 }))
    }

    /// The code.
    pub fn code(&self) -> io::Result<&[u8]> {
        let code = usize::try_from(self.header.used).ok().and_then(|used| {
            let bytes = self.mapping.bytes();
            bytes.get(CodeMemory::OFFSET as usize..)?.get(..used)
        });
        code.ok_or_else(invalid)
    }

    /// The next section.
    pub fn section<T: FromBytes + Immutable>(&mut self) -> io::Result<Mapped<T>> {
        let [start, length] = *self.header.sections.get(self.sections).ok_or_else(invalid)?;
        self.sections += 1;
        let end = start.checked_add(length).ok_or_else(invalid)?;
        Mapped::new(&self.mapping, start as usize..end as usize).ok_or_else(invalid)
    }
}

fn invalid() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it is no image of translated code")
}
