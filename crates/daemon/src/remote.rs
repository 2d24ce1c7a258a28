//! The API on TCP: by TLS, and for whoever has a token.
//!
//! A connection belongs to a [`peer::Peer`], a stranger at first: there are so many strangers at once, and each has so much time
//! to show a token, whatever it does meanwhile. From then on it is an administrator, as those at the Unix socket are.

pub mod authorize;
mod certificate;
pub mod peer;

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use axum::{Extension, Router};
use purlin_api::{
    Fingerprint, Reason, keep_alive,
    server::{EXHAUSTED, Refusal, serve_one},
};
use tokio::{io::AsyncWriteExt, net::TcpListener, time::sleep};
use tokio_rustls::TlsAcceptor;

use self::peer::{Held, Peers};
use crate::error::StartError;

/// Where to listen on TCP, and as whom.
#[derive(Clone, Debug)]
pub struct Listen {
    /// The address and port; port 0 is one that is free.
    pub at: SocketAddr,
    /// The files of a certificate and its key, in PEM, if it is not to be the daemon's own.
    pub certificate: Option<(PathBuf, PathBuf)>,
}

/// Where a daemon listens on TCP, and what its certificate is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listening {
    /// The address and port.
    pub at: SocketAddr,
    /// The certificate's.
    pub fingerprint: Fingerprint,
}

/// A socket that listens, with nobody served yet.
pub struct Listener {
    socket: TcpListener,
    tls: TlsAcceptor,
    /// What others are told.
    pub told: Listening,
}

impl Listener {
    /// Begins to listen. The daemon's own certificate is in `data`, and made where there is none.
    pub async fn open(listen: &Listen, data: &std::path::Path) -> Result<Self, StartError> {
        let (tls, fingerprint) = match &listen.certificate {
            None => certificate::own(data, listen.at.ip())?,
            Some((certificate, key)) => certificate::read(certificate, key)?,
        };
        let cannot = |source| StartError::Listen { at: listen.at, source };
        let socket = TcpListener::bind(listen.at).await.map_err(cannot)?;
        let told = Listening { at: socket.local_addr().map_err(cannot)?, fingerprint };
        Ok(Self { socket, tls: TlsAcceptor::from(Arc::new(tls)), told })
    }

    /// Serves `router`, as long as this is polled.
    pub async fn serve(self, router: Router, peers: Arc<Peers>) {
        loop {
            match self.socket.accept().await {
                Ok((stream, address)) => {
                    // A connection that is gone already says so later.
                    let _ = keep_alive::set(&stream);
                    let held = peers.hold(stream, address.ip());
                    tokio::spawn(meet(held, self.tls.clone(), router.clone()));
                }
                // There are too many descriptors, or the client is gone already.
                Err(_) => sleep(EXHAUSTED).await,
            }
        }
    }
}

/// Serves one connection.
async fn meet(mut held: Held, tls: TlsAcceptor, router: Router) {
    match held.speaks_tls().await {
        Ok(true) => {}
        Ok(false) => return refuse_plain(held).await,
        Err(_) => return,
    }
    let peer = held.peer();
    // Who fails to shake hands has been told so by TLS.
    if let Ok(stream) = tls.accept(held).await {
        serve_one(stream, router.layer(Extension(peer))).await;
    }
}

/// Tells somebody who does not speak TLS that it is spoken here.
async fn refuse_plain(mut held: Held) {
    let Refusal(body) = Refusal::new(Reason::BadRequest, "TLS is spoken at this port: use https");
    let body = serde_json::to_string(&body).unwrap_or_default();
    let head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n";
    let _ = held.write_all(format!("{head}content-length: {}\r\n\r\n{body}", body.len()).as_bytes()).await;
}
