//! `purlin token`: what lets programs in that come to the daemon over the network.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use purlin_api::{CreatedToken, NewToken, ServerInfo, Token};

use crate::{
    client::Api,
    exit::Ended,
    list::age,
    table::{columns, print},
    terminal,
};

/// Make and delete the tokens that let one in over the network
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct TokenArgs {
    #[command(subcommand)]
    what: Do,
}

#[derive(Subcommand)]
enum Do {
    /// Make one, and print it: it is not shown again
    Create {
        /// Its name: small letters, digits and hyphens
        name: String,
    },
    /// List them
    #[command(alias = "ls")]
    List {
        /// Print JSON: an array, as the API has it
        #[arg(long)]
        json: bool,
    },
    /// Delete one; whoever has come by it is sent away
    #[command(alias = "rm")]
    Delete {
        /// Its name
        name: String,
    },
}

const EXAMPLES: &str = "\
Examples:
  purlin daemon --listen 0.0.0.0:8443    a daemon that is reached over the network, too
  purlin token create laptop             prints a token
  purlin token delete laptop

  and on the other host:
  PURLIN_HOST=https://server:8443 PURLIN_TOKEN=purlin_... purlin list

Whoever has a token can do with machines whatever the daemon's user can, and read and write that user's files by
giving them to a machine as disks.";

/// Does what the user asks for, at the daemon here.
pub fn token(args: &TokenArgs) -> Result<Ended> {
    let api = Api::reach_own()?;
    match &args.what {
        Do::Create { name } => create(&api, name),
        Do::List { json } => list(&api.get::<Vec<Token>>("/1.0/tokens")?, *json),
        Do::Delete { name } => {
            let _: Vec<Token> = api.delete(&format!("/1.0/tokens/{name}"))?;
            Ok(Ended::Well)
        }
    }
}

fn create(api: &Api, name: &str) -> Result<Ended> {
    let created: CreatedToken = api.post("/1.0/tokens", &NewToken { name: name.to_owned() })?;
    terminal::print(&created.token);
    let info: ServerInfo = api.get("/1.0")?;
    match info.listens_at.zip(info.fingerprint) {
        Some((at, fingerprint)) => {
            terminal::say(&format!("the daemon listens at {at}; its certificate is {fingerprint}"))
        }
        None => terminal::say("the daemon does not listen on the network: 'purlin daemon --listen ADDRESS:PORT' does"),
    }
    Ok(Ended::Well)
}

fn list(tokens: &[Token], json: bool) -> Result<Ended> {
    if json {
        print(&serde_json::to_string(tokens).context("cannot write JSON")?);
    } else {
        let rows = tokens.iter().map(|token| [token.name.clone(), age(Duration::from_secs(token.created))]);
        print(&columns(["NAME", "AGE"], rows));
    }
    Ok(Ended::Well)
}
