//! Clones of instances: of one that runs, memory and disk go on copy-on-write in both.

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared, join, join_all, ready as ready_made},
};
use purlin_agent::{
    client::{Client, ClientError, connect_when_up},
    protocol::{Card, Renew},
};
use purlin_api::{
    ErrorBody, Machine, NewClones, Operation, Reason, check_name,
    unix::Address,
    vm::{self, Freeze},
};
use purlin_debian::Progress as _;
use purlin_vmm::storage::{Format, NewImage};
use rustix::rand::{GetRandomFlags, getrandom};

use super::{Entry, Instances, create::make_dir, disks::boot, failed, ready, taken};
use crate::{
    events::now_ms,
    operations::Progress,
    record::{Boot, Record, Stage},
};

/// The most clones that are made by one request.
const MOST: usize = 256;
/// How long the agent of a clone's guest may take to answer: it is there already, or not at all.
const AGENT: Duration = Duration::from_secs(3);
/// How long that of a guest that boots may take.
const BOOT: Duration = Duration::from_secs(600);
/// How long a clone's guest puts off what nobody waits for: what it is asked first is alone.
const PUT_OFF: Duration = Duration::from_millis(250);
/// How much longer for each other clone that is made with it: none is to hold up those that have not begun.
const PUT_OFF_FOR_EACH: Duration = Duration::from_millis(100);
/// But at most.
const PUT_OFF_AT_MOST: Duration = Duration::from_secs(8);
/// Bytes of randomness that a clone's guest is given.
const SEED: usize = 64;

/// What clones are made of.
struct Source<'a> {
    /// The instance as it is, or will be, when it is frozen.
    record: &'a Record,
    /// Where the clones go on from.
    origin: vm::Origin,
    /// When it is.
    frozen: Shared<BoxFuture<'a, Result<(), ErrorBody>>>,
}

impl Instances {
    /// Begins to make clones.
    pub fn clone_instance(self: &Arc<Self>, name: &str, new: NewClones) -> Result<Operation, ErrorBody> {
        let source = self.get(name)?;
        ready(&source.record())?;
        self.check_clones(&new)?;
        let instances = self.clone();
        let what = format!("clone {name}");
        Ok(self
            .operations
            .begin(what, name, |progress| async move { instances.make_clones(&source, &new.names, &progress).await }))
    }

    fn check_clones(&self, new: &NewClones) -> Result<(), ErrorBody> {
        let bad = |message: String| Err(ErrorBody::new(Reason::BadRequest, message));
        if new.names.is_empty() || new.names.len() > MOST {
            return bad(format!("there can be 1 to {MOST} clones at once"));
        }
        for (at, name) in new.names.iter().enumerate() {
            check_name(name).map_err(|e| ErrorBody::new(Reason::BadRequest, e))?;
            if new.names[..at].contains(name) {
                return bad(format!("'{name}' is there twice"));
            }
            if self.get(name).is_ok() {
                return Err(taken(name));
            }
        }
        Ok(())
    }

    async fn make_clones(
        self: &Arc<Self>,
        source: &Arc<Entry>,
        names: &[String],
        progress: &Progress,
    ) -> Result<(), ErrorBody> {
        let freeze = uuid::Uuid::new_v4().to_string();
        // Held to the end: the source is not to be deleted before its clones stand on its files.
        let _busy = source.busy.lock().await;
        ready(&source.record())?;
        let Some(vm) = source.vm() else {
            self.freeze_disk(source)?;
            let record = source.record();
            let boots =
                Source { record: &record, origin: vm::Origin::Boot, frozen: ready_made(Ok(())).boxed().shared() };
            let clones = names.iter().map(|name| self.make_clone(&boots, name, Duration::ZERO, progress));
            return join_all(clones).await.into_iter().collect();
        };
        let overlay = self.begin_overlay(source)?;
        // As it will be when it is frozen: the clones' processes are started meanwhile.
        let mut record = source.record();
        record.boot.iter_mut().for_each(|boot| boot.go_on_with(overlay.clone()));
        let origin = vm::Origin::Clone { socket: self.dir_of(&record).join(vm::FROZEN), freeze: freeze.clone() };
        let frozen = async {
            let frozen = vm.freeze(&Freeze { freeze: freeze.clone(), overlay: overlay.clone() }).await;
            self.settle_disk(source).await?;
            frozen?;
            // What the clones stand on is not to be written any more, whatever the process says.
            let is_frozen = boot(&source.record())?.disk == overlay;
            is_frozen.then_some(()).ok_or_else(|| failed("its disk has not gone on with an overlay"))
        };
        let running = Source { record: &record, origin, frozen: frozen.boxed().shared() };
        let others = names.len().saturating_sub(1) as u32;
        let put_off = (PUT_OFF + others * PUT_OFF_FOR_EACH).min(PUT_OFF_AT_MOST);
        let clones = join_all(names.iter().map(|name| self.make_clone(&running, name, put_off, progress)));
        let (_, made) = join(running.frozen.clone(), clones).await;
        drop(running);
        // Nobody waits for that.
        tokio::spawn(async move { vm.thaw(&freeze).await });
        made.into_iter().collect()
    }

    /// Makes a clone, and starts it if its source runs.
    async fn make_clone(
        self: &Arc<Self>,
        of: &Source<'_>,
        name: &str,
        put_off: Duration,
        progress: &Progress,
    ) -> Result<(), ErrorBody> {
        let source = of.record;
        let source_dir = self.dir_of(source);
        let record = Record {
            name: name.to_owned(),
            id: uuid::Uuid::new_v4().to_string(),
            created: now_ms() / 1000,
            stage: Stage::Creating,
            boot: Some(boot_of_clone(source, &source_dir, name)?),
            mac: purlin_vmm::setup::random_mac(),
            last_end: None,
            snapshots: Vec::new(),
            next_memory: None,
            is_to_be_renewed: true,
            // The source has those ports.
            machine: Machine { publish: Vec::new(), ..source.machine.clone() },
            ..source.clone()
        };
        let dir = self.dir_of(&record);
        let backing = boot(&record)?.layers[0].clone();
        let disk = dir.join(&boot(&record)?.disk);
        let entry = self.insert(record)?;
        let _busy = entry.busy.lock().await;
        // All clones at the same time, and not on a thread that serves others.
        let image = NewImage::overlay(disk, backing, Format::Qcow2);
        let is_used = of.origin != vm::Origin::Boot;
        let make_image = move || if is_used { image.create_over_used() } else { image.create() };
        let files = move || make_dir(&dir).and_then(|()| make_image().map_err(failed));
        let made = tokio::task::spawn_blocking(files).await.map_err(failed).flatten();
        let made = match made {
            Ok(()) if is_used => self.start_clone(&entry, of, put_off, progress).await,
            Ok(()) => self.change(&entry, |record| record.stage = Stage::Ready),
            other => other,
        };
        if let Err(error) = &made {
            tracing::warn!("the clone '{name}': {error}");
            self.stop(&entry, true, None).await?;
            self.remove(&entry).await?;
        }
        made
    }

    /// Nobody asks the clone's guest anything before it is another one. If it has no agent it goes on as it is.
    async fn start_clone(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        of: &Source<'_>,
        put_off: Duration,
        progress: &Progress,
    ) -> Result<(), ErrorBody> {
        let source = of.record;
        entry.is_renewing.store(true, Ordering::SeqCst);
        let (frozen, started) = join(of.frozen.clone(), self.start(entry, of.origin.clone())).await;
        // Only now there is something that the clone's disk can stand on.
        let started = frozen.and(started).and_then(|()| self.change(entry, |record| record.stage = Stage::Ready));
        let renewed = match &started {
            Ok(()) => self.renew(entry, Some(source.mac), put_off, AGENT).await,
            Err(_) => Ok(()),
        };
        entry.is_renewing.store(false, Ordering::SeqCst);
        if let Err(error) = renewed {
            let name = entry.record().name;
            progress.note(&format!("'{name}' still thinks that it is '{}': {error}", source.name));
            self.renew_when_up(entry);
        }
        started
    }

    /// Makes the guest of a clone that boots another one, when it is up.
    pub(super) fn renew_when_up(self: &Arc<Self>, entry: &Arc<Entry>) {
        let (instances, entry) = (self.clone(), entry.clone());
        tokio::spawn(async move {
            if let Err(error) = instances.renew(&entry, None, Duration::ZERO, BOOT).await {
                tracing::warn!("'{}' still thinks that it is what it was cloned of: {error}", entry.record().name);
            }
        });
    }

    /// Has the guest's agent give it a name, machine ID, host keys, randomness and, where its card had the address
    /// `old_mac`, a new one. What takes long it puts off for `put_off`.
    async fn renew(
        &self,
        entry: &Entry,
        old_mac: Option<[u8; 6]>,
        put_off: Duration,
        patience: Duration,
    ) -> Result<(), ErrorBody> {
        let record = entry.record();
        let cards = old_mac.map(|old| Card { old: text(old), new: text(record.mac) });
        let renew = Renew {
            host_name: record.name.clone(),
            machine_id: String::new(),
            random_seed: random_seed(),
            remake_ssh_host_keys: true,
            cards: cards.into_iter().collect(),
            time_ns: 0,
            put_off_ms: put_off.as_millis() as u32,
        };
        self.ask_to_renew(&record, renew, patience).await?;
        self.change(entry, |record| record.is_to_be_renewed = false)
    }

    /// A guest that goes on from a snapshot thinks that it is still then, and has the randomness that it had: its agent, if
    /// it has one, sets that right.
    pub(super) fn bring_to_the_present(self: &Arc<Self>, entry: &Arc<Entry>) {
        let (instances, record) = (self.clone(), entry.record());
        tokio::spawn(async move {
            let socket = instances.dir_of(&record).join(vm::VSOCK);
            let info = ask(socket, AGENT, |client| client.info()).await;
            let Ok(info) = info else { return };
            let renew = Renew { machine_id: info.machine_id, random_seed: random_seed(), ..Renew::default() };
            if let Err(error) = instances.ask_to_renew(&record, renew, AGENT).await {
                tracing::warn!("the clock of '{}' was not set: {error}", record.name);
            }
        });
    }

    async fn ask_to_renew(&self, record: &Record, renew: Renew, patience: Duration) -> Result<(), ErrorBody> {
        let socket = self.dir_of(record).join(vm::VSOCK);
        let renewed = ask(socket, patience, move |client| {
            // The time at which it is asked, not that at which somebody began to wait for it.
            client.renew(Renew { time_ns: now_ms() * 1_000_000, ..renew }).map(|(renewed, _)| renewed)
        });
        for problem in renewed.await?.problems {
            tracing::warn!("'{}': {problem}", record.name);
        }
        Ok(())
    }
}

/// Asks the agent at a machine's vsock socket something, on a thread that may wait.
async fn ask<T: Send + 'static>(
    socket: PathBuf,
    patience: Duration,
    what: impl FnOnce(Client<UnixStream, UnixStream>) -> Result<T, ClientError> + Send + 'static,
) -> Result<T, ErrorBody> {
    let asked = tokio::task::spawn_blocking(move || {
        let address = Address::of(&socket).map_err(|e| e.to_string())?;
        let client = connect_when_up(address.path(), patience).map_err(|e| e.to_string())?;
        what(client).map_err(|e| e.to_string())
    });
    asked.await.map_err(failed)?.map_err(failed)
}

fn random_seed() -> Vec<u8> {
    let mut seed = vec![0; SEED];
    let length = getrandom(&mut seed, GetRandomFlags::empty()).unwrap_or(0);
    seed.truncate(length);
    seed
}

/// It boots what the other one does, from there, and has a disk of its own on the frozen one.
fn boot_of_clone(source: &Record, dir: &Path, name: &str) -> Result<Boot, ErrorBody> {
    let from = boot(source)?;
    let there = |path: &PathBuf| dir.join(path);
    let word = |word: &str| match word.split_once('=') {
        Some(("systemd.hostname", _)) => format!("systemd.hostname={name}"),
        _ => word.to_owned(),
    };
    let words = from.cmdline.split(' ').map(word);
    Ok(Boot {
        kernel: there(&from.kernel),
        initrds: from.initrds.iter().map(there).collect(),
        cmdline: words.collect::<Vec<_>>().join(" "),
        disk: "disk.qcow2".into(),
        layers: from.layers.iter().map(there).collect(),
        next_disk: None,
        overlays: 0,
        seed: there(&from.seed),
    })
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
