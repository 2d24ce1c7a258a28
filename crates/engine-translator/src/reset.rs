//! The processor after power-up, INIT and SIPI (SDM vol. 3A table 9-1).

use std::sync::Arc;

use purlin_arch::x86_64::{
    cpuid::CpuidEntry,
    regs::{cr0, gpr::RDX, rflags, seg::CS, xcr0},
    state::Activity,
};

use crate::{
    cpu::{Cpu, Segment, Table, access},
    debug::{dr6, dr7},
    translate::{PageCopies, RecentBlocks},
    vm::Shared,
};

const DATA: u32 = access::P | access::S | access::RW | access::ACCESSED;

/// Real-mode segments after reset: 64 KiB at 0, CS at the top of memory.
fn segments() -> [Segment; 6] {
    let mut segments = [Segment { base: 0, limit: 0xffff, access: DATA, selector: 0 }; 6];
    segments[CS] = Segment { base: 0xffff_0000, limit: 0xffff, access: DATA | access::CODE, selector: 0xf000 };
    segments
}

/// LDTR and TR after reset: present, of type LDT and busy 32-bit TSS, 64 KiB at 0.
fn ldtr() -> Segment {
    Segment { base: 0, limit: 0xffff, access: access::P | 2, selector: 0 }
}

fn tr() -> Segment {
    Segment { base: 0, limit: 0xffff, access: access::P | 11, selector: 0 }
}

impl Cpu {
    /// A processor after power-up. Number 0 is the bootstrap processor, the others wait for SIPI.
    pub fn new(shared: Arc<Shared>, index: u32, cpuid: Arc<Vec<CpuidEntry>>) -> Self {
        let mut cpu = Self {
            gpr: [0; 16],
            rip: 0,
            rflags: rflags::FIXED,
            seg: segments(),
            emitted: Default::default(),
            ldtr: ldtr(),
            tr: tr(),
            gdtr: Table { base: 0, limit: 0xffff },
            idtr: Table { base: 0, limit: 0xffff },
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: xcr0::X87,
            dr: [0; 4],
            dr6: dr6::FIXED,
            dr7: dr7::FIXED,
            pdptes: [0; 4],
            cpl: 0,
            sti_shadow: false,
            mov_ss_shadow: false,
            injected: None,
            nmi_pending: false,
            nmi_masked: false,
            pending_debug: 0,
            activity: Activity::Running,
            xstate: Default::default(),
            msrs: Default::default(),
            lapic: crate::lapic::Lapic::new(index),
            clock: Default::default(),
            cpuid: Default::default(),
            features: Default::default(),
            index,
            tlb: crate::tlb::TlbHandle::standalone(),
            shared,
            copies: PageCopies::default(),
            recent: RecentBlocks::default(),
            bus: None,
            leave: false,
        };
        cpu.set_cpuid(cpuid);
        cpu.cr0 = cr0::CD | cr0::NW | cr0::ET;
        cpu.start_at_reset_vector();
        if index != 0 {
            cpu.activity = Activity::WaitForSipi;
        }
        cpu
    }

    /// What power-up and INIT have in common.
    fn start_at_reset_vector(&mut self) {
        self.gpr = [0; 16];
        self.gpr[RDX] = self.signature();
        self.rip = 0xfff0;
        self.rflags = rflags::FIXED;
        self.seg = segments();
        (self.ldtr, self.tr) = (ldtr(), tr());
        self.gdtr = Table { base: 0, limit: 0xffff };
        self.idtr = Table { base: 0, limit: 0xffff };
        (self.cr2, self.cr3, self.cr4, self.efer) = (0, 0, 0, 0);
        self.dr = [0; 4];
        (self.dr6, self.dr7) = (dr6::FIXED, dr7::FIXED);
        self.pdptes = [0; 4];
        self.cpl = 0;
        self.sti_shadow = false;
        self.mov_ss_shadow = false;
        self.injected = None;
        self.nmi_masked = false;
        self.pending_debug = 0;
        self.flush_tlb_all();
    }

    /// Family, model and stepping, which RDX holds after a reset.
    fn signature(&self) -> u64 {
        self.cpuid.iter().find(|e| e.leaf == 1).map_or(0, |e| u64::from(e.eax))
    }
}

/// INIT (SDM vol. 3A 9.1.1): as after power-up, but x87, vector and model-specific registers, XCR0 and the cache
/// bits of CR0 stay. The bootstrap processor starts again at the reset vector, the others wait for SIPI.
pub fn init(cpu: &mut Cpu) {
    cpu.cr0 = cpu.cr0 & (cr0::CD | cr0::NW) | cr0::ET;
    cpu.start_at_reset_vector();
    crate::lapic::init(cpu);
    cpu.activity = if cpu.index == 0 { Activity::Running } else { Activity::WaitForSipi };
}

/// SIPI: a processor that waits for it starts in real mode at page `vector` (SDM vol. 3A 8.4.3); any other ignores
/// it.
pub fn sipi(cpu: &mut Cpu, vector: u8) {
    if cpu.activity != Activity::WaitForSipi {
        return;
    }
    let code = &mut cpu.seg[CS];
    code.selector = u16::from(vector) << 8;
    code.base = u64::from(vector) << 12;
    cpu.rip = 0;
    cpu.activity = Activity::Running;
}

#[cfg(test)]
mod tests;
