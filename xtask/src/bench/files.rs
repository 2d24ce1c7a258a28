//! The files that guests and the host run the rows in: one tree, from which an initramfs is made, too.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use purlin_debian::{guest::Guest, initramfs::Initramfs};

use super::userland;
use crate::{
    guests::Kernel,
    shell::{root, run, target},
};

/// Where everything is.
pub struct Files {
    /// Of this run; logs are here.
    pub dir: PathBuf,
    /// The tree: what is / in the guests.
    pub root: PathBuf,
    /// The kernel, with that tree.
    pub guest: Guest,
    /// The guest of `cargo xtask boot`.
    pub small: Guest,
}

/// Compiles and packs what has changed.
pub fn prepare() -> Result<Files> {
    let dir = target().join("xtask/bench");
    let tree = dir.join(userland::ENTRY);
    userland::prepare(&tree)?;
    for sub in ["dev", "proc", "sys", "tmp"] {
        fs::create_dir_all(tree.join(sub))?;
    }
    compile(&tree.join("bench"))?;
    let small = Kernel::Cloud.guest()?;
    let initrd = dir.join("initrd");
    pack(&small.initrd, &tree, &initrd).with_context(|| format!("cannot make {}", initrd.display()))?;
    let guest = Guest { kernel: small.kernel.clone(), initrd };
    Ok(Files { dir, root: tree, guest, small })
}

/// Makes one program of all rows. Loops stay as they are written: rows with vectors say so themselves.
fn compile(to: &Path) -> Result<()> {
    let sources = root().join("xtask/src/bench/programs");
    let mut files: Vec<_> = fs::read_dir(&sources)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "c"));
    files.sort();
    let mut gcc = Command::new("gcc");
    gcc.args(["-O2", "-static", "-pthread", "-fno-tree-vectorize", "-Wall", "-Wextra", "-o"]).arg(to).args(files);
    run(&mut gcc)
}

/// An initramfs with busybox, which comes first, the tree, and our own process 1 in place of the small guest's.
fn pack(first: &Path, tree: &Path, to: &Path) -> io::Result<()> {
    let mut out = BufWriter::new(File::create(to)?);
    let mut first = File::open(first)?;
    let size = io::copy(&mut first, &mut out)?;
    // The kernel takes several archives in a row, each aligned.
    out.write_all(&vec![0; (size.next_multiple_of(512) - size) as usize])?;
    let mut archive = Initramfs::new(out);
    add(&mut archive, tree, "")?;
    archive.file("init", 0o755, include_bytes!("init.sh"))?;
    archive.finish()?.flush()
}

/// Adds what is in a directory of the tree.
fn add(archive: &mut Initramfs<impl Write>, tree: &Path, within: &str) -> io::Result<()> {
    let mut entries: Vec<_> = fs::read_dir(tree.join(within))?.collect::<io::Result<_>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name();
        let name = Path::new(within).join(&name).to_string_lossy().into_owned();
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            archive.directory(&name)?;
            add(archive, tree, &name)?;
        } else if metadata.is_symlink() {
            archive.symlink(&name, &fs::read_link(entry.path())?.to_string_lossy())?;
        } else {
            archive.file(&name, metadata.permissions().mode() & 0o777, &fs::read(entry.path())?)?;
        }
    }
    Ok(())
}
