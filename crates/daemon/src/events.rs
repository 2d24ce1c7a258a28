//! What has happened, told to whoever listens, and kept.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use purlin_api::{Event, EventKind};
use tokio::sync::broadcast;

use crate::database::{Database, DatabaseError};

/// Events that a listener may lag behind before some are left out for it.
const LAG: usize = 1024;

/// The events.
pub struct Events {
    database: Arc<Database>,
    live: broadcast::Sender<Event>,
    /// The number of the last one.
    last: Mutex<u64>,
}

impl Events {
    /// Goes on behind those in the database.
    pub fn new(database: Arc<Database>) -> Result<Self, DatabaseError> {
        let last = Mutex::new(database.last_event()?);
        Ok(Self { database, live: broadcast::channel(LAG).0, last })
    }

    /// Something has happened.
    pub fn tell(&self, kind: EventKind) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        *last += 1;
        let event = Event { number: *last, time: now_ms(), kind };
        if let Err(error) = self.database.put_event(&event) {
            tracing::warn!("{error}");
        }
        // An error says that nobody listens.
        let _ = self.live.send(event);
    }

    /// What was from event `number` on, if that is wanted, and all that follows; each event once.
    pub fn listen(&self, from: Option<u64>) -> Result<(Vec<Event>, broadcast::Receiver<Event>), DatabaseError> {
        let _last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let past = from.map_or(Ok(Vec::new()), |number| self.database.events_from(number))?;
        Ok((past, self.live.subscribe()))
    }
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}
