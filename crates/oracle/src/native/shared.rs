//! What the child and its parent share.

use std::{
    cell::UnsafeCell,
    sync::atomic::{AtomicU32, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use crate::{
    layout::{CODE_BYTES, DATA_BYTES},
    xsave::Area,
};

/// Cases in a batch at most.
pub const BATCH: usize = 64;

/// Bytes of code in a case at most: all that there is room for.
pub const MAX_CODE: usize = CODE_BYTES;

/// A case on its way to the child, and its outcome on the way back: each value is replaced by what it was at the end.
#[repr(C, align(64))]
pub struct Slot {
    pub cs: u16,
    pub ss: u16,
    pub entry: u64,
    pub code_len: usize,
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub selectors: [u16; 6],
    /// Of FS and GS.
    pub bases: [u64; 2],
    pub vector: u64,
    pub error: u64,
    pub address: u64,
    pub area_len: usize,
    pub area: Area,
    pub code: [u8; MAX_CODE],
    pub memory: [u8; DATA_BYTES],
}

/// All of it.
#[repr(C)]
pub struct Shared {
    pub control: Control,
    slots: UnsafeCell<[Slot; BATCH]>,
}

// SAFETY: the slots belong to whoever has the turn, which `Control` says.
unsafe impl Sync for Shared {}

impl Shared {
    pub fn slot(&self, i: usize) -> *mut Slot {
        assert!(i < BATCH);
        self.slots.get().cast::<Slot>().wrapping_add(i)
    }
}

const PARENT: u32 = 0;
const CHILD: u32 = 1;

/// Whose turn it is.
#[repr(C)]
pub struct Control {
    turn: AtomicU32,
    count: AtomicUsize,
    progress: AtomicUsize,
}

impl Control {
    /// The child's turn, to come up.
    pub fn reset(&self) {
        self.turn.store(CHILD, Ordering::SeqCst);
        self.progress.store(0, Ordering::SeqCst);
    }

    /// The child's turn, with a batch.
    pub fn start(&self, count: usize) {
        self.progress.store(0, Ordering::SeqCst);
        self.count.store(count, Ordering::SeqCst);
        self.turn.store(CHILD, Ordering::SeqCst);
        futex(&self.turn, libc::FUTEX_WAKE, 1, std::ptr::null());
    }

    /// Waits for the parent's turn; false if that takes too long.
    pub fn wait(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        while self.turn.load(Ordering::SeqCst) == CHILD {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let time = libc::timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            futex(&self.turn, libc::FUTEX_WAIT, CHILD, &time);
        }
        true
    }

    /// Cases that are done.
    pub fn progress(&self) -> usize {
        self.progress.load(Ordering::SeqCst)
    }

    /// The child is past `i` cases.
    pub fn set_progress(&self, i: usize) {
        self.progress.store(i, Ordering::SeqCst);
    }

    /// Gives the turn back and waits for the next batch. Returns its size.
    pub fn next_batch(&self) -> usize {
        self.turn.store(PARENT, Ordering::SeqCst);
        futex(&self.turn, libc::FUTEX_WAKE, 1, std::ptr::null());
        while self.turn.load(Ordering::SeqCst) == PARENT {
            futex(&self.turn, libc::FUTEX_WAIT, PARENT, std::ptr::null());
        }
        self.count.load(Ordering::SeqCst)
    }
}

/// The system call, without libc's `errno`: in the child FS does not lead to it.
fn futex(word: &AtomicU32, operation: i32, value: u32, time: *const libc::timespec) {
    // SAFETY: a system call with pointers that are valid for its time; the kernel changes RAX, RCX and R11.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") libc::SYS_futex => _,
            in("rdi") word as *const AtomicU32,
            in("rsi") operation,
            in("rdx") value,
            in("r10") time,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
}
