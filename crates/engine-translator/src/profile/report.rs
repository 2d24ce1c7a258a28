//! What a profile says.

use std::sync::atomic::Ordering;

use iced_x86::Mnemonic;

use super::{ExitKind, GuestPlace, Place, Profile, lock};

/// A profile's numbers. Those of the code cache are there once its VM is gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How many vCPUs there are.
    pub vcpus: usize,
    /// Time of the host's processors that they took, in ns.
    pub cpu_ns: u64,
    /// Samples by place, all of [`Place::ALL`].
    pub places: Vec<(Place, u64)>,
    /// Samples in translated code by guest address, most first.
    pub hottest: Vec<Hot>,
    /// Emulated instructions, those with most samples first.
    pub emulated: Vec<Emulated>,
    /// How often translated code was left, by reason.
    pub exits: Vec<(ExitKind, u64)>,
    /// What the translator made.
    pub translation: Translation,
}

/// A block in which samples were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hot {
    /// Where the guest has it.
    pub place: GuestPlace,
    /// How many.
    pub samples: u64,
}

/// An instruction that was emulated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Emulated {
    /// Its mnemonic, in lower case.
    pub name: String,
    /// How many samples found it.
    pub samples: u64,
    /// How often it was emulated.
    pub count: u64,
}

/// What the translator made, and what became of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Translation {
    /// Blocks for the first executions.
    pub cold: u64,
    /// Blocks made for speed.
    pub hot: u64,
    /// Bytes of all.
    pub bytes: u64,
    /// Blocks that made way for one made for speed.
    pub replaced: u64,
    /// Blocks whose source was stored to.
    pub killed: u64,
    /// How often the code cache was full, and emptied.
    pub cleared: u64,
}

impl Report {
    /// How many samples there are.
    pub fn samples(&self) -> u64 {
        self.places.iter().map(|(_, samples)| samples).sum()
    }
}

impl Profile {
    /// The numbers so far.
    pub fn report(&self) -> Report {
        let vcpus = lock(&self.vcpus);
        let places = Place::ALL.map(|place| (place, vcpus.iter().map(|v| v.samples(place)).sum()));
        let exits = ExitKind::all().map(|kind| (kind, vcpus.iter().map(|v| v.exits(kind)).sum()));
        let emulated = Mnemonic::values().filter_map(|mnemonic| {
            let counts = vcpus.iter().map(|v| v.emulated(mnemonic));
            let [samples, count] = counts.fold([0, 0], |[a, b], [c, d]| [a + c, b + d]);
            (count != 0).then(|| Emulated { name: format!("{mnemonic:?}").to_lowercase(), samples, count })
        });
        let mut emulated: Vec<_> = emulated.collect();
        emulated.sort_by_key(|e| std::cmp::Reverse((e.samples, e.count)));
        Report {
            vcpus: vcpus.len(),
            cpu_ns: vcpus.iter().map(|v| v.cpu_ns()).sum(),
            places: places.to_vec(),
            hottest: self.hottest(),
            emulated,
            exits: exits.collect(),
            translation: self.translation(),
        }
    }

    fn hottest(&self) -> Vec<Hot> {
        let mut hottest: Vec<_> = lock(&self.hot).iter().map(|(&place, &samples)| Hot { place, samples }).collect();
        hottest.sort_by_key(|hot| (std::cmp::Reverse(hot.samples), hot.place));
        hottest
    }

    fn translation(&self) -> Translation {
        let ends = lock(&self.caches).ends;
        Translation {
            cold: self.blocks.load(Ordering::Relaxed),
            hot: self.hot_blocks.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            replaced: ends.heated,
            killed: ends.stored,
            cleared: ends.cleared,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{profile::Phase, translate::CodeCache};

    #[test]
    fn vcpus_are_added_up_and_what_is_hottest_comes_first() {
        let (profile, code) = (Profile::default(), CodeCache::default());
        let vcpus = [profile.vcpu(&code), profile.vcpu(&code)];
        let phase = Phase::default();
        let place = |linear, user| GuestPlace { linear: Some(linear), physical: linear & 0xfff, user };
        for (vcpu, linear, times) in [(0, 0x1000, 1), (0, 0x2000, 3), (1, 0x1000, 1), (1, 0x3000, 1)] {
            phase.set(if linear == 0x1000 { Place::User } else { Place::Kernel });
            for _ in 0..times {
                vcpus[vcpu].sampled(code.first_block(), &phase);
                profile.sampled(place(linear, linear == 0x1000));
            }
        }
        phase.emulating(Mnemonic::Out);
        vcpus[1].emulates(Mnemonic::Out);
        vcpus[1].sampled(0, &phase);
        vcpus[0].emulates(Mnemonic::In);
        vcpus[0].left(ExitKind::Emulate);
        vcpus[1].left(ExitKind::Emulate);
        profile.translated(false, 100);
        profile.translated(true, 1000);
        profile.ended(&code);

        let report = profile.report();
        assert_eq!((report.vcpus, report.samples()), (2, 7));
        assert_eq!(report.places[..2], [(Place::User, 2), (Place::Kernel, 4)]);
        let hottest: Vec<_> =
            report.hottest.iter().map(|hot| (hot.place.linear.unwrap(), hot.place.user, hot.samples)).collect();
        assert_eq!(hottest, [(0x2000, false, 3), (0x1000, true, 2), (0x3000, false, 1)]);
        let emulated = |name: &str, samples| Emulated { name: name.into(), samples, count: 1 };
        assert_eq!(report.emulated, [emulated("out", 1), emulated("in", 0)]);
        assert!(report.exits.contains(&(ExitKind::Emulate, 2)));
        assert_eq!(report.translation, Translation { cold: 1, hot: 1, bytes: 1100, ..Translation::default() });
        assert_eq!(profile.pieces(), code.pieces());
    }
}
