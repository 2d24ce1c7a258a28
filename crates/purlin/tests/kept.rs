//! Machines that are kept: launched, found again, stopped and deleted, whatever is killed in between.

mod support;

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use purlin_storage::{Disk, DiskSpec, Merge, Request};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::{Home, Killed, assert_one_line, kill, stderr, wait};

/// Far more than anything here takes, also on a loaded host.
const PATIENCE: Duration = Duration::from_secs(60);

fn list(home: &Home) -> Vec<Value> {
    let Value::Array(list) = serde_json::from_str(&home.ok("list --json")).unwrap() else { panic!("no array") };
    list
}

fn info(home: &Home, name: &str) -> Value {
    serde_json::from_str(&home.ok(&format!("info {name} --json"))).unwrap()
}

fn status(home: &Home, name: &str) -> String {
    info(home, name)["status"].as_str().unwrap().to_owned()
}

#[track_caller]
fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "{what} does not come");
        thread::sleep(Duration::from_millis(20));
    }
}

/// The directories of instances.
fn directories(home: &Home) -> usize {
    let there = fs::read_dir(home.path().join("data/instances"));
    there.map_or(0, |entries| entries.flatten().filter(|entry| entry.path().is_dir()).count())
}

#[test]
fn a_machine_from_its_launch_to_its_deletion() {
    let home = Home::new();
    assert_eq!(list(&home), Vec::<Value>::new());
    home.ok("launch tiny a --device debug-exit --engine translator --memory 64M");
    assert_eq!(status(&home, "a"), "running");
    assert_is_sandboxed(&home, home.machines()[0]);
    assert!(home.ok("list").lines().nth(1).unwrap().starts_with("a     running"), "{}", home.ok("list"));

    home.ok("pause a");
    assert_eq!(status(&home, "a"), "paused");
    assert_one_line(&home.run("stop a"), 1, &["paused"]);
    home.ok("resume a");
    assert_eq!(status(&home, "a"), "running");

    // Its kernel does not listen to the power button.
    assert_one_line(&home.run("stop a --timeout 1"), 1, &["within 1 s", "--force"]);
    home.ok("restart -f a");
    assert_eq!(status(&home, "a"), "running");

    // What is typed at the console reaches the guest, and what it says is seen.
    let mut console =
        home.purlin().args(["console", "a"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    console.stdin.take().unwrap().write_all(b"hello").unwrap();
    wait_for("the echo", || home.ok("console --log a").ends_with("ready\nhello"));
    let mut exit = home.purlin().args(["console", "a"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    exit.stdin.take().unwrap().write_all(b"E").unwrap();
    let output = console.wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).ends_with("hello"), "{output:?}");
    exit.wait().unwrap();

    home.ok("wait a --timeout 60");
    let ended = info(&home, "a");
    assert_eq!((&ended["status"], &ended["process"]), (&"stopped".into(), &Value::Null));
    assert!(ended["last_end"]["message"].as_str().unwrap().contains("status 33"), "{ended}");
    assert!(home.machines().is_empty());

    home.ok("rename a b");
    home.ok("set b memory=96M");
    home.ok("start b");
    assert_eq!(info(&home, "b")["machine"]["memory"], 96 << 20);
    assert_one_line(&home.run("delete b"), 1, &["'b' runs", "--force"]);
    home.ok("delete -f b");
    assert_eq!((list(&home).len(), home.machines().len(), directories(&home)), (0, 0, 0));
    home.ok("daemon stop");
    wait_for("the daemon's end", || home.processes().is_empty());
}

#[test]
fn names_that_nobody_has_given() {
    let home = Home::new();
    for _ in 0..2 {
        home.ok("launch tiny --memory 64M --engine translator --no-start");
    }
    let names: Vec<_> = list(&home).iter().map(|i| i["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(names, ["tiny", "tiny-2"]);
    home.ok("snapshot create tiny snap1");
    for name in ["snap0", "snap2"] {
        let created = home.run("snapshot create tiny");
        assert_one_line(&created, 0, &["tiny: snapshot", name]);
    }
}

/// Its kernel has no agent, and never will.
#[test]
fn a_guest_that_is_waited_for_in_vain_is_waited_for_until_a_signal_comes() {
    let home = Home::new();
    home.ok("launch tiny a --memory 64M --engine translator");
    for words in [&["exec", "a", "true"][..], &["shell", "a"], &["port-forward", "a", "0:80"]] {
        let mut waiting = home.purlin();
        let mut waiting = Killed(waiting.args(words).stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
        let lines = BufReader::new(waiting.0.stderr.take().unwrap()).lines();
        let (sender, said) = mpsc::channel();
        thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let said = said.recv_timeout(PATIENCE).unwrap();
        assert_eq!(said, "purlin: 'a' is still booting: waiting for its agent");
        kill_process(Pid::from_child(&waiting.0), Signal::TERM).unwrap();
        let status = wait(&mut waiting.0);
        assert!(status.code() == Some(143) || status.signal() == Some(15), "{words:?}: {status}");
    }
}

/// The one before it is ended by that and starts the machine again, for the next one to wait for its guest.
#[test]
fn a_forced_deletion_does_not_wait_for_guests_that_do_not_shut_down() {
    let home = Home::new();
    home.ok("launch tiny a --memory 64M --engine translator");
    let mut monitor = Killed(home.purlin().args(["monitor", "--from", "1"]).stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(monitor.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    let _waiting = ["restart", "stop"].map(|verb| {
        let mut command = home.purlin();
        command.args([verb, "a", "--timeout", "100000"]).stdin(Stdio::null()).stderr(Stdio::null());
        let waiting = Killed(command.spawn().unwrap());
        assert!(lines.any(|line| line.contains(&format!("'{verb} a' begins"))));
        waiting
    });
    home.ok("delete -f a");
    assert_eq!((list(&home).len(), home.machines().len()), (0, 0));
}

#[test]
fn an_operation_goes_on_though_nobody_waits() {
    let home = Home::new();
    home.ok("launch tiny a --memory 64M --engine translator");
    let mut monitor = Killed(home.purlin().args(["monitor", "--from", "1"]).stdout(Stdio::piped()).spawn().unwrap());
    // Its kernel does not listen to the power button.
    let stop = home.purlin().args(["stop", "a", "--timeout", "1000"]).stderr(Stdio::piped()).spawn().unwrap();
    let events = BufReader::new(monitor.0.stdout.take().unwrap());
    assert!(events.lines().map(Result::unwrap).any(|line| line.contains("begins") && line.contains("stop")));
    kill_process(Pid::from_child(&stop), Signal::TERM).unwrap();
    assert_one_line(&stop.wait_with_output().unwrap(), 143, &["ended by SIGTERM", "goes on"]);
    assert_eq!(status(&home, "a"), "running");
}

/// What its sandbox lacks is told; the rest is there, which is not little wherever it runs.
fn assert_is_sandboxed(home: &Home, pid: u32) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.split(':').next() == Some(name)).unwrap();
        line.split_whitespace().last().unwrap().to_owned()
    };
    assert_eq!((field("CapEff"), field("CapBnd")), ("0000000000000000".into(), "0000000000000000".into()));
    assert_eq!((field("NoNewPrivs"), field("Seccomp")), ("1".into(), "2".into()));
    let lacks = info(home, "a")["process"]["sandbox_lacks"].to_string();
    if !lacks.contains("root of its own") {
        assert!(fs::read_dir(format!("/proc/{pid}/root/etc")).is_err(), "it can see /etc");
    }
}

#[test]
fn what_makes_no_sense_is_told_and_changes_nothing() {
    let home = Home::new();
    home.ok("launch tiny a --no-start --memory 64M");
    let before = home.ok("list --json");
    for (words, status, told) in [
        ("launch tiny a", 1, &["'a' already"][..]),
        ("launch tiny A", 2, &["'A' cannot be a name"]),
        ("launch tiny -- -a", 2, &["cannot be a name"]),
        ("launch nothing b", 1, &["no image 'nothing'", "purlin image list"]),
        ("launch No/thing b", 1, &["'No/thing' is no name for an image"]),
        ("launch tiny b --memory 1P", 2, &["memory"]),
        ("launch tiny b --memory 100T", 2, &["memory"]),
        ("launch tiny b --cpus 0", 2, &["0 processors"]),
        ("launch tiny b --disk-size 1M", 2, &["1"]),
        ("launch tiny b --publish 99999:1", 2, &["publish"]),
        ("launch tiny b --disk /nope.img", 2, &["/nope.img", "No such file"]),
        ("launch tiny b --disk /dev/null,format=raw", 2, &["/dev/null"]),
        ("info nope", 1, &["no instance 'nope'", "purlin list"]),
        ("start nope", 1, &["no instance 'nope'"]),
        ("delete nope", 1, &["no instance 'nope'"]),
        ("console nope", 1, &["no instance 'nope'"]),
        ("stop a", 1, &["'a' is not running", "purlin start a"]),
        ("stop -f a", 1, &["'a' is not running"]),
        ("pause a", 1, &["'a' is not running"]),
        ("resume a", 1, &["'a' is not running"]),
        ("console a", 1, &["'a' is not running"]),
        ("rename a A", 2, &["'A' cannot be a name"]),
        ("rename a a", 1, &["'a' already"]),
        ("rename nope b", 1, &["no instance 'nope'"]),
        ("set a cpus=0", 2, &["0 processors"]),
        ("set a cpu=x", 2, &["x"]),
        ("set a memory=1", 2, &["memory"]),
        ("wait nope", 1, &["no instance 'nope'"]),
        ("port-forward nope 0:80", 1, &["no instance 'nope'"]),
        ("port-forward a 0:80", 1, &["'a' is not running"]),
        ("port-forward a 80", 2, &["[HOST:]PORT:GUESTPORT"]),
        ("port-forward a 53:53/udp", 2, &["only TCP"]),
        ("wait a --for running --timeout 0", 1, &["'a' is stopped after 0 s"]),
    ] {
        let output = home.run(words);
        assert_eq!(output.status.code(), Some(status), "{words}: {:#?}", stderr(&output));
        let text = stderr(&output).join("\n");
        assert!(told.iter().all(|word| text.contains(word)), "{words}: {text}");
    }
    assert_eq!(home.ok("list --json"), before);
    assert_eq!(directories(&home), 1);
    // Two at once: one of them gets the name.
    let two = ["b", "b"]
        .map(|name| home.purlin().args(["launch", "tiny", name, "--no-start"]).stderr(Stdio::null()).spawn().unwrap());
    let well = two.map(|mut child| child.wait().unwrap().success());
    assert_ne!(well[0], well[1]);
}

#[test]
fn machines_go_on_without_the_daemon_and_are_found_again() {
    let home = Home::new();
    home.ok("launch tiny a --memory 64M --engine translator");
    home.ok("launch tiny b --memory 64M --engine translator");
    let machines = home.machines();
    kill(home.daemon().unwrap());
    wait_for("the daemon's end", || home.daemon().is_none());
    assert_eq!(home.machines(), machines);

    let pid = |name: &str| info(&home, name)["process"]["pid"].as_u64();
    wait_for("a", || pid("a").is_some() && pid("b").is_some());
    let mut found = [pid("a").unwrap() as u32, pid("b").unwrap() as u32];
    found.sort_unstable();
    assert_eq!(found.to_vec(), machines);
    assert_one_line(&home.run("start a"), 1, &["runs already"]);

    // A machine whose process is killed has crashed, beside the other one, and can be started again.
    kill(pid("a").unwrap() as u32);
    wait_for("its end", || status(&home, "a") == "crashed");
    assert!(info(&home, "a")["last_end"]["message"].as_str().unwrap().contains("killed"));
    assert_eq!(status(&home, "b"), "running");
    home.ok("start a");

    // One that ends while there is no daemon has ended when there is one again.
    kill(home.daemon().unwrap());
    kill(pid_of(&home, "b"));
    wait_for("the machine's end", || home.machines().len() == 1);
    wait_for("both", || list(&home).iter().all(|instance| instance["status"] != "starting"));
    assert_eq!(status(&home, "b"), "crashed");
    assert_eq!(status(&home, "a"), "running");
}

/// By what only the machine's own process has open.
fn pid_of(home: &Home, name: &str) -> u32 {
    let spec = fs::read_dir(home.path().join("data/instances")).unwrap().flatten().find(|entry| {
        let is_spec = entry.path().extension().is_some_and(|extension| extension == "json");
        is_spec && serde_json::from_str::<Value>(&fs::read_to_string(entry.path()).unwrap()).unwrap()["name"] == name
    });
    let id = spec.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned();
    home.processes().into_iter().find(|(_, command)| command.contains(&id)).unwrap().0
}

/// What the user of the random kills knows of a machine: what was acknowledged, and what may have happened since.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Known {
    Gone,
    There,
    Maybe,
}

/// While somebody launches, stops, starts and deletes machines, daemon and machines are killed at random moments: what was
/// acknowledged is there, nothing else is, and no machine runs twice. `PURLIN_TEST_KILLS` says how often (300 in
/// `cargo xtask kept`).
#[test]
fn nothing_acknowledged_is_lost_when_anything_is_killed_at_any_moment() {
    let kills: u32 = std::env::var("PURLIN_TEST_KILLS").map_or(25, |text| text.parse().unwrap());
    let home = Home::new();
    home.ok("launch tiny witness --memory 64M --engine translator");
    let witness = pid_of(&home, "witness");
    let killed = AtomicU32::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            // Moments that are not the same in each run, and known where it fails.
            let mut random = u64::from(std::process::id());
            while killed.load(Ordering::SeqCst) < kills {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                thread::sleep(Duration::from_millis(random >> 33 & 127));
                let victims: Vec<u32> =
                    home.processes().iter().map(|(pid, _)| *pid).filter(|pid| *pid != witness).collect();
                let daemon_or_machine: Vec<u32> =
                    home.daemon().into_iter().chain(home.machines()).filter(|pid| victims.contains(pid)).collect();
                if let Some(victim) = daemon_or_machine.get(random as usize % daemon_or_machine.len().max(1)) {
                    kill(*victim);
                    killed.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        let mut known = [Known::Gone; 3];
        let mut round = 0;
        while killed.load(Ordering::SeqCst) < kills {
            let number = round % 3;
            round += 1;
            known[number] = one_cycle(&home, number, known[number]);
        }
        // Calm again, once a daemon that may have been killed just now is gone: what is there is what is known.
        wait_for("calm", || home.run("list").status.success());
        let names: Vec<String> = list(&home).iter().map(|i| i["name"].as_str().unwrap().to_owned()).collect();
        for (number, known) in known.iter().enumerate() {
            let there = names.contains(&format!("m{number}"));
            assert!(*known == Known::Maybe || (*known == Known::There) == there, "m{number}: {known:?}, but {names:?}");
        }
    });
    wait_for("calm", || list(&home).iter().all(|i| i["status"] != "starting"));
    assert_eq!(info(&home, "witness")["process"]["pid"], witness, "another machine was not left alone");
    // Each process belongs to an instance, and each instance has one at most.
    let running: Vec<u32> =
        list(&home).iter().filter_map(|i| i["process"]["pid"].as_u64()).map(|pid| pid as u32).collect();
    let mut machines = home.machines();
    machines.sort_unstable();
    let mut sorted = running.clone();
    sorted.sort_unstable();
    assert_eq!(machines, sorted);
    // Those that are deleted may have files that their clones stand on.
    assert!(directories(&home) >= list(&home).len());
    for instance in list(&home) {
        home.ok(&format!("delete -f {}", instance["name"].as_str().unwrap()));
    }
    assert_eq!((home.machines().len(), directories(&home)), (0, 0));
}

/// Does the next thing with a machine; each may fail, for the daemon may be killed in its midst.
fn one_cycle(home: &Home, number: usize, known: Known) -> Known {
    let name = format!("m{number}");
    if known == Known::Gone {
        let launched = home.run(&format!("launch tiny {name} --memory 64M --engine translator")).status.success();
        return if launched { Known::There } else { Known::Maybe };
    }
    // Whatever came of it, it changes nothing of whether the machine is there.
    home.run(&format!("stop -f {name}"));
    home.run(&format!("start {name}"));
    let snapshot = format!("s{number}");
    if home.run(&format!("snapshot create {name} {snapshot}")).status.success() {
        let restored = home.run(&format!("snapshot restore {name} {snapshot}"));
        assert!(!stderr(&restored).iter().any(|line| line.contains("has no snapshot")), "{restored:?}");
    }
    home.run(&format!("clone {name} k{number}"));
    home.run(&format!("delete -f k{number}"));
    // What nobody needs then is merged meanwhile.
    home.run(&format!("snapshot create {name} more"));
    home.run(&format!("snapshot delete {name} {snapshot}"));
    let there = home.run(&format!("info {name}")).status.success();
    let lost = !there && known == Known::There && says_there_is_none(&home.run(&format!("info {name}")));
    assert!(!lost, "{name} was lost");
    let deleted = home.run(&format!("delete -f {name}"));
    let is_gone = deleted.status.success() || says_there_is_none(&deleted);
    if is_gone { Known::Gone } else { Known::Maybe }
}

/// Whether the daemon says, clearly, that there is no such machine.
fn says_there_is_none(output: &Output) -> bool {
    stderr(output).iter().any(|line| line.contains("there is no instance"))
}

/// The last line that the guest has echoed.
fn echo(home: &Home, name: &str, text: &str) {
    let mut console =
        home.purlin().args(["console", name]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    console.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    wait_for("the echo", || home.ok(&format!("console --log {name}")).ends_with(text));
    console.kill().unwrap();
    console.wait().unwrap();
}

/// Files of an instance's directory whose names begin so.
fn files(home: &Home, name: &str, prefix: &str) -> Vec<String> {
    let id = info(home, name)["id"].as_str().unwrap().to_owned();
    let dir = fs::read_dir(home.path().join("data/instances").join(id)).unwrap();
    let mut names: Vec<_> = dir.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name.starts_with(prefix));
    names.sort();
    names
}

#[test]
fn snapshots_are_taken_gone_back_to_and_deleted() {
    let home = Home::new();
    home.ok("launch tiny a --memory 64M --engine translator");
    echo(&home, "a", "one");
    home.ok("snapshot create a s1");
    echo(&home, "a", "two");
    home.ok("snapshot create a s2");
    let list: Value = serde_json::from_str(&home.ok("snapshot list a --json")).unwrap();
    assert_eq!((&list[0]["name"], &list[1]["name"], &list[1]["running"]), (&"s1".into(), &"s2".into(), &true.into()));
    assert!(list[1]["bytes"].as_u64() < list[0]["bytes"].as_u64(), "the second has only what has changed: {list}");
    assert_eq!((files(&home, "a", "disk").len(), files(&home, "a", "memory").len()), (3, 2));

    // Back to the first, of which the second has only what has changed since; and on to the second again.
    for snapshot in ["s1", "s2", "s1"] {
        home.ok(&format!("snapshot restore a {snapshot}"));
        assert_eq!(status(&home, "a"), "running");
        echo(&home, "a", snapshot);
    }
    home.ok("stop -f a");
    // Memory is again what it was then, but the engine is what it is now.
    home.ok("set a memory=96M engine=auto");
    home.ok("snapshot restore a s2");
    assert_eq!(status(&home, "a"), "running");
    let machine = &info(&home, "a")["machine"];
    assert_eq!((&machine["memory"], &machine["engine"]), (&(64 << 20).into(), &"auto".into()));

    // What the second stands on stays as long as it does.
    home.ok("snapshot delete a s1");
    assert_eq!(files(&home, "a", "memory").len(), 2);
    home.ok("snapshot restore a s2");
    echo(&home, "a", "again");
    home.ok("snapshot delete a s2");
    assert_eq!((files(&home, "a", "memory").len(), home.ok("snapshot list a --json").trim()), (0, "[]"));

    // Without a guest that runs there is a disk only.
    home.ok("stop -f a");
    home.ok("snapshot create a off");
    home.ok("start a");
    home.ok("snapshot restore a off");
    assert_eq!(status(&home, "a"), "stopped");
    for (words, told) in [
        ("snapshot create a off", "'off' already"),
        ("snapshot restore a nope", "no snapshot 'nope'"),
        ("snapshot delete a nope", "no snapshot 'nope'"),
        ("snapshot create nope s", "no instance 'nope'"),
    ] {
        assert_one_line(&home.run(words), 1, &[told]);
    }
    assert_one_line(&home.run("snapshot create a A"), 2, &["'A' cannot be a name"]);
    home.ok("delete a");
    assert_eq!(directories(&home), 0);
}

#[test]
fn an_image_can_go_whatever_stands_on_it() {
    let home = Home::new();
    home.ok("launch tiny a --memory 64M --engine translator --no-start");
    home.ok("image delete tiny");
    assert_eq!(home.run("launch tiny b").status.code(), Some(1));
    home.ok("start a");
    wait_for("its first words", || home.ok("console --log a").ends_with("ready\n"));
    home.ok("clone a b");
    home.ok("delete -f a");
    echo(&home, "b", "b");
    home.ok("delete -f b");
    assert_eq!(fs::read_dir(home.path().join("data/bases")).unwrap().count(), 0);
}

/// What a machine's process can write to is not what the daemon goes by.
#[test]
fn a_process_that_was_taken_over_cannot_make_the_daemon_start_another() {
    let home = Home::new();
    home.ok("launch tiny a --memory 64M --engine translator");
    let dir = home.path().join("data/instances").join(info(&home, "a")["id"].as_str().unwrap());
    let before = home.machines();
    for entry in fs::read_dir(&dir).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if !name.starts_with("disk") && !name.starts_with("kernel") {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    kill(home.daemon().unwrap());
    assert_ne!(home.run("start a").status.code(), Some(0));
    assert_eq!(home.machines(), before);
    kill(before[0]);
    wait_for("its end", || status(&home, "a") == "crashed");
    // Whatever it leaves behind is read as far as it makes sense.
    fs::remove_file(dir.join("end.json")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", dir.join("end.json")).unwrap();
    kill(home.daemon().unwrap());
    wait_for("a new daemon", || status(&home, "a") != "starting");
    home.ok("delete -f a");
}

#[test]
fn a_damaged_snapshot_is_refused_and_the_machine_goes_on() {
    let home = Home::new();
    home.ok("launch tiny a --memory 64M --engine translator");
    home.ok("snapshot create a s");
    let id = info(&home, "a")["id"].as_str().unwrap().to_owned();
    let path = home.path().join("data/instances").join(id).join(&files(&home, "a", "memory")[0]);
    let whole = fs::read(&path).unwrap();
    let pid = info(&home, "a")["process"]["pid"].clone();
    // The header, memory, what is behind it, and the end.
    for at in [0, 20, 5000, whole.len() / 2, whole.len() - 1] {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        fs::write(&path, damaged).unwrap();
        assert_one_line(&home.run("snapshot restore a s"), 1, &["snapshot"]);
    }
    for length in [0, 100, 5000, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        assert_one_line(&home.run("snapshot restore a s"), 1, &["snapshot"]);
    }
    fs::remove_file(&path).unwrap();
    assert_eq!(home.run("snapshot restore a s").status.code(), Some(1));
    assert_eq!((status(&home, "a"), &info(&home, "a")["process"]["pid"]), ("running".into(), &pid));
    fs::write(&path, whole).unwrap();
    home.ok("snapshot restore a s");
    assert_ne!(info(&home, "a")["process"]["pid"], pid);
}

#[test]
fn clones_go_on_by_themselves_and_outlive_what_they_were_made_of() {
    let home = Home::new();
    home.ok("launch tiny a --memory 64M --engine translator");
    echo(&home, "a", "before");
    let said = home.run("clone a b --count 2");
    assert!(said.status.success());
    // Its guest has no agent.
    assert!(stderr(&said).iter().any(|line| line.contains("'b-1' still thinks that it is 'a'")), "{said:?}");
    for name in ["a", "b-1", "b-2"] {
        assert_eq!(status(&home, name), "running");
        echo(&home, name, name);
    }
    assert_eq!(home.machines().len(), 3);
    home.ok("clone b-1 c");
    home.ok("delete -f a b-1");
    // Two directories stay, of which only what the others stand on.
    assert_eq!(directories(&home), 4);
    echo(&home, "c", "c");
    // A machine of that name can be there again; and a clone can boot.
    home.ok("launch tiny a --memory 64M --no-start");
    home.ok("restart -f c b-2");
    wait_for("c", || home.ok("console --log c").ends_with("ready\n"));
    kill(home.daemon().unwrap());
    wait_for("a new daemon", || list(&home).iter().all(|i| i["status"] != "starting"));
    assert_eq!((status(&home, "c"), directories(&home)), ("running".into(), 5));
    home.ok("clone a d");
    assert_eq!(status(&home, "d"), "stopped");
    assert_one_line(&home.run("clone a c"), 1, &["'c' already"]);
    assert_one_line(&home.run("clone nope e"), 1, &["no instance 'nope'"]);
    assert_one_line(&home.run("clone a A"), 2, &["'A' cannot be a name"]);
    home.ok("delete -f c b-2");
    home.ok("delete a d");
    assert_eq!((directories(&home), home.machines().len()), (0, 0));
}

/// Milliseconds of CPU time of a machine so far.
fn cpu(home: &Home, name: &str) -> u64 {
    info(home, name)["process"]["usage"]["cpu_ms"].as_u64().unwrap()
}

#[test]
fn a_cap_is_kept_and_can_be_changed() {
    let home = Home::new();
    // Its guest is busy all the time.
    home.ok("launch tiny a --memory 64M --engine translator --cpu-cap 20");
    // What it has used to begin with is not counted.
    thread::sleep(Duration::from_secs(1));
    let (begin, before) = (Instant::now(), cpu(&home, "a"));
    thread::sleep(Duration::from_secs(4));
    let used = cpu(&home, "a") - before;
    let percent = used as f64 / begin.elapsed().as_millis() as f64 * 100.0;
    assert!(percent > 0.0 && percent < 22.0, "{percent} %");
    home.ok("set a cpu-cap=none");
    wait_for("more", || {
        let (begin, before) = (Instant::now(), cpu(&home, "a"));
        thread::sleep(Duration::from_millis(500));
        (cpu(&home, "a") - before) as f64 / begin.elapsed().as_millis() as f64 > 0.3
    });
    home.ok("set a cpu-shares=200 memory-max=256M");
    assert_eq!(info(&home, "a")["machine"]["cpu_shares"], 200);
    for (words, told) in [
        ("set a cpu-cap=0", "at least 1"),
        ("set a cpu-shares=0", "from 1 to 10000"),
        ("set a memory-max=1M", "less than the guest's own"),
        ("launch tiny b --cpu-cap 0", "at least 1"),
    ] {
        assert_one_line(&home.run(words), 2, &[told]);
    }
    home.ok("delete -f a");
}

#[test]
fn memory_can_be_less_at_once_and_more_than_it_was_started_with_later() {
    let home = Home::new();
    home.ok("launch tiny a --memory 64M --engine translator");
    let memory = |name: &str| {
        let memory = info(&home, name)["process"]["memory"].clone();
        ["most", "wanted", "now"].map(|field| memory[field].as_u64().unwrap() >> 20)
    };
    assert_eq!(memory("a"), [64, 64, 64]);
    assert!(stderr(&home.run("set a memory=32M")).is_empty(), "nothing waits for a start");
    // Its kernel knows no balloon, so it has given back nothing.
    assert_eq!(memory("a"), [64, 32, 64]);
    assert!(home.ok("list").contains("32 MiB (now 64 MiB)"), "{}", home.ok("list"));
    let said = home.ok("info a");
    assert!(said.contains("32 MiB; the guest has 64 MiB now, of 64 MiB that it was started with"), "{said}");

    // Whoever goes on from there goes on with that.
    home.ok("snapshot create a s");
    home.ok("clone a b");
    assert_eq!(memory("b"), [64, 32, 64]);
    home.ok("set b memory=64M");
    assert_eq!((memory("b"), memory("a")), ([64, 64, 64], [64, 32, 64]));
    let more = home.run("set a memory=96M");
    assert_one_line(&more, 0, &["'a' was started with 64 MiB", "next start", "purlin restart a"]);
    assert_eq!(memory("a"), [64, 64, 64]);
    home.ok("snapshot restore a s");
    assert_eq!((memory("a"), &info(&home, "a")["machine"]["memory"]), ([64, 32, 64], &(32 << 20).into()));

    // Its process may need all that it was started with.
    assert_one_line(&home.run("set a memory-max=48M"), 2, &["started with, 64 MiB", "stop 'a' first"]);
    home.ok("restart -f a");
    assert_eq!(memory("a"), [32, 32, 32]);
    home.ok("set a memory-max=48M");
    home.ok("delete -f a b");
}

#[test]
fn an_image_that_a_killed_daemon_was_receiving_leaves_nothing() {
    let home = Home::new();
    home.ok("list");
    let images = || fs::read_dir(home.path().join("data/images")).unwrap().count();
    let before = images();
    let mut sender = std::os::unix::net::UnixStream::connect(home.path().join("run/daemon.sock")).unwrap();
    sender.write_all(b"PUT /1.0/images/half HTTP/1.1\r\nhost: x\r\ncontent-length: 1048576\r\n\r\n").unwrap();
    sender.write_all(&[7; 1000]).unwrap();
    wait_for("its beginning", || images() > before);
    kill(home.daemon().unwrap());
    wait_for("the daemon's end", || home.daemon().is_none());
    assert!(images() > before, "it was killed in the midst of it");
    home.ok("list");
    assert_eq!(images(), before);
    assert!(!home.ok("image list").contains("half"));
}

/// An instance's directory.
fn dir(home: &Home, name: &str) -> PathBuf {
    home.path().join("data/instances").join(info(home, name)["id"].as_str().unwrap())
}

/// Writes to a disk, which no machine runs on: everywhere a bit, so that each image has some of it.
fn write(disk: &Path, round: u8) {
    let disk = Disk::open(&DiskSpec::new(disk)).unwrap();
    disk.write_at(&[round; 100_000], u64::from(round) * 70_000).unwrap();
    disk.write_at(&[round; 512], 7 << 20).unwrap();
    disk.request::<()>(Request::WriteZeroes { offset: 4 << 20, length: u64::from(round) << 16, unmap: true }).unwrap();
}

fn qemu_img(words: &[&str]) {
    let output = Command::new("qemu-img").args(words).output().expect("qemu-img (package qemu-utils)");
    assert!(output.status.success(), "{words:?}: {output:?}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// All of a disk as a raw image, to compare it with later.
fn copy_of(home: &Home, disk: &Path) -> PathBuf {
    let copy = home.path().join(disk.file_name().unwrap()).with_extension("copy");
    qemu_img(&["convert", "-U", "-O", "raw", text(disk), text(&copy)]);
    copy
}

fn assert_same(disk: &Path, copy: &Path) {
    qemu_img(&["check", "-q", "-U", "-f", "qcow2", text(disk)]);
    qemu_img(&["compare", "-q", "-U", "-f", "qcow2", "-F", "raw", text(disk), text(copy)]);
}

#[test]
fn images_that_no_snapshot_needs_are_merged() {
    let home = Home::new();
    home.ok("launch tiny a --memory 64M --engine translator --no-start");
    let dir = dir(&home, "a");
    let disk = |number: u32| match number {
        0 => dir.join("disk.qcow2"),
        _ => dir.join(format!("disk-{number}.qcow2")),
    };
    for number in 0..6 {
        write(&disk(number), number as u8 + 1);
        home.ok(&format!("snapshot create a s{number}"));
    }
    write(&disk(6), 7);
    let needed = [0, 3, 5, 6].map(disk);
    let copies = needed.each_ref().map(|disk| copy_of(&home, disk));
    assert_eq!(files(&home, "a", "disk").len(), 7);
    for number in [1, 2, 4] {
        home.ok(&format!("snapshot delete a s{number}"));
    }
    wait_for("the merges", || files(&home, "a", "disk").len() == 4);
    let paths: Vec<_> = files(&home, "a", "disk").iter().map(|name| dir.join(name)).collect();
    assert_eq!(paths, [disk(3), disk(5), disk(6), disk(0)]);
    needed.iter().zip(&copies).for_each(|(disk, copy)| assert_same(disk, copy));
    home.ok("snapshot restore a s3");
    assert_same(&disk(7), &copies[1]);
    home.ok("start a");
    echo(&home, "a", "up");

    // Often enough to stand on more than can be, if nothing were merged. The machine runs on it.
    for _ in 0..65 {
        home.ok("snapshot create a x");
        home.ok("snapshot delete a x");
    }
    for name in ["s0", "s3", "s5"] {
        home.ok(&format!("snapshot delete a {name}"));
    }
    wait_for("the merges", || files(&home, "a", "disk").len() == 2);
    echo(&home, "a", "still there");
    home.ok("stop -f a");
    for _ in 0..65 {
        home.ok("clone a b");
        home.ok("delete b");
    }
    wait_for("the merges", || files(&home, "a", "disk").len() == 2);
    home.ok("start a");
    echo(&home, "a", "and again");
    for name in files(&home, "a", "disk") {
        qemu_img(&["check", "-q", "-U", "-f", "qcow2", text(&dir.join(name))]);
    }
}

#[test]
fn images_are_merged_below_a_clone_that_runs_and_is_frozen_again() {
    let home = Home::new();
    home.ok("launch tiny a --memory 64M --engine translator --no-start");
    let there = dir(&home, "a");
    write(&there.join("disk.qcow2"), 1);
    home.ok("snapshot create a s");
    write(&there.join("disk-1.qcow2"), 2);
    home.ok("start a");
    home.ok("clone a b");
    let copy = copy_of(&home, &there.join("disk-1.qcow2"));
    // Now the disks of both stand on one that stands on what nobody else needs.
    home.ok("snapshot delete a s");
    wait_for("the merge", || files(&home, "a", "disk") == ["disk-1.qcow2", "disk-2.qcow2"]);
    assert_same(&there.join("disk-1.qcow2"), &copy);
    for name in ["a", "b"] {
        home.ok(&format!("snapshot create {name} again"));
        echo(&home, name, "goes on");
        home.ok(&format!("snapshot restore {name} again"));
        echo(&home, name, "went back");
    }
    home.ok("delete -f a");
    home.ok("restart -f b");
    wait_for("b", || home.ok("console --log b").ends_with("ready\n"));
}

/// A daemon that is killed has made a merged image by half, or put it in its place and not told the records.
#[test]
fn a_merge_is_gone_on_with_wherever_the_daemon_was_killed() {
    let home = Home::new();
    home.ok("launch tiny a --memory 64M --engine translator --no-start");
    let dir = dir(&home, "a");
    let disk = |number: u32| dir.join(format!("disk-{number}.qcow2"));
    for (number, path) in [dir.join("disk.qcow2"), disk(1), disk(2), disk(3)].iter().enumerate() {
        write(path, number as u8 + 1);
        if number < 3 {
            home.ok(&format!("snapshot create a s{number}"));
        }
    }
    let copies = [disk(2), disk(3)].map(|disk| copy_of(&home, &disk));
    home.ok("snapshot delete a s0");
    wait_for("the merge", || files(&home, "a", "disk").len() == 3);
    kill(home.daemon().unwrap());
    wait_for("the daemon's end", || home.daemon().is_none());
    // What would be left of it is made here.
    let base = fs::read_dir(home.path().join("data/bases")).unwrap().next().unwrap().unwrap().path();
    let (upper, lower) = (disk(2), disk(1));
    let merged = disk(2).with_added_extension("merged");
    Merge { upper, lower, below: base }.run(&merged, &|| true).unwrap();
    fs::rename(&merged, disk(2)).unwrap();
    fs::write(disk(3).with_added_extension("merged"), "half").unwrap();
    home.ok("snapshot delete a s1");
    wait_for("the end of it", || files(&home, "a", "disk") == ["disk-2.qcow2", "disk-3.qcow2"]);
    [disk(2), disk(3)].iter().zip(&copies).for_each(|(disk, copy)| assert_same(disk, copy));
    home.ok("snapshot restore a s2");
    home.ok("start a");
    echo(&home, "a", "up");
}

#[test]
fn a_snapshot_is_deleted_whoever_is_busy_with_its_machine() {
    let home = Home::new();
    home.ok("launch tiny a --memory 64M --engine translator");
    home.ok("snapshot create a s");
    // Its kernel does not listen to the power button.
    let mut monitor = Killed(home.purlin().args(["monitor", "--from", "1"]).stdout(Stdio::piped()).spawn().unwrap());
    let mut stop = home.purlin();
    let _stop = Killed(stop.args(["stop", "a", "--timeout", "100000"]).stderr(Stdio::null()).spawn().unwrap());
    let mut events = BufReader::new(monitor.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(events.any(|line| line.contains("'stop a' begins")));
    home.ok("snapshot delete a s");
    assert_eq!((home.ok("snapshot list a --json").trim(), files(&home, "a", "memory").len()), ("[]", 0));
    home.ok("stop -f a");

    // Who goes back to one just then has it, or is told that it is not there; who takes the next one stands on what was there.
    home.ok("start a");
    for round in 0..12_u64 {
        home.ok("snapshot create a s");
        let verb = if round % 2 == 0 { &["snapshot", "restore", "a", "s"] } else { &["snapshot", "create", "a", "t"] };
        let other = home.purlin().args(verb).stderr(Stdio::piped()).spawn().unwrap();
        thread::sleep(Duration::from_millis(round * 7));
        home.ok("snapshot delete a s");
        let other = other.wait_with_output().unwrap();
        assert!(other.status.success() || stderr(&other)[0].contains("no snapshot 's'"), "{round}: {other:?}");
        if round % 2 == 1 {
            home.ok("snapshot restore a t");
            home.ok("snapshot delete a t");
        }
        assert_eq!(status(&home, "a"), "running", "{round}");
        echo(&home, "a", "up");
    }
    assert_eq!(files(&home, "a", "memory").len(), 0);
}

#[test]
fn a_host_without_ssh_keygen_is_told_what_is_missing() {
    let home = Home::new();
    let nowhere = home.path().join("nowhere");
    fs::create_dir(&nowhere).unwrap();
    let launch = |words: &[&str]| {
        let mut command = home.purlin();
        command.args(["launch", "tiny", "a", "--no-start"]).args(words).env("HOME", &nowhere).env("PATH", &nowhere);
        command.output().unwrap()
    };
    assert_one_line(&launch(&[]), 1, &["ssh key", "ssh-keygen", "openssh-client", "~/.ssh"]);
    assert!(list(&home).is_empty());
    // Who has a key needs none.
    fs::create_dir(nowhere.join(".ssh")).unwrap();
    fs::write(nowhere.join(".ssh/id_ed25519"), "").unwrap();
    fs::write(nowhere.join(".ssh/id_ed25519.pub"), "ssh-ed25519 AAAA me@here").unwrap();
    assert!(launch(&[]).status.success());
}

#[test]
fn files_of_memory_do_not_pile_up_where_the_oldest_snapshot_is_always_deleted() {
    let home = Home::new();
    home.ok("launch tiny a --memory 64M --engine translator");
    home.ok("snapshot create a s0");
    let mut most = 0;
    for number in 1..40 {
        home.ok(&format!("snapshot create a s{number}"));
        home.ok(&format!("snapshot delete a s{}", number - 1));
        most = most.max(files(&home, "a", "memory").len());
    }
    assert!((5..16).contains(&most), "{most} files");
    home.ok("snapshot restore a s39");
    echo(&home, "a", "up");
}
