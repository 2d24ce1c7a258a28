//! Users and groups, of /etc/passwd and /etc/group. A static program cannot ask for others by itself (LDAP, systemd's):
//! it asks getent(1) and id(1) for those.

use std::{
    fs,
    process::{Command, Stdio},
};

use purlin_agent::protocol::{Failed, FailureKind};

/// A user who can run commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The login name.
    pub name: String,
    /// The user's number.
    pub uid: u32,
    /// The number of the login group.
    pub gid: u32,
    /// All groups, that one too.
    pub groups: Vec<u32>,
    /// The home directory.
    pub home: String,
    /// The login shell.
    pub shell: String,
}

/// The user of this name or number; root if it is empty.
pub fn find(name: &str) -> Result<User, Failed> {
    let name = if name.is_empty() { "root" } else { name };
    let is_in = |line: &str| -> Option<User> { parse_user(line).filter(|user| user.name == name) };
    let has_number = |line: &str| parse_user(line).filter(|user| Some(user.uid) == number(name));
    let passwd = read("/etc/passwd");
    let local = passwd.lines().find_map(is_in).or_else(|| passwd.lines().find_map(has_number));
    if let Some(user) = local {
        let groups = groups_of(&user, &read("/etc/group"));
        return Ok(User { groups, ..user });
    }
    let elsewhere = getent("passwd", name).and_then(|line| parse_user(&line));
    // getent takes `+0` for a number, too.
    let elsewhere = elsewhere.filter(|user| user.name.eq_ignore_ascii_case(name) || Some(user.uid) == number(name));
    let user = elsewhere.ok_or_else(|| unknown("user", name))?;
    let said = ask("id", &["-G", "--", &user.name]).unwrap_or_default();
    let mut groups: Vec<u32> = said.split_ascii_whitespace().filter_map(number).collect();
    if !groups.contains(&user.gid) {
        groups.push(user.gid);
    }
    Ok(User { groups, ..user })
}

/// The number of the group of this name or number.
pub fn group(name: &str) -> Result<u32, Failed> {
    let of_line = |line: &str| number(line.split(':').nth(2)?);
    let group = read("/etc/group");
    let local = group.lines().find(|line| line.split(':').next() == Some(name)).and_then(of_line);
    let found = local.or_else(|| number(name)).or_else(|| getent("group", name).as_deref().and_then(of_line));
    found.ok_or_else(|| unknown("group", name))
}

fn unknown(what: &str, name: &str) -> Failed {
    Failed::new(FailureKind::NoSuchUser, format!("there is no {what} '{}' in the guest", name.escape_debug()))
}

/// Where the file is not there it has nobody in it.
fn read(path: &str) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn number(text: &str) -> Option<u32> {
    // Not `+5`; and -1 is nobody's.
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?.filter(|number| *number != u32::MAX)
}

/// passwd(5).
fn parse_user(line: &str) -> Option<User> {
    let fields: Vec<&str> = line.trim_end().split(':').collect();
    let [name, _, uid, gid, _, home, shell] = fields[..] else { return None };
    let or = |text: &str, default: &str| if text.is_empty() { default.to_owned() } else { text.to_owned() };
    let (uid, gid) = (number(uid)?, number(gid)?);
    Some(User { name: name.into(), uid, gid, groups: vec![gid], home: or(home, "/"), shell: or(shell, "/bin/sh") })
}

/// group(5): the login group, and those that list the user.
fn groups_of(user: &User, group: &str) -> Vec<u32> {
    let listed = |line: &str| {
        let mut fields = line.trim_end().split(':').skip(2);
        let (gid, members) = (number(fields.next()?)?, fields.next()?);
        members.split(',').any(|member| member == user.name).then_some(gid)
    };
    let mut groups = vec![user.gid];
    groups.extend(group.lines().filter_map(listed).filter(|gid| *gid != user.gid));
    groups
}

fn getent(database: &str, name: &str) -> Option<String> {
    ask("getent", &["--", database, name]).and_then(|said| said.lines().next().map(str::to_owned))
}

/// What a program says, if it succeeds. (A word that is none of theirs, as one with a zero byte, is nobody's name.)
fn ask(program: &str, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    command.args(arguments).env("PATH", "/usr/bin:/bin").stdin(Stdio::null()).stderr(Stdio::null());
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_passwd_and_group() {
        let user = parse_user("web:x:1000:1001:Web,,,:/srv/web:/bin/bash\n").unwrap();
        assert_eq!((user.uid, user.gid, &*user.home, &*user.shell), (1000, 1001, "/srv/web", "/bin/bash"));
        assert_eq!(parse_user("a:x:1:1:::").unwrap().shell, "/bin/sh");
        assert_eq!(parse_user("a:x:-1:1:::"), None);
        assert_eq!(parse_user("+::::::"), None);
        let group = "root:x:0:\nadm:x:4:other,web\nweb:x:1001:web\nbroken\nwebs:x:9:webs\n";
        assert_eq!(groups_of(&user, group), [1001, 4]);
    }

    #[test]
    fn of_this_machine() {
        assert_eq!(find("").unwrap(), find("0").unwrap());
        assert_eq!(find("root").unwrap().uid, 0);
        assert_eq!(group("root"), Ok(0));
        for nobody in ["no such", "-x", "a:b", "a\0b", "+0", "4294967295"] {
            assert_eq!(find(nobody).unwrap_err().kind(), FailureKind::NoSuchUser, "{nobody}");
        }
        assert_eq!(group("no such").unwrap_err().kind(), FailureKind::NoSuchUser);
    }
}
