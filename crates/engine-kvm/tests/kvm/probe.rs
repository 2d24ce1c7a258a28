//! The probe on this machine's /dev/kvm.

use std::time::Instant;

use purlin_engine_kvm::{Obstacle, probe};

/// What the probe must find: `usable` or `unusable`. Whoever runs the tests may know; without it, either will do.
const EXPECTED: &str = "PURLIN_TEST_KVM_PROBE";

#[test]
fn the_probe_comes_to_a_verdict() {
    if crate::machine::engine().is_none() {
        return;
    }
    let start = Instant::now();
    let verdict = probe();
    println!("{verdict:?} after {:?}", start.elapsed());
    match (std::env::var(EXPECTED).as_deref(), &verdict) {
        (Ok("usable"), Ok(_)) | (Ok("unusable"), Err(_)) | (Err(_), _) => {}
        (expected, verdict) => panic!("expected {expected:?}, found {verdict:?}"),
    }
    if let Err(obstacle) = verdict {
        // The device opens, so the guest was run.
        assert!(
            matches!(obstacle, Obstacle::Instruction { .. } | Obstacle::Slow { .. } | Obstacle::Hung { .. }),
            "{obstacle:?}"
        );
        assert!(!obstacle.advice().is_empty());
    }
}
