//! Which pages of a private mapping this process has written to.
//!
//! The kernel is asked what it has anyway: a page that was written is no longer the file's (Linux's
//! Documentation/admin-guide/mm/pagemap.rst).

// One ioctl.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    ops::Range,
    os::{fd::AsRawFd, unix::fs::FileExt},
    sync::OnceLock,
};

use crate::PAGE_SIZE;

/// `/proc/self/pagemap`, opened.
#[derive(Debug)]
pub(crate) struct Pagemap(File);

/// Opens what freezes need of /proc, once for the process: to be called before a sandbox closes it.
pub fn prepare() -> io::Result<()> {
    Pagemap::of_process().map(|_| ())
}

/// `PAGEMAP_SCAN`, since Linux 6.7: `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;

/// `PAGE_IS_*`
const FILE: u64 = 1 << 2;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
const ZERO_PAGE: u64 = 1 << 5;

/// `struct pm_scan_arg`
#[repr(C)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_length: u64,
    max_pages: u64,
    inverted: u64,
    all_of: u64,
    any_of: u64,
    returned: u64,
}

/// `struct page_region`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// Regions that one call tells at most.
const REGIONS: usize = 1024;

impl Pagemap {
    /// This process's, which stays open.
    pub fn of_process() -> io::Result<&'static Self> {
        static OPENED: OnceLock<Pagemap> = OnceLock::new();
        match OPENED.get() {
            Some(pagemap) => Ok(pagemap),
            None => {
                let opened = Self(File::open("/proc/self/pagemap")?);
                Ok(OPENED.get_or_init(|| opened))
            }
        }
    }

    /// The pages, counted from `address`, among the `count` from there on that are private to this process and not the
    /// file's that is mapped there.
    pub(crate) fn private(&self, address: u64, count: u64) -> io::Result<Vec<Range<u64>>> {
        match self.scan(address, count) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                self.read(address, count)
            }
            other => other,
        }
    }

    /// By the ioctl.
    fn scan(&self, address: u64, count: u64) -> io::Result<Vec<Range<u64>>> {
        let end = address + count * PAGE_SIZE;
        let (mut at, mut found) = (address, Vec::new());
        let mut regions = [Region::default(); REGIONS];
        while at < end {
            let mut scan = Scan {
                size: size_of::<Scan>() as u64,
                flags: 0,
                start: at,
                end,
                walk_end: 0,
                regions: regions.as_mut_ptr() as u64,
                regions_length: REGIONS as u64,
                max_pages: 0,
                inverted: FILE | ZERO_PAGE,
                all_of: FILE | ZERO_PAGE,
                any_of: PRESENT | SWAPPED,
                returned: FILE,
            };
            // SAFETY: the kernel writes to `scan` and to as many regions as it is told that there are.
            let told = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
            let told = usize::try_from(told).map_err(|_| io::Error::last_os_error())?;
            let page = |at: u64| (at - address) / PAGE_SIZE;
            regions[..told].iter().for_each(|r| add(&mut found, page(r.start)..page(r.end)));
            // Without progress there is nothing more to hear.
            at = if scan.walk_end > at { scan.walk_end } else { end };
        }
        Ok(found)
    }

    /// By reading a word for each page.
    fn read(&self, address: u64, count: u64) -> io::Result<Vec<Range<u64>>> {
        const AT_ONCE: u64 = 8192;
        let (mut buffer, mut found) = (vec![0; 8 * AT_ONCE as usize], Vec::new());
        for first in (0..count).step_by(AT_ONCE as usize) {
            let words = &mut buffer[..8 * AT_ONCE.min(count - first) as usize];
            self.0.read_exact_at(words, (address / PAGE_SIZE + first) * 8)?;
            for (page, word) in (first..).zip(words.chunks_exact(8)) {
                let word = word.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
                // Present or swapped, and of no file.
                if word >> 62 != 0 && word >> 61 & 1 == 0 {
                    add(&mut found, page..page + 1);
                }
            }
        }
        Ok(found)
    }
}

/// Adds a range behind the last one.
fn add(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use crate::{Freeze, create, from_layers};

    use super::*;

    #[test]
    fn both_ways_see_what_was_written() {
        let pagemap = Pagemap::of_process().unwrap();
        const PAGES: u64 = 9000;
        let ram = Arc::new(create(&[(0, PAGES * PAGE_SIZE)]).unwrap());
        (0..PAGES).step_by(3).for_each(|page| ram.write_obj(1u8, GuestAddress(page * PAGE_SIZE)).unwrap());
        let layers = Freeze::begin(&ram).unwrap().finish().unwrap().into_layers().unwrap();
        let clone = from_layers(&layers).unwrap();
        let address = clone.iter().next().unwrap().as_ptr() as u64;
        let see = || {
            let seen = pagemap.scan(address, PAGES).unwrap();
            assert_eq!(seen, pagemap.read(address, PAGES).unwrap());
            seen
        };
        // Pages are read, and some of them written.
        (0..PAGES).for_each(|page| assert!(clone.read_obj::<u8>(GuestAddress(page * PAGE_SIZE)).unwrap() < 2));
        assert_eq!(see(), []);
        for page in [0, 1, 5, 4095, 4096, 8191, 8192, PAGES - 1] {
            clone.write_obj(2u8, GuestAddress(page * PAGE_SIZE)).unwrap();
        }
        assert_eq!(see(), [0..2, 5..6, 4095..4097, 8191..8193, PAGES - 1..PAGES]);
        // More runs than one call tells.
        (0..PAGES).step_by(2).for_each(|page| clone.write_obj(2u8, GuestAddress(page * PAGE_SIZE)).unwrap());
        assert!(see().len() > 4000);
    }
}
