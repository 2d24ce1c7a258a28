//! The daemon's life.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use purlin_api::server;
use purlin_images::store::Store;
use rustix::{
    fs::{FlockOperation, Mode, flock},
    io::Errno,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    sync::Notify,
    task::JoinSet,
};

use crate::{
    api::{self, Shared},
    database::Database,
    error::StartError,
    events::Events,
    images::Images,
    instances::Instances,
    operations::Operations,
    remote::{Listen, Listener, Listening, authorize::Gate, peer::Peers},
    tokens::Tokens,
};

/// How long answers that are under way may take once the daemon ends.
const LAST_ANSWERS: Duration = Duration::from_millis(300);
/// File descriptors that are enough for as many connections as there can be.
const DESCRIPTORS: u64 = 8192;
/// For how long another daemon may still be ending.
const LAST_MOMENT: Duration = Duration::from_secs(2);

/// Where the daemon keeps what it has.
#[derive(Clone, Debug)]
pub struct Places {
    /// The socket of its API.
    pub socket: PathBuf,
    /// The directory of its database and of the instances.
    pub data: PathBuf,
}

/// Runs the daemon until a signal or somebody at the API ends it; machines go on. It answers at its socket, and on TCP if
/// `listen` says so. `ready` is called once it does.
pub fn run(places: &Places, listen: Option<&Listen>, ready: impl FnOnce(Option<Listening>)) -> Result<(), StartError> {
    let _ = rustix::thread::set_name(c"purlin-daemon");
    // Machines' processes read what is in directories that nobody else can enter.
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    let _lock = lock(places)?;
    raise_descriptors();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(StartError::host("start threads for", &places.socket))?;
    let ended = runtime.block_on(serve(places, listen, ready));
    runtime.shutdown_timeout(LAST_ANSWERS);
    ended
}

/// There is one daemon for a directory.
fn lock(places: &Places) -> Result<File, StartError> {
    let run = places.socket.parent().unwrap_or(Path::new("/"));
    for dir in [&places.data, run] {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(StartError::host("create", dir))?;
    }
    let path = places.data.join("daemon.lock");
    let lock = File::create(&path).map_err(StartError::host("create", &path))?;
    let begin = Instant::now();
    loop {
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            // One that is about to end has said so, and has its lock a moment longer.
            Err(Errno::WOULDBLOCK) if begin.elapsed() < LAST_MOMENT => thread::sleep(Duration::from_millis(10)),
            Err(Errno::WOULDBLOCK) => return Err(StartError::Running),
            other => return other.map(|()| lock).map_err(|e| StartError::host("lock", &path)(e.into())),
        }
    }
}

/// Each connection is a descriptor, and each that leads to a machine two. What the host gives is not always enough.
fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let enough = limit.maximum.map_or(DESCRIPTORS, |maximum| maximum.min(DESCRIPTORS));
    if limit.current.is_some_and(|current| current < enough) {
        // Without it, connections wait for each other.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(enough), maximum: limit.maximum });
    }
}

async fn serve(
    places: &Places,
    listen: Option<&Listen>,
    ready: impl FnOnce(Option<Listening>),
) -> Result<(), StartError> {
    let remote = match listen {
        Some(listen) => Some(Listener::open(listen, &places.data).await?),
        None => None,
    };
    let told = remote.as_ref().map(|remote| remote.told);
    let database_path = places.data.join("purlin.redb");
    let wrong =
        |e: crate::database::DatabaseError| StartError::Database { path: database_path.clone(), reason: e.to_string() };
    let database = Arc::new(Database::open(&database_path)?);
    let events = Arc::new(Events::new(database.clone()).map_err(wrong)?);
    let operations = Arc::new(Operations::new(database.clone(), events.clone()).map_err(wrong)?);
    let tokens = Arc::new(Tokens::new(database.clone()).map_err(wrong)?);
    let store = Store::at(places.data.join("images"));
    let images = Images::new(Store::at(places.data.join("images")), operations.clone());
    let dir = places.data.join("instances");
    let instances = Instances::new(dir, store, database, events.clone(), operations.clone()).map_err(wrong)?;
    instances.recover().await;
    let listener = bind(&places.socket).map_err(StartError::host("listen at", &places.socket))?;
    let end = Arc::new(Notify::new());
    let gate = Gate { tokens, peers: Peers::new() };
    let shared = Shared::new(instances, images, operations, events, end.clone(), gate.clone(), told);
    let mut servers = JoinSet::new();
    servers.spawn(server::serve(listener, api::router(shared.clone())));
    if let Some(remote) = remote {
        servers.spawn(remote.serve(api::remote_router(shared), gate.peers));
    }
    ready(told);
    wait_for_end(&end).await;
    servers.abort_all();
    // Nobody is to wait for somebody who is gone.
    let _ = fs::remove_file(&places.socket);
    Ok(())
}

/// The socket, for the daemon's user alone. One that is there is of a daemon that was killed.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let _ = fs::remove_file(path);
    UnixListener::bind(purlin_api::unix::Address::of(path)?.path())
}

async fn wait_for_end(asked: &Notify) {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return asked.notified().await;
    };
    tokio::select! {
        () = asked.notified() => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    // The answer that it ends is to arrive.
    tokio::time::sleep(Duration::from_millis(50)).await;
}
