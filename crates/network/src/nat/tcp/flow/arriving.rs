//! What the guest says: segments, acknowledgements, data (RFC 9293 3.10.7).

use std::{mem, time::Instant};

use rustix::io::Errno;
use smoltcp::wire::TcpControl;

use super::{
    super::{
        ring::Memory,
        segment::{Incoming, Reply},
    },
    Flow, Next, Phase, send,
};
use crate::nat::link::Link;

impl Flow {
    /// A segment has come from the guest (RFC 9293 3.10.7).
    pub fn on_segment(&mut self, segment: &Incoming<'_>, memory: &mut Memory, link: &mut Link, now: Instant) -> Next {
        match self.phase {
            Phase::Connecting if segment.control == TcpControl::Rst => return Next::Gone,
            // A SYN sent again: the answer is on its way.
            Phase::Connecting => return Next::Wait,
            Phase::SynSent => return self.on_syn_answer(segment, link, now),
            Phase::SynReceived | Phase::Open => {}
        }
        let offset = self.from_guest.next.wrapping_sub(segment.seq).cast_signed();
        match segment.control {
            TcpControl::Syn => {
                // Our answer was lost, or this is another connection: the guest will tell (RFC 5961 4).
                let again = self.phase == Phase::SynReceived && offset == 1;
                self.to_guest.syn_due |= again;
                self.from_guest.ack_due |= !again;
                return Next::Again;
            }
            TcpControl::Rst if offset == 0 => {
                self.abort_host();
                return Next::Gone;
            }
            TcpControl::Rst => {
                // RFC 5961 3.2: perhaps; the guest will tell.
                self.from_guest.ack_due |= self.is_in_window(segment.seq);
                return Next::Again;
            }
            TcpControl::None | TcpControl::Psh | TcpControl::Fin => {}
        }
        let Some(ack) = segment.ack else { return Next::Wait };
        if !self.on_ack(ack, segment, now) {
            self.from_guest.ack_due = true;
            return Next::Again;
        }
        self.last_active = now;
        if segment.len() > 0 {
            self.from_guest.ack_due = true;
            // Nothing comes out of order but by loss; what is lost comes again.
            if offset >= 0
                && let Err(error) = self.take_data(segment, offset.cast_unsigned() as usize, memory)
            {
                return self.fail(error, link);
            }
        }
        Next::Again
    }

    fn is_in_window(&self, seq: u32) -> bool {
        seq.wrapping_sub(self.from_guest.next) < self.from_guest.edge.wrapping_sub(self.from_guest.next)
    }

    /// The guest's answer to our SYN.
    fn on_syn_answer(&mut self, segment: &Incoming<'_>, link: &mut Link, now: Instant) -> Next {
        let acks_ours = segment.ack == Some(self.to_guest.una.wrapping_add(1));
        match (segment.control, segment.ack) {
            (TcpControl::Rst, _) if acks_ours => {
                self.abort_host();
                return Next::Gone;
            }
            (TcpControl::Syn, _) if acks_ours => {}
            (TcpControl::Rst, _) | (_, None) => return Next::Wait,
            _ if acks_ours => return Next::Wait,
            // The guest remembers an earlier connection between the same ends: it is to forget that, and hear of this one at
            // once; but if it does not forget, only as often as anyhow.
            (_, Some(ack)) => {
                Reply::bare(TcpControl::Rst, ack, None, 0).send_or_wait(&self.key, link);
                self.to_guest.syn_due |= !mem::replace(&mut self.to_guest.syn_repeated, true);
                return Next::Again;
            }
        }
        self.take_syn(segment);
        self.to_guest.una = self.to_guest.una.wrapping_add(1);
        self.open(now);
        self.from_guest.ack_due = true;
        Next::Again
    }

    /// Takes an acknowledgement. Returns whether the segment is acceptable.
    fn on_ack(&mut self, ack: u32, segment: &Incoming<'_>, now: Instant) -> bool {
        let to = &mut self.to_guest;
        let advance = ack.wrapping_sub(to.una);
        if advance.cast_signed() < 0 {
            // An old one: its data may be new.
            return self.phase == Phase::Open;
        }
        if advance > to.max.wrapping_sub(to.una) {
            return false;
        }
        if self.phase == Phase::SynReceived {
            if advance == 0 {
                return false;
            }
            to.una = to.una.wrapping_add(1);
            self.open(now);
        }
        let to = &mut self.to_guest;
        let window = u32::from(segment.window) << to.shift;
        let advance = ack.wrapping_sub(to.una);
        if advance > 0 {
            let data = (advance as usize).min(to.buffer.len());
            to.buffer.consume(data);
            to.fin_acked |= advance as usize > data;
            to.una = ack;
            if to.next.wrapping_sub(to.una).cast_signed() < 0 {
                to.next = to.una;
            }
            to.duplicate_acks = 0;
            self.timer.clear();
        } else if to.max != to.una && segment.len() == 0 && window == to.window {
            // RFC 5681 3.2: three duplicates say that something was lost.
            to.duplicate_acks = to.duplicate_acks.saturating_add(1);
            if to.duplicate_acks == 3 {
                to.next = to.una;
            }
        }
        to.window = window;
        true
    }

    /// Takes the data of a segment, all but the first `skip` bytes, which have come before; and its FIN.
    fn take_data(&mut self, segment: &Incoming<'_>, skip: usize, memory: &mut Memory) -> Result<(), Errno> {
        let from = &mut self.from_guest;
        let Some(data) = segment.payload.get(skip..) else { return Ok(()) };
        if from.fin {
            return Ok(());
        }
        let mut taken = 0;
        if from.buffer.is_empty() && self.writable && !data.is_empty() {
            taken = match send(&self.socket, &[std::io::IoSlice::new(data)]) {
                Ok(count) => count,
                Err(Errno::AGAIN) => 0,
                Err(error) => return Err(error),
            };
            self.writable = taken == data.len();
        }
        // What there is no memory for comes again.
        taken += from.buffer.push(&data[taken..], memory);
        from.next = from.next.wrapping_add(taken as u32);
        if segment.control == TcpControl::Fin && taken == data.len() {
            from.fin = true;
            from.next = from.next.wrapping_add(1);
        }
        Ok(())
    }
}
