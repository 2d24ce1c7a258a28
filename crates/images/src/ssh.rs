//! The key that a user logs in with.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use purlin_debian::{Error as HostError, home};

use crate::Error;

/// Keys that guests let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    /// Lines as in authorized_keys(5).
    pub public: Vec<String>,
    /// The private key to name to ssh with -i, where ssh does not find one by itself.
    pub identity: Option<PathBuf>,
}

/// The user's own public keys (`~/.ssh/id_*.pub`), or else those of a pair that is made at the first use.
pub fn keys_of_user() -> Result<Keys, Error> {
    let own = std::env::var_os("HOME").map(|home| own_keys(&Path::new(&home).join(".ssh"))).unwrap_or_default();
    if own.is_empty() { keys_in(&home::data()?.join("ssh")) } else { Ok(Keys { public: own, identity: None }) }
}

fn own_keys(dir: &Path) -> Vec<String> {
    let files = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_public = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // A public key whose private one is not here lets nobody in.
        name.starts_with("id_") && name.ends_with(".pub") && path.with_extension("").exists()
    };
    let mut files: Vec<_> = files.filter(is_public).collect();
    files.sort();
    files.iter().filter_map(|path| public_key(path)).collect()
}

/// The one line of a public key's file.
fn public_key(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().next()?.trim();
    (line.split_whitespace().count() >= 2 && !line.starts_with('-')).then(|| line.to_owned())
}

fn keys_in(dir: &Path) -> Result<Keys, Error> {
    let (private, public) = (dir.join("id_ed25519"), dir.join("id_ed25519.pub"));
    if public_key(&public).is_none() || !private.exists() {
        make_pair(dir, &private, &public)?;
    }
    let line = public_key(&public).ok_or_else(|| Error::SshKey {
        reason: format!("{} holds no public key", public.display()),
        advice: "remove it, then try again",
    })?;
    Ok(Keys { public: vec![line], identity: Some(private) })
}

/// Makes a pair elsewhere first: another purlin may do the same, and the first pair counts.
fn make_pair(dir: &Path, private: &Path, public: &Path) -> Result<(), Error> {
    fs::create_dir_all(dir).map_err(HostError::file("create", dir))?;
    let temporary = tempfile::tempdir_in(dir).map_err(HostError::file("create a directory in", dir))?;
    let new = temporary.path().join("id_ed25519");
    let mut command = Command::new("ssh-keygen");
    command.args(["-q", "-t", "ed25519", "-N", "", "-C", "purlin", "-f"]).arg(&new);
    let output = command.stdin(Stdio::null()).output().map_err(|error| Error::SshKey {
        reason: format!("ssh-keygen cannot be started: {error}"),
        advice: "install it as root with 'apt-get install openssh-client', or put a key of yours into ~/.ssh",
    })?;
    if !output.status.success() {
        let reason = format!("ssh-keygen failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        return Err(Error::SshKey { reason, advice: "see whether ssh-keygen works here" });
    }
    for (from, to) in [(new.clone(), private), (new.with_extension("pub"), public)] {
        match fs::hard_link(&from, to) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(HostError::file("create", to)(error).into());
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let first = keys_in(dir.path()).unwrap();
        assert!(first.public[0].starts_with("ssh-ed25519 "));
        assert_eq!(keys_in(dir.path()).unwrap(), first);
        // ssh-keygen itself says which public key belongs to the private one.
        let output = Command::new("ssh-keygen").arg("-y").arg("-f").arg(first.identity.unwrap()).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert_eq!(said.split_whitespace().nth(1), first.public[0].split_whitespace().nth(1));
    }

    #[test]
    fn the_users_own_are_found() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("id_rsa", "-----BEGIN"),
            ("id_rsa.pub", "ssh-rsa AAAA me@here\n"),
            ("id_lost.pub", "ssh-rsa BBBB me@there\n"),
            ("id_bad", ""),
            ("id_bad.pub", "-----BEGIN PRIVATE KEY-----\n"),
            ("known_hosts", "x y\n"),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        assert_eq!(own_keys(dir.path()), ["ssh-rsa AAAA me@here"]);
        assert!(own_keys(&dir.path().join("none")).is_empty());
    }
}
