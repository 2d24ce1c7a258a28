//! XSAVE, XSAVEOPT, XSAVEC and XRSTOR (SDM vol. 1 13.7 to 13.10): from wherever they are executed to an area in memory.

use iced_x86::{Instruction, Mnemonic};
use purlin_arch::x86_64::regs::{
    cr4,
    gpr::{RAX, RDX},
    xcr0,
};

use super::{
    Layout, MXCSR_INIT, checks, fxsave,
    fxsave::Pointers,
    layout::COMPONENTS,
    memory::{HostMemory, Memory, Operand, UNIT, unit},
    offset::{self, HEADER_END, LEGACY_END, XSTATE_BV},
};
use crate::{cpu::Cpu, exception::Exception, mem::Access};

const COMPACTED: u64 = 1 << 63;
/// MXCSR belongs to both in the standard format.
const WITH_MXCSR: u64 = xcr0::SSE | xcr0::AVX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Plain,
    Optimised,
    Compacted,
    Restore,
}

/// Which of the instructions it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    kind: Kind,
    pointers: Pointers,
}

impl Form {
    const ALL: [(Mnemonic, Kind, Pointers); 8] = [
        (Mnemonic::Xsave, Kind::Plain, Pointers::Bits32),
        (Mnemonic::Xsave64, Kind::Plain, Pointers::Bits64),
        (Mnemonic::Xsaveopt, Kind::Optimised, Pointers::Bits32),
        (Mnemonic::Xsaveopt64, Kind::Optimised, Pointers::Bits64),
        (Mnemonic::Xsavec, Kind::Compacted, Pointers::Bits32),
        (Mnemonic::Xsavec64, Kind::Compacted, Pointers::Bits64),
        (Mnemonic::Xrstor, Kind::Restore, Pointers::Bits32),
        (Mnemonic::Xrstor64, Kind::Restore, Pointers::Bits64),
    ];

    /// That of `mnemonic`; `None` if it is another instruction.
    pub fn of(mnemonic: Mnemonic) -> Option<Self> {
        Self::ALL.iter().position(|(known, ..)| *known == mnemonic).map(|word| Self::from_word(word as u64))
    }

    /// The same as emitted code passes it on.
    pub fn to_word(self) -> u64 {
        Self::ALL.iter().position(|&(_, kind, pointers)| Self { kind, pointers } == self).unwrap_or(0) as u64
    }

    /// What [`Self::to_word`] has said.
    pub fn from_word(word: u64) -> Self {
        let (_, kind, pointers) = Self::ALL[word as usize % Self::ALL.len()];
        Self { kind, pointers }
    }

    /// Whether the processor has it, where the system has enabled these instructions.
    fn is_offered(self, cpu: &Cpu) -> bool {
        match self.kind {
            Kind::Plain | Kind::Restore => true,
            Kind::Optimised => cpu.features.xsaveopt,
            Kind::Compacted => cpu.features.xsavec,
        }
    }

    fn access(self) -> Access {
        if self.kind == Kind::Restore { Access::Read } else { Access::Write }
    }
}

/// #UD and #NM.
fn check_enabled(cpu: &Cpu, form: Form) -> Result<(), Exception> {
    if !form.is_offered(cpu) || cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    checks::check_task_switched(cpu)
}

/// The components that EDX:EAX asks for, of those that the system has enabled.
fn requested(cpu: &Cpu) -> u64 {
    cpu.xcr0 & (cpu.gpr[RAX] & 0xffff_ffff | cpu.gpr[RDX] << 32)
}

/// How many bytes of a component exist outside of 64-bit mode: those of registers 0 to 7.
fn visible(cpu: &Cpu, component: u32, size: usize) -> usize {
    match component {
        _ if cpu.code64() => size,
        1 | 2 | 6 => size / 2,
        7 => 0,
        _ => size,
    }
}

/// A piece of the area: where it goes, and what goes there.
#[derive(Clone, Copy)]
struct Piece {
    offset: usize,
    size: usize,
    /// Bytes that are accessed as one.
    unit: usize,
    source: Source,
}

#[derive(Clone, Copy)]
enum Source {
    /// Bytes from here on of the processor's own area.
    Area(usize),
    /// As many of these.
    Bytes([u8; offset::MXCSR]),
    /// Of a component that is in its initial state.
    Zeros,
}

impl Piece {
    fn area(offset: usize, from: usize, size: usize) -> Self {
        Self { offset, size, unit: UNIT, source: Source::Area(from) }
    }

    fn bytes(offset: usize, data: &[u8]) -> Self {
        let mut bytes = [0; offset::MXCSR];
        bytes[..data.len()].copy_from_slice(data);
        Self { offset, size: data.len(), unit: UNIT, source: Source::Bytes(bytes) }
    }

    /// Writes it into the area; its pages have been checked.
    fn write(&self, cpu: &mut Cpu, memory: &Memory) -> Result<(), Exception> {
        match (self.source, memory) {
            (Source::Area(from), Memory::Host(host)) => {
                host.write(self.offset, &cpu.xstate.area[from..from + self.size]);
                Ok(())
            }
            (Source::Area(from), _) => {
                let mut buffer = [0; 256];
                for done in (0..self.size).step_by(buffer.len()) {
                    let part = &mut buffer[..(self.size - done).min(256)];
                    part.copy_from_slice(&cpu.xstate.area[from + done..][..part.len()]);
                    memory.write(cpu, self.offset + done, self.unit, part)?;
                }
                Ok(())
            }
            (Source::Bytes(bytes), _) => memory.write(cpu, self.offset, self.unit, &bytes[..self.size]),
            (Source::Zeros, _) => memory.write(cpu, self.offset, self.unit, &[0; LARGEST][..self.size]),
        }
    }
}

/// Bytes of the largest component.
const LARGEST: usize = 1024;

/// XSAVE, XSAVEOPT, XSAVEC, XRSTOR.
pub fn execute(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let form = Form::of(insn.mnemonic()).ok_or(Exception::UD)?;
    check_enabled(cpu, form)?;
    let access = form.access();
    let memory = Memory::Operand(Operand::of(cpu, insn, HEADER_END, 64, access)?);
    save_or_restore(cpu, form, &memory)
}

/// The same in 64-bit code, if the area at linear `address` is plain memory that can be accessed without anybody's taking
/// note. False if nothing was done: there is more to it.
pub fn quickly(cpu: &mut Cpu, form: Form, address: u64) -> bool {
    let ready = check_enabled(cpu, form).is_ok() && cpu.dr7 & 0xff == 0 && address & 63 == 0;
    let memory = if ready { HostMemory::find(cpu, address, form.access()) } else { None };
    memory.is_some_and(|host| save_or_restore(cpu, form, &Memory::Host(host)).is_ok())
}

fn save_or_restore(cpu: &mut Cpu, form: Form, memory: &Memory) -> Result<(), Exception> {
    match form.kind {
        Kind::Restore => restore(cpu, form.pointers, memory),
        _ => save(cpu, form, memory),
    }
}

fn save(cpu: &mut Cpu, Form { kind, pointers }: Form, memory: &Memory) -> Result<(), Exception> {
    let requested = requested(cpu);
    let mut in_use = cpu.xstate.in_use();
    if !cpu.code64() && !cpu.features.amd {
        // Registers that there are none of are in their initial state, to Intel's processors.
        in_use &= !(1 << 7);
    }
    if kind == Kind::Compacted && cpu.xstate.mxcsr() != MXCSR_INIT {
        in_use |= xcr0::SSE;
    }
    let saved = if kind == Kind::Plain { requested } else { requested & in_use };
    let mut pieces = pieces(cpu, memory, kind, pointers, requested, saved)?;
    pieces.push(match kind {
        Kind::Compacted => {
            let header = [in_use & requested, COMPACTED | requested].map(u64::to_le_bytes);
            Piece::bytes(XSTATE_BV, header.as_flattened())
        }
        _ => {
            let mut old = [0; 8];
            memory.read(cpu, XSTATE_BV, UNIT, &mut old)?;
            let new = u64::from_le_bytes(old) & !requested | in_use & requested;
            Piece::bytes(XSTATE_BV, &new.to_le_bytes())
        }
    });
    let end = pieces.all().map(|piece| piece.offset + piece.size).max().unwrap_or(0);
    memory.check_end(cpu, end)?;
    for piece in pieces.all() {
        memory.probe(cpu, piece.offset, piece.unit, piece.size)?;
    }
    for piece in pieces.all() {
        piece.write(cpu, memory)?;
    }
    Ok(())
}

/// Those of one area: x87's two, MXCSR, the other components, the header.
#[derive(Default)]
struct Pieces {
    pieces: [Option<Piece>; COMPONENTS as usize + 3],
    count: usize,
}

impl Pieces {
    fn push(&mut self, piece: Piece) {
        self.pieces[self.count] = Some(piece);
        self.count += 1;
    }

    fn all(&self) -> impl Iterator<Item = &Piece> {
        self.pieces.iter().flatten()
    }
}

fn pieces(
    cpu: &mut Cpu,
    memory: &Memory,
    kind: Kind,
    pointers: Pointers,
    requested: u64,
    saved: u64,
) -> Result<Pieces, Exception> {
    let mut pieces = Pieces::default();
    if saved & xcr0::X87 != 0 {
        let mut control = [0; offset::MXCSR];
        memory.read(cpu, 0, UNIT, &mut control)?;
        fxsave::put_x87_control(cpu, &mut control, pointers);
        pieces.push(Piece::bytes(0, &control));
        pieces.push(Piece::area(offset::ST, offset::ST, offset::XMM - offset::ST));
    }
    let with_mxcsr = match kind {
        Kind::Compacted => saved & xcr0::SSE,
        _ => requested & WITH_MXCSR,
    };
    if with_mxcsr != 0 {
        let fields = [cpu.xstate.mxcsr(), cpu.features.mxcsr].map(u32::to_le_bytes);
        pieces.push(Piece::bytes(offset::MXCSR, fields.as_flattened()));
    }
    let layout = cpu.features.xsave_layout;
    for component in (1..COMPONENTS).filter(|i| saved & 1 << i != 0) {
        let target = match kind {
            Kind::Compacted => layout.compacted(component, requested),
            _ => layout.range(component),
        };
        let (Some(target), Some(source)) = (target, Layout::host().range(component)) else { continue };
        let size = visible(cpu, component, source.len());
        let source = match cpu.xstate.in_use() & 1 << component {
            0 => Source::Zeros,
            _ => Source::Area(source.start),
        };
        pieces.push(Piece { offset: target.start, size, unit: unit(component), source });
    }
    Ok(pieces)
}

/// XRSTOR, from both formats.
fn restore(cpu: &mut Cpu, pointers: Pointers, memory: &Memory) -> Result<(), Exception> {
    let requested = requested(cpu);
    let mut header = [0; HEADER_END - LEGACY_END];
    memory.read(cpu, LEGACY_END, UNIT, &mut header)?;
    let word = |i: usize| u64::from_le_bytes(header[8 * i..8 * i + 8].try_into().unwrap_or_default());
    let (present, format) = (word(0), word(1));
    let compacted = format & COMPACTED != 0;
    let components = format & !COMPACTED;

    let valid = if compacted {
        cpu.features.xsavec
            && components & !cpu.xcr0 == 0
            && present & !components == 0
            && header[16..].iter().all(|b| *b == 0)
    } else {
        present & !cpu.xcr0 == 0 && header[8..24].iter().all(|b| *b == 0)
    };
    if !valid {
        return Err(Exception::GP0);
    }

    let mut legacy = [0; LEGACY_END];
    memory.read(cpu, 0, UNIT, &mut legacy)?;
    let mxcsr = match compacted {
        false if requested & WITH_MXCSR != 0 => Some(memory_mxcsr(&legacy)),
        true if requested & present & xcr0::SSE != 0 => Some(memory_mxcsr(&legacy)),
        true if requested & xcr0::SSE != 0 => Some(MXCSR_INIT),
        _ => None,
    };
    if mxcsr.is_some_and(|value| value & !cpu.features.mxcsr != 0) {
        return Err(Exception::GP0);
    }

    // Everything is found readable before anything is changed: a page fault leaves the registers as they were.
    let layout = cpu.features.xsave_layout;
    let mut loaded = [None; COMPONENTS as usize];
    for component in (1..COMPONENTS).filter(|i| requested & present & 1 << i != 0) {
        let source = if compacted { layout.compacted(component, components) } else { layout.range(component) };
        let Some(source) = source else { continue };
        let size = visible(cpu, component, source.len());
        memory.check_end(cpu, source.start + size)?;
        memory.probe(cpu, source.start, unit(component), size)?;
        loaded[component as usize] = Some((source.start, size));
    }
    let mut data = match memory {
        Memory::Operand(_) => Some(Loaded::read(cpu, memory, &loaded)?),
        // That cannot fault any more.
        Memory::Host(_) => None,
    };

    if requested & xcr0::X87 != 0 {
        match present & xcr0::X87 {
            0 => cpu.xstate.initialise(0),
            _ => fxsave::take_x87(cpu, &legacy, pointers),
        }
        cpu.xstate.settle_x87();
    }
    if let Some(mxcsr) = mxcsr {
        cpu.xstate.set_mxcsr(mxcsr);
    }
    for component in (1..COMPONENTS).filter(|i| requested & !present & 1 << i != 0) {
        initialise(cpu, component);
    }
    for (component, (at, size)) in (0..COMPONENTS).zip(loaded).filter_map(|(i, piece)| Some((i, piece?))) {
        let loaded = data.as_mut().map(|data| data.take(size));
        let Some(area) = cpu.xstate.component(component) else { continue };
        match (memory, loaded) {
            (Memory::Host(host), _) => host.read(at, &mut area[..size]),
            (_, Some(loaded)) => area[..size].copy_from_slice(loaded),
            _ => {}
        }
    }
    Ok(())
}

/// Components on their way from memory.
struct Loaded {
    data: [u8; LOADABLE],
    taken: usize,
}

/// Bytes of all components but x87.
const LOADABLE: usize = 256 + 256 + 64 + 512 + LARGEST;

impl Loaded {
    /// Reads them, each with its place and size.
    fn read(cpu: &mut Cpu, memory: &Memory, components: &[Option<(usize, usize)>]) -> Result<Self, Exception> {
        let mut loaded = Self { data: [0; LOADABLE], taken: 0 };
        let mut end = 0;
        for (component, (at, size)) in (0..).zip(components).filter_map(|(i, piece)| Some((i, (*piece)?))) {
            memory.read(cpu, at, unit(component), &mut loaded.data[end..end + size])?;
            end += size;
        }
        Ok(loaded)
    }

    /// The next one, of this size.
    fn take(&mut self, size: usize) -> &[u8] {
        let start = self.taken;
        self.taken += size;
        &self.data[start..self.taken]
    }
}

fn memory_mxcsr(legacy: &[u8; LEGACY_END]) -> u32 {
    let at = offset::MXCSR;
    u32::from_le_bytes([legacy[at], legacy[at + 1], legacy[at + 2], legacy[at + 3]])
}

/// Registers 8 and up are out of reach outside of 64-bit mode.
fn initialise(cpu: &mut Cpu, component: u32) {
    let Some(range) = Layout::host().range(component) else { return };
    let size = visible(cpu, component, range.len());
    if size == range.len() {
        cpu.xstate.initialise(component);
    } else if cpu.xstate.in_use() & 1 << component != 0 {
        cpu.xstate.area[range][..size].fill(0);
    }
}
