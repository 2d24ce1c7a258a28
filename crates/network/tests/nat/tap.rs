//! TAP, as far as this host has it.

use std::{
    fs,
    net::UdpSocket,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use purlin_network::{
    Backend, Offload, PacketHeader,
    tap::{self, Queues},
};
use rustix::{io::Errno, process::geteuid};
use vm_memory::VolatileSlice;

fn refusal(name: &str) -> String {
    tap::open(name, Queues::UpTo(1)).unwrap_err().to_string()
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
    /// `None`, said aloud, where this user may not. `kind`: a further word for `ip tuntap add`.
    fn new(prefix: &str, kind: Option<&str>) -> Option<Self> {
        let name = format!("{prefix}{}", std::process::id() % 1_000_000);
        let ip = |arguments: &[&str]| Command::new("ip").args(arguments).status().is_ok_and(|status| status.success());
        let add = ["tuntap", "add", &name, "mode", "tap"].into_iter().chain(kind);
        let is_made = Path::new("/dev/net/tun").exists() && ip(&add.collect::<Vec<_>>());
        if !is_made {
            eprintln!("skipped: this user cannot make a TAP interface");
        }
        let new = is_made.then(|| Self(name.clone()))?;
        // Without IPv6 the kernel has nothing to say of its own on a new interface.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
        assert!(ip(&["link", "set", &name, "up"]));
        Some(new)
    }

    /// An address for the host's end, and a neighbour.
    fn give_network(&self, address: &str, neighbour: &str) {
        let ip = |arguments: &[&str]| assert!(Command::new("ip").args(arguments).status().unwrap().success());
        ip(&["address", "add", address, "dev", &self.0]);
        ip(&["neighbour", "add", neighbour, "lladdr", "52:54:00:01:02:03", "dev", &self.0]);
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", &self.0]).status();
    }
}

#[test]
fn packets_go_through_a_tap() {
    let Some(interface) = Interface::new("ptap", None) else { return };
    let one_queue = tap::open(&interface.0, Queues::Exactly(2)).unwrap_err().to_string();
    assert!(one_queue.contains("has one queue only"), "{one_queue}");
    let backend = tap::open(&interface.0, Queues::UpTo(4)).unwrap().remove(0);
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
    interface.give_network("198.51.100.1/30", "198.51.100.2");
    let socket = UdpSocket::bind("198.51.100.1:0").unwrap();
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
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
    panic!("the datagram has not come");
}

/// By which queues datagrams come that 64 ports of the host's send. (An interface that has just got
/// its other end drops what it is given for a while.)
fn spread(queues: &[Backend]) -> Vec<bool> {
    let mut counts = vec![0; queues.len()];
    let sockets: Vec<_> = (0..64).map(|_| UdpSocket::bind("198.51.100.5:0").unwrap()).collect();
    let start = Instant::now();
    while counts.iter().sum::<usize>() < sockets.len() {
        assert!(start.elapsed() < Duration::from_secs(60), "{counts:?}");
        for socket in &sockets {
            socket.send_to(b"to the guest", "198.51.100.6:9").unwrap();
            for (queue, count) in queues.iter().zip(&mut counts) {
                let mut packet = vec![0; 2000];
                while let Ok(length) = queue.receive(&[VolatileSlice::from(&mut packet[..])]) {
                    *count += usize::from(packet[..length].ends_with(b"to the guest"));
                }
            }
        }
    }
    counts.iter().map(|&count| count > 0).collect()
}

#[test]
fn packets_come_by_the_queues_that_are_in_use() {
    let Some(interface) = Interface::new("pmq", Some("multi_queue")) else { return };
    let queues = tap::open(&interface.0, Queues::UpTo(3)).unwrap();
    assert_eq!(queues.len(), 3);
    assert!(refusal(&interface.0).contains("is in use by another program"), "{}", refusal(&interface.0));
    interface.give_network("198.51.100.5/30", "198.51.100.6");
    assert_eq!(spread(&queues), [true, false, false]);
    queues[1].set_in_use(true).unwrap();
    assert_eq!(spread(&queues), [true, true, false]);
    queues[2].set_in_use(true).unwrap();
    // Said twice it is the same.
    queues[2].set_in_use(true).unwrap();
    assert_eq!(spread(&queues), [true, true, true]);
    queues[1].set_in_use(false).unwrap();
    queues[2].set_in_use(false).unwrap();
    assert_eq!(spread(&queues), [true, false, false]);
    drop(queues);
    assert_eq!(tap::open(&interface.0, Queues::Exactly(2)).unwrap().len(), 2);
}
