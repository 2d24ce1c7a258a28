//! The environment of a command: what a login gives (login(1), pam_env(8)), and what the host wants.

use std::{collections::BTreeMap, ffi::OsString, fs, os::unix::ffi::OsStringExt};

use purlin_agent::protocol::{Exec, Failed, FailureKind};

use crate::users::User;

/// Variables and their values.
pub type Environment = BTreeMap<OsString, OsString>;

/// As in Debian's login.defs(5).
const PATH_OF_ROOT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const PATH_OF_USERS: &str = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games";

/// What systems say for every login; the languages are in the latter two.
const FILES: [&str; 3] = ["/etc/environment", "/etc/default/locale", "/etc/locale.conf"];

/// That of a command which `user` runs.
pub fn environment(exec: &Exec, user: &User) -> Result<Environment, Failed> {
    let path = if user.uid == 0 { PATH_OF_ROOT } else { PATH_OF_USERS };
    let mut variables = Environment::from([("PATH".into(), path.into())]);
    for file in FILES {
        let text = String::from_utf8_lossy(&fs::read(file).unwrap_or_default()).into_owned();
        variables.extend(text.lines().filter_map(assignment).map(|(name, value)| (name.into(), value.into())));
    }
    for (name, value) in [("HOME", &user.home), ("SHELL", &user.shell), ("USER", &user.name), ("LOGNAME", &user.name)] {
        variables.insert(name.into(), value.into());
    }
    if let Some(tty) = &exec.tty {
        let term = if tty.term.is_empty() { "xterm" } else { &tty.term };
        variables.insert("TERM".into(), term.into());
    }
    for variable in &exec.env {
        let (name, value) = split(variable)?;
        variables.insert(name, value);
    }
    Ok(variables)
}

/// `NAME=value`, the value perhaps quoted, perhaps behind `export`.
fn assignment(line: &str) -> Option<(&str, &str)> {
    let line = line.trim().trim_start_matches("export ");
    let (name, value) = line.split_once('=')?;
    let good = |name: &str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    let unquoted = |quote: char| value.strip_prefix(quote)?.strip_suffix(quote);
    good(name).then(|| (name, unquoted('"').or_else(|| unquoted('\'')).unwrap_or(value)))
}

fn split(variable: &[u8]) -> Result<(OsString, OsString), Failed> {
    let text = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    match variable.iter().position(|byte| *byte == b'=') {
        Some(at @ 1..) => Ok((text(&variable[..at]), text(&variable[at + 1..]))),
        _ => {
            let what = String::from_utf8_lossy(variable).escape_debug().to_string();
            Err(Failed::new(FailureKind::Invalid, format!("'{what}' is no variable: write NAME=value")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assignments_of_files() {
        assert_eq!(assignment("LANG=C.UTF-8"), Some(("LANG", "C.UTF-8")));
        assert_eq!(assignment("  export LANG=\"de_DE.UTF-8\" "), Some(("LANG", "de_DE.UTF-8")));
        assert_eq!(assignment("A='b=c'"), Some(("A", "b=c")));
        for none in ["", "# LANG=C", "LANG", "=C", "A B=C"] {
            assert_eq!(assignment(none), None, "{none}");
        }
    }

    #[test]
    fn the_host_has_the_last_word() {
        let user = crate::users::find("root").unwrap();
        let exec = Exec { env: vec![b"USER=me".to_vec(), b"EMPTY=".to_vec(), b"X=a=b".to_vec()], ..Exec::default() };
        let variables = environment(&exec, &user).unwrap();
        let value = |name: &str| variables.get(&OsString::from(name)).map(|value| value.to_str().unwrap());
        assert_eq!((value("USER"), value("LOGNAME"), value("EMPTY")), (Some("me"), Some("root"), Some("")));
        assert_eq!((value("X"), value("TERM"), value("HOME")), (Some("a=b"), None, Some(&*user.home)));
        for bad in ["X", "", "=x"] {
            let exec = Exec { env: vec![bad.into()], ..Exec::default() };
            assert_eq!(environment(&exec, &user).unwrap_err().kind(), FailureKind::Invalid);
        }
    }
}
