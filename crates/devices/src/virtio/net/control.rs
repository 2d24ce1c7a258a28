//! The control queue (virtio 1.3, 5.1.6.5): the driver says how many pairs of queues it uses.

use std::sync::{
    Arc,
    atomic::{AtomicU16, Ordering},
};

use virtio_bindings::virtio_net::{VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK};

use super::{
    super::{Chain, Malformed, Told, Virtqueue, Wake, fill},
    pair::{Pair, use_pairs},
};

/// What the thread of the control queue has.
pub(super) struct Control {
    pub queue: Arc<Virtqueue>,
    /// All pairs, with what their threads wait by.
    pub pairs: Vec<(Arc<Pair>, Arc<Wake>)>,
    /// How many of them the driver may use: those whose queues it has enabled, one without VIRTIO_NET_F_MQ.
    pub usable: u16,
    /// How many it uses.
    pub in_use: Arc<AtomicU16>,
}

impl Control {
    /// Serves the queue until it is told to end.
    pub fn run(&self, wake: &Wake) {
        loop {
            match wake.wait(&[]) {
                Told::Work => self.queue.serve(wake, |chain| self.command(chain)),
                Told::Hold => {}
                Told::End => return,
            }
        }
    }

    /// Does a command, and returns how many bytes were written: its acknowledgement.
    fn command(&self, mut chain: Chain<'_>) -> u32 {
        let mut header = [0; 2];
        if chain.read(&mut header).is_err() || chain.writable_length() == 0 {
            self.queue.notifier().needs_reset(&Malformed::Request);
            return 0;
        }
        let [class, command] = header.map(u32::from);
        let is_done = match (class, command) {
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => self.set_pairs(&mut chain),
            // Nothing else is offered.
            _ => false,
        };
        let answer = if is_done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        fill(&chain.writable, &[answer as u8]) as u32
    }

    /// Whether there are as many pairs as the driver wants to use.
    fn set_pairs(&self, chain: &mut Chain<'_>) -> bool {
        let mut count = [0; 2];
        if chain.read(&mut count).is_err() {
            return false;
        }
        let count = u16::from_le_bytes(count);
        if !(1..=self.usable).contains(&count) {
            return false;
        }
        let pairs: Vec<_> = self.pairs.iter().map(|(pair, _)| pair.clone()).collect();
        if let Err(error) = use_pairs(&pairs, count) {
            tracing::warn!("a network device cannot use {count} pairs of queues: {error}");
            // As it was before, as far as the host allows.
            let _ = use_pairs(&pairs, self.in_use.load(Ordering::SeqCst));
            return false;
        }
        self.in_use.store(count, Ordering::SeqCst);
        self.pairs.iter().for_each(|(_, wake)| wake.ring());
        true
    }
}
