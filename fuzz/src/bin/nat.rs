//! The NAT's parsers and tables: a series of messages from a hostile guest, each with its length before it.
#![no_main]

use std::{cell::RefCell, net::UdpSocket};

use libfuzzer_sys::fuzz_target;
use purlin_network::nat::fuzzing::Victim;

thread_local! {
    /// Nobody answers there, and nobody else is reached.
    static RESOLVER: UdpSocket = UdpSocket::bind("127.0.0.1:0").expect("this host has UDP");
    /// One for all inputs: what one leaves behind the next one meets.
    static VICTIM: RefCell<Victim> =
        RefCell::new(Victim::new(RESOLVER.with(|socket| socket.local_addr()).expect("it is bound")));
}

fuzz_target!(|data: &[u8]| {
    VICTIM.with_borrow_mut(|victim| {
        let mut rest = data;
        while let Some((length, more)) = rest.split_first_chunk::<2>() {
            let (message, others) = more.split_at(more.len().min(u16::from_le_bytes(*length).into()));
            if !message.is_empty() {
                victim.send(message);
            }
            rest = others;
        }
        while victim.receive().is_some() {}
    });
});
