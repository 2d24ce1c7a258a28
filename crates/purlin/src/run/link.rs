//! The socket between the command and the process of its machine: first descriptors, then lines of JSON both ways.

use std::{
    io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    net::Shutdown,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Mutex, PoisonError},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::retry_on_intr,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
        recvmsg, sendmsg,
    },
};
use serde::{Serialize, de::DeserializeOwned};

/// The most descriptors that are handed over.
const DESCRIPTORS: usize = 8;
/// The longest line: a profile's perf map is one.
const LINE: u64 = 256 << 20;
/// How long somebody is waited for who does not listen. What is said to him then is lost.
const PATIENCE: Duration = Duration::from_secs(1);

/// Says things to the other end.
pub struct Teller(Mutex<UnixStream>);

impl Teller {
    /// Says what goes as one line.
    pub fn tell(&self, what: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(what)?;
        line.push(b'\n');
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line)
    }

    /// Both ends hear and say nothing any more.
    pub fn hang_up(&self) {
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).shutdown(Shutdown::Both);
    }
}

/// Hears what the other end says.
pub struct Hearer(BufReader<UnixStream>);

impl Hearer {
    /// The next line; `None` if the other end is gone, or makes no sense.
    pub fn hear<T: DeserializeOwned>(&mut self) -> Option<T> {
        let mut line = Vec::new();
        (&mut self.0).take(LINE).read_until(b'\n', &mut line).ok()?;
        serde_json::from_slice(&line).ok()
    }

    /// Whether the other end is gone.
    pub fn is_alone(&self) -> bool {
        let (now, mut end) = (Timespec::default(), [PollFd::new(self.0.get_ref(), PollFlags::empty())]);
        let _ = retry_on_intr(|| poll(&mut end, Some(&now)));
        end[0].revents().contains(PollFlags::HUP)
    }
}

/// The two directions of an end.
pub fn open(stream: UnixStream) -> io::Result<(Teller, Hearer)> {
    let hearer = Hearer(BufReader::new(stream.try_clone()?));
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok((Teller(Mutex::new(stream)), hearer))
}

/// Hands descriptors over, before anything is said.
pub fn send_descriptors(stream: &UnixStream, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // They need a byte to go with.
    retry_on_intr(|| sendmsg(stream, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// What [`send_descriptors`] has sent.
pub fn receive_descriptors(stream: &UnixStream) -> io::Result<Vec<OwnedFd>> {
    let (mut byte, mut space) = ([0], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))]);
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        retry_on_intr(|| recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC))?;
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    Ok(descriptors.flatten().collect())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn descriptors_and_lines_arrive() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        send_descriptors(&ours, &[std::os::fd::AsFd::as_fd(&writer)]).unwrap();
        drop(writer);
        let received = receive_descriptors(&theirs).unwrap();
        let [fd] = <[OwnedFd; 1]>::try_from(received).unwrap();
        File::from(fd).write_all(b"x").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");

        let ((ours, _), (_, mut theirs)) = (open(ours).unwrap(), open(theirs).unwrap());
        ours.tell(&("a\nb", 1)).unwrap();
        ours.tell(&("c", 2)).unwrap();
        assert_eq!(theirs.hear(), Some(("a\nb".to_owned(), 1)));
        assert_eq!(theirs.hear(), Some(("c".to_owned(), 2)));
    }

    #[test]
    fn who_is_gone_or_makes_no_sense_is_not_heard() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut hearer = open(theirs).unwrap().1;
        (&ours).write_all(b"no sense\n").unwrap();
        assert_eq!(hearer.hear::<u32>(), None);
        assert!(!hearer.is_alone());
        drop(ours);
        assert!(hearer.is_alone());
        assert_eq!(hearer.hear::<u32>(), None);
    }
}
