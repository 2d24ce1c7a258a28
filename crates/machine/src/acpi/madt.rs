//! MADT: processors and interrupt controllers (ACPI 6.5 5.2.12).

use super::{SCI, sdt};
use crate::layout::{IOAPIC, LAPIC};

/// There are 8259s too, to be masked before the APICs are used.
const PCAT_COMPAT: u32 = 1;
/// A processor that can be used.
const ENABLED: u32 = 1;
/// Polarity and trigger mode as the bus has them: for ISA active high and edge.
const CONFORMS: u16 = 0;
/// Active high (1), level-triggered (3).
const HIGH_LEVEL: u16 = 3 << 2 | 1;
/// Every processor.
const ALL_PROCESSORS: u8 = 0xff;

/// I/O APIC input of the PIT's interrupt: 0 is the 8259's output on real boards.
pub const TIMER_GSI: u32 = 2;

/// The table for `cpus` processors with APIC IDs from 0 up.
pub fn table(cpus: u32) -> Vec<u8> {
    let mut madt = sdt(b"APIC", 5);
    madt.append_slice(&(LAPIC as u32).to_le_bytes());
    madt.append_slice(&PCAT_COMPAT.to_le_bytes());
    for id in 0..cpus as u8 {
        madt.append_slice(&local_apic(id));
    }
    madt.append_slice(&io_apic());
    madt.append_slice(&source_override(0, TIMER_GSI, CONFORMS));
    madt.append_slice(&source_override(SCI, SCI.into(), HIGH_LEVEL));
    madt.append_slice(&local_apic_nmi());
    madt.as_slice().to_vec()
}

/// Processor local APIC, 5.2.12.2. The processor's UID is its APIC ID.
fn local_apic(id: u8) -> [u8; 8] {
    let [a, b, c, d] = ENABLED.to_le_bytes();
    [0, 8, id, id, a, b, c, d]
}

/// I/O APIC, 5.2.12.3: ID 0, inputs from 0 up.
fn io_apic() -> [u8; 12] {
    let [a, b, c, d] = (IOAPIC as u32).to_le_bytes();
    [1, 12, 0, 0, a, b, c, d, 0, 0, 0, 0]
}

/// Interrupt source override, 5.2.12.5: ISA interrupt `irq` arrives at input `gsi`.
fn source_override(irq: u8, gsi: u32, flags: u16) -> [u8; 10] {
    let ([a, b, c, d], [e, f]) = (gsi.to_le_bytes(), flags.to_le_bytes());
    [2, 10, 0, irq, a, b, c, d, e, f]
}

/// Local APIC NMI, 5.2.12.7: at LINT1 of every processor.
fn local_apic_nmi() -> [u8; 6] {
    let [a, b] = CONFORMS.to_le_bytes();
    [4, 6, ALL_PROCESSORS, a, b, 1]
}
