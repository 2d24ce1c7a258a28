//! Copies and fills on guest memory by host address, a page's part at a time, for the string instructions.
#![allow(unsafe_code)]

/// Which way a string instruction goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Up,
    Down,
}

/// Copies `length` bytes from `source` to `target` as single moves of `size` bytes in `direction` would: where a move
/// reads what an earlier one has written, the bytes repeat.
///
/// # Safety
/// Both are addresses of guest memory with `length` bytes left on their pages, found for loads and stores. `length` is
/// a multiple of `size`.
pub(super) unsafe fn copy(source: *const u8, target: *mut u8, length: usize, size: usize, direction: Direction) {
    let distance = (target as usize).wrapping_sub(source as usize);
    let repeats = match direction {
        Direction::Up => distance != 0 && distance < length,
        Direction::Down => distance.wrapping_neg() != 0 && distance.wrapping_neg() < length,
    };
    if !repeats {
        // SAFETY: as the caller promises.
        unsafe { std::ptr::copy(source, target, length) };
        return;
    }
    for i in 0..length / size {
        let at = match direction {
            Direction::Up => i * size,
            Direction::Down => length - (i + 1) * size,
        };
        let mut element = [0; 8];
        // SAFETY: `at + size` is at most `length`.
        unsafe {
            std::ptr::copy_nonoverlapping(source.add(at), element.as_mut_ptr(), size);
            std::ptr::copy_nonoverlapping(element.as_ptr(), target.add(at), size);
        }
    }
}

/// Fills `length` bytes at `target` with the low `size` bytes of `value`.
///
/// # Safety
/// As for [`copy`].
pub(super) unsafe fn fill(target: *mut u8, length: usize, size: usize, value: u64) {
    let bytes = value.to_le_bytes();
    let element = &bytes[..size];
    if element.iter().all(|b| *b == element[0]) {
        // SAFETY: as the caller promises.
        unsafe { std::ptr::write_bytes(target, element[0], length) };
        return;
    }
    for at in (0..length).step_by(size) {
        // SAFETY: `length` is a multiple of `size`.
        unsafe { std::ptr::copy_nonoverlapping(element.as_ptr(), target.add(at), size) };
    }
}

/// The element of `size` bytes at `source`.
///
/// # Safety
/// `source` is an address of guest memory with `size` bytes left on its page.
pub(super) unsafe fn load(source: *const u8, size: usize) -> u64 {
    let mut bytes = [0; 8];
    // SAFETY: as the caller promises.
    unsafe { std::ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), size) };
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_equal_single_moves() {
        for size in [1usize, 2, 4, 8] {
            for (source, target) in [(0usize, 64usize), (0, 1), (0, 8), (8, 0), (3, 0), (0, 0), (5, 9), (40, 8)] {
                for direction in [Direction::Up, Direction::Down] {
                    let start: Vec<u8> = (0..160).collect();
                    let (mut wanted, mut got, length) = (start.clone(), start, 48);
                    for i in 0..length / size {
                        let at = if direction == Direction::Up { i * size } else { length - (i + 1) * size };
                        let element = wanted[source + at..source + at + size].to_vec();
                        wanted[target + at..target + at + size].copy_from_slice(&element);
                    }
                    let base = got.as_mut_ptr();
                    // SAFETY: both ranges are in the vector.
                    unsafe { copy(base.add(source), base.add(target), length, size, direction) };
                    assert_eq!(got, wanted, "{size} {source} {target} {direction:?}");
                }
            }
        }
    }
}
