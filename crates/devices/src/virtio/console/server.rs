//! The thread between the queues and the port.

use std::{os::fd::AsFd, sync::Arc};

use rustix::event::{PollFd, PollFlags};

use super::{
    super::{Chain, Notifier, Told, Virtqueue, Wake},
    port::Port,
    settling::Settling,
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
    pub settling: Settling,
}

impl Server {
    /// Serves the queues until it is told to end. Between two waits it has no chain.
    pub fn run(mut self, wake: &Wake) {
        loop {
            let port = PollFd::from_borrowed_fd(self.port.as_fd(), PollFlags::IN);
            let wanted = [port, self.settling.wanted()];
            let count = if self.port.is_settled() { 1 } else { 2 };
            match wake.wait(&wanted[..count]) {
                Told::Work => {}
                Told::Hold => {
                    self.settling.interrupt();
                    continue;
                }
                Told::End => return,
            }
            // What happens from here on is heard by the next wait.
            self.port.clear_event();
            self.settle();
            let sent = self.transmit.as_deref().is_none_or(|queue| self.transmit(queue, wake));
            let received = self.receive.as_deref().is_none_or(|queue| self.receive(queue, wake));
            if !(sent && received) {
                wake.ring();
            }
        }
    }

    /// Tells the driver what it is to be told, once it can hear.
    fn settle(&mut self) {
        if !self.port.is_settled() && self.settling.is_over() {
            self.port.set_settled();
            // Of input that it has been given, maybe by a machine before this one.
            self.receive.iter().for_each(|queue| self.notifier.used_buffers(queue.index()));
        }
        if self.port.is_settled() && self.wants_size && self.port.tell_size() {
            self.notifier.configuration_changed();
        }
    }

    /// Prints what the driver sends, as far as the output takes it. Returns whether that was all for now.
    fn transmit(&self, queue: &Virtqueue, wake: &Wake) -> bool {
        let print = |chain: &Chain<'_>| self.port.print(&chain.readable, || wake.is_interrupted()).then_some(0);
        let (is_used, is_all) = each_chain(queue, wake, || true, print);
        if is_used {
            queue.notify_driver();
        }
        is_all
    }

    /// Gives the driver what was typed, as far as it has buffers. Returns whether that was all for now.
    fn receive(&self, queue: &Virtqueue, wake: &Wake) -> bool {
        let deliver = |chain: &Chain<'_>| Some(self.port.deliver(&chain.writable) as u32);
        let (is_used, is_all) = each_chain(queue, wake, || self.port.has_input(), deliver);
        if is_used && self.port.is_settled() {
            queue.notify_driver();
        }
        is_all
    }
}

/// Has chains of a queue served while there is something for them. `serve` returns how many bytes it wrote, or `None` if
/// the chain is to be served later. Returns whether chains were used, and whether that was all for now.
fn each_chain(
    queue: &Virtqueue,
    wake: &Wake,
    wanted: impl Fn() -> bool,
    serve: impl Fn(&Chain<'_>) -> Option<u32>,
) -> (bool, bool) {
    let mut is_used = false;
    queue.disable_notification();
    for _ in 0..TURN {
        // Whoever interrupts rings, too.
        if wake.is_interrupted() || !wanted() {
            return (is_used, true);
        }
        let Some(chain) = queue.pop() else {
            if queue.enable_notification() {
                queue.disable_notification();
                continue;
            }
            return (is_used, true);
        };
        let Some(written) = serve(&chain) else {
            queue.put_back(1);
            return (is_used, true);
        };
        queue.push(chain.head(), written);
        is_used = true;
    }
    (is_used, false)
}
