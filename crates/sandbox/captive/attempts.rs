//! What is tried.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Read, Write},
    net::TcpStream,
    os::{
        fd::{AsRawFd, FromRawFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    path::Path,
    ptr,
};

use crate::World;

type Attempt = fn(&World) -> io::Result<()>;

/// By name.
pub const ALL: &[(&str, Attempt)] = &[
    // What must work.
    ("own-files", own_files),
    ("descriptor", descriptor),
    ("device", device),
    ("own-socket", own_socket),
    ("threads", threads),
    ("ring", ring),
    ("emitted-code", emitted_code),
    ("guest-memory", guest_memory),
    ("probe", probe),
    // What must not.
    ("passwd", |_| read(Path::new("/etc/passwd"))),
    ("proc", |_| read(Path::new("/proc/self/status"))),
    ("home", |world| read(&world.directory.join("home/secret"))),
    ("list-root", |_| fs::read_dir("/usr").map(drop)),
    ("write-readonly", |world| write(&world.directory.join("readonly"))),
    ("write-root", |_| write(Path::new("/mark"))),
    ("unix", |world| UnixStream::connect(world.directory.join("host.socket")).map(drop)),
    ("abstract", abstract_socket),
    ("tcp", |world| TcpStream::connect(("127.0.0.1", world.port)).map(drop)),
    ("kill", |world| call(libc::SYS_kill, [world.sibling.into(), 0, 0])),
    ("ptrace", ptrace),
    ("read-memory", read_memory),
    ("mount", mount),
    ("unshare", |_| call(libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0])),
    ("setuid", |_| call(libc::SYS_setresuid, [0, 0, 0])),
    ("bpf", bpf),
    ("handle", open_by_handle),
    // KEYCTL_GET_KEYRING_ID of the session's keyring.
    ("keyctl", |_| call(libc::SYS_keyctl, [0, -3, 1])),
    // READ_IMPLIES_EXEC.
    ("personality", |_| call(libc::SYS_personality, [0x0040_0000, 0, 0])),
    ("execve", execve),
    ("fork", fork),
    ("new-code", new_code),
    ("code-after-seal", code_after_seal),
    ("open", |world| read(&world.directory.join("readonly"))),
    ("new-socket", |_| UnixStream::pair().map(drop)),
    ("new-ring", |_| Ring::new(0).map(drop)),
    ("new-thread", |_| std::thread::Builder::new().spawn(|| ()).map(drop)),
    ("symlink", |world| std::os::unix::fs::symlink("/etc/passwd", world.directory.join("instance/link"))),
    ("raise-limit", raise_limit),
    // The terminal is standard input.
    ("type", |_| terminal(libc::TIOCSTI, c"x".as_ptr())),
    ("set-modes", set_modes),
    ("take-terminal", |_| terminal(libc::TIOCSCTTY, ptr::null::<u8>())),
    // For faults of user code only.
    ("userfaultfd", |_| call(libc::SYS_userfaultfd, [1, 0, 0])),
    ("perf", perf),
];

fn check(result: i64) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A system call that names no memory.
fn call(number: libc::c_long, [a, b, c]: [i64; 3]) -> io::Result<()> {
    // SAFETY: as just said.
    check(unsafe { libc::syscall(number, a, b, c) })
}

fn read(path: &Path) -> io::Result<()> {
    fs::read(path).map(drop)
}

fn write(path: &Path) -> io::Result<()> {
    File::options().append(true).create(true).open(path)?.write_all(b"x")
}

fn own_files(world: &World) -> io::Result<()> {
    assert_eq!(fs::read_to_string(world.directory.join("readonly"))?, "read me");
    let own = world.directory.join("instance");
    fs::write(own.join("new"), "written")?;
    fs::create_dir(own.join("directory"))?;
    fs::rename(own.join("new"), own.join("directory/renamed"))?;
    assert_eq!(fs::read_to_string(own.join("directory/renamed"))?, "written");
    let file = File::options().write(true).open(own.join("directory/renamed"))?;
    file.set_len(3)?;
    file.sync_all()?;
    fs::remove_file(own.join("directory/renamed"))?;
    fs::remove_dir(own.join("directory"))?;
    let names: Vec<_> = fs::read_dir(&own)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?;
    assert!(names.iter().any(|name| name == "disk"), "{names:?}");
    File::options().write(true).open(own.join("disk"))?.write_all(b"block")
}

/// Standard input is one end of a socket pair.
fn descriptor(_: &World) -> io::Result<()> {
    // SAFETY: it is open, and nobody else uses it.
    let mut socket = unsafe { UnixStream::from_raw_fd(0) };
    let mut question = [0; 4];
    socket.read_exact(&mut question)?;
    socket.write_all(if &question == b"ping" { b"pong" } else { b"what" })
}

fn device(_: &World) -> io::Result<()> {
    File::open("/dev/urandom")?.read_exact(&mut [0; 16])
}

fn own_socket(world: &World) -> io::Result<()> {
    let path = world.directory.join("instance/socket");
    let listener = UnixListener::bind(&path)?;
    UnixStream::connect(&path)?.write_all(b"x")?;
    listener.accept()?.0.read_exact(&mut [0])?;
    fs::remove_file(path)
}

/// A thread with a role starts one that has another role.
fn threads(_: &World) -> io::Result<()> {
    let vcpu = purlin_sandbox::spawn("vcpu0", || {
        purlin_sandbox::thread(purlin_sandbox::Role::Vcpu).unwrap();
        let disk = purlin_sandbox::spawn("disk0", || {
            let ring = Ring::new(0).unwrap();
            purlin_sandbox::thread(purlin_sandbox::Role::Disk).unwrap();
            assert_eq!(ring.enter(), 0);
        });
        disk.unwrap().join().unwrap();
    });
    vcpu?.join().map_err(|_| io::Error::other("a thread panicked"))
}

fn ring(_: &World) -> io::Result<()> {
    assert_eq!(Ring::new(0)?.enter(), 0);
    Ok(())
}

/// As the translator makes it: shared memory, mapped twice.
fn emitted_code(_: &World) -> io::Result<()> {
    let (write, execute) = twice_mapped()?;
    // SAFETY: both are mapped, and the code is a function that returns.
    unsafe {
        let ret: &[u8] = if cfg!(target_arch = "x86_64") { &[0xc3] } else { &[0xc0, 0x03, 0x5f, 0xd6] };
        ptr::copy_nonoverlapping(ret.as_ptr(), write, ret.len());
        std::mem::transmute::<*mut u8, extern "C" fn()>(execute)();
    }
    Ok(())
}

fn twice_mapped() -> io::Result<(*mut u8, *mut u8)> {
    let (data, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: new mappings, at addresses of the kernel's choice.
    unsafe {
        let write = libc::mmap(ptr::null_mut(), 4096, data, shared, -1, 0);
        let execute = libc::mremap(write, 0, 4096, libc::MREMAP_MAYMOVE);
        assert!(write != libc::MAP_FAILED && execute != libc::MAP_FAILED);
        check(libc::mprotect(execute, 4096, libc::PROT_READ | libc::PROT_EXEC).into())?;
        Ok((write.cast(), execute.cast()))
    }
}

fn guest_memory(_: &World) -> io::Result<()> {
    // SAFETY: a new file, and a new mapping of it.
    unsafe {
        let fd = libc::memfd_create(c"ram".as_ptr(), libc::MFD_CLOEXEC);
        check(fd.into())?;
        check(libc::ftruncate(fd, 1 << 20).into())?;
        let memory = libc::mmap(ptr::null_mut(), 1 << 20, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0);
        assert!(memory != libc::MAP_FAILED);
        memory.cast::<u8>().write(1);
        check(libc::fallocate(fd, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 0, 4096).into())?;
        assert_eq!(memory.cast::<u8>().read_volatile(), 0);
    }
    Ok(())
}

/// What `doctor` asks; outside of a sandbox.
fn probe(world: &World) -> io::Result<()> {
    let report = purlin_sandbox::probe(&world.plan()).map_err(io::Error::other)?;
    report.layers.iter().for_each(|layer| crate::say(&format!("layer {layer}")));
    report.missing.iter().for_each(|missing| crate::say(&format!("missing {missing}")));
    // This process is as free as before.
    read(Path::new("/etc/passwd"))
}

fn abstract_socket(world: &World) -> io::Result<()> {
    UnixStream::connect_addr(&SocketAddr::from_abstract_name(&world.abstract_name)?).map(drop)
}

fn ptrace(world: &World) -> io::Result<()> {
    // SAFETY: it touches no memory of this process; at its end the other one is let go.
    check(unsafe { libc::ptrace(libc::PTRACE_SEIZE, world.sibling, 0, 0) })
}

fn read_memory(world: &World) -> io::Result<()> {
    // Where its program is: the same for parent and child without exec.
    let here = ptr::from_ref(world).cast_mut().cast();
    let mut byte = 0u8;
    let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let remote = libc::iovec { iov_base: here, iov_len: 1 };
    // SAFETY: the structures outlive the call.
    let result = unsafe { libc::process_vm_readv(world.sibling, &local, 1, &remote, 1, 0) };
    match check(result as i64) {
        // Allowed: only that address is not one of its.
        Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Ok(()),
        other => other,
    }
}

fn mount(world: &World) -> io::Result<()> {
    let target = CString::new(world.directory.join("instance").to_str().unwrap())?;
    // SAFETY: the strings outlive the call.
    check(unsafe { libc::mount(c"none".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), 0, ptr::null()) }.into())
}

/// Loads a program that returns 0, as a socket filter.
fn bpf(_: &World) -> io::Result<()> {
    let code: [u64; 2] = [0xb7, 0x95];
    let mut attributes = [0u64; 16];
    attributes[0] = 1 | 2 << 32;
    attributes[1] = code.as_ptr() as u64;
    attributes[2] = c"GPL".as_ptr() as u64;
    // SAFETY: BPF_PROG_LOAD (5) with attributes as bpf(2) says; all outlive the call.
    check(unsafe { libc::syscall(libc::SYS_bpf, 5, attributes.as_ptr(), size_of_val(&attributes)) })
}

/// A handle of a file outside, as one could guess it: made by name where that works, else of zeroes.
fn open_by_handle(world: &World) -> io::Result<()> {
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        data: [u8; 128],
    }
    let mut handle = Handle { bytes: 128, kind: 0, data: [0; 128] };
    let mut mount = 0i32;
    let directory = File::open(world.directory.join("instance"))?;
    let path = CString::new(world.directory.join("home/secret").to_str().unwrap())?;
    // SAFETY: the handle has the room that it says.
    unsafe {
        libc::syscall(libc::SYS_name_to_handle_at, libc::AT_FDCWD, path.as_ptr(), &raw mut handle, &raw mut mount, 0);
        check(libc::syscall(libc::SYS_open_by_handle_at, directory.as_raw_fd(), &raw const handle, libc::O_RDONLY))
    }
}

fn execve(_: &World) -> io::Result<()> {
    std::process::Command::new("/bin/true").status().map(drop)
}

fn fork(_: &World) -> io::Result<()> {
    // SAFETY: the child ends at once.
    unsafe {
        match libc::fork() {
            0 => libc::_exit(0),
            id => check(id.into()),
        }
    }
}

/// Code from data, in one step.
fn new_code(_: &World) -> io::Result<()> {
    let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    // SAFETY: a new mapping.
    let memory = unsafe { libc::mmap(ptr::null_mut(), 4096, prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0) };
    if memory == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn code_after_seal(world: &World) -> io::Result<()> {
    if world.get("sandbox") == Some("on") {
        emitted_code(world).expect("before the seal");
        assert!(purlin_sandbox::seal().expect("a seal"), "the kernel has no MDWE");
    }
    emitted_code(world)
}

fn raise_limit(_: &World) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure outlives the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &limit) }.into())
}

/// `argument` is what this request takes.
fn terminal<T>(request: libc::Ioctl, argument: *const T) -> io::Result<()> {
    // SAFETY: as just said.
    check(unsafe { libc::ioctl(0, request, argument) }.into())
}

fn set_modes(_: &World) -> io::Result<()> {
    // SAFETY: zeroes are a termios, which the kernel fills.
    let mut modes: libc::termios = unsafe { std::mem::zeroed() };
    terminal(libc::TCGETS, &raw mut modes)?;
    terminal(libc::TCSETS, &raw const modes)
}

fn perf(_: &World) -> io::Result<()> {
    let mut attributes = [0u64; 16];
    // PERF_TYPE_SOFTWARE, 128 bytes, cpu-clock; without the kernel.
    attributes[0] = 1 | 128 << 32;
    attributes[5] = 1 << 5 | 1 << 6;
    // SAFETY: the structure is as long as it says.
    check(unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, 0) })
}

/// An io_uring without use.
struct Ring(File);

impl Ring {
    fn new(flags: u32) -> io::Result<Self> {
        let mut parameters = [0u32; 30];
        parameters[2] = flags;
        // SAFETY: the structure is as long as the kernel's io_uring_params.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 2, parameters.as_mut_ptr()) };
        check(fd)?;
        // SAFETY: it is new.
        Ok(Self(unsafe { File::from_raw_fd(fd as i32) }))
    }

    /// Submits nothing.
    fn enter(&self) -> i64 {
        // SAFETY: no memory is named.
        unsafe { libc::syscall(libc::SYS_io_uring_enter, self.0.as_raw_fd(), 0, 0, 0, 0, 0) }
    }
}
