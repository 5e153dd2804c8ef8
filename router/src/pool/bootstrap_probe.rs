//! Whether a prefill worker's bootstrap server knows its ranks.
//!
//! A prefill server answers `/ready` before its ranks have registered; a request that it gets until then fails after a
//! minute or not at all. The question is the one that decode asks (`GET /route` with -1 for every rank): 503 means that ranks
//! are missing, and every other answer that the server is there and may judge for itself.
#![forbid(unsafe_code)]

use http_body_util::{BodyExt, Limited};
use hyper::StatusCode;
use hyper::http::uri::{Authority, PathAndQuery};

use super::client::WorkerClient;
use super::health::{FAILURES_TO_UNREADY, PROBE_TIMEOUT};
use super::{Role, Worker};

/// What decode asks (`CommonKVReceiver._ensure_prefill_info`).
const QUESTION: &str =
    "/route?prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1";

/// An answer describes one server in some hundred bytes; more of it is not read.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// Remembers how often in a row the server was not there.
#[derive(Debug, Default)]
pub struct BootstrapProbe {
    failures: u32,
}

impl BootstrapProbe {
    /// Whether the worker counts as ready as far as its bootstrap server goes. True at once for workers that have none, or
    /// whose source did not ask for the probe. A worker that is ready is left out after several failures only.
    pub async fn allows(&mut self, worker: &Worker, client: &WorkerClient) -> bool {
        let port = worker
            .bootstrap_port()
            .filter(|_| worker.probes_bootstrap());
        let Some(port) = port.filter(|_| worker.role() == Role::Prefill) else {
            return true;
        };
        let answer = tokio::time::timeout(PROBE_TIMEOUT, is_up(worker, port, client));
        if answer.await.unwrap_or(false) {
            self.failures = 0;
            return true;
        }
        self.failures = self.failures.saturating_add(1);
        if self.failures == 1 {
            let url = worker.url();
            tracing::warn!(%url, port, "the prefill worker's bootstrap server does not know its ranks yet; sending it nothing");
        }
        worker.is_ready() && self.failures < FAILURES_TO_UNREADY
    }
}

async fn is_up(worker: &Worker, port: u16, client: &WorkerClient) -> bool {
    // Bootstrap servers speak plain HTTP, whatever the worker itself does.
    let authority = format!("{}:{port}", worker.url().host());
    let Ok(authority) = Authority::try_from(authority) else {
        return false;
    };
    let path = PathAndQuery::from_static(QUESTION);
    let Ok(response) = client.get_elsewhere(authority, path).await else {
        return false;
    };
    let status = response.status();
    // Some servers note an answer that was not read to its end as a failure.
    let _ = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
        .collect()
        .await;
    status != StatusCode::SERVICE_UNAVAILABLE
}
