//! The names of emitted code for Linux's perf: /tmp/perf-PID.map has a line for each piece, with its start and size in
//! hexadecimal (tools/perf/Documentation/jit-interface.txt in the kernel's sources).

use std::{
    fmt::Write,
    path::{Path, PathBuf},
};

use purlin_vmm::profile::{Content, Piece};

/// Where perf looks for the names of a process.
pub fn path(process: u32) -> PathBuf {
    Path::new("/tmp").join(format!("perf-{process}.map"))
}

/// The map.
pub fn text(pieces: &[Piece]) -> String {
    let mut text = String::new();
    for Piece { addresses, content } in pieces {
        let size = addresses.end - addresses.start;
        let _ = write!(text, "{:x} {size:x} ", addresses.start);
        let _ = match content {
            Content::Stub(name) => writeln!(text, "purlin-stub-{name}"),
            Content::Block(place) => {
                let mode = if place.user { "user" } else { "kernel" };
                match place.linear {
                    Some(linear) => writeln!(text, "guest-{mode} {linear:#x}"),
                    None => writeln!(text, "guest-{mode} physical {:#x}", place.physical),
                }
            }
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use purlin_vmm::profile::GuestPlace;

    use super::*;

    #[test]
    fn lines() {
        let block = |linear, user| Content::Block(GuestPlace { linear, physical: 0x9000, user });
        let pieces = [
            Piece { addresses: 0x7f00_0000_0000..0x7f00_0000_0040, content: Content::Stub("enter") },
            Piece { addresses: 0x7f00_0000_0040..0x7f00_0000_0052, content: block(Some(0x40_1234), true) },
            Piece { addresses: 0x7f00_0000_0052..0x7f00_0000_1052, content: block(Some(0xffff_ffff_8100_0000), false) },
            Piece { addresses: 0x7f00_0000_1052..0x7f00_0000_1054, content: block(None, true) },
        ];
        let expected = "\
7f0000000000 40 purlin-stub-enter
7f0000000040 12 guest-user 0x401234
7f0000000052 1000 guest-kernel 0xffffffff81000000
7f0000001052 2 guest-user physical 0x9000
";
        assert_eq!(text(&pieces), expected);
        assert_eq!(path(42), Path::new("/tmp/perf-42.map"));
    }
}
