//! What can go wrong before there is anybody to tell but whoever started the daemon.

use std::{io, net::SocketAddr, path::PathBuf};

/// Why the daemon cannot run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another one has its place.
    #[error("a daemon runs already; 'purlin daemon stop' ends it")]
    Running,
    /// A file or directory of its own.
    #[error("cannot {what} {}: {source}", path.display())]
    Host {
        /// What it was about to do.
        what: &'static str,
        /// With which.
        path: PathBuf,
        /// The host's word.
        source: io::Error,
    },
    /// The socket on the network.
    #[error("cannot listen at {at}: {source}")]
    Listen {
        /// Where.
        at: SocketAddr,
        /// The host's word.
        source: io::Error,
    },
    /// The certificate, or its key.
    #[error("{} is of no use for TLS: {reason}", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The database.
    #[error("the database {} cannot be opened: {reason}", path.display())]
    Database {
        /// It.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl StartError {
    /// A [`StartError::Host`].
    pub(crate) fn host(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Host { what, path, source }
    }
}
