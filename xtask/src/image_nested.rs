//! The image on true KVM, on machines that have none: inside emulated AMD-V.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Result, ensure};

use crate::{
    debian::prepare,
    image::check_file_system,
    machine,
    nested::{self, Job},
    shell,
};

/// Tells how the system is once it is up, and powers off if all is well; else it ends the run with another status. What
/// cloud-init runs is itself a part of coming up, and cannot wait for that.
const USER_DATA: &str = "#cloud-config
write_files:
- path: /root/check
  content: |
    state=$(systemctl is-system-running --wait)
    failed=$(systemctl --failed --no-legend --plain)
    echo \"purlin-test: $state, $(nproc) processors, $(systemd-detect-virt), failed: '$failed'\" > /dev/ttyS0
    if [ \"$state\" = running ] && [ -z \"$failed\" ]; then systemctl poweroff; exit; fi
    printf '\\001' | dd of=/dev/port bs=1 seek=$((0xf4)) status=none
runcmd:
- [systemd-run, --no-block, sh, /root/check]
";

/// Boots it to the end.
pub fn run(image: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let user_data = dir.path().join("user-data");
    fs::write(&user_data, USER_DATA)?;
    let prepared = prepare(image, Some(&user_data))?;
    // The outer guest has the disks as its own: what is in its initramfs is in its memory.
    let (disk, seed) = (dir.path().join("disk.raw"), dir.path().join("seed.raw"));
    shell::run(Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(&prepared.disk).arg(&disk))?;
    fs::copy(&prepared.seed, &seed)?;
    let mut arguments: Vec<String> = ["run", "--engine", "kvm", "--memory", "1G", "--cpus", "2", "--net", "user"]
        .iter()
        .chain(&["--device", "rng", "--device", "debug-exit", "--no-reboot", "--cmdline", &prepared.cmdline])
        .chain(&["--disk", "/dev/vda,format=raw", "--disk", "/dev/vdb,format=raw,readonly", "--kernel", "/vmlinuz"])
        .map(|word| word.to_string())
        .collect();
    let mut files = vec![(prepared.kernel.clone(), "/vmlinuz".into())];
    for (number, initrd) in prepared.initrds.iter().enumerate() {
        let inside = format!("/initrd-{number}");
        arguments.extend(["--initrd".into(), inside.clone()]);
        files.push((initrd.clone(), inside.into()));
    }
    let job = Job {
        program: machine::program(),
        args: arguments,
        env: Vec::new(),
        files,
        disks: vec![disk.clone(), seed],
        cpu: nested::CPUS[0].into(),
        cpus: 2,
        memory: 3072,
        timeout: Duration::from_secs(1800),
    };
    let status = nested::run_inside(&job)?;
    ensure!(status == 0, "the image under KVM ended with status {status}: its console is above");
    check(&disk)
}

fn check(disk: &Path) -> Result<()> {
    check_file_system(disk)?;
    println!("the image runs under KVM, and leaves its file system clean");
    Ok(())
}
