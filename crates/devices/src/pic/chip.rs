//! One 8259A (Intel 8259A data sheet, order number 231468).

/// Where the chip is in its initialization sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Init {
    /// Not in it: stores to A0 = 1 are OCW1.
    Done = 0,
    Icw2 = 1,
    Icw3 = 2,
    Icw4 = 3,
}

/// ICW1 and OCW2/3 share the address A0 = 0; these bits tell which it is.
const ICW1: u8 = 1 << 4;
const OCW3: u8 = 1 << 3;

/// ICW1: ICW4 is needed.
const ICW1_IC4: u8 = 1 << 0;
/// ICW1: single, there is no ICW3.
const ICW1_SNGL: u8 = 1 << 1;
/// ICW1: all inputs are level triggered.
const ICW1_LTIM: u8 = 1 << 3;
/// ICW4: automatic end of interrupt.
const ICW4_AEOI: u8 = 1 << 1;
/// ICW4: special fully nested mode.
const ICW4_SFNM: u8 = 1 << 4;

/// The chip's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chip {
    /// The inputs' levels.
    pub lines: u8,
    /// Edges that have not been acknowledged.
    pub edges: u8,
    /// In-service register.
    pub isr: u8,
    /// Interrupt mask register.
    pub imr: u8,
    /// Edge/level control register: inputs that are level triggered.
    pub elcr: u8,
    /// ICW1's LTIM: all are.
    pub all_level: bool,
    /// The five high bits of the vectors.
    pub base: u8,
    /// The input of lowest priority.
    pub lowest: u8,
    pub init: Init,
    /// ICW1 announced an ICW4.
    pub needs_icw4: bool,
    /// ICW1 said that there is no cascade.
    pub single: bool,
    pub auto_eoi: bool,
    pub rotate_in_auto_eoi: bool,
    pub special_fully_nested: bool,
    pub special_mask: bool,
    /// Loads from A0 = 0 give ISR, not IRR.
    pub read_isr: bool,
    /// The next load is a poll.
    pub poll: bool,
    /// The input that slaves are on: bit 2 of the master.
    pub cascade: u8,
}

impl Chip {
    /// A chip after power-up with slaves at the inputs `cascade`. It has everything masked until it is initialized, so
    /// that it interrupts nobody who does not know of it.
    pub fn new(cascade: u8) -> Self {
        Self {
            lines: 0,
            edges: 0,
            isr: 0,
            imr: 0xff,
            elcr: 0,
            all_level: false,
            base: 0,
            lowest: 7,
            init: Init::Done,
            needs_icw4: false,
            single: false,
            auto_eoi: false,
            rotate_in_auto_eoi: false,
            special_fully_nested: false,
            special_mask: false,
            read_isr: false,
            poll: false,
            cascade,
        }
    }

    fn level_inputs(&self) -> u8 {
        if self.all_level { 0xff } else { self.elcr }
    }

    /// Interrupt request register.
    ///
    /// On the chip an edge is forgotten if its input falls before the acknowledge. Here it is kept: a vCPU may have to
    /// wait for its host longer than any input stays high, and would miss interrupts that hardware delivers.
    pub fn irr(&self) -> u8 {
        let level = self.level_inputs();
        self.edges & !level | self.lines & level
    }

    /// Drives the input `line`.
    pub fn set_line(&mut self, line: u8, high: bool) {
        let bit = 1 << (line & 7);
        if high {
            self.edges |= bit & !self.lines;
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
    }

    /// The inputs from highest to lowest priority.
    fn by_priority(&self) -> impl Iterator<Item = u8> + use<> {
        let lowest = self.lowest;
        (1..=8).map(move |i| (lowest + i) & 7)
    }

    /// The input whose interrupt the chip requests, if any: the highest that is not masked, unless one of the same or
    /// higher priority is in service.
    pub fn pending(&self) -> Option<u8> {
        let requests = self.irr() & !self.imr;
        if requests == 0 {
            return None;
        }
        // In special mask mode what is masked does not hold up the others.
        let blocking = if self.special_mask { self.isr & !self.imr } else { self.isr };
        // In special fully nested mode a slave in service is not locked out of its own input.
        let exempt = if self.special_fully_nested { self.cascade } else { 0 };
        for input in self.by_priority() {
            let bit = 1 << input;
            if requests & bit != 0 && blocking & bit & !exempt == 0 {
                return Some(input);
            }
            if blocking & bit != 0 {
                return None;
            }
        }
        None
    }

    /// The interrupt-acknowledge cycle for what [`Chip::pending`] said.
    pub fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        self.edges &= !bit;
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_in_auto_eoi {
            self.lowest = input;
        }
    }

    /// A load; `a0` is the address line.
    pub fn read(&mut self, a0: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return self.read_poll();
        }
        match (a0, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr(),
        }
    }

    /// The poll command makes the next load an acknowledge (data sheet, "Poll Command").
    fn read_poll(&mut self) -> u8 {
        let Some(input) = self.pending() else { return 0 };
        self.acknowledge(input);
        0x80 | input
    }

    /// A store; `a0` is the address line.
    pub fn write(&mut self, a0: bool, value: u8) {
        if !a0 {
            match value {
                _ if value & ICW1 != 0 => self.start_init(value),
                _ if value & OCW3 != 0 => self.write_ocw3(value),
                _ => self.write_ocw2(value),
            }
            return;
        }
        match self.init {
            Init::Done => self.imr = value,
            Init::Icw2 => {
                self.base = value & 0xf8;
                self.init = if !self.single { Init::Icw3 } else { self.after_icw3() };
            }
            // The cascade is wired, whatever software says of it.
            Init::Icw3 => self.init = self.after_icw3(),
            Init::Icw4 => {
                self.auto_eoi = value & ICW4_AEOI != 0;
                self.special_fully_nested = value & ICW4_SFNM != 0;
                self.init = Init::Done;
            }
        }
    }

    fn after_icw3(&self) -> Init {
        if self.needs_icw4 { Init::Icw4 } else { Init::Done }
    }

    /// ICW1 (data sheet, "Initialization Command Words", a to f). An input that is high needs a new edge.
    fn start_init(&mut self, icw1: u8) {
        *self = Self {
            lines: self.lines,
            elcr: self.elcr,
            imr: 0,
            base: self.base,
            all_level: icw1 & ICW1_LTIM != 0,
            single: icw1 & ICW1_SNGL != 0,
            needs_icw4: icw1 & ICW1_IC4 != 0,
            init: Init::Icw2,
            ..Self::new(self.cascade)
        };
    }

    /// OCW2: end of interrupt and rotation, by its bits R, SL and EOI.
    fn write_ocw2(&mut self, ocw2: u8) {
        let named = ocw2 & 7;
        match ocw2 >> 5 {
            0b000 => self.rotate_in_auto_eoi = false,
            0b001 => drop(self.end_highest()),
            0b010 => {}
            0b011 => self.isr &= !(1 << named),
            0b100 => self.rotate_in_auto_eoi = true,
            0b101 => {
                if let Some(ended) = self.end_highest() {
                    self.lowest = ended;
                }
            }
            0b110 => self.lowest = named,
            _ => {
                self.isr &= !(1 << named);
                self.lowest = named;
            }
        }
    }

    /// The non-specific end of interrupt: of the highest in service. In special mask mode it passes over those that
    /// are masked.
    fn end_highest(&mut self) -> Option<u8> {
        let candidates = if self.special_mask { self.isr & !self.imr } else { self.isr };
        let highest = self.by_priority().find(|input| candidates & 1 << input != 0)?;
        self.isr &= !(1 << highest);
        Some(highest)
    }

    fn write_ocw3(&mut self, ocw3: u8) {
        if ocw3 & 0x40 != 0 {
            self.special_mask = ocw3 & 0x20 != 0;
        }
        if ocw3 & 0x02 != 0 {
            self.read_isr = ocw3 & 0x01 != 0;
        }
        self.poll = ocw3 & 0x04 != 0;
    }
}
