//! What the guest is told: our SYN, data as far as its window goes, acknowledgements and windows (RFC 9293 3.8.6).

use std::time::Instant;

use smoltcp::wire::TcpControl;

use super::{
    super::{ring::Memory, segment::Reply},
    Flow, MAX_SEGMENT, Phase, WINDOW_SHIFT,
};
use crate::nat::link::{Link, Sent};

impl Flow {
    /// Sends the guest all that its window allows, or at least an acknowledgement that is due.
    pub(super) fn talk_to_guest(&mut self, memory: &Memory, link: &mut Link, now: Instant) -> Sent {
        if self.to_guest.syn_due {
            if self.send_syn(memory, link) == Sent::Blocked {
                return Sent::Blocked;
            }
            self.to_guest.syn_due = false;
            self.timer.start(now);
        }
        if self.phase != Phase::Open {
            return Sent::Yes;
        }
        while let Some((offset, len, fin)) = self.next_segment(link) {
            let (seq, last) = (self.to_guest.next, offset + len == self.to_guest.buffer.len());
            let control = match (fin, last) {
                (true, _) => TcpControl::Fin,
                (false, true) => TcpControl::Psh,
                (false, false) => TcpControl::None,
            };
            let (edge, window) = self.window(memory);
            let reply = Reply {
                payload: self.to_guest.buffer.slices(offset, len),
                mss: self.to_guest.mss,
                ..Reply::bare(control, seq, Some(self.from_guest.next), window)
            };
            if reply.send(&self.key, link) == Sent::Blocked {
                return Sent::Blocked;
            }
            self.told(edge);
            let to = &mut self.to_guest;
            to.next = seq.wrapping_add(len as u32 + u32::from(fin));
            if to.next.wrapping_sub(to.max).cast_signed() > 0 {
                to.max = to.next;
            }
        }
        let to = &self.to_guest;
        if to.max != to.una || (to.window == 0 && !to.buffer.is_empty()) {
            self.timer.start(now);
        }
        let (edge, window) = self.window(memory);
        if self.from_guest.ack_due || self.is_worth_telling(edge) {
            let reply = Reply::bare(TcpControl::None, self.to_guest.next, Some(self.from_guest.next), window);
            if reply.send(&self.key, link) == Sent::Blocked {
                return Sent::Blocked;
            }
            self.told(edge);
        }
        Sent::Yes
    }

    /// Our SYN, with an acknowledgement of the guest's if that was first.
    fn send_syn(&mut self, memory: &Memory, link: &mut Link) -> Sent {
        let is_answer = self.phase != Phase::SynSent;
        let iss = self.to_guest.una;
        // RFC 7323 2.2: the window of a SYN is not scaled.
        let window = memory.allowance().min(usize::from(u16::MAX)) as u16;
        let scale = (!is_answer || self.from_guest.shift > 0).then_some(WINDOW_SHIFT);
        let ack = is_answer.then_some(self.from_guest.next);
        let reply =
            Reply { options: Some((self.to_guest.mss, scale)), ..Reply::bare(TcpControl::Syn, iss, ack, window) };
        let sent = reply.send(&self.key, link);
        if sent == Sent::Yes {
            if is_answer {
                self.told(self.from_guest.next.wrapping_add(window.into()));
            }
            self.to_guest.next = iss.wrapping_add(1);
            self.to_guest.max = self.to_guest.next;
        }
        sent
    }

    /// What to send next: where in the buffer it begins, its length, and whether a FIN follows it.
    fn next_segment(&self, link: &Link) -> Option<(usize, usize, bool)> {
        let to = &self.to_guest;
        let flying = to.next.wrapping_sub(to.una) as usize;
        // Beyond the last byte there is only the FIN, which has been sent then.
        let unsent = to.buffer.len().checked_sub(flying)?;
        let room = (to.window as usize).saturating_sub(flying);
        let mss = usize::from(to.mss);
        let most = if link.takes_large_segments(self.key.guest.ip()) { MAX_SEGMENT / mss * mss } else { mss };
        let len = unsent.min(room).min(most);
        let fin = to.eof && len == unsent && !to.fin_acked;
        // RFC 9293 3.8.6.2.1: no small segments for a small window, while larger ones are on their way.
        let is_silly = len < unsent && len < mss && flying > 0;
        ((len > 0 && !is_silly) || (fin && (room > 0 || unsent == 0))).then_some((flying, len, fin))
    }

    /// How far the guest may send, as a sequence number, and the same as the window in a header.
    fn window(&self, memory: &Memory) -> (u32, u16) {
        let from = &self.from_guest;
        let free = memory.allowance().saturating_sub(from.buffer.len());
        let told = from.edge.wrapping_sub(from.next).cast_signed().max(0).cast_unsigned();
        // What was once offered is not taken back (RFC 9293 3.8.6).
        let window = (free as u32).max(told) >> from.shift;
        let window = window.min(u16::MAX.into()) as u16;
        (from.next.wrapping_add(u32::from(window) << from.shift), window)
    }

    fn told(&mut self, edge: u32) {
        let from = &mut self.from_guest;
        // Rounding to the scale may not take back what was offered.
        if edge.wrapping_sub(from.edge).cast_signed() > 0 {
            from.edge = edge;
        }
        from.ack_due = false;
    }

    /// Whether the window has opened so far that the guest should know (RFC 9293 3.8.6.2.2).
    fn is_worth_telling(&self, edge: u32) -> bool {
        let from = &self.from_guest;
        let told = from.edge.wrapping_sub(from.next).cast_signed();
        let opened = edge.wrapping_sub(from.edge).cast_signed();
        let enough = (2 * i32::from(self.to_guest.mss)).min((told + opened) / 2).max(1);
        !from.fin && opened >= enough && opened >= told
    }
}
