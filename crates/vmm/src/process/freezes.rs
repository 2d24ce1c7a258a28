//! Freezes by their names, and who waits for them: clones' processes are started while their source is being frozen.

use std::{
    collections::HashMap,
    mem,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How long after who wants it a freeze may begin.
const BEGINNING: Duration = Duration::from_secs(5);

/// Freezes by their names.
pub struct Freezes<T> {
    stages: Mutex<HashMap<String, Stage<T>>>,
    /// One has begun, or ended.
    changed: Condvar,
}

/// How far a freeze is.
enum Stage<T> {
    Begun,
    Done(T),
    /// Until it is forgotten: who comes later is not to wait for it.
    Failed,
}

impl<T> Default for Freezes<T> {
    fn default() -> Self {
        Self { stages: Mutex::default(), changed: Condvar::new() }
    }
}

impl<T> Freezes<T> {
    /// One is being made from here on, until what is returned is gone.
    pub fn begin<'a>(&'a self, name: &'a str) -> Begun<'a, T> {
        self.set(name, Stage::Begun);
        Begun { freezes: self, name, end: Stage::Failed }
    }

    /// A freeze, when it is there; `None` if it could not be made, or does not begin.
    pub fn wait_for(&self, name: &str) -> Option<T>
    where
        T: Clone,
    {
        let since = Instant::now();
        let mut stages = self.lock();
        loop {
            stages = match stages.get(name) {
                Some(Stage::Done(freeze)) => return Some(freeze.clone()),
                Some(Stage::Failed) => return None,
                // That may copy all memory, and takes as long as it takes.
                Some(Stage::Begun) => self.changed.wait(stages).unwrap_or_else(PoisonError::into_inner),
                None => {
                    let rest = BEGINNING.checked_sub(since.elapsed())?;
                    self.changed.wait_timeout(stages, rest).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Forgets one; returns it if it was made.
    pub fn forget(&self, name: &str) -> Option<T> {
        match self.lock().remove(name) {
            Some(Stage::Done(freeze)) => Some(freeze),
            _ => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Stage<T>>> {
        self.stages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, name: &str, stage: Stage<T>) {
        self.lock().insert(name.to_owned(), stage);
        self.changed.notify_all();
    }
}

/// A freeze that is being made. Whatever happens, nobody waits for it any more when this is gone.
pub struct Begun<'a, T> {
    freezes: &'a Freezes<T>,
    name: &'a str,
    end: Stage<T>,
}

impl<T> Begun<'_, T> {
    /// It is there.
    pub fn done(mut self, freeze: T) {
        self.end = Stage::Done(freeze);
    }
}

impl<T> Drop for Begun<'_, T> {
    fn drop(&mut self) {
        self.freezes.set(self.name, mem::replace(&mut self.end, Stage::Failed));
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn who_is_early_waits_for_it() {
        let freezes = Freezes::default();
        thread::scope(|scope| {
            let waiters: Vec<_> = (0..3).map(|_| scope.spawn(|| freezes.wait_for("a"))).collect();
            thread::sleep(Duration::from_millis(20));
            let begun = freezes.begin("a");
            let late = scope.spawn(|| freezes.wait_for("a"));
            thread::sleep(Duration::from_millis(20));
            assert!(!late.is_finished());
            begun.done(7);
            assert!(waiters.into_iter().chain([late]).all(|waiter| waiter.join().unwrap() == Some(7)));
        });
        assert_eq!(freezes.forget("a"), Some(7));
        assert_eq!(freezes.forget("a"), None);
    }

    #[test]
    fn nobody_waits_for_what_has_failed() {
        let freezes = Freezes::<u32>::default();
        thread::scope(|scope| {
            let begun = freezes.begin("a");
            let waiter = scope.spawn(|| freezes.wait_for("a"));
            // Also where it has panicked.
            drop(begun);
            assert_eq!(waiter.join().unwrap(), None);
            let since = Instant::now();
            assert_eq!(freezes.wait_for("a"), None);
            assert!(since.elapsed() < BEGINNING);
            assert_eq!(freezes.forget("a"), None);
        });
    }

    #[test]
    fn what_does_not_begin_is_given_up() {
        assert_eq!(Freezes::<u32>::default().wait_for("a"), None);
    }
}
