//! Resource limits.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{Limits, SandboxError, error::host};

/// Sets the limits; where the process may not have as much as the plan says, it keeps what it may.
pub(crate) fn set(limits: &Limits) -> Result<(), SandboxError> {
    limit(Resource::Core, 0)?;
    limit(Resource::Nofile, limits.descriptors)?;
    limit(Resource::Memlock, limits.locked_memory)?;
    if let Some(threads) = limits.threads {
        limit(Resource::Nproc, threads)?;
    }
    if let Some(bytes) = limits.file_size {
        limit(Resource::Fsize, bytes)?;
    }
    Ok(())
}

fn limit(resource: Resource, wanted: u64) -> Result<(), SandboxError> {
    let value = Some(getrlimit(resource).maximum.map_or(wanted, |maximum| maximum.min(wanted)));
    setrlimit(resource, Rlimit { current: value, maximum: value }).map_err(host("set a resource limit"))
}
