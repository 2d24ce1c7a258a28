//! The virtual machine's generation ID: 16 bytes in guest memory that are others in each copy of a machine, and an
//! interrupt when they change (Microsoft, "Virtual Machine Generation ID"). A guest then makes anew what must not be the
//! same twice, random numbers first of all.

use std::sync::Arc;

use prost::Message;
use purlin_memory::GuestRam;
use purlin_state::{Saved, Section, StateError};
use vm_memory::{Bytes, GuestAddress};

use crate::{Device, Effect, IrqLine, Space};

/// Bytes of an ID.
pub const LENGTH: usize = 16;

/// The generation ID. It has no registers: the guest finds it in memory.
pub struct VmGenId {
    ram: Arc<GuestRam>,
    address: GuestAddress,
    irq: IrqLine,
    id: [u8; LENGTH],
    /// The level of the line, of which a rise is an interrupt.
    irq_high: bool,
    /// The guest has not been told of the ID that it has.
    is_news: bool,
    /// Machine time, ns.
    now: u64,
}

/// The saved state.
#[derive(Clone, PartialEq, Eq, Message)]
struct SavedVmGenId {
    #[prost(bytes = "vec", tag = "1")]
    id: Vec<u8>,
    #[prost(bool, tag = "2")]
    irq_high: bool,
    #[prost(bool, tag = "3")]
    is_news: bool,
}

impl Saved for SavedVmGenId {
    const NAME: &'static str = "vmgenid";
    const VERSION: u32 = 1;
}

impl VmGenId {
    /// A machine with this ID, 16 random bytes, which is in memory at `address` from the first reset on. `irq` is
    /// edge-triggered.
    pub fn new(ram: Arc<GuestRam>, address: u64, irq: IrqLine, id: [u8; LENGTH]) -> Self {
        let address = GuestAddress(address);
        Self { ram, address, irq, id, irq_high: false, is_news: false, now: 0 }
    }

    /// The machine is another one from here on, with this ID. The guest is told as soon as the machine runs.
    pub fn renew(&mut self, id: [u8; LENGTH]) {
        self.id = id;
        self.is_news = true;
        self.write_id();
    }

    fn write_id(&self) {
        if let Err(error) = self.ram.write_slice(&self.id, self.address) {
            tracing::error!("the generation ID is not in guest memory: {error}");
        }
    }

    fn set_irq(&mut self, high: bool) {
        self.irq_high = high;
        self.irq.set(high);
    }
}

impl Device for VmGenId {
    fn name(&self) -> &str {
        SavedVmGenId::NAME
    }

    fn read(&mut self, _: Space, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _: Space, _: u64, _: &[u8]) -> Effect {
        Effect::None
    }

    /// A machine that is reset is the same one. Who boots now reads the ID that it has.
    fn reset(&mut self) {
        self.is_news = false;
        self.set_irq(false);
        self.write_id();
    }

    fn save(&self) -> Section {
        Section::new(&SavedVmGenId { id: self.id.to_vec(), irq_high: self.irq_high, is_news: self.is_news })
    }

    /// The ID is in the memory that was saved with it.
    fn restore(&mut self, saved: &Section) -> Result<(), StateError> {
        let saved: SavedVmGenId = saved.decode()?;
        let id = saved.id.try_into();
        self.id = id.map_err(|_| StateError::corrupt(SavedVmGenId::NAME, "a generation ID has 16 bytes"))?;
        self.is_news = saved.is_news;
        self.set_irq(saved.irq_high);
        Ok(())
    }

    /// At once; but deadlines are kept only while the machine runs, so that no interrupt is lost.
    fn deadline(&self) -> Option<u64> {
        self.is_news.then_some(self.now)
    }

    fn advance(&mut self, now: u64) {
        self.now = now;
        if std::mem::take(&mut self.is_news) {
            self.set_irq(false);
            self.set_irq(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Probe;

    const ADDRESS: u64 = 0x3000;

    fn device(ram: &Arc<GuestRam>) -> (VmGenId, Probe) {
        let irq = Probe::default();
        (VmGenId::new(ram.clone(), ADDRESS, irq.line(), [1; LENGTH]), irq)
    }

    fn ram() -> Arc<GuestRam> {
        Arc::new(purlin_memory::create(&[(0, 1 << 20)]).unwrap())
    }

    fn in_memory(ram: &GuestRam) -> [u8; LENGTH] {
        ram.read_obj(GuestAddress(ADDRESS)).unwrap()
    }

    #[test]
    fn a_reset_leaves_the_id_and_writes_it_to_memory() {
        let ram = ram();
        let (mut device, irq) = device(&ram);
        device.reset();
        assert_eq!(in_memory(&ram), [1; LENGTH]);
        ram.write_slice(&[9; LENGTH], GuestAddress(ADDRESS)).unwrap();
        device.reset();
        device.advance(100);
        assert_eq!((in_memory(&ram), irq.take_rises(), device.deadline()), ([1; LENGTH], 0, None));
    }

    #[test]
    fn each_new_id_is_in_memory_before_its_interrupt() {
        let ram = ram();
        let (mut device, irq) = device(&ram);
        device.reset();
        for number in 2..5 {
            device.renew([number; LENGTH]);
            assert_eq!((in_memory(&ram), irq.take_rises()), ([number; LENGTH], 0));
            let now = device.deadline().unwrap();
            device.advance(now);
            assert_eq!((irq.take_rises(), device.deadline()), (1, None));
        }
        device.advance(1 << 40);
        assert_eq!(irq.take_rises(), 0);
    }

    #[test]
    fn a_move_keeps_the_id_and_the_news_of_it() {
        let ram = ram();
        let (mut first, _) = device(&ram);
        first.reset();
        first.renew([7; LENGTH]);
        let saved = first.save();
        let (mut second, irq) = device(&ram);
        second.restore(&saved).unwrap();
        assert_eq!((second.save(), in_memory(&ram)), (saved, [7; LENGTH]));
        second.advance(second.deadline().unwrap());
        assert_eq!(irq.take_rises(), 1);

        let (mut third, irq) = device(&ram);
        third.restore(&second.save()).unwrap();
        assert_eq!((third.save(), third.deadline()), (second.save(), None));
        irq.take_rises();
        third.renew([8; LENGTH]);
        third.advance(1);
        assert_eq!(irq.take_rises(), 1, "of a line that was high");
    }

    #[test]
    fn a_saved_id_of_another_length_is_refused() {
        let (mut device, _) = device(&ram());
        let saved = SavedVmGenId { id: vec![1; 15], irq_high: false, is_news: false };
        assert!(device.restore(&Section::new(&saved)).is_err());
    }
}
