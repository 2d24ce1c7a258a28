//! Entries of the Boot Loader Specification (type 1), as Fedora and its relatives have them.

use std::cmp::Ordering;

use super::{Entry, files::FileSystem, grub, version};

/// The entry that GRUB's environment has chosen, or else the newest.
pub fn default_entry(system: &FileSystem) -> Option<Entry> {
    ["/boot", ""].iter().find_map(|base| {
        let dir = format!("{base}/loader/entries");
        let environment = grub::environment(system, base);
        let names = system.names(&dir);
        let name = choose(&names, environment.get("saved_entry").map(String::as_str))?;
        let text = system.text(&format!("{dir}/{name}"))?;
        let entry = parse(&text, |variable| environment.get(variable).cloned())?;
        Some(Entry {
            kernel: grub::locate(system, base, &entry.kernel),
            initrds: entry.initrds.iter().map(|path| grub::locate(system, base, path)).collect(),
            ..entry
        })
    })
}

fn choose<'a>(names: &'a [String], saved: Option<&str>) -> Option<&'a str> {
    let entries = || names.iter().filter_map(|name| name.strip_suffix(".conf").map(|id| (id, name.as_str())));
    let saved = saved.and_then(|saved| entries().find(|(id, _)| *id == saved));
    saved.or_else(|| entries().max_by(|(a, _), (b, _)| newer(a, b))).map(|(_, name)| name)
}

/// By name without the machine's id, a rescue entry last.
fn newer(a: &str, b: &str) -> Ordering {
    let regular = |id: &str| !id.contains("rescue");
    regular(a).cmp(&regular(b)).then_with(|| version::compare(a, b))
}

/// `linux`, `initrd` and `options`, each in as many lines as it likes. Fedora's options hold variables of GRUB's
/// environment (`$kernelopts`).
fn parse(text: &str, variable: impl Fn(&str) -> Option<String>) -> Option<Entry> {
    let mut entry = Entry::default();
    let mut options = vec![];
    for line in text.lines() {
        let Some((key, value)) = line.trim().split_once(char::is_whitespace) else { continue };
        match key {
            "linux" => entry.kernel = value.trim().to_owned(),
            "initrd" => {
                entry.initrds.extend(value.split_whitespace().filter(|w| !w.starts_with('$')).map(str::to_owned))
            }
            "options" => options.extend(value.split_whitespace().filter_map(|word| match word.strip_prefix('$') {
                Some(name) => variable(name),
                None => Some(word.to_owned()),
            })),
            _ => {}
        }
    }
    entry.arguments = options.join(" ");
    (!entry.kernel.is_empty()).then_some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_of_fedoras() {
        let text = "title Fedora\nversion 5.14\nlinux /vmlinuz-5.14\ninitrd /initramfs-5.14.img $tuned_initrd\n\
                    options root=UUID=1 ro $kernelopts $tuned_params\n# x\n";
        let entry = parse(text, |name| (name == "kernelopts").then(|| "quiet".into())).unwrap();
        assert_eq!(entry.kernel, "/vmlinuz-5.14");
        assert_eq!(entry.initrds, ["/initramfs-5.14.img"]);
        assert_eq!(entry.arguments, "root=UUID=1 ro quiet");
        assert_eq!(parse("title x\n", |_| None), None);
    }

    #[test]
    fn saved_or_newest() {
        let names = ["a-5.9.conf", "a-5.10.conf", "a-0-rescue.conf", "README"].map(String::from);
        assert_eq!(choose(&names, None), Some("a-5.10.conf"));
        assert_eq!(choose(&names, Some("a-5.9")), Some("a-5.9.conf"));
        assert_eq!(choose(&names, Some("gone")), Some("a-5.10.conf"));
        assert_eq!(choose(&names[3..], None), None);
    }
}
