//! What is done when the guest says that its kernel has panicked.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use purlin_vmm::{GuestEvent, Running};

use super::args::OnPanic;
use crate::{
    stop::{Reason, Stop},
    terminal,
};

/// A guest that panics again and again is not reported more often.
const PAUSE: Duration = Duration::from_secs(1);

/// Whether the guest has panicked.
#[derive(Clone, Default)]
pub struct Panicked(Arc<AtomicBool>);

impl Panicked {
    /// It has.
    pub fn has_happened(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// Reports panics of the guest from here on, or ends the run with the first.
pub fn watch(running: &Running, on_panic: OnPanic, stop: &Arc<Stop>) -> Panicked {
    // One waits while another one is said: the vCPU does not wait for the user's terminal.
    let (sender, events) = mpsc::sync_channel(1);
    let (panicked, stop) = (Panicked::default(), stop.clone());
    let noted = panicked.clone();
    running.on_guest_event(move |event| {
        noted.0.fetch_or(event == GuestEvent::Panicked, Ordering::SeqCst);
        // If there is no room, the same is being said.
        let _ = sender.try_send(event);
    });
    thread::spawn(move || {
        for event in events {
            match (event, on_panic) {
                (GuestEvent::Panicked, OnPanic::Exit) => stop.request(Reason::GuestPanicked),
                (GuestEvent::Panicked, OnPanic::Continue) => terminal::say(
                    "the guest's kernel panicked; what comes next is up to the guest (--on-panic exit would end the run)",
                ),
                (GuestEvent::CrashKernel, _) => {
                    terminal::say("the guest's kernel panicked; its crash kernel takes over");
                }
            }
            thread::sleep(PAUSE);
        }
    });
    panicked
}
