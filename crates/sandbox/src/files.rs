//! Landlock: files, TCP, signals and abstract sockets, as far as the kernel knows it.

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use rustix::io::Errno;

use crate::{Access, Layer, Plan, Reachable, Report, SandboxError};

/// The newest that is known here; an older kernel enforces what it has.
const NEWEST: ABI = ABI::V9;

/// Denies every file, signals to other processes and abstract sockets that are not the process's own. Best effort.
pub fn deny() -> Result<(), SandboxError> {
    ruleset()?.create()?.restrict_self()?;
    Ok(())
}

/// Denies all but the plan's paths, and TCP.
pub(crate) fn restrict(plan: &Plan, report: &mut Report) -> Result<(), SandboxError> {
    let mut rules = ruleset()?.handle_access(AccessNet::from_all(NEWEST))?.create()?;
    for reachable in &plan.paths {
        rules = rules.add_rule(rule(reachable)?)?;
    }
    let status = rules.restrict_self()?;
    match status.landlock {
        LandlockStatus::Available { effective_abi, .. } if status.ruleset != RulesetStatus::NotEnforced => {
            report.landlock_abi = effective_abi as u32;
            report.add(Layer::Landlock);
        }
        _ => report.lacks(Layer::Landlock, "the kernel has none, or its lsm= option leaves it out"),
    }
    Ok(())
}

fn ruleset() -> Result<Ruleset, RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .scope(Scope::AbstractUnixSocket | Scope::Signal)
}

fn rule(Reachable { path, access }: &Reachable) -> Result<PathBeneath<PathFd>, SandboxError> {
    let failed = |error| SandboxError::Path { path: path.clone(), error };
    let metadata = path.metadata().map_err(|error| failed(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
    let fd = PathFd::new(path).map_err(|_| failed(Errno::ACCESS))?;
    let rights = rights(*access);
    Ok(PathBeneath::new(fd, if metadata.is_dir() { rights } else { rights & AccessFs::from_file(NEWEST) }))
}

fn rights(access: Access) -> BitFlags<AccessFs> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    match access {
        Access::Read => read,
        // What is executed, links and devices are left out.
        Access::ReadWrite => {
            read | AccessFs::WriteFile
                | AccessFs::Truncate
                | AccessFs::MakeReg
                | AccessFs::MakeDir
                | AccessFs::MakeSock
                | AccessFs::RemoveFile
                | AccessFs::RemoveDir
                | AccessFs::Refer
                | AccessFs::ResolveUnix
        }
        Access::Device => read | AccessFs::WriteFile | AccessFs::IoctlDev,
    }
}
