//! The user's terminal: raw while a guest has it, and given back however the process ends.

use std::{
    env, fmt,
    io::{self, Read, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    process::{Child, Command, ExitCode, Stdio},
    sync::atomic::{AtomicBool, Ordering},
};

use nix::sys::signal::SigSet;
use rustix::{
    stdio::{stderr, stdin, stdout},
    termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr},
};
use tracing::{Event, Level, Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    fmt::{
        FmtContext,
        format::{FormatEvent, FormatFields, Writer},
    },
    registry::LookupSpan,
};

/// Whether [`Raw`] is in force: lines then need a carriage return.
static IS_RAW: AtomicBool = AtomicBool::new(false);
/// Whether the guest has left the terminal's cursor in the midst of a line.
static IS_IN_LINE: AtomicBool = AtomicBool::new(false);

/// Whether the user is at a terminal.
pub fn is_interactive() -> bool {
    isatty(stdin())
}

/// Whether the user sees what is written to standard output.
pub fn is_shown() -> bool {
    isatty(stdout())
}

/// Whether the guest's output and our messages come together on a terminal.
pub fn is_shared() -> bool {
    isatty(stdout()) && isatty(stderr())
}

/// The guest writes this to a terminal that is shared.
pub fn guest_wrote(bytes: &[u8]) {
    if let Some(last) = bytes.last() {
        // After a carriage return alone, the line may have something in it.
        IS_IN_LINE.store(*last != b'\n', Ordering::Relaxed);
    }
}

/// Whether the guest has left the cursor in the midst of a line.
pub fn is_in_line() -> bool {
    IS_IN_LINE.load(Ordering::Relaxed)
}

/// Whether the guest of another process has.
pub fn set_in_line(is_in_line: bool) {
    IS_IN_LINE.store(is_in_line, Ordering::Relaxed);
}

/// Another process has made the terminal raw, for as long as this one lives.
pub fn is_raw_by_another() {
    IS_RAW.store(true, Ordering::Relaxed);
}

/// Columns and lines of the user's terminal, where they are known.
pub fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(stdin()).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_col, size.ws_row))
}

/// What a guest on a serial line cannot find out about the terminal: its size and type, as environment variables.
pub fn environment() -> String {
    let mut variables = Vec::new();
    if let Some((columns, lines)) = size() {
        variables.push(format!("LINES={lines} COLUMNS={columns}"));
    }
    let is_word =
        |text: &String| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-+._".contains(&b));
    variables.extend(env::var("TERM").ok().filter(is_word).map(|name| format!("TERM={name}")));
    variables.join(" ")
}

/// Tells the user something, on a line of its own on standard error.
pub fn say(line: &str) {
    // If standard error is closed there is nobody to tell.
    let _ = Lines.write_all(format!("purlin: {line}\n").as_bytes());
}

/// Prints a result, to standard output; nobody is left to tell if that is closed.
pub fn print(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
}

/// Sends the program's log to standard error: warnings, or what `PURLIN_LOG` says (`error`, `info`, `debug`, `trace`).
pub fn log_to_stderr() {
    let level = env::var("PURLIN_LOG").ok().and_then(|level| level.parse().ok()).unwrap_or(LevelFilter::WARN);
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .event_format(LikeMessages)
        .with_writer(|| Lines)
        .init();
}

/// Warnings are for the user, in the manner of [`say`]. What `PURLIN_LOG` adds is for us: it says where it comes from.
struct LikeMessages;

impl<S, N> FormatEvent<S, N> for LikeMessages
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut line: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let metadata = event.metadata();
        write!(line, "purlin: ")?;
        if *metadata.level() > Level::WARN {
            write!(line, "{} {}: ", metadata.level().as_str().to_lowercase(), metadata.target())?;
        }
        context.field_format().format_fields(line.by_ref(), event)?;
        writeln!(line)
    }
}

/// Standard error, with the line breaks that the terminal needs now. What is written at once is lines.
struct Lines;

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut text = Vec::with_capacity(bytes.len() + 4);
        let ends_guests_line = IS_IN_LINE.swap(false, Ordering::Relaxed).then_some(&b'\n');
        for &byte in ends_guests_line.into_iter().chain(bytes) {
            if byte == b'\n' && IS_RAW.load(Ordering::Relaxed) {
                text.push(b'\r');
            }
            text.push(byte);
        }
        io::stderr().write_all(&text)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// The terminal on standard input in raw mode, until dropped.
pub struct Raw {
    modes: Modes,
    has_screen: bool,
    keeper: Option<Child>,
}

/// Goes to a screen of its own, without a cursor (xterm's control sequences, private modes 1049 and 25).
const ENTER_SCREEN: &[u8] = b"\x1b[?1049h\x1b[?25l";
/// Goes back, to what was there before.
const LEAVE_SCREEN: &[u8] = b"\x1b[?25h\x1b[?1049l";

impl Raw {
    /// Makes it raw.
    pub fn enter() -> io::Result<Self> {
        Self::begin(false)
    }

    /// Makes it raw, and shows a screen of its own meanwhile.
    pub fn enter_screen() -> io::Result<Self> {
        Self::begin(true)
    }

    fn begin(has_screen: bool) -> io::Result<Self> {
        let modes = Modes::of(stdin())?;
        // Should there be no keeper, `drop` still does its work at all ends but the violent ones.
        let keeper = start_keeper(has_screen).ok();
        tcsetattr(stdin(), OptionalActions::Now, &modes.raw)?;
        IS_RAW.store(true, Ordering::Relaxed);
        let raw = Self { modes, has_screen, keeper };
        if has_screen {
            raw.show(ENTER_SCREEN)?;
        }
        Ok(raw)
    }

    fn show(&self, sequence: &[u8]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(sequence).and_then(|()| stdout.flush())
    }

    /// The modes, to make the terminal raw again after the process was stopped and continued.
    pub fn modes(&self) -> Modes {
        self.modes.clone()
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if self.has_screen {
            // A terminal that has gone away shows nothing.
            let _ = self.show(LEAVE_SCREEN);
        }
        self.modes.restore(stdin());
        IS_RAW.store(false, Ordering::Relaxed);
        if let Some(mut keeper) = self.keeper.take() {
            drop(keeper.stdin.take());
            // It has nothing left to do and ends at once.
            let _ = keeper.wait();
        }
    }
}

/// The terminal's modes as they were found, and the raw ones made of them.
#[derive(Clone)]
pub struct Modes {
    found: Termios,
    raw: Termios,
}

impl Modes {
    fn of(terminal: impl AsFd) -> io::Result<Self> {
        let found = tcgetattr(terminal)?;
        let mut raw = found.clone();
        raw.make_raw();
        Ok(Self { found, raw })
    }

    /// Makes the terminal raw again.
    pub fn again(&self) {
        // A terminal that has gone away needs nothing.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.raw);
    }

    /// Puts the terminal back, unless somebody else (a shell after the end of this process) has changed it since; whether
    /// it did.
    fn restore(&self, terminal: impl AsFd) -> bool {
        let ours = |now: Termios| {
            (now.local_modes, now.input_modes, now.output_modes)
                == (self.raw.local_modes, self.raw.input_modes, self.raw.output_modes)
        };
        tcgetattr(&terminal).is_ok_and(ours) && tcsetattr(&terminal, OptionalActions::Now, &self.found).is_ok()
    }
}

/// The hidden verb of the keeper: the same program once more, waiting for the end of this process, to put the
/// terminal back where that could not (SIGKILL, a fault in the engine, the kernel being out of memory).
pub const KEEPER_VERB: &str = "__keep-terminal";
/// Its argument where there is a screen to be left, too.
const WITH_SCREEN: &str = "screen";

/// Starts the keeper and waits until it has read the terminal's modes.
fn start_keeper(has_screen: bool) -> io::Result<Child> {
    let mut keeper = Command::new(env::current_exe()?)
        .arg(KEEPER_VERB)
        .args(has_screen.then_some(WITH_SCREEN))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(stdin().try_clone_to_owned()?)
        // What kills this process's group spares it.
        .process_group(0)
        .spawn()?;
    if let Some(mut ready) = keeper.stdout.take() {
        ready.read_exact(&mut [0])?;
    }
    Ok(keeper)
}

/// The keeper. The terminal is its standard error; its standard input ends when the process that started it does.
pub fn keep() -> ExitCode {
    // SIGTTOU among them: a background process that blocks it may set the terminal's modes (POSIX, tcsetattr).
    let _ = SigSet::all().thread_block();
    let Ok(modes) = Modes::of(stderr()) else { return ExitCode::FAILURE };
    if io::stdout().write_all(b"\n").and_then(|()| io::stdout().flush()).is_err() {
        return ExitCode::FAILURE;
    }
    // Nothing is ever sent.
    let _ = io::stdin().read(&mut [0]);
    if modes.restore(stderr()) && env::args().nth(2).as_deref() == Some(WITH_SCREEN) {
        let _ = io::stderr().write_all(LEAVE_SCREEN);
    }
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Text(Arc<Mutex<Vec<u8>>>);

    impl Write for Text {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn warnings_are_like_messages() {
        let text = Text::default();
        let writer = text.clone();
        let log = tracing_subscriber::fmt().with_max_level(Level::DEBUG).event_format(LikeMessages);
        tracing::subscriber::with_default(log.with_writer(move || writer.clone()).finish(), || {
            tracing::warn!("'/a': it is full");
            tracing::debug!("a packet");
        });
        let text = String::from_utf8(text.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text, format!("purlin: '/a': it is full\npurlin: debug {}: a packet\n", module_path!()));
    }
}
