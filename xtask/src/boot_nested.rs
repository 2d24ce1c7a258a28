//! The boot tests on true KVM, on machines that have none: this program inside emulated AMD-V.
//!
//! Everything is at the same path inside, so that the guests are found in the cache and the programs where they were
//! built.

use std::{
    env,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use crate::{
    boot::BootArgs,
    guests::Kernel,
    machine,
    nested::{self, Job},
    shell::target,
};

/// What QEMU reads when it boots a kernel: its data, and SeaBIOS.
const QEMU_DATA: [&str; 3] =
    ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/kvmvapic.bin", "/usr/share/qemu/linuxboot_dma.bin"];

/// Runs the boot tests inside.
pub fn run(args: &BootArgs) -> Result<()> {
    let same = |path: PathBuf| (path.clone(), path);
    let mut files = vec![same(machine::program()), (qemu()?, "/usr/bin/qemu-system-x86_64".into())];
    files.extend(QEMU_DATA.map(|path| same(path.into())));
    for kernel in args.kernels() {
        let guest = kernel.guest()?;
        let sums = guest.kernel.with_file_name("SHA256SUMS");
        files.extend([guest.kernel, guest.initrd, sums].map(same));
    }
    let job = |arguments| -> Result<Job> {
        Ok(Job {
            program: env::current_exe()?,
            args: arguments,
            // QEMU finds its data from where it is itself.
            env: vec![
                ("CARGO_TARGET_DIR".into(), target().to_string_lossy().into()),
                ("PATH".into(), "/usr/bin:/bin".into()),
            ],
            files: files.clone(),
            disks: Vec::new(),
            cpu: nested::CPUS[0].into(),
            cpus: 2,
            memory: 2048,
            timeout: Duration::from_secs(300),
        })
    };
    let jobs = jobs(args);
    let mut booted = 0;
    for arguments in &jobs {
        if nested::succeeds_inside(&job(arguments.clone())?)? {
            booted += 1;
        } else {
            println!(
                "NOT SHOWN: '{}': emulated AMD-V did not carry it in {} attempts",
                arguments.join(" "),
                nested::ATTEMPTS
            );
        }
    }
    println!("{booted} of {} came to their end inside emulated AMD-V", jobs.len());
    ensure!(booted > 0, "emulated AMD-V carries no boot here: nothing is known of KVM");
    Ok(())
}

/// The arguments of this program for each machine to boot inside, an outer machine for each; or for the times.
fn jobs(args: &BootArgs) -> Vec<Vec<String>> {
    let inside = ["boot", "--inside", "--engine", args.engine.name()];
    let job = |more: &[&str]| inside.iter().chain(more).map(|word| word.to_string()).collect();
    if let Some(rounds) = args.timing {
        // Each in an outer machine of its own: one in which a guest stood still is good for nothing any more.
        return vec![job(&["--timing", "1"]); rounds];
    }
    let repeat = args.repeat.to_string();
    let of = |kernel: Kernel, cpus: u32| {
        let kernel = kernel.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        job(&["--kernel", &kernel, "--cpus", &cpus.to_string(), "--repeat", &repeat])
    };
    args.kernels().iter().flat_map(|kernel| args.cpus().iter().map(|cpus| of(*kernel, *cpus))).collect()
}

fn qemu() -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|dir| dir.join("qemu-system-x86_64")).find(|file| Path::is_file(file));
    found.context("qemu-system-x86_64 is not installed (cargo xtask setup)")
}
