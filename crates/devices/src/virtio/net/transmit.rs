//! From the driver to the back end.

use std::io;

use purlin_network::{Backend, MAX_PACKET, PacketHeader};

use super::{super::Virtqueue, link::TURN, pace::Pace};

/// How far it got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The queue is empty; the driver tells when it is not.
    All,
    /// There may be more.
    Some,
    /// The back end has no room now.
    Blocked,
    /// The rate does not allow more now.
    Paced,
}

/// Sends what is available, and what its pace allows.
pub fn transmit(queue: &Virtqueue, backend: &Backend, mut pace: Option<&mut Pace>) -> Sent {
    queue.disable_notification();
    let (mut result, mut used) = (Sent::Some, false);
    for _ in 0..TURN {
        if pace.as_ref().is_some_and(|pace| !pace.may_go()) {
            result = Sent::Paced;
            break;
        }
        let Some(chain) = queue.pop() else {
            if !queue.enable_notification() {
                result = Sent::All;
                break;
            }
            queue.disable_notification();
            continue;
        };
        // What is no packet is not sent, but it is used (5.1.6.2).
        let is_packet = (PacketHeader::LENGTH..=MAX_PACKET).contains(&chain.readable_length());
        if is_packet && is_blocked(backend.send(&chain.readable)) {
            queue.put_back(1);
            result = Sent::Blocked;
            break;
        }
        if let Some(pace) = pace.as_mut().filter(|_| is_packet) {
            pace.charge(chain.readable_length() - PacketHeader::LENGTH);
        }
        queue.push(chain.head(), 0);
        used = true;
    }
    if used {
        queue.notify_driver();
    }
    result
}

fn is_blocked(result: io::Result<()>) -> bool {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => true,
        // As on any wire, a packet that cannot go is lost. (A TAP refuses headers that make no sense.)
        Err(error) => {
            tracing::debug!("a packet of the guest's is lost: {error}");
            false
        }
        Ok(()) => false,
    }
}
