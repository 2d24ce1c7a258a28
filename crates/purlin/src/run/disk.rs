//! `--disk PATH[,format=…,readonly,serial=…,iops=…,bps=…]`.

use purlin_vmm::storage::{DiskSpec, limit::Rate};

use super::quantity::{parse_count, parse_rate};

/// Reads the argument. A comma in the path is written twice.
pub fn parse(text: &str) -> Result<DiskSpec, String> {
    let mut parts = split(text).into_iter();
    let path = parts.next().filter(|path| !path.is_empty()).ok_or("it begins with the image's path")?;
    let mut spec = DiskSpec::new(path);
    for part in parts {
        match part.split_once('=') {
            Some(("format", name)) => spec.format = Some(name.parse().map_err(|e| format!("'format={name}': {e}"))?),
            Some(("serial", serial)) => spec.serial = Some(serial.to_owned()),
            Some(("iops", rate)) => spec.limits.operations = Some(Rate::new(parse_count(rate)?)),
            Some(("bps", rate)) => spec.limits.bytes = Some(Rate::new(parse_rate(rate)?)),
            None if part == "readonly" => spec.read_only = true,
            _ => {
                return Err(format!("'{part}' is none of format=raw|qcow2, readonly, serial=TEXT, iops=N, bps=RATE"));
            }
        }
    }
    Ok(spec)
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
    use purlin_vmm::storage::Format;

    use super::*;

    #[test]
    fn disks() {
        assert_eq!(parse("a b.img"), Ok(DiskSpec::new("a b.img")));
        let all = DiskSpec { serial: Some("x=1".into()), ..DiskSpec::new("a,b").format(Format::Qcow2).read_only() };
        assert_eq!(parse("a,,b,format=qcow2,readonly,serial=x=1"), Ok(all));
        let limited = parse("a.img,iops=500,bps=10M").unwrap().limits;
        assert_eq!((limited.operations, limited.bytes), (Some(Rate::new(500)), Some(Rate::new(10 << 20))));
        for wrong in
            ["a,iops=0", "a,bps=10", "", ",readonly", "a,format=vmdk", "a,format", "a,readonly=no", "a,", "a,b"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
