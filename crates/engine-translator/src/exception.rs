//! Exceptions (SDM vol. 3A chapter 6): what an instruction raises instead of completing.

/// A fault or trap on its way to be delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// Error code, for the vectors that have one.
    pub error: Option<u32>,
    /// What CR2 (page fault) or DR6 (debug exception: the bits to set) gets.
    pub payload: u64,
}

/// Vectors.
pub mod vector {
    #![allow(missing_docs)]
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

/// Bits of a page fault's error code (SDM vol. 3A 4.7).
pub mod pf {
    #![allow(missing_docs)]
    pub const PRESENT: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RESERVED: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
}

impl Exception {
    /// An exception without error code.
    pub const fn plain(vector: u8) -> Self {
        Self { vector, error: None, payload: 0 }
    }

    /// An exception with error code.
    pub const fn with_error(vector: u8, error: u32) -> Self {
        Self { vector, error: Some(error), payload: 0 }
    }

    /// #UD.
    pub const UD: Self = Self::plain(vector::UD);
    /// #NM.
    pub const NM: Self = Self::plain(vector::NM);
    /// #DE.
    pub const DE: Self = Self::plain(vector::DE);
    /// #GP(0).
    pub const GP0: Self = Self::with_error(vector::GP, 0);
    /// #SS(0).
    pub const SS0: Self = Self::with_error(vector::SS, 0);
    /// #AC(0).
    pub const AC0: Self = Self::with_error(vector::AC, 0);

    /// #GP with a selector error code (the RPL bits are dropped).
    pub const fn gp(selector: u16) -> Self {
        Self::with_error(vector::GP, selector as u32 & 0xfffc)
    }

    /// #NP(selector).
    pub const fn np(selector: u16) -> Self {
        Self::with_error(vector::NP, selector as u32 & 0xfffc)
    }

    /// #SS(selector).
    pub const fn ss(selector: u16) -> Self {
        Self::with_error(vector::SS, selector as u32 & 0xfffc)
    }

    /// #TS(selector).
    pub const fn ts(selector: u16) -> Self {
        Self::with_error(vector::TS, selector as u32 & 0xfffc)
    }

    /// #PF at `linear` with the given error code.
    pub const fn page_fault(linear: u64, error: u32) -> Self {
        Self { vector: vector::PF, error: Some(error), payload: linear }
    }

    /// #DB with the given bits for DR6.
    pub const fn debug(dr6: u64) -> Self {
        Self { vector: vector::DB, error: None, payload: dr6 }
    }
}
