//! What `purlin image` needs: information, conversion, growing, and reading on the host.

mod common;

use std::{
    fs,
    io::{Read, Seek, SeekFrom},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use common::{KIB, MIB, Rng, assert_image, qemu_img, qemu_img_ok, text};
use purlin_storage::{
    Conversion, Disk, DiskReader, DiskSpec, Format, NewImage, SourceFormat, grow, info, open_read_only,
};

/// A sparse raw image of 16 MiB with something at its start, in its middle and at its end.
fn sparse(directory: &Path) -> (PathBuf, Vec<u8>) {
    let path = directory.join("source.raw");
    let mut content = vec![0; 16 * MIB as usize];
    let mut rng = Rng::new(1);
    for (offset, length) in [(0, 100 * KIB), (5 * MIB + 512, 3 * MIB), (16 * MIB - 512, 512)] {
        rng.fill(&mut content[offset as usize..][..length as usize]);
    }
    NewImage::empty(&path, Format::Raw, 16 * MIB).create().unwrap();
    let disk = Disk::open(&DiskSpec::new(&path)).unwrap();
    for (index, block) in content.chunks(512).enumerate() {
        if block.iter().any(|b| *b != 0) {
            disk.write_at(block, index as u64 * 512).unwrap();
        }
    }
    (path, content)
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

fn convert(source: (&Path, SourceFormat), target: (&Path, Format)) {
    let mut last = (0, 0);
    let mut progress = |done, all| {
        assert!(last.0 <= done && done <= all);
        last = (done, all);
    };
    Conversion { source, target, other_files: false }.run(&mut progress).unwrap();
    if matches!(source.1, SourceFormat::Disk(_)) {
        assert_eq!(last, (16 * MIB, 16 * MIB));
    }
}

#[test]
fn between_raw_and_qcow2_without_the_holes() {
    let directory = tempfile::tempdir().unwrap();
    let (raw, content) = sparse(directory.path());
    let qcow2 = directory.path().join("a.qcow2");
    convert((&raw, SourceFormat::Disk(Format::Raw)), (&qcow2, Format::Qcow2));
    assert_image(&qcow2, Format::Qcow2, &content);
    assert!(allocated(&qcow2) < 5 * MIB, "{}", allocated(&qcow2));
    let again = directory.path().join("b.raw");
    convert((&qcow2, SourceFormat::Disk(Format::Qcow2)), (&again, Format::Raw));
    assert_image(&again, Format::Raw, &content);
    assert!(allocated(&again) < 5 * MIB, "{}", allocated(&again));
    assert_eq!(fs::metadata(&again).unwrap().len(), 16 * MIB);
}

#[test]
fn compressed_images_as_they_are_downloaded() {
    let directory = tempfile::tempdir().unwrap();
    let (raw, content) = sparse(directory.path());
    let compressed = directory.path().join("cloud.img");
    qemu_img_ok(&["convert", "-c", "-f", "raw", "-O", "qcow2", text(&raw), text(&compressed)]);
    assert_eq!(SourceFormat::of_content(&compressed).unwrap(), SourceFormat::Disk(Format::Qcow2));
    let target = directory.path().join("a.raw");
    convert((&compressed, SourceFormat::Disk(Format::Qcow2)), (&target, Format::Raw));
    assert_image(&target, Format::Raw, &content);
}

#[test]
fn foreign_formats() {
    let directory = tempfile::tempdir().unwrap();
    let (raw, content) = sparse(directory.path());
    for (qemu_name, options, format) in [
        ("vmdk", "subformat=monolithicSparse", SourceFormat::Vmdk),
        ("vmdk", "subformat=streamOptimized", SourceFormat::Vmdk),
        ("vpc", "force_size=on", SourceFormat::Vhd),
        ("vpc", "force_size=on,subformat=fixed", SourceFormat::Vhd),
        ("vhdx", "subformat=dynamic", SourceFormat::Vhdx),
        ("vdi", "static=off", SourceFormat::Vdi),
    ] {
        let foreign = directory.path().join("foreign");
        qemu_img_ok(&["convert", "-f", "raw", "-O", qemu_name, "-o", options, text(&raw), text(&foreign)]);
        assert_eq!(SourceFormat::of_content(&foreign).unwrap(), format, "{options}");
        assert_eq!(format.to_string().parse(), Ok(format));
        let target = directory.path().join("target.qcow2");
        convert((&foreign, format), (&target, Format::Qcow2));
        assert_image(&target, Format::Qcow2, &content);
        fs::remove_file(target).unwrap();
    }
}

#[test]
fn conversions_that_cannot_be() {
    let directory = tempfile::tempdir().unwrap();
    let (raw, _) = sparse(directory.path());
    let target = directory.path().join("target.qcow2");
    let run = |source: &Path, format, target: &Path| {
        let conversion = Conversion { source: (source, format), target: (target, Format::Qcow2), other_files: false };
        let line = conversion.run(&mut |_, _| {}).unwrap_err().to_string();
        assert!(!line.contains('\n'), "{line}");
        line
    };
    // A VMDK of which the data is in another file.
    let flat = directory.path().join("flat.vmdk");
    let options = ["-O", "vmdk", "-o", "subformat=monolithicFlat"];
    qemu_img_ok(&[&["convert", "-f", "raw"], &options[..], &[text(&raw), text(&flat)]].concat());
    let line = run(&flat, SourceFormat::Vmdk, &target);
    assert!(line.contains("only names the files"), "{line}");
    let line = run(&raw, SourceFormat::Vhdx, &target);
    assert!(line.contains("qemu-img cannot convert") && line.contains("source.raw"), "{line}");
    assert!(!target.exists());

    let overlay = directory.path().join("overlay.qcow2");
    NewImage::overlay(&overlay, &raw, Format::Raw).create().unwrap();
    let line = run(&overlay, SourceFormat::Disk(Format::Qcow2), &target);
    assert!(line.contains("depends on another file"), "{line}");
    assert!(!target.exists());

    fs::write(&target, "precious").unwrap();
    run(&raw, SourceFormat::Disk(Format::Raw), &target);
    run(&flat, SourceFormat::Vmdk, &target);
    assert_eq!(fs::read(&target).unwrap(), b"precious");
}

#[test]
fn an_overlay_of_an_image_that_is_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let [used, overlay] = ["used.qcow2", "overlay.qcow2"].map(|name| directory.path().join(name));
    NewImage::empty(&used, Format::Qcow2, 32 * MIB).create().unwrap();
    let spec = DiskSpec::new(&used).format(Format::Qcow2);
    let disk = Disk::open(&spec).unwrap();
    let new = NewImage::overlay(&overlay, &used, Format::Qcow2);
    assert!(new.create().is_err(), "it can be written by somebody");
    new.create_over_used().unwrap();
    drop(disk);
    let (_, said) = qemu_img(&["info", "--output=json", "--backing-chain", text(&overlay)]);
    assert_eq!(said.matches(&format!("\"virtual-size\": {}", 32 * MIB)).count(), 2, "{said}");
    assert!(said.contains("\"backing-filename-format\": \"qcow2\""), "{said}");

    let raw = directory.path().join("raw");
    fs::write(&raw, [0; 512]).unwrap();
    let other = directory.path().join("other.qcow2");
    assert!(NewImage::overlay(&other, &raw, Format::Qcow2).create_over_used().is_err());
    for size in [0u64, 513, 1 << 60, u64::MAX] {
        let file = fs::File::options().write(true).open(&used).unwrap();
        file.write_all_at(&size.to_be_bytes(), 24).unwrap();
        let refused = NewImage::overlay(&other, &used, Format::Qcow2).create_over_used().unwrap_err().to_string();
        assert!(refused.contains("does not say its size"), "{refused}");
    }
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&overlay, &link).unwrap();
    assert!(NewImage::overlay(&other, &link, Format::Qcow2).create_over_used().is_err());
    assert!(!other.exists());
}

#[test]
fn information() {
    let directory = tempfile::tempdir().unwrap();
    let (raw, _) = sparse(directory.path());
    let overlay = directory.path().join("overlay.qcow2");
    NewImage::overlay(&overlay, &raw, Format::Raw).size(32 * MIB).create().unwrap();
    let about = info(&overlay, None).unwrap();
    assert_eq!((about.format, about.virtual_size), (Format::Qcow2, 32 * MIB));
    let backing = about.backing.unwrap();
    assert_eq!((backing.path, backing.format.as_deref()), (raw.clone(), Some("raw")));
    assert_eq!(about.allocated, allocated(&overlay));
    let (_, said) = qemu_img(&["info", "-U", "--output=json", text(&overlay)]);
    assert!(said.contains(&format!("\"virtual-size\": {}", 32 * MIB)), "{said}");

    let about = info(&raw, None).unwrap();
    assert_eq!((about.format, about.virtual_size, about.backing), (Format::Raw, 16 * MIB, None));
    assert!(about.allocated < 5 * MIB);
    assert_eq!(info(&overlay, Some(Format::Raw)).unwrap().format, Format::Raw);
}

#[test]
fn larger_and_never_smaller() {
    let directory = tempfile::tempdir().unwrap();
    let (raw, mut content) = sparse(directory.path());
    let qcow2 = directory.path().join("a.qcow2");
    convert((&raw, SourceFormat::Disk(Format::Raw)), (&qcow2, Format::Qcow2));
    // 2 GiB takes more tables than the image had.
    for (path, format, size) in [(&raw, Format::Raw, 20 * MIB), (&qcow2, Format::Qcow2, 2048 * MIB)] {
        grow(path, format, size).unwrap();
        assert_eq!(Disk::open(&DiskSpec::new(path).read_only()).unwrap().size(), size);
        assert!(grow(path, format, size - 512).is_err());
        assert!(grow(path, format, size + 1).is_err());
    }
    content.resize(20 * MIB as usize, 0);
    assert_image(&raw, Format::Raw, &content);
    assert_image(&qcow2, Format::Qcow2, &content);
    assert!(allocated(&qcow2) < 6 * MIB);
}

#[test]
fn an_overlay_shows_what_is_below() {
    let directory = tempfile::tempdir().unwrap();
    let (raw, content) = sparse(directory.path());
    let overlay = directory.path().join("overlay.qcow2");
    NewImage::overlay(&overlay, &raw, Format::Raw).create().unwrap();
    let disk = Disk::open(&DiskSpec::new(&overlay)).unwrap();
    disk.write_at(&[7; 512], 512).unwrap();
    drop(disk);
    assert_eq!(fs::read(&raw).unwrap(), content);

    let mut reader = DiskReader::new(open_read_only(&overlay, None).unwrap());
    let mut sectors = [0; 1536];
    reader.read_exact(&mut sectors).unwrap();
    assert!(sectors[..512] == content[..512] && sectors[512..1024] == [7; 512]);
    assert!(sectors[1024..] == content[1024..1536]);
    assert_eq!(reader.seek(SeekFrom::End(-100)).unwrap(), 16 * MIB - 100);
    let mut rest = Vec::new();
    assert_eq!(reader.read_to_end(&mut rest).unwrap(), 100);
    assert!(rest == content[content.len() - 100..]);
    assert_eq!(reader.seek(SeekFrom::Current(-50)).unwrap(), 16 * MIB - 50);
    assert!(reader.seek(SeekFrom::Current(i64::MIN)).is_err());
    reader.seek(SeekFrom::Start(u64::MAX)).unwrap();
    assert_eq!(reader.read(&mut sectors).unwrap(), 0);
}
