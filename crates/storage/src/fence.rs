//! A fence round a library that works on what strangers wrote: a panic in it ends one request, not the machine.

use std::{
    future::{Future, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    task::Poll,
};

/// The future panicked. What it worked on may be in any state, and must not be used again.
#[derive(Debug)]
pub(crate) struct Panicked;

/// `future`'s output, or that it panicked.
pub(crate) async fn fence<F: Future>(future: F) -> Result<F::Output, Panicked> {
    let mut future = pin!(future);
    poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context))) {
        Ok(poll) => poll.map(Ok),
        Err(_) => Poll::Ready(Err(Panicked)),
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block_on::block_on;

    #[test]
    fn a_panic_ends_here() {
        assert_eq!(block_on(fence(async { 7 })).unwrap(), 7);
        let empty: Vec<u8> = Vec::new();
        assert!(block_on(fence(async { empty[1] })).is_err());
    }
}
