//! Where control groups are mounted, and which is this process's.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Where the kernel tells it.
const MOUNTS: &str = "/proc/self/mountinfo";
const OWN: &str = "/proc/self/cgroup";

/// The mount of a hierarchy.
#[derive(Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    point: PathBuf,
    /// What of the hierarchy is there.
    root: PathBuf,
    /// `cgroup` or `cgroup2`.
    kind: String,
    /// For version 1, which controllers are in it.
    controllers: Vec<String>,
}

/// All hierarchies, and the process's place in each.
pub struct Hierarchies {
    mounts: Vec<Mount>,
    own: String,
}

impl Hierarchies {
    /// Those of this host.
    pub fn of_host() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        Self { mounts: mounts(&read(MOUNTS)), own: read(OWN) }
    }

    /// A host without any.
    #[cfg(test)]
    pub fn none() -> Self {
        Self { mounts: Vec::new(), own: String::new() }
    }

    /// The groups that this process is in, from its own outwards, in the hierarchy of version 2.
    pub fn v2(&self) -> Vec<PathBuf> {
        let own = self.own.lines().find_map(|line| line.strip_prefix("0::"));
        let mount = self.mounts.iter().find(|mount| mount.kind == "cgroup2");
        mount.zip(own).map_or_else(Vec::new, |(mount, own)| mount.outwards(own))
    }

    /// The same in the hierarchy of version 1 that has `controller`.
    pub fn v1(&self, controller: &str) -> Vec<PathBuf> {
        let own = self.own.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let has = fields.next()?.split(',').any(|name| name == controller);
            fields.next().filter(|_| has)
        });
        let has = |mount: &&Mount| mount.kind == "cgroup" && mount.controllers.iter().any(|name| name == controller);
        let mount = self.mounts.iter().find(has);
        mount.zip(own).map_or_else(Vec::new, |(mount, own)| mount.outwards(own))
    }
}

impl Mount {
    /// The directories of a group and those that it is in, as far as this mount shows them.
    fn outwards(&self, group: &str) -> Vec<PathBuf> {
        // A container may see a part of the hierarchy only, or a group that is outside of it.
        let below = Path::new(group).strip_prefix(&self.root).unwrap_or(Path::new(""));
        let own = self.point.join(below.strip_prefix("/").unwrap_or(below));
        own.ancestors().take_while(|path| path.starts_with(&self.point)).map(Path::to_owned).collect()
    }
}

/// See proc_pid_mountinfo(5).
fn mounts(text: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (before, behind) = line.split_once(" - ")?;
        let before: Vec<&str> = before.split(' ').collect();
        let behind: Vec<&str> = behind.split(' ').collect();
        let (kind, options) = (*behind.first()?, *behind.get(2)?);
        matches!(kind, "cgroup" | "cgroup2").then_some(())?;
        Some(Mount {
            root: before.get(3)?.into(),
            point: before.get(4)?.into(),
            kind: kind.into(),
            controllers: options.split(',').map(str::to_owned).collect(),
        })
    };
    text.lines().filter_map(mount).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hierarchies() -> Hierarchies {
        let text = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
                    32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
                    35 31 0:32 /docker/1 /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                    41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let own = "3:cpu,cpuacct:/\n2:memory:/docker/1/a/b\n1:name=systemd:/\n0::/user.slice/x.scope\n";
        Hierarchies { mounts: mounts(text), own: own.into() }
    }

    #[test]
    fn own_groups_are_found_outwards() {
        let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect::<Vec<_>>();
        let here = hierarchies();
        assert_eq!(here.v1("cpu"), paths(&["/sys/fs/cgroup/cpu,cpuacct"]));
        assert_eq!(here.v1("cpuacct"), here.v1("cpu"));
        let memory = ["/sys/fs/cgroup/memory/a/b", "/sys/fs/cgroup/memory/a", "/sys/fs/cgroup/memory"];
        assert_eq!(here.v1("memory"), paths(&memory));
        let unified = ["unified/user.slice/x.scope", "unified/user.slice", "unified"];
        assert_eq!(here.v2(), unified.map(|path| Path::new("/sys/fs/cgroup").join(path)));
        assert!(here.v1("blkio").is_empty());
    }

    #[test]
    fn without_any_there_are_none() {
        let nowhere = Hierarchies::none();
        assert!(nowhere.v2().is_empty() && nowhere.v1("cpu").is_empty());
    }
}
