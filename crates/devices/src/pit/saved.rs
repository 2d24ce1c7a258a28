//! The saved form of the interval timer.

use prost::Message;
use purlin_state::{Saved, StateError};

use super::{
    KEPT, Pit,
    channel::{Channel, Run},
};

#[derive(Clone, PartialEq, Eq, Message)]
pub struct SavedPit {
    /// Machine time, ns.
    #[prost(uint64, tag = "1")]
    now: u64,
    #[prost(message, repeated, tag = "2")]
    channels: Vec<SavedChannel>,
    /// Bits 3:1 of port 0x61.
    #[prost(uint32, tag = "3")]
    port_b: u32,
    #[prost(bool, tag = "4")]
    irq_high: bool,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct SavedChannel {
    #[prost(uint32, tag = "1")]
    control: u32,
    /// The count register.
    #[prost(uint32, tag = "2")]
    register: u32,
    #[prost(bool, tag = "3")]
    null_count: bool,
    #[prost(message, optional, tag = "4")]
    run: Option<SavedRun>,
    /// Tick of the next load.
    #[prost(uint64, optional, tag = "5")]
    load_at: Option<u64>,
    #[prost(bool, tag = "6")]
    gate: bool,
    /// Ticks into the run at which the gate stopped it.
    #[prost(uint64, optional, tag = "7")]
    held: Option<u64>,
    #[prost(uint32, optional, tag = "8")]
    low_byte: Option<u32>,
    #[prost(bool, tag = "9")]
    read_high: bool,
    #[prost(uint32, optional, tag = "10")]
    latched_count: Option<u32>,
    #[prost(uint32, optional, tag = "11")]
    latched_status: Option<u32>,
}

/// A loaded counting element.
#[derive(Clone, PartialEq, Eq, Message)]
struct SavedRun {
    /// Tick of the load.
    #[prost(uint64, tag = "1")]
    start: u64,
    #[prost(uint64, tag = "2")]
    count: u64,
    #[prost(bool, tag = "3")]
    low_first: bool,
}

impl Saved for SavedPit {
    const NAME: &'static str = "pit";
    const VERSION: u32 = 1;
}

impl SavedPit {
    pub fn of(pit: &Pit) -> Self {
        Self {
            now: pit.now,
            channels: pit.channels.iter().map(SavedChannel::of).collect(),
            port_b: pit.port_b.into(),
            irq_high: pit.irq_high,
        }
    }

    pub fn apply(self, pit: &mut Pit) -> Result<(), StateError> {
        let channels = self.channels.iter().map(SavedChannel::channel).collect::<Option<Vec<_>>>();
        let channels = channels.ok_or_else(|| StateError::corrupt(Self::NAME, "a count or a time out of range"))?;
        pit.channels = channels.try_into().map_err(|_| StateError::corrupt(Self::NAME, "not three channels"))?;
        pit.now = self.now;
        pit.port_b = self.port_b as u8 & KEPT;
        pit.irq_high = self.irq_high;
        Ok(())
    }
}

impl SavedChannel {
    fn of(channel: &Channel) -> Self {
        let run = channel.run.map(|run| SavedRun { start: run.start, count: run.count, low_first: run.low_first });
        Self {
            control: channel.control.into(),
            register: channel.register.into(),
            null_count: channel.null_count,
            run,
            load_at: channel.load_at,
            gate: channel.gate,
            held: channel.held,
            low_byte: channel.low_byte.map(u32::from),
            read_high: channel.read_high,
            latched_count: channel.latched_count.map(u32::from),
            latched_status: channel.latched_status.map(u32::from),
        }
    }

    /// `None` if its values make no sense. No tick is so late that adding to it could overflow.
    fn channel(&self) -> Option<Channel> {
        const LATEST: u64 = u64::MAX >> 1;
        let run = match &self.run {
            None => None,
            Some(run) if (1..=0x1_0000).contains(&run.count) && run.start <= LATEST => {
                Some(Run { start: run.start, count: run.count, low_first: run.low_first })
            }
            Some(_) => return None,
        };
        (self.load_at.is_none_or(|at| at <= LATEST)).then(|| Channel {
            control: self.control as u8 & 0x3f,
            register: self.register as u16,
            null_count: self.null_count,
            run,
            load_at: self.load_at,
            gate: self.gate,
            held: self.held,
            low_byte: self.low_byte.map(|byte| byte as u8),
            read_high: self.read_high,
            latched_count: self.latched_count.map(|count| count as u16),
            latched_status: self.latched_status.map(|status| status as u8),
        })
    }
}

#[cfg(test)]
mod tests {
    use purlin_state::Section;

    use super::*;
    use crate::{Device, IrqLine};

    #[test]
    fn a_corrupt_state_is_refused() {
        let mut pit = Pit::new(IrqLine::unconnected());
        let good = SavedPit::of(&pit);
        assert!(pit.restore(&Section::new(&good)).is_ok());
        let with_run = |start, count| {
            let mut bad = good.clone();
            bad.channels[1].run = Some(SavedRun { start, count, low_first: false });
            bad
        };
        let late = || {
            let mut bad = good.clone();
            bad.channels[0].load_at = Some(u64::MAX);
            bad
        };
        let short = SavedPit { channels: good.channels[..2].to_vec(), ..good.clone() };
        for bad in [short, with_run(0, 0), with_run(0, 0x1_0001), with_run(u64::MAX, 1), late()] {
            assert!(matches!(pit.restore(&Section::new(&bad)), Err(StateError::Corrupt { .. })), "{bad:?}");
        }
    }
}
