//! What the ways out of translated code are called.

use super::ExitKind;

impl ExitKind {
    /// How many there are.
    pub const COUNT: usize = 9;

    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..Self::COUNT as u32).map(Self::from_raw)
    }

    /// A name for programs.
    pub fn key(self) -> &'static str {
        match self {
            Self::Miss => "miss",
            Self::Link => "link",
            Self::Emulate => "emulate",
            Self::Fault => "fault",
            Self::After => "after",
            Self::Signal => "signal",
            Self::Dead => "dead",
            Self::Apart => "apart",
            Self::Across => "across",
        }
    }

    /// A name for people.
    pub fn label(self) -> &'static str {
        match self {
            Self::Miss => "misses: jumps to what no table knew",
            Self::Link => "links: direct jumps for the first time",
            Self::Emulate => "instructions to be emulated",
            Self::Fault => "accesses that raised an exception",
            Self::After => "stores that had to be noticed",
            Self::Signal => "polls with news, host signals",
            Self::Dead => "blocks that were no longer valid",
            Self::Apart => "accesses with more to them than a refill",
            Self::Across => "links to other pages",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_number_and_name() {
        for (i, kind) in ExitKind::all().enumerate() {
            assert_eq!(kind as usize, i);
            assert!(ExitKind::all().take(i).all(|k| k.key() != kind.key() && k.label() != kind.label()));
        }
    }
}
