//! A processor for tests of single instructions: no emitted code, a few MiB of memory, flat segments.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use iced_x86::{Decoder, DecoderOptions, Instruction};
use purlin_arch::x86_64::{
    cpuid::{self, CpuModel, CpuidEntry},
    regs::{
        cr0, cr4, efer,
        gpr::RSP,
        rflags,
        seg::{CS, DS, ES, FS, GS, SS},
    },
    state::Activity,
};
use purlin_engine::{Bus, memory};

use crate::{
    clock::VmClock,
    cpu::{Cpu, Segment, Table, access},
    descriptor::Descriptor,
    exception::Exception,
    mailbox::Mailbox,
    ram::Ram,
    system::emulate,
    translate::{Backing, CodeCache},
    vm::{BlockPtr, Blocks, Shared},
};

/// Bytes of memory, at physical address 0.
pub const MEMORY: u64 = 4 << 20;
/// The GDT; it has room for [`selector`] and for tests' own entries from [`selector::FREE`] on.
pub const GDT: u64 = 0x1000;
/// The IDT: 256 entries of 8 bytes, or 16 in long mode.
pub const IDT: u64 = 0x2000;
/// The TSS that TR holds: 32-bit, or 64-bit in long mode.
pub const TSS: u64 = 0x3000;
/// The stack pointer.
pub const STACK: u64 = 0x8000;
/// Where code is, and RIP.
pub const CODE: u64 = 0x9000;
/// The root of page tables that map the first 2 MiB to themselves, user and writable. In the tables for long mode
/// the page directory is two pages further.
pub const PAGES: u64 = 0x10000;

/// Selectors in the GDT. RPL is that of the segment's DPL.
pub mod selector {
    #![allow(missing_docs)]
    pub const CODE32: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const CODE64: u16 = 0x18;
    pub const USER_CODE32: u16 = 0x23;
    pub const USER_DATA: u16 = 0x2b;
    pub const USER_CODE64: u16 = 0x33;
    pub const CODE16: u16 = 0x38;
    pub const DATA16: u16 = 0x40;
    pub const CONFORMING: u16 = 0x48;
    pub const TSS: u16 = 0x50;
    pub const FREE: u16 = 0x60;
}

/// Modes that a test's processor can be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Real mode.
    Real,
    /// 32-bit protected mode without paging, at this CPL (0 or 3).
    Protected(u8),
    /// Virtual-8086 mode without paging.
    V86,
    /// 32-bit code in long mode, at this CPL.
    Compatibility(u8),
    /// 64-bit mode, at this CPL.
    Long(u8),
}

/// A descriptor of base, limit (in bytes; beyond 1 MiB in pages) and access rights as [`Segment::access`] has them.
pub fn descriptor(base: u32, limit: u32, rights: u32) -> u64 {
    let (limit, rights) = if limit > 0xf_ffff { (limit >> 12, rights | access::G) } else { (limit, rights) };
    let (base, limit, rights) = (u64::from(base), u64::from(limit), u64::from(rights));
    limit & 0xffff | (base & 0xff_ffff) << 16 | rights << 40 | (limit & 0xf_0000) << 32 | (base & 0xff00_0000) << 32
}

/// A gate of the given type and DPL.
pub fn gate(selector: u16, offset: u32, kind: u8, dpl: u8) -> u64 {
    let offset = u64::from(offset);
    let rights = 0x80 | u64::from(dpl) << 5 | u64::from(kind);
    offset & 0xffff | u64::from(selector) << 16 | rights << 40 | (offset & 0xffff_0000) << 32
}

/// Access rights of a segment: code or data, present, accessed, readable or writable, with the given DPL.
pub const fn rights(kind: u32, dpl: u32) -> u32 {
    access::P | access::S | access::RW | access::ACCESSED | kind | dpl << access::DPL_SHIFT
}

const CODE32_RIGHTS: u32 = access::CODE | access::DB;
const CODE64_RIGHTS: u32 = access::CODE | access::L;

fn gdt() -> Vec<u64> {
    let flat = |kind, dpl| descriptor(0, u32::MAX, rights(kind, dpl));
    // Room for an interrupt redirection bitmap and a byte of the I/O permission bitmap behind it.
    let tss_limit = 0x88;
    vec![
        0,
        flat(CODE32_RIGHTS, 0),
        flat(access::DB, 0),
        flat(CODE64_RIGHTS, 0),
        flat(CODE32_RIGHTS, 3),
        flat(access::DB, 3),
        flat(CODE64_RIGHTS, 3),
        descriptor(0, 0xffff, rights(access::CODE, 0)),
        descriptor(0, 0xffff, rights(0, 0)),
        flat(CODE32_RIGHTS | access::DC, 0),
        descriptor(TSS as u32, tss_limit, access::P | 11),
    ]
}

/// CPUID of an AMD processor with all that these tests need; 40 bits of physical address.
fn leaves() -> Vec<CpuidEntry> {
    let entry = |leaf, [eax, ebx, ecx, edx]: [u32; 4]| CpuidEntry { leaf, subleaf: None, eax, ebx, ecx, edx };
    let vendor = |text: &[u8; 4]| u32::from_le_bytes(*text);
    vec![
        entry(0, [0xd, vendor(b"Auth"), vendor(b"cAMD"), vendor(b"enti")]),
        entry(1, [0x00a1_0f11, 0, 1 << 17 | 1 << 26, 0x0783_fbff]),
        entry(7, [0, 1 << 0 | 1 << 7 | 1 << 10 | 1 << 20, 1 << 2, 0]),
        entry(0xd, [0xe7, 2688, 2688, 0]),
        entry(0x8000_0001, [0, 0, 0, 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29]),
        entry(0x8000_0008, [0x3028, 0, 0, 0]),
    ]
}

fn shared() -> Arc<Shared> {
    let memory = memory::create(&[(0, MEMORY)]).expect("guest memory");
    Arc::new(Shared {
        ram: Ram::new(Arc::new(memory)),
        code: CodeCache::new(1 << 20, Backing::File).expect("code cache"),
        blocks: Default::default(),
        extint: Default::default(),
        clock: VmClock::new(1_000_000),
        tsc_khz: 1_000_000,
        watching: Default::default(),
        world: Default::default(),
        low_movable: Default::default(),
        profile: None,
    })
}

/// A processor in `mode`, at [`CODE`].
pub fn cpu(mode: Mode) -> Box<Cpu> {
    in_mode(Box::new(Cpu::new(shared(), 0, Arc::new(leaves()))), mode)
}

/// Several processors of one VM in `mode`, with mailboxes, and with the host's features.
pub fn cpus(mode: Mode, count: u32) -> Vec<Box<Cpu>> {
    let shared = shared();
    let _ = shared.blocks.set((0..count).map(|_| block_with_mailbox()).collect());
    let make = |index| {
        let table = cpuid::leaves(CpuModel::Host, &host_cpuid, index, count, shared.tsc_khz);
        let mut cpu = in_mode(Box::new(Cpu::new(shared.clone(), index, Arc::new(table))), mode);
        crate::lapic::announce(&mut cpu);
        if let Some(mailbox) = shared.mailbox(index as usize) {
            mailbox.take();
        }
        cpu
    };
    (0..count).map(make).collect()
}

/// The host's CPUID, remembered: under a hypervisor each costs tens of microseconds.
fn host_cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    static KNOWN: Mutex<BTreeMap<(u32, u32), [u32; 4]>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    *known.entry((leaf, subleaf)).or_insert_with(|| {
        let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
        [r.eax, r.ebx, r.ecx, r.edx]
    })
}

/// A block of which only the mailbox is used. It is never freed.
#[allow(unsafe_code)]
fn block_with_mailbox() -> BlockPtr {
    let block = Blocks::allocate(1)[0];
    // SAFETY: just allocated, and nobody else's.
    unsafe { (&raw mut (*block.0.as_ptr()).mailbox).write(Mailbox::default()) };
    block
}

/// Has a bus answer the processor.
pub fn attach_bus(cpu: &mut Cpu, bus: &'static dyn Bus) {
    cpu.bus = Some(bus);
}

fn in_mode(mut cpu: Box<Cpu>, mode: Mode) -> Box<Cpu> {
    cpu.activity = Activity::Running;
    cpu.gpr[RSP] = STACK;
    cpu.rip = CODE;
    cpu.rflags = rflags::FIXED;
    if mode == Mode::Real {
        cpu.seg[CS].base = 0;
        cpu.seg[CS].selector = 0;
        return cpu;
    }
    let long = matches!(mode, Mode::Compatibility(_) | Mode::Long(_));
    cpu.cr0 |= cr0::PE | cr0::WP;
    for (i, descriptor) in gdt().into_iter().enumerate() {
        poke(&cpu, GDT + 8 * i as u64, descriptor);
    }
    cpu.gdtr = Table { base: GDT, limit: 0xfff };
    cpu.idtr = Table { base: IDT, limit: if long { 0xfff } else { 0x7ff } };
    cpu.tr = segment(&cpu, selector::TSS);
    if long {
        cpu.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        cpu.cr4 = cr4::PAE;
        cpu.cr0 |= cr0::PG;
        cpu.cr3 = PAGES;
        poke(&cpu, PAGES, (PAGES + 0x1000) | 7);
        poke(&cpu, PAGES + 0x1000, (PAGES + 0x2000) | 7);
        poke(&cpu, PAGES + 0x2000, 0x87u64);
    }
    let (code, data, cpl) = match mode {
        Mode::Protected(3) | Mode::Compatibility(3) => (selector::USER_CODE32, selector::USER_DATA, 3),
        Mode::Long(3) => (selector::USER_CODE64, selector::USER_DATA, 3),
        Mode::Long(_) => (selector::CODE64, selector::DATA, 0),
        _ => (selector::CODE32, selector::DATA, 0),
    };
    cpu.cpl = cpl;
    for seg in [ES, CS, SS, DS, FS, GS] {
        cpu.seg[seg] = segment(&cpu, if seg == CS { code } else { data });
    }
    if mode == Mode::V86 {
        cpu.rflags |= rflags::VM;
        cpu.cpl = 3;
        cpu.seg = [Segment::v86(0); 6];
    }
    cpu
}

/// What the GDT's entry for `selector` makes of a segment register.
pub fn segment(cpu: &Cpu, selector: u16) -> Segment {
    let low = peek(cpu, GDT + u64::from(selector & !7));
    Descriptor { low, high: 0, address: 0 }.segment(selector)
}

/// Puts `descriptor` into the GDT at `selector`.
pub fn set_descriptor(cpu: &Cpu, selector: u16, descriptor: u64) {
    poke(cpu, GDT + u64::from(selector & !7), descriptor);
}

/// Puts a gate for `vector` into the IDT of the processor's mode.
pub fn set_gate(cpu: &Cpu, vector: u8, gate: u64) {
    let size = if cpu.long_mode() { 16 } else { 8 };
    poke(cpu, IDT + size * u64::from(vector), gate);
}

/// Executes one instruction, given as its bytes. RIP moves on.
pub fn step(cpu: &mut Cpu, bytes: &[u8]) -> Result<(), Exception> {
    let insn = decode(cpu, bytes);
    emulate(cpu, &insn)
}

/// Decodes an instruction for the processor's mode.
pub fn decode(cpu: &Cpu, bytes: &[u8]) -> Instruction {
    let bits = 8 * cpu.code_size() as u32;
    let insn = Decoder::with_ip(bits, bytes, cpu.rip, DecoderOptions::AMD).decode();
    assert!(!insn.is_invalid(), "{bytes:02x?} is no instruction in {bits}-bit code");
    assert_eq!(insn.len(), bytes.len(), "{bytes:02x?} are more bytes than one instruction");
    insn
}

/// Eight bytes of physical memory.
pub fn peek(cpu: &Cpu, physical: u64) -> u64 {
    let mut bytes = [0; 8];
    let page = cpu.shared.ram.page(physical).expect("memory");
    crate::mem::copy_from_guest(page.host.wrapping_add((physical & 0xfff) as usize), &mut bytes);
    u64::from_le_bytes(bytes)
}

/// Stores an integer or bytes to physical memory, on one page.
pub fn poke<T: AsBytes>(cpu: &Cpu, physical: u64, value: T) {
    let page = cpu.shared.ram.page(physical).expect("memory");
    crate::mem::copy_to_guest(page.host.wrapping_add((physical & 0xfff) as usize), value.as_bytes().as_ref());
}

/// What [`poke`] stores.
pub trait AsBytes {
    /// Its bytes in memory.
    fn as_bytes(&self) -> Vec<u8>;
}

macro_rules! as_bytes {
    ($($t:ty),*) => {$(
        impl AsBytes for $t {
            fn as_bytes(&self) -> Vec<u8> {
                self.to_le_bytes().to_vec()
            }
        }
    )*};
}
as_bytes!(u8, u16, u32, u64);

impl AsBytes for &[u8] {
    fn as_bytes(&self) -> Vec<u8> {
        self.to_vec()
    }
}
