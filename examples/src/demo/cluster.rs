//! The cluster: which processes there are, how they start and end.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::children::{Plan, Process, ROUTER, WORKER};
use super::ports::{Ports, Wish};
use super::{Arguments, say, say_part};
use crate::client::Client;

/// How long all processes together may take until they are ready.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks at a starting process.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// The model that requests name, as in the guide that this demo follows.
pub(super) const MODEL: &str = "/models/Qwen3-32B";

/// All processes of a run.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) prefills: [Plan; 2],
    pub(super) decode: Plan,
    pub(super) router: Plan,
    pub(super) single: Plan,
    pub(super) client: Client,
    logs: PathBuf,
    remove_logs: bool,
    running: Vec<Process>,
}

impl Cluster {
    /// Chooses the ports. Nothing runs yet.
    pub(super) fn plan(arguments: &Arguments) -> anyhow::Result<Self> {
        let mut ports = Ports::new(match arguments {
            Arguments {
                strict_ports: true, ..
            } => Wish::Strict,
            Arguments {
                any_ports: true, ..
            } => Wish::Any,
            Arguments { .. } => Wish::Preferred,
        });
        let router_port = ports.take("router", arguments.router_port)?;
        let first_registry = ports.take("bootstrap registry", arguments.bootstrap_port)?;
        let second_registry = ports.take_next("second bootstrap registry", first_registry)?;
        let mut worker_port =
            |purpose, place: u16| ports.take(purpose, arguments.worker_port.saturating_add(place));
        let (model, path) = (arguments.model_flags(), arguments.path_flags());
        let model: Vec<&str> = model.iter().map(String::as_str).collect();
        let all: Vec<&str> = model
            .iter()
            .copied()
            .chain(path.iter().map(String::as_str))
            .collect();
        let mut prefill = |name: &'static str, place, registry: u16, tp: u32| {
            let port = worker_port(name, place)?;
            let registry = registry.to_string();
            let flags = [
                "--disaggregation-mode",
                "prefill",
                "--disaggregation-bootstrap-port",
                &registry,
            ];
            anyhow::Ok(worker(name, port, tp, &[&flags[..], &all].concat()))
        };
        let [first_tp, second_tp] = arguments.prefill_ranks();
        let prefills = [
            prefill("prefill-1", 0, first_registry, first_tp)?,
            prefill("prefill-2", 1, second_registry, second_tp)?,
        ];
        let flags = [&["--disaggregation-mode", "decode"], &all[..]].concat();
        let decode = worker(
            "decode",
            worker_port("decode", 2)?,
            arguments.decode_ranks(),
            &flags,
        );
        let single = worker("single", worker_port("single", 3)?, 1, &model);
        let registries = [first_registry, second_registry];
        let router = router(router_port, &prefills, registries, &decode);
        say(format_args!(
            "prefill-1 TP {first_tp} (bootstrap registry :{first_registry}), prefill-2 TP {second_tp} (:{second_registry}: \
             one host, so each needs its own port), decode TP {}, router :{router_port}, and a single worker to compare with",
            arguments.decode_ranks()
        ));
        let temporary =
            || std::env::temp_dir().join(format!("kvtransfer-demo-{}", std::process::id()));
        Ok(Self {
            prefills,
            decode,
            router,
            single,
            client: Client::default(),
            logs: arguments.logs.clone().unwrap_or_else(temporary),
            remove_logs: arguments.logs.is_none(),
            running: Vec::new(),
        })
    }

    /// Starts every process and waits until all are ready.
    pub(super) async fn start(&mut self) -> anyhow::Result<()> {
        std::fs::create_dir_all(&self.logs)
            .with_context(|| format!("cannot make the folder {}", self.logs.display()))?;
        let begun = Instant::now();
        let [first, second] = self.prefills.clone();
        let workers = [first, second, self.decode.clone(), self.single.clone()];
        self.start_all(&workers, begun).await?;
        // The router's first look finds every worker ready, so both prefills take part from the first request on.
        let router = self.router.clone();
        self.start_all(std::slice::from_ref(&router), begun).await?;
        let pids: Vec<String> = self.running.iter().map(|p| p.id().to_string()).collect();
        say(format_args!(
            "ready after {:.1} s: 5 processes ({})",
            begun.elapsed().as_secs_f64(),
            pids.join(" ")
        ));
        Ok(())
    }

    async fn start_all(&mut self, plans: &[Plan], begun: Instant) -> anyhow::Result<()> {
        for plan in plans {
            self.running.push(Process::start(plan, &self.logs)?);
        }
        let mut waiting: Vec<&Plan> = plans.iter().collect();
        while let Some(plan) = waiting.first() {
            self.check_alive()?;
            let ready = self.client.get(&plan.url("/ready")).await;
            if ready.is_ok_and(|(status, _)| status.is_success()) {
                waiting.remove(0);
                continue;
            }
            if begun.elapsed() > START_PATIENCE {
                bail!("{} is not ready after {START_PATIENCE:?}", plan.name);
            }
            progress(plan.name, begun);
            sleep(LOOK_INTERVAL).await;
        }
        if std::io::stdout().is_terminal() {
            say_part("\r\x1b[K");
        }
        Ok(())
    }

    /// Fails if a process has ended.
    pub(super) fn check_alive(&mut self) -> anyhow::Result<()> {
        self.running.iter_mut().try_for_each(Process::check_alive)
    }

    /// The decode's rooms that ended after the one numbered `after`, and the last number.
    pub(super) async fn transfers(&self, after: u64) -> anyhow::Result<(u64, Vec<Value>)> {
        let url = self.decode.url(&format!("/debug/transfers?after={after}"));
        let (_, answer) = self.client.get(&url).await?;
        let last = answer["last_serial"]
            .as_u64()
            .context("the decode lists no transfers")?;
        let listed = answer["transfers"].as_array().cloned().unwrap_or_default();
        Ok((last, listed))
    }

    /// Tells how to ask by hand.
    pub(super) fn print_how_to_ask(&self) {
        let chat = self.router.url("/v1/chat/completions");
        say(format_args!(
            "\nThe cluster stays up until Ctrl-C. Ask it:\n\
             curl {chat} -H 'Content-Type: application/json' -d '{{\"model\":\"{MODEL}\",\"messages\":[{{\"role\":\"user\",\
             \"content\":\"Hello, this is a test\"}}],\"max_tokens\":50}}'\n\
             curl {}   # paths, handshakes, rates\n\
             curl '{}'   # the last transfers\n\
             curl {}   # Prometheus\n\
             logs: {}",
            self.decode.url("/server_info"),
            self.decode.url("/debug/transfers"),
            self.prefills[0].url("/metrics"),
            self.logs.display()
        ));
    }

    /// Ends every process: all are told first, so that they end side by side.
    pub(super) fn end(&mut self) {
        self.running.iter_mut().for_each(Process::let_go);
        self.running.clear();
    }

    pub(super) fn logs(&self) -> &Path {
        &self.logs
    }

    /// Removes logs that nobody asked for.
    pub(super) fn remove_logs(&self) {
        if self.remove_logs {
            // Never made if the run ended early.
            let _missing = std::fs::remove_dir_all(&self.logs);
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.end();
    }
}

fn progress(name: &str, begun: Instant) {
    if std::io::stdout().is_terminal() {
        say_part(format_args!(
            "\r\x1b[Kbuilding the model, warming up… {:.1} s (waiting for {name})",
            begun.elapsed().as_secs_f64()
        ));
    }
}

fn worker(name: &'static str, port: u16, tp: u32, flags: &[&str]) -> Plan {
    let (port_text, tp) = (port.to_string(), tp.to_string());
    let mut command: Vec<String> = [
        WORKER,
        "--port",
        &port_text,
        "--model-path",
        MODEL,
        "--tp",
        &tp,
    ]
    .map(str::to_owned)
    .to_vec();
    command.extend(flags.iter().map(|&flag| flag.to_owned()));
    Plan {
        name,
        command,
        port,
    }
}

fn router(port: u16, prefills: &[Plan; 2], registries: [u16; 2], decode: &Plan) -> Plan {
    let mut command: Vec<String> = [
        ROUTER,
        "--host",
        "127.0.0.1",
        "--port",
        &port.to_string(),
        "--pd-disaggregation",
        "--decode",
        &decode.url(""),
        "--log-plain",
    ]
    .map(str::to_owned)
    .to_vec();
    for (prefill, registry) in prefills.iter().zip(registries) {
        command.extend([
            "--prefill".to_owned(),
            prefill.url(""),
            registry.to_string(),
        ]);
    }
    Plan {
        name: "router",
        command,
        port,
    }
}
