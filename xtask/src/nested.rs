//! True KVM on machines that have none: QEMU emulates AMD-V, Debian's kernel inside it offers /dev/kvm.
//!
//! [`run_inside`] boots that kernel with an initramfs of BusyBox, the KVM modules and one program, runs the program
//! as root and hands back its exit status. `cargo xtask nested` runs the KVM engine's tests so, or whatever program it
//! is given: `cargo xtask nested --file target/bzImage:/bzImage target/release/purlin run --kernel /bzImage`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, BufRead, BufReader, BufWriter, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use purlin_debian::initramfs::Initramfs;

use crate::{
    outer,
    shell::{cargo, target},
};

/// Run a program, or the KVM engine's tests, on KVM inside an emulated AMD-V
#[derive(clap::Args, Debug)]
pub struct NestedArgs {
    /// Processor that QEMU emulates; may be given several times [default: `max,+svm,+npt` and EPYC]
    #[arg(long, value_name = "MODEL")]
    cpu: Vec<String>,
    /// Processors of the outer guest
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Memory of the outer guest in MiB
    #[arg(long, default_value_t = 1024)]
    memory: u32,
    /// Seconds after which the outer guest is killed
    #[arg(long, default_value_t = 120)]
    timeout: u64,
    /// A file of this machine to put into the outer guest
    #[arg(long, value_name = "HOST:GUEST")]
    file: Vec<String>,
    /// Set an environment variable for the program
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// The program, a path on this machine, and its arguments [default: the KVM engine's tests]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    program: Vec<String>,
}

/// What to run in the outer guest.
#[derive(Clone, Debug)]
pub struct Job {
    /// The program, a path on this machine; its shared libraries are brought along.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its environment, beside PATH and HOME.
    pub env: Vec<(String, String)>,
    /// More files: path on this machine, path in the guest.
    pub files: Vec<(PathBuf, PathBuf)>,
    /// Raw images that are its disks: /dev/vda and so on.
    pub disks: Vec<PathBuf>,
    /// The processor that QEMU emulates, with AMD-V.
    pub cpu: String,
    /// Processors of the outer guest.
    pub cpus: u32,
    /// Memory of the outer guest in MiB.
    pub memory: u32,
    /// When to give up.
    pub timeout: Duration,
}

/// Processors with AMD-V and nested paging: all that QEMU has, and a real one's subset.
pub const CPUS: [&str; 2] = ["max,+svm,+npt", "EPYC"];

/// `cargo xtask nested`.
pub fn run(args: &NestedArgs) -> Result<()> {
    let cpus: Vec<String> = if args.cpu.is_empty() { CPUS.map(String::from).to_vec() } else { args.cpu.clone() };
    for cpu in cpus {
        let job = job(args, cpu)?;
        println!("== {} on KVM inside QEMU's {}", job.program.display(), job.cpu);
        if args.program.is_empty() {
            ensure!(succeeds_inside(&job)?, "emulated AMD-V did not carry it in {ATTEMPTS} attempts");
            continue;
        }
        let status = run_inside(&job)?;
        ensure!(status == 0, "{} failed with status {status} on QEMU's {}", job.program.display(), job.cpu);
    }
    Ok(())
}

/// How often a job is tried. Emulated AMD-V is a test bed with faults of its own, under QEMU as under Purlin: once in some
/// fifteen boots the guest stands still (its vCPU runs, and nothing of what it does reaches the monitor), sometimes the
/// outer machine with it, and once QEMU's guest was reset in mid-boot. Another try tells whether the guest boots. Where
/// none does, nothing is known of the guest: that is said aloud, and is no failure of it.
pub const ATTEMPTS: u32 = 4;

/// So many attempts in which Purlin's guest ended wrongly, while QEMU's did not, are no accident of the test bed's.
const FAILURES: u32 = 3;

/// Whether a job came to its end, as it should.
pub fn succeeds_inside(job: &Job) -> Result<bool> {
    let mut failures = 0;
    for attempt in 1..=ATTEMPTS {
        match run_inside(job) {
            Ok(0) => return Ok(true),
            Ok(status) if status == i32::from(crate::NOT_ENDED) => {
                println!("attempt {attempt} of {ATTEMPTS}: emulated AMD-V did not carry it");
            }
            Ok(status) => {
                failures += 1;
                println!("attempt {attempt} of {ATTEMPTS}: FAILED with status {status}");
                ensure!(failures < FAILURES, "it failed on KVM {failures} times, lastly with status {status}");
            }
            Err(error) => println!("attempt {attempt} of {ATTEMPTS}: {error:#}"),
        }
    }
    Ok(false)
}

fn job(args: &NestedArgs, cpu: String) -> Result<Job> {
    let split = |text: &String, separator: char| {
        let (left, right) = text.split_once(separator).with_context(|| format!("'{text}' has no '{separator}'"))?;
        anyhow::Ok((left.to_owned(), right.to_owned()))
    };
    let files = args.file.iter().map(|f| split(f, ':').map(|(host, guest)| (host.into(), guest.into())));
    let env = args.env.iter().map(|e| split(e, '='));
    let mut job = Job {
        program: PathBuf::new(),
        args: Vec::new(),
        env: env.collect::<Result<_>>()?,
        files: files.collect::<Result<_>>()?,
        disks: Vec::new(),
        cpu,
        cpus: args.cpus,
        memory: args.memory,
        timeout: Duration::from_secs(args.timeout),
    };
    if let [program, rest @ ..] = args.program.as_slice() {
        job.program = program.into();
        job.args = rest.to_vec();
    } else {
        job.program = engine_tests()?;
        job.env.push(("PURLIN_TEST_KVM_PROBE".into(), "usable".into()));
    }
    Ok(job)
}

/// Builds the tests of the KVM engine that run guests; where the binary is.
fn engine_tests() -> Result<PathBuf> {
    let output = cargo(&["test", "--package", "purlin-engine-kvm", "--test", "kvm", "--no-run", "--locked"])
        .arg("--message-format=json")
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(output.status.success(), "the KVM engine's tests do not build");
    let messages = String::from_utf8(output.stdout).context("cargo's messages")?;
    let mut executables = messages.lines().filter_map(|line| line.split_once(r#""executable":""#)?.1.split('"').next());
    executables.next_back().map(PathBuf::from).context("cargo named no test binary")
}

/// Runs `job` in the outer guest, whose console goes to stdout. Returns the program's exit status.
pub fn run_inside(job: &Job) -> Result<i32> {
    let outer = outer::obtain()?;
    let dir = target().join("xtask/nested");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let initrd = dir.join(format!("initrd-{}", std::process::id()));
    let result = write_initrd(job, &outer.initrd, &initrd)
        .with_context(|| format!("cannot write {}", initrd.display()))
        .and_then(|()| boot(job, &outer.kernel, &initrd));
    fs::remove_file(&initrd).ok();
    result
}

/// What the guest says when the program has ended.
const MARKER: &str = "purlin-nested: exit ";

/// What `purlin doctor` advises to change.
const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// The first process of the outer guest.
fn init_script(job: &Job) -> String {
    let quote = |text: &str| format!("'{}'", text.replace('\'', r"'\''"));
    let exports: String = job.env.iter().map(|(name, value)| format!("export {name}={}\n", quote(value))).collect();
    let arguments: String = job.args.iter().map(|arg| format!(" {}", quote(arg))).collect();
    format!(
        "#!/bin/sh\n\
         /bin/busybox --install -s /bin\n\
         export PATH=/bin HOME=/tmp\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sysfs /sys\n\
         mount -t devtmpfs dev /dev\n\
         mkdir -p /dev/shm && mount -t tmpfs tmpfs /dev/shm\n\
         ulimit -c 0\n\
         echo advise >{HUGE_PAGES}\n\
         for module in /modules/*; do insmod \"$module\"; done\n\
         {exports}\
         /program{arguments} </dev/null\n\
         echo \"{MARKER}$?\"\n\
         poweroff -f\n"
    )
}

/// The outer guest's system, `base`, and behind it the job: the kernel unpacks several archives, one over the other
/// (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
fn write_initrd(job: &Job, base: &Path, to: &Path) -> Result<()> {
    let mut out = BufWriter::new(File::create(to)?);
    io::copy(&mut File::open(base)?, &mut out)?;
    let mut archive = Initramfs::new(out);
    let files = files(job)?;
    let directories: BTreeSet<&Path> = files.keys().flat_map(|path| path.ancestors().skip(1)).collect();
    for directory in directories.into_iter().filter(|path| !path.as_os_str().is_empty()) {
        archive.directory(text(directory)?)?;
    }
    for (guest, host) in &files {
        let data = fs::read(host).with_context(|| format!("cannot read {}", host.display()))?;
        archive.file(text(guest)?, 0o755, &data)?;
    }
    archive.file("init", 0o755, init_script(job).as_bytes())?;
    archive.finish()?.flush()?;
    Ok(())
}

/// All files of a job, with the shared libraries that its programs need: path in the guest, without a slash in front,
/// and path on this machine.
fn files(job: &Job) -> Result<BTreeMap<PathBuf, PathBuf>> {
    let program = (job.program.clone(), PathBuf::from("program"));
    let mut files = BTreeMap::new();
    for (host, guest) in job.files.iter().chain([&program]) {
        let libraries = shared_libraries(host)?;
        files.extend(libraries.into_iter().map(|library| (below_root(&library), library)));
        files.insert(below_root(guest), host.clone());
    }
    Ok(files)
}

fn below_root(path: &Path) -> PathBuf {
    path.strip_prefix("/").unwrap_or(path).to_owned()
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

/// What the dynamic loader maps for a program, the loader among it: absolute paths. Nothing for other files.
fn shared_libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).env("LC_ALL", "C").output().context("cannot run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)` or `/lib64/ld-linux-x86-64.so.2 (0x…)`.
    Ok(text
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect())
}

/// Boots the outer guest and waits for what the program came to.
fn boot(job: &Job, kernel: &Path, initrd: &Path) -> Result<i32> {
    let disk = |path: &PathBuf| ["-drive".into(), format!("if=virtio,format=raw,file={}", path.display())];
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(job.disks.iter().flat_map(disk))
        .args(["-accel", "tcg,thread=multi", "-cpu", &job.cpu, "-smp", &job.cpus.to_string()])
        .args(["-m", &job.memory.to_string(), "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-serial", "stdio", "-append", "console=ttyS0 quiet panic=-1 mitigations=off"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run qemu-system-x86_64 (Debian package qemu-system-x86)")?;
    let result = follow(&mut qemu, job.timeout);
    // Whatever came of it, it is over.
    qemu.kill().ok();
    qemu.wait().ok();
    result
}

/// What the outer kernel says of a processor of its own that gets nowhere.
const STALLED: [&str; 3] = ["soft lockup", "self-detected stall", "detected stalls on CPUs"];

/// Shows the console until the marker comes.
fn follow(qemu: &mut Child, timeout: Duration) -> Result<i32> {
    let console = BufReader::new(qemu.stdout.take().expect("piped"));
    let (send, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in console.split(b'\n').map_while(|line| line.ok()) {
            if send.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                break;
            }
        }
    });
    let deadline = Instant::now() + timeout;
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                if let Some((before, status)) = line.split_once(MARKER) {
                    show(before);
                    return status.trim().parse().with_context(|| format!("the guest says '{line}'"));
                }
                show(&line);
                ensure!(!STALLED.iter().any(|word| line.contains(word)), "the outer machine itself stands still");
            }
            Err(mpsc::RecvTimeoutError::Timeout) => bail!("the guest was not done after {timeout:?}"),
            Err(mpsc::RecvTimeoutError::Disconnected) => bail!("the guest ended before the program did"),
        }
    }
}

fn show(line: &str) {
    // A closed stdout is no reason to fail.
    if !line.is_empty() {
        writeln!(std::io::stdout(), "{line}").ok();
    }
}
