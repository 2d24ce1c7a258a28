//! sshd's own keys: those of the machine that this one is a copy of must not be used any more.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{Problems, note, run_program};

const DIRECTORY: &str = "/etc/ssh";

/// sshd under the names that distributions have for it, and what starts it when somebody connects.
const UNITS: [&str; 4] = ["ssh.socket", "sshd.socket", "ssh.service", "sshd.service"];

/// sshd without its old keys.
pub struct Keys {
    /// Kinds of the keys that there were.
    kinds: Vec<String>,
    /// What has been stopped.
    units: Vec<String>,
}

/// Stops sshd, and removes its keys.
pub fn take_down(problems: &mut Problems) -> Keys {
    // Sessions that there are go on (KillMode=process), or rather: their connections are the other machine's.
    let units = running();
    if !units.is_empty() {
        let units: Vec<&str> = units.iter().map(String::as_str).collect();
        note(problems, "stopping sshd", systemctl("stop", &units));
    }
    let kinds = match remove(Path::new(DIRECTORY)) {
        Ok(kinds) => kinds,
        Err(error) => {
            problems.push(format!("the old SSH keys: {error}"));
            Vec::new()
        }
    };
    Keys { kinds, units }
}

impl Keys {
    /// Makes new keys, and starts sshd if it was running.
    pub fn bring_up(self, problems: &mut Problems) {
        // None of a kind that nobody had: RSA's takes long.
        for kind in &self.kinds {
            let path = format!("{DIRECTORY}/ssh_host_{kind}_key");
            let arguments = ["-q", "-t", kind, "-N", "", "-C", "", "-f", &path];
            note(problems, "a new SSH key", run_program("ssh-keygen", &arguments, "").map(drop));
        }
        if !self.units.is_empty() {
            let units: Vec<&str> = self.units.iter().map(String::as_str).collect();
            note(problems, "starting sshd", systemctl("start", &[&["--no-block"], &units[..]].concat()));
        }
    }
}

/// The units that run, or are about to. Where there is no systemd there are none.
fn running() -> Vec<String> {
    let states = "--state=active,activating,reloading";
    let list = [&["list-units", "--plain", "--no-legend", "--full", states], &UNITS[..]].concat();
    let said = run_program("systemctl", &list, "").unwrap_or_default();
    said.lines().filter_map(|line| line.split_ascii_whitespace().next()).map(str::to_owned).collect()
}

fn systemctl(verb: &str, words: &[&str]) -> Result<(), String> {
    run_program("systemctl", &[&[verb], words].concat(), "").map(drop)
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
