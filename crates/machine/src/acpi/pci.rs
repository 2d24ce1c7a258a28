//! PCI Express: the MCFG table (PCI Firmware Specification 3.3, 4.1.2) and the host bridge in the DSDT (4.5, ACPI 6.5
//! 6.2.11).

use acpi_tables::{
    Aml,
    aml::{
        AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If, Local,
        Memory32Fixed, Method, Name, NotEqual, Or, Path, ResourceTemplate, Return, Store, Uuid,
    },
    mcfg::MCFG,
};

use super::{OEM, OEM_REVISION, OEM_TABLE, bytes};
use crate::layout::{ECAM, ECAM_LENGTH, PCI_WINDOW, PCI_WINDOW_LENGTH};

/// The last bus whose configuration space is in ECAM.
const LAST_BUS: u8 = (ECAM_LENGTH / (1 << 20) - 1) as u8;
/// What the operating system may control of what it asks for: hot-plug (native and SHPC), power management events,
/// error reporting, the capability structure.
const OSC_CONTROL: u8 = 0x1f;
/// `_OSC` status: another revision than this one's.
const OSC_REVISION: u8 = 1 << 3;
/// `_OSC` status: another interface than PCI's.
const OSC_UUID: u8 = 1 << 2;
/// `_OSC` status: not all of what was asked for is granted.
const OSC_MASKED: u8 = 1 << 4;

/// The table that says where ECAM is.
pub fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(ECAM, 0, 0, LAST_BUS);
    bytes(&mcfg)
}

/// The host bridge: what is behind it, and at which addresses.
pub fn host_bridge() -> Vec<u8> {
    let window = PCI_WINDOW as u32..=(PCI_WINDOW + (PCI_WINDOW_LENGTH - 1)) as u32;
    let (first, last) = (*window.start(), *window.end());
    bytes(&Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_SEG".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            // Devices read and write memory as the processors see it.
            &Name::new("_CCA".into(), &1u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &AddressSpace::new_bus_number(0u16, LAST_BUS.into()),
                    &IO::new(0xcf8, 0xcf8, 1, 8),
                    &AddressSpace::new_io(0x0000u16, 0x0cf7, None),
                    &AddressSpace::new_io(0x0d00u16, 0xffff, None),
                    &AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None),
                ]),
            ),
            &Raw(osc()),
        ],
    ))
}

/// The addresses of ECAM, which are not to be given to anybody: those of a system board's device.
pub fn ecam() -> Vec<u8> {
    bytes(&Device::new(
        "ECAM".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &1u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(true, ECAM as u32, ECAM_LENGTH as u32)]),
            ),
        ],
    ))
}

/// `_OSC(UUID, revision, count, capabilities)`: who controls what of PCI Express.
fn osc() -> Vec<u8> {
    let (status, control): (Path, Path) = ("CDW1".into(), "CDW3".into());
    let (capabilities, granted) = (Arg(3), Local(0));
    let complain = |bit: &'static u8| bytes(&Or::new(&Path::new("CDW1"), &Path::new("CDW1"), bit));
    let pci = Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766");
    bytes(&Method::new(
        "_OSC".into(),
        4,
        false,
        vec![
            &CreateDWordField::new(&status, &capabilities, &0u8),
            &If::new(
                &Equal::new(&Arg(0), &pci),
                vec![
                    &CreateDWordField::new(&control, &capabilities, &8u8),
                    &And::new(&granted, &control, &OSC_CONTROL),
                    &If::new(&NotEqual::new(&Arg(1), &1u8), vec![&Raw(complain(&OSC_REVISION))]),
                    &If::new(&NotEqual::new(&control, &granted), vec![&Raw(complain(&OSC_MASKED))]),
                    &Store::new(&control, &granted),
                ],
            ),
            &Else::new(vec![&Raw(complain(&OSC_UUID))]),
            &Return::new(&capabilities),
        ],
    ))
}

/// AML that has been made already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}
