//! HTTP: SGLang's and OpenAI's endpoints in front of the scheduler's mailbox.
#![forbid(unsafe_code)]

mod admin;
mod generate;
pub mod intake;
mod openai;
pub mod refusal;
mod sse;
mod ticket;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::{get, post};
use axum::serve::{Listener, ListenerExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::clock::unix_seconds;
use crate::plane::Watch;
use crate::scheduler::Scheduler;
use crate::scheduler::mailbox::Mailbox;

/// What the worker does, by SGLang's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Serves requests alone.
    #[default]
    Null,
    /// Computes prompts and sends their KV.
    Prefill,
    /// Receives KV and generates.
    Decode,
}

impl Mode {
    /// The value of `--disaggregation-mode`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// The resolved settings that requests are checked against and that are reported.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The model's name.
    pub model: String,
    /// The role.
    pub mode: Mode,
    /// The worker's own bootstrap port, which a request without one means.
    pub bootstrap_port: u16,
    /// Tensor-parallel ranks.
    pub tp: usize,
    /// Tokens per page.
    pub page_size: usize,
    /// Tokens of a prompt computed per step.
    pub chunk_tokens: usize,
    /// Tokens that the cache holds.
    pub cache_tokens: usize,
    /// Longest sequence, prompt and output: the smaller of context and cache.
    pub sequence_max: usize,
    /// Requests that hold memory at once.
    pub running_max: usize,
    /// Live requests.
    pub live_max: usize,
    /// Seed of the weights.
    pub seed: u64,
}

/// What the handlers share.
#[derive(Debug)]
pub struct App {
    facts: Facts,
    scheduler: Scheduler,
    watch: Option<Arc<Watch>>,
    started: u64,
}

impl App {
    fn mailbox(&self) -> &Arc<Mailbox> {
        self.scheduler.mailbox()
    }
}

/// How long a stopping server waits for clients to read their last bytes.
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);

/// A bound server that has not begun to serve.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    app: Arc<App>,
}

impl Server {
    /// Serves `scheduler` on `listener`, and what `watch` sees of its plane.
    #[must_use]
    pub fn new(
        listener: TcpListener,
        facts: Facts,
        scheduler: Scheduler,
        watch: Option<Arc<Watch>>,
    ) -> Self {
        Self {
            listener,
            app: Arc::new(App {
                facts,
                scheduler,
                watch,
                started: unix_seconds(),
            }),
        }
    }

    /// What can be seen of its plane, if it has engines.
    #[must_use]
    pub fn watch(&self) -> Option<&Arc<Watch>> {
        self.app.watch.as_ref()
    }

    /// Where it listens; with port 0 asked for, the port it got.
    ///
    /// # Errors
    /// When the socket is broken.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop` resolves. Live requests are aborted then, so that no connection is waited for in vain.
    ///
    /// # Errors
    /// When accepting fails for good.
    pub async fn run(self, stop: impl Future<Output = ()> + Send + 'static) -> std::io::Result<()> {
        let Self { listener, app } = self;
        let mailbox = app.mailbox().clone();
        let (told, mut overdue) = tokio::sync::oneshot::channel::<()>();
        let stopping = async move {
            stop.await;
            mailbox.stop();
            // Nobody listens only if serving has ended by itself.
            let _ended = told.send(());
        };
        let served =
            axum::serve(prompt(listener), routes(app.clone())).with_graceful_shutdown(stopping);
        let patience = async {
            if (&mut overdue).await.is_err() {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(DRAIN_PATIENCE).await;
        };
        let result = tokio::select! {
            result = served.into_future() => result,
            () = patience => Ok(()),
        };
        // The last reference: joins the scheduler's thread, which was told to end.
        drop(app);
        result
    }
}

/// Sends what is written at once. Otherwise the first token waits for the acknowledgement of the answer's head, which
/// the other side delays by 40 ms.
fn prompt(listener: TcpListener) -> impl Listener<Io = TcpStream, Addr = SocketAddr> {
    listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a client was gone before it was served");
        }
    })
}

fn routes(app: Arc<App>) -> Router {
    Router::new()
        .route("/generate", post(generate::generate))
        .route("/v1/chat/completions", post(openai::chat))
        .route("/v1/completions", post(openai::complete))
        .route("/v1/models", get(admin::models))
        .route("/health", get(admin::health))
        .route("/ready", get(admin::ready))
        .route("/server_info", get(admin::server_info))
        .route("/model_info", get(admin::model_info))
        .route("/v1/loads", get(admin::loads))
        .route("/metrics", get(admin::metrics))
        .route("/debug/transfers", get(admin::transfers))
        .route("/abort_request", post(admin::abort))
        .with_state(app)
}

#[cfg(test)]
mod tests;
