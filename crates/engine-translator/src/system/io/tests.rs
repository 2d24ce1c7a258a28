use std::sync::{Mutex, OnceLock};

use purlin_arch::x86_64::regs::{
    gpr::{RAX, RCX},
    rflags,
};
use purlin_engine::{After, Bus};

use super::*;
use crate::testing::{CODE, Mode, TSS, attach_bus, cpus, peek, poke, step};

/// Answers IN with the port's number and a size; keeps what is written.
#[derive(Default)]
struct Ports(Mutex<Vec<(u16, u8, u32)>>);

impl Bus for Ports {
    fn port_in(&self, port: u16, size: u8) -> u32 {
        self.0.lock().unwrap().push((port, size, 0));
        0x8899_0000 | u32::from(port)
    }
    fn port_out(&self, port: u16, size: u8, value: u32) -> After {
        self.0.lock().unwrap().push((port, size, value));
        if port == 0xf4 { After::Leave } else { After::Continue }
    }
    fn mmio_read(&self, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: u64, _: &[u8]) -> After {
        After::Continue
    }
    fn acknowledge_interrupt(&self) -> u8 {
        0
    }
    fn end_of_interrupt(&self, _: u8) {}
}

fn processor(mode: Mode) -> (Box<Cpu>, &'static Ports) {
    let mut cpu = cpus(mode, 1).remove(0);
    let bus: &'static Ports = Box::leak(Box::default());
    attach_bus(&mut cpu, bus);
    (cpu, bus)
}

fn log(bus: &Ports) -> Vec<(u16, u8, u32)> {
    std::mem::take(&mut bus.0.lock().unwrap())
}

#[test]
fn in_and_out() {
    let (mut cpu, bus) = processor(Mode::Long(0));
    cpu.gpr[RAX] = 0x1111_2222_3333_4444;
    cpu.gpr[RDX] = 0xffff_1234;
    step(&mut cpu, &[0xe4, 0x60]).unwrap(); // in al, 0x60
    assert_eq!(cpu.gpr[RAX], 0x1111_2222_3333_4460);
    step(&mut cpu, &[0x66, 0xed]).unwrap(); // in ax, dx
    assert_eq!(cpu.gpr[RAX], 0x1111_2222_3333_1234);
    step(&mut cpu, &[0xed]).unwrap(); // in eax, dx
    assert_eq!(cpu.gpr[RAX], 0x8899_1234);
    step(&mut cpu, &[0xe7, 0x80]).unwrap(); // out 0x80, eax
    step(&mut cpu, &[0xee]).unwrap(); // out dx, al
    assert_eq!(log(bus), [(0x60, 1, 0), (0x1234, 2, 0), (0x1234, 4, 0), (0x80, 4, 0x8899_1234), (0x1234, 1, 0x34)]);
    assert!(!cpu.leave);
    step(&mut cpu, &[0xe6, 0xf4]).unwrap();
    assert!(cpu.leave, "the machine wants to act");
}

#[test]
fn privilege_and_the_permission_map() {
    let in_al_dx = [0xecu8];
    for mode in [Mode::Protected(3), Mode::Long(3), Mode::V86] {
        let (mut cpu, bus) = processor(mode);
        cpu.gpr[RDX] = 0x0a;
        poke(&cpu, TSS + 102, 0xffff_u16);
        assert_eq!(step(&mut cpu, &in_al_dx), Err(Exception::GP0), "{mode:?}: no map");
        cpu.rflags |= rflags::IOPL;
        let wanted = if mode == Mode::V86 { Err(Exception::GP0) } else { Ok(()) };
        assert_eq!(step(&mut cpu, &in_al_dx), wanted, "{mode:?}: IOPL does not count in virtual-8086 mode");
        cpu.rflags &= !rflags::IOPL;
        log(bus);

        cpu.tr.limit = 0x8a;
        poke(&cpu, TSS + 102, 0x88u16);
        poke(&cpu, TSS + 0x88, 0xfbff_u16); // port 10 alone
        poke(&cpu, TSS + 0x8a, 0xffu8);
        assert_eq!(step(&mut cpu, &in_al_dx), Ok(()), "{mode:?}");
        let wide: &[u8] = if mode == Mode::V86 { &[0xed] } else { &[0x66, 0xed] };
        assert_eq!(step(&mut cpu, wide), Err(Exception::GP0), "two ports");
        cpu.gpr[RDX] = 0x0b;
        assert_eq!(step(&mut cpu, &in_al_dx), Err(Exception::GP0));
        poke(&cpu, TSS + 0x88, 0u16);
        cpu.gpr[RDX] = 0x0f;
        assert_eq!(step(&mut cpu, &in_al_dx), Ok(()), "the last port within the limit");
        cpu.gpr[RDX] = 0x10;
        assert_eq!(step(&mut cpu, &in_al_dx), Err(Exception::GP0), "two bytes are read: beyond the limit");
        cpu.gpr[RCX] = 0;
        assert_eq!(step(&mut cpu, &[0xf3, 0x6c]), Err(Exception::GP0), "REP INSB, though there is nothing to do");
        assert_eq!(log(bus).len(), 2, "{mode:?}: no other access reached the bus");
    }
}

#[test]
fn strings() {
    let (mut cpu, bus) = processor(Mode::Long(0));
    (cpu.gpr[RDX], cpu.gpr[RDI], cpu.gpr[RCX]) = (0x1f0, 0x30000, 3);
    step(&mut cpu, &[0xf3, 0x66, 0x6d]).unwrap(); // rep insw
    assert_eq!((peek(&cpu, 0x30000), cpu.gpr[RDI], cpu.gpr[RCX]), (0x01f0_01f0_01f0, 0x30006, 0));
    assert_eq!(log(bus), [(0x1f0, 2, 0); 3]);
    poke(&cpu, 0x30000, 0x2211u16);
    (cpu.gpr[RSI], cpu.gpr[RCX]) = (0x30000, 2);
    step(&mut cpu, &[0xf3, 0x6e]).unwrap(); // rep outsb
    assert_eq!(log(bus), [(0x1f0, 1, 0x11), (0x1f0, 1, 0x22)]);
    // Nothing is read from the port if the store would fault: 2 MiB are mapped.
    (cpu.gpr[RDI], cpu.gpr[RCX]) = (0x1f_ffff, 3);
    assert_eq!(step(&mut cpu, &[0xf3, 0x6c]), Err(Exception::page_fault(0x20_0000, 2)));
    assert_eq!((log(bus).len(), cpu.gpr[RDI], cpu.gpr[RCX]), (1, 0x20_0000, 2));
    // A request of the machine comes between two elements.
    (cpu.gpr[RDX], cpu.gpr[RSI], cpu.gpr[RCX], cpu.rip) = (0xf4, 0x30000, 5, CODE);
    step(&mut cpu, &[0xf3, 0x6e]).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[RCX], cpu.leave), (CODE, 4, true));
}

#[test]
fn a_16_bit_tss_has_no_map() {
    static BUS: OnceLock<Ports> = OnceLock::new();
    let mut cpu = cpus(Mode::Protected(3), 1).remove(0);
    attach_bus(&mut cpu, BUS.get_or_init(Ports::default));
    poke(&cpu, TSS + 102, 0x68u16);
    cpu.tr.access = cpu.tr.access & !0xf | 3;
    cpu.tr.limit = 0x2000;
    assert_eq!(step(&mut cpu, &[0xec]), Err(Exception::GP0));
}
