//! `purlin doctor`: what this host offers to virtual machines.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
};

use anyhow::{Result, anyhow};
use clap::Args;
use purlin_vmm::host::{self, EngineReport, Fact, HostReport, Value};
use serde_json::json;

use crate::exit::Ended;

/// Explain this host: which engines work here and why, what guests can have, what to change
#[derive(Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Looks at the host and says what it found. Fails where no engine works.
pub fn doctor(args: &DoctorArgs) -> Result<Ended> {
    let report = host::report();
    let text = if args.json { format!("{:#}\n", as_json(&report)) } else { as_text(&report) };
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(anyhow!("cannot write the report: {error}")),
        // A reader that has seen enough is no failure.
        _ if report.auto.is_some() => Ok(Ended::Well),
        _ => Err(anyhow!("no engine works on this host; the report above says why and what to do")),
    }
}

fn as_text(report: &HostReport) -> String {
    let mut text = String::from("Engines\n");
    for engine in &report.engines {
        text += &engine_lines(engine);
    }
    let auto = report.auto.map_or("nothing: no engine works".into(), |engine| engine.to_string());
    let _ = writeln!(text, "  --engine auto takes {auto}\n\nProcessor\n  {}", report.cpu.model);
    let level = match report.cpu.level {
        1 => "x86-64 without the additions of any level".into(),
        level => format!("x86-64-v{level}, the highest level for --cpu besides host"),
    };
    let _ = writeln!(text, "  {level}");
    wrap(&mut text, &report.cpu.features);
    text += "\nHost\n";
    for fact in &report.facts {
        let _ = writeln!(text, "  {:<27} {}", fact.label, value_text(&fact.value));
        if let Some(advice) = &fact.advice {
            let _ = writeln!(text, "    → {advice}");
        }
    }
    text
}

fn engine_lines(engine: &EngineReport) -> String {
    let verdict = if engine.usable { "works" } else { "does not work" };
    let mut text = format!("  {}: {verdict}: {}\n", engine.engine, engine.why);
    if let Some(advice) = &engine.advice {
        let _ = writeln!(text, "    → {advice}");
    }
    text
}

/// Words in lines that fit a terminal of 80 columns.
fn wrap(text: &mut String, words: &[&str]) {
    let mut line = String::new();
    for word in words {
        if line.len() + word.len() > 76 {
            let _ = writeln!(text, " {line}");
            line.clear();
        }
        line.push(' ');
        line.push_str(word);
    }
    if !line.is_empty() {
        let _ = writeln!(text, " {line}");
    }
}

fn value_text(value: &Value) -> String {
    match *value {
        Value::Number(u64::MAX) => "unlimited".into(),
        Value::Number(number) => number.to_string(),
        Value::Bytes(bytes) if bytes < 1 << 30 => format!("{} MiB", bytes >> 20),
        Value::Bytes(bytes) => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
        Value::Flag(true) => "yes".into(),
        Value::Flag(false) => "no".into(),
        Value::Unknown => "unknown".into(),
    }
}

fn as_json(report: &HostReport) -> serde_json::Value {
    let engines: Vec<_> = report
        .engines
        .iter()
        .map(|e| json!({ "name": e.engine.to_string(), "usable": e.usable, "why": e.why, "advice": e.advice }))
        .collect();
    let facts: serde_json::Map<_, _> = report.facts.iter().map(|fact| (fact.key.to_owned(), fact_json(fact))).collect();
    json!({
        "engines": engines,
        "auto": report.auto.map(|engine| engine.to_string()),
        "cpu": { "model": report.cpu.model, "level": report.cpu.level, "features": report.cpu.features },
        "host": facts,
    })
}

fn fact_json(fact: &Fact) -> serde_json::Value {
    let value = match fact.value {
        Value::Number(number) | Value::Bytes(number) => json!(number),
        Value::Flag(flag) => json!(flag),
        Value::Unknown => json!(null),
    };
    json!({ "value": value, "advice": fact.advice })
}

#[cfg(test)]
mod tests {
    use purlin_vmm::{engines::EngineChoice, host::CpuReport};

    use super::*;

    fn report() -> HostReport {
        let kvm = EngineReport {
            engine: EngineChoice::Kvm,
            usable: false,
            why: "there is no /dev/kvm".into(),
            advice: Some("Load the module.".into()),
        };
        let translator =
            EngineReport { engine: EngineChoice::Translator, usable: true, why: "it is software".into(), advice: None };
        HostReport {
            engines: vec![kvm, translator],
            auto: Some(EngineChoice::Translator),
            cpu: CpuReport { model: "Some CPU".into(), level: 3, features: vec!["nx", "avx2"] },
            facts: vec![
                Fact { key: "memory", label: "memory", value: Value::Bytes(3 << 29), advice: None },
                Fact { key: "tun", label: "/dev/net/tun", value: Value::Flag(false), advice: Some("Ask.".into()) },
            ],
        }
    }

    #[test]
    fn text() {
        let expected = "\
Engines
  kvm: does not work: there is no /dev/kvm
    → Load the module.
  translator: works: it is software
  --engine auto takes translator

Processor
  Some CPU
  x86-64-v3, the highest level for --cpu besides host
  nx avx2

Host
  memory                      1.5 GiB
  /dev/net/tun                no
    → Ask.
";
        assert_eq!(as_text(&report()), expected);
    }

    #[test]
    fn json() {
        let json = as_json(&report());
        assert_eq!(json["engines"][0]["advice"], "Load the module.");
        assert_eq!(json["auto"], "translator");
        assert_eq!(json["cpu"]["features"][1], "avx2");
        assert_eq!(json["host"]["memory"]["value"], 3u64 << 29);
        assert_eq!(json["host"]["tun"]["value"], false);
    }
}
