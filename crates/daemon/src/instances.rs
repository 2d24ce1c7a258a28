//! The instances: what can be done with them, one thing at a time for each.

mod clones;
mod create;
mod disks;
mod memory;
mod merge;
mod shares;
mod snapshots;

use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use purlin_api::{
    ChangeState, ErrorBody, EventKind, Instance, Operation, Reason, Status, check_name,
    vm::{self, Action},
};
use purlin_images::store::Store;

use tokio::sync::Notify;

use crate::{
    database::{Database, DatabaseError},
    events::Events,
    operations::Operations,
    process::{self, Vm, failed},
    record::{Record, SnapshotRecord, Stage},
};

/// How many seconds a guest may take to shut down, if nobody says.
const SHUTDOWN: u32 = 60;
/// How often the power button is pressed: a guest that has just begun to boot does not hear it.
const PRESS_AGAIN: Duration = Duration::from_secs(5);
/// How often a run is ended while others who were there first have their turns.
const END_AGAIN: Duration = Duration::from_secs(1);
/// How long a process may take to end that is told to.
const QUIT: Duration = Duration::from_secs(5);

/// All instances.
pub struct Instances {
    dir: PathBuf,
    /// Where images of the store's have names for instances that stand on them.
    bases: PathBuf,
    store: Store,
    database: Arc<Database>,
    events: Arc<Events>,
    operations: Arc<Operations>,
    /// By name.
    entries: Mutex<BTreeMap<String, Arc<Entry>>>,
    /// Those that are gone but for files that clones of theirs stand on.
    deleted: Mutex<Vec<Record>>,
    /// Held by whoever looks for files that nobody needs, and by whoever makes one before a record has it.
    files: Mutex<()>,
    /// An image that is being made and in no record yet.
    merging: Mutex<Option<PathBuf>>,
    /// Something may have to be merged.
    to_merge: Notify,
}

/// An instance.
pub struct Entry {
    record: Mutex<Record>,
    vm: Mutex<Option<Arc<Vm>>>,
    is_starting: AtomicBool,
    /// Its guest is being made another one: nobody else is to ask it anything.
    is_renewing: AtomicBool,
    /// Held by whoever starts, stops or deletes it.
    busy: tokio::sync::Mutex<()>,
    /// Snapshots whose files whoever is busy with it needs, also if they are deleted meanwhile.
    held: Mutex<Vec<SnapshotRecord>>,
}

impl Entry {
    fn new(record: Record) -> Arc<Self> {
        let (vm, is_starting, is_renewing, busy, held) = Default::default();
        Arc::new(Self { record: Mutex::new(record), vm, is_starting, is_renewing, busy, held })
    }

    fn record(&self) -> Record {
        lock(&self.record).clone()
    }

    /// Its process, if it has one.
    pub fn vm(&self) -> Option<Arc<Vm>> {
        lock(&self.vm).clone()
    }

    /// Waits until a clone's guest knows who it is.
    pub async fn wait_until_renewed(&self) {
        while self.is_renewing.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Ends its run without waiting for whoever is busy with it: a guest that is shutting down may take long.
    async fn end_at_once(&self) {
        if let Some(vm) = self.vm() {
            // What this does not end is killed when it is its turn.
            let _ = vm.act(Action::Quit).await;
        }
    }

    /// Waits for its turn, and ends its run until then: whoever is before it may have started it again, and wait for the guest
    /// to shut down.
    async fn turn_by_force(&self) -> tokio::sync::MutexGuard<'_, ()> {
        let mut turn = std::pin::pin!(self.busy.lock());
        loop {
            self.end_at_once().await;
            if let Ok(busy) = tokio::time::timeout(END_AGAIN, &mut turn).await {
                return busy;
            }
        }
    }

    /// Its process, or an error that says that it has none.
    pub fn running_vm(&self) -> Result<Arc<Vm>, ErrorBody> {
        let name = &lock(&self.record).name;
        self.vm().ok_or_else(|| conflict(format!("'{name}' is not running: 'purlin start {name}' starts it")))
    }
}

impl Instances {
    /// Those in the database, with their files in `dir`.
    pub fn new(
        dir: PathBuf,
        store: Store,
        database: Arc<Database>,
        events: Arc<Events>,
        operations: Arc<Operations>,
    ) -> Result<Arc<Self>, DatabaseError> {
        let (deleted, there): (Vec<_>, Vec<_>) =
            database.all::<Record>()?.into_iter().partition(|record| record.stage == Stage::Deleting);
        let entries = there.into_iter().map(|record| (record.name.clone(), Entry::new(record)));
        let (entries, deleted) = (Mutex::new(entries.collect()), Mutex::new(deleted));
        let bases = dir.with_file_name("bases");
        Ok(Arc::new(Self {
            dir,
            bases,
            store,
            database,
            events,
            operations,
            entries,
            deleted,
            files: Mutex::default(),
            merging: Mutex::default(),
            to_merge: Notify::new(),
        }))
    }

    /// Comes back to the truth: what was being made is taken back, what was being deleted is deleted, and the processes
    /// that run are found again.
    pub async fn recover(self: &Arc<Self>) {
        for entry in self.entries() {
            let record = entry.record();
            match record.stage {
                // A clone's process is started before its source is frozen.
                Stage::Creating if process::is_locked(&self.dir_of(&record)).unwrap_or(false) => {
                    tokio::spawn(self.clone().take_back(entry));
                }
                Stage::Creating | Stage::Deleting => self.remove_rest(&entry).await,
                Stage::Ready => {
                    entry.is_starting.store(true, Ordering::SeqCst);
                    tokio::spawn(self.clone().find_again(entry));
                }
            }
        }
        if let Err(error) = self.sweep() {
            tracing::warn!("{error}");
        }
        tokio::spawn(self.clone().merge_for_ever());
    }

    async fn remove_rest(&self, entry: &Entry) {
        if let Err(error) = self.remove(entry).await {
            tracing::warn!("cannot remove what is left of '{}': {error}", entry.record().name);
        }
    }

    /// Ends the process of an instance that is not to be, as soon as it answers, or waits until it has ended by itself; then
    /// removes it.
    async fn take_back(self: Arc<Self>, entry: Arc<Entry>) {
        let _busy = entry.busy.lock().await;
        let dir = self.dir_of(&entry.record());
        loop {
            match process::find(&dir).await {
                Ok(Some(vm)) => {
                    vm.kill();
                    vm.end().await;
                }
                Ok(None) => return self.remove_rest(&entry).await,
                Err(error) => tracing::warn!("'{}', which is to be removed: {error}", entry.record().name),
            }
        }
    }

    async fn find_again(self: Arc<Self>, entry: Arc<Entry>) {
        let _busy = entry.busy.lock().await;
        let record = entry.record();
        let found = process::find(&self.dir_of(&record)).await;
        match found {
            Ok(Some(vm)) => self.has_started(&entry, vm),
            Ok(None) => {
                shares::forget(record.clone()).await;
                self.remove_half_written(&record);
                self.note_end(&entry);
            }
            Err(error) => tracing::warn!("'{}': {error}", record.name),
        }
        if let Err(error) = self.settle_disk(&entry).await {
            tracing::warn!("'{}': {error}", record.name);
        }
        entry.is_starting.store(false, Ordering::SeqCst);
        self.to_merge.notify_one();
    }

    /// A run that ended while nobody waited for it has said how.
    fn note_end(&self, entry: &Entry) {
        let record = entry.record();
        let end = process::last_end(&self.dir_of(&record));
        if end != record.last_end {
            self.change(entry, |record| record.last_end = end).unwrap_or_else(|e| tracing::warn!("{e}"));
        }
    }

    /// The instance `name`.
    pub fn get(&self, name: &str) -> Result<Arc<Entry>, ErrorBody> {
        let found = lock(&self.entries).get(name).cloned();
        found.ok_or_else(|| {
            let name: String = name.chars().take(80).collect();
            ErrorBody::new(
                Reason::NotFound,
                format!("there is no instance '{}': 'purlin list' shows those there are", name.escape_debug()),
            )
        })
    }

    /// All, in the order of their names.
    pub fn entries(&self) -> Vec<Arc<Entry>> {
        lock(&self.entries).values().cloned().collect()
    }

    /// What is known of one.
    pub async fn describe(&self, entry: &Entry) -> Instance {
        let mut process = match entry.vm() {
            Some(vm) => Some(vm.describe().await),
            None => None,
        };
        let record = entry.record();
        if let Some(process) = &mut process {
            process.usage.memory_limited = shares::memory_limited(&record);
        }
        let status = match (record.stage, &process) {
            (Stage::Creating, _) => Status::Creating,
            (Stage::Deleting, _) => Status::Deleting,
            (Stage::Ready, Some(process)) if process.said.state == vm::State::Paused => Status::Paused,
            (Stage::Ready, Some(_)) => Status::Running,
            (Stage::Ready, None) if entry.is_starting.load(Ordering::SeqCst) => Status::Starting,
            (Stage::Ready, None) if record.last_end.as_ref().is_some_and(|end| end.crashed) => Status::Crashed,
            (Stage::Ready, None) => Status::Stopped,
        };
        let Record { name, id, image, created, machine, last_end, .. } = record;
        Instance { name, id, image, status, created, machine, process, last_end }
    }

    /// Begins to change what an instance is doing.
    pub fn change_state(self: &Arc<Self>, name: &str, change: ChangeState) -> Result<Operation, ErrorBody> {
        let entry = self.get(name)?;
        self.check_state(&entry, &change)?;
        let verb = match change {
            ChangeState::Start => "start",
            ChangeState::Stop { .. } => "stop",
            ChangeState::Restart { .. } => "restart",
            ChangeState::Pause => "pause",
            ChangeState::Resume => "resume",
        };
        let instances = self.clone();
        Ok(self.operations.begin(format!("{verb} {name}"), name, |_| async move {
            let is_forced =
                matches!(change, ChangeState::Stop { force: true, .. } | ChangeState::Restart { force: true, .. });
            let _busy = if is_forced { entry.turn_by_force().await } else { entry.busy.lock().await };
            if is_forced {
                // It may have ended by that, which is no reason to refuse it.
                ready(&entry.record())?;
            } else {
                instances.check_state(&entry, &change)?;
            }
            match change {
                ChangeState::Start => instances.start(&entry, vm::Origin::Boot).await,
                ChangeState::Stop { force, timeout } => instances.stop(&entry, force, timeout).await,
                ChangeState::Restart { force, timeout } => {
                    instances.stop(&entry, force, timeout).await?;
                    instances.start(&entry, vm::Origin::Boot).await
                }
                ChangeState::Pause => instances.act(&entry, Action::Pause, Status::Paused).await,
                ChangeState::Resume => instances.act(&entry, Action::Resume, Status::Running).await,
            }
        }))
    }

    /// Whether it can be asked for now.
    fn check_state(&self, entry: &Entry, change: &ChangeState) -> Result<(), ErrorBody> {
        let record = entry.record();
        ready(&record)?;
        match change {
            ChangeState::Start if entry.vm().is_some() => Err(conflict(format!("'{}' runs already", record.name))),
            ChangeState::Start => Ok(()),
            // What is starting can be stopped once it has started.
            _ if entry.is_starting.load(Ordering::SeqCst) => Ok(()),
            _ => entry.running_vm().map(drop),
        }
    }

    async fn start(self: &Arc<Self>, entry: &Arc<Entry>, origin: vm::Origin) -> Result<(), ErrorBody> {
        self.settle_disk(entry).await?;
        let record = entry.record();
        let boots = origin == vm::Origin::Boot;
        let spec = record.spec(origin).ok_or_else(|| failed(format!("'{}' has nothing to boot", record.name)))?;
        entry.is_starting.store(true, Ordering::SeqCst);
        self.tell(&record.name, Some(Status::Starting), None);
        let started = process::start(&self.dir_of(&record), &spec).await;
        let started = started.map(|vm| self.has_started(entry, vm));
        entry.is_starting.store(false, Ordering::SeqCst);
        if started.is_ok() && boots && record.is_to_be_renewed {
            self.renew_when_up(entry);
        }
        started.inspect_err(|error| {
            self.note_end(entry);
            self.tell(&record.name, Some(Status::Crashed), Some(error.to_string()));
        })
    }

    /// From now on somebody waits for its end.
    fn has_started(self: &Arc<Self>, entry: &Arc<Entry>, vm: Arc<Vm>) {
        *lock(&entry.vm) = Some(vm.clone());
        self.tell(&entry.record().name, Some(Status::Running), None);
        let (instances, entry) = (self.clone(), entry.clone());
        tokio::spawn(async move {
            let end = vm.end().await;
            shares::forget(entry.record()).await;
            instances.remove_half_written(&entry.record());
            let status = if end.crashed { Status::Crashed } else { Status::Stopped };
            let message = end.message.clone();
            let changed = instances.change(&entry, |record| record.last_end = Some(end));
            changed.unwrap_or_else(|error| tracing::warn!("{error}"));
            *lock(&entry.vm) = None;
            instances.to_merge.notify_one();
            instances.tell(&entry.record().name, Some(status), Some(message));
        });
    }

    async fn stop(&self, entry: &Entry, force: bool, timeout: Option<u32>) -> Result<(), ErrorBody> {
        let Ok(vm) = entry.running_vm() else { return Ok(()) };
        if force {
            let _ = vm.act(Action::Quit).await;
            if !vm.is_gone_within(QUIT).await {
                vm.kill();
            }
        } else {
            shut_down(&vm, Duration::from_secs(timeout.unwrap_or(SHUTDOWN).into())).await?;
        }
        self.wait_until_forgotten(entry, &vm).await;
        Ok(())
    }

    /// Waits until it is known that the process is gone: the next start must not find it.
    async fn wait_until_forgotten(&self, entry: &Entry, vm: &Arc<Vm>) {
        vm.end().await;
        while entry.vm().is_some_and(|now| Arc::ptr_eq(&now, vm)) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn act(&self, entry: &Entry, action: Action, then: Status) -> Result<(), ErrorBody> {
        entry.running_vm()?.act(action).await?;
        self.tell(&entry.record().name, Some(then), None);
        Ok(())
    }

    /// Begins to delete an instance; one that runs only if `force`.
    pub fn delete(self: &Arc<Self>, name: &str, force: bool) -> Result<Operation, ErrorBody> {
        let entry = self.get(name)?;
        ready(&entry.record())?;
        if !force && entry.vm().is_some() {
            return Err(conflict(format!("'{name}' runs: stop it first, or delete it with --force")));
        }
        let instances = self.clone();
        Ok(self.operations.begin(format!("delete {name}"), name, |_| async move {
            let _busy = if force { entry.turn_by_force().await } else { entry.busy.lock().await };
            if force {
                instances.stop(&entry, true, None).await?;
            } else if entry.vm().is_some() {
                return Err(conflict("it runs: stop it first, or delete it with --force"));
            }
            instances.remove(&entry).await
        }))
    }

    /// Removes its files, and then what is known of it. It does not run. Files that clones of it stand on stay as long as
    /// those, and so does the record, with no name that others could not have.
    async fn remove(&self, entry: &Entry) -> Result<(), ErrorBody> {
        // From now on a daemon that is started goes on with it.
        self.change(entry, |record| record.stage = Stage::Deleting)?;
        let record = entry.record();
        shares::forget(record.clone()).await;
        let mut entries = lock(&self.entries);
        if entries.get(&record.name).is_some_and(|now| std::ptr::eq(&**now, entry)) {
            entries.remove(&record.name);
        }
        lock(&self.deleted).push(record.clone());
        drop(entries);
        let swept = self.sweep();
        self.tell(&record.name, None, None);
        swept
    }

    /// Gives an instance another name. Its guest's host name stays.
    pub fn rename(&self, name: &str, to: &str) -> Result<(), ErrorBody> {
        check_name(to).map_err(|e| ErrorBody::new(Reason::BadRequest, e))?;
        let entry = self.get(name)?;
        ready(&entry.record())?;
        let mut entries = lock(&self.entries);
        if entries.contains_key(to) {
            return Err(taken(to));
        }
        self.change(&entry, |record| record.name = to.to_owned())?;
        entries.remove(name);
        entries.insert(to.to_owned(), entry);
        drop(entries);
        self.events.tell(EventKind::Renamed { from: name.to_owned(), to: to.to_owned() });
        Ok(())
    }

    /// Changes the hardware of an instance, by a JSON merge patch (RFC 7396): its shares at once, its memory too as far as the
    /// guest was started with that much, the rest from its next start on.
    pub async fn change_machine(&self, name: &str, patch: &serde_json::Value) -> Result<(), ErrorBody> {
        let entry = self.get(name)?;
        let record = entry.record();
        ready(&record)?;
        let mut machine = serde_json::to_value(&record.machine).map_err(failed)?;
        merge(&mut machine, patch);
        let machine = serde_json::from_value(machine).map_err(|e| ErrorBody::new(Reason::BadRequest, e))?;
        create::check_machine(&machine)?;
        if let Some(vm) = entry.vm() {
            memory::check(&record, &machine, &vm).await?;
            shares::change(&record, &machine, &vm).await?;
            memory::change(&record, &machine, &vm).await?;
        }
        self.change(&entry, |record| record.machine = machine)
    }

    /// Changes a record, in the database first.
    fn change(&self, entry: &Entry, change: impl FnOnce(&mut Record)) -> Result<(), ErrorBody> {
        let mut record = lock(&entry.record);
        let mut changed = record.clone();
        change(&mut changed);
        self.database.put(&changed).map_err(failed)?;
        *record = changed;
        Ok(())
    }

    /// What its guest has last written to its serial port: nothing if it has never run.
    pub async fn console_log(&self, entry: &Entry) -> Result<Vec<u8>, ErrorBody> {
        let path = self.dir_of(&entry.record()).join(vm::CONSOLE_LOG);
        match process::read_some(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            read => read.map_err(|e| failed(format!("cannot read {}: {e}", path.display()))),
        }
    }

    /// Snapshots that a process was writing when it was killed.
    fn remove_half_written(&self, record: &Record) {
        for entry in std::fs::read_dir(self.dir_of(record)).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(".purlin-snapshot-") {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    fn dir_of(&self, record: &Record) -> PathBuf {
        self.dir.join(&record.id)
    }

    fn tell(&self, name: &str, status: Option<Status>, message: Option<String>) {
        self.events.tell(EventKind::Instance { name: name.to_owned(), status, message });
    }
}

/// Presses the power button, and again, until the machine is off.
async fn shut_down(vm: &Vm, most: Duration) -> Result<(), ErrorBody> {
    let end = tokio::time::Instant::now() + most;
    loop {
        match vm.act(Action::PressPowerButton).await {
            Err(_) if vm.is_gone_within(Duration::ZERO).await => return Ok(()),
            other => other?,
        }
        let left = end.saturating_duration_since(tokio::time::Instant::now());
        if vm.is_gone_within(left.min(PRESS_AGAIN)).await {
            return Ok(());
        }
        if left <= PRESS_AGAIN {
            let message = format!("the guest did not shut down within {} s: --force ends it", most.as_secs());
            return Err(ErrorBody::new(Reason::Failed, message));
        }
    }
}

fn ready(record: &Record) -> Result<(), ErrorBody> {
    match record.stage {
        Stage::Ready => Ok(()),
        Stage::Creating => Err(conflict(format!("'{}' is being made: wait for it", record.name))),
        Stage::Deleting => Err(conflict(format!("'{}' is being deleted", record.name))),
    }
}

fn conflict(message: impl std::fmt::Display) -> ErrorBody {
    ErrorBody::new(Reason::Conflict, message)
}

fn taken(name: &str) -> ErrorBody {
    conflict(format!("there is an instance '{name}' already: choose another name, or delete it"))
}

/// RFC 7396, 2.
fn merge(target: &mut serde_json::Value, patch: &serde_json::Value) {
    let serde_json::Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = serde_json::json!({});
    }
    let Some(target) = target.as_object_mut() else { return };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key).or_insert(serde_json::Value::Null), value);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn merge_patches_as_the_rfc_has_them() {
        // Appendix A.
        for (target, patch, result) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (json!({"a": {"b": "c"}}), json!({"a": {"b": "d", "c": null}}), json!({"a": {"b": "d"}})),
            (json!({"a": [1]}), json!({"a": [2, 3]}), json!({"a": [2, 3]})),
            (json!([1]), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
        ] {
            let mut merged = target.clone();
            merge(&mut merged, &patch);
            assert_eq!(merged, result, "{target} {patch}");
        }
    }
}
