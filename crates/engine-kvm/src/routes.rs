//! Which end-of-interrupts KVM is to report.
//!
//! With a split irqchip KVM leaves the guest at an EOI only for vectors that a level-triggered message in its routing
//! table names, within the first entries, those reserved for a user-space I/O APIC. The seam has no routing table:
//! a level-triggered message is put into KVM's when it is first delivered. So neither an I/O APIC nor whatever else
//! sends such messages need do anything for their EOIs to come back.

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry};

/// Trigger mode of a message: level (SDM vol. 3A 11.11.2).
const DATA_LEVEL: u32 = 1 << 15;

/// How many messages are kept: an I/O APIC has 24 pins, and a guest that moves them leaves old ones behind.
pub(crate) const CAPACITY: usize = 64;

/// A message-signalled interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) address: u64,
    pub(crate) data: u32,
}

impl Message {
    /// A level-triggered message with `vector` to the local APIC `id` (physical destination).
    pub(crate) fn level(id: u32, vector: u8) -> Self {
        Self { address: physical_destination(id), data: DATA_LEVEL | u32::from(vector) }
    }

    pub(crate) fn is_level(self) -> bool {
        self.data & DATA_LEVEL != 0
    }
}

/// The address of a message to the local APIC `id`, physical destination mode. What exceeds 8 bits of the ID is in
/// the high half, as KVM takes it with KVM_X2APIC_API_USE_32BIT_IDS.
pub(crate) fn physical_destination(id: u32) -> u64 {
    0xfee0_0000 | u64::from(id & 0xff) << 12 | u64::from(id & !0xff) << 32
}

/// The level-triggered messages that KVM knows of, the one delivered last at the end.
#[derive(Debug, Default)]
pub(crate) struct LevelRoutes(Vec<Message>);

impl LevelRoutes {
    /// Notes `message`. Returns KVM's new table if it was not there.
    pub(crate) fn learn(&mut self, message: Message) -> Option<KvmIrqRouting> {
        if let Some(at) = self.0.iter().position(|m| *m == message) {
            self.0[at..].rotate_left(1);
            return None;
        }
        if self.0.len() == CAPACITY {
            self.0.remove(0);
        }
        self.0.push(message);
        Some(self.table())
    }

    fn table(&self) -> KvmIrqRouting {
        let entries: Vec<_> = (0..).zip(&self.0).map(|(gsi, message)| entry(gsi, *message)).collect();
        KvmIrqRouting::from_entries(&entries).expect("fewer entries than KVM's limit")
    }
}

fn entry(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}

#[cfg(test)]
mod tests {
    use super::{CAPACITY, LevelRoutes, Message, physical_destination};

    #[test]
    fn destination_is_split_at_8_bits() {
        assert_eq!(physical_destination(3), 0xfee0_3000);
        assert_eq!(physical_destination(0x1234), 0x0000_1200_fee3_4000);
    }

    #[test]
    fn a_message_is_learnt_once() {
        let mut routes = LevelRoutes::default();
        let table = routes.learn(Message::level(0, 0x31)).expect("new");
        assert_eq!(table.as_slice().len(), 1);
        assert!(routes.learn(Message::level(0, 0x31)).is_none());
        assert_eq!(routes.learn(Message::level(1, 0x31)).expect("another destination").as_slice().len(), 2);
    }

    #[test]
    fn the_one_not_delivered_for_longest_makes_room() {
        let mut routes = LevelRoutes::default();
        for vector in 0..CAPACITY as u8 {
            routes.learn(Message::level(0, vector));
        }
        assert!(routes.learn(Message::level(0, 0)).is_none(), "delivered again: now the youngest");
        assert_eq!(routes.learn(Message::level(0, 200)).expect("new").as_slice().len(), CAPACITY);
        assert!(routes.learn(Message::level(0, 0)).is_none(), "still there");
        assert!(routes.learn(Message::level(0, 1)).is_some(), "made room");
    }
}
