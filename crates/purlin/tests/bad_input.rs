//! Bad input gets one line that says what, why and what to do, and a status.

mod support;

use std::{fs, path::PathBuf, process::Output};

use support::{assert_one_line, purlin, stderr};
use tempfile::TempDir;

fn run(arguments: &str) -> Output {
    purlin().args(arguments.split_whitespace()).output().unwrap()
}

#[test]
fn wrong_usage() {
    for (arguments, words) in [
        ("rum", &["'rum'", "similar", "'run'"][..]),
        ("run", &["nothing to boot", "--kernel"]),
        ("run debain", &["'debain'", "debian"]),
        ("run shell --engine kvn", &["'kvn'", "auto, kvm, translator", "similar", "'kvm'"]),
        ("run shell --cpu x86-64-v5", &["'x86-64-v5'", "x86-64-v4"]),
        ("run shell --device debug-exti", &["'debug-exti'", "similar", "'debug-exit'"]),
        ("run shell --kernle x", &["--kernle", "similar", "'--kernel'"]),
        ("run shell --memory 512", &["'512'", "512M"]),
        ("run shell --memory lots", &["'lots'", "512M"]),
        ("run shell --cpus two", &["'two'", "--cpus"]),
        ("run shell --cpus -1", &["-1"]),
        ("run shell --serial tcp:1", &["'tcp:1'", "stdio, file:PATH, none"]),
        ("run shell --console tcp:1", &["'tcp:1'", "stdio, file:PATH, none"]),
        ("run shell --console stdio --serial stdio", &["--serial", "--console", "file:PATH or none"]),
        ("run shell --on-panic stop", &["'stop'", "continue, exit"]),
        ("run shell --engine kvm --profile p", &["--profile", "--engine translator", "leave --profile out"]),
        ("run shell --kernel x", &["--kernel"]),
        ("run --initrd x", &["--kernel"]),
        ("run shell --disk a,format=vmdk", &["'format=vmdk'", "raw and qcow2"]),
        ("run shell --disk a,readonyl", &["'readonyl'", "readonly"]),
        ("run shell --disk a,bps=fast", &["bytes a second"]),
        ("run shell --net bridge", &["'bridge'", "user, tap=NAME, none"]),
        ("run shell --balloon on", &["'on'", "size=SIZE"]),
        ("run shell --balloon size=12", &["'12'", "512M"]),
        ("run shell --on-io-error stop", &["'stop'", "report, pause"]),
        ("run shell --vsock a,cid=2", &["'cid=2'", "3 to 4294967294"]),
        ("run shell --vsock a,port=2", &["'port=2'", "cid=N"]),
        ("run shell --net user,queues=2", &["'queues=2'", "user takes", "loopback"]),
        ("run shell --net tap=tap0,queues=9", &["queues=", "1 to 8"]),
        ("run debian --publish 80:80 --net none", &["--publish", "--net user"]),
        ("run shell --hostname a", &["--hostname", "images"]),
        ("run shell --publish 80", &["'80'", "[HOST:]PORT:GUESTPORT"]),
        ("run --kernel x --user-data y", &["--user-data", "images"]),
    ] {
        let output = run(arguments);
        assert_one_line(&output, 2, words);
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn help_goes_to_standard_output() {
    for (arguments, words) in [
        ("--help", &["run", "doctor", "Examples:", "purlin run debian"][..]),
        (
            "run --help",
            &[
                "--kernel <FILE>",
                "--no-reboot",
                "--profile <FILE>",
                "perf-PID.map",
                "Examples:",
                "Ctrl-A x",
                "Exit status:",
            ],
        ),
        ("doctor --help", &["--json"]),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(0));
        let text = String::from_utf8(output.stdout).unwrap();
        words.iter().for_each(|word| assert!(text.contains(word), "no '{word}' in: {text}"));
        assert!(output.stderr.is_empty());
    }
}

/// A directory with one file in it.
fn file(bytes: &[u8]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, bytes).unwrap();
    (dir, path)
}

fn boot(kernel: &str, more: &[&str]) -> Output {
    purlin().args(["run", "--engine", "translator", "--kernel", kernel]).args(more).output().unwrap()
}

#[test]
fn no_such_kernel_or_initrd() {
    assert_one_line(&boot("/no/such/kernel", &[]), 1, &["/no/such/kernel", "No such file"]);
    let (_dir, kernel) = file(&support::kernel());
    assert_one_line(&boot(kernel.to_str().unwrap(), &["--initrd", "/no/such/initrd"]), 1, &["/no/such/initrd"]);
}

#[test]
fn a_kernel_that_is_none() {
    let mut arm = support::elf_header();
    arm[18..20].copy_from_slice(&183u16.to_le_bytes()); // EM_AARCH64
    for (bytes, words) in [
        (&b""[..], &["empty"][..]),
        (b"#!/bin/sh\necho not a kernel\n", &["kernel"]),
        (&arm, &["AArch64"]),
        (&support::truncated_bzimage(), &["truncated"]),
    ] {
        let (_dir, path) = file(bytes);
        assert_one_line(&boot(path.to_str().unwrap(), &[]), 1, words);
    }
    assert_one_line(&boot("/", &[]), 1, &["'/'", "regular file"]);
}

#[test]
fn impossible_machines() {
    let (_dir, kernel) = file(&support::kernel());
    let kernel = kernel.to_str().unwrap();
    for (more, words) in [
        (["--memory", "0"], &["memory", "at least"][..]),
        (["--memory", "1M"], &["memory", "at least"]),
        (["--memory", "1000T"], &["memory", "RAM and swap"]),
        (["--cpus", "0"], &["0"]),
        (["--cpus", "10000"], &["10000"]),
        (["--balloon", "size=1G"], &["balloon", "512 MiB", "smaller"]),
    ] {
        assert_one_line(&boot(kernel, &more), 2, words);
    }
    let (_dir, initrd) = file(&vec![0; 40 << 20]);
    let output = boot(kernel, &["--memory", "32M", "--initrd", initrd.to_str().unwrap()]);
    assert_one_line(&output, 1, &["initrd", "memory"]);
}

#[test]
fn a_serial_file_that_cannot_be() {
    let (_dir, kernel) = file(&support::kernel());
    let output = boot(kernel.to_str().unwrap(), &["--serial", "file:/no/such/directory/log"]);
    assert_one_line(&output, 1, &["/no/such/directory/log", "--serial"]);
    let output = boot(kernel.to_str().unwrap(), &["--console", "file:/no/such/directory/log"]);
    assert_one_line(&output, 1, &["/no/such/directory/log", "--console"]);
}

#[test]
fn a_socket_that_cannot_be() {
    let (dir, kernel) = file(&support::kernel());
    let kernel = kernel.to_str().unwrap();
    assert_one_line(&boot(kernel, &["--vsock", "/no/such/directory/x"]), 1, &["/no/such/directory/x", "No such file"]);
    assert_one_line(&boot(kernel, &["--vsock", kernel]), 1, &["no socket", "another path"]);
    let path = dir.path().join("used");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    assert_one_line(&boot(kernel, &["--vsock", path.to_str().unwrap()]), 1, &["in use", "another path"]);
}

#[test]
fn what_is_wrong_is_told_before_a_guest_is_fetched_or_built() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let publish = format!("{}:80", taken.local_addr().unwrap().port());
    for (arguments, status, words) in [
        (&["shell", "--disk", "/no/such/disk"][..], 1, &["/no/such/disk", "No such file"][..]),
        // (Where there is no TAP at all, or none for this user, that is what is told.)
        (&["shell", "--net", "tap=nosuch"], 1, &["TAP|interface|/dev/net/tun"]),
        (&["shell", "--net", "user", "--publish", &publish], 1, &["in use by another program"]),
        (&["shell", "--profile", "/no/such/directory/p"], 1, &["/no/such/directory/p", "No such file", "--profile"]),
        (&["shell", "--profile", "/dev/null"], 1, &["/dev/null", "not a regular file"]),
        (&["shell", "--vsock", "/no/such/directory/x"], 1, &["/no/such/directory/x", "No such file"]),
        (&["debian", "--user-data", "/no/such.yaml"], 1, &["cannot open '/no/such.yaml': No such file"]),
        (&["debian", "--disk-size", "1M"], 2, &["--disk-size 1M", "10240M"]),
    ] {
        let home = tempfile::tempdir().unwrap();
        let output = purlin().env("PURLIN_HOME", home.path()).arg("run").args(arguments).output().unwrap();
        let line = stderr(&output).join("\n");
        let words: Vec<_> =
            words.iter().map(|any| any.split('|').find(|word| line.contains(word)).unwrap_or(any)).collect();
        assert_one_line(&output, status, &words);
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0, "{arguments:?}");
    }
}
