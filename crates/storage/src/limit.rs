//! Limits: how many requests and bytes a second, with bursts.
//!
//! A [`Bucket`] is a token bucket in the form of one time stamp (the virtual scheduling of ITU-T I.371's generic cell
//! rate algorithm): the moment at which it will be full again. Nothing here sleeps or asks the time; whoever serves
//! requests asks [`Limiter::ready_at`] and comes back then. It serves disks and networks alike.

use std::time::{Duration, Instant};

/// How much of a rate may be taken at once if the user says nothing: a quarter of a second's worth.
const DEFAULT_BURST: Duration = Duration::from_millis(250);

/// A rate and the burst that it allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Units (requests, bytes, bits) each second; at least 1.
    pub per_second: u64,
    /// Units that may go at once after a rest. 0: what [`Rate::per_second`] gives in a quarter of a second.
    pub burst: u64,
}

impl Rate {
    /// `per_second` with the default burst.
    pub fn new(per_second: u64) -> Self {
        Self { per_second, burst: 0 }
    }
}

/// The limits of one disk or network interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests (or packets).
    pub operations: Option<Rate>,
    /// Bytes.
    pub bytes: Option<Rate>,
}

impl Limits {
    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        self.operations.is_none() && self.bytes.is_none()
    }
}

/// A token bucket. A request of any size may go as soon as the bucket is not overdrawn, and is charged in full: so over
/// any time *t* no more than `rate × t + burst + one request` goes.
#[derive(Clone, Debug)]
pub struct Bucket {
    per_second: u64,
    burst: Duration,
    /// When the bucket is full again, if nothing more is taken.
    full_at: Instant,
}

impl Bucket {
    /// A full bucket.
    pub fn new(rate: Rate, now: Instant) -> Self {
        let per_second = rate.per_second.max(1);
        let burst = if rate.burst == 0 { DEFAULT_BURST } else { time_for(rate.burst, per_second) };
        Self { per_second, burst, full_at: now }
    }

    /// The moment from which a request may go: `now` or before if it may go now.
    pub fn ready_at(&self, now: Instant) -> Instant {
        self.full_at.checked_sub(self.burst).unwrap_or(now)
    }

    /// Takes `units` out, at once.
    pub fn charge(&mut self, units: u64, now: Instant) {
        self.full_at = self.full_at.max(now) + time_for(units, self.per_second);
    }
}

/// How long `units` take at a rate, rounded up to a nanosecond; no longer than an hour, so that one request of any size
/// can neither overflow a clock nor stop its owner for good.
fn time_for(units: u64, per_second: u64) -> Duration {
    const HOUR: u128 = 3_600_000_000_000;
    let ns = (u128::from(units) * 1_000_000_000).div_ceil(u128::from(per_second)).min(HOUR);
    Duration::from_nanos(ns as u64)
}

/// The buckets of one disk or network interface.
#[derive(Clone, Debug)]
pub struct Limiter {
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Limiter {
    /// Full buckets for `limits`.
    pub fn new(limits: Limits, now: Instant) -> Self {
        let bucket = |rate: Option<Rate>| rate.map(|rate| Bucket::new(rate, now));
        Self { operations: bucket(limits.operations), bytes: bucket(limits.bytes) }
    }

    /// The moment from which the next request may go, `None` if it may go now.
    pub fn ready_at(&self, now: Instant) -> Option<Instant> {
        let buckets = [&self.operations, &self.bytes];
        buckets.into_iter().flatten().map(|bucket| bucket.ready_at(now)).max().filter(|ready| *ready > now)
    }

    /// Charges one request of `bytes`.
    pub fn charge(&mut self, bytes: u64, now: Instant) {
        if let Some(bucket) = &mut self.operations {
            bucket.charge(1, now);
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.charge(bytes, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Requests of the given sizes, each as early as the limits let it; returns when each went.
    fn run(limits: Limits, sizes: &[u64], rests: &[u64], start: Instant) -> Vec<Instant> {
        let mut limiter = Limiter::new(limits, start);
        let mut now = start;
        let sent = sizes.iter().zip(rests).map(|(size, rest)| {
            now += Duration::from_micros(*rest);
            now = limiter.ready_at(now).unwrap_or(now);
            limiter.charge(*size, now);
            now
        });
        sent.collect()
    }

    const WINDOW: Duration = Duration::from_secs(30);

    /// The most that went in any window.
    fn most_in_a_window(sent: &[Instant], sizes: &[u64]) -> u64 {
        let mut most = 0;
        let mut first = 0;
        let mut sum = 0;
        for (last, at) in sent.iter().enumerate() {
            sum += sizes[last];
            while *at - sent[first] >= WINDOW {
                sum -= sizes[first];
                first += 1;
            }
            most = most.max(sum);
        }
        most
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whoever asks for more than it may have, with rests or without, gets no more than 105 % in any 30 s.
        #[test]
        fn a_rate_of_bytes_is_never_exceeded(
            rate in 1_000_000_u64..1_000_000_000,
            sizes in prop::collection::vec(512_u64..1_000_000, 2_000),
            rests in prop::collection::vec(0_u64..30_000, 2_000),
        ) {
            let limits = Limits { bytes: Some(Rate::new(rate)), ..Limits::default() };
            let sent = run(limits, &sizes, &rests, Instant::now());
            prop_assert!(most_in_a_window(&sent, &sizes) <= rate * 30 * 105 / 100);
        }

        /// Whoever never rests gets at least 95 % over the whole time, of bytes and of requests.
        #[test]
        fn a_rate_is_reached(rate in 20_u64..2_000, size in 1_u64..4_000) {
            let count = rate as usize * 30;
            let (ones, rests) = (vec![1; count], vec![0; count]);
            let start = Instant::now();
            let limits = Limits { operations: Some(Rate::new(rate)), ..Limits::default() };
            let sent = run(limits, &ones, &rests, start);
            prop_assert!(sent[count - 1] - start <= WINDOW);
            prop_assert!(sent[count - 1] - start >= WINDOW.mul_f64(0.95));

            let limits = Limits { bytes: Some(Rate::new(rate * size)), ..Limits::default() };
            let sent = run(limits, &vec![size; count], &rests, start);
            prop_assert!(sent[count - 1] - start <= WINDOW);
            prop_assert!(sent[count - 1] - start >= WINDOW.mul_f64(0.95));
        }
    }

    #[test]
    fn a_burst_goes_at_once_and_no_more() {
        let rate = Rate { per_second: 100, burst: 50 };
        let limits = Limits { operations: Some(rate), bytes: None };
        let start = Instant::now();
        let sent = run(limits, &[1; 60], &[0; 60], start);
        // The request that overdraws the bucket goes, too.
        assert_eq!(sent.iter().filter(|at| **at == start).count(), 51);
        assert_eq!(sent[51], start + Duration::from_millis(10));
    }

    #[test]
    fn no_request_stops_the_next_one_for_good() {
        let limits = Limits { bytes: Some(Rate::new(1)), operations: None };
        let start = Instant::now();
        let sent = run(limits, &[u64::MAX, 1], &[0, 0], start);
        assert!(sent[1] - start <= Duration::from_secs(3600));
    }
}
