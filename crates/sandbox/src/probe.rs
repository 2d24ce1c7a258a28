//! What a sandbox would consist of.

use rustix::{
    fd::OwnedFd,
    net::{SendFlags, send},
};

use crate::{Missing, Plan, Report, SandboxError, enter, fork, plan::LAYERS};

/// Begins an answer that is an error.
const FAILED: &str = "failed";

/// Enters the plan's sandbox in a child and returns its report: what this host has for this user, for `purlin doctor`.
/// Nothing is required. The process must have one thread.
pub fn probe(plan: &Plan) -> Result<Report, SandboxError> {
    crate::process::check_single_threaded()?;
    let plan = Plan { require: Vec::new(), ..plan.clone() };
    let answer = fork::answer_of_child(|socket| tell(socket, &enter(&plan)))
        .map_err(|error| SandboxError::Probe(error.to_string()))?;
    decode(&String::from_utf8_lossy(&answer))
}

/// One line for each fact.
fn tell(socket: &OwnedFd, result: &Result<Report, SandboxError>) {
    let text = match result {
        Ok(report) => encode(report),
        Err(error) => format!("{FAILED}\n{error}"),
    };
    let _ = send(socket, text.as_bytes(), SendFlags::NOSIGNAL);
}

fn encode(report: &Report) -> String {
    let mut text = format!("{} {}\n", report.pid, report.landlock_abi);
    for layer in &report.layers {
        text += &format!("+{layer}\n");
    }
    for Missing { layer, reason } in &report.missing {
        text += &format!("-{layer}:{reason}\n");
    }
    text
}

fn decode(text: &str) -> Result<Report, SandboxError> {
    if let Some(error) = text.strip_prefix(FAILED) {
        return Err(SandboxError::Probe(error.trim().to_owned()));
    }
    parse(text).ok_or_else(|| SandboxError::Probe("it ended without an answer".into()))
}

fn parse(text: &str) -> Option<Report> {
    let mut lines = text.lines();
    let (pid, abi) = lines.next()?.split_once(' ')?;
    let mut report = Report { pid: pid.parse().ok()?, landlock_abi: abi.parse().ok()?, ..Report::default() };
    let layer = |name: &str| LAYERS.into_iter().find(|layer| layer.to_string() == name);
    for line in lines {
        match line.split_at_checked(1)? {
            ("+", name) => report.add(layer(name)?),
            ("-", rest) => {
                let (name, reason) = rest.split_once(':')?;
                report.lacks(layer(name)?, reason);
            }
            _ => return None,
        }
    }
    Some(report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Layer;

    #[test]
    fn a_report_comes_back_as_it_was() {
        let mut report = Report { pid: 42, landlock_abi: 7, ..Report::default() };
        LAYERS.into_iter().filter(|layer| *layer != Layer::Root).for_each(|layer| report.add(layer));
        report.lacks(Layer::Root, "the host: does not allow it");
        assert_eq!(decode(&encode(&report)).unwrap(), report);
        assert!(decode("").is_err());
        assert!(decode("failed\nno").unwrap_err().to_string().contains("no"));
    }
}
