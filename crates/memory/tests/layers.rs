//! Machines that are frozen, cloned, written and emptied in any order: each has its own memory, and a layer stays as it
//! was.

use std::{os::fd::AsFd, sync::Arc};

use proptest::{collection::vec, prelude::*};
use purlin_memory::{Freeze, GuestRam, Layer, PAGE_SIZE, create, data, discard, from_layers, receive, send};
use rustix::{
    io::Errno,
    mm::{MapFlags, ProtFlags},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Two slots with a hole between them, the second not at the start of a huge page.
const SLOTS: [(u64, u64); 2] = [(0, 40 * PAGE_SIZE), (50 * PAGE_SIZE, 300 * PAGE_SIZE)];

/// What all of memory is to be: a number for each page, which its bytes have.
type Model = Vec<u8>;

fn pages() -> impl Iterator<Item = u64> {
    SLOTS.into_iter().flat_map(|(start, length)| start / PAGE_SIZE..(start + length) / PAGE_SIZE)
}

#[derive(Clone, Debug)]
enum Step {
    /// Writes to some of a machine's pages.
    Write { machine: usize, first: u64, step: u64, count: u64, value: u8 },
    /// Gives some back.
    Discard { machine: usize, first: u64, count: u64 },
    /// Freezes a machine, writing to a page between the two parts of it.
    Freeze { machine: usize, between: u64, value: u8 },
    /// Makes a machine of what was frozen.
    Clone { frozen: usize, sent: bool },
    /// A machine ends.
    End { machine: usize },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = 0..340u64;
    let step = prop_oneof![
        4 => (0..9usize, place.clone(), 1..4u64, 1..100u64, 0..5u8)
            .prop_map(|(machine, first, step, count, value)| Step::Write { machine, first, step, count, value }),
        2 => (0..9usize, place.clone(), 1..60u64)
            .prop_map(|(machine, first, count)| Step::Discard { machine, first, count }),
        3 => (0..9usize, place, 0..5u8).prop_map(|(machine, between, value)| Step::Freeze { machine, between, value }),
        2 => (0..9usize, any::<bool>()).prop_map(|(frozen, sent)| Step::Clone { frozen, sent }),
        1 => (0..9usize).prop_map(|machine| Step::End { machine }),
    ];
    vec(step, 1..40)
}

#[derive(Default)]
struct World {
    machines: Vec<(Arc<GuestRam>, Model)>,
    frozen: Vec<(Vec<Layer>, Model)>,
}

fn write(ram: &GuestRam, model: &mut Model, page: u64, value: u8) {
    if ram.write_slice(&[value; PAGE_SIZE as usize], GuestAddress(page * PAGE_SIZE)).is_ok() {
        model[page as usize] = value;
    }
}

impl World {
    fn step(&mut self, step: Step) {
        let (machines, frozen) = (self.machines.len(), self.frozen.len());
        match step {
            Step::Write { machine, first, step, count, value } => {
                let (ram, model) = &mut self.machines[machine % machines];
                (0..count).for_each(|i| write(ram, model, (first + i * step).min(349), value));
            }
            Step::Discard { machine, first, count } => {
                let (ram, model) = &mut self.machines[machine % machines];
                discard(ram, first * PAGE_SIZE, count * PAGE_SIZE).unwrap();
                model.iter_mut().skip(first as usize).take(count as usize).for_each(|page| *page = 0);
            }
            Step::Freeze { machine, between, value } => {
                let (ram, model) = &mut self.machines[machine % machines];
                let freeze = Freeze::begin(ram).unwrap();
                write(ram, model, between, value);
                discard(ram, (between / 2) * PAGE_SIZE, 10 * PAGE_SIZE).unwrap();
                model.iter_mut().skip(between as usize / 2).take(10).for_each(|page| *page = 0);
                let layers = freeze.finish().unwrap().into_layers().unwrap();
                self.frozen.push((layers, self.machines[machine % machines].1.clone()));
            }
            Step::Clone { frozen: index, sent } if frozen > 0 => {
                let (layers, model) = &self.frozen[index % frozen];
                let layers = if sent { sent_and_received(layers) } else { layers.clone() };
                self.machines.push((Arc::new(from_layers(&layers).unwrap()), model.clone()));
            }
            Step::End { machine } if machines > 1 => drop(self.machines.swap_remove(machine % machines)),
            Step::Clone { .. } | Step::End { .. } => {}
        }
    }

    fn check(&self) {
        for (ram, model) in &self.machines {
            let data = data(ram).unwrap();
            for page in pages() {
                let mut bytes = [0xff; PAGE_SIZE as usize];
                ram.read_slice(&mut bytes, GuestAddress(page * PAGE_SIZE)).unwrap();
                assert_eq!(bytes, [model[page as usize]; PAGE_SIZE as usize], "page {page}");
                let told = data.iter().any(|range| range.contains(&(page * PAGE_SIZE)));
                assert!(told || model[page as usize] == 0, "page {page} is not told of");
            }
        }
        for (layers, model) in &self.frozen {
            for layer in layers {
                let mut bytes = vec![0; layer.length() as usize];
                layer.read(0, &mut bytes).unwrap();
                let data = layer.data().unwrap();
                for (index, page) in (0..).zip(bytes.chunks(PAGE_SIZE as usize)) {
                    let value = model[(layer.start() / PAGE_SIZE + index) as usize];
                    assert!(page.iter().all(|byte| *byte == value), "page {index} of a layer");
                    assert!(value == 0 || data.contains(&index));
                }
            }
        }
        for pair in self.frozen.windows(2) {
            let [(before, old), (after, new)] = pair else { unreachable!() };
            for (before, after) in before.iter().zip(after) {
                let candidates = after.candidates(before).unwrap();
                let first = before.start() / PAGE_SIZE;
                let differs = |page: u64| old[page as usize] != new[page as usize];
                let missed =
                    (first..first + before.pages()).find(|&p| differs(p) && !candidates.contains(&(p - first)));
                assert_eq!(missed, None);
            }
        }
    }
}

fn sent_and_received(layers: &[Layer]) -> Vec<Layer> {
    let (message, files) = send(layers);
    let files = files.iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
    receive(&message, files).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn every_machine_has_its_own_memory(steps in steps()) {
            let mut world = World { machines: vec![(Arc::new(create(&SLOTS).unwrap()), vec![0; 350])], frozen: Vec::new() };
        for step in steps {
            world.step(step);
        }
        world.check();
    }
}

#[test]
fn the_first_freeze_copies_nothing_and_later_ones_what_was_written() {
    let ram = Arc::new(create(&[(0, 4000 * PAGE_SIZE)]).unwrap());
    let address = ram.iter().next().unwrap().as_ptr();
    let mut model = vec![0; 4000];
    (0..2000).for_each(|page| write(&ram, &mut model, page, 1));
    let freeze = || Freeze::begin(&ram).unwrap().finish().unwrap().into_layers().unwrap();
    let (first, again) = (freeze(), freeze());
    assert!(again[0].candidates(&first[0]).unwrap().is_empty());
    // A few, as a patch: the layer has the rest where the first one has it.
    (0..300).for_each(|page| write(&ram, &mut model, 2 * page, 2));
    let patched = freeze();
    let moved: u64 = patched[0].candidates(&first[0]).unwrap().iter().map(|range| range.end - range.start).sum();
    assert_eq!(moved, 300);
    assert_eq!(send(&patched).1.len(), 2);
    // The freezes come to more pages than there are: everything is in one new file.
    let mut patches = 0;
    let folded = loop {
        let layers = freeze();
        if send(&layers).1.len() == 1 {
            break layers;
        }
        patches += 1;
    };
    assert_eq!(patches, 2000u64.div_ceil(300) - 1);
    let mut bytes = vec![0; 4000 * PAGE_SIZE as usize];
    folded[0].read(0, &mut bytes).unwrap();
    assert!(bytes.chunks(PAGE_SIZE as usize).zip(&model).all(|(page, value)| page[0] == *value));
    assert_eq!(ram.iter().next().unwrap().as_ptr(), address);
    assert_eq!(purlin_memory::usage(&ram).unwrap(), 0);
}

/// So many pages that they are copied by a child, while the machine goes on.
#[test]
fn what_is_copied_late_is_of_the_moment() {
    const PAGES: u64 = 20_000;
    let ram = Arc::new(create(&[(0, PAGES * PAGE_SIZE)]).unwrap());
    let mut model = vec![0; PAGES as usize];
    Freeze::begin(&ram).unwrap().finish().unwrap().into_layers().unwrap();
    for value in 1..4 {
        (0..PAGES).filter(|page| page % 7 != 3).for_each(|page| write(&ram, &mut model, page, value));
        (100..200).for_each(|page| write(&ram, &mut model, page, 0));
        let (frozen, moment) = (Freeze::begin(&ram).unwrap().finish().unwrap(), model.clone());
        // Before the child can be done.
        (0..PAGES).for_each(|page| write(&ram, &mut model, page, 9));
        discard(&ram, 1000 * PAGE_SIZE, 1000 * PAGE_SIZE).unwrap();
        model[1000..2000].fill(0);
        let layers = frozen.into_layers().unwrap();
        let clone = from_layers(&layers).unwrap();
        for (page, value) in (0..).zip(&moment) {
            let mut bytes = [0xff; PAGE_SIZE as usize];
            clone.read_slice(&mut bytes, GuestAddress(page * PAGE_SIZE)).unwrap();
            assert!(bytes.iter().all(|byte| byte == value), "page {page}");
        }
        // There is no child left.
        assert_eq!(rustix::process::wait(rustix::process::WaitOptions::NOHANG).unwrap_err(), Errno::CHILD);
    }
}

#[test]
fn nobody_can_change_a_layer() {
    let ram = Arc::new(create(&[(0, 16 * PAGE_SIZE)]).unwrap());
    ram.write_obj(1u8, GuestAddress(0)).unwrap();
    let layers = Freeze::begin(&ram).unwrap().finish().unwrap().into_layers().unwrap();
    ram.write_obj(2u8, GuestAddress(0)).unwrap();
    let layers = [layers, Freeze::begin(&ram).unwrap().finish().unwrap().into_layers().unwrap()].concat();
    let (_, files) = send(&layers);
    assert_eq!(files.len(), 2);
    for file in files {
        assert_eq!(rustix::io::pwrite(file, &[9], 0), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(file, 0), Err(Errno::PERM));
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        assert_eq!(rustix::fs::fallocate(file, punch, 0, PAGE_SIZE), Err(Errno::PERM));
        assert_eq!(map_shared(file), Err(Errno::PERM));
    }
}

#[allow(unsafe_code, reason = "whether a mapping can be made")]
fn map_shared(file: impl AsFd) -> Result<(), Errno> {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, which nobody uses.
    unsafe { rustix::mm::mmap(std::ptr::null_mut(), 4096, prot, MapFlags::SHARED, file, 0) }.map(|_| ())
}

#[test]
fn what_is_received_is_looked_at() {
    let ram = Arc::new(create(&[(0, 16 * PAGE_SIZE)]).unwrap());
    let layers = Freeze::begin(&ram).unwrap().finish().unwrap().into_layers().unwrap();
    let (message, files) = send(&layers);
    let refused = |files| receive(&message, files).unwrap_err().to_string();
    assert!(refused(Vec::new()).contains("no file 0"));
    let unsealed = rustix::fs::memfd_create(c"t", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    assert!(refused(vec![unsealed]).contains("not sealed"));
    let short = tempfile::tempfile().unwrap();
    short.set_len(15 * PAGE_SIZE).unwrap();
    assert!(refused(vec![short.into()]).contains("is to have more"));
    assert!(receive(&message, vec![files[0].try_clone_to_owned().unwrap()]).is_ok());
    // A snapshot's, wherever that is.
    for directory in [std::env::temp_dir().as_path(), "/dev/shm".as_ref()] {
        let file = tempfile::tempfile_in(directory).unwrap();
        file.set_len(16 * PAGE_SIZE).unwrap();
        assert!(receive(&message, vec![file.into()]).is_ok(), "{}", directory.display());
    }
}

/// Prints what a freeze and a clone cost: `cargo test --release -p purlin-memory --test layers -- --ignored --nocapture`.
#[test]
#[ignore = "it measures"]
fn costs() {
    // Of this thread, so that nobody else's work is measured.
    let now = || {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6
    };
    let ms = |start: f64| now() - start;
    for size in [256u64, 1024, 1024, 256] {
        let pages = (size << 20) / PAGE_SIZE;
        let ram = Arc::new(create(&[(0, size << 20)]).unwrap());
        let mut model = vec![0; pages as usize];
        (0..pages).for_each(|page| write(&ram, &mut model, page, 1));
        let start = now();
        let frozen = Freeze::begin(&ram).unwrap().finish().unwrap();
        println!("{size} MiB: first freeze {:.2} ms", ms(start));
        frozen.into_layers().unwrap();
        println!("  and {:.2} ms to unmap", ms(start));
        for (dirty, step) in [(100, 100), (2560, 20), (2560, 1), (25600, 2), (25600, 1)] {
            (0..dirty).for_each(|page| write(&ram, &mut model, page * step % pages, 2));
            let start = now();
            let freeze = Freeze::begin(&ram).unwrap();
            let begun = ms(start);
            let still = freeze.finish().unwrap();
            let frozen = ms(start) - begun;
            let layers = still.into_layers().unwrap();
            let start = now();
            let clone = from_layers(&layers).unwrap();
            let cloned = ms(start);
            let own = purlin_memory::usage(&clone).unwrap() >> 10;
            println!(
                "  {dirty} pages, every {step}. : begin {begun:.2} ms, finish {frozen:.2} ms, clone {cloned:.2} ms ({own} KiB \
                 its own, {} files)",
                send(&layers).1.len()
            );
        }
    }
}
