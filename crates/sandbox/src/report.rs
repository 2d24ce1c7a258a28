//! What a sandbox consists of on this host.

use std::fmt;

use crate::{Layer, SandboxError};

/// What a sandbox consists of on this host, and what it lacks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The process's id in the PID namespace of whoever called [`enter`](crate::enter).
    pub pid: u32,
    /// What is in force.
    pub layers: Vec<Layer>,
    /// What is not, and why.
    pub missing: Vec<Missing>,
    /// Landlock's ABI as far as it is used, 0 without Landlock.
    pub landlock_abi: u32,
}

/// A layer that the host does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Which.
    pub layer: Layer,
    /// Why, and what could be done about it; half a sentence.
    pub reason: String,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "The sandbox has no {}: {}.", self.layer, self.reason)
    }
}

impl Report {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Whether `layer` is in force.
    pub fn has(&self, layer: Layer) -> bool {
        self.layers.contains(&layer)
    }

    pub(crate) fn add(&mut self, layer: Layer) {
        self.layers.push(layer);
    }

    pub(crate) fn lacks(&mut self, layer: Layer, reason: impl Into<String>) {
        self.missing.push(Missing { layer, reason: reason.into() });
    }

    /// An error if one of `required` is missing.
    pub(crate) fn check(&self, required: &[Layer]) -> Result<(), SandboxError> {
        match self.missing.iter().find(|missing| required.contains(&missing.layer)) {
            Some(Missing { layer, reason }) => Err(SandboxError::Required { layer: *layer, reason: reason.clone() }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_an_error_only_where_it_is_required() {
        let mut report = Report::new();
        report.add(Layer::Seccomp);
        report.lacks(Layer::Landlock, "the kernel has none");
        assert!(report.check(&[Layer::Seccomp, Layer::Root]).is_ok());
        let error = report.check(&[Layer::Landlock]).unwrap_err().to_string();
        assert_eq!(error, "the sandbox would lack its Landlock, which is required: the kernel has none");
        assert_eq!(report.missing[0].to_string(), "The sandbox has no Landlock: the kernel has none.");
    }
}
