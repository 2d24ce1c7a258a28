//! The physical address map of `pc-1`: where memory, firmware tables, devices and what a boot method hands over lie.
//!
//! ```text
//! 0000_0000  RAM, 640 KiB       the hand-over areas below, the kernel's from then on
//! 000a_0000  hole               (a PC's video memory)
//! 000c_0000  RAM                (a PC's option ROMs)
//! 000e_0000  RAM, reserved      ACPI tables, the generation ID
//! 0010_0000  RAM                kernel, initrd; up to 3 GiB
//! c000_0000  hole               PCI functions, e000_0000 ECAM (reserved), fec0_0000 I/O APIC, fee0_0000 local APICs
//! 1_0000_0000  RAM              the rest
//! ```

/// A page.
pub const PAGE: u64 = 4096;
/// 1 MiB.
pub const MIB: u64 = 1 << 20;

/// The least memory that a machine can have: a kernel is loaded from 1 MiB up.
pub const MIN_MEMORY: u64 = 2 * MIB;
/// The most processors. Their APIC IDs (0 and up) must fit 8 bits, of which 255 is broadcast (SDM vol. 3A 11.6.2.1).
pub const MAX_CPUS: u32 = 255;

/// The most disks: so many slots of the PCI bus are theirs.
pub const MAX_DISKS: usize = 16;
/// The most network devices, for the same reason.
pub const MAX_NETWORKS: usize = 8;

/// End of conventional memory. The last KiB is the extended BIOS data area, where kernels look for one.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// The extended BIOS data area.
pub const EBDA: u64 = 0x9_fc00;
/// Where a PC has its option ROMs. Kernels search here, too, for what firmware leaves behind: it is memory, so that not
/// every byte that they look at is an exit.
pub const OPTION_ROMS: u64 = 0xc_0000;
/// Start of the area in which kernels look for the RSDP (ACPI 6.5 5.2.5.1), and of all ACPI tables.
pub const ACPI: u64 = 0xe_0000;
/// End of the ACPI tables' area.
pub const ACPI_END: u64 = GENERATION_ID;
/// The generation ID, with a page for itself: no operating system is to use what is beside it.
pub const GENERATION_ID: u64 = HIGH_RAM - PAGE;
/// Start of extended memory.
pub const HIGH_RAM: u64 = 0x10_0000;
/// Where memory below 4 GiB ends at the latest; what does not fit goes on at [`RAM_ABOVE_4G`].
pub const RAM_BELOW_4G_END: u64 = 0xc000_0000;
/// Memory above the hole.
pub const RAM_ABOVE_4G: u64 = 1 << 32;

/// What PCI functions have their registers in.
pub const PCI_WINDOW: u64 = RAM_BELOW_4G_END;
/// Length of [`PCI_WINDOW`].
pub const PCI_WINDOW_LENGTH: u64 = ECAM - PCI_WINDOW;
/// PCI Express configuration space (256 buses).
pub const ECAM: u64 = 0xe000_0000;
/// Length of [`ECAM`].
pub const ECAM_LENGTH: u64 = 0x1000_0000;
/// The I/O APIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The local APICs (the engine's).
pub const LAPIC: u64 = 0xfee0_0000;

/// What a boot method hands over, all in conventional memory.
pub mod handover {
    /// Global descriptor table.
    pub const GDT: u64 = 0x500;
    /// `boot_params`, `hvm_start_info` or multiboot information, one page for the structure itself…
    pub const INFO: u64 = 0x7000;
    /// …and one for the lists that it points to.
    pub const LISTS: u64 = 0x8000;
    /// The six pages of an identity mapping of the first 4 GiB.
    pub const PAGE_TABLES: u64 = 0x9000;
    /// The command line (and other strings); 64 KiB.
    pub const CMDLINE: u64 = 0x2_0000;
    /// End of the command line's area.
    pub const CMDLINE_END: u64 = 0x3_0000;
}

/// Guest memory as slots for [`purlin_engine::memory::create`].
pub fn slots(memory: u64) -> Vec<(u64, u64)> {
    let below = memory.min(RAM_BELOW_4G_END);
    let mut slots = vec![(0, LOW_RAM_END), (OPTION_ROMS, below - OPTION_ROMS)];
    if memory > below {
        slots.push((RAM_ABOVE_4G, memory - below));
    }
    slots
}

/// What a range of the memory map is (ACPI 6.5 15.3, table 15.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// Free for the guest.
    Ram = 1,
    /// Not free.
    Reserved = 2,
}

/// A range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// What it is.
    pub kind: RangeKind,
}

/// The memory map as the firmware call E820 would give it, sorted; every boot method hands this same map over.
pub fn memory_map(memory: u64) -> Vec<Range> {
    let below = memory.min(RAM_BELOW_4G_END);
    let range = |start, end, kind| Range { start, length: end - start, kind };
    let mut map = vec![
        range(0, EBDA, RangeKind::Ram),
        range(EBDA, LOW_RAM_END, RangeKind::Reserved),
        range(ACPI, HIGH_RAM, RangeKind::Reserved),
        range(HIGH_RAM, below, RangeKind::Ram),
        range(ECAM, ECAM + ECAM_LENGTH, RangeKind::Reserved),
    ];
    if memory > below {
        map.push(range(RAM_ABOVE_4G, RAM_ABOVE_4G + (memory - below), RangeKind::Ram));
    }
    map
}

/// End of memory below 4 GiB.
pub fn low_end(memory: u64) -> u64 {
    memory.min(RAM_BELOW_4G_END)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_split_round_the_hole() {
        assert_eq!(slots(512 * MIB), [(0, 0xa_0000), (0xc_0000, 512 * MIB - 0xc_0000)]);
        let eight = slots(8 << 30);
        assert_eq!(eight[1], (0xc_0000, 0xc000_0000 - 0xc_0000));
        assert_eq!(eight[2], (1 << 32, 5 << 30));
    }

    #[test]
    fn the_map_is_sorted_disjoint_and_all_of_its_ram_is_in_a_slot() {
        for memory in [MIN_MEMORY, 512 * MIB, 3 << 30, (3 << 30) + PAGE, 64 << 30] {
            let map = memory_map(memory);
            assert!(map.windows(2).all(|w| w[0].start + w[0].length <= w[1].start), "{memory:#x}: {map:x?}");
            let slots = slots(memory);
            for r in map.iter().filter(|r| r.kind == RangeKind::Ram) {
                let inside = |&(start, length)| r.start >= start && r.start + r.length <= start + length;
                assert!(slots.iter().any(inside), "{memory:#x}: {r:x?}");
            }
        }
    }
}
