//! Memory order: outcomes of small programs that x86-TSO forbids never appear.
//!
//! The tests and their names are those of Sewell et al., "x86-TSO: A Rigorous and Usable Programmer's Model for x86
//! Multiprocessors" (CACM 53(7), 2010), and of the diy7 suite; those of SDM vol. 3A 8.2.3 go by its sections.

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::regs::gpr::RDI;

use crate::machine::*;

type Result = std::result::Result<(), IcedError>;

/// What a thread of a litmus test does, in order.
#[derive(Clone, Copy)]
enum Op {
    /// Stores a number to a location.
    Store(u64, u8),
    /// The same, by XCHG; what was there is forgotten.
    Exchange(u64, u8),
    /// The same, by LOCK CMPXCHG in a loop.
    Compare(u64, u8),
    /// Adds a number by LOCK XADD; what was there is the thread's next result.
    Add(u64, u8),
    /// Loads a location into the thread's next result.
    Load(u64),
    /// MFENCE.
    Fence,
    /// A locked instruction on another location.
    Locked,
}
use Op::{Add, Compare, Exchange, Fence, Load, Locked, Store};

const X: u64 = 0;
const Y: u64 = 1;
/// What nobody looks at.
const ELSEWHERE: i32 = 2;
/// Runs of one litmus test.
const RUNS: u64 = 10_000;
const LOCATIONS: u64 = DATA;
const RESULTS: u64 = DATA + 0x40_0000;
const TURNS: u64 = DATA + 0x60_0000;
/// Results of a thread, at most.
const WIDTH: u64 = 2;

/// The results of one run: those of all threads in turn, then X and Y as they are in the end.
type Outcome = Vec<u8>;

impl Op {
    /// R8: the run's locations. Results go to `results`. Changes EAX, ECX.
    fn emit(self, a: &mut CodeAssembler, results: &mut std::slice::Iter<'_, AsmRegister8>) -> Result {
        let place = |n: u64| r8 + (n * 64 * RUNS) as i32;
        let mut result = || *results.next().expect("two results of a thread at most");
        match self {
            Store(n, value) => a.mov(byte_ptr(place(n)), u32::from(value)),
            Exchange(n, value) => {
                a.mov(al, u32::from(value))?;
                a.xchg(byte_ptr(place(n)), al)
            }
            Compare(n, value) => {
                let mut again = a.create_label();
                a.mov(cl, u32::from(value))?;
                a.mov(al, byte_ptr(place(n)))?;
                a.set_label(&mut again)?;
                a.lock().cmpxchg(byte_ptr(place(n)), cl)?;
                a.jnz(again)
            }
            Add(n, value) => {
                let register = result();
                a.mov(register, u32::from(value))?;
                a.lock().xadd(byte_ptr(place(n)), register)
            }
            Load(n) => a.mov(result(), byte_ptr(place(n))),
            Fence => a.mfence(),
            Locked => a.lock().add(dword_ptr(rbx + ELSEWHERE * 0x400), 0),
        }
    }

    fn has_result(&self) -> bool {
        matches!(self, Load(_) | Add(..))
    }
}

/// Runs a litmus test.
fn litmus(threads: &[&[Op]]) -> Vec<Outcome> {
    let m = Machine::new(threads.len() as u32);
    let mut guests = Vec::new();
    for (t, ops) in threads.iter().enumerate() {
        let at = CODE + 0x1000 * t as u64;
        // Locations are arrays of cache lines; RDI counts in them. The next thread is waited for, but not for
        // ever: it may have no processor to run on.
        m.code(at, |a| {
            let (mut again, mut wait, mut go) = (a.create_label(), a.create_label(), a.create_label());
            a.mov(rbx, TURNS)?;
            a.mov(rsi, RESULTS + WIDTH * RUNS * t as u64)?;
            a.xor(edi, edi)?;
            a.mov(r8, LOCATIONS)?;
            a.set_label(&mut again)?;
            a.inc(edi)?;
            a.mov(qword_ptr(rbx + 64 * t as i32), rdi)?;
            a.mov(ecx, 2000)?;
            a.set_label(&mut wait)?;
            a.cmp(qword_ptr(rbx + 64 * ((t + 1) % threads.len()) as i32), rdi)?;
            a.jae(go)?;
            a.dec(ecx)?;
            a.jnz(wait)?;
            // Not always at the same time: each run has other pauses.
            let mut pause = a.create_label();
            a.set_label(&mut go)?;
            a.mov(ecx, edi)?;
            a.shr(ecx, 4 * (t as u32 & 1))?;
            a.and(ecx, 15)?;
            a.set_label(&mut pause)?;
            a.dec(ecx)?;
            a.jns(pause)?;
            let registers = [r10b, r11b];
            let mut results = registers.iter();
            for op in *ops {
                op.emit(a, &mut results)?;
            }
            let count = registers.len() - results.len();
            for (i, register) in registers[..count].iter().enumerate() {
                a.mov(byte_ptr(rsi + i as i32), *register)?;
            }
            a.add(rsi, WIDTH as i32)?;
            a.add(r8, 64)?;
            a.cmp(edi, RUNS as i32)?;
            a.jb(again)?;
            done(a)
        });
        guests.push(m.vcpu(t as u32, |s| s.regs.rip = at));
    }
    for (stop, guest) in run_all(&mut guests).into_iter().zip(&mut guests) {
        assert!(matches!(stop, Stop::Done(_)), "{stop:?}");
        assert_eq!(guest.state().regs.gpr[RDI], RUNS);
    }
    (0..RUNS).map(|run| outcome(&m, threads, run)).collect()
}

fn outcome(m: &Machine, threads: &[&[Op]], run: u64) -> Outcome {
    let results = threads.iter().enumerate().flat_map(|(t, ops)| {
        let count = ops.iter().filter(|op| op.has_result()).count() as u64;
        (0..count).map(move |i| RESULTS + WIDTH * RUNS * t as u64 + WIDTH * run + i)
    });
    let last = [X, Y].map(|n| LOCATIONS + 64 * (n * RUNS + run));
    results.chain(last).map(|at| m.peek::<u8>(at)).collect()
}

/// Runs a test; what is `forbidden` must not come out. Says how many different outcomes there were.
fn never(name: &str, threads: &[&[Op]], forbidden: impl Fn(&[u8]) -> bool) -> usize {
    let outcomes = litmus(threads);
    for (run, outcome) in outcomes.iter().enumerate() {
        assert!(!forbidden(outcome), "{name}: {outcome:?} in run {run} is forbidden");
    }
    outcomes.into_iter().collect::<std::collections::BTreeSet<_>>().len()
}

/// A condition on the first results, or on all of them and the memory in the end.
fn begins(with: &'static [u8]) -> impl Fn(&[u8]) -> bool {
    move |outcome| outcome.starts_with(with)
}

#[test]
fn the_examples_of_the_manual() {
    never("8.2.3.2", &[&[Store(X, 1), Store(Y, 1)], &[Load(Y), Load(X)]], begins(&[1, 0]));
    never("8.2.3.3", &[&[Load(X), Store(Y, 1)], &[Load(Y), Store(X, 1)]], begins(&[1, 1]));
    never("8.2.3.9", &[&[Exchange(X, 1), Load(Y)], &[Exchange(Y, 1), Load(X)]], begins(&[0, 0]));
    never("8.2.3.6", &[&[Store(X, 1)], &[Load(X), Store(Y, 1)], &[Load(Y), Load(X)]], begins(&[1, 1, 0]));
    let readers: [&[Op]; 2] = [&[Load(X), Load(Y)], &[Load(Y), Load(X)]];
    let writers: [&[Op]; 2] = [&[Store(X, 1)], &[Store(Y, 1)]];
    never("8.2.3.7", &[writers[0], writers[1], readers[0], readers[1]], begins(&[1, 0, 1, 0]));
    let fenced: [&[Op]; 2] = [&[Load(X), Fence, Load(Y)], &[Load(Y), Fence, Load(X)]];
    never("8.2.3.7, fenced", &[writers[0], writers[1], fenced[0], fenced[1]], begins(&[1, 0, 1, 0]));
    let locked: [&[Op]; 2] = [&[Exchange(X, 1)], &[Exchange(Y, 1)]];
    never("8.2.3.8", &[locked[0], locked[1], readers[0], readers[1]], begins(&[1, 0, 1, 0]));
}

#[test]
fn store_buffering_is_stopped_by_fences_and_locks() {
    for (name, barrier) in [("MFENCE", Fence), ("LOCK", Locked)] {
        let threads: [&[Op]; 2] = [&[Store(X, 1), barrier, Load(Y)], &[Store(Y, 1), barrier, Load(X)]];
        never(name, &threads, begins(&[0, 0]));
    }
    never("CMPXCHG", &[&[Compare(X, 1), Load(Y)], &[Compare(Y, 1), Load(X)]], begins(&[0, 0]));
    // A barrier in one of them is not enough for that, but then the other sees its own store (no results but 0 and 1).
    never("half", &[&[Store(X, 1), Fence, Load(Y)], &[Store(Y, 1), Load(X)]], |o| o.iter().any(|&r| r > 1));
    // One's own store is seen before others see it, and never lost: n6 of the paper without its allowed outcome.
    never("own store", &[&[Store(X, 1), Load(X), Load(Y)], &[Store(Y, 2), Store(X, 2)]], |o| o[0] == 0);
}

#[test]
fn without_a_barrier_stores_may_be_buffered() {
    // It is allowed, not promised; but nothing else than these four may come out.
    let kinds = never("SB", &[&[Store(X, 1), Load(Y)], &[Store(Y, 1), Load(X)]], |o| o[2..] != [1, 1]);
    assert!((1..=4).contains(&kinds), "{kinds} outcomes");
}

#[test]
fn stores_and_loads_are_seen_in_order() {
    // The last two results are X and Y in the end: which of two stores to a location came last.
    let end = |o: &[u8], x: u8, y: u8| o.ends_with(&[x, y]);
    never("MP", &[&[Store(X, 1), Store(Y, 1)], &[Load(Y), Load(X)]], begins(&[1, 0]));
    never("MP by XADD", &[&[Store(X, 1), Add(Y, 1)], &[Load(Y), Load(X)]], |o| o[1..3] == [1, 0]);
    never("LB", &[&[Load(X), Store(Y, 1)], &[Load(Y), Store(X, 1)]], begins(&[1, 1]));
    never("2+2W", &[&[Store(X, 1), Store(Y, 2)], &[Store(Y, 1), Store(X, 2)]], |o| end(o, 1, 1));
    never("S", &[&[Store(X, 2), Store(Y, 1)], &[Load(Y), Store(X, 1)]], |o| o[0] == 1 && o[1] == 2);
    never("R, fenced", &[&[Store(X, 1), Store(Y, 1)], &[Store(Y, 2), Fence, Load(X)]], |o| o[0] == 0 && o[2] == 2);
    never("R, locked", &[&[Store(X, 1), Store(Y, 1)], &[Exchange(Y, 2), Load(X)]], |o| o[0] == 0 && o[2] == 2);
}

#[test]
fn each_location_has_one_order_of_its_stores() {
    never("CoRR", &[&[Store(X, 1)], &[Load(X), Load(X)]], begins(&[1, 0]));
    never("CoRR of two", &[&[Store(X, 1), Store(X, 2)], &[Load(X), Load(X)]], |o| o[0] > o[1]);
    never("CoWW", &[&[Store(X, 1), Store(X, 2)], &[Load(X)]], |o| o[1] != 2);
    never("CoRW1", &[&[Load(X), Store(X, 1)], &[Load(Y)]], |o| o[0] != 0);
    never("CoRW2", &[&[Load(X), Store(X, 1)], &[Store(X, 2)]], |o| o[0] == 2 && o[1] == 2);
    never("CoWR", &[&[Store(X, 1), Load(X)], &[Store(X, 2)]], |o| o[0] == 0 || o[0] == 2 && o[1] == 1);
    let readers: [&[Op]; 2] = [&[Load(X), Load(X)], &[Load(X), Load(X)]];
    never("CoIRIW", &[&[Store(X, 1)], &[Store(X, 2)], readers[0], readers[1]], begins(&[1, 2, 2, 1]));
}

#[test]
fn locked_instructions_happen_at_once() {
    // Both add: one sees the other's, and nothing is lost.
    let both: [&[Op]; 2] = [&[Add(X, 1), Add(X, 1)], &[Add(X, 1), Add(X, 1)]];
    never("XADD", &both, |o| {
        let mut seen = o[..4].to_vec();
        seen.sort_unstable();
        seen != [0, 1, 2, 3] || o[4] != 4
    });
    never("XADD and SB", &[&[Add(X, 1), Load(Y)], &[Add(Y, 1), Load(X)]], |o| o[1] == 0 && o[3] == 0);
    never("XADD and MP", &[&[Store(X, 1), Add(Y, 1)], &[Add(Y, 2), Load(X)]], |o| o[1] == 1 && o[2] == 0);
    never("CMPXCHG and CoWW", &[&[Compare(X, 1), Compare(X, 2)], &[Load(X), Load(X)]], |o| o[0] > o[1] || o[2] != 2);
}
