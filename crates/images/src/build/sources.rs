//! Where the packages come from: the host's own sources of the release, as apt knows them.

use std::{collections::BTreeMap, env, fs, path::Path, process::Command};

use purlin_debian::{Error as HostError, Progress, apt::PrivateApt};

use crate::Error;

/// Debian's keys on a host of the family, and in the guest.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The host's sources for one release.
pub struct Sources {
    /// In the deb822 format (sources.list(5)).
    pub text: String,
    /// apt.conf(5) for the build.
    pub options: String,
    /// apt.conf(5) for the guest: what of the host's is true there, too.
    pub guest_options: String,
    /// When the newest of the package lists was made, in seconds since 1970.
    pub date: u64,
    uri: String,
}

/// An archive's package list, as the host's configuration and the archive name it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct List {
    origin: String,
    codename: String,
    component: String,
    uri: String,
}

impl Sources {
    /// Asks the host's apt, with `work` for its files. Where the host is of another release, its archive is asked for
    /// this one.
    pub fn find(work: &Path, suite: &str, progress: &dyn Progress) -> Result<Self, Error> {
        let dir = subdirectory(work, "apt")?;
        let apt = PrivateApt::new(&dir, "amd64", progress)?;
        let complaint = apt.update()?;
        let lists = lists(&apt)?;
        if let Some(text) = sources(&lists, suite) {
            return Self::new(&apt, &dir, text, &lists);
        }
        if lists.is_empty()
            && let Some(complaint) = complaint
        {
            return Err(apt.failure("the package lists", Some(complaint)).into());
        }
        Self::of_other_release(work, &lists, suite, progress)
    }

    fn of_other_release(work: &Path, lists: &[List], suite: &str, progress: &dyn Progress) -> Result<Self, Error> {
        let renamed: Vec<_> = lists.iter().filter_map(|list| renamed(list, suite)).collect();
        let text = sources(&renamed, suite).ok_or(Error::NoRelease)?;
        let dir = subdirectory(work, "apt-other")?;
        let apt = PrivateApt::new(&dir, "amd64", progress)?;
        let file = dir.join("other.sources");
        fs::write(&file, &text).map_err(HostError::file("write", &file))?;
        apt.use_only(&file)?;
        apt.update()?;
        // Only what the archive has.
        let there = self::lists(&apt)?;
        let text = sources(&there, suite).ok_or(Error::NoRelease)?;
        Self::new(&apt, &dir, text, &there)
    }

    fn new(apt: &PrivateApt, dir: &Path, text: String, lists: &[List]) -> Result<Self, Error> {
        const WANTED: [&str; 6] = [
            "Acquire::http::Proxy",
            "Acquire::https::Proxy",
            "Acquire::ftp::Proxy",
            // Where an archive's snapshot is used.
            "Acquire::Check-Valid-Until",
            "Acquire::Check-Date",
            "Acquire::http::No-Cache",
        ];
        let mut options = apt.options(&WANTED)?;
        options.push("Acquire::Languages \"none\";".into());
        let (guest_options, uri) = (guest_options(&options), first_uri(lists));
        Ok(Self { text, options: options.join("\n") + "\n", guest_options, date: newest_date(&dir.join("lists")), uri })
    }

    /// The archive, for people; without a user's name and password.
    pub fn mirror(&self) -> String {
        match self.uri.split_once("://") {
            Some((scheme, rest)) => format!("{scheme}://{}", rest.rsplit_once('@').map_or(rest, |(_, host)| host)),
            None => self.uri.clone(),
        }
    }
}

fn subdirectory(work: &Path, name: &str) -> Result<std::path::PathBuf, Error> {
    let dir = work.join(name);
    fs::create_dir_all(&dir).map_err(HostError::file("create", &dir))?;
    Ok(dir)
}

fn first_uri(lists: &[List]) -> String {
    lists.iter().find(|list| list.origin == "Debian").map(|list| list.uri.clone()).unwrap_or_default()
}

fn lists(apt: &PrivateApt) -> Result<Vec<List>, Error> {
    let found = apt.package_lists(["ORIGIN", "CODENAME", "COMPONENT", "REPO_URI"])?;
    let list = |[origin, codename, component, uri]: [String; 4]| List { origin, codename, component, uri };
    Ok(found.into_iter().map(list).collect())
}

/// Debian's lists of the release, with its updates and security fixes, as a file of sources. `None` if the release
/// itself is not among them.
fn sources(lists: &[List], suite: &str) -> Option<String> {
    const KINDS: [&str; 3] = ["", "-updates", "-security"];
    let of_release = |list: &&List| {
        list.origin == "Debian" && list.codename.strip_prefix(suite).is_some_and(|kind| KINDS.contains(&kind))
    };
    let mut archives = BTreeMap::<(&str, &str), Vec<&str>>::new();
    for list in lists.iter().filter(of_release) {
        // The code name stays true when the release becomes an old one.
        let components = archives.entry((&list.uri, &list.codename)).or_default();
        if !components.contains(&list.component.as_str()) {
            components.push(&list.component);
        }
    }
    if !archives.keys().any(|(_, codename)| *codename == suite) {
        return None;
    }
    let keys = if Path::new(KEYRING).exists() { format!("Signed-By: {KEYRING}\n") } else { String::new() };
    let entry = |((uri, codename), components): (&(&str, &str), &Vec<&str>)| {
        format!("Types: deb\nURIs: {uri}\nSuites: {codename}\nComponents: {}\n{keys}", components.join(" "))
    };
    Some(archives.iter().map(entry).collect::<Vec<_>>().join("\n"))
}

/// The same archive's list of another release: `trixie-security` → `bookworm-security`.
fn renamed(list: &List, suite: &str) -> Option<List> {
    let kind = list.codename.split_once('-').map_or(String::new(), |(_, kind)| format!("-{kind}"));
    (list.origin == "Debian").then(|| List { codename: format!("{suite}{kind}"), ..list.clone() })
}

/// Proxies on this host's loopback are not the guest's.
fn guest_options(options: &[String]) -> String {
    let of_environment = |name: &str| env::var(format!("{name}_proxy")).ok().filter(|value| !value.is_empty());
    let proxies = ["http", "https"].iter().filter_map(|name| {
        let configured = options.iter().any(|line| line.starts_with(&format!("Acquire::{name}::Proxy ")));
        (!configured).then(|| of_environment(name)).flatten().map(|url| format!("Acquire::{name}::Proxy \"{url}\";"))
    });
    let lines = options.iter().cloned().chain(proxies);
    // What finds proxies out is a program of this host; that there are no languages has a file of its own.
    let true_there = |line: &String| !is_loopback(line) && !line.contains("Auto-Detect") && !line.contains("Languages");
    lines.filter(true_there).fold(String::new(), |text, line| text + &line + "\n")
}

fn is_loopback(line: &str) -> bool {
    ["//localhost", "//127.", "//[::1]", "@localhost", "@127.", "@[::1]"].iter().any(|host| line.contains(host))
}

/// The date in the newest of the archives' release files; 0 if there is none.
fn newest_date(lists: &Path) -> u64 {
    let files = fs::read_dir(lists).into_iter().flatten().flatten().map(|entry| entry.path());
    let releases = files.filter(|path| path.to_string_lossy().ends_with("Release"));
    releases.filter_map(|path| date(&fs::read_to_string(path).ok()?)).max().unwrap_or(0)
}

/// `Date: Sat, 11 Jan 2025 09:30:00 UTC`.
fn date(release: &str) -> Option<u64> {
    let text = release.lines().find_map(|line| line.strip_prefix("Date:"))?.trim();
    let output = Command::new("date").args(["--utc", "+%s", "--date", text]).output().ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(origin: &str, codename: &str, component: &str) -> List {
        List {
            origin: origin.into(),
            codename: codename.into(),
            component: component.into(),
            uri: "http://mirror.test/debian/".into(),
        }
    }

    #[test]
    fn only_the_release_of_debian() {
        let lists = [
            list("Debian", "bookworm", "main"),
            list("Debian", "bookworm", "contrib"),
            list("Debian", "bookworm", "main"),
            list("Debian", "bookworm-security", "main"),
            list("Debian Backports", "bookworm-backports", "main"),
            list("Other", "bookworm", "main"),
            list("Debian", "trixie", "main"),
        ];
        let text = sources(&lists, "bookworm").unwrap();
        assert_eq!(text.matches("Types: deb\n").count(), 2);
        assert!(text.contains("Suites: bookworm\nComponents: main contrib\n"), "{text}");
        assert!(text.contains("Suites: bookworm-security\nComponents: main\n"), "{text}");
        assert_eq!(sources(&lists[3..], "bookworm"), None);
    }

    #[test]
    fn another_release_of_the_same_archive() {
        assert_eq!(
            renamed(&list("Debian", "trixie-security", "main"), "bookworm").unwrap().codename,
            "bookworm-security"
        );
        assert_eq!(renamed(&list("Debian", "trixie", "main"), "bookworm").unwrap().codename, "bookworm");
        assert_eq!(renamed(&list("Ubuntu", "noble", "main"), "bookworm"), None);
    }

    #[test]
    fn a_loopback_proxy_is_not_the_guests() {
        let options = [
            "Acquire::http::Proxy \"http://127.0.0.1:3142\";",
            "Acquire::https::Proxy \"http://proxy.test:3128\";",
            "Acquire::Check-Valid-Until \"false\";",
            "Acquire::Languages \"none\";",
        ]
        .map(String::from);
        assert_eq!(
            guest_options(&options),
            "Acquire::https::Proxy \"http://proxy.test:3128\";\nAcquire::Check-Valid-Until \"false\";\n"
        );
    }

    #[test]
    fn dates_of_releases() {
        // date(1) of the epoch's first day after a leap year's February.
        assert_eq!(date("Origin: Debian\nDate: Fri, 01 Mar 2024 00:00:00 UTC\n"), Some(1_709_251_200));
        assert_eq!(date("Origin: Debian\n"), None);
    }
}
