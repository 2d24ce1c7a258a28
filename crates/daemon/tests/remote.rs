//! The API on TCP: who is let in, and how long those may stay who are not.

mod support;

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    sync::Arc,
    thread,
};

use futures_util::StreamExt;
use purlin_api::{
    Reason, ServerInfo, Token,
    client::{Client, ClientError, Remote},
};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    crypto::ring,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use serde_json::{Value, json};
use support::{Daemon, PATIENCE, exchange};

/// What the tests ask of a daemon on TCP.
struct Tcp<'a> {
    daemon: &'a Daemon,
    token: String,
    /// Trusts its certificate as other programs do, by the file.
    tls: Arc<ClientConfig>,
}

impl<'a> Tcp<'a> {
    fn of(daemon: &'a Daemon) -> Self {
        let (status, created) = daemon.request("POST", "/1.0/tokens", r#"{"name": "test"}"#);
        assert_eq!(status, 201, "{created}");
        let certificate = fs::read(daemon.data().join("tls.crt")).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&certificate).unwrap()).unwrap();
        let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Self { daemon, token: created["token"].as_str().unwrap().to_owned(), tls: Arc::new(tls) }
    }

    /// A connection without TLS.
    fn plain(&self) -> TcpStream {
        let stream = TcpStream::connect(self.daemon.listening.unwrap().at).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn connect(&self) -> StreamOwned<ClientConnection, TcpStream> {
        let name = ServerName::try_from("localhost").unwrap();
        StreamOwned::new(ClientConnection::new(self.tls.clone(), name).unwrap(), self.plain())
    }

    /// A request with these headers, each with its end of line; the answer's status, headers and body.
    fn ask(&self, method: &str, path: &str, headers: &[u8], body: &[u8]) -> (u16, String, Value) {
        let head =
            format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
        let request = [head.as_bytes(), headers, b"content-type: application/json\r\n\r\n", body].concat();
        let (status, head, body) = exchange(self.connect(), &request);
        (status, head, serde_json::from_str(&body).unwrap_or_else(|e| panic!("{method} {path}: {e}: {body:?}")))
    }

    fn authorization(&self) -> Vec<u8> {
        format!("authorization: Bearer {}\r\n", self.token).into_bytes()
    }

    /// Somebody who behaves is served.
    fn assert_serves(&self) {
        let (status, _, answer) = self.ask("GET", "/1.0", &self.authorization(), b"");
        assert_eq!((status, &answer["api_version"]), (200, &json!("1.0")));
    }

    /// The client that the command has.
    fn client(&self) -> Client {
        let listening = self.daemon.listening.unwrap();
        let url = format!("https://{}", listening.at);
        Client::of_remote(Remote::new(&url, &self.token, Some(listening.fingerprint)).unwrap())
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

#[track_caller]
fn assert_unauthorized((status, head, answer): (u16, String, Value)) {
    assert_eq!((status, &answer["reason"]), (401, &json!("unauthorized")), "{answer}");
    assert!(head.contains("\r\nwww-authenticate: bearer"), "{head}");
    let message = answer["message"].as_str().unwrap();
    assert!(!message.is_empty() && !message.contains('\n'), "{message}");
}

#[test]
fn who_has_a_token_is_served_until_it_is_deleted() {
    let daemon = Daemon::start_on_tcp();
    let tcp = Tcp::of(&daemon);
    let listed = daemon.request("GET", "/1.0/tokens", "").1;
    assert_eq!(listed[0]["name"], "test");
    assert!(!listed.to_string().contains(&tcp.token), "a token is shown once");
    block_on(async {
        let client = tcp.client();
        let info: ServerInfo = client.get("/1.0").await.unwrap();
        let listening = daemon.listening.unwrap();
        assert_eq!(info.listens_at, Some(listening.at.to_string()));
        assert_eq!(info.fingerprint, Some(listening.fingerprint.to_string()));
        // A websocket, which is nothing of the HTTP server's any more, ends with the token, too.
        let mut events = client.websocket("/1.0/events").await.unwrap();
        assert_eq!(daemon.request("DELETE", "/1.0/tokens/test", ""), (200, json!([])));
        let ended = tokio::time::timeout(PATIENCE, events.next()).await.expect("it goes on");
        assert!(matches!(ended, None | Some(Err(_))), "{ended:?}");
        let refused = client.get::<ServerInfo>("/1.0").await.unwrap_err();
        assert_eq!(refused.refused().unwrap().reason, Reason::Unauthorized);
        // So it does at a websocket's path, and where there is nothing.
        let refused = client.websocket("/1.0/events").await.err().expect("it is refused");
        assert_eq!(refused.refused().unwrap().reason, Reason::Unauthorized);
        let nothing = client.get::<ServerInfo>("/nothing").await.unwrap_err();
        assert_eq!(nothing.refused().unwrap().reason, Reason::Unauthorized);
    });
}

#[test]
fn a_daemon_with_another_certificate_is_told_nothing() {
    let (daemon, other) = (Daemon::start_on_tcp(), Daemon::start_on_tcp());
    let url = format!("https://{}", daemon.listening.unwrap().at);
    let seen = daemon.listening.unwrap().fingerprint;
    let expected = other.listening.unwrap().fingerprint;
    assert_ne!(seen, expected);
    block_on(async {
        for expected in [None, Some(expected)] {
            let remote = Remote::new(&url, "token", expected).unwrap();
            assert_eq!(remote.look().await.unwrap(), seen);
            let error = Client::of_remote(remote).get::<ServerInfo>("/1.0").await.unwrap_err();
            assert!(matches!(error, ClientError::Untrusted { seen: found, .. } if found == seen), "{error}");
        }
    });
}

#[test]
fn tokens_are_not_managed_over_the_network() {
    let daemon = Daemon::start_on_tcp();
    let tcp = Tcp::of(&daemon);
    for (method, path) in [("GET", "/1.0/tokens"), ("POST", "/1.0/tokens"), ("DELETE", "/1.0/tokens/test")] {
        let (status, _, answer) = tcp.ask(method, path, &tcp.authorization(), br#"{"name": "more"}"#);
        assert_eq!((status, &answer["reason"]), (403, &json!("forbidden")), "{method} {path}: {answer}");
    }
    let listed: Vec<Token> = serde_json::from_value(daemon.request("GET", "/1.0/tokens", "").1).unwrap();
    assert_eq!(listed.len(), 1);
    for (body, status) in [(r#"{"name": "test"}"#, 409), (r#"{"name": "T"}"#, 400), ("{}", 400)] {
        assert_eq!(daemon.request("POST", "/1.0/tokens", body).0, status, "{body}");
    }
    assert_eq!(daemon.request("DELETE", "/1.0/tokens/nope", "").0, 404);
}

#[test]
fn what_is_no_token_is_refused() {
    let daemon = Daemon::start_on_tcp();
    let tcp = Tcp::of(&daemon);
    let (token, long) = (tcp.token.as_bytes(), b"x".repeat(20_000));
    let header = |value: &[u8]| [b"authorization: ", value, b"\r\n"].concat();
    for headers in [
        Vec::new(),
        header(b""),
        header(b"Bearer"),
        header(b"Bearer "),
        header(token),
        header(&[b"Basic ", token].concat()),
        header(&[b"Bearer ", &token[1..]].concat()),
        header(&[b"Bearer ", token, b"0"].concat()),
        header(&[b"Bearer ", token, b" ", token].concat()),
        header(&[b"Bearer ", &*long].concat()),
        header("Bearer purlin_ä".as_bytes()),
        header(b"Bearer \xff\xfe"),
        [tcp.authorization(), tcp.authorization()].concat(),
    ] {
        assert_unauthorized(tcp.ask("GET", "/1.0/instances", &headers, b""));
    }
    // What is no request either.
    let nul = [b"GET /1.0 HTTP/1.1\r\nauthorization: Bearer \0\r\n\r\n".as_slice()].concat();
    assert_eq!(exchange(tcp.connect(), &nul).0, 400);
    let endless = [b"GET /1.0 HTTP/1.1\r\nx: ".as_slice(), &b"x".repeat(200_000)].concat();
    assert_eq!(exchange(tcp.connect(), &endless).0, 431);
    assert_eq!(tcp.ask("POST", "/1.0/instances", &tcp.authorization(), &b"x".repeat(5 << 20)).0, 413);
    tcp.assert_serves();
}

#[test]
fn wrong_tokens_delay_nobody_else() {
    let daemon = Daemon::start_on_tcp();
    let tcp = Tcp::of(&daemon);
    let wrong = format!("authorization: Bearer purlin_{}\r\n", "0".repeat(64)).into_bytes();
    let (tcp, wrong) = (&tcp, &wrong);
    thread::scope(|scope| {
        let guesses: Vec<_> = (0..30).map(|_| scope.spawn(move || tcp.ask("GET", "/1.0", wrong, b""))).collect();
        for _ in 0..5 {
            tcp.assert_serves();
        }
        guesses.into_iter().for_each(|guess| assert_unauthorized(guess.join().unwrap()));
    });
}

#[test]
fn who_does_not_speak_tls_is_told_so() {
    let daemon = Daemon::start_on_tcp();
    let tcp = Tcp::of(&daemon);
    for said in [&b"GET /1.0 HTTP/1.1\r\nhost: x\r\n\r\n"[..], b"nonsense\n", b"\0"] {
        let (status, _, body) = exchange(tcp.plain(), said);
        let answer: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &answer["reason"]), (400, &json!("bad-request")));
        assert!(answer["message"].as_str().unwrap().contains("https"), "{answer}");
    }
    // It begins as TLS does.
    let mut stream = tcp.plain();
    stream.write_all(b"\x16\x03\x01\x00\x05nonsense").unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    tcp.assert_serves();
}

/// Each of them is sent away in the end, and none keeps somebody else waiting until then.
#[test]
fn who_does_not_come_to_the_point_is_sent_away() {
    let daemon = Daemon::start_on_tcp();
    let tcp = Tcp::of(&daemon);
    let silent = tcp.plain();
    let mut amid_handshake = tcp.plain();
    let mut hello = Vec::new();
    let name = ServerName::try_from("localhost").unwrap();
    ClientConnection::new(tcp.tls.clone(), name).unwrap().write_tls(&mut hello).unwrap();
    amid_handshake.write_all(&hello[..hello.len() / 2]).unwrap();
    let mut after_handshake = tcp.connect();
    after_handshake.flush().unwrap();
    let mut amid_header = tcp.connect();
    amid_header.write_all(b"GET /1.0 HTTP/1.1\r\nx: ").unwrap();
    thread::scope(|scope| {
        // A header that never ends, a byte at a time.
        scope.spawn(|| {
            let mut endless = tcp.connect();
            endless.write_all(b"GET /1.0 HTTP/1.1\r\n").unwrap();
            while endless.write_all(b"x: y\r\n").and_then(|()| endless.flush()).is_ok() {
                thread::sleep(std::time::Duration::from_millis(200));
            }
        });
        tcp.assert_serves();
        for mut stream in [&silent, &amid_handshake, &after_handshake.sock, &amid_header.sock] {
            // Whatever else it is told, there is an end.
            let mut buffer = [0; 4096];
            while let Ok(1..) = stream.read(&mut buffer).inspect_err(|e| {
                assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset, "it goes on");
            }) {}
        }
    });
    tcp.assert_serves();
}

#[test]
fn five_hundred_who_say_nothing_keep_nobody_from_it() {
    let daemon = Daemon::start_on_tcp();
    let tcp = Tcp::of(&daemon);
    let mut silent: Vec<_> = (0..500).map(|_| tcp.plain()).collect();
    for _ in 0..10 {
        tcp.assert_serves();
    }
    // There is no room for all of them: who came first has gone.
    assert_eq!(silent[0].read(&mut [0]).unwrap(), 0);
    // Others have shown their token, and have a websocket each.
    block_on(async {
        let client = tcp.client();
        let mut events = Vec::new();
        for _ in 0..50 {
            events.push(client.websocket("/1.0/events").await.unwrap());
        }
    });
    silent.iter().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    tcp.assert_serves();
}
