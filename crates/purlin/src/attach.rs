//! `purlin console`: the serial port of a machine that is kept, on the terminal.

use std::{
    io::{self, Write},
    thread,
};

use anyhow::{Result, anyhow};
use clap::Args;
use futures_util::{SinkExt, StreamExt};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;

use crate::{
    client::Api,
    console::{Command, Escape, read_stdin},
    exit::Ended,
    terminal::{self, Raw},
};

/// Connect the terminal with a machine's serial port; Ctrl-A x leaves it
#[derive(Args)]
pub struct ConsoleArgs {
    /// The machine
    name: String,

    /// Print what it has written of late, and leave
    #[arg(long)]
    log: bool,
}

const HELP: &str = "Ctrl-A x leaves the console (the machine goes on), Ctrl-A h shows this, Ctrl-A Ctrl-A sends Ctrl-A";

/// What comes from the keyboard.
enum Typed {
    Bytes(Vec<u8>),
    Leave,
}

/// Connects it.
pub fn attach(args: &ConsoleArgs) -> Result<Ended> {
    let api = Api::reach()?;
    if args.log {
        let log = api.bytes(&format!("/1.0/instances/{}/log", args.name))?;
        let _ = io::stdout().write_all(&log);
        return Ok(Ended::Well);
    }
    let socket = api.websocket(&format!("/1.0/instances/{}/console", args.name))?;
    let interactive = terminal::is_interactive();
    let raw = interactive.then(Raw::enter).transpose().map_err(|e| anyhow!("cannot make the terminal raw: {e}"))?;
    if interactive {
        terminal::say(HELP);
    }
    let typed = read_keyboard(interactive);
    let left = api.block_on(pass(socket, typed));
    drop(raw);
    match left {
        true if interactive => terminal::say(&format!("left the console of '{}', which goes on", args.name)),
        true => {}
        false => terminal::say(&format!("'{}' has stopped", args.name)),
    }
    Ok(Ended::Well)
}

fn read_keyboard(interactive: bool) -> mpsc::Receiver<Typed> {
    let (sender, receiver) = mpsc::channel(64);
    thread::spawn(move || {
        let (mut buffer, mut escape) = ([0; 4096], Escape::default());
        while let Some(bytes) = read_stdin(&mut buffer) {
            let (bytes, commands) = if interactive { escape.filter(bytes) } else { (bytes.to_vec(), Vec::new()) };
            if !bytes.is_empty() && sender.blocking_send(Typed::Bytes(bytes)).is_err() {
                return;
            }
            for command in commands {
                match command {
                    Command::Quit => drop(sender.blocking_send(Typed::Leave)),
                    Command::Help | Command::GoOn => terminal::say(HELP),
                }
            }
        }
    });
    receiver
}

/// Both ways, until the user leaves (true) or the machine stops.
async fn pass(mut socket: purlin_api::client::WebSocket, mut typed: mpsc::Receiver<Typed>) -> bool {
    let mut keyboard = true;
    loop {
        tokio::select! {
            message = socket.next() => match message {
                Some(Ok(Message::Binary(bytes))) => {
                    let mut stdout = io::stdout().lock();
                    if stdout.write_all(&bytes).and_then(|()| stdout.flush()).is_err() {
                        return true;
                    }
                    terminal::guest_wrote(&bytes);
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => return false,
                Some(Ok(_)) => {}
            },
            typed = typed.recv(), if keyboard => match typed {
                Some(Typed::Bytes(bytes)) => {
                    if socket.send(Message::Binary(bytes.into())).await.is_err() {
                        return false;
                    }
                }
                Some(Typed::Leave) => return true,
                // A pipe has ended; what the guest writes goes on.
                None => keyboard = false,
            },
        }
    }
}
