//! FNSTENV, FLDENV, FNSAVE and FRSTOR: the x87 environment in its four formats (SDM vol. 1 8.1.10), kept by hand
//! because its instruction and data pointers are the guest's.

use iced_x86::{Code, Instruction};

use super::{FCW_INIT, XState, checks, offset};
use crate::{cpu::Cpu, exception::Exception, mem::Access};

/// Bits of the status word: exceptions, their summary, busy.
const FSW_EXCEPTIONS: u16 = 0x3f;
const FSW_ES: u16 = 1 << 7;
const FSW_BUSY: u16 = 1 << 15;

/// The environment: 14 or 28 bytes, with linear pointers in real mode, selectors and offsets in protected
/// mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Format {
    wide: bool,
    protected: bool,
}

impl Format {
    fn size(self) -> usize {
        if self.wide { 28 } else { 14 }
    }
}

/// The registers that an environment holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Environment {
    fcw: u16,
    fsw: u16,
    /// The full tag word: two bits a register.
    tags: u16,
    fip: u64,
    fdp: u64,
    fop: u16,
    fcs: u16,
    fds: u16,
}

/// FNSTENV, FLDENV, FNSAVE, FRSTOR.
pub fn execute(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Exception> {
    checks::check_x87(cpu, insn)?;
    if !cpu.features.amd {
        cpu.xstate.settle_pointers();
    }
    let format = |wide| Format { wide, protected: cpu.protected() && !cpu.v86() };
    match insn.code() {
        Code::Fnstenv_m14byte | Code::Fstenv_m14byte => store_environment(cpu, insn, format(false)),
        Code::Fnstenv_m28byte | Code::Fstenv_m28byte => store_environment(cpu, insn, format(true)),
        Code::Fldenv_m14byte => load_environment(cpu, insn, format(false)),
        Code::Fldenv_m28byte => load_environment(cpu, insn, format(true)),
        Code::Fnsave_m94byte | Code::Fsave_m94byte => save(cpu, insn, format(false)),
        Code::Fnsave_m108byte | Code::Fsave_m108byte => save(cpu, insn, format(true)),
        Code::Frstor_m94byte => restore(cpu, insn, format(false)),
        Code::Frstor_m108byte => restore(cpu, insn, format(true)),
        _ => Err(Exception::UD),
    }
}

/// Eight registers of ten bytes follow the environment in FNSAVE's image.
const REGISTERS: usize = 80;

fn store_environment(cpu: &mut Cpu, insn: &Instruction, format: Format) -> Result<(), Exception> {
    let mut image = [0; 28];
    let image = &mut image[..format.size()];
    Environment::of(&mut cpu.xstate).encode(format, image);
    write(cpu, insn, image)?;
    // It masks all exceptions for the handler that is to look at what it stored.
    let fcw = cpu.xstate.u16(offset::FCW) | 0x3f;
    cpu.xstate.set_u16(offset::FCW, fcw);
    update_summary(&mut cpu.xstate);
    Ok(())
}

fn load_environment(cpu: &mut Cpu, insn: &Instruction, format: Format) -> Result<(), Exception> {
    checks::check_pending_x87(cpu)?;
    let mut image = [0; 28];
    let image = &mut image[..format.size()];
    read(cpu, insn, image)?;
    Environment::decode(format, image).load(cpu);
    Ok(())
}

fn save(cpu: &mut Cpu, insn: &Instruction, format: Format) -> Result<(), Exception> {
    let mut image = [0; 28 + REGISTERS];
    let image = &mut image[..format.size() + REGISTERS];
    Environment::of(&mut cpu.xstate).encode(format, image);
    for (i, register) in image[format.size()..].chunks_mut(10).enumerate() {
        let at = offset::ST + 16 * i;
        register.copy_from_slice(&cpu.xstate.area[at..at + 10]);
    }
    write(cpu, insn, image)?;
    fninit(&mut cpu.xstate);
    Ok(())
}

fn restore(cpu: &mut Cpu, insn: &Instruction, format: Format) -> Result<(), Exception> {
    checks::check_pending_x87(cpu)?;
    let mut image = [0; 28 + REGISTERS];
    let image = &mut image[..format.size() + REGISTERS];
    read(cpu, insn, image)?;
    Environment::decode(format, image).load(cpu);
    for (i, register) in image[format.size()..].chunks(10).enumerate() {
        let at = offset::ST + 16 * i;
        cpu.xstate.area[at..at + 10].copy_from_slice(register);
        cpu.xstate.area[at + 10..at + 16].fill(0);
    }
    Ok(())
}

fn write(cpu: &mut Cpu, insn: &Instruction, image: &[u8]) -> Result<(), Exception> {
    let (segment, offset) = cpu.effective_address(insn);
    let address = cpu.linear(segment, offset, image.len(), Access::Write)?;
    cpu.write_as(address, image, cpu.privilege())
}

fn read(cpu: &mut Cpu, insn: &Instruction, image: &mut [u8]) -> Result<(), Exception> {
    let (segment, offset) = cpu.effective_address(insn);
    let address = cpu.linear(segment, offset, image.len(), Access::Read)?;
    cpu.read_as(address, image, cpu.privilege())
}

/// FNINIT: the data registers stay, all tagged empty.
fn fninit(state: &mut XState) {
    state.materialise(0);
    state.set_top(0);
    state.area[..offset::MXCSR].fill(0);
    state.set_u16(offset::FCW, FCW_INIT);
    state.clear_pointers();
}

/// ES and B follow from the exceptions that are set and not masked.
fn update_summary(state: &mut XState) {
    let (fcw, fsw) = (state.u16(offset::FCW), state.u16(offset::FSW));
    let waiting = fsw & !fcw & FSW_EXCEPTIONS != 0;
    let summary = if waiting { FSW_ES | FSW_BUSY } else { 0 };
    state.set_u16(offset::FSW, fsw & !(FSW_ES | FSW_BUSY) | summary);
}

impl Environment {
    fn of(state: &mut XState) -> Self {
        state.materialise(0);
        Self {
            fcw: state.u16(offset::FCW),
            fsw: state.u16(offset::FSW),
            tags: full_tags(state),
            fip: state.fip,
            fdp: state.fdp,
            fop: state.fop as u16 & 0x7ff,
            fcs: state.fcs,
            fds: state.fds,
        }
    }

    fn load(self, cpu: &mut Cpu) {
        let state = &mut cpu.xstate;
        state.materialise(0);
        state.set_top(self.fsw >> 11);
        state.set_u16(offset::FCW, self.fcw & 0x1f3f | 0x40);
        state.set_u16(offset::FSW, self.fsw);
        state.area[offset::FTW] = (0..8).filter(|i| self.tags >> (2 * i) & 3 != 3).fold(0, |used, i| used | 1 << i);
        state.set_pointers(self.fip, self.fdp, self.fop.into());
        (state.fcs, state.fds) = if cpu.features.no_pointer_selectors { (0, 0) } else { (self.fcs, self.fds) };
        update_summary(state);
    }

    /// Writes the first 14 or 28 bytes of `image`.
    fn encode(&self, format: Format, image: &mut [u8]) {
        let (fip, fdp) = (self.fip as u32, self.fdp as u32);
        let words = match (format.wide, format.protected) {
            (true, true) => [fip, u32::from(self.fcs) | u32::from(self.fop) << 16, fdp, u32::from(self.fds)],
            (false, true) => [fip, self.fcs.into(), fdp, self.fds.into()],
            (true, false) => [
                fip & 0xffff,
                fip >> 16 << 12 & 0x0fff_f000 | u32::from(self.fop),
                fdp & 0xffff,
                fdp >> 16 << 12 & 0x0fff_f000,
            ],
            (false, false) => [fip, fip >> 4 & 0xf000 | u32::from(self.fop), fdp, fdp >> 4 & 0xf000],
        };
        let words = [u32::from(self.fcw), u32::from(self.fsw), u32::from(self.tags)].into_iter().chain(words);
        if format.wide {
            // The unused upper halves are stored as ones.
            let unused = [true, true, true, !format.protected, false, !format.protected, format.protected];
            for (i, (word, unused)) in words.zip(unused).enumerate() {
                let word = if unused { word | 0xffff_0000 } else { word };
                image[4 * i..4 * i + 4].copy_from_slice(&word.to_le_bytes());
            }
        } else {
            for (i, word) in words.enumerate() {
                image[2 * i..2 * i + 2].copy_from_slice(&(word as u16).to_le_bytes());
            }
        }
    }

    fn decode(format: Format, image: &[u8]) -> Self {
        let half = |at: usize| u32::from(u16::from_le_bytes([image[at], image[at + 1]]));
        let word = |i: usize| match format.wide {
            true => half(4 * i) | half(4 * i + 2) << 16,
            false => half(2 * i),
        };
        let upper = |value: u32| if format.wide { value >> 12 << 16 } else { value >> 12 << 16 & 0xf_0000 };
        let (fip, fdp, fop) = match (format.wide, format.protected) {
            (true, true) => (word(3), word(5), word(4) >> 16),
            (false, true) => (word(3), word(5), 0),
            (_, false) => (word(3) & 0xffff | upper(word(4)), word(5) & 0xffff | upper(word(6)), word(4)),
        };
        Self {
            fcw: word(0) as u16,
            fsw: word(1) as u16,
            tags: word(2) as u16,
            fip: u64::from(fip),
            fdp: u64::from(fdp),
            fop: fop as u16 & 0x7ff,
            fcs: if format.protected { word(4) as u16 } else { 0 },
            fds: if format.protected { word(6) as u16 } else { 0 },
        }
    }
}

/// The full tag word: 0 valid, 1 zero, 2 special (NaN, infinity, denormal, unsupported), 3 empty.
fn full_tags(state: &XState) -> u16 {
    let top = usize::from(state.u16(offset::FSW) >> 11 & 7);
    let mut tags = 0;
    for physical in 0..8 {
        let tag = if state.area[offset::FTW] & 1 << physical == 0 {
            3
        } else {
            let at = offset::ST + 16 * ((physical + 8 - top) & 7);
            register_tag(&state.area[at..at + 10])
        };
        tags |= tag << (2 * physical);
    }
    tags
}

fn register_tag(register: &[u8]) -> u16 {
    let mantissa = u64::from_le_bytes(register[..8].try_into().unwrap_or_default());
    let exponent = u16::from_le_bytes([register[8], register[9]]) & 0x7fff;
    match (exponent, mantissa) {
        (0, 0) => 1,
        (0 | 0x7fff, _) => 2,
        (_, mantissa) if mantissa >> 63 == 0 => 2,
        _ => 0,
    }
}
