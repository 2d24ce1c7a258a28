//! What the command and the process of its machine say to each other. First comes an [`Order`], then the process says that
//! all is [`Said::Opened`], then it is told what to boot.

use std::path::PathBuf;

use purlin_api as api;
use serde::{Deserialize, Serialize};

use super::{
    args::{OnPanic, Port, Target},
    profile::{Form, Written},
};
use crate::signals::Signal;

/// A machine to be made, but for what it boots.
#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    /// The hardware.
    pub machine: api::Machine,
    /// The guest's host name, as far as it is known.
    pub name: String,
    /// It is an image: a server to be reached.
    pub is_image: bool,
    /// Where the serial port goes.
    pub serial: Target,
    /// Where the console on virtio-console goes.
    pub console: Target,
    /// The port whose input is handed over.
    pub input: Option<Port>,
    /// The input is what is typed at a terminal, which is raw while the guest has it.
    pub interactive: bool,
    /// The guest's context ID, if it has a vsock.
    pub cid: Option<u32>,
    /// What follows a panic of the guest's kernel.
    pub on_panic: OnPanic,
    /// The run ends when the guest resets itself.
    pub no_reboot: bool,
    /// How the profile is to be written, if there is to be one.
    pub profile: Option<Form>,
    /// The command's own process.
    pub command: u32,
}

/// What is booted.
#[derive(Debug, Serialize, Deserialize)]
pub struct Boot {
    /// The kernel.
    pub kernel: PathBuf,
    /// Initial RAM disks, in order.
    pub initrds: Vec<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// The guest's own disks, before those that the user adds.
    pub disks: Vec<api::Disk>,
    /// The private key to name to ssh.
    pub identity: Option<PathBuf>,
    /// The columns and lines of the terminal, where the guest's console has it.
    pub size: Option<(u16, u16)>,
}

/// What the process is told, behind its order.
#[derive(Debug, Serialize, Deserialize)]
pub enum Told {
    /// This is booted.
    Boot(Boot),
    /// What has said that it is [`Said::Entered`] is a child of the command, which will not be another's before the command
    /// has ended.
    Adopted,
    /// The run is to end.
    Stop,
    /// A guest that a failed disk has paused may go on.
    GoOn,
    /// The terminal has so many columns and lines.
    Resize(u16, u16),
    /// The user is to be told something: the process knows where the guest has left the cursor.
    Say(String),
}

/// What the process says.
#[derive(Debug, Serialize, Deserialize)]
pub enum Said {
    /// All that the order names could be opened. The NAT, if there is one, is this process.
    Opened(Option<u32>),
    /// It is in its sandbox, and has this number on the host. The guest has not run yet, so this can be believed.
    Entered(u32),
    /// The run is over.
    Ended(End),
}

/// How a run ended.
#[derive(Debug, Serialize, Deserialize)]
pub struct End {
    /// How.
    pub how: How,
    /// The guest has left the cursor in the midst of a line.
    pub in_line: bool,
    /// The profile, if there is one.
    pub profile: Option<Written>,
}

/// As [`crate::exit::Ended`].
#[derive(Debug, Serialize, Deserialize)]
pub enum How {
    /// As it should.
    Well,
    /// Because the command has said so.
    Stopped,
    /// By a signal that the command has got as well. The process does not say this: the command sees it.
    #[serde(skip)]
    Signalled(Signal),
    /// The guest chose the status.
    WithStatus(u8),
    /// It could not be done.
    Failed(String),
    /// The command line makes no sense.
    WrongUsage(String),
    /// The guest crashed or the engine failed.
    Crashed(String),
}

impl<E: std::fmt::Display> From<E> for How {
    /// Not the chain: each error of ours says its cause itself.
    fn from(error: E) -> Self {
        Self::Failed(error.to_string())
    }
}
