//! Groups, whatever enforces them.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{GroupError, How, Means, Shares, Usage, mounts::Hierarchies, process, v1::Directories, v2};

/// Directories of groups begin with this.
const PREFIX: &str = "purlin-";

/// How often, and after what time each, the removal of a group is tried: the kernel may need a moment to see that its
/// last process is gone.
const REMOVAL: (u32, Duration) = (100, Duration::from_millis(10));

/// Processes under one set of shares.
#[derive(Clone, Debug)]
pub struct Group {
    name: String,
    shares: Shares,
    by: By,
}

#[derive(Clone, Debug)]
enum By {
    V2(PathBuf),
    V1(Directories),
    /// The processes that were added.
    Process(Vec<u32>),
}

impl Group {
    /// Makes a group, or takes the one of that name, and says how it is enforced. Where no control group is to be had,
    /// the group is known to this value only. A limit of memory that nobody can enforce is an error.
    pub fn create(name: &str, shares: &Shares) -> Result<(Self, How), GroupError> {
        Self::create_in(&Hierarchies::of_host(), name, shares)
    }

    fn create_in(hierarchies: &Hierarchies, name: &str, shares: &Shares) -> Result<(Self, How), GroupError> {
        let directory = directory(name)?;
        shares.check()?;
        let by = existing(hierarchies, &directory)
            .or_else(|| v2::create(hierarchies, &directory).map(By::V2))
            .or_else(|| Directories::create(hierarchies, &directory).map(By::V1))
            .unwrap_or(By::Process(Vec::new()));
        let mut group = Self { name: name.to_owned(), shares: *shares, by };
        if let Err(error) = group.set(shares) {
            // It is as if it had never been; if it cannot be removed, it is in use, and the first error counts.
            let _ = group.remove();
            return Err(error);
        }
        let how = group.how();
        Ok((group, how))
    }

    /// The group of that name, which somebody else has made: before a restart, say. Only control groups are found.
    pub fn find(name: &str) -> Result<Option<Self>, GroupError> {
        let by = existing(&Hierarchies::of_host(), &directory(name)?);
        Ok(by.map(|by| Self { name: name.to_owned(), shares: Shares::default(), by }))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How it is enforced.
    pub fn how(&self) -> How {
        match &self.by {
            By::V2(path) => v2::how(path),
            By::V1(directories) => directories.how(),
            By::Process(_) => How { cpu: Means::Process, memory: Means::Nothing, io: Means::Nothing },
        }
    }

    /// Puts a process into it, with all its threads and what it starts from now on. Memory that it has already is not
    /// counted: add it before it takes its own.
    pub fn add(&mut self, pid: u32) -> Result<(), GroupError> {
        match &mut self.by {
            By::V2(path) => files::write(&path.join("cgroup.procs"), &pid.to_string()),
            By::V1(directories) => {
                directories.all().iter().try_for_each(|path| files::write(&path.join("cgroup.procs"), &pid.to_string()))
            }
            By::Process(pids) => {
                pids.retain(|known| *known != pid);
                pids.push(pid);
                process::set(pid, &self.shares)
            }
        }
    }

    /// Puts this process into it, as [`Self::add`] does.
    pub fn enter(&mut self) -> Result<(), GroupError> {
        match &self.by {
            // The kernel has a process wait for others (an RCU grace period, 10 to 30 ms), but not a thread that moves
            // itself (`cgroup_procs_write_start` in kernel/cgroup/cgroup.c).
            By::V1(directories) if process::has_one_thread() => {
                let moved = directories.all().iter().try_for_each(|path| files::write(&path.join("tasks"), "0"));
                moved.or_else(|_| self.add(std::process::id()))
            }
            _ => self.add(std::process::id()),
        }
    }

    /// What its processes have taken.
    pub fn usage(&self) -> Result<Usage, GroupError> {
        match &self.by {
            By::V2(path) => v2::usage(path),
            By::V1(directories) => directories.usage(),
            By::Process(pids) => Ok(pids.iter().map(|&pid| process::usage(pid)).fold(Usage::default(), |sum, one| {
                Usage { cpu_ns: sum.cpu_ns + one.cpu_ns, memory: sum.memory + one.memory, throttled_ns: 0 }
            })),
        }
    }

    /// Changes what it may take, at once. A limit of memory below what is in use is an error with version 1, and has
    /// memory reclaimed, or a process killed, with version 2.
    pub fn set(&mut self, shares: &Shares) -> Result<(), GroupError> {
        shares.check()?;
        match &self.by {
            By::V2(path) => v2::set(path, shares)?,
            By::V1(directories) => directories.set(shares)?,
            By::Process(_) if shares.memory_max.is_some() => return Err(GroupError::NoMemoryLimit),
            By::Process(pids) => pids.iter().try_for_each(|&pid| process::set(pid, shares))?,
        }
        self.shares = *shares;
        Ok(())
    }

    /// Whether it has no process.
    pub fn is_empty(&self) -> bool {
        let empty = |path: &Path| fs::read_to_string(path.join("cgroup.procs")).is_ok_and(|pids| pids.is_empty());
        match &self.by {
            By::V2(path) => empty(path),
            By::V1(directories) => directories.all().into_iter().all(empty),
            By::Process(pids) => pids.iter().all(|pid| !Path::new("/proc").join(pid.to_string()).exists()),
        }
    }

    /// Removes it. Its processes must have ended; it waits up to a second for the kernel to notice.
    pub fn remove(self) -> Result<(), GroupError> {
        match &self.by {
            By::V2(path) => files::remove(path),
            By::V1(directories) => directories.all().into_iter().try_for_each(files::remove),
            By::Process(_) => Ok(()),
        }
    }
}

/// The names of all groups that there are on this host where this process would make some, for somebody who looks for
/// leftovers: those that [`Group::find`] finds and that are [empty](Group::is_empty).
pub fn names() -> Vec<String> {
    let hierarchies = Hierarchies::of_host();
    let controllers = ["cpu", "cpuacct", "memory", "blkio"].into_iter().flat_map(|name| hierarchies.v1(name));
    let entries = hierarchies.v2().into_iter().chain(controllers).filter_map(|path| fs::read_dir(path).ok());
    let name = |entry: io::Result<fs::DirEntry>| {
        let entry = entry.ok()?;
        entry.file_type().ok()?.is_dir().then_some(())?;
        let name = entry.file_name().to_str()?.strip_prefix(PREFIX)?.to_owned();
        directory(&name).is_ok().then_some(name)
    };
    let mut names: Vec<_> = entries.flatten().filter_map(name).collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn existing(hierarchies: &Hierarchies, directory: &str) -> Option<By> {
    let v2 = hierarchies.v2().into_iter().map(|parent| parent.join(directory)).find(|path| path.is_dir());
    v2.map(By::V2).or_else(|| Directories::find(hierarchies, directory).map(By::V1))
}

/// The directory's name.
fn directory(name: &str) -> Result<String, GroupError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(fits) {
        return Err(GroupError::Name(name.to_owned()));
    }
    Ok(format!("{PREFIX}{name}"))
}

/// The files of control groups.
pub mod files {
    use std::{fs, io, path::Path, thread};

    use super::REMOVAL;
    use crate::GroupError;

    fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> GroupError {
        move |error| GroupError::Cgroup { what, path: path.to_owned(), error }
    }

    /// Makes a group's directory, or finds it; whether it is there.
    pub fn make(path: &Path) -> bool {
        path.is_dir() || fs::create_dir(path).is_ok()
    }

    /// Writes a file that is there.
    pub fn write(path: &Path, text: &str) -> Result<(), GroupError> {
        use io::Write;
        let mut file = fs::File::options().write(true).truncate(true).open(path).map_err(failed("write", path))?;
        file.write_all(text.as_bytes()).map_err(failed("write", path))
    }

    /// The text of a file.
    pub fn read(path: &Path) -> Result<String, GroupError> {
        fs::read_to_string(path).map_err(failed("read", path))
    }

    /// The number that a file has.
    pub fn number(path: &Path) -> Result<u64, GroupError> {
        let invalid = |_| failed("read", path)(io::ErrorKind::InvalidData.into());
        read(path)?.trim().parse().map_err(invalid)
    }

    /// The number behind `name` in a file of names and numbers.
    pub fn field(text: &str, name: &str) -> Option<u64> {
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }

    /// Removes a group's directory.
    pub fn remove(path: &Path) -> Result<(), GroupError> {
        for _ in 0..REMOVAL.0 {
            match fs::remove_dir(path) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => thread::sleep(REMOVAL.1),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                other => return other.map_err(failed("remove", path)),
            }
        }
        fs::remove_dir(path).map_err(failed("remove", path))
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::process::{Pid, getpriority_process};

    use super::*;

    #[test]
    fn without_control_groups_a_weight_is_a_nice_value() {
        let nowhere = Hierarchies::none();
        let half = Shares { cpu_weight: 50, ..Shares::default() };
        let (mut group, how) = Group::create_in(&nowhere, "test", &half).unwrap();
        assert_eq!(how, How { cpu: Means::Process, memory: Means::Nothing, io: Means::Nothing });
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let nice = || getpriority_process(Pid::from_raw(child.id().cast_signed())).unwrap();
        let before = nice();
        // Only root may take a priority back.
        let nice_of = |weight| {
            if rustix::process::geteuid().is_root() { process::nice(weight) } else { before.max(process::nice(weight)) }
        };
        group.add(child.id()).unwrap();
        assert_eq!(nice(), nice_of(50));
        group.set(&Shares { cpu_weight: 20, ..half }).unwrap();
        assert_eq!(nice(), nice_of(20));
        assert!(!group.is_empty() && group.usage().unwrap().memory > 0);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(group.is_empty());
        group.remove().unwrap();
    }

    #[test]
    fn without_control_groups_memory_has_no_limit() {
        let limited = Shares { memory_max: Some(1 << 30), ..Shares::default() };
        let created = Group::create_in(&Hierarchies::none(), "test", &limited);
        assert!(matches!(created, Err(GroupError::NoMemoryLimit)));
    }
}
