//! sshd's own keys: those of the machine that this one is a copy of must not be used any more.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rustix::process::{Pid, Signal, kill_process};

use super::{Problems, note, run_program};

const DIRECTORY: &str = "/etc/ssh";

/// sshd under the names that distributions have for it, and what starts it when somebody connects.
const UNITS: [&str; 4] = ["ssh.socket", "sshd.socket", "ssh.service", "sshd.service"];

/// Where sshd says which process listens.
const PID_FILE: &str = "/run/sshd.pid";

/// Where these are, systemd starts sshd when somebody connects first, and before it makes keys of [these kinds](MADE_ON_DEMAND):
/// so it is in the image that Purlin builds.
const ON_DEMAND: [&str; 2] =
    ["/etc/systemd/system/sockets.target.wants/ssh.socket", "/etc/systemd/system/ssh.service.wants/ssh-keys.service"];

/// The kinds that ssh-keys.service makes.
const MADE_ON_DEMAND: [&str; 2] = ["ecdsa", "ed25519"];

/// sshd without its old keys.
pub struct Keys {
    /// Kinds of the keys that there were.
    kinds: Vec<String>,
    sshd: Sshd,
}

/// sshd while it accepts nobody.
enum Sshd {
    /// Its listening process does not run. To have systemd stop it takes longer than all else that the host waits for.
    Held(Pid),
    /// These units have been stopped.
    Stopped(Vec<String>),
    /// It is started when somebody connects. A listening process that somebody before has had started does not run.
    OnDemand(Option<Pid>),
}

/// Has sshd accept nobody, and removes its keys.
pub fn take_down(problems: &mut Problems) -> Keys {
    let held = listener(Path::new(PID_FILE)).filter(|listener| kill_process(*listener, Signal::STOP).is_ok());
    let sshd = match held {
        held if ON_DEMAND.iter().all(|file| fs::symlink_metadata(file).is_ok()) => Sshd::OnDemand(held),
        Some(listener) => Sshd::Held(listener),
        None => Sshd::Stopped(stop(problems)),
    };
    let mut kinds = match remove(Path::new(DIRECTORY)) {
        Ok(kinds) => kinds,
        Err(error) => {
            problems.push(format!("the old SSH keys: {error}"));
            Vec::new()
        }
    };
    if matches!(sshd, Sshd::OnDemand(_)) {
        kinds.retain(|kind| !MADE_ON_DEMAND.contains(&kind.as_str()));
    }
    Keys { kinds, sshd }
}

impl Keys {
    /// Makes new keys, but for those that are made on demand, and starts sshd if it was running.
    pub fn bring_up(self, problems: &mut Problems) {
        let units = match &self.sshd {
            Sshd::Stopped(units) => units.clone(),
            Sshd::Held(_) => stop(problems),
            Sshd::OnDemand(_) => Vec::new(),
        };
        // None of a kind that nobody had: RSA's takes long.
        for kind in &self.kinds {
            let path = format!("{DIRECTORY}/ssh_host_{kind}_key");
            let arguments = ["-q", "-t", kind, "-N", "", "-C", "", "-f", &path];
            note(problems, "a new SSH key", run_program("ssh-keygen", &arguments, "").map(drop));
        }
        match self.sshd {
            Sshd::OnDemand(None) => {}
            Sshd::OnDemand(Some(listener)) => {
                // It ends before it accepts anybody, and systemd listens again.
                let _ = kill_process(listener, Signal::TERM).and_then(|()| kill_process(listener, Signal::CONT));
            }
            // It is nobody's that could start it again: it starts anew by itself, with the new keys (sshd(8)).
            Sshd::Held(listener) if units.is_empty() => {
                let _ = kill_process(listener, Signal::HUP).and_then(|()| kill_process(listener, Signal::CONT));
            }
            _ if units.is_empty() => {}
            _ => note(problems, "starting sshd", systemctl(&["start", "--no-block"], &units)),
        }
    }
}

/// The process that `pid_file` names, if it is sshd's.
fn listener(pid_file: &Path) -> Option<Pid> {
    let number: u32 = fs::read_to_string(pid_file).ok()?.trim().parse().ok()?;
    let pid = Pid::from_raw(number.try_into().ok()?)?;
    let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).ok()?;
    (name.trim() == "sshd").then_some(pid)
}

/// Has systemd stop sshd. Sessions that there are go on (KillMode=process): but their connections are the other machine's.
fn stop(problems: &mut Problems) -> Vec<String> {
    let units = running();
    if !units.is_empty() {
        note(problems, "stopping sshd", systemctl(&["stop"], &units));
    }
    units
}

/// The units that run, or are about to. Where there is no systemd there are none.
fn running() -> Vec<String> {
    let states = "--state=active,activating,reloading";
    let list = [&["list-units", "--plain", "--no-legend", "--full", states], &UNITS[..]].concat();
    let said = run_program("systemctl", &list, "").unwrap_or_default();
    said.lines().filter_map(|line| line.split_ascii_whitespace().next()).map(str::to_owned).collect()
}

fn systemctl(verb: &[&str], units: &[String]) -> Result<(), String> {
    let units: Vec<&str> = units.iter().map(String::as_str).collect();
    run_program("systemctl", &[verb, &units[..]].concat(), "").map(drop)
}

/// Removes all keys of a directory; returns their kinds.
fn remove(directory: &Path) -> io::Result<Vec<String>> {
    let mut kinds = Vec::new();
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(kinds),
        entries => entries?,
    };
    let paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    for path in paths {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Some(rest) = name.strip_prefix("ssh_host_") else { continue };
        let private = rest.strip_suffix("_key");
        let is_public = rest.ends_with("_key.pub") || rest.ends_with("_key-cert.pub");
        if private.is_some() || is_public {
            kinds.extend(private.map(str::to_owned));
            fs::remove_file(&path)?;
        }
    }
    kinds.sort();
    Ok(kinds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_sshds_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        assert_eq!(listener(&file), None);
        // The tests' own process is no sshd; and 0 and -1 would be many.
        for text in [std::process::id().to_string(), "0".into(), "-1".into(), "x".into()] {
            fs::write(&file, text).unwrap();
            assert_eq!(listener(&file), None);
        }
    }

    #[test]
    fn keys_are_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "ssh_host_rsa_key",
            "ssh_host_rsa_key.pub",
            "ssh_host_ed25519_key",
            "ssh_host_ed25519_key-cert.pub",
            "sshd_config",
            "moduli",
        ] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(remove(dir.path()).unwrap(), ["ed25519", "rsa"]);
        let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["moduli", "sshd_config"]);
        assert!(remove(&dir.path().join("none")).unwrap().is_empty());
    }
}
