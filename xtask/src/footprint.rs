//! What a running machine takes of the host's memory beyond what is the guest's.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};

/// How the mapping of guest memory is told from the others in `/proc/PID/smaps`.
#[derive(Clone, Copy)]
pub enum GuestMemory {
    /// By the name of its memfd: Purlin's.
    Named(&'static str),
    /// By its size in KiB, and that nothing in it is executed: QEMU's (its code cache may be of the same size).
    Sized(u64),
}

/// Purlin's.
pub const PURLIN: GuestMemory = GuestMemory::Named("/memfd:purlin-ram");

/// KiB that this process and all its descendants have in memory, each page they share with others counted in parts
/// (Pss in proc_pid_smaps(5)), without the guest's memory.
pub fn beyond_guest(process: u32, guest: GuestMemory) -> Result<u64> {
    let (mut total, mut seen) = (0, false);
    for process in family(process)? {
        let maps = Path::new("/proc").join(process.to_string()).join("smaps");
        let maps = fs::read_to_string(&maps).with_context(|| format!("cannot read {}", maps.display()))?;
        let (guests, others) = split(&maps, guest);
        seen |= guests > 0;
        total += others;
    }
    ensure!(seen, "no mapping of process {process} is guest memory");
    Ok(total)
}

/// KiB of guest memory and of everything else.
fn split(maps: &str, guest: GuestMemory) -> (u64, u64) {
    let (mut sums, mut is_guest) = ((0, 0), false);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("Size:"), Some(size)) => {
                if let GuestMemory::Sized(of) = guest {
                    is_guest &= size.parse() == Ok(of);
                }
            }
            (Some("Pss:"), Some(size)) => {
                let sum = if is_guest { &mut sums.0 } else { &mut sums.1 };
                *sum += size.parse::<u64>().unwrap_or(0);
            }
            // The first line of a mapping: addresses, permissions, offset, device, inode, path.
            (Some(range), Some(permissions)) if range.contains('-') && !range.ends_with(':') => {
                is_guest = match guest {
                    GuestMemory::Named(name) => line.contains(name),
                    GuestMemory::Sized(_) => !permissions.contains('x'),
                };
            }
            _ => {}
        }
    }
    sums
}

/// A process and its descendants.
pub fn family(process: u32) -> Result<Vec<u32>> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Ok(id) = entry?.file_name().to_string_lossy().parse::<u32>() else { continue };
        // Whoever has ended meanwhile takes nothing.
        let Ok(stat) = fs::read_to_string(format!("/proc/{id}/stat")) else { continue };
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        if let Some(Ok(parent)) = after_name.split_whitespace().nth(1).map(str::parse::<u32>) {
            parents.push((id, parent));
        }
    }
    let mut family = vec![process];
    let mut at = 0;
    while let Some(&member) = family.get(at) {
        family.extend(parents.iter().filter(|(_, parent)| *parent == member).map(|(id, _)| *id));
        at += 1;
    }
    Ok(family)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
7f00-7f40 rw-s 00000000 00:01 12 /memfd:purlin-ram (deleted)
Size:               1024 kB
Pss:                 700 kB
Pss_Dirty:           700 kB
7f40-7f80 rwxp 00000000 00:00 0
Size:               1024 kB
Pss:                  30 kB
7f80-7fc0 rw-p 00000000 00:00 0 [heap]
Size:               1024 kB
Pss:                   5 kB
VmFlags: rd wr mr mw me ac
";

    #[test]
    fn guest_memory_is_left_out() {
        assert_eq!(split(MAPS, PURLIN), (700, 35));
        assert_eq!(split(MAPS, GuestMemory::Sized(1024)), (705, 30));
        assert_eq!(split(MAPS, GuestMemory::Sized(4096)), (0, 735));
    }

    #[test]
    fn a_child_is_of_the_family() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let family = family(std::process::id()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(family.contains(&std::process::id()) && family.contains(&child.id()), "{family:?}");
    }
}
