//! `purlin file push` and `pull`: files to and from a machine's guest.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Result, anyhow};
use clap::{Args, Subcommand};
use purlin_agent::protocol::Push;

use crate::{agent, exit::Ended};

/// How long a guest that is still booting is waited for.
const PATIENCE: Duration = Duration::from_secs(120);

/// Copy files to and from a machine's guest
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct FileArgs {
    #[command(subcommand)]
    what: Do,
}

#[derive(Subcommand)]
enum Do {
    Push(PushArgs),
    Pull(PullArgs),
}

/// Copy a file to a machine's guest
#[derive(Args)]
struct PushArgs {
    /// The file here; '-' is standard input
    file: PathBuf,

    /// The machine, and the path in its guest; one that ends in '/' is a directory
    #[arg(value_name = "NAME/PATH")]
    to: OsString,

    /// Its mode, in octal [default: the file's]
    #[arg(long, value_name = "MODE", value_parser = parse_mode)]
    mode: Option<u32>,

    /// Its owner in the guest
    #[arg(long, value_name = "USER", default_value = "")]
    user: String,

    /// Its group in the guest
    #[arg(long, value_name = "GROUP", default_value = "")]
    group: String,

    /// Make directories that are missing
    #[arg(long, short = 'p')]
    parents: bool,
}

/// Copy a file from a machine's guest
#[derive(Args)]
struct PullArgs {
    /// The machine, and the path in its guest
    #[arg(value_name = "NAME/PATH")]
    from: OsString,

    /// The file here, or a directory; '-' is standard output
    #[arg(default_value = ".")]
    file: PathBuf,
}

const EXAMPLES: &str = "\
Examples:
  purlin file push nginx.conf web/etc/nginx/nginx.conf
  purlin file push -p site.tar web/srv/site/
  purlin file pull web/var/log/syslog
  purlin file pull web/etc/hosts -";

/// Copies a file.
pub fn file(args: &FileArgs) -> Result<Ended> {
    match &args.what {
        Do::Push(args) => push(args),
        Do::Pull(args) => pull(args),
    }
}

fn parse_mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777).ok_or_else(|| "it is octal, as 644".into())
}

/// `NAME/PATH`, or `NAME:/PATH`, as name and absolute path.
fn split(place: &OsString) -> Option<(String, Vec<u8>)> {
    let bytes = place.as_bytes();
    let slash = bytes.iter().position(|&byte| byte == b'/')?;
    let (name, path) = bytes.split_at(slash);
    let name = name.strip_suffix(b":").unwrap_or(name);
    Some((String::from_utf8(name.to_vec()).ok()?, path.to_vec()))
}

fn no_place(place: &OsString) -> Ended {
    Ended::WrongUsage(format!("'{}' is not NAME/PATH, such as web/etc/hosts", place.to_string_lossy()))
}

fn push(args: &PushArgs) -> Result<Ended> {
    let Some((name, mut path)) = split(&args.to) else { return Ok(no_place(&args.to)) };
    let is_stdin = args.file == Path::new("-");
    if path.ends_with(b"/") {
        let Some(file) = args.file.file_name().filter(|_| !is_stdin) else { return Ok(no_place(&args.to)) };
        path.extend_from_slice(file.as_bytes());
    }
    let (from, mode): (Box<dyn Read>, _) = if is_stdin {
        (Box::new(io::stdin()), args.mode)
    } else {
        let cannot = |e: io::Error| anyhow!("cannot read {}: {e}", args.file.display());
        let file = File::open(&args.file).map_err(cannot)?;
        let metadata = file.metadata().map_err(cannot)?;
        if metadata.is_dir() {
            return Err(anyhow!("{0} is a directory: tar c {0} | purlin exec {name} -- tar x", args.file.display()));
        }
        (Box::new(file), args.mode.or(Some(metadata.mode() & 0o777)))
    };
    let push = Push { path, mode, user: args.user.clone(), group: args.group.clone(), make_dirs: args.parents };
    agent::connect(&name, PATIENCE)?.push(push, from)?;
    Ok(Ended::Well)
}

fn pull(args: &PullArgs) -> Result<Ended> {
    let Some((name, path)) = split(&args.from) else { return Ok(no_place(&args.from)) };
    let file_name = path.rsplit(|&byte| byte == b'/').next().unwrap_or_default().to_vec();
    let mut pulled = agent::connect(&name, PATIENCE)?.pull(&path)?;
    if args.file == Path::new("-") {
        let mut stdout = io::stdout().lock();
        let copied = io::copy(&mut pulled, &mut stdout).and_then(|_| stdout.flush());
        copied.map_err(|e| anyhow!("cannot copy it: {e}"))?;
        return Ok(Ended::Well);
    }
    let to = if args.file.is_dir() { args.file.join(OsString::from_vec(file_name)) } else { args.file.clone() };
    store(&mut pulled, &to).map_err(|e| anyhow!("cannot copy it to {}: {e}", to.display()))?;
    Ok(Ended::Well)
}

/// Whole or not at all.
fn store<R: Read, W>(pulled: &mut purlin_agent::client::Pulled<R, W>, to: &Path) -> io::Result<()> {
    let dir = to.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mode = pulled.file.mode & 0o777;
    if to.exists() && !to.is_file() {
        let mut file = File::options().write(true).open(to)?;
        return io::copy(pulled, &mut file).map(drop);
    }
    let mut file = tempfile::Builder::new().prefix(".purlin-").tempfile_in(dir)?;
    io::copy(pulled, &mut file)?;
    fs::set_permissions(file.path(), fs::Permissions::from_mode(mode))?;
    file.persist(to)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        assert_eq!(split(&"web/etc/hosts".into()), Some(("web".into(), b"/etc/hosts".to_vec())));
        assert_eq!(split(&"web:/etc/hosts".into()), Some(("web".into(), b"/etc/hosts".to_vec())));
        assert_eq!(split(&"web".into()), None);
    }
}
