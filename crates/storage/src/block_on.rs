//! Runs a future to its end on this thread.

use std::{
    future::Future,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
};

use tokio::task::coop::unconstrained;

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs `future` to its end. There must be no current ring (see `ring.rs`): host files do their work at once then, and
/// the future waits for other threads only.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    // A caller that is a task of tokio's has a budget, and with none left nothing would wake this thread: tokio does that
    // when the task has returned to it.
    let mut future = pin!(unconstrained(future));
    crate::ring::enter(None, || {
        loop {
            match future.as_mut().poll(&mut context) {
                Poll::Ready(output) => return output,
                Poll::Pending => thread::park(),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use tokio::sync::Mutex;

    use super::*;

    #[test]
    fn in_a_task_that_does_more_than_its_budget() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let done = runtime.block_on(async {
            let mutex = Mutex::new(0);
            (0..1000).for_each(|_| block_on(async { *mutex.lock().await += 1 }));
            mutex.into_inner()
        });
        assert_eq!(done, 1000);
    }
}
