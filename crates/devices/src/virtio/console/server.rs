//! The thread between the queues and the port.

use std::{os::fd::AsFd, sync::Arc};

use rustix::event::{PollFd, PollFlags};

use super::{
    super::{Notifier, Told, Virtqueue, Wake},
    port::Port,
};

/// Chains of one direction before it is the other's turn.
const TURN: usize = 64;

/// What the thread has.
pub(super) struct Server {
    pub port: Arc<Port>,
    pub receive: Option<Arc<Virtqueue>>,
    pub transmit: Option<Arc<Virtqueue>>,
    pub notifier: Arc<Notifier>,
    /// The driver asks for the terminal's size.
    pub wants_size: bool,
}

impl Server {
    /// Serves the queues until it is told to end. Between two waits it has no chain.
    pub fn run(&self, wake: &Wake) {
        loop {
            match wake.wait(&[PollFd::from_borrowed_fd(self.port.as_fd(), PollFlags::IN)]) {
                Told::Work => {}
                Told::Hold => continue,
                Told::End => return,
            }
            // What happens from here on is heard by the next wait.
            self.port.clear_event();
            if self.wants_size && self.port.tell_size() {
                self.notifier.configuration_changed();
            }
            let sent = self.transmit.as_deref().is_none_or(|queue| self.transmit(queue, wake));
            let received = self.receive.as_deref().is_none_or(|queue| self.receive(queue, wake));
            if !(sent && received) {
                wake.ring();
            }
        }
    }

    /// Prints what the driver sends, as far as the output takes it. Returns whether that was all for now.
    fn transmit(&self, queue: &Virtqueue, wake: &Wake) -> bool {
        each_chain(
            queue,
            wake,
            || true,
            |chain| self.port.print(&chain.readable, || wake.is_interrupted()).then_some(0),
        )
    }

    /// Gives the driver what was typed, as far as it has buffers. Returns whether that was all for now.
    fn receive(&self, queue: &Virtqueue, wake: &Wake) -> bool {
        each_chain(queue, wake, || self.port.has_input(), |chain| Some(self.port.deliver(&chain.writable) as u32))
    }
}

/// Has chains of a queue served while there is something for them. `serve` returns how many bytes it wrote, or `None` if
/// the chain is to be served later. Returns `false` if there may be more.
fn each_chain(
    queue: &Virtqueue,
    wake: &Wake,
    wanted: impl Fn() -> bool,
    serve: impl Fn(&super::super::Chain<'_>) -> Option<u32>,
) -> bool {
    let (mut is_used, mut is_all) = (false, false);
    queue.disable_notification();
    for _ in 0..TURN {
        // Whoever interrupts rings, too.
        if wake.is_interrupted() || !wanted() {
            is_all = true;
            break;
        }
        let Some(chain) = queue.pop() else {
            if queue.enable_notification() {
                queue.disable_notification();
                continue;
            }
            is_all = true;
            break;
        };
        let Some(written) = serve(&chain) else {
            queue.put_back(1);
            is_all = true;
            break;
        };
        queue.push(chain.head(), written);
        is_used = true;
    }
    if is_used {
        queue.notify_driver();
    }
    is_all
}
