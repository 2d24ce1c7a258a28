//! Signals that ask for the end, received by a thread instead of a handler.

use std::{
    process, thread,
    time::{Duration, Instant},
};

pub use nix::sys::signal::Signal;
use nix::sys::signal::{SigSet, raise};

/// Requests that come closer together are one: timeout(1) sends its own twice, to the process and to its group.
pub const ONE_REQUEST: Duration = Duration::from_secs(1);

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

    /// Takes SIGTSTP, too, in this thread and all that it starts: [`Obey::stand_still`] comes before it is obeyed.
    pub fn with_job_control(mut self) -> Self {
        self.0.add(Signal::SIGTSTP);
        let _ = self.0.thread_block();
        self
    }

    /// Blocks, for good, what asks for an end or comes of a terminal: another process obeys it for this one.
    pub fn leave_to_another() {
        let _ = Self::block();
        let of_terminals: SigSet = [Signal::SIGTTIN, Signal::SIGTTOU].into_iter().collect();
        let _ = of_terminals.thread_block();
    }

    /// As [`Signals::obey`]: `on_end`, `on_continue` and `on_resize` are what is done.
    pub fn watch(
        self,
        on_end: impl Fn(Signal) + Send + 'static,
        on_continue: impl Fn() + Send + 'static,
        on_resize: impl Fn() + Send + 'static,
    ) {
        self.obey(Watch { on_end, on_continue, on_resize });
    }

    /// Starts a thread that has the signals obeyed. A second one that asks for the end, after a second, is obeyed on the
    /// spot.
    pub fn obey(self, obeyed: impl Obey) {
        thread::spawn(move || {
            let mut asked: Option<Instant> = None;
            while let Ok(signal) = self.0.wait() {
                match signal {
                    Signal::SIGCONT => obeyed.go_on(),
                    Signal::SIGWINCH => obeyed.resize(),
                    Signal::SIGTSTP => {
                        obeyed.stand_still();
                        stop_by(signal);
                        obeyed.go_on();
                    }
                    signal => match asked {
                        Some(first) if first.elapsed() < ONE_REQUEST => {}
                        Some(_) => {
                            obeyed.end_at_once();
                            process::exit(128 + signal as i32)
                        }
                        None => {
                            asked = Some(Instant::now());
                            obeyed.end(signal);
                        }
                    },
                }
            }
        });
    }
}

/// Has a signal that is blocked do what it does by itself: the process is stopped, unless nobody could have it go on (an
/// orphaned process group, setpgid(2)).
fn stop_by(signal: Signal) {
    let set: SigSet = [signal].into_iter().collect();
    let _ = raise(signal);
    let _ = set.thread_unblock();
    let _ = set.thread_block();
}

/// What is done at signals.
pub trait Obey: Send + 'static {
    /// The first signal asks for the end.
    fn end(&self, signal: Signal);
    /// The process exits when this returns.
    fn end_at_once(&self) {}
    /// The process is about to be stopped ([`Signals::with_job_control`]).
    fn stand_still(&self) {}
    /// The process goes on after having been stopped.
    fn go_on(&self) {}
    /// The terminal has another size.
    fn resize(&self) {}
}

struct Watch<E, C, R> {
    on_end: E,
    on_continue: C,
    on_resize: R,
}

impl<E, C, R> Obey for Watch<E, C, R>
where
    E: Fn(Signal) + Send + 'static,
    C: Fn() + Send + 'static,
    R: Fn() + Send + 'static,
{
    fn end(&self, signal: Signal) {
        (self.on_end)(signal);
    }

    fn go_on(&self) {
        (self.on_continue)();
    }

    fn resize(&self) {
        (self.on_resize)();
    }
}
