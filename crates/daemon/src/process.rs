//! The processes of VMs, as the daemon sees them: started, found again, asked, and outlived.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use purlin_agent::client::greeting;
use purlin_api::{
    ErrorBody, InstanceProcess, Reason, Usage,
    client::{Client, ClientError, WebSocket},
    unix::Address,
    vm::{self, Act, Action, Cap, Freeze, Ready, SetMemory, SnapshotTaken, TakeSnapshot},
};
use purlin_vmm::process::VERB;
use rustix::{
    fs::{FlockOperation, Mode, OFlags, flock},
    io::Errno,
    process::{Pid, Signal, kill_process},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    process::{Child, Command},
    sync::watch,
    time::{sleep, timeout},
};

use crate::events::now_ms;

/// How long a process may take to say what it is doing.
const ANSWER: Duration = Duration::from_millis(200);
/// How long it may take to do what it is asked.
const ACTION: Duration = Duration::from_secs(10);
/// Bytes that are read of a file of a VM's process: its console's log is shorter.
const MOST_READ: u64 = 2 << 20;
/// How long a process that has just been started may not listen yet.
const SILENCE: Duration = Duration::from_secs(10);
/// How often something is looked at that tells nobody when it changes.
const LOOK: Duration = Duration::from_millis(10);
/// Bytes of the longest line that says how a start went.
const MAX_READY: u64 = 64 << 10;

/// A VM's process.
pub struct Vm {
    dir: PathBuf,
    client: Client,
    pid: u32,
    said: Mutex<vm::Process>,
    /// Whether it is gone.
    gone: watch::Receiver<bool>,
}

/// Something that could not be done.
pub fn failed(message: impl std::fmt::Display) -> ErrorBody {
    ErrorBody::new(Reason::Failed, message)
}

/// Starts the machine in `dir`, and returns when its guest runs.
pub async fn start(dir: &Path, spec: &vm::Spec) -> Result<Arc<Vm>, ErrorBody> {
    write_spec(dir, spec).map_err(|e| failed(format!("cannot write {}: {e}", vm::spec_of(dir).display())))?;
    let mut child = spawn(dir).map_err(|e| failed(format!("cannot start the machine's process: {e}")))?;
    let ready = read_ready(&mut child, dir).await;
    // It is the daemon's child as long as there is this daemon; without anybody to wait for it, a zombie would stay.
    tokio::spawn(async move { child.wait().await });
    match ready? {
        Ready::Started(said) => Vm::connect(dir, said).await.map_err(failed),
        Ready::Failed(error) => Err(error),
    }
}

/// Finds the process again that runs the machine in `dir`; `None` if there is none.
pub async fn find(dir: &Path) -> Result<Option<Arc<Vm>>, ErrorBody> {
    let client = Client::new(dir.join(vm::CONTROL));
    let begin = Instant::now();
    while is_locked(dir).map_err(|e| failed(format!("cannot look at {}: {e}", vm::lock_of(dir).display())))? {
        // One that is starting answers when its guest runs.
        match client.get::<vm::Process>("/1.0").await {
            Ok(said) => return Vm::connect(dir, said).await.map(Some).map_err(failed),
            Err(ClientError::Connect { .. }) if begin.elapsed() > SILENCE => {
                return Err(failed("its process runs, and does not listen to anybody: end it by 'kill'"));
            }
            Err(_) => sleep(LOOK).await,
        }
    }
    Ok(None)
}

fn write_spec(dir: &Path, spec: &vm::Spec) -> io::Result<()> {
    let new = dir.with_added_extension("new");
    fs::write(&new, serde_json::to_vec_pretty(spec)?)?;
    fs::rename(new, vm::spec_of(dir))
}

fn spawn(dir: &Path) -> io::Result<Child> {
    let log = File::options().create(true).append(true).open(dir.join(vm::LOG))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg(VERB).arg(dir).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    command.kill_on_drop(false).spawn()
}

async fn read_ready(child: &mut Child, dir: &Path) -> Result<Ready, ErrorBody> {
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        let read = BufReader::new(stdout.take(MAX_READY)).read_line(&mut line).await;
        read.map_err(|e| failed(format!("cannot hear from the machine's process: {e}")))?;
    }
    serde_json::from_str(&line).map_err(|_| {
        failed(format!("the machine's process ended before its guest ran; {} says why", dir.join(vm::LOG).display()))
    })
}

/// Whether a process runs the machine in `dir`.
pub fn is_locked(dir: &Path) -> io::Result<bool> {
    let lock = match File::open(vm::lock_of(dir)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        other => other?,
    };
    match flock(&lock, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(false),
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

impl Vm {
    async fn connect(dir: &Path, said: vm::Process) -> io::Result<Arc<Self>> {
        let socket = dir.join(vm::CONTROL);
        let stream = UnixStream::connect(Address::of(&socket)?.path()).await?;
        let pid = stream.peer_cred()?.pid().unwrap_or_default().cast_unsigned();
        let (sender, gone) = watch::channel(false);
        let vm = Arc::new(Self { dir: dir.to_owned(), client: Client::new(socket), pid, said: Mutex::new(said), gone });
        tokio::spawn({
            let (client, dir) = (vm.client.clone(), dir.to_owned());
            async move {
                wait_for_end(&client, &dir).await;
                let _ = sender.send(true);
            }
        });
        Ok(vm)
    }

    /// Waits until the process is gone, and says how its run ended.
    pub async fn end(&self) -> vm::End {
        self.wait_until_gone().await;
        last_end(&self.dir).unwrap_or_else(killed)
    }

    async fn wait_until_gone(&self) {
        // The other end is dropped once it has said so.
        let _ = self.gone.clone().wait_for(|gone| *gone).await;
    }

    /// Waits for its end, but not longer than `most`; whether it is gone.
    pub async fn is_gone_within(&self, most: Duration) -> bool {
        timeout(most, self.wait_until_gone()).await.is_ok()
    }

    /// Asks it to do something.
    pub async fn act(&self, action: Action) -> Result<(), ErrorBody> {
        let act = Act { action };
        match timeout(ACTION, self.client.put::<vm::Process>("/1.0/state", &act)).await {
            Ok(Ok(said)) => {
                self.set_said(said);
                Ok(())
            }
            Ok(Err(error)) => Err(refused(error)),
            Err(_) => Err(ErrorBody::new(Reason::Unavailable, "the machine's process does not answer")),
        }
    }

    /// Has it keep another cap, where it does that itself.
    pub async fn set_cap(&self, percent: Option<u32>) -> Result<(), ErrorBody> {
        self.client.put::<vm::Process>("/1.0/cap", &Cap { percent }).await.map(drop).map_err(refused)
    }

    /// Has its guest make do with other memory, as far as it can have that before its next start.
    pub async fn set_memory(&self, bytes: u64) -> Result<(), ErrorBody> {
        match self.client.put::<vm::Process>("/1.0/memory", &SetMemory { bytes }).await {
            Ok(said) => {
                self.set_said(said);
                Ok(())
            }
            // A process that an older Purlin has started.
            Err(ClientError::Refused(ErrorBody { reason: Reason::NotFound, .. })) => Ok(()),
            Err(error) => Err(refused(error)),
        }
    }

    /// Its process's number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Has it take a snapshot.
    pub async fn take_snapshot(&self, wanted: &TakeSnapshot) -> Result<SnapshotTaken, ErrorBody> {
        self.client.post("/1.0/snapshot", wanted).await.map_err(refused)
    }

    /// Has it freeze for clones.
    pub async fn freeze(&self, wanted: &Freeze) -> Result<vm::Frozen, ErrorBody> {
        self.client.post("/1.0/freezes", wanted).await.map_err(refused)
    }

    /// Has it forget a freeze. If it is gone, that is forgotten too.
    pub async fn thaw(&self, freeze: &str) {
        let _ = self.client.delete::<()>(&format!("/1.0/freezes/{freeze}")).await;
    }

    /// Ends it without asking.
    pub fn kill(&self) {
        if let Some(pid) = Pid::from_raw(self.pid.cast_signed()) {
            // It may be gone already.
            let _ = kill_process(pid, Signal::KILL);
        }
    }

    /// What it is doing now, whenever it answers; `None` if it is gone.
    pub async fn ask(&self) -> Option<vm::Process> {
        loop {
            match self.client.get::<vm::Process>("/1.0").await {
                Ok(said) => {
                    self.set_said(said.clone());
                    return Some(said);
                }
                Err(_) if self.is_gone_within(LOOK).await => return None,
                Err(_) => {}
            }
        }
    }

    /// What it is doing now; where it does not answer soon, what it said last.
    pub async fn look(&self) -> vm::Process {
        if let Ok(Ok(said)) = timeout(ANSWER, self.client.get::<vm::Process>("/1.0")).await {
            self.set_said(said);
        }
        self.said()
    }

    /// What it said last, which is all of what does not change.
    pub fn said(&self) -> vm::Process {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_said(&self, said: vm::Process) {
        *self.said.lock().unwrap_or_else(PoisonError::into_inner) = said;
    }

    /// All that is known of it.
    pub async fn describe(&self) -> InstanceProcess {
        InstanceProcess { pid: self.pid, said: self.look().await, usage: usage(self.pid) }
    }

    /// The guest's console.
    pub async fn console(&self) -> Result<WebSocket, ErrorBody> {
        self.client.websocket("/1.0/console").await.map_err(|e| ErrorBody::new(Reason::Unavailable, e))
    }

    /// A connection to the agent in the guest.
    pub async fn agent(&self) -> Result<BufReader<UnixStream>, ErrorBody> {
        let connect = async {
            let stream = UnixStream::connect(Address::of(&self.dir.join(vm::VSOCK))?.path()).await?;
            let mut stream = BufReader::new(stream);
            stream.write_all(greeting().as_bytes()).await?;
            let mut line = String::new();
            (&mut stream).take(64).read_line(&mut line).await?;
            if line.starts_with("OK ") { Ok(stream) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
        };
        let connected: io::Result<_> = connect.await;
        connected.map_err(|e| ErrorBody::new(Reason::Unavailable, format!("the guest's agent: {e}")))
    }
}

fn refused(error: ClientError) -> ErrorBody {
    match error {
        ClientError::Refused(error) => error,
        error => ErrorBody::new(Reason::Unavailable, error),
    }
}

/// How the last run in `dir` ended, if there was one. No process runs there.
pub fn last_end(dir: &Path) -> Option<vm::End> {
    let said = read_some(&dir.join(vm::END)).ok().and_then(|text| serde_json::from_slice(&text).ok());
    if said.is_some() || !vm::spec_of(dir).exists() {
        return said;
    }
    // It has been started, and has not lived to say how it ended. From now on that is known.
    let end = killed();
    if let Ok(text) = serde_json::to_vec(&end) {
        let _ = fs::write(dir.join(vm::END), text);
    }
    Some(end)
}

/// The beginning of a file that a VM's process writes: it may be anything, of any length, and no link is followed.
pub fn read_some(path: &Path) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let mut text = Vec::new();
    file.take(MOST_READ).read_to_end(&mut text)?;
    Ok(text)
}

fn killed() -> vm::End {
    vm::End { time: now_ms(), crashed: true, message: "the machine's process was killed".into() }
}

/// Waits until no process has the lock in `dir` any more.
async fn wait_for_end(client: &Client, dir: &Path) {
    loop {
        // It answers when the run is over, or not at all where the process is killed.
        let _ = client.get::<vm::End>("/1.0/end").await;
        if !is_locked(dir).unwrap_or(false) {
            return;
        }
        sleep(LOOK).await;
    }
}

/// What a process uses, as proc(5) has it; nothing of one that is gone.
fn usage(pid: u32) -> Usage {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let (stat, statm) = (read("stat"), read("statm"));
    // The name in brackets may have anything in it.
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let ticks = |field: usize| fields.get(field).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    let pages = statm.split_whitespace().nth(1).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    let cpu_ms = (ticks(11) + ticks(12)) * 1000 / rustix::param::clock_ticks_per_second();
    Usage { cpu_ms, memory: pages * rustix::param::page_size() as u64, memory_limited: None }
}
