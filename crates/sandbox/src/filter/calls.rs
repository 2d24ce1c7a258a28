//! Which system calls the process and its threads make, by purpose.
//!
//! The lists come from traces of runs under the translator and KVM, and from reading the crates. A call that is missing
//! ends the process: [`Filters::Log`](crate::Filters::Log) tells which.

use super::{Argument, Filter};
use crate::Role;

/// What every thread does: memory, locks, time, its own end.
const BASICS: &[libc::c_long] = &[
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_membarrier,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_sysinfo,
];

/// Descriptors that are open: they are used, waited for, and woken by.
const OPEN_DESCRIPTORS: &[libc::c_long] = &[
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_fstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What is asked of a descriptor. Locks are those of open files.
const FCNTL: &[i32] = &[
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_DUPFD_CLOEXEC,
    libc::F_OFD_GETLK,
    libc::F_OFD_SETLK,
    libc::F_OFD_SETLKW,
    libc::F_ADD_SEALS,
    libc::F_GET_SEALS,
];

/// Sockets that are open.
const OPEN_SOCKETS: &[libc::c_long] = &[
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
];

/// New sockets, which can be Unix ones only.
const NEW_SOCKETS: &[libc::c_long] =
    &[libc::SYS_accept4, libc::SYS_bind, libc::SYS_connect, libc::SYS_getpeername, libc::SYS_listen];

/// What is in files that are open.
const OPEN_FILES: &[libc::c_long] = &[
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    // By names too, but libraries have no other call for an open file.
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_sync_file_range,
];

/// Files by their names: which there are, the root and Landlock say. No links and devices are made, nothing is mounted,
/// and no owner is changed.
const NAMED_FILES: &[libc::c_long] = &[
    libc::SYS_fchmod,
    libc::SYS_fstatfs,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_mkdirat,
    libc::SYS_renameat2,
    libc::SYS_utimensat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
];

const REMOVAL: &[libc::c_long] = &[
    libc::SYS_unlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rmdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
];

/// To open files. A thread that has no use for that is told that it may not: libraries try it too.
const OPENING: &[libc::c_long] = &[
    libc::SYS_openat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
];

/// To ask what a name stands for; as [`OPENING`].
const LOOKUPS: &[libc::c_long] = &[
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
];

/// Timers that signal a vCPU's thread.
const TIMERS: &[libc::c_long] = &[
    libc::SYS_timer_create,
    libc::SYS_timer_delete,
    libc::SYS_timer_getoverrun,
    libc::SYS_timer_gettime,
    libc::SYS_timer_settime,
];

/// Signals that are taken as they come.
const SIGNALS: &[libc::c_long] = &[libc::SYS_rt_sigpending, libc::SYS_rt_sigtimedwait, libc::SYS_signalfd4];

/// New rings. What goes through them passes no filter: `purlin-storage` restricts each before it is used.
pub(crate) const NEW_RINGS: &[libc::c_long] = &[libc::SYS_io_uring_register, libc::SYS_io_uring_setup];

/// The process before its threads have roles, and the thread that starts others: what all roles may, and what builds a
/// machine.
pub(crate) fn process() -> Filter {
    const EXEC: u32 = libc::PROT_EXEC.cast_unsigned();
    // Which pages a machine that is frozen has written, of /proc/self/pagemap: it was opened before.
    const PAGEMAP_SCAN: u32 = 0xc060_6610;
    let filter = control(basics())
        .allow_if(libc::SYS_ioctl, &[Argument::Is(1, PAGEMAP_SCAN)])
        // A copy of the process, with the same filters, that writes down what memory was at that moment.
        .allow_if(libc::SYS_clone, &[Argument::Is(0, libc::CLONE_PIDFD.cast_unsigned())])
        .allow(TIMERS)
        .allow(NEW_RINGS)
        .allow(&[libc::SYS_io_uring_enter, libc::SYS_seccomp])
        .allow_if(libc::SYS_prctl, &[prctl(libc::PR_SET_NO_NEW_PRIVS)])
        .allow_if(libc::SYS_prctl, &[prctl(libc::PR_SET_MDWE)])
        // To end with who has started it, which it is the child of only now; not to outlive it after all.
        .allow_if(libc::SYS_prctl, &[prctl(libc::PR_SET_PDEATHSIG), Argument::Is(1, libc::SIGKILL.cast_unsigned())])
        // Emitted code, until `seal`: shared memory that is mapped twice becomes executable at one place.
        .allow_if(libc::SYS_mprotect, &[Argument::Has(2, EXEC, EXEC)]);
    vcpu_registers(tun(filter))
}

/// A thread with a role.
pub(crate) fn thread(role: Role) -> Filter {
    if role == Role::Control {
        return control(basics());
    }
    let serving = basics().allow(OPEN_FILES).allow(OPEN_SOCKETS).refuse(OPENING, libc::EACCES);
    match role {
        // A signal turns KVM back at the guest's edge, and is taken away again.
        Role::Vcpu => removing(vcpu_registers(tun(serving))).allow(TIMERS).allow(&[libc::SYS_rt_sigtimedwait]),
        Role::Supervisor => removing(tun(serving)),
        Role::Vsock => removing(unix_sockets(serving)),
        Role::Device | Role::Control => tun(serving).refuse(LOOKUPS, libc::EACCES),
        Role::Disk => serving.allow(&[libc::SYS_io_uring_enter]).refuse(LOOKUPS, libc::EACCES),
    }
}

/// The last one to let go of a machine removes the sockets that it has made, if they are still the ones.
fn removing(filter: Filter) -> Filter {
    filter.allow(REMOVAL).allow(LOOKUPS)
}

/// What every thread may: also KVM's ioctls, for all send interrupts.
fn basics() -> Filter {
    const KVM: u32 = 0xae00;
    let own = std::process::id();
    let fcntl = |command: i32| [Argument::Is(1, command.cast_unsigned())];
    FCNTL
        .iter()
        .fold(Filter::new(), |filter, &command| filter.allow_if(libc::SYS_fcntl, &fcntl(command)))
        .allow(BASICS)
        .allow(OPEN_DESCRIPTORS)
        .allow_data_memory()
        // Its own threads only.
        .allow_if(libc::SYS_tgkill, &[Argument::Is(0, own)])
        .allow_if(libc::SYS_prctl, &[prctl(libc::PR_SET_NAME)])
        .allow_if(libc::SYS_prctl, &[prctl(libc::PR_SET_VMA)])
        // To ask for its own limits, not to set them.
        .allow_if(libc::SYS_prlimit64, &[Argument::Is(0, 0), Argument::HasLong(2, u64::MAX, 0)])
        .allow_if(libc::SYS_ioctl, &[Argument::Has(1, 0xff00, KVM)])
        .allow_if(libc::SYS_ioctl, &[Argument::Is(1, libc::FIONBIO as u32)])
        // Who stops a process that it has started before must not fail by that: here there is none.
        .refuse(&[libc::SYS_kill, libc::SYS_tkill], libc::EPERM)
        .refuse(&[libc::SYS_wait4], libc::ECHILD)
        .allow(&[libc::SYS_waitid])
}

/// What serves the control socket, and starts threads.
fn control(filter: Filter) -> Filter {
    const NEW_NAMESPACES: i32 = libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET;
    let (thread, mask) = (libc::CLONE_THREAD.cast_unsigned(), (libc::CLONE_THREAD | NEW_NAMESPACES).cast_unsigned());
    unix_sockets(filter)
        .allow(OPEN_FILES)
        .allow(OPEN_SOCKETS)
        .allow(NAMED_FILES)
        .allow(REMOVAL)
        .allow(OPENING)
        .allow(LOOKUPS)
        .allow(SIGNALS)
        .allow(&[libc::SYS_memfd_create, libc::SYS_pipe2, libc::SYS_set_tid_address])
        .allow(&[libc::SYS_getuid, libc::SYS_geteuid, libc::SYS_getgid, libc::SYS_getegid, libc::SYS_uname])
        .allow_if(libc::SYS_clone, &[Argument::Has(0, mask, thread)])
        // Its flags are in memory, where no filter can look; the C library then uses clone.
        .refuse(&[libc::SYS_clone3], libc::ENOSYS)
        // Whether a descriptor is a terminal.
        .allow_if(libc::SYS_ioctl, &[Argument::Is(1, libc::TCGETS as u32)])
        .allow_if(libc::SYS_ioctl, &[Argument::Is(1, libc::TIOCGWINSZ as u32)])
}

fn unix_sockets(filter: Filter) -> Filter {
    let unix = [Argument::Is(0, libc::AF_UNIX.cast_unsigned())];
    filter.allow(NEW_SOCKETS).allow_if(libc::SYS_socket, &unix).allow_if(libc::SYS_socketpair, &unix)
}

/// The TUN driver's ioctls: type 'T' as terminals have it, numbers from 0xc0 on.
fn tun(filter: Filter) -> Filter {
    filter.allow_if(libc::SYS_ioctl, &[Argument::Has(1, 0xffc0, 0x54c0)])
}

/// GS points at what a vCPU's emitted code works on.
fn vcpu_registers(filter: Filter) -> Filter {
    #[cfg(target_arch = "x86_64")]
    const ARCH_SET_GS: u32 = 0x1001;
    #[cfg(target_arch = "x86_64")]
    const ARCH_GET_GS: u32 = 0x1004;
    #[cfg(target_arch = "x86_64")]
    let filter = filter
        .allow_if(libc::SYS_arch_prctl, &[Argument::Is(0, ARCH_SET_GS)])
        .allow_if(libc::SYS_arch_prctl, &[Argument::Is(0, ARCH_GET_GS)]);
    filter
}

fn prctl(option: i32) -> Argument {
    Argument::Is(0, option.cast_unsigned())
}
