//! The NAT in its sandboxed process, from the VM's end of the packet socket and from this host's sockets.

mod guest;
mod tap;
mod tcp;
mod wire;

/// Becomes the NAT's process: what `nat::start` starts is this program with this test's name as its argument. Run as
/// a test it does nothing, as its standard input is no packet socket.
#[test]
fn __nat() {
    purlin_network::nat::main();
}
