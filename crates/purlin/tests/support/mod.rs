//! What the tests of the command line share.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod terminal;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// The program under test, with none of the user's settings.
pub fn purlin() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_purlin"));
    for variable in ["PURLIN_HOME", "XDG_CACHE_HOME", "PURLIN_LOG", "PURLIN_HOST", "PURLIN_TOKEN", "PURLIN_FINGERPRINT"]
    {
        command.env_remove(variable);
    }
    command
}

/// Standard error as lines.
pub fn stderr(output: &Output) -> Vec<String> {
    String::from_utf8_lossy(&output.stderr).lines().map(str::to_owned).collect()
}

/// A child that does not outlive a test that fails.
pub struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It has ended by itself where all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for an end that is due.
#[track_caller]
pub fn wait(child: &mut Child) -> ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "the run does not end");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Asserts that the run ended with `status` and one line on standard error that has all of `words` in it.
#[track_caller]
pub fn assert_one_line(output: &Output, status: i32, words: &[&str]) {
    let lines = stderr(output);
    assert_eq!(output.status.code(), Some(status), "{lines:#?}");
    let [line] = lines.as_slice() else { panic!("not one line: {lines:#?}") };
    assert!(line.starts_with("purlin: "), "{line}");
    for word in words {
        assert!(line.contains(word), "no '{word}' in: {line}");
    }
}

/// A kernel that can be booted by multiboot 1 and does what it is told on its serial port: it says `ready`, then
/// echoes every byte, but for the commands of [`command`].
pub fn kernel() -> Vec<u8> {
    const LOAD: u32 = 0x10_0000;
    const FLAGS: u32 = 1 << 16; // The addresses are in this header (Multiboot 0.6.96, 3.1.2).
    const MAGIC: u32 = 0x1bad_b002;
    let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS);
    let header = [MAGIC, FLAGS, checksum, LOAD, LOAD, 0, 0, LOAD + 32];
    let mut image: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    image.extend([0xbc, 0, 0, 0x20, 0]); // mov esp, 0x200000
    image.extend([0x66, 0xba, 0xfb, 0x03, 0xb0, 0x03, 0xee]); // mov dx, 0x3fb; mov al, 3; out dx, al: words of 8 bits
    image.extend([0xeb, 18]); // jmp over putc
    let putc = image.len(); // Writes bl once the transmitter is empty.
    image.extend([0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x20, 0x74, 0xfb]); // mov dx, 0x3fd; 1: in al, dx; test al, 0x20; jz 1b
    image.extend([0x66, 0xba, 0xf8, 0x03, 0x88, 0xd8, 0xee, 0xc3, 0x90]); // mov dx, 0x3f8; mov al, bl; out dx, al; ret
    let jump = |image: &mut Vec<u8>, opcode: u8, to: usize| {
        image.push(opcode);
        let distance = to as i32 - (image.len() as i32 + 4);
        image.extend(distance.to_le_bytes());
    };
    let call = |image: &mut Vec<u8>| jump(image, 0xe8, putc);
    for &byte in b"ready\n" {
        image.extend([0xb3, byte]); // mov bl, byte
        call(&mut image);
    }
    let next = image.len();
    image.extend([0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb]); // mov dx, 0x3fd; 1: in al, dx; test al, 1; jz 1b
    image.extend([0x66, 0xba, 0xf8, 0x03, 0xec, 0x88, 0xc3]); // mov dx, 0x3f8; in al, dx; mov bl, al
    for (byte, code) in [
        (command::EXIT, &[0xb0, 16, 0xe6, 0xf4][..]), // mov al, 16; out 0xf4, al
        (command::RESET, &[0x66, 0xba, 0xf9, 0x0c, 0xb0, 6, 0xee]), // mov dx, 0xcf9; mov al, 6; out dx, al
        (command::DEBUGCON, &[0xb0, b'D', 0xe6, 0xe9]), // mov al, 'D'; out 0xe9, al
        // push 0; push 0; lidt [esp]; ud2: with no IDT the processor shuts down.
        (command::TRIPLE_FAULT, &[0x6a, 0, 0x6a, 0, 0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x0b]),
    ] {
        image.extend([0x3c, byte, 0x75, code.len() as u8]); // cmp al, byte; jne over the code
        image.extend(code);
    }
    image.extend([0x3c, command::FLOOD, 0x75, 7]); // cmp al, FLOOD; jne over the loop
    call(&mut image);
    image.extend([0xeb, 0xf9]); // jmp back to the call
    call(&mut image);
    jump(&mut image, 0xe9, next);
    image
}

/// What [`kernel`] obeys.
pub mod command {
    /// Ends the run by debug-exit, with status 33.
    pub const EXIT: u8 = b'E';
    /// Resets the machine, by port 0xcf9.
    pub const RESET: u8 = b'R';
    /// Writes `D` to debugcon.
    pub const DEBUGCON: u8 = b'D';
    /// Writes for ever.
    pub const FLOOD: u8 = b'F';
    /// Ends in a triple fault.
    pub const TRIPLE_FAULT: u8 = b'T';
}

/// A home of its own, with an image `tiny` whose kernel is [`kernel`]; its daemon and machines end with it.
pub struct Home {
    dir: TempDir,
}

impl Home {
    /// Makes it.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (root, disk) = (dir.path().join("root"), dir.path().join("tiny.raw"));
        fs::create_dir_all(root.join("boot")).unwrap();
        fs::create_dir_all(root.join("etc/kernel")).unwrap();
        fs::write(root.join("boot/vmlinuz-1"), kernel()).unwrap();
        fs::write(root.join("etc/kernel/cmdline"), "quiet").unwrap();
        fs::write(root.join("etc/os-release"), "ID=tiny").unwrap();
        let mut command = Command::new("/sbin/mke2fs");
        command.args(["-q", "-F", "-t", "ext4", "-d"]).stdout(Stdio::null()).arg(&root).arg(&disk).arg("8M");
        assert!(command.status().expect("mke2fs (e2fsprogs)").success());
        let home = Self { dir };
        let import = home.purlin().args(["image", "import", "--name", "tiny"]).arg(&disk).output().unwrap();
        assert!(import.status.success(), "{:#?}", stderr(&import));
        home
    }

    /// The program, at home here.
    pub fn purlin(&self) -> Command {
        let mut command = purlin();
        command.env("PURLIN_HOME", self.path());
        command
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Runs a verb that succeeds; its standard output.
    #[track_caller]
    pub fn ok(&self, words: &str) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words}: {:#?}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a verb.
    pub fn run(&self, words: &str) -> Output {
        self.purlin().args(words.split_whitespace()).stdin(Stdio::null()).output().unwrap()
    }

    /// The processes that run the machines kept here, and the daemons, as (process, command line).
    pub fn processes(&self) -> Vec<(u32, String)> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let read = |file: &str| fs::read(entry.path().join(file)).unwrap_or_default();
            let environment = format!("PURLIN_HOME={}\0", self.path().display());
            if String::from_utf8_lossy(&read("environ")).contains(&environment) {
                found.push((pid, String::from_utf8_lossy(&read("cmdline")).replace('\0', " ")));
            }
        }
        found
    }

    /// The machines' processes.
    pub fn machines(&self) -> Vec<u32> {
        let machines = self.processes().into_iter().filter(|(_, command)| command.contains("__vmm"));
        machines.map(|(pid, _)| pid).collect()
    }

    /// The daemon's process.
    pub fn daemon(&self) -> Option<u32> {
        self.processes().into_iter().find(|(_, command)| command.contains("daemon --detached")).map(|(pid, _)| pid)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // Control groups of machines go with them.
        if !thread::panicking() {
            let listed = self.run("list --json").stdout;
            let listed: serde_json::Value = serde_json::from_slice(&listed).unwrap_or_default();
            for instance in listed.as_array().into_iter().flatten() {
                self.run(&format!("delete -f {}", instance["name"].as_str().unwrap_or_default()));
            }
        }
        for (pid, _) in self.processes() {
            kill(pid);
        }
    }
}

/// The process of the machine that `purlin run`, the process `command`, runs: the one in its sandbox.
#[track_caller]
pub fn machine_of(command: u32) -> u32 {
    let start = Instant::now();
    loop {
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let read = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
            let is_its = status_of(pid, "PPid").as_deref() == Some(&command.to_string());
            if is_its && read("cmdline").contains("__run") && status_of(pid, "Seccomp").as_deref() == Some("2") {
                return pid;
            }
        }
        assert!(start.elapsed() < Duration::from_secs(60), "there is no machine's process");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A field of /proc/PID/status; `None` if there is no such process.
pub fn status_of(pid: u32, field: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| Some(line.strip_prefix(field)?.strip_prefix(':')?.trim().to_owned()))
}

/// SIGKILL.
pub fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

/// An ELF header for 64-bit x86 without segments (System V gABI, chapter 4).
pub fn elf_header() -> Vec<u8> {
    let mut header = vec![0; 64];
    header[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    header[16] = 2; // ET_EXEC
    header[18] = 62; // EM_X86_64
    header[20] = 1; // EV_CURRENT
    header[52] = 64; // e_ehsize
    header
}

/// The start of a bzImage that says it is longer than it is (Linux, Documentation/arch/x86/boot.rst).
pub fn truncated_bzimage() -> Vec<u8> {
    let mut image = vec![0; 2048];
    image[0x1f1] = 1; // setup_sects
    image[0x1f4..0x1f8].copy_from_slice(&0x1_0000u32.to_le_bytes()); // syssize, in 16-byte units
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x200..0x206].copy_from_slice(b"\xeb\x66HdrS");
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x211] = 1; // LOADED_HIGH
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    image[0x230..0x234].copy_from_slice(&0x20_0000u32.to_le_bytes()); // kernel_alignment
    image[0x236] = 1; // XLF_KERNEL_64
    image[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes()); // cmdline_size
    image[0x260..0x264].copy_from_slice(&0x20_0000u32.to_le_bytes()); // init_size
    image
}

/// [`kernel`] in a file.
pub struct Kernel {
    dir: TempDir,
}

impl Kernel {
    /// Writes it.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("kernel"), kernel()).unwrap();
        Self { dir }
    }

    /// A file beside it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `purlin run` with this kernel and debug-exit.
    pub fn run(&self) -> Command {
        let mut command = purlin();
        command.args(["run", "--device", "debug-exit", "--kernel"]).arg(self.path("kernel"));
        command
    }
}
