//! What a guest boots, read from its own disk at each start: as long as there is no firmware, Purlin does a boot loader's
//! work.
//!
//! The guest can write all that is read here, so every size is bounded and nothing is believed.

mod bls;
mod files;
mod grub;
mod kernels;
mod partitions;
mod version;

use std::{
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use purlin_debian::Error as HostError;
use purlin_storage::Disk;

use self::{
    files::{FileSystem, cannot_read},
    partitions::Volume,
};
use crate::Error;

/// What the machine is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootFiles {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM disks, in order; the kernel takes them joined.
    pub initrds: Vec<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// What a boot loader's configuration says, with paths as in the file system that it is in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Entry {
    kernel: String,
    initrds: Vec<String>,
    arguments: String,
}

/// The most bytes of a kernel.
const MAX_KERNEL: u64 = 256 << 20;
/// The most bytes of all initial RAM disks.
const MAX_INITRD: u64 = 1 << 30;
/// The most initial RAM disks.
const MAX_INITRDS: usize = 64;
/// The most that the kernel takes (COMMAND_LINE_SIZE on x86).
const MAX_CMDLINE: usize = 2047;

/// Bytes that are copied at once.
const PIECE: u64 = 256 << 10;

/// Finds what the guest on `disk` would boot, and copies it to the directory `to`: `kernel`, `initrd-0` and so on. `name` is what
/// errors call the disk.
pub fn copy(disk: &Arc<Disk>, name: &str, to: &Path) -> Result<BootFiles, Error> {
    let failed = |reason| Error::Boot { disk: name.to_owned(), reason };
    let volumes = partitions::find(disk)?;
    let (systems, others) = open_all(disk, &volumes);
    if systems.is_empty() {
        return Err(failed(nothing_readable(&others)));
    }
    for (system, volume) in &systems {
        let Some(entry) = find_entry(system) else { continue };
        let root = root_argument(&entry, &systems, volume).map_err(failed)?;
        let cmdline = command_line(&format!("{root}{}", entry.arguments)).map_err(failed)?;
        let (kernel, initrds) = copy_files(system, &entry, to, &failed)?;
        return Ok(BootFiles { kernel, initrds, cmdline });
    }
    Err(failed(format!("there is no kernel in /boot{}", and_others(&others))))
}

type Systems<'a> = Vec<(FileSystem, &'a Volume)>;

/// Opens the file systems that can be read, and says what the others are.
fn open_all<'a>(disk: &Arc<Disk>, volumes: &'a [Volume]) -> (Systems<'a>, Vec<String>) {
    let (mut systems, mut others) = (vec![], vec![]);
    for volume in volumes {
        match FileSystem::open(disk, volume) {
            Ok(system) => systems.push((system, volume)),
            Err(Some(what)) => others.push(what),
            Err(None) => {}
        }
    }
    (systems, others)
}

/// The ways to find a kernel, those first that say most.
fn find_entry(system: &FileSystem) -> Option<Entry> {
    bls::default_entry(system).or_else(|| grub::default_entry(system)).or_else(|| kernels::newest(system))
}

/// What to add for the kernel to find its root, where the entry does not say.
fn root_argument(entry: &Entry, systems: &Systems, boot: &Volume) -> Result<String, String> {
    if entry.arguments.split_whitespace().any(|word| word.starts_with("root=")) {
        return Ok(String::new());
    }
    let is_root = |system: &FileSystem| system.exists("/etc/os-release") || system.exists("/sbin/init");
    match systems.iter().find(|(system, _)| is_root(system)) {
        Some((system, _)) => Ok(format!("root=UUID={} ", system.uuid())),
        None => Err(format!("the kernel on {boot} is there, but neither arguments for it nor a root file system")),
    }
}

/// Copies the kernel and the initial RAM disks.
fn copy_files(
    system: &FileSystem,
    entry: &Entry,
    to: &Path,
    failed: &dyn Fn(String) -> Error,
) -> Result<(PathBuf, Vec<PathBuf>), Error> {
    if entry.initrds.len() > MAX_INITRDS {
        return Err(failed(format!("its kernel has more than {MAX_INITRDS} initial RAM disks")));
    }
    let copy = |path: &str, most, name: &str| copy_file(system, path, most, &to.join(name), failed);
    let (kernel, _) = copy(&entry.kernel, MAX_KERNEL, "kernel")?;
    let (mut initrds, mut left) = (vec![], MAX_INITRD);
    for (number, path) in entry.initrds.iter().enumerate() {
        let (initrd, size) = copy(path, left, &format!("initrd-{number}"))?;
        left -= size;
        initrds.push(initrd);
    }
    Ok((kernel, initrds))
}

/// Copies a file of at most `most` bytes; gives where it is, and its size.
fn copy_file(
    system: &FileSystem,
    path: &str,
    most: u64,
    to: &Path,
    failed: &dyn Fn(String) -> Error,
) -> Result<(PathBuf, u64), Error> {
    let (mut file, size) = system.file(path, most).map_err(failed)?;
    let mut copy = File::create(to).map_err(HostError::file("write", to))?;
    let mut piece = Vec::with_capacity(PIECE as usize);
    loop {
        piece.clear();
        match file.by_ref().take(PIECE).read_to_end(&mut piece) {
            Ok(0) => return Ok((to.to_owned(), size)),
            Ok(_) => copy.write_all(&piece).map_err(HostError::file("write", to))?,
            Err(error) => return Err(failed(cannot_read(path, &error))),
        }
    }
}

/// The kernel's command line, as far as it can be one.
fn command_line(arguments: &str) -> Result<String, String> {
    let cmdline = with_console(arguments);
    match cmdline.len() {
        0..=MAX_CMDLINE if cmdline.bytes().all(|b| (b' '..0x7f).contains(&b)) => Ok(cmdline),
        _ => Err("the arguments of its kernel are too long, or not printable".into()),
    }
}

/// The last console named is the one that process 1 gets: the serial port.
fn with_console(arguments: &str) -> String {
    let words: Vec<&str> = arguments.split_whitespace().collect();
    let last = words.iter().rev().find(|word| word.starts_with("console="));
    let serial = last.is_some_and(|word| *word == "console=ttyS0" || word.starts_with("console=ttyS0,"));
    words.into_iter().chain((!serial).then_some("console=ttyS0")).collect::<Vec<_>>().join(" ")
}

fn nothing_readable(others: &[String]) -> String {
    match others {
        [] => "there is no file system on it; name a kernel with --kernel".into(),
        _ => format!("its kernel cannot be read: {}; name a kernel with --kernel", others.join(", ")),
    }
}

fn and_others(others: &[String]) -> String {
    if others.is_empty() { String::new() } else { format!(", and {} (cannot be read)", others.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_serial_console_is_last() {
        assert_eq!(with_console("ro  quiet"), "ro quiet console=ttyS0");
        assert_eq!(with_console("console=tty0 console=ttyS0,115200"), "console=tty0 console=ttyS0,115200");
        assert_eq!(with_console("console=ttyS0 console=tty1"), "console=ttyS0 console=tty1 console=ttyS0");
    }
}
