//! Things by small numbers that are used again, with a generation to tell the old holder from the new.

/// A place in a [`Slab`], as 56 bits: a reference to what was there once finds nothing else later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(u64);

impl Id {
    fn new(index: usize, generation: u32) -> Self {
        Self(u64::from(generation & 0xff_ffff) << 32 | index as u64)
    }

    /// The number.
    pub fn to_bits(self) -> u64 {
        self.0
    }

    /// The place with this number.
    pub fn from_bits(bits: u64) -> Self {
        Self(bits & ((1 << 56) - 1))
    }

    fn index(self) -> usize {
        self.0 as u32 as usize
    }
}

/// Things by [`Id`].
#[derive(Debug)]
pub struct Slab<T> {
    places: Vec<(u32, Option<T>)>,
    free: Vec<usize>,
}

impl<T> Slab<T> {
    /// Without anything in it.
    pub const fn new() -> Self {
        Self { places: Vec::new(), free: Vec::new() }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Where the next one will be.
    pub fn next_id(&self) -> Id {
        match self.free.last() {
            Some(&index) => Id::new(index, self.places[index].0),
            None => Id::new(self.places.len(), 0),
        }
    }

    /// Puts a thing in.
    pub fn insert(&mut self, thing: T) -> Id {
        let id = self.next_id();
        match self.free.pop() {
            Some(index) => self.places[index].1 = Some(thing),
            None => self.places.push((0, Some(thing))),
        }
        id
    }

    /// The thing at `id`.
    pub fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        let (generation, thing) = self.places.get_mut(id.index())?;
        if Id::new(id.index(), *generation) == id { thing.as_mut() } else { None }
    }

    /// Takes the thing out.
    pub fn remove(&mut self, id: Id) -> Option<T> {
        let thing = self.get_mut(id).is_some();
        let place = thing.then(|| &mut self.places[id.index()])?;
        place.0 = place.0.wrapping_add(1);
        self.free.push(id.index());
        place.1.take()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (Id, &T)> {
        let places = self.places.iter().enumerate();
        places.filter_map(|(index, (generation, thing))| Some((Id::new(index, *generation), thing.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_id_does_not_find_the_new_tenant() {
        let mut slab = Slab::new();
        let a = slab.insert('a');
        let b = slab.insert('b');
        assert_eq!(slab.remove(a), Some('a'));
        assert_eq!(slab.remove(a), None);
        let expected = slab.next_id();
        let c = slab.insert('c');
        assert_eq!(c, expected);
        assert_ne!(a, c);
        assert_eq!(slab.get_mut(a), None);
        assert_eq!(slab.len(), 2);
        assert_eq!(slab.get_mut(Id::from_bits(c.to_bits())), Some(&mut 'c'));
        assert_eq!(slab.iter().map(|(id, &x)| (id, x)).collect::<Vec<_>>(), [(c, 'c'), (b, 'b')]);
        assert_eq!(slab.get_mut(Id::from_bits(u64::MAX)), None);
    }
}
