//! kvrouter: a front door for SGLang servers that run prefill and decode on separate workers.
//!
//! Each generation request goes to one prefill and one decode worker at once, joined by a *room* number that the router
//! draws. The client gets the decode worker's bytes as they come. When one leg fails, the other is cancelled at once and
//! only the guilty one is blamed.
//!
//! * `config`: the settings and their command line.
//! * `schedule`: which pair serves a request, and under which rooms.
//! * `simulate`: the same choice replayed against a fleet that exists only as arithmetic.
//! * `discover`: where workers come from.
//! * `fleet`: what follows the workers as they come and go.
//! * `pool`: the workers, the connections to them, and whether they are ready.
//! * `gossip`: what replicas tell each other.
//! * `pick`: the scheduler, joined to the workers.
//! * `proxy`: the HTTP front, the two legs, the stream back to the client.
//! * `epp`: Envoy's external processing: the same pairs for requests that Envoy carries.
//! * `respond`: the only place that turns an error into a status code.
//! * `metrics`, `observe`, `overview`, `ui`: what operators see: counters, requests one by one, the whole at a glance.
//! * `descriptors`: how many connections the process may have.
//! * `drain`: how the router stops.
#![forbid(unsafe_code)]

pub mod config;
pub mod descriptors;
pub mod discover;
pub mod drain;
pub mod epp;
pub mod fleet;
pub mod gossip;
pub mod metrics;
pub mod observe;
pub mod overview;
pub mod pick;
pub mod pool;
pub mod proxy;
pub mod respond;
pub mod schedule;
pub mod simulate;
pub mod ui;

use std::ffi::OsString;
use std::future::Future;
use std::sync::Arc;

use anyhow::Context;

pub use config::Config;
use config::reload::Reloader;
pub use proxy::server::{Router, RunError};

/// Serves until `shutdown` resolves, then finishes live requests for at most `config.drain_timeout`.
///
/// # Errors
/// [`RunError`] when the address cannot be listened on.
pub async fn run(
    config: Config,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), RunError> {
    Router::bind(config).await?.serve(shutdown).await;
    Ok(())
}

/// The same with the workers of `source`, which is followed until the end.
///
/// # Errors
/// [`RunError`] when the source cannot be followed or the address cannot be listened on.
pub async fn run_with(
    config: Config,
    source: discover::source::Source,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), RunError> {
    let mut tasks = tokio::task::JoinSet::new();
    let fleet = discover::source::follow(source, &config, &mut tasks).await?;
    Router::bind_with(config, fleet)
        .await?
        .serve(shutdown)
        .await;
    Ok(())
}

/// Does all that the `kvrouter` binary does, with `args` as its command line (the first one is the program's name).
/// Help and mistakes in the arguments end the process, as command lines do.
///
/// # Errors
/// When the settings contradict each other, the address is taken or the runtime cannot start.
pub fn main_from_args(
    args: impl IntoIterator<Item = impl Into<OsString> + Clone>,
) -> anyhow::Result<()> {
    let mut args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    if args.get(1).is_some_and(|first| first == "simulate") {
        args.remove(1);
        return simulate::command::main_from_args(args);
    }
    if args.get(1).is_some_and(|first| first == "check-config") {
        args.remove(1);
        let status = config::check::main_from_args(&args, &mut std::io::stdout().lock());
        match status {
            // Whoever reads it has seen enough.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            status => std::process::exit(status?),
        }
    }
    let started = config::CommandLine::from_args(args.iter().cloned());
    let started = started.unwrap_or_else(|error| error.exit());
    if started.config.epp.is_some() {
        // What is read again has no subcommand.
        args.remove(1);
    }
    let logs = started.logs.init();
    for warning in &started.warnings {
        tracing::warn!("{warning}");
    }
    match descriptors::raise() {
        Ok(allowed) => descriptors::warn_if_few(allowed, started.config.requests_max),
        Err(error) => tracing::warn!(%error, "cannot raise the limit of file descriptors"),
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    runtime.block_on(async {
        let signals = drain::stop_signals().context("cannot listen for signals")?;
        let hangups = drain::hangups().context("cannot listen for signals")?;
        let mut tasks = tokio::task::JoinSet::new();
        let fleet = discover::source::follow(started.source.clone(), &started.config, &mut tasks)
            .await
            .context("cannot serve")?;
        let router = Router::bind_with(started.config.clone(), fleet)
            .await
            .context("cannot serve")?;
        let reloader = Reloader::new(args, &started, logs, Arc::clone(router.front()));
        let reloading = tokio::spawn(reloader.run(hangups));
        router.serve(signals).await;
        reloading.abort();
        Ok(())
    })
}
