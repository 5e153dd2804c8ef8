//! gRPC's health checks: the process lives; the picker can pick.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::protocol::health::health_check_response::ServingStatus;
use super::protocol::health::health_server::Health;
use super::protocol::health::{HealthCheckRequest, HealthCheckResponse};
use super::session::Shared;
use crate::pool::Role;

/// The names under which the Gateway API's picker protocol asks for readiness; the empty one is the whole server.
const READINESS: [&str; 3] = [
    "",
    "readiness",
    "envoy.service.ext_proc.v3.ExternalProcessor",
];

/// And for the process.
const LIVENESS: &str = "liveness";

/// How often a watched status is looked at.
const WATCH_PERIOD: Duration = Duration::from_millis(250);

/// Answers health checks.
#[derive(Clone, Debug)]
pub struct HealthService {
    shared: Arc<Shared>,
}

impl HealthService {
    /// For the picker of `shared`.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// `None` for a name nobody serves.
    fn status_of(&self, service: &str) -> Option<ServingStatus> {
        if service == LIVENESS {
            return Some(ServingStatus::Serving);
        }
        if !READINESS.contains(&service) {
            return None;
        }
        let front = &self.shared.front;
        let now = front.pool.now();
        let can_pick = now.ready(Role::Prefill) > 0 && now.ready(Role::Decode) > 0;
        Some(if can_pick && !front.drain.is_thrown() {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        })
    }
}

fn told(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse {
        status: status.into(),
    }
}

#[tonic::async_trait]
impl Health for HealthService {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let status = self.status_of(&request.get_ref().service);
        let status = status.ok_or_else(|| Status::not_found("no such service"))?;
        Ok(Response::new(told(status)))
    }

    type WatchStream = ReceiverStream<Result<HealthCheckResponse, Status>>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (sender, receiver) = mpsc::channel(1);
        let (health, service) = (self.clone(), request.into_inner().service);
        tokio::spawn(async move {
            let mut last = None;
            loop {
                let status = health
                    .status_of(&service)
                    .unwrap_or(ServingStatus::ServiceUnknown);
                if last.replace(status) != Some(status)
                    && sender.send(Ok(told(status))).await.is_err()
                {
                    return;
                }
                tokio::select! {
                    () = tokio::time::sleep(WATCH_PERIOD) => {}
                    () = sender.closed() => return,
                    () = health.shared.cut.thrown() => return,
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
