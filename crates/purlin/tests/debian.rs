//! `purlin run shell`, as far as the files: with the host's apt, on a package archive made here.
//!
//! The archive's kernel is a text file, so each run that gets that far ends with the complaint about it.

mod support;

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};
use support::{assert_one_line, purlin, stderr};
use tempfile::TempDir;

/// A package archive, and a home for the cache.
struct Host {
    dir: TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(host.path("archive")).unwrap();
        fs::create_dir(host.path("bin")).unwrap();
        let meta = host.package("linux-image-cloud-amd64", "Depends: linux-image-1-test (= 1)\n", &[]);
        let kernel = host.package("linux-image-1-test", "", &[("boot/vmlinuz-1-test", "a kernel in words")]);
        let busybox = host.package("busybox-static", "", &[("bin/busybox", "a busybox in words")]);
        fs::write(host.path("archive/Packages"), [meta, kernel, busybox].join("\n")).unwrap();
        host.use_source(&format!("deb [trusted=yes] file:{} ./", host.path("archive").display()));
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a package in the archive and gives its paragraph of the index.
    fn package(&self, name: &str, fields: &str, files: &[(&str, &str)]) -> String {
        let tree = self.path(name);
        let control = format!(
            "Package: {name}\nVersion: 1\nArchitecture: amd64\nMaintainer: nobody <nobody@example.org>\n{fields}\
             Description: for a test\n"
        );
        for (path, text) in files.iter().chain([&("DEBIAN/control", control.as_str())]) {
            fs::create_dir_all(tree.join(path).parent().unwrap()).unwrap();
            fs::write(tree.join(path), text).unwrap();
        }
        let deb = self.path("archive").join(format!("{name}_1_amd64.deb"));
        let built = Command::new("dpkg-deb").args(["--build", "--root-owner-group"]).arg(&tree).arg(&deb).output();
        assert!(built.unwrap().status.success());
        let sum = Command::new("sha256sum").arg(&deb).output().unwrap().stdout;
        let sum = String::from_utf8(sum).unwrap();
        let (sum, size) = (sum.split(' ').next().unwrap(), fs::metadata(&deb).unwrap().len());
        format!("{control}Filename: ./{name}_1_amd64.deb\nSize: {size}\nSHA256: {sum}\n")
    }

    /// Makes `line` the host's only package source.
    fn use_source(&self, line: &str) {
        fs::write(self.path("sources.list"), format!("{line}\n")).unwrap();
        let config = format!(
            "Dir::Etc::sourcelist \"{}\";\nDir::Etc::sourceparts \"/dev/null\";\nAcquire::http::Proxy \"DIRECT\";\n",
            self.path("sources.list").display()
        );
        fs::write(self.path("apt.conf"), config).unwrap();
    }

    /// Puts a script before the host's apt-get.
    fn wrap_apt_get(&self, script: &str) {
        let path = self.path("bin/apt-get");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn run(&self) -> Command {
        let mut command = purlin();
        let path = std::env::var("PATH").unwrap();
        command.args(["run", "shell"]).stdin(Stdio::null());
        command.env("PURLIN_HOME", self.path("home")).env("APT_CONFIG", self.path("apt.conf"));
        command.env("PATH", format!("{}:{path}", self.path("bin").display()));
        command
    }

    fn output(&self) -> Output {
        self.run().output().unwrap()
    }

    /// What is in the cache, locks apart.
    fn cached(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.path("home/cache")) else { return vec![] };
        entries.map(|e| e.unwrap().path()).filter(|p| p.extension().is_none_or(|e| e != "lock")).collect()
    }
}

/// Asserts that the guest was obtained: the run came as far as looking at the kernel.
#[track_caller]
fn assert_obtained(host: &Host, output: &Output) {
    let lines = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{lines:#?}");
    assert!(lines.last().unwrap().contains("vmlinuz"), "{lines:#?}");
    let cached = host.cached();
    let [entry] = cached.as_slice() else { panic!("{cached:?}") };
    assert_eq!(fs::read_to_string(entry.join("vmlinuz")).unwrap(), "a kernel in words");
    let initrd = fs::read(entry.join("initrd")).unwrap();
    let has = |text: &str| initrd.windows(text.len()).any(|w| w == text.as_bytes());
    assert!(has("a busybox in words") && has("setsid -c sh") && has("TRAILER!!!"));
}

#[test]
fn is_fetched_once() {
    let host = Host::new();
    let first = host.output();
    assert_obtained(&host, &first);
    assert!(stderr(&first).iter().any(|line| line.contains("fetching linux-image-1-test, busybox-static")));
    // From here on there is no network.
    host.wrap_apt_get("exit 100");
    let second = host.output();
    assert_obtained(&host, &second);
    assert_eq!(stderr(&second).len(), 1, "only the complaint about the kernel: {:#?}", stderr(&second));
}

#[test]
fn damage_is_fetched_anew() {
    let host = Host::new();
    host.output();
    let kernel = host.cached()[0].join("vmlinuz");
    fs::write(&kernel, "a kern").unwrap();
    let output = host.output();
    assert!(stderr(&output)[0].contains("is damaged: obtaining it anew"), "{:#?}", stderr(&output));
    assert_obtained(&host, &output);
}

#[test]
fn two_first_runs_at_once() {
    let host = Host::new();
    host.wrap_apt_get("sleep 1; echo \"$@\" >>\"$(dirname \"$0\")/calls\"; exec /usr/bin/apt-get \"$@\"");
    let both: Vec<_> = (0..2).map(|_| host.run().stderr(Stdio::piped()).spawn().unwrap()).collect();
    let outputs: Vec<_> = both.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    outputs.iter().for_each(|output| assert_obtained(&host, output));
    let waited = |output: &&Output| stderr(output).iter().any(|line| line.contains("another purlin"));
    assert_eq!(outputs.iter().filter(waited).count(), 1);
    let calls = fs::read_to_string(host.path("bin/calls")).unwrap();
    assert_eq!(calls.lines().filter(|line| line.contains(" download ")).count(), 1, "{calls}");
}

#[test]
fn no_network() {
    let host = Host::new();
    // Port 1 of the loopback interface refuses.
    host.use_source("deb [trusted=yes] http://127.0.0.1:1/debian bookworm main");
    let output = host.output();
    let lines = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{lines:#?}");
    let last = lines.last().unwrap();
    assert!(last.contains("cannot obtain") && last.contains("check the network"), "{last}");
    assert_eq!(lines.len(), 2, "the step and the error: {lines:#?}");
    assert_eq!(host.cached(), [] as [PathBuf; 0]);
}

#[test]
fn no_such_package() {
    let host = Host::new();
    fs::write(host.path("archive/Packages"), "").unwrap();
    let output = host.output();
    assert!(stderr(&output).last().unwrap().contains("none of the host's package sources offers"));
    assert_eq!((output.status.code(), host.cached().len()), (Some(1), 0));
}

#[test]
fn a_corrupt_download_is_refused() {
    let host = Host::new();
    let deb = host.path("archive/linux-image-1-test_1_amd64.deb");
    let mut bytes = fs::read(&deb).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&deb, bytes).unwrap();
    let output = host.output();
    let lines = stderr(&output);
    assert!(lines.last().unwrap().contains("cannot obtain linux-image-1-test"), "{lines:#?}");
    assert_eq!((output.status.code(), host.cached().len()), (Some(1), 0));
}

#[test]
fn an_interrupted_download_leaves_nothing() {
    for (signal, status) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129)] {
        let host = Host::new();
        // As apt does: a line twice a second, while the network is silent.
        host.wrap_apt_get("while :; do echo dlstatus:1:0.0000:waiting; sleep 0.1; done");
        let mut child = host.run().stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        assert!(lines.next().unwrap().contains("fetching package lists"));
        kill_process(Pid::from_child(&child), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(status));
        assert!(lines.next().unwrap().contains("ended by SIG"));
        assert_eq!((lines.next(), host.cached()), (None, vec![]));
    }
}

#[test]
fn a_full_disk_leaves_nothing() {
    let host = Host::new();
    fs::create_dir(host.path("home")).unwrap();
    // A mount namespace of its own, with a cache of three pages.
    let script = "mount -t tmpfs -o size=12k full \"$PURLIN_HOME\" && \"$0\" run shell; status=$?; \
                  find \"$PURLIN_HOME\" -type f ! -name '*.lock'; exit $status";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]).arg(env!("CARGO_BIN_EXE_purlin"));
    command.env("PURLIN_HOME", host.path("home")).env("APT_CONFIG", host.path("apt.conf")).stdin(Stdio::null());
    let output = command.output().unwrap();
    let lines = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{lines:#?}");
    assert!(lines.last().unwrap().contains("no space left in"), "{lines:#?}");
    assert!(lines.last().unwrap().contains("PURLIN_HOME"), "{lines:#?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "files left behind");
}

#[test]
fn a_host_without_apt() {
    let host = Host::new();
    let output = host.run().env("PATH", host.path("bin")).output().unwrap();
    let lines = stderr(&output);
    assert!(lines.last().unwrap().contains("'apt-get' is not installed"), "{lines:#?}");
    assert!(lines.last().unwrap().contains("--kernel"), "{lines:#?}");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn no_place_for_the_cache() {
    let nowhere = |home: &Path| purlin().args(["run", "shell"]).env("PURLIN_HOME", home).output().unwrap();
    assert_one_line(&nowhere(Path::new("/proc/nowhere")), 1, &["cannot create /proc/nowhere/cache", "PURLIN_HOME"]);
    let output = purlin().args(["run", "shell"]).env_remove("HOME").output().unwrap();
    assert_one_line(&output, 1, &["no place for Purlin's files", "PURLIN_HOME"]);
}
