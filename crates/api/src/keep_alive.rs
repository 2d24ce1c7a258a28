//! TCP connections that are quiet for long, and may have lost their other end.

use std::{io, os::fd::AsFd, time::Duration};

use rustix::net::sockopt;

/// How long a connection is quiet before the other end is asked whether it is there.
const QUIET: Duration = Duration::from_secs(60);
/// How often it is asked, and how many times in vain.
const AGAIN: Duration = Duration::from_secs(15);
const TIMES: u32 = 4;

/// Has the kernel end a connection whose other end is gone, within two minutes, and not wait before it sends what is short.
pub fn set(stream: &impl AsFd) -> io::Result<()> {
    sockopt::set_tcp_nodelay(stream, true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, QUIET)?;
    sockopt::set_tcp_keepintvl(stream, AGAIN)?;
    Ok(sockopt::set_tcp_keepcnt(stream, TIMES)?)
}
