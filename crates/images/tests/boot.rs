//! Kernels found on disks as other tools make them: mke2fs, with or without partitions, raw and qcow2.

use std::{
    fs::{self, File},
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use purlin_images::{
    Error,
    boot::{self, BootFiles},
};
use purlin_storage::{Conversion, Disk, Format, SourceFormat, open_read_only};

const MIB: u64 = 1 << 20;

/// A directory tree as the file system of a disk.
fn ext(dir: &Path, kind: &str, files: &[(&str, &str)]) -> PathBuf {
    let root = dir.join("root");
    let _ = fs::remove_dir_all(&root);
    for (path, content) in files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    let disk = dir.join("fs.raw");
    let _ = fs::remove_file(&disk);
    let mut command = Command::new("/sbin/mke2fs");
    command.args(["-q", "-F", "-t", kind, "-U", "11111111-2222-3333-4444-555555555555", "-d"]);
    assert!(command.arg(&root).arg(&disk).arg("8M").status().expect("mke2fs (e2fsprogs)").success());
    disk
}

/// The file system in the second partition of an MBR.
fn in_mbr(dir: &Path, system: &Path) -> PathBuf {
    let data = fs::read(system).unwrap();
    let disk = dir.join("mbr.raw");
    let mut file = File::create(&disk).unwrap();
    file.set_len(2 * MIB + data.len() as u64).unwrap();
    let mut table = [0_u8; 512];
    for (index, start, length, kind) in [(0, MIB, MIB, 0x0c_u8), (1, 2 * MIB, data.len() as u64, 0x83)] {
        let entry = &mut table[446 + 16 * index..][..16];
        entry[4] = kind;
        entry[8..12].copy_from_slice(&((start / 512) as u32).to_le_bytes());
        entry[12..16].copy_from_slice(&((length / 512) as u32).to_le_bytes());
    }
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    file.write_all(&table).unwrap();
    file.seek(SeekFrom::Start(2 * MIB)).unwrap();
    file.write_all(&data).unwrap();
    disk
}

fn open(path: &Path) -> Arc<Disk> {
    open_read_only(path, None).unwrap()
}

/// Finds what is booted, next to the disk.
fn read(path: &Path) -> Result<BootFiles, Error> {
    boot::copy(&open(path), "x", path.parent().unwrap())
}

/// The content of the kernel that was found.
fn kernel(found: &BootFiles) -> String {
    fs::read_to_string(&found.kernel).unwrap()
}

fn reason(path: &Path) -> String {
    let error = read(path).unwrap_err();
    assert!(matches!(error, Error::Boot { .. }), "{error}");
    let text = error.to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

const PLAIN: [(&str, &str); 4] = [
    ("boot/vmlinuz-6.1.0-9", "old"),
    ("boot/vmlinuz-6.1.0-10", "kernel"),
    ("boot/initrd.img-6.1.0-10", "initrd"),
    ("etc/os-release", "ID=x"),
];

#[test]
fn the_newest_kernel_of_each_file_system() {
    let dir = tempfile::tempdir().unwrap();
    for kind in ["ext2", "ext3", "ext4"] {
        let files = read(&ext(dir.path(), kind, &PLAIN)).unwrap();
        assert_eq!(kernel(&files), "kernel");
        let [initrd] = &files.initrds[..] else { panic!("{files:?}") };
        assert_eq!(fs::read(initrd).unwrap(), b"initrd");
        assert_eq!(files.cmdline, "root=UUID=11111111-2222-3333-4444-555555555555 console=ttyS0", "{kind}");
    }
}

#[test]
fn partitions_and_qcow2() {
    let dir = tempfile::tempdir().unwrap();
    let raw = in_mbr(dir.path(), &ext(dir.path(), "ext4", &PLAIN));
    let qcow2 = dir.path().join("disk.qcow2");
    let source = (raw.as_path(), SourceFormat::Disk(Format::Raw));
    Conversion { source, target: (&qcow2, Format::Qcow2), other_files: false }.run(&mut |_, _| {}).unwrap();
    for disk in [raw, qcow2] {
        assert_eq!(kernel(&read(&disk).unwrap()), "kernel");
    }
}

#[test]
fn what_the_boot_loader_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let grub = "menuentry 'x' {\n linux /boot/k root=LABEL=a quiet\n initrd /boot/i\n}\n";
    let files = [("boot/grub/grub.cfg", grub), ("boot/k", "from grub"), ("boot/i", "i"), PLAIN[1]];
    let found = read(&ext(dir.path(), "ext4", &files)).unwrap();
    assert_eq!((&*kernel(&found), &*found.cmdline), ("from grub", "root=LABEL=a quiet console=ttyS0"));

    // A partition of its own for /boot: paths are from its top, and the entry says where the root is.
    let entry = "title x\nlinux /k\ninitrd /i\noptions root=UUID=1 ro\n";
    let files = [("loader/entries/x.conf", entry), ("k", "from bls"), ("i", "i")];
    let found = read(&ext(dir.path(), "ext4", &files)).unwrap();
    assert_eq!((&*kernel(&found), &*found.cmdline), ("from bls", "root=UUID=1 ro console=ttyS0"));

    let files = [("etc/kernel/cmdline", "root=/dev/vda\nro\n"), PLAIN[1]];
    let found = read(&ext(dir.path(), "ext4", &files)).unwrap();
    assert_eq!(found.cmdline, "root=/dev/vda ro console=ttyS0");
}

#[test]
fn a_kernel_of_many_blocks_is_copied_whole() {
    let dir = tempfile::tempdir().unwrap();
    // With a hole, and more than is copied at once.
    let line = |number: u32| if number / 5000 == 3 { "\0".repeat(16) } else { format!("{number:15}\n") };
    let long: String = (0..50_001).map(line).collect();
    let found = read(&ext(dir.path(), "ext4", &[("boot/vmlinuz-6.1.0-10", &long), PLAIN[2], PLAIN[3]])).unwrap();
    assert!(kernel(&found) == long);
}

#[test]
fn what_cannot_be_booted_is_named() {
    let dir = tempfile::tempdir().unwrap();
    assert!(reason(&ext(dir.path(), "ext4", &[("etc/os-release", "x")])).contains("no kernel in /boot"));
    let missing = "menuentry x {\nlinux /boot/gone root=/dev/vda\n}\n";
    assert!(reason(&ext(dir.path(), "ext4", &[("boot/grub/grub.cfg", missing)])).contains("/boot/gone"));
    let entry = |initrds| format!("menuentry x {{\nlinux /boot/k root=x\ninitrd {}\n}}\n", "/boot/i ".repeat(initrds));
    let with =
        |initrds| ext(dir.path(), "ext4", &[("boot/grub/grub.cfg", &*entry(initrds)), ("boot/k", ""), ("boot/i", "")]);
    assert_eq!(read(&with(64)).unwrap().initrds.len(), 64);
    assert!(reason(&with(65)).contains("more than 64 initial RAM disks"));
    let control = "menuentry x {\nlinux /boot/k root=\u{7}\n}\n";
    assert!(
        reason(&ext(dir.path(), "ext4", &[("boot/grub/grub.cfg", control), ("boot/k", "k")])).contains("printable")
    );

    for (at, signature, name) in
        [(0, &b"XFSB"[..], "XFS"), (0x1_0040, b"_BHRfS_M", "Btrfs"), (0, b"", "no file system")]
    {
        let disk = dir.path().join("other.raw");
        let mut file = File::create(&disk).unwrap();
        file.set_len(MIB).unwrap();
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(signature).unwrap();
        assert!(reason(&disk).contains(name), "{name}");
    }
}

/// An extended partition whose chain of tables leads back to itself ends, and so does one at sector 0.
#[test]
fn a_loop_of_tables_ends() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("loop.raw");
    for start in [0_u32, 1] {
        let mut data = vec![0_u8; MIB as usize];
        for sector in [0, 1] {
            let table = &mut data[512 * sector..][..512];
            for (at, kind) in [(446, 0x83), (462, 0x05)] {
                table[at + 4] = kind;
                table[at + 8..at + 12].copy_from_slice(&(if sector == 0 { start } else { 0 }).to_le_bytes());
                table[at + 12..at + 16].copy_from_slice(&8_u32.to_le_bytes());
            }
            table[510..].copy_from_slice(&[0x55, 0xaa]);
        }
        fs::write(&disk, &data).unwrap();
        assert!(reason(&disk).contains("no file system"), "{start}");
    }
}

/// What a guest wrote over its own disk must be an error or a kernel, never a panic.
#[test]
fn a_disk_with_damage_is_survived() {
    let dir = tempfile::tempdir().unwrap();
    let whole = fs::read(in_mbr(dir.path(), &ext(dir.path(), "ext4", &PLAIN))).unwrap();
    let disk = dir.path().join("damaged.raw");
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..300 {
        let mut data = whole.clone();
        for _ in 0..40 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            // The tables and the file system's first blocks, where all that matters is.
            let at = if state & 1 == 0 { state >> 8 & 0x1ff } else { 2 * MIB + (state >> 8) % (256 << 10) };
            data[at as usize] = (state >> 40) as u8;
        }
        fs::write(&disk, &data).unwrap();
        let _ = read(&disk);
    }
}
