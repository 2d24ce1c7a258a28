//! Where the components of the XSAVE area are. Processors differ: Intel's leave a gap where MPX was, AMD's do not.

use std::{ops::Range, sync::OnceLock};

use purlin_arch::x86_64::{
    cpuid::{CpuidEntry, lookup},
    regs::xcr0,
};

use super::{AREA, offset};

/// Highest component that is known, plus one: Hi16_ZMM is 7.
pub const COMPONENTS: u32 = 8;

/// Offsets and sizes of the extended components in the standard format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    components: [Component; COMPONENTS as usize],
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Component {
    offset: usize,
    size: usize,
    /// Starts at a multiple of 64 in the compacted format.
    aligned: bool,
}

impl Layout {
    /// The host's.
    pub fn host() -> &'static Self {
        static HOST: OnceLock<Layout> = OnceLock::new();
        HOST.get_or_init(|| Self::from_leaves(host_leaf))
    }

    /// The one that a guest sees.
    pub fn of(cpuid: &[CpuidEntry]) -> Self {
        Self::from_leaves(|component| lookup(cpuid, 0xd, component))
    }

    fn from_leaves(leaf: impl Fn(u32) -> [u32; 4]) -> Self {
        let mut layout = Self::default();
        for component in [2, 5, 6, 7] {
            let [size, offset, flags, _] = leaf(component);
            let (size, offset) = (size as usize, offset as usize);
            if size == known_size(component) && offset >= offset::HEADER_END && offset.saturating_add(size) <= AREA {
                layout.components[component as usize] = Component { offset, size, aligned: flags & 2 != 0 };
            }
        }
        layout
    }

    /// The bytes of a component in the standard format; `None` if there is no such component (nor for x87, which is
    /// in several pieces).
    pub fn range(&self, component: u32) -> Option<Range<usize>> {
        if component == 1 {
            return Some(offset::XMM..offset::XMM + 256);
        }
        let Component { offset, size, .. } = *self.components.get(component as usize)?;
        (size != 0).then_some(offset..offset + size)
    }

    /// The bytes of a component in the compacted format with the components of `xcomp_bv` (SDM vol. 1 13.4.3).
    pub fn compacted(&self, component: u32, xcomp_bv: u64) -> Option<Range<usize>> {
        if component == 1 {
            return self.range(1);
        }
        let mut end = offset::HEADER_END;
        for i in (2..COMPONENTS).filter(|i| xcomp_bv & 1 << i != 0) {
            let Component { size, aligned, .. } = self.components[i as usize];
            let start = if aligned { end.next_multiple_of(64) } else { end };
            end = start + size;
            if i == component {
                return (size != 0).then_some(start..end);
            }
        }
        None
    }

    /// The components that there are, as bits of XCR0.
    pub fn components(&self) -> u64 {
        (2..COMPONENTS).filter(|i| self.range(*i).is_some()).fold(xcr0::X87 | xcr0::SSE, |all, i| all | 1 << i)
    }

    /// Size of the area that holds `components` in the standard format.
    pub fn standard_size(&self, components: u64) -> usize {
        let ends = (2..COMPONENTS).filter(|i| components & 1 << i != 0).filter_map(|i| self.range(i)).map(|r| r.end);
        ends.max().unwrap_or(offset::HEADER_END)
    }

    /// Size of the area that holds `components` in the compacted format.
    pub fn compacted_size(&self, components: u64) -> usize {
        let ends = (2..COMPONENTS).filter_map(|i| self.compacted(i, components)).map(|r| r.end);
        ends.max().unwrap_or(offset::HEADER_END)
    }
}

/// Sizes are the same everywhere: 16 upper halves, 8 masks, 16 upper halves, 16 registers.
fn known_size(component: u32) -> usize {
    match component {
        2 => 256,
        5 => 64,
        6 => 512,
        7 => 1024,
        _ => 0,
    }
}

fn host_leaf(component: u32) -> [u32; 4] {
    use core::arch::x86_64::{__cpuid, __cpuid_count};
    if __cpuid(0).eax < 0xd {
        return [0; 4];
    }
    let leaf = __cpuid_count(0xd, component);
    [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
}
