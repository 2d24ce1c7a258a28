//! What a console is connected to: the host's end of it, with what has not passed yet.

use std::{
    collections::VecDeque,
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    super::{Slices, fill},
    SavedConsole, SavedSize,
};
use crate::{event::Event, output::Output};

/// Bytes of input that may wait for the driver.
const CAPACITY: usize = 64 << 10;

/// Bytes of a chain that are looked at together.
const PIECE: usize = 4096;

/// The size of a terminal in characters. All zero: it has none that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Size {
    /// Characters of a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// The host's end of a console. One device at a time is connected to it.
pub struct Port {
    output: Output,
    /// For the device's thread: input has come, the size is another, or the output has room again.
    event: Arc<Event>,
    state: Mutex<State>,
}

struct State {
    input: VecDeque<u8>,
    size: Size,
    /// The size that the driver was told of last, since its last reset.
    told: Option<Size>,
    /// Bytes of the next chain to transmit that the output has taken already.
    printed: u64,
    /// The driver has had the time to finish setting itself up since its last reset.
    is_settled: bool,
}

impl Port {
    /// A port that prints on `sink`, on a thread of its own; the terminal there has this size.
    pub fn new(sink: Box<dyn Write + Send>, size: Size) -> io::Result<Arc<Self>> {
        let state = State { input: VecDeque::new(), size, told: None, printed: 0, is_settled: false };
        let (output, event) = (Output::new(sink)?, Arc::new(Event::new()?));
        Ok(Arc::new(Self { output, event, state: Mutex::new(state) }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Input for the guest. Takes what there is room for, and returns how many bytes that was. Does not block.
    pub fn push_input(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        let count = bytes.len().min(CAPACITY.saturating_sub(state.input.len()));
        state.input.extend(&bytes[..count]);
        drop(state);
        if count > 0 {
            self.event.signal();
        }
        count
    }

    /// The terminal has another size. The driver hears of it as soon as the machine runs.
    pub fn resize(&self, size: Size) {
        self.lock().size = size;
        self.event.signal();
    }

    pub(super) fn size(&self) -> Size {
        self.lock().size
    }

    /// Prints a character before all that waits in the queue, if there is room.
    pub(super) fn print_now(&self, character: u8) {
        self.output.push(&[character]);
    }

    /// Nothing has happened since.
    pub(super) fn clear_event(&self) {
        self.event.clear();
    }

    /// Whether the driver is to be told of the size, which it then has been.
    pub(super) fn tell_size(&self) -> bool {
        let mut state = self.lock();
        let is_news = state.size != Size::default() && state.told != Some(state.size);
        if is_news {
            state.told = Some(state.size);
        }
        is_news
    }

    /// Whether the driver can hear.
    pub(super) fn is_settled(&self) -> bool {
        self.lock().is_settled
    }

    /// It can from here on.
    pub(super) fn set_settled(&self) {
        self.lock().is_settled = true;
    }

    /// Whether there is input.
    pub(super) fn has_input(&self) -> bool {
        !self.lock().input.is_empty()
    }

    /// Moves as much input as fits into guest memory; returns how much.
    pub(super) fn deliver(&self, to: &Slices<'_>) -> usize {
        let mut state = self.lock();
        let count = fill(to, state.input.make_contiguous());
        state.input.drain(..count);
        count
    }

    /// Prints the next chain from where it was left. `false` if it is to be tried again: once the event has happened,
    /// or, if `is_interrupted` says so, later.
    pub(super) fn print(&self, chain: &Slices<'_>, is_interrupted: impl Fn() -> bool) -> bool {
        let mut skip = self.lock().printed as usize;
        let (mut piece, mut done) = ([0; PIECE], skip);
        for slice in chain {
            let mut at = skip.min(slice.len());
            skip -= at;
            while let Ok(rest) = slice.offset(at)
                && !rest.is_empty()
            {
                let length = rest.copy_to(&mut piece[..]);
                let taken = self.output.push_or_wait(&piece[..length], &self.event);
                (at, done) = (at + taken, done + taken);
                if taken < length || is_interrupted() {
                    self.lock().printed = done as u64;
                    return false;
                }
            }
        }
        self.lock().printed = 0;
        true
    }

    /// The driver is gone, and what it had under way.
    pub(super) fn forget_driver(&self) {
        let mut state = self.lock();
        (state.told, state.printed, state.is_settled) = (None, 0, false);
    }

    pub(super) fn save(&self) -> SavedConsole {
        let state = self.lock();
        let told = state.told.map(|size| SavedSize { columns: size.columns.into(), rows: size.rows.into() });
        let input = state.input.iter().copied().collect();
        SavedConsole { input, printed: state.printed, told, is_settled: state.is_settled }
    }

    pub(super) fn restore(&self, saved: SavedConsole) -> Result<(), &'static str> {
        let told = saved.told.map(size_of).transpose()?;
        let mut state = self.lock();
        (state.input, state.printed, state.told) = (saved.input.into(), saved.printed, told);
        state.is_settled = saved.is_settled;
        Ok(())
    }
}

fn size_of(saved: SavedSize) -> Result<Size, &'static str> {
    let number = |number| u16::try_from(number).map_err(|_| "a terminal's size is too large");
    Ok(Size { columns: number(saved.columns)?, rows: number(saved.rows)? })
}

impl AsFd for Port {
    /// Readable when there may be something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port").finish_non_exhaustive()
    }
}
