//! A new instance: its files, made of an image.

use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use purlin_api::{ErrorBody, Machine, NewInstance, Operation, Reason, Status, check_name, vm};
use purlin_images::{
    Error as ImageError,
    build::Recipe,
    prepare::{Files, Request, prepare_in},
};
use purlin_network::nat::Publish;
use purlin_shares::Shares;
use purlin_vmm::{setup, storage::Disk};

use super::{Entry, Instances, disks::make_overlay, failed, lock, taken};
use crate::{
    events::now_ms,
    operations::Progress,
    record::{Boot, Record, Stage},
};

impl Instances {
    /// Begins to make an instance, which is known by its name from now on.
    pub fn create(self: &Arc<Self>, new: NewInstance) -> Result<Operation, ErrorBody> {
        self.check_new(&new)?;
        let record = Record {
            name: new.name.clone(),
            id: uuid::Uuid::new_v4().to_string(),
            image: new.image.clone(),
            created: now_ms() / 1000,
            stage: Stage::Creating,
            machine: new.machine.clone(),
            boot: None,
            mac: setup::random_mac(),
            last_end: None,
            snapshots: Vec::new(),
            next_memory: None,
            is_to_be_renewed: false,
        };
        let entry = self.insert(record)?;
        let instances = self.clone();
        let (name, what) = (new.name.clone(), format!("launch {}", new.name));
        Ok(self.operations.begin(what, &name, |progress| instances.make(entry, new, progress)))
    }

    /// Puts a new record among the others, if its name is free.
    pub(super) fn insert(&self, record: Record) -> Result<Arc<Entry>, ErrorBody> {
        let name = record.name.clone();
        let entry = Entry::new(record.clone());
        let mut entries = lock(&self.entries);
        if entries.contains_key(&name) {
            return Err(taken(&name));
        }
        self.database.put(&record).map_err(failed)?;
        entries.insert(name.clone(), entry.clone());
        drop(entries);
        self.tell(&name, Some(Status::Creating), None);
        Ok(entry)
    }

    fn check_new(&self, new: &NewInstance) -> Result<(), ErrorBody> {
        let bad = |e: &dyn std::fmt::Display| ErrorBody::new(Reason::BadRequest, e);
        check_name(&new.name).map_err(|e| bad(&e))?;
        check_machine(&new.machine)?;
        request(new).check().map_err(|e| bad(&e))?;
        for disk in &new.machine.disks {
            // Before anything is made that its first start would leave behind.
            Disk::open(&setup::disk(disk)).map_err(|e| bad(&e))?;
        }
        match (self.store.get(&new.image), Recipe::of_name(&new.image)) {
            (Err(error @ (ImageError::NoImage(_) | ImageError::Name(_))), Err(_)) => {
                Err(ErrorBody::new(Reason::NotFound, error))
            }
            _ => Ok(()),
        }
    }

    async fn make(self: Arc<Self>, entry: Arc<Entry>, new: NewInstance, progress: Progress) -> Result<(), ErrorBody> {
        let busy = entry.busy.lock().await;
        let start = new.start;
        let dir = self.dir_of(&entry.record());
        let (instances, work) = (self.clone(), dir.clone());
        let files = tokio::task::spawn_blocking(move || instances.make_files(&work, &new, &progress));
        let files = files.await.unwrap_or_else(|e| Err(failed(e)));
        let made = files
            .and_then(|boot| self.change(&entry, |record| (record.boot, record.stage) = (Some(boot), Stage::Ready)));
        if let Err(error) = made {
            self.remove(&entry).await.unwrap_or_else(|e| tracing::warn!("{e}"));
            return Err(error);
        }
        self.tell(&entry.record().name, Some(Status::Stopped), None);
        if start {
            self.start(&entry, vm::Origin::Boot).await?;
        }
        drop(busy);
        Ok(())
    }

    fn make_files(&self, dir: &Path, new: &NewInstance, progress: &Progress) -> Result<Boot, ErrorBody> {
        make_dir(dir)?;
        let files = prepare_in(dir, &self.store, &request(new), progress).map_err(|error| match error {
            ImageError::NoImage(_) => ErrorBody::new(Reason::NotFound, error),
            ImageError::DiskSize { .. } | ImageError::Name(_) => ErrorBody::new(Reason::BadRequest, error),
            _ => failed(error),
        })?;
        let id = dir.file_name().unwrap_or_default().to_string_lossy();
        let base = self.keep_base(&files.image.disk(), &id)?;
        // The overlay is to name that, too.
        fs::remove_file(&files.disk).map_err(|e| failed(format!("cannot write {}: {e}", files.disk.display())))?;
        make_overlay(&files.disk, &base, files.image.format, new.disk_size)?;
        Ok(boot(dir, files, base))
    }
}

/// An instance's directory, of the daemon's user alone.
pub(super) fn make_dir(dir: &Path) -> Result<(), ErrorBody> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|e| failed(format!("cannot create {}: {e}", dir.display())))
}

fn request(new: &NewInstance) -> Request<'_> {
    Request {
        image: &new.image,
        host_name: Some(&new.name),
        user_data: new.user_data.as_deref().map(str::as_bytes),
        ssh_keys: new.ssh_keys.as_deref(),
        disk_size: new.disk_size,
        arguments: new.cmdline.as_deref(),
    }
}

/// What the files are to the record, which does not know where the directory is.
fn boot(dir: &Path, files: Files, base: PathBuf) -> Boot {
    let relative = |path: &Path| path.strip_prefix(dir).unwrap_or(path).to_owned();
    Boot {
        kernel: relative(&files.kernel),
        initrds: files.initrds.iter().map(|path| relative(path)).collect(),
        cmdline: files.cmdline,
        disk: relative(&files.disk),
        seed: relative(&files.seed),
        layers: vec![base],
        next_disk: None,
        overlays: 0,
    }
}

/// Whether a machine could be so, as far as that is known without making it.
pub fn check_machine(machine: &Machine) -> Result<(), ErrorBody> {
    let bad = |e: &dyn std::fmt::Display| Err(ErrorBody::new(Reason::BadRequest, e));
    for publish in &machine.publish {
        if let Err(error) = publish.parse::<Publish>() {
            return bad(&error);
        }
    }
    if let Some(disk) = machine.disks.iter().find(|disk| !disk.path.is_absolute()) {
        return bad(&format!("the disk's path '{}' is not absolute", disk.path.display()));
    }
    let zero = |value: Option<u64>| value == Some(0);
    if machine.disks.iter().any(|disk| zero(disk.iops) || zero(disk.bytes_per_second)) {
        return bad(&"a disk's limits are at least 1");
    }
    if machine.cpu_shares.is_some_and(|weight| !(1..=Shares::MAX_WEIGHT).contains(&weight)) {
        return bad(&format!(
            "CPU shares are from 1 to {}; everybody has {}",
            Shares::MAX_WEIGHT,
            Shares::DEFAULT_WEIGHT
        ));
    }
    if machine.cpu_cap == Some(0) {
        return bad(&"a CPU cap is at least 1 percent; 100 is one whole CPU");
    }
    if machine.memory_max.is_some_and(|most| most < machine.memory()) {
        return bad(&"the most memory is less than the guest's own: it is the guest's and some more");
    }
    setup::check(machine).or_else(|error| bad(&error))
}
