//! A small assembler for the host instructions that the translator adds of its own.
//!
//! Registers are numbered as in the encoding (0 RAX … 15 R15). Guest instructions that are copied are encoded by
//! iced-x86 into the same buffer.

use super::desc::LinkDesc;

/// Host registers.
pub mod reg {
    #![allow(missing_docs)]
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    pub const R8: u8 = 8;
    pub const R9: u8 = 9;
    pub const R10: u8 = 10;
    pub const R11: u8 = 11;
    pub const R12: u8 = 12;
    pub const R13: u8 = 13;
    pub const R14: u8 = 14;
    pub const R15: u8 = 15;
}

/// A memory operand.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mem {
    /// Relative to GS.
    pub gs: bool,
    /// Base register.
    pub base: Option<u8>,
    /// Index register and log2 of its scale.
    pub index: Option<(u8, u8)>,
    /// Displacement.
    pub disp: i32,
}

impl Mem {
    /// `gs:[disp]`.
    pub const fn gs(disp: i32) -> Self {
        Self { gs: true, base: None, index: None, disp }
    }

    /// `gs:[base + disp]`.
    pub const fn gs_at(base: u8, disp: i32) -> Self {
        Self { gs: true, base: Some(base), index: None, disp }
    }

    /// `[base + disp]`.
    pub const fn at(base: u8, disp: i32) -> Self {
        Self { gs: false, base: Some(base), index: None, disp }
    }

    /// `[base + index]`.
    pub const fn sum(base: u8, index: u8) -> Self {
        Self { gs: false, base: Some(base), index: Some((index, 0)), disp: 0 }
    }
}

/// A place in the code that may be referred to before it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label(u32);

/// Where in a block code or data goes; the sections follow each other in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// What is executed normally.
    Hot,
    /// Slow paths.
    Cold,
    /// Descriptors.
    Data,
}

/// Code under construction.
pub struct Asm {
    sections: [Vec<u8>; 3],
    current: Section,
    /// Address at which the first byte of the hot section will lie.
    pub origin: u64,
    labels: Vec<Option<(Section, u32)>>,
    /// Positions of rel32 fields and the labels that they refer to.
    uses: Vec<(Section, u32, Label)>,
    /// Positions of rel32 fields and the addresses that they refer to.
    far_uses: Vec<(Section, u32, u64)>,
    /// Positions of fields for the distance of labels from `base`.
    distances: Vec<(Section, u32, Label)>,
    /// See `distances`.
    pub base: u64,
    /// Positions of `LinkDesc`s and the places behind the conditional jumps that lead there.
    links: Vec<(Section, u32, Label)>,
    /// All of it, once it is finished.
    all: Vec<u8>,
}

/// Condition codes as in the encoding of Jcc.
pub mod cc {
    #![allow(missing_docs)]
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const BE: u8 = 6;
    pub const A: u8 = 7;
}

impl Asm {
    /// Code that will lie at `origin`.
    pub fn new(origin: u64) -> Self {
        Self {
            sections: [Vec::with_capacity(1024), Vec::with_capacity(1024), Vec::with_capacity(512)],
            current: Section::Hot,
            origin,
            labels: Vec::new(),
            uses: Vec::new(),
            far_uses: Vec::new(),
            distances: Vec::new(),
            base: origin,
            links: Vec::new(),
            all: Vec::new(),
        }
    }

    /// Makes it an empty one, for code that will lie at `origin`.
    pub fn restart(&mut self, origin: u64) {
        self.sections.iter_mut().for_each(Vec::clear);
        self.labels.clear();
        self.uses.clear();
        self.far_uses.clear();
        self.distances.clear();
        self.links.clear();
        (self.current, self.origin, self.base) = (Section::Hot, origin, origin);
    }

    /// The current section's bytes.
    pub fn code(&mut self) -> &mut Vec<u8> {
        &mut self.sections[self.current as usize]
    }

    /// Goes on in `section`; returns the one so far.
    pub fn section(&mut self, section: Section) -> Section {
        std::mem::replace(&mut self.current, section)
    }

    /// Address of the next byte of the hot section.
    pub fn here(&self) -> u64 {
        self.origin + self.sections[0].len() as u64
    }

    /// A new label.
    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() as u32 - 1)
    }

    /// A label for this place.
    pub fn label_here(&mut self) -> Label {
        let label = self.label();
        self.bind(label);
        label
    }

    /// Puts `label` here.
    pub fn bind(&mut self, label: Label) {
        let at = self.code().len() as u32;
        self.labels[label.0 as usize] = Some((self.current, at));
    }

    /// Offset of `label` from the origin, once all code is there.
    pub fn offset_of(&self, label: Label) -> u32 {
        let (section, at) = self.labels[label.0 as usize].expect("label is bound");
        self.start_of(section) + at
    }

    fn start_of(&self, section: Section) -> u32 {
        // Jumps that are patched are aligned in their section; descriptors are read by Rust code as structures.
        let cold = self.sections[0].len().next_multiple_of(8);
        match section {
            Section::Hot => 0,
            Section::Cold => cold as u32,
            Section::Data => (cold + self.sections[1].len()).next_multiple_of(8) as u32,
        }
    }

    /// Length of the code so far, descriptors left out.
    pub fn code_len(&self) -> u32 {
        self.start_of(Section::Cold) + self.sections[1].len() as u32
    }

    /// Fills in all references.
    pub fn finish(&mut self) {
        for i in 0..self.uses.len() {
            let (section, at, label) = self.uses[i];
            let target = self.offset_of(label);
            let rel = target.wrapping_sub(self.start_of(section) + at + 4);
            self.patch(section, at, rel);
        }
        for i in 0..self.far_uses.len() {
            let (section, at, target) = self.far_uses[i];
            let next = self.origin + u64::from(self.start_of(section) + at + 4);
            let rel = target.wrapping_sub(next) as i64;
            debug_assert_eq!(rel, i64::from(rel as i32));
            self.patch(section, at, rel as u32);
        }
        for i in 0..self.distances.len() {
            let (section, at, label) = self.distances[i];
            let distance = self.origin - self.base + u64::from(self.offset_of(label));
            self.patch(section, at, distance as u32);
        }
        for i in 0..self.links.len() {
            let (section, at, behind) = self.links[i];
            let more = LinkDesc::behind(self.start_of(section) + at - self.offset_of(behind));
            let desc = &mut self.sections[section as usize][at as usize..];
            desc.iter_mut().zip(more).for_each(|(byte, more)| *byte |= more);
        }
        self.all.clear();
        for section in [Section::Hot, Section::Cold, Section::Data] {
            self.all.resize(self.start_of(section) as usize, 0xcc);
            self.all.extend_from_slice(&self.sections[section as usize]);
        }
    }

    /// The whole, once it is finished.
    pub fn all(&self) -> &[u8] {
        &self.all
    }

    fn patch(&mut self, section: Section, at: u32, value: u32) {
        let at = at as usize;
        self.sections[section as usize][at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Raw bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.code().extend_from_slice(bytes);
    }

    fn imm32(&mut self, value: i32) {
        self.bytes(&value.to_le_bytes());
    }

    /// Nops up to a position with `position % alignment == rest`.
    pub fn align(&mut self, alignment: usize, rest: usize) {
        const NOPS: [&[u8]; 8] = [
            &[0x90],
            &[0x66, 0x90],
            &[0x0f, 0x1f, 0],
            &[0x0f, 0x1f, 0x40, 0],
            &[0x0f, 0x1f, 0x44, 0, 0],
            &[0x66, 0x0f, 0x1f, 0x44, 0, 0],
            &[0x0f, 0x1f, 0x80, 0, 0, 0, 0],
            &[0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0],
        ];
        loop {
            let position = (self.origin as usize + self.code().len()) % alignment;
            let missing = (rest + alignment - position) % alignment;
            if missing == 0 {
                return;
            }
            self.bytes(NOPS[missing.min(8) - 1]);
        }
    }

    /// Nops, if need be, so that five bytes from here on are within eight aligned ones: they can be replaced by one store.
    pub fn align_patch(&mut self) {
        self.align_patch_behind(0);
    }

    /// The same for the five bytes behind the next `len`.
    pub fn align_patch_behind(&mut self, len: usize) {
        if (self.origin as usize + self.code().len() + len) % 8 > 3 {
            self.align(8, 8 - len % 8);
        }
    }

    /// An instruction with a ModRM memory operand.
    fn op_mem(&mut self, prefix: Option<u8>, wide: bool, opcode: &[u8], reg: u8, mem: Mem) {
        if mem.gs {
            self.code().push(0x65);
        }
        self.code().extend(prefix);
        let (base, index) = (mem.base.unwrap_or(0), mem.index.map_or(0, |(r, _)| r));
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3;
        if rex != 0x40 {
            self.code().push(rex);
        }
        self.bytes(opcode);
        self.modrm(reg, mem);
    }

    fn modrm(&mut self, reg: u8, mem: Mem) {
        let reg = (reg & 7) << 3;
        let Some(base) = mem.base else {
            // No base: SIB with base 101 and mod 00 is disp32.
            self.bytes(&[reg | 4, 0x25]);
            self.imm32(mem.disp);
            return;
        };
        let md = match mem.disp {
            0 if base & 7 != 5 => 0,
            -128..=127 => 1,
            _ => 2,
        };
        match mem.index {
            Some((index, scale)) => {
                debug_assert_ne!(index, reg::RSP);
                self.bytes(&[md << 6 | reg | 4, scale << 6 | (index & 7) << 3 | base & 7]);
            }
            None if base & 7 == 4 => self.bytes(&[md << 6 | reg | 4, 0x24]),
            None => self.code().push(md << 6 | reg | base & 7),
        }
        match md {
            0 => {}
            1 => self.code().push(mem.disp as u8),
            _ => self.imm32(mem.disp),
        }
    }

    fn op_rr(&mut self, wide: bool, opcode: &[u8], reg: u8, rm: u8) {
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | rm >> 3;
        if rex != 0x40 {
            self.code().push(rex);
        }
        self.bytes(opcode);
        self.code().push(0xc0 | (reg & 7) << 3 | rm & 7);
    }

    /// `mov dst, src`
    pub fn mov_rr(&mut self, dst: u8, src: u8) {
        self.op_rr(true, &[0x89], src, dst);
    }

    /// `mov dst32, src32`
    pub fn mov_rr32(&mut self, dst: u8, src: u8) {
        self.op_rr(false, &[0x89], src, dst);
    }

    /// `movzx dst32, src16`
    pub fn movzx16(&mut self, dst: u8, src: u8) {
        self.op_rr(false, &[0x0f, 0xb7], dst, src);
    }

    /// `mov dst16, src16`
    pub fn mov_rr16(&mut self, dst: u8, src: u8) {
        self.code().push(0x66);
        self.op_rr(false, &[0x89], src, dst);
    }

    /// `mov dst, value`, the shortest form.
    pub fn mov_ri(&mut self, dst: u8, value: u64) {
        if value <= u64::from(u32::MAX) {
            if dst >= 8 {
                self.code().push(0x41);
            }
            self.code().push(0xb8 | dst & 7);
            self.imm32(value as u32 as i32);
        } else if value as i64 == i64::from(value as i32) {
            self.bytes(&[0x48 | dst >> 3, 0xc7, 0xc0 | dst & 7]);
            self.imm32(value as i32);
        } else {
            self.mov_wide(dst, value);
        }
    }

    /// `mov dst, value` in ten bytes, of which the last eight are the value.
    pub fn mov_wide(&mut self, dst: u8, value: u64) {
        self.bytes(&[0x48 | dst >> 3, 0xb8 | dst & 7]);
        self.bytes(&value.to_le_bytes());
    }

    /// `mov dst, [mem]`, 64 bits.
    pub fn load(&mut self, dst: u8, mem: Mem) {
        self.op_mem(None, true, &[0x8b], dst, mem);
    }

    /// `mov [mem], src`, 64 bits.
    pub fn store(&mut self, mem: Mem, src: u8) {
        self.op_mem(None, true, &[0x89], src, mem);
    }

    /// `mov [mem], src` of `size` bytes (2, 4 or 8).
    pub fn store_sized(&mut self, mem: Mem, src: u8, size: usize) {
        let prefix = (size == 2).then_some(0x66);
        self.op_mem(prefix, size == 8, &[0x89], src, mem);
    }

    /// `movzx dst32, word [mem]`
    pub fn load16(&mut self, dst: u8, mem: Mem) {
        self.op_mem(None, false, &[0x0f, 0xb7], dst, mem);
    }

    /// `mov dst, [mem]` of `size` bytes (2: the rest is kept; 4: zero-extended; 8).
    pub fn load_sized(&mut self, dst: u8, mem: Mem, size: usize) {
        let prefix = (size == 2).then_some(0x66);
        self.op_mem(prefix, size == 8, &[0x8b], dst, mem);
    }

    /// `mov [mem], imm` of `size` bytes (2, 4 or 8: sign-extended).
    pub fn store_imm(&mut self, mem: Mem, value: i32, size: usize) {
        let prefix = (size == 2).then_some(0x66);
        self.op_mem(prefix, size == 8, &[0xc7], 0, mem);
        if size == 2 {
            self.bytes(&(value as i16).to_le_bytes());
        } else {
            self.imm32(value);
        }
    }

    /// `mov qword [mem], distance of label from the base`
    pub fn store_distance(&mut self, mem: Mem, label: Label) {
        self.store_imm(mem, 0, 8);
        let at = self.code().len() as u32 - 4;
        self.distances.push((self.current, at, label));
    }

    /// Takes an instruction of [`Self::ERASED`] bytes and one at `at` out of the hot section: as many as leave all that is
    /// aligned where it was.
    pub fn erase(&mut self, at: usize) {
        let code = &mut self.sections[Section::Hot as usize];
        code[at] = 0x90;
        code.drain(at + 1..=at + Self::ERASED);
        let moved = |section: Section, place: &mut u32| {
            if section == Section::Hot && *place as usize > at {
                *place -= Self::ERASED as u32;
            }
        };
        self.labels.iter_mut().flatten().for_each(|(section, place)| moved(*section, place));
        let (labels, addresses) = (&mut self.uses, &mut self.far_uses);
        let fields = labels.iter_mut().chain(&mut self.distances).chain(&mut self.links);
        fields.for_each(|(section, place, _)| moved(*section, place));
        addresses.iter_mut().for_each(|(section, place, _)| moved(*section, place));
    }

    /// See [`Self::erase`].
    pub const ERASED: usize = 8;

    /// `movzx dst32, byte [mem]`
    pub fn load8(&mut self, dst: u8, mem: Mem) {
        self.op_mem(None, false, &[0x0f, 0xb6], dst, mem);
    }

    /// `lea dst, [mem]`
    pub fn lea(&mut self, dst: u8, mem: Mem) {
        self.op_mem(None, true, &[0x8d], dst, mem);
    }

    /// `lea dst32, [mem]`
    pub fn lea32(&mut self, dst: u8, mem: Mem) {
        self.op_mem(None, false, &[0x8d], dst, mem);
    }

    /// `lea dst, [rip + label]`
    pub fn lea_label(&mut self, dst: u8, label: Label) {
        self.bytes(&[0x48 | (dst >> 3) << 2, 0x8d, (dst & 7) << 3 | 5]);
        self.rel32(label);
    }

    /// `sub dst, src`
    pub fn sub_rr(&mut self, dst: u8, src: u8) {
        self.op_rr(true, &[0x29], src, dst);
    }

    /// `sub dst, [mem]`
    pub fn sub_mem(&mut self, dst: u8, mem: Mem) {
        self.op_mem(None, true, &[0x2b], dst, mem);
    }

    /// `add dst, [mem]`
    pub fn add_mem(&mut self, dst: u8, mem: Mem) {
        self.op_mem(None, true, &[0x03], dst, mem);
    }

    /// `cmp reg, imm`, 64 bits, the immediate sign-extended.
    pub fn cmp_ri(&mut self, reg: u8, value: i32) {
        self.bytes(&[0x48 | reg >> 3, 0x81, 0xf8 | reg & 7]);
        self.imm32(value);
    }

    /// `cmp reg, value` of 32 bits
    pub fn cmp32_ri(&mut self, reg: u8, value: i32) {
        if reg >= 8 {
            self.bytes(&[0x41]);
        }
        self.bytes(&[0x81, 0xf8 | reg & 7]);
        self.imm32(value);
    }

    /// `cmp reg, [mem]`, 64 bits
    pub fn cmp_reg_mem(&mut self, reg: u8, mem: Mem) {
        self.op_mem(None, true, &[0x3b], reg, mem);
    }

    /// `cmp a, b`
    pub fn cmp_rr(&mut self, a: u8, b: u8) {
        self.op_rr(true, &[0x39], b, a);
    }

    /// `test a, a`
    pub fn test_rr(&mut self, a: u8) {
        self.op_rr(true, &[0x85], a, a);
    }

    /// `cmp dword [mem], imm`
    pub fn cmp32_mem(&mut self, mem: Mem, value: u32) {
        self.op_mem(None, false, &[0x81], 7, mem);
        self.imm32(value as i32);
    }

    /// `cmp byte [mem], imm`
    pub fn cmp8_mem(&mut self, mem: Mem, value: u8) {
        self.op_mem(None, false, &[0x80], 7, mem);
        self.code().push(value);
    }

    /// `test byte [mem], imm`
    pub fn test8_mem(&mut self, mem: Mem, value: u8) {
        self.op_mem(None, false, &[0xf6], 0, mem);
        self.code().push(value);
    }

    /// `cmp qword mem, value`
    pub fn cmp_mem(&mut self, mem: Mem, value: i8) {
        self.op_mem(None, true, &[0x83], 7, mem);
        self.code().push(value as u8);
    }

    /// `and dst32, imm`
    pub fn and32(&mut self, dst: u8, value: u32) {
        if dst >= 8 {
            self.code().push(0x41);
        }
        self.bytes(&[0x81, 0xe0 | dst & 7]);
        self.imm32(value as i32);
    }

    /// `shr dst, count`
    pub fn shr(&mut self, dst: u8, count: u8) {
        self.bytes(&[0x48 | dst >> 3, 0xc1, 0xe8 | dst & 7, count]);
    }

    /// `shl dst, count`
    pub fn shl(&mut self, dst: u8, count: u8) {
        self.bytes(&[0x48 | dst >> 3, 0xc1, 0xe0 | dst & 7, count]);
    }

    /// `sar dst, count`
    pub fn sar(&mut self, dst: u8, count: u8) {
        self.bytes(&[0x48 | dst >> 3, 0xc1, 0xf8 | dst & 7, count]);
    }

    /// `movsx dst, src` from `size` bytes (2, 4 or 8).
    pub fn movsx(&mut self, dst: u8, src: u8, size: usize) {
        match size {
            2 => self.op_rr(true, &[0x0f, 0xbf], dst, src),
            4 => self.op_rr(true, &[0x63], dst, src),
            _ => self.mov_rr(dst, src),
        }
    }

    /// `rorx dst, src, count` (BMI2)
    pub fn rorx(&mut self, dst: u8, src: u8, count: u8) {
        let (r, b) = (!(dst >> 3) & 1, !(src >> 3) & 1);
        self.bytes(&[0xc4, r << 7 | 1 << 6 | b << 5 | 3, 0xfb, 0xf0, 0xc0 | (dst & 7) << 3 | src & 7, count]);
    }

    /// `lahf; seto al`: the status flags in AX.
    pub fn flags_to_ax(&mut self) {
        self.bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
    }

    /// `add al, 127; sahf`: the status flags from AX.
    pub fn ax_to_flags(&mut self) {
        self.bytes(&[0x04, 0x7f, 0x9e]);
    }

    /// `jmp label`
    pub fn jmp(&mut self, label: Label) {
        self.code().push(0xe9);
        self.rel32(label);
    }

    /// `jcc label`
    pub fn jcc(&mut self, cc: u8, label: Label) {
        self.bytes(&[0x0f, 0x80 | cc]);
        self.rel32(label);
    }

    /// The descriptor of a link, and the place behind the conditional jump that leads to the link.
    pub fn link_desc(&mut self, desc: LinkDesc, behind: Option<Label>) {
        let at = self.code().len() as u32;
        self.links.extend(behind.map(|behind| (self.current, at, behind)));
        self.bytes(&desc.to_bytes());
    }

    /// Four bytes that say where `label` is from behind them.
    pub fn offset_to(&mut self, label: Label) {
        self.rel32(label);
    }

    fn rel32(&mut self, label: Label) {
        let at = self.code().len() as u32;
        self.uses.push((self.current, at, label));
        self.imm32(0);
    }

    fn rel32_to(&mut self, target: u64) {
        let at = self.code().len() as u32;
        self.far_uses.push((self.current, at, target));
        self.imm32(0);
    }

    /// `jmp target`
    pub fn jmp_to(&mut self, target: u64) {
        self.code().push(0xe9);
        self.rel32_to(target);
    }

    /// `jcc target`
    pub fn jcc_to(&mut self, cc: u8, target: u64) {
        self.bytes(&[0x0f, 0x80 | cc]);
        self.rel32_to(target);
    }

    /// `jmp reg`
    pub fn jmp_reg(&mut self, r: u8) {
        self.op_rr(false, &[0xff], 4, r);
    }

    /// `call label`
    pub fn call(&mut self, label: Label) {
        self.code().push(0xe8);
        self.rel32(label);
    }

    /// `call target`
    pub fn call_to(&mut self, target: u64) {
        self.code().push(0xe8);
        self.rel32_to(target);
    }

    /// `jmp [mem]`
    pub fn jmp_mem(&mut self, mem: Mem) {
        self.op_mem(None, false, &[0xff], 4, mem);
    }

    /// `call [mem]`
    pub fn call_mem(&mut self, mem: Mem) {
        self.op_mem(None, false, &[0xff], 2, mem);
    }

    /// Length of [`Self::call_mem`] where the operand is relative to GS and one of R8 to R15, and its displacement large.
    pub const CALL_GS: usize = 8;

    /// `push reg`
    pub fn push(&mut self, r: u8) {
        if r >= 8 {
            self.code().push(0x41);
        }
        self.code().push(0x50 | r & 7);
    }

    /// `push qword [mem]`
    pub fn push_mem(&mut self, mem: Mem) {
        self.op_mem(None, false, &[0xff], 6, mem);
    }

    /// `pop reg`
    pub fn pop(&mut self, r: u8) {
        if r >= 8 {
            self.code().push(0x41);
        }
        self.code().push(0x58 | r & 7);
    }

    /// `neg dst`
    pub fn neg(&mut self, dst: u8) {
        self.bytes(&[0x48 | dst >> 3, 0xf7, 0xd8 | dst & 7]);
    }

    /// `ret`
    pub fn ret(&mut self) {
        self.code().push(0xc3);
    }

    /// An instruction of the XSAVE family with the GS-relative area at `disp`, with REX.W.
    pub fn xsave(&mut self, opcode: &[u8], digit: u8, disp: i32) {
        self.op_mem(None, true, opcode, digit, Mem::gs(disp));
    }

    /// `movups [mem], xmm`
    pub fn store_xmm(&mut self, xmm: u8, mem: Mem) {
        self.op_mem(None, false, &[0x0f, 0x11], xmm, mem);
    }

    /// `movups xmm, [mem]`
    pub fn load_xmm(&mut self, xmm: u8, mem: Mem) {
        self.op_mem(None, false, &[0x0f, 0x10], xmm, mem);
    }

    /// `ldmxcsr gs:[disp]`
    pub fn ldmxcsr(&mut self, disp: i32) {
        self.op_mem(None, false, &[0x0f, 0xae], 2, Mem::gs(disp));
    }
}
