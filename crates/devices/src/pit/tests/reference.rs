//! The 8254 once more, for the tests: counted down tick by tick, as the data sheet tells it.

/// A counter whose counts are written as one byte.
pub struct Reference {
    mode: u8,
    modulus: u32,
    gate: bool,
    register: u32,
    /// The counting element; `None` before its first load.
    pub element: Option<u32>,
    pub output: bool,
    /// The next tick loads the counting element.
    pub load_pending: bool,
    /// The end of the count is yet to come (modes 0, 1, 4, 5).
    armed: bool,
    /// Mode 3: the half that is running belongs to an odd count.
    odd: bool,
}

impl Reference {
    pub fn new(mode: u8, bcd: bool, gate: bool) -> Self {
        let modulus = if bcd { 10_000 } else { 0x1_0000 };
        let (register, element, load_pending, armed, odd) = (0, None, false, false, false);
        Self { mode, modulus, gate, register, element, output: mode != 0, load_pending, armed, odd }
    }

    pub fn write(&mut self, count: u32) {
        self.register = if count == 0 { self.modulus } else { count };
        match self.mode {
            0 | 4 => self.load_pending = true,
            2 | 3 => self.load_pending |= self.element.is_none(),
            _ => {}
        }
    }

    pub fn set_gate(&mut self, open: bool) {
        let rises = open && !self.gate;
        self.gate = open;
        match self.mode {
            1 | 5 => self.load_pending |= rises,
            2 | 3 if self.element.is_some() => {
                // The trigger is kept for the next tick, even if the gate closes before.
                self.load_pending |= rises;
                self.output |= !open;
            }
            _ => {}
        }
    }

    pub fn tick(&mut self) {
        if self.load_pending {
            self.load_pending = false;
            self.load();
            self.armed = true;
            self.output = matches!(self.mode, 2..=5);
        } else if self.element.is_some() && (self.gate || matches!(self.mode, 1 | 5)) {
            self.count();
        }
    }

    fn load(&mut self) {
        self.odd = self.register % 2 == 1;
        self.element = Some(if self.mode == 3 { self.register & !1 } else { self.register });
    }

    fn count(&mut self) {
        let element = self.element.unwrap();
        let below = |step| (element + self.modulus - step) % self.modulus;
        match self.mode {
            2 if element == 1 => {
                self.load();
                self.output = true;
            }
            2 => {
                self.element = Some(element - 1);
                self.output = element - 1 != 1;
            }
            3 if element == 0 || element == 2 && !(self.odd && self.output) => {
                self.load();
                self.output = !self.output;
            }
            3 => self.element = Some(element - 2),
            _ => {
                self.element = Some(below(1));
                let ends = self.armed && below(1) == 0;
                self.armed &= !ends;
                self.output = match self.mode {
                    0 | 1 => self.output || ends,
                    _ => !ends,
                };
            }
        }
    }
}
