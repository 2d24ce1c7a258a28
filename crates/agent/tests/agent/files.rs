//! Files, to the agent and from it.

use std::{
    fs::{self, Permissions},
    io::{Read, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
    path::Path,
};

use purlin_agent::{
    client::ClientError,
    frame::encode,
    protocol::{FailureKind, HostFrame, HostMessage, Push},
};

use crate::{Agent, UnixClient, failure, is_root, kind, noise, wait_until};

fn push(path: &Path) -> Push {
    Push { path: path.to_str().unwrap().into(), ..Push::default() }
}

fn pull(client: UnixClient, path: &Path) -> Result<(purlin_agent::protocol::File, Vec<u8>), ClientError> {
    let mut pulled = client.pull(path.to_str().unwrap().as_bytes())?;
    let mut data = Vec::new();
    pulled.read_to_end(&mut data).unwrap();
    Ok((pulled.file.clone(), data))
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn ten_mebibytes_there_and_back() {
    let agent = Agent::start();
    let (data, path) = (noise(10 << 20), agent.path("file"));
    let mode = Some(0o4751);
    assert_eq!(agent.client().push(Push { mode, ..push(&path) }, &data[..]).unwrap(), data.len() as u64);
    assert!(fs::read(&path).unwrap() == data);
    let (file, got) = pull(agent.client(), &path).unwrap();
    assert!(got == data);
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!((file.size, file.mode), (data.len() as u64, 0o4751));
    assert_eq!((file.uid, file.gid, file.modified), (metadata.uid(), metadata.gid(), metadata.mtime()));
}

#[test]
fn modes_and_owners() {
    let agent = Agent::start();
    let path = agent.path("file");
    agent.client().push(push(&path), &b""[..]).unwrap();
    assert_eq!((mode(&path), fs::read(&path).unwrap()), (0o644, vec![]));
    // What is replaced gives its mode, and its owner.
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    agent.client().push(push(&path), &b"new"[..]).unwrap();
    assert_eq!((mode(&path), fs::read(&path).unwrap()), (0o600, b"new".to_vec()));
    for other in
        [Push { user: "nosuchuser".into(), ..push(&path) }, Push { group: "nosuchgroup".into(), ..push(&path) }]
    {
        assert_eq!(kind(agent.client().push(other, &b"x"[..])), FailureKind::NoSuchUser);
    }
    if is_root() {
        agent.client().push(Push { user: "nobody".into(), group: "3".into(), ..push(&path) }, &b"x"[..]).unwrap();
        let nobody = fs::metadata(&path).unwrap();
        assert_ne!(nobody.uid(), 0);
        assert_eq!(nobody.gid(), 3);
        agent.client().push(push(&path), &b"y"[..]).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().uid(), nobody.uid());
    }
}

#[test]
fn paths_that_cannot_be() {
    let agent = Agent::start();
    let file = agent.path("file");
    fs::write(&file, "old").unwrap();
    let failures = [
        (agent.dir.path().to_owned(), FailureKind::IsADirectory),
        (agent.path("none/file"), FailureKind::NoSuchDirectory),
        (agent.path("none/"), FailureKind::IsADirectory),
        (file.join("below"), FailureKind::NotADirectory),
        ("relative".into(), FailureKind::Invalid),
        ("/a\0b".into(), FailureKind::Invalid),
        (agent.path("agent"), FailureKind::Other),
    ];
    for (path, wanted) in &failures {
        assert_eq!(kind(agent.client().push(push(path), &b"x"[..])), *wanted, "push {}", path.display());
    }
    for (path, wanted) in &failures {
        let wanted = if *wanted == FailureKind::NoSuchDirectory { FailureKind::NoSuchFile } else { *wanted };
        let wanted = if path.ends_with("none") { FailureKind::NoSuchFile } else { wanted };
        assert_eq!(kind(pull(agent.client(), path)), wanted, "pull {}", path.display());
    }
    let failed = failure(pull(agent.client(), Path::new("/no\nsuch")));
    assert_eq!(failed.message, "cannot read '/no\\nsuch' in the guest: No such file or directory");
    assert_eq!(fs::read(file).unwrap(), b"old");
}

#[test]
fn directories_are_made_where_that_is_wanted() {
    let agent = Agent::start();
    let path = agent.path("a/b/file");
    agent.client().push(Push { make_dirs: true, ..push(&path) }, &b"x"[..]).unwrap();
    assert_eq!(fs::read(path).unwrap(), b"x");
}

#[test]
fn links_are_followed_and_special_files_written_to() {
    let agent = Agent::start();
    let (file, link) = (agent.path("file"), agent.path("link"));
    symlink("file", &link).unwrap();
    agent.client().push(push(&link), &b"x"[..]).unwrap();
    assert!(link.is_symlink());
    assert_eq!(fs::read(file).unwrap(), b"x");
    agent.client().push(push(Path::new("/dev/null")), &b"x"[..]).unwrap();
    assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    assert_eq!(kind(pull(agent.client(), Path::new("/dev/zero"))), FailureKind::Other);
    let fifo = agent.path("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    assert_eq!(kind(agent.client().push(push(&fifo), &b"x"[..])), FailureKind::Other);
    assert_eq!(kind(pull(agent.client(), &fifo)), FailureKind::Other);
    let (file, data) = pull(agent.client(), Path::new("/proc/self/status")).unwrap();
    assert_eq!(file.size, 0);
    assert!(data.starts_with(b"Name:\tpurlin-agent\n"));
}

#[test]
fn a_file_is_complete_or_not_there() {
    let agent = Agent::start();
    let path = agent.path("file");
    fs::write(&path, "old").unwrap();
    let mut stream = agent.stream();
    for message in [HostMessage::Push(push(&path)), HostMessage::Data(noise(100_000))] {
        stream.write_all(&encode(&HostFrame::from(message)).unwrap()).unwrap();
    }
    let names = || fs::read_dir(agent.dir.path()).unwrap().count();
    wait_until("the file begins", || names() == 3);
    assert_eq!(fs::read(&path).unwrap(), b"old");
    drop(stream);
    wait_until("nothing is left of it", || names() == 2);
    assert_eq!(fs::read(&path).unwrap(), b"old");
}

#[test]
fn a_full_disk_is_told_in_the_midst() {
    let agent = Agent::start();
    let failed = failure(agent.client().push(push(Path::new("/dev/full")), &noise(3 << 20)[..]));
    assert_eq!(failed.kind(), FailureKind::NoSpace);
    assert_eq!(failed.message, "cannot write '/dev/full' in the guest: No space left on device");
}
