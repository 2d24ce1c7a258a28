//! What the guest is.

use std::{fs, time::Duration};

use purlin_agent::protocol::Info;
use rustix::{
    system::uname,
    time::{ClockId, clock_gettime},
};

/// All of it, as it is now.
pub fn info() -> Info {
    let uname = uname();
    let text = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
    Info {
        agent: env!("CARGO_PKG_VERSION").into(),
        host_name: text(uname.nodename()),
        machine_id: machine_id(),
        boot_id: line_of("/proc/sys/kernel/random/boot_id"),
        uptime_ms: uptime().as_millis() as u64,
        os: pretty_name(&os_release()),
        kernel: text(uname.release()),
    }
}

/// machine-id(5); empty if there is none.
pub fn machine_id() -> String {
    line_of("/etc/machine-id")
}

fn line_of(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn uptime() -> Duration {
    clock_gettime(ClockId::Boottime).try_into().unwrap_or_default()
}

fn os_release() -> String {
    ["/etc/os-release", "/usr/lib/os-release"].iter().find_map(|path| fs::read_to_string(path).ok()).unwrap_or_default()
}

/// os-release(5): assignments as of a shell, here of one word or a quoted one.
fn pretty_name(os_release: &str) -> String {
    let value = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).unwrap_or_default();
    value.trim().trim_matches(['"', '\'']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_systems() {
        assert_eq!(
            pretty_name("ID=debian\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n"),
            "Debian GNU/Linux 12 (bookworm)"
        );
        assert_eq!(pretty_name("PRETTY_NAME=Void\n"), "Void");
        assert_eq!(pretty_name(""), "");
    }

    #[test]
    fn of_this_machine() {
        let info = info();
        assert_eq!(info.boot_id.len(), 36);
        assert!(info.uptime_ms > 0 && !info.kernel.is_empty());
    }
}
