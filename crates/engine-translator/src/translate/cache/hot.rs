//! What samples found executing.

use std::io;

use rustc_hash::FxHashSet as HashSet;

use super::{
    Key,
    image::{Reader, Writer},
    list::Mapped,
};

/// Places at most, beside those that it began with; the set begins anew when it is full.
const MAX: usize = 1 << 16;

/// The places of hot code.
#[derive(Default)]
pub struct Hot {
    places: HashSet<Key>,
    /// Those of the image that this began with, in ascending order.
    imaged: Option<Mapped<Key>>,
}

impl Hot {
    fn imaged(&self) -> &[Key] {
        self.imaged.as_ref().map_or(&[], Mapped::get)
    }

    /// Whether the code there is.
    pub fn contains(&self, key: &Key) -> bool {
        self.imaged().binary_search(key).is_ok() || self.places.contains(key)
    }

    /// Says that it is; whether that is new.
    pub fn insert(&mut self, key: Key) -> bool {
        if self.imaged().binary_search(&key).is_ok() {
            return false;
        }
        if self.places.len() >= MAX {
            self.places.clear();
        }
        self.places.insert(key)
    }

    /// Writes them.
    pub fn save(&self, image: &mut Writer) -> io::Result<()> {
        let mut all: Vec<Key> = self.imaged().iter().chain(&self.places).copied().collect();
        all.sort_unstable();
        image.section([&all[..]])
    }

    /// Those that [`Self::save`] wrote.
    pub fn restore(image: &mut Reader) -> io::Result<Self> {
        Ok(Self { places: HashSet::default(), imaged: Some(image.section()?) })
    }
}
