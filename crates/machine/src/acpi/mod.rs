//! The ACPI tables (ACPI 6.5 chapter 5): RSDP, XSDT, FADT, FACS, MADT, MCFG, DSDT.

mod dsdt;
mod fadt;
mod madt;
mod pci;

pub use madt::TIMER_GSI;

use acpi_tables::{Aml, facs::FACS, rsdp::Rsdp, sdt::Sdt, xsdt::XSDT};
use purlin_engine::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::{
    config::MachineConfig,
    error::MachineError,
    layout::{ACPI, ACPI_END},
};

/// In each table: who made it.
const OEM: [u8; 6] = *b"PURLIN";
/// In each table: the machine type.
const OEM_TABLE: [u8; 8] = *b"PC-1    ";
/// In each table: the revision of the machine type's tables.
const OEM_REVISION: u32 = 1;

/// The interrupt by which ACPI events arrive, level-triggered and active high.
pub const SCI: u8 = 9;
/// The interrupt of a new generation ID, edge-triggered.
pub const GENERATION_IRQ: u8 = 5;

/// Writes the tables of a machine. The RSDP is at [`ACPI`].
pub fn write(config: &MachineConfig, ram: &GuestRam) -> Result<(), MachineError> {
    for (address, table) in tables(config) {
        debug_assert!(address + table.len() as u64 <= ACPI_END);
        ram.write_slice(&table, GuestAddress(address))?;
    }
    Ok(())
}

/// All tables with their addresses.
fn tables(config: &MachineConfig) -> Vec<(u64, Vec<u8>)> {
    let mut area = Area { next: ACPI + Rsdp::len() as u64, tables: Vec::new() };
    let dsdt = area.add(dsdt::table(config));
    let facs = area.add(bytes(&FACS::new()));
    let fadt = area.add(fadt::table(dsdt, facs));
    let madt = area.add(madt::table(config.cpus));
    let mcfg = area.add(pci::mcfg());
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    xsdt.add_entry(mcfg);
    let xsdt = area.add(bytes(&xsdt));
    area.tables.push((ACPI, bytes(&Rsdp::new(OEM, xsdt))));
    area.tables
}

/// Places tables one after the other.
struct Area {
    next: u64,
    tables: Vec<(u64, Vec<u8>)>,
}

impl Area {
    fn add(&mut self, table: Vec<u8>) -> u64 {
        // The FACS must start at a multiple of 64 (5.2.10); the others do not mind.
        let address = self.next.next_multiple_of(64);
        self.next = address + table.len() as u64;
        self.tables.push((address, table));
        address
    }
}

/// An empty table with a header.
fn sdt(signature: &[u8; 4], revision: u8) -> Sdt {
    Sdt::new(*signature, 36, revision, OEM, OEM_TABLE, OEM_REVISION)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::*;
    use crate::{boot::tests::config, layout::MAX_CPUS};

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
    }

    fn table<'a>(tables: &'a [(u64, Vec<u8>)], signature: &[u8]) -> &'a [u8] {
        &tables.iter().find(|(_, t)| t.starts_with(signature)).unwrap().1
    }

    fn u64_at(table: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(table[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn the_most_processors_fit_the_area_and_no_tables_overlap() {
        let mut tables = tables(&config(512 << 20, MAX_CPUS));
        tables.sort();
        assert!(tables.windows(2).all(|w| w[0].0 + w[0].1.len() as u64 <= w[1].0));
        let (address, last) = tables.last().unwrap();
        assert!(address + last.len() as u64 <= ACPI_END);
    }

    #[test]
    fn lengths_and_checksums_hold() {
        for (_, table) in tables(&config(512 << 20, 2)) {
            match &table[..4] {
                b"RSD " => assert_eq!((sum(&table[..20]), sum(&table), table.len()), (0, 0, 36)),
                b"FACS" => assert_eq!(table.len(), 64),
                signature => {
                    assert_eq!(sum(&table), 0, "{signature:?}");
                    assert_eq!(table[4..8], (table.len() as u32).to_le_bytes(), "{signature:?}");
                }
            }
        }
    }

    #[test]
    fn pointers_lead_from_the_rsdp_to_every_table() {
        let tables = tables(&config(512 << 20, 2));
        let at = |address: u64| &tables.iter().find(|t| t.0 == address).unwrap().1[..4];
        let rsdp = table(&tables, b"RSD PTR ");
        assert_eq!(at(ACPI), b"RSD ");
        assert_eq!(at(u64_at(rsdp, 24)), b"XSDT");
        let xsdt = table(&tables, b"XSDT");
        let entries = [36, 44, 52].map(|offset| at(u64_at(xsdt, offset)));
        assert_eq!(entries, [b"FACP", b"APIC", b"MCFG"]);
        assert_eq!(xsdt.len(), 60);
        let fadt = table(&tables, b"FACP");
        assert_eq!((at(u64_at(fadt, 140)), at(u64_at(fadt, 132))), (&b"DSDT"[..], &b"FACS"[..]));
    }

    /// Disassembles each table and compiles the result: ACPICA, which kernels use too, must find no fault.
    #[test]
    fn acpica_accepts_the_tables() {
        if std::env::var_os("PURLIN_TEST_NO_IASL").is_some() {
            return;
        }
        let directory = std::env::temp_dir().join(format!("purlin-acpi-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        for signature in [b"DSDT", b"FACP", b"APIC", b"MCFG", b"XSDT", b"FACS"] {
            let tables = tables(&config(512 << 20, 3));
            let name = String::from_utf8_lossy(signature).to_lowercase();
            let (binary, source) = (directory.join(format!("{name}.aml")), directory.join(format!("{name}.dsl")));
            fs::write(&binary, table(&tables, signature)).unwrap();
            for arguments in [["-d", binary.to_str().unwrap()], ["-we", source.to_str().unwrap()]] {
                let run = Command::new("iasl").current_dir(&directory).args(arguments).output();
                let run = run.expect("iasl runs (package acpica-tools; PURLIN_TEST_NO_IASL=1 goes without)");
                let text = [run.stdout, run.stderr].concat();
                let text = String::from_utf8_lossy(&text);
                assert!(run.status.success() && !text.contains("Warning  ") && !text.contains("***"), "{text}");
            }
        }
        fs::remove_dir_all(&directory).unwrap();
    }
}
