//! virtio-net with two pairs of queues and the control queue, and a network that sends packets of all sizes.
#![no_main]

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use libfuzzer_sys::fuzz_target;
use purlin_devices::virtio::{
    VirtioDevice,
    net::{Net, NetConfig, Network},
    testing::{EVENT_IDX, INDIRECT, abuse},
};
use purlin_network::Backend;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

/// CSUM, GUEST_CSUM, MTU, MAC, GUEST_TSO4, HOST_TSO4, MRG_RXBUF, STATUS, CTRL_VQ, MQ.
const FEATURES: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 11 | 1 << 15 | 1 << 16 | 1 << 17 | 1 << 22;

/// The bytes of the packets that wait, some of them none: shorter than a header, a header alone, one byte, usual
/// frames, the largest, too large.
const WAITING: [usize; 9] = [3, 12, 13, 72, 1526, 5000, 12 + 65_549, 70_000, 100];

/// The network's ends of the present device.
static NETWORK: Mutex<Vec<OwnedFd>> = Mutex::new(Vec::new());

fn device() -> Box<dyn VirtioDevice> {
    let mut network = NETWORK.lock().expect("nobody panics");
    network.clear();
    let mut backend = || {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("the sockets are made");
        for length in WAITING {
            // What the socket has no room for does not wait.
            let _ = send(&theirs, &vec![0x5a; length], SendFlags::DONTWAIT);
        }
        network.push(theirs);
        Arc::new(Backend::socket(ours).expect("the socket is one"))
    };
    let backends = vec![backend(), backend()];
    let config = NetConfig { mac: [0x52, 0x54, 0, 1, 2, 3], mtu: 1400 };
    Box::new(Net::new("net0", Network { config, backends, rate: None }))
}

fuzz_target!(|bytes: &[u8]| abuse(device, FEATURES | INDIRECT | EVENT_IDX, bytes));
