//! The probe guest: code for ring 0 in long mode, and the state in which it begins.
#![allow(unsafe_code, reason = "guest code is assembled here, and read as bytes")]

use std::{arch::global_asm, slice};

use purlin_arch::x86_64::{
    cpuid::CpuidEntry,
    regs::{cr0, cr4, efer, gpr, rflags, seg, xcr0},
    state::{Segment, Table, VcpuState},
};
use purlin_engine::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// Ports that the guest writes to before and after each round of the loop.
pub(super) const ROUND_BEGINS: u16 = 0x10;
pub(super) const ROUND_ENDS: u16 = 0x11;

/// Iterations of a round: what an interpreter takes some 50 ms for, and a processor 20 µs.
pub(super) const ITERATIONS: u32 = 50_000;

// Steps, in the order in which the guest goes through them.
const STEP_INT3: u8 = 1;
const STEP_CMPXCHG16B: u8 = 2;
const STEP_XSAVE: u8 = 3;
const STEP_SMAP: u8 = 4;
const STEP_INVPCID: u8 = 5;
const STEP_LOOP: u8 = 6;

// Features in EDI.
const HAS_CMPXCHG16B: u32 = 1 << 0;
const HAS_XSAVE: u32 = 1 << 1;
const HAS_SMAP: u32 = 1 << 2;
const HAS_INVPCID: u32 = 1 << 3;

// RSI points to the scratch page: the step at 0, a 16-byte operand at 64, a zero INVPCID descriptor at 80, an XSAVE
// area at 128.
global_asm!(
    ".pushsection .rodata.purlin_probe, \"a\"",
    "purlin_probe_guest:",
    "mov byte ptr [rsi], {int3}",
    "int3",
    "mov byte ptr [rsi], {cmpxchg16b}",
    "test edi, {has_cmpxchg16b}",
    "jz 2f",
    "xor eax, eax",
    "xor edx, edx",
    "lock cmpxchg16b [rsi + 64]",
    "2:",
    "mov byte ptr [rsi], {xsave}",
    "test edi, {has_xsave}",
    "jz 3f",
    "mov eax, 3",
    "xor edx, edx",
    "xsave [rsi + 128]",
    "xrstor [rsi + 128]",
    "3:",
    "mov byte ptr [rsi], {smap}",
    "test edi, {has_smap}",
    "jz 4f",
    "stac",
    "clac",
    "4:",
    "mov byte ptr [rsi], {invpcid}",
    "test edi, {has_invpcid}",
    "jz 5f",
    "mov eax, 2", // all contexts
    "invpcid rax, [rsi + 80]",
    "5:",
    "mov byte ptr [rsi], {rounds}",
    "6:",
    "out {begins}, al",
    "mov ecx, {iterations}",
    "7:",
    "dec ecx",
    "jnz 7b",
    "out {ends}, al",
    "jmp 6b",
    "purlin_probe_breakpoint:",
    "iretq",
    "purlin_probe_end:",
    ".popsection",
    int3 = const STEP_INT3,
    cmpxchg16b = const STEP_CMPXCHG16B,
    xsave = const STEP_XSAVE,
    smap = const STEP_SMAP,
    invpcid = const STEP_INVPCID,
    rounds = const STEP_LOOP,
    has_cmpxchg16b = const HAS_CMPXCHG16B,
    has_xsave = const HAS_XSAVE,
    has_smap = const HAS_SMAP,
    has_invpcid = const HAS_INVPCID,
    begins = const ROUND_BEGINS,
    ends = const ROUND_ENDS,
    iterations = const ITERATIONS,
);

unsafe extern "C" {
    static purlin_probe_guest: u8;
    static purlin_probe_breakpoint: u8;
    static purlin_probe_end: u8;
}

/// The guest's bytes, and the offset of its breakpoint handler.
fn code() -> (&'static [u8], u64) {
    let start = &raw const purlin_probe_guest;
    let handler = (&raw const purlin_probe_breakpoint) as u64 - start as u64;
    let length = (&raw const purlin_probe_end) as usize - start as usize;
    // SAFETY: the labels delimit constant bytes that the assembler laid down above.
    (unsafe { slice::from_raw_parts(start, length) }, handler)
}

/// The same loop on the host, in ring 3.
pub(super) fn native_round() {
    // SAFETY: counts a register down; touches nothing else.
    unsafe {
        std::arch::asm!("2:", "dec {0:e}", "jnz 2b", inout(reg) ITERATIONS => _, options(nomem, nostack));
    }
}

// Where things are in guest memory, all within the first 2 MiB, which one large page maps.
const PML4: u64 = 0x2000;
const PDPT: u64 = 0x3000;
const DIRECTORY: u64 = 0x4000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const CODE: u64 = 0x7000;
const SCRATCH: u64 = 0x8000;
const STACK_TOP: u64 = 0xb000;

/// Size of guest memory.
pub(super) const MEMORY: u64 = 2 << 20;

const CODE_SELECTOR: u16 = 8;
const DATA_SELECTOR: u16 = 16;

/// Writes the guest, its page tables and its descriptors.
pub(super) fn load(memory: &GuestRam) -> Result<(), GuestMemoryError> {
    let put = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at));
    let (present_writable, large) = (3, 1 << 7);
    put(PML4, PDPT | present_writable)?;
    put(PDPT, DIRECTORY | present_writable)?;
    put(DIRECTORY, present_writable | large)?;
    // IRETQ reads the descriptors (SDM vol. 3A 3.4.5): flat 64-bit code, flat data.
    put(GDT + u64::from(CODE_SELECTOR), 0x00af_9b00_0000_ffff)?;
    put(GDT + u64::from(DATA_SELECTOR), 0x00cf_9300_0000_ffff)?;

    let (code, breakpoint) = code();
    memory.write_slice(code, GuestAddress(CODE))?;
    // A 64-bit interrupt gate for vector 3 (SDM vol. 3A 6.14.1); the handler is below 64 KiB.
    let (present, interrupt_gate) = (1 << 47, 0xe << 40);
    let gate = (CODE + breakpoint) | u64::from(CODE_SELECTOR) << 16 | present | interrupt_gate;
    put(IDT + 3 * 16, gate)
}

/// `state` made ready to run the guest on a processor with these CPUID leaves.
pub(super) fn begin(mut state: VcpuState, cpuid: &[CpuidEntry]) -> VcpuState {
    let features = features(cpuid);
    let has_xsave = features & HAS_XSAVE != 0;

    let system = &mut state.system;
    system.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
    system.cr3 = PML4;
    system.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | if has_xsave { cr4::OSXSAVE } else { 0 };
    system.efer = efer::LME | efer::LMA;
    system.gdtr = Table { base: GDT, limit: 23 };
    system.idtr = Table { base: IDT, limit: 0xfff };
    let (code, data) = (0xa09b, 0xc093);
    system.segments.fill(Segment { selector: DATA_SELECTOR.into(), base: 0, limit: !0, access: data });
    system.segments[seg::CS] = Segment { selector: CODE_SELECTOR.into(), base: 0, limit: !0, access: code };

    state.regs.rip = CODE;
    state.regs.rflags = rflags::FIXED;
    state.regs.gpr[gpr::RSP] = STACK_TOP;
    state.regs.gpr[gpr::RSI] = SCRATCH;
    state.regs.gpr[gpr::RDI] = features.into();
    if has_xsave {
        state.xcr0 = xcr0::X87 | xcr0::SSE;
    }
    state
}

/// Which of the instructions the guest may use.
fn features(cpuid: &[CpuidEntry]) -> u32 {
    let leaf = |n: u32| cpuid.iter().find(|e| e.leaf == n && e.subleaf.unwrap_or(0) == 0).copied().unwrap_or_default();
    let (basic, extended) = (leaf(1), leaf(7));
    [
        (basic.ecx, 13, HAS_CMPXCHG16B),
        (basic.ecx, 26, HAS_XSAVE),
        (extended.ebx, 20, HAS_SMAP),
        (extended.ebx, 10, HAS_INVPCID),
    ]
    .into_iter()
    .filter(|(register, bit, _)| register >> bit & 1 != 0)
    .fold(0, |all, (_, _, feature)| all | feature)
}

/// What the guest was at when it stopped.
pub(super) fn step(memory: &GuestRam) -> &'static str {
    match memory.read_obj::<u8>(GuestAddress(SCRATCH)) {
        Ok(STEP_INT3) => "int3",
        Ok(STEP_CMPXCHG16B) => "lock cmpxchg16b",
        Ok(STEP_XSAVE) => "xsave and xrstor",
        Ok(STEP_SMAP) => "stac and clac",
        Ok(STEP_INVPCID) => "invpcid",
        Ok(STEP_LOOP) => "dec and jnz",
        _ => "its first instruction",
    }
}
