//! A client of the daemon, and of a VM's process: HTTP over a Unix socket.

use std::{
    io,
    path::{Path, PathBuf},
};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response,
    body::{Bytes, Incoming},
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{self, protocol::WebSocketConfig},
};

use crate::{ErrorBody, Reason, unix::Address};

/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 64 << 20;

/// Why there is no answer, or what it says.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens at the socket.
    #[error("nobody listens at {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The host's word.
        source: io::Error,
    },
    /// The other side says no.
    #[error("{0}")]
    Refused(ErrorBody),
    /// The other side ended, or is none of ours.
    #[error("the connection to {} failed: {reason}", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl ClientError {
    /// What the other side said, if it did.
    pub fn refused(&self) -> Option<&ErrorBody> {
        match self {
            Self::Refused(body) => Some(body),
            _ => None,
        }
    }
}

/// A websocket of the other side's.
pub type WebSocket = WebSocketStream<UnixStream>;

/// A client; each request has a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// Of whoever listens at `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// GET.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.request(Method::GET, path, None::<&()>).await
    }

    /// POST.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.request(Method::POST, path, Some(body)).await
    }

    /// PUT.
    pub async fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.request(Method::PUT, path, Some(body)).await
    }

    /// PATCH.
    pub async fn patch<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.request(Method::PATCH, path, Some(body)).await
    }

    /// DELETE.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.request(Method::DELETE, path, None::<&()>).await
    }

    /// GET, of what is no JSON.
    pub async fn bytes(&self, path: &str) -> Result<Vec<u8>, ClientError> {
        Ok(self.ask(Method::GET, path, None::<&()>).await?.to_vec())
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let answer = self.ask(method, path, body).await?;
        let answer: &[u8] = if answer.is_empty() { b"null" } else { &answer };
        serde_json::from_slice(answer).map_err(|e| self.broken(format!("its answer makes no sense: {e}")))
    }

    async fn ask(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> Result<Bytes, ClientError> {
        let body = body.map(serde_json::to_vec).transpose().map_err(|e| self.broken(e))?.unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| self.broken(e))?;
        let stream = self.connect().await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| self.broken(e))?;
        let connection = tokio::spawn(connection);
        let answer = sender.send_request(request).await.map_err(|e| self.broken(e));
        let answer = match answer {
            Ok(answer) => self.read(answer).await,
            Err(error) => Err(error),
        };
        connection.abort();
        answer
    }

    async fn read(&self, answer: Response<Incoming>) -> Result<Bytes, ClientError> {
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await.map_err(|e| self.broken(e))?.to_bytes();
        if status.is_success() { Ok(body) } else { Err(ClientError::Refused(error_body(status.as_u16(), &body))) }
    }

    /// A websocket at `path`.
    pub async fn websocket(&self, path: &str) -> Result<WebSocket, ClientError> {
        let stream = self.connect().await?;
        // What waits to be sent is sent at once; a message of a megabyte is the longest that there is.
        let config = WebSocketConfig::default().max_message_size(Some(4 << 20)).write_buffer_size(0);
        let connected = client_async_with_config(format!("ws://localhost{path}"), stream, Some(config)).await;
        match connected {
            Ok((socket, _)) => Ok(socket),
            Err(tungstenite::Error::Http(answer)) => {
                let body = answer.body().as_deref().unwrap_or_default();
                Err(ClientError::Refused(error_body(answer.status().as_u16(), body)))
            }
            Err(error) => Err(self.broken(error)),
        }
    }

    async fn connect(&self) -> Result<UnixStream, ClientError> {
        let connect = async { UnixStream::connect(Address::of(&self.socket)?.path()).await };
        connect.await.map_err(|source| ClientError::Connect { path: self.socket.clone(), source })
    }

    fn broken(&self, reason: impl std::fmt::Display) -> ClientError {
        ClientError::Broken { path: self.socket.clone(), reason: reason.to_string() }
    }
}

/// What an answer says; where it says nothing that is understood, its status.
fn error_body(status: u16, body: &[u8]) -> ErrorBody {
    serde_json::from_slice(body).unwrap_or_else(|_| {
        let text = String::from_utf8_lossy(body);
        let text = text.lines().next().unwrap_or_default();
        ErrorBody::new(Reason::Failed, format!("status {status} {text}"))
    })
}
