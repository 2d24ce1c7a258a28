//! The translator: cases run on one vCPU in user mode, behind page tables that map what the child maps.
#![allow(unsafe_code)]

mod tables;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use purlin_arch::x86_64::{
    cpuid::{CpuModel, leaves},
    regs::{cr0, cr4, efer, rflags, seg},
};
use purlin_engine::{Kick, memory};
use purlin_engine_translator::{
    cpu::{Cpu, access},
    exception::{Exception, vector},
    subject::Subject,
};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::{
    case::{Case, Fault, Outcome},
    layout::{CODE_BYTES, DATA_BYTES, DATA_FRAMES, FILLER, PAGE, code_offset, mappings},
    native::bases_are_readable,
    segments,
    xsave::{self, Area, at},
};

/// Guest memory: page tables from the first page up, the frames at their place.
const MEMORY: u64 = 4 << 20;
const TABLES: u64 = 0x1000;
const FRAMES: u64 = 2 << 20;
const SYSTEM: u64 = 3 << 20;
/// Instructions in a case at most; what goes on for longer is taken for an endless loop.
const STEPS: usize = 400;
/// How long a run may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// An instruction that was executed, and the registers before it.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Where.
    pub rip: u64,
    /// With what.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub rflags: u64,
    /// The segments' bases.
    pub bases: [u64; 6],
    /// In code of this size.
    pub bits: u32,
}

impl Step {
    fn of(cpu: &Cpu) -> Self {
        let wide = cpu.seg[seg::CS].access & access::DB != 0;
        let bits = if cpu.code64() { 64 } else { 16 << u32::from(wide) };
        Self { rip: cpu.rip, gpr: cpu.gpr, rflags: cpu.rflags, bases: cpu.seg.map(|segment| segment.base), bits }
    }
}

/// How a case is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// Every block is one instruction.
    Single,
    /// In blocks, with nothing translated, an empty TLB and the vector registers not in use.
    Cold,
    /// In blocks, with what the last run has left behind.
    Warm,
}

/// The vCPU.
pub struct Translated {
    subject: Subject,
    host: *mut u8,
    watchdog: Arc<AtomicU64>,
    last: Option<(u64, usize)>,
}

impl Translated {
    /// A vCPU with the host's features. `processor` is what Linux calls the one that the native side runs on.
    pub fn new(processor: u32) -> Result<Self> {
        let ram = Arc::new(memory::create(&[(0, MEMORY)])?);
        let host = ram.get_host_address(GuestAddress(0)).context("guest memory")?;
        let cpuid = |leaf, subleaf| {
            let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
            [r.eax, r.ebx, r.ecx, r.edx]
        };
        let subject = Subject::new(ram, leaves(CpuModel::Host, &cpuid, 0, 1, 1_000_000))?;
        let watchdog = watch(subject.kicker());
        let mut translated = Self { subject, host, watchdog, last: None };
        translated.map();
        // SAFETY: the frames of code lie in guest memory.
        unsafe { std::ptr::write_bytes(translated.frame(DATA_FRAMES), FILLER, CODE_BYTES) };
        // SAFETY: within guest memory, which nobody else uses now.
        let system =
            unsafe { std::slice::from_raw_parts_mut(host.add(SYSTEM as usize), (tables::PAGES * PAGE) as usize) };
        tables::write(system, processor);
        translated.set_system_state();
        translated.subject.cpu().msrs.tsc_aux = processor;
        Ok(translated)
    }

    fn frame(&self, i: usize) -> *mut u8 {
        self.host.wrapping_add((FRAMES + i as u64 * PAGE) as usize)
    }

    /// Page tables for [`mappings`] (SDM vol. 3A 4.5), accessed and dirty already, as Linux has them.
    fn map(&mut self) {
        let mut free = TABLES + PAGE;
        for m in mappings() {
            let rights = pte::USER | if m.writable { pte::WRITE } else { 0 } | if m.executable { 0 } else { pte::NX };
            self.map_page(m.linear, FRAMES + m.frame as u64 * PAGE, rights, &mut free);
        }
        for offset in (0..tables::PAGES).map(|i| i * PAGE) {
            self.map_page(tables::LINEAR + offset, SYSTEM + offset, pte::WRITE | pte::NX, &mut free);
        }
        assert!(free <= FRAMES);
    }

    /// Maps one page, with tables from `free` on where there are none yet.
    fn map_page(&mut self, linear: u64, physical: u64, rights: u64, free: &mut u64) {
        let mut table = TABLES;
        for level in (1..4).rev() {
            let entry = self.entry(table, linear >> (12 + 9 * level));
            // SAFETY: an aligned word in guest memory, which nobody else uses now.
            unsafe {
                if *entry == 0 {
                    *entry = *free | pte::PRESENT | pte::WRITE | pte::USER | pte::ACCESSED;
                    *free += PAGE;
                }
                table = *entry & !0xfff;
            }
        }
        // SAFETY: the same.
        unsafe { *self.entry(table, linear >> 12) = physical | rights | pte::PRESENT | pte::ACCESSED | pte::DIRTY };
    }

    fn entry(&self, table: u64, index: u64) -> *mut u64 {
        self.host.wrapping_add((table + (index & 0x1ff) * 8) as usize).cast()
    }

    /// The control registers as Linux sets them.
    fn set_system_state(&mut self) {
        let cpu = self.subject.cpu();
        tables::load(cpu);
        cpu.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
        cpu.cr3 = TABLES;
        cpu.cr4 = cr4::DE
            | cr4::PSE
            | cr4::PAE
            | cr4::MCE
            | cr4::PGE
            | cr4::OSFXSR
            | cr4::OSXMMEXCPT
            | cr4::OSXSAVE
            | cr4::FSGSBASE
            | cr4::UMIP
            | cr4::SMEP
            | cr4::SMAP;
        cpu.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        cpu.xcr0 = xsave::components();
    }

    /// Runs `case`. `None` if it does not end. The steps are those of [`Run::Single`].
    pub fn run(&mut self, case: &Case, run: Run) -> Result<Option<(Outcome, Vec<Step>)>> {
        let area = case.area();
        // SAFETY: the frames lie in guest memory, and no vCPU runs.
        let data = unsafe { std::slice::from_raw_parts_mut(self.frame(0), DATA_BYTES) };
        case.fill_memory(data);
        if run != Run::Warm {
            self.load_code(case);
            self.subject.cpu().flush_tlb_all();
            self.subject.forget_vectors();
            // Both ways of translating get their share.
            self.subject.all_hot(case.code.len().is_multiple_of(2));
            self.subject.low_movable(case.code.len() & 2 != 0);
        }
        load(self.subject.cpu(), case, &area);
        let mut steps = Vec::new();
        self.watchdog.fetch_add(1, Ordering::SeqCst);
        let exception = match run {
            Run::Single => self.subject.step(&mut |cpu| {
                steps.push(Step::of(cpu));
                steps.len() <= STEPS
            }),
            _ => self.subject.run(),
        };
        self.watchdog.fetch_add(1, Ordering::SeqCst);
        let Some(exception) = exception? else { return Ok(None) };
        let memory = data.to_vec();
        let trap = self.leave_handler();
        let cpu = self.subject.cpu();
        Ok(Some((outcome(cpu, trap.unwrap_or(exception), memory), steps)))
    }

    /// Takes back what INT1, INT3 and INTO did to get into a handler, of which there is none: the state is that at
    /// their end. The trap, if there was one.
    fn leave_handler(&mut self) -> Option<Exception> {
        let host = self.host;
        let cpu = self.subject.cpu();
        let (vector, frame) = tables::entered(cpu)?;
        let mut words = [0; 5];
        for (word, i) in words.iter_mut().zip(0..) {
            // SAFETY: the handler's stack lies in guest memory, and no vCPU runs.
            *word = unsafe { host.add((SYSTEM + frame + 8 * i) as usize).cast::<u64>().read() };
        }
        let [rip, cs, flags, rsp, ss] = words;
        (cpu.rip, cpu.rflags, cpu.gpr[4]) = (rip, flags, rsp);
        (cpu.seg[seg::CS].selector, cpu.seg[seg::SS].selector) = (cs as u16, ss as u16);
        Some(Exception::plain(vector))
    }

    fn load_code(&mut self, case: &Case) {
        let frames = FRAMES + DATA_FRAMES as u64 * PAGE;
        if let Some((offset, len)) = self.last.take() {
            // SAFETY: as below.
            unsafe { std::ptr::write_bytes(self.frame(DATA_FRAMES).add(offset as usize), FILLER, len) };
            self.subject.wrote_memory(frames + offset, len as u64);
        }
        let offset = code_offset(case.entry);
        let len = case.code.len().min(CODE_BYTES - offset as usize);
        // SAFETY: within the frames of code, which lie in guest memory, and no vCPU runs.
        unsafe {
            let to = self.frame(DATA_FRAMES).add(offset as usize);
            std::ptr::copy_nonoverlapping(case.code.as_ptr(), to, len);
        }
        self.subject.wrote_memory(frames + offset, len as u64);
        self.last = Some((offset, len));
    }
}

/// Kicks a run that takes too long: the counter that is returned is odd while one is under way.
fn watch(kicker: Arc<dyn Kick>) -> Arc<AtomicU64> {
    let counter = Arc::new(AtomicU64::new(0));
    let watched = Arc::downgrade(&counter);
    std::thread::spawn(move || {
        let mut before = 0;
        loop {
            std::thread::sleep(PATIENCE);
            let Some(counter) = watched.upgrade() else { return };
            let now = counter.load(Ordering::SeqCst);
            if now % 2 == 1 && now == before {
                kicker.kick();
            }
            before = now;
        }
    });
    counter
}

/// Bits of an entry in a page table.
mod pte {
    pub const PRESENT: u64 = 1;
    pub const WRITE: u64 = 1 << 1;
    pub const USER: u64 = 1 << 2;
    pub const ACCESSED: u64 = 1 << 5;
    pub const DIRTY: u64 = 1 << 6;
    pub const NX: u64 = 1 << 63;
}

fn load(cpu: &mut Cpu, case: &Case, area: &Area) {
    let selectors = [segments::DATA32, case.cs(), case.ss, segments::DATA32, segments::FS, segments::GS];
    for (segment, selector) in cpu.seg.iter_mut().zip(selectors) {
        *segment = tables::segment(selector);
    }
    cpu.cpl = 3;
    cpu.gpr = case.gpr;
    cpu.rip = case.entry;
    cpu.rflags = case.rflags | rflags::FIXED | rflags::IF;
    cpu.cr2 = 0;
    cpu.pending_debug = 0;
    (cpu.sti_shadow, cpu.mov_ss_shadow) = (false, false);
    cpu.xstate.area.copy_from_slice(&area.0);
    cpu.xstate.set_pointers(0, 0, 0);
    (cpu.xstate.fcs, cpu.xstate.fds) = (0, 0);
}

fn outcome(cpu: &mut Cpu, exception: Exception, memory: Vec<u8>) -> Outcome {
    let mut area = Area(cpu.xstate.area);
    if !cpu.features.amd {
        cpu.xstate.settle_pointers();
    }
    area.set(at::FIP, &cpu.xstate.fip.to_le_bytes());
    area.set(at::FDP, &cpu.xstate.fdp.to_le_bytes());
    area.set(at::FOP, &(cpu.xstate.fop as u16).to_le_bytes());
    area.normalise();
    let page_fault = exception.vector == vector::PF;
    let base = |segment: usize| if bases_are_readable() { cpu.seg[segment].base } else { 0 };
    Outcome {
        gpr: cpu.gpr,
        rip: cpu.rip,
        rflags: cpu.rflags,
        selectors: cpu.seg.map(|segment| segment.selector),
        bases: [base(seg::FS), base(seg::GS)],
        fault: Fault {
            vector: exception.vector,
            error: exception.error.unwrap_or(0),
            address: if page_fault { exception.payload } else { 0 },
        },
        area,
        memory,
    }
}
