//! Where returns lead: for each jump table a stack of host addresses, which emitted code's calls push and its returns pop.
//!
//! What is popped is a guess, as good as the guest's calls and returns are paired: the place behind a call that it leads to,
//! a *return site*, checks that it is the one for the address that the guest's own stack held. Where it is not, or where
//! there is no guess left, the jump table says. So a stack may be emptied at any moment; like jump tables, it must be
//! when linear addresses change their meaning.
//!
//! Below each stack is a page that nobody may touch. A call that runs into it finds the stack empty (see `signals.rs`).
#![allow(unsafe_code)]

use std::{io, ptr::NonNull};

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use super::jumps::TABLES;

/// Bytes from one stack to the next, with the page between.
const STRIDE: usize = 64 << 10;
const GUARD: usize = 4096;

/// The stacks of one vCPU.
pub struct ReturnStacks {
    memory: NonNull<u8>,
    pointers: [u64; TABLES],
}

impl ReturnStacks {
    /// Empty stacks; `sentinels` is where a return from each leads while it is empty.
    pub fn new(sentinels: &[u64; TABLES]) -> io::Result<Self> {
        let (len, prot) = (TABLES * STRIDE, ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let pointer = unsafe { mmap_anonymous(std::ptr::null_mut(), len, prot, MapFlags::PRIVATE)? };
        let memory = NonNull::new(pointer.cast()).ok_or(io::Error::from(io::ErrorKind::OutOfMemory))?;
        let mut stacks = Self { memory, pointers: [0; TABLES] };
        for (table, &sentinel) in sentinels.iter().enumerate() {
            let base = stacks.base() + (table * STRIDE) as u64;
            let top = stacks.top(table) as *mut u64;
            // SAFETY: all of it is within the new mapping.
            unsafe {
                mprotect(base as *mut _, GUARD, MprotectFlags::empty())?;
                top.add(1).write(sentinel);
            }
        }
        stacks.forget();
        Ok(stacks)
    }

    /// Address of the lowest byte.
    pub fn base(&self) -> u64 {
        self.memory.as_ptr() as u64
    }

    fn top(&self, table: usize) -> u64 {
        self.base() + (table * STRIDE + TOP) as u64
    }

    /// The stack pointer of that of `table`.
    pub fn pointer(&self, table: usize) -> u64 {
        self.pointers[table]
    }

    /// Sets it, to what emitted code has left.
    pub fn set_pointer(&mut self, table: usize, pointer: u64) {
        self.pointers[table] = pointer;
    }

    /// Empties them all.
    pub fn forget(&mut self) {
        for table in 0..TABLES {
            self.forget_table(table);
        }
    }

    /// Empties that of `table`.
    pub fn forget_table(&mut self, table: usize) {
        let top = self.top(table);
        // SAFETY: it is within the mapping, which is ours, and emitted code is not executed.
        unsafe { renew(top) };
        self.pointers[table] = top;
    }
}

/// Offset of an empty stack's pointer from where the stack begins.
const TOP: usize = STRIDE - 64;

/// Puts the word at the top of a stack back, which is a copy of the one above: emitted code may have put another one there.
///
/// # Safety
/// `top` is what [`emptied`] or [`ReturnStacks::top`] says of a stack that nobody uses at the moment.
pub unsafe fn renew(top: u64) {
    // SAFETY: both are within the stack, as the caller vouches.
    unsafe { (top as *mut u64).write((top as *const u64).add(1).read()) };
}

/// The pointer that empties the stack which a push at `address` has run out of: stacks begin at `base`.
pub fn emptied(base: u64, address: u64) -> Option<u64> {
    let offset = usize::try_from(address.checked_sub(base)?).ok().filter(|offset| *offset < TABLES * STRIDE)?;
    (offset % STRIDE < GUARD).then(|| base + (offset - offset % STRIDE + TOP) as u64)
}

impl Drop for ReturnStacks {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; nobody executes with it any more.
        let _ = unsafe { munmap(self.memory.as_ptr().cast(), TABLES * STRIDE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_push_below_a_stack_empties_that_one() {
        let stacks = ReturnStacks::new(&[7; TABLES]).unwrap();
        let base = stacks.base();
        for table in 0..TABLES {
            let lowest = base + (table * STRIDE + GUARD) as u64;
            assert_eq!(emptied(base, lowest - 8), Some(stacks.pointer(table)));
            assert_eq!(emptied(base, lowest), None);
            // SAFETY: the sentinel is there.
            assert_eq!(unsafe { *(stacks.pointer(table) as *const u64) }, 7);
        }
        assert_eq!(emptied(base, base - 8), None);
        assert_eq!(emptied(base, base + (TABLES * STRIDE) as u64), None);
    }
}
