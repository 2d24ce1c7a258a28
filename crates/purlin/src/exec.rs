//! `purlin exec` and `purlin shell`: commands in the guest of a machine.

use std::{
    env,
    ffi::OsString,
    io::{self, Write},
    os::unix::{ffi::OsStringExt, net::UnixStream},
    process,
    sync::{Arc, OnceLock},
    thread,
    time::Duration,
};

use anyhow::{Result, anyhow};
use clap::Args;
use purlin_agent::{
    client::{ClientError, Command, Event, Input, Output},
    protocol::{Exec, Tty},
};

use crate::{
    agent,
    console::read_stdin,
    exit::Ended,
    signals::{Signal, Signals},
    terminal::{self, Modes, Raw},
};

/// How long a guest that is still booting is waited for.
const PATIENCE: Duration = Duration::from_secs(120);

/// Run a command in a machine's guest; its exit status is this command's
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct ExecArgs {
    /// The machine
    name: String,

    /// The command and its arguments; options of purlin's come before it, or before --
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,

    #[command(flatten)]
    as_whom: AsWhom,

    /// Give the command a terminal though standard input is none
    #[arg(long, short, conflicts_with = "no_tty")]
    tty: bool,

    /// Give it none though standard input and output are one
    #[arg(long, short = 'T')]
    no_tty: bool,
}

/// Open a shell in a machine's guest
#[derive(Args)]
pub struct ShellArgs {
    /// The machine
    name: String,

    #[command(flatten)]
    as_whom: AsWhom,
}

/// As whom, and where.
#[derive(Args)]
struct AsWhom {
    /// The guest's user
    #[arg(long, short, value_name = "USER", default_value = "root")]
    user: String,

    /// The directory to work in [default: the user's home]
    #[arg(long, value_name = "DIR")]
    cwd: Option<OsString>,

    /// A variable of its environment
    #[arg(long, short, value_name = "NAME=VALUE")]
    env: Vec<OsString>,
}

/// A shell's status of a command that SIGPIPE has ended.
const BROKEN_PIPE: u8 = 128 + Signal::SIGPIPE as u8;

const EXAMPLES: &str = "\
Examples:
  purlin exec web -- apt-get install -y nginx
  purlin exec web --user www-data -- id
  tar c site | purlin exec web -- tar x -C /srv
  purlin exec web -- sh -c 'exit 3'; echo $?
  purlin exec web top

Exit status: the command's; 128+n if signal n ended it; 126 and 127 as in a shell, where the command
cannot be run. 1 with a line on standard error that begins with 'purlin:' says that the guest could not be asked.";

/// Runs a command.
pub fn exec(args: &ExecArgs, signals: Signals) -> Result<Ended> {
    let tty = args.tty || !args.no_tty && terminal::is_interactive() && terminal::is_shown();
    let argv = args.command.iter().map(|word| word.clone().into_vec()).collect();
    run(&args.name, Exec { argv, ..request(&args.as_whom, tty) }, signals)
}

/// Opens a shell.
pub fn shell(args: &ShellArgs, signals: Signals) -> Result<Ended> {
    run(&args.name, request(&args.as_whom, terminal::is_interactive()), signals)
}

fn request(whom: &AsWhom, tty: bool) -> Exec {
    let (columns, rows) = terminal::size().unwrap_or((80, 24));
    let term = env::var("TERM").unwrap_or_default();
    Exec {
        argv: Vec::new(),
        env: whom.env.iter().map(|variable| variable.clone().into_vec()).collect(),
        cwd: whom.cwd.clone().unwrap_or_default().into_vec(),
        user: whom.user.clone(),
        tty: tty.then(|| Tty { columns: columns.into(), rows: rows.into(), term }),
        with_stdin: true,
    }
}

fn run(name: &str, exec: Exec, signals: Signals) -> Result<Ended> {
    let raw = exec.tty.is_some() && terminal::is_interactive();
    let running = Arc::new(Running::default());
    pass_signals(&running, signals);
    let command = match agent::connect(name, PATIENCE)?.exec(exec) {
        Err(ClientError::Failed(failed)) => {
            terminal::say(&format!("{name}: {}", failed.message));
            return Ok(Ended::WithStatus(failed.exit_status()));
        }
        other => other?,
    };
    let raw = raw.then(Raw::enter).transpose().map_err(|e| anyhow!("cannot make the terminal raw: {e}"))?;
    let Command { input, output, .. } = command;
    let input = running.begin(input, raw.as_ref().map(Raw::modes));
    pass_input(input);
    let ended = show(output);
    drop(raw);
    ended
}

/// Shows what it writes until the command has ended, or nobody looks any more.
fn show(mut output: Output<UnixStream>) -> Result<Ended> {
    loop {
        let written = match output.next_event()? {
            Event::Stdout(bytes) => write_all(&mut io::stdout().lock(), &bytes),
            Event::Stderr(bytes) => write_all(&mut io::stderr().lock(), &bytes),
            Event::Exited(exited) => return Ok(Ended::WithStatus(exited.exit_status())),
        };
        match written {
            Ok(()) => {}
            // As of any command before a pipe whose reader has seen enough: a status, and not a word.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Ended::WithStatus(BROKEN_PIPE)),
            Err(error) => return Err(anyhow!("the command's output is lost: {error}")),
        }
    }
}

fn write_all(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes).and_then(|()| to.flush())
}

fn pass_input(input: Arc<Input<UnixStream>>) {
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Some(bytes) = read_stdin(&mut buffer) {
            if input.write(bytes).is_err() {
                return;
            }
        }
        let _ = input.end();
    });
}

/// The command, from when it runs on.
#[derive(Default)]
struct Running(OnceLock<(Arc<Input<UnixStream>>, Option<Modes>)>);

impl Running {
    /// It runs; `raw` are the modes of a terminal that it has.
    fn begin(&self, input: Input<UnixStream>, raw: Option<Modes>) -> Arc<Input<UnixStream>> {
        let input = Arc::new(input);
        let _ = self.0.set((input.clone(), raw));
        // The terminal may have become another one since its size was told.
        self.resize();
        input
    }

    /// Tells the terminal's size, where there is one. A command that is gone says so by its end; so it is below.
    fn resize(&self) {
        if let Some((input, Some(_))) = self.0.get()
            && let Some((columns, rows)) = terminal::size()
        {
            let _ = input.resize(columns.into(), rows.into());
        }
    }
}

/// The command gets the signals, and with a terminal, what that says of its size. Before there is a command they end this.
fn pass_signals(running: &Arc<Running>, signals: Signals) {
    let (to_end, to_continue, to_resize) = (running.clone(), running.clone(), running.clone());
    let on_end = move |signal: Signal| match to_end.0.get() {
        Some((input, _)) => drop(input.signal(signal as i32)),
        None => process::exit(128 + signal as i32),
    };
    let on_continue = move || to_continue.0.get().iter().for_each(|(_, raw)| raw.iter().for_each(Modes::again));
    signals.watch(on_end, on_continue, move || to_resize.resize());
}
