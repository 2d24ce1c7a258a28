//! `purlin monitor`: what happens, as it happens.

use anyhow::{Context, Result};
use clap::Args;
use futures_util::StreamExt;
use purlin_api::{Event, EventKind, OperationState};
use tokio_tungstenite::tungstenite::Message;

use crate::{client::Api, exit::Ended, terminal};

/// Tell what happens to machines, until Ctrl-C
#[derive(Args)]
pub struct MonitorArgs {
    /// Print each event as a line of JSON
    #[arg(long)]
    json: bool,

    /// Begin with event number N, if it is still known
    #[arg(long, value_name = "N")]
    from: Option<u64>,
}

/// Tells it.
pub fn monitor(args: &MonitorArgs) -> Result<Ended> {
    let api = Api::reach()?;
    let from = args.from.map(|number| format!("?from={number}")).unwrap_or_default();
    let mut events = api.websocket(&format!("/1.0/events{from}"))?;
    while let Some(message) = api.block_on(events.next()) {
        let Message::Text(text) = message.context("the daemon went away")? else { continue };
        if args.json {
            terminal::print(&text);
        } else {
            let event: Event = serde_json::from_str(&text).context("an event makes no sense")?;
            terminal::print(&line(&event));
        }
    }
    Ok(Ended::Well)
}

fn line(event: &Event) -> String {
    let what = match &event.kind {
        EventKind::Instance { name, status, message } => {
            let status = status.map_or("deleted", |status| status.as_str());
            let message = message.as_ref().map(|m| format!(": {m}")).unwrap_or_default();
            format!("{name} is {status}{message}")
        }
        EventKind::Renamed { from, to } => format!("{from} is called {to}"),
        EventKind::Operation { operation } => {
            let state = match operation.state {
                OperationState::Running => "begins",
                OperationState::Done => "is done",
                OperationState::Failed => "failed",
            };
            let error = operation.error.as_ref().map(|e| format!(": {e}")).unwrap_or_default();
            format!("'{}' {state}{error}", operation.what)
        }
    };
    format!("{:6}  {what}", event.number)
}
