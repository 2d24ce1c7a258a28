//! The program that runs the rows (`programs/main.c`), here or in a guest, and what it says.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc, OnceLock,
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use super::{figures::Sample, processor};
use crate::{footprint::family, shell::describe};

/// Far more than a guest's boot or any row takes, also on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running agent.
pub struct Agent {
    child: Child,
    input: ChildStdin,
    lines: Receiver<(Stamp, String)>,
    log: PathBuf,
    /// The process and its descendants, which a machine may be one of.
    processes: Arc<OnceLock<Vec<u32>>>,
    /// Whether the process is a machine that the agent is in, not the agent itself.
    is_machine: bool,
}

/// When a line came.
#[derive(Clone, Copy)]
struct Stamp {
    at: Instant,
    /// What the processes had taken of the host's processors.
    processor: Duration,
}

impl Stamp {
    fn now(processes: &[u32]) -> Self {
        Self { at: Instant::now(), processor: processor::time(processes) }
    }
}

/// What it answers when it is asked for a row.
pub enum Answer {
    /// It is done.
    Done(Sample),
    /// The processor lacks something that the row needs.
    Unable,
}

impl Agent {
    /// Starts it by this command, which is that of a machine or of the agent itself, and waits until it is ready. What is
    /// said besides goes to logs in `dir`.
    pub fn start(mut command: Command, is_machine: bool, name: &str, dir: &Path) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let messages = File::create(dir.join(format!("{name}.messages")))?;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(messages)
            .spawn()
            .with_context(|| format!("cannot start: {}", describe(&command)))?;
        let (input, output) = (child.stdin.take().context("no input")?, child.stdout.take().context("no output")?);
        let (sender, lines) = mpsc::channel();
        let mut transcript = File::create(&log)?;
        let processes = Arc::new(OnceLock::<Vec<u32>>::new());
        let known = processes.clone();
        thread::spawn(move || {
            let mut reader = BufReader::new(output);
            let mut line = Vec::new();
            while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                let said =
                    (Stamp::now(known.get().map_or(&[], |all| all)), String::from_utf8_lossy(&line).into_owned());
                // Where there is no room for a log there is still a measurement.
                let _ = transcript.write_all(&line);
                if sender.send(said).is_err() {
                    break;
                }
                line.clear();
            }
        });
        let mut agent = Self { child, input, lines, log, processes, is_machine };
        agent.expect(|said| (said == Said::Ready).then_some(())).context("it does not begin")?;
        let family = family(agent.child.id())?;
        agent.processes.get_or_init(|| family);
        Ok(agent)
    }

    /// Has it run a row, and takes the time.
    pub fn run(&mut self, row: &str) -> Result<Answer> {
        writeln!(self.input, "{row}")?;
        let mut begin = None;
        loop {
            match self.listen()? {
                (stamp, Said::Begin) => begin = Some(stamp),
                (end, Said::End { own, own_processor, checksum }) => {
                    let begin: Stamp = begin.context("it ends a row that has not begun")?;
                    let processor = match self.is_machine {
                        true => end.processor.saturating_sub(begin.processor),
                        false => own_processor,
                    };
                    return Ok(Answer::Done(Sample { wall: end.at - begin.at, own, processor, checksum }));
                }
                (_, Said::Unable) => return Ok(Answer::Unable),
                (_, Said::Failed(reason)) => bail!("{row}: {reason}"),
                (_, Said::Ready) => bail!("{row}: it began anew"),
            }
        }
    }

    /// The process that runs it, or the machine that it is in.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// That process and its descendants.
    pub fn processes(&self) -> &[u32] {
        self.processes.get().map_or(&[], |all| all)
    }

    /// All that it said.
    pub fn log(&self) -> &Path {
        &self.log
    }

    fn expect<T>(&mut self, wanted: impl Fn(Said) -> Option<T>) -> Result<T> {
        let (_, said) = self.listen()?;
        wanted(said).context("it says something else")
    }

    fn listen(&mut self) -> Result<(Stamp, Said)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "silent for {PATIENCE:?}");
            match self.lines.recv_timeout(left) {
                Ok((stamp, line)) => {
                    if let Some(said) = parse(&line) {
                        return Ok((stamp, said));
                    }
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => bail!("it has ended: {}", tail(&self.log)),
            }
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last lines of a log.
fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}

/// A line of the agent's.
#[derive(Debug, PartialEq)]
enum Said {
    Ready,
    Begin,
    End { own: Duration, own_processor: Duration, checksum: String },
    Unable,
    Failed(String),
}

/// Anything else is the kernel's, or the monitor's.
fn parse(line: &str) -> Option<Said> {
    let (_, line) = line.split_once("bench: ")?;
    let mut words = line.split_whitespace();
    Some(match (words.next()?, words.next()) {
        ("ready", None) => Said::Ready,
        ("begin", Some(_)) => Said::Begin,
        ("unable", Some(_)) => Said::Unable,
        ("failed", Some(_)) => Said::Failed(words.collect::<Vec<_>>().join(" ")),
        ("end", Some(_)) => {
            let mut time = || Some(Duration::from_nanos(words.next()?.parse().ok()?));
            let (own, own_processor) = (time()?, time()?);
            Said::End { own, own_processor, checksum: words.next()?.to_owned() }
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_agent() {
        let [own, own_processor] = [2, 1].map(Duration::from_millis);
        let end = Said::End { own, own_processor, checksum: "0af0".into() };
        assert_eq!(parse("\u{1b}[mbench: end sieve 2000000 1000000 0af0\r\n"), Some(end));
        assert_eq!(parse("bench: ready\r\n"), Some(Said::Ready));
        assert_eq!(parse("bench: failed pipe no more: ENFILE\n"), Some(Said::Failed("no more: ENFILE".into())));
        assert_eq!(parse("bench: end sieve 5\n"), None);
        assert_eq!(parse("[    0.1] Linux version 6.1\n"), None);
    }
}
