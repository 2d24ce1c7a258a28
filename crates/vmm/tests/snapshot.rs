//! Snapshots of a running machine as files, and machines that go on from them.

mod support;

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use purlin_engine::Engine;
use purlin_vmm::{
    FreezeSpec, Pages, RestoreError, RunConfig, Running, SnapshotSpec, Snapshotted, TakeError, Vmm, check_engine,
    snapshots::{Chain, Snapshot, SnapshotError},
    storage::{Disk, DiskSpec, Format, NewImage},
};
use support::counting::{COUNTS, NAME, config, engine, read, wait_for_steps};
use vm_memory::Bytes;

fn start(config: &RunConfig) -> Running {
    Vmm::start(config.clone(), Box::new(io::sink())).unwrap()
}

fn spec(path: PathBuf, incremental: bool) -> SnapshotSpec {
    SnapshotSpec { path, machine: "web-1".into(), disks: FreezeSpec::default(), incremental }
}

fn take(running: &Running, path: &Path, incremental: bool) -> Snapshotted {
    running.snapshot(&spec(path.to_owned(), incremental)).unwrap()
}

fn restore(config: &RunConfig, path: &Path, pages: Pages) -> Result<Running, RestoreError> {
    Vmm::restore_snapshot(config.clone(), path, pages, Box::new(io::sink()))
}

#[test]
fn a_machine_goes_on_from_each_of_its_snapshots() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path());
    let path = |name: &str| directory.path().join(name);
    let running = start(&config);
    let mut moments = Vec::new();
    for number in 0..4u64 {
        running.memory().unwrap().write_obj(number, NAME).unwrap();
        wait_for_steps(&running, 50);
        let before = read(&running, COUNTS[0]);
        let taken = take(&running, &path(&number.to_string()), number > 0);
        assert_eq!(taken.parent, (number > 0).then(|| path(&(number - 1).to_string())));
        assert!(taken.pages > 0 && !taken.pause.is_zero(), "{taken:?}");
        assert_eq!(fs::metadata(path(&number.to_string())).unwrap().len(), taken.bytes);
        moments.push((before, read(&running, COUNTS[0])));
    }
    for pages in [Pages::Mapped, Pages::Copied, Pages::Unchecked] {
        for (number, (from, to)) in moments.iter().enumerate() {
            let again = restore(&config, &path(&number.to_string()), pages).unwrap();
            let counts = COUNTS.map(|at| read(&again, at));
            assert!(counts[0] == counts[1] && (*from..=*to).contains(&counts[0]), "{counts:?} is no one moment");
            assert_eq!(read(&again, NAME.0), number as u64);
            again.resume().unwrap();
            wait_for_steps(&again, 50);
        }
    }
    // One that goes on from a snapshot stands on it with its next one.
    let again = restore(&config, &path("3"), Pages::Mapped).unwrap();
    let state = again.save().unwrap();
    let taken = take(&again, &path("4"), true);
    assert_eq!((taken.parent, taken.pages, taken.pause.is_zero()), (Some(path("3")), 0, true));
    again.resume().unwrap();
    wait_for_steps(&again, 50);
    assert!(take(&again, &path("5"), true).pages > 0);
    assert_eq!(restore(&config, &path("4"), Pages::Mapped).unwrap().save().unwrap(), state);
    assert!(restore(&config, &path("5"), Pages::Mapped).is_ok());
    wait_for_steps(&running, 50);
}

#[test]
fn a_damaged_snapshot_makes_no_machine() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path());
    let path = directory.path().join("a");
    let running = start(&config);
    wait_for_steps(&running, 50);
    take(&running, &path, false);
    let good = fs::read(&path).unwrap();
    // The last byte of the header, of memory (the index follows), and of the file.
    for at in [4095, 4096, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&path, bad).unwrap();
        for pages in [Pages::Mapped, Pages::Copied] {
            let error = restore(&config, &path, pages).err().unwrap();
            assert!(matches!(error, RestoreError::Snapshot(SnapshotError::Corrupt { .. })), "{error}");
        }
    }
    fs::write(&path, &good[..good.len() / 2]).unwrap();
    assert!(matches!(
        restore(&config, &path, Pages::Unchecked),
        Err(RestoreError::Snapshot(SnapshotError::CutOff { .. }))
    ));
    fs::write(&path, &good).unwrap();
    assert!(restore(&config, &path, Pages::Mapped).is_ok());
}

#[test]
fn disks_are_of_the_same_moment_and_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    NewImage::empty(path("disk.qcow2"), Format::Qcow2, 1 << 20).create().unwrap();
    let disks = vec![DiskSpec::new(path("disk.qcow2"))];
    let config = RunConfig { disks, ..config(directory.path()) };
    let running = start(&config);
    wait_for_steps(&running, 10);
    // Without an overlay for the disk nothing happens.
    let refused = running.snapshot(&spec(path("a"), false)).unwrap_err();
    assert!(matches!(refused, TakeError::Freeze(_)), "{refused}");
    assert!(!path("a").exists());
    let disks = FreezeSpec { overlays: vec![Some(path("overlay.qcow2"))] };
    running.snapshot(&SnapshotSpec { disks, ..spec(path("a"), false) }).unwrap();
    let image = Snapshot::open(&path("a")).unwrap().manifest().disks[0].clone();
    assert_eq!((Path::new(&image.path), image.format.as_str()), (&*path("disk.qcow2"), "qcow2"));

    NewImage::overlay(path("again.qcow2"), &image.path, Format::Qcow2).create().unwrap();
    let config = RunConfig { disks: vec![DiskSpec::new(path("again.qcow2"))], ..config };
    let again = restore(&config, &path("a"), Pages::Mapped).unwrap();
    again.resume().unwrap();
    wait_for_steps(&again, 10);
    drop((running, again));
    assert!(Disk::open(&DiskSpec::new(path("overlay.qcow2"))).is_ok());
}

#[test]
fn a_processor_that_the_engine_cannot_be_makes_no_machine() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path());
    let path = directory.path().join("a");
    let running = start(&config);
    wait_for_steps(&running, 10);
    take(&running, &path, false);
    let lesser: Arc<dyn Engine> = Arc::new(engine().without("avx2").without("sha_ni"));
    let chain = Chain::open(&path).unwrap();
    assert!(check_engine(&chain, &*config.engine).is_ok());
    let restored = restore(&RunConfig { engine: lesser.clone(), ..config }, &path, Pages::Mapped);
    for error in [restored.err().unwrap(), check_engine(&chain, &*lesser).unwrap_err()] {
        let text = error.to_string();
        assert!(text.contains("has avx2, sha_ni, which the scripted engine does not offer"), "{text}");
    }
}

/// Set where [`waits_for_room`] is to run: a file system of 800 KiB.
const SMALL_DIRECTORY: &str = "PURLIN_TEST_SMALL_DIRECTORY";

/// The test itself runs where such a file system can be mounted without being root.
#[test]
fn a_full_disk_leaves_nothing_and_the_guest_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let mount = "mount -t tmpfs -o size=800k none \"$0\" && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", mount]).arg(directory.path());
    command.arg(std::env::current_exe().unwrap()).args(["--exact", "on_a_small_file_system", "--ignored"]);
    let output = command.env(SMALL_DIRECTORY, directory.path()).output().expect("unshare (util-linux) is needed");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "a_full_disk_leaves_nothing_and_the_guest_goes_on runs it on a small file system"]
fn on_a_small_file_system() {
    let directory = PathBuf::from(std::env::var_os(SMALL_DIRECTORY).expect("it is run by another test"));
    let config = config(&directory);
    let running = start(&config);
    wait_for_steps(&running, 10);
    let first = directory.join("first");
    take(&running, &first, false);
    // It changes more than the file system has room for.
    running.memory().unwrap().write_obj(1u64, NAME).unwrap();
    wait_for_steps(&running, 1000);
    for incremental in [false, true] {
        let error = running.snapshot(&spec(directory.join("second"), incremental)).unwrap_err();
        assert!(matches!(error, TakeError::Write(_)) && error.to_string().contains("No space left"), "{error}");
        let names = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(names.filter(|name| name != "kernel" && name != "first").count(), 0);
        wait_for_steps(&running, 100);
    }
    // The first one is as it was, and no parent once its file is gone.
    assert!(restore(&config, &first, Pages::Mapped).is_ok());
    fs::remove_file(&first).unwrap();
    let refused = running.snapshot(&spec(directory.join("second"), true)).unwrap_err();
    assert!(matches!(refused, TakeError::Refused(SnapshotError::ParentMissing { .. })), "{refused}");
}
