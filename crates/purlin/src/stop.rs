//! The request to end a run: made by whoever first has a reason, carried out as soon as there is something to stop.

use std::{
    io,
    sync::{Mutex, OnceLock, PoisonError},
};

use crate::signals::Signal;

/// Why a run is to end.
#[derive(Debug)]
pub enum Reason {
    /// Ctrl-A x.
    Quit,
    /// A signal.
    Signal(Signal),
    /// What the guest writes reaches nobody any more.
    OutputLost(io::Error),
    /// The guest's kernel has panicked, and the run is to end with that.
    GuestPanicked,
}

type Action = Box<dyn Fn() + Send>;

/// Shared by all that can end a run.
#[derive(Default)]
pub struct Stop {
    reason: OnceLock<Reason>,
    action: Mutex<Option<Action>>,
}

impl Stop {
    /// Asks for the end. The first reason counts.
    pub fn request(&self, reason: Reason) {
        if self.reason.set(reason).is_ok()
            && let Some(action) = &*self.action.lock().unwrap_or_else(PoisonError::into_inner)
        {
            action();
        }
    }

    /// Why, if it was asked for.
    pub fn reason(&self) -> Option<&Reason> {
        self.reason.get()
    }

    /// Says what is to be done at the request; done at once where the request came before.
    pub fn on_request(&self, action: impl Fn() + Send + 'static) {
        let mut slot = self.action.lock().unwrap_or_else(PoisonError::into_inner);
        if self.reason.get().is_some() {
            action();
        }
        *slot = Some(Box::new(action));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    #[test]
    fn acts_once_whichever_comes_first() {
        for request_first in [true, false] {
            let (stop, acted) = (Stop::default(), Arc::new(AtomicUsize::new(0)));
            let count = acted.clone();
            let action = move || {
                count.fetch_add(1, Ordering::SeqCst);
            };
            if request_first {
                stop.request(Reason::Quit);
                stop.on_request(action);
            } else {
                stop.on_request(action);
                stop.request(Reason::Quit);
            }
            stop.request(Reason::Signal(Signal::SIGTERM));
            assert_eq!(acted.load(Ordering::SeqCst), 1);
            assert!(matches!(stop.reason(), Some(Reason::Quit)));
        }
    }
}
