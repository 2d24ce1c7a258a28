//! Debian's kernels with a userland that tests itself, kept under the target directory.

use anyhow::Result;
use clap::ValueEnum;
use purlin_debian::{
    Progress,
    cache::Cache,
    guest::{Guest, Recipe, obtain},
};

use crate::shell::target;

/// One of Debian's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kernel {
    /// linux-image-cloud-amd64
    Cloud,
    /// linux-image-amd64
    Amd64,
    /// linux-image-686-pae, from the i386 packages
    I686Pae,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Cloud, Self::Amd64, Self::I686Pae];

    /// A name for files and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cloud => "cloud-amd64",
            Self::Amd64 => "amd64",
            Self::I686Pae => "686-pae",
        }
    }

    /// The kernel and its initramfs, fetched at the first use.
    pub fn guest(self) -> Result<Guest> {
        let (architecture, package) = match self {
            Self::Cloud => ("amd64", "linux-image-cloud-amd64"),
            Self::Amd64 => ("amd64", "linux-image-amd64"),
            Self::I686Pae => ("i386", "linux-image-686-pae"),
        };
        let name = format!("test-{}", self.name());
        let recipe = Recipe {
            name: &name,
            architecture,
            kernels: &[package],
            modules: &[],
            init: include_str!("guest-init.sh"),
        };
        Ok(obtain(&cache(), &recipe, &Printed(self.name()))?)
    }
}

/// The guest of `purlin run shell`, fetched at the first use.
pub fn shell() -> Result<Guest> {
    Ok(obtain(&cache(), &Recipe::SHELL, &Printed(Recipe::SHELL.name))?)
}

/// The shell on a kernel that has the driver of VMGenID built in: the cloud kernel of Debian 12 has none.
pub fn with_generation_id() -> Result<Guest> {
    let recipe = Recipe { name: "test-shell-amd64", kernels: &["linux-image-amd64"], ..Recipe::SHELL };
    Ok(obtain(&cache(), &recipe, &Printed(recipe.name))?)
}

/// Where guests are kept.
pub fn cache() -> Cache {
    Cache::at(target().join("xtask/guests"))
}

/// Progress as plain lines, each with what it is about.
pub struct Printed(pub &'static str);

impl Progress for Printed {
    fn step(&self, what: &str) {
        println!("{}: {what}", self.0);
    }

    fn fraction(&self, _done: f64) {}

    fn note(&self, what: &str) {
        println!("{}: {what}", self.0);
    }
}
