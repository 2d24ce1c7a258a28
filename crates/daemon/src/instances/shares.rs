//! Shares of the host: a VM's process joins its group by itself; the daemon changes it while it runs, and removes it.

use purlin_api::{ErrorBody, Machine};
use purlin_shares::{Group, Means};
use purlin_vmm::process::shares;

use super::failed;
use crate::{process::Vm, record::Record};

/// Changes what a machine that runs may take.
pub async fn change(record: &Record, machine: &Machine, vm: &Vm) -> Result<(), ErrorBody> {
    let (old, new) = (shares(&record.machine), shares(machine));
    if old == new {
        return Ok(());
    }
    let (mut group, how) = Group::create(&record.id, &new).map_err(failed)?;
    if how.cpu == Means::Process {
        group.add(vm.pid()).map_err(failed)?;
        vm.set_cap(new.cpu_cap).await?;
    }
    Ok(())
}

/// The memory that counts against a machine's limit, if it has one.
pub fn memory_limited(record: &Record) -> Option<u64> {
    record.machine.memory_max?;
    Group::find(&record.id).ok()??.usage().ok().map(|usage| usage.memory)
}

/// Removes the group of a machine whose process is gone. The kernel may take a moment to notice.
pub async fn forget(record: Record) {
    let removed = tokio::task::spawn_blocking(move || match Group::find(&record.id) {
        Ok(Some(group)) => group.remove().unwrap_or_else(|error| tracing::warn!("'{}': {error}", record.name)),
        Ok(None) => {}
        Err(error) => tracing::warn!("'{}': {error}", record.name),
    });
    // It fails only where the daemon ends.
    let _ = removed.await;
}
