//! `purlin image`: the images that machines are made of.

mod args;
mod table;

use std::sync::Arc;

use anyhow::Result;
use purlin_images::{
    Error,
    build::{self, Recipe},
    convert,
    import::Import,
    store::{Image, Store},
};
use purlin_storage::Format;

pub use self::args::ImageArgs;
use self::args::{Build, Convert, Delete, Do, ImportArgs, Info, List};
use crate::{
    exit::Ended,
    progress::Shown,
    signals::Signals,
    stop::{Reason, Stop},
    table::print,
    terminal,
};

/// Does what the user asks for.
pub fn image(args: &ImageArgs, signals: Signals) -> Result<Ended> {
    let stop = Arc::new(Stop::default());
    let asked = stop.clone();
    signals.watch(move |signal| asked.request(Reason::Signal(signal)), || {}, || {});
    let store = Store::of_user()?;
    let done = match &args.what {
        Do::Build(args) => build(&store, args, &stop),
        Do::Import(args) => import(&store, args, &stop),
        Do::List(args) => list(&store, args),
        Do::Info(args) => info(&store, args),
        Do::Delete(args) => delete(&store, args, &stop),
        Do::Convert(args) => convert(&store, args, &stop),
    };
    match (done, stop.reason()) {
        (Err(_), Some(Reason::Signal(signal))) => Ok(Ended::Signalled(*signal)),
        (Err(error @ (Error::Name(_) | Error::UnknownBuild(_) | Error::Scheme(_))), _) => {
            Ok(Ended::WrongUsage(error.to_string()))
        }
        (Err(error), _) => Err(error.into()),
        (Ok(()), _) => Ok(Ended::Well),
    }
}

fn build(store: &Store, args: &Build, stop: &Arc<Stop>) -> Result<(), Error> {
    let recipe = Recipe::of_name(&args.what)?;
    let name = args.name.as_deref().unwrap_or(recipe.image);
    let image = build::build(store, recipe, name, args.rebuild, &Shown::new(stop.clone()))?;
    say_ready(&image);
    Ok(())
}

fn import(store: &Store, args: &ImportArgs, stop: &Arc<Stop>) -> Result<(), Error> {
    let name = args.name.clone().unwrap_or_else(|| args::name_of_source(&args.source));
    let import = Import { source: &args.source, name: &name, format: args.format, sha256: args.sha256.as_deref() };
    say_ready(&import.run(store, &Shown::new(stop.clone()))?);
    Ok(())
}

fn say_ready(image: &Image) {
    terminal::say(&format!("image '{}' is ready", image.name));
}

fn list(store: &Store, args: &List) -> Result<(), Error> {
    let mut images = vec![];
    for image in store.list()? {
        match image {
            Ok(image) => images.push(image),
            Err(damaged) => terminal::say(&damaged.to_string()),
        }
    }
    print(&if args.json { table::json_of_all(&images) } else { table::of_all(&images) });
    Ok(())
}

fn info(store: &Store, args: &Info) -> Result<(), Error> {
    let image = store.get(build::image_name(store, &args.name))?;
    print(&if args.json { table::json(&image).to_string() } else { table::of_one(&image) });
    Ok(())
}

fn delete(store: &Store, args: &Delete, stop: &Arc<Stop>) -> Result<(), Error> {
    let mut names = args.names.iter().map(|name| build::image_name(store, name));
    names.try_for_each(|name| store.delete(name, &Shown::new(stop.clone())))
}

fn convert(store: &Store, args: &Convert, stop: &Arc<Stop>) -> Result<(), Error> {
    let format = args.format.or_else(|| Format::of_name(&args.target)).unwrap_or(Format::Qcow2);
    convert::convert(store, &args.source, &args.target, format, &Shown::new(stop.clone()))
}
