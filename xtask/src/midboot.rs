//! Debian's boot, saved and continued in new machines at random moments: `crates/vmm/tests/midboot`; and copied:
//! `crates/vmm/tests/clone.rs`.

use std::process::Command;

use anyhow::Result;
use clap::Args;

use crate::{
    guests,
    shell::{self, cargo},
};

/// When to move it.
#[derive(Args, Default)]
pub struct MidbootArgs {
    /// How many moments there are to be; 100 if not given
    #[arg(long)]
    moments: Option<u32>,
    /// Repeat the moments of a run that has printed this
    #[arg(long)]
    seed: Option<u64>,
}

/// A test of the VMM's, optimised as users have it. With the program beside it, whose dependencies are built already.
fn test_of_vmm(name: &str) -> Command {
    let packages = ["--package", "purlin", "--package", "purlin-vmm"];
    let mut test = cargo(&["test", "--release", "--locked", "--test", name]);
    test.args(packages).args(["--", "--ignored", "--nocapture"]);
    test
}

/// Runs the tests.
pub fn run(args: &MidbootArgs) -> Result<()> {
    let guest = guests::shell()?;
    let mut test = test_of_vmm("midboot");
    test.env("PURLIN_TEST_KERNEL", guest.kernel).env("PURLIN_TEST_INITRD", guest.initrd);
    for (variable, value) in [("PURLIN_TEST_MOMENTS", args.moments.map(u64::from)), ("PURLIN_TEST_SEED", args.seed)] {
        if let Some(value) = value {
            test.env(variable, value.to_string());
        }
    }
    shell::run(&mut test)?;

    let guest = guests::with_generation_id()?;
    let mut test = test_of_vmm("clone");
    test.env("PURLIN_TEST_KERNEL", guest.kernel).env("PURLIN_TEST_INITRD", guest.initrd);
    shell::run(&mut test)
}
