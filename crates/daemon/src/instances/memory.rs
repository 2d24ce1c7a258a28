//! The memory of a guest that runs: as much as it was started with, or less, by its balloon.

use purlin_api::{ErrorBody, Machine, Reason};

use crate::{process::Vm, record::Record};

/// Has the guest of a machine that runs make do with other memory.
pub async fn change(record: &Record, machine: &Machine, vm: &Vm) -> Result<(), ErrorBody> {
    if record.machine.memory_left() == machine.memory_left() {
        return Ok(());
    }
    vm.set_memory(machine.memory_left()).await
}

/// What a guest was started with it may not have given back yet, and takes back when its kernel starts anew: the host must
/// not end its process for that.
pub async fn check(record: &Record, machine: &Machine, vm: &Vm) -> Result<(), ErrorBody> {
    let Some(most) = machine.memory_max.filter(|_| machine.memory_max != record.machine.memory_max) else {
        return Ok(());
    };
    match vm.look().await.memory {
        Some(guest) if most < guest.most => Err(ErrorBody::new(
            Reason::BadRequest,
            format!(
                "the most memory is less than the guest was started with, {} MiB: stop '{}' first",
                guest.most >> 20,
                record.name
            ),
        )),
        _ => Ok(()),
    }
}
