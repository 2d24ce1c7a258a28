//! gcc and make in the guest: the sources of a Debian package are configured, built, and its test suite run.

use anyhow::{Context, Result, ensure};

use super::job::{self, LIMIT};
use crate::debian::Debian;

/// Some 70,000 lines of C, and tests that compute and compare for minutes, without a network.
const PACKAGE: &str = "xz-utils";

/// Fetches, builds and tests.
pub fn run(guest: &mut Debian<'_>) -> Result<()> {
    let within = |command: &str| format!("cd {PACKAGE}-* && {command}");
    // The guest's sources are those of the host, of binary packages only.
    let fetch = format!(
        "sed -i 's/^Types: deb$/Types: deb deb-src/' /etc/apt/sources.list.d/*.sources && apt-get -q update && \
         apt-get -q source {PACKAGE} && find {PACKAGE}-* -name '*.[ch]' -exec cat {{}} + | wc -l"
    );
    let log = job::run(guest, "fetch", &fetch, LIMIT)?;
    let lines: u32 = log.lines().last().and_then(|line| line.trim().parse().ok()).context("lines were not counted")?;
    println!("soak: {PACKAGE}: {lines} lines of C");
    // Without a shared library its programs are programs, not scripts that find it.
    job::run(guest, "configure", &within("./configure --disable-nls --disable-shared"), LIMIT)?;
    job::run(guest, "make", &within("make -j 2"), LIMIT)?;
    let log = job::run(guest, "check", &within("make -j 2 check"), LIMIT)?;
    let [passed, failed] = results(&log);
    ensure!(passed > 0 && failed == 0, "{passed} tests of {PACKAGE} passed, {failed} failed");
    println!("soak: {PACKAGE}: {passed} tests passed");
    Ok(())
}

/// How many tests passed and failed, as automake's test driver says: `# PASS:  17`.
fn results(log: &str) -> [u32; 2] {
    let count = |name: &str| -> u32 {
        let of_line = |line: &str| line.strip_prefix("# ")?.strip_prefix(name)?.strip_prefix(':')?.trim().parse().ok();
        log.lines().filter_map(of_line).fold(0, u32::saturating_add)
    };
    [count("PASS"), ["FAIL", "XPASS", "ERROR"].map(count).iter().sum()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_results_of_all_directories_are_added() {
        let one =
            "PASS: test_check\n# TOTAL: 3\n# PASS:  2\n# SKIP:  0\n# XFAIL: 0\n# FAIL:  1\n# XPASS: 0\n# ERROR: 0\n";
        assert_eq!(results(one), [2, 1]);
        assert_eq!(results(&format!("{one}# PASS:  5\n# ERROR: 2\n")), [7, 3]);
        assert_eq!(results("nothing"), [0, 0]);
    }
}
