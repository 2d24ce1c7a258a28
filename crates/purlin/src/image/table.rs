//! Images as tables and as JSON.

use purlin_api::{Image, ImageOrigin};

use crate::table::{columns, in_units};

/// One line for each image.
pub fn of_all(images: &[Image]) -> String {
    let rows = images.iter().map(|image| {
        let (size, on_disk) = (in_units(image.virtual_size), in_units(image.file_size));
        [image.name.clone(), size, on_disk, image.created.clone(), origin(image)]
    });
    columns(["NAME", "SIZE", "ON DISK", "CREATED", "ORIGIN"], rows)
}

/// One line for each thing that is known.
pub fn of_one(image: &Image) -> String {
    [
        ("name", image.name.clone()),
        ("format", format!("{:?}", image.format).to_lowercase()),
        ("size", in_units(image.virtual_size)),
        ("on disk", in_units(image.file_size)),
        ("sha256", image.sha256.clone()),
        ("origin", origin(image)),
        ("created", image.created.clone()),
        ("disk", image.disk.display().to_string()),
    ]
    .iter()
    .map(|(name, value)| format!("{name:9} {value}\n"))
    .collect()
}

fn origin(image: &Image) -> String {
    match &image.origin {
        ImageOrigin::Built(what) => format!("built: {what}"),
        ImageOrigin::Imported(from) => format!("imported from {from}"),
    }
}
