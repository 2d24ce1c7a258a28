//! virtio-vsock, and host programs that want to connect to the guest.
#![no_main]

use std::{os::unix::net::UnixStream, path::PathBuf, sync::Arc};

use libfuzzer_sys::fuzz_target;
use purlin_devices::virtio::{
    VirtioDevice,
    testing::{EVENT_IDX, INDIRECT, abuse},
    vsock::{HostSocket, Vsock, VsockConfig},
};

fn path() -> PathBuf {
    std::env::temp_dir().join(format!("purlin-fuzz-{}.vsock", std::process::id()))
}

fn device() -> Box<dyn VirtioDevice> {
    let socket = HostSocket::bind(&path()).expect("the socket is made");
    // Its answer is the guest's affair.
    if let Ok(mut program) = UnixStream::connect(socket.path()) {
        let _ = std::io::Write::write_all(&mut program, b"CONNECT 22\n");
    }
    Box::new(Vsock::new("vsock0", VsockConfig { guest_cid: 3, socket: Arc::new(socket) }))
}

fuzz_target!(|bytes: &[u8]| abuse(device, INDIRECT | EVENT_IDX, bytes));
