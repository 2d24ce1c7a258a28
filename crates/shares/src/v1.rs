//! Control groups of version 1: a directory in the hierarchy of each controller.

use std::path::{Path, PathBuf};

use crate::{GroupError, How, Means, Shares, Usage, group::files, mounts::Hierarchies};

/// The period of a cap, in µs.
const PERIOD: u64 = 100_000;

/// cpu.shares of a process that is in no group of its own: what a weight of 100 is.
const DEFAULT_CPU_SHARES: u64 = 1024;

/// The directories of a group, where there are such controllers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directories {
    cpu: Option<PathBuf>,
    cpuacct: Option<PathBuf>,
    memory: Option<PathBuf>,
    blkio: Option<PathBuf>,
}

impl Directories {
    /// Makes the group in each hierarchy, in the innermost of the groups around this process in which this user may.
    /// `None` if that is in none of them, or not where CPU time is shared.
    pub fn create(hierarchies: &Hierarchies, directory: &str) -> Option<Self> {
        let make = |controller| {
            let places = hierarchies.v1(controller).into_iter().map(|parent| parent.join(directory));
            places.into_iter().find(|path| files::make(path))
        };
        let cpu = make("cpu")?;
        Some(Self { cpu: Some(cpu), cpuacct: make("cpuacct"), memory: make("memory"), blkio: make("blkio") })
    }

    /// A group that is there, at least in one hierarchy.
    pub fn find(hierarchies: &Hierarchies, directory: &str) -> Option<Self> {
        let find = |controller| {
            let places = hierarchies.v1(controller).into_iter().map(|parent| parent.join(directory));
            places.into_iter().find(|path| path.is_dir())
        };
        let found = Self { cpu: find("cpu"), cpuacct: find("cpuacct"), memory: find("memory"), blkio: find("blkio") };
        (found != Self::default()).then_some(found)
    }

    /// Each once: controllers may have one hierarchy together.
    pub fn all(&self) -> Vec<&Path> {
        let all = [&self.cpu, &self.cpuacct, &self.memory, &self.blkio];
        let mut paths: Vec<_> = all.into_iter().flatten().map(PathBuf::as_path).collect();
        paths.sort_unstable();
        paths.dedup();
        paths
    }

    /// What it has.
    pub fn how(&self) -> How {
        let by = |there: bool| if there { Means::CgroupV1 } else { Means::Nothing };
        How { cpu: by(self.cpu.is_some()), memory: by(self.memory.is_some()), io: by(self.io_weight().is_some()) }
    }

    /// The kernel has it only with the BFQ scheduler.
    fn io_weight(&self) -> Option<PathBuf> {
        self.blkio.as_ref().map(|path| path.join("blkio.bfq.weight")).filter(|path| path.exists())
    }

    /// Sets what it may take.
    pub fn set(&self, shares: &Shares) -> Result<(), GroupError> {
        if let Some(cpu) = &self.cpu {
            let weight = u64::from(shares.cpu_weight) * DEFAULT_CPU_SHARES / u64::from(Shares::DEFAULT_WEIGHT);
            files::write(&cpu.join("cpu.shares"), &weight.max(2).to_string())?;
            files::write(&cpu.join("cpu.cfs_period_us"), &PERIOD.to_string())?;
            let quota = shares.cpu_cap.map_or(-1, |percent| i64::from(percent) * PERIOD as i64 / 100);
            files::write(&cpu.join("cpu.cfs_quota_us"), &quota.to_string())?;
        }
        match (&self.memory, shares.memory_max) {
            (None, None) => {}
            (None, Some(_)) => return Err(GroupError::NoMemoryLimit),
            (Some(memory), bytes) => {
                let text = bytes.map_or("-1".into(), |bytes| bytes.to_string());
                files::write(&memory.join("memory.limit_in_bytes"), &text)?;
            }
        }
        if let Some(weight) = self.io_weight() {
            // Its largest weight is 1000.
            files::write(&weight, &shares.cpu_weight.min(1000).to_string())?;
        }
        Ok(())
    }

    /// What it has taken.
    pub fn usage(&self) -> Result<Usage, GroupError> {
        let number = |path: &Option<PathBuf>, file: &str| {
            path.as_ref().and_then(|path| files::number(&path.join(file)).ok()).unwrap_or(0)
        };
        let throttled = self.cpu.as_ref().map(|path| files::read(&path.join("cpu.stat"))).transpose()?;
        Ok(Usage {
            cpu_ns: number(&self.cpuacct, "cpuacct.usage"),
            memory: number(&self.memory, "memory.usage_in_bytes"),
            throttled_ns: throttled.and_then(|stat| files::field(&stat, "throttled_time")).unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn weights_are_those_of_version_2_in_other_units() {
        let directory = tempfile::tempdir().unwrap();
        let path = Some(directory.path().to_owned());
        let group = Directories { cpu: path.clone(), memory: path, ..Directories::default() };
        let files = ["cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us", "memory.limit_in_bytes"];
        files.iter().for_each(|name| fs::write(directory.path().join(name), "").unwrap());
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        for (weight, shares) in [(100, "1024"), (200, "2048"), (10_000, "102400"), (1, "10")] {
            group.set(&Shares { cpu_weight: weight, ..Shares::default() }).unwrap();
            assert_eq!(read("cpu.shares"), shares);
        }
        assert_eq!(read("cpu.cfs_quota_us"), "-1");
        group.set(&Shares { cpu_cap: Some(30), memory_max: Some(4096), ..Shares::default() }).unwrap();
        assert_eq!(read("cpu.cfs_quota_us"), "30000");
        assert_eq!(read("memory.limit_in_bytes"), "4096");
    }
}
