//! A small HTTP client for the demo and the tests: JSON in, JSON or server-sent events out, every wait bounded.
#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::time::timeout;

/// Bytes of one answer; ours have some kilobytes.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// Longest silence of a server, from the request to the head and between two pieces of an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A client that opens a connection per request, so that a restarted server is nobody's broken connection.
#[derive(Clone, Debug)]
pub struct Client(legacy::Client<HttpConnector, Full<Bytes>>);

impl Default for Client {
    fn default() -> Self {
        let mut builder = legacy::Client::builder(TokioExecutor::new());
        Self(builder.pool_max_idle_per_host(0).build_http())
    }
}

impl Client {
    /// Asks for a page; a body that is no JSON arrives as a string.
    ///
    /// # Errors
    /// When no answer comes.
    pub async fn get(&self, url: &str) -> anyhow::Result<(StatusCode, Value)> {
        let response = self.send(Method::GET, url, None).await?;
        Self::whole(url, response).await
    }

    /// Posts JSON; a body that is no JSON arrives as a string.
    ///
    /// # Errors
    /// When no answer comes.
    pub async fn post(&self, url: &str, body: &Value) -> anyhow::Result<(StatusCode, Value)> {
        let response = self.send(Method::POST, url, Some(body)).await?;
        Self::whole(url, response).await
    }

    /// Posts JSON and hands every server-sent event to `event` as it comes, until `[DONE]`.
    ///
    /// # Errors
    /// When the answer is an error, is cut short, or stops coming.
    pub async fn stream(
        &self,
        url: &str,
        body: &Value,
        mut event: impl FnMut(&Value),
    ) -> anyhow::Result<()> {
        let response = self.send(Method::POST, url, Some(body)).await?;
        if response.status() != StatusCode::OK {
            let (status, answer) = Self::whole(url, response).await?;
            bail!("{url} answered {status}: {answer}");
        }
        let mut body = response.into_body();
        let mut pending = Vec::new();
        while let Some(frame) = timeout(PATIENCE, body.frame())
            .await
            .with_context(|| format!("{url} stopped in the middle of a stream"))?
        {
            let frame = frame.with_context(|| format!("{url} broke off a stream"))?;
            pending.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            if pending.len() > ANSWER_BYTES_MAX {
                bail!("{url} sent an event without end");
            }
            while let Some(end) = pending.windows(2).position(|pair| pair == b"\n\n") {
                let block: Vec<u8> = pending.drain(..end + 2).collect();
                let text = String::from_utf8_lossy(&block);
                let Some(data) = text.trim().strip_prefix("data:").map(str::trim) else {
                    continue;
                };
                if data == "[DONE]" {
                    return Ok(());
                }
                let value: Value = serde_json::from_str(data)
                    .with_context(|| format!("{url} sent an event that is no JSON: {data}"))?;
                event(&value);
            }
        }
        bail!("{url} ended a stream without [DONE]")
    }

    async fn send(
        &self,
        method: Method,
        url: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Response<Incoming>> {
        let body = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
        let request = Request::builder()
            .method(method)
            .uri(url)
            .header("content-type", "application/json")
            .body(Full::new(body))
            .with_context(|| format!("{url} is no address"))?;
        timeout(PATIENCE, self.0.request(request))
            .await
            .with_context(|| format!("{url} did not answer within {PATIENCE:?}"))?
            .with_context(|| format!("{url} cannot be reached"))
    }

    async fn whole(url: &str, response: Response<Incoming>) -> anyhow::Result<(StatusCode, Value)> {
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect();
        let body = timeout(PATIENCE, body)
            .await
            .with_context(|| format!("{url} stopped in the middle of an answer"))?
            .map_err(|error| anyhow::anyhow!("{url} broke off an answer: {error}"))?
            .to_bytes();
        let value = serde_json::from_slice(&body)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&body).into_owned()));
        Ok((status, value))
    }
}
