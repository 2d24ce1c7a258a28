//! Throughput of a disk's queue: sequential by 1 MiB and random by 4 KiB.
//!
//! `cargo bench -p purlin-storage --bench disk [-- DIRECTORY]` measures on files in that directory (the current one if
//! none is given), in the page cache and with it dropped; `PURLIN_IO_URING=off` measures the fallback. If fio is
//! installed, it does the same on the same raw file.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use purlin_storage::{Disk, DiskSpec, Format, NewImage, Queue, Request};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const SIZE: u64 = 512 << 20;
const TIME: Duration = Duration::from_millis(1500);

#[derive(Clone, Copy)]
struct Load {
    write: bool,
    random: bool,
    block: u64,
    depth: u64,
}

impl Load {
    fn name(self) -> String {
        let kind = if self.random { "rand" } else { "" };
        let direction = if self.write { "write" } else { "read" };
        format!("{kind}{direction} {} KiB, {} at once", self.block >> 10, self.depth)
    }

    /// Requests a second.
    fn measure(self, disk: &std::sync::Arc<Disk>) -> f64 {
        let size = (self.depth * self.block) as usize;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap();
        Queue::scope(disk, |queue| self.serve(queue, &memory)).unwrap()
    }

    fn serve<'m>(self, queue: &mut Queue<'m>, memory: &'m GuestMemoryMmap) -> f64 {
        let mut number = 0;
        for slot in 0..self.depth {
            queue.submit(slot, self.request(slot, &mut number, memory));
        }
        let start = Instant::now();
        let mut done = 0;
        while start.elapsed() < TIME {
            // As a device does: take what is there, submit as much again, then sleep.
            let mut completion = queue.wait();
            while let Some(finished) = completion {
                finished.result.unwrap();
                done += 1;
                queue.submit(finished.tag, self.request(finished.tag, &mut number, memory));
                completion = if done % 64 == 0 { None } else { queue.completed() };
            }
        }
        f64::from(done) / start.elapsed().as_secs_f64()
    }

    fn request<'m>(self, slot: u64, number: &mut u64, memory: &'m GuestMemoryMmap) -> Request<'m> {
        let buffers = vec![memory.get_slice(GuestAddress(slot * self.block), self.block as usize).unwrap()];
        *number += 1;
        let block = if self.random { number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20 } else { *number };
        let offset = block % (SIZE / self.block) * self.block;
        if self.write { Request::Write { offset, buffers } } else { Request::Read { offset, buffers } }
    }
}

fn main() {
    let directory = env::args().skip(1).find(|a| !a.starts_with('-')).map_or_else(|| PathBuf::from("."), PathBuf::from);
    let directory = tempfile::tempdir_in(directory).unwrap();
    let images = [(Format::Raw, "disk.raw"), (Format::Qcow2, "disk.qcow2")];
    for (format, name) in images {
        let path = directory.path().join(name);
        NewImage::empty(&path, format, SIZE).create().unwrap();
        let disk = Disk::open(&DiskSpec::new(&path)).unwrap();
        let block = vec![0x5a; 1 << 20];
        (0..SIZE >> 20).for_each(|index| disk.write_at(&block, index << 20).unwrap());
        disk.request::<()>(Request::Flush).unwrap();
    }
    for cached in [true, false] {
        println!("{}", if cached { "in the page cache:" } else { "with the page cache dropped:" });
        for load in loads(cached) {
            print!("  {:32}", load.name());
            for (_, name) in images {
                let path = directory.path().join(name);
                let disk = Disk::open(&DiskSpec::new(&path)).unwrap();
                if !cached {
                    drop_cache(&path);
                }
                let rate = load.measure(&disk);
                print!("  {name} {rate:9.0}/s {:6.0} MB/s", rate * load.block as f64 / 1e6);
                disk.request::<()>(Request::Flush).unwrap();
            }
            println!("{}", fio(load, &directory.path().join("disk.raw"), cached));
        }
    }
}

fn loads(cached: bool) -> Vec<Load> {
    let mut loads = Vec::new();
    for (random, block) in [(false, 1 << 20), (true, 4 << 10)] {
        for depth in [1, 16] {
            loads.extend([false, true].map(|write| Load { write, random, block, depth }));
        }
    }
    loads.retain(|load| cached || !load.write);
    loads
}

fn drop_cache(path: &Path) {
    let file = fs::File::open(path).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

/// fio's figures for the same load by pread and pwrite, and by io_uring.
fn fio(load: Load, path: &Path, cached: bool) -> String {
    let mut figures = String::new();
    for engine in ["psync", "io_uring"] {
        if !cached {
            drop_cache(path);
        }
        let direction = if load.write { "write" } else { "read" };
        let arguments = [
            "--name=x".to_owned(),
            format!("--filename={}", path.display()),
            format!("--rw={}{direction}", if load.random { "rand" } else { "" }),
            format!("--bs={}", load.block),
            format!("--iodepth={}", load.depth),
            format!("--ioengine={engine}"),
            format!("--runtime={}ms", TIME.as_millis()),
            "--time_based".to_owned(),
            "--norandommap".to_owned(),
            "--invalidate=0".to_owned(),
            "--output-format=terse".to_owned(),
        ];
        let Ok(output) = Command::new("fio").args(arguments).output() else { return figures };
        let line = String::from_utf8_lossy(&output.stdout).into_owned();
        // Terse version 3: field 8 is read IOPS, 49 is write IOPS, counted from 1.
        let field = if load.write { 48 } else { 7 };
        let rate = line.split(';').nth(field).unwrap_or("?").to_owned();
        figures += &format!("  fio {engine} {rate:>7}/s");
    }
    figures
}
