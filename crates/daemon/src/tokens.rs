//! Tokens, which let programs in that come over the network. Only their hashes are kept.

use std::{
    fmt::Write,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use purlin_api::{CreatedToken, ErrorBody, Reason, Token, check_name};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::{
    database::{Database, DatabaseError},
    events::now_ms,
    process::failed,
};

/// What a token begins with: who finds one where it should not be knows what it is.
const PREFIX: &str = "purlin_";
/// Random bytes of a token.
const RANDOM: usize = 32;
/// Characters of a token.
const LENGTH: usize = PREFIX.len() + 2 * RANDOM;
/// So many there can be: each request over the network is compared with all.
const MOST: usize = 1000;

/// A token's hash, which is also what it goes by here: another one of the same name is another one.
pub type TokenHash = [u8; 32];

/// A token, as it is kept.
#[derive(Clone, Serialize, Deserialize)]
pub struct TokenRecord {
    /// What it is called by.
    pub name: String,
    /// Seconds since 1970.
    pub created: u64,
    /// SHA-256. A token is 256 random bits, so nobody finds it by trying.
    pub hash: TokenHash,
}

impl TokenRecord {
    fn shown(&self) -> Token {
        Token { name: self.name.clone(), created: self.created }
    }
}

/// All tokens.
pub struct Tokens {
    database: Arc<Database>,
    known: Mutex<Vec<TokenRecord>>,
}

impl Tokens {
    /// Those in the database.
    pub fn new(database: Arc<Database>) -> Result<Self, DatabaseError> {
        let known = Mutex::new(database.all()?);
        Ok(Self { database, known })
    }

    /// All, in the order of their names.
    pub fn list(&self) -> Vec<Token> {
        let mut tokens: Vec<_> = self.known().iter().map(TokenRecord::shown).collect();
        tokens.sort_by(|a, b| a.name.cmp(&b.name));
        tokens
    }

    /// Makes one.
    pub fn create(&self, name: &str) -> Result<CreatedToken, ErrorBody> {
        check_name(name).map_err(|e| ErrorBody::new(Reason::BadRequest, e))?;
        let mut known = self.known();
        if known.iter().any(|token| token.name == name) {
            let message = format!("there is a token '{name}' already: choose another name, or delete it");
            return Err(ErrorBody::new(Reason::Conflict, message));
        }
        if known.len() >= MOST {
            return Err(ErrorBody::new(Reason::Conflict, format!("there are {MOST} tokens: delete those of no use")));
        }
        let token = random_token().map_err(|e| failed(format!("the host has no random numbers: {e}")))?;
        let record = TokenRecord { name: name.to_owned(), created: now_ms() / 1000, hash: hash(&token) };
        self.database.put(&record).map_err(failed)?;
        known.push(record.clone());
        Ok(CreatedToken { name: record.name, created: record.created, token })
    }

    /// Deletes one; then `forget` is told its hash, before anybody is let in again.
    pub fn delete(&self, name: &str, forget: impl FnOnce(&TokenHash)) -> Result<(), ErrorBody> {
        let mut known = self.known();
        let Some(index) = known.iter().position(|token| token.name == name) else {
            let name: String = name.chars().take(80).collect();
            let message =
                format!("there is no token '{}': 'purlin token list' shows those there are", name.escape_debug());
            return Err(ErrorBody::new(Reason::NotFound, message));
        };
        self.database.remove::<TokenRecord>(name).map_err(failed)?;
        forget(&known.remove(index).hash);
        Ok(())
    }

    /// Whether `presented` is one of them; if so `admit` is told which, before it can be deleted.
    pub fn check<T>(&self, presented: &[u8], admit: impl FnOnce(TokenHash) -> T) -> Option<T> {
        if presented.len() != LENGTH || !presented.starts_with(PREFIX.as_bytes()) {
            return None;
        }
        let presented: TokenHash = Sha256::digest(presented).into();
        let known = self.known();
        // All of them are compared, and all of each.
        let found = known.iter().fold(false, |found, token| found | bool::from(token.hash.ct_eq(&presented)));
        found.then(|| admit(presented))
    }

    fn known(&self) -> MutexGuard<'_, Vec<TokenRecord>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn random_token() -> rustix::io::Result<String> {
    let mut random = [0; RANDOM];
    // So few bytes come at once (getrandom(2)).
    getrandom(&mut random, GetRandomFlags::empty())?;
    let mut token = PREFIX.to_owned();
    for byte in random {
        let _ = write!(token, "{byte:02x}");
    }
    Ok(token)
}

fn hash(token: &str) -> TokenHash {
    Sha256::digest(token).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_known_until_it_is_deleted_and_kept_as_a_hash_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("purlin.redb");
        let database = Arc::new(Database::open(&path).unwrap());
        let tokens = Tokens::new(database.clone()).unwrap();
        let created = tokens.create("ci").unwrap();
        let other = tokens.create("laptop").unwrap();
        assert_eq!(created.token.len(), LENGTH);
        assert_ne!(created.token, other.token);
        assert_eq!(tokens.create("ci").unwrap_err().reason, Reason::Conflict);
        assert_eq!(tokens.create("Ci").unwrap_err().reason, Reason::BadRequest);

        let tokens = Tokens::new(database.clone()).unwrap();
        let is_known = |tokens: &Tokens, token: &str| tokens.check(token.as_bytes(), |hash| hash);
        assert_eq!(is_known(&tokens, &created.token), Some(hash(&created.token)));
        for wrong in ["", "purlin_", &created.token[1..], &format!("{} ", created.token), &created.token.to_uppercase()]
        {
            assert_eq!(is_known(&tokens, wrong), None, "{wrong}");
        }
        let mut forgotten = None;
        tokens.delete("ci", |hash| forgotten = Some(*hash)).unwrap();
        assert_eq!(forgotten, Some(hash(&created.token)));
        assert_eq!(is_known(&tokens, &created.token), None);
        assert_eq!(tokens.delete("ci", |_| {}).unwrap_err().reason, Reason::NotFound);
        assert_eq!(Tokens::new(database.clone()).unwrap().list(), tokens.list());
        let kept = std::fs::read(path).unwrap();
        assert!(!kept.windows(LENGTH).any(|window| window == other.token.as_bytes()));
    }
}
