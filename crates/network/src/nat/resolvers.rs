//! The host's name servers, as resolv.conf(5) names them.

use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

/// The file.
const PATH: &str = "/etc/resolv.conf";
/// The file is looked at again no sooner than after this.
const FRESH: Duration = Duration::from_secs(2);
/// As much as is read of it, in bytes.
const MAX_LENGTH: usize = 4096;

/// The name servers, one of which is in use.
pub struct Resolvers {
    servers: Vec<SocketAddr>,
    current: usize,
    /// Kept open, as no path can be opened later. A file that is written anew in place is followed, one that is
    /// replaced by another is not.
    file: Option<File>,
    read_at: Option<Instant>,
}

impl Resolvers {
    /// Those of this host, and as they change.
    pub fn of_host() -> Self {
        let file = File::open(PATH).ok();
        let mut new = Self { servers: Vec::new(), current: 0, file, read_at: None };
        new.read();
        new
    }

    /// These; without any, those of this host.
    pub fn new(servers: Vec<SocketAddr>) -> Self {
        if servers.is_empty() { Self::of_host() } else { Self { servers, current: 0, file: None, read_at: None } }
    }

    /// The one in use.
    pub fn current(&self) -> SocketAddr {
        self.servers[self.current]
    }

    /// `server` does not answer: the next one is used.
    pub fn failed(&mut self, server: SocketAddr) {
        if self.current() == server {
            self.current = (self.current + 1) % self.servers.len();
        }
    }

    /// Looks whether the file has changed.
    pub fn refresh(&mut self, now: Instant) {
        if self.file.is_some() && self.read_at.is_none_or(|at| now.saturating_duration_since(at) >= FRESH) {
            self.read_at = Some(now);
            self.read();
        }
    }

    fn read(&mut self) {
        let mut text = [0; MAX_LENGTH];
        let length = self.file.as_ref().and_then(|file| file.read_at(&mut text, 0).ok()).unwrap_or(0);
        let servers = parse(&String::from_utf8_lossy(&text[..length]));
        if servers != self.servers {
            self.servers = servers;
            self.current = 0;
        }
    }
}

/// The servers that a resolv.conf names, or the one that it means if it names none. One on a link (`fe80::1%eth0`)
/// cannot be told to which link it belongs and is left out.
fn parse(text: &str) -> Vec<SocketAddr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let address = (words.next() == Some("nameserver")).then(|| words.next())??;
        address.parse::<IpAddr>().ok()
    });
    let servers: Vec<_> = servers.map(|ip| SocketAddr::new(ip, 53)).collect();
    if servers.is_empty() { vec![(Ipv4Addr::LOCALHOST, 53).into()] } else { servers }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolv_conf() {
        let text = "# nameserver 1.1.1.1\nsearch example.org\nnameserver 192.0.2.1\n nameserver\t2001:db8::1 \n\
                    nameserver fe80::1%eth0\nnameserver\noptions edns0\n";
        assert_eq!(parse(text), ["192.0.2.1:53".parse().unwrap(), "[2001:db8::1]:53".parse().unwrap()]);
        assert_eq!(parse(""), ["127.0.0.1:53".parse().unwrap()]);
    }

    #[test]
    fn a_failed_server_gives_way_once() {
        let (a, b) = ("192.0.2.1:53".parse().unwrap(), "192.0.2.2:53".parse().unwrap());
        let mut resolvers = Resolvers::new(vec![a, b]);
        resolvers.failed(a);
        resolvers.failed(a);
        assert_eq!(resolvers.current(), b);
        resolvers.failed(b);
        assert_eq!(resolvers.current(), a);
    }
}
