//! What is written comes back: all of memory, or what has changed, in any number of steps.

mod common;

use std::{fs, path::Path, process::Command};

use common::{PAGES, content, content_of, freeze, memory, put, state, take};
use proptest::{collection::vec, prelude::*};
use purlin_memory::{PAGE_SIZE, discard};
use purlin_snapshot::{Chain, Contents, DiskImage, MAX_DEPTH, Snapshot, SnapshotError, write};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn every_moment_comes_back(
        rounds in vec((any::<bool>(), vec((0..PAGES, 0..4u8), 0..80), 0..PAGES, 0..30u64), 1..6)
    ) {
        let directory = tempfile::tempdir().unwrap();
        let ram = memory();
        let mut parent = None;
        let mut moments = Vec::new();
        for (number, (incremental, writes, hole, length)) in rounds.into_iter().enumerate() {
            writes.into_iter().for_each(|(page, value)| put(&ram, page, value));
            discard(&ram, hole * PAGE_SIZE, length * PAGE_SIZE).unwrap();
            let path = directory.path().join(format!("{number}.snap"));
            let layers = freeze(&ram);
            let written = take(&path, number as u32, &layers, parent.as_ref().filter(|_| incremental)).unwrap();
            prop_assert_eq!(written.bytes, fs::metadata(&path).unwrap().len());
            parent = Some(written.into_parent(layers));
            moments.push((path, content(&ram)));
        }
        for (number, (path, expected)) in moments.into_iter().enumerate() {
            let chain = Chain::open(&path).unwrap();
            chain.verify().unwrap();
            prop_assert_eq!(chain.state(), &state(number as u32));
            let layers = chain.layers().unwrap();
            prop_assert!(content_of(&layers) == expected, "moment {}, from the files", number);
            let loaded = chain.load().unwrap();
            prop_assert!(content_of(&loaded) == expected, "moment {}, from memory", number);
        }
    }
}

#[test]
fn only_what_has_changed_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let ram = memory();
    (100..200).for_each(|page| put(&ram, page, 1));
    let layers = freeze(&ram);
    let written = take(&path("a"), 0, &layers, None).unwrap();
    assert_eq!((written.pages, written.zero_pages), (100, 0));
    let parent = written.into_parent(layers);

    // One that changes, one that is written as it was, one that is zero now, one that is new.
    [(100, 2), (101, 1), (102, 0), (300, 1)].into_iter().for_each(|(page, value)| put(&ram, page, value));
    let layers = freeze(&ram);
    let written = take(&path("b"), 1, &layers, Some(&parent)).unwrap();
    assert_eq!((written.pages, written.zero_pages), (2, 1));

    // A machine that goes on from the snapshot's file stands on it, too.
    let chain = Chain::open(&path("b")).unwrap();
    let layers = chain.layers().unwrap();
    let restored = std::sync::Arc::new(purlin_memory::from_layers(&layers).unwrap());
    let parent = chain.into_parent(layers).unwrap();
    put(&restored, 150, 3);
    let written = take(&path("c"), 2, &freeze(&restored), Some(&parent)).unwrap();
    assert_eq!((written.pages, written.zero_pages), (1, 0));
    assert!(content_of(&Chain::open(&path("c")).unwrap().layers().unwrap()) == content(&restored));
    // Files may go while a machine has them.
    ["a", "b", "c"].iter().for_each(|name| fs::remove_file(path(name)).unwrap());
    assert_eq!(content(&restored).len(), 340 * PAGE_SIZE as usize);
}

#[test]
fn the_manifest_says_what_it_is_of() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.snap");
    let disks = [DiskImage { path: "/disks/a.qcow2".into(), format: "qcow2".into() }, DiskImage::default()];
    let memory = freeze(&memory());
    let contents = Contents { machine: "web-1", state: &state(3), memory: &memory, disks: &disks, parent: None };
    let written = write(&path, &contents).unwrap();
    let snapshot = Snapshot::open(&path).unwrap();
    let manifest = snapshot.manifest();
    assert_eq!((manifest.id(), manifest.machine.as_str(), &manifest.disks[..]), (written.id, "web-1", &disks[..]));
    assert!(manifest.parent.is_none() && manifest.created().elapsed().unwrap().as_secs() < 600);
    assert_eq!((snapshot.pages(), written.id.to_string().len()), (0, 32));
}

#[test]
fn parents_must_be_the_ones_that_they_were() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let ram = memory();
    put(&ram, 7, 1);
    let layers = freeze(&ram);
    let parent = take(&path("a"), 0, &layers, None).unwrap().into_parent(layers);
    put(&ram, 8, 1);
    take(&path("b"), 1, &freeze(&ram), Some(&parent)).unwrap();
    assert!(Chain::open(&path("b")).is_ok());

    fs::rename(path("a"), path("elsewhere")).unwrap();
    let error = Chain::open(&path("b")).unwrap_err();
    assert!(matches!(error, SnapshotError::ParentMissing { .. }), "{error}");
    // The same machine, another snapshot.
    take(&path("a"), 0, &freeze(&ram), None).unwrap();
    let error = Chain::open(&path("b")).unwrap_err();
    assert!(matches!(error, SnapshotError::WrongParent { .. }), "{error}");
    fs::rename(path("b"), path("a")).unwrap();
    let error = Chain::open(&path("a")).unwrap_err();
    assert!(matches!(error, SnapshotError::WrongParent { .. }), "its own parent: {error}");

    // What cannot stand on it.
    let layers = freeze(&ram);
    let missing = take(&path("c"), 1, &layers, Some(&parent)).map(drop);
    assert!(matches!(missing, Ok(())), "something is in its place, which is found when it is opened");
    fs::create_dir(path("other")).unwrap();
    let error = take(&path("other/d"), 1, &layers, Some(&parent)).unwrap_err();
    assert!(matches!(error, SnapshotError::Elsewhere { .. }), "{error}");
    let error = take(&path("d"), 1, &layers[..1], Some(&parent)).unwrap_err();
    assert!(matches!(error, SnapshotError::OtherMachine { .. }), "{error}");
    fs::remove_file(path("a")).unwrap();
    let error = take(&path("d"), 1, &layers, Some(&parent)).unwrap_err();
    assert!(matches!(error, SnapshotError::ParentMissing { .. }), "{error}");
}

#[test]
fn a_chain_has_an_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = |number: usize| directory.path().join(number.to_string());
    let ram = memory();
    let layers = freeze(&ram);
    let mut parent = take(&path(0), 0, &layers, None).unwrap().into_parent(layers);
    for number in 1..MAX_DEPTH {
        put(&ram, number as u64, 1);
        let layers = freeze(&ram);
        parent = take(&path(number), 0, &layers, Some(&parent)).unwrap().into_parent(layers);
    }
    let chain = Chain::open(&path(MAX_DEPTH - 1)).unwrap();
    let layers = chain.layers().unwrap();
    assert!(content_of(&layers) == content(&ram));
    for parent in [parent, chain.into_parent(layers.clone()).unwrap()] {
        let error = take(&path(MAX_DEPTH), 0, &layers, Some(&parent)).unwrap_err();
        assert!(matches!(error, SnapshotError::TooDeep { .. }), "{error}");
    }
}

#[test]
fn nothing_is_overwritten_and_nothing_left_behind() {
    let directory = tempfile::tempdir().unwrap();
    let layers = freeze(&memory());
    let path = directory.path().join("a");
    fs::write(&path, "mine").unwrap();
    let error = take(&path, 0, &layers, None).unwrap_err().to_string();
    assert!(error.contains("exists"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    let error = take(&directory.path().join("none/a"), 0, &layers, None).unwrap_err().to_string();
    assert!(error.contains("No such file"), "{error}");
    assert_eq!(names(directory.path()), ["a"]);
}

fn names(directory: &Path) -> Vec<String> {
    let names = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

/// Set where [`on_a_small_file_system`] is to run: a file system of 400 KiB.
const SMALL_DIRECTORY: &str = "PURLIN_TEST_SMALL_DIRECTORY";

/// The test itself runs where such a file system can be mounted without being root.
#[test]
fn a_full_disk_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mount = "mount -t tmpfs -o size=400k none \"$0\" && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", mount]).arg(directory.path());
    command.arg(std::env::current_exe().unwrap()).args(["--exact", "on_a_small_file_system", "--ignored"]);
    let output = command.env(SMALL_DIRECTORY, directory.path()).output().expect("unshare (util-linux) is needed");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "a_full_disk_leaves_nothing runs it on a small file system"]
fn on_a_small_file_system() {
    let directory = std::env::var_os(SMALL_DIRECTORY).expect("it is run by another test");
    let directory = Path::new(&directory);
    let ram = memory();
    // 50 pages have room, 200 have not.
    (0..40).for_each(|page| put(&ram, page, 1));
    let layers = freeze(&ram);
    let parent = take(&directory.join("a"), 0, &layers, None).unwrap().into_parent(layers);
    (100..300).for_each(|page| put(&ram, page, 1));
    let layers = freeze(&ram);
    for parent in [None, Some(&parent)] {
        let error = take(&directory.join("b"), 0, &layers, parent).unwrap_err().to_string();
        assert!(error.contains("No space left on device"), "{error}");
        assert_eq!(names(directory), ["a"]);
    }
    // The machine has its memory, and the next snapshot is right again.
    (100..280).for_each(|page| put(&ram, page, 0));
    take(&directory.join("b"), 0, &freeze(&ram), Some(&parent)).unwrap();
    assert!(content_of(&Chain::open(&directory.join("b")).unwrap().layers().unwrap()) == content(&ram));
}
