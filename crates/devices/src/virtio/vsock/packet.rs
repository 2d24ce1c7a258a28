//! The header before each packet (virtio 1.3, 5.10.6).

/// The host's context ID (5.10.4).
pub const HOST_CID: u64 = 2;
/// The port that stands for any: nothing has it.
pub const ANY_PORT: u32 = u32::MAX;
/// Stream sockets, the only type that there is here (5.10.6.2).
pub const STREAM: u16 = 1;

/// A SHUTDOWN's flags, also as a set of what is shut down (5.10.6.6.1).
pub mod shut {
    /// The sender will not receive any more.
    pub const RECEIVE: u32 = 1 << 0;
    /// The sender will not send any more.
    pub const SEND: u32 = 1 << 1;
    /// Both.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// To connect.
    Request = 1,
    /// The connection is there.
    Response = 2,
    /// There is no such connection, or none any more.
    Rst = 3,
    /// The sender will not send, or not receive, any more.
    Shutdown = 4,
    /// Data.
    Rw = 5,
    /// Tells how much the sender can receive, as every packet does.
    CreditUpdate = 6,
    /// Asks for that.
    CreditRequest = 7,
}

impl Op {
    /// `None` if the protocol has no such operation.
    pub fn from_number(number: u16) -> Option<Self> {
        use Op::{CreditRequest, CreditUpdate, Request, Response, Rst, Rw, Shutdown};
        [Request, Response, Rst, Shutdown, Rw, CreditUpdate, CreditRequest].into_iter().find(|op| *op as u16 == number)
    }
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    /// [`STREAM`]
    pub kind: u16,
    /// An [`Op`], if it is one.
    pub op: u16,
    /// [`shut`]
    pub flags: u32,
    /// Bytes that the sender has room for in all, on this connection.
    pub buf_alloc: u32,
    /// Bytes of data that have left that room since the connection began, modulo 2³².
    pub fwd_cnt: u32,
}

impl Header {
    /// Bytes of it.
    pub const LENGTH: usize = 44;

    pub fn from_bytes(bytes: &[u8; Self::LENGTH]) -> Self {
        let field = |at: usize, size: usize| {
            let mut value = [0; 8];
            value[..size].copy_from_slice(&bytes[at..][..size]);
            u64::from_le_bytes(value)
        };
        Self {
            src_cid: field(0, 8),
            dst_cid: field(8, 8),
            src_port: field(16, 4) as u32,
            dst_port: field(20, 4) as u32,
            len: field(24, 4) as u32,
            kind: field(28, 2) as u16,
            op: field(30, 2) as u16,
            flags: field(32, 4) as u32,
            buf_alloc: field(36, 4) as u32,
            fwd_cnt: field(40, 4) as u32,
        }
    }

    pub fn to_bytes(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        let mut put = |at: usize, value: &[u8]| bytes[at..][..value.len()].copy_from_slice(value);
        put(0, &self.src_cid.to_le_bytes());
        put(8, &self.dst_cid.to_le_bytes());
        put(16, &self.src_port.to_le_bytes());
        put(20, &self.dst_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// What says to the sender of this packet that there is no such connection.
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Rst as u16,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offsets as 5.10.6 lays them out.
    #[test]
    fn headers() {
        let mut bytes = [0u8; Header::LENGTH];
        bytes.iter_mut().zip(1..).for_each(|(byte, value)| *byte = value);
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.src_cid, 0x0807_0605_0403_0201);
        assert_eq!(header.dst_port, 0x1817_1615);
        assert_eq!((header.len, header.kind, header.op), (0x1c1b_1a19, 0x1e1d, 0x201f));
        assert_eq!((header.flags, header.buf_alloc, header.fwd_cnt), (0x2423_2221, 0x2827_2625, 0x2c2b_2a29));
        assert_eq!(header.to_bytes(), bytes);
        assert_eq!([0, 1, 7, 8].map(Op::from_number), [None, Some(Op::Request), Some(Op::CreditRequest), None]);
    }
}
