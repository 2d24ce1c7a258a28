//! A terminal for a command: a pair of a master, the agent's, and a slave, the command's (pty(7)).

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use purlin_agent::protocol::{Size, Tty};
use rustix::{
    fs::{Gid, Mode, OFlags, Uid, fchmod, fchown, open},
    process::Pid,
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt},
    termios::{InputModes, OptionalActions, SpecialCodeIndex, Winsize, tcgetattr, tcgetpgrp, tcsetattr, tcsetwinsize},
};

/// The group of terminals on most systems; who is not in it cannot write to them.
const TTY_GROUP: u32 = 5;

/// The agent's end.
#[derive(Debug)]
pub struct Terminal {
    master: OwnedFd,
}

impl Terminal {
    /// Makes a terminal of the user `uid`; with the command's end.
    pub fn open(tty: &Tty, uid: u32) -> io::Result<(Self, OwnedFd)> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let slave = match ioctl_tiocgptpeer(&master, flags) {
            Ok(slave) => slave,
            // Linux before 4.13.
            Err(_) => {
                open(ptsname(&master, Vec::new())?, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?
            }
        };
        // Who is not root keeps what he has been given.
        let _ = fchown(&slave, Some(Uid::from_raw(uid)), Some(Gid::from_raw(TTY_GROUP)));
        let _ = fchmod(&slave, Mode::from_raw_mode(0o620));
        let mut modes = tcgetattr(&slave)?;
        modes.input_modes |= InputModes::IUTF8;
        tcsetattr(&slave, OptionalActions::Now, &modes)?;
        let terminal = Self { master };
        terminal.resize(&Size { columns: tty.columns, rows: tty.rows })?;
        Ok((terminal, slave))
    }

    /// A further descriptor of it, to read or write.
    pub fn stream(&self) -> io::Result<OwnedFd> {
        self.master.try_clone()
    }

    /// Gives it a size; who is in its foreground gets SIGWINCH if that is another.
    pub fn resize(&self, size: &Size) -> io::Result<()> {
        let short = |number: u32| number.min(u16::MAX.into()) as u16;
        let (ws_col, ws_row) = (short(size.columns), short(size.rows));
        Ok(tcsetwinsize(&self.master, Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 })?)
    }

    /// The process group in its foreground.
    pub fn foreground(&self) -> Option<Pid> {
        tcgetpgrp(self.master.as_fd()).ok()
    }

    /// The character that ends the input.
    pub fn end_of_file(&self) -> io::Result<u8> {
        Ok(tcgetattr(&self.master)?.special_codes[SpecialCodeIndex::VEOF])
    }
}
