//! The images of another host, by its daemon.

use std::{fs::File, path::Path};

use anyhow::{Result, anyhow};
use purlin_api::{Image, ImageFormat, Images, NewImage, Operation};
use purlin_images::{Error, import::is_url};
use purlin_storage::{Format, SourceFormat};

use super::{
    args::{Build, Delete, Do, ImageArgs, ImportArgs, name_of_source},
    say_ready, show, show_one,
};
use crate::{
    client::{self, Api},
    exit::Ended,
    signals::Signals,
    terminal,
};

/// Does there what the user asks for.
pub fn image(args: &ImageArgs, signals: Signals) -> Result<Ended> {
    if let Do::Import(args) = &args.what
        && !is_url(&args.source)
    {
        // A signal ends it, and with it what is being sent.
        signals.unblock();
        return send(args);
    }
    signals.watch(client::leave, || {}, || {});
    let api = Api::reach()?;
    match &args.what {
        Do::Build(args) => build(&api, args)?,
        Do::Import(args) => import(&api, args)?,
        Do::List(args) => {
            let Images { images, damaged } = api.get("/1.0/images")?;
            damaged.iter().for_each(|damaged| terminal::say(damaged));
            show(&images, args);
        }
        Do::Info(args) => show_one(&api.get::<Image>(&path_of(&args.name))?, args),
        Do::Delete(args) => delete(&api, args)?,
        Do::Convert(_) => {}
    }
    Ok(Ended::Well)
}

fn build(api: &Api, Build { what, name, rebuild }: &Build) -> Result<()> {
    let new = NewImage::Build { what: what.clone(), name: name.clone(), rebuild: *rebuild };
    api.follow(api.post("/1.0/images", &new)?)?;
    // It is called what the daemon calls it.
    let image: Image = api.get(&path_of(name.as_deref().unwrap_or(what)))?;
    say_ready(&image.name);
    Ok(())
}

fn import(api: &Api, args: &ImportArgs) -> Result<()> {
    let name = name(args);
    let format = args.format.map(image_format);
    let new = NewImage::Url { name: name.clone(), url: args.source.clone(), format, sha256: args.sha256.clone() };
    api.follow(api.post("/1.0/images", &new)?)?;
    say_ready(&name);
    Ok(())
}

/// Sends a file.
fn send(args: &ImportArgs) -> Result<Ended> {
    if args.source.contains("://") && !Path::new(&args.source).exists() {
        return Ok(Ended::WrongUsage(Error::Scheme(args.source.clone()).to_string()));
    }
    let file = File::open(&args.source).map_err(|e| anyhow!("cannot open '{}': {e}", args.source))?;
    let name = name(args);
    let called = Path::new(&args.source).file_name().unwrap_or_default().to_string_lossy();
    let mut path = format!("{}?source={}", path_of(&name), encoded(&called));
    if let Some(format) = args.format {
        path += &format!("&format={format}");
    }
    if let Some(sum) = &args.sha256 {
        path += &format!("&sha256={sum}");
    }
    let api = Api::reach()?;
    let operation: Operation = api.put_file(&path, file)?;
    api.follow(operation)?;
    say_ready(&name);
    Ok(Ended::Well)
}

fn delete(api: &Api, args: &Delete) -> Result<()> {
    args.names.iter().try_for_each(|name| api.follow(api.delete(&path_of(name))?))
}

fn name(args: &ImportArgs) -> String {
    args.name.clone().unwrap_or_else(|| name_of_source(&args.source))
}

fn path_of(name: &str) -> String {
    format!("/1.0/images/{}", encoded(name))
}

/// As a part of a URL (RFC 3986, 2.1).
fn encoded(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(byte.into()),
            _ => encoded += &format!("%{byte:02X}"),
        }
    }
    encoded
}

fn image_format(format: SourceFormat) -> ImageFormat {
    match format {
        SourceFormat::Disk(Format::Raw) => ImageFormat::Raw,
        SourceFormat::Disk(Format::Qcow2) => ImageFormat::Qcow2,
        SourceFormat::Vmdk => ImageFormat::Vmdk,
        SourceFormat::Vhd => ImageFormat::Vhd,
        SourceFormat::Vhdx => ImageFormat::Vhdx,
        SourceFormat::Vdi => ImageFormat::Vdi,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_urls() {
        assert_eq!(encoded("a-B_0.~"), "a-B_0.~");
        assert_eq!(encoded("a b/ä?&#%"), "a%20b%2F%C3%A4%3F%26%23%25");
    }
}
