//! The daemon's certificate: its own, which it makes at first, or the user's.

use std::{
    fs::{self, File},
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::Arc,
};

use purlin_api::Fingerprint;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, KeyUsagePurpose};
use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

use crate::error::StartError;

/// The files of the daemon's own.
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";

/// The one that the daemon has made in `data`, or makes now; `at` is where it will listen.
pub fn own(data: &Path, at: IpAddr) -> Result<(ServerConfig, Fingerprint), StartError> {
    let (certificate, key) = (data.join(CERTIFICATE), data.join(KEY));
    if !certificate.exists() {
        make(&certificate, &key, at)?;
    }
    read(&certificate, &key)
}

/// The one in these files, and what it is known by. The first certificate is the daemon's, further ones lead to whoever
/// vouches for it.
pub fn read(certificate: &Path, key: &Path) -> Result<(ServerConfig, Fingerprint), StartError> {
    let wrong = |path: &Path, reason: &dyn ToString| StartError::Certificate {
        path: path.to_owned(),
        reason: reason.to_string(),
    };
    let text = fs::read(certificate).map_err(StartError::host("read", certificate))?;
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(&text).collect::<Result<_, _>>().map_err(|e| wrong(certificate, &e))?;
    let first = chain.first().ok_or_else(|| wrong(certificate, &"it has no certificate in PEM"))?;
    let fingerprint = Fingerprint::of(first);
    let text = fs::read(key).map_err(StartError::host("read", key))?;
    let secret = PrivateKeyDer::from_pem_slice(&text).map_err(|e| wrong(key, &e))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, secret))
        .map_err(|e| wrong(certificate, &e))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok((config, fingerprint))
}

/// Makes one, for the names that this host is reached by.
fn make(certificate: &Path, key: &Path, at: IpAddr) -> Result<(), StartError> {
    let wrong = |e: rcgen::Error| StartError::Certificate { path: certificate.to_owned(), reason: e.to_string() };
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let addresses = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST), at];
    let mut names = vec!["localhost".to_owned()];
    // A host's name need not be one that a certificate can have.
    names.extend(Some(host).filter(|host| host.is_ascii() && !host.is_empty()));
    names.extend(addresses.iter().filter(|address| !address.is_unspecified()).map(IpAddr::to_string));
    names.sort();
    names.dedup();
    let secret = KeyPair::generate().map_err(wrong)?;
    let mut params = CertificateParams::new(names).map_err(wrong)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "Purlin");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let made = params.self_signed(&secret).map_err(wrong)?;
    // The key first: where there is a certificate, there is its key.
    write(key, &secret.serialize_pem()).map_err(StartError::host("write", key))?;
    write(certificate, &made.pem()).map_err(StartError::host("write", certificate))
}

/// Writes it whole, for the daemon's user alone.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_added_extension("new");
    let _ = fs::remove_file(&new);
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_daemons_own_certificate_stays_and_nobody_else_reads_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let at = IpAddr::from([192, 0, 2, 1]);
        let (_, fingerprint) = own(dir.path(), at).unwrap();
        assert_eq!(own(dir.path(), at).unwrap().1, fingerprint);
        let mode = fs::metadata(dir.path().join(KEY)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // One that was made in part is made anew.
        fs::remove_file(dir.path().join(CERTIFICATE)).unwrap();
        assert_ne!(own(dir.path(), at).unwrap().1, fingerprint);
    }

    #[test]
    fn files_that_are_no_certificate_and_key_are_refused() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for dir in [&dir, &other] {
            own(dir.path(), IpAddr::from([192, 0, 2, 1])).unwrap();
        }
        let (certificate, key) = (dir.path().join(CERTIFICATE), dir.path().join(KEY));
        let nothing = dir.path().join("nothing");
        fs::write(&nothing, "nothing").unwrap();
        assert!(read(&certificate, &key).is_ok());
        for (certificate, key) in [
            (&certificate, &other.path().join(KEY)),
            (&certificate, &certificate),
            (&key, &key),
            (&nothing, &key),
            (&certificate, &nothing),
            (&certificate, &dir.path().join("missing")),
        ] {
            let error = read(certificate, key).unwrap_err().to_string();
            assert!(error.contains(&*dir.path().to_string_lossy()) && !error.contains('\n'), "{error}");
        }
    }
}
