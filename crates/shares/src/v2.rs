//! Control groups of version 2 (the kernel's admin-guide/cgroup-v2).

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{GroupError, How, Means, Shares, Usage, group::files, mounts::Hierarchies};

/// The period of a cap, in µs.
const PERIOD: u64 = 100_000;

/// What is wanted of a group.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "io"];

/// Makes a group in the innermost of the groups around this process that gives its children a CPU controller. `None` if
/// there is none in which this user may.
pub fn create(hierarchies: &Hierarchies, directory: &str) -> Option<PathBuf> {
    hierarchies.v2().into_iter().find_map(|parent| {
        let path = parent.join(directory);
        (enable(&parent) && files::make(&path)).then_some(path)
    })
}

/// Whether the children of `parent` have a CPU controller, having asked for that.
fn enable(parent: &Path) -> bool {
    let enabled = || list(&parent.join("cgroup.subtree_control"));
    let missing = CONTROLLERS.iter().filter(|name| !enabled().iter().any(|have| have == *name));
    for name in missing {
        // A group with processes of its own must not (EBUSY), nor one that is another user's: then the next one may.
        let _ = fs::write(parent.join("cgroup.subtree_control"), format!("+{name}"));
    }
    enabled().iter().any(|name| name == "cpu")
}

fn list(path: &Path) -> Vec<String> {
    fs::read_to_string(path).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}

/// What a group has, by the files that it has.
pub fn how(group: &Path) -> How {
    let by = |file: &str| if group.join(file).exists() { Means::CgroupV2 } else { Means::Nothing };
    How { cpu: by("cpu.weight"), memory: by("memory.max"), io: by("io.weight") }
}

/// Sets what it may take.
pub fn set(group: &Path, shares: &Shares) -> Result<(), GroupError> {
    let how = how(group);
    files::write(&group.join("cpu.weight"), &shares.cpu_weight.to_string())?;
    let quota = shares.cpu_cap.map_or("max".into(), |percent| (u64::from(percent) * PERIOD / 100).to_string());
    files::write(&group.join("cpu.max"), &format!("{quota} {PERIOD}"))?;
    match (how.memory, shares.memory_max) {
        (Means::Nothing, None) => {}
        (Means::Nothing, Some(_)) => return Err(GroupError::NoMemoryLimit),
        (_, bytes) => {
            let text = bytes.map_or("max".into(), |bytes| bytes.to_string());
            files::write(&group.join("memory.max"), &text)?;
        }
    }
    if how.io != Means::Nothing {
        files::write(&group.join("io.weight"), &shares.cpu_weight.to_string())?;
    }
    Ok(())
}

/// What it has taken.
pub fn usage(group: &Path) -> Result<Usage, GroupError> {
    let stat = files::read(&group.join("cpu.stat"))?;
    let micros = |name| files::field(&stat, name).unwrap_or(0).saturating_mul(1000);
    let memory = files::number(&group.join("memory.current")).unwrap_or(0);
    Ok(Usage { cpu_ns: micros("usage_usec"), memory, throttled_ns: micros("throttled_usec") })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that looks like a group; nothing enforces what is written there.
    fn group(names: &[&str]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        names.iter().for_each(|name| fs::write(directory.path().join(name), "").unwrap());
        directory
    }

    #[test]
    fn shares_are_written_as_the_kernel_wants_them() {
        let group = group(&["cpu.weight", "cpu.max", "memory.max", "io.weight"]);
        let read = |name: &str| fs::read_to_string(group.path().join(name)).unwrap();
        let shares = Shares { cpu_weight: 250, cpu_cap: Some(150), memory_max: Some(1 << 30) };
        set(group.path(), &shares).unwrap();
        assert_eq!(read("cpu.weight"), "250");
        assert_eq!(read("cpu.max"), "150000 100000");
        assert_eq!(read("memory.max"), "1073741824");
        assert_eq!(read("io.weight"), "250");
        set(group.path(), &Shares::default()).unwrap();
        assert_eq!(read("cpu.max"), "max 100000");
        assert_eq!(read("memory.max"), "max");
    }

    #[test]
    fn a_limit_that_nobody_enforces_is_an_error() {
        let group = group(&["cpu.weight", "cpu.max"]);
        assert_eq!(how(group.path()), How { cpu: Means::CgroupV2, memory: Means::Nothing, io: Means::Nothing });
        assert!(set(group.path(), &Shares::default()).is_ok());
        let limited = Shares { memory_max: Some(1), ..Shares::default() };
        assert!(matches!(set(group.path(), &limited), Err(GroupError::NoMemoryLimit)));
    }

    #[test]
    fn usage_is_read() {
        let group = group(&[]);
        let stat = "usage_usec 1234\nuser_usec 1000\nnr_throttled 3\nthrottled_usec 77\n";
        fs::write(group.path().join("cpu.stat"), stat).unwrap();
        fs::write(group.path().join("memory.current"), "4096\n").unwrap();
        let expected = Usage { cpu_ns: 1_234_000, memory: 4096, throttled_ns: 77_000 };
        assert_eq!(usage(group.path()).unwrap(), expected);
    }
}
