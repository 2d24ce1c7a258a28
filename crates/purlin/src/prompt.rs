//! When a server on a serial line is ready for what is piped in. What arrives before somebody is logged in is thrown away
//! there (a getty flushes the line), so it is held back until a prompt has been shown and nothing after it.

use std::{
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Duration,
};

/// What prompts end with: those of shells, and of login.
const PROMPTS: [&[u8]; 4] = [b"# ", b"$ ", b"login: ", b"Password: "];

/// How long nothing follows a prompt.
const QUIET: Duration = Duration::from_millis(300);

/// The end of what the guest has said.
#[derive(Default)]
pub struct Prompt {
    end: Mutex<End>,
    said: Condvar,
}

#[derive(Default)]
struct End {
    bytes: Vec<u8>,
    /// How often something was said.
    count: u64,
}

impl Prompt {
    /// Returns once the guest waits at a prompt.
    pub fn wait(&self) {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let waits = |end: &mut End| !end.is_prompt();
            end = self.said.wait_while(end, waits).unwrap_or_else(PoisonError::into_inner);
            let before = end.count;
            let quiet = self.said.wait_timeout_while(end, QUIET, |end| end.count == before);
            let (now, timeout) = quiet.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() {
                return;
            }
            end = now;
        }
    }

    fn note(&self, said: &[u8]) {
        let longest = PROMPTS.iter().map(|prompt| prompt.len()).max().unwrap_or_default();
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        end.bytes.extend(&said[said.len().saturating_sub(longest)..]);
        let surplus = end.bytes.len().saturating_sub(longest);
        end.bytes.drain(..surplus);
        end.count += 1;
        drop(end);
        self.said.notify_all();
    }
}

impl End {
    fn is_prompt(&self) -> bool {
        PROMPTS.iter().any(|prompt| self.bytes.ends_with(prompt))
    }
}

/// An output that tells a [`Prompt`] what goes through it.
pub struct Watched<W>(pub W, pub Arc<Prompt>);

impl<W: Write> Write for Watched<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.0.write(bytes)?;
        self.1.note(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, Ordering},
        thread,
    };

    use super::*;

    #[test]
    fn input_is_held_until_a_prompt_that_nothing_follows() {
        let prompt = Arc::new(Prompt::default());
        let (waiting, is_over) = (prompt.clone(), Arc::new(AtomicBool::new(false)));
        let over = is_over.clone();
        let thread = thread::spawn(move || {
            waiting.wait();
            over.store(true, Ordering::SeqCst);
        });
        let mut output = Watched(Vec::new(), prompt);
        for said in ["[    0.0] Linux\r\n", "a comment # ", "that goes on\r\n", "root@debian:~"] {
            output.write_all(said.as_bytes()).unwrap();
        }
        thread::sleep(2 * QUIET);
        assert!(!is_over.load(Ordering::SeqCst));
        output.write_all(b"#").unwrap();
        output.write_all(b" ").unwrap();
        thread.join().unwrap();
        assert!(output.0.ends_with(b"root@debian:~# "));
    }
}
