//! The translator: cases run on one vCPU in user mode, behind page tables that map what the child maps.
#![allow(unsafe_code)]

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
    cpu::{Cpu, Segment, access},
    exception::Exception,
    subject::Subject,
};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::{
    case::{Case, Fault, Outcome},
    layout::{CODE, CODE_BYTES, DATA_BYTES, DATA_FRAMES, FILLER, FS_BASE, GS_BASE, HIGH, PAGE, mappings},
    xsave::{self, Area, at},
};

/// Guest memory: page tables from the first page up, the frames at their place.
const MEMORY: u64 = 4 << 20;
const TABLES: u64 = 0x1000;
const FRAMES: u64 = 2 << 20;
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
    /// A vCPU with the host's features.
    pub fn new() -> Result<Self> {
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
        translated.set_system_state();
        Ok(translated)
    }

    fn frame(&self, i: usize) -> *mut u8 {
        self.host.wrapping_add((FRAMES + i as u64 * PAGE) as usize)
    }

    /// Page tables for [`mappings`] (SDM vol. 3A 4.5), accessed and dirty already, as Linux has them.
    fn map(&mut self) {
        const PRESENT: u64 = 1;
        const WRITE: u64 = 1 << 1;
        const USER: u64 = 1 << 2;
        const ACCESSED: u64 = 1 << 5;
        const DIRTY: u64 = 1 << 6;
        const NX: u64 = 1 << 63;
        let mut free = TABLES + PAGE;
        for m in mappings() {
            let mut table = TABLES;
            for level in (1..4).rev() {
                let entry = self.entry(table, m.linear >> (12 + 9 * level));
                // SAFETY: an aligned word in guest memory, which nobody else uses now.
                unsafe {
                    if *entry == 0 {
                        *entry = free | PRESENT | WRITE | USER | ACCESSED;
                        free += PAGE;
                    }
                    table = *entry & !0xfff;
                }
            }
            let mut page = (FRAMES + m.frame as u64 * PAGE) | PRESENT | USER | ACCESSED | DIRTY;
            page |= if m.writable { WRITE } else { 0 } | if m.executable { 0 } else { NX };
            // SAFETY: the same.
            unsafe { *self.entry(table, m.linear >> 12) = page };
        }
        assert!(free <= FRAMES);
    }

    fn entry(&self, table: u64, index: u64) -> *mut u64 {
        self.host.wrapping_add((table + (index & 0x1ff) * 8) as usize).cast()
    }

    /// The control registers as Linux sets them.
    fn set_system_state(&mut self) {
        let cpu = self.subject.cpu();
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
                steps.push(Step { rip: cpu.rip, gpr: cpu.gpr });
                steps.len() <= STEPS
            }),
            _ => self.subject.run(),
        };
        self.watchdog.fetch_add(1, Ordering::SeqCst);
        let Some(exception) = exception? else { return Ok(None) };
        let memory = data.to_vec();
        Ok(Some((outcome(self.subject.cpu(), exception, memory), steps)))
    }

    fn load_code(&mut self, case: &Case) {
        let frames = FRAMES + DATA_FRAMES as u64 * PAGE;
        if let Some((offset, len)) = self.last.take() {
            // SAFETY: as below.
            unsafe { std::ptr::write_bytes(self.frame(DATA_FRAMES).add(offset as usize), FILLER, len) };
            self.subject.wrote_memory(frames + offset, len as u64);
        }
        let offset = (case.entry & !HIGH).saturating_sub(CODE).min(CODE_BYTES as u64);
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

const CODE64: u32 = 1 << 13;
const CODE32: u32 = 1 << 14;

/// A flat user segment; `kind` holds the type, L and D/B.
fn segment(selector: u16, base: u64, kind: u32) -> Segment {
    let access = access::P | access::S | access::DPL | access::G | access::RW | access::ACCESSED | kind;
    Segment { base, limit: u32::MAX, access, selector }
}

fn load(cpu: &mut Cpu, case: &Case, area: &Area) {
    let code = if case.bits == 64 { (0x33, CODE64) } else { (0x23, CODE32) };
    cpu.seg[seg::CS] = segment(code.0, 0, access::CODE | code.1);
    for i in [seg::DS, seg::ES, seg::SS] {
        cpu.seg[i] = segment(0x2b, 0, access::DB);
    }
    cpu.seg[seg::FS] = segment(0x63, FS_BASE, access::DB);
    cpu.seg[seg::GS] = segment(0x6b, GS_BASE, access::DB);
    cpu.cpl = 3;
    cpu.gpr = case.gpr;
    cpu.rip = case.entry;
    cpu.rflags = case.rflags | rflags::FIXED | rflags::IF;
    cpu.cr2 = 0;
    cpu.pending_debug = 0;
    cpu.xstate.area.copy_from_slice(&area.0);
    cpu.xstate.fip = 0;
    cpu.xstate.fdp = 0;
    cpu.xstate.fop = 0;
}

fn outcome(cpu: &mut Cpu, exception: Exception, memory: Vec<u8>) -> Outcome {
    let mut area = Area(cpu.xstate.area);
    area.set(at::FIP, &cpu.xstate.fip.to_le_bytes());
    area.set(at::FDP, &cpu.xstate.fdp.to_le_bytes());
    area.set(at::FOP, &(cpu.xstate.fop as u16).to_le_bytes());
    area.normalise();
    let page_fault = exception.vector == purlin_engine_translator::exception::vector::PF;
    Outcome {
        gpr: cpu.gpr,
        rip: cpu.rip,
        rflags: cpu.rflags,
        fault: Fault {
            vector: exception.vector,
            error: exception.error.unwrap_or(0),
            address: if page_fault { exception.payload } else { 0 },
        },
        area,
        memory,
    }
}
