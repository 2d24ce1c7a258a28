//! FADT: the fixed hardware (ACPI 6.5 5.2.9).

use acpi_tables::{
    fadt::{FADTBuilder, Flags, PmProfile},
    gas::{AccessSize, AddressSpace, GAS},
};

use purlin_devices::{acpi_pm::AcpiPm, rtc::Rtc};

use super::{OEM, OEM_REVISION, OEM_TABLE, SCI, bytes};
use crate::chipset::ports;

/// `IAPC_BOOT_ARCH`: there are devices on an ISA bus.
const LEGACY_DEVICES: u16 = 1 << 0;
/// `IAPC_BOOT_ARCH`: there is no VGA. (And no keyboard controller to probe for: bit 1 is clear.)
const NO_VGA: u16 = 1 << 2;
/// There is no C2, no C3: latencies above 100 and 1000 µs say so.
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

/// The table; it points to the DSDT and the FACS.
pub fn table(dsdt: u64, facs: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_64(facs)
        .preferred_pm_profile(PmProfile::Desktop)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    // PWR_BUTTON is clear: the power button is fixed hardware. Kernels of before ACPI 2.0 read the 32-bit fields, and ACPICA warns where both are given and differ.
    fadt.sci_int = u16::from(SCI).into();
    fadt.pm1a_evt_blk = u32::from(ports::PM1_EVENT).into();
    fadt.pm1a_cnt_blk = u32::from(ports::PM1_CONTROL).into();
    fadt.pm_tmr_blk = u32::from(ports::PM_TIMER).into();
    fadt.x_pm1a_evt_blk = register(ports::PM1_EVENT, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = register(ports::PM1_CONTROL, 16, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = register(ports::PM_TIMER, 32, AccessSize::DwordAccess);
    (fadt.pm1_evt_len, fadt.pm1_cnt_len) = (AcpiPm::EVENT_LENGTH, AcpiPm::CONTROL_LENGTH);
    fadt.pm_tmr_len = AcpiPm::TIMER_LENGTH;
    (fadt.p_lvl2_lat, fadt.p_lvl3_lat) = (NO_C2.into(), NO_C3.into());
    fadt.century = Rtc::CENTURY;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA).into();
    fadt.reset_reg = register(ports::RESET, 8, AccessSize::ByteAccess);
    fadt.reset_value = ports::RESET_VALUE;
    bytes(&fadt.finalize())
}

fn register(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}
