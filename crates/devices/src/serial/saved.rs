//! The saved form of a serial port.

use prost::Message;
use purlin_state::{Saved, StateError};

use super::{
    Serial,
    receiver::Receiver,
    registers::{FIFO_DEPTH, Ier, Lcr, Mcr, Msr},
};

#[derive(Clone, PartialEq, Eq, Message)]
pub struct SavedSerial {
    /// Machine time, ns.
    #[prost(uint64, tag = "1")]
    now: u64,
    #[prost(uint32, tag = "2")]
    ier: u32,
    #[prost(uint32, tag = "3")]
    lcr: u32,
    #[prost(uint32, tag = "4")]
    mcr: u32,
    /// The low nibble of MSR.
    #[prost(uint32, tag = "5")]
    msr_deltas: u32,
    #[prost(bool, tag = "6")]
    fifos: bool,
    /// FCR bits 7:6.
    #[prost(uint32, tag = "7")]
    trigger: u32,
    #[prost(uint32, tag = "8")]
    scratch: u32,
    #[prost(uint32, tag = "9")]
    divisor: u32,
    #[prost(bytes = "vec", tag = "10")]
    receive_fifo: Vec<u8>,
    /// Input that has not reached the port.
    #[prost(bytes = "vec", tag = "11")]
    wire: Vec<u8>,
    #[prost(uint64, tag = "12")]
    next_arrival: u64,
    #[prost(uint64, tag = "13")]
    last_activity: u64,
    #[prost(bool, tag = "14")]
    overrun: bool,
    #[prost(bytes = "vec", tag = "15")]
    transmit_fifo: Vec<u8>,
    /// The transmitter's interrupt.
    #[prost(bool, tag = "16")]
    emptied: bool,
    #[prost(bool, tag = "17")]
    rts_used: bool,
    #[prost(uint32, tag = "18")]
    polls: u32,
    #[prost(bool, tag = "19")]
    polled: bool,
    #[prost(bool, tag = "20")]
    irq_high: bool,
}

impl Saved for SavedSerial {
    const NAME: &'static str = "serial";
    const VERSION: u32 = 1;
}

impl SavedSerial {
    pub fn of(serial: &Serial) -> Self {
        let receiver = &serial.receiver;
        Self {
            now: serial.now,
            ier: serial.ier.bits().into(),
            lcr: serial.lcr.bits().into(),
            mcr: serial.mcr.bits().into(),
            msr_deltas: serial.msr_deltas.bits().into(),
            fifos: serial.fifos,
            trigger: serial.trigger.into(),
            scratch: serial.scratch.into(),
            divisor: serial.divisor.into(),
            receive_fifo: receiver.fifo.iter().copied().collect(),
            wire: receiver.wire.iter().copied().collect(),
            next_arrival: receiver.next_arrival,
            last_activity: receiver.last_activity,
            overrun: receiver.overrun,
            transmit_fifo: serial.transmitter.iter().copied().collect(),
            emptied: serial.emptied,
            rts_used: serial.rts_used,
            polls: serial.polls.into(),
            polled: serial.polled,
            irq_high: serial.irq_high,
        }
    }

    pub fn apply(self, serial: &mut Serial) -> Result<(), StateError> {
        if self.receive_fifo.len() > FIFO_DEPTH || self.transmit_fifo.len() > FIFO_DEPTH {
            return Err(StateError::corrupt(&serial.name, "more characters in a FIFO than it holds"));
        }
        serial.now = self.now;
        serial.ier = Ier::from_bits_truncate(self.ier as u8);
        serial.lcr = Lcr::from_bits_retain(self.lcr as u8);
        serial.mcr = Mcr::from_bits_truncate(self.mcr as u8);
        serial.msr_deltas = Msr::from_bits_retain(self.msr_deltas as u8) & Msr::DELTAS;
        serial.fifos = self.fifos;
        serial.trigger = self.trigger as u8 & 3;
        serial.scratch = self.scratch as u8;
        serial.divisor = self.divisor as u16;
        serial.receiver = Receiver {
            fifo: self.receive_fifo.into(),
            wire: self.wire.into(),
            next_arrival: self.next_arrival,
            last_activity: self.last_activity,
            overrun: self.overrun,
        };
        serial.transmitter = self.transmit_fifo.into();
        serial.emptied = self.emptied;
        serial.rts_used = self.rts_used;
        serial.polls = self.polls as u8;
        serial.polled = self.polled;
        serial.irq_high = self.irq_high;
        Ok(())
    }
}
