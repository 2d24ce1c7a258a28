//! A case: code and the state that it starts from; and what came of it.

use std::fmt;

use anyhow::{Context, Result, bail};

use crate::{
    layout::DATA_BYTES,
    rng::Rng,
    segments::{CODE16, CODE32, CODE64, DATA32},
    xsave::{self, Area, at},
};

/// Code and the state that it starts from. The vector registers and the data are drawn from seeds of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// 16, 32 or 64.
    pub bits: u32,
    /// The stack segment's selector.
    pub ss: u16,
    /// Where it starts: linear address of the first byte of `code`.
    pub entry: u64,
    /// The code.
    pub code: Vec<u8>,
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub rflags: u64,
    /// Seed of the x87 and vector registers.
    pub vectors: u64,
    /// Seed of the data.
    pub memory: u64,
}

impl Case {
    /// The x87 and vector registers.
    pub fn area(&self) -> Area {
        Area::random(self.vectors)
    }

    /// The code segment's selector.
    pub fn cs(&self) -> u16 {
        match self.bits {
            16 => CODE16,
            32 => CODE32,
            _ => CODE64,
        }
    }

    /// Puts the data into `bytes`, of which there are [`DATA_BYTES`].
    pub fn fill_memory(&self, bytes: &mut [u8]) {
        xsave::fill(&mut bytes[..DATA_BYTES], &mut Rng::new(self.memory));
    }

    /// Reads what [`fmt::Display`] writes. Lines that begin with `#` are comments.
    pub fn parse(text: &str) -> Result<Self> {
        let field = |name: &str| {
            let mut lines = text.lines().filter_map(|l| l.trim().split_once(' '));
            lines
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.trim())
                .with_context(|| format!("no field '{name}'"))
        };
        let number = |text: &str| u64::from_str_radix(text, 16).with_context(|| format!("'{text}' is not hexadecimal"));
        let hex = field("code")?;
        let code: Result<Vec<u8>, _> =
            (0..hex.len() / 2).map(|i| u8::from_str_radix(hex.get(2 * i..2 * i + 2).unwrap_or("?"), 16)).collect();
        let registers = field("gpr")?.split_whitespace().map(number).collect::<Result<Vec<_>>>()?;
        let Ok(gpr) = <[u64; 16]>::try_from(registers) else { bail!("there are 16 general registers") };
        let bits = match field("bits")? {
            "16" => 16,
            "32" => 32,
            "64" => 64,
            other => bail!("code of {other} bits"),
        };
        Ok(Self {
            bits,
            ss: field("ss").ok().map_or(Ok(u64::from(DATA32)), number)? as u16,
            entry: number(field("entry")?)?,
            code: code.context("code is in hexadecimal")?,
            gpr,
            rflags: number(field("rflags")?)?,
            vectors: number(field("vectors")?)?,
            memory: number(field("memory")?)?,
        })
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "bits {}", self.bits)?;
        if self.ss != DATA32 {
            writeln!(f, "ss {:x}", self.ss)?;
        }
        writeln!(f, "entry {:x}", self.entry)?;
        write!(f, "code ")?;
        self.code.iter().try_for_each(|b| write!(f, "{b:02x}"))?;
        write!(f, "\ngpr")?;
        self.gpr.iter().try_for_each(|r| write!(f, " {r:x}"))?;
        writeln!(f, "\nrflags {:x}\nvectors {:x}\nmemory {:x}", self.rflags, self.vectors, self.memory)
    }
}

/// The exception that ended a case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    /// Vector.
    pub vector: u8,
    /// Error code; 0 for vectors without.
    pub error: u32,
    /// CR2, if it was a page fault; else 0.
    pub address: u64,
}

/// What came of a case.
#[derive(Clone)]
pub struct Outcome {
    /// General registers.
    pub gpr: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// Selectors: ES, CS, SS, DS, FS, GS.
    pub selectors: [u16; 6],
    /// Bases of FS and GS, where the host lets user code read them.
    pub bases: [u64; 2],
    /// How it ended.
    pub fault: Fault,
    /// x87 and vector registers, normalised.
    pub area: Area,
    /// The data.
    pub memory: Vec<u8>,
}

impl Outcome {
    /// Whether an unmasked x87 exception waits (FSW.ES).
    pub fn x87_exception_waits(&self) -> bool {
        self.area.u16(at::FSW) & 0x80 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trip() {
        let case = Case {
            bits: 16,
            ss: 0x1f,
            entry: 0x2000_1ffe,
            code: vec![0x90, 0x0f],
            gpr: std::array::from_fn(|i| (i as u64) << 60 | 7),
            rflags: 0x202,
            vectors: u64::MAX,
            memory: 0,
        };
        assert_eq!(Case::parse(&format!("# kept\n{case}")).unwrap(), case);
        assert!(Case::parse("bits 64").is_err());
    }
}
