//! What the tests of the API share.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::{
    io::{Read, Write},
    net::Ipv4Addr,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::mpsc,
    thread::{self, JoinHandle},
    time::Duration,
};

use purlin_daemon::{Listen, Listening, Places, run};
use serde_json::Value;

/// Far more than anything here takes, also on a loaded host.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon in a thread of its own.
pub struct Daemon {
    pub socket: PathBuf,
    /// Where it listens on TCP.
    pub listening: Option<Listening>,
    thread: Option<JoinHandle<()>>,
    dir: tempfile::TempDir,
}

impl Daemon {
    pub fn start() -> Self {
        Self::start_with(None)
    }

    /// One that listens on TCP, too.
    pub fn start_on_tcp() -> Self {
        Self::start_with(Some(Listen { at: (Ipv4Addr::LOCALHOST, 0).into(), certificate: None }))
    }

    fn start_with(listen: Option<Listen>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let places = Places { socket: dir.path().join("run/daemon.sock"), data: dir.path().join("data") };
        let socket = places.socket.clone();
        let (ready, is_ready) = mpsc::channel();
        let thread =
            thread::spawn(move || run(&places, listen.as_ref(), |listening| ready.send(listening).unwrap()).unwrap());
        let listening = is_ready.recv().unwrap();
        Self { socket, listening, thread: Some(thread), dir }
    }

    /// Sends a request as it is written; the answer's status and body.
    pub fn send(&self, text: &[u8]) -> (u16, String) {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let (status, _, body) = exchange(stream, text);
        (status, body)
    }

    /// The daemon's data.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn request(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n");
        let head = format!("{head}content-type: application/json\r\ncontent-length: {length}\r\n\r\n");
        let (status, body) = self.send((head + body).as_bytes());
        (status, serde_json::from_str(&body).unwrap_or_else(|e| panic!("{method} {path}: {e}: {body:?}")))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if !thread::panicking() {
            assert_eq!(self.request("POST", "/1.0/shutdown", "").0, 200);
            self.thread.take().unwrap().join().unwrap();
            assert!(!self.socket.exists());
        }
    }
}

/// Sends a request as it is written; the answer's status, headers and body.
pub fn exchange(mut stream: impl Read + Write, text: &[u8]) -> (u16, String, String) {
    // Who is refused in mid-sentence need not have said all.
    let _ = stream.write_all(text).and_then(|()| stream.flush());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    (status.unwrap_or_else(|| panic!("no answer: {answer:?}")), head.to_lowercase(), body.to_owned())
}
