//! One counter of the 8254 (Intel 8254 data sheet, order number 231164).
//!
//! Nothing is counted: a counter knows at which tick its counting element was loaded, and everything it shows follows
//! from the ticks that have passed since.

/// What the counter does, control word bits 3:1 (bit 3 is not looked at in modes 2 and 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 0: the output rises when the count ends.
    TerminalCount,
    /// 1: a low pulse as long as the count, for each trigger.
    OneShot,
    /// 2: one tick low in each period.
    RateGenerator,
    /// 3: half of each period low.
    SquareWave,
    /// 4: one tick low when the count ends.
    SoftwareStrobe,
    /// 5: the same, for each trigger.
    HardwareStrobe,
}

/// A counting element that has been loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The tick of the load; moved on by the ticks that the gate was closed for.
    pub start: u64,
    /// The count, 1 to 65,536 (10,000 in BCD).
    pub count: u64,
    /// Mode 3: the load was at the end of a high half.
    pub low_first: bool,
}

/// One counter. All methods take the tick that it is, never less than before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Channel {
    /// The control word's low six bits: access, mode, BCD. They are also what the status shows.
    pub control: u8,
    /// The count register, as written.
    pub register: u16,
    /// It has not been loaded into the counting element yet.
    pub null_count: bool,
    /// The counting element. Without one the counter waits for a count, or for a trigger.
    pub run: Option<Run>,
    /// When the counting element is next loaded from the register.
    pub load_at: Option<u64>,
    pub gate: bool,
    /// Ticks that had passed since the load when the gate stopped the counter.
    pub held: Option<u64>,
    /// The low byte of a count whose high byte is yet to come.
    pub low_byte: Option<u8>,
    /// The next load of two is of the high byte.
    pub read_high: bool,
    pub latched_count: Option<u16>,
    pub latched_status: Option<u8>,
}

/// Access, control word bits 5:4: low byte, high byte, low then high.
const LOW: u8 = 1;
const HIGH: u8 = 2;

impl Channel {
    /// A counter as it is after power-up: the data sheet leaves it undefined; here it stands still, its output low.
    pub fn new(gate: bool) -> Self {
        Self {
            control: 0x30,
            register: 0,
            null_count: true,
            run: None,
            load_at: None,
            gate,
            held: None,
            low_byte: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
        }
    }

    pub fn mode(&self) -> Mode {
        match self.control >> 1 & 7 {
            0 => Mode::TerminalCount,
            1 => Mode::OneShot,
            2 | 6 => Mode::RateGenerator,
            3 | 7 => Mode::SquareWave,
            4 => Mode::SoftwareStrobe,
            _ => Mode::HardwareStrobe,
        }
    }

    fn access(&self) -> u8 {
        self.control >> 4 & 3
    }

    /// Numbers that the counting element has.
    fn modulus(&self) -> u64 {
        if self.control & 1 != 0 { 10_000 } else { 0x1_0000 }
    }

    /// Modes 1 and 5 start at a trigger, the others when a count is written.
    fn starts_at_trigger(&self) -> bool {
        matches!(self.mode(), Mode::OneShot | Mode::HardwareStrobe)
    }

    /// Modes in which counting goes on for ever.
    fn is_periodic(&self) -> bool {
        matches!(self.mode(), Mode::RateGenerator | Mode::SquareWave)
    }

    /// A control word for this counter, other than the latch command.
    pub fn set_control(&mut self, control: u8) {
        *self = Self { control: control & 0x3f, register: self.register, ..Self::new(self.gate) };
    }

    /// A byte of a count.
    pub fn write(&mut self, tick: u64, value: u8) {
        match (self.access(), self.low_byte) {
            (LOW, _) => self.set_count(tick, value.into()),
            (HIGH, _) => self.set_count(tick, u16::from(value) << 8),
            (_, Some(low)) => {
                self.low_byte = None;
                self.set_count(tick, u16::from_le_bytes([low, value]));
            }
            (_, None) => {
                self.low_byte = Some(value);
                if self.mode() == Mode::TerminalCount {
                    // The first byte disables counting, and the output goes low at once (data sheet, "Mode 0").
                    (self.run, self.load_at, self.held) = (None, None, None);
                }
            }
        }
    }

    fn set_count(&mut self, tick: u64, count: u16) {
        self.register = count;
        self.null_count = true;
        if self.starts_at_trigger() {
            return;
        }
        self.load_at = match self.run {
            // Periodic modes finish what they are at; while the gate is closed they wait for it to open.
            Some(_) if self.is_periodic() && self.held.is_some() => None,
            Some(run) if self.is_periodic() => Some(self.end_of_part(run, tick)),
            _ => Some(tick + 1),
        };
    }

    /// Opens or closes the gate. Its rise is the trigger.
    pub fn set_gate(&mut self, tick: u64, open: bool) {
        if open == self.gate {
            return;
        }
        self.gate = open;
        match (self.mode(), open) {
            (Mode::OneShot | Mode::HardwareStrobe, true) => self.load_at = Some(tick + 1),
            (Mode::OneShot | Mode::HardwareStrobe, false) => {}
            (mode, false) => {
                self.held = self.run.map(|run| tick.saturating_sub(run.start));
                if self.run.is_some() && matches!(mode, Mode::RateGenerator | Mode::SquareWave) {
                    self.load_at = None;
                }
            }
            (Mode::RateGenerator | Mode::SquareWave, true) => {
                self.held = None;
                if self.run.take().is_some() {
                    self.load_at = Some(tick + 1);
                }
            }
            (_, true) => {
                if let (Some(run), Some(held)) = (&mut self.run, self.held.take()) {
                    run.start = tick.saturating_sub(held);
                }
            }
        }
    }

    /// Does the load that is due.
    pub fn settle(&mut self, tick: u64) {
        let Some(at) = self.load_at.filter(|&at| at <= tick) else { return };
        let low_first = self.mode() == Mode::SquareWave && self.run.is_some_and(|run| run.ends_high_half(at));
        self.load_at = None;
        self.null_count = false;
        self.run = Some(Run { start: at, count: self.count(), low_first });
        let stopped = !self.gate && !self.starts_at_trigger();
        self.held = stopped.then_some(0);
    }

    /// The count register's meaning.
    fn count(&self) -> u64 {
        let register = u64::from(self.register);
        let count = if self.control & 1 == 0 {
            register
        } else {
            // Digits above 9 count as what they would be worth.
            (0..4).rev().fold(0, |sum, digit| sum * 10 + (register >> (4 * digit) & 0xf))
        };
        if count % self.modulus() == 0 { self.modulus() } else { count % self.modulus() }
    }

    /// Ticks since the load.
    fn elapsed(&self, run: Run, tick: u64) -> u64 {
        self.held.unwrap_or(tick.saturating_sub(run.start))
    }

    /// The end of the period, or in mode 3 of the half, that is running at `tick`.
    fn end_of_part(&self, run: Run, tick: u64) -> u64 {
        let elapsed = tick.saturating_sub(run.start);
        let (periods, into) = (elapsed / run.count, elapsed % run.count);
        let part = match self.mode() {
            Mode::SquareWave if into < run.first_half() => run.first_half(),
            _ => run.count,
        };
        run.start + periods * run.count + part
    }

    /// The output.
    pub fn output(&self, tick: u64) -> bool {
        let Some(run) = self.run else { return self.mode() != Mode::TerminalCount };
        let elapsed = self.elapsed(run, tick);
        match self.mode() {
            Mode::TerminalCount | Mode::OneShot => elapsed >= run.count,
            // A closed gate sets the output high at once.
            Mode::RateGenerator => self.held.is_some() || elapsed % run.count != run.count - 1,
            Mode::SquareWave => self.held.is_some() || (elapsed % run.count < run.first_half()) != run.low_first,
            Mode::SoftwareStrobe | Mode::HardwareStrobe => elapsed != run.count,
        }
    }

    /// The counting element.
    fn value(&self, tick: u64) -> u16 {
        let value = match self.run {
            None => self.count() % self.modulus(),
            Some(run) => {
                let elapsed = self.elapsed(run, tick);
                match self.mode() {
                    Mode::RateGenerator => run.count - elapsed % run.count,
                    Mode::SquareWave => run.square_wave_value(elapsed % run.count),
                    // It goes on below 0 for ever.
                    _ => run.count + self.modulus() - elapsed % self.modulus(),
                }
            }
        } % self.modulus();
        if self.control & 1 == 0 {
            return value as u16;
        }
        [1000, 100, 10, 1].iter().fold(0, |bcd, place| bcd << 4 | (value / place % 10) as u16)
    }

    /// A byte of the status or the count, latched or as it is.
    pub fn read(&mut self, tick: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.value(tick)).to_le_bytes();
        let (byte, last) = match self.access() {
            LOW => (low, true),
            HIGH => (high, true),
            _ => {
                self.read_high = !self.read_high;
                if self.read_high { (low, false) } else { (high, true) }
            }
        };
        if last {
            self.latched_count = None;
        }
        byte
    }

    /// Latches the count. A count that is latched already stays.
    pub fn latch_count(&mut self, tick: u64) {
        self.latched_count.get_or_insert(self.value(tick));
    }

    /// Latches the status. A status that is latched already stays.
    pub fn latch_status(&mut self, tick: u64) {
        let status = u8::from(self.output(tick)) << 7 | u8::from(self.null_count) << 6 | self.control;
        self.latched_status.get_or_insert(status);
    }

    /// The first tick after `tick` at which the output rises if nobody interferes.
    pub fn next_rise(&self, tick: u64) -> Option<u64> {
        let rise = self.run.and_then(|run| self.rise_of(run, tick));
        let Some(load) = self.load_at else { return rise };
        if let Some(rise) = rise.filter(|&rise| rise < load) {
            return Some(rise);
        }
        let mut loaded = self.clone();
        loaded.settle(load);
        let load_rises = load > tick && loaded.output(load) && !self.output(load - 1);
        if load_rises { Some(load) } else { loaded.next_rise(load.max(tick)) }
    }

    fn rise_of(&self, run: Run, tick: u64) -> Option<u64> {
        if self.held.is_some() {
            return None;
        }
        // The first of a series `first, first + count, …` after `tick`.
        let periodic = |first: u64| {
            let passed = (tick + 1).saturating_sub(first).div_ceil(run.count);
            Some(first + passed * run.count)
        };
        match self.mode() {
            Mode::TerminalCount | Mode::OneShot => Some(run.start + run.count),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => Some(run.start + run.count + 1),
            // A count of 1 is illegal in mode 2 and has no low half in mode 3.
            _ if run.count == 1 => None,
            Mode::SquareWave if run.low_first => periodic(run.start + run.first_half()),
            Mode::RateGenerator | Mode::SquareWave => periodic(run.start + run.count),
        }
        .filter(|&rise| rise > tick)
    }
}

impl Run {
    /// Mode 3: ticks of the first half. The high half of an odd count is the longer one.
    fn first_half(&self) -> u64 {
        if self.low_first { self.count / 2 } else { self.count.div_ceil(2) }
    }

    /// Mode 3: whether a load at `at`, the end of a half, is followed by a low half.
    fn ends_high_half(&self, at: u64) -> bool {
        let elapsed = at.saturating_sub(self.start);
        let second_half_next = elapsed % self.count == self.first_half();
        elapsed != 0 && second_half_next != self.low_first
    }

    /// Mode 3: the counting element goes down by two; in the high half of an odd count one tick longer.
    fn square_wave_value(&self, into: u64) -> u64 {
        let into_half = if into < self.first_half() { into } else { into - self.first_half() };
        (self.count & !1).saturating_sub(2 * into_half)
    }
}
