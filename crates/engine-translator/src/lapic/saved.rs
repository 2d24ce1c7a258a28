//! The local APIC's saved state: its register page.

use std::sync::atomic::Ordering;

use purlin_arch::x86_64::lapic::LapicState;
use purlin_state::StateError;

use super::{LVT_WRITABLE, Lapic, VERSION, base, ipi, reg, svr, take_vectors, timer, timer::Timer};
use crate::{clock::monotonic_ns, cpu::Cpu, mailbox::request};

/// Size of the saved register page in bytes.
const PAGE: usize = 1024;

/// The state, after all that other threads have sent has been taken over. `requests` are the requests (bits of
/// [`request`]) that the run loop has taken from the mailbox but not acted on.
pub fn save(cpu: &mut Cpu, requests: u32) -> LapicState {
    take_vectors(cpu);
    timer::elapse(cpu);
    let lapic = &cpu.lapic;
    let mut page = Page(vec![0; PAGE]);
    page.set(reg::ID, if lapic.x2apic() { lapic.initial_id } else { lapic.xapic_id << 24 });
    page.set(reg::VERSION, VERSION);
    page.set(reg::TPR, u32::from(lapic.tpr));
    page.set(reg::PPR, u32::from(lapic.ppr()));
    page.set(reg::LDR, if lapic.x2apic() { ipi::x2apic_logical_id(lapic.initial_id) } else { lapic.ldr });
    page.set(reg::DFR, lapic.dfr);
    page.set(reg::SVR, lapic.svr);
    for (first, vectors) in [(reg::ISR, &lapic.isr), (reg::TMR, &lapic.tmr), (reg::IRR, &lapic.irr)] {
        for (offset, word) in (first..).step_by(16).zip(vectors) {
            page.set(offset, *word);
        }
    }
    page.set(reg::ESR, lapic.esr);
    page.set(reg::ICR, lapic.icr as u32);
    page.set(reg::ICR_HIGH, (lapic.icr >> 32) as u32);
    for (offset, entry) in (reg::LVT_TIMER..).step_by(16).zip(&lapic.lvt) {
        page.set(offset, *entry);
    }
    page.set(reg::INITIAL_COUNT, lapic.timer.initial_count());
    page.set(reg::CURRENT_COUNT, lapic.timer.current_count());
    page.set(reg::DIVIDE, lapic.timer.divide());

    let sipi = match cpu.shared.mailbox(cpu.index as usize) {
        Some(mailbox) if requests & request::SIPI != 0 => mailbox.sipi_vector.load(Ordering::SeqCst) + 1,
        _ => 0,
    };
    LapicState {
        regs: page.0,
        timer_remaining_ns: cpu.lapic.timer.remaining_ns(monotonic_ns()),
        sipi_plus_one: sipi,
        init_pending: requests & request::INIT != 0,
    }
}

/// Takes over a state. `apic_base` is IA32_APIC_BASE; IA32_TSC_DEADLINE is to be written afterwards.
pub fn restore(cpu: &mut Cpu, saved: &LapicState, apic_base: u64) -> Result<(), StateError> {
    let corrupt = |reason: &str| Err(StateError::corrupt("vcpu", reason));
    if saved.regs.len() != PAGE {
        return corrupt("the local APIC's register page is not 1 KiB long");
    }
    if apic_base & (base::EN | base::EXTD) == base::EXTD {
        return corrupt("the local APIC is in an impossible mode");
    }
    if saved.sipi_plus_one > 256 {
        return corrupt("SIPI vector out of range");
    }
    let page = Page(saved.regs.clone());
    let mut lapic = Lapic::new(cpu.index);
    lapic.base = apic_base;
    if !lapic.x2apic() {
        lapic.xapic_id = page.get(reg::ID) >> 24;
        lapic.ldr = page.get(reg::LDR) & 0xff00_0000;
    }
    lapic.tpr = page.get(reg::TPR) as u8;
    lapic.dfr = page.get(reg::DFR) | 0x0fff_ffff;
    lapic.svr = page.get(reg::SVR) & svr::WRITABLE;
    for (first, vectors) in [(reg::ISR, &mut lapic.isr), (reg::TMR, &mut lapic.tmr), (reg::IRR, &mut lapic.irr)] {
        for (offset, word) in (first..).step_by(16).zip(vectors.iter_mut()) {
            *word = page.get(offset);
        }
        // Vectors 0 to 15 do not exist.
        vectors[0] &= !0xffff;
    }
    lapic.esr = page.get(reg::ESR);
    lapic.icr = u64::from(page.get(reg::ICR)) | u64::from(page.get(reg::ICR_HIGH)) << 32;
    for (i, offset) in (reg::LVT_TIMER..).step_by(16).take(lapic.lvt.len()).enumerate() {
        lapic.lvt[i] = page.get(offset) & LVT_WRITABLE[i];
    }
    lapic.timer = Timer::restored(page.get(reg::INITIAL_COUNT), page.get(reg::DIVIDE), saved.timer_remaining_ns);
    // The line is the devices' state, which comes first: it has not risen just now.
    lapic.lint0 = cpu.shared.extint.load(Ordering::SeqCst);
    cpu.lapic = lapic;
    ipi::publish_address(cpu);
    restore_requests(cpu, saved);
    Ok(())
}

/// What other threads have sent goes back into the mailbox, emptied of what it held for the state before.
fn restore_requests(cpu: &Cpu, saved: &LapicState) {
    let Some(mailbox) = cpu.shared.mailbox(cpu.index as usize) else { return };
    for word in mailbox.irr.iter().chain(&mailbox.level) {
        word.store(0, Ordering::SeqCst);
    }
    let kept = mailbox.take() & (request::KICK | request::SAFE_POINT);
    let mut requests = kept | request::LAPIC | request::TIMER | request::EXTINT;
    if saved.init_pending {
        requests |= request::INIT;
    }
    if let Some(vector) = saved.sipi_plus_one.checked_sub(1) {
        mailbox.sipi_vector.store(vector, Ordering::SeqCst);
        requests |= request::SIPI;
    }
    mailbox.request(requests);
}

/// A register page.
struct Page(Vec<u8>);

impl Page {
    fn set(&mut self, offset: u32, value: u32) {
        self.0[offset as usize..offset as usize + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn get(&self, offset: u32) -> u32 {
        let at = offset as usize;
        u32::from_le_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }
}
