//! Seconds and the clock's time registers.

use super::RegisterB;

pub const SECONDS_PER_DAY: i64 = 86_400;

/// The time registers as software sees them: in BCD or binary, with the hour in 12- or 24-hour form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct TimeRegisters {
    pub second: u8,
    pub minute: u8,
    pub hour: u8,
    /// 1 is Sunday.
    pub weekday: u8,
    pub day: u8,
    pub month: u8,
    /// In the century.
    pub year: u8,
    pub century: u8,
}

/// Bit 7 of the hour: afternoon, in 12-hour form.
const PM: u8 = 0x80;

impl TimeRegisters {
    /// The registers at `seconds` of the Unix epoch.
    pub fn at(seconds: i64, format: RegisterB) -> Self {
        let (day_number, time) = (seconds.div_euclid(SECONDS_PER_DAY), seconds.rem_euclid(SECONDS_PER_DAY));
        let (year, month, day) = date(day_number);
        let number = |value: i64| encode(value as u8, format);
        Self {
            second: number(time % 60),
            minute: number(time / 60 % 60),
            hour: encode_hour((time / 3600) as u8, format),
            // The epoch was a Thursday.
            weekday: number((day_number + 4).rem_euclid(7) + 1),
            day: number(day),
            month: number(month),
            year: number(year.rem_euclid(100)),
            century: number(year.div_euclid(100).rem_euclid(100)),
        }
    }

    /// The Unix time that the registers mean. What is out of range counts on: the 31st of a month of 30 days is the
    /// first of the next.
    pub fn seconds(&self, format: RegisterB) -> i64 {
        let number = |value| i64::from(decode(value, format));
        let year = number(self.century) * 100 + number(self.year);
        let days = days_before_month(year, number(self.month)) + number(self.day) - 1;
        let hour = i64::from(decode_hour(self.hour, format));
        days * SECONDS_PER_DAY + hour * 3600 + number(self.minute) * 60 + number(self.second)
    }
}

fn encode(value: u8, format: RegisterB) -> u8 {
    if format.contains(RegisterB::BINARY) { value } else { ((value / 10) << 4) | (value % 10) }
}

pub fn decode(value: u8, format: RegisterB) -> u8 {
    if format.contains(RegisterB::BINARY) { value } else { (value >> 4) * 10 + (value & 0xf) }
}

fn encode_hour(hour: u8, format: RegisterB) -> u8 {
    if format.contains(RegisterB::HOURS_24) {
        return encode(hour, format);
    }
    let afternoon = if hour >= 12 { PM } else { 0 };
    encode((hour + 11) % 12 + 1, format) | afternoon
}

/// 0 to 23 for what is an hour; something larger for what is none.
pub fn decode_hour(value: u8, format: RegisterB) -> u8 {
    if format.contains(RegisterB::HOURS_24) {
        return decode(value, format);
    }
    match decode(value & !PM, format) {
        12 if value & PM == 0 => 0,
        12 => 12,
        hour if value & PM != 0 => hour + 12,
        hour => hour,
    }
}

/// Days from the epoch to the first of a month of the Gregorian calendar; `month` from 1, may be beyond 12.
fn days_before_month(year: i64, month: i64) -> i64 {
    // Years that begin in March: the leap day is their last.
    let months = year * 12 + (month - 1) - 2;
    let (year, month) = (months.div_euclid(12), months.rem_euclid(12));
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    // Days before each month from March on: 0, 31, 61, 92, 122, 153 …
    let before = (153 * month + 2) / 5;
    // The epoch is day 719,468 of that count.
    year * 365 + leap_days + before - 719_468
}

/// Year, month (from 1) and day (from 1) of a day since the epoch.
fn date(day: i64) -> (i64, i64, i64) {
    // An estimate by the mean length of the year, at most one off.
    let mut year = 1970 + day.div_euclid(146_097) * 400 + day.rem_euclid(146_097) * 400 / 146_097;
    if days_before_month(year + 1, 1) <= day {
        year += 1;
    } else if days_before_month(year, 1) > day {
        year -= 1;
    }
    let month = (2..=12).take_while(|&month| days_before_month(year, month) <= day).last().unwrap_or(1);
    (year, month, day - days_before_month(year, month) + 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_days() {
        for (day, expected) in [
            (0, (1970, 1, 1)),
            (-1, (1969, 12, 31)),
            (58, (1970, 2, 28)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (19_782, (2024, 2, 29)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
            (2_932_896, (9999, 12, 31)),
            (-719_528, (0, 1, 1)),
        ] {
            assert_eq!(date(day), expected);
            let (year, month, of_month) = expected;
            assert_eq!(days_before_month(year, month) + of_month - 1, day);
        }
    }

    #[test]
    fn every_day_of_the_registers_range_follows_the_one_before() {
        let (mut year, mut month, mut day) = (0, 1, 1);
        for number in -719_528..=2_932_896 {
            assert_eq!(date(number), (year, month, day));
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let length = [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month as usize - 1];
            day += 1;
            if day > length {
                (day, month) = (1, month + 1);
            }
            if month > 12 {
                (month, year) = (1, year + 1);
            }
        }
    }

    #[test]
    fn the_formats() {
        // 2024-02-29 is a Thursday.
        let day = 19_782 * SECONDS_PER_DAY;
        let bcd = TimeRegisters::at(day + 23 * 3600 + 59 * 60 + 58, RegisterB::HOURS_24);
        assert_eq!((bcd.hour, bcd.minute, bcd.second, bcd.weekday), (0x23, 0x59, 0x58, 5));
        assert_eq!((bcd.century, bcd.year, bcd.month, bcd.day), (0x20, 0x24, 0x02, 0x29));
        for (hour, twelve) in [(0, 12), (1, 1), (11, 11), (12, 12 | PM), (13, 1 | PM), (23, 11 | PM)] {
            assert_eq!(TimeRegisters::at(day + hour * 3600, RegisterB::BINARY).hour, twelve);
        }
        assert_eq!(TimeRegisters::at(day, RegisterB::empty()).hour, 0x12);
    }

    proptest! {
        #[test]
        fn registers_and_seconds_are_the_same(day in -719_528i64..=2_932_896, time in 0..SECONDS_PER_DAY, b: u8) {
            let (seconds, format) = (day * SECONDS_PER_DAY + time, RegisterB::from_bits_retain(b));
            prop_assert_eq!(TimeRegisters::at(seconds, format).seconds(format), seconds);
        }

        #[test]
        fn any_registers_mean_something(raw: [u8; 8], b: u8) {
            let [second, minute, hour, weekday, day, month, year, century] = raw;
            let registers = TimeRegisters { second, minute, hour, weekday, day, month, year, century };
            let format = RegisterB::from_bits_retain(b);
            let _ = TimeRegisters::at(registers.seconds(format), format);
        }
    }
}
