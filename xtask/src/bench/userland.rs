//! Debian's own programs for the rows that run them, with the libraries that they need.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use purlin_debian::{Error, Progress, apt::PrivateApt, deb};

use crate::{
    guests::{Printed, cache},
    shell::{root, run},
};

/// The packages.
const PACKAGES: [&str; 4] = ["binutils", "cpp", "gzip", "perl-base"];

/// The entry of the cache that keeps them, and the tree that is made of it: a new one for another list.
pub const ENTRY: &str = "bench-userland-1";

/// The programs: their files in the packages end so, and where they are then found in `/programs`.
const PROGRAMS: [(&str, &str); 4] =
    [("/cc1", "cc1"), ("-linux-gnu-as", "as"), ("bin/gzip", "gzip"), ("usr/bin/perl", "perl")];

/// Where libraries are in the packages. Nothing else of them is kept.
const LIBRARIES: [&str; 4] = ["lib", "lib64", "usr/lib", "usr/lib64"];

/// Makes the tree of programs and libraries, if it is not there yet.
pub fn prepare(tree: &Path) -> Result<()> {
    if !tree.join("programs").exists() {
        let debs = cache().entry(ENTRY, &[], &Printed("bench"), |new, work| download(new, work, &Printed("bench")))?;
        let scratch = tree.with_extension("new");
        if scratch.exists() {
            fs::remove_dir_all(&scratch)?;
        }
        unpack(&debs, &scratch)?;
        fs::rename(&scratch, tree).with_context(|| format!("cannot make {}", tree.display()))?;
    }
    own_files(&tree.join("programs"))
}

fn download(new: &Path, work: &Path, progress: &dyn Progress) -> Result<(), Error> {
    let apt = PrivateApt::new(work, "amd64", progress)?;
    apt.update()?;
    for deb in apt.download_with_dependencies(&PACKAGES)? {
        let to = new.join(deb.file_name().unwrap_or_default());
        fs::rename(&deb, &to).map_err(Error::file("create", &to))?;
    }
    Ok(())
}

fn unpack(debs: &Path, tree: &Path) -> Result<()> {
    let all = tree.with_extension("all");
    for entry in fs::read_dir(debs)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            deb::unpack(&path, &all)?;
        }
    }
    fs::create_dir_all(tree.join("usr"))?;
    let programs = tree.join("programs");
    fs::create_dir(&programs)?;
    let files = files(&all)?;
    for (end, name) in PROGRAMS {
        let file = files.iter().find(|file| file.to_string_lossy().ends_with(end));
        fs::copy(file.with_context(|| format!("no package has {end}"))?, programs.join(name))?;
    }
    for directory in LIBRARIES.iter().filter(|directory| all.join(directory).exists()) {
        fs::rename(all.join(directory), tree.join(directory))?;
    }
    fs::remove_dir_all(tree.join("usr/lib/gcc"))?;
    // Where the packages rely on /lib64 being a link, as base-files has it.
    if !tree.join("lib64").exists() {
        std::os::unix::fs::symlink("usr/lib64", tree.join("lib64"))?;
    }
    Ok(fs::remove_dir_all(all)?)
}

/// All regular files below a directory.
fn files(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        match entry.file_type()? {
            kind if kind.is_dir() => found.extend(files(&entry.path())?),
            kind if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
    Ok(found)
}

/// What the programs work on.
fn own_files(programs: &Path) -> Result<()> {
    let sources = root().join("xtask/src/bench/tree");
    fs::copy(sources.join("words.pl"), programs.join("words.pl"))?;
    let mut preprocessor = Command::new("gcc");
    run(preprocessor.args(["-E", "-P", "-o"]).arg(programs.join("source.i")).arg(sources.join("source.c")))
}
