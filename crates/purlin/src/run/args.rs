//! The arguments of `purlin run`.

use std::path::PathBuf;

use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser},
};
use purlin_arch::x86_64::cpuid::CpuModel;
use purlin_vmm::{OptionalDevice, engines::EngineChoice, network::nat::Publish, storage::DiskSpec};

use super::{
    disk,
    net::{self, Net},
    quantity::parse_size,
};
use crate::exit;

/// Run a virtual machine in the foreground, with its serial port on the terminal
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

    /// The kernel's command line ('console=ttyS0' if not given); added to that of an image
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,

    /// Memory of the guest: a number with K, M, G or T [default: 512M, for an image 1G]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory: Option<u64>,

    /// Number of virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,

    /// What executes the guest: KVM, the translator, or KVM only where it really runs kernels
    #[arg(long, default_value = "auto", value_parser = engine_parser())]
    pub engine: EngineChoice,

    /// The processor that the guest sees [default: the best level up to x86-64-v3 that this host has]
    #[arg(long, value_name = "MODEL", value_parser = model_parser())]
    pub cpu: Option<CpuModel>,

    /// Where the guest's serial port goes: stdio, file:PATH or none
    #[arg(long, value_name = "WHERE", default_value = "stdio", value_parser = parse_serial)]
    pub serial: Serial,

    /// A further device: rng (virtio-rng), debug-exit (port 0xf4 ends the run) or debugcon (port 0xe9 writes to the
    /// serial output)
    #[arg(long, value_name = "DEVICE", value_parser = device_parser())]
    pub device: Vec<OptionalDevice>,

    /// A disk (/dev/vda, /dev/vdb and so on in the guest, behind those of an image): the path of a raw or qcow2 image,
    /// with format=raw|qcow2 where its name does not say it, readonly, serial=TEXT, and the limits iops=N and bps=RATE
    /// behind commas
    #[arg(long, value_name = "PATH[,OPTION]...", value_parser = disk::parse)]
    pub disk: Vec<DiskSpec>,

    /// The network: user (behind the host's own address, with no privilege), tap=NAME (an interface of the host's) or
    /// none; ',bps=RATE' limits it, ',loopback' makes user's gateway 10.0.2.2 the host's own 127.0.0.1, ',queues=N' is
    /// for an interface made with multi_queue (as many as there are CPUs) [default: user for an image, else none]
    #[arg(long, value_name = "KIND", value_parser = net::parse)]
    pub net: Option<Net>,

    /// A port of the host's that leads to one of the guest's; without HOST it is 127.0.0.1. An image's ssh is led to from
    /// port 2222, or the next that is free
    #[arg(long, value_name = "[HOST:]PORT:GUESTPORT[/udp]")]
    pub publish: Vec<Publish>,

    /// The guest's name [default: the image's]
    #[arg(long, value_name = "NAME", conflicts_with = "kernel")]
    pub hostname: Option<String>,

    /// What cloud-init is to do in an image at its first boot, beside letting your ssh key in
    #[arg(long, value_name = "FILE", conflicts_with = "kernel")]
    pub user_data: Option<PathBuf>,

    /// The size of an image's own disk, if it is to be larger than the image
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with = "kernel")]
    pub disk_size: Option<u64>,

    /// End the run when the guest resets itself, instead of starting it again
    #[arg(long)]
    pub no_reboot: bool,
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
  purlin run --kernel kernel.elf --device debug-exit --serial file:log --no-reboot";

const KEYS: &str = "\
On a terminal:
  Ctrl-A x  ends the run       Ctrl-A h  shows this help       Ctrl-A Ctrl-A  sends Ctrl-A";

/// Where the serial port goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Serial {
    /// Standard input and output.
    Stdio,
    /// Output to a file, no input.
    File(PathBuf),
    /// There is no serial port.
    None,
}

fn parse_serial(text: &str) -> Result<Serial, String> {
    match (text, text.strip_prefix("file:")) {
        ("stdio", _) => Ok(Serial::Stdio),
        ("none", _) => Ok(Serial::None),
        (_, Some(path)) if !path.is_empty() => Ok(Serial::File(path.into())),
        _ => Err("it is one of stdio, file:PATH, none".into()),
    }
}

fn engine_parser() -> impl TypedValueParser<Value = EngineChoice> {
    PossibleValuesParser::new(["auto", "kvm", "translator"]).try_map(|name| name.parse::<EngineChoice>())
}

fn model_parser() -> impl TypedValueParser<Value = CpuModel> {
    PossibleValuesParser::new(["host", "x86-64-v2", "x86-64-v3", "x86-64-v4"]).map(|name| match name.as_str() {
        "x86-64-v2" => CpuModel::V2,
        "x86-64-v3" => CpuModel::V3,
        "x86-64-v4" => CpuModel::V4,
        _ => CpuModel::Host,
    })
}

fn device_parser() -> impl TypedValueParser<Value = OptionalDevice> {
    PossibleValuesParser::new(["rng", "debug-exit", "debugcon"]).map(|name| match name.as_str() {
        "rng" => OptionalDevice::Rng,
        "debug-exit" => OptionalDevice::DebugExit,
        _ => OptionalDevice::Debugcon,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_ports() {
        assert_eq!(parse_serial("file:a:b"), Ok(Serial::File("a:b".into())));
        assert!(parse_serial("file:").is_err());
        assert!(parse_serial("tcp").is_err());
    }
}
