//! The host name and the machine ID.

use std::{fs, io, path::Path};

use purlin_agent::protocol::{Failed, FailureKind, Renew};
use rustix::{
    rand::{GetRandomFlags, getrandom},
    system::sethostname,
};

use super::{Problems, note};
use crate::files::replace;

/// Whether the wanted ones can be.
pub fn check(renew: &Renew) -> Result<(), Failed> {
    let name = &renew.host_name;
    let good = |label: &str| {
        let fits = (1..64).contains(&label.len()) && !label.starts_with('-') && !label.ends_with('-');
        fits && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    // hostname(7): at most 64 bytes.
    let can_be = name.is_empty() || (name.len() <= 64 && name.split('.').all(good));
    if !can_be {
        return Err(invalid(format!("'{}' can be no host name", name.escape_debug())));
    }
    let id = &renew.machine_id;
    let is_id = id.len() == 32 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if !id.is_empty() && (!is_id || id.bytes().all(|byte| byte == b'0')) {
        return Err(invalid(format!("'{}' is no machine ID: 32 hexadecimal digits", id.escape_debug())));
    }
    Ok(())
}

fn invalid(message: String) -> Failed {
    Failed::new(FailureKind::Invalid, message)
}

/// Takes them; returns the machine ID.
pub fn renew(renew: &Renew, problems: &mut Problems) -> String {
    let name = &renew.host_name;
    if !name.is_empty() {
        note(problems, "the host name", sethostname(name.as_bytes()));
        note(problems, "/etc/hostname", replace(Path::new("/etc/hostname"), format!("{name}\n").as_bytes()));
        note(problems, "/etc/hosts", rewrite_hosts(name));
    }
    let id = match renew.machine_id.as_str() {
        "" => random_id(),
        id => Ok(id.to_owned()),
    };
    let written = id.and_then(|id| write_id(&id).map(|()| id));
    written.unwrap_or_else(|error| {
        problems.push(format!("/etc/machine-id: {error}"));
        String::new()
    })
}

/// Goes through the writing of files where nobody looks for them.
pub fn rehearse() {
    let path = Path::new("/etc/.purlin-rehearsal");
    // Again, so that there is one to be replaced.
    for _ in 0..2 {
        let _ = replace(path, b"it can be removed\n");
    }
    let _ = fs::remove_file(path);
}

fn rewrite_hosts(name: &str) -> io::Result<()> {
    let path = Path::new("/etc/hosts");
    match fs::read(path) {
        Ok(text) => replace(path, hosts(&String::from_utf8_lossy(&text), name).as_bytes()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// hosts(5) in Debian's manner: the machine's own name is that of 127.0.1.1. Where no line is, none is needed.
fn hosts(text: &str, name: &str) -> String {
    let short = name.split('.').next().unwrap_or(name);
    let names = if short == name { name.to_owned() } else { format!("{name} {short}") };
    let mut out = String::new();
    for line in text.split_inclusive('\n') {
        let is_own = line.split_ascii_whitespace().next() == Some("127.0.1.1");
        if is_own { out += &format!("127.0.1.1\t{names}\n") } else { out += line }
    }
    out
}

/// As machine-id(5) wants it: a random UUID of variant 1, version 4.
fn random_id() -> io::Result<String> {
    let mut bytes = [0; 16];
    // Sixteen bytes are never given in parts.
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn write_id(id: &str) -> io::Result<()> {
    let line = format!("{id}\n");
    replace(Path::new("/etc/machine-id"), line.as_bytes())?;
    // Usually a link to the other.
    let dbus = Path::new("/var/lib/dbus/machine-id");
    match fs::symlink_metadata(dbus) {
        Ok(metadata) if metadata.is_file() => replace(dbus, line.as_bytes()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ids_that_can_be() {
        let renew = |name: &str, id: &str| Renew { host_name: name.into(), machine_id: id.into(), ..Renew::default() };
        for good in ["", "web", "web-1.example.org"] {
            assert!(check(&renew(good, "")).is_ok(), "{good}");
        }
        for bad in ["-a", "a-", "a b", "a\nb", "a..b", ".", &"a".repeat(64)] {
            assert!(check(&renew(bad, "")).is_err(), "{bad}");
        }
        assert!(check(&renew("", &"0a".repeat(16))).is_ok());
        for bad in ["0", &"0".repeat(32), &"0A".repeat(16), &"0a".repeat(17)] {
            assert!(check(&renew("", bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_own_name_in_hosts() {
        let text = "127.0.0.1\tlocalhost\n127.0.1.1 old.example.org old\n127.0.1.10 x\n::1 localhost\n";
        let wanted = "127.0.0.1\tlocalhost\n127.0.1.1\tnew\n127.0.1.10 x\n::1 localhost\n";
        assert_eq!(hosts(text, "new"), wanted);
        assert_eq!(hosts("127.0.1.1 a", "n.b"), "127.0.1.1\tn.b n\n");
        assert_eq!(hosts("127.0.0.1 localhost\n", "new"), "127.0.0.1 localhost\n");
    }

    #[test]
    fn random_ids_are_ids() {
        let id = random_id().unwrap();
        assert_ne!(id, random_id().unwrap());
        assert!(check(&Renew { machine_id: id.clone(), ..Renew::default() }).is_ok());
        assert_eq!(id.as_bytes()[12], b'4');
    }
}
