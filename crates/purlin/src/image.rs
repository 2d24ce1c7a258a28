//! `purlin image`: the images that machines are made of.

mod args;
mod table;
mod there;

use std::sync::Arc;

use anyhow::Result;
use purlin_api::Image;
use purlin_daemon::shown_image;
use purlin_images::{
    Error,
    build::{self, Recipe},
    convert,
    import::Import,
    store::Store,
};
use purlin_storage::Format;
use serde::Serialize;

pub use self::args::ImageArgs;
use self::args::{Build, Convert, Delete, Do, ImportArgs, Info, List};
use crate::{
    client,
    exit::Ended,
    progress::Shown,
    remote,
    signals::Signals,
    stop::{Reason, Stop},
    table::print,
    terminal,
};

/// Does what the user asks for, here or on the host that they mean.
pub fn image(args: &ImageArgs, signals: Signals) -> Result<Ended> {
    if remote::chosen().is_some() && !args.is_of_this_host() {
        return client::ended(there::image(args, signals));
    }
    image_here(args, signals)
}

fn image_here(args: &ImageArgs, signals: Signals) -> Result<Ended> {
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
    say_ready(&image.name);
    Ok(())
}

fn import(store: &Store, args: &ImportArgs, stop: &Arc<Stop>) -> Result<(), Error> {
    let name = args.name.clone().unwrap_or_else(|| args::name_of_source(&args.source));
    let import = Import { source: &args.source, name: &name, format: args.format, sha256: args.sha256.as_deref() };
    say_ready(&import.run(store, &Shown::new(stop.clone()))?.name);
    Ok(())
}

fn say_ready(name: &str) {
    terminal::say(&format!("image '{name}' is ready"));
}

fn list(store: &Store, args: &List) -> Result<(), Error> {
    let mut images = vec![];
    for image in store.list()? {
        match image {
            Ok(image) => images.push(shown_image(&image)),
            Err(damaged) => terminal::say(&damaged.to_string()),
        }
    }
    show(&images, args);
    Ok(())
}

fn show(images: &[Image], args: &List) {
    print(&if args.json { json(&images) } else { table::of_all(images) });
}

/// As the API has it.
fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

fn info(store: &Store, args: &Info) -> Result<(), Error> {
    let image = shown_image(&store.get(build::image_name(store, &args.name))?);
    show_one(&image, args);
    Ok(())
}

fn show_one(image: &Image, args: &Info) {
    print(&if args.json { json(image) } else { table::of_one(image) });
}

fn delete(store: &Store, args: &Delete, stop: &Arc<Stop>) -> Result<(), Error> {
    let mut names = args.names.iter().map(|name| build::image_name(store, name));
    names.try_for_each(|name| store.delete(name, &Shown::new(stop.clone())))
}

fn convert(store: &Store, args: &Convert, stop: &Arc<Stop>) -> Result<(), Error> {
    let format = args.format.or_else(|| Format::of_name(&args.target)).unwrap_or(Format::Qcow2);
    convert::convert(store, &args.source, &args.target, format, &Shown::new(stop.clone()))
}
