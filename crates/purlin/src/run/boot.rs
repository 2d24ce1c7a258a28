//! What `purlin run` boots: a kernel of the user's, a shell in memory, or an image.

use std::{path::PathBuf, sync::Arc};

use anyhow::Result;
use purlin_api::{Disk, DiskFormat};
use purlin_debian::{
    cache::Cache,
    guest::{Recipe, obtain},
};
use purlin_images::{
    prepare::{Prepared, Request, prepare_run},
    seed::read_user_data,
    store::Store,
};

use super::{
    args::{Port, RunArgs},
    order,
};
use crate::{progress::Shown, stop::Stop, terminal};

/// The guest that is Debian's kernel with a shell, all in memory.
pub const SHELL: &str = "shell";

/// What is booted, and what it needs of the machine.
pub struct Boot {
    /// The kernel.
    pub kernel: PathBuf,
    /// Initial RAM disks, in order.
    pub initrds: Vec<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// The guest's own disks, before those that the user adds.
    pub disks: Vec<Disk>,
    /// The files of the run, removed when this is dropped.
    pub machine: Option<Prepared>,
}

impl Boot {
    /// Finds, obtains or builds it. `interactive`: the guest has the user's terminal.
    pub fn prepare(args: &RunArgs, interactive: bool, stop: &Arc<Stop>) -> Result<Self> {
        match (&args.kernel, args.guest.as_deref()) {
            (Some(kernel), _) => Ok(Self::of_kernel(args, kernel.clone())),
            (None, Some(SHELL)) => Self::shell(args, interactive, stop),
            (None, image) => Self::image(image.unwrap_or_default(), args, interactive, stop),
        }
    }

    /// The same for the machine's process, with the terminal's columns and lines, if the guest's console has it.
    pub fn to_order(&self, size: Option<(u16, u16)>) -> order::Boot {
        order::Boot {
            kernel: self.kernel.clone(),
            initrds: self.initrds.clone(),
            cmdline: self.cmdline.clone(),
            disks: self.disks.clone(),
            identity: self.machine.as_ref().and_then(|machine| machine.identity.clone()),
            size,
        }
    }

    fn of_kernel(args: &RunArgs, kernel: PathBuf) -> Self {
        let cmdline = args.cmdline.clone().unwrap_or_else(|| console(args));
        Self { kernel, initrds: args.initrd.clone(), cmdline, disks: Vec::new(), machine: None }
    }

    fn shell(args: &RunArgs, interactive: bool, stop: &Arc<Stop>) -> Result<Self> {
        let guest = obtain(&Cache::of_user()?, &Recipe::SHELL, &Shown::new(stop.clone()))?;
        let environment = interactive.then(terminal::environment);
        let console = console(args);
        let words = [Some(console.as_str()), Some("quiet"), environment.as_deref(), args.cmdline.as_deref()];
        Ok(Self {
            kernel: guest.kernel,
            initrds: vec![guest.initrd],
            cmdline: join(&words),
            disks: Vec::new(),
            machine: None,
        })
    }

    fn image(image: &str, args: &RunArgs, interactive: bool, stop: &Arc<Stop>) -> Result<Self> {
        let environment = interactive.then(terminal::environment);
        // Its own command line names the serial port.
        let console = (args.port_on_stdio() == Some(Port::Console)).then(|| console(args));
        let arguments = join(&[console.as_deref(), environment.as_deref(), args.cmdline.as_deref()]);
        let user_data = args.machine.user_data.as_deref().map(read_user_data).transpose()?;
        let request = Request { arguments: Some(&arguments), user_data: user_data.as_deref(), ..request(image, args) };
        let machine = prepare_run(&Store::of_user()?, &request, &Shown::new(stop.clone()))?;
        let disk = Disk { format: Some(DiskFormat::Qcow2), ..Disk::new(&machine.disk) };
        let seed = Disk { format: Some(DiskFormat::Raw), read_only: true, ..Disk::new(&machine.seed) };
        Ok(Self {
            kernel: machine.kernel.clone(),
            initrds: machine.initrds.clone(),
            cmdline: machine.cmdline.clone(),
            disks: vec![disk, seed],
            machine: Some(machine),
        })
    }
}

fn request<'a>(image: &'a str, args: &'a RunArgs) -> Request<'a> {
    Request { image, host_name: args.hostname.as_deref(), disk_size: args.machine.disk_size, ..Request::default() }
}

/// The host name of an image's guest; others have none that is known.
pub fn guest_name(args: &RunArgs) -> Result<String> {
    match args.guest.as_deref() {
        Some(image) if image != SHELL => Ok(request(image, args).guest_name()?),
        _ => Ok(String::new()),
    }
}

/// What names the guest's own console: the port on standard input and output, the serial port if there is none.
fn console(args: &RunArgs) -> String {
    format!("console={}", args.port_on_stdio().unwrap_or(Port::Serial).linux_name())
}

/// The last word on the kernel's command line counts, so the user's come last. What the kernel does not know it hands
/// to process 1 as environment.
fn join(words: &[Option<&str>]) -> String {
    words.iter().flatten().copied().filter(|words| !words.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines() {
        assert_eq!(join(&[Some("console=ttyS0 quiet"), None, None]), "console=ttyS0 quiet");
        assert_eq!(join(&[Some("a"), Some(""), Some("b c")]), "a b c");
    }
}
