//! The guest's console: what it writes, and what is typed.

use std::{
    io::{self, Write},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use purlin_vmm::GuestInput;

/// What the guest has written, in whichever machine. Clones are the same console.
#[derive(Clone, Default)]
pub struct Console(Arc<Mutex<Paper>>);

#[derive(Default)]
struct Paper {
    /// All that was written, but for the carriage returns.
    bytes: Vec<u8>,
    /// How much of it was there when.
    times: Vec<(usize, Instant)>,
}

impl Console {
    /// All of it so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap().bytes).into_owned()
    }

    /// When `text` was first to be read.
    pub fn time_of(&self, text: &str) -> Option<Instant> {
        let paper = self.0.lock().unwrap();
        let end = paper.bytes.windows(text.len()).position(|part| part == text.as_bytes())? + text.len();
        paper.times.iter().find(|(length, _)| *length >= end).map(|(_, time)| *time)
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut paper = self.0.lock().unwrap();
        paper.bytes.extend(bytes.iter().filter(|byte| **byte != b'\r'));
        let length = paper.bytes.len();
        paper.times.push((length, Instant::now()));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Types at the guest's shell as soon as it is there, also while the guest is being moved.
pub struct Typist {
    keyboard: Arc<Mutex<GuestInput>>,
    over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Typist {
    /// Types `text` once `prompt` is to be seen.
    pub fn start(console: Console, prompt: &'static str, text: &'static str, input: GuestInput) -> Self {
        let keyboard = Arc::new(Mutex::new(input));
        let over = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (keyboard, over) = (keyboard.clone(), over.clone());
            move || {
                while !over.load(Ordering::SeqCst) && !console.text().contains(prompt) {
                    thread::sleep(Duration::from_millis(5));
                }
                text.bytes().for_each(|byte| press(&keyboard, &over, byte));
            }
        });
        Self { keyboard, over, thread }
    }

    /// From here on the keyboard is at another machine.
    pub fn plug_into(&self, input: GuestInput) {
        *self.keyboard.lock().unwrap() = input;
    }

    /// The guest has ended.
    pub fn finish(self) {
        self.over.store(true, Ordering::SeqCst);
        self.thread.join().unwrap();
    }
}

/// A machine that is gone has not taken the byte: its successor gets it.
fn press(keyboard: &Mutex<GuestInput>, over: &AtomicBool, byte: u8) {
    while !over.load(Ordering::SeqCst) {
        let input = keyboard.lock().unwrap().clone();
        if input.push(&[byte]) {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
}
