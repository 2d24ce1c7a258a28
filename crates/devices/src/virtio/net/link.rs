//! The thread between a pair of queues and its back end.

use std::{
    io,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::event::{PollFd, PollFlags};

use super::{
    super::{Notifier, Told, Virtqueue, Wake},
    pace::{Limits, Pace},
    pair::Pair,
    receive::{Received, Receiver},
    transmit::{Sent, transmit},
};

/// Packets of one direction before it is the other's turn.
pub(super) const TURN: usize = 64;

/// What the thread has.
pub(super) struct Link {
    pub pair: Arc<Pair>,
    pub receive: Option<Arc<Virtqueue>>,
    pub transmit: Option<Arc<Virtqueue>>,
    /// The negotiated features.
    pub features: u64,
    pub mtu: u16,
    pub limits: Option<Limits>,
    pub notifier: Arc<Notifier>,
    pub link_up: Arc<AtomicBool>,
}

impl Link {
    /// Serves the queues until it is told to end.
    pub fn run(&self, wake: &Wake) {
        let pace = |limits: Limits| Ok::<_, io::Error>((Pace::new(limits.receive)?, Pace::new(limits.transmit)?));
        match self.limits.clone().map(pace).transpose() {
            Ok(paces) => self.serve(wake, paces.unzip()),
            Err(error) => self.notifier.needs_reset(&format_args!("its rate cannot be limited: {error}")),
        }
    }

    /// Between two waits no packet is under way.
    fn serve(&self, wake: &Wake, (mut receiving, mut sending): (Option<Pace>, Option<Pace>)) {
        let mut receiver = self.receive.as_deref().map(|queue| Receiver::new(queue, self.features, self.mtu));
        let (mut received, mut sent) = (Received::All, Sent::All);
        loop {
            match wake.wait(&self.wanted((received, &receiving), (sent, &sending))) {
                Told::Work => {}
                Told::Hold => {
                    if let Some(receiver) = &mut receiver {
                        receiver.put_back();
                    }
                    continue;
                }
                Told::End => return,
            }
            let in_use = self.pair.lock();
            if !*in_use {
                // Nothing is waited for until it is; then it is told.
                (received, sent) = (Received::NotInUse, Sent::All);
                continue;
            }
            if let Some(queue) = &self.transmit {
                sent = transmit(queue, &self.pair.backend, sending.as_mut());
            }
            if let Some(receiver) = receiver.as_mut().filter(|_| self.link_up.load(Ordering::SeqCst)) {
                received = receiver.receive(&self.pair.backend, receiving.as_mut());
            }
            drop(in_use);
            if received == Received::Gone {
                self.take_down();
            }
            if sent == Sent::Some {
                // There is more: but first it is looked whether to hold.
                wake.ring();
            }
        }
    }

    /// What to wait for beside the driver: the back end, and timers.
    fn wanted<'a>(
        &'a self,
        (received, receiving): (Received, &'a Option<Pace>),
        (sent, sending): (Sent, &'a Option<Pace>),
    ) -> Vec<PollFd<'a>> {
        let mut events = PollFlags::empty();
        events.set(PollFlags::IN, matches!(received, Received::All | Received::Some));
        events.set(PollFlags::OUT, sent == Sent::Blocked);
        // A descriptor whose other end is gone is always ready.
        let is_of_use = self.link_up.load(Ordering::SeqCst) && !events.is_empty();
        let fd = is_of_use.then(|| PollFd::from_borrowed_fd(self.pair.backend.as_fd(), events));
        let timer = |is_wanted: bool, pace: &'a Option<Pace>| {
            pace.as_ref().filter(|_| is_wanted).map(|pace| PollFd::new(pace.timer(), PollFlags::IN))
        };
        let timers = [timer(received == Received::Paced, receiving), timer(sent == Sent::Paced, sending)];
        fd.into_iter().chain(timers.into_iter().flatten()).collect()
    }

    /// The back end is gone: the driver sees its cable unplugged.
    fn take_down(&self) {
        if self.link_up.swap(false, Ordering::SeqCst) {
            tracing::error!("the network of a virtual machine is gone: its network process has ended");
            self.notifier.configuration_changed();
        }
    }
}
