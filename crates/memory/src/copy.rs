//! Copying pages of a machine that stands still, in no more time than it may.
//!
//! A page takes 3 µs (on the development machine). Many are left to a child process, a fork: it has all of memory as it
//! was at that moment, for 26 ms a GiB of private pages, copies them while the machine goes on, and ends.

// A fork, and reads of guest memory.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
    sync::Arc,
};

use crate::PAGE_SIZE;

/// From so many pages on they are left to a child: 12 ms.
const LEAST_FOR_A_CHILD: u64 = 4096;

/// Pages to be copied.
pub(crate) struct Job {
    address: *const u8,
    length: usize,
    file: Arc<File>,
    offset: u64,
}

impl Job {
    /// To copy `length` bytes, whole pages, to the file at its byte `offset`, where it has a hole.
    pub fn new(address: *const u8, length: usize, file: Arc<File>, offset: u64) -> Self {
        Self { address, length, file, offset }
    }
}

/// Copies all pages but those of zeroes, now or by a child, which is returned.
///
/// # Safety
/// The pages are mapped for reading, and nobody writes to them until this returns.
pub(crate) unsafe fn copy(jobs: &[Job]) -> io::Result<Option<Child>> {
    let pages: u64 = jobs.iter().map(|job| job.length as u64 / PAGE_SIZE).sum();
    if pages >= LEAST_FOR_A_CHILD {
        // SAFETY: as the caller promises.
        match unsafe { Child::begin(jobs) } {
            Ok(child) => return Ok(Some(child)),
            // A sandbox, or too many processes.
            Err(error) => tracing::debug!("memory is copied while the machine stands still: {error}"),
        }
    }
    // SAFETY: as the caller promises.
    match unsafe { copy_now(jobs) } {
        0 => Ok(None),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// A process that copies. Dropped, it is waited for.
#[derive(Debug)]
pub(crate) struct Child(Option<OwnedFd>);

impl Child {
    /// # Safety
    /// As for [`copy`].
    unsafe fn begin(jobs: &[Job]) -> io::Result<Self> {
        let mut pidfd: libc::c_int = -1;
        let _signals = Blocked::all()?;
        // Nobody is told of its end by a signal; who has a handler for children would wonder.
        // SAFETY: without CLONE_VM the child has a copy of everything, this stack among it; the kernel writes to `pidfd`.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_PIDFD, 0usize, &raw mut pidfd, 0usize, 0usize) };
        match pid {
            0 => {
                // Of all threads only this one is here: whatever takes a lock or allocates may wait for ever.
                // SAFETY: `copy_now` does neither; memory is as it was at the fork, whatever the parent does.
                unsafe { libc::_exit(copy_now(jobs)) }
            }
            // SAFETY: a new descriptor, which is nobody's yet.
            1.. => Ok(Self(Some(unsafe { OwnedFd::from_raw_fd(pidfd) }))),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Waits until all is copied.
    pub fn wait(mut self) -> io::Result<()> {
        self.reap()
    }

    fn reap(&mut self) -> io::Result<()> {
        let Some(pidfd) = self.0.take() else { return Ok(()) };
        let (id, options) = (pidfd.as_raw_fd() as libc::id_t, libc::WEXITED | libc::__WALL);
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        // SAFETY: the kernel writes to `info`.
        while unsafe { libc::waitid(libc::P_PIDFD, id, info.as_mut_ptr(), options) } != 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        // SAFETY: waitid has filled it, for a child that has ended.
        let (code, status) = unsafe { (info.assume_init().si_code, info.assume_init().si_status()) };
        match (code, status) {
            (libc::CLD_EXITED, 0) => Ok(()),
            (libc::CLD_EXITED, errno) => Err(io::Error::from_raw_os_error(errno)),
            (_, signal) => Err(io::Error::other(format!("the process that copies it was killed by signal {signal}"))),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.reap();
    }
}

/// Copies; returns the number of an error, or 0. Neither allocates nor takes a lock.
///
/// # Safety
/// As for [`copy`].
unsafe fn copy_now(jobs: &[Job]) -> i32 {
    let page = PAGE_SIZE as usize;
    for job in jobs {
        let mut at = 0;
        while at < job.length {
            // SAFETY: within the job's pages.
            let run = unsafe { nonzero(job.address.add(at), job.length - at) };
            if run > 0 {
                // SAFETY: as above.
                let errno = unsafe { write(job.file.as_raw_fd(), job.address.add(at), run, job.offset + at as u64) };
                if errno != 0 {
                    return errno;
                }
            }
            // The page behind a run is of zeroes, or not there.
            at += run + page;
        }
    }
    0
}

/// The bytes, in whole pages, before the first page of zeroes.
///
/// # Safety
/// `length` bytes, whole pages, are mapped at `address`.
unsafe fn nonzero(address: *const u8, length: usize) -> usize {
    static ZERO: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
    let mut at = 0;
    while at < length {
        // SAFETY: within what is mapped, as the caller promises.
        if unsafe { libc::memcmp(address.add(at).cast(), ZERO.as_ptr().cast(), ZERO.len()) } == 0 {
            break;
        }
        at += ZERO.len();
    }
    at
}

/// # Safety
/// `length` bytes are mapped at `address`.
unsafe fn write(fd: i32, mut address: *const u8, mut length: usize, mut offset: u64) -> i32 {
    while length > 0 {
        // SAFETY: as the caller promises.
        let done = unsafe { libc::pwrite(fd, address.cast(), length, offset as i64) };
        if done > 0 {
            // SAFETY: at most the end of the range.
            address = unsafe { address.add(done as usize) };
            (length, offset) = (length - done as usize, offset + done as u64);
            continue;
        }
        // SAFETY: the thread's own, in the child too.
        let errno = if done == 0 { libc::EIO } else { unsafe { *libc::__errno_location() } };
        if errno != libc::EINTR {
            return errno;
        }
    }
    0
}

/// No signal is handled on this thread, or in a child of it, as long as this lives.
struct Blocked(libc::sigset_t);

impl Blocked {
    fn all() -> io::Result<Self> {
        let (mut all, mut old) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: both sets are written before they are read.
        let error = unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), old.as_mut_ptr())
        };
        match error {
            // SAFETY: pthread_sigmask has filled it.
            0 => Ok(Self(unsafe { old.assume_init() })),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: a set that pthread_sigmask has given.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Copies so many pages, of which every third is zeroes, to the file.
    fn copy_to(file: File, pages: u64) -> io::Result<Option<Child>> {
        let page = |number: u64| [u8::from(!number.is_multiple_of(3)); PAGE_SIZE as usize];
        let bytes: Vec<u8> = (0..pages).flat_map(page).collect();
        let file = Arc::new(file);
        // In two jobs, the second one page behind the first.
        let (first, second) = bytes.split_at(bytes.len() / 2);
        let gap = first.len() as u64 + PAGE_SIZE;
        let jobs = [(first, 0), (second, gap)].map(|(b, at)| Job::new(b.as_ptr(), b.len(), file.clone(), at));
        // SAFETY: nobody else has the bytes.
        let child = unsafe { copy(&jobs) }?;
        // The child has bytes of its own.
        drop(bytes);
        Ok(child)
    }

    #[test]
    fn few_and_many_pages_are_copied_without_zeroes() {
        for (pages, by_child) in [(30, false), (LEAST_FOR_A_CHILD, true)] {
            let file = tempfile::tempfile().unwrap();
            let child = copy_to(file.try_clone().unwrap(), pages).unwrap();
            assert_eq!(child.is_some(), by_child);
            child.map(Child::wait).transpose().unwrap();
            let mut page = vec![0; PAGE_SIZE as usize];
            for number in 0..pages {
                let at = number + u64::from(number >= pages / 2);
                // The last one may be a hole at the file's end.
                page.fill(0);
                let _ = std::os::unix::fs::FileExt::read_exact_at(&file, &mut page, at * PAGE_SIZE);
                assert!(page.iter().all(|byte| *byte == u8::from(number % 3 != 0)), "page {number} of {pages}");
            }
        }
    }

    #[test]
    fn errors_are_heard_of_from_the_child_too() {
        let full = || File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(copy_to(full(), 30).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        let child = copy_to(full(), LEAST_FOR_A_CHILD).unwrap().expect("a child");
        assert_eq!(child.wait().unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    }
}
