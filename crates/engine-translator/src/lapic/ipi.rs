//! Interrupt messages: who they are for, and how they get there (SDM vol. 3A 11.6).

use std::sync::atomic::{AtomicU32, Ordering};

use super::{esr, svr};
use crate::{
    cpu::Cpu,
    mailbox::{Mailbox, request},
    vm::Shared,
};

/// Read-only bit of ICR: there is nothing to wait for.
pub(super) const DELIVERY_STATUS: u32 = 1 << 12;
/// Bits of the x2APIC's ICR that must be zero (SDM vol. 3A figure 11-28), the delivery status aside, which KVM and
/// real processors let pass.
pub(super) const X2APIC_ICR_RESERVED: u64 = 0xfff3_2000;

/// What others need to know of a local APIC to find out whether a message is for it. Only its own vCPU writes it.
#[derive(Debug, Default)]
pub struct Address {
    mode: AtomicU32,
    id: AtomicU32,
    logical: AtomicU32,
}

/// Bits of [`Address::mode`].
mod mode {
    pub const ENABLED: u32 = 1 << 0;
    pub const X2APIC: u32 = 1 << 1;
    /// Enabled in SVR: fixed interrupts are taken.
    pub const SOFTWARE: u32 = 1 << 2;
    /// DFR selects the cluster model.
    pub const CLUSTER: u32 = 1 << 3;
}

/// Brings [`Address`] up to date.
pub(super) fn publish_address(cpu: &mut Cpu) {
    let Some(mailbox) = cpu.shared.mailbox(cpu.index as usize) else { return };
    let lapic = &cpu.lapic;
    let bits = [
        (mode::ENABLED, lapic.enabled()),
        (mode::X2APIC, lapic.x2apic()),
        (mode::SOFTWARE, lapic.svr & svr::ENABLED != 0),
        (mode::CLUSTER, lapic.dfr >> 28 == 0),
    ];
    let logical = if lapic.x2apic() { x2apic_logical_id(lapic.initial_id) } else { lapic.ldr >> 24 };
    mailbox.address.id.store(lapic.id(), Ordering::SeqCst);
    mailbox.address.logical.store(logical, Ordering::SeqCst);
    let bits = bits.iter().filter(|(_, on)| *on).fold(0, |all, (bit, _)| all | bit);
    mailbox.address.mode.store(bits, Ordering::SeqCst);
}

/// The logical ID of an x2APIC: the cluster in the upper half, a bit of the lower (SDM vol. 3A 11.12.10.2).
pub(super) fn x2apic_logical_id(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 0xf)
}

/// An interrupt message on its way.
#[derive(Clone, Copy, Debug)]
struct Message {
    vector: u8,
    delivery: Delivery,
    level_triggered: bool,
    destination: Destination,
}

/// The delivery mode, as bits 10:8 of ICR and of MSI data encode it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delivery {
    Fixed,
    LowestPriority,
    Nmi,
    Init,
    Startup,
    ExtInt,
}

impl Delivery {
    /// `None` for SMI, which has nobody to handle it, and reserved modes.
    fn decode(bits: u32) -> Option<Self> {
        Some(match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            7 => Self::ExtInt,
            _ => return None,
        })
    }
}

#[derive(Clone, Copy, Debug)]
enum Destination {
    /// An APIC ID. `broadcast` is the one that means all of them.
    Physical { id: u32, broadcast: u32 },
    /// A set, see [`Address::in_set`].
    Logical { set: u32, broadcast: u32 },
    /// All vCPUs.
    All,
    /// All vCPUs but the sender.
    AllBut(u32),
}

impl Address {
    fn load(&self) -> (u32, u32, u32) {
        (self.mode.load(Ordering::SeqCst), self.id.load(Ordering::SeqCst), self.logical.load(Ordering::SeqCst))
    }

    fn matches(&self, index: u32, destination: Destination) -> bool {
        let (mode, id, _) = self.load();
        if mode & mode::ENABLED == 0 {
            return false;
        }
        match destination {
            Destination::All => true,
            Destination::AllBut(sender) => index != sender,
            Destination::Physical { id: wanted, broadcast } => wanted == broadcast || wanted == id,
            Destination::Logical { set, broadcast } => set == broadcast || self.in_set(set),
        }
    }

    /// Whether a logical destination names this APIC (SDM vol. 3A 11.6.2.2).
    fn in_set(&self, set: u32) -> bool {
        let (mode, _, logical) = self.load();
        if mode & mode::X2APIC != 0 {
            return set >> 16 == logical >> 16 && set & logical & 0xffff != 0;
        }
        if mode & mode::CLUSTER != 0 {
            let (set_cluster, cluster) = (set >> 4 & 0xf, logical >> 4);
            return (set_cluster == 0xf || set_cluster == cluster) && set & logical & 0xf != 0;
        }
        set & logical & 0xff != 0
    }

    fn takes_fixed(&self) -> bool {
        let both = mode::ENABLED | mode::SOFTWARE;
        self.mode.load(Ordering::SeqCst) & both == both
    }
}

/// Delivers a message-signalled interrupt (SDM vol. 3A 11.11): from any thread.
pub fn deliver_msi(shared: &Shared, address: u64, data: u32) {
    if address >> 20 != 0xfee {
        return;
    }
    let Some(delivery) = Delivery::decode(data >> 8) else { return };
    let id = (address >> 12 & 0xff) as u32;
    let logical = address & 1 << 2 != 0;
    let destination = match logical {
        true => Destination::Logical { set: id, broadcast: 0xff },
        false => Destination::Physical { id, broadcast: 0xff },
    };
    // The redirection hint asks for one of the set, as lowest priority does.
    let redirect = address & 1 << 3 != 0 && delivery == Delivery::Fixed && logical;
    let delivery = if redirect { Delivery::LowestPriority } else { delivery };
    deliver(shared, Message { vector: data as u8, delivery, level_triggered: data & 1 << 15 != 0, destination });
}

/// Sends what ICR says.
pub(super) fn send(cpu: &mut Cpu) {
    let icr = cpu.lapic.icr;
    let Some(delivery) = Delivery::decode((icr >> 8) as u32) else { return };
    let vector = icr as u8;
    let (level, level_triggered) = (icr & 1 << 14 != 0, icr & 1 << 15 != 0);
    // "INIT level de-assert" sets arbitration IDs on processors that have them, and does nothing on others. ExtINT
    // cannot be sent by a processor.
    if delivery == Delivery::Init && level_triggered && !level || delivery == Delivery::ExtInt {
        return;
    }
    let fixed = matches!(delivery, Delivery::Fixed | Delivery::LowestPriority);
    if fixed && vector < 16 {
        cpu.lapic.error(esr::SEND_ILLEGAL);
        return;
    }
    let shorthand = icr >> 18 & 3;
    if shorthand == 1 {
        if fixed {
            send_to_self(cpu, vector);
        }
        return;
    }
    let (id, broadcast) = if cpu.lapic.x2apic() { ((icr >> 32) as u32, u32::MAX) } else { ((icr >> 56) as u32, 0xff) };
    let destination = match shorthand {
        2 => Destination::All,
        3 => Destination::AllBut(cpu.index),
        _ if icr & 1 << 11 != 0 => Destination::Logical { set: id, broadcast },
        _ => Destination::Physical { id, broadcast },
    };
    let shared = cpu.shared.clone();
    deliver(&shared, Message { vector, delivery, level_triggered: false, destination });
}

/// An interrupt to the processor itself.
pub(super) fn send_to_self(cpu: &mut Cpu, vector: u8) {
    if vector < 16 {
        cpu.lapic.error(esr::SEND_ILLEGAL);
    } else if cpu.lapic.svr & svr::ENABLED != 0 {
        cpu.lapic.request(vector, false);
    }
}

fn deliver(shared: &Shared, message: Message) {
    let targets = || {
        (0..).zip(shared.mailboxes()).filter(|(index, mailbox)| mailbox.address.matches(*index, message.destination))
    };
    if message.delivery == Delivery::LowestPriority {
        // Processors do not publish their priorities: the vector picks one, so that different ones spread.
        let able = || targets().filter(|(_, mailbox)| mailbox.address.takes_fixed());
        let count = able().count();
        if count > 0
            && let Some((_, mailbox)) = able().nth(usize::from(message.vector) % count)
        {
            hand_over(mailbox, message);
        }
        return;
    }
    for (_, mailbox) in targets() {
        hand_over(mailbox, message);
    }
}

fn hand_over(mailbox: &Mailbox, message: Message) {
    match message.delivery {
        Delivery::Fixed | Delivery::LowestPriority => {
            if mailbox.address.takes_fixed() {
                hand_over_vector(mailbox, message.vector, message.level_triggered);
            }
        }
        Delivery::Nmi => mailbox.request(request::NMI),
        Delivery::Init => {
            // One that it has not taken yet was sent to a processor that ran, or comes before the INIT that undoes it.
            mailbox.withdraw(request::SIPI);
            mailbox.request(request::INIT);
        }
        Delivery::Startup => {
            mailbox.sipi_vector.store(u32::from(message.vector), Ordering::SeqCst);
            mailbox.request(request::SIPI);
        }
        // The I/O APIC passes on the 8259's interrupt, which arrives by its own wire.
        Delivery::ExtInt => mailbox.request(request::EXTINT),
    }
}

/// The level bit goes first: who takes the vector then sees it.
fn hand_over_vector(mailbox: &Mailbox, vector: u8, level_triggered: bool) {
    let (word, bit) = (usize::from(vector) / 32, 1 << (vector % 32));
    if level_triggered {
        mailbox.level[word].fetch_or(bit, Ordering::SeqCst);
    } else {
        mailbox.level[word].fetch_and(!bit, Ordering::SeqCst);
    }
    mailbox.irr[word].fetch_or(bit, Ordering::SeqCst);
    mailbox.request(request::LAPIC);
}
