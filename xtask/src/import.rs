//! Images as other systems lay them out: Debian with GRUB on a GPT disk, as its cloud images are, in the formats that
//! hypervisors have. Each is imported, compared with what it was made from, and one is booted.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use clap::Args;
use purlin_images::{prepare::Prepared, store::Store};

use crate::{
    agent,
    debian::{Connection, Debian, HOST_NAME, PROMPT, prepare, purlin},
    machine, shell,
};

/// What to start from.
#[derive(Args)]
pub struct ImportArgs {
    /// An image of the store; it is built if it is not there yet
    #[arg(long, default_value = "debian")]
    image: String,
}

/// qemu-img's names of the formats.
const FORMATS: [&str; 5] = ["raw", "qcow2", "vmdk", "vpc", "vhdx"];

/// The one to boot.
const BOOTED: &str = "vmdk";

/// The disk that the guest makes, its third.
const SIZE: u64 = 4 << 30;

/// What makes a copy of the running system on /dev/vdc, as Debian's cloud images have it: a GPT with a partition for GRUB,
/// one for EFI and one for all else, and a configuration that Debian's GRUB writes.
const COPY: &str = r#"set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq -y --no-install-recommends install fdisk dosfstools >/dev/null
sfdisk -q /dev/vdc <<'TABLE'
label: gpt
/dev/vdc14 : start=2048, size=3M, type=21686148-6449-6E6F-744E-656564454649
/dev/vdc15 : size=124M, type=uefi
/dev/vdc1 : type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709
TABLE
udevadm settle
mkfs.ext4 -q /dev/vdc1
mkfs.vfat /dev/vdc15 >/dev/null
mount /dev/vdc1 /mnt
tar -C / --one-file-system -cf - . | tar -C /mnt -xpf -
mkdir -p /mnt/boot/efi /mnt/boot/grub
mount /dev/vdc15 /mnt/boot/efi
for system in dev proc sys run; do mount --rbind /$system /mnt/$system; mount --make-rslave /mnt/$system; done
echo "PARTUUID=$(blkid -s PARTUUID -o value /dev/vdc1) / ext4 defaults 0 1" >/mnt/etc/fstab
chroot /mnt apt-get -qq -y --no-install-recommends install grub2-common >/dev/null
echo 'GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200 net.ifnames=0"' >/mnt/etc/default/grub
chroot /mnt update-grub
chroot /mnt cloud-init clean --logs
: >/mnt/etc/machine-id
chroot /mnt systemctl --quiet disable purlin-agent.service
rm -r /mnt/usr/lib/purlin /mnt/etc/systemd/system/purlin-agent.service
for system in dev proc sys run; do umount -R -l /mnt/$system; done
umount -R /mnt
e2fsck -fn /dev/vdc1 >/dev/null
echo it is made
"#;

/// Makes the disk and tries it.
pub fn run(args: &ImportArgs) -> Result<()> {
    machine::build()?;
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk.raw");
    fs::File::create(&disk)?.set_len(SIZE)?;
    make(&prepare(&args.image, None)?, &disk)?;
    for format in FORMATS {
        import(&disk, format, dir.path())?;
    }
    Ok(())
}

/// Runs [`COPY`] in a guest with this disk beside its own.
fn make(prepared: &Prepared, disk: &Path) -> Result<()> {
    let connection = Connection::user()?;
    let mut command = purlin(prepared, &connection);
    command.arg("--disk").arg(format!("{},format=raw", disk.display()));
    let mut guest = Debian::start_command("import-make", prepared, command, connection)?;
    guest.wait_for(PROMPT)?;
    let said = guest.ssh_with("sh", COPY.as_bytes())?;
    ensure!(said.ends_with("it is made\n"), "the disk could not be made: {said}; see {}", guest.log().display());
    guest.ssh("systemctl poweroff")?;
    guest.wait_for_end()
}

/// Imports the disk from an image of this format, and boots it if it is the one to boot.
fn import(disk: &Path, format: &str, dir: &Path) -> Result<()> {
    let source = dir.join(format!("disk.{format}"));
    if format != "raw" {
        let convert = ["convert", "-f", "raw", "-O", format];
        shell::run(Command::new("qemu-img").args(convert).arg(disk).arg(&source))?;
    }
    let name = format!("import-{format}");
    let image = |words: &[&str]| {
        let mut command = Command::new(machine::program());
        command.arg("image").args(words);
        command
    };
    let store = Store::of_user()?;
    if store.get(&name).is_ok() {
        shell::run(&mut image(&["delete", &name]))?;
    }
    shell::run(image(&["import", "--name", &name]).arg(&source))?;
    let imported = store.get(&name)?.disk();
    // An image of another format may be longer by a part of its cylinder.
    shell::run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "qcow2"]).arg(disk).arg(&imported))?;
    if format == BOOTED {
        boot(&name)?;
    }
    shell::run(&mut image(&["delete", &name]))
}

/// As a user runs an image from elsewhere.
fn boot(image: &str) -> Result<()> {
    let prepared = prepare(image, None)?;
    ensure!(prepared.cmdline.contains("console=tty0"), "GRUB's arguments are not used: {}", prepared.cmdline);
    let mut guest = Debian::start("import-boot", &prepared, purlin_with_vsock, Connection::user()?)?;
    for (command, wanted) in [
        ("systemctl is-system-running --wait", "running"),
        ("hostname", HOST_NAME),
        ("findmnt -n -o SOURCE /", "/dev/vda1"),
        ("findmnt -n -o SOURCE /boot/efi; test -d /boot/grub && echo GRUB", "GRUB"),
    ] {
        let said = guest.ssh(command)?;
        ensure!(said.trim() == wanted, "{command}: {said:?} instead of {wanted:?}; see {}", guest.log().display());
    }
    agent::check_installed(&agent::socket(&guest.connection)).context("the agent that the seed brings")?;
    guest.ssh("systemctl poweroff")?;
    guest.wait_for_end()
}

fn purlin_with_vsock(prepared: &Prepared, connection: &Connection) -> Command {
    let mut command = purlin(prepared, connection);
    command.arg("--vsock").arg(agent::socket(connection));
    command
}
