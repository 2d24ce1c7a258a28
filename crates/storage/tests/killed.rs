//! A process that is killed in mid-load loses nothing that it was told is stable, and leaves a sound image.

mod common;

use std::{
    env,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
};

use common::{KIB, Kind, MIB, Rng, memory, qemu_img, slice, text};
use purlin_storage::{Disk, DiskSpec, Format, OpenError, Queue, Request};
use vm_memory::{Bytes, GuestAddress};

const SIZE: u64 = 8 * MIB;
const BLOCK: u64 = 4 * KIB;
const BLOCKS: u64 = SIZE / BLOCK;
/// The environment variables that make [`child`] the child.
const IMAGE: &str = "PURLIN_TEST_KILLED_IMAGE";
const SEED: &str = "PURLIN_TEST_KILLED_SEED";

/// The block that write number `number` of a load goes to.
fn block_of(seed: u64, number: u64) -> u64 {
    Rng::new(seed << 32 | number).below(BLOCKS)
}

/// Writes without end, eight at a time, and tells after each flush up to which number all writes are stable.
#[test]
#[ignore = "the child of killed_in_mid_load"]
fn child() {
    let image = env::var(IMAGE).expect("it is run by killed_in_mid_load");
    let seed: u64 = env::var(SEED).unwrap().parse().unwrap();
    let disk = Disk::open(&DiskSpec::new(image).format(Format::Qcow2)).unwrap();
    let memory = memory(8 * BLOCK);
    Queue::scope(&disk, |queue| {
        for batch in 1.. {
            for slot in 0..8 {
                let number: u64 = (batch - 1) * 8 + slot + 1;
                let data = number.to_le_bytes().repeat(BLOCK as usize / 8);
                memory.write_slice(&data, GuestAddress(slot * BLOCK)).unwrap();
                let buffers = vec![slice(&memory, slot * BLOCK, BLOCK)];
                queue.submit(slot, Request::Write { offset: block_of(seed, number) * BLOCK, buffers });
                // Two at once to one block would have no order.
                assert_eq!(queue.wait().unwrap().result, Ok(()));
            }
            if batch % 4 == 0 {
                queue.submit::<()>(8, Request::Flush);
                assert_eq!(queue.wait().unwrap().result, Ok(()));
                // A line of its own: the test harness has said something before.
                println!("\nstable {}", batch * 8);
                std::io::stdout().flush().unwrap();
            }
        }
    })
    .unwrap();
}

/// Runs the child on an image until it has flushed `flushes` times; returns the last number that it said is stable.
fn run_and_kill(image: &Path, seed: u64, flushes: u64) -> u64 {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "child", "--ignored", "--nocapture"]);
    let mut child = command.env(IMAGE, image).env(SEED, seed.to_string()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let stable = |line: String| line.strip_prefix("stable ").map(|number| number.parse::<u64>().unwrap());
    let mut last = 0;
    for _ in 0..flushes {
        last = lines.by_ref().find_map(stable).expect("the child goes on until it is killed");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // What it said before it was killed counts.
    lines.filter_map(stable).last().unwrap_or(last)
}

/// Opens the image. The kernel may hold a killed process's files, and with them its locks, for a moment after its end: as
/// long as io_uring takes to go.
fn open(image: &Path) -> std::sync::Arc<Disk> {
    loop {
        match Disk::open(&DiskSpec::new(image).format(Format::Qcow2).read_only()) {
            Err(OpenError::InUse { .. }) => std::thread::yield_now(),
            other => return other.unwrap(),
        }
    }
}

fn check(image: &Path, before: &[u8], seed: u64, stable: u64) -> Vec<u8> {
    let disk = open(image);
    let (status, said) = qemu_img(&["check", "-f", "qcow2", text(image)]);
    // 3: clusters that nothing refers to any more, which cost room and nothing else.
    assert!(status == 0 || status == 3, "qemu-img check: {said}");
    let mut needed = vec![0; BLOCKS as usize];
    for number in 1..=stable {
        needed[block_of(seed, number) as usize] = number;
    }
    let mut content = vec![0; SIZE as usize];
    disk.read_at(&mut content, 0).unwrap();
    for (block, (now, before)) in content.chunks(BLOCK as usize).zip(before.chunks(BLOCK as usize)).enumerate() {
        let needed = needed[block];
        if needed == 0 && now == before {
            continue;
        }
        let number = u64::from_le_bytes(now[..8].try_into().unwrap());
        assert_eq!(now, number.to_le_bytes().repeat(BLOCK as usize / 8), "block {block} is torn");
        assert!(number >= needed, "block {block} has write {number}, but {needed} was flushed");
        assert_eq!(block_of(seed, number), block as u64, "block {block} has what was written elsewhere");
    }
    content
}

fn killed(kind: Kind, rounds: u64) {
    let directory = tempfile::tempdir().unwrap();
    let (spec, mut content) = kind.create(directory.path(), SIZE, &mut Rng::new(1));
    for seed in 0..rounds {
        let stable = run_and_kill(&spec.path, seed, 1 + Rng::new(seed).below(12));
        content = check(&spec.path, &content, seed, stable);
        // Each round's numbers begin at 1 again.
        let path = spec.path.as_path();
        let (status, said) = qemu_img(&["check", "-r", "leaks", "-f", "qcow2", text(path)]);
        assert_eq!(status, 0, "{said}");
    }
}

#[test]
fn killed_in_mid_load() {
    killed(Kind::Qcow2, 8);
    killed(Kind::Overlays, 6);
    killed(Kind::SmallClusters, 6);
}
