//! XSAVE, XSAVEOPT, XSAVEC and XRSTOR (SDM vol. 1 13.7 to 13.10).

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
    offset::{self, HEADER_END, LEGACY_END, XSTATE_BV},
};
use crate::{cpu::Cpu, exception::Exception, mem::Access, tlb::Privilege};

const COMPACTED: u64 = 1 << 63;
/// MXCSR belongs to both in the standard format.
const WITH_MXCSR: u64 = xcr0::SSE | xcr0::AVX;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Optimised,
    Compacted,
}

fn decode(insn: &Instruction) -> (Kind, Pointers) {
    match insn.mnemonic() {
        Mnemonic::Xsaveopt => (Kind::Optimised, Pointers::Bits32),
        Mnemonic::Xsaveopt64 => (Kind::Optimised, Pointers::Bits64),
        Mnemonic::Xsavec => (Kind::Compacted, Pointers::Bits32),
        Mnemonic::Xsavec64 => (Kind::Compacted, Pointers::Bits64),
        Mnemonic::Xsave64 | Mnemonic::Xrstor64 => (Kind::Plain, Pointers::Bits64),
        _ => (Kind::Plain, Pointers::Bits32),
    }
}

/// Address of the area, whose legacy region and header are checked, and the requested components.
fn operands(cpu: &mut Cpu, insn: &Instruction, access: Access) -> Result<(u64, u64), Exception> {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::UD);
    }
    checks::check_task_switched(cpu)?;
    let requested = cpu.xcr0 & (cpu.gpr[RAX] & 0xffff_ffff | cpu.gpr[RDX] << 32);
    let (segment, at) = cpu.effective_address(insn);
    let address = cpu.linear(segment, at, HEADER_END, access)?;
    if address & 63 != 0 { Err(Exception::GP0) } else { Ok((address, requested)) }
}

/// Checks that the segment holds the extended components too, up to byte `end` of the area.
fn check_whole_area(cpu: &mut Cpu, insn: &Instruction, end: usize, access: Access) -> Result<(), Exception> {
    let (segment, at) = cpu.effective_address(insn);
    cpu.linear(segment, at, end, access).map(drop)
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
        Self { offset, size, source: Source::Area(from) }
    }

    fn bytes(offset: usize, data: &[u8]) -> Self {
        let mut bytes = [0; offset::MXCSR];
        bytes[..data.len()].copy_from_slice(data);
        Self { offset, size: data.len(), source: Source::Bytes(bytes) }
    }

    /// Writes it into the area at `address`; its pages have been checked.
    fn write(&self, cpu: &mut Cpu, address: u64, privilege: Privilege) -> Result<(), Exception> {
        let (at, end) = (address.wrapping_add(self.offset as u64), self.size);
        match self.source {
            Source::Area(from) => {
                let mut buffer = [0; 256];
                for done in (0..end).step_by(buffer.len()) {
                    let part = &mut buffer[..(end - done).min(256)];
                    part.copy_from_slice(&cpu.xstate.area[from + done..][..part.len()]);
                    cpu.write_as(at.wrapping_add(done as u64), part, privilege)?;
                }
                Ok(())
            }
            Source::Bytes(bytes) => cpu.write_as(at, &bytes[..end], privilege),
            Source::Zeros => cpu.write_as(at, &[0; LARGEST][..end], privilege),
        }
    }
}

/// Bytes of the largest component.
const LARGEST: usize = 1024;

/// XSAVE, XSAVEOPT, XSAVEC.
pub fn xsave(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let (kind, pointers) = decode(insn);
    let offered = match kind {
        Kind::Plain => true,
        Kind::Optimised => cpu.features.xsaveopt,
        Kind::Compacted => cpu.features.xsavec,
    };
    if !offered {
        return Err(Exception::UD);
    }
    let (address, requested) = operands(cpu, insn, Access::Write)?;
    let privilege = cpu.privilege();

    let mut in_use = cpu.xstate.in_use();
    if kind == Kind::Compacted && cpu.xstate.mxcsr() != MXCSR_INIT {
        in_use |= xcr0::SSE;
    }
    let saved = if kind == Kind::Plain { requested } else { requested & in_use };
    let mut pieces = pieces(cpu, address, kind, pointers, requested, saved, privilege)?;
    pieces.push(match kind {
        Kind::Compacted => {
            let header = [in_use & requested, COMPACTED | requested].map(u64::to_le_bytes);
            Piece::bytes(XSTATE_BV, header.as_flattened())
        }
        _ => {
            let old: u64 = cpu.load(address.wrapping_add(XSTATE_BV as u64))?;
            let new = old & !requested | in_use & requested;
            Piece::bytes(XSTATE_BV, &new.to_le_bytes())
        }
    });
    let end = pieces.all().map(|piece| piece.offset + piece.size).max().unwrap_or(0);
    check_whole_area(cpu, insn, end, Access::Write)?;
    for piece in pieces.all() {
        cpu.probe(address.wrapping_add(piece.offset as u64), piece.size, Access::Write, privilege)?;
    }
    for piece in pieces.all() {
        piece.write(cpu, address, privilege)?;
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
    address: u64,
    kind: Kind,
    pointers: Pointers,
    requested: u64,
    saved: u64,
    privilege: Privilege,
) -> Result<Pieces, Exception> {
    let mut pieces = Pieces::default();
    if saved & xcr0::X87 != 0 {
        let mut control = [0; offset::MXCSR];
        cpu.read_as(address, &mut control, privilege)?;
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
        pieces.push(Piece { offset: target.start, size, source });
    }
    Ok(pieces)
}

/// XRSTOR, from both formats.
pub fn xrstor(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    let (_, pointers) = decode(insn);
    let (address, requested) = operands(cpu, insn, Access::Read)?;
    let privilege = cpu.privilege();
    let mut header = [0; HEADER_END - LEGACY_END];
    cpu.read_as(address.wrapping_add(LEGACY_END as u64), &mut header, privilege)?;
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
    cpu.read_as(address, &mut legacy, privilege)?;
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
        check_whole_area(cpu, insn, source.start + size, Access::Read)?;
        let at = address.wrapping_add(source.start as u64);
        cpu.probe(at, size, Access::Read, privilege)?;
        loaded[component as usize] = Some((at, size));
    }
    let mut data = [0; LOADABLE];
    let mut read = 0;
    for (at, size) in loaded.into_iter().flatten() {
        cpu.read_as(at, &mut data[read..read + size], privilege)?;
        read += size;
    }

    if requested & xcr0::X87 != 0 {
        match present & xcr0::X87 {
            0 => cpu.xstate.initialise(0),
            _ => fxsave::take_x87(cpu, &legacy, pointers),
        }
    }
    if let Some(mxcsr) = mxcsr {
        cpu.xstate.set_mxcsr(mxcsr);
    }
    for component in (1..COMPONENTS).filter(|i| requested & !present & 1 << i != 0) {
        initialise(cpu, component);
    }
    let mut data = &data[..];
    for (component, (_, size)) in (0..COMPONENTS).zip(loaded).filter_map(|(i, piece)| Some((i, piece?))) {
        let (bytes, rest) = data.split_at(size);
        data = rest;
        if let Some(area) = cpu.xstate.component(component) {
            area[..size].copy_from_slice(bytes);
        }
    }
    Ok(())
}

/// Bytes of all components but x87.
const LOADABLE: usize = 256 + 256 + 64 + 512 + LARGEST;

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
