//! Images out of the store: a copy as a file, in a format of the user's choice.

use std::path::Path;

use purlin_debian::{Error as HostError, Progress};
use purlin_storage::{Conversion, Format, SourceFormat};

use crate::{Error, build, store::Store};

/// Writes the disk of `source`, an image in the store or a file, to the new file `target`.
pub fn convert(
    store: &Store,
    source: &str,
    target: &Path,
    format: Format,
    progress: &dyn Progress,
) -> Result<(), Error> {
    // Before anything is said, or done for nothing.
    if target.try_exists().map_err(HostError::file("create", target))? {
        return Err(Error::TargetExists(target.to_owned()));
    }
    let (path, source_format) = match store.get(build::image_name(store, source)) {
        Ok(image) => (image.disk(), SourceFormat::Disk(image.format)),
        Err(Error::NoImage(_) | Error::Name(_)) if Path::new(source).exists() => {
            (source.into(), SourceFormat::of_content(Path::new(source))?)
        }
        Err(error) => return Err(error),
    };
    progress.step(&format!("converting from {source_format} to {format}"));
    // It is the user's own file: it may have others below it.
    let conversion = Conversion { source: (&path, source_format), target: (target, format), other_files: true };
    conversion.run(&mut |done, all| progress.fraction(done as f64 / all.max(1) as f64))?;
    if progress.cancelled() {
        // It is whole, but nobody wants it any more.
        std::fs::remove_file(target).map_err(HostError::file("remove", target))?;
        return Err(HostError::Cancelled.into());
    }
    Ok(())
}
