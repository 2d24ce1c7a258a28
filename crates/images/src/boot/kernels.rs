//! A kernel without a boot loader's configuration: the distribution's symbolic links, or the newest file.

use super::{Entry, files::FileSystem, version};

/// Kernel and initial RAM disk of Debian's links, or else the newest in /boot (or at the top of a boot partition). The
/// arguments are those of /etc/kernel/cmdline (kernel-install(8)).
pub fn newest(system: &FileSystem) -> Option<Entry> {
    let arguments = system.text("/etc/kernel/cmdline").unwrap_or_default();
    let arguments = arguments.split_whitespace().collect::<Vec<_>>().join(" ");
    let (kernel, initrd) = linked(system).or_else(|| newest_in(system, "/boot")).or_else(|| newest_in(system, ""))?;
    Some(Entry { kernel, initrds: initrd.into_iter().collect(), arguments })
}

type Files = (String, Option<String>);

fn linked(system: &FileSystem) -> Option<Files> {
    let there = |path: &str| system.exists(path).then(|| path.to_owned());
    ["", "/boot"].iter().find_map(|dir| {
        let kernel = there(&format!("{dir}/vmlinuz"))?;
        Some((kernel, there(&format!("{dir}/initrd.img"))))
    })
}

fn newest_in(system: &FileSystem, dir: &str) -> Option<Files> {
    let names = system.names(if dir.is_empty() { "/" } else { dir });
    let (version, kernel) = newest_of(&names)?;
    let candidates = [
        format!("initrd.img-{version}"),
        format!("initramfs-{version}.img"),
        format!("initrd-{version}"),
        format!("initramfs-{}", kernel.trim_start_matches("vmlinuz-")),
    ];
    let initrd = candidates.into_iter().find(|name| names.contains(name));
    Some((format!("{dir}/{kernel}"), initrd.map(|name| format!("{dir}/{name}"))))
}

/// The newest kernel's version and name. One for emergencies counts only if there is no other.
fn newest_of(names: &[String]) -> Option<(&str, &str)> {
    let kernels = names.iter().filter_map(|name| Some((name.strip_prefix("vmlinuz-")?, name.as_str())));
    kernels.max_by(|(a, _), (b, _)| {
        let regular = |version: &str| !version.contains("rescue");
        regular(a).cmp(&regular(b)).then_with(|| version::compare(a, b))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_counts() {
        let names = ["vmlinuz-6.1.0-9", "vmlinuz-6.1.0-10", "vmlinuz-9-rescue-x", "initrd.img-7"].map(String::from);
        assert_eq!(newest_of(&names), Some(("6.1.0-10", "vmlinuz-6.1.0-10")));
        assert_eq!(newest_of(&names[3..]), None);
    }
}
