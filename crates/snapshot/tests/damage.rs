//! A damaged snapshot is refused, whatever is wrong with it, with an error that says what.

mod common;

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use common::{freeze, memory, put, take};
use purlin_snapshot::{Chain, SnapshotError};

/// A snapshot with a parent, of a few pages, so that every byte has its turn. Returns the path of the upper one.
fn two(directory: &Path) -> [PathBuf; 2] {
    let paths = ["parent.snap", "child.snap"].map(|name| directory.join(name));
    let ram = memory();
    [3, 60, 61].into_iter().for_each(|page| put(&ram, page, 1));
    let layers = freeze(&ram);
    let parent = take(&paths[0], 0, &layers, None).unwrap().into_parent(layers);
    [3, 62].into_iter().for_each(|page| put(&ram, page, 2));
    put(&ram, 60, 0);
    take(&paths[1], 1, &freeze(&ram), Some(&parent)).unwrap();
    paths
}

/// What a restore does before it makes anything.
fn check(path: &Path) -> Result<(), SnapshotError> {
    let chain = Chain::open(path)?;
    chain.verify()?;
    chain.layers().map(|_| ())
}

fn assert_clear(error: &SnapshotError, file: &Path) {
    let text = error.to_string();
    assert!(text.contains(file.to_str().unwrap()) && !text.contains('\n'), "{text}");
}

#[test]
fn every_byte_is_guarded() {
    let directory = tempfile::tempdir().unwrap();
    let [parent, child] = two(directory.path());
    check(&child).unwrap();
    let mut sections = BTreeSet::new();
    for path in [&parent, &child] {
        let good = fs::read(path).unwrap();
        let file = fs::File::options().write(true).open(path).unwrap();
        let pages = 4096..4096 + good[4096..].len() / 4096 * 4096;
        // Of each page a fraction; they are all alike.
        for at in (0..good.len()).filter(|at| !pages.contains(at) || at % 13 == 0) {
            file.write_all_at(&[good[at] ^ 1 << (at % 8)], at as u64).unwrap();
            let error = check(&child).expect_err("a flipped bit");
            file.write_all_at(&good[at..=at], at as u64).unwrap();
            assert_clear(&error, path);
            sections.insert(match error {
                SnapshotError::Corrupt { section, .. } => section,
                SnapshotError::NotASnapshot { .. } => "magic",
                SnapshotError::Newer { .. } => "version",
                other => panic!("at {at:#x}: {other}"),
            });
        }
    }
    let all = ["header", "index", "magic", "manifest", "memory", "state", "version"];
    assert!(sections.iter().eq(&all), "{sections:?}");
    check(&child).unwrap();
}

#[test]
fn a_cut_off_file_is_refused_wherever_it_ends() {
    let directory = tempfile::tempdir().unwrap();
    let [parent, child] = two(directory.path());
    for path in [&parent, &child] {
        let good = fs::read(path).unwrap();
        let file = fs::File::options().write(true).open(path).unwrap();
        for length in (0..good.len()).rev() {
            file.set_len(length as u64).unwrap();
            let error = check(&child).expect_err("a file that is cut off");
            assert_clear(&error, path);
            let named = matches!(error, SnapshotError::CutOff { .. })
                || (length == 0 && matches!(error, SnapshotError::NotASnapshot { .. }));
            assert!(named, "at {length:#x}: {error}");
        }
        // Longer than it is is no better.
        fs::write(path, [&good[..], &[0]].concat()).unwrap();
        assert!(matches!(check(&child), Err(SnapshotError::CutOff { .. })));
        fs::write(path, &good).unwrap();
    }
}

/// Writes a header with another version or features, and the right checksum.
fn with_word(path: &Path, at: usize, value: u32) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[..4092]);
    bytes[4092..4096].copy_from_slice(&checksum.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn later_formats_are_told() {
    let directory = tempfile::tempdir().unwrap();
    let [parent, _] = two(directory.path());
    with_word(&parent, 12, 4);
    let error = check(&parent).unwrap_err();
    assert!(matches!(error, SnapshotError::Feature { bits: 4, .. }), "{error}");
    with_word(&parent, 12, 0);
    check(&parent).unwrap();
    with_word(&parent, 8, 2);
    let error = check(&parent).unwrap_err();
    assert!(matches!(error, SnapshotError::Newer { found: 2, known: 1, .. }), "{error}");
    assert!(error.to_string().contains("use a newer one"));
}

/// Sections whose checksums are right, and which make no sense all the same.
#[test]
fn nonsense_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let [parent, _] = two(directory.path());
    let good = fs::read(&parent).unwrap();
    // Each word of the section table, and random ones: no panic, and never a snapshot.
    for at in (16..112).step_by(4).filter(|at| (at - 16) % 24 < 16) {
        for value in [0, 1, 4095, 4096, 0x7fff_ffff, u32::MAX] {
            fs::write(&parent, &good).unwrap();
            with_word(&parent, at, value);
            let same = good[at..at + 4] == value.to_le_bytes();
            assert_eq!(check(&parent).is_ok(), same, "{value:#x} at {at}");
        }
    }
}

#[test]
fn other_files_are_no_snapshots() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a");
    for bytes in [&b""[..], b"PURLX", &[0; 10_000], b"QFI\xfb"] {
        fs::write(&path, bytes).unwrap();
        let error = check(&path).unwrap_err();
        assert!(matches!(error, SnapshotError::NotASnapshot { .. }), "{error}");
    }
    assert!(matches!(check(directory.path()), Err(SnapshotError::Host { .. })));
    assert!(matches!(check(&directory.path().join("none")), Err(SnapshotError::Host { what: "open", .. })));
}
