//! Copies of machines that begin with the translations of the original.

use std::{fs::File, sync::Arc};

use iced_x86::{IcedError, code_asm::*};
use purlin_engine::{CodeChanges, SavedCode};
use vm_memory::{Bytes, GuestAddress};

use crate::machine::*;

/// Functions, each alone on its page: `mov eax, VALUE; ret`.
const FUNCTIONS: u64 = 0x40_0000;
const COUNT: u64 = 600;

fn function(number: u64) -> u64 {
    FUNCTIONS + 0x1000 * number
}

fn set_value(m: &Machine, number: u64, value: u32) {
    m.poke(function(number) + 1, value);
}

/// Adds up what all functions return; if `patched` each is first made to return one more than it did.
fn sum(patched: bool) -> impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError> {
    move |a| {
        let mut again = a.create_label();
        a.xor(esi, esi)?;
        a.mov(rbx, FUNCTIONS)?;
        a.mov(ecx, COUNT as u32)?;
        a.set_label(&mut again)?;
        if patched {
            a.inc(dword_ptr(rbx + 1))?;
        }
        a.call(rbx)?;
        a.add(esi, eax)?;
        a.add(rbx, 0x1000)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.mov(eax, esi)?;
        done(a)
    }
}

/// A machine that has run its functions, which return 1.
fn original(cpus: u32, small: bool) -> Machine {
    let m = if small { Machine::with_small_code_cache(cpus) } else { Machine::new(cpus) };
    for number in 0..COUNT {
        m.load(function(number), &[0xb8, 1, 0, 0, 0, 0xc3]);
    }
    let mut guest = run_at_code(&m, 0, false);
    assert_eq!(guest.run(), Stop::Done(COUNT as u32));
    m
}

fn run_at_code(m: &Machine, cpu: u32, patched: bool) -> Guest {
    m.code(CODE, sum(patched));
    m.vcpu(cpu, |_| {})
}

/// What runs [`sum`] anew.
fn run_again(guest: &mut Guest) -> Stop {
    guest.change(|state| {
        state.regs.rip = CODE;
    });
    guest.run()
}

/// A machine with the same memory, `change`d, that begins with the same translations.
fn copy(of: &Machine, cpus: u32, small: bool, change: impl FnOnce(&Machine)) -> Machine {
    let m = if small { Machine::with_small_code_cache(cpus) } else { Machine::new(cpus) };
    m.load(0, &bytes(of));
    change(&m);
    m.vm.restore_code(&saved(of)).unwrap();
    m
}

/// All its memory.
fn bytes(m: &Machine) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY as usize];
    m.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// A machine with this memory and code.
fn with_memory(memory: &[u8], code: &SavedCode) -> Machine {
    let m = Machine::new(1);
    m.load(0, memory);
    m.vm.restore_code(code).unwrap();
    m
}

/// What a machine that stands still has translated.
fn saved(m: &Machine) -> SavedCode {
    m.vm.code().expect("the translator has code").save().unwrap().expect("it is there still")
}

#[test]
fn a_copy_executes_what_the_original_has_translated() {
    let m = original(1, false);
    // It is told that memory is the same, and believes it: so one sees what it executes.
    let copied = copy(&m, 1, false, |copied| set_value(copied, 7, 1000));
    let mut guest = copied.vcpu(0, |_| {});
    assert_eq!(guest.run(), Stop::Done(COUNT as u32));
}

#[test]
fn stores_to_its_code_are_noticed_and_are_its_own() {
    let m = original(1, false);
    let copied = copy(&m, 1, false, |_| {});
    // By a device.
    set_value(&copied, 7, 1000);
    let mut guest = copied.vcpu(0, |_| {});
    let with_one = COUNT as u32 + 999;
    assert_eq!(guest.run(), Stop::Done(with_one));
    assert_eq!(run_again(&mut guest), Stop::Done(with_one));

    // By the guest, on every page.
    copied.code(CODE, sum(true));
    for round in 1..4 {
        assert_eq!(run_again(&mut guest), Stop::Done(with_one + round * COUNT as u32));
    }
    // The original, and another copy of it, have nothing of that.
    let other = copy(&m, 1, false, |_| {});
    assert_eq!(other.vcpu(0, |_| {}).run(), Stop::Done(COUNT as u32));
    m.code(CODE, sum(true));
    let third = copy(&m, 1, false, |_| {});
    assert_eq!(third.vcpu(0, |_| {}).run(), Stop::Done(2 * COUNT as u32));
}

#[test]
fn a_copy_of_a_copy_has_what_both_have_translated() {
    let m = original(1, false);
    let first = copy(&m, 1, false, |_| {});
    let mut guest = run_at_code(&first, 0, true);
    assert_eq!(guest.run(), Stop::Done(2 * COUNT as u32));
    let tell = |m: &Machine| set_value(m, 3, 500);
    let second = copy(&first, 1, false, tell);
    second.code(CODE, sum(false));
    // What it has not been told of.
    assert_eq!(second.vcpu(0, |_| {}).run(), Stop::Done(2 * COUNT as u32));
    set_value(&second, 3, 500);
    let mut guest = copy(&second, 1, false, |_| {}).vcpu(0, |_| {});
    assert_eq!(guest.run(), Stop::Done(2 * COUNT as u32 + 498));
}

#[test]
fn a_copy_whose_cache_is_full_begins_anew() {
    let m = original(1, true);
    let copied = copy(&m, 1, true, |_| {});
    let mut guest = run_at_code(&copied, 0, true);
    let mut wanted = COUNT as u32;
    // Each round translates every function anew.
    for _ in 0..20 {
        wanted += COUNT as u32;
        assert_eq!(run_again(&mut guest), Stop::Done(wanted));
    }
}

#[test]
fn two_processors_execute_pages_that_become_its_own() {
    let m = original(2, false);
    let copied = copy(&m, 2, false, |_| {});
    let mut guests = [run_at_code(&copied, 0, false), copied.vcpu(1, |_| {})];
    for round in 0..20 {
        // Between two runs a device stores to every page: both processors find out, and link anew.
        (0..COUNT).for_each(|number| set_value(&copied, number, round));
        assert_eq!(run_all(&mut guests), [Stop::Done(COUNT as u32 * round); 2]);
        guests.iter_mut().for_each(|guest| guest.change(|state| state.regs.rip = CODE));
    }
}

#[test]
fn an_image_of_another_moment_is_that_of_the_right_one() {
    let m = original(2, false);
    // The moment is before the image, in which the functions return 2.
    let (then, memory) = (m.vm.code().unwrap(), bytes(&m));
    let mut guest = m.vcpu(1, |_| {});
    m.code(CODE, sum(true));
    assert_eq!(run_again(&mut guest), Stop::Done(2 * COUNT as u32));
    let code = then.save().unwrap().unwrap();
    assert_eq!(with_memory(&memory, &code).vcpu(0, |_| {}).run(), Stop::Done(COUNT as u32));

    // Now the image is before the moment: of what has changed since it has nothing.
    (0..COUNT / 2).for_each(|number| set_value(&m, number, 4));
    m.code(CODE, sum(false));
    let later = saved(&m);
    assert!(Arc::ptr_eq(&later.file, &code.file), "one image is enough");
    assert!(later.changes.died.len() >= COUNT as usize / 2);
    assert_eq!(with_memory(&bytes(&m), &later).vcpu(0, |_| {}).run(), Stop::Done(3 * COUNT as u32));
}

#[test]
fn the_original_goes_on_where_it_has_given_its_code_away() {
    for small in [false, true] {
        let m = original(2, small);
        let (code, memory) = (saved(&m), bytes(&m));
        // What it changes from here on is its own: pages that copies have, and, where the cache is small, all of it, again and again.
        let mut guest = run_at_code(&m, 1, true);
        let mut wanted = COUNT as u32;
        for _ in 0..10 {
            wanted += COUNT as u32;
            assert_eq!(run_again(&mut guest), Stop::Done(wanted));
        }
        let copied = if small { Machine::with_small_code_cache(1) } else { Machine::new(1) };
        copied.load(0, &memory);
        copied.code(CODE, sum(false));
        copied.vm.restore_code(&code).unwrap();
        assert_eq!(copied.vcpu(0, |_| {}).run(), Stop::Done(COUNT as u32));
        // It can be copied again.
        m.code(CODE, sum(false));
        let again = with_memory(&bytes(&m), &saved(&m));
        assert_eq!(again.vcpu(0, |_| {}).run(), Stop::Done(wanted));
    }
}

#[test]
fn code_is_given_away_while_it_executes() {
    let m = original(2, false);
    let wanted = 200 * COUNT as u32;
    std::thread::scope(|scope| {
        let mut guest = run_at_code(&m, 1, false);
        let running = scope.spawn(move || (0..200).map(|_| run_again(&mut guest)).filter_map(done_with).sum::<u32>());
        let copied = with_memory(&bytes(&m), &saved(&m));
        assert_eq!(copied.vcpu(0, |_| {}).run(), Stop::Done(COUNT as u32));
        assert_eq!(running.join().unwrap(), wanted);
    });
}

fn done_with(stop: Stop) -> Option<u32> {
    if let Stop::Done(value) = stop { Some(value) } else { None }
}

#[test]
fn an_image_that_lacks_much_is_followed_by_another_one() {
    let m = original(2, false);
    let first = saved(&m);
    m.vm.code().unwrap().refresh().unwrap();
    assert!(Arc::ptr_eq(&saved(&m).file, &first.file), "it lacks nothing");
    let mut guest = run_at_code(&m, 1, true);
    for round in 2..5 {
        assert_eq!(run_again(&mut guest), Stop::Done(round * COUNT as u32));
    }
    m.vm.code().unwrap().refresh().unwrap();
    m.code(CODE, sum(false));
    let second = saved(&m);
    assert!(!Arc::ptr_eq(&second.file, &first.file), "it lacks more than it has");
    assert_eq!(with_memory(&bytes(&m), &second).vcpu(0, |_| {}).run(), Stop::Done(4 * COUNT as u32));
}

#[test]
fn what_is_no_image_is_refused() {
    let m = Machine::new(1);
    let file = Arc::new(File::open("/proc/self/exe").unwrap());
    assert!(m.vm.restore_code(&SavedCode { file, changes: CodeChanges::default() }).is_err());
    // A machine that has run already goes on as it is.
    let m = original(2, false);
    let code = saved(&m);
    let mut guest = m.vcpu(1, |_| {});
    m.vm.restore_code(&code).unwrap();
    assert_eq!(guest.run(), Stop::Done(COUNT as u32));
}
