//! The alarm: the next second that matches its three registers.

use super::{
    RegisterB,
    calendar::{SECONDS_PER_DAY, decode, decode_hour},
};

/// The alarm registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Alarm {
    pub second: u8,
    pub minute: u8,
    pub hour: u8,
}

/// Both high bits set: any value matches (data sheet, "Time, Calendar and Alarm Locations").
const ANY: u8 = 0xc0;

impl Alarm {
    /// How many seconds after `now` (Unix time) it next goes off: 1 to 86,400, or never if a register holds no time.
    pub fn seconds_until(&self, now: i64, format: RegisterB) -> Option<i64> {
        let field = |raw: u8, value: u8, range: i64| match i64::from(value) {
            _ if raw & ANY == ANY => Some(None),
            value if value < range => Some(Some(value)),
            _ => None,
        };
        let hour = field(self.hour, decode_hour(self.hour, format), 24)?;
        let minute = field(self.minute, decode(self.minute, format), 60)?;
        let second = field(self.second, decode(self.second, format), 60)?;

        let time = now.rem_euclid(SECONDS_PER_DAY);
        // A field that matches anything stays, goes on by one, or starts from 0 where a larger one goes on.
        let candidates = |fixed: Option<i64>, current: i64, range: i64| match fixed {
            Some(value) => [value; 3],
            None => [0, current, (current + 1) % range],
        };
        let mut until = SECONDS_PER_DAY;
        for h in candidates(hour, time / 3600, 24) {
            for m in candidates(minute, time / 60 % 60, 60) {
                for s in candidates(second, time % 60, 60) {
                    let distance = (h * 3600 + m * 60 + s - time).rem_euclid(SECONDS_PER_DAY);
                    if distance != 0 {
                        until = until.min(distance);
                    }
                }
            }
        }
        Some(until)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_the_first_second_that_matches(
            now in 0..SECONDS_PER_DAY,
            hour in prop_oneof![0u8..24, Just(0xc0), Just(0xff)],
            minute in prop_oneof![0u8..60, Just(0xc5)],
            second in prop_oneof![0u8..60, Just(0xff)],
        ) {
            let format = RegisterB::BINARY | RegisterB::HOURS_24;
            let matches = |raw: u8, value: i64| raw >= 0xc0 || i64::from(raw) == value;
            let first = (1..=SECONDS_PER_DAY).find(|passed| {
                let time = now + passed;
                matches(hour, time / 3600 % 24) && matches(minute, time / 60 % 60) && matches(second, time % 60)
            });
            prop_assert_eq!(Alarm { second, minute, hour }.seconds_until(now, format), first);
        }
    }

    #[test]
    fn what_is_no_time_never_comes() {
        for alarm in [
            Alarm { second: 0x60, minute: 0, hour: 0 },
            Alarm { second: 0, minute: 0x7f, hour: 0 },
            Alarm { second: 0, minute: 0, hour: 0x24 },
        ] {
            assert_eq!(alarm.seconds_until(0, RegisterB::HOURS_24), None);
        }
        // 1 pm in 12-hour form.
        let alarm = Alarm { second: 0, minute: 0, hour: 0x81 };
        assert_eq!(alarm.seconds_until(0, RegisterB::empty()), Some(13 * 3600));
    }
}
