//! One machine's processors: what the vCPUs share, and how they wait for each other.

use std::{
    alloc::{Layout, handle_alloc_error},
    ptr::{self, NonNull},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::{
    clock::VmClock,
    cpu::Block,
    mailbox::{Mailbox, request},
    profile::{Place, Profile},
    ram::Ram,
    translate::CodeCache,
};

/// What the vCPUs of one VM share.
pub struct Shared {
    /// Guest memory.
    pub ram: Ram,
    /// The translations.
    pub code: CodeCache,
    /// The vCPUs' blocks, by index; set once, before the first runs.
    pub blocks: OnceLock<Vec<BlockPtr>>,
    /// Level of the 8259's INTR output.
    pub extint: AtomicBool,
    /// The clock that kvmclock shows.
    pub clock: VmClock,
    /// Guest TSC frequency in kHz (the host's).
    pub tsc_khz: u32,
    /// Held by the vCPU that makes a page watched, until no other has an entry to store to it.
    pub watching: Mutex<()>,
    /// Held by the vCPU that has all others stand outside of emitted code.
    pub world: Mutex<()>,
    /// Code below 4 GiB is movable, too (see `translate/place.rs`).
    pub low_movable: AtomicBool,
    /// What is counted of it.
    pub profile: Option<Arc<Profile>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(profile) = &self.profile {
            profile.ended(&self.code);
        }
    }
}

/// A vCPU's block: the mailbox may be used by any thread, the `Cpu` by the one that took the vCPU.
#[derive(Clone, Copy, Debug)]
pub struct BlockPtr(pub NonNull<Block>);

#[allow(unsafe_code)]
// SAFETY: see the fields of `Block`; the blocks live as long as the `Shared` that lists them.
unsafe impl Send for BlockPtr {}
#[allow(unsafe_code)]
// SAFETY: as above.
unsafe impl Sync for BlockPtr {}

impl BlockPtr {
    /// The mailbox.
    #[allow(unsafe_code)]
    pub fn mailbox(&self) -> &Mailbox {
        // SAFETY: the block is alive, and its mailbox is made for being shared.
        unsafe { &(*self.0.as_ptr()).mailbox }
    }
}

/// The blocks of a VM's vCPUs. Whoever uses one, or a mailbox in one, keeps this alive.
pub struct Blocks(Vec<BlockPtr>);

#[allow(unsafe_code)]
impl Blocks {
    /// `count` blocks of zeroed memory, which is not touched: most of a block is tables of which a vCPU uses little at first.
    /// (The allocator would write the zeroes, megabytes of them, for the sake of the alignment.)
    pub fn allocate(count: usize) -> Vec<BlockPtr> {
        const { assert!(align_of::<Block>() <= 4096) };
        let allocate = || {
            let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
            // SAFETY: a new mapping, at an address of the kernel's choice, and of whole pages.
            let block = unsafe { mmap_anonymous(ptr::null_mut(), size_of::<Block>(), prot, flags) };
            let block = block.ok().and_then(|block| NonNull::new(block.cast()));
            BlockPtr(block.unwrap_or_else(|| handle_alloc_error(Layout::new::<Block>())))
        };
        (0..count).map(|_| allocate()).collect()
    }

    /// Takes ownership of blocks.
    ///
    /// # Safety
    /// They are from [`Blocks::allocate`], were initialised, and have no other owner.
    pub unsafe fn own(blocks: Vec<BlockPtr>) -> Self {
        Self(blocks)
    }

    /// The block of vCPU `index`.
    pub fn get(&self, index: u32) -> Option<BlockPtr> {
        self.0.get(index as usize).copied()
    }
}

#[allow(unsafe_code)]
impl Drop for Blocks {
    fn drop(&mut self) {
        for block in &self.0 {
            // SAFETY: owned and initialised, see `Blocks::own`; nobody uses them any more.
            unsafe {
                ptr::drop_in_place(block.0.as_ptr());
                let _ = munmap(block.0.as_ptr().cast(), size_of::<Block>());
            }
        }
    }
}

impl Shared {
    /// The mailbox of vCPU `index`.
    pub fn mailbox(&self, index: usize) -> Option<&Mailbox> {
        self.blocks.get()?.get(index).map(BlockPtr::mailbox)
    }

    /// The mailboxes of all vCPUs, by index.
    pub fn mailboxes(&self) -> impl Iterator<Item = &Mailbox> {
        (0..).map_while(|index| self.mailbox(index))
    }

    fn others(&self, me: u32) -> impl Iterator<Item = (u32, &Mailbox)> {
        let blocks = self.blocks.get().map_or(&[][..], Vec::as_slice);
        blocks.iter().enumerate().map(|(i, b)| (i as u32, b.mailbox())).filter(move |(i, _)| *i != me)
    }

    /// Makes the vCPUs in `writers` (bit `index % 64`), but `me`, forget that the page at `host` may be stored to, and
    /// waits until they have: they are outside of emitted code, or have been since. The caller is outside.
    pub fn forbid_stores(&self, writers: u64, host: u64, me: u32) {
        let _phase = self.mailbox(me as usize).map(|m| m.phase.during(Place::Waiting));
        let mut waiting = Vec::new();
        for (_, mailbox) in self.others(me).filter(|(i, _)| writers & (1 << (i % 64)) != 0) {
            mailbox.forbidden.lock().unwrap_or_else(PoisonError::into_inner).push(host);
            let inside = mailbox.inside.load(Ordering::SeqCst);
            mailbox.request(request::SAFE_POINT);
            waiting.push((mailbox, inside));
        }
        for (mailbox, inside) in waiting {
            wait_outside(mailbox, inside);
        }
    }

    /// Has all vCPUs stand outside of emitted code until the result is dropped. The caller is outside.
    pub fn stop_world(&self, me: u32) -> MutexGuard<'_, ()> {
        let _phase = self.mailbox(me as usize).map(|m| m.phase.during(Place::Waiting));
        let world = self.world.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, mailbox) in self.others(me) {
            mailbox.request(request::SAFE_POINT);
        }
        // They do not come back before the lock is free: a request is seen before emitted code is entered.
        for (_, mailbox) in self.others(me) {
            wait_outside(mailbox, mailbox.inside.load(Ordering::SeqCst));
        }
        world
    }

    /// Empties the code cache, with all vCPUs outside of emitted code. The caller is outside.
    pub fn clear_code(&self, me: u32) {
        let _world = self.stop_world(me);
        for physical in self.code.clear() {
            if let Some(page) = self.ram.page(physical) {
                self.ram.unwatch(page);
            }
        }
    }
}

/// Waits until a vCPU that was seen with `inside` is outside of emitted code, or has been since.
fn wait_outside(mailbox: &Mailbox, inside: u64) {
    let mut spins = 0u32;
    while inside % 2 == 1 && mailbox.inside.load(Ordering::SeqCst) == inside {
        spins += 1;
        if spins < 100 { std::hint::spin_loop() } else { std::thread::yield_now() }
    }
}
