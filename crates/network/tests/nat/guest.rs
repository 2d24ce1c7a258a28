//! A guest without a machine: smoltcp's TCP/IP at the VM's end of the packet socket.

use std::{
    collections::VecDeque,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::AsFd,
    time::{Duration, Instant as Time},
};

use purlin_network::{
    Backend, MAX_PACKET, PacketHeader,
    nat::{self, NatConfig, NatProcess},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send},
};
use smoltcp::{
    iface::{Config, Interface, SocketHandle, SocketSet},
    phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken},
    socket::{tcp, udp},
    time::Instant,
    wire::{EthernetAddress, IpCidr, Ipv4Address},
};

/// Nothing here takes so long unless it stands still.
const TOO_LONG: Duration = Duration::from_secs(120);

pub const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
pub const GATEWAY: Ipv4Address = Ipv4Address::new(10, 0, 2, 2);
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd70, 0x7572, 0x6c69, 2, 0, 0, 0, 2);
pub const DNS: Ipv4Address = Ipv4Address::new(10, 0, 2, 3);
pub const GUEST: Ipv4Address = Ipv4Address::new(10, 0, 2, 15);
pub const GUEST_V6: Ipv6Addr = Ipv6Addr::new(0xfd70, 0x7572, 0x6c69, 2, 0, 0, 0, 15);

/// A configuration under which nothing leaves this host.
pub fn config() -> NatConfig {
    NatConfig { mac: GUEST_MAC, allow_host_loopback: true, isolated: true, ..NatConfig::default() }
}

/// The packet socket as smoltcp's network device.
pub struct Wire {
    pub backend: Backend,
    /// Frames that did not fit yet.
    waiting: VecDeque<Vec<u8>>,
}

impl Wire {
    pub fn new(backend: Backend) -> Self {
        Self { backend, waiting: VecDeque::new() }
    }

    /// One packet: header and frame.
    pub fn receive_packet(&self) -> Option<(PacketHeader, Vec<u8>)> {
        let mut packet = vec![0; MAX_PACKET];
        match recv(self.backend.as_fd(), &mut packet[..], RecvFlags::DONTWAIT) {
            Ok((length, _)) if length > 0 => {
                let frame = packet[PacketHeader::LENGTH..length].to_vec();
                let header = packet[..PacketHeader::LENGTH].try_into().unwrap();
                Some((PacketHeader::from_bytes(header), frame))
            }
            Ok(_) => panic!("the NAT is gone"),
            Err(Errno::AGAIN) => None,
            Err(error) => panic!("the packet socket: {error}"),
        }
    }

    pub fn send_frame(&mut self, frame: &[u8]) {
        self.waiting.push_back([&PacketHeader::default().to_bytes(), frame].concat());
        self.flush();
    }

    pub fn flush(&mut self) {
        while let Some(packet) = self.waiting.front() {
            match send(self.backend.as_fd(), packet, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(_) => drop(self.waiting.pop_front()),
                Err(Errno::AGAIN) => return,
                Err(error) => panic!("the packet socket: {error}"),
            }
        }
    }

    /// Waits for a packet, or for room if there is something to send.
    pub fn wait(&self, timeout: Duration) {
        let mut wanted = PollFlags::IN;
        wanted.set(PollFlags::OUT, !self.waiting.is_empty());
        let fd = self.backend.as_fd();
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
        poll(&mut [PollFd::new(&fd, wanted)], Some(&timeout)).unwrap();
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sender<'_>)> {
        let (_, frame) = self.receive_packet()?;
        Some((Received(frame), Sender(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sender<'_>> {
        self.flush();
        self.waiting.is_empty().then_some(Sender(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

pub struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

pub struct Sender<'a>(&'a mut Wire);

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.send_frame(&frame);
        result
    }
}

/// A guest with addresses, behind a NAT of its own.
pub struct Guest {
    pub nat: NatProcess,
    pub wire: Wire,
    interface: Interface,
    pub sockets: SocketSet<'static>,
    next_port: u16,
}

impl Guest {
    pub fn new(config: &NatConfig) -> Self {
        let (backend, nat) = nat::start(config).unwrap();
        let mut wire = Wire::new(backend);
        let mut interface_config = Config::new(EthernetAddress(GUEST_MAC).into());
        interface_config.random_seed = 1;
        let mut interface = Interface::new(interface_config, &mut wire, Instant::now());
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(GUEST.into(), 24)).unwrap();
            addresses.push(IpCidr::new(GUEST_V6.into(), 64)).unwrap();
        });
        interface.routes_mut().add_default_ipv4_route(GATEWAY).unwrap();
        interface.routes_mut().add_default_ipv6_route(GATEWAY_V6).unwrap();
        Self { nat, wire, interface, sockets: SocketSet::new(Vec::new()), next_port: 20000 }
    }

    /// Lets the guest run until `done`.
    pub fn run_until(&mut self, mut done: impl FnMut(&mut SocketSet<'static>) -> bool) {
        let start = Time::now();
        loop {
            let now = Instant::now();
            self.interface.poll(now, &mut self.wire, &mut self.sockets);
            if done(&mut self.sockets) {
                // What `done` wrote is sent.
                self.interface.poll(Instant::now(), &mut self.wire, &mut self.sockets);
                return;
            }
            assert!(start.elapsed() < TOO_LONG, "the guest stands still");
            let delay = self.interface.poll_delay(Instant::now(), &self.sockets);
            let delay = delay.map_or(Duration::from_millis(10), Into::into);
            self.wire.wait(delay.min(Duration::from_millis(10)));
        }
    }

    pub fn tcp(&mut self, buffer: usize) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; buffer]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        // What has come is acknowledged before a socket is let go of.
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        self.sockets.add(socket)
    }

    /// A socket that is connecting.
    pub fn connect(&mut self, to: impl Into<SocketAddr>, buffer: usize) -> SocketHandle {
        let (handle, to) = (self.tcp(buffer), to.into());
        self.next_port = self.next_port.checked_add(1).unwrap_or(20000);
        let remote: (IpAddr, u16) = (to.ip(), to.port());
        self.sockets
            .get_mut::<tcp::Socket>(handle)
            .connect(self.interface.context(), (smoltcp::wire::IpAddress::from(remote.0), remote.1), self.next_port)
            .unwrap();
        handle
    }

    /// Lets the guest run until the connection stands or has failed; returns whether it stands.
    pub fn wait_connected(&mut self, handle: SocketHandle) -> bool {
        let mut stands = false;
        self.run_until(|sockets| {
            let socket = sockets.get::<tcp::Socket>(handle);
            stands = socket.may_send();
            stands || !socket.is_open()
        });
        stands
    }

    /// Sends everything.
    pub fn send_all(&mut self, handle: SocketHandle, mut data: &[u8]) {
        self.run_until(|sockets| {
            let sent = sockets.get_mut::<tcp::Socket>(handle).send_slice(data).unwrap();
            data = &data[sent..];
            data.is_empty()
        });
    }

    /// Receives until the other side has closed.
    pub fn receive_all(&mut self, handle: SocketHandle) -> Vec<u8> {
        let mut data = Vec::new();
        self.run_until(|sockets| {
            let socket = sockets.get_mut::<tcp::Socket>(handle);
            while socket.can_recv() {
                socket
                    .recv(|bytes| {
                        data.extend_from_slice(bytes);
                        (bytes.len(), ())
                    })
                    .unwrap();
            }
            !socket.may_recv()
        });
        data
    }

    /// The same, of a connection that is still to stand.
    pub fn receive_all_after_connect(&mut self, handle: SocketHandle) -> Vec<u8> {
        assert!(self.wait_connected(handle));
        self.receive_all(handle)
    }

    /// Closes the guest's half.
    pub fn close(&mut self, handle: SocketHandle) {
        self.sockets.get_mut::<tcp::Socket>(handle).close();
    }

    pub fn udp(&mut self, port: u16) -> SocketHandle {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 64 << 10]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(port).unwrap();
        self.sockets.add(socket)
    }
}
