//! `purlin daemon`: the manager of machines that are kept; and how other verbs find it.

use std::{
    env,
    fs::File,
    io::{self, BufRead, BufReader, Write},
    net::SocketAddr,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Subcommand};
use purlin_api::ServerInfo;
use purlin_daemon::{Listen, Listening, Places};
use purlin_debian::home;

use crate::{client::Api, exit::Ended, signals::Signals, terminal};

/// Manage machines that are kept; other verbs start it when they need it
#[derive(Args)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct DaemonArgs {
    #[command(subcommand)]
    what: Option<Do>,

    /// Listen on the network, too: by TLS, for whoever has a token ('purlin token')
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,

    /// The certificate to have there, in PEM [default: one that the daemon makes, and keeps]
    #[arg(long, value_name = "FILE", requires_all = ["listen", "tls_key"])]
    tls_cert: Option<PathBuf>,

    /// Its key, in PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// Leave the terminal and session of whoever starts it
    #[arg(long, hide = true)]
    detached: bool,
}

#[derive(Subcommand)]
enum Do {
    /// End it; machines go on, and the next daemon finds them
    Stop,
    /// Say whether it runs, and where
    Status,
}

const EXAMPLES: &str = "\
Examples:
  purlin daemon           runs it here, until Ctrl-C
  purlin daemon status
  purlin daemon stop      ends it, and no machine
  purlin daemon --listen 0.0.0.0:8443
  purlin daemon --listen '[::]:8443' --tls-cert server.crt --tls-key server.key

Its API is at the socket that 'purlin daemon status' names; GET /1.0/openapi.json describes it.";

/// Runs the daemon, or asks for it.
pub fn daemon(args: &DaemonArgs, signals: Signals) -> Result<Ended> {
    match args.what {
        None => run(args, signals),
        Some(Do::Status) => status(),
        Some(Do::Stop) => stop(),
    }
}

/// Where the user's daemon is.
pub fn places() -> Result<Places> {
    Ok(Places { socket: home::run()?.join("daemon.sock"), data: home::data()? })
}

fn run(args: &DaemonArgs, signals: Signals) -> Result<Ended> {
    let certificate = args.tls_cert.clone().zip(args.tls_key.clone());
    let listen = args.listen.map(|at| Listen { at, certificate });
    if args.detached {
        rustix::process::setsid().context("cannot leave the session")?;
        env::set_current_dir("/").context("cannot enter /")?;
    }
    signals.unblock();
    let places = places()?;
    let socket = places.socket.display().to_string();
    let ready = |listening: Option<Listening>| {
        // Who started it may have gone away.
        let _ = writeln!(io::stdout(), "the daemon answers at {socket}");
        if let Some(Listening { at, fingerprint }) = listening {
            let _ = writeln!(io::stdout(), "and at https://{at}; its certificate is {fingerprint}");
        }
    };
    match purlin_daemon::run(&places, listen.as_ref(), ready) {
        Ok(()) => Ok(Ended::Well),
        Err(error) => Err(error.into()),
    }
}

fn status() -> Result<Ended> {
    let places = places()?;
    match Api::of_running(&places)?.try_get::<ServerInfo>("/1.0")? {
        Some(info) => {
            let (pid, socket) = (info.pid, places.socket.display());
            terminal::print(&format!("running: version {}, process {pid}, at {socket}", info.version));
            if let Some((at, fingerprint)) = info.listens_at.zip(info.fingerprint) {
                terminal::print(&format!("and at https://{at}; its certificate is {fingerprint}"));
            }
            Ok(Ended::Well)
        }
        None => Err(anyhow!("no daemon runs; the next verb that needs it starts it, or 'purlin daemon' does")),
    }
}

fn stop() -> Result<Ended> {
    let places = places()?;
    let api = Api::of_running(&places)?;
    if api.try_get::<ServerInfo>("/1.0")?.is_none() {
        terminal::say("no daemon runs");
        return Ok(Ended::Well);
    }
    let _: ServerInfo = api.post("/1.0/shutdown", &())?;
    api.wait_until_gone(&places)?;
    Ok(Ended::Well)
}

/// Starts a daemon that outlives this process, and returns when it answers.
pub fn start(places: &Places) -> Result<()> {
    let log_path = places.data.join("daemon.log");
    std::fs::create_dir_all(&places.data).with_context(|| format!("cannot create {}", places.data.display()))?;
    let log = File::options().create(true).append(true).open(&log_path);
    let log = log.map_err(|e| anyhow!("cannot write {}: {e}", log_path.display()))?;
    let mut child = Command::new(env::current_exe().context("cannot find this program")?)
        .args(["daemon", "--detached"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("cannot start the daemon")?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line).context("cannot hear from the daemon")?;
    }
    if line.is_empty() {
        let status = child.wait().context("cannot wait for the daemon")?;
        // Another one that was started at the same time is as good.
        if Api::of_running(places)?.try_get::<ServerInfo>("/1.0")?.is_none() {
            bail!("the daemon ended at once ({status}): {} says why", log_path.display());
        }
    }
    Ok(())
}
