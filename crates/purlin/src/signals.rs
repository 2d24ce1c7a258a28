//! Signals that ask for the end, received by a thread instead of a handler.

use std::{
    process, thread,
    time::{Duration, Instant},
};

use nix::sys::signal::SigSet;
pub use nix::sys::signal::Signal;

/// Signals that come closer together are one request: timeout(1) sends its own twice, to the process and to its group.
const ONE_REQUEST: Duration = Duration::from_secs(1);

/// The signals of interest, blocked in this thread and all that it starts. (Programs that the process starts do not
/// inherit this: the standard library unblocks signals there.)
pub struct Signals(SigSet);

impl Signals {
    /// Blocks them. One that is ignored, as SIGHUP under nohup(1), stays ignored.
    pub fn block() -> Self {
        let set: SigSet =
            [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM, Signal::SIGCONT, Signal::SIGWINCH].into_iter().collect();
        // Cannot fail with a valid set (pthread_sigmask(3)); if it did, the signals would only act as usual.
        let _ = set.thread_block();
        Self(set)
    }

    /// Gives them up: each does what it does by itself again, also in threads that are started from now on.
    pub fn unblock(self) {
        let _ = self.0.thread_unblock();
    }

    /// Starts a thread that calls `on_end` at the first signal that asks for the end, `on_continue` when the process goes
    /// on after having been stopped, and `on_resize` when the terminal has another size. A second signal that asks for
    /// the end, after a second, is obeyed on the spot.
    pub fn watch(
        self,
        on_end: impl Fn(Signal) + Send + 'static,
        on_continue: impl Fn() + Send + 'static,
        on_resize: impl Fn() + Send + 'static,
    ) {
        thread::spawn(move || {
            let mut asked: Option<Instant> = None;
            while let Ok(signal) = self.0.wait() {
                match signal {
                    Signal::SIGCONT => on_continue(),
                    Signal::SIGWINCH => on_resize(),
                    signal => match asked {
                        Some(first) if first.elapsed() < ONE_REQUEST => {}
                        Some(_) => process::exit(128 + signal as i32),
                        None => {
                            asked = Some(Instant::now());
                            on_end(signal);
                        }
                    },
                }
            }
        });
    }
}
