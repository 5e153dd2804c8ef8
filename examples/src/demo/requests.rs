//! What is asked, and the comparison of every answer with the single worker's.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use futures_util::future::try_join_all;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::children::Plan;
use super::cluster::{Cluster, MODEL};
use super::table::Row;
use super::{say, say_part};

const CHAT: &str = "/v1/chat/completions";

/// Requests sent at once.
const BURST: usize = 6;

/// A kind of request that takes so long is reported at once: a slow machine must not look like a stuck one.
const SLOW: Duration = Duration::from_secs(2);

/// How much is asked.
struct Sizes {
    /// Tokens of the first answer.
    hello_tokens: u32,
    /// Lines of the long prompt; a line has some 50 tokens.
    long_lines: usize,
    /// Lines that the longer prompt has besides.
    more_lines: usize,
    /// Tokens of the answers to both.
    long_tokens: u32,
    /// Tokens of each answer of a burst.
    burst_tokens: u32,
}

impl Sizes {
    /// The long prompt has some 600 tokens: 40 pages of the cache and 10 steps of chunked prefill.
    const USUAL: Self = Self {
        hello_tokens: 50,
        long_lines: 12,
        more_lines: 3,
        long_tokens: 32,
        burst_tokens: 24,
    };

    /// The long prompt still has some 250 tokens: 16 pages and 4 steps.
    const QUICK: Self = Self {
        hello_tokens: 16,
        long_lines: 5,
        more_lines: 2,
        long_tokens: 8,
        burst_tokens: 8,
    };
}

/// What is compared. Cached token counts are left out: the single worker has one cache, the cluster three.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Answer {
    content: String,
    finish_reason: String,
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
}

/// Asks everything. A row per kind of request.
pub(super) async fn ask_all(cluster: &Cluster, quick: bool) -> anyhow::Result<Vec<Row>> {
    let sizes = if quick { Sizes::QUICK } else { Sizes::USUAL };
    let mut asker = Asker {
        cluster,
        last_serial: 0,
        begun: Instant::now(),
        registries: BTreeSet::new(),
    };
    let hello = chat("Hello, this is a test", sizes.hello_tokens);
    say(format_args!(
        "\n> Hello, this is a test  (the answer, as it streams; random weights, so no sense)"
    ));
    let mut rows = vec![asker.streamed("hello, streamed", &hello, true).await?];
    rows.push(asker.whole("hello, in one piece", &hello).await?);
    let long = chat(&long_text(sizes.long_lines), sizes.long_tokens);
    rows.push(
        asker
            .streamed("long prompt, in chunks", &long, false)
            .await?,
    );
    rows.push(
        asker
            .streamed("the same, cached by decode", &long, false)
            .await?,
    );
    let longer = chat(
        &long_text(sizes.long_lines + sizes.more_lines),
        sizes.long_tokens,
    );
    rows.push(
        asker
            .streamed("a longer one, part cached", &longer, false)
            .await?,
    );
    rows.push(asker.burst(sizes.burst_tokens).await?);
    ensure!(
        asker.registries.len() == cluster.prefills.len(),
        "only {:?} served, but there are {} prefill workers",
        asker.registries,
        cluster.prefills.len()
    );
    Ok(rows)
}

struct Asker<'a> {
    cluster: &'a Cluster,
    /// The decode's last transfer that belongs to a row.
    last_serial: u64,
    /// When the row in hand began.
    begun: Instant,
    /// Who has served so far.
    registries: BTreeSet<String>,
}

impl Asker<'_> {
    async fn streamed(&mut self, name: &str, body: &Value, shown: bool) -> anyhow::Result<Row> {
        let (answer, ttft) = stream(self.cluster, &self.cluster.router, body, shown).await?;
        let (expected, _) = stream(self.cluster, &self.cluster.single, body, false).await?;
        compare(name, &answer, &expected)?;
        self.row(name, 1, Some(ttft)).await
    }

    async fn whole(&mut self, name: &str, body: &Value) -> anyhow::Result<Row> {
        let answer = whole(self.cluster, &self.cluster.router, body).await?;
        let expected = whole(self.cluster, &self.cluster.single, body).await?;
        compare(name, &answer, &expected)?;
        self.row(name, 1, None).await
    }

    async fn burst(&mut self, tokens: u32) -> anyhow::Result<Row> {
        let name = format!("{BURST} at once, two prefills");
        let bodies: Vec<Value> = (0..BURST)
            .map(|i| chat(&format!("Request {i}. {}", long_text(1 + i % 3)), tokens))
            .collect();
        let asking = bodies
            .iter()
            .map(|b| stream(self.cluster, &self.cluster.router, b, false));
        let answers = try_join_all(asking).await?;
        let mut slowest = Duration::ZERO;
        for (body, (answer, ttft)) in bodies.iter().zip(&answers) {
            let (expected, _) = stream(self.cluster, &self.cluster.single, body, false).await?;
            compare(&name, answer, &expected)?;
            slowest = slowest.max(*ttft);
        }
        self.row(&name, BURST, Some(slowest)).await
    }

    /// What the decode and the serving prefills say of the transfers behind `requests` answers.
    async fn row(
        &mut self,
        name: &str,
        requests: usize,
        ttft: Option<Duration>,
    ) -> anyhow::Result<Row> {
        let (last, transfers) = self.cluster.transfers(self.last_serial).await?;
        self.last_serial = last;
        ensure!(
            transfers.len() == requests && transfers.iter().all(|t| t["ok"] == true),
            "{requests} answers came of these transfers: {}",
            Value::from(transfers)
        );
        let mut row = Row::new(name, ttft);
        for transfer in &transfers {
            let registry = transfer["bootstrap"].as_str().unwrap_or_default();
            self.registries.insert(registry.to_owned());
            row.bytes += transfer["bytes"].as_u64().unwrap_or_default();
            for peer in transfer["peers"].as_array().into_iter().flatten() {
                row.paths
                    .insert(peer["path"].as_str().unwrap_or("?").to_owned());
                row.handshake_ms = row
                    .handshake_ms
                    .max(peer["handshake_ms"].as_f64().unwrap_or_default());
            }
            row.gb_s = row.gb_s.max(self.rate(registry).await?);
        }
        let took = self.begun.elapsed();
        self.begun = Instant::now();
        if took >= SLOW {
            say(format_args!(
                "{name}: equal, after {:.1} s",
                took.as_secs_f64()
            ));
        }
        Ok(row)
    }

    /// How fast the prefill behind a registry sends while it sends, all its ranks and rails together.
    async fn rate(&self, registry: &str) -> anyhow::Result<f64> {
        for prefill in &self.cluster.prefills {
            let (_, info) = self
                .cluster
                .client
                .get(&prefill.url("/server_info"))
                .await?;
            if info["kvtransfer"]["bootstrap"] == registry {
                let ranks = info["kvtransfer"]["ranks"]
                    .as_array()
                    .cloned()
                    .unwrap_or_default();
                let rails = ranks
                    .iter()
                    .flat_map(|rank| rank["rails"].as_array().into_iter().flatten());
                return Ok(rails.filter_map(|rail| rail["rate_gb_s"].as_f64()).sum());
            }
        }
        bail!("no prefill has the registry {registry}")
    }
}

fn chat(content: &str, max_tokens: u32) -> Value {
    json!({
        "model": MODEL,
        "messages": [{ "role": "user", "content": content }],
        "max_tokens": max_tokens,
    })
}

/// Numbered lines, a stand-in for a document.
fn long_text(lines: usize) -> String {
    let mut text = String::new();
    for line in 0..lines {
        let _infallible = writeln!(
            text,
            "{line}: page {} of a long prompt holds the number {}.",
            line / 4,
            line * line + 7
        );
    }
    text
}

fn compare(name: &str, answer: &Answer, expected: &Answer) -> anyhow::Result<()> {
    ensure!(answer.completion_tokens > 0, "{name}: the answer is empty");
    ensure!(
        answer == expected,
        "{name}: the cluster's answer differs from the single worker's:\n  cluster {answer:?}\n  single  {expected:?}"
    );
    Ok(())
}

async fn whole(cluster: &Cluster, server: &Plan, body: &Value) -> anyhow::Result<Answer> {
    let (status, reply) = cluster.client.post(&server.url(CHAT), body).await?;
    ensure!(
        status.is_success(),
        "{} answered {status}: {reply}",
        server.name
    );
    let choice = &reply["choices"][0];
    let mut answer = Answer {
        content: choice["message"]["content"]
            .as_str()
            .context("an answer without content")?
            .to_owned(),
        finish_reason: choice["finish_reason"]
            .as_str()
            .unwrap_or_default()
            .to_owned(),
        ..Answer::default()
    };
    answer.count(&reply["usage"]);
    Ok(answer)
}

/// The answer and the time to its first piece of text. `shown` prints the pieces as they come.
async fn stream(
    cluster: &Cluster,
    server: &Plan,
    body: &Value,
    shown: bool,
) -> anyhow::Result<(Answer, Duration)> {
    let mut body = body.clone();
    body["stream"] = json!(true);
    body["stream_options"] = json!({ "include_usage": true });
    let (mut answer, mut first, mut error) = (Answer::default(), None, None);
    let begun = Instant::now();
    cluster
        .client
        .stream(&server.url(CHAT), &body, |event| {
            if !event["error"].is_null() || event["object"] == "error" {
                error = Some(event.to_string());
            }
            let choice = &event["choices"][0];
            if let Some(text) = choice["delta"]["content"]
                .as_str()
                .filter(|t| !t.is_empty())
            {
                first.get_or_insert_with(|| begun.elapsed());
                answer.content.push_str(text);
                if shown {
                    // The weights are random: escape sequences must not reach the terminal.
                    say_part(text.escape_debug());
                }
            }
            if let Some(reason) = choice["finish_reason"].as_str() {
                reason.clone_into(&mut answer.finish_reason);
            }
            answer.count(&event["usage"]);
        })
        .await?;
    if shown {
        say("");
    }
    if let Some(error) = error {
        bail!("{} answered with an error: {error}", server.name);
    }
    Ok((answer, first.unwrap_or_else(|| begun.elapsed())))
}

impl Answer {
    fn count(&mut self, usage: &Value) {
        if usage.is_object() {
            let count = |name: &str| usage[name].as_u64().unwrap_or_default();
            self.prompt_tokens = count("prompt_tokens");
            self.completion_tokens = count("completion_tokens");
            self.total_tokens = count("total_tokens");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_difference_ends_the_run() {
        let right = Answer {
            content: "text".to_owned(),
            finish_reason: "length".to_owned(),
            prompt_tokens: 3,
            completion_tokens: 4,
            total_tokens: 7,
        };
        compare("x", &right, &right.clone()).unwrap();
        let wrong = [
            Answer {
                content: "texT".to_owned(),
                ..right.clone()
            },
            Answer {
                finish_reason: "stop".to_owned(),
                ..right.clone()
            },
            Answer {
                prompt_tokens: 2,
                ..right.clone()
            },
            Answer {
                completion_tokens: 5,
                ..right.clone()
            },
            Answer {
                total_tokens: 8,
                ..right.clone()
            },
        ];
        for wrong in wrong {
            let error = compare("the name", &wrong, &right).unwrap_err().to_string();
            assert!(
                error.contains("the name: the cluster's answer differs"),
                "{error}"
            );
        }
        let empty = Answer::default();
        assert!(
            compare("x", &empty, &empty.clone()).is_err(),
            "two empty answers prove nothing"
        );
    }
}
