//! Random loads, compared with a model in memory and then with qemu-img's reading of the image.

mod common;

use common::{KIB, Kind, MIB, Rng, assert_image, memory, slice};
use purlin_storage::{Disk, Queue, Request};
use vm_memory::{Bytes, GuestAddress};

const SIZE: u64 = 8 * MIB;
/// Requests at once.
const DEPTH: u64 = 16;
/// Each request's part of guest memory.
const BUFFER: u64 = 256 * KIB;

/// A request in flight, by its tag.
struct Pending {
    range: std::ops::Range<u64>,
    expect: Expect,
}

enum Expect {
    /// A read: the content at the time.
    Content,
    /// The content is this now.
    Becomes(Vec<u8>),
    /// A discard: zeroes or as before, which a read will tell.
    Discarded,
    /// That read.
    ZeroesOrContent,
    Nothing,
}

struct Load<'a> {
    rng: &'a mut Rng,
    content: &'a mut [u8],
    /// The disk's offset of `content`.
    start: u64,
}

impl Load<'_> {
    /// A range that no request in flight touches, with a length of 512 bytes to a bit more than a cluster, or any.
    fn range(&mut self, pending: &[Option<Pending>]) -> std::ops::Range<u64> {
        let size = self.content.len() as u64;
        loop {
            let align = [512, 4 * KIB, 64 * KIB][self.rng.below(3) as usize];
            let start = self.rng.below(size / align) * align;
            let length = (1 + self.rng.below(BUFFER / align)) * align;
            let range = start..(start + length).min(size);
            let free = pending.iter().flatten().all(|p| range.end <= p.range.start || p.range.end <= range.start);
            if free {
                return range;
            }
        }
    }

    fn run(&mut self, disk: &std::sync::Arc<Disk>, requests: u64) {
        let memory = memory(DEPTH * BUFFER);
        Queue::scope(disk, |queue| {
            let mut pending: Vec<Option<Pending>> = (0..DEPTH).map(|_| None).collect();
            for _ in 0..requests {
                let slot = match pending.iter().position(Option::is_none) {
                    Some(slot) => slot,
                    None => self.finish_one(queue, &mut pending, &memory),
                };
                let range = self.range(&pending);
                let (request, expect) = self.request(&memory, slot as u64 * BUFFER, &range);
                let range = range.start..range.end;
                queue.submit(slot as u64, request);
                pending[slot] = Some(Pending { range, expect });
            }
            while queue.in_flight() > 0 {
                self.finish_one(queue, &mut pending, &memory);
            }
        })
        .unwrap();
    }

    fn request<'m>(
        &mut self,
        memory: &'m vm_memory::GuestMemoryMmap,
        address: u64,
        range: &std::ops::Range<u64>,
    ) -> (Request<'m>, Expect) {
        let (offset, length) = (self.start + range.start, range.end - range.start);
        // Two buffers, the first one short.
        let buffers = || {
            let first = length.min(512);
            let mut buffers = vec![slice(memory, address, first)];
            if length > first {
                buffers.push(slice(memory, address + first, length - first));
            }
            buffers
        };
        match self.rng.below(20) {
            0..=7 => {
                let mut data = vec![0; length as usize];
                self.rng.fill(&mut data);
                memory.write_slice(&data, GuestAddress(address)).unwrap();
                (Request::Write { offset, buffers: buffers() }, Expect::Becomes(data))
            }
            8..=13 => (Request::Read { offset, buffers: buffers() }, Expect::Content),
            14 | 15 => (Request::Discard { offset, length }, Expect::Discarded),
            kind @ 16..=18 => {
                let unmap = kind != 16;
                (Request::WriteZeroes { offset, length, unmap }, Expect::Becomes(vec![0; length as usize]))
            }
            _ => (Request::Flush, Expect::Nothing),
        }
    }

    /// Waits for a request, checks what it did, and returns its slot.
    fn finish_one<'m>(
        &mut self,
        queue: &mut Queue<'m>,
        pending: &mut [Option<Pending>],
        memory: &'m vm_memory::GuestMemoryMmap,
    ) -> usize {
        loop {
            let done = queue.wait().expect("something is in flight");
            assert_eq!(done.result, Ok(()));
            let slot = done.tag as usize;
            let Pending { range, expect } = pending[slot].take().expect("each request is done once");
            let content = &mut self.content[range.start as usize..range.end as usize];
            let address = done.tag * BUFFER;
            let mut read = vec![0; content.len()];
            memory.read_slice(&mut read, GuestAddress(address)).unwrap();
            match expect {
                Expect::Content => assert!(read == content, "a read of {range:?} brought something else"),
                Expect::Becomes(data) => content.copy_from_slice(&data),
                Expect::Discarded => {
                    let buffers = vec![slice(memory, address, content.len() as u64)];
                    queue.submit(done.tag, Request::Read { offset: self.start + range.start, buffers });
                    pending[slot] = Some(Pending { range, expect: Expect::ZeroesOrContent });
                    continue;
                }
                Expect::ZeroesOrContent => {
                    let as_it_was = |(now, before): (&u8, &u8)| *now == 0 || now == before;
                    assert!(read.iter().zip(&*content).all(as_it_was), "a discard of {range:?} made new content");
                    content.copy_from_slice(&read);
                }
                Expect::Nothing => {}
            }
            return slot;
        }
    }
}

fn load(kind: Kind, seed: u64) {
    let mut rng = Rng::new(seed);
    let directory = tempfile::tempdir().unwrap();
    let (spec, mut content) = kind.create(directory.path(), SIZE, &mut rng);
    for round in 0..4 {
        let disk = Disk::open(&spec).unwrap();
        let requests = 100 + rng.below(200);
        Load { rng: &mut rng, content: &mut content, start: 0 }.run(&disk, requests);
        drop(disk);
        eprintln!("{kind:?}, seed {seed}: round {round}");
        assert_image(&spec.path, spec.format.unwrap(), &content);
    }
}

/// Queues on several threads, each on its own part of the disk: they share the image's tables.
fn load_by_threads(kind: Kind, seed: u64) {
    const THREADS: u64 = 4;
    let directory = tempfile::tempdir().unwrap();
    let (spec, mut content) = kind.create(directory.path(), SIZE, &mut Rng::new(seed));
    let disk = Disk::open(&spec).unwrap();
    let part = SIZE / THREADS;
    std::thread::scope(|scope| {
        for (index, content) in content.chunks_mut(part as usize).enumerate() {
            let disk = &disk;
            scope.spawn(move || {
                let mut rng = Rng::new(seed * THREADS + index as u64);
                Load { rng: &mut rng, content, start: index as u64 * part }.run(disk, 300);
            });
        }
    });
    drop(disk);
    assert_image(&spec.path, spec.format.unwrap(), &content);
}

#[test]
fn raw() {
    (0..3).for_each(|seed| load(Kind::Raw, seed));
    load_by_threads(Kind::Raw, 9);
}

#[test]
fn qcow2() {
    (0..3).for_each(|seed| load(Kind::Qcow2, seed));
    (0..3).for_each(|seed| load_by_threads(Kind::Qcow2, seed));
}

#[test]
fn qcow2_version_2() {
    (0..2).for_each(|seed| load(Kind::OldQcow2, seed));
    load_by_threads(Kind::OldQcow2, 9);
}

#[test]
fn small_clusters() {
    (0..2).for_each(|seed| load(Kind::SmallClusters, seed));
    load_by_threads(Kind::SmallClusters, 9);
}

#[test]
fn overlays_three_deep() {
    (0..3).for_each(|seed| load(Kind::Overlays, seed));
    (0..3).for_each(|seed| load_by_threads(Kind::Overlays, seed));
}

/// The same where the host does not allow io_uring.
#[test]
fn without_io_uring() {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.env("PURLIN_IO_URING", "off").args([
        "--exact",
        "raw",
        "qcow2",
        "qcow2_version_2",
        "small_clusters",
        "overlays_three_deep",
    ]);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("5 passed"), "{said}");
}
