//! TAP, as far as this host has it.

use std::{fs, path::Path, process::Command};

use purlin_network::{Offload, PacketHeader, tap};
use rustix::{io::Errno, process::geteuid};
use vm_memory::VolatileSlice;

fn refusal(name: &str) -> String {
    tap::open(name).unwrap_err().to_string()
}

#[test]
fn what_is_no_interface_is_refused() {
    for name in ["", ".", "..", "a/b", "a b", "a:1", "sixteen-letters!", "tap%d", "\u{e9}"] {
        assert!(refusal(name).contains("is not a name of a network interface"), "{name}");
    }
    if fs::File::options().read(true).write(true).open("/dev/net/tun").is_ok() {
        assert_eq!(
            refusal("purlin-none"),
            "there is no network interface 'purlin-none': make it with 'ip tuntap add purlin-none mode tap' as root"
        );
        if geteuid().is_root() {
            assert!(refusal("lo").contains("'lo' is not a TAP interface"), "{}", refusal("lo"));
        }
    }
}

/// An interface of this test's, gone when dropped.
struct Interface(String);

impl Interface {
    fn new() -> Option<Self> {
        let name = format!("ptap{}", std::process::id() % 1_000_000);
        let ip = |arguments: &[&str]| Command::new("ip").args(arguments).status().is_ok_and(|status| status.success());
        let is_made = Path::new("/dev/net/tun").exists() && ip(&["tuntap", "add", &name, "mode", "tap"]);
        let new = is_made.then(|| Self(name.clone()))?;
        // Without IPv6 the kernel has nothing to say of its own on a new interface.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
        assert!(ip(&["link", "set", &name, "up"]));
        Some(new)
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", &self.0]).status();
    }
}

#[test]
fn packets_go_through_a_tap() {
    let Some(interface) = Interface::new() else {
        eprintln!("skipped: this user cannot make a TAP interface");
        return;
    };
    let backend = tap::open(&interface.0).unwrap();
    assert!(refusal(&interface.0).contains("is in use by another program"), "{}", refusal(&interface.0));
    backend.set_offload(Offload::CSUM | Offload::TSO4 | Offload::TSO6 | Offload::TSO_ECN).unwrap();
    backend.set_offload(Offload::empty()).unwrap();

    // The kernel counts what it receives.
    let received = || {
        let path = format!("/sys/class/net/{}/statistics/rx_bytes", interface.0);
        fs::read_to_string(path).unwrap().trim().parse::<u64>().unwrap()
    };
    let before = received();
    let mut packet = PacketHeader::default().to_bytes().to_vec();
    packet.extend([0xff; 6]);
    packet.extend([0x52, 0x54, 0, 1, 2, 3, 0x88, 0xb5]);
    packet.extend([0; 46]);
    let (header, frame) = packet.split_at_mut(5);
    backend.send(&[VolatileSlice::from(header), VolatileSlice::from(frame)]).unwrap();
    assert_eq!(received() - before, 60);

    // What is sent to the interface comes out, with its header.
    let ip = |arguments: &[&str]| assert!(Command::new("ip").args(arguments).status().unwrap().success());
    ip(&["address", "add", "198.51.100.1/30", "dev", &interface.0]);
    ip(&["neighbour", "add", "198.51.100.2", "lladdr", "52:54:00:01:02:03", "dev", &interface.0]);
    let socket = std::net::UdpSocket::bind("198.51.100.1:0").unwrap();
    let mut packet = vec![0; 2000];
    let is_datagram = |packet: &[u8]| packet.ends_with(b"to the guest");
    for _ in 0..1000 {
        match backend.receive(&[VolatileSlice::from(&mut packet[..])]) {
            Ok(length) if is_datagram(&packet[..length]) => {
                assert_eq!(length, PacketHeader::LENGTH + 14 + 20 + 8 + 12);
                assert_eq!(packet[12..18], [0x52, 0x54, 0, 1, 2, 3]);
                return;
            }
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(Errno::AGAIN.raw_os_error()));
                // An interface that has just got its other end drops what it is given for a while.
                socket.send_to(b"to the guest", "198.51.100.2:9").unwrap();
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    }
    panic!("the datagram has not come");
}
