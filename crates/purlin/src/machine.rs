//! The options that say what a machine is made of, for every verb that makes one.

mod balloon;
pub mod disk;
mod net;
mod quantity;

use std::path::PathBuf;

use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser},
};
use purlin_api::{Balloon, CpuModel, Device, Disk, Engine, Machine, Network, OnIoError};
use purlin_vmm::network::nat::Publish;

pub use self::{net::parse as parse_network, quantity::parse_size};

/// A machine's hardware, as the command line says it.
#[derive(Args, Clone, Debug)]
pub struct MachineArgs {
    /// Memory of the guest: a number with K, M, G or T [default: 1G for an image, else 512M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, help_heading = PROCESSOR)]
    pub memory: Option<u64>,

    /// Number of virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = PROCESSOR)]
    pub cpus: u32,

    /// What executes the guest: KVM, the translator, or KVM only where it really runs kernels
    #[arg(long, default_value = "auto", value_parser = engine_parser(), help_heading = PROCESSOR)]
    pub engine: Engine,

    /// The processor that the guest sees [default: the best level up to x86-64-v3 that this host has]
    #[arg(long, value_name = "MODEL", value_parser = model_parser(), help_heading = PROCESSOR)]
    pub cpu: Option<CpuModel>,

    /// A memory balloon (virtio-balloon), through which free memory of the guest's is the host's again
    ///
    /// 'size=SIZE[,deflate-on-oom=on|off][,free-page-reporting=on|off]': SIZE is what the guest is asked to give back at
    /// once, mostly 0; if not said otherwise it gives back what is free as it goes, and takes more when it runs out.
    #[arg(long, value_name = "OPTIONS", value_parser = balloon::parse, help_heading = PROCESSOR)]
    pub balloon: Option<Balloon>,

    /// A disk: the path of a raw or qcow2 image, with options behind commas; can be repeated
    ///
    /// It is /dev/vda, /dev/vdb and so on in the guest, behind those of an image. Options: format=raw|qcow2 where its name
    /// does not say it, readonly, serial=TEXT, and the limits iops=N and bps=RATE.
    #[arg(long, value_name = "PATH[,OPTION]...", value_parser = disk::parse, help_heading = DISKS)]
    pub disk: Vec<Disk>,

    /// The size of an image's own disk, if it is to be larger than the image (it cannot be smaller)
    #[arg(long, value_name = "SIZE", value_parser = parse_size, help_heading = DISKS)]
    pub disk_size: Option<u64>,

    /// What to do when the host cannot carry out a request to a disk: report or pause
    ///
    /// That is so when the host is out of space, or its own disk fails. report gives the guest an error, pause stops the
    /// guest until you let it go on, and then tries again.
    #[arg(long, value_name = "WHAT", default_value = "report", value_parser = on_io_error_parser(), help_heading = DISKS)]
    pub on_io_error: OnIoError,

    /// The network: user, tap=NAME or none [default: user for an image, else none]
    ///
    /// user is behind the host's own address, with no privilege; tap=NAME is an interface of the host's. ',bps=RATE' limits
    /// it, ',loopback' makes user's gateway 10.0.2.2 the host's own 127.0.0.1, ',queues=N' is for an interface made with
    /// multi_queue (as many as there are CPUs).
    #[arg(long, value_name = "KIND", value_parser = net::parse, help_heading = NETWORK)]
    pub net: Option<Network>,

    /// A port of the host's that leads to one of the guest's; without HOST it is 127.0.0.1; can be repeated
    ///
    /// An image's ssh is led to from port 2222, or the next that is free.
    #[arg(long, value_name = "[HOST:]PORT:GUESTPORT[/udp]", value_parser = publish_parser(), help_heading = NETWORK)]
    pub publish: Vec<String>,

    /// A further device: rng, debug-exit or debugcon; can be repeated
    ///
    /// rng is virtio-rng; a write to port 0xf4 of debug-exit ends the run; what is written to port 0xe9 of debugcon goes to
    /// the serial output.
    #[arg(long, value_name = "DEVICE", value_parser = device_parser())]
    pub device: Vec<Device>,

    /// What cloud-init is to do in an image at its first boot, beside letting your ssh key in
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<PathBuf>,
}

/// Headings of `--help`.
const PROCESSOR: &str = "Processor and memory";
const DISKS: &str = "Disks";
const NETWORK: &str = "Network";

impl MachineArgs {
    /// The hardware, with `memory` and `network` where the command line says nothing of them.
    pub fn hardware(&self, memory: u64, network: Network) -> Machine {
        Machine {
            memory: Some(self.memory.unwrap_or(memory)),
            cpus: Some(self.cpus),
            engine: self.engine,
            cpu: self.cpu,
            devices: self.device.clone(),
            disks: self.disk.iter().map(disk::absolute).collect(),
            network: self.net.clone().unwrap_or(network),
            publish: self.publish.clone(),
            balloon: self.balloon,
            on_io_error: self.on_io_error,
            cpu_shares: None,
            cpu_cap: None,
            memory_max: None,
        }
    }
}

fn engine_parser() -> impl TypedValueParser<Value = Engine> {
    PossibleValuesParser::new(["auto", "kvm", "translator"]).map(|name| match name.as_str() {
        "kvm" => Engine::Kvm,
        "translator" => Engine::Translator,
        _ => Engine::Auto,
    })
}

fn model_parser() -> impl TypedValueParser<Value = CpuModel> {
    PossibleValuesParser::new(["host", "x86-64-v2", "x86-64-v3", "x86-64-v4"]).map(|name| match name.as_str() {
        "x86-64-v2" => CpuModel::V2,
        "x86-64-v3" => CpuModel::V3,
        "x86-64-v4" => CpuModel::V4,
        _ => CpuModel::Host,
    })
}

fn device_parser() -> impl TypedValueParser<Value = Device> {
    PossibleValuesParser::new(["rng", "debug-exit", "debugcon"]).map(|name| match name.as_str() {
        "rng" => Device::Rng,
        "debug-exit" => Device::DebugExit,
        _ => Device::Debugcon,
    })
}

/// The text, once it is known to make sense.
fn publish_parser() -> impl TypedValueParser<Value = String> {
    clap::builder::NonEmptyStringValueParser::new().try_map(|text| text.parse::<Publish>().map(|_| text))
}

fn on_io_error_parser() -> impl TypedValueParser<Value = OnIoError> {
    PossibleValuesParser::new(["report", "pause"])
        .map(|name| if name == "pause" { OnIoError::Pause } else { OnIoError::Report })
}
