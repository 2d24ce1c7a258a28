//! schemathesis against the daemon: requests of all kinds that its description allows, and of those that it does not. The daemon
//! must refuse in documented ways what makes no sense, and never fail.

mod tool;

use std::{
    fs,
    io::{self, BufRead, BufReader},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::{
    home::Home,
    machine,
    shell::{root, run},
};

/// How long, and where to begin.
#[derive(Args)]
pub struct SchemathesisArgs {
    /// For so many seconds in each of two parts
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// The seed of what is asked, which is printed [default: another one each time]
    #[arg(long)]
    seed: Option<u32>,
}

impl Default for SchemathesisArgs {
    fn default() -> Self {
        Self { seconds: 60, seed: None }
    }
}

/// What every answer is checked for.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,\
                      response_schema_conformance";
/// What is checked besides, where nobody else changes what there is.
const MORE_CHECKS: &str =
    "negative_data_rejection,unsupported_method,allow_header_conformance,ignored_auth,use_after_free";

/// Does both parts.
pub fn run_all(args: &SchemathesisArgs) -> Result<()> {
    let schemathesis = tool::install()?;
    machine::build()?;
    let seed =
        args.seed.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.subsec_nanos()));
    println!("the seed is {seed}");
    let mut daemon = Daemon::start()?;
    let ask = |description: &Path, url: &str| {
        let mut command = Command::new(&schemathesis);
        command.args(["run", "--no-color", "--workers", "2", "--generation-database", "none", "--warnings", "off"]);
        command.args(["--seed", &seed.to_string(), "--max-time", &args.seconds.to_string()]);
        // This one ends the daemon.
        command.args(["--exclude-path", "/1.0/shutdown", "--url", url]).arg(description);
        command.current_dir(daemon.home.path());
        command
    };
    println!("== as it is described, over the network");
    let mut described = ask(&root().join("docs/openapi.json"), &daemon.url);
    described.arg("--tls-verify").arg(daemon.home.path().join("data/tls.crt"));
    described.args(["--header", &format!("Authorization: Bearer {}", daemon.token)]);
    run(described.args(["--checks", &format!("{CHECKS},{MORE_CHECKS}")]))?;
    println!("== at the Unix socket, about a few machines, snapshots and tokens that there are");
    daemon.launch()?;
    let description = daemon.home.path().join("few.json");
    fs::write(&description, few_names(&root().join("docs/openapi.json"))?.to_string())?;
    let url = lead_to(daemon.home.path().join("run/daemon.sock"))?;
    let mut few = ask(&description, &url);
    // The other part has shown that what is not allowed is refused.
    run(few.args(["--mode", "positive", "--request-timeout", "60", "--checks", CHECKS]))?;
    daemon.end()
}

/// The description with so few names that most requests are about something that there is, with small machines that are not
/// started at once, and with little patience: their guests do not shut down.
fn few_names(description: &Path) -> Result<Value> {
    let mut description: Value = serde_json::from_slice(&fs::read(description)?)?;
    let names = json!({"type": "string", "enum": ["a", "b", "c"]});
    let patience = json!({"type": "integer", "enum": [0, 1]});
    for path in description["paths"].as_object_mut().context("no paths")?.values_mut() {
        for operation in path.as_object_mut().into_iter().flat_map(|path| path.values_mut()) {
            let parameters = operation.get_mut("parameters").and_then(Value::as_array_mut);
            for parameter in parameters.into_iter().flatten() {
                match parameter["name"].as_str() {
                    Some("name" | "snapshot") => parameter["schema"] = names.clone(),
                    Some("timeout") => (parameter["schema"], parameter["required"]) = (patience.clone(), json!(true)),
                    _ => {}
                }
            }
        }
    }
    let schemas = &mut description["components"]["schemas"];
    for of in ["NewInstance", "NewSnapshot", "NewToken", "Rename"] {
        schemas[of]["properties"]["name"] = names.clone();
    }
    for action in schemas["ChangeState"]["oneOf"].as_array_mut().into_iter().flatten() {
        if action["properties"]["timeout"].is_object() {
            action["properties"]["timeout"] = patience.clone();
            action["required"] = json!(["action", "timeout"]);
        }
    }
    schemas["NewClones"]["properties"]["names"]["items"] = names;
    schemas["NewInstance"]["properties"]["image"] = json!({"type": "string", "enum": ["tiny"]});
    schemas["NewInstance"]["properties"]["start"] = json!({"type": "boolean", "enum": [false]});
    schemas["NewInstance"]["required"] = json!(["name", "image", "start"]);
    schemas["Machine"]["properties"]["memory"] = json!({"type": "integer", "enum": [64 << 20, 65 << 20]});
    Ok(description)
}

/// Leads a port here to a Unix socket, for a program that knows TCP only; its URL.
fn lead_to(socket: PathBuf) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", listener.local_addr()?);
    thread::spawn(move || {
        for ours in listener.incoming().flatten() {
            if let Ok(theirs) = UnixStream::connect(&socket) {
                pass(ours, theirs);
            }
        }
    });
    Ok(url)
}

fn pass(ours: TcpStream, theirs: UnixStream) {
    let (ours, theirs) = (Arc::new(ours), Arc::new(theirs));
    let (to, from) = (theirs.clone(), ours.clone());
    thread::spawn(move || {
        let _ = io::copy(&mut &*from, &mut &*to);
        let _ = to.shutdown(Shutdown::Write);
    });
    thread::spawn(move || {
        let _ = io::copy(&mut &*theirs, &mut &*ours);
        let _ = ours.shutdown(Shutdown::Write);
    });
}

/// A daemon with a home of its own, an image, and a token.
struct Daemon {
    home: Home,
    process: Child,
    url: String,
    token: String,
}

impl Daemon {
    fn start() -> Result<Self> {
        let home = Home::empty()?;
        import_tiny(&home)?;
        let mut command = home.command(&["daemon", "--listen", "127.0.0.1:0"]);
        let log = fs::File::create(home.path().join("daemon.log"))?;
        let mut process = command.stdout(Stdio::piped()).stderr(log).spawn()?;
        let mut lines = BufReader::new(process.stdout.take().context("no stdout")?).lines();
        let mut line = || lines.next().context("the daemon ended at once")?.context("the daemon says nothing");
        line()?;
        let line = line()?;
        let url = line.split([' ', ';']).nth(2).context("the daemon has no URL")?.to_owned();
        let token = home.purlin(&["token", "create", "schemathesis"])?.trim().to_owned();
        Ok(Self { home, process, url, token })
    }

    /// Has a machine `a` run. Its image may have been deleted by now, or be another of that name.
    fn launch(&self) -> Result<()> {
        self.home.command(&["image", "delete", "tiny"]).output()?;
        import_tiny(&self.home)?;
        let machine = ["--engine", "translator", "--memory", "64M", "--net", "none"];
        self.home.purlin(&[&["launch", "tiny", "a"][..], &machine].concat()).map(drop)
    }

    /// It is still the one that was started, has said nothing of a panic, and can delete what was made.
    fn end(&mut self) -> Result<()> {
        ensure!(self.process.try_wait()?.is_none(), "the daemon has ended");
        let said = fs::read_to_string(self.home.path().join("daemon.log"))?;
        ensure!(!said.contains("panicked"), "the daemon said: {said}");
        self.home.end()?;
        let status = self.process.wait()?;
        ensure!(status.success(), "the daemon ended: {status}");
        Ok(())
    }
}

/// An image `tiny`, whose kernel does nothing (Multiboot 0.6.96, 3.1: its addresses are in the header).
fn import_tiny(home: &Home) -> Result<()> {
    const LOAD: u32 = 0x10_0000;
    const FLAGS: u32 = 1 << 16;
    const MAGIC: u32 = 0x1bad_b002;
    let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS);
    let header = [MAGIC, FLAGS, checksum, LOAD, LOAD, 0, 0, LOAD + 32];
    let mut kernel: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    kernel.extend([0xf4, 0xeb, 0xfd]); // hlt; jmp back
    let (files, disk) = (home.path().join("root"), home.path().join("tiny.raw"));
    fs::create_dir_all(files.join("boot"))?;
    fs::create_dir_all(files.join("etc/kernel"))?;
    fs::write(files.join("boot/vmlinuz-1"), kernel)?;
    fs::write(files.join("etc/kernel/cmdline"), "quiet")?;
    fs::write(files.join("etc/os-release"), "ID=tiny")?;
    run(Command::new("/sbin/mke2fs").args(["-q", "-F", "-t", "ext4", "-d"]).arg(files).arg(&disk).arg("8M"))?;
    run(home.command(&["image", "import", "--name", "tiny"]).arg(disk))
}
