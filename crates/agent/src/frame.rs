//! Frames: how messages lie in the stream. A frame is its length, four bytes, little-endian, and one message of so many
//! bytes. Nothing here reads or writes, so that blocking and asynchronous code, and relays, can use it alike.

use std::marker::PhantomData;

use prost::Message;

/// The most bytes of data (of a file, of a command's input or output) in one message.
pub const MAX_DATA: usize = 1 << 20;
/// The most bytes of a message: [`MAX_DATA`] and what is about it.
pub const MAX_MESSAGE: usize = MAX_DATA + 4096;
/// Bytes of the length.
const HEADER: usize = 4;

/// Why a stream of frames cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A message is longer than [`MAX_MESSAGE`].
    #[error("a message of {0} bytes is too long: at most {MAX_MESSAGE} are allowed")]
    TooLong(usize),
    /// It is no message of this protocol.
    #[error("a message cannot be understood: {0}")]
    Undecodable(String),
}

/// Appends the frame of `message`; on an error `to` is as it was.
pub fn encode_into(message: &impl Message, to: &mut Vec<u8>) -> Result<(), FrameError> {
    let length = message.encoded_len();
    if length > MAX_MESSAGE {
        return Err(FrameError::TooLong(length));
    }
    to.reserve(HEADER + length);
    to.extend_from_slice(&(length as u32).to_le_bytes());
    message.encode_raw(to);
    Ok(())
}

/// The frame of `message`.
pub fn encode(message: &impl Message) -> Result<Vec<u8>, FrameError> {
    let mut frame = Vec::new();
    encode_into(message, &mut frame)?;
    Ok(frame)
}

/// Takes bytes as they come, and yields the messages in them.
///
/// It keeps at most one unfinished frame and what was fed last: who takes all messages before feeding more needs no
/// further limit. After an error it yields that error again.
#[derive(Clone, Debug)]
pub struct FrameReader<M> {
    buffer: Vec<u8>,
    /// Where the next frame begins in it.
    start: usize,
    failed: Option<FrameError>,
    message: PhantomData<M>,
}

impl<M> Default for FrameReader<M> {
    fn default() -> Self {
        Self { buffer: Vec::new(), start: 0, failed: None, message: PhantomData }
    }
}

impl<M: Message + Default> FrameReader<M> {
    /// Nothing fed yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes what has come.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.failed.is_none() {
            self.buffer.drain(..std::mem::take(&mut self.start));
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// The next message, if all of it is there.
    pub fn next_message(&mut self) -> Result<Option<M>, FrameError> {
        match self.failed.clone().map_or_else(|| self.take(), Err) {
            Err(error) => {
                self.buffer = Vec::new();
                self.start = 0;
                Err(self.failed.insert(error).clone())
            }
            taken => taken,
        }
    }

    fn take(&mut self) -> Result<Option<M>, FrameError> {
        let rest = &self.buffer[self.start..];
        let Some((header, rest)) = rest.split_first_chunk::<HEADER>() else { return Ok(None) };
        let length = u32::from_le_bytes(*header) as usize;
        if length > MAX_MESSAGE {
            return Err(FrameError::TooLong(length));
        }
        let Some(message) = rest.get(..length) else { return Ok(None) };
        let message = M::decode(message).map_err(|error| FrameError::Undecodable(error.to_string()))?;
        self.start += HEADER + length;
        Ok(Some(message))
    }

    /// Whether a frame has begun and not ended: a stream must not end here.
    pub fn is_amid_frame(&self) -> bool {
        self.start < self.buffer.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::protocol::{HostFrame, HostMessage};

    fn frame_of(data: Vec<u8>) -> HostFrame {
        HostMessage::Data(data).into()
    }

    #[test]
    fn a_length_that_is_too_long_is_an_error_before_its_bytes_come() {
        let mut reader = FrameReader::<HostFrame>::new();
        reader.feed(&(MAX_MESSAGE as u32 + 1).to_le_bytes());
        let error = FrameError::TooLong(MAX_MESSAGE + 1);
        assert_eq!(reader.next_message(), Err(error.clone()));
        reader.feed(&encode(&frame_of(vec![1])).unwrap());
        assert_eq!(reader.next_message(), Err(error));
    }

    #[test]
    fn the_most_data_fits_and_more_does_not() {
        let frame = frame_of(vec![7; MAX_DATA]);
        let mut reader = FrameReader::new();
        reader.feed(&encode(&frame).unwrap());
        assert_eq!(reader.next_message(), Ok(Some(frame)));
        assert!(!reader.is_amid_frame());
        let mut to = vec![1];
        assert!(matches!(encode_into(&frame_of(vec![7; MAX_MESSAGE]), &mut to), Err(FrameError::TooLong(_))));
        assert_eq!(to, [1]);
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_they_are_cut(
            datas in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
            cuts in prop::collection::vec(1usize..97, 1..20),
        ) {
            let frames: Vec<_> = datas.into_iter().map(frame_of).collect();
            let mut bytes = Vec::new();
            frames.iter().for_each(|frame| encode_into(frame, &mut bytes).unwrap());
            let (mut reader, mut got, mut rest) = (FrameReader::<HostFrame>::new(), Vec::new(), &bytes[..]);
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                reader.feed(now);
                rest = later;
                while let Some(frame) = reader.next_message().unwrap() { got.push(frame); }
            }
            prop_assert_eq!(got, frames);
            prop_assert!(!reader.is_amid_frame());
        }

        #[test]
        fn garbage_neither_panics_nor_piles_up(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..64)) {
            let mut reader = FrameReader::<HostFrame>::new();
            for piece in pieces {
                reader.feed(&piece);
                while let Ok(Some(_)) = reader.next_message() {}
                prop_assert!(reader.buffer.len() <= HEADER + MAX_MESSAGE + 64);
            }
        }

        #[test]
        fn a_message_with_a_wrong_byte_is_another_or_an_error(data in prop::collection::vec(any::<u8>(), 0..64), at: prop::sample::Index, byte: u8) {
            let mut bytes = encode(&frame_of(data)).unwrap();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let mut reader = FrameReader::<HostFrame>::new();
            reader.feed(&bytes);
            let _ = reader.next_message();
        }
    }
}
