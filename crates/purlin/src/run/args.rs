//! The arguments of `purlin run`.

use std::path::PathBuf;

use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser},
};
use serde::{Deserialize, Serialize};

use super::vsock::{self, Vsock};
use crate::{exit, machine::MachineArgs};

/// Run a virtual machine in the foreground, with its serial port (or console) on the terminal
#[derive(Args)]
#[command(after_help = after_help())]
pub struct RunArgs {
    /// What to run: 'debian' is a Debian 12 server, built from the package mirror that this host is set up with at its
    /// first run; any other image by its name ('purlin image list'); or 'shell', Debian's kernel with a shell in memory
    #[arg(value_name = "IMAGE", conflicts_with_all = ["kernel", "initrd"])]
    pub guest: Option<String>,

    /// Kernel to boot: a bzImage, an ELF file with a PVH note, or a multiboot kernel
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk; several are joined, or are the modules of a multiboot kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Vec<PathBuf>,

    /// The kernel's command line (if not given 'console=ttyS0', with --console stdio 'console=hvc0'); added to that of an image
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,

    /// Where the guest's serial port goes: stdio, file:PATH or none [default: stdio, with --console stdio none]
    #[arg(long, value_name = "WHERE", value_parser = parse_target)]
    pub serial: Option<Target>,

    /// Where a console on virtio-console (/dev/hvc0 in the guest) goes: stdio, file:PATH or none. It is faster than the
    /// serial port, and knows the terminal's size; with stdio it is the guest's own console
    #[arg(long, value_name = "WHERE", default_value = "none", value_parser = parse_target)]
    pub console: Target,

    /// Sockets between programs of the host's and the guest's (virtio-vsock): the Unix socket to create. A program that
    /// connects to it and says 'CONNECT PORT' is led to that port of the guest's, whose own connections to the host (CID
    /// 2) are led to the socket PATH_PORT; ',cid=N' is the guest's address [default: 3]
    #[arg(long, value_name = "PATH[,cid=N]", value_parser = vsock::parse)]
    pub vsock: Option<Vsock>,

    #[command(flatten)]
    pub machine: MachineArgs,

    /// The guest's name [default: the image's]
    #[arg(long, value_name = "NAME", conflicts_with = "kernel")]
    pub hostname: Option<String>,

    /// End the run when the guest resets itself, instead of starting it again
    #[arg(long)]
    pub no_reboot: bool,

    /// What to do when the guest says (by pvpanic) that its kernel has panicked, beside telling so: continue leaves what
    /// comes next to the guest, exit ends the run with status 4
    #[arg(long, value_name = "WHAT", default_value = "continue", value_parser = on_panic_parser())]
    pub on_panic: OnPanic,

    /// Where guest time goes under the translator, written to FILE at the end of the run (JSON if it ends in .json): shares
    /// of translated code, misses, helpers, translation and so on, and the guest's hottest addresses. Beside it comes
    /// /tmp/perf-PID.map, in which 'perf report' finds the names of the translated code that 'perf record' has seen in the
    /// machine's process
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
}

/// What follows a panic of the guest's kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum OnPanic {
    /// The guest decides.
    Continue,
    /// The run ends.
    Exit,
}

impl RunArgs {
    /// Where the serial port goes.
    pub fn serial(&self) -> Target {
        let terminal = if self.console == Target::Stdio { Target::None } else { Target::Stdio };
        self.serial.clone().unwrap_or(terminal)
    }

    /// The port that has standard input and output.
    pub fn port_on_stdio(&self) -> Option<Port> {
        if self.console == Target::Stdio {
            return Some(Port::Console);
        }
        (self.serial() == Target::Stdio).then_some(Port::Serial)
    }
}

/// A port of the guest's for characters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Port {
    /// COM1.
    Serial,
    /// virtio-console.
    Console,
}

impl Port {
    /// What Linux calls it.
    pub fn linux_name(self) -> &'static str {
        match self {
            Self::Serial => "ttyS0",
            Self::Console => "hvc0",
        }
    }
}

fn after_help() -> String {
    format!("{EXAMPLES}\n\n{KEYS}\n\n{}", exit::HELP)
}

const EXAMPLES: &str = "\
Examples:
  purlin run debian --cpus 2 --memory 2G --disk-size 20G
  purlin run debian --publish 8080:80 --user-data setup.yaml --hostname web1
  purlin run debian --cpus 4 --net tap=tap0,queues=4,bps=100M
  echo 'uname -a; poweroff' | purlin run shell
  purlin run --kernel bzImage --initrd initrd.img --cmdline 'console=ttyS0 quiet'
  purlin run --kernel bzImage --disk root.qcow2 --disk data.img,serial=data --cmdline 'console=ttyS0 root=/dev/vda1'
  purlin run debian --disk /srv/data.qcow2 --on-io-error pause
  purlin run --kernel kernel.elf --device debug-exit --serial file:log --no-reboot
  purlin run shell --console stdio --serial file:log
  purlin run debian --vsock /tmp/vm.sock    # then: socat - UNIX-CONNECT:/tmp/vm.sock, and CONNECT 22
  purlin run debian --memory 8G --balloon size=0
  purlin run shell --engine translator --profile profile.txt";

const KEYS: &str = "\
On a terminal:
  Ctrl-A x  ends the run       Ctrl-A h  shows this help       Ctrl-A Ctrl-A  sends Ctrl-A
  Ctrl-A c  lets a guest go on that a failed disk has paused (--on-io-error pause)";

/// Where a port goes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Target {
    /// Standard input and output.
    Stdio,
    /// Output to a file, no input.
    File(PathBuf),
    /// There is no such port.
    None,
}

fn parse_target(text: &str) -> Result<Target, String> {
    match (text, text.strip_prefix("file:")) {
        ("stdio", _) => Ok(Target::Stdio),
        ("none", _) => Ok(Target::None),
        (_, Some(path)) if !path.is_empty() => Ok(Target::File(path.into())),
        _ => Err("it is one of stdio, file:PATH, none".into()),
    }
}

fn on_panic_parser() -> impl TypedValueParser<Value = OnPanic> {
    PossibleValuesParser::new(["continue", "exit"])
        .map(|name| if name == "exit" { OnPanic::Exit } else { OnPanic::Continue })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        assert_eq!(parse_target("file:a:b"), Ok(Target::File("a:b".into())));
        assert!(parse_target("file:").is_err());
        assert!(parse_target("tcp").is_err());
    }
}
