//! What this host offers to virtual machines: the data of `purlin doctor`.

use std::{
    fs::{self, OpenOptions},
    io::ErrorKind,
};

use purlin_engine_kvm::probe;
use purlin_engine_translator::TranslatorEngine;
use purlin_sandbox::{Identity, Layer, Plan};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    process::{Resource, geteuid, getrlimit},
};

use crate::engines::{EngineChoice, speed};

/// What this host offers.
#[derive(Clone, Debug)]
pub struct HostReport {
    /// The engines.
    pub engines: Vec<EngineReport>,
    /// The engine that `auto` comes to, if any works.
    pub auto: Option<EngineChoice>,
    /// The processor.
    pub cpu: CpuReport,
    /// Limits and abilities.
    pub facts: Vec<Fact>,
}

/// Whether one engine works here.
#[derive(Clone, Debug)]
pub struct EngineReport {
    /// Which.
    pub engine: EngineChoice,
    /// Whether it works.
    pub usable: bool,
    /// Why, or why not: a sentence without its full stop.
    pub why: String,
    /// What to change, where it does not work.
    pub advice: Option<String>,
}

/// The host's processor, as its kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuReport {
    /// Its name.
    pub model: String,
    /// Highest level of the x86-64 psABI that it has in full: 1 to 4.
    pub level: u8,
    /// Features that matter to virtual machines, under the kernel's names.
    pub features: Vec<&'static str>,
}

/// A limit or an ability of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// Its name for programs, `lower_case`.
    pub key: &'static str,
    /// Its name for people.
    pub label: &'static str,
    /// What it is here.
    pub value: Value,
    /// What to change, where it stands in the way.
    pub advice: Option<String>,
}

/// What a limit or an ability is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A count.
    Number(u64),
    /// A size in bytes.
    Bytes(u64),
    /// An ability: there or not.
    Flag(bool),
    /// The host does not say.
    Unknown,
}

/// Looks at the host. Runs KVM's probe guest, which takes up to 0.3 s.
#[must_use]
pub fn report() -> HostReport {
    let engines = vec![kvm(), translator()];
    let auto = engines.iter().find(|e| e.usable).map(|e| e.engine);
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let mut facts = memory(&read("/proc/meminfo"));
    facts.extend([
        cpus(),
        max_map_count(&read("/proc/sys/vm/max_map_count")),
        open_files(),
        memfd(),
        huge_pages(&read(HUGE_PAGES)),
        sandbox(),
        userfaultfd(),
        tun(),
    ]);
    HostReport { engines, auto, cpu: cpu(&read("/proc/cpuinfo")), facts }
}

fn kvm() -> EngineReport {
    let engine = EngineChoice::Kvm;
    match probe() {
        Ok(probed) => EngineReport { engine, usable: true, why: speed(probed), advice: None },
        Err(obstacle) => {
            let advice = Some(obstacle.advice().to_owned());
            EngineReport { engine, usable: false, why: obstacle.to_string(), advice }
        }
    }
}

fn translator() -> EngineReport {
    let engine = EngineChoice::Translator;
    match TranslatorEngine::new() {
        Ok(_) => EngineReport { engine, usable: true, why: "it needs nothing of the host".into(), advice: None },
        Err(error) => EngineReport { engine, usable: false, why: error.to_string(), advice: None },
    }
}

/// What each level adds (x86-64 psABI 1.0, table 3.1), under the names in /proc/cpuinfo.
const LEVELS: [(u8, &[&str]); 3] = [
    (2, &["cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"]),
    (3, &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"]),
    (4, &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]),
];

/// Features that decide what a guest can be given, or how fast it runs.
const NOTABLE: &[&str] = &[
    "vmx",
    "svm",
    "ept",
    "npt",
    "hypervisor",
    "nx",
    "pcid",
    "invpcid",
    "smep",
    "smap",
    "umip",
    "pku",
    "la57",
    "fsgsbase",
    "x2apic",
    "tsc_deadline_timer",
    "constant_tsc",
    "nonstop_tsc",
    "rdrand",
    "rdseed",
    "aes",
    "sha_ni",
    "erms",
    "fsrm",
    "xsave",
    "xsavec",
    "xsaves",
    "avx",
    "avx2",
    "avx512f",
    "amx_tile",
];

fn cpu(cpuinfo: &str) -> CpuReport {
    let field = |name: &str| {
        let line = cpuinfo.lines().filter_map(|line| line.split_once(':')).find(|(key, _)| key.trim() == name);
        line.map_or("", |(_, value)| value.trim())
    };
    let flags: Vec<&str> = field("flags").split_whitespace().collect();
    let has = |flag: &&&str| flags.contains(*flag);
    let full = LEVELS.iter().take_while(|(_, added)| added.iter().all(|flag| has(&flag)));
    CpuReport {
        model: field("model name").to_owned(),
        level: full.last().map_or(1, |(level, _)| *level),
        features: NOTABLE.iter().filter(has).copied().collect(),
    }
}

fn memory(meminfo: &str) -> Vec<Fact> {
    // `MemTotal:       24586996 kB`
    let bytes = |key: &str| {
        let value = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        let kib = value.and_then(|value| value.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
        kib.map_or(Value::Unknown, |kib| Value::Bytes(kib.saturating_mul(1024)))
    };
    let fact = |key, label, name| Fact { key, label, value: bytes(name), advice: None };
    vec![
        fact("memory_total", "memory", "MemTotal"),
        fact("memory_available", "memory available", "MemAvailable"),
        fact("swap_total", "swap", "SwapTotal"),
    ]
}

fn cpus() -> Fact {
    let value = std::thread::available_parallelism().map_or(Value::Unknown, |n| Value::Number(n.get() as u64));
    Fact { key: "cpus", label: "processors", value, advice: None }
}

/// Linux's default, which is enough.
const MAP_COUNT: u64 = 65530;

fn max_map_count(text: &str) -> Fact {
    let count = text.trim().parse().ok();
    let advice = count
        .filter(|count| *count < MAP_COUNT)
        .map(|_| format!("Large guests may run out of memory mappings: `sudo sysctl vm.max_map_count={MAP_COUNT}`."));
    let value = count.map_or(Value::Unknown, Value::Number);
    Fact { key: "max_map_count", label: "memory mappings per process", value, advice }
}

/// A process of one machine opens some dozens of files; a manager of many, some per machine.
const OPEN_FILES: u64 = 1024;

fn open_files() -> Fact {
    let limit = getrlimit(Resource::Nofile).current;
    let advice = limit
        .filter(|limit| *limit < OPEN_FILES)
        .map(|_| format!("Many devices need more open files: `ulimit -n {OPEN_FILES}`."));
    // No limit is the highest there is.
    Fact { key: "open_files", label: "open files per process", value: Value::Number(limit.unwrap_or(u64::MAX)), advice }
}

fn memfd() -> Fact {
    let there = memfd_create(c"purlin-doctor", MemfdFlags::CLOEXEC).is_ok();
    let advice =
        (!there).then(|| "Guest memory is a memfd: use a kernel, or a sandbox, that allows memfd_create.".into());
    Fact { key: "memfd", label: "memfd", value: Value::Flag(there), advice }
}

/// Whether shared memory, as guest memory is, gets huge pages where a program asks for them (Linux,
/// Documentation/admin-guide/mm/transhuge.rst).
const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Of text such as `always within_size advise [never] deny force`.
fn huge_pages(text: &str) -> Fact {
    let chosen = text.split_once('[').and_then(|(_, rest)| Some(rest.split_once(']')?.0));
    let value = chosen.map_or(Value::Unknown, |chosen| Value::Flag(!["never", "deny"].contains(&chosen)));
    let advice = (value == Value::Flag(false))
        .then(|| format!("Guests under KVM are faster with huge pages: `echo advise | sudo tee {HUGE_PAGES}`."));
    Fact { key: "huge_pages", label: "huge pages", value, advice }
}

/// What the processes of machines that are kept are shut in by. A user who is not root has machines of the same user.
fn sandbox() -> Fact {
    const SOMEBODY: u32 = 0x7000_0000;
    let identity = geteuid().is_root().then_some(Identity { uid: SOMEBODY, gid: SOMEBODY });
    let is_root = identity.is_some();
    let (value, advice) = match purlin_sandbox::probe(&Plan { identity, ..Plan::default() }) {
        Ok(report) => {
            let missing = report.missing.iter().filter(|missing| is_root || missing.layer != Layer::Identity);
            let missing: Vec<String> = missing.map(ToString::to_string).collect();
            (Value::Flag(missing.is_empty()), (!missing.is_empty()).then(|| missing.join(" ")))
        }
        Err(_) => (Value::Unknown, None),
    };
    Fact { key: "sandbox", label: "whole sandbox for machines", value, advice }
}

/// Root may use userfaultfd(2) for faults of the kernel, too, as KVM and system calls make them; others only if a
/// sysctl says so, or through the device.
fn userfaultfd() -> Fact {
    let sysctl = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").ok();
    let in_kernel = sysctl.is_some();
    let open_to_all = sysctl.is_some_and(|text| text.trim() == "1");
    let allowed = open_to_all || geteuid().is_root() || can_open("/dev/userfaultfd").is_ok();
    let advice = (in_kernel && !allowed).then(|| {
        "Restoring machines lazily needs it: `sudo sysctl vm.unprivileged_userfaultfd=1`, or permission on \
         /dev/userfaultfd."
            .into()
    });
    Fact { key: "userfaultfd", label: "userfaultfd", value: Value::Flag(in_kernel && allowed), advice }
}

fn tun() -> Fact {
    let result = can_open("/dev/net/tun");
    let advice = result.as_ref().err().map(|kind| match kind {
        ErrorKind::PermissionDenied => "Bridged networks need permission on /dev/net/tun.".into(),
        _ => {
            "Bridged networks need /dev/net/tun: load the module `tun`, or ask for the device in the container.".into()
        }
    });
    Fact { key: "tun", label: "/dev/net/tun", value: Value::Flag(result.is_ok()), advice }
}

fn can_open(path: &str) -> Result<(), ErrorKind> {
    OpenOptions::new().read(true).write(true).open(path).map(drop).map_err(|e| e.kind())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_flags(flags: &str) -> CpuReport {
        cpu(&format!("processor\t: 0\nmodel name\t: Some CPU @ 2.0: fast\nflags\t\t: {flags}\nbugs\t\t: avx512f\n"))
    }

    const V2: &str = "cx16 lahf_lm popcnt pni ssse3 sse4_1 sse4_2";
    const V3: &str = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave";
    const V4: &str = "avx512f avx512bw avx512cd avx512dq avx512vl";

    #[test]
    fn a_level_is_there_when_all_of_it_and_of_those_below_is() {
        assert_eq!(with_flags("fpu").level, 1);
        assert_eq!(with_flags(V2).level, 2);
        assert_eq!(with_flags(&format!("{V2} {V3}")).level, 3);
        assert_eq!(with_flags(&format!("{V2} {V3} {V4}")).level, 4);
        assert_eq!(with_flags(&format!("{V2} {V4}")).level, 2, "level 3 is missing");
        assert_eq!(with_flags(&format!("{V2} {V3}").replace("movbe", "")).level, 2);
    }

    #[test]
    fn the_processor_is_described() {
        let report = with_flags("nx svm mystery");
        assert_eq!(report.model, "Some CPU @ 2.0: fast");
        assert_eq!(report.features, ["svm", "nx"]);
        assert_eq!(cpu(""), CpuReport { model: String::new(), level: 1, features: vec![] });
    }

    #[test]
    fn memory_is_in_bytes() {
        let facts = memory("MemTotal:       24586996 kB\nMemFree: 1 kB\nSwapTotal:             0 kB\n");
        let values: Vec<_> = facts.into_iter().map(|f| f.value).collect();
        assert_eq!(values, [Value::Bytes(24_586_996 * 1024), Value::Unknown, Value::Bytes(0)]);
    }

    #[test]
    fn too_few_mappings_come_with_advice() {
        assert_eq!(max_map_count("65530\n").advice, None);
        assert!(max_map_count("1000\n").advice.is_some_and(|a| a.contains("vm.max_map_count=65530")));
        assert_eq!(max_map_count("").value, Value::Unknown);
    }

    #[test]
    fn huge_pages_of_shared_memory() {
        let of = |text| huge_pages(text);
        for text in ["always within_size [advise] never deny force\n", "[always] within_size advise never deny force\n"]
        {
            assert_eq!((of(text).value, of(text).advice), (Value::Flag(true), None));
        }
        let never = of("always within_size advise [never] deny force\n");
        assert_eq!(never.value, Value::Flag(false));
        assert!(never.advice.is_some_and(|advice| advice.contains("shmem_enabled")));
        assert_eq!(of("").value, Value::Unknown);
    }

    #[test]
    fn this_host_is_described() {
        let report = report();
        assert!(report.cpu.level >= 1 && !report.cpu.model.is_empty());
        let keys: Vec<_> = report.facts.iter().map(|f| f.key).collect();
        assert_eq!(
            keys,
            [
                "memory_total",
                "memory_available",
                "swap_total",
                "cpus",
                "max_map_count",
                "open_files",
                "memfd",
                "huge_pages",
                "sandbox",
                "userfaultfd",
                "tun"
            ]
        );
        for engine in &report.engines {
            assert_eq!(engine.usable, engine.advice.is_none(), "{engine:?}");
        }
        assert_eq!(report.auto, report.engines.iter().find(|e| e.usable).map(|e| e.engine));
    }
}
