//! The target as the initiator sees it: a child process that is asked, watched, and killed by its own number at the end.
#![forbid(unsafe_code)]

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, ChildStdin, ChildStdout, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use anyhow::Context as _;

use crate::{
    TARGET_SUBCOMMAND,
    protocol::{Answer, Command},
    raw::{self, Signal},
};

/// How long a step may take before the child is killed, which ends every wait for it: a pass and its check take seconds.
const STEP_MAX: Duration = Duration::from_secs(120);

pub(crate) struct TargetProcess {
    child: Arc<Mutex<Child>>,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    /// Told of every step; the watching thread ends when it is dropped.
    progress: SyncSender<()>,
}

impl TargetProcess {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("finding this program")?;
        let mut child = std::process::Command::new(program)
            .arg(TARGET_SUBCOMMAND)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the target process")?;
        let stdin = child.stdin.take().context("the target's stdin")?;
        let stdout = child.stdout.take().context("the target's stdout")?;
        let child = Arc::new(Mutex::new(child));
        let (progress, steps) = sync_channel(1);
        let watched = Arc::clone(&child);
        thread::spawn(move || {
            loop {
                match steps.recv_timeout(STEP_MAX) {
                    Ok(()) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                    Err(RecvTimeoutError::Timeout) => {
                        tracing::error!(?STEP_MAX, "a step takes too long: the target is killed");
                        kill(&watched);
                        return;
                    }
                }
            }
        });
        Ok(Self {
            child,
            stdin,
            stdout: BufReader::new(stdout),
            progress,
        })
    }

    /// Says something without waiting for the answer.
    pub(crate) fn tell(&mut self, command: &Command) -> anyhow::Result<()> {
        // A full queue means that an earlier step has not been noticed yet, which is as good.
        let _ = self.progress.try_send(());
        let mut line = serde_json::to_vec(command)?;
        line.push(b'\n');
        self.stdin.write_all(&line).context("the target is gone")
    }

    /// The answer to what was told.
    pub(crate) fn answer(&mut self) -> anyhow::Result<Answer> {
        let mut line = String::new();
        let read = self.stdout.read_line(&mut line)?;
        anyhow::ensure!(read > 0, "the target process ended");
        match serde_json::from_str(&line)? {
            Answer::Failed { error } => anyhow::bail!("the target: {error}"),
            answer => Ok(answer),
        }
    }

    pub(crate) fn ask(&mut self, command: &Command) -> anyhow::Result<Answer> {
        self.tell(command)?;
        self.answer()
    }

    /// Stops it, lets it go on, or ends it.
    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // It is not waited for anywhere but in `kill`, so the number is still its own.
        Ok(raw::signal(child.id(), signal)?)
    }

    /// Processor seconds of the target so far.
    pub(crate) fn cpu_seconds(&mut self) -> anyhow::Result<f64> {
        match self.ask(&Command::Usage)? {
            Answer::Usage { cpu_seconds } => Ok(cpu_seconds),
            other => anyhow::bail!("an unexpected answer: {other:?}"),
        }
    }
}

impl Drop for TargetProcess {
    fn drop(&mut self) {
        kill(&self.child);
    }
}

/// Ends the child. Its number cannot have been given to anybody else: it is not waited for anywhere but here.
fn kill(child: &Mutex<Child>) {
    let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = child.kill();
    let _ = child.wait();
}
