//! A daemon on another host: which one, what lets one in, and how it is known.

use std::{
    env,
    fs::{self, File},
    io::{self, BufRead, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use anyhow::{Context, Result, anyhow, bail};
use purlin_api::{Fingerprint, client::Remote};
use purlin_debian::home;
use tokio::runtime::Runtime;

use crate::terminal;

/// The URL of the daemon that is asked, where that is not the user's own here.
static HOST: OnceLock<Option<String>> = OnceLock::new();

/// What `--help` says of `--host`.
pub const HELP: &str = "\
Ask the daemon of another host about machines that are kept and images, and not the one here; that runs as 'purlin daemon --listen
ADDRESS:PORT' there. The environment may say it, too: PURLIN_HOST.

What lets you in is a token, which 'purlin token create' prints there: PURLIN_TOKEN, or the file PURLIN_TOKEN_FILE, has it.
The daemon's certificate is known by its fingerprint, PURLIN_FINGERPRINT; without it you are asked once, on a terminal.

Paths of disks, published ports and images are the other host's then; files that are pushed and pulled, and ports that are
forwarded, are this one's.";

/// From now on verbs ask the daemon at `host`, or at `$PURLIN_HOST`, if there is one.
pub fn choose(host: Option<String>) {
    let _ = HOST.set(host.or_else(|| set("PURLIN_HOST")));
}

/// The URL of another host's daemon, if that is who verbs ask.
pub fn chosen() -> Option<&'static str> {
    HOST.get().and_then(Option::as_deref)
}

/// Reads a URL of a daemon.
pub fn parse(url: &str) -> Result<String, String> {
    Remote::new(url, "", None).map(|_| url.to_owned()).map_err(|e| e.to_string())
}

/// The daemon at `url`, once it is known what certificate it is to have.
pub fn find(url: &str, runtime: &Runtime) -> Result<Remote> {
    let token = token(url)?;
    let fingerprint = match set("PURLIN_FINGERPRINT") {
        Some(text) => text.parse().map_err(|e| anyhow!("PURLIN_FINGERPRINT is no fingerprint: {e}"))?,
        None => Known::of_user()?.fingerprint(url, runtime)?,
    };
    Ok(Remote::new(url, &token, Some(fingerprint))?)
}

/// What says which certificate is the right one: a variable of the environment, or a file.
pub fn who_says_which() -> String {
    let known = Known::of_user().map_or_else(|_| String::new(), |known| known.path.display().to_string());
    set("PURLIN_FINGERPRINT").map_or(known, |_| "PURLIN_FINGERPRINT".into())
}

/// What lets one in at `url`.
fn token(url: &str) -> Result<String> {
    if let Some(token) = set("PURLIN_TOKEN") {
        return Ok(token);
    }
    let Some(path) = env::var_os("PURLIN_TOKEN_FILE").filter(|path| !path.is_empty()).map(PathBuf::from) else {
        let host = url.split("://").nth(1).unwrap_or(url);
        let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
        bail!(
            "it takes a token: run 'purlin token create NAME' on {host}, and set PURLIN_TOKEN here to what it prints"
        );
    };
    let text = fs::read_to_string(&path).map_err(|e| anyhow!("cannot read {}: {e}", path.display()))?;
    Ok(text.trim().to_owned())
}

fn set(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// The file of daemons whose certificates the user has said to know: a line for each, of URL and fingerprint.
struct Known {
    path: PathBuf,
}

impl Known {
    fn of_user() -> Result<Self> {
        Ok(Self { path: home::data()?.join("known-daemons") })
    }

    /// Of the one at `url`; where nobody knows it, the user is asked.
    fn fingerprint(&self, url: &str, runtime: &Runtime) -> Result<Fingerprint> {
        let shown = Remote::new(url, "", None)?;
        // However the user has written it.
        let url = shown.url();
        if let Some(known) = self.get(&url)? {
            return Ok(known);
        }
        let seen = runtime.block_on(shown.look())?;
        ask(&url, seen)?;
        self.add(&url, seen).with_context(|| format!("cannot write {}", self.path.display()))?;
        Ok(seen)
    }

    fn get(&self, url: &str) -> Result<Option<Fingerprint>> {
        let text = read(&self.path).map_err(|e| anyhow!("cannot read {}: {e}", self.path.display()))?;
        let line = text.lines().find_map(|line| line.split_once(' ').filter(|(known, _)| *known == url));
        let wrong = |e| anyhow!("the line of {url} in {} has no fingerprint: {e}", self.path.display());
        line.map(|(_, fingerprint)| fingerprint.trim().parse().map_err(wrong)).transpose()
    }

    fn add(&self, url: &str, fingerprint: Fingerprint) -> io::Result<()> {
        self.path.parent().map_or(Ok(()), fs::create_dir_all)?;
        let mut file = File::options().create(true).append(true).mode(0o600).open(&self.path)?;
        file.write_all(format!("{url} {fingerprint}\n").as_bytes())
    }
}

fn read(path: &Path) -> io::Result<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read,
    }
}

/// Whether the user knows this certificate. Until then nothing is said to whoever has it.
fn ask(url: &str, seen: Fingerprint) -> Result<()> {
    if !terminal::is_interactive() {
        bail!(
            "nobody knows the certificate of {url}: if 'purlin daemon status' there says {seen}, set PURLIN_FINGERPRINT to that"
        );
    }
    terminal::say(&format!("the certificate of {url} is {seen}"));
    terminal::say("'purlin daemon status' says there whether that is so; write 'yes' if it is:");
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line).context("cannot hear from the terminal")?;
    if line.trim() != "yes" {
        bail!("the certificate of {url} is not known: nothing was said to it");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn daemons_are_known_by_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let known = Known { path: dir.path().join("data/known-daemons") };
        assert_eq!(known.get("https://a:1").unwrap(), None);
        let (one, two) = (Fingerprint::of(b"1"), Fingerprint::of(b"2"));
        known.add("https://a:1", one).unwrap();
        known.add("https://a:12", two).unwrap();
        assert_eq!(known.get("https://a:1").unwrap(), Some(one));
        assert_eq!(known.get("https://a:12").unwrap(), Some(two));
        fs::write(&known.path, "https://a:1 sha256:0\n").unwrap();
        assert!(known.get("https://a:1").is_err());
    }
}
