//! What is under way: each operation is a task that reports its progress, and whose end can be waited for.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use purlin_api::{ErrorBody, EventKind, Operation, OperationState, Reason};
use tokio::sync::watch;

use crate::{
    database::{Database, DatabaseError},
    events::{Events, now_ms},
};

/// Operations that are over and remembered without asking the database.
const REMEMBERED: usize = 1000;

/// All operations.
pub struct Operations {
    database: Arc<Database>,
    events: Arc<Events>,
    known: Mutex<HashMap<String, watch::Receiver<Operation>>>,
}

/// The task's side of an operation.
#[derive(Clone)]
pub struct Progress(Arc<watch::Sender<Operation>>);

impl Operations {
    /// Those in the database; what was under way when the daemon ended has failed.
    pub fn new(database: Arc<Database>, events: Arc<Events>) -> Result<Self, DatabaseError> {
        let mut known = HashMap::new();
        for mut operation in database.operations()? {
            if operation.state == OperationState::Running {
                operation.state = OperationState::Failed;
                operation.error = Some(ErrorBody::new(Reason::Unavailable, "the daemon ended in its midst"));
                database.put_operation(&operation)?;
            }
            known.insert(operation.id.clone(), watch::channel(operation).1);
        }
        Ok(Self { database, events, known: Mutex::new(known) })
    }

    /// Begins one: `work` runs on until it is done, whoever waits for it.
    pub fn begin<F>(self: &Arc<Self>, what: String, instance: &str, work: impl FnOnce(Progress) -> F) -> Operation
    where
        F: Future<Output = Result<(), ErrorBody>> + Send + 'static,
    {
        let operation = Operation {
            id: uuid::Uuid::new_v4().to_string(),
            what,
            instance: instance.to_owned(),
            created: now_ms() / 1000,
            state: OperationState::Running,
            revision: 0,
            step: None,
            percent: None,
            notes: Vec::new(),
            error: None,
        };
        let (sender, receiver) = watch::channel(operation.clone());
        let progress = Progress(Arc::new(sender));
        self.remember(&operation.id, receiver);
        self.keep(&operation);
        let (operations, work) = (self.clone(), work(progress.clone()));
        tokio::spawn(async move {
            // A panic is a failure like any other.
            let done = tokio::spawn(work).await.unwrap_or_else(|e| Err(ErrorBody::new(Reason::Failed, e)));
            operations.end(&progress, done);
        });
        operation
    }

    fn end(&self, progress: &Progress, done: Result<(), ErrorBody>) {
        let mut operation = progress.0.borrow().clone();
        operation.state = if done.is_ok() { OperationState::Done } else { OperationState::Failed };
        (operation.step, operation.percent, operation.error) = (None, None, done.err());
        operation.revision += 1;
        self.keep(&operation);
        progress.0.send_replace(operation);
    }

    /// Writes it down, and tells of it.
    fn keep(&self, operation: &Operation) {
        if let Err(error) = self.database.put_operation(operation) {
            tracing::warn!("{error}");
        }
        self.events.tell(EventKind::Operation { operation: operation.clone() });
    }

    fn remember(&self, id: &str, operation: watch::Receiver<Operation>) {
        let mut known = self.known();
        if known.len() >= 2 * REMEMBERED {
            let mut over: Vec<_> = known.values().map(|o| o.borrow().clone()).collect();
            over.retain(|o| o.state != OperationState::Running);
            over.sort_by_key(|o| o.created);
            over.truncate(over.len().saturating_sub(REMEMBERED));
            over.iter().for_each(|o| drop(known.remove(&o.id)));
        }
        known.insert(id.to_owned(), operation);
    }

    /// An operation, as it is and as it will be.
    pub fn get(&self, id: &str) -> Option<watch::Receiver<Operation>> {
        self.known().get(id).cloned()
    }

    /// All that are remembered, oldest first.
    pub fn list(&self) -> Vec<Operation> {
        let mut list: Vec<_> = self.known().values().map(|o| o.borrow().clone()).collect();
        list.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        list
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, watch::Receiver<Operation>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress {
    fn change(&self, change: impl FnOnce(&mut Operation)) {
        self.0.send_modify(|operation| {
            change(operation);
            operation.revision += 1;
        });
    }
}

impl purlin_debian::Progress for Progress {
    fn step(&self, what: &str) {
        self.change(|o| (o.step, o.percent) = (Some(what.to_owned()), None));
    }

    fn fraction(&self, done: f64) {
        let percent = (done.clamp(0.0, 1.0) * 100.0) as u8;
        if self.0.borrow().percent != Some(percent) {
            self.change(|o| o.percent = Some(percent));
        }
    }

    fn note(&self, what: &str) {
        self.change(|o| o.notes.push(what.to_owned()));
    }
}
