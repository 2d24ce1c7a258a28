//! The unit and integration tests of all crates.

use std::fs::File;

use anyhow::Result;

use crate::shell::{cargo, is_installed, run};

/// Runs them, by nextest where it is installed. (There are no examples in doc comments to be run.)
pub fn test() -> Result<()> {
    let mut tests = match is_installed("cargo-nextest") {
        true => cargo(&["nextest", "run", "--workspace", "--locked", "--no-fail-fast"]),
        false => cargo(&["test", "--workspace", "--locked", "--no-fail-fast", "--lib", "--bins", "--tests"]),
    };
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        println!("/dev/kvm: {error}: the tests that need it are left out");
        tests.env("PURLIN_TEST_NO_KVM", "1");
    }
    run(&mut tests)?;
    // The translator's guests lie where code is not movable.
    let guests = ["-p", "purlin-engine-translator", "--test", "guests", "--locked"];
    run(cargo(&["test"]).args(guests).env("PURLIN_TEST_MOVABLE_CODE", "1"))
}
