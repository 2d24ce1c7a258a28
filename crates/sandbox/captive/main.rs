//! A process that enters the sandbox and then tries what somebody would who has taken it over.
//!
//! `captive KEY=VALUE… ATTEMPT` writes `report …` lines, then `ok`, or `failed ERRNO`; nothing if it is killed.
#![allow(unsafe_code)]

mod attempts;

use std::{
    env,
    io::{self, Write},
    path::PathBuf,
    process::exit,
};

use purlin_sandbox::{Access, Filters, Identity, Layer, Plan, Reachable, Role};

/// What there is outside of the sandbox, and what is to be done with it.
pub struct World {
    /// `instance` in it is the process's own, `readonly` is a file to read; the rest is not for it.
    pub directory: PathBuf,
    /// A process of the same user.
    pub sibling: i32,
    /// A port of 127.0.0.1 on which somebody listens.
    pub port: u16,
    /// An abstract Unix socket on which somebody listens.
    pub abstract_name: String,
    settings: Vec<(String, String)>,
}

impl World {
    fn from_arguments() -> (Self, String) {
        let mut arguments: Vec<_> = env::args().skip(1).collect();
        let attempt = arguments.pop().expect("an attempt");
        let settings: Vec<(String, String)> = arguments
            .iter()
            .map(|argument| argument.split_once('=').expect("KEY=VALUE"))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        let get = |key: &str| settings.iter().find(|(k, _)| k == key).map_or("", |(_, v)| v.as_str());
        let world = Self {
            directory: get("directory").into(),
            sibling: get("sibling").parse().unwrap_or(0),
            port: get("port").parse().unwrap_or(0),
            abstract_name: get("abstract").into(),
            settings: settings.clone(),
        };
        (world, attempt)
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.settings.iter().find(|(k, _)| k == key).map(|(_, value)| value.as_str())
    }

    fn plan(&self) -> Plan {
        let path = |name: &str, access| Reachable { path: self.directory.join(name), access };
        Plan {
            paths: vec![
                path("readonly", Access::Read),
                path("instance", Access::ReadWrite),
                Reachable { path: "/dev/urandom".into(), access: Access::Device },
            ],
            identity: self.get("uid").map(|uid| {
                let uid = uid.parse().expect("a number");
                Identity { uid, gid: uid }
            }),
            require: self.get("require").map(|_| Layer::Root).into_iter().collect(),
            filters: if self.get("filters") == Some("off") { Filters::Off } else { Filters::Enforce },
            ..Plan::default()
        }
    }
}

fn main() {
    let (world, attempt) = World::from_arguments();
    if world.get("threads") == Some("on") {
        std::thread::spawn(std::thread::park);
    }
    if world.get("sandbox") == Some("on") {
        enter(&world);
    }
    let result = attempts::ALL.iter().find(|(name, _)| *name == attempt).expect("no such attempt").1(&world);
    match result {
        Ok(()) => say("ok"),
        Err(error) => say(&format!("failed {} {error}", error.raw_os_error().unwrap_or(0))),
    }
    exit(0);
}

fn enter(world: &World) {
    match purlin_sandbox::enter(&world.plan()) {
        Ok(report) => {
            say(&format!("pid {}", report.pid));
            report.layers.iter().for_each(|layer| say(&format!("layer {layer}")));
            report.missing.iter().for_each(|missing| say(&format!("missing {missing}")));
        }
        Err(error) => {
            say(&format!("error {error}"));
            exit(1);
        }
    }
    let role = match world.get("role") {
        Some("vcpu") => Role::Vcpu,
        Some("device") => Role::Device,
        Some("disk") => Role::Disk,
        Some("vsock") => Role::Vsock,
        Some("supervisor") => Role::Supervisor,
        Some("control") => Role::Control,
        Some(other) => panic!("no such role: {other}"),
        None => return,
    };
    purlin_sandbox::thread(role).expect("a role");
}

/// Writes a line, at once.
fn say(line: &str) {
    let _ = io::stdout().write_all(format!("{line}\n").as_bytes());
    let _ = io::stdout().flush();
}
