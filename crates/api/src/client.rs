//! A client of the daemon, and of a VM's process: HTTP over a Unix socket, or by TLS over TCP.

mod remote;
mod upload;

use std::{error::Error, io, path::PathBuf, sync::Arc};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response,
    body::{Body, Bytes, Incoming},
    header::{AUTHORIZATION, HOST, HeaderMap, HeaderValue},
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
};
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{self, client::IntoClientRequest, protocol::WebSocketConfig},
};

pub use self::remote::{InvalidRemote, Remote};
use crate::{ErrorBody, Fingerprint, Reason, unix::Address};

/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 64 << 20;

/// Why there is no answer, or what it says.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("nobody listens at {place}: {source}")]
    Connect {
        /// The socket, or the URL.
        place: String,
        /// The host's word.
        source: io::Error,
    },
    /// Somebody else's certificate is there.
    #[error(
        "the certificate of {place} is {seen}, not the one that is to be there: somebody else answers, or it has a new \
         one, which 'purlin daemon status' there would show"
    )]
    Untrusted {
        /// The URL.
        place: String,
        /// What is there.
        seen: Fingerprint,
    },
    /// The other side says no.
    #[error("{0}")]
    Refused(ErrorBody),
    /// The other side ended, or is none of ours.
    #[error("the connection to {place} failed: {reason}")]
    Broken {
        /// The socket, or the URL.
        place: String,
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

/// Bytes both ways.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A websocket of the other side's.
pub type WebSocket = WebSocketStream<Box<dyn Stream>>;

/// A client; each request has a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    place: Place,
}

/// Where the other side is.
#[derive(Clone, Debug)]
enum Place {
    Socket(PathBuf),
    Remote(Arc<Remote>),
}

impl Client {
    /// Of whoever listens at `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { place: Place::Socket(socket.into()) }
    }

    /// Of a daemon on the network.
    pub fn of_remote(remote: Remote) -> Self {
        Self { place: Place::Remote(Arc::new(remote)) }
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
        self.send(method, path, "application/json", Full::new(Bytes::from(body))).await
    }

    async fn send<B>(&self, method: Method, path: &str, content_type: &str, body: B) -> Result<Bytes, ClientError>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        let request = Request::builder().method(method).uri(path).header("content-type", content_type);
        let mut request = request.body(body).map_err(|e| self.broken(e))?;
        self.introduce(request.headers_mut());
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
        let request = format!("ws://localhost{path}").into_client_request();
        let mut request = request.map_err(|e| self.broken(e))?;
        self.introduce(request.headers_mut());
        let connected = client_async_with_config(request, stream, Some(config)).await;
        match connected {
            Ok((socket, _)) => Ok(socket),
            Err(tungstenite::Error::Http(answer)) => {
                let body = answer.body().as_deref().unwrap_or_default();
                Err(ClientError::Refused(error_body(answer.status().as_u16(), body)))
            }
            Err(error) => Err(self.broken(error)),
        }
    }

    /// Whom it is for, and who asks.
    fn introduce(&self, headers: &mut HeaderMap) {
        match &self.place {
            Place::Socket(_) => drop(headers.insert(HOST, HeaderValue::from_static("localhost"))),
            Place::Remote(remote) => {
                headers.insert(HOST, remote.host_header());
                headers.insert(AUTHORIZATION, remote.authorization());
            }
        }
    }

    async fn connect(&self) -> Result<Box<dyn Stream>, ClientError> {
        match &self.place {
            Place::Remote(remote) => Ok(Box::new(remote.connect().await?)),
            Place::Socket(path) => {
                let connect = async { UnixStream::connect(Address::of(path)?.path()).await };
                let connected = connect.await.map_err(|source| ClientError::Connect { place: self.place(), source });
                Ok(Box::new(connected?))
            }
        }
    }

    fn place(&self) -> String {
        match &self.place {
            Place::Socket(path) => path.display().to_string(),
            Place::Remote(remote) => remote.url(),
        }
    }

    fn broken(&self, reason: impl std::fmt::Display) -> ClientError {
        ClientError::Broken { place: self.place(), reason: reason.to_string() }
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
