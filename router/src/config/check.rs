//! `kvrouter check-config`: what is in effect, where it comes from, and what is wrong with it.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::io::Write;

use super::command_line::{CommandLine, definition};
use super::layers::{self, Origin, Setting};
use super::reload;
use crate::pool::client::WorkerClient;
use crate::pool::tls;

/// The exit status when something is wrong, as clap's own.
pub const EXIT_WRONG: i32 = 2;

/// The width up to which values are lined up; longer ones push their origin to the right.
const VALUE_COLUMNS: usize = 44;

/// Does what the arguments say; the first one is the program's name. Help ends the process. Gives the exit status.
///
/// # Errors
/// When `out` cannot be written to.
pub fn main_from_args(args: &[OsString], out: &mut dyn Write) -> std::io::Result<i32> {
    let command = definition().name("kvrouter check-config").about(
        "Shows the settings that `kvrouter` with the same options would have, where each comes from, and what is wrong.",
    );
    let layers = match layers::read(command, args) {
        Ok(layers) => layers,
        Err(error) if !error.use_stderr() => error.exit(),
        Err(error) => {
            write!(out, "{}", error.render())?;
            return Ok(EXIT_WRONG);
        }
    };
    table(&layers.settings, out)?;
    for warning in &layers.warnings {
        writeln!(out, "warning: {warning}")?;
    }
    let problems = problems(&layers);
    for problem in &problems {
        writeln!(out, "error: {problem}")?;
    }
    if problems.is_empty() {
        writeln!(out, "these settings work")?;
        return Ok(0);
    }
    Ok(EXIT_WRONG)
}

fn problems(layers: &layers::Layers) -> Vec<String> {
    let typed = match CommandLine::typed(&layers.matches) {
        Ok(typed) => typed,
        Err(error) => {
            let text = error.to_string();
            let first = text.split("\n\n").next().unwrap_or_default();
            return vec![first.trim_start_matches("error: ").to_owned()];
        }
    };
    let mut found = Vec::new();
    if let Err(error) = typed.check() {
        found.push(error.to_string());
        // A key that cannot stand in a header cannot be given to a client either.
        return found;
    }
    let config = typed.config;
    if let Some(Err(error)) = config.tls.as_ref().map(tls::acceptor) {
        found.push(with_causes(&error));
    }
    if let Some(Err(error)) = config.gossip.tls.as_ref().map(tls::mutual_acceptor) {
        found.push(with_causes(&error));
    }
    let telemetry = &config.telemetry;
    if let Some(Err(error)) = telemetry.identity.as_ref().map(tls::acceptor) {
        found.push(with_causes(&error));
    }
    if let Err(error) = WorkerClient::new(&config) {
        found.push(with_causes(&error));
    }
    found
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn table(settings: &[Setting], out: &mut dyn Write) -> std::io::Result<()> {
    let width = settings.iter().map(|setting| setting.name.len()).max();
    let width = width.unwrap_or_default();
    writeln!(
        out,
        "{:width$}  {:VALUE_COLUMNS$}  from",
        "setting", "value"
    )?;
    for setting in settings {
        let value = match &setting.values[..] {
            [] => "-".to_owned(),
            _ if setting.is_secret => "(hidden)".to_owned(),
            values => values.join(" "),
        };
        let reloads = if reload::is_reloadable(&setting.name) {
            ", reloads"
        } else {
            ""
        };
        let origin = match &setting.origin {
            Origin::Default if setting.values.is_empty() => "not set".to_owned(),
            origin => origin.to_string(),
        };
        writeln!(
            out,
            "{:width$}  {value:VALUE_COLUMNS$}  {origin}{reloads}",
            setting.name
        )?;
    }
    Ok(())
}
