//! When which flow next wants to be looked at.

use std::{collections::BTreeSet, time::Instant};

/// Deadlines of things that keep their own, and tell here only of those earlier than what is noted: a deadline that
/// moves back at each packet costs nothing.
#[derive(Debug)]
pub struct Timers<K> {
    due: BTreeSet<(Instant, K)>,
}

impl<K: Copy + Ord> Timers<K> {
    /// Without any.
    pub const fn new() -> Self {
        Self { due: BTreeSet::new() }
    }

    /// The first moment at which somebody may be due.
    pub fn next(&self) -> Option<Instant> {
        self.due.first().map(|&(at, _)| at)
    }

    /// Notes that `key` is due at `deadline`, unless `noted` is earlier. `noted` is kept by the owner for this.
    pub fn note(&mut self, key: K, deadline: Instant, noted: &mut Option<Instant>) {
        match *noted {
            Some(earlier) if earlier <= deadline => return,
            Some(later) => {
                self.due.remove(&(later, key));
            }
            None => {}
        }
        self.due.insert((deadline, key));
        *noted = Some(deadline);
    }

    /// `key` is gone.
    pub fn forget(&mut self, key: K, noted: Option<Instant>) {
        if let Some(at) = noted {
            self.due.remove(&(at, key));
        }
    }

    /// Takes out one whose noted time has come. Its owner looks whether its deadline has, and notes it again.
    pub fn pop(&mut self, now: Instant) -> Option<K> {
        let &(at, key) = self.due.first()?;
        if at > now {
            return None;
        }
        self.due.remove(&(at, key));
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn one_entry_for_each_key_at_its_earliest() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut timers = Timers::new();
        let mut noted = None;
        for deadline in [at(5), at(9), at(3), at(4)] {
            timers.note(1, deadline, &mut noted);
        }
        assert_eq!((timers.next(), noted), (Some(at(3)), Some(at(3))));
        assert_eq!(timers.pop(at(2)), None);
        assert_eq!(timers.pop(at(3)), Some(1));
        assert_eq!(timers.pop(at(100)), None);
        let mut noted = None;
        timers.note(1, at(7), &mut noted);
        timers.forget(1, noted);
        assert_eq!(timers.next(), None);
    }
}
