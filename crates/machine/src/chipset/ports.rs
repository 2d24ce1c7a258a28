//! Port numbers that more than one place must know: devices are put there, firmware tables tell of them.

use purlin_devices::{acpi_pm::AcpiPm, reset_control::ResetControl};

/// COM1.
pub const COM1: u16 = 0x3f8;
/// Edge/level control of both 8259s.
pub const ELCR: u16 = 0x4d0;
/// ACPI's fixed hardware.
pub const ACPI_PM: u16 = 0x600;
/// PM1a event block.
pub const PM1_EVENT: u16 = ACPI_PM + AcpiPm::EVENT;
/// PM1a control block.
pub const PM1_CONTROL: u16 = ACPI_PM + AcpiPm::CONTROL;
/// Power management timer.
pub const PM_TIMER: u16 = ACPI_PM + AcpiPm::TIMER;
/// Where the guest says that its kernel has panicked.
pub const PVPANIC: u16 = 0x505;
/// The reset control, also the ACPI reset register.
pub const RESET: u16 = 0xcf9;
/// What resets the machine there.
pub const RESET_VALUE: u8 = ResetControl::RESET_VALUE;
