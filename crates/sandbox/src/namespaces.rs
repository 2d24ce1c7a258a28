//! Namespaces of the process's own.

use rustix::{
    io::Errno,
    process::{getgid, getuid},
    thread::{UnshareFlags, unshare_unsafe},
};

use crate::{Layer, Report, fork, process::Proc};

/// A user namespace for a process without privileges, which then has those that the other namespaces take.
pub(crate) fn unshare_user(report: &mut Report) {
    unshare_user_in(&Proc::open(), report);
}

/// The same with a `/proc/self` that need not be in sight any more.
///
/// It is tried in a child first: there are hosts that allow user namespaces and then nothing in them, and a process that
/// has come to be nobody there cannot go back.
pub(crate) fn unshare_user_in(proc: &Proc, report: &mut Report) {
    // The directory in /proc is this process's: the child cannot write its own map by it, but the kernel's answer to
    // whether it would be allowed shows in the rest.
    let entered = fork::succeeds_in_child(|| try_user(None)).and_then(|()| try_user(Some(proc)));
    match entered {
        Ok(()) => report.add(Layer::UserNamespace),
        Err(error) => report.lacks(Layer::UserNamespace, reason("user namespaces", error)),
    }
}

/// Unshares the user namespace, and maps the process's user and group to themselves.
fn try_user(proc: Option<&Proc>) -> Result<(), Errno> {
    let (uid, gid) = (getuid().as_raw(), getgid().as_raw());
    unshare(UnshareFlags::NEWUSER)?;
    let Some(proc) = proc else { return unshare(UnshareFlags::NEWNS) };
    // Without this, a group that denies access could be left.
    proc.write("setgroups", "deny")?;
    proc.write("uid_map", &format!("{uid} {uid} 1"))?;
    proc.write("gid_map", &format!("{gid} {gid} 1"))
}

/// The other namespaces, each by itself: what one host lacks another has. The mount namespace is the new root's.
pub(crate) fn unshare_others(report: &mut Report) {
    const OTHERS: [(Layer, UnshareFlags); 4] = [
        (Layer::PidNamespace, UnshareFlags::NEWPID),
        (Layer::NetworkNamespace, UnshareFlags::NEWNET),
        (Layer::IpcNamespace, UnshareFlags::NEWIPC),
        (Layer::UtsNamespace, UnshareFlags::NEWUTS),
    ];
    for (layer, flag) in OTHERS {
        let name_hidden = |()| if layer == Layer::UtsNamespace { hide_host_name() } else { Ok(()) };
        match unshare(flag).and_then(name_hidden) {
            Ok(()) => report.add(layer),
            Err(error) => report.lacks(layer, reason("namespaces", error)),
        }
    }
}

fn hide_host_name() -> Result<(), Errno> {
    rustix::system::sethostname(b"sandbox")?;
    rustix::system::setdomainname(b"")
}

/// Unshares one namespace of the calling thread's, which is the process's only one.
pub(crate) fn unshare(flag: UnshareFlags) -> Result<(), Errno> {
    // SAFETY: unsafe because of flags that threads share (files, file system attributes) and none here is one of.
    #[allow(unsafe_code)]
    unsafe {
        unshare_unsafe(flag)
    }
}

/// Half a sentence on why the host refused `what`.
pub(crate) fn reason(what: &str, error: Errno) -> String {
    match error {
        Errno::PERM | Errno::ACCESS => format!(
            "the host does not allow {what} to this user ({error}); it may be a container, or a sysctl such as \
             kernel.unprivileged_userns_clone, user.max_user_namespaces or \
             kernel.apparmor_restrict_unprivileged_userns forbids it"
        ),
        Errno::NOSPC | Errno::USERS => {
            format!("the host's limit of {what} is reached ({error}); see the sysctls user.max_*_namespaces")
        }
        Errno::INVAL | Errno::NOSYS => format!("the kernel has no {what} ({error})"),
        _ => format!("the host refused {what}: {error}"),
    }
}
