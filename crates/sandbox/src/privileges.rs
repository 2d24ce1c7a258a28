//! Whom the process is, and what that allows.

use rustix::{
    io::Errno,
    process::{DumpableBehavior, getegid, geteuid, getuid, set_dumpable_behavior},
    thread::{
        CapabilitiesSecureBits, CapabilitySet, CapabilitySets, Gid, Uid, capabilities, clear_ambient_capability_set,
        remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits, set_no_new_privs,
        set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    },
};

use crate::{Identity, Layer, Plan, Report, SandboxError, error::host};

/// Whether the process can make namespaces without a user namespace.
pub(crate) fn may_administer() -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

/// Becomes the plan's user and group, where the process may.
pub(crate) fn take_identity(plan: &Plan, report: &mut Report) -> Result<(), SandboxError> {
    let own = (geteuid().as_raw(), getegid().as_raw());
    match plan.identity {
        None if own.0 == 0 => report.lacks(Layer::Identity, "it runs as root, for it was given no other user"),
        None => report.lacks(Layer::Identity, "it has that of who started it; only root can give it another one"),
        Some(Identity { uid, gid }) if own == (uid, gid) && getuid().as_raw() == uid => report.add(Layer::Identity),
        Some(identity) => match become_other(identity) {
            Ok(()) => report.add(Layer::Identity),
            Err(error) => report.lacks(Layer::Identity, format!("only root can give it one ({error})")),
        },
    }
    // A process that has changed its user cannot write its own maps in /proc otherwise. `give_up` takes it back.
    set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(host("keep the process's own /proc"))
}

fn become_other(Identity { uid, gid }: Identity) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    // The process has one thread: the calls are the thread's own.
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)
}

/// Gives all privileges up: nothing that the process does can bring one back. It cannot be traced or dumped any more
/// by processes of the same user.
pub fn give_up() -> Result<(), SandboxError> {
    set_no_new_privs(true).map_err(host("forbid new privileges"))?;
    forget_bounding_set().map_err(host("empty the bounding set of capabilities"))?;
    let none = CapabilitySet::empty();
    clear_ambient_capability_set().map_err(host("clear the ambient capabilities"))?;
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .map_err(host("give up the capabilities"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(host("forbid core dumps"))
}

/// Where the process may not (it never had a capability) nothing is lost: without new privileges the bounding set has no
/// say.
fn forget_bounding_set() -> Result<(), Errno> {
    let effective = capabilities(None)?.effective;
    if !effective.contains(CapabilitySet::SETPCAP) {
        return Ok(());
    }
    let all = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_SETUID_FIXUP
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    set_capabilities_secure_bits(all)?;
    for number in 0..64 {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            // Behind the last one that the kernel knows.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
