//! The routers that are measured: how each is started, and how one knows that it serves.
#![forbid(unsafe_code)]

use std::io::BufRead as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

use crate::client::{self, Job};
use crate::http::end_of_head;
use crate::usage;
use crate::worker::{Addresses, BOOTSTRAP_PORT, COUNTS_PATH, Counts};

/// smg looks at its workers after half a minute only.
const START_TIME_MAX: Duration = Duration::from_secs(120);

/// One of the programs compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub(crate) enum Who {
    /// No router: the client asks a decode worker.
    #[serde(rename = "direct")]
    Direct,
    /// Copies bytes to one worker.
    #[serde(rename = "relay")]
    Relay,
    #[serde(rename = "kvrouter")]
    Ours,
    #[serde(rename = "sglang-router")]
    Sglang,
    #[serde(rename = "smg")]
    Smg,
}

impl Who {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Relay => "relay",
            Self::Ours => "kvrouter",
            Self::Sglang => "sglang-router",
            Self::Smg => "smg",
        }
    }

    /// Whether it sends each request to a pair.
    pub(crate) const fn pairs(self) -> bool {
        !matches!(self, Self::Direct | Self::Relay)
    }
}

/// A router's program; the Python of its environment for those that are Python packages.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) who: Who,
    pub(crate) path: PathBuf,
}

impl Program {
    /// The command line that makes it serve `workers` on `port`. Of the rivals is switched off what costs time and
    /// is not needed here; ours runs as it comes.
    pub(crate) fn arguments(&self, workers: &Addresses, port: u16) -> anyhow::Result<Vec<String>> {
        let mut words: Vec<String> = match self.who {
            Who::Relay => {
                let words = [
                    crate::RELAY_SUBCOMMAND,
                    &port.to_string(),
                    &workers.decode[0].to_string(),
                ];
                return Ok(words.map(str::to_owned).into());
            }
            Who::Direct | Who::Ours => Vec::new(),
            Who::Sglang => vec!["-m".into(), "sglang_router.launch_router".into()],
            Who::Smg => vec!["-m".into(), "smg.launch_router".into()],
        };
        let mut add = |text: &str| words.extend(text.split(' ').map(str::to_owned));
        add(&format!(
            "--pd-disaggregation --host 127.0.0.1 --port {port}"
        ));
        for address in &workers.prefill {
            add(&format!("--prefill http://{address} {BOOTSTRAP_PORT}"));
        }
        for address in &workers.decode {
            add(&format!("--decode http://{address}"));
        }
        if self.who != Who::Ours {
            add(
                "--policy round_robin --disable-retries --disable-circuit-breaker --log-level error",
            );
            add(&format!(
                "--max-concurrent-requests -1 --prometheus-port {}",
                free_port()?
            ));
        }
        if self.who == Who::Smg {
            add("--disable-worker-overload-protection");
        }
        Ok(words)
    }

    /// Its version, in its own words.
    pub(crate) fn version(&self) -> Option<String> {
        let mut command = Command::new(&self.path);
        let package = match self.who {
            Who::Direct | Who::Relay => return None,
            Who::Ours => None,
            Who::Sglang => Some("sglang-router"),
            Who::Smg => Some("smg"),
        };
        match package {
            Some(package) => {
                let ask = format!(
                    "import importlib.metadata as m; print('{package}', m.version('{package}'))"
                );
                command.args(["-c", &ask])
            }
            None => command.arg("--version"),
        };
        let said = command
            .output()
            .map(|output| output.stdout)
            .unwrap_or_default();
        Some(String::from_utf8_lossy(&said).trim().to_owned())
    }
}

fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port())
}

/// A process that is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Process(Child);

impl Process {
    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended by itself cannot be killed, and need not.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts the pretended workers, where this thread may run.
pub(crate) fn start_workers() -> anyhow::Result<(Process, Addresses)> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg(crate::WORKER_SUBCOMMAND)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let said = child
        .stdout
        .take()
        .context("the workers' output is not there")?;
    let process = Process(child);
    let mut line = String::new();
    std::io::BufReader::new(said).read_line(&mut line)?;
    let addresses = serde_json::from_str(&line).context("the workers did not start")?;
    Ok((process, addresses))
}

/// A router that serves.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) who: Who,
    pub(crate) address: SocketAddr,
    process: Option<Process>,
}

impl Running {
    /// No router.
    pub(crate) fn direct(workers: &Addresses) -> Self {
        Self {
            who: Who::Direct,
            address: workers.decode[0],
            process: None,
        }
    }

    /// Whether there is one.
    pub(crate) fn is_router(&self) -> bool {
        self.process.is_some()
    }

    /// What it used so far; nothing if it is no router.
    pub(crate) fn usage(&self) -> anyhow::Result<usage::Usage> {
        match &self.process {
            Some(process) => usage::of_tree(process.id()),
            None => Ok(usage::Usage::default()),
        }
    }

    /// Starts `program` on `cores` and waits until it serves, a rival with every worker. What it says goes to `logs`.
    pub(crate) async fn start(
        program: &Program,
        workers: &Addresses,
        (cores, back_on): (&[usize], &[usize]),
        logs: &Path,
    ) -> anyhow::Result<Self> {
        let who = program.who;
        let port = free_port()?;
        let log = logs.join(format!("{}.log", who.name()));
        let file = std::fs::File::create(&log)?;
        // A child runs where its parent's thread ran when it was made.
        usage::run_on(cores)?;
        let child = Command::new(&program.path)
            .args(program.arguments(workers, port)?)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn();
        usage::run_on(back_on)?;
        let child = child.with_context(|| format!("cannot start {}", program.path.display()))?;
        let mut running = Self {
            who,
            address: (Ipv4Addr::LOCALHOST, port).into(),
            process: Some(Process(child)),
        };
        running
            .wait_until_serving(workers)
            .await
            .with_context(|| format!("{} does not serve; see {}", who.name(), log.display()))?;
        Ok(running)
    }

    async fn wait_until_serving(&mut self, workers: &Addresses) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_TIME_MAX;
        let before = counts(workers).await?;
        loop {
            if let Some(Process(child)) = &mut self.process
                && let Some(status) = child.try_wait()?
            {
                anyhow::bail!("it ended with {status}");
            }
            let outcome =
                client::closed_loop(self.address, &Job::chat(80), 1, 8, START_TIME_MAX).await;
            let now = counts(workers).await?;
            let mut grown = now.by_worker.iter().zip(&before.by_worker);
            // Ours asks all workers from the start, and may well prefer one of each role as long as nothing is under way.
            let is_known = matches!(self.who, Who::Ours | Who::Relay)
                || grown.all(|(now, before)| now > before);
            if outcome.errors == 0 && is_known {
                return Ok(());
            }
            let error = outcome
                .error
                .unwrap_or_else(|| "a worker got no request".to_owned());
            anyhow::ensure!(Instant::now() < deadline, "{error}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// What reached the workers so far.
pub(crate) async fn counts(workers: &Addresses) -> anyhow::Result<Counts> {
    let mut stream = tokio::net::TcpStream::connect(workers.decode[0]).await?;
    let request = format!("GET {COUNTS_PATH} HTTP/1.1\r\nhost: worker\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut said = Vec::new();
    loop {
        anyhow::ensure!(
            stream.read_buf(&mut said).await? > 0,
            "the workers are gone"
        );
        if let Some(end) = end_of_head(&said)
            && let Ok(counts) = serde_json::from_slice(&said[end..])
        {
            return Ok(counts);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rivals_get_the_same_workers_and_no_extras() {
        let address = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let workers = Addresses {
            prefill: vec![address(1), address(2)],
            decode: vec![address(3)],
        };
        let words = |who| {
            let path = PathBuf::from("x");
            let words = Program { who, path }.arguments(&workers, 9).unwrap();
            words.join(" ")
        };
        let common = "--pd-disaggregation --host 127.0.0.1 --port 9 --prefill http://127.0.0.1:1 8998 \
                      --prefill http://127.0.0.1:2 8998 --decode http://127.0.0.1:3";
        assert_eq!(words(Who::Ours), common);
        for who in [Who::Sglang, Who::Smg] {
            let words = words(who);
            assert!(words.contains(common), "{words}");
            assert!(
                words.contains("--disable-retries --disable-circuit-breaker"),
                "{words}"
            );
        }
    }
}
