//! The cases that once differed, and a bounded run of new ones.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use purlin_oracle::{
    case::Case,
    check::{Oracle, Verdict},
    generate::{Generated, Generator},
};

#[test]
fn kept_cases_agree() {
    let mut oracle = Oracle::new().unwrap();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    let (mut count, mut different) = (0, Vec::new());
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let case = Case::parse(&fs::read_to_string(&path).unwrap()).unwrap();
        let verdict = oracle.check(&case).unwrap();
        // What processors of one vendor do differently cannot be the same on each.
        if !matches!(verdict, Verdict::Same { .. } | Verdict::Known { .. }) {
            different.push(format!("{}: {verdict:?}", path.display()));
        }
        count += 1;
    }
    assert!(different.is_empty(), "{different:#?}");
    assert!(count >= 50, "only {count} kept cases were found");
}

/// New cases for ten seconds, at most 20,000; seeds that no other run uses.
#[test]
fn generated_cases_agree() {
    const FIRST: u64 = 1 << 40;
    let mut oracle = Oracle::new().unwrap();
    let generator = Generator::default();
    let begin = Instant::now();
    let (mut same, mut different) = (0, Vec::new());
    for batch in 0..20_000 / 64 {
        let seeds = FIRST + batch * 64..FIRST + (batch + 1) * 64;
        let generated: Vec<(u64, Generated)> = seeds.filter_map(|s| Some((s, generator.generate(s)?))).collect();
        let cases: Vec<&Case> = generated.iter().map(|(_, g)| &g.case).collect();
        for ((seed, _), verdict) in generated.iter().zip(oracle.check_all(&cases).unwrap()) {
            if matches!(verdict, Verdict::Different { .. }) {
                different.push(format!("`oracle replay {seed}`: {verdict:?}"));
            }
            same += usize::from(matches!(verdict, Verdict::Same { .. }));
        }
        if begin.elapsed() > Duration::from_secs(10) {
            break;
        }
    }
    assert!(different.is_empty(), "{different:#?}");
    assert!(same > 500, "only {same} cases came to anything");
}
