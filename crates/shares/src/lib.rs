//! Fair shares of the host for processes: weights and limits of CPU and memory.
//!
//! A [`Group`] is a process and its threads under one set of [`Shares`]. It is a control group where the host has them and
//! lets this user make some: of version 2 (in the subtree that is delegated to a user too), else of version 1. Where there
//! are none, a weight is a nice value, and a cap is kept by the process itself, which stops its busy threads for part of
//! the time ([`throttle`]); [`How`] tells which.
//!
//! Groups of control groups outlive who has made them, and are found again by name.
#![forbid(unsafe_code)]

mod group;
mod mounts;
mod process;
pub mod throttle;
mod v1;
mod v2;

use std::{fmt, io, path::PathBuf};

pub use group::{Group, names};

/// What a process may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Weight of its CPU time, and of its transfers to and from disks, against other processes' that want it at the same
    /// time: 1 to 10000, 100 if nothing is said, as systemd's CPUWeight= has it. Twice the weight is twice the time.
    pub cpu_weight: u32,
    /// The most CPU time, in percent of one CPU: 150 is one and a half. Also if nobody else wants it.
    pub cpu_cap: Option<u32>,
    /// The most memory in bytes, with what it has in the page cache. Beyond that it is reclaimed, and in the end a process
    /// is killed: leave room for more than the guest's memory.
    pub memory_max: Option<u64>,
}

impl Default for Shares {
    fn default() -> Self {
        Self { cpu_weight: Self::DEFAULT_WEIGHT, cpu_cap: None, memory_max: None }
    }
}

impl Shares {
    /// The weight of who says nothing.
    pub const DEFAULT_WEIGHT: u32 = 100;
    /// The largest weight.
    pub const MAX_WEIGHT: u32 = 10_000;

    fn check(&self) -> Result<(), GroupError> {
        if !(1..=Self::MAX_WEIGHT).contains(&self.cpu_weight) {
            return Err(GroupError::Weight(self.cpu_weight));
        }
        match self.cpu_cap {
            Some(0) => Err(GroupError::Cap),
            _ => Ok(()),
        }
    }
}

/// By what means something is enforced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// A control group of version 2.
    CgroupV2,
    /// A control group of version 1.
    CgroupV1,
    /// Nice values for weights; for a cap, the process's own [`throttle`].
    Process,
    /// Not at all.
    Nothing,
}

impl fmt::Display for Means {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CgroupV2 => "control groups (version 2)",
            Self::CgroupV1 => "control groups (version 1)",
            Self::Process => "the process itself",
            Self::Nothing => "nothing",
        })
    }
}

/// By what means each part of [`Shares`] is enforced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct How {
    /// Weight and cap of CPU time. For [`Means::Process`] the process must keep its cap itself.
    pub cpu: Means,
    /// The limit of memory.
    pub memory: Means,
    /// The weight of transfers.
    pub io: Means,
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, memory, io } = self;
        write!(f, "CPU time is shared by {cpu}, memory is limited by {memory}, disk transfers are shared by {io}")
    }
}

/// What a group has taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time in ns. For a control group, of processes too that have ended.
    pub cpu_ns: u64,
    /// Bytes of memory at present.
    pub memory: u64,
    /// For how many ns its threads had to wait for the cap; 0 where nobody counts it.
    pub throttled_ns: u64,
}

/// Why something cannot be done with a group.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// A name that would not do for a directory.
    #[error("'{0}' cannot be a group's name: use up to 64 letters, digits, '-', '_' and '.', not '.' first")]
    Name(String),
    /// There is no such weight.
    #[error("{0} is no CPU weight: use 1 to {max}, {default} is everybody's", max = Shares::MAX_WEIGHT, default = Shares::DEFAULT_WEIGHT)]
    Weight(u32),
    /// Nothing can run with no time at all.
    #[error("a CPU cap of 0 % would stop the process: use 1 or more, 100 is one whole CPU")]
    Cap,
    /// The kernel refuses it.
    #[error("cannot {what} {}: {error}", .path.display())]
    Cgroup {
        /// What was tried.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A process cannot be given its nice value.
    #[error("cannot set the priority of process {pid}: {error}")]
    Priority {
        /// The process.
        pid: u32,
        /// Why.
        error: io::Error,
    },
    /// The memory of a process cannot be limited here.
    #[error("this host has no control groups that this user may make, so memory cannot be limited")]
    NoMemoryLimit,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_refused() {
        let with = |cpu_weight, cpu_cap| Shares { cpu_weight, cpu_cap, memory_max: None }.check();
        assert!(with(1, Some(1)).is_ok() && with(10_000, None).is_ok());
        assert!(matches!(with(0, None), Err(GroupError::Weight(0))));
        assert!(matches!(with(10_001, None), Err(GroupError::Weight(_))));
        assert!(matches!(with(100, Some(0)), Err(GroupError::Cap)));
    }
}
