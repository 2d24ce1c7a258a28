//! Images at the API: sent, fetched, looked at and deleted, and never there by half.

mod support;

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::Instant,
};

use serde_json::{Value, json};
use support::{Daemon, PATIENCE, exchange};

/// A raw disk of 1 MiB.
fn disk() -> Vec<u8> {
    (0..1_u32 << 20).map(|i| if i < 4096 { (i % 251) as u8 } else { 0 }).collect()
}

fn head(path: &str, length: impl std::fmt::Display) -> String {
    let head = format!("PUT {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n");
    format!("{head}content-type: application/octet-stream\r\ncontent-length: {length}\r\n\r\n")
}

fn put(daemon: &Daemon, path: &str, body: &[u8]) -> (u16, Value) {
    let (status, answer) = daemon.send(&[head(path, body.len()).as_bytes(), body].concat());
    (status, serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{path}: {e}: {answer:?}")))
}

/// An operation, once it is over.
fn ended(daemon: &Daemon, (status, begun): (u16, Value)) -> Value {
    assert_eq!(status, 202, "{begun}");
    daemon.request("GET", &format!("/1.0/operations/{}/wait?timeout=60", begun["id"].as_str().unwrap()), "").1
}

fn files(dir: &Path) -> Vec<String> {
    let files = fs::read_dir(dir).into_iter().flatten();
    files.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[track_caller]
fn nothing_is_left(daemon: &Daemon) {
    let begin = Instant::now();
    while !files(&daemon.data().join("images")).is_empty() {
        assert!(begin.elapsed() < PATIENCE, "{:?}", files(&daemon.data().join("images")));
        thread::yield_now();
    }
    assert_eq!(daemon.request("GET", "/1.0/images", "").1, json!({"images": [], "damaged": []}));
}

#[test]
fn an_image_is_sent_looked_at_and_deleted() {
    let daemon = Daemon::start();
    nothing_is_left(&daemon);
    let done = ended(&daemon, put(&daemon, "/1.0/images/a?source=disk.img", &disk()));
    assert_eq!((&done["state"], &done["what"]), (&json!("done"), &json!("import image a")), "{done}");
    let (status, image) = daemon.request("GET", "/1.0/images/a", "");
    assert_eq!((status, &image["virtual_size"], &image["format"]), (200, &json!(1 << 20), &json!("qcow2")));
    assert_eq!(image["origin"], json!({"imported": "disk.img"}));
    assert_eq!(daemon.request("GET", "/1.0/images", "").1["images"], json!([image]));
    let path = Path::new(image["disk"].as_str().unwrap());
    let mut content = vec![0; 1 << 20];
    purlin_vmm::storage::open_read_only(path, None).unwrap().read_at(&mut content, 0).unwrap();
    assert!(content == disk(), "it is another disk");

    // The name is taken, which is told before anything is sent.
    let (status, _, answer) =
        exchange(UnixStream::connect(&daemon.socket).unwrap(), head("/1.0/images/a", 9).as_bytes());
    assert_eq!((status, answer.contains("'a' already")), (409, true), "{answer}");
    let import = json!({"from": "url", "name": "a", "url": "http://127.0.0.1:1/a"}).to_string();
    assert_eq!(daemon.request("POST", "/1.0/images", &import).0, 409);

    assert_eq!(ended(&daemon, daemon.request("DELETE", "/1.0/images/a", ""))["state"], "done");
    nothing_is_left(&daemon);
    assert_eq!(daemon.request("DELETE", "/1.0/images/a", "").0, 404);
    assert_eq!(daemon.request("GET", "/1.0/images/a", "").0, 404);
}

#[test]
fn an_image_is_fetched() {
    let daemon = Daemon::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/disk.img", listener.local_addr().unwrap());
    thread::spawn(move || {
        for length in [disk().len(), disk().len() + 1] {
            let (mut stream, _) = listener.accept().unwrap();
            let request = BufReader::new(stream.try_clone().unwrap());
            let _: Vec<_> = request.lines().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
            write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n").unwrap();
            stream.write_all(&disk()).unwrap();
        }
    });
    let import = |name: &str| {
        let new = json!({"from": "url", "name": name, "url": url, "format": "raw"}).to_string();
        ended(&daemon, daemon.request("POST", "/1.0/images", &new))
    };
    assert_eq!(import("a")["state"], "done");
    // It ends too early.
    let failed = import("b");
    assert_eq!(failed["error"]["reason"], "failed", "{failed}");
    let listed = daemon.request("GET", "/1.0/images", "").1;
    assert_eq!((listed["images"].as_array().unwrap().len(), &listed["images"][0]["name"]), (1, &json!("a")));
    assert_eq!(files(&daemon.data().join("images")), ["a"]);
}

#[test]
fn what_makes_no_sense_is_refused_and_leaves_nothing() {
    let daemon = Daemon::start();
    let zeroes = "0".repeat(64);
    for (path, status) in [
        ("/1.0/images/A", 400),
        ("/1.0/images/..%2fx", 400),
        ("/1.0/images/x.lock", 400),
        ("/1.0/images/a?format=iso", 400),
        ("/1.0/images/a?sha256=1", 400),
        ("/1.0/images/a?source=%0a", 400),
        ("/1.0/images/a?color=1", 400),
    ] {
        let (got, answer) = put(&daemon, path, b"x");
        assert_eq!(got, status, "{path}: {answer}");
    }
    assert_eq!(put(&daemon, "/1.0/images/a", b"").0, 400);
    for (new, status) in [
        (json!({"from": "url", "name": "a", "url": "/etc/passwd"}), 400),
        (json!({"from": "url", "name": "a", "url": "ftp://x/y"}), 400),
        (json!({"from": "url", "name": "A", "url": "http://x/y"}), 400),
        (json!({"from": "url", "name": "a", "url": "http://x/y", "sha256": "1"}), 400),
        (json!({"from": "url", "name": "a", "url": "http://x/y", "sha256": "^\u{6b90f}"}), 400),
        (json!({"from": "build", "what": "windows"}), 400),
        (json!({"from": "build", "what": "debian", "name": "A"}), 400),
        (json!({"from": "nowhere"}), 400),
    ] {
        assert_eq!(daemon.request("POST", "/1.0/images", &new.to_string()).0, status, "{new}");
    }
    let (status, answer) = daemon.send(head("/1.0/images/a", 2_u64 << 40).as_bytes());
    assert_eq!((status, answer.contains("1024 GiB")), (413, true), "{answer}");
    // No disk, another checksum, and another format than it is called.
    for (path, body, told) in [
        ("/1.0/images/a", &b"QFI\xfb"[..], "qcow2"),
        (&format!("/1.0/images/a?sha256={zeroes}"), &disk(), "checksum"),
        ("/1.0/images/a?source=x.qcow2", &disk(), "its name says qcow2"),
        ("/1.0/images/a?format=vdi", &disk(), ""),
    ] {
        let failed = ended(&daemon, put(&daemon, path, body));
        assert_eq!(failed["state"], "failed", "{path}");
        let message = failed["error"]["message"].as_str().unwrap();
        assert!(message.contains(told), "{path}: {message}");
        nothing_is_left(&daemon);
    }
}

#[test]
fn an_image_whose_sender_goes_away_is_forgotten() {
    let daemon = Daemon::start();
    let length = disk().len();
    let mut stream = UnixStream::connect(&daemon.socket).unwrap();
    stream.write_all(head("/1.0/images/a", length).as_bytes()).unwrap();
    stream.write_all(&disk()[..length / 2]).unwrap();
    let begin = Instant::now();
    while files(&daemon.data().join("images")).is_empty() {
        assert!(begin.elapsed() < PATIENCE, "nothing begins");
        thread::yield_now();
    }
    drop(stream);
    nothing_is_left(&daemon);
    let operations = daemon.request("GET", "/1.0/operations", "").1;
    let begin = Instant::now();
    while daemon.request("GET", "/1.0/operations", "").1[0]["state"] != "failed" {
        assert!(begin.elapsed() < PATIENCE, "{operations}");
    }
}
