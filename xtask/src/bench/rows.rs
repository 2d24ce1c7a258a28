//! The rows, in the order in which they are measured.

/// What a row shows, as the goals are told by it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Integer code of user programs.
    Integer,
    /// SIMD and floating point.
    Vector,
    /// Copies that are one instruction.
    Copy,
    /// The kernel's work.
    Kernel,
    /// From start to userspace.
    Boot,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Integer, Self::Vector, Self::Copy, Self::Kernel, Self::Boot];
}

/// A row of the table.
#[derive(Debug)]
pub struct Row {
    /// As the agent knows it.
    pub name: &'static str,
    /// What it shows.
    pub kind: Kind,
}

const fn row(name: &'static str, kind: Kind) -> Row {
    Row { name, kind }
}

/// From start to userspace: not the agent's, for it takes new machines.
pub const BOOT: &str = "boot";

/// All rows. The compiler is the last that guests run: their memory is at its peak then.
pub const ROWS: &[Row] = &[
    row("integer", Kind::Integer),
    row("sieve", Kind::Integer),
    row("chase", Kind::Integer),
    row("sha256", Kind::Integer),
    row("interp", Kind::Integer),
    row("fib", Kind::Integer),
    row("indirect", Kind::Integer),
    row("quicksort", Kind::Integer),
    row("tree", Kind::Integer),
    row("memcpy-sse", Kind::Vector),
    row("memcpy-rep", Kind::Copy),
    row("triad", Kind::Vector),
    row("scalar-fp", Kind::Vector),
    row("vector-sse2", Kind::Vector),
    row("vector-avx2", Kind::Vector),
    row("getppid", Kind::Kernel),
    row("pipe", Kind::Kernel),
    row("fork", Kind::Kernel),
    row("exec", Kind::Kernel),
    row("faults", Kind::Kernel),
    row("segv", Kind::Kernel),
    row("futex", Kind::Kernel),
    row(BOOT, Kind::Boot),
    row("gzip", Kind::Integer),
    row("perl", Kind::Integer),
    row("gcc", Kind::Integer),
];

/// All names, for a message.
pub fn names() -> String {
    ROWS.iter().map(|row| row.name).collect::<Vec<_>>().join(", ")
}
