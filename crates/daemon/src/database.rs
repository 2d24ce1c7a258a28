//! The database: instances, operations, events and tokens, in one file.
//!
//! What was acknowledged is on the host's disk by then. Values are JSON: what is added to a type later has a default.

use std::path::Path;

use purlin_api::{Event, Operation};
use redb::{
    Database as Redb, Durability, Key, Range, ReadTransaction, ReadableDatabase, ReadableTable, ReadableTableMetadata,
    TableDefinition, WriteTransaction,
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{error::StartError, record::Record, tokens::TokenRecord};

/// Operations by when they began, and their identity.
const OPERATIONS: TableDefinition<(u64, &str), &[u8]> = TableDefinition::new("operations");
/// Events by number.
const EVENTS: TableDefinition<u64, &[u8]> = TableDefinition::new("events");

/// So many operations and events are kept.
const MOST: u64 = 10_000;

/// What is kept, each by a text, until somebody removes it.
pub trait Kept: Serialize + DeserializeOwned {
    /// Where.
    const TABLE: TableDefinition<'static, &'static str, &'static [u8]>;

    /// By what.
    fn key(&self) -> &str;
}

impl Kept for Record {
    const TABLE: TableDefinition<'static, &'static str, &'static [u8]> = TableDefinition::new("instances");

    fn key(&self) -> &str {
        &self.id
    }
}

impl Kept for TokenRecord {
    const TABLE: TableDefinition<'static, &'static str, &'static [u8]> = TableDefinition::new("tokens");

    fn key(&self) -> &str {
        &self.name
    }
}

/// Why the database could not do it.
#[derive(Debug, thiserror::Error)]
#[error("the database failed: {0}")]
pub struct DatabaseError(String);

/// The database.
pub struct Database(Redb);

impl Database {
    /// Opens it, or makes a new one.
    pub fn open(path: &Path) -> Result<Self, StartError> {
        let wrong = |reason: String| StartError::Database { path: path.to_owned(), reason };
        let database = Redb::create(path).map_err(|e| wrong(e.to_string()))?;
        let database = Self(database);
        database.make_tables().map_err(|e| wrong(e.0))?;
        Ok(database)
    }

    fn make_tables(&self) -> Result<(), DatabaseError> {
        self.write(Durability::Immediate, |transaction| {
            transaction.open_table(Record::TABLE)?;
            transaction.open_table(OPERATIONS)?;
            transaction.open_table(EVENTS)?;
            transaction.open_table(TokenRecord::TABLE)?;
            Ok(())
        })
    }

    /// All of a table.
    pub fn all<T: Kept>(&self) -> Result<Vec<T>, DatabaseError> {
        self.read(|transaction| bytes(transaction.open_table(T::TABLE)?.iter()?))
    }

    /// Writes one, in place of what has its key.
    pub fn put<T: Kept>(&self, value: &T) -> Result<(), DatabaseError> {
        let bytes = encode(value)?;
        self.write(Durability::Immediate, |transaction| {
            transaction.open_table(T::TABLE)?.insert(value.key(), bytes.as_slice())?;
            Ok(())
        })
    }

    /// Forgets the one with this key.
    pub fn remove<T: Kept>(&self, key: &str) -> Result<(), DatabaseError> {
        self.write(Durability::Immediate, |transaction| {
            transaction.open_table(T::TABLE)?.remove(key)?;
            Ok(())
        })
    }

    /// The last operations, oldest first.
    pub fn operations(&self) -> Result<Vec<Operation>, DatabaseError> {
        self.read(|transaction| bytes(transaction.open_table(OPERATIONS)?.iter()?))
    }

    /// Writes an operation, and forgets the oldest where there are too many. Their order matters, not that the last is there
    /// after a crash: it is on the disk with the next change to an instance.
    pub fn put_operation(&self, operation: &Operation) -> Result<(), DatabaseError> {
        let value = encode(operation)?;
        self.write(Durability::None, |transaction| {
            let mut table = transaction.open_table(OPERATIONS)?;
            table.insert((operation.created, operation.id.as_str()), value.as_slice())?;
            while table.len()? > MOST {
                table.pop_first()?;
            }
            Ok(())
        })
    }

    /// The events from `number` on, oldest first.
    pub fn events_from(&self, number: u64) -> Result<Vec<Event>, DatabaseError> {
        self.read(|transaction| bytes(transaction.open_table(EVENTS)?.range(number..)?))
    }

    /// The number of the last event; 0 if there was none.
    pub fn last_event(&self) -> Result<u64, DatabaseError> {
        let read = || -> Result<_, redb::Error> {
            let table = self.0.begin_read()?.open_table(EVENTS)?;
            Ok(table.last()?.map_or(0, |(number, _)| number.value()))
        };
        read().map_err(failed)
    }

    /// Writes an event, as [`Database::put_operation`] does.
    pub fn put_event(&self, event: &Event) -> Result<(), DatabaseError> {
        let value = encode(event)?;
        self.write(Durability::None, |transaction| {
            let mut table = transaction.open_table(EVENTS)?;
            table.insert(event.number, value.as_slice())?;
            while table.len()? > MOST {
                table.pop_first()?;
            }
            Ok(())
        })
    }

    fn read<T: DeserializeOwned>(
        &self,
        values: impl FnOnce(&ReadTransaction) -> Result<Vec<Vec<u8>>, redb::Error>,
    ) -> Result<Vec<T>, DatabaseError> {
        let read = || values(&self.0.begin_read()?);
        read().map_err(failed)?.iter().map(|value| decode(value)).collect()
    }

    fn write(
        &self,
        durability: Durability,
        change: impl FnOnce(&WriteTransaction) -> Result<(), redb::Error>,
    ) -> Result<(), DatabaseError> {
        let write = || {
            let mut transaction = self.0.begin_write()?;
            transaction.set_durability(durability)?;
            change(&transaction)?;
            Ok(transaction.commit()?)
        };
        write().map_err(failed)
    }
}

/// The values of a table's entries.
fn bytes<K: Key + 'static>(entries: Range<'_, K, &'static [u8]>) -> Result<Vec<Vec<u8>>, redb::Error> {
    entries.map(|entry| Ok(entry?.1.value().to_vec())).collect()
}

fn failed(error: redb::Error) -> DatabaseError {
    DatabaseError(error.to_string())
}

fn encode(value: &impl Serialize) -> Result<Vec<u8>, DatabaseError> {
    serde_json::to_vec(value).map_err(|e| DatabaseError(e.to_string()))
}

fn decode<T: DeserializeOwned>(value: &[u8]) -> Result<T, DatabaseError> {
    serde_json::from_slice(value).map_err(|e| DatabaseError(format!("an entry makes no sense: {e}")))
}
