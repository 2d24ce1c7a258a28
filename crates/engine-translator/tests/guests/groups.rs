//! Several accesses off one base register, some of them on a page that is not like the others: each is as if it were
//! alone.

use iced_x86::{IcedError, code_asm::*};
use purlin_arch::x86_64::regs::gpr::{RAX, RBX, RCX, RDX};

use crate::machine::*;

type Result = std::result::Result<(), IcedError>;

/// Two pages, whose frames do not follow each other; RBX points into the first.
const WINDOW: u64 = 0x8000_0000;
const SECOND: u64 = WINDOW + 0x1000;
const FRAME: u64 = DATA + 0x1_0000;
const SECOND_FRAME: u64 = DATA + 0x3_0000;
/// Where displacements count from: 32 bytes before the second page.
const BASE: u64 = SECOND - 0x20;
/// Where there is no memory.
const MMIO: u64 = 0xd000_0000;

/// An access of eight bytes with a register of its own, or a change of the base.
#[derive(Clone, Copy, Debug)]
enum Op {
    Load(i32),
    Store(i32),
    /// `add m, r`
    Add(i32),
    /// `xchg`
    Swap(i32),
    /// 16 bytes, by XMM0, which holds the register's value twice.
    StoreVector(i32),
    /// `add rbx, n`
    Step(i32),
    /// `lea rbx, [rbx + n]`
    Lea(i32),
}
use Op::{Add, Lea, Load, Step, Store, StoreVector, Swap};

const ROWS: [&[Op]; 14] = [
    &[Store(0), Store(8), Store(0x20), Store(0x10)],
    &[Load(0), Load(8), Load(0x20), Load(0x10)],
    &[Store(0), Load(0), Add(8), Load(0x28), Store(0x18)],
    &[Load(0x100), Store(0), Store(8)],
    &[Store(0x20), Store(0)],
    // Half on one page, half on the other.
    &[Store(0), Store(0x1c), Store(0x10)],
    &[Load(0), Store(8), Load(0x1d), Store(0x10)],
    &[Store(0), Add(8), Add(0x1f), Add(0x10)],
    &[Store(0), Swap(8), Swap(0x40), Swap(0x10)],
    &[Store(0), StoreVector(8), StoreVector(0x20), Store(0)],
    &[StoreVector(0), StoreVector(0x18), Store(0)],
    // The base goes over the edge.
    &[Store(0), Step(0x10), Store(0), Step(0x10), Store(0), Step(0x10), Store(-0x10)],
    &[Store(0), Lea(0x18), Store(0), Lea(8), Add(0), Store(-8)],
    &[Load(0x20), Step(0x20), Store(-0x20), Add(-0x18), Store(0x20)],
];

const REGISTERS: [(AsmRegister64, usize); 6] = [(rax, RAX), (rdx, RDX), (r8, 8), (r9, 9), (r12, 12), (r13, 13)];

impl Op {
    fn emit(self, a: &mut CodeAssembler, own: AsmRegister64) -> Result {
        match self {
            Load(at) => a.mov(own, qword_ptr(rbx + at)),
            Store(at) => a.mov(qword_ptr(rbx + at), own),
            Add(at) => a.add(qword_ptr(rbx + at), own),
            Swap(at) => a.xchg(qword_ptr(rbx + at), own),
            StoreVector(at) => a.movups(xmmword_ptr(rbx + at), xmm0),
            Step(by) => a.add(rbx, by),
            Lea(by) => a.lea(rbx, rbx + by),
        }
    }

    /// Address off the base, size, and whether it stores.
    fn access(self) -> Option<(i32, u64, bool)> {
        match self {
            Load(at) => Some((at, 8, false)),
            Store(at) | Add(at) | Swap(at) => Some((at, 8, true)),
            StoreVector(at) => Some((at, 16, true)),
            Step(_) | Lea(_) => None,
        }
    }
}

/// A processor and memory that do what the manual says, one access after the other.
#[derive(Clone, Debug, PartialEq)]
struct Model {
    registers: [u64; 6],
    base: u64,
    memory: Vec<u8>,
}

/// What each vector register's two halves are.
const VECTOR: u64 = 0x7777_6666_5555_4444;

impl Model {
    fn new() -> Self {
        let registers = std::array::from_fn(|i| 0x0101_0101_0101_0101 * (i as u64 + 1));
        let mut memory: Vec<u8> = (0..0x2000u32).map(|i| (i * 7 / 8) as u8).collect();
        memory[0x1000 + FUNCTION] = 0xc3;
        Self { registers, base: BASE, memory }
    }

    /// Executes `op`, unless it `touches` what it must not: then its address is returned.
    fn step(&mut self, op: Op, own: usize, forbidden: impl Fn(u64, u64, bool) -> Option<u64>) -> Option<u64> {
        let Some((at, size, store)) = op.access() else {
            let (Step(by) | Lea(by)) = op else { unreachable!() };
            self.base = self.base.wrapping_add_signed(by.into());
            return None;
        };
        let address = self.base.wrapping_add_signed(at.into());
        if let Some(fault) = forbidden(address, size, store) {
            return Some(fault);
        }
        let place = (address - WINDOW) as usize;
        let old = u64::from_le_bytes(self.memory[place..place + 8].try_into().unwrap());
        let own = &mut self.registers[own];
        let new = match op {
            Load(_) => {
                *own = old;
                return None;
            }
            Add(_) => old.wrapping_add(*own),
            Swap(_) => std::mem::replace(own, old),
            StoreVector(_) => {
                self.memory[place + 8..place + 16].copy_from_slice(&VECTOR.to_le_bytes());
                VECTOR
            }
            _ => *own,
        };
        self.memory[place..place + 8].copy_from_slice(&new.to_le_bytes());
        None
    }
}

/// A function that does nothing, on the second page.
const FUNCTION: usize = 0x800;
/// What calls that before the row is executed.
const WITH_CALL: u64 = CODE - 0x100;

/// Puts the entry R14 at RSI, forgets the second page, and executes a row ECX times.
fn program(m: &Machine, ops: &[Op]) -> Vec<u64> {
    let mut starts = Vec::new();
    let again = m.code(CODE, |a| {
        a.mov(qword_ptr(rsi), r14)?;
        a.invlpg(ptr(rdi))?;
        // The first page is known, for loads and stores.
        a.mov(r15, qword_ptr(rdi - 0x1000))?;
        a.mov(qword_ptr(rdi - 0x1000), r15)?;
        a.movq(xmm0, rbp)?;
        a.punpcklqdq(xmm0, xmm0)
    });
    let mut at = m.code(again, |a| a.mov(rbx, BASE));
    let mut registers = REGISTERS.into_iter();
    for op in ops {
        starts.push(at);
        let own = if op.access().is_some() { registers.next().expect("six accesses at most").0 } else { rax };
        at = m.code(at, |a| op.emit(a, own));
    }
    m.code(WITH_CALL, |a| {
        a.mov(rax, SECOND + FUNCTION as u64)?;
        a.call(rax)?;
        a.mov(rax, 0x0101_0101_0101_0101u64)?;
        a.jmp(CODE)
    });
    m.code(at, |a| {
        a.dec(ecx)?;
        a.jnz(again)?;
        a.out(u32::from(DONE), al)
    });
    starts
}

struct Row {
    machine: Machine,
    guest: Guest,
    start: purlin_arch::x86_64::state::VcpuState,
    starts: Vec<u64>,
    ops: &'static [Op],
}

impl Row {
    fn new(ops: &'static [Op]) -> Self {
        let machine = Machine::new(1);
        machine.map(WINDOW, FRAME, pte::P | pte::W);
        let starts = program(&machine, ops);
        let mut guest = machine.vcpu(0, |_| {});
        Self { start: guest.state(), machine, guest, starts, ops }
    }

    /// Executes it `times` times with this entry for the second page, from the model's state.
    fn run(&mut self, entry: u64, times: u64) -> Stop {
        let model = Model::new();
        self.machine.load(FRAME, &model.memory[..0x1000]);
        self.machine.load(SECOND_FRAME, &model.memory[0x1000..]);
        let mut state = self.start.clone();
        let gpr = &mut state.regs.gpr;
        for ((_, number), value) in REGISTERS.into_iter().zip(model.registers) {
            gpr[number] = value;
        }
        (gpr[RCX], gpr[14], gpr[5]) = (times, entry, VECTOR);
        (gpr[6], gpr[7]) = (self.machine.pte(SECOND), SECOND);
        // Restoring changes no linear address; the guest's INVLPG does.
        self.guest.vcpu.restore(&state).unwrap();
        self.guest.run()
    }

    fn state(&mut self) -> Model {
        let gpr = self.guest.state().regs.gpr;
        let frames = (FRAME..FRAME + 0x1000).chain(SECOND_FRAME..SECOND_FRAME + 0x1000);
        let memory = frames.map(|at| self.machine.peek::<u8>(at)).collect();
        Model { registers: REGISTERS.map(|(_, number)| gpr[number]), base: gpr[RBX], memory }
    }

    /// The model's state where the row ends or faults; the number of the operation that does, and the address.
    fn model(&self, forbidden: impl Fn(u64, u64, bool) -> Option<u64>) -> (Model, Option<(usize, u64)>) {
        let mut model = Model::new();
        let mut own = 0;
        for (i, op) in self.ops.iter().enumerate() {
            if let Some(address) = model.step(*op, own, &forbidden) {
                return (model, Some((i, address)));
            }
            own += usize::from(op.access().is_some());
        }
        (model, None)
    }
}

/// Where an access reaches the second page, if it does.
fn on_second(address: u64, size: u64) -> Option<u64> {
    (address + size > SECOND).then_some(address.max(SECOND))
}

const PRESENT: u64 = SECOND_FRAME | pte::P | pte::W;
const READ_ONLY: u64 = SECOND_FRAME | pte::P;

#[test]
fn a_page_that_is_not_there_or_not_to_be_stored_to() {
    for ops in ROWS {
        let mut row = Row::new(ops);
        // For the first time, when the translations are known, and when the code is hot.
        for before in [0, 5, 1_000_000] {
            if before > 0 {
                assert!(matches!(row.run(PRESENT, before), Stop::Done(_)));
            }
            for entry in [0, READ_ONLY] {
                let what = format!("{ops:?} after {before} times, entry {entry:#x}");
                let forbidden = |address, size, store: bool| on_second(address, size).filter(|_| store || entry == 0);
                let (expected, fault) = row.model(forbidden);
                let stop = row.run(entry, 1);
                match (stop, fault) {
                    (Stop::Done(_), None) => {}
                    (Stop::Vector(14, frame), Some((op, address))) => {
                        let stores = ops[op].access().is_some_and(|(.., store)| store);
                        let error = u32::from(stores) << 1 | u32::from(entry != 0);
                        assert_eq!((frame.rip, frame.error), (row.starts[op], Some(error)), "{what}");
                        assert_eq!(row.guest.state().system.cr2, address, "{what}");
                    }
                    other => panic!("{what}: {other:?}"),
                }
                assert_eq!(row.state(), expected, "{what}");
                // It goes on as if nothing had been.
                if let Stop::Vector(_, frame) = stop {
                    row.machine.map(SECOND, SECOND_FRAME, pte::P | pte::W);
                    row.guest.resume(&frame, frame.rip);
                    assert!(matches!(row.guest.run(), Stop::Done(_)), "{what}");
                    assert_eq!(row.state(), row.model(|_, _, _| None).0, "{what}: afterwards");
                }
            }
        }
    }
}

#[test]
fn a_page_that_is_none_of_memory() {
    // A device is told of each access that reaches it, in order, and of no other.
    for ops in ROWS {
        let mut row = Row::new(ops);
        assert!(matches!(row.run(PRESENT, 5), Stop::Done(_)));
        for (at, byte) in (MMIO..MMIO + 0x1000).zip(&Model::new().memory[0x1000..]) {
            lock(&row.machine.bus.mmio).insert(at, *byte);
        }
        assert!(matches!(row.run(MMIO | pte::P | pte::W, 1), Stop::Done(_)), "{ops:?}");
        // The device keeps nothing of what is stored to it: the row must not load it again.
        let mut seen = Model::new().memory;
        for (at, bytes) in lock(&row.machine.bus.writes).iter() {
            let place = 0x1000 + (at - MMIO) as usize;
            seen[place..place + bytes.len()].copy_from_slice(bytes);
        }
        let (expected, _) = row.model(|_, _, _| None);
        assert_eq!(seen[0x1000..], expected.memory[0x1000..], "{ops:?}: the device's");
        let got = row.state();
        assert_eq!((got.registers, got.base), (expected.registers, expected.base), "{ops:?}");
        assert_eq!(got.memory[..0x1000], expected.memory[..0x1000], "{ops:?}");
    }
}

#[test]
fn a_page_that_holds_code() {
    // Each store to it has to be noticed, though none hits the code.
    for ops in ROWS {
        let mut row = Row::new(ops);
        assert!(matches!(row.run(PRESENT, 5), Stop::Done(_)));
        row.start.regs.rip = WITH_CALL;
        for times in [1, 20_000, 1] {
            assert!(matches!(row.run(PRESENT, times), Stop::Done(_)), "{ops:?}");
            if times == 1 {
                assert_eq!(row.state(), row.model(|_, _, _| None).0, "{ops:?}");
            }
        }
    }
}
