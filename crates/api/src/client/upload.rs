//! Bodies that are too large for memory: a file's content.

use std::{
    fs::File,
    io::{self, Read},
    pin::Pin,
    task::{Context, Poll},
};

use hyper::{
    Method,
    body::{Body, Bytes, Frame, SizeHint},
};
use serde::de::DeserializeOwned;
use tokio::{sync::mpsc, task};

use super::{Client, ClientError};

/// Bytes that are read at once.
const PIECE: usize = 256 << 10;
/// Pieces that wait to be sent.
const PIECES: usize = 4;

impl Client {
    /// PUT of a file's content. `sent` is told how much of it is on its way: 0.0 to 1.0.
    pub async fn put_file<T: DeserializeOwned>(
        &self,
        path: &str,
        file: File,
        sent: impl Fn(f64) + Send + 'static,
    ) -> Result<T, ClientError> {
        let length = file.metadata().map_err(|e| self.broken(e))?.len();
        let (sender, pieces) = mpsc::channel(PIECES);
        task::spawn_blocking(move || read(file, length, &sender, &sent));
        let body = Pieces { pieces, left: length };
        let answer = self.send(Method::PUT, path, "application/octet-stream", body).await?;
        serde_json::from_slice(&answer).map_err(|e| self.broken(format!("its answer makes no sense: {e}")))
    }
}

/// Reads a file as long as somebody wants it.
fn read(mut file: File, length: u64, sender: &mpsc::Sender<io::Result<Bytes>>, sent: &dyn Fn(f64)) {
    let mut done = 0;
    while done < length {
        let mut piece = vec![0; PIECE.min((length - done) as usize)];
        let read = file.read_exact(&mut piece).map(|()| Bytes::from(piece));
        let is_read = read.is_ok();
        if sender.blocking_send(read).is_err() || !is_read {
            return;
        }
        done = length.min(done + PIECE as u64);
        sent(done as f64 / length as f64);
    }
}

/// What is read, as a body.
struct Pieces {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    left: u64,
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let piece = std::task::ready!(self.pieces.poll_recv(context));
        if let Some(Ok(piece)) = &piece {
            self.left = self.left.saturating_sub(piece.len() as u64);
        }
        Poll::Ready(piece.map(|piece| piece.map(Frame::data)))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }
}
