//! io_uring: what a thread has asked of the kernel and not yet heard of.
//!
//! A [`Ring`] belongs to one thread. While that thread polls a request's future, the ring is its *current* one, and the
//! files below (see `host_file.rs`) put their operations into it. Without a current ring they do them at once, with
//! preadv and its like: so it is on hosts that do not allow io_uring, and in tools.

use std::{
    cell::RefCell,
    future::Future,
    io,
    os::fd::{AsRawFd, BorrowedFd},
    pin::Pin,
    rc::Rc,
    sync::OnceLock,
    task::{Context, Poll, Waker},
};

use io_uring::{IoUring, opcode, register::Restriction, squeue};

/// Submissions that are collected before the kernel is told, at most.
const ENTRIES: u32 = 128;

thread_local! {
    static CURRENT: RefCell<Option<Rc<Ring>>> = const { RefCell::new(None) };
}

/// The ring of the future that this thread is polling.
pub(crate) fn current() -> Option<Rc<Ring>> {
    CURRENT.with_borrow(Clone::clone)
}

/// Makes `ring` the current one while `f` runs.
pub(crate) fn enter<R>(ring: Option<&Rc<Ring>>, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<Rc<Ring>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            CURRENT.set(self.0.take());
        }
    }
    let _restore = Restore(CURRENT.replace(ring.cloned()));
    f()
}

/// One io_uring and the operations in it.
pub(crate) struct Ring {
    uring: RefCell<IoUring>,
    operations: RefCell<Operations>,
}

/// What became of each operation, by its number in the ring (the kernel's `user_data`).
#[derive(Default)]
struct Operations {
    slots: Vec<State>,
    free: Vec<usize>,
}

enum State {
    Free,
    InFlight(Option<Waker>),
    Done(i32),
}

impl Ring {
    /// A ring, or `None` where the host does not allow it (old kernel, seccomp, sysctl kernel.io_uring_disabled) or the
    /// environment says `PURLIN_IO_URING=off`.
    pub(crate) fn new() -> Option<Rc<Self>> {
        static ALLOWED: OnceLock<bool> = OnceLock::new();
        let off = || std::env::var_os("PURLIN_IO_URING").is_some_and(|value| value == "off");
        if !ALLOWED.get_or_init(|| !off() && restricted(2).is_ok()) {
            return None;
        }
        let uring = restricted(ENTRIES).inspect_err(|e| tracing::info!("no io_uring for a disk's queue: {e}")).ok()?;
        // Without these two, operations could get lost (before Linux 5.5); nobody has such a kernel and wants io_uring.
        let usable = uring.params().is_feature_nodrop() && uring.params().is_feature_submit_stable();
        usable.then(|| Rc::new(Self { uring: RefCell::new(uring), operations: RefCell::default() }))
    }

    /// Puts an operation into the ring. The kernel hears of it at the next [`Ring::submit`].
    ///
    /// # Safety
    /// The memory that the operation names must stay valid until the returned future is ready or dropped, and whoever
    /// holds that memory must not forget the future.
    pub(crate) unsafe fn start(self: Rc<Self>, entry: squeue::Entry) -> Operation {
        let slot = self.operations.borrow_mut().allocate();
        let entry = entry.user_data(slot as u64);
        // SAFETY: as this function's caller promises.
        while unsafe { self.uring.borrow_mut().submission().push(&entry) }.is_err() {
            self.submit();
            // With too many results untaken, the kernel takes nothing more.
            self.reap();
        }
        Operation { ring: self, slot }
    }

    /// Tells the kernel of what was started.
    pub(crate) fn submit(&self) {
        let mut uring = self.uring.borrow_mut();
        if !uring.submission().is_empty() {
            retry(|| uring.submit());
        }
    }

    /// Takes what is done out of the ring and wakes those who wait for it.
    pub(crate) fn reap(&self) {
        let mut uring = self.uring.borrow_mut();
        let mut operations = self.operations.borrow_mut();
        loop {
            for completion in uring.completion() {
                operations.finish(completion.user_data() as usize, completion.result());
            }
            // What the ring had no room for the kernel keeps until it is entered again: until then the descriptor is readable,
            // and the ring empty.
            if !uring.submission().cq_overflow() {
                return;
            }
            retry(|| uring.submit());
        }
    }

    /// Lends a descriptor that is readable while there is something for [`Ring::reap`].
    pub(crate) fn with_fd<R>(&self, f: impl FnOnce(BorrowedFd<'_>) -> R) -> R {
        let fd = self.uring.borrow().as_raw_fd();
        // SAFETY: the ring keeps it open, and outlives the call.
        f(unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// Blocks until at least one operation is done.
    fn wait(&self) {
        {
            let uring = self.uring.borrow_mut();
            retry(|| uring.submit_and_wait(1));
        }
        self.reap();
    }
}

/// A ring that can do nothing but the operations of `host_file.rs`, whoever fills it: what goes through a ring passes no
/// filter of system calls (Linux 5.10; io_uring_register(2), IORING_REGISTER_RESTRICTIONS).
fn restricted(entries: u32) -> io::Result<IoUring> {
    let uring = IoUring::builder().setup_r_disabled().build(entries)?;
    let operations = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE];
    let submitter = uring.submitter();
    submitter.register_restrictions(&mut operations.map(Restriction::sqe_op))?;
    submitter.register_enable_rings()?;
    Ok(uring)
}

/// Calls `enter` again where a signal came in between or the kernel is short of something for a moment.
fn retry(mut enter: impl FnMut() -> io::Result<usize>) {
    while let Err(error) = enter() {
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            // Results must be taken first, which is the caller's next step.
            Some(libc::EBUSY) => return,
            Some(libc::EAGAIN) => std::thread::yield_now(),
            // Nothing of what we do can cause another one (bad descriptor, bad flags).
            _ => panic!("io_uring_enter: {error}"),
        }
    }
}

impl Operations {
    fn allocate(&mut self) -> usize {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(State::Free);
            self.slots.len() - 1
        });
        self.slots[slot] = State::InFlight(None);
        slot
    }

    fn finish(&mut self, slot: usize, result: i32) {
        if let Some(state) = self.slots.get_mut(slot)
            && let State::InFlight(waker) = std::mem::replace(state, State::Done(result))
            && let Some(waker) = waker
        {
            waker.wake();
        }
    }

    fn free(&mut self, slot: usize) {
        self.slots[slot] = State::Free;
        self.free.push(slot);
    }
}

/// An operation in a ring; ready with its result: what a system call would return, errors as negative numbers.
///
/// Dropped before that, it waits: the kernel must be done with the memory.
pub(crate) struct Operation {
    ring: Rc<Ring>,
    slot: usize,
}

impl Future for Operation {
    type Output = i32;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<i32> {
        match &mut self.ring.operations.borrow_mut().slots[self.slot] {
            State::Done(result) => Poll::Ready(*result),
            state => {
                *state = State::InFlight(Some(context.waker().clone()));
                Poll::Pending
            }
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        while !matches!(self.ring.operations.borrow().slots[self.slot], State::Done(_)) {
            self.ring.wait();
        }
        self.ring.operations.borrow_mut().free(self.slot);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use io_uring::types::Fd;

    use super::*;

    /// What the kernel says to `entry`, `None` where there is no io_uring.
    fn result_of(entry: &squeue::Entry) -> Option<i32> {
        let mut uring = restricted(2).ok()?;
        // SAFETY: the caller's entry names static memory only.
        unsafe { uring.submission().push(entry) }.unwrap();
        uring.submit_and_wait(1).unwrap();
        uring.completion().next().map(|completion| completion.result())
    }

    #[test]
    fn a_ring_does_nothing_but_read_write_and_flush() {
        let file = File::open("/dev/null").unwrap();
        let fd = Fd(file.as_raw_fd());
        let Some(read) = result_of(&opcode::Readv::new(fd, std::ptr::null(), 0).build()) else {
            eprintln!("skipped: this host allows no io_uring");
            return;
        };
        assert_eq!(read, 0);
        let root = c"/".as_ptr();
        let forbidden = [
            opcode::Nop::new().build(),
            opcode::OpenAt::new(Fd(libc::AT_FDCWD), root).build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::UnlinkAt::new(Fd(libc::AT_FDCWD), root).build(),
            opcode::Close::new(fd).build(),
        ];
        for entry in &forbidden {
            assert_eq!(result_of(entry), Some(-libc::EACCES), "{entry:?}");
        }
    }

    #[test]
    fn results_that_the_ring_has_no_room_for_are_not_lost() {
        const COUNT: usize = 4 * ENTRIES as usize;
        let Some(ring) = Ring::new() else {
            eprintln!("skipped: this host allows no io_uring");
            return;
        };
        let file = File::open("/dev/null").unwrap();
        let entry = opcode::Readv::new(Fd(file.as_raw_fd()), std::ptr::null(), 0).build();
        let start = |number: usize| {
            // SAFETY: the entry names no memory.
            let operation = unsafe { ring.clone().start(entry.clone()) };
            if number % 64 == 63 {
                ring.submit();
            }
            operation
        };
        let operations: Vec<_> = (0..COUNT).map(start).collect();
        ring.reap();
        let slots = &ring.operations.borrow().slots;
        assert_eq!(slots.iter().filter(|state| matches!(state, State::Done(0))).count(), operations.len());
    }

    #[test]
    fn without_restrictions_a_ring_would_do_more() {
        let Ok(mut uring) = IoUring::new(2) else { return };
        // SAFETY: the entry names no memory.
        unsafe { uring.submission().push(&opcode::Nop::new().build()) }.unwrap();
        uring.submit_and_wait(1).unwrap();
        assert_eq!(uring.completion().next().map(|completion| completion.result()), Some(0));
    }
}
