//! `--disk PATH[,format=…,readonly,serial=…,iops=…,bps=…]`.

use std::path::{Path, PathBuf};

use purlin_api::{Disk, DiskFormat};

use super::quantity::{parse_count, parse_rate};

/// Reads the argument. A comma in the path is written twice.
pub fn parse(text: &str) -> Result<Disk, String> {
    let mut parts = split(text).into_iter();
    let path = parts.next().filter(|path| !path.is_empty()).ok_or("it begins with the image's path")?;
    let mut spec = Disk::new(path);
    for part in parts {
        match part.split_once('=') {
            Some(("format", name)) => spec.format = Some(parse_format(name)?),
            Some(("serial", serial)) => spec.serial = Some(serial.to_owned()),
            Some(("iops", rate)) => spec.iops = Some(parse_count(rate)?),
            Some(("bps", rate)) => spec.bytes_per_second = Some(parse_rate(rate)?),
            None if part == "readonly" => spec.read_only = true,
            _ => {
                return Err(format!("'{part}' is none of format=raw|qcow2, readonly, serial=TEXT, iops=N, bps=RATE"));
            }
        }
    }
    Ok(spec)
}

fn parse_format(name: &str) -> Result<DiskFormat, String> {
    match name {
        "raw" => Ok(DiskFormat::Raw),
        "qcow2" => Ok(DiskFormat::Qcow2),
        _ => Err(format!("'format={name}': the formats are raw and qcow2")),
    }
}

/// The disk by its absolute path, for a process that is elsewhere.
pub fn absolute(disk: &Disk) -> Disk {
    Disk { path: absolute_path(&disk.path), ..disk.clone() }
}

fn absolute_path(path: &Path) -> PathBuf {
    // It fails only where there is no working directory: then a relative path leads nowhere anyway.
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Splits at commas; two of them are one that does not split.
pub fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match (c, parts.last_mut()) {
            (',', Some(part)) if rest.next_if_eq(&',').is_some() => part.push(','),
            (',', _) | (_, None) => parts.push(String::new()),
            (c, Some(part)) => part.push(c),
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks() {
        assert_eq!(parse("a b.img"), Ok(Disk::new("a b.img")));
        let all =
            Disk { serial: Some("x=1".into()), format: Some(DiskFormat::Qcow2), read_only: true, ..Disk::new("a,b") };
        assert_eq!(parse("a,,b,format=qcow2,readonly,serial=x=1"), Ok(all));
        let limited = parse("a.img,iops=500,bps=10M").unwrap();
        assert_eq!((limited.iops, limited.bytes_per_second), (Some(500), Some(10 << 20)));
        for wrong in
            ["a,iops=0", "a,bps=10", "", ",readonly", "a,format=vmdk", "a,format", "a,readonly=no", "a,", "a,b"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
