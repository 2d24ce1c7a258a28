//! The saved form of the 8259A pair.

use prost::Message;
use purlin_state::{Saved, StateError};

use super::{
    CASCADE, EDGE_ONLY, Pic,
    chip::{Chip, Init},
};

#[derive(Clone, PartialEq, Eq, Message)]
pub struct SavedPic {
    #[prost(message, required, tag = "1")]
    master: SavedChip,
    #[prost(message, required, tag = "2")]
    slave: SavedChip,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct SavedChip {
    /// The inputs' levels.
    #[prost(uint32, tag = "1")]
    lines: u32,
    #[prost(uint32, tag = "2")]
    edges: u32,
    #[prost(uint32, tag = "3")]
    isr: u32,
    #[prost(uint32, tag = "4")]
    imr: u32,
    #[prost(uint32, tag = "5")]
    elcr: u32,
    /// ICW1's LTIM.
    #[prost(bool, tag = "6")]
    all_level: bool,
    /// ICW2.
    #[prost(uint32, tag = "7")]
    base: u32,
    /// The input of lowest priority.
    #[prost(uint32, tag = "8")]
    lowest: u32,
    #[prost(enumeration = "Init", tag = "9")]
    init: i32,
    #[prost(bool, tag = "10")]
    needs_icw4: bool,
    #[prost(bool, tag = "11")]
    single: bool,
    #[prost(bool, tag = "12")]
    auto_eoi: bool,
    #[prost(bool, tag = "13")]
    rotate_in_auto_eoi: bool,
    #[prost(bool, tag = "14")]
    special_fully_nested: bool,
    #[prost(bool, tag = "15")]
    special_mask: bool,
    #[prost(bool, tag = "16")]
    read_isr: bool,
    #[prost(bool, tag = "17")]
    poll: bool,
}

impl Saved for SavedPic {
    const NAME: &'static str = "pic";
    const VERSION: u32 = 1;
}

impl SavedPic {
    pub fn of(pic: &Pic) -> Self {
        Self { master: SavedChip::of(&pic.master), slave: SavedChip::of(&pic.slave) }
    }

    pub fn apply(self, pic: &mut Pic) -> Result<(), StateError> {
        pic.master = self.master.chip(1 << CASCADE, EDGE_ONLY[0])?;
        pic.slave = self.slave.chip(0, EDGE_ONLY[1])?;
        Ok(())
    }
}

impl SavedChip {
    fn of(chip: &Chip) -> Self {
        Self {
            lines: chip.lines.into(),
            edges: chip.edges.into(),
            isr: chip.isr.into(),
            imr: chip.imr.into(),
            elcr: chip.elcr.into(),
            all_level: chip.all_level,
            base: chip.base.into(),
            lowest: chip.lowest.into(),
            init: chip.init.into(),
            needs_icw4: chip.needs_icw4,
            single: chip.single,
            auto_eoi: chip.auto_eoi,
            rotate_in_auto_eoi: chip.rotate_in_auto_eoi,
            special_fully_nested: chip.special_fully_nested,
            special_mask: chip.special_mask,
            read_isr: chip.read_isr,
            poll: chip.poll,
        }
    }

    fn chip(&self, cascade: u8, edge_only: u8) -> Result<Chip, StateError> {
        let init = Init::try_from(self.init)
            .map_err(|_| StateError::corrupt(SavedPic::NAME, format!("no initialization step {}", self.init)))?;
        Ok(Chip {
            lines: self.lines as u8,
            edges: self.edges as u8,
            isr: self.isr as u8,
            imr: self.imr as u8,
            elcr: self.elcr as u8 & !edge_only,
            all_level: self.all_level,
            base: self.base as u8 & 0xf8,
            lowest: self.lowest as u8 & 7,
            init,
            needs_icw4: self.needs_icw4,
            single: self.single,
            auto_eoi: self.auto_eoi,
            rotate_in_auto_eoi: self.rotate_in_auto_eoi,
            special_fully_nested: self.special_fully_nested,
            special_mask: self.special_mask,
            read_isr: self.read_isr,
            poll: self.poll,
            cascade,
        })
    }
}
