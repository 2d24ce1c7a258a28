//! The way to the agent: a machine's vsock socket, at which one asks for a port (`CONNECT 20565`).

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use super::{Client, ClientError};
use crate::PORT;

/// What is to be written to a machine's vsock socket first. The answer is `OK`, a number, and the line's end; if nobody
/// listens at the guest's port, the end of the stream.
pub fn greeting() -> String {
    format!("CONNECT {PORT}\n")
}

/// Bytes of the longest answer: `OK 4294967295\n`.
const ANSWER: usize = 14;

/// Connects to the agent of the machine whose vsock socket is at `socket`, within `patience`.
pub fn connect(socket: &Path, patience: Duration) -> Result<Client<UnixStream, UnixStream>, ClientError> {
    let failed = |source| ClientError::Connect { path: socket.to_owned(), source };
    let stream = UnixStream::connect(socket).map_err(failed)?;
    // Zero would be none.
    let patience = Some(patience.max(Duration::from_millis(1)));
    stream.set_read_timeout(patience).and_then(|()| stream.set_write_timeout(patience)).map_err(failed)?;
    greet(&stream).map_err(absent)?;
    let client = Client::over(stream).map_err(|error| match error {
        ClientError::Io(error) => absent(error),
        ClientError::Ended => ClientError::NoAgent,
        other => other,
    })?;
    let stream = &client.sender.writer;
    stream.set_read_timeout(None).and_then(|()| stream.set_write_timeout(None)).map_err(failed)?;
    Ok(client)
}

/// The same, but waits for an agent that is not up yet, for so long as `patience`.
pub fn connect_when_up(socket: &Path, patience: Duration) -> Result<Client<UnixStream, UnixStream>, ClientError> {
    let begin = Instant::now();
    loop {
        let left = patience.saturating_sub(begin.elapsed());
        match connect(socket, left) {
            Err(ClientError::NoAgent | ClientError::Ended) if !left.is_zero() => {
                thread::sleep(Duration::from_millis(50).min(left));
            }
            result => return result,
        }
    }
}

fn greet(mut stream: &UnixStream) -> io::Result<()> {
    stream.write_all(greeting().as_bytes())?;
    let mut answer = Vec::new();
    // One by one: what is behind the line is the agent's.
    while answer.last() != Some(&b'\n') && answer.len() < ANSWER {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        answer.extend(byte);
    }
    let good = answer.starts_with(b"OK ") && answer.ends_with(b"\n");
    if good { Ok(()) } else { Err(io::Error::new(io::ErrorKind::InvalidData, "it is no machine's vsock socket")) }
}

/// Silence, or an end, instead of an answer.
fn absent(error: io::Error) -> ClientError {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::WouldBlock | Kind::TimedOut | Kind::UnexpectedEof | Kind::ConnectionReset | Kind::BrokenPipe => {
            ClientError::NoAgent
        }
        _ => ClientError::Io(error),
    }
}
