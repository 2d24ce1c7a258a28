//! What cloud-init is to know at a guest's first boot: a NoCloud seed, a FAT file system with the label `CIDATA`
//! (cloud-init's documentation, "NoCloud"). Where the image has no agent the seed brings it.

use std::{
    fs,
    io::{self, Cursor, Write},
    path::Path,
};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use serde::de::IgnoredAny;

use crate::{Error, build::agent};

/// The most bytes of user-data.
const MAX_USER_DATA: u64 = 1 << 20;

/// The seed of one machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seed {
    /// What tells this machine from all others: cloud-init does its first-boot work once for each.
    pub instance_id: String,
    /// The guest's host name; [`check_host_name`] says whether it can be one.
    pub host_name: String,
    /// Public keys that may log in, as lines of authorized_keys(5).
    pub ssh_keys: Vec<String>,
    /// The user's own user-data ([`read_user_data`]).
    pub user_data: Option<Vec<u8>>,
    /// Whether cloud-init is to install the guest's agent. Images that Purlin builds have it.
    pub agent: bool,
}

/// Root may log in with the keys, as on the console; images of others do not allow that by themselves.
const DEFAULT_USER_DATA: &str = "#cloud-config\ndisable_root: false\n";

/// The agent's file on the disk.
const AGENT: &str = "purlin-agent";

/// cloud-init's vendor-data: a script that installs the agent, in what cloud-init does last. (Not cloud-config: a user's
/// `runcmd` would take the place of the vendor's.) It does nothing where there is no systemd.
fn install_agent() -> String {
    let (path, unit, name) = (purlin_agent::PROGRAM_PATH, purlin_agent::UNIT, purlin_agent::UNIT_NAME);
    format!(
        r#"#!/bin/sh
# Installs Purlin's agent, which is on the disk that this is from.
set -eu
command -v systemctl >/dev/null || exit 0
disk=$(mktemp -d)
mount -o ro LABEL=CIDATA "$disk"
trap 'umount "$disk"; rmdir "$disk"' EXIT
if ! cmp -s "$disk/{AGENT}" {path}; then
    install -D -m 0755 "$disk/{AGENT}" {path}
fi
# SELinux would not have it run otherwise.
chcon -t bin_t {path} 2>/dev/null || true
cat >/etc/systemd/system/{name} <<'UNIT'
{unit}UNIT
systemctl daemon-reload
systemctl enable {name}
systemctl restart {name}
"#
    )
}

/// DHCP on whatever cards there are.
const NETWORK_CONFIG: &str = "\
version: 2
ethernets:
  all:
    match: {name: \"e*\"}
    dhcp4: true
";

impl Seed {
    /// The disk's content.
    pub fn to_disk(&self) -> io::Result<Vec<u8>> {
        let meta_data = self.meta_data()?;
        let user_data = self.user_data.as_deref().unwrap_or(DEFAULT_USER_DATA.as_bytes());
        let vendor_data = install_agent();
        let mut files = vec![
            ("meta-data", meta_data.as_bytes()),
            ("user-data", user_data),
            ("network-config", NETWORK_CONFIG.as_bytes()),
        ];
        if self.agent {
            files.extend([("vendor-data", vendor_data.as_bytes()), (AGENT, agent::PROGRAM)]);
        }
        // FAT's tables and directory take less than 64 KiB of so small a disk.
        let content: usize = files.iter().map(|(_, content)| content.len()).sum();
        let size = (content + (128 << 10)).next_multiple_of(64 << 10);
        let mut disk = Cursor::new(vec![0; size]);
        let options = FormatVolumeOptions::new().volume_label(*b"CIDATA     ");
        fatfs::format_volume(&mut disk, options)?;
        let volume = FileSystem::new(&mut disk, FsOptions::new())?;
        for (name, content) in files {
            volume.root_dir().create_file(name)?.write_all(content)?;
        }
        volume.unmount()?;
        Ok(disk.into_inner())
    }

    /// JSON is YAML, and its strings need no second thought.
    fn meta_data(&self) -> io::Result<String> {
        let keys: Vec<&str> = self.ssh_keys.iter().map(String::as_str).collect();
        let fields = serde_json::json!({
            "instance-id": self.instance_id, "local-hostname": self.host_name, "public-keys": keys,
        });
        Ok(serde_json::to_string_pretty(&fields)? + "\n")
    }
}

/// Reads a user-data file and sees whether cloud-init will know what it is.
pub fn read_user_data(path: &Path) -> Result<Vec<u8>, Error> {
    let cannot_open = |source| Error::Open { path: path.to_owned(), source };
    let size = fs::metadata(path).map_err(cannot_open)?.len();
    if size > MAX_USER_DATA {
        return Err(wrong_user_data(path, too_large()));
    }
    let data = fs::read(path).map_err(cannot_open)?;
    what_is_wrong(&data).map_err(|reason| wrong_user_data(path, reason))?;
    Ok(data)
}

/// Sees whether cloud-init will know what it is.
pub fn check_user_data(data: &[u8]) -> Result<(), Error> {
    let small = if data.len() as u64 > MAX_USER_DATA { Err(too_large()) } else { Ok(()) };
    small.and_then(|()| what_is_wrong(data)).map_err(|reason| wrong_user_data(Path::new("user-data"), reason))
}

fn wrong_user_data(path: &Path, reason: String) -> Error {
    Error::UserData { path: path.to_owned(), reason }
}

fn too_large() -> String {
    format!("it is larger than {} KiB", MAX_USER_DATA >> 10)
}

/// cloud-init goes by the first line ("User data formats").
fn what_is_wrong(data: &[u8]) -> Result<(), String> {
    const KINDS: [&str; 7] = [
        "#!",
        "#include",
        "#cloud-boothook",
        "#part-handler",
        "#cloud-config-archive",
        "## template:",
        "Content-Type:",
    ];
    let text = match std::str::from_utf8(data) {
        Ok(text) => text,
        // gzip, which cloud-init unpacks.
        Err(_) if data.starts_with(&[0x1f, 0x8b]) => return Ok(()),
        Err(_) => return Err("it is not UTF-8 text".into()),
    };
    if text.trim().is_empty() {
        return Err("it is empty".into());
    }
    let first = text.lines().next().unwrap_or_default().trim_end();
    if first == "#cloud-config" {
        return check_cloud_config(text);
    }
    if KINDS.iter().any(|kind| first.starts_with(kind)) {
        return Ok(());
    }
    Err("its first line is neither '#cloud-config' nor that of a script ('#!/bin/sh')".into())
}

fn check_cloud_config(text: &str) -> Result<(), String> {
    if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
        return Ok(());
    }
    let parsed = serde_saphyr::from_str::<std::collections::BTreeMap<String, IgnoredAny>>(text);
    parsed.map(drop).map_err(|error| match error.location() {
        Some(at) => format!("line {} is no YAML mapping as cloud-config wants it: {}", at.line(), first_line(&error)),
        None => format!("it is no YAML mapping as cloud-config wants it: {}", first_line(&error)),
    })
}

fn first_line(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
}

/// Whether a machine can be called so (RFC 1123, 2.1).
pub fn check_host_name(name: &str) -> Result<(), Error> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    let edge = |byte: Option<u8>| byte.is_some_and(|b| b.is_ascii_alphanumeric());
    let fits = name.len() <= 63 && name.bytes().all(good) && edge(name.bytes().next()) && edge(name.bytes().last());
    if fits { Ok(()) } else { Err(Error::HostName(name.escape_debug().to_string())) }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, io::Read, os::unix::fs::PermissionsExt, process::Command};

    use super::*;

    fn seed() -> Seed {
        Seed {
            instance_id: "i-1".into(),
            host_name: "web".into(),
            ssh_keys: vec!["ssh-ed25519 AAAA a \"b\": c".into()],
            user_data: None,
            agent: false,
        }
    }

    fn file(disk: Vec<u8>, name: &str) -> String {
        String::from_utf8(bytes(disk, name).unwrap()).unwrap()
    }

    fn bytes(disk: Vec<u8>, name: &str) -> Option<Vec<u8>> {
        let volume = FileSystem::new(Cursor::new(disk), FsOptions::new()).unwrap();
        let mut bytes = Vec::new();
        volume.root_dir().open_file(name).ok()?.read_to_end(&mut bytes).unwrap();
        Some(bytes)
    }

    #[test]
    fn a_disk_as_cloud_init_looks_for_it() {
        let disk = seed().to_disk().unwrap();
        // The label in the boot sector is at 43 in FAT12 and FAT16, the type behind it.
        assert_eq!(&disk[43..54], b"CIDATA     ");
        assert_eq!(&disk[54..57], b"FAT");
        assert_eq!(&disk[510..512], [0x55, 0xaa]);
        assert_eq!(disk.len() % 512, 0);
        assert_eq!(file(disk.clone(), "user-data"), DEFAULT_USER_DATA);
        let meta: BTreeMap<String, serde_json::Value> = serde_json::from_str(&file(disk, "meta-data")).unwrap();
        assert_eq!(meta["local-hostname"], "web");
        assert_eq!(meta["public-keys"][0], "ssh-ed25519 AAAA a \"b\": c");
    }

    #[test]
    fn large_user_data_fits() {
        let text = format!("#cloud-config\n# {}\n", "x".repeat(MAX_USER_DATA as usize - 20));
        let disk = Seed { user_data: Some(text.clone().into_bytes()), ..seed() }.to_disk().unwrap();
        assert_eq!(file(disk, "user-data"), text);
    }

    #[test]
    fn the_agent_is_brought_where_it_is_not_and_user_data_stays() {
        let without = seed().to_disk().unwrap();
        assert_eq!((bytes(without.clone(), "vendor-data"), bytes(without, AGENT)), (None, None));
        let text = "#cloud-config\nruncmd: [[true]]\n";
        let disk = Seed { agent: true, user_data: Some(text.into()), ..seed() }.to_disk().unwrap();
        assert_eq!(file(disk.clone(), "user-data"), text);
        assert!(bytes(disk.clone(), AGENT).unwrap() == agent::PROGRAM);
        let script = file(disk, "vendor-data");
        assert!(script.starts_with("#!/bin/sh\n") && script.contains(purlin_agent::UNIT));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vendor-data");
        fs::write(&path, script).unwrap();
        assert!(Command::new("sh").arg("-n").arg(path).status().unwrap().success());
    }

    #[test]
    fn the_agent_is_a_static_program_that_runs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        fs::write(&path, agent::PROGRAM).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let output = Command::new(&path).arg("--version").output().unwrap();
        assert!(output.stdout.starts_with(b"purlin-agent "), "{output:?}");
        // A program that is not would name its loader (PT_INTERP).
        assert!(!agent::PROGRAM.windows(8).any(|bytes| bytes == b"/ld-linu"));
    }

    #[test]
    fn user_data_that_cloud_init_knows() {
        for good in [
            "#cloud-config\nruncmd:\n - echo\n",
            "#cloud-config\n",
            "#!/bin/sh\necho\n",
            "## template: jinja\n#cloud-config\n{{ x }}\n",
        ] {
            assert_eq!(what_is_wrong(good.as_bytes()), Ok(()), "{good}");
        }
        for bad in [
            "",
            "packages: [vim]\n",
            "#cloud-config\n- a\n- b\n",
            "#cloud-config\nfoo\n",
            "#cloud-config\npackages: [vim\nruncmd: x: y\n",
        ] {
            let reason = what_is_wrong(bad.as_bytes()).expect_err(bad);
            assert!(!reason.contains('\n'), "{reason}");
        }
        assert!(what_is_wrong(b"#cloud-config\n\xff").is_err());
        assert!(what_is_wrong(b"#cloud-config\na: 1\nb: [\n").unwrap_err().contains("line"));
    }

    #[test]
    fn user_data_that_is_not_there_or_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nosuch.yaml");
        let text = read_user_data(&path).unwrap_err().to_string();
        assert!(text.starts_with(&format!("cannot open '{}': No such file", path.display())), "{text}");
        fs::write(&path, "\n").unwrap();
        let text = read_user_data(&path).unwrap_err().to_string();
        assert!(text.ends_with("nosuch.yaml is no user-data for cloud-init: it is empty"), "{text}");
    }

    #[test]
    fn host_names() {
        for good in ["a", "web-1", "A1"] {
            assert!(check_host_name(good).is_ok());
        }
        for bad in ["", "-a", "a-", "a.b", "a_b", "a b", &"a".repeat(64)] {
            assert!(check_host_name(bad).is_err(), "{bad}");
        }
    }
}
