//! Wrong usage in one line.

use std::process::ExitCode;

use clap::error::ErrorKind;

use crate::exit::Ended;

/// Prints what clap has to say: help as it is, an error as one line with its tip.
pub fn report(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // Nobody is left to tell if standard output is closed.
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(2)
        }
        _ => Ended::WrongUsage(one_line(&error.render().to_string())).report(),
    }
}

/// Clap's paragraphs, up to the usage, as one line: `error: …`, a list of what is possible, `tip: …`.
fn one_line(text: &str) -> String {
    let text = text.split("\nUsage:").next().unwrap_or(text);
    let text = text.split("\nFor more information").next().unwrap_or(text);
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let mut line = String::new();
    for part in text.lines().map(str::trim).filter(|part| !part.is_empty()) {
        let separator = match part {
            _ if line.is_empty() => "",
            _ if part.starts_with('[') || line.ends_with(':') => " ",
            _ if part.starts_with("tip:") => "; ",
            _ => ", ",
        };
        line.push_str(separator);
        line.push_str(part.strip_prefix("tip: ").unwrap_or(part));
    }
    line + " (see --help)"
}

#[cfg(test)]
mod tests {
    use super::one_line;

    #[test]
    fn clap_errors_become_one_line() {
        let text = "error: invalid value 'kvn' for '--engine <ENGINE>'\n  [possible values: auto, kvm]\n\n  tip: a \
                    similar value exists: 'kvm'\n\nFor more information, try '--help'.\n";
        assert_eq!(
            one_line(text),
            "invalid value 'kvn' for '--engine <ENGINE>' [possible values: auto, kvm]; a similar value exists: 'kvm' \
             (see --help)"
        );
        let missing = "error: the following required arguments were not provided:\n  --kernel <FILE>\n\nUsage: purlin";
        assert_eq!(
            one_line(missing),
            "the following required arguments were not provided: --kernel <FILE> (see --help)"
        );
    }
}
