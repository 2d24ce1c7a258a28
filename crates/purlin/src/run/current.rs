//! The machine of this run, for those who are there before it is; and the pause that follows when the host cannot carry
//! out a request to a disk (`--on-io-error pause`).

use std::{
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
};

use purlin_vmm::{ConsoleSize, OnIoError, Running};

use crate::terminal;

/// The machine, once there is one.
#[derive(Default)]
pub struct Current {
    running: OnceLock<Weak<Running>>,
    /// It is paused, or about to be, because a disk has failed.
    disk_failed: AtomicBool,
    /// What the terminal has come to be.
    size: Mutex<Option<ConsoleSize>>,
}

impl Current {
    /// Here it is.
    pub fn set(&self, running: &Arc<Running>) {
        let _ = self.running.set(Arc::downgrade(running));
        // It may have changed since the console was made.
        if let Some(size) = *self.size.lock().unwrap_or_else(PoisonError::into_inner) {
            running.resize_console(size);
        }
    }

    /// The terminal at its console has another size.
    pub fn resize(&self, size: ConsoleSize) {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner) = Some(size);
        if let Some(running) = self.get() {
            running.resize_console(size);
        }
    }

    /// The machine, while it is there.
    fn get(&self) -> Option<Arc<Running>> {
        self.running.get().and_then(Weak::upgrade)
    }

    /// Lets the machine go on if it has been paused because a disk has failed.
    pub fn go_on(&self) {
        if self.disk_failed.swap(false, Ordering::SeqCst)
            && let Some(running) = self.get()
        {
            terminal::say("the guest goes on");
            // If it fails the run is over.
            let _ = running.resume();
        }
    }

    /// Pauses the machine where a disk fails, and says once how it goes on: by a signal to the process `command`, for one.
    pub fn pause_on_io_error(self: &Arc<Self>, command: u32) -> OnIoError {
        let (sender, lines) = mpsc::sync_channel::<String>(1);
        // A disk's thread does not wait for the user's terminal.
        thread::spawn(move || lines.into_iter().for_each(|line| terminal::say(&line)));
        let current = self.clone();
        OnIoError::Pause(Arc::new(move |path, error| {
            if !current.disk_failed.swap(true, Ordering::SeqCst) {
                let what = if error.is_out_of_space() { "make room" } else { "see to the disk" };
                let path = path.display();
                // There is room: what was said before has been answered.
                let _ = sender.try_send(format!(
                    "'{path}': {error}: the guest is paused, and nothing is lost; {what}, then Ctrl-A c (or \
                     'kill -CONT {command}') lets it go on"
                ));
            }
        }))
    }
}
