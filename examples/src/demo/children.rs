//! The processes of the demo: started with a pipe as their standard input, which keeps them alive.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::time::Instant;

/// Hidden command of a worker process.
pub(super) const WORKER: &str = "worker";

/// Hidden command of the router process.
pub(super) const ROUTER: &str = "router";

/// How long a process may take to end by itself once its pipe is closed.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// Lines of a log that an error shows.
const LOG_LINES: usize = 12;

/// What a process is to be.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Shown to the user, and the log's name.
    pub(super) name: &'static str,
    /// [`WORKER`] or [`ROUTER`], and its flags.
    pub(super) command: Vec<String>,
    /// Its HTTP port.
    pub(super) port: u16,
}

impl Plan {
    pub(super) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }
}

/// A started process. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Process {
    name: &'static str,
    log: PathBuf,
    child: Child,
}

impl Process {
    pub(super) fn start(plan: &Plan, logs: &Path) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("this program's own file is not known")?;
        let log = logs.join(format!("{}.log", plan.name));
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let errors = file.try_clone().context("cannot share a log file")?;
        let child = Command::new(program)
            .args(&plan.command)
            .stdin(Stdio::piped())
            .stdout(file)
            .stderr(errors)
            .spawn()
            .with_context(|| format!("cannot start {}", plan.name))?;
        Ok(Self {
            name: plan.name,
            log,
            child,
        })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Fails with the end of its log if it has ended.
    pub(super) fn check_alive(&mut self) -> anyhow::Result<()> {
        let Some(status) = self
            .child
            .try_wait()
            .context("a process cannot be watched")?
        else {
            return Ok(());
        };
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n  ");
        bail!("{} ended ({status}); its last words:\n  {tail}", self.name)
    }

    /// Asks it to end, without waiting.
    pub(super) fn let_go(&mut self) {
        drop(self.child.stdin.take());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.let_go();
        let deadline = Instant::now() + END_PATIENCE;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        // By its own process id, which is still ours: nobody has waited for it.
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}
