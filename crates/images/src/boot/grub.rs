//! The default entry of GRUB's configuration, as grub-mkconfig(8) writes it.
//!
//! It is a program of a shell's kind; of that only `set`, `menuentry`, `submenu`, `linux` and `initrd` are understood,
//! and conditions are not evaluated. That is enough for generated files.

use std::collections::HashMap;

use super::{Entry, files::FileSystem};

/// The entry that GRUB would boot without anybody at the keyboard.
pub fn default_entry(system: &FileSystem) -> Option<Entry> {
    for base in ["/boot", ""] {
        for dir in ["grub", "grub2"] {
            let Some(text) = system.text(&format!("{base}/{dir}/grub.cfg")) else { continue };
            let entry = parse(&text, &environment(system, base))?;
            return Some(Entry {
                kernel: locate(system, base, &entry.kernel),
                initrds: entry.initrds.iter().map(|path| locate(system, base, path)).collect(),
                ..entry
            });
        }
    }
    None
}

/// A path of a boot loader's is one of the file system that /boot is on: where that is the root's own, some leave out
/// `/boot`.
pub fn locate(system: &FileSystem, base: &str, path: &str) -> String {
    let below = format!("{base}{path}");
    if !system.exists(path) && system.exists(&below) { below } else { path.to_owned() }
}

/// The variables in grubenv, a file of 1 KiB that GRUB itself can write.
pub fn environment(system: &FileSystem, base: &str) -> HashMap<String, String> {
    let text = ["grub", "grub2"].iter().find_map(|dir| system.text(&format!("{base}/{dir}/grubenv")));
    let pairs = |line: &str| line.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    text.unwrap_or_default().lines().filter(|line| !line.starts_with('#')).filter_map(pairs).collect()
}

/// A place in a menu: its number there, its title and ids.
#[derive(Clone, Debug)]
struct Place {
    number: usize,
    names: Vec<String>,
}

impl Place {
    fn is(&self, wanted: &str) -> bool {
        wanted.parse() == Ok(self.number) || self.names.iter().any(|name| name == wanted)
    }
}

/// The menu as it is read.
#[derive(Default)]
struct Menu {
    /// Each with its place in the menu and in the submenus on the way.
    entries: Vec<(Vec<Place>, Entry)>,
    /// The submenus that are open, each with how many entries it has so far.
    submenus: Vec<(Place, usize)>,
    count: usize,
    open: Option<(Vec<Place>, Entry)>,
}

impl Menu {
    fn place(&mut self, words: &[String]) -> Place {
        let count = self.submenus.last_mut().map_or(&mut self.count, |(_, count)| count);
        *count += 1;
        Place { number: *count - 1, names: names(words) }
    }

    fn open_submenu(&mut self, words: &[String]) {
        let place = self.place(words);
        self.submenus.push((place, 0));
    }

    fn open_entry(&mut self, words: &[String]) {
        let place = self.place(words);
        let path = self.submenus.iter().map(|(submenu, _)| submenu.clone()).chain([place]).collect();
        self.open = Some((path, Entry::default()));
    }

    /// A closing brace; those of functions are outside of all menus.
    fn close(&mut self) {
        match self.open.take() {
            Some(found) => self.entries.push(found),
            None => drop(self.submenus.pop()),
        }
    }

    /// The entry chosen (`1>0`, `Advanced options>Debian, with Linux 6.1`, an id), or else the first.
    fn pick(mut self, chosen: &str) -> Option<Entry> {
        let wanted: Vec<&str> = chosen.split('>').collect();
        let is_chosen = |path: &[Place]| {
            path.len() == wanted.len() && path.iter().zip(&wanted).all(|(place, wanted)| place.is(wanted))
        };
        let chosen = self.entries.iter().position(|(path, entry)| is_chosen(path) && !entry.kernel.is_empty());
        let index = chosen.or_else(|| self.entries.iter().position(|(_, entry)| !entry.kernel.is_empty()))?;
        Some(self.entries.swap_remove(index).1)
    }
}

fn parse(text: &str, environment: &HashMap<String, String>) -> Option<Entry> {
    let mut variables = environment.clone();
    // It is for one boot, before which GRUB itself clears it.
    variables.remove("next_entry");
    let (mut menu, mut default) = (Menu::default(), None);
    for line in text.lines() {
        let words = words(line, &variables);
        let Some((command, rest)) = words.split_first() else { continue };
        match (command.as_str(), &mut menu.open) {
            ("set", None) => match rest.first().and_then(|word| word.split_once('=')) {
                // Of several, in branches, that which has a value: `default="${next_entry}"` has none.
                Some(("default", value)) if default.is_none() && !value.is_empty() => default = Some(value.to_owned()),
                Some((name, value)) => drop(variables.insert(name.to_owned(), value.to_owned())),
                None => {}
            },
            ("submenu", None) => menu.open_submenu(rest),
            ("menuentry", None) => menu.open_entry(rest),
            ("linux" | "linux16" | "linuxefi", Some((_, entry))) => {
                entry.kernel = rest.first().cloned().unwrap_or_default();
                entry.arguments = rest.get(1..).unwrap_or_default().join(" ");
            }
            ("initrd" | "initrd16" | "initrdefi", Some((_, entry))) => entry.initrds = rest.to_vec(),
            ("}", _) => menu.close(),
            _ => {}
        }
    }
    menu.pick(default.as_deref().unwrap_or("0"))
}

/// `menuentry 'Debian' --class debian $menuentry_id_option 'gnulinux-simple-…' {`: all that could be a name.
fn names(words: &[String]) -> Vec<String> {
    words.iter().filter(|word| !word.starts_with("--") && *word != "{").cloned().collect()
}

/// The words of a line, without quotes, with variables put in (those not known are empty).
fn words(line: &str, variables: &HashMap<String, String>) -> Vec<String> {
    let (mut words, mut word) = (vec![], None::<String>);
    let mut quote = None;
    let mut chars = line.trim().chars().peekable();
    while let Some(c) = chars.next() {
        match (c, quote) {
            ('#', None) if word.is_none() => break,
            ('\'' | '"', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (c, Some(q)) if c == q => quote = None,
            ('\\', None | Some('"')) => word.get_or_insert_default().extend(chars.next()),
            ('$', None | Some('"')) => {
                let braced = chars.next_if_eq(&'{').is_some();
                let mut name = String::new();
                while let Some(c) = chars.next_if(|c| c.is_ascii_alphanumeric() || *c == '_') {
                    name.push(c);
                }
                if braced {
                    chars.next_if_eq(&'}');
                }
                if let Some(value) = variables.get(&name) {
                    word.get_or_insert_default().push_str(value);
                }
            }
            (c, None) if c.is_whitespace() || c == ';' => words.extend(word.take()),
            (c, _) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = r#"
set default="0"
if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
fi
function gfxmode {
	set gfxpayload="${1}"
}
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple-1' {
	load_video
	insmod ext2
	search --no-floppy --fs-uuid --set=root 1-2
	echo	'Loading Linux 6.1.0-10-amd64 ...'
	linux	/boot/vmlinuz-6.1.0-10-amd64 root=UUID=1-2 ro console=tty0 console=ttyS0,115200 $vt_handoff
	initrd	/boot/initrd.img-6.1.0-10-amd64
}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-1' {
	menuentry 'Debian GNU/Linux, with Linux 6.1.0-9-amd64' --class debian {
		linux	/boot/vmlinuz-6.1.0-9-amd64 root=UUID=1-2 ro
		initrd	/boot/initrd.img-6.1.0-9-amd64
	}
}
"#;

    #[test]
    fn debians_default() {
        let entry = parse(DEBIAN, &HashMap::new()).unwrap();
        assert_eq!(entry.kernel, "/boot/vmlinuz-6.1.0-10-amd64");
        assert_eq!(entry.initrds, ["/boot/initrd.img-6.1.0-10-amd64"]);
        assert_eq!(entry.arguments, "root=UUID=1-2 ro console=tty0 console=ttyS0,115200");
    }

    #[test]
    fn the_chosen_entry() {
        let saved =
            DEBIAN.replace("set default=\"0\"", "set default=\"${next_entry}\"\nset default=\"${saved_entry}\"");
        let kernel = |text: &str, saved: &str| {
            let environment = [("saved_entry", saved), ("next_entry", "9")].map(|(k, v)| (k.to_owned(), v.to_owned()));
            parse(text, &environment.into()).unwrap().kernel
        };
        let by_name = "Advanced options for Debian GNU/Linux>Debian GNU/Linux, with Linux 6.1.0-9-amd64";
        for chosen in ["1>0", "gnulinux-advanced-1>0", by_name] {
            assert_eq!(kernel(&saved, chosen), "/boot/vmlinuz-6.1.0-9-amd64", "{chosen}");
        }
        for chosen in ["0", "gnulinux-simple-1", "gone", "1", "1>7", ""] {
            assert_eq!(kernel(&saved, chosen), "/boot/vmlinuz-6.1.0-10-amd64", "{chosen}");
        }
        // What was saved counts only where the configuration asks for it.
        assert_eq!(kernel(DEBIAN, "1>0"), "/boot/vmlinuz-6.1.0-10-amd64");
    }

    #[test]
    fn nonsense_is_no_entry() {
        for text in ["", "menuentry", "menuentry x {", "linux /x", "menuentry x {\nlinux\n}", "}\n}\n'\"${", "blscfg\n"]
        {
            assert_eq!(parse(text, &HashMap::new()), None, "{text}");
        }
    }

    #[test]
    fn quotes_and_variables() {
        let variables = HashMap::from([("a".to_owned(), "1 2".to_owned())]);
        assert_eq!(
            words(r#"x 'a "b' "c $a" $a ${a}y $none \$z # t"#, &variables),
            ["x", "a \"b", "c 1 2", "1 2", "1 2y", "$z"]
        );
    }
}
