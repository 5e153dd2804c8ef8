//! The table at the end.

use std::collections::BTreeSet;
use std::time::Duration;

use super::say;

/// One kind of request.
#[derive(Clone, Debug)]
pub(super) struct Row {
    name: String,
    pub(super) paths: BTreeSet<String>,
    pub(super) bytes: u64,
    pub(super) gb_s: f64,
    pub(super) handshake_ms: f64,
    ttft: Option<Duration>,
}

impl Row {
    pub(super) fn new(name: &str, ttft: Option<Duration>) -> Self {
        Self {
            name: name.to_owned(),
            paths: BTreeSet::new(),
            bytes: 0,
            gb_s: 0.0,
            handshake_ms: 0.0,
            ttft,
        }
    }

    fn line(&self) -> String {
        let paths: Vec<&str> = self.paths.iter().map(String::as_str).collect();
        let ttft = self.ttft.map_or_else(
            || "-".to_owned(),
            |t| format!("{:.1}", t.as_secs_f64() * 1e3),
        );
        format!(
            "{:<28} {:<12} {:>10} {:>7.2} {:>13.2} {:>9}  yes",
            self.name,
            paths.join(","),
            self.bytes,
            self.gb_s,
            self.handshake_ms,
            ttft
        )
    }
}

/// Prints the rows. A row exists only if the answers were equal; a difference ends the run before.
pub(super) fn print(rows: &[Row]) {
    say(format_args!(
        "\n{:<28} {:<12} {:>10} {:>7} {:>13} {:>9}  equal",
        "request", "path", "KV bytes", "GB/s", "handshake ms", "TTFT ms"
    ));
    for row in rows {
        say(row.line());
    }
    say(
        "GB/s: the sending engine's rate while bytes move (latest sample, all its ranks). Handshake: once per connection, \
         then reused.\nTTFT: at the client, through the router; of requests at once, the slowest. Equal: to the single \
         worker's answer, byte for byte.\n",
    );
}
