//! Two outcomes of a case, held against each other.

use iced_x86::{Decoder, EncodingKind, Instruction, Mnemonic, OpKind, Register, RflagsBits};
use purlin_arch::x86_64::regs::rflags;
use purlin_engine_translator::{exception::vector, translate::source::DECODER_OPTIONS};

use crate::{
    case::{Case, Fault, Outcome},
    generate::hidden::gives_something_else,
    host::{is_amd, is_amd_before_zen_5},
    layout::{CODE_BYTES, PAGE, code_base, code_offset, in_code},
    segments::{CODE64, DATA32},
    translated::Step,
    xsave::{COMPONENTS, at},
};

/// The status flags, in RFLAGS' bits.
pub const STATUS: u64 = rflags::STATUS;

/// What the SDM leaves open in a case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Open {
    /// Status flags that are undefined at the end.
    pub flags: u64,
    /// An instruction has read an undefined flag, or has given a result that is its own each time and was not thrown
    /// away: anything may differ.
    pub consumed: bool,
}

/// Follows the executed instructions: which flags each leaves undefined, and whether one reads such a flag.
///
/// `trapped`: the case was ended by a trap behind its last instruction.
pub fn open(case: &Case, steps: &[Step], trapped: bool) -> Open {
    let mut open = Open::default();
    let mut steps = steps.iter().peekable();
    while let Some(step) = steps.next() {
        open.consumed |= decode(case, step.rip, step.bits).is_some_and(|insn| copies_onto_itself(&insn, step));
        // The last one raised the exception, or was not even there.
        let again = |next: &&Step| next.rip == step.rip && next.gpr == step.gpr;
        if steps.peek().is_some_and(again) || steps.peek().is_none() && !trapped {
            continue;
        }
        let Some(insn) = decode(case, step.rip, step.bits) else { continue };
        let next = steps.peek().and_then(|next| decode(case, next.rip, next.bits));
        open.consumed |= gives_something_else(insn.mnemonic()) && next.is_none_or(|n| n.mnemonic() != Mnemonic::Mov);
        if status(insn.rflags_read()) & open.flags != 0 {
            open.consumed = true;
        }
        if leaves_flags(&insn, step) {
            continue;
        }
        let undefined = status(insn.rflags_undefined()) | undefined_by_count(&insn, step) | by_chance(&insn);
        open.flags = open.flags & !status(insn.rflags_modified()) | undefined;
    }
    open
}

/// A REP MOVS whose source and target are the same memory at different addresses, fewer bytes apart than it moves at once: what
/// comes of that is the processor's (SDM vol. 1 7.3.9.3).
fn copies_onto_itself(insn: &Instruction, step: &Step) -> bool {
    const AT_ONCE: u64 = 64;
    let moves = matches!(insn.mnemonic(), Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq);
    let (source, target) = (step.gpr[6], step.gpr[7]);
    let distance = target.wrapping_sub(source) & (PAGE - 1);
    let near = !(AT_ONCE..=PAGE - AT_ONCE).contains(&distance);
    moves && insn.is_string_instruction() && insn.has_rep_prefix() && near && (source ^ target) >= PAGE
}

/// The instruction of `case` at `rip`, in code of `bits`.
pub fn decode(case: &Case, rip: u64, bits: u32) -> Option<Instruction> {
    let offset = in_code(rip)?.checked_sub(code_offset(case.entry))? as usize;
    let bytes = case.code.get(offset..).filter(|b| !b.is_empty())?;
    let insn = Decoder::with_ip(bits, bytes, rip, *DECODER_OPTIONS).decode();
    (!insn.is_invalid()).then_some(insn)
}

/// iced's flag bits as RFLAGS' bits.
fn status(bits: u32) -> u64 {
    let pairs = [
        (RflagsBits::OF, rflags::OF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
    ];
    pairs.iter().filter(|(iced, _)| bits & iced != 0).fold(0, |all, (_, flag)| all | flag)
}

/// The masked count of a shift or rotate.
fn count(insn: &Instruction, step: &Step) -> Option<u32> {
    use Mnemonic::*;
    if !matches!(insn.mnemonic(), Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd) {
        return None;
    }
    let last = insn.op_count() - 1;
    let count = match insn.op_kind(last) {
        OpKind::Immediate8 => u32::from(insn.immediate8()),
        _ if insn.op_register(last) == Register::CL => step.gpr[1] as u32 & 0xff,
        _ => 1,
    };
    Some(count & if operand_bits(insn) == 64 { 63 } else { 31 })
}

fn operand_bits(insn: &Instruction) -> u32 {
    match insn.op0_kind() {
        OpKind::Register => insn.op0_register().size() as u32 * 8,
        _ => insn.memory_size().size() as u32 * 8,
    }
}

/// A shift by nothing changes no flags.
fn leaves_flags(insn: &Instruction, step: &Step) -> bool {
    let repeats = insn.is_string_instruction() && (insn.has_rep_prefix() || insn.has_repne_prefix());
    let nothing = || match insn.op_kinds().any(|k| matches!(k, OpKind::MemoryESEDI | OpKind::MemorySegESI)) {
        true => step.gpr[1] as u32 == 0,
        false => step.gpr[1] == 0,
    };
    count(insn, step) == Some(0) || repeats && nothing()
}

/// SHL and SHR by more than the operand's size leave CF undefined; SHLD and SHRD everything (SDM vol. 2).
fn undefined_by_count(insn: &Instruction, step: &Step) -> u64 {
    let Some(count) = count(insn, step) else { return 0 };
    match insn.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr if count >= operand_bits(insn) => rflags::CF,
        Mnemonic::Shld | Mnemonic::Shrd if count > operand_bits(insn) => STATUS,
        Mnemonic::Rol | Mnemonic::Ror | Mnemonic::Rcl | Mnemonic::Rcr if count != 1 => rflags::OF,
        _ => 0,
    }
}

/// CF of RDRAND and RDSEED: whether there was a number. A loop of RDSEEDs soon finds none.
fn by_chance(insn: &Instruction) -> u64 {
    if matches!(insn.mnemonic(), Mnemonic::Rdrand | Mnemonic::Rdseed) { rflags::CF } else { 0 }
}

/// What may be left out of a comparison.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ignore {
    /// Status flags.
    pub flags: u64,
    /// The x87's last-instruction pointers: AMD's processors save them only while an exception waits.
    pub pointers: bool,
}

/// Whether it is one of the differences that are known, and left so. Processors have instructions of many accesses
/// whose order, and what they leave behind at a fault, is in no manual:
/// - POPA loads registers before it faults, PUSHA stores before it looks at the limit;
/// - ENTER, compressed and expanded moves, and AMD's MASKMOV before Zen 5, check alignment or not; to Intel's an expanded load
///   may be beyond the segment though what it loads is not;
/// - gathers and scatters are single-stepped by the element, AVX-512 gathers clear what is above their result or do not;
/// - FXSAVE and FXRSTOR, FNSAVE and FRSTOR, XSAVE and XRSTOR begin in the middle or at the end; FNSAVE, FRSTOR and the like
///   check alignment or not, and go on at the other end of a segment of 4 GiB;
/// - far RET and IRET read what is higher up on the stack first, the outer level's stack before they look at CS, and
///   check RIP before SS;
/// - far CALL from 64-bit code to other code has a stack of 32 bits already, and pushes before it checks RIP;
/// - XSAVE tries all of its area, even where nothing is to be saved;
/// - XSAVE and XRSTOR check their own alignment before the segment's limit and #AC's;
/// - AMD's processors before Zen 5 refuse XSAVE and XRSTOR an area that goes on behind 4 GiB, where others go on at the segment's
///   beginning, and let VEX's masked moves do that, which Zen 5 refuses;
/// - Intel's have stored the elements of an AVX-512 masked store before the one that is beyond the segment;
/// - which of CMPS's two operands faults first depends on the processor's generation: of REPE CMPSB, on AMD's before Zen 5.
pub fn known(case: &Case, native: &Outcome, translated: &Outcome) -> bool {
    use Mnemonic::*;
    let place = |o: &Outcome| (o.rip, o.fault.vector, o.fault.address);
    let same_fault = place(native) == place(translated);
    let same_place = native.rip == translated.rip;
    let checks_alignment = (case.rflags | native.rflags | translated.rflags) & rflags::AC != 0;
    let either = |vectors: [u8; 2]| [native, translated].iter().any(|o| vectors.contains(&o.fault.vector));
    let peculiar = |insn: Instruction| match insn.mnemonic() {
        Pusha | Pushad | Fxsave | Fxsave64 | Fxrstor | Fxrstor64 => same_place,
        Fnsave | Frstor | Fnstenv | Fldenv => {
            let refused = matches!(translated.fault.vector, vector::SS | vector::GP);
            checks_alignment || same_place && either([vector::SS, vector::PF]) || case.bits != 64 && refused
        }
        Xsave | Xsave64 | Xsavec | Xsavec64 | Xsaveopt | Xsaveopt64 | Xrstor | Xrstor64 => {
            let alignment = || same_place && either([vector::GP, vector::AC]);
            let refused = || is_amd_before_zen_5() && case.bits != 64 && native.fault.vector == vector::GP;
            native.fault.vector == vector::PF
                || same_place && either([vector::SS, vector::PF])
                || alignment()
                || refused()
        }
        Retf | Iret | Iretd | Iretq => {
            let no_selector = || native.fault.error == 0 || translated.fault.error == 0;
            same_place && (either([vector::SS, vector::PF]) || either([vector::GP; 2]) && no_selector())
        }
        Call if insn.is_call_far() || insn.is_call_far_indirect() => {
            let pushed = || translated.fault.vector == vector::GP && translated.fault.error == 0;
            let low = || (native.fault.address ^ translated.fault.address) as u32 == 0 && either([vector::PF; 2]);
            let no_address = case.bits == 64 && translated.fault.vector == vector::SS;
            same_place && (low() || pushed() || no_address)
        }
        Maskmovq | Maskmovdqu | Vmaskmovdqu => is_amd() && (checks_alignment || same_place),
        Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq => {
            let refused = matches!(translated.fault.vector, vector::SS | vector::GP);
            is_amd_before_zen_5() && case.bits != 64 && refused
        }
        Vcompresspd | Vcompressps | Vpcompressb | Vpcompressd | Vpcompressq | Vpcompressw => checks_alignment,
        Vexpandpd | Vexpandps | Vpexpandb | Vpexpandd | Vpexpandq | Vpexpandw => {
            checks_alignment || !is_amd() && same_place && either([vector::SS, vector::GP])
        }
        Cmpsb | Cmpsw | Cmpsd | Cmpsq => {
            let faulted = |o: &Outcome| matches!(o.fault.vector, 12..=14);
            is_amd() && same_place && faulted(native) && faulted(translated)
        }
        Enter => checks_alignment || same_fault,
        Popa | Popad => same_fault,
        _ if !insn.is_vsib() => {
            let stores = insn.op_mask() != Register::None && insn.op0_kind() == OpKind::Memory;
            !is_amd() && stores && same_fault && either([vector::SS, vector::GP])
        }
        _ => native.fault.vector == 1 || insn.encoding() == EncodingKind::EVEX && same_fault,
    };
    [native.rip, translated.rip].into_iter().filter_map(|rip| decode(case, rip, case.bits)).any(peculiar)
}

/// The differences, a line each: none if the outcomes agree.
pub fn differences(case: &Case, native: &Outcome, translated: &Outcome, ignore: Ignore) -> Vec<String> {
    let mut found = Vec::new();
    let mut differ = |what: &str, native: u64, translated: u64| {
        if native != translated {
            found.push(format!("{what}: native {native:#x}, translated {translated:#x}"));
        }
    };
    differ("vector", native.fault.vector.into(), translated.fault.vector.into());
    // Linux does not tell whether addresses are mapped that are not for users: from the last page of their half on.
    let kernel = native.fault.address >= (1 << 47) - PAGE;
    let told = if kernel { !1 } else { !0 };
    differ("error code", (native.fault.error & told).into(), (translated.fault.error & told).into());
    differ("fault address", native.fault.address, translated.fault.address);
    differ("rip", native.rip, translated.rip);
    for (name, (a, b)) in SEGMENTS.iter().zip(native.selectors.iter().zip(&translated.selectors)) {
        differ(name, not_null(*a).into(), not_null(*b).into());
    }
    differ("fs base", native.bases[0], translated.bases[0]);
    differ("gs base", native.bases[1], translated.bases[1]);
    let (count, mask) = if case.bits == 64 { (16, u64::MAX) } else { (8, u64::from(u32::MAX)) };
    for (name, (a, b)) in NAMES.iter().zip(native.gpr.iter().zip(&translated.gpr)).take(count) {
        // Code that is not of 64 bits leaves open what is above 32 bits (SDM vol. 1 3.4.1.1).
        // A stack of 16 bits has its part of the stack pointer only.
        let mask = match (*name, native.selectors[1], native.selectors[2]) {
            ("rsp", CODE64, DATA32) => mask,
            ("rsp", CODE64, _) => 0xffff,
            ("rsp", ..) => u64::from(u32::MAX),
            _ => mask,
        };
        differ(name, a & mask, b & mask);
    }
    let flags = (STATUS | rflags::DF | rflags::AC | rflags::NT) & !ignore.flags;
    differ("rflags", native.rflags & flags, translated.rflags & flags);

    let (a, b) = (&native.area, &translated.area);
    differ("fcw", a.u16(at::FCW).into(), b.u16(at::FCW).into());
    differ("fsw", a.u16(at::FSW).into(), b.u16(at::FSW).into());
    differ("ftw", a.0[at::FTW].into(), b.0[at::FTW].into());
    differ("mxcsr", a.u32(at::MXCSR).into(), b.u32(at::MXCSR).into());
    if !ignore.pointers {
        differ("fop", a.u16(at::FOP).into(), b.u16(at::FOP).into());
        differ("fip", a.u64(at::FIP), b.u64(at::FIP));
        differ("fdp", a.u64(at::FDP), b.u64(at::FDP));
    }
    for i in 0..8 {
        let at = at::ST + 16 * i;
        differ(&format!("st{i} mantissa"), a.u64(at), b.u64(at));
        differ(&format!("st{i} exponent"), a.u16(at + 8).into(), b.u16(at + 8).into());
    }
    let mut words = |name: &str, offset: usize, size: usize| {
        for at in (offset..offset + size).step_by(8) {
            if a.u64(at) != b.u64(at) {
                differ(&format!("{name}+{:#x}", at - offset), a.u64(at), b.u64(at));
            }
        }
    };
    words("xmm", at::XMM, 256);
    for c in COMPONENTS.iter() {
        words(c.name, c.offset, c.size);
    }
    if native.memory != translated.memory {
        let at = native.memory.iter().zip(&translated.memory).position(|(a, b)| a != b).unwrap_or(0);
        differ(&format!("data+{at:#x}"), native.memory[at].into(), translated.memory[at].into());
    }
    found
}

/// Null selectors are alike: the way back to user code makes 0 of them all (SDM vol. 2, IRET).
fn not_null(selector: u16) -> u16 {
    if selector & !3 == 0 { 0 } else { selector }
}

const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];
const NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// How `outcome` ended, in words.
pub fn ending(outcome: &Outcome) -> String {
    let Fault { vector, error, address } = outcome.fault;
    format!("natively it ends by vector {vector} (error code {error:#x}, address {address:#x}) at {:#x}", outcome.rip)
}

/// Whether the case ended by running into the hole behind the code.
pub fn ran_through(case: &Case, outcome: &Outcome) -> bool {
    let end = outcome.fault.address == outcome.rip && outcome.rip == code_base(case.entry) + CODE_BYTES as u64;
    outcome.fault.vector == 14 && end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xsave::Area;

    fn outcome() -> Outcome {
        let fault = Fault { vector: 14, error: 6, address: 0x1000_5000 };
        Outcome {
            gpr: [7; 16],
            rip: 0x2000_1000,
            rflags: 0x246,
            selectors: [7; 6],
            bases: [7; 2],
            fault,
            area: Area::default(),
            memory: vec![0; 64],
        }
    }

    fn case(code: &[u8]) -> Case {
        let (gpr, entry) = ([7; 16], 0x2000_1000);
        Case { bits: 64, ss: 0x2b, entry, code: code.to_vec(), gpr, rflags: 0x202, vectors: 0, memory: 0 }
    }

    fn changed(change: impl Fn(&mut Outcome)) -> Vec<String> {
        let mut other = outcome();
        change(&mut other);
        differences(&case(&[0x90]), &outcome(), &other, Ignore { flags: rflags::AF, pointers: false })
    }

    #[test]
    fn every_difference_is_found() {
        assert_eq!(changed(|_| {}), Vec::<String>::new());
        assert_eq!(changed(|o| o.rflags ^= rflags::AF | rflags::RF), Vec::<String>::new());
        type Change = (&'static str, fn(&mut Outcome));
        let changes: [Change; 14] = [
            ("vector", |o| o.fault.vector = 13),
            ("error code", |o| o.fault.error = 7),
            ("fault address", |o| o.fault.address += 1),
            ("rip", |o| o.rip += 1),
            ("ds", |o| o.selectors[3] = 0),
            ("gs base", |o| o.bases[1] = 0),
            ("r15", |o| o.gpr[15] ^= 1 << 63),
            ("rflags", |o| o.rflags ^= rflags::OF),
            ("mxcsr", |o| o.area.0[at::MXCSR] = 1),
            ("fdp", |o| o.area.0[at::FDP] = 1),
            ("st7 exponent", |o| o.area.0[at::ST + 16 * 7 + 9] = 1),
            ("xmm+0xf8", |o| o.area.0[at::XMM + 0xff] = 1),
            ("ymm-high+0x0", |o| o.area.0[COMPONENTS[0].offset] = 1),
            ("data+0x3f", |o| o.memory[63] = 1),
        ];
        for (name, change) in changes {
            let lines = changed(change);
            assert_eq!(lines.len(), 1, "{name}: {lines:?}");
            assert!(lines[0].starts_with(&format!("{name}:")), "{lines:?}");
        }
    }

    #[test]
    fn undefined_flags_are_followed() {
        let step = |offset, rcx| Step {
            bits: 64,
            rip: 0x2000_1000u64 + offset,
            rflags: 0,
            bases: [0; 6],
            gpr: std::array::from_fn(|i| if i == 1 { rcx } else { 7 }),
        };
        // imul eax, eax: SF, ZF, AF and PF; then an end.
        let imul = case(&[0x0f, 0xaf, 0xc0, 0xd3, 0xe0]);
        let undefined = rflags::SF | rflags::ZF | rflags::AF | rflags::PF;
        assert_eq!(open(&imul, &[step(0, 0), step(3, 0)], false).flags, undefined);
        // shl eax, cl: by 0 nothing changes; by 3 AF and OF are undefined, the others are written.
        assert_eq!(open(&imul, &[step(0, 0), step(3, 0), step(5, 0)], false).flags, undefined);
        assert_eq!(open(&imul, &[step(0, 3), step(3, 3), step(5, 3)], false).flags, rflags::AF | rflags::OF);
        // rdseed ecx: CF by chance.
        let random = case(&[0x0f, 0xc7, 0xf9, 0x90]);
        assert_eq!(open(&random, &[step(0, 0), step(3, 0)], false).flags, rflags::CF);
        // jz reads ZF.
        let jump = case(&[0x0f, 0xaf, 0xc0, 0x74, 0x00]);
        assert!(open(&jump, &[step(0, 0), step(3, 0), step(5, 0)], false).consumed);
        assert!(!open(&jump, &[step(3, 0), step(5, 0)], false).consumed);
    }
}
