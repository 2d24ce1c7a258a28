//! The host's processor: cases run in a child process.
//!
//! The child lives in a signal handler. To begin a case it puts the case's state into its own signal frame and returns
//! from the handler: the kernel loads every register. The signal that ends the case brings it back into the handler,
//! with every register in the new frame. Cases come and go in batches through shared memory.
#![allow(unsafe_code)]

mod child;
mod shared;

use std::{fs, io, ops::Range, time::Duration};

use anyhow::{Context, Result, bail};
pub use child::bases_are_readable;
pub use shared::BATCH;
use shared::{Shared, Slot};

use crate::{
    case::{Case, Fault, Outcome},
    layout::{DATA_BYTES, FRAMES, PAGE, mappings},
    xsave::{self, AREA},
};

/// How long a batch may take.
const PATIENCE: Duration = Duration::from_secs(4);

/// The child and what is shared with it.
pub struct Native {
    shared: &'static Shared,
    frames: i32,
    child: libc::pid_t,
    /// What is mapped in the child beside the layout: its program, its stack.
    own: Vec<Range<u64>>,
    processor: Processor,
}

/// The processor that the child runs on, as Linux tells user code by the limit of a segment and by RDPID.
#[derive(Clone, Copy, Debug)]
pub struct Processor {
    number: u32,
    node: u32,
}

impl Processor {
    fn current() -> Self {
        let mut this = Self { number: 0, node: 0 };
        // SAFETY: the kernel writes two words.
        unsafe { libc::syscall(libc::SYS_getcpu, &raw mut this.number, &raw mut this.node, 0) };
        this
    }

    /// Both numbers in one (Linux: `vdso_encode_cpunode`).
    pub fn encoded(self) -> u32 {
        self.node << 12 | self.number
    }
}

impl Native {
    /// Starts the child.
    pub fn new() -> Result<Self> {
        let frames = memory_file().context("cannot make memory for the native side")?;
        let length = size_of::<Shared>();
        // SAFETY: a new shared mapping of zeroes, which are a valid `Shared`; it is never unmapped.
        let shared = unsafe {
            let pointer = libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            if pointer == libc::MAP_FAILED {
                return Err(io::Error::last_os_error()).context("cannot map memory to share with the child");
            }
            &*pointer.cast::<Shared>()
        };
        let mut native = Self { shared, frames, child: 0, own: Vec::new(), processor: Processor::current() };
        native.start()?;
        Ok(native)
    }

    /// Where the child runs.
    pub fn processor(&self) -> Processor {
        self.processor
    }

    fn start(&mut self) -> Result<()> {
        self.shared.control.reset();
        // SAFETY: the child goes on in `child::main`, which only makes system calls of its own and never returns.
        match unsafe { libc::fork() } {
            -1 => return Err(io::Error::last_os_error()).context("cannot fork"),
            0 => child::main(self.shared, self.frames, self.processor.number),
            pid => self.child = pid,
        }
        if !self.shared.control.wait(PATIENCE) {
            self.stop();
            bail!("the native side does not start (step {})", self.shared.control.progress());
        }
        self.own = own_mappings(self.child).context("cannot read what is mapped in the native side")?;
        Ok(())
    }

    /// Whether the child has something of its own at `address`, where a case has to find nothing: once in some millions of
    /// random addresses.
    pub fn owns(&self, address: u64) -> bool {
        self.own.iter().any(|range| range.contains(&address))
    }

    fn stop(&mut self) {
        if self.child > 0 {
            // SAFETY: our own child, not yet waited for.
            unsafe {
                libc::kill(self.child, libc::SIGKILL);
                libc::waitpid(self.child, std::ptr::null_mut(), 0);
            }
        }
        self.child = 0;
    }

    /// Runs cases, at most [`BATCH`] of them. `None` for one that does not end, or that ends the child.
    pub fn run(&mut self, cases: &[&Case]) -> Result<Vec<Option<Outcome>>> {
        let mut outcomes = Vec::with_capacity(cases.len());
        while outcomes.len() < cases.len() {
            let rest = &cases[outcomes.len()..];
            let rest = &rest[..rest.len().min(BATCH)];
            for (i, case) in rest.iter().enumerate() {
                // SAFETY: the child waits: nobody else uses the slots.
                unsafe { (*self.shared.slot(i)).set(case) };
            }
            self.shared.control.start(rest.len());
            let ended = self.shared.control.wait(PATIENCE);
            let done = if ended { rest.len() } else { self.shared.control.progress() };
            for i in 0..done {
                // SAFETY: the child waits, or is past this slot.
                outcomes.push(Some(unsafe { (*self.shared.slot(i)).outcome() }));
            }
            if !ended {
                outcomes.push(None);
                self.stop();
                self.start()?;
            }
        }
        Ok(outcomes)
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        self.stop();
        // SAFETY: ours, and not used after this.
        unsafe { libc::close(self.frames) };
    }
}

/// What is mapped in process `child`, but for the layout.
fn own_mappings(child: libc::pid_t) -> io::Result<Vec<Range<u64>>> {
    let maps = fs::read_to_string(format!("/proc/{child}/maps"))?;
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let range = |line: &str| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        Some(number(start)?..number(end)?)
    };
    let of_the_layout = |range: &Range<u64>| mappings().iter().any(|mapping| range.contains(&mapping.linear));
    Ok(maps.lines().filter_map(range).filter(|range| !of_the_layout(range)).collect())
}

fn memory_file() -> io::Result<i32> {
    // SAFETY: plain system calls.
    unsafe {
        let fd = libc::memfd_create(c"oracle".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 || libc::ftruncate(fd, (FRAMES as u64 * PAGE) as libc::off_t) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(fd)
    }
}

impl Slot {
    fn set(&mut self, case: &Case) {
        (self.cs, self.ss) = (case.cs(), case.ss);
        self.entry = case.entry;
        self.code_len = case.code.len().min(self.code.len());
        self.code[..self.code_len].copy_from_slice(&case.code[..self.code_len]);
        self.gpr = case.gpr;
        self.rip = case.entry;
        self.rflags = case.rflags;
        self.area = case.area();
        self.area_len = xsave::size();
        case.fill_memory(&mut self.memory);
    }

    fn outcome(&self) -> Outcome {
        let page_fault = self.vector == 14;
        let mut area = self.area.clone();
        area.normalise();
        Outcome {
            gpr: self.gpr,
            rip: self.rip,
            rflags: self.rflags,
            selectors: self.selectors,
            bases: self.bases,
            fault: Fault {
                vector: self.vector as u8,
                error: self.error as u32,
                address: if page_fault { self.address } else { 0 },
            },
            area,
            memory: self.memory.to_vec(),
        }
    }
}

const _: () = assert!(DATA_BYTES.is_multiple_of(4096) && AREA.is_multiple_of(64));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_child_knows_what_is_its_own() {
        let native = Native::new().unwrap();
        // It is a copy of this process.
        let ours = &raw const *native.shared as u64;
        assert!(native.owns(ours) && native.owns(Native::new as *const () as u64));
        assert!(mappings().iter().all(|mapping| !native.owns(mapping.linear)));
        assert!(!native.owns(0) && !native.owns(u64::MAX));
    }
}
