//! Images as tables and as JSON.

use std::io::{Write, stdout};

use purlin_images::store::Image;
use serde_json::{Value, json};

/// Prints to standard output; nobody is left to tell if that is closed.
pub fn print(text: &str) {
    let _ = writeln!(stdout(), "{}", text.trim_end());
}

/// One line for each image.
pub fn of_all(images: &[Image]) -> String {
    let header = ["NAME", "SIZE", "ON DISK", "CREATED", "ORIGIN"].map(String::from);
    let rows = images.iter().map(|image| {
        let metadata = &image.metadata;
        let (size, on_disk) = (in_units(metadata.virtual_size), in_units(metadata.file_size));
        [image.name.clone(), size, on_disk, metadata.created.clone(), metadata.origin.to_string()]
    });
    let rows: Vec<_> = std::iter::once(header).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 5] = std::array::from_fn(width);
    let line = |row: &[String; 5]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// One line for each thing that is known.
pub fn of_one(image: &Image) -> String {
    let metadata = &image.metadata;
    [
        ("name", image.name.clone()),
        ("format", image.format.to_string()),
        ("size", in_units(metadata.virtual_size)),
        ("on disk", in_units(metadata.file_size)),
        ("sha256", metadata.sha256.clone()),
        ("origin", metadata.origin.to_string()),
        ("created", metadata.created.clone()),
        ("disk", image.disk().display().to_string()),
    ]
    .iter()
    .map(|(name, value)| format!("{name:9} {value}\n"))
    .collect()
}

/// All images, as an array.
pub fn json_of_all(images: &[Image]) -> String {
    Value::Array(images.iter().map(json).collect()).to_string()
}

/// One image. Sizes are in bytes.
pub fn json(image: &Image) -> Value {
    let metadata = &image.metadata;
    json!({
        "name": image.name,
        "format": image.format.to_string(),
        "virtual_size": metadata.virtual_size,
        "file_size": metadata.file_size,
        "sha256": metadata.sha256,
        "origin": metadata.origin,
        "created": metadata.created,
        "disk": image.disk(),
    })
}

/// `10 GiB`, `485.1 MiB`.
fn in_units(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let unit = (bytes.max(1).ilog2() / 10).min(4);
    let value = bytes as f64 / f64::from(1_u32 << (10 * unit.min(3))) / if unit == 4 { 1024.0 } else { 1.0 };
    format!("{} {}", format!("{value:.1}").trim_end_matches(".0"), units[unit as usize])
}

#[cfg(test)]
mod tests {
    use super::in_units;

    #[test]
    fn sizes_for_people() {
        assert_eq!(in_units(0), "0 bytes");
        assert_eq!(in_units(1023), "1023 bytes");
        assert_eq!(in_units(10 << 30), "10 GiB");
        assert_eq!(in_units((485 << 20) + (100 << 10)), "485.1 MiB");
        assert_eq!(in_units(3 << 40), "3 TiB");
    }
}
