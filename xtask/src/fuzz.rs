//! Fuzzing: the targets in `fuzz/src/bin`, with libFuzzer and the coverage that LLVM instruments for.

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};

use crate::shell::{cargo, root, run, target};

/// Fuzz a target, or each of them
#[derive(clap::Args)]
pub struct FuzzArgs {
    /// The targets; all if none is given
    target: Vec<String>,
    /// Seconds for each
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Inputs tried at once, each by a process of its own
    #[arg(long, default_value_t = 1)]
    jobs: u32,
}

/// Instrumentation as libFuzzer wants it; stable compilers have it as options of LLVM's.
const RUSTFLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                         -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                         -Cllvm-args=-sanitizer-coverage-pc-table \
                         -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing";
/// Named, so that build scripts and macros are not instrumented.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds all targets and runs those asked for. What is learnt is kept in `target/xtask/fuzz/NAME`, what fails beside it.
pub fn run_all(args: &FuzzArgs) -> Result<()> {
    let known = targets()?;
    for name in &args.target {
        ensure!(known.contains(name), "there is no fuzz target '{name}': it is one of {}", known.join(", "));
    }
    let build_dir = target().join("fuzz");
    let mut build = cargo(&["build", "--release", "--manifest-path", "fuzz/Cargo.toml", "--target", TARGET]);
    run(build.env("RUSTFLAGS", RUSTFLAGS).env("CARGO_TARGET_DIR", &build_dir))?;
    let chosen = if args.target.is_empty() { &known } else { &args.target };
    for name in chosen {
        let corpus = target().join("xtask/fuzz").join(name);
        fs::create_dir_all(&corpus).with_context(|| format!("cannot create {}", corpus.display()))?;
        let mut fuzzer = Command::new(build_dir.join(TARGET).join("release").join(name));
        fuzzer.arg(format!("-max_total_time={}", args.seconds)).arg(format!("-fork={}", args.jobs));
        fuzzer.args(["-max_len=2000", "-timeout=60", "-rss_limit_mb=2048"]);
        // What a target and libFuzzer leave behind goes with it.
        let temporary = tempfile::tempdir()?;
        fuzzer.env("TMPDIR", temporary.path());
        fuzzer.arg(format!("-artifact_prefix={}-failed-", corpus.display())).arg(&corpus);
        run(&mut fuzzer)?;
    }
    Ok(())
}

/// The names of the targets.
fn targets() -> Result<Vec<String>> {
    let directory = root().join("fuzz/src/bin");
    let entries = fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let path = entry?.path();
        names.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}
