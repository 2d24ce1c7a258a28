//! Lists that only grow, whose beginning may be in a file that others have mapped, too.

use std::{marker::PhantomData, ops::Range, sync::Arc};

use zerocopy::{FromBytes, Immutable};

use crate::translate::memory::Mapping;

/// Values in a mapped file.
#[derive(Clone)]
pub struct Mapped<T> {
    mapping: Arc<Mapping>,
    bytes: Range<usize>,
    _values: PhantomData<T>,
}

impl<T: FromBytes + Immutable> Mapped<T> {
    /// Those in `bytes` of the file; `None` if they cannot be there.
    pub fn new(mapping: &Arc<Mapping>, bytes: Range<usize>) -> Option<Self> {
        <[T]>::ref_from_bytes(mapping.bytes().get(bytes.clone())?).ok()?;
        Some(Self { mapping: mapping.clone(), bytes, _values: PhantomData })
    }

    /// They.
    pub fn get(&self) -> &[T] {
        <[T]>::ref_from_bytes(&self.mapping.bytes()[self.bytes.clone()]).unwrap_or(&[])
    }
}

/// A list that only grows. What is added at once lies in one piece.
pub struct List<T> {
    first: Option<Mapped<T>>,
    then: Vec<T>,
}

impl<T> Default for List<T> {
    fn default() -> Self {
        Self { first: None, then: Vec::new() }
    }
}

impl<T: FromBytes + Immutable> From<Mapped<T>> for List<T> {
    fn from(first: Mapped<T>) -> Self {
        Self { first: Some(first), then: Vec::new() }
    }
}

impl<T: FromBytes + Immutable> List<T> {
    fn first(&self) -> &[T] {
        self.first.as_ref().map_or(&[], Mapped::get)
    }

    /// Both parts of it.
    pub fn parts(&self) -> [&[T]; 2] {
        [self.first(), &self.then]
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.first().len() + self.then.len()
    }

    /// One of them.
    pub fn get(&self, index: usize) -> Option<&T> {
        let first = self.first();
        first.get(index).or_else(|| self.then.get(index.checked_sub(first.len())?))
    }

    /// Those of `range`, which were added at once.
    pub fn slice(&self, range: Range<usize>) -> &[T] {
        let first = self.first();
        match range.start.checked_sub(first.len()) {
            Some(start) => &self.then[start..range.end - first.len()],
            None => &first[range],
        }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.parts().into_iter().flatten()
    }

    /// Makes room for `count` more, in steps that do not double what is there.
    fn grow(&mut self, count: usize) {
        const STEP: usize = 1 << 14;
        if self.then.len() + count > self.then.capacity() {
            self.then.reserve_exact(STEP.max(count));
        }
    }

    /// Adds one.
    pub fn push(&mut self, value: T) {
        self.grow(1);
        self.then.push(value);
    }

    /// Adds some.
    pub fn extend(&mut self, values: impl ExactSizeIterator<Item = T>) {
        self.grow(values.len());
        self.then.extend(values);
    }
}
