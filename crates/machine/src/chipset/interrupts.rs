//! How interrupts get from devices to processors: each ISA interrupt goes to the 8259 pair and to the I/O APIC, as on
//! a PC's board; the guest masks what it does not use.

use std::sync::{Arc, Mutex};

use purlin_devices::{
    IrqLine,
    ioapic::{InterruptMessage, IoApic, MessageSink},
    pic::Pic,
};
use purlin_engine::Vm;

use crate::{acpi::TIMER_GSI, bus::lock};

/// The I/O APIC's messages, on their way to the local APICs.
struct Messages(Arc<dyn Vm>);

impl MessageSink for Messages {
    fn send(&self, message: InterruptMessage) {
        self.0.deliver_msi(message.address, message.data);
    }

    /// Engines learn of level-triggered messages as these are delivered.
    fn route_changed(&self, _pin: u8, _message: InterruptMessage) {}
}

/// The two interrupt controllers that the machine has beside the processors' local APICs.
pub struct Interrupts {
    /// The 8259 pair; its INTR goes to the first processor's LINT0.
    pub pic: Arc<Mutex<Pic>>,
    /// The I/O APIC; it sends messages.
    pub ioapic: Arc<Mutex<IoApic>>,
}

impl Interrupts {
    /// Both controllers, wired to the processors.
    pub fn new(vm: &Arc<dyn Vm>) -> Self {
        let wire = vm.clone();
        let pic = Pic::new(IrqLine::new(move |high| wire.set_extint(high)));
        let ioapic = IoApic::new(Box::new(Messages(vm.clone())));
        Self { pic: Arc::new(Mutex::new(pic)), ioapic: Arc::new(Mutex::new(ioapic)) }
    }

    /// The line of ISA interrupt `irq`, 0 to 15 except 2.
    pub fn isa(&self, irq: u8) -> IrqLine {
        let (pic, ioapic) = (self.pic.clone(), self.ioapic.clone());
        // The MADT's override: the timer arrives at another input.
        let pin = if irq == 0 { TIMER_GSI as u8 } else { irq };
        IrqLine::new(move |high| {
            // Each lock is let go before the next is taken: see the order in `bus`.
            lock(&pic).set_irq(irq, high);
            lock(&ioapic).set_irq(pin, high);
        })
    }
}
