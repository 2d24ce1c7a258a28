//! The saved form of the real-time clock.

use prost::Message;
use purlin_state::{Saved, StateError};

use super::{A_DV, A_RS, Flags, RegisterB, Rtc, SECOND, alarm::Alarm, calendar::TimeRegisters};

#[derive(Clone, PartialEq, Eq, Message)]
pub struct SavedRtc {
    /// Machine time, ns.
    #[prost(uint64, tag = "1")]
    now: u64,
    /// Wall clock at 0 of the machine's: Unix time.
    #[prost(message, required, tag = "2")]
    wall: Span,
    /// What the guest has set the clock forward.
    #[prost(message, required, tag = "3")]
    set_forward: Span,
    #[prost(uint32, tag = "4")]
    index: u32,
    #[prost(bool, tag = "5")]
    nmi_masked: bool,
    #[prost(uint32, tag = "6")]
    a: u32,
    #[prost(uint32, tag = "7")]
    b: u32,
    /// Register C.
    #[prost(uint32, tag = "8")]
    flags: u32,
    /// Second, minute, hour.
    #[prost(bytes = "vec", tag = "9")]
    alarm: Vec<u8>,
    #[prost(uint32, tag = "10")]
    weekday_shift: u32,
    /// Second, minute, hour, weekday, day, month, year, century while they stand still.
    #[prost(bytes = "vec", optional, tag = "11")]
    held: Option<Vec<u8>>,
    /// CMOS memory; the bytes of registers are not used.
    #[prost(bytes = "vec", tag = "12")]
    ram: Vec<u8>,
}

/// A time.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct Span {
    #[prost(sint64, tag = "1")]
    seconds: i64,
    /// 0 to 999,999,999, added to the seconds.
    #[prost(uint32, tag = "2")]
    nanoseconds: u32,
}

impl Saved for SavedRtc {
    const NAME: &'static str = "rtc";
    const VERSION: u32 = 1;
}

impl Span {
    fn of(ns: i128) -> Self {
        Self { seconds: ns.div_euclid(SECOND) as i64, nanoseconds: ns.rem_euclid(SECOND) as u32 }
    }

    /// `None` beyond what any setting of the clock comes to: some ten thousand years.
    fn ns(self) -> Option<i128> {
        const MOST: u64 = 1 << 40;
        (self.seconds.unsigned_abs() <= MOST).then(|| i128::from(self.seconds) * SECOND + i128::from(self.nanoseconds))
    }
}

impl SavedRtc {
    pub fn of(rtc: &Rtc) -> Self {
        Self {
            now: rtc.now,
            wall: Span::of(rtc.wall),
            set_forward: Span::of(rtc.set_forward),
            index: rtc.index.into(),
            nmi_masked: rtc.nmi_masked,
            a: rtc.a.into(),
            b: rtc.b.bits().into(),
            flags: rtc.flags.bits().into(),
            alarm: vec![rtc.alarm.second, rtc.alarm.minute, rtc.alarm.hour],
            weekday_shift: rtc.weekday_shift.into(),
            held: rtc.held.map(|t| vec![t.second, t.minute, t.hour, t.weekday, t.day, t.month, t.year, t.century]),
            ram: rtc.ram.to_vec(),
        }
    }

    pub fn apply(self, rtc: &mut Rtc) -> Result<(), StateError> {
        let corrupt = |reason| StateError::corrupt(Self::NAME, reason);
        let &[second, minute, hour] = &self.alarm[..] else { return Err(corrupt("not three alarm registers")) };
        rtc.alarm = Alarm { second, minute, hour };
        rtc.held = match self.held.as_deref() {
            None => None,
            Some(&[second, minute, hour, weekday, day, month, year, century]) => {
                Some(TimeRegisters { second, minute, hour, weekday, day, month, year, century })
            }
            Some(_) => return Err(corrupt("not eight time registers")),
        };
        rtc.ram = self.ram.try_into().map_err(|_| corrupt("not 128 bytes of memory"))?;
        let out_of_range = || corrupt("a time out of range");
        rtc.wall = self.wall.ns().ok_or_else(out_of_range)?;
        rtc.set_forward = self.set_forward.ns().ok_or_else(out_of_range)?;
        rtc.now = self.now;
        rtc.index = self.index as u8 & 0x7f;
        rtc.nmi_masked = self.nmi_masked;
        rtc.a = self.a as u8 & (A_DV | A_RS);
        rtc.b = RegisterB::from_bits_retain(self.b as u8);
        rtc.flags = Flags::from_bits_retain(self.flags as u8) & (Flags::UPDATE | Flags::ALARM | Flags::PERIODIC);
        rtc.weekday_shift = (self.weekday_shift % 7) as u8;
        if rtc.held.is_some() == rtc.is_running() {
            return Err(corrupt("the time must stand still if and only if registers A and B say so"));
        }
        Ok(())
    }
}
