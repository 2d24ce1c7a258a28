//! Clones of a running machine, with an engine whose processors run closures.

mod support;

use std::{io, time::Duration};

use purlin_vmm::{FreezeSpec, Frozen, RunConfig, Running, Vmm};
use support::counting::{COUNTS, NAME, NAMES, config, read, wait_for_steps};
use vm_memory::{Bytes, GuestAddress};

fn clone_of(config: &RunConfig, frozen: &Frozen) -> Running {
    Vmm::restore_from(config.clone(), &frozen.state, &frozen.memory, frozen.saved_code().as_ref(), Box::new(io::sink()))
        .unwrap()
}

#[test]
fn ten_clones_go_on_each_by_itself() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path());
    let parent = Vmm::start(config.clone(), Box::new(io::sink())).unwrap();
    let mut clones = Vec::new();
    for name in 1..=10u64 {
        // Longer than the memory that it writes: that is what the last clone's layer has.
        wait_for_steps(&parent, 1000);
        let frozen = parent.fork(&FreezeSpec::default()).unwrap();
        let clone = clone_of(&config, &frozen);
        let counts = COUNTS.map(|at| read(&clone, at));
        assert!(counts[0] == counts[1] && counts[0] >= 1000 * name, "{counts:?} is no one moment");
        let memory = clone.memory().unwrap();
        NAMES.step_by(4096).for_each(|at| assert_eq!(memory.read_obj::<u64>(GuestAddress(at)).unwrap(), 0));
        memory.write_obj(name, NAME).unwrap();
        clone.resume().unwrap();
        clones.push(clone);
    }
    // A clone of a clone.
    let frozen = clones[4].fork(&FreezeSpec::default()).unwrap();
    clones.push(clone_of(&config, &frozen));
    clones[10].memory().unwrap().write_obj(11u64, NAME).unwrap();
    clones[10].resume().unwrap();
    for (running, name) in clones.iter().chain([&parent]).zip((1..=11).chain([0])) {
        wait_for_steps(running, 1000);
        running.pause().unwrap();
        let memory = running.memory().unwrap();
        let wrong = NAMES.step_by(4096).find(|at| memory.read_obj::<u64>(GuestAddress(*at)).unwrap() != name);
        assert_eq!(wrong, None, "the memory of {name}");
    }
}

#[test]
fn a_paused_machine_is_forked_and_stays_paused() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path());
    let parent = Vmm::start(config.clone(), Box::new(io::sink())).unwrap();
    wait_for_steps(&parent, 10);
    parent.pause().unwrap();
    let (state, count) = (parent.save().unwrap(), read(&parent, COUNTS[0]));
    let frozen = parent.fork(&FreezeSpec::default()).unwrap();
    assert_eq!((&frozen.state, frozen.pause), (&state, Duration::ZERO));
    assert_eq!((parent.save().unwrap(), read(&parent, COUNTS[0])), (state, count));
    let clone = clone_of(&config, &frozen);
    assert_eq!(clone.save().unwrap(), frozen.state);
    // The saved state is of another machine than this memory.
    let half = RunConfig { memory: 8 << 20, ..config.clone() };
    let other = Vmm::start(half.clone(), Box::new(io::sink())).unwrap();
    let other = other.fork(&FreezeSpec::default()).unwrap();
    let refused = Vmm::restore_from(half, &frozen.state, &other.memory, None, Box::new(io::sink()));
    assert!(refused.err().unwrap().to_string().contains("not of one moment"));
}
