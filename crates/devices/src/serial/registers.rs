//! The 16550's registers (PC16550D data sheet, section 8).

use bitflags::bitflags;

/// Receiver buffer and transmitter holding register; divisor latch, low byte.
pub const RBR_THR_DLL: u64 = 0;
/// Interrupt enable; divisor latch, high byte.
pub const IER_DLM: u64 = 1;
/// Interrupt identification (read), FIFO control (write).
pub const IIR_FCR: u64 = 2;
/// Line control.
pub const LCR: u64 = 3;
/// Modem control.
pub const MCR: u64 = 4;
/// Line status.
pub const LSR: u64 = 5;
/// Modem status.
pub const MSR: u64 = 6;
/// Scratch.
pub const SCR: u64 = 7;

bitflags! {
    /// Interrupt enable register. The high nibble is always 0.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Ier: u8 {
        /// Received data available, and character timeout.
        const ERBFI = 1 << 0;
        /// Transmitter holding register empty.
        const ETBEI = 1 << 1;
        /// Receiver line status.
        const ELSI = 1 << 2;
        /// Modem status.
        const EDSSI = 1 << 3;
    }

    /// FIFO control register; bits 6 and 7 are the trigger level.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Fcr: u8 {
        const ENABLE = 1 << 0;
        const CLEAR_RECEIVER = 1 << 1;
        const CLEAR_TRANSMITTER = 1 << 2;
        const TRIGGER = 3 << 6;
    }

    /// Line control register. Bits 0 and 1 are the word length.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Lcr: u8 {
        const WORD_LENGTH = 3;
        const STOP_BITS = 1 << 2;
        const PARITY = 1 << 3;
        const EVEN = 1 << 4;
        const STICK = 1 << 5;
        const BREAK = 1 << 6;
        const DLAB = 1 << 7;
    }

    /// Modem control register. The three highest bits are always 0.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Mcr: u8 {
        const DTR = 1 << 0;
        const RTS = 1 << 1;
        const OUT1 = 1 << 2;
        /// On a PC: lets the interrupt through to the line.
        const OUT2 = 1 << 3;
        const LOOP = 1 << 4;
    }

    /// Line status register. Parity and framing errors and breaks do not happen on this line.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Lsr: u8 {
        const DATA_READY = 1 << 0;
        const OVERRUN = 1 << 1;
        const THRE = 1 << 5;
        const TEMT = 1 << 6;
    }

    /// Modem status register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Msr: u8 {
        const DELTA_CTS = 1 << 0;
        const DELTA_DSR = 1 << 1;
        /// Trailing edge of the ring indicator.
        const TERI = 1 << 2;
        const DELTA_DCD = 1 << 3;
        const CTS = 1 << 4;
        const DSR = 1 << 5;
        const RI = 1 << 6;
        const DCD = 1 << 7;
        const DELTAS = 0xf;
        const LINES = 0xf0;
    }
}

/// Why the 16550 interrupts, highest priority first (data sheet, table IV); the value is what IIR shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Cause {
    LineStatus = 0x06,
    DataAvailable = 0x04,
    CharacterTimeout = 0x0c,
    TransmitterEmpty = 0x02,
    ModemStatus = 0x00,
}

/// IIR with no interrupt pending.
pub const IIR_NONE: u8 = 0x01;
/// IIR with the FIFOs on.
pub const IIR_FIFOS: u8 = 0xc0;

/// Characters that a FIFO takes.
pub const FIFO_DEPTH: usize = 16;

/// The UART's clock on a PC, Hz.
const CLOCK: u64 = 1_843_200;

/// Time that a character takes on the line, ns.
pub fn character_ns(lcr: Lcr, divisor: u16) -> u64 {
    let word = 5 + u64::from((lcr & Lcr::WORD_LENGTH).bits());
    let parity = u64::from(lcr.contains(Lcr::PARITY));
    // Half bits: 1 stop bit, or 2 (1.5 with 5-bit words).
    let stop = match (lcr.contains(Lcr::STOP_BITS), word) {
        (false, _) => 2,
        (true, 5) => 3,
        (true, _) => 4,
    };
    let half_bits = 2 * (1 + word + parity) + stop;
    // A divisor of 0 has no meaning; after power-up software has to write one.
    half_bits * 8 * u64::from(divisor.max(1)) * 1_000_000_000 / CLOCK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_takes_its_bits() {
        let eight = Lcr::WORD_LENGTH;
        // 8N1 at 115200 and 9600 baud: ten bits.
        assert_eq!(character_ns(eight, 1), 86_805);
        assert_eq!(character_ns(eight, 12), 1_041_666);
        // 8E2: twelve bits. 5N1.5: seven and a half.
        assert_eq!(character_ns(eight | Lcr::PARITY | Lcr::EVEN | Lcr::STOP_BITS, 12), 1_250_000);
        assert_eq!(character_ns(Lcr::STOP_BITS, 12), 781_250);
    }
}
