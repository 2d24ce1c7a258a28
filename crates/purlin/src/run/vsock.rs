//! `--vsock PATH[,cid=N]`.

use std::path::PathBuf;

use anyhow::Result;
use purlin_vmm::vsock::{GUEST_CIDS, HostSocket};

use crate::machine::disk::split;

/// The context ID of a guest that is not given one.
const DEFAULT_CID: u32 = 3;

/// Sockets between the guest and the host, as the command line has them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vsock {
    /// The host's Unix socket.
    path: PathBuf,
    /// The guest's context ID.
    pub cid: u32,
}

impl Vsock {
    /// Creates the socket, which goes when this is dropped.
    pub fn open(&self) -> Result<HostSocket> {
        Ok(HostSocket::bind(&self.path)?)
    }
}

/// Reads the option. A comma in the path is written twice.
pub fn parse(text: &str) -> Result<Vsock, String> {
    let mut parts = split(text).into_iter();
    let path = parts.next().filter(|path| !path.is_empty()).ok_or("it begins with the path of the socket to create")?;
    let mut vsock = Vsock { path: path.into(), cid: DEFAULT_CID };
    for part in parts {
        let cid = part.strip_prefix("cid=").ok_or_else(|| format!("'{part}' is not cid=N"))?;
        let number = cid.parse().ok().filter(|cid| GUEST_CIDS.contains(cid));
        let (first, last) = GUEST_CIDS.into_inner();
        vsock.cid = number.ok_or_else(|| format!("'cid={cid}': it is a number from {first} to {last}"))?;
    }
    Ok(vsock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets() {
        assert_eq!(parse("a b.sock"), Ok(Vsock { path: "a b.sock".into(), cid: 3 }));
        assert_eq!(parse("/run/a,,b,cid=4294967294"), Ok(Vsock { path: "/run/a,b".into(), cid: u32::MAX - 1 }));
        for wrong in ["", ",cid=3", "a,cid=2", "a,cid=4294967295", "a,cid=-1", "a,cid", "a,port=5", "a,"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
