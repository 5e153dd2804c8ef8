//! The command line, and the worker that it describes.

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Parser;
use tokio::net::TcpListener;
use tracing_subscriber::EnvFilter;

use crate::cache::heap::heap_ranks;
use crate::cache::pages::PageCache;
use crate::cache::{PagedKv, RankShape};
use crate::model::{Model, ModelShape};
use crate::pd::{Doorbell, Plane};
use crate::plane::{self, RdmaConnector, TransferPath};
use crate::scheduler::mailbox::Mailbox;
use crate::scheduler::{Limits, Scheduler};
use crate::server::{Facts, Mode, Server};
use crate::text::BOS;

/// A small PD worker around a real transformer on the CPU. Flags are named as SGLang's where SGLang has them.
#[derive(Clone, Debug, Parser)]
#[command(name = "kvworker", version)]
pub struct Settings {
    /// Address to serve HTTP on.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// Port to serve HTTP on; 0 lets the system choose.
    #[arg(long, default_value_t = 30000)]
    pub port: u16,
    /// Name under which the model is served. Nothing is read from it: weights come from --seed.
    #[arg(long, default_value = "kvworker-random")]
    pub model_path: String,
    /// Seed of the weights; every worker of a cluster needs the same.
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Role of this worker.
    #[arg(long, value_enum, default_value_t)]
    pub disaggregation_mode: Mode,
    /// Port of the bootstrap registry that a prefill runs; 0 lets the system choose.
    #[arg(long, default_value_t = 34000)]
    pub disaggregation_bootstrap_port: u16,
    /// Address that decodes are told to connect to, if it is not --host.
    #[arg(long)]
    pub advertise_ip: Option<IpAddr>,
    /// Path of the bytes between two workers of one host; `verbs` is RDMA, between hosts too.
    #[arg(long, visible_alias = "path", value_enum, default_value_t)]
    pub transfer_path: TransferPath,
    /// RDMA devices for `--transfer-path verbs`, as SGLang's --disaggregation-ib-device. Default: every usable one.
    #[arg(long, value_name = "LIST", default_value = "")]
    pub rdma_devices: String,
    /// How queue pairs are connected. Default: as the device's mode asks for.
    #[arg(long, value_enum)]
    pub rdma_connector: Option<RdmaConnector>,
    /// Serve the live transfer telemetry (gRPC) on this port; 0 lets the system choose. Default: nowhere.
    #[arg(long)]
    pub telemetry_port: Option<u16>,
    /// Serve /metrics on a port of its own too, beside the worker's.
    #[arg(long, requires = "telemetry_port")]
    pub metrics_port: Option<u16>,
    /// Longest life of a transfer in seconds, from bootstrap to confirmation.
    #[arg(long, default_value_t = 120)]
    pub disaggregation_timeout_secs: u64,
    /// Tensor-parallel ranks; must divide the KV heads.
    #[arg(long, visible_alias = "tp-size", default_value_t = 1)]
    pub tp: u32,
    /// Tokens per KV page; equal on both sides of a transfer.
    #[arg(long, default_value_t = 16)]
    pub page_size: u32,
    /// Tokens of a prompt computed per step.
    #[arg(long, default_value_t = 64)]
    pub chunked_prefill_size: u32,
    /// Tokens that the KV cache holds, rounded down to whole pages.
    #[arg(long, default_value_t = 16_384)]
    pub max_total_tokens: u32,
    /// Requests that hold KV memory at once.
    #[arg(long, default_value_t = 32)]
    pub max_running_requests: u32,
    /// Live requests, waiting ones included; more are answered 503.
    #[arg(long, default_value_t = 256)]
    pub max_queued_requests: u32,
    /// Longest sequence in tokens, prompt and output.
    #[arg(long, default_value_t = 4096)]
    pub context_length: u32,
    /// Transformer blocks.
    #[arg(long, default_value_t = 4)]
    pub layers: u32,
    /// Width of the residual stream.
    #[arg(long, default_value_t = 128)]
    pub hidden_size: u32,
    /// Query heads.
    #[arg(long, default_value_t = 8)]
    pub q_heads: u32,
    /// KV heads.
    #[arg(long, default_value_t = 4)]
    pub kv_heads: u32,
    /// Elements of one head.
    #[arg(long, default_value_t = 32)]
    pub head_dim: u32,
    /// Width of the MLP.
    #[arg(long, default_value_t = 384)]
    pub intermediate_size: u32,
    /// Use the embedding table as the output head.
    #[arg(long)]
    pub tie_word_embeddings: bool,
}

/// Longest context: rotary tables and the event queue of a request grow with it.
pub const CONTEXT_MAX: u32 = 131_072;

impl Settings {
    /// The model that the flags describe.
    #[must_use]
    pub const fn model(&self) -> ModelShape {
        ModelShape {
            layers: self.layers as usize,
            hidden: self.hidden_size as usize,
            q_heads: self.q_heads as usize,
            kv_heads: self.kv_heads as usize,
            head_dim: self.head_dim as usize,
            ffn: self.intermediate_size as usize,
            context: self.context_length as usize,
            tied: self.tie_word_embeddings,
        }
    }

    /// The KV memory of one rank; divide the KV heads by `--tp` for the whole.
    #[must_use]
    pub const fn rank(&self) -> RankShape {
        RankShape {
            layers: self.layers as usize,
            kv_heads: (self.kv_heads / self.tp) as usize,
            head_dim: self.head_dim as usize,
            page_size: self.page_size as usize,
            pages: (self.max_total_tokens / self.page_size) as usize,
            // Every request that holds memory may hold an aux row.
            aux_slots: self.max_running_requests as usize,
        }
    }

    /// Checks what the flags must satisfy together. Call it before anything else is derived from them.
    ///
    /// # Errors
    /// A sentence that names the flag.
    pub fn check(&self) -> anyhow::Result<()> {
        self.model().check()?;
        ensure!(
            self.tp > 0 && self.kv_heads.is_multiple_of(self.tp),
            "--tp must divide --kv-heads"
        );
        ensure!(
            self.context_length <= CONTEXT_MAX,
            "--context-length must be at most {CONTEXT_MAX}"
        );
        ensure!(self.page_size > 0, "--page-size must be at least 1");
        ensure!(
            self.chunked_prefill_size > 0,
            "--chunked-prefill-size must be at least 1"
        );
        ensure!(
            self.max_total_tokens >= self.page_size,
            "--max-total-tokens must hold at least one page"
        );
        ensure!(
            self.max_running_requests > 0,
            "--max-running-requests must be at least 1"
        );
        ensure!(
            self.max_queued_requests > 0,
            "--max-queued-requests must be at least 1"
        );
        ensure!(
            self.disaggregation_timeout_secs > 0,
            "a transfer needs time"
        );
        ensure!(
            [
                self.max_total_tokens / self.page_size,
                self.max_running_requests
            ]
            .into_iter()
            .all(|count| i32::try_from(count).is_ok()),
            "--max-total-tokens and --max-running-requests must stay below 2^31"
        );
        Ok(())
    }

    /// Builds the worker around a plane that `plane` makes: it is told the shape of every rank and the bell that
    /// wakes the scheduler. Binds the port, computes a warm-up, starts the scheduler.
    ///
    /// # Errors
    /// When the flags contradict themselves, the plane cannot be made, or the address cannot be bound.
    pub async fn build(
        &self,
        plane: impl FnOnce(&Self, Doorbell) -> anyhow::Result<Plane>,
    ) -> anyhow::Result<Server> {
        self.check()?;
        let listener = TcpListener::bind((self.host.as_str(), self.port))
            .await
            .with_context(|| format!("cannot listen on {}:{}", self.host, self.port))?;
        let model = Model::from_seed(self.model(), self.seed)?;
        warm_up(&model)?;
        let mailbox = Mailbox::new(self.max_queued_requests as usize);
        let plane = plane(self, mailbox.doorbell())?;
        let watch = plane.watch.clone();
        let limits = Limits {
            chunk_tokens: self.chunked_prefill_size as usize,
            running_max: self.max_running_requests as usize,
            transfer_timeout: Duration::from_secs(self.disaggregation_timeout_secs),
        };
        let scheduler = Scheduler::start(model, plane, limits, mailbox)?;
        let bootstrap = watch.as_ref().and_then(|watch| watch.bootstrap());
        let facts = self.facts(bootstrap.map(|address| address.port()));
        Ok(Server::new(listener, facts, scheduler, watch))
    }

    fn facts(&self, bootstrap_port: Option<u16>) -> Facts {
        let rank = self.rank();
        let cache_tokens = rank.pages * rank.page_size;
        Facts {
            model: self.model_path.clone(),
            mode: self.disaggregation_mode,
            bootstrap_port: bootstrap_port.unwrap_or(self.disaggregation_bootstrap_port),
            tp: self.tp as usize,
            page_size: rank.page_size,
            chunk_tokens: self.chunked_prefill_size as usize,
            cache_tokens,
            sequence_max: cache_tokens.min(self.context_length as usize),
            running_max: self.max_running_requests as usize,
            live_max: self.max_queued_requests as usize,
            seed: self.seed,
        }
    }
}

/// Computes one prompt and forgets it: the first request must not pay for the thread pool.
fn warm_up(model: &Model) -> anyhow::Result<()> {
    let shape = model.shape();
    let (layers, kv_heads, head_dim) = (shape.layers, shape.kv_heads, shape.head_dim);
    let rank = RankShape {
        layers,
        kv_heads,
        head_dim,
        page_size: 8,
        pages: 1,
        aux_slots: 1,
    };
    let ranks = heap_ranks(rank, 1);
    let mut pages = PageCache::new(1, rank.page_size);
    let tokens = vec![BOS; rank.page_size.min(shape.context)];
    let lease = pages
        .reserve(&tokens, tokens.len(), 0)
        .context("the warm-up needs one page")?;
    model.forward(
        &tokens,
        0,
        &PagedKv {
            ranks: &ranks,
            pages: lease.pages(),
        },
    )?;
    pages.release(lease, &[]);
    Ok(())
}

/// Parses `args` and serves until SIGINT or SIGTERM.
pub(crate) fn run(args: impl Iterator<Item = OsString>) -> anyhow::Result<()> {
    let settings = match Settings::try_parse_from(args) {
        Ok(settings) => settings,
        // Help and version are printed by clap, which knows where to.
        Err(message) => message.exit(),
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // A host program may have installed its own already.
    let _installed = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let server = settings.build(plane::build).await?;
        tracing::info!(
            address = %server.address()?,
            mode = settings.disaggregation_mode.name(),
            tp = settings.tp,
            "serving"
        );
        server.run(stop_signal()).await?;
        Ok(())
    })
}

async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let interrupted = tokio::signal::ctrl_c();
    match signal(SignalKind::terminate()) {
        Ok(mut terminated) => {
            tokio::select! {
                _ = interrupted => {}
                _ = terminated.recv() => {}
            }
        }
        Err(error) => {
            tracing::warn!(%error, "SIGTERM is not watched");
            // Without a working ctrl-c either, only a kill ends the worker.
            let _unwatched = interrupted.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(flags: &[&str]) -> Settings {
        Settings::parse_from([&["kvworker"], flags].concat())
    }

    #[test]
    fn the_defaults_fit_together_and_contradictions_are_named() {
        parse(&[]).check().expect("defaults");
        for (flags, words) in [
            (&["--tp", "3"][..], "--tp"),
            (&["--tp", "0"], "--tp"),
            (&["--page-size", "0"], "--page-size"),
            (&["--chunked-prefill-size", "0"], "--chunked-prefill-size"),
            (&["--max-total-tokens", "15"], "--max-total-tokens"),
            (&["--max-running-requests", "0"], "--max-running-requests"),
            (&["--q-heads", "6"], "query heads"),
            (&["--head-dim", "31"], "head_dim"),
            (&["--layers", "0"], "at least 1"),
            (&["--context-length", "131073"], "--context-length"),
        ] {
            let error = parse(flags)
                .check()
                .expect_err("a contradiction")
                .to_string();
            assert!(error.contains(words), "{flags:?}: {error}");
        }
    }

    #[test]
    fn ranks_share_the_heads() {
        let settings = parse(&[
            "--tp",
            "2",
            "--page-size",
            "10",
            "--max-total-tokens",
            "101",
        ]);
        let rank = settings.rank();
        assert_eq!(
            (rank.kv_heads, rank.pages, rank.page_bytes()),
            (2, 10, 10 * 2 * 32 * 4)
        );
    }
}
