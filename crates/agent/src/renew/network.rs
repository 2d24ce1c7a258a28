//! Network cards whose addresses change, and what they have got by DHCP.

use std::{fs, io, path::Path};

use purlin_agent::protocol::{Card, Failed, FailureKind};

use super::{
    Problems,
    interface::{Interface, leave_network},
    note, run_program,
};

/// Interfaces that are down and have their new addresses.
pub struct Cards(Vec<String>);

/// Whether the addresses are some.
pub fn check(cards: &[Card]) -> Result<(), Failed> {
    let bad = cards.iter().flat_map(|card| [&card.old, &card.new]).find(|address| parse(address).is_none());
    bad.map_or(Ok(()), |bad| {
        let message = format!("'{}' is no address of a network card, as 52:54:00:12:34:56", bad.escape_debug());
        Err(Failed::new(FailureKind::Invalid, message))
    })
}

fn parse(address: &str) -> Option<[u8; 6]> {
    let is_byte = |text: &str| text.len() == 2 && text.bytes().all(|digit| digit.is_ascii_hexdigit());
    let byte = |text: &str| is_byte(text).then(|| u8::from_str_radix(text, 16).ok())?;
    let bytes: Vec<u8> = address.split(':').map(byte).collect::<Option<_>>()?;
    bytes.try_into().ok()
}

/// Takes the cards down, so that nothing is sent from their old addresses any more, and gives them the new ones.
pub fn take_down(cards: &[Card], problems: &mut Problems) -> Cards {
    let mut names = Vec::new();
    let interfaces = if cards.is_empty() { Vec::new() } else { interfaces(Path::new("/sys/class/net")) };
    for card in cards {
        let found = interfaces.iter().find(|(_, address)| Some(*address) == parse(&card.old));
        let Some((name, _)) = found else {
            problems.push(format!("the network card {}: there is none", card.old));
            continue;
        };
        note(problems, &format!("the network card {name}"), change(name, &card.new));
        names.push(name.clone());
    }
    Cards(names)
}

/// Goes through the same with the loopback of a network of its own, in which the thread stays.
pub fn rehearse() {
    interfaces(Path::new("/sys/class/net"));
    if let Ok(loopback) = leave_network().and_then(|()| Interface::new("lo")) {
        let _ = loopback.set_up(true).and_then(|()| loopback.set_up(false));
    }
}

/// Takes them up again, and has new leases got for them.
pub fn bring_up(cards: Cards, problems: &mut Problems) {
    let Cards(names) = cards;
    if names.is_empty() {
        return;
    }
    // While they are down: it must not give the leases back that are the other machine's. Others see the links go down and
    // up.
    let mut networkd = vec!["systemctl", "try-restart", "systemd-networkd.service"];
    if names.iter().all(|name| goes_by_address(name)) {
        networkd = ["networkctl", "reconfigure"].into_iter().chain(names.iter().map(String::as_str)).collect();
    }
    let _ = run_program(networkd[0], &networkd[1..], "");
    for name in &names {
        let up = Interface::new(name).and_then(|card| card.set_up(true));
        note(problems, &format!("the network card {name}"), up);
    }
}

/// Whether networkd, by the file with which it has set the card up, tells others nothing of the machine but the card's address
/// and the host name. Else it has to be started anew (and not be told to set the card up as well, or it takes a lease's address away
/// that it has just got): it goes on by the machine ID with which it was started.
fn goes_by_address(card: &str) -> bool {
    let index = fs::read_to_string(format!("/sys/class/net/{card}/ifindex")).unwrap_or_default();
    let state = fs::read_to_string(format!("/run/systemd/netif/links/{}", index.trim())).unwrap_or_default();
    let file = state.lines().find_map(|line| line.strip_prefix("NETWORK_FILE="));
    file.and_then(|file| fs::read_to_string(file).ok()).is_some_and(|file| is_by_address(&file))
}

/// systemd.network(5).
fn is_by_address(file: &str) -> bool {
    ["ClientIdentifier=mac", "DUIDType=link-layer"].iter().all(|line| file.lines().any(|there| there.trim() == *line))
}

/// Takes a card down, and gives it an address that [`check`] has found to be one.
fn change(name: &str, address: &str) -> io::Result<()> {
    let address = parse(address).ok_or(io::ErrorKind::InvalidInput)?;
    let card = Interface::new(name)?;
    card.set_up(false)?;
    card.set_address(address)
}

/// Cards, not what is made of them (bridges and the like): their names and addresses.
fn interfaces(class: &Path) -> Vec<(String, [u8; 6])> {
    let entries = fs::read_dir(class).into_iter().flatten().flatten().map(|entry| entry.path());
    let cards = entries.filter(|path| path.join("device").exists());
    cards
        .filter_map(|path| {
            let address = parse(fs::read_to_string(path.join("address")).ok()?.trim())?;
            Some((path.file_name()?.to_str()?.to_owned(), address))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(parse("52:54:00:12:34:Fe"), Some([0x52, 0x54, 0, 0x12, 0x34, 0xfe]));
        for bad in ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:+1", "5:54:00:12:34:56"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
        let card = |old: &str, new: &str| Card { old: old.into(), new: new.into() };
        assert!(check(&[card("52:54:00:12:34:56", "52:54:00:12:34:57")]).is_ok());
        assert!(check(&[card("52:54:00:12:34:56", "x\nlink")]).is_err());
    }

    #[test]
    fn who_goes_by_the_address() {
        assert!(is_by_address("[DHCPv4]\nClientIdentifier=mac \n[DHCPv6]\nDUIDType=link-layer\n"));
        assert!(!is_by_address("[DHCPv4]\n#ClientIdentifier=mac\n[DHCPv6]\nDUIDType=link-layer\n"));
        assert!(!is_by_address(""));
        assert!(!goes_by_address("purlin-none"));
    }

    #[test]
    fn cards_are_those_with_a_device() {
        let dir = tempfile::tempdir().unwrap();
        for (name, address) in [("eth0", "52:54:00:12:34:56\n"), ("lo", "00:00:00:00:00:00\n")] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("address"), address).unwrap();
        }
        fs::create_dir(dir.path().join("eth0/device")).unwrap();
        assert_eq!(interfaces(dir.path()), [("eth0".to_owned(), [0x52, 0x54, 0, 0x12, 0x34, 0x56])]);
    }
}
