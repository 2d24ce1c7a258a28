//! What the NAT's process gives up once it has all that it needs: files, programs, other processes, privileges, and
//! every system call but those below.

use std::collections::BTreeMap;

use landlock::{ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError, Scope};
use rustix::{
    io::Errno,
    process::{DumpableBehavior, set_dumpable_behavior},
    thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs},
};
use seccompiler::{
    BpfProgram, SeccompAction,
    SeccompCmpArgLen::Dword,
    SeccompCmpOp::{Eq, MaskedEq},
    SeccompCondition, SeccompFilter, SeccompRule,
};

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("{0}")]
    Host(#[from] Errno),
    #[error("Landlock: {0}")]
    Landlock(#[from] RulesetError),
    #[error("seccomp: {0}")]
    Filter(#[from] seccompiler::BackendError),
    #[error("seccomp: {0}")]
    Seccomp(#[from] seccompiler::Error),
}

/// Enters the sandbox, for good.
pub fn enter() -> Result<(), SandboxError> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    set_no_new_privs(true)?;
    drop_capabilities()?;
    deny_files()?;
    filter_system_calls()
}

fn drop_capabilities() -> Result<(), Errno> {
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
}

/// As far as the kernel knows Landlock: seccomp denies every way to a path too.
fn deny_files() -> Result<(), RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .scope(Scope::AbstractUnixSocket | Scope::Signal)?
        .create()?
        .restrict_self()
        .map(drop)
}

fn filter_system_calls() -> Result<(), SandboxError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ANY.iter().map(|&call| (call, Vec::new())).collect();
    // Internet sockets only: no Unix socket leads to a service of the host's.
    let family = |value: i32| argument(0, Eq, value);
    rules.insert(libc::SYS_socket, vec![only(family(libc::AF_INET)?)?, only(family(libc::AF_INET6)?)?]);
    // Memory, but no code.
    let not_code = || argument(2, MaskedEq(libc::PROT_EXEC as u64), 0);
    rules.insert(libc::SYS_mmap, vec![only(not_code()?)?]);
    rules.insert(libc::SYS_mprotect, vec![only(not_code()?)?]);
    // What a build with debug assertions asks before it closes a descriptor.
    rules.insert(libc::SYS_fcntl, vec![only(argument(1, Eq, libc::F_GETFD)?)?]);
    // Denied without harm: the C library's allocator looks into /proc, and goes on without.
    let denied = BTreeMap::from([(libc::SYS_openat, Vec::new())]);
    apply(denied, SeccompAction::Allow, SeccompAction::Errno(libc::EACCES.cast_unsigned()))?;
    rules.insert(libc::SYS_openat, Vec::new());
    apply(rules, SeccompAction::KillProcess, SeccompAction::Allow)
}

/// Of several filters the most severe verdict counts.
fn apply(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<(), SandboxError> {
    let arch = std::env::consts::ARCH.try_into()?;
    let program: BpfProgram = SeccompFilter::new(rules, otherwise, matched, arch)?.try_into()?;
    Ok(seccompiler::apply_filter(&program)?)
}

fn argument(
    number: u8,
    operator: seccompiler::SeccompCmpOp,
    value: i32,
) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(number, Dword, operator, value.cast_unsigned().into())
}

fn only(condition: SeccompCondition) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![condition])
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
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
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
