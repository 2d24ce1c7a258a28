//! A daemon on the network: TLS 1.3 over TCP. Its certificate is known by its fingerprint, and by nothing else; nothing is
//! said to one that has another.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hyper::{Uri, header::HeaderValue, http::uri::Scheme};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::ClientError;
use crate::{Fingerprint, keep_alive};

/// How long the other side may take to accept a connection, and again to say who it is.
const PATIENCE: Duration = Duration::from_secs(10);
/// The port of a URL that has none (RFC 9110, 4.2.2).
const DEFAULT_PORT: u16 = 443;

/// A daemon on the network.
#[derive(Clone, Debug)]
pub struct Remote {
    host: String,
    port: u16,
    name: ServerName<'static>,
    authorization: HeaderValue,
    tls: Arc<ClientConfig>,
    identity: Arc<Identity>,
}

/// That cannot be the way to a daemon.
#[derive(Debug, thiserror::Error)]
pub enum InvalidRemote {
    /// Its place.
    #[error("'{0}' is no place of a daemon: that is written as https://HOST:PORT")]
    Url(String),
    /// The token.
    #[error("the token has characters that no token has: it is what 'purlin token create' has printed")]
    Token,
    /// TLS.
    #[error("cannot speak TLS: {0}")]
    Tls(#[from] rustls::Error),
}

impl Remote {
    /// The one at `url`, which is `https://HOST[:PORT]`, for whoever has `token`. It is the one whose certificate has the
    /// fingerprint `expected`; without that, none is.
    pub fn new(url: &str, token: &str, expected: Option<Fingerprint>) -> Result<Self, InvalidRemote> {
        let (host, port) = parse(url).ok_or_else(|| InvalidRemote::Url(url.escape_debug().to_string()))?;
        let bare = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(bare).map_err(|_| InvalidRemote::Url(url.escape_debug().to_string()))?;
        let mut authorization = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| InvalidRemote::Token)?;
        authorization.set_sensitive(true);
        let provider = Arc::new(ring::default_provider());
        let identity = Arc::new(Identity { expected, seen: Mutex::default(), provider: provider.clone() });
        let mut tls = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(identity.clone())
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { host, port, name, authorization, tls: Arc::new(tls), identity })
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("https://{}:{}", self.host, self.port)
    }

    /// Asks it for its certificate, and says nothing else: the fingerprint.
    pub async fn look(&self) -> Result<Fingerprint, ClientError> {
        match self.connect().await {
            Ok(_) => self.identity.seen().ok_or_else(|| self.broken("it has no certificate")),
            Err(ClientError::Untrusted { seen, .. }) => Ok(seen),
            Err(error) => Err(error),
        }
    }

    pub(super) fn host_header(&self) -> HeaderValue {
        // It was part of a URL.
        HeaderValue::from_str(&format!("{}:{}", self.host, self.port)).unwrap_or(HeaderValue::from_static("localhost"))
    }

    pub(super) fn authorization(&self) -> HeaderValue {
        self.authorization.clone()
    }

    pub(super) async fn connect(&self) -> Result<TlsStream<TcpStream>, ClientError> {
        let address = format!("{}:{}", self.host, self.port);
        let connected = timeout(PATIENCE, TcpStream::connect(address)).await;
        let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let stream = connected.and_then(|stream| keep_alive::set(&stream).map(|()| stream));
        let stream = stream.map_err(|source| ClientError::Connect { place: self.url(), source })?;
        let shaken = timeout(PATIENCE, TlsConnector::from(self.tls.clone()).connect(self.name.clone(), stream)).await;
        match shaken {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => match self.identity.seen().filter(|seen| Some(*seen) != self.identity.expected) {
                Some(seen) => Err(ClientError::Untrusted { place: self.url(), seen }),
                None => Err(self.broken(error)),
            },
            Err(_) => Err(self.broken("it does not answer in TLS")),
        }
    }

    fn broken(&self, reason: impl ToString) -> ClientError {
        ClientError::Broken { place: self.url(), reason: reason.to_string() }
    }
}

/// Its host, an IPv6 address in brackets, and port.
fn parse(url: &str) -> Option<(String, u16)> {
    let uri: Uri = url.parse().ok()?;
    let authority = uri.authority()?;
    let is_bare = uri.path_and_query().is_none_or(|rest| rest.as_str() == "/") && !authority.as_str().contains('@');
    let port = if authority.as_str() == authority.host() { DEFAULT_PORT } else { authority.port_u16()? };
    (uri.scheme() == Some(&Scheme::HTTPS) && is_bare && !authority.host().is_empty())
        .then(|| (authority.host().to_owned(), port))
}

/// Who the other side is to be.
#[derive(Debug)]
struct Identity {
    expected: Option<Fingerprint>,
    /// The fingerprint of the certificate that was shown last.
    seen: Mutex<Option<Fingerprint>>,
    provider: Arc<CryptoProvider>,
}

impl Identity {
    fn seen(&self) -> Option<Fingerprint> {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ServerCertVerifier for Identity {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let seen = Fingerprint::of(certificate);
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(seen);
        if self.expected == Some(seen) {
            return Ok(ServerCertVerified::assertion());
        }
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken".into()))
    }

    /// That the other side has the certificate's key.
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_daemons() {
        let at = |url| Remote::new(url, "t", None).map(|remote| remote.url()).ok();
        assert_eq!(at("https://h:8443").unwrap(), "https://h:8443");
        assert_eq!(at("https://[::1]:8443/").unwrap(), "https://[::1]:8443");
        assert_eq!(at("https://192.0.2.1").unwrap(), "https://192.0.2.1:443");
        for wrong in [
            "",
            "h:8443",
            "http://h:1",
            "https://h:1/1.0",
            "https://u@h:1",
            "https://:1",
            "https://h:99999",
            "https://h:1?x",
        ] {
            assert_eq!(at(wrong), None, "{wrong}");
        }
        assert!(matches!(Remote::new("https://h", "a\nb", None), Err(InvalidRemote::Token)));
    }
}
