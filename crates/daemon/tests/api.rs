//! The API without any machine: descriptions, refusals, and clients that behave badly.

mod support;

use std::{fs, io::Write, os::unix::net::UnixStream, path::Path};

use purlin_daemon::api;
use serde_json::json;
use support::Daemon;

/// The descriptions that are committed are those of the programs: `UPDATE=1 cargo test -p purlin-daemon --test api` writes
/// them.
#[test]
fn the_committed_descriptions_are_true() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    for (file, description) in
        [("openapi.json", api::description()), ("openapi-vmm.json", purlin_vmm::process::description())]
    {
        let path = docs.join(file);
        let text = format!("{description:#}\n");
        if std::env::var_os("UPDATE").is_some() {
            fs::write(&path, &text).unwrap();
        }
        let committed = fs::read_to_string(&path).unwrap_or_default();
        assert!(committed == text, "{} is not what the program says: run this test with UPDATE=1", path.display());
    }
}

#[test]
fn parameters_are_described_where_they_are() {
    let description = api::description();
    for (path, item) in description["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                let is_in_path = path.contains(&format!("{{{}}}", parameter["name"].as_str().unwrap()));
                assert_eq!(parameter["in"], if is_in_path { "path" } else { "query" }, "{method} {path}: {parameter}");
            }
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused_in_words() {
    let daemon = Daemon::start();
    assert_eq!(daemon.request("GET", "/1.0/instances", ""), (200, json!([])));
    let long = "x".repeat(5 << 20);
    for (method, path, body, status, reason) in [
        ("GET", "/", "", 404, "not-found"),
        ("GET", "/1.0/instances/nope", "", 404, "not-found"),
        ("GET", "/1.0/instances/%00", "", 404, "not-found"),
        ("GET", "/1.0/instances/..%2f..", "", 404, "not-found"),
        ("GET", "/1.0/instances/%ff", "", 400, "bad-request"),
        ("GET", "/1.0/operations/x", "", 404, "not-found"),
        ("GET", "/1.0/operations/x/wait?timeout=-1", "", 400, "bad-request"),
        ("GET", "/1.0/operations/x/wait?beyond=9223372036854775808", "", 400, "bad-request"),
        ("GET", "/1.0/events", "", 400, "bad-request"),
        ("GET", "/1.0/events?from=x", "", 400, "bad-request"),
        ("PUT", "/1.0/instances", "", 405, "method-not-allowed"),
        ("POST", "/1.0/instances", "", 400, "bad-request"),
        ("POST", "/1.0/instances", "{}", 400, "bad-request"),
        ("POST", "/1.0/instances", "[1", 400, "bad-request"),
        ("POST", "/1.0/instances", r#"{"name": "a", "image": "nope"}"#, 404, "not-found"),
        ("POST", "/1.0/instances", r#"{"name": "A", "image": "debian"}"#, 400, "bad-request"),
        ("POST", "/1.0/instances", r#"{"name": "a", "image": "debian", "color": 1}"#, 400, "bad-request"),
        ("POST", "/1.0/instances", r#"{"name": "a", "image": "debian", "machine": {"cpus": 0}}"#, 400, "bad-request"),
        ("POST", "/1.0/instances", r#"{"name": "a", "image": "debian", "user_data": "x"}"#, 400, "bad-request"),
        ("POST", "/1.0/instances", &long, 413, "too-large"),
        ("PUT", "/1.0/instances/nope/state", r#"{"action": "start"}"#, 404, "not-found"),
        ("PUT", "/1.0/instances/nope/state", r#"{"action": "fly"}"#, 400, "bad-request"),
        ("DELETE", "/1.0/instances/nope?force=maybe", "", 400, "bad-request"),
        ("PATCH", "/1.0/instances/nope", "[]", 400, "bad-request"),
    ] {
        let (got, answer) = daemon.request(method, path, body);
        assert_eq!((got, &answer["reason"]), (status, &json!(reason)), "{method} {path}: {answer}");
        let message = answer["message"].as_str().unwrap();
        assert!(!message.is_empty() && !message.contains('\n'), "{message}");
    }
    assert_eq!(daemon.request("GET", "/1.0/instances", ""), (200, json!([])));
}

#[test]
fn clients_that_behave_badly_keep_nobody_from_it() {
    let daemon = Daemon::start();
    assert_eq!(daemon.send(b"nonsense\r\n\r\n").0, 400);
    // Slow ones, and many: they have said nothing yet, or half a request.
    let idle: Vec<_> = (0..400).map(|_| UnixStream::connect(&daemon.socket).unwrap()).collect();
    for mut stream in &idle {
        stream.write_all(b"GET /1.0 HTT").unwrap();
    }
    for _ in 0..20 {
        assert_eq!(daemon.request("GET", "/1.0", "").0, 200);
    }
    drop(idle);
    let silent: Vec<_> = (0..500).map(|_| UnixStream::connect(&daemon.socket).unwrap()).collect();
    assert_eq!(daemon.request("GET", "/1.0", "").0, 200);
    // More than there is room for: who comes then waits until others have gone.
    let more: Vec<_> = (0..200).map(|_| UnixStream::connect(&daemon.socket).unwrap()).collect();
    drop(silent);
    drop(more);
    assert_eq!(daemon.request("GET", "/1.0", "").0, 200);
}

#[test]
fn a_body_that_does_not_come_is_not_waited_for_for_long() {
    let daemon = Daemon::start();
    let head =
        "POST /1.0/instances HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n";
    let (status, body) = daemon.send(format!("{head}{{\"name\": ").as_bytes());
    assert_eq!(status, 408);
    assert!(body.contains("too-slow"), "{body}");
}
