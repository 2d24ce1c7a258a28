//! DSDT: what cannot be enumerated (ACPI 6.5 5.2.11.1), in AML.

use acpi_tables::{
    Aml,
    aml::{
        Arg, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If,
        Interrupt, Method, Name, Notify, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Return, Scope,
        Store,
    },
};

use purlin_devices::{acpi_pm::AcpiPm, pvpanic::Pvpanic};

use super::{GENERATION_IRQ, bytes, pci, sdt};
use crate::{chipset::ports, config::MachineConfig, layout::GENERATION_ID};

/// The table.
pub fn table(config: &MachineConfig) -> Vec<u8> {
    let mut dsdt = sdt(b"DSDT", 2);
    dsdt.append_slice(&sleep_states());
    dsdt.append_slice(&system_bus(config));
    dsdt.as_slice().to_vec()
}

/// `\_S5`: what PM1 control's SLP_TYP must hold to power off.
fn sleep_states() -> Vec<u8> {
    let s5: &dyn Aml = &AcpiPm::SLEEP_TYPE_S5;
    bytes(&Name::new("_S5_".into(), &Package::new(vec![s5, s5, &0u8, &0u8])))
}

fn system_bus(config: &MachineConfig) -> Vec<u8> {
    let mut devices: Vec<u8> = (0..config.cpus).flat_map(processor).collect();
    devices.extend(pci::host_bridge());
    devices.extend(pci::ecam());
    devices.extend(platform_device("PIC_", "PNP0000", &[(0x20, 2), (0xa0, 2), (0x4d0, 2)], None));
    // The timer's interrupt is not named here: AML's would be input 0 of the I/O APIC, and the MADT has its override.
    devices.extend(platform_device("PIT_", "PNP0100", &[(0x40, 4)], None));
    devices.extend(platform_device("RTC_", "PNP0B00", &[(0x70, 2)], Some(8)));
    if config.serial {
        devices.extend(platform_device("COM1", "PNP0501", &[(0x3f8, 8)], Some(4)));
    }
    let board = [(ports::ACPI_PM, AcpiPm::PORTS as u8), (ports::RESET, 1)];
    devices.extend(platform_device("MBRD", "PNP0C02", &board, None));
    devices.extend(panic_port());
    devices.extend(generation_id());
    devices.extend(event_device());
    Scope::raw("\\_SB_".into(), devices)
}

/// The port by which a guest says that its kernel has panicked, with the methods of its specification (QEMU,
/// docs/specs/pvpanic): RDPT gives what is understood, WRPT says what has happened.
fn panic_port() -> Vec<u8> {
    let (port, length) = (ports::PVPANIC, Pvpanic::PORTS as u8);
    let said = || Path::new("PEPT");
    let registers = vec![FieldEntry::Named(*b"PEPT", 8)];
    bytes(&Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(port, port, 1, length)])),
            &OpRegion::new("PEOR".into(), OpRegionSpace::SystemIO, &port, &length),
            &Field::new(
                "PEOR".into(),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::Preserve,
                registers,
            ),
            &Method::new("RDPT".into(), 0, false, vec![&Return::new(&said())]),
            &Method::new("WRPT".into(), 1, false, vec![&Store::new(&said(), &Arg(0))]),
        ],
    ))
}

/// Where the generation ID is (Microsoft, "Virtual Machine Generation ID"), with the name by which systems find it, and
/// the one that is valid as an ID of ACPI's.
fn generation_id() -> Vec<u8> {
    let (low, high) = (GENERATION_ID as u32, (GENERATION_ID >> 32) as u32);
    bytes(&Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"PRLN0001"),
            &Name::new("_CID".into(), &Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"])),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    ))
}

/// What notifies the guest's drivers of events that come by an interrupt (ACPI 6.5 5.6.9): of a new generation ID.
fn event_device() -> Vec<u8> {
    let interrupt = Interrupt::new(true, true, false, false, GENERATION_IRQ.into());
    bytes(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&interrupt])),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&If::new(
                    &Equal::new(&Arg(0), &GENERATION_IRQ),
                    vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &0x80u8)],
                )],
            ),
        ],
    ))
}

/// A processor; `_UID` ties it to its entry in the MADT.
fn processor(id: u32) -> Vec<u8> {
    let name = format!("C{id:03X}");
    bytes(&Device::new(
        name.as_str().into(),
        vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &id)],
    ))
}

/// An ISA device: its ports (first, number of them) and edge-triggered interrupt.
fn platform_device(name: &str, hid: &str, ports: &[(u16, u8)], irq: Option<u32>) -> Vec<u8> {
    let ports: Vec<IO> = ports.iter().map(|&(first, count)| IO::new(first, first, 1, count)).collect();
    let interrupt = irq.map(|irq| Interrupt::new(true, true, false, false, irq));
    let mut resources: Vec<&dyn Aml> = ports.iter().map(|p| p as &dyn Aml).collect();
    resources.extend(interrupt.iter().map(|i| i as &dyn Aml));
    bytes(&Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new(hid)),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    ))
}
