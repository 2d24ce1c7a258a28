//! The local APIC (SDM vol. 3A chapter 11): registers, priorities, modes.
//!
//! It belongs to its vCPU's thread. Other threads put vectors into the vCPU's mailbox ([`ipi`]); [`take_requests`]
//! merges them. Where something done on the vCPU's own thread makes an interrupt deliverable or moves the timer's
//! deadline, a request to itself makes the run loop look again.

mod ipi;
mod saved;
#[cfg(test)]
mod tests;
mod timer;

use std::sync::atomic::Ordering;

pub use ipi::{Address, deliver_msi};
use purlin_arch::x86_64::{cpuid::physical_bits, msr};
pub use saved::{restore, save};
use timer::Timer;

use crate::{cpu::Cpu, exception::Exception, mailbox::request};

/// Bits of IA32_APIC_BASE.
pub mod base {
    #![allow(missing_docs)]
    pub const BSP: u64 = 1 << 8;
    pub const EXTD: u64 = 1 << 10;
    pub const EN: u64 = 1 << 11;
    pub const DEFAULT: u64 = 0xfee0_0000;
}

/// Offsets of the registers in the xAPIC's page; an x2APIC MSR is 0x800 plus the offset divided by 16.
mod reg {
    pub const ID: u32 = 0x20;
    pub const VERSION: u32 = 0x30;
    pub const TPR: u32 = 0x80;
    pub const APR: u32 = 0x90;
    pub const PPR: u32 = 0xa0;
    pub const EOI: u32 = 0xb0;
    pub const RRD: u32 = 0xc0;
    pub const LDR: u32 = 0xd0;
    pub const DFR: u32 = 0xe0;
    pub const SVR: u32 = 0xf0;
    pub const ISR: u32 = 0x100;
    pub const TMR: u32 = 0x180;
    pub const IRR: u32 = 0x200;
    pub const ESR: u32 = 0x280;
    pub const ICR: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT_TIMER: u32 = 0x320;
    pub const LVT_THERMAL: u32 = 0x330;
    pub const LVT_PERF: u32 = 0x340;
    pub const LVT_LINT0: u32 = 0x350;
    pub const LVT_LINT1: u32 = 0x360;
    pub const LVT_ERROR: u32 = 0x370;
    pub const INITIAL_COUNT: u32 = 0x380;
    pub const CURRENT_COUNT: u32 = 0x390;
    pub const DIVIDE: u32 = 0x3e0;
    pub const SELF_IPI: u32 = 0x3f0;
}

/// Version 0x14 with six LVT entries that can suppress the broadcast of an end of interrupt (bit 24).
const VERSION: u32 = 0x14 | 5 << 16 | 1 << 24;

/// Bits of the spurious-interrupt vector register.
mod svr {
    pub const ENABLED: u32 = 1 << 8;
    pub const SUPPRESS_EOI: u32 = 1 << 12;
    pub const WRITABLE: u32 = 0xff | ENABLED | 1 << 9 | SUPPRESS_EOI;
}

/// Bits of the error status register.
mod esr {
    pub const SEND_ILLEGAL: u32 = 1 << 5;
    pub const RECEIVE_ILLEGAL: u32 = 1 << 6;
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Bits of an LVT entry.
mod lvt {
    pub const MASKED: u32 = 1 << 16;
    pub const MODE_SHIFT: u32 = 8;
    pub const FIXED: u32 = 0;
    pub const NMI: u32 = 4;
    pub const EXTINT: u32 = 7;
}

/// Indices of the LVT entries, in the order of their registers.
const TIMER: usize = 0;
const LINT0: usize = 3;
const ERROR: usize = 5;
/// What can be written of each: timer (mode in 18:17), thermal and performance (delivery mode), LINT0 and LINT1
/// (delivery mode, polarity, trigger mode), error.
const LVT_WRITABLE: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];

/// 256 vectors.
type Vectors = [u32; 8];

/// The local APIC of one vCPU.
#[derive(Clone, Debug)]
pub struct Lapic {
    /// IA32_APIC_BASE.
    base: u64,
    /// The vCPU's number: the x2APIC ID, and the xAPIC ID after reset.
    initial_id: u32,
    /// The xAPIC ID, 8 bits.
    xapic_id: u32,
    tpr: u8,
    /// LDR of the xAPIC: the ID in 31:24. (That of the x2APIC follows from its ID.)
    ldr: u32,
    dfr: u32,
    svr: u32,
    isr: Vectors,
    tmr: Vectors,
    irr: Vectors,
    /// What ESR shows, and what it will show after the next write to it.
    esr: u32,
    errors: u32,
    icr: u64,
    lvt: [u32; 6],
    timer: Timer,
    /// The level of LINT0, the 8259's output, when it was last looked at.
    lint0: bool,
}

impl Default for Lapic {
    fn default() -> Self {
        Self::new(0)
    }
}

impl Lapic {
    /// The local APIC of vCPU `index` after power-up: enabled, in xAPIC mode.
    pub fn new(index: u32) -> Self {
        let bsp = if index == 0 { base::BSP } else { 0 };
        Self {
            base: base::DEFAULT | base::EN | bsp,
            initial_id: index,
            xapic_id: index & 0xff,
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [lvt::MASKED; 6],
            timer: Timer::default(),
            lint0: false,
        }
    }

    /// What INIT leaves of it: the mode and the ID (SDM vol. 3A 11.4.7.3).
    fn reset_registers(&mut self) {
        *self = Self { base: self.base, xapic_id: self.xapic_id, lint0: self.lint0, ..Self::new(self.initial_id) };
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Whether it is enabled in IA32_APIC_BASE; CPUID leaf 1 shows it.
    pub fn enabled(&self) -> bool {
        self.base & base::EN != 0
    }

    /// Whether it is in x2APIC mode.
    pub fn x2apic(&self) -> bool {
        self.base & base::EXTD != 0
    }

    /// Physical address of the register page while in xAPIC mode, else `None`.
    pub fn mmio_base(&self) -> Option<u64> {
        (self.base & (base::EN | base::EXTD) == base::EN).then_some(self.base & !0xfff)
    }

    /// The APIC ID of the mode that it is in.
    pub fn id(&self) -> u32 {
        if self.x2apic() { self.initial_id } else { self.xapic_id }
    }

    /// The task priority, 8 bits. CR8 is its upper half.
    pub fn tpr(&self) -> u8 {
        self.tpr
    }

    /// The processor priority: the higher of task priority and the vector in service (SDM vol. 3A 11.8.3.1).
    fn ppr(&self) -> u8 {
        let in_service = highest(&self.isr).unwrap_or(0);
        if self.tpr >> 4 >= in_service >> 4 { self.tpr } else { in_service & 0xf0 }
    }

    /// The vector that the processor may take now.
    pub fn pending(&self) -> Option<u8> {
        if !self.enabled() {
            return None;
        }
        highest(&self.irr).filter(|vector| vector >> 4 > self.ppr() >> 4)
    }

    /// The processor takes an interrupt: the vector goes from requested to in service. Where none is pending any more
    /// it is the spurious one, which is not in service.
    pub fn acknowledge(&mut self) -> u8 {
        let Some(vector) = self.pending() else { return self.svr as u8 };
        set(&mut self.irr, vector, false);
        set(&mut self.isr, vector, true);
        vector
    }

    /// Whether the 8259's interrupt reaches the processor: through LINT0 in ExtINT mode, or past a disabled APIC.
    pub fn accepts_extint(&self) -> bool {
        if !self.enabled() {
            return true;
        }
        let entry = self.lvt[LINT0];
        entry & lvt::MASKED == 0 && delivery_mode(entry) == lvt::EXTINT
    }

    /// Marks `vector` as requested.
    fn request(&mut self, vector: u8, level: bool) {
        set(&mut self.irr, vector, true);
        set(&mut self.tmr, vector, level);
    }

    /// Notes an error, and raises the error interrupt (SDM vol. 3A 11.5.3).
    fn error(&mut self, bits: u32) {
        self.errors |= bits;
        self.raise_lvt(ERROR);
    }

    /// The source of a fixed-mode LVT entry is active.
    fn raise_lvt(&mut self, index: usize) {
        let entry = self.lvt[index];
        if entry & lvt::MASKED != 0 {
            return;
        }
        match entry as u8 {
            vector @ 16.. => self.request(vector, false),
            // Noted without the error interrupt: it might itself be the one with the illegal vector.
            _ => self.errors |= esr::RECEIVE_ILLEGAL,
        }
    }
}

fn delivery_mode(entry: u32) -> u32 {
    entry >> lvt::MODE_SHIFT & 7
}

fn highest(vectors: &Vectors) -> Option<u8> {
    let (i, word) = vectors.iter().enumerate().rev().find(|(_, word)| **word != 0)?;
    Some((32 * i as u32 + 31 - word.leading_zeros()) as u8)
}

fn is_set(vectors: &Vectors, vector: u8) -> bool {
    vectors[usize::from(vector) / 32] & 1 << (vector % 32) != 0
}

fn set(vectors: &mut Vectors, vector: u8, on: bool) {
    let (word, bit) = (&mut vectors[usize::from(vector) / 32], 1 << (vector % 32));
    if on {
        *word |= bit;
    } else {
        *word &= !bit;
    }
}

/// The bit in a group of eight 32-bit registers that starts at `first`, as an index.
fn group(offset: u32, first: u32) -> Option<usize> {
    (first..first + 0x80).contains(&offset).then(|| ((offset - first) >> 4) as usize)
}

fn lvt_index(offset: u32) -> Option<usize> {
    (reg::LVT_TIMER..=reg::LVT_ERROR).contains(&offset).then(|| ((offset - reg::LVT_TIMER) >> 4) as usize)
}

/// Sets the task priority (CR8 shifted left by four, or the register).
pub fn set_tpr(cpu: &mut Cpu, tpr: u8) {
    cpu.lapic.tpr = tpr;
    look_again(cpu);
}

/// Has the run loop look at the local APIC if there is something to deliver.
fn look_again(cpu: &mut Cpu) {
    if cpu.lapic.pending().is_some() {
        cpu.request_of_self(request::LAPIC);
    }
}

impl Cpu {
    /// Leaves a request in the vCPU's own mailbox.
    pub(crate) fn request_of_self(&self, bits: u32) {
        if let Some(mailbox) = self.shared.mailbox(self.index as usize) {
            mailbox.request(bits);
        }
    }
}

/// Takes over what other threads and the timer have left: vectors in the mailbox, an expired timer, a change of
/// the 8259's line where LINT0 is not in ExtINT mode. `requests` are bits of [`request`]; NMI, INIT and SIPI are the
/// run loop's (see [`init`], [`startup`]).
pub fn take_requests(cpu: &mut Cpu, requests: u32) {
    if requests & request::LAPIC != 0 {
        take_vectors(cpu);
    }
    if requests & request::TIMER != 0 {
        timer::elapse(cpu);
    }
    if requests & request::EXTINT != 0 {
        take_lint0(cpu);
    }
}

fn take_vectors(cpu: &mut Cpu) {
    let shared = cpu.shared.clone();
    let Some(mailbox) = shared.mailbox(cpu.index as usize) else { return };
    for i in 0..8 {
        let mut requested = mailbox.irr[i].swap(0, Ordering::SeqCst);
        let level = mailbox.level[i].load(Ordering::SeqCst);
        if i == 0 && requested & 0xffff != 0 {
            cpu.lapic.error(esr::RECEIVE_ILLEGAL);
            requested &= !0xffff;
        }
        cpu.lapic.irr[i] |= requested;
        cpu.lapic.tmr[i] = cpu.lapic.tmr[i] & !requested | level & requested;
    }
}

/// LINT0 is the 8259's output. In ExtINT mode the run loop deals with it.
fn take_lint0(cpu: &mut Cpu) {
    let high = cpu.shared.extint.load(Ordering::SeqCst);
    let rising = high && !cpu.lapic.lint0;
    cpu.lapic.lint0 = high;
    let entry = cpu.lapic.lvt[LINT0];
    if !rising || !cpu.lapic.enabled() || entry & lvt::MASKED != 0 {
        return;
    }
    match delivery_mode(entry) {
        lvt::FIXED => cpu.lapic.raise_lvt(LINT0),
        lvt::NMI => cpu.request_of_self(request::NMI),
        _ => {}
    }
}

/// INIT reaches the local APIC. (The rest of the processor is `reset`'s.)
pub fn init(cpu: &mut Cpu) {
    cpu.lapic.reset_registers();
    ipi::publish_address(cpu);
}

/// The vector of a SIPI, if the processor is waiting for one; else the SIPI is lost (SDM vol. 3A 9.4.2).
pub fn startup(cpu: &Cpu) -> Option<u8> {
    if cpu.activity != purlin_arch::x86_64::state::Activity::WaitForSipi {
        return None;
    }
    let mailbox = cpu.shared.mailbox(cpu.index as usize)?;
    Some(mailbox.sipi_vector.load(Ordering::SeqCst) as u8)
}

/// Tells other threads who this local APIC is. To be called before the vCPU runs for the first time.
pub fn announce(cpu: &mut Cpu) {
    ipi::publish_address(cpu);
}

/// The guest's TSC was set: a TSC deadline lies elsewhere now.
pub fn tsc_changed(cpu: &mut Cpu) {
    timer::tsc_changed(cpu);
}

/// IA32_TSC_DEADLINE.
pub fn tsc_deadline(cpu: &mut Cpu) -> u64 {
    timer::elapse(cpu);
    cpu.lapic.timer.tsc_deadline()
}

/// Writes IA32_TSC_DEADLINE.
pub fn set_tsc_deadline(cpu: &mut Cpu, deadline: u64) {
    timer::set_tsc_deadline(cpu, deadline);
}

/// A load from the register page. Registers are 32 bits wide at multiples of 16 bytes.
pub fn mmio_read(cpu: &mut Cpu, offset: u32, data: &mut [u8]) {
    let value = match offset & !0xf {
        reg::ICR_HIGH => (cpu.lapic.icr >> 32) as u32,
        reg::DFR => cpu.lapic.dfr,
        register => read(cpu, register).unwrap_or_else(|| {
            cpu.lapic.error(esr::ILLEGAL_REGISTER);
            0
        }),
    };
    let bytes = u64::from(value).to_le_bytes();
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = bytes.get((offset & 0xf) as usize + i).copied().unwrap_or(0);
    }
}

/// A store to it; one that is not of 32 bits to a register's address is ignored (SDM vol. 3A 11.4.1).
pub fn mmio_write(cpu: &mut Cpu, offset: u32, data: &[u8]) {
    let Ok(bytes) = <[u8; 4]>::try_from(data) else { return };
    let value = u32::from_le_bytes(bytes);
    let lapic = &mut cpu.lapic;
    match offset {
        _ if offset & 0xf != 0 => return,
        reg::ID => {
            lapic.xapic_id = value >> 24;
            ipi::publish_address(cpu);
        }
        reg::LDR => {
            lapic.ldr = value & 0xff00_0000;
            ipi::publish_address(cpu);
        }
        reg::DFR => {
            lapic.dfr = value | 0x0fff_ffff;
            ipi::publish_address(cpu);
        }
        reg::ICR_HIGH => lapic.icr = lapic.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32,
        reg::ICR => {
            lapic.icr = lapic.icr & !0xffff_ffff | u64::from(value & !ipi::DELIVERY_STATUS);
            ipi::send(cpu);
        }
        _ => write(cpu, offset, value),
    }
    look_again(cpu);
}

/// The registers that both modes share; `None` where there is none to be read.
fn read(cpu: &mut Cpu, register: u32) -> Option<u32> {
    let lapic = &mut cpu.lapic;
    if let Some(i) = group(register, reg::ISR) {
        return Some(lapic.isr[i]);
    }
    if let Some(i) = group(register, reg::TMR) {
        return Some(lapic.tmr[i]);
    }
    if let Some(i) = group(register, reg::IRR) {
        take_vectors(cpu);
        return Some(cpu.lapic.irr[i]);
    }
    if let Some(i) = lvt_index(register) {
        return Some(lapic.lvt[i]);
    }
    Some(match register {
        reg::ID if lapic.x2apic() => lapic.initial_id,
        reg::ID => lapic.xapic_id << 24,
        reg::VERSION => VERSION,
        reg::TPR => u32::from(lapic.tpr),
        reg::PPR => u32::from(lapic.ppr()),
        reg::APR | reg::RRD | reg::EOI if !lapic.x2apic() => 0,
        reg::LDR if lapic.x2apic() => ipi::x2apic_logical_id(lapic.initial_id),
        reg::LDR => lapic.ldr,
        reg::SVR => lapic.svr,
        reg::ESR => lapic.esr,
        reg::ICR => lapic.icr as u32,
        reg::INITIAL_COUNT => lapic.timer.initial_count(),
        reg::CURRENT_COUNT => {
            timer::elapse(cpu);
            cpu.lapic.timer.current_count()
        }
        reg::DIVIDE => lapic.timer.divide(),
        _ => return None,
    })
}

/// Writes a register that both modes share.
fn write(cpu: &mut Cpu, register: u32, value: u32) {
    match register {
        reg::TPR => cpu.lapic.tpr = value as u8,
        reg::EOI => end_of_interrupt(cpu),
        reg::SVR => write_svr(cpu, value),
        reg::ESR => cpu.lapic.esr = std::mem::take(&mut cpu.lapic.errors),
        reg::INITIAL_COUNT => timer::set_initial_count(cpu, value),
        reg::DIVIDE => timer::set_divide(cpu, value),
        reg::LVT_TIMER => timer::set_lvt(cpu, value),
        reg::LVT_THERMAL | reg::LVT_PERF | reg::LVT_LINT0 | reg::LVT_LINT1 | reg::LVT_ERROR => {
            if let Some(i) = lvt_index(register) {
                cpu.lapic.lvt[i] = cpu.lapic.allowed_lvt(i, value);
                // The 8259 may have been waiting for LINT0 to open.
                cpu.request_of_self(request::EXTINT);
            }
        }
        // Read-only ones are not errors.
        reg::VERSION | reg::PPR | reg::APR | reg::RRD | reg::CURRENT_COUNT => {}
        _ if group(register, reg::ISR).or(group(register, reg::TMR)).or(group(register, reg::IRR)).is_some() => {}
        _ => cpu.lapic.error(esr::ILLEGAL_REGISTER),
    }
}

impl Lapic {
    /// What an LVT entry becomes when `value` is written: masked whatever it says while the APIC is disabled by
    /// software (SDM vol. 3A 11.4.7.2).
    fn allowed_lvt(&self, index: usize, value: u32) -> u32 {
        let forced = if self.svr & svr::ENABLED == 0 { lvt::MASKED } else { 0 };
        value & LVT_WRITABLE[index] | forced
    }
}

fn write_svr(cpu: &mut Cpu, value: u32) {
    cpu.lapic.svr = value & svr::WRITABLE;
    if cpu.lapic.svr & svr::ENABLED == 0 {
        timer::elapse(cpu);
        for entry in &mut cpu.lapic.lvt {
            *entry |= lvt::MASKED;
        }
    }
    ipi::publish_address(cpu);
}

/// The highest vector in service is done; the I/O APIC hears of a level-triggered one.
fn end_of_interrupt(cpu: &mut Cpu) {
    let Some(vector) = highest(&cpu.lapic.isr) else { return };
    set(&mut cpu.lapic.isr, vector, false);
    if is_set(&cpu.lapic.tmr, vector) && cpu.lapic.svr & svr::SUPPRESS_EOI == 0 {
        cpu.bus().end_of_interrupt(vector);
    }
}

/// Writes IA32_APIC_BASE: the modes of SDM vol. 3A figure 11-27.
pub fn set_base(cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
    let address = (1 << physical_bits(&cpu.cpuid)) - 0x1000;
    let old = cpu.lapic.base & (base::EN | base::EXTD);
    let new = value & (base::EN | base::EXTD);
    let reserved = value & !(address | base::BSP | base::EN | base::EXTD) != 0;
    let allowed = match (old, new) {
        (_, base::EXTD) => false,                 // no x2APIC mode without being enabled
        (0, new) => new & base::EXTD == 0,        // from disabled to xAPIC only
        (old, base::EN) => old & base::EXTD == 0, // not back from x2APIC to xAPIC
        _ => true,
    };
    if reserved || !allowed {
        return Err(Exception::GP0);
    }
    if old != 0 && new == 0 {
        cpu.lapic.reset_registers();
        cpu.lapic.xapic_id = cpu.lapic.initial_id & 0xff;
    }
    if old == base::EN && new == base::EN | base::EXTD {
        // The logical ID now follows from the ID; ICR's destination has another format.
        cpu.lapic.icr &= 0xffff_ffff;
    }
    cpu.lapic.base = value;
    ipi::publish_address(cpu);
    // The register page may have moved, and with it what is memory and what not.
    cpu.flush_tlb_all();
    cpu.request_of_self(request::EXTINT);
    Ok(())
}

/// RDMSR of 0x800 to 0x8ff (SDM vol. 3A table 11-6).
pub fn read_msr(cpu: &mut Cpu, index: u32) -> Result<u64, Exception> {
    let register = (index - 0x800) << 4;
    if !cpu.lapic.x2apic() {
        return Err(Exception::GP0);
    }
    match register {
        reg::ICR => Ok(cpu.lapic.icr),
        reg::ICR_HIGH | reg::DFR | reg::EOI | reg::SELF_IPI => Err(Exception::GP0),
        _ => read(cpu, register).map(u64::from).ok_or(Exception::GP0),
    }
}

/// WRMSR to 0x800 to 0x8ff: bits that are not there fault.
pub fn write_msr(cpu: &mut Cpu, index: u32, value: u64) -> Result<(), Exception> {
    let register = (index - 0x800) << 4;
    let writable = match register {
        reg::TPR | reg::SELF_IPI => 0xff,
        reg::EOI | reg::ESR => 0,
        reg::SVR => u64::from(svr::WRITABLE),
        reg::ICR => !ipi::X2APIC_ICR_RESERVED,
        reg::INITIAL_COUNT => 0xffff_ffff,
        reg::DIVIDE => 0xb,
        // The delivery status (bit 12) and the remote IRR (bit 14) are read-only.
        _ => match lvt_index(register) {
            Some(i) => u64::from(LVT_WRITABLE[i] | 1 << 12 | 1 << 14),
            None => return Err(Exception::GP0),
        },
    };
    if !cpu.lapic.x2apic() || value & !writable != 0 {
        return Err(Exception::GP0);
    }
    match register {
        reg::ICR => {
            cpu.lapic.icr = value & !u64::from(ipi::DELIVERY_STATUS);
            ipi::send(cpu);
        }
        reg::SELF_IPI => ipi::send_to_self(cpu, value as u8),
        _ => write(cpu, register, value as u32),
    }
    look_again(cpu);
    Ok(())
}

/// Whether an MSR is one of the x2APIC's.
pub fn is_x2apic_msr(index: u32) -> bool {
    (0x800..0x900).contains(&index)
}

/// The MSRs that belong to the local APIC but not to the x2APIC's range.
pub const MSRS: [u32; 2] = [msr::APIC_BASE, msr::TSC_DEADLINE];
