//! The host's apt with a private state: its sources and keys, our directories.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::fs::statvfs;

use crate::{Error, Progress};

/// apt working in a directory of its own, for one architecture.
pub struct PrivateApt<'a> {
    dir: PathBuf,
    progress: &'a dyn Progress,
}

impl<'a> PrivateApt<'a> {
    /// Prepares `dir`, which exists and is empty, for packages of `architecture` (`amd64`, `i386`), which need not be
    /// the host's own.
    pub fn new(dir: &Path, architecture: &str, progress: &'a dyn Progress) -> Result<Self, Error> {
        for sub in ["lists/partial", "archives/partial"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path).map_err(Error::file("create", &path))?;
        }
        for (name, text) in [("status", String::new()), ("apt.conf", configuration(dir, architecture))] {
            let path = dir.join(name);
            fs::write(&path, text).map_err(Error::file("write", &path))?;
        }
        Ok(Self { dir: dir.to_owned(), progress })
    }

    /// Fetches the package lists. A source that cannot be had is no error yet: it may not be needed.
    /// Returns apt's first complaint, to explain a package that is then missing.
    pub fn update(&self) -> Result<Option<String>, Error> {
        self.progress.step("fetching package lists");
        let ended = self.run("apt-get", &["update"])?;
        if ended.complaint.as_deref().is_some_and(is_disk_full) {
            return Err(Error::DiskFull(self.dir.clone()));
        }
        Ok(ended.complaint)
    }

    /// Works with the sources in the file `sources` (deb822) only, instead of the host's.
    pub fn use_only(&self, sources: &Path) -> Result<(), Error> {
        let path = self.dir.join("apt.conf");
        let only = format!("Dir::Etc::sourcelist \"{}\";\nDir::Etc::sourceparts \"-\";\n", sources.display());
        let added = File::options().append(true).open(&path).and_then(|mut file| file.write_all(only.as_bytes()));
        added.map_err(Error::file("write", &path))
    }

    /// The package lists that there are, each as the values of `fields` (apt-get(8), `indextargets`; `CODENAME`,
    /// `REPO_URI`, …). What only the archive knows is there after [`PrivateApt::update`].
    pub fn package_lists<const N: usize>(&self, fields: [&str; N]) -> Result<Vec<[String; N]>, Error> {
        // No field contains a tab.
        let format = fields.map(|field| format!("$({field})")).join("\t");
        let mut command = self.command("apt-get");
        let output = command.args(["indextargets", "--format", &format, "Created-By: Packages"]).output();
        let output = output.map_err(not_installed("apt-get"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let values = |line: &str| line.split('\t').map(str::to_owned).collect::<Vec<_>>().try_into().ok();
        Ok(text.lines().filter_map(values).collect())
    }

    /// The values in effect of the options whose names begin with one of `prefixes`, as lines of apt.conf(5).
    pub fn options(&self, prefixes: &[&str]) -> Result<Vec<String>, Error> {
        let output = self.command("apt-config").arg("dump").output().map_err(not_installed("apt-config"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let wanted = |line: &&str| prefixes.iter().any(|prefix| line.starts_with(prefix));
        Ok(text.lines().filter(wanted).map(str::to_owned).collect())
    }

    /// The fields of the newest version of `package` that the host's sources and preferences select, as in
    /// `apt-cache show`; `None` if there is no such package.
    pub fn show(&self, package: &str) -> Result<Option<Control>, Error> {
        let output = self.command("apt-cache").args(["show", "--no-all-versions", package]).output();
        let output: Output = output.map_err(not_installed("apt-cache"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok((output.status.success() && !text.trim().is_empty()).then_some(Control(text)))
    }

    /// Downloads packages and returns their files. apt has checked them against the signed lists.
    pub fn download(&self, packages: &[&str]) -> Result<Vec<PathBuf>, Error> {
        self.progress.step(&format!("fetching {}", packages.join(", ")));
        let ended = self.run("apt-get", &[&["download"], packages].concat())?;
        if !ended.success {
            return Err(self.failure(&packages.join(", "), ended.complaint));
        }
        packages.iter().map(|package| self.file_of(package)).collect()
    }

    /// Downloads packages with all that they depend on, and returns the files in the order of their names.
    pub fn download_with_dependencies(&self, packages: &[&str]) -> Result<Vec<PathBuf>, Error> {
        let what = packages.join(", ");
        self.progress.step(&format!("fetching {what} and what they need"));
        let install = ["--yes", "--no-install-recommends", "--download-only", "install"];
        let ended = self.run("apt-get", &[&install, packages].concat())?;
        if !ended.success {
            return Err(self.failure(&what, ended.complaint));
        }
        let archives = self.dir.join("archives");
        let found = fs::read_dir(&archives).map_err(Error::file("read", &archives))?.flatten();
        let mut files: Vec<_> = found.map(|entry| entry.path()).collect();
        files.retain(|path| path.extension().is_some_and(|extension| extension == "deb"));
        files.sort();
        Ok(files)
    }

    /// The error for `what` that apt's complaint amounts to.
    pub fn failure(&self, what: &str, complaint: Option<String>) -> Error {
        let reason = complaint.unwrap_or_else(|| "apt-get failed without a reason".into());
        if is_disk_full(&reason) {
            return Error::DiskFull(self.dir.clone());
        }
        const NETWORK: [&str; 6] =
            ["resolv", "onnect", "Network is unreachable", "timed out", "Failed to fetch", "ailed to get"];
        let advice = if NETWORK.iter().any(|sign| reason.contains(sign)) {
            NETWORK_ADVICE
        } else {
            "see whether 'apt-get update' works on this host, then try again"
        };
        Error::Apt { what: what.into(), reason, advice }
    }

    /// `apt-get download` names files `package_version_arch.deb`, in the working directory.
    fn file_of(&self, package: &str) -> Result<PathBuf, Error> {
        let prefix = format!("{package}_");
        let entries = fs::read_dir(&self.dir).map_err(Error::file("read", &self.dir))?;
        entries
            .filter_map(|entry| entry.ok().map(|e| e.path()))
            .find(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&prefix)))
            .ok_or_else(|| Error::NoPackage(package.into()))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(self.dir.join("apt.conf")).current_dir(&self.dir);
        // Its messages are read by `complaint`.
        command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs apt, passing on its progress.
    fn run(&self, program: &'static str, args: &[&str]) -> Result<Ended, Error> {
        let mut child = self.command(program).args(args).spawn().map_err(not_installed(program))?;
        let stderr = child.stderr.take().map(|pipe| thread::spawn(move || read_all(pipe)));
        let followed = self.follow(&mut child);
        if followed.is_err() {
            // It may have ended by itself; either way it is reaped next.
            let _ = child.kill();
        }
        let status = child.wait().map_err(Error::file("run", Path::new(program)))?;
        let messages = stderr.and_then(|reader| reader.join().ok()).unwrap_or_default();
        followed?;
        Ok(Ended { success: status.success(), complaint: complaint(&messages) })
    }

    /// Reads the status lines until apt closes its output, or until it must not go on. apt sends a line at least
    /// twice a second, even where the network is silent; on a full disk it would do so for ever.
    fn follow(&self, child: &mut Child) -> Result<(), Error> {
        let Some(stdout) = child.stdout.take() else { return Ok(()) };
        let (mut progress, mut since) = (String::new(), Instant::now());
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if self.progress.cancelled() {
                return Err(Error::Cancelled);
            }
            if is_full(&self.dir) {
                return Err(Error::DiskFull(self.dir.clone()));
            }
            if let Some(percent) = download_percent(&line) {
                self.progress.fraction(percent / 100.0);
            }
            if line != progress {
                (progress, since) = (line, Instant::now());
            } else if since.elapsed() > PATIENCE {
                let reason = format!("nothing has come for {} seconds", PATIENCE.as_secs());
                return Err(Error::Apt { what: "packages".into(), reason, advice: NETWORK_ADVICE });
            }
        }
        if self.progress.cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }
}

/// Longer than apt's own timeouts and retries together.
const PATIENCE: Duration = Duration::from_secs(120);

const NETWORK_ADVICE: &str = "check the network (and http_proxy, if you need one), then try again";

/// Whether the file system that holds `dir` has no room left. (One that does not count says 0 blocks in all.)
fn is_full(dir: &Path) -> bool {
    const LEAST: u64 = 64 << 10;
    statvfs(dir).is_ok_and(|fs| fs.f_blocks > 0 && fs.f_bavail.saturating_mul(fs.f_frsize) < LEAST)
}

/// How a run of apt ended.
struct Ended {
    success: bool,
    complaint: Option<String>,
}

/// The fields of a package, as in its control file.
pub struct Control(String);

impl Control {
    /// The value of a field, for example `Version`.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
    }

    /// The names in `Depends`, without versions; of alternatives the first.
    pub fn depends(&self) -> impl Iterator<Item = &str> {
        let list = self.field("Depends").unwrap_or_default();
        list.split(',').filter_map(|one| one.split_whitespace().next())
    }
}

/// What is put over the host's own configuration. Hooks of the host's (`Post-Invoke`: some images delete archives
/// there) are not run; `#clear` empties a list (apt.conf(5)).
fn configuration(dir: &Path, architecture: &str) -> String {
    let dir = dir.display();
    format!(
        r#"#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Architectures;
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Status-Fd "1";
// As root apt would change to a user who cannot reach a directory in root's home.
APT::Sandbox::User "root";
Dir::State "{dir}";
Dir::State::status "{dir}/status";
Dir::State::lists "{dir}/lists";
Dir::Cache "{dir}";
Dir::Cache::archives "{dir}/archives";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons-small::DefaultEnabled "false";
Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled "false";
Acquire::Retries "2";
Acquire::http::Timeout "15";
Acquire::https::Timeout "15";
"#
    )
}

/// The percentage in a status line: `dlstatus:1:90.1364:Retrieving file 7 of 9`.
fn download_percent(line: &str) -> Option<f64> {
    let mut fields = line.strip_prefix("dlstatus:")?.split(':');
    fields.nth(1)?.parse().ok()
}

/// The first error of apt's, or else its first warning that is about fetching.
fn complaint(messages: &str) -> Option<String> {
    let line = |tag: &'static str| messages.lines().filter_map(move |l| l.strip_prefix(tag)).map(str::trim);
    // `E: Some index files failed to download …` only sums up the warnings or errors before it.
    let specific = |text: &&str| !text.starts_with("Some index files") && !text.starts_with("Unable to fetch some");
    let fetching = |text: &&str| text.contains("Failed to fetch") || text.contains("GPG error");
    let text = line("E: ").find(specific).or_else(|| line("W: ").find(fetching)).or_else(|| line("E: ").next())?;
    Some(text.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn is_disk_full(complaint: &str) -> bool {
    ["No space left on device", "enough free space", "Disk quota exceeded"].iter().any(|sign| complaint.contains(sign))
}

fn read_all(mut pipe: impl Read) -> String {
    let mut bytes = Vec::new();
    // What could be read is better than nothing.
    let _ = pipe.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

fn not_installed(program: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| match source.kind() {
        io::ErrorKind::NotFound => Error::NotDebian(program),
        _ => Error::File { what: "run", path: program.into(), source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages() {
        assert_eq!(download_percent("dlstatus:7:90.1364:Retrieving file 7 of 9"), Some(90.1364));
        assert_eq!(download_percent("pmstatus:dpkg:50:Running dpkg"), None);
        assert_eq!(download_percent("Get:1 http://mirror.test/debian bookworm InRelease"), None);
    }

    #[test]
    fn control_fields() {
        let control = Control(
            "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\nPre-Depends: dpkg\n\
             Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), kmod | module-init\n"
                .into(),
        );
        assert_eq!(control.field("Version"), Some("6.1.192-2"));
        assert_eq!(control.field("Homepage"), None);
        assert_eq!(control.depends().collect::<Vec<_>>(), ["linux-image-6.1.0-56-cloud-amd64", "kmod"]);
    }

    #[test]
    fn the_cause_is_told_not_the_summary() {
        let no_network = "W: Failed to fetch http://mirror.test/debian/dists/bookworm/InRelease  Temporary failure \
                          resolving 'mirror.test'\nW: Some index files failed to download.\n";
        assert!(complaint(no_network).is_some_and(|c| c.ends_with("Temporary failure resolving 'mirror.test'")));
        let full = "E: Some index files failed to download.\nE: You don't have enough free space in /x/archives/.\n";
        assert_eq!(complaint(full).as_deref(), Some("You don't have enough free space in /x/archives/."));
        assert_eq!(complaint("N: a notice\nW: Target Packages is configured multiple times\n"), None);
    }
}
