//! Settings that change while the router runs: on SIGHUP, and when the configuration file changes.
//!
//! All places are read again as at the start. What has changed and may, takes effect for the next request; the rest is
//! named in the log and waits for a restart. A file that cannot be used changes nothing.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::signal::unix::Signal;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use super::file::Stamp;
use super::layers::Setting;
use super::ops::LogSwitch;
use super::{CommandLine, Config};
use crate::metrics::bump;
use crate::proxy::Front;
use crate::schedule::Settings;

/// How often the file is looked at: a ConfigMap reaches a pod within a minute anyway, and a person waits no longer.
pub const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Takes one setting from the second configuration into the first.
type Take = fn(&mut Config, &Config);

/// The log filter is not part of [`Config`].
const LOG_LEVEL: &str = "log-level";

/// Every setting that may change while the router runs. All others need a restart.
const RELOADABLE: [(&str, Take); 27] = [
    ("policy", |to, from| {
        scheduling(to).policy = settings(from).policy
    }),
    ("egress-limit", |to, from| {
        scheduling(to).egress_bytes_max = settings(from).egress_bytes_max;
    }),
    ("kv-share", |to, from| {
        scheduling(to).kv_share_max = settings(from).kv_share_max;
    }),
    ("low-priority-share", |to, from| {
        scheduling(to).low_priority_share = settings(from).low_priority_share;
    }),
    ("cross-zone-bandwidth", |to, from| {
        scheduling(to).cross_zone_bytes_per_s = settings(from).cross_zone_bytes_per_s;
    }),
    ("decode-allocates-late", |to, from| {
        scheduling(to).decode_allocates_early = settings(from).decode_allocates_early;
    }),
    ("sticky-slack", |to, from| {
        scheduling(to).sticky_slack = settings(from).sticky_slack;
    }),
    ("sticky-ttl", |to, from| {
        scheduling(to).sticky_ttl = settings(from).sticky_ttl;
    }),
    ("no-prefix-credit", |to, from| {
        scheduling(to).prefix_credit = settings(from).prefix_credit;
    }),
    ("trust-dp-rank", |to, from| {
        to.trusts_dp_rank = from.trusts_dp_rank;
    }),
    ("header-overrides", |to, from| {
        to.header_overrides = from.header_overrides;
    }),
    ("request-timeout", |to, from| {
        to.request_timeout = from.request_timeout;
    }),
    ("first-byte-timeout", |to, from| {
        to.first_byte_timeout = from.first_byte_timeout;
    }),
    ("stall-timeout", |to, from| {
        to.stall_timeout = from.stall_timeout;
    }),
    ("drain-timeout", |to, from| {
        to.drain_timeout = from.drain_timeout;
    }),
    ("max-body-bytes", |to, from| {
        to.body_bytes_max = from.body_bytes_max;
    }),
    ("max-concurrent-requests", |to, from| {
        to.requests_max = from.requests_max;
    }),
    ("queue-size", |to, from| to.queue_max = from.queue_max),
    ("queue-timeout", |to, from| {
        to.queue_timeout = from.queue_timeout;
    }),
    ("max-requests-per-prefill", |to, from| {
        to.prefill_requests_max = from.prefill_requests_max;
    }),
    ("max-bytes-per-prefill", |to, from| {
        to.prefill_bytes_max = from.prefill_bytes_max;
    }),
    ("max-requests-per-decode", |to, from| {
        to.decode_requests_max = from.decode_requests_max;
    }),
    ("max-attempts", |to, from| {
        to.attempts_max = from.attempts_max;
    }),
    ("breaker-failures", |to, from| {
        to.breaker.failures = from.breaker.failures;
    }),
    ("breaker-open", |to, from| {
        to.breaker.open = from.breaker.open;
    }),
    ("access-log", |to, from| to.access_log = from.access_log),
    ("no-ui", |to, from| to.serves_pages = from.serves_pages),
];

const fn settings(config: &Config) -> &Settings {
    &config.scheduling.settings
}

const fn scheduling(config: &mut Config) -> &mut Settings {
    &mut config.scheduling.settings
}

/// Whether the setting of this name may change while the router runs.
pub fn is_reloadable(name: &str) -> bool {
    name == LOG_LEVEL || RELOADABLE.iter().any(|(known, _)| *known == name)
}

/// The settings in effect. Readers take one whole configuration, never half of two.
#[derive(Clone, Debug)]
pub struct LiveConfig {
    current: Arc<watch::Sender<Arc<Config>>>,
}

impl LiveConfig {
    /// Begins with `config`.
    pub fn new(config: Config) -> Self {
        Self {
            current: Arc::new(watch::Sender::new(Arc::new(config))),
        }
    }

    /// The settings now.
    pub fn now(&self) -> Arc<Config> {
        Arc::clone(&self.current.borrow())
    }

    /// The settings from now on.
    pub fn replace(&self, config: Config) {
        self.current.send_replace(Arc::new(config));
    }
}

/// What a reload did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing has changed.
    Unchanged,
    /// These have changed, and these would need a restart.
    Changed {
        /// In effect now.
        applied: Vec<String>,
        /// Not in effect.
        waiting: Vec<String>,
    },
    /// The settings cannot be used; the old ones stay.
    Rejected(String),
}

/// Reads the settings again and again.
#[derive(Debug)]
pub struct Reloader {
    args: Vec<OsString>,
    file: Option<PathBuf>,
    /// The file whose settings are in effect.
    applied: Option<Stamp>,
    settings: Vec<Setting>,
    logs: LogSwitch,
    front: Arc<Front>,
}

impl Reloader {
    /// Keeps the router behind `front` at what `args`, the environment and the file say. `started` is what they said when
    /// it began.
    pub fn new(
        args: Vec<OsString>,
        started: &CommandLine,
        logs: LogSwitch,
        front: Arc<Front>,
    ) -> Self {
        Self {
            args,
            file: started.file.clone(),
            applied: started.stamp,
            settings: started.settings.clone(),
            logs,
            front,
        }
    }

    /// Reloads whenever `hangups` or the file asks for it, until dropped.
    pub async fn run(mut self, mut hangups: Signal) {
        let mut last = self.applied;
        let mut ticks = tokio::time::interval(POLL_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let is_asked = tokio::select! {
                signal = hangups.recv() => signal.is_some(),
                _ = ticks.tick() => false,
            };
            let seen = self.stamp().await;
            // A file that still changes may be half written.
            let rests = seen == last;
            last = seen;
            if is_asked || (rests && seen != self.applied) {
                self.applied = seen;
                self.reload();
            }
        }
    }

    /// Looks at the file without holding up others: it may lie on a network.
    async fn stamp(&self) -> Option<Stamp> {
        let file = self.file.clone()?;
        let look = tokio::task::spawn_blocking(move || Stamp::of(&file));
        look.await.unwrap_or_default()
    }

    /// Reads all settings and applies what may change.
    pub fn reload(&mut self) -> Outcome {
        let outcome = self.try_reload();
        let metrics = &self.front.metrics;
        let is_good = !matches!(outcome, Outcome::Rejected(_));
        metrics
            .reload_is_good
            .store(u64::from(is_good), Ordering::Relaxed);
        match &outcome {
            Outcome::Unchanged => tracing::info!("settings read again: nothing has changed"),
            Outcome::Changed { applied, waiting } => {
                bump(&metrics.reloads_applied);
                if !applied.is_empty() {
                    tracing::info!(settings = applied.join(", "), "new settings are in effect");
                }
                if !waiting.is_empty() {
                    let settings = waiting.join(", ");
                    tracing::warn!(settings, "these settings have changed: needs a restart");
                }
            }
            Outcome::Rejected(error) => {
                bump(&metrics.reloads_rejected);
                tracing::error!("the new settings cannot be used, the old ones stay: {error}");
            }
        }
        outcome
    }

    fn try_reload(&mut self) -> Outcome {
        let read = match CommandLine::from_args(self.args.iter().cloned()) {
            Ok(read) => read,
            Err(error) => {
                let text = error.to_string();
                let text = text.split("\n\n").next().unwrap_or_default();
                return Outcome::Rejected(text.trim_start_matches("error: ").to_owned());
            }
        };
        let (mut applied, mut waiting) = (Vec::new(), Vec::new());
        let mut config = Config::clone(&self.front.live.now());
        for (was, is) in self.settings.iter_mut().zip(&read.settings) {
            if was.values == is.values {
                // The same by another way, as a line that moved: worth remembering only.
                was.origin.clone_from(&is.origin);
                continue;
            }
            if is.name == LOG_LEVEL {
                self.logs.set(&read.logs.filter);
            } else if let Some((_, take)) = RELOADABLE.iter().find(|(name, _)| *name == is.name) {
                take(&mut config, &read.config);
            } else {
                // Stays as it was, so that it is named again until somebody restarts or takes it back.
                waiting.push(is.name.clone());
                continue;
            }
            was.clone_from(is);
            applied.push(is.name.clone());
        }
        if applied.is_empty() && waiting.is_empty() {
            return Outcome::Unchanged;
        }
        self.front.apply(config);
        Outcome::Changed { applied, waiting }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Router, config::command_line::definition, drain};

    #[tokio::test]
    async fn a_file_that_changes_while_the_router_starts_is_read_again() {
        let file = std::env::temp_dir().join(format!("kvrouter-{}.toml", std::process::id()));
        std::fs::write(&file, "max-body-bytes = 20").unwrap();
        let pair = ["--prefill", "http://127.0.0.1:1", "8998", "--decode"];
        let mut args: Vec<OsString> = ["kvrouter", "--port", "0", "--config"]
            .map(Into::into)
            .to_vec();
        args.push(file.clone().into());
        args.extend(pair.map(Into::into));
        args.push("http://127.0.0.1:2".into());
        let started = CommandLine::from_args(args.iter().cloned()).unwrap();
        std::fs::write(&file, "max-body-bytes = 2000").unwrap();
        let router = Router::bind(started.config.clone()).await.unwrap();
        let front = Arc::clone(router.front());
        let reloader = Reloader::new(args, &started, started.logs.init(), Arc::clone(&front));
        let reloading = tokio::spawn(reloader.run(drain::hangups().unwrap()));
        tokio::time::timeout(Duration::from_secs(20), async {
            while front.live.now().body_bytes_max != 2000 {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("the change was seen");
        reloading.abort();
        std::fs::remove_file(&file).unwrap();
    }

    #[test]
    fn every_reloadable_setting_exists() {
        let definition = definition();
        for (name, _) in RELOADABLE {
            let found = definition
                .get_arguments()
                .any(|arg| arg.get_long() == Some(name));
            assert!(found, "{name} is no option");
            assert!(is_reloadable(name));
        }
        assert!(is_reloadable(LOG_LEVEL) && !is_reloadable("port"));
    }
}
