//! Memory type range registers (SDM vol. 3A 12.11). They have no effect beyond being there: all of a guest's memory
//! is write-back.

use purlin_arch::x86_64::msr::MTRR_DEF_TYPE;

use crate::exception::Exception;

/// IA32_MTRRCAP: eight variable ranges, the fixed ones, write-combining.
pub const CAP: u64 = VARIABLE as u64 | 1 << 8 | 1 << 10;

/// Number of variable ranges.
const VARIABLE: usize = 8;
/// IA32_MTRR_PHYSBASE0; bases and masks alternate.
const PHYS_BASE: u32 = 0x200;
/// The fixed ranges, each of eight types.
const FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];

/// The memory type range registers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mtrrs {
    default_type: u64,
    variable: [[u64; 2]; VARIABLE],
    fixed: [u64; FIXED.len()],
}

/// Which register an index names.
enum Register {
    DefaultType,
    Base(usize),
    Mask(usize),
    Fixed(usize),
}

impl Register {
    fn find(index: u32) -> Option<Self> {
        if index == MTRR_DEF_TYPE {
            return Some(Self::DefaultType);
        }
        if let Some(i) = FIXED.iter().position(|fixed| *fixed == index) {
            return Some(Self::Fixed(i));
        }
        let i = index.checked_sub(PHYS_BASE)? as usize;
        match (i / 2 < VARIABLE, i % 2) {
            (false, _) => None,
            (true, 0) => Some(Self::Base(i / 2)),
            (true, _) => Some(Self::Mask(i / 2)),
        }
    }
}

impl Mtrrs {
    /// The register `index`, if it is one of these.
    pub fn read(&self, index: u32) -> Option<u64> {
        Some(match Register::find(index)? {
            Register::DefaultType => self.default_type,
            Register::Base(i) => self.variable[i][0],
            Register::Mask(i) => self.variable[i][1],
            Register::Fixed(i) => self.fixed[i],
        })
    }

    /// Writes the register `index`, if it is one of these; `physical_bits` is MAXPHYADDR.
    pub fn write(&mut self, index: u32, value: u64, physical_bits: u32) -> Option<Result<(), Exception>> {
        let page = (1 << physical_bits) - 0x1000;
        let register = Register::find(index)?;
        let valid = match register {
            Register::DefaultType => value & !0xcff == 0 && is_type(value as u8),
            Register::Base(_) => value & !(page | 0xff) == 0 && is_type(value as u8),
            Register::Mask(_) => value & !(page | 1 << 11) == 0,
            Register::Fixed(_) => value.to_le_bytes().into_iter().all(is_type),
        };
        if !valid {
            return Some(Err(Exception::GP0));
        }
        *match register {
            Register::DefaultType => &mut self.default_type,
            Register::Base(i) => &mut self.variable[i][0],
            Register::Mask(i) => &mut self.variable[i][1],
            Register::Fixed(i) => &mut self.fixed[i],
        } = value;
        Some(Ok(()))
    }

    /// All indices, for saving.
    pub fn indices() -> impl Iterator<Item = u32> {
        let variable = PHYS_BASE..PHYS_BASE + 2 * VARIABLE as u32;
        std::iter::once(MTRR_DEF_TYPE).chain(variable).chain(FIXED)
    }
}

/// UC, WC, WT, WP, WB.
fn is_type(kind: u8) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_keep_what_is_valid() {
        let mut mtrrs = Mtrrs::default();
        let valid =
            [(0x2ff, 0xc06), (0x200, 0xc000_0000), (0x201, 0xff_c000_0800), (0x20f, 0x800), (0x26f, 0x0606_0505)];
        for (index, value) in valid {
            assert_eq!(mtrrs.write(index, value, 40), Some(Ok(())), "{index:#x}");
            assert_eq!(mtrrs.read(index), Some(value), "{index:#x}");
        }
        let invalid = [(0x2ff, 0x1000), (0x2ff, 2), (0x200, 7), (0x200, 1 << 40), (0x201, 0x400), (0x250, 0x0300)];
        for (index, value) in invalid {
            assert_eq!(mtrrs.write(index, value, 40), Some(Err(Exception::GP0)), "{index:#x} {value:#x}");
        }
        assert_eq!(mtrrs.write(0x210, 0, 40), None, "eight ranges only");
        assert_eq!(mtrrs.read(0x251), None);
        assert_eq!(Mtrrs::indices().filter(|i| mtrrs.read(*i).is_some()).count(), 1 + 16 + 11);
    }
}
