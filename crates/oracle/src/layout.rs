//! The address space that a case runs in, natively and under the translator.
//!
//! Four frames of data lie side by side with a hole before and behind them, the third of them read-only:
//! `hole W0 W1 R W2 hole`. They are mapped at several places: below 2 GiB, beyond 4 GiB, and within reach of 16-bit
//! addresses; W2 is the last page below 4 GiB too. Two frames of code, mapped at three places likewise, have a hole behind
//! them: running into it is how a case ends.

/// Size of a page and of a frame.
pub const PAGE: u64 = 4096;
/// Frames of data.
pub const DATA_FRAMES: usize = 4;
/// Frames of code, which follow them.
pub const CODE_FRAMES: usize = 2;
/// All of them.
pub const FRAMES: usize = DATA_FRAMES + CODE_FRAMES;
/// Bytes of data.
pub const DATA_BYTES: usize = DATA_FRAMES * PAGE as usize;
/// Bytes of code.
pub const CODE_BYTES: usize = CODE_FRAMES * PAGE as usize;

/// What is added to addresses for the copy beyond 4 GiB.
pub const HIGH: u64 = 0x4100_0000_0000;
/// First page of data, below 2 GiB.
pub const DATA: u64 = 0x1000_1000;
/// First page of data, within reach of 16-bit addresses.
pub const DATA16: u64 = 0x9000;
/// The last page below 4 GiB: W2.
pub const TOP: u64 = 0xffff_f000;
/// First page of code, below 2 GiB.
pub const CODE: u64 = 0x2000_0000;
/// First page of code, within reach of 16-bit addresses.
pub const CODE16: u64 = 0x5000;
/// Base of FS.
pub const FS_BASE: u64 = 0x0f12_3450;
/// Base of GS.
pub const GS_BASE: u64 = 0x1000_2008;
/// What the code frames are filled with: HLT, which user code must not execute.
pub const FILLER: u8 = 0xf4;

/// The first page of code, in the copy that `entry` lies in.
pub fn code_base(entry: u64) -> u64 {
    if entry < CODE { CODE16 } else { CODE | entry & HIGH }
}

/// Where in the frames of code `address` lies, in whichever copy.
pub fn in_code(address: u64) -> Option<u64> {
    let offset = address.checked_sub(code_base(address))?;
    (offset < CODE_BYTES as u64).then_some(offset)
}

/// How far into the frames of code `entry` lies.
pub fn code_offset(entry: u64) -> u64 {
    entry.saturating_sub(code_base(entry)).min(CODE_BYTES as u64)
}

/// A page that is mapped.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    /// Linear address.
    pub linear: u64,
    /// Frame.
    pub frame: usize,
    /// Whether it can be written to.
    pub writable: bool,
    /// Whether it can be executed.
    pub executable: bool,
}

/// All of them.
pub fn mappings() -> Vec<Mapping> {
    let mut all = Vec::new();
    for base in [DATA, DATA16, HIGH + DATA] {
        for frame in 0..DATA_FRAMES {
            let linear = base + frame as u64 * PAGE;
            all.push(Mapping { linear, frame, writable: frame != 2, executable: false });
        }
    }
    all.push(Mapping { linear: TOP, frame: 3, writable: true, executable: false });
    for base in [CODE, CODE16, HIGH + CODE] {
        for i in 0..CODE_FRAMES {
            let linear = base + i as u64 * PAGE;
            all.push(Mapping { linear, frame: DATA_FRAMES + i, writable: false, executable: true });
        }
    }
    all
}
