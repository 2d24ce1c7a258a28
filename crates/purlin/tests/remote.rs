//! A daemon on another host, as verbs reach it: by TLS, with a token, and only where its certificate is known.

mod support;

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::{Home, Killed, assert_one_line, purlin, stderr, terminal::OnTerminal, wait};

/// Far more than anything here takes, also on a loaded host.
const PATIENCE: Duration = Duration::from_secs(60);

/// A home whose daemon listens on TCP, and another one that has nothing but a token of it.
struct Hosts {
    there: Home,
    daemon: Killed,
    here: tempfile::TempDir,
    url: String,
    fingerprint: String,
    token: String,
}

impl Hosts {
    fn new() -> Self {
        let there = Home::new();
        let (daemon, lines) = start(&there, &[]);
        let said = lines[1].strip_prefix("and at ").unwrap();
        let (url, fingerprint) = said.split_once("; its certificate is ").unwrap();
        let token = there.run("token create laptop");
        assert_one_line(&token, 0, &["listens at 127.0.0.1:", fingerprint]);
        let token = String::from_utf8(token.stdout).unwrap().trim().to_owned();
        let (url, fingerprint) = (url.to_owned(), fingerprint.to_owned());
        Self { there, daemon, here: tempfile::tempdir().unwrap(), url, fingerprint, token }
    }

    /// The program here, which knows the daemon there.
    fn purlin(&self) -> Command {
        let mut command = self.stranger();
        command.env("PURLIN_FINGERPRINT", &self.fingerprint);
        command
    }

    /// The program here, which does not know its certificate.
    fn stranger(&self) -> Command {
        let mut command = purlin();
        command.env("PURLIN_HOME", self.here.path()).env("PURLIN_HOST", &self.url).env("PURLIN_TOKEN", &self.token);
        command.stdin(Stdio::null());
        command
    }

    #[track_caller]
    fn ok(&self, words: &str) -> String {
        let output = self.purlin().args(words.split_whitespace()).output().unwrap();
        assert!(output.status.success(), "{words}: {:#?}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }
}

/// A daemon that listens at a port that is free; what it says.
fn start(home: &Home, arguments: &[&str]) -> (Killed, [String; 2]) {
    let mut command = home.purlin();
    command.args(["daemon", "--listen", "127.0.0.1:0"]).args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut daemon = Killed(command.spawn().unwrap());
    let mut lines = BufReader::new(daemon.0.stdout.take().unwrap()).lines();
    let said = [(); 2].map(|()| lines.next().expect("it ends").unwrap());
    (daemon, said)
}

#[test]
fn a_machine_on_another_host() {
    let hosts = Hosts::new();
    hosts.ok("launch tiny a --device debug-exit --engine translator --memory 64M");
    let listed: Value = serde_json::from_str(&hosts.ok("list --json")).unwrap();
    assert_eq!((&listed[0]["name"], &listed[0]["status"]), (&"a".into(), &"running".into()));
    let there: Value = serde_json::from_str(&hosts.there.ok("info a --json")).unwrap();
    assert_eq!(listed[0]["id"], there["id"]);
    // As an option, and not in the environment.
    let output = hosts.purlin().env_remove("PURLIN_HOST").args(["--host", &hosts.url, "info", "a"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("running"), "{output:?}");

    // Websockets: what is typed at the console reaches the guest, and events arrive.
    let mut console = hosts.purlin();
    let mut console = console.args(["console", "a"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    console.stdin.take().unwrap().write_all(b"hello").unwrap();
    let begin = Instant::now();
    while !hosts.ok("console --log a").ends_with("ready\nhello") {
        assert!(begin.elapsed() < PATIENCE, "the echo does not come");
        thread::sleep(Duration::from_millis(20));
    }
    let mut monitor = hosts.purlin();
    let mut monitor =
        Killed(monitor.args(["monitor", "--from", "1", "--json"]).stdout(Stdio::piped()).spawn().unwrap());
    let mut events = BufReader::new(monitor.0.stdout.take().unwrap()).lines();
    assert!(events.any(|line| line.unwrap().contains(r#""status":"running""#)));

    hosts.ok("delete -f a");
    assert!(String::from_utf8_lossy(&console.wait_with_output().unwrap().stdout).ends_with("hello"));
    assert!(events.any(|line| line.unwrap().contains(r#""what":"delete a""#)));
    // Nothing was kept or started here.
    assert!(!hosts.here.path().join("data/purlin.redb").exists());
}

#[test]
fn a_daemon_that_is_not_known_is_told_nothing() {
    let hosts = Hosts::new();
    let list = |command: &mut Command| command.arg("list").output().unwrap();
    assert_one_line(&list(&mut hosts.stranger()), 1, &["nobody knows the certificate", &hosts.url, &hosts.fingerprint]);
    let other = format!("sha256:{}", "0".repeat(64));
    let mistaken = list(hosts.stranger().env("PURLIN_FINGERPRINT", &other));
    assert_one_line(
        &mistaken,
        1,
        &["the certificate of", &hosts.fingerprint, "not the one", "PURLIN_FINGERPRINT says"],
    );
    assert_one_line(&list(hosts.stranger().env("PURLIN_FINGERPRINT", "x")), 1, &["PURLIN_FINGERPRINT", "64 hex"]);

    // Who is asked and says no has not said anything; who says yes is not asked again.
    for (answer, status) in [("no\n", 1), ("yes\n", 0)] {
        let mut command = hosts.stranger();
        let mut asked = OnTerminal::start(command.arg("list"));
        asked.expect(&hosts.fingerprint);
        asked.expect("write 'yes'");
        asked.type_keys(answer.as_bytes());
        assert_eq!(wait(&mut asked.child.0).code(), Some(status), "{}", asked.seen);
    }
    assert!(list(&mut hosts.stranger()).status.success());
    let known = fs::read_to_string(hosts.here.path().join("data/known-daemons")).unwrap();
    assert_eq!(known, format!("{} {}\n", hosts.url, hosts.fingerprint));
}

#[test]
fn who_has_no_token_is_not_let_in() {
    let mut hosts = Hosts::new();
    let list = |hosts: &Hosts, change: &dyn Fn(&mut Command) -> &mut Command| {
        change(hosts.purlin().arg("list")).output().unwrap()
    };
    let none = list(&hosts, &|command| command.env_remove("PURLIN_TOKEN"));
    assert_one_line(&none, 1, &["PURLIN_TOKEN", "purlin token create"]);
    let wrong = list(&hosts, &|command| command.env("PURLIN_TOKEN", format!("purlin_{}", "0".repeat(64))));
    assert_one_line(&wrong, 1, &["nobody has this token"]);
    let file = hosts.here.path().join("token");
    fs::write(&file, format!("{}\n", hosts.token)).unwrap();
    let by_file = list(&hosts, &|command| command.env_remove("PURLIN_TOKEN").env("PURLIN_TOKEN_FILE", &file));
    assert!(by_file.status.success(), "{by_file:?}");

    let tokens: Value = serde_json::from_str(&hosts.there.ok("token list --json")).unwrap();
    assert_eq!(tokens[0]["name"], "laptop");
    assert!(hosts.there.ok("token list").lines().nth(1).unwrap().starts_with("laptop"));
    assert_one_line(&hosts.there.run("token create laptop"), 1, &["'laptop' already"]);
    assert_one_line(&hosts.there.run("token delete other"), 1, &["no token 'other'"]);
    // Tokens and the certificate outlive a daemon.
    kill_process(Pid::from_child(&hosts.daemon.0), Signal::TERM).unwrap();
    wait(&mut hosts.daemon.0);
    let gone = list(&hosts, &|command| command);
    assert_one_line(&gone, 1, &["nobody listens at", &hosts.url]);
    let (daemon, said) = start(&hosts.there, &[]);
    hosts.daemon = daemon;
    assert!(said[1].ends_with(&hosts.fingerprint), "{said:?}");
    hosts.url = said[1].split([' ', ';']).nth(2).unwrap().to_owned();
    assert!(list(&hosts, &|command| command).status.success());
    let status = hosts.there.ok("daemon status");
    assert!(status.contains(&hosts.url) && status.contains(&hosts.fingerprint), "{status}");
    hosts.there.ok("token delete laptop");
    assert_one_line(&list(&hosts, &|command| command), 1, &["nobody has this token"]);
}

#[test]
fn what_cannot_be_done_elsewhere_is_wrong_usage() {
    let run = |words: &[&str]| purlin().args(words).stdin(Stdio::null()).output().unwrap();
    let host = "https://localhost:1";
    for verb in
        [&["run", "shell"][..], &["image", "convert", "a", "b"], &["daemon", "status"], &["token", "list"], &["doctor"]]
    {
        assert_one_line(&run(&[&["--host", host], verb].concat()), 2, &["--host", "this host"]);
    }
    assert_one_line(&run(&["--host", "http://localhost", "list"]), 2, &["http://localhost", "https://HOST:PORT"]);
    assert_one_line(&run(&["--host", host, "launch", "tiny", "--disk", "a.img"]), 2, &["a.img", "absolute path"]);
    assert_one_line(&run(&["daemon", "--listen", "localhost"]), 2, &["--listen"]);
    assert_one_line(&run(&["daemon", "--tls-cert", "a"]), 2, &["--tls-key"]);
}

#[test]
fn a_certificate_of_the_users_own() {
    let (home, other) = (Home::new(), Home::new());
    // Another daemon's will do.
    let (_daemon, said) = start(&other, &[]);
    let files = ["tls.crt", "tls.key"].map(|file| other.path().join("data").join(file).display().to_string());
    let (_ours, ours) = start(&home, &["--tls-cert", &files[0], "--tls-key", &files[1]]);
    let fingerprint = |said: &[String; 2]| said[1].split_whitespace().last().unwrap().to_owned();
    assert_eq!(fingerprint(&ours), fingerprint(&said));
    assert!(!home.path().join("data/tls.key").exists());
    let fails = |arguments: &[&str]| {
        let third = tempfile::tempdir().unwrap();
        let mut command = purlin();
        command.env("PURLIN_HOME", third.path()).args(["daemon", "--listen"]).args(arguments);
        command.stdin(Stdio::null()).output().unwrap()
    };
    let missing = Path::new(&files[0]).with_file_name("missing").display().to_string();
    let key = fails(&["127.0.0.1:0", "--tls-cert", &files[0], "--tls-key", &files[0]]);
    assert_one_line(&key, 1, &[&files[0], "no use for TLS"]);
    assert_one_line(&fails(&["127.0.0.1:0", "--tls-cert", &missing, "--tls-key", &files[1]]), 1, &["read", &missing]);
    let taken = said[1].split([' ', ';']).nth(2).unwrap().trim_start_matches("https://").to_owned();
    assert_one_line(&fails(&[&taken]), 1, &["cannot listen at", &taken]);
}

#[test]
fn images_of_another_host() {
    let hosts = Hosts::new();
    let file = hosts.here.path().join("some disk.img");
    fs::write(&file, vec![7; 1 << 20]).unwrap();
    let import = hosts.purlin().args(["image", "import", "--name", "sent"]).arg(&file).output().unwrap();
    assert_eq!(stderr(&import).last().unwrap(), "purlin: image 'sent' is ready", "{import:?}");
    let listed: Value = serde_json::from_str(&hosts.ok("image list --json")).unwrap();
    let names: Vec<_> = listed.as_array().unwrap().iter().map(|image| image["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["sent", "tiny"]);
    assert_eq!(listed[0]["origin"]["imported"], "some disk.img");
    assert_eq!(listed, serde_json::from_str::<Value>(&hosts.there.ok("image list --json")).unwrap());
    assert!(hosts.ok("image info sent").contains("imported from some disk.img"));
    assert!(hosts.ok("image list").contains("sent  1 MiB"));
    let again = hosts.purlin().args(["image", "import", "--name", "sent"]).arg(&file).output().unwrap();
    assert_eq!((again.status.code(), stderr(&again).last().unwrap().contains("'sent' already")), (Some(1), true));
    for (words, status, told) in [
        ("image info nope", 1, "no image 'nope'"),
        ("image delete nope", 1, "no image 'nope'"),
        ("image import http://127.0.0.1:1/x --name x", 1, "cannot fetch"),
        ("image import ftp://x/y --name x", 2, "only http and https"),
        ("image import /nope --name x", 1, "/nope"),
        ("image build windows", 2, "cannot be built"),
    ] {
        let output = hosts.purlin().args(words.split(' ')).output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{words}: {output:?}");
        assert!(stderr(&output).last().unwrap().contains(told), "{words}: {output:?}");
    }
    hosts.ok("image delete sent");
    assert_eq!(hosts.there.run("image info sent").status.code(), Some(1));
    // Files of this host are this host's business, whoever is asked otherwise.
    let copy = hosts.here.path().join("copy.qcow2");
    let convert = hosts.purlin().args(["image", "convert"]).arg(&file).arg(&copy).output().unwrap();
    assert!(convert.status.success() && copy.exists(), "{convert:?}");
    let told = hosts.purlin().args(["--host", &hosts.url, "image", "convert", "a", "b"]).output().unwrap();
    assert_one_line(&told, 2, &["on this host"]);
    assert!(!hosts.here.path().join("data/images").exists());
}
