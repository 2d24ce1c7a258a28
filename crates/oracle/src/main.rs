//! `oracle run`, `oracle replay`, `oracle coverage`.

use std::{collections::BTreeMap, fs, path::PathBuf, time::Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use iced_x86::{Decoder, Formatter, IntelFormatter};
use purlin_engine_translator::translate::source::DECODER_OPTIONS;
use purlin_oracle::{
    case::Case,
    check::{Oracle, Verdict},
    coverage::{self, Coverage},
    generate::{Generated, Generator, reasons::Left},
    host,
    reduce::reduce,
};

/// The host's processor against the translator.
#[derive(Parser)]
#[command(name = "oracle")]
enum Cli {
    /// Runs generated cases.
    Run(RunArgs),
    /// Runs one case again: of a seed, or from a file.
    Replay {
        /// The seed, or the path of a kept case.
        case: String,
    },
    /// Says which forms are generated, and which not and why.
    Coverage {
        /// Lists the forms that the host has and that are left out all the same, with the reason.
        #[arg(long)]
        left_out: bool,
        /// Lists all that are left out, those of other processors too.
        #[arg(long)]
        all: bool,
    },
}

#[derive(clap::Args)]
struct RunArgs {
    /// How many cases.
    #[arg(long, default_value_t = 10_000)]
    cases: u64,
    /// The seed of the first case; the others follow.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only forms whose name (as iced spells it) contains this.
    #[arg(long)]
    code: Option<String>,
    /// Stops after this many differences.
    #[arg(long, default_value_t = 20)]
    stop: usize,
    /// Writes reduced cases that differ here.
    #[arg(long)]
    keep: Option<PathBuf>,
    /// Writes the table of coverage.
    #[arg(long)]
    table: bool,
}

fn main() -> Result<()> {
    match Cli::parse() {
        Cli::Run(args) => run(&args),
        Cli::Replay { case } => replay(&case),
        Cli::Coverage { left_out, all } => {
            table(&Coverage::default());
            if left_out || all {
                list_left_out(all);
            }
            Ok(())
        }
    }
}

fn list_left_out(all: bool) {
    let of_the_host = |reason: Left| reason.counts() || reason == Left::Guests;
    for (code, reason) in coverage::left_out().into_iter().filter(|(_, reason)| all || of_the_host(*reason)) {
        println!("{code:?}: {}", reason.why());
    }
}

fn run(args: &RunArgs) -> Result<()> {
    let mut oracle = Oracle::new()?;
    let generator = match &args.code {
        Some(name) => Generator::new(|code| format!("{code:?}").contains(name.as_str())),
        None => Generator::default(),
    };
    if generator.is_empty() {
        bail!("no form's name contains what --code says: `oracle coverage` lists those there are");
    }
    let mut tally = Tally::default();
    let mut coverage = Coverage::default();
    let begin = Instant::now();
    let mut seed = args.seed;
    let end = args.seed.saturating_add(args.cases);
    while seed < end && tally.different < args.stop {
        let seeds: Vec<u64> = (seed..end.min(seed + 64)).collect();
        seed += seeds.len() as u64;
        let batch: Vec<(u64, Generated)> =
            seeds.into_iter().filter_map(|s| generator.generate(s).map(|g| (s, g))).collect();
        let cases: Vec<&Case> = batch.iter().map(|(_, g)| &g.case).collect();
        for ((seed, generated), verdict) in batch.iter().zip(oracle.check_all(&cases)?) {
            match verdict {
                Verdict::Same { completed, raised, vector } => {
                    tally.same += 1;
                    coverage.add(&generated.case, &completed, raised, vector);
                }
                Verdict::Endless => tally.endless += 1,
                Verdict::Open => tally.open += 1,
                Verdict::Known { .. } => tally.known += 1,
                Verdict::Different { .. } => {
                    tally.different += 1;
                    report(&mut oracle, *seed, generated, args)?;
                }
            }
        }
    }
    println!(
        "{} same, {} different, {} known, {} endless, {} differ after an undefined flag was read; {:.0} s",
        tally.same,
        tally.different,
        tally.known,
        tally.endless,
        tally.open,
        begin.elapsed().as_secs_f64()
    );
    if args.table {
        table(&coverage);
    }
    if tally.different > 0 {
        bail!("{} cases differ", tally.different);
    }
    Ok(())
}

#[derive(Default)]
struct Tally {
    same: u64,
    different: usize,
    endless: u64,
    open: u64,
    known: u64,
}

/// Shows a case that differs, reduced.
fn report(oracle: &mut Oracle, seed: u64, generated: &Generated, args: &RunArgs) -> Result<()> {
    println!("--- seed {seed}");
    let reduced = reduce(oracle, generated)?;
    let mut case = reduced.case;
    let mut verdict = oracle.check(&case)?;
    if !matches!(verdict, Verdict::Different { .. }) {
        println!("(not when run alone)");
        case = generated.case.clone();
        verdict = oracle.check(&case)?;
    }
    show(&case, &verdict);
    if let Some(directory) = &args.keep {
        fs::create_dir_all(directory)?;
        fs::write(directory.join(format!("seed-{seed}.case")), case.to_string())?;
    }
    Ok(())
}

fn show(case: &Case, verdict: &Verdict) {
    print!("{case}");
    let mut decoder = Decoder::with_ip(case.bits, &case.code, case.entry, *DECODER_OPTIONS);
    let mut formatter = IntelFormatter::new();
    while decoder.can_decode() {
        let insn = decoder.decode();
        let mut text = String::new();
        formatter.format(&insn, &mut text);
        println!("  {:x}  {text}   {:?}", insn.ip(), insn.code());
    }
    match verdict {
        Verdict::Different { run, lines } => {
            println!("{run}:");
            lines.iter().take(16).for_each(|l| println!("  {l}"));
        }
        Verdict::Known { lines } => {
            println!("known:");
            lines.iter().take(16).for_each(|l| println!("  {l}"));
        }
        other => println!("{other:?}"),
    }
}

fn replay(name: &str) -> Result<()> {
    let mut oracle = Oracle::new()?;
    let case = match name.parse::<u64>() {
        Ok(seed) => Generator::default().generate(seed).context("this seed gives no case")?.case,
        Err(_) => Case::parse(&fs::read_to_string(name).with_context(|| format!("cannot read '{name}'"))?)?,
    };
    let verdict = oracle.check(&case)?;
    show(&case, &verdict);
    if matches!(verdict, Verdict::Different { .. }) { bail!("it differs") } else { Ok(()) }
}

fn table(coverage: &Coverage) {
    println!(
        "| extension | forms | executed | refused | executions | fewest |
|---|---|---|---|---|---|"
    );
    for row in coverage.by_extension() {
        let coverage::Row { name, forms, executed, refused, count, fewest } = row;
        println!("| {name} | {forms} | {executed} | {refused} | {count} | {fewest} |");
    }
    let left: Vec<Left> = coverage::left_out().into_iter().map(|(_, reason)| reason).collect();
    let counted = left.iter().filter(|reason| reason.counts()).count();
    let generated = coverage::generated().iter().filter(|form| host::has(form.code)).count();
    let share = 100.0 * generated as f64 / (generated + counted) as f64;
    println!("\nof {} forms that the host has, {generated} are generated: {share:.2} %", generated + counted);
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    left.iter().for_each(|reason| *reasons.entry(reason.why()).or_default() += 1);
    reasons.iter().for_each(|(why, count)| println!("left out: {count}: {why}"));
    if coverage.vectors().is_empty() {
        return;
    }
    println!("never executed: {:?}", coverage.never());
    println!("cases by the vector that ended them: {:?}", coverage.vectors());
}
