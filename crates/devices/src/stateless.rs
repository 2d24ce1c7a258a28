//! The saved form of a device that has no state.

use prost::Message;
use purlin_state::{Saved, Section, StateError};

/// Nothing. A device whose state is this says so by saving it.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Nothing {}

impl Saved for Nothing {
    const NAME: &'static str = "nothing";
    const VERSION: u32 = 1;
}

impl Nothing {
    /// A section without content, under the name of the instance.
    pub fn section(name: &str) -> Section {
        Section::named(name, &Self {})
    }

    /// Whether `saved` is such a section.
    pub fn check(saved: &Section) -> Result<(), StateError> {
        saved.decode::<Self>().map(|_| ())
    }
}
