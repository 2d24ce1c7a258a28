//! `--net user|tap=NAME|none`, with `,bps=…`, `,queues=…` and `,loopback`.

use purlin_api::Network;
use purlin_vmm::network::tap;

use super::quantity;

/// Reads the option.
pub fn parse(text: &str) -> Result<Network, String> {
    let mut parts = text.split(',');
    let kind = parts.next().unwrap_or_default();
    let mut net = match (kind, kind.strip_prefix("tap=")) {
        ("user", _) => Network::User { bytes_per_second: None, loopback: false },
        ("none", _) => Network::None,
        (_, Some(name)) if !name.is_empty() => Network::Tap { name: name.into(), bytes_per_second: None, queues: None },
        _ => return Err(format!("it is one of user, tap=NAME, none; {SETTINGS}")),
    };
    for setting in parts {
        match (&mut net, setting.split_once('=').unwrap_or((setting, ""))) {
            (Network::User { bytes_per_second, .. } | Network::Tap { bytes_per_second, .. }, ("bps", value)) => {
                *bytes_per_second = Some(parse_rate(value)?)
            }
            (Network::User { loopback, .. }, ("loopback", "")) => *loopback = true,
            (Network::Tap { queues, .. }, ("queues", value)) => *queues = Some(parse_queues(value)?),
            _ => return Err(format!("'{setting}' is no setting of {kind}: {SETTINGS}")),
        }
    }
    Ok(net)
}

const SETTINGS: &str = "user takes ',bps=RATE' and ',loopback', tap ',bps=RATE' and ',queues=N'";

fn parse_rate(rate: &str) -> Result<u64, String> {
    quantity::parse_rate(rate).map_err(|e| format!("bps={rate}: {e}"))
}

fn parse_queues(count: &str) -> Result<u16, String> {
    let most = tap::MOST_QUEUES;
    let count = count
        .bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| count.parse().ok())
        .flatten()
        .filter(|count| (1..=most).contains(count));
    count.ok_or_else(|| format!("queues= takes a number from 1 to {most}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        assert_eq!(parse("user"), Ok(Network::User { bytes_per_second: None, loopback: false }));
        assert_eq!(parse("none"), Ok(Network::None));
        let rate = Some(2 << 20);
        assert_eq!(parse("user,loopback,bps=2M"), Ok(Network::User { bytes_per_second: rate, loopback: true }));
        let tap = |bytes_per_second, queues| Network::Tap { name: "tap0".into(), bytes_per_second, queues };
        assert_eq!(parse("tap=tap0"), Ok(tap(None, None)));
        assert_eq!(parse("tap=tap0,bps=2M"), Ok(tap(rate, None)));
        assert_eq!(parse("tap=tap0,queues=4,bps=2M"), Ok(tap(rate, Some(4))));
        for wrong in [
            "",
            "tap",
            "tap=",
            "bridge",
            "user,mac=1",
            "none,bps=1M",
            "user,bps=0",
            "user,queues=2",
            "user,loopback=1",
            "user,",
            "tap=a,loopback",
            "tap=a,queues",
            "tap=a,queues=0",
            "tap=a,queues=9",
            "tap=a,queues=+1",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
