//! Images: listed, made and deleted for those at the API.

use std::{io, sync::Arc};

use axum::body::Bytes;
use purlin_api::{
    DiskFormat, ErrorBody, Image, ImageFormat, ImageOrigin, Images as Listed, NewImage, Operation, Reason,
};
use purlin_images::{
    Error, Origin,
    build::{self, Recipe},
    import::{Import, is_url},
    store::{self, Store},
};
use purlin_vmm::storage::{Format, SourceFormat};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::{
    operations::{Operations, Progress},
    process::failed,
};

/// So many are fetched or built at once; others wait.
const MOST_MADE: usize = 4;
/// So many are received at once; others are refused.
const MOST_RECEIVED: usize = 8;
/// Pieces of an image that wait to be written.
const PIECES: usize = 8;

/// The images of the daemon's host.
pub struct Images {
    store: Store,
    operations: Arc<Operations>,
    made: Semaphore,
    received: Arc<Semaphore>,
}

/// What is said of an image that is sent.
pub struct Sent {
    /// Its name here.
    pub name: String,
    /// What it is called where it comes from.
    pub source: String,
    /// Its format; what its content says if left out.
    pub format: Option<ImageFormat>,
    /// The checksum that it must have.
    pub sha256: Option<String>,
    /// How many bytes there are, if that is known.
    pub length: Option<u64>,
}

/// An image that is being received.
pub struct Receiving {
    /// What becomes of it.
    pub operation: Operation,
    pieces: mpsc::Sender<Piece>,
    _permit: OwnedSemaphorePermit,
}

impl Images {
    /// Those of a store; what killed makers of images have left there is removed.
    pub fn new(store: Store, operations: Arc<Operations>) -> Arc<Self> {
        store.sweep();
        let (made, received) = (Semaphore::new(MOST_MADE), Arc::new(Semaphore::new(MOST_RECEIVED)));
        Arc::new(Self { store, operations, made, received })
    }

    /// All.
    pub fn list(&self) -> Result<Listed, ErrorBody> {
        let (mut images, mut damaged) = (Vec::new(), Vec::new());
        for image in self.store.list().map_err(refusal)? {
            match image {
                Ok(image) => images.push(shown(&image)),
                Err(error) => damaged.push(error.to_string()),
            }
        }
        Ok(Listed { images, damaged })
    }

    /// One.
    pub fn get(&self, name: &str) -> Result<Image, ErrorBody> {
        let image = self.store.get(build::image_name(&self.store, name)).map_err(refusal)?;
        Ok(shown(&image))
    }

    /// Begins to fetch one, or to build it.
    pub fn create(self: &Arc<Self>, new: NewImage) -> Result<Operation, ErrorBody> {
        self.check(&new).map_err(refusal)?;
        let what = match &new {
            NewImage::Url { name, .. } => format!("import image {name}"),
            NewImage::Build { what, .. } => format!("build image {what}"),
        };
        let images = self.clone();
        Ok(self.operations.begin(what, "", |progress| async move {
            // It fails only where the semaphore is closed, which it never is.
            let _turn = images.made.acquire().await;
            let work = images.clone();
            tokio::task::spawn_blocking(move || work.make(&new, &progress)).await.map_err(failed)?.map_err(refusal)
        }))
    }

    /// What can be known to be wrong.
    fn check(&self, new: &NewImage) -> Result<(), Error> {
        match new {
            NewImage::Url { name, url, sha256, .. } if is_url(url) => {
                Import { source: url, name, format: None, sha256: sha256.as_deref() }.check(&self.store)
            }
            NewImage::Url { url, .. } => Err(Error::Scheme(url.chars().take(80).collect())),
            NewImage::Build { what, name, .. } => {
                let recipe = Recipe::of_name(what)?;
                match self.store.get(name.as_deref().unwrap_or(recipe.image)) {
                    Err(error @ Error::Name(_)) => Err(error),
                    _ => Ok(()),
                }
            }
        }
    }

    fn make(&self, new: &NewImage, progress: &Progress) -> Result<(), Error> {
        match new {
            NewImage::Url { name, url, format, sha256 } => {
                let import = Import { source: url, name, format: format.map(source_format), sha256: sha256.as_deref() };
                import.run(&self.store, progress).map(drop)
            }
            NewImage::Build { what, name, rebuild } => {
                let recipe = Recipe::of_name(what)?;
                let name = name.as_deref().unwrap_or(recipe.image);
                build::build(&self.store, recipe, name, *rebuild, progress).map(drop)
            }
        }
    }

    /// Begins to receive one: it is there when all of it has been [passed](Receiving::pass), and [is whole](Receiving::end).
    pub fn receive(self: &Arc<Self>, sent: Sent) -> Result<Receiving, ErrorBody> {
        let import = Import { source: "", name: &sent.name, format: None, sha256: sent.sha256.as_deref() };
        import.check(&self.store).map_err(refusal)?;
        let _permit = self.received.clone().try_acquire_owned().map_err(|_| {
            ErrorBody::new(
                Reason::Unavailable,
                format!("{MOST_RECEIVED} images are being received already: wait for them"),
            )
        })?;
        let (pieces, inbox) = mpsc::channel(PIECES);
        let (images, what) = (self.clone(), format!("import image {}", sent.name));
        let operation = self.operations.begin(what, "", |progress| async move {
            let take = move || {
                let Sent { name, source, format, sha256, length } = &sent;
                let (format, sha256) = (format.map(source_format), sha256.as_deref());
                let import = Import { source, name, format, sha256 };
                let mut data = Pieces { inbox, rest: Bytes::new(), is_whole: false };
                import.run_on(&mut data, *length, &images.store, &progress).map(drop)
            };
            tokio::task::spawn_blocking(take).await.map_err(failed)?.map_err(refusal)
        });
        Ok(Receiving { operation, pieces, _permit })
    }

    /// Begins to delete one.
    pub fn delete(self: &Arc<Self>, name: &str) -> Result<Operation, ErrorBody> {
        let name = build::image_name(&self.store, name).to_owned();
        // A damaged one can be deleted.
        if let Err(error @ (Error::NoImage(_) | Error::Name(_))) = self.store.get(&name) {
            return Err(refusal(error));
        }
        let images = self.clone();
        Ok(self.operations.begin(format!("delete image {name}"), "", |progress| async move {
            let delete = move || images.store.delete(&name, &progress);
            tokio::task::spawn_blocking(delete).await.map_err(failed)?.map_err(refusal)
        }))
    }
}

/// A part of an image, or the word that there is no more.
enum Piece {
    Data(Bytes),
    End,
}

impl Receiving {
    /// Passes a part of it on; whether it is wanted still.
    pub async fn pass(&self, data: Bytes) -> bool {
        self.pieces.send(Piece::Data(data)).await.is_ok()
    }

    /// All of it was there. Without this it is forgotten.
    pub async fn end(self) -> Operation {
        // Nobody wants to know where it has failed already.
        let _ = self.pieces.send(Piece::End).await;
        self.operation
    }
}

/// What is passed on, for a thread that reads it.
struct Pieces {
    inbox: mpsc::Receiver<Piece>,
    rest: Bytes,
    is_whole: bool,
}

impl io::Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() && !self.is_whole {
            match self.inbox.blocking_recv() {
                Some(Piece::Data(data)) => self.rest = data,
                Some(Piece::End) => self.is_whole = true,
                None => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "not all of it was sent")),
            }
        }
        let count = self.rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.rest.split_to(count));
        Ok(count)
    }
}

/// An image, as the API has it.
pub fn shown(image: &store::Image) -> Image {
    let metadata = &image.metadata;
    Image {
        name: image.name.clone(),
        format: match image.format {
            Format::Raw => DiskFormat::Raw,
            Format::Qcow2 => DiskFormat::Qcow2,
        },
        virtual_size: metadata.virtual_size,
        file_size: metadata.file_size,
        sha256: metadata.sha256.clone(),
        origin: match &metadata.origin {
            Origin::Built(what) => ImageOrigin::Built(what.clone()),
            Origin::Imported(from) => ImageOrigin::Imported(from.clone()),
        },
        created: metadata.created.clone(),
        disk: image.disk(),
    }
}

fn source_format(format: ImageFormat) -> SourceFormat {
    match format {
        ImageFormat::Raw => SourceFormat::Disk(Format::Raw),
        ImageFormat::Qcow2 => SourceFormat::Disk(Format::Qcow2),
        ImageFormat::Vmdk => SourceFormat::Vmdk,
        ImageFormat::Vhd => SourceFormat::Vhd,
        ImageFormat::Vhdx => SourceFormat::Vhdx,
        ImageFormat::Vdi => SourceFormat::Vdi,
    }
}

/// Why it cannot be done, with what that is to programs.
pub fn refusal(error: Error) -> ErrorBody {
    let reason = match error {
        Error::NoImage(_) => Reason::NotFound,
        Error::Name(_) | Error::Scheme(_) | Error::NoChecksum(_) | Error::UnknownBuild(_) | Error::DiskSize { .. } => {
            Reason::BadRequest
        }
        Error::Exists(_) | Error::InUse(_) => Reason::Conflict,
        _ => Reason::Failed,
    };
    ErrorBody::new(reason, error)
}
