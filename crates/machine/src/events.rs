//! What a guest says has happened to it, on its way to whoever wants to hear.

use std::sync::Mutex;

use purlin_devices::GuestEvent;

use crate::bus::lock;

/// Who hears of events, on the thread of a vCPU: it must not wait for anything.
pub type Listener = Box<dyn Fn(GuestEvent) + Send>;

/// The events of one machine.
#[derive(Default)]
pub struct Events(Mutex<State>);

#[derive(Default)]
struct State {
    listener: Option<Listener>,
    /// The last event that came before there was a listener.
    missed: Option<GuestEvent>,
}

impl Events {
    /// Says who is to hear of events from here on; of one that came before there was anybody, at once.
    pub fn listen(&self, listener: Listener) {
        let mut state = lock(&self.0);
        state.missed.take().into_iter().for_each(&listener);
        state.listener = Some(listener);
    }

    /// An event.
    pub fn tell(&self, event: GuestEvent) {
        let mut state = lock(&self.0);
        match &state.listener {
            Some(listener) => listener(event),
            None => state.missed = Some(event),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn events_come_to_the_listener_also_if_it_comes_later() {
        let (sender, receiver) = mpsc::channel();
        let events = Events::default();
        events.tell(GuestEvent::CrashKernel);
        events.listen(Box::new(move |event| sender.send(event).unwrap()));
        events.tell(GuestEvent::Panicked);
        assert_eq!(receiver.try_iter().collect::<Vec<_>>(), [GuestEvent::CrashKernel, GuestEvent::Panicked]);
    }
}
