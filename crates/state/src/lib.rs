//! The saved form of everything that has state.
//!
//! A stateful thing (vCPU, interrupt controller, device, queue) has a *saved type* apart from its runtime type: a
//! prost message with numbered fields, a name and a version. Fields are only ever added; a field's number is never
//! used again. [`Section`] is one saved thing as bytes, [`SavedState`] the whole of a machine.
#![forbid(unsafe_code)]

use prost::Message;

/// A saved type: what is written of a thing's state, and under which name and version.
pub trait Saved: Message + Default {
    /// The name of the section, for example `pit`; unique among saved types.
    const NAME: &'static str;
    /// Raised when the meaning of existing fields changes (added fields need no new version).
    const VERSION: u32;
}

/// A thing whose state can be saved and restored.
///
/// There is no default implementation: whoever adds a stateful thing says here what of it is state.
pub trait SaveRestore {
    /// The saved type.
    type Saved: Saved;

    /// The state now. The thing must not be running.
    fn save(&self) -> Self::Saved;

    /// Takes over `saved`. On an error the thing may be left in any consistent state and must not be run.
    fn restore(&mut self, saved: &Self::Saved) -> Result<(), StateError>;
}

/// One saved thing as bytes.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Section {
    /// [`Saved::NAME`] of the type, or for a thing that exists several times the name of the instance.
    #[prost(string, tag = "1")]
    pub name: String,
    /// [`Saved::VERSION`] at the time of saving.
    #[prost(uint32, tag = "2")]
    pub version: u32,
    /// The encoded message.
    #[prost(bytes = "vec", tag = "3")]
    pub data: Vec<u8>,
}

impl Section {
    /// `saved` as a section under its type's own name.
    pub fn new<S: Saved>(saved: &S) -> Self {
        Self::named(S::NAME, saved)
    }

    /// `saved` as a section under the name of one instance, for example `serial0` or `vcpu3`.
    pub fn named<S: Saved>(name: &str, saved: &S) -> Self {
        Self { name: name.to_owned(), version: S::VERSION, data: saved.encode_to_vec() }
    }

    /// The message again.
    pub fn decode<S: Saved>(&self) -> Result<S, StateError> {
        if self.version > S::VERSION {
            return Err(StateError::Newer { name: self.name.clone(), found: self.version, known: S::VERSION });
        }
        S::decode(self.data.as_slice())
            .map_err(|e| StateError::Corrupt { name: self.name.clone(), reason: e.to_string() })
    }
}

/// The state of a whole machine: a list of sections, each name once.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SavedState {
    /// The sections, in the order in which they were saved.
    #[prost(message, repeated, tag = "1")]
    pub sections: Vec<Section>,
}

impl SavedState {
    /// The section with this name.
    pub fn section(&self, name: &str) -> Result<&Section, StateError> {
        self.sections.iter().find(|s| s.name == name).ok_or_else(|| StateError::Missing { name: name.to_owned() })
    }

    /// Decodes the section with this name.
    pub fn decode<S: Saved>(&self, name: &str) -> Result<S, StateError> {
        self.section(name)?.decode()
    }
}

/// Why a saved state could not be taken over.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The section was written by a newer version.
    #[error("saved state of '{name}' has version {found}, this program knows up to {known}")]
    Newer {
        /// Section.
        name: String,
        /// Its version.
        found: u32,
        /// The newest version known here.
        known: u32,
    },
    /// The section is not a valid message, or its values make no sense.
    #[error("saved state of '{name}' is corrupt: {reason}")]
    Corrupt {
        /// Section.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such section.
    #[error("saved state has no section '{name}'")]
    Missing {
        /// Section.
        name: String,
    },
}

impl StateError {
    /// A [`StateError::Corrupt`].
    pub fn corrupt(name: &str, reason: impl Into<String>) -> Self {
        Self::Corrupt { name: name.to_owned(), reason: reason.into() }
    }
}
