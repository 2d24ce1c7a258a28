//! Images from elsewhere: a file or a URL becomes a qcow2 image of its own in the store.

use std::{
    fs::File,
    io::{Read, Write},
    path::Path,
    time::Duration,
};

use purlin_debian::{Error as HostError, Progress, cache};
use purlin_storage::{Conversion, Format, SourceFormat};

use crate::{
    Error, Metadata, Origin,
    store::{Image, Store, disk_name},
};

/// What to import.
#[derive(Clone, Debug)]
pub struct Import<'a> {
    /// A path, or a URL with http or https.
    pub source: &'a str,
    /// The new image's name.
    pub name: &'a str,
    /// The source's format; its content decides without one.
    pub format: Option<SourceFormat>,
    /// The checksum that the source must have, in hexadecimal.
    pub sha256: Option<&'a str>,
}

impl Import<'_> {
    /// What can be known to be wrong before anything is fetched.
    pub fn check(&self, store: &Store) -> Result<(), Error> {
        self.check_scheme()?;
        if let Some(sum) = self.sha256.filter(|sum| !is_sha256(sum)) {
            return Err(Error::NoChecksum(sum.chars().take(80).collect()));
        }
        match store.get(self.name) {
            Err(Error::NoImage(_)) => Ok(()),
            Ok(_) => Err(Error::Exists(self.name.into())),
            Err(other) => Err(other),
        }
    }

    /// Makes the image.
    pub fn run(&self, store: &Store, progress: &dyn Progress) -> Result<Image, Error> {
        self.add(store, progress, |new, work| {
            if !is_url(self.source) {
                return self.take(Path::new(self.source), self.origin(), new, progress);
            }
            let file = work.join("download");
            download(self.source, &file, progress)?;
            self.take(&file, self.origin(), new, progress)
        })
    }

    /// Makes the image of what `data` has, of which there are `length` bytes, if that is known. The source is only what it
    /// is called where it comes from.
    pub fn run_on(
        &self,
        data: &mut dyn Read,
        length: Option<u64>,
        store: &Store,
        progress: &dyn Progress,
    ) -> Result<Image, Error> {
        self.add(store, progress, |new, work| {
            let file = work.join("upload");
            progress.step(&format!("receiving {}", self.source));
            receive(data, length, &file, progress, |reason| Error::Upload { reason })?;
            self.take(&file, self.source.to_owned(), new, progress)
        })
    }

    fn add(
        &self,
        store: &Store,
        progress: &dyn Progress,
        make: impl FnOnce(&Path, &Path) -> Result<Metadata, Error>,
    ) -> Result<Image, Error> {
        let lock = store.lock(self.name, progress)?;
        // With the lock: another process may have made it.
        self.check(store)?;
        store.add(&lock, self.name, make)
    }

    fn take(&self, file: &Path, origin: String, new: &Path, progress: &dyn Progress) -> Result<Metadata, Error> {
        if let Some(wanted) = self.sha256 {
            progress.step("comparing the checksum");
            let found = cache::checksum(file).map_err(HostError::file("read", file))?;
            if !found.eq_ignore_ascii_case(wanted) {
                return Err(Error::Checksum { what: self.source.into(), found, wanted: wanted.into() });
            }
        }
        let format = match self.format {
            Some(format) => format,
            None => SourceFormat::of_content(file)?,
        };
        if format == SourceFormat::Disk(Format::Raw) {
            refuse_compressed(file)?;
            self.check_name()?;
        }
        progress.step(&format!("converting from {format}"));
        let disk = new.join(disk_name(Format::Qcow2));
        // A stranger's image must not name files of this host.
        let conversion = Conversion { source: (file, format), target: (&disk, Format::Qcow2), other_files: false };
        conversion.run(&mut |done, all| progress.fraction(done as f64 / all.max(1) as f64))?;
        if progress.cancelled() {
            return Err(HostError::Cancelled.into());
        }
        let size = purlin_storage::info(&disk, Some(Format::Qcow2))?.virtual_size;
        let metadata = Metadata::of_disk(&disk, Format::Qcow2, size, Origin::Imported(origin));
        Ok(metadata.map_err(HostError::file("read", &disk))?)
    }

    /// A URL of another kind is no file's name that has a misprint.
    fn check_scheme(&self) -> Result<(), Error> {
        let looks_like_url = self.source.contains("://") && !Path::new(self.source).exists();
        if looks_like_url && !is_url(self.source) {
            return Err(Error::Scheme(public_part(self.source)));
        }
        Ok(())
    }

    /// A raw disk that is called otherwise is mostly a download of something else, such as a page that says why not. (Of
    /// VMDKs, the files with the data are raw.)
    fn check_name(&self) -> Result<(), Error> {
        let source = if is_url(self.source) { public_part(self.source) } else { self.source.to_owned() };
        let named = Path::new(&source).extension().and_then(|e| e.to_str()?.to_lowercase().parse().ok());
        match named {
            Some(format @ (SourceFormat::Disk(Format::Qcow2) | SourceFormat::Vhdx | SourceFormat::Vdi))
                if self.format.is_none() =>
            {
                Err(Error::Misnamed { source_name: source, format })
            }
            _ => Ok(()),
        }
    }

    /// Without what may be secret in a URL.
    fn origin(&self) -> String {
        if !is_url(self.source) {
            let path = std::path::absolute(self.source).unwrap_or_else(|_| self.source.into());
            return path.to_string_lossy().into_owned();
        }
        public_part(self.source)
    }
}

/// Whether a source is one that is fetched.
pub fn is_url(source: &str) -> bool {
    let scheme = source.split_once("://").map_or("", |(scheme, _)| scheme);
    ["http", "https"].iter().any(|known| scheme.eq_ignore_ascii_case(known))
}

/// Whether it is a SHA-256 checksum as sha256sum(1) writes it, in digits of either case.
pub fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// A URL without a query, a user's name and a password.
fn public_part(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    format!("{scheme}://{}/{path}", host.rsplit_once('@').map_or(host, |(_, host)| host))
}

/// The most bytes that are fetched or received; a disk with more data does not come as one file.
pub const MAX_BYTES: u64 = 1 << 40;

fn download(url: &str, to: &Path, progress: &dyn Progress) -> Result<(), Error> {
    let failed = |reason: String| Error::Download { url: public_part(url), reason };
    progress.step(&format!("fetching {}", public_part(url)));
    let config = ureq::Agent::config_builder()
        .timeout_connect(Some(Duration::from_secs(30)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        .user_agent(concat!("purlin/", env!("CARGO_PKG_VERSION")));
    // The host's own certificates.
    let tls = ureq::tls::TlsConfig::builder().root_certs(ureq::tls::RootCerts::PlatformVerifier).build();
    let agent = ureq::Agent::new_with_config(config.tls_config(tls).build());
    let mut response = agent.get(url).call().map_err(|error| failed(error.to_string()))?;
    let all = response.body().content_length();
    let mut body = response.body_mut().with_config().limit(MAX_BYTES).reader();
    receive(&mut body, all, to, progress, failed)
}

/// Writes what comes to a file.
fn receive(
    data: &mut dyn Read,
    all: Option<u64>,
    to: &Path,
    progress: &dyn Progress,
    failed: impl Fn(String) -> Error,
) -> Result<(), Error> {
    let mut file = File::create(to).map_err(HostError::file("create", to))?;
    let (mut buffer, mut done) = (vec![0; 256 << 10], 0_u64);
    loop {
        if progress.cancelled() {
            return Err(HostError::Cancelled.into());
        }
        let count = data.read(&mut buffer).map_err(|error| failed(error.to_string()))?;
        if count == 0 {
            break;
        }
        file.write_all(&buffer[..count]).map_err(HostError::file("write", to))?;
        done += count as u64;
        if let Some(all) = all {
            progress.fraction(done as f64 / all.max(1) as f64);
        }
    }
    match all {
        Some(all) if all != done => Err(failed(format!("it ended after {done} of {all} bytes"))),
        _ => Ok(()),
    }
}

/// A compressed file would become a disk of nonsense.
fn refuse_compressed(path: &Path) -> Result<(), Error> {
    const SIGNATURES: [(&[u8], &str, &str); 5] = [
        (&[0x1f, 0x8b], "gzip", "gunzip"),
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz", "unxz"),
        (&[0x28, 0xb5, 0x2f, 0xfd], "zstd", "unzstd"),
        (b"BZh", "bzip2", "bunzip2"),
        (b"PK\x03\x04", "zip", "unzip"),
    ];
    let mut start = Vec::new();
    let read = File::open(path).and_then(|file| file.take(8).read_to_end(&mut start));
    read.map_err(HostError::file("read", path))?;
    match SIGNATURES.iter().find(|(signature, ..)| start.starts_with(signature)) {
        Some((_, format, tool)) => Err(Error::Compressed { path: path.to_owned(), format, tool }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{BufRead, BufReader},
        net::TcpListener,
        thread,
    };

    use super::*;

    struct Silent;

    impl Progress for Silent {
        fn step(&self, _what: &str) {}
        fn fraction(&self, _done: f64) {}
        fn note(&self, _what: &str) {}
    }

    fn import(dir: &Path, source: &str, sha256: Option<&str>) -> Result<Image, Error> {
        let import = Import { source, name: "x", format: None, sha256 };
        import.run(&Store::at(dir.join("images")), &Silent)
    }

    /// A server for one request; its URL.
    fn serve(head: String, body: Vec<u8>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://me:secret@{}/disk.img?token=1", listener.local_addr().unwrap());
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = BufReader::new(stream.try_clone().unwrap());
            let mut line = String::new();
            while request.read_line(&mut line).unwrap() > 2 {
                line.clear();
            }
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
        });
        url
    }

    fn disk() -> Vec<u8> {
        (0..1_u32 << 20).map(|i| if i < 4096 { (i % 251) as u8 } else { 0 }).collect()
    }

    #[test]
    fn a_file_by_its_checksum() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk.img");
        fs::write(&file, disk()).unwrap();
        let sum = cache::checksum(&file).unwrap();
        let source = file.to_str().unwrap();
        assert!(matches!(import(dir.path(), source, Some(&"00".repeat(32))), Err(Error::Checksum { .. })));
        assert!(matches!(import(dir.path(), source, Some("00")), Err(Error::NoChecksum(_))));
        let image = import(dir.path(), source, Some(&sum.to_uppercase())).unwrap();
        assert_eq!(image.metadata.virtual_size, 1 << 20);
        let mut content = vec![0; 1 << 20];
        purlin_storage::open_read_only(&image.disk(), None).unwrap().read_at(&mut content, 0).unwrap();
        assert_eq!(content, disk());
        assert!(matches!(import(dir.path(), source, None), Err(Error::Exists(_))));
    }

    #[test]
    fn a_url() {
        let dir = tempfile::tempdir().unwrap();
        let url = serve(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 1 << 20), disk());
        let image = import(dir.path(), &url, None).unwrap();
        let origin = image.metadata.origin.to_string();
        assert!(origin.ends_with("/disk.img") && !origin.contains("secret"), "{origin}");
    }

    #[test]
    fn what_cannot_be_fetched_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        for url in [
            serve("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".into(), vec![]),
            serve("HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n".into(), vec![0; 512]),
        ] {
            let error = import(dir.path(), &url, None).unwrap_err().to_string();
            assert!(error.starts_with("cannot fetch") && !error.contains("secret"), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
        assert!(Store::at(dir.path().join("images")).list().unwrap().is_empty());
    }

    #[test]
    fn what_is_no_disk() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk.img.xz");
        for content in [b"\xfd7zXZ\0 and so on".to_vec(), vec![], b"QFI\xfb".to_vec()] {
            fs::write(&file, &content).unwrap();
            let error = import(dir.path(), file.to_str().unwrap(), None).unwrap_err().to_string();
            assert!(error.contains("disk.img.xz") && !error.contains('\n'), "{error}");
        }
        assert!(import(dir.path(), "/nowhere/x", None).unwrap_err().to_string().contains("/nowhere/x"));
        assert!(matches!(import(dir.path(), "ftp://x.test/disk.img", None), Err(Error::Scheme(_))));
        assert_eq!(fs::read_dir(dir.path().join("images")).unwrap().count(), 0);
    }

    #[test]
    fn a_name_that_the_content_belies() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk.qcow2");
        fs::write(&file, [b'<'; 512]).unwrap();
        let source = file.to_str().unwrap();
        let error = import(dir.path(), source, None).unwrap_err().to_string();
        assert!(error.contains("its name says qcow2, but it does not begin as one"), "{error}");
        let raw = Import { source, name: "x", format: Some(SourceFormat::Disk(Format::Raw)), sha256: None };
        raw.run(&Store::at(dir.path().join("images")), &Silent).unwrap();
    }
}
