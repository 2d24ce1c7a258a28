//! Who is at the other end of a connection, how long, and how many.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv6Addr},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
    runtime::Handle,
    sync::{Semaphore, watch},
    time::timeout,
};

use crate::tokens::TokenHash;

/// Strangers at once. One more takes the place of the one that has been here longest, of those from the network address
/// that most are from.
const MOST_STRANGERS: usize = 256;
/// How long a stranger has to show a token.
const PATIENCE: Duration = Duration::from_secs(10);
/// Connections at once of those who have shown one.
const MOST_KNOWN: usize = 512;
/// How long a connection that is over may have things unread, and how many such there are at once.
const LINGER: Duration = Duration::from_secs(2);
const MOST_LINGERING: usize = 64;
/// The first byte of a TLS handshake: the type of its record (RFC 8446, 5.1).
const HANDSHAKE: u8 = 22;

/// The other end of a connection.
pub struct Peer {
    /// The network that it is in.
    network: IpAddr,
    state: watch::Sender<State>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Stranger,
    /// It has shown this token last.
    Known(TokenHash),
    /// Its connection is to end.
    Ended,
}

/// All of them.
pub struct Peers {
    all: Mutex<All>,
    /// Connections that are over, and not closed yet.
    lingering: Arc<Semaphore>,
}

#[derive(Default)]
struct All {
    /// Who came first is first.
    strangers: Vec<Arc<Peer>>,
    known: Vec<Arc<Peer>>,
}

/// There are as many connections as there may be.
pub struct Full;

impl Peers {
    /// Nobody.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { all: Mutex::default(), lingering: Arc::new(Semaphore::new(MOST_LINGERING)) })
    }

    /// Takes a connection in, of a stranger at `address`.
    pub fn hold(self: &Arc<Self>, stream: TcpStream, address: IpAddr) -> Held {
        let peer = Arc::new(Peer { network: network_of(address), state: watch::channel(State::Stranger).0 });
        let mut all = self.all();
        if all.strangers.len() >= MOST_STRANGERS {
            all.send_one_away();
        }
        all.strangers.push(peer.clone());
        drop(all);
        let ended = Box::pin(end_of(peer.state.subscribe()));
        Held { stream: Some(stream), peer, peers: self.clone(), ended, is_over: false }
    }

    /// `peer` has shown the token of this hash.
    pub fn admit(&self, peer: &Arc<Peer>, token: TokenHash) -> Result<(), Full> {
        let mut all = self.all();
        if let Some(index) = position(&all.strangers, peer) {
            if all.known.len() >= MOST_KNOWN {
                return Err(Full);
            }
            all.strangers.remove(index);
            all.known.push(peer.clone());
        }
        peer.state.send_if_modified(|state| {
            // One that is to end does so, whatever it shows.
            let goes_on = *state != State::Ended;
            if goes_on {
                *state = State::Known(token);
            }
            goes_on
        });
        Ok(())
    }

    /// Ends the connections of all who have come by this token.
    pub fn end_all_of(&self, token: &TokenHash) {
        let all = self.all();
        for peer in all.known.iter().filter(|peer| *peer.state.borrow() == State::Known(*token)) {
            peer.state.send_replace(State::Ended);
        }
    }

    fn forget(&self, peer: &Arc<Peer>) {
        let mut all = self.all();
        all.strangers.retain(|other| !Arc::ptr_eq(other, peer));
        all.known.retain(|other| !Arc::ptr_eq(other, peer));
    }

    fn all(&self) -> MutexGuard<'_, All> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl All {
    /// Whoever sends many sends their own away, and nobody else's.
    fn send_one_away(&mut self) {
        let mut counts = HashMap::new();
        self.strangers.iter().for_each(|peer| *counts.entry(peer.network).or_insert(0) += 1);
        let most = counts.values().max();
        if let Some(index) = self.strangers.iter().position(|peer| counts.get(&peer.network) == most) {
            self.strangers.remove(index).state.send_replace(State::Ended);
        }
    }
}

fn position(peers: &[Arc<Peer>], peer: &Arc<Peer>) -> Option<usize> {
    peers.iter().position(|other| Arc::ptr_eq(other, peer))
}

/// Of an IPv6 address its /64, for that is what one host has.
fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address => address,
    }
}

/// Returns when a connection is to end: a stranger's time is over, or somebody says so.
async fn end_of(mut state: watch::Receiver<State>) {
    let is_admitted = timeout(PATIENCE, state.wait_for(|state| *state != State::Stranger)).await.is_ok();
    if is_admitted {
        // The sender is the peer, which whoever has the connection holds.
        let _ = state.wait_for(|state| *state == State::Ended).await;
    }
}

/// A connection that ends when it is to, whoever has it by then: a websocket is no longer the server's.
pub struct Held {
    /// There until it is dropped.
    stream: Option<TcpStream>,
    peer: Arc<Peer>,
    peers: Arc<Peers>,
    /// Is done when it is to end.
    ended: Pin<Box<dyn Future<Output = ()> + Send>>,
    is_over: bool,
}

impl Held {
    /// Its other end.
    pub fn peer(&self) -> Arc<Peer> {
        self.peer.clone()
    }

    /// An error if it is to end; else the task is woken when it is.
    fn go_on(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        self.is_over = self.is_over || self.ended.as_mut().poll(context).is_ready();
        if self.is_over { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }

    fn stream(&mut self) -> io::Result<&mut TcpStream> {
        self.stream.as_mut().ok_or(io::ErrorKind::NotConnected.into())
    }

    /// Waits for the first byte, and says whether it is one of TLS.
    pub async fn speaks_tls(&mut self) -> io::Result<bool> {
        let (Some(stream), mut first) = (&self.stream, [0]) else { return Err(io::ErrorKind::NotConnected.into()) };
        tokio::select! {
            length = stream.peek(&mut first) => Ok(length? == 1 && first[0] == HANDSHAKE),
            () = &mut self.ended => {
                self.is_over = true;
                Err(io::ErrorKind::ConnectionAborted.into())
            }
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.peers.forget(&self.peer);
        let lingering = self.peers.lingering.clone().try_acquire_owned();
        if let (false, Some(stream), Ok(permit), Ok(runtime)) =
            (self.is_over, self.stream.take(), lingering, Handle::try_current())
        {
            runtime.spawn(async move {
                let _ = timeout(LINGER, drain(stream)).await;
                drop(permit);
            });
        }
    }
}

/// Takes what the other end goes on sending: a connection with something unread is reset when it is closed, and the
/// other end loses the answer that says why.
async fn drain(mut stream: TcpStream) -> io::Result<()> {
    stream.shutdown().await?;
    let mut piece = vec![0; 64 << 10];
    while stream.read(&mut piece).await? > 0 {}
    Ok(())
}

impl AsyncRead for Held {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.go_on(context)?;
        Pin::new(self.stream()?).poll_read(context, to)
    }
}

impl AsyncWrite for Held {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.go_on(context)?;
        Pin::new(self.stream()?).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.stream()?).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.stream()?).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stranger(network: [u8; 4]) -> Arc<Peer> {
        Arc::new(Peer { network: network.into(), state: watch::channel(State::Stranger).0 })
    }

    #[test]
    fn who_sends_many_sends_their_own_away() {
        let (flood, one) = ([192, 0, 2, 1], [192, 0, 2, 2]);
        let strangers = [one, flood, flood, one, flood].map(stranger).to_vec();
        let mut all = All { strangers: strangers.clone(), known: Vec::new() };
        all.send_one_away();
        let ended: Vec<_> = strangers.iter().map(|peer| *peer.state.borrow() == State::Ended).collect();
        assert_eq!(ended, [false, true, false, false, false]);
        assert_eq!(all.strangers.len(), 4);
    }

    #[test]
    fn one_host_is_one_network() {
        let network = |address: &str| network_of(address.parse().unwrap());
        assert_eq!(network("::ffff:192.0.2.1"), network("192.0.2.1"));
        assert_ne!(network("192.0.2.2"), network("192.0.2.1"));
        assert_eq!(network("2001:db8:0:1::1"), network("2001:db8:0:1:ffff::2"));
        assert_ne!(network("2001:db8:0:1::1"), network("2001:db8:0:2::1"));
    }

    #[test]
    fn a_token_that_is_deleted_takes_its_connections_with_it() {
        let (peers, ours, theirs) = (Peers::new(), stranger([192, 0, 2, 1]), stranger([192, 0, 2, 1]));
        peers.all().strangers = vec![ours.clone(), theirs.clone()];
        assert!(peers.admit(&ours, [1; 32]).is_ok() && peers.admit(&theirs, [2; 32]).is_ok());
        peers.end_all_of(&[1; 32]);
        assert!(*ours.state.borrow() == State::Ended && *theirs.state.borrow() == State::Known([2; 32]));
        assert!(peers.admit(&ours, [2; 32]).is_ok() && *ours.state.borrow() == State::Ended);
    }
}
