//! Images as tables and as JSON.

use purlin_images::store::Image;
use serde_json::{Value, json};

use crate::table::{columns, in_units};

/// One line for each image.
pub fn of_all(images: &[Image]) -> String {
    let rows = images.iter().map(|image| {
        let metadata = &image.metadata;
        let (size, on_disk) = (in_units(metadata.virtual_size), in_units(metadata.file_size));
        [image.name.clone(), size, on_disk, metadata.created.clone(), metadata.origin.to_string()]
    });
    columns(["NAME", "SIZE", "ON DISK", "CREATED", "ORIGIN"], rows)
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
