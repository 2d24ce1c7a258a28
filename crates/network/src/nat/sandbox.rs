//! What the NAT's process gives up once it has all that it needs: files, programs, other processes, privileges, and
//! every system call but those below.

use purlin_sandbox::{
    Filters, SandboxError, deny_files,
    filter::{Argument, Filter},
    give_up_privileges,
};

/// Enters the sandbox, for good.
pub fn enter() -> Result<(), SandboxError> {
    give_up_privileges()?;
    // As far as the kernel knows Landlock: the filter denies every way to a path too.
    deny_files()?;
    Ok(filter().install(Filters::Enforce)?)
}

fn filter() -> Filter {
    // Internet sockets only: no Unix socket leads to a service of the host's.
    let family = |value: i32| [Argument::Is(0, value.cast_unsigned())];
    Filter::new()
        .allow(ANY)
        .allow_data_memory()
        .allow_if(libc::SYS_socket, &family(libc::AF_INET))
        .allow_if(libc::SYS_socket, &family(libc::AF_INET6))
        // What a build with debug assertions asks before it closes a descriptor.
        .allow_if(libc::SYS_fcntl, &[Argument::Is(1, libc::F_GETFD.cast_unsigned())])
        // The C library's allocator looks into /proc, and goes on without.
        .refuse(&[libc::SYS_openat], libc::EACCES)
}

/// System calls allowed whatever their arguments.
const ANY: &[i64] = &[
    // Packets and sockets.
    libc::SYS_accept4,
    libc::SYS_close,
    libc::SYS_connect,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    // Waiting.
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_clock_gettime,
    libc::SYS_restart_syscall,
    // resolv.conf, which is open; the log, on standard error.
    libc::SYS_pread64,
    libc::SYS_write,
    // What the standard library needs to start, to panic and to end.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
];
