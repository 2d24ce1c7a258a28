//! A 16550A serial port (National Semiconductor PC16550D data sheet).
//!
//! Written here rather than taken from vm-superio: that crate's port has no FIFO control register and no trigger
//! levels or timeouts, can only pulse an edge where the 8250's interrupt is a level, and clears "data available" when
//! IIR is read, which the data sheet reserves for reading the data.
//!
//! Sending takes no time; what is received comes at line speed. The far end has all its modem
//! lines up. It honours RTS: it stops sending while a guest that uses RTS has it low. A guest that never touched RTS
//! is sent to once it enables the receiver's interrupt or is seen to poll for characters. Before that, as kernels
//! probe and initialise the port, characters would be lost.

mod receiver;
mod registers;
mod saved;

use std::collections::VecDeque;

use purlin_state::{Section, StateError};

use crate::{Device, Effect, IrqLine, Space, byte_bus, output::Output};
use receiver::{Receiver, Setup};
use registers::*;
use saved::SavedSerial;

/// How many reads of LSR in a row, with nothing to send or receive, tell that the guest waits for a character.
const POLLS: u8 = 16;

/// How soon it is tried again when the output had no room, ns.
const RETRY: u64 = 1_000_000;

/// A 16550A. One port range of [`Serial::PORTS`] ports: 0x3f8 with IRQ 4 is COM1.
pub struct Serial {
    name: String,
    irq: IrqLine,
    irq_high: bool,
    output: Output,

    now: u64,
    ier: Ier,
    lcr: Lcr,
    mcr: Mcr,
    /// The four changes; the lines themselves follow from `mcr`.
    msr_deltas: Msr,
    fifos: bool,
    trigger: u8,
    scratch: u8,
    divisor: u16,
    receiver: Receiver,
    /// The transmitter's FIFO or holding register; only filled while the output takes nothing.
    transmitter: VecDeque<u8>,
    /// The transmitter ran empty (or its interrupt was enabled while it was), and IIR has not told so yet.
    emptied: bool,
    rts_used: bool,
    polls: u8,
    polled: bool,
}

impl Serial {
    /// Length of the port range.
    pub const PORTS: u16 = 8;

    /// A port called `name` (`serial0`) that drives `irq` and sends to `output`.
    pub fn new(name: &str, irq: IrqLine, output: Output) -> Self {
        Self {
            name: name.to_owned(),
            irq,
            irq_high: false,
            output,
            now: 0,
            ier: Ier::empty(),
            lcr: Lcr::empty(),
            mcr: Mcr::empty(),
            msr_deltas: Msr::empty(),
            fifos: false,
            trigger: 0,
            scratch: 0,
            divisor: 0,
            receiver: Receiver::new(),
            transmitter: VecDeque::new(),
            emptied: false,
            rts_used: false,
            polls: 0,
            polled: false,
        }
    }

    /// How many bytes [`Serial::push_input`] would take now.
    pub fn input_room(&self) -> usize {
        self.receiver.room()
    }

    /// Input for the guest. Takes what there is room for, and returns how many bytes that was.
    pub fn push_input(&mut self, bytes: &[u8]) -> usize {
        let count = self.receiver.send(self.now, bytes);
        self.update();
        count
    }

    fn read_register(&mut self, register: u64) -> u8 {
        let value = match register {
            RBR_THR_DLL if self.dlab() => self.divisor.to_le_bytes()[0],
            RBR_THR_DLL => self.receiver.read(self.now),
            IER_DLM if self.dlab() => self.divisor.to_le_bytes()[1],
            IER_DLM => self.ier.bits(),
            IIR_FCR => self.identify_interrupt(),
            LCR => self.lcr.bits(),
            MCR => self.mcr.bits(),
            LSR => self.read_line_status(),
            MSR => self.read_modem_status(),
            SCR => self.scratch,
            _ => 0xff,
        };
        self.polls = if register == LSR { self.polls } else { 0 };
        self.update();
        value
    }

    fn write_register(&mut self, register: u64, value: u8) {
        match register {
            RBR_THR_DLL if self.dlab() => self.divisor = self.divisor & 0xff00 | u16::from(value),
            RBR_THR_DLL => self.transmit(value),
            IER_DLM if self.dlab() => self.divisor = self.divisor & 0xff | u16::from(value) << 8,
            IER_DLM => self.enable_interrupts(Ier::from_bits_truncate(value)),
            IIR_FCR => self.control_fifos(Fcr::from_bits_truncate(value)),
            LCR => self.lcr = Lcr::from_bits_retain(value),
            MCR => self.control_modem(Mcr::from_bits_truncate(value)),
            SCR => self.scratch = value,
            // LSR is for factory tests, and MSR is read-only (data sheet 8.5, 8.8).
            _ => {}
        }
        self.polls = 0;
        self.update();
    }

    fn dlab(&self) -> bool {
        self.lcr.contains(Lcr::DLAB)
    }

    /// Reading IIR resets the transmitter's interrupt if that is what it shows (data sheet, table IV).
    fn identify_interrupt(&mut self) -> u8 {
        let cause = self.cause();
        if cause == Some(Cause::TransmitterEmpty) {
            self.emptied = false;
        }
        let fifos = if self.fifos { IIR_FIFOS } else { 0 };
        fifos | cause.map_or(IIR_NONE, |cause| cause as u8)
    }

    fn cause(&self) -> Option<Cause> {
        let setup = self.setup();
        let timed_out = || self.receiver.timeout_at(setup).is_some_and(|at| at <= self.now);
        if self.ier.contains(Ier::ELSI) && self.receiver.overrun {
            Some(Cause::LineStatus)
        } else if self.ier.contains(Ier::ERBFI) && self.receiver.fifo.len() >= setup.trigger_level() {
            Some(Cause::DataAvailable)
        } else if self.ier.contains(Ier::ERBFI) && timed_out() {
            Some(Cause::CharacterTimeout)
        } else if self.ier.contains(Ier::ETBEI) && self.emptied {
            Some(Cause::TransmitterEmpty)
        } else if self.ier.contains(Ier::EDSSI) && !self.msr_deltas.is_empty() {
            Some(Cause::ModemStatus)
        } else {
            None
        }
    }

    /// Enabling the transmitter's interrupt while it is empty interrupts at once; Linux's 8250 driver tests for it,
    /// and starts every transmission by it.
    fn enable_interrupts(&mut self, ier: Ier) {
        if ier.difference(self.ier).contains(Ier::ETBEI) && self.transmitter.is_empty() {
            self.emptied = true;
        }
        self.ier = ier;
    }

    fn control_fifos(&mut self, fcr: Fcr) {
        let enable = fcr.contains(Fcr::ENABLE);
        // A change of mode clears both FIFOs; without FIFOs the other bits are not taken (data sheet 8.4).
        let changed = enable != self.fifos;
        self.fifos = enable;
        if changed || enable && fcr.contains(Fcr::CLEAR_RECEIVER) {
            self.receiver.clear(!self.mcr.contains(Mcr::LOOP));
        }
        if (changed || enable && fcr.contains(Fcr::CLEAR_TRANSMITTER)) && !self.transmitter.is_empty() {
            self.transmitter.clear();
            self.emptied = true;
        }
        if enable {
            self.trigger = (fcr & Fcr::TRIGGER).bits() >> 6;
        }
    }

    fn control_modem(&mut self, mcr: Mcr) {
        let before = self.modem_lines();
        self.mcr = mcr;
        let after = self.modem_lines();
        let changed = before ^ after;
        self.msr_deltas |= Msr::from_bits_retain((changed & (Msr::CTS | Msr::DSR | Msr::DCD)).bits() >> 4);
        if changed.contains(Msr::RI) && before.contains(Msr::RI) {
            self.msr_deltas |= Msr::TERI;
        }
        // In loopback the pins are inactive, whatever the register says (data sheet 8.6, bit 4).
        self.rts_used |= mcr.contains(Mcr::RTS) && !mcr.contains(Mcr::LOOP);
    }

    /// The modem's lines: up but for the ring, or in loopback the guest's own.
    fn modem_lines(&self) -> Msr {
        if !self.mcr.contains(Mcr::LOOP) {
            return Msr::CTS | Msr::DSR | Msr::DCD;
        }
        let wires = [(Mcr::RTS, Msr::CTS), (Mcr::DTR, Msr::DSR), (Mcr::OUT1, Msr::RI), (Mcr::OUT2, Msr::DCD)];
        wires.into_iter().filter(|&(from, _)| self.mcr.contains(from)).fold(Msr::empty(), |lines, (_, to)| lines | to)
    }

    fn read_modem_status(&mut self) -> u8 {
        let deltas = std::mem::replace(&mut self.msr_deltas, Msr::empty());
        (self.modem_lines() | deltas).bits()
    }

    fn read_line_status(&mut self) -> u8 {
        let mut lsr = Lsr::empty();
        lsr.set(Lsr::DATA_READY, !self.receiver.fifo.is_empty());
        lsr.set(Lsr::OVERRUN, std::mem::take(&mut self.receiver.overrun));
        lsr.set(Lsr::THRE | Lsr::TEMT, self.transmitter.is_empty());
        if lsr == Lsr::THRE | Lsr::TEMT {
            self.polls = (self.polls + 1).min(POLLS);
            self.polled |= self.polls == POLLS;
        }
        lsr.bits()
    }

    fn transmit(&mut self, byte: u8) {
        self.emptied = false;
        if self.mcr.contains(Mcr::LOOP) {
            let setup = self.setup();
            self.receiver.loop_back(self.now, byte & self.word_mask(), setup);
            self.emptied = true;
            return;
        }
        match (self.transmitter.len(), self.fifos) {
            (FIFO_DEPTH.., true) => return,
            (1.., false) => self.transmitter.clear(),
            _ => {}
        }
        self.transmitter.push_back(byte & self.word_mask());
        self.send();
    }

    /// The bits of a character that the word length leaves.
    fn word_mask(&self) -> u8 {
        0xff >> (3 - (self.lcr & Lcr::WORD_LENGTH).bits())
    }

    /// Hands the transmitter's content to the output as far as that takes it.
    fn send(&mut self) {
        if self.transmitter.is_empty() {
            return;
        }
        let taken = self.output.push(self.transmitter.make_contiguous());
        self.transmitter.drain(..taken);
        self.emptied |= self.transmitter.is_empty();
    }

    fn setup(&self) -> Setup {
        Setup {
            fifos: self.fifos,
            trigger: self.trigger,
            listening: self.is_listening(),
            character_ns: character_ns(self.lcr, self.divisor),
        }
    }

    /// Whether the far end may send, see the module's documentation.
    fn is_listening(&self) -> bool {
        if self.mcr.contains(Mcr::LOOP) {
            false
        } else if self.rts_used {
            self.mcr.contains(Mcr::RTS)
        } else {
            self.polled || self.ier.contains(Ier::ERBFI)
        }
    }

    /// Brings up to date what follows from the registers and the time.
    fn update(&mut self) {
        self.receiver.advance(self.now, self.setup());
        // In loopback the OUT2 pin is inactive too.
        let gate = self.mcr & (Mcr::OUT2 | Mcr::LOOP) == Mcr::OUT2;
        let high = gate && self.cause().is_some();
        if high != self.irq_high {
            self.irq_high = high;
            self.irq.set(high);
        }
    }
}

impl Device for Serial {
    fn name(&self) -> &str {
        &self.name
    }

    fn read(&mut self, _: Space, offset: u64, data: &mut [u8]) {
        byte_bus::read(offset, data, |register| self.read_register(register));
    }

    fn write(&mut self, _: Space, offset: u64, data: &[u8]) -> Effect {
        byte_bus::write(offset, data, |register, value| {
            self.write_register(register, value);
            Effect::None
        })
    }

    /// What waits at the far end stays there.
    fn reset(&mut self) {
        self.receiver.clear(!self.mcr.contains(Mcr::LOOP));
        self.receiver.overrun = false;
        self.ier = Ier::empty();
        self.lcr = Lcr::empty();
        self.mcr = Mcr::empty();
        self.msr_deltas = Msr::empty();
        (self.fifos, self.trigger, self.scratch, self.divisor) = (false, 0, 0, 0);
        self.transmitter.clear();
        self.emptied = false;
        (self.rts_used, self.polls, self.polled) = (false, 0, false);
        self.update();
    }

    fn save(&self) -> Section {
        Section::named(&self.name, &SavedSerial::of(self))
    }

    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        saved.decode::<SavedSerial>()?.apply(self)?;
        self.irq.set(self.irq_high);
        Ok(())
    }

    fn deadline(&self) -> Option<u64> {
        let receive = if self.ier.contains(Ier::ERBFI) { self.receiver.deadline(self.now, self.setup()) } else { None };
        let retry = (!self.transmitter.is_empty()).then_some(self.now.saturating_add(RETRY));
        receive.into_iter().chain(retry).min()
    }

    fn advance(&mut self, now: u64) {
        self.now = now;
        self.send();
        self.update();
    }
}

#[cfg(test)]
mod tests;
