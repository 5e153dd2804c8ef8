//! The binary as a process, with its log.

use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};

use crate::fakes::{FakeWorker, Running, soon};

pub struct Process {
    pub child: Child,
    pub router: Running,
    lines: Lines<BufReader<ChildStderr>>,
}

/// The binary without any setting of the test's own environment.
pub fn kvrouter() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvrouter"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("KVROUTER_") {
            command.env_remove(name);
        }
    }
    command
}

impl Process {
    /// Starts the binary in front of two workers and waits until it listens.
    pub async fn start(
        prefill: &FakeWorker,
        decode: &FakeWorker,
        arrange: impl FnOnce(&mut Command),
    ) -> Self {
        let mut command = kvrouter();
        command
            .args(["--prefill", &prefill.url, "8998", "--decode", &decode.url])
            .args(["--host", "127.0.0.1", "--port", "0", "--log-plain"])
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        arrange(&mut command);
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut started = Self {
            child,
            router: Running::elsewhere(""),
            lines,
        };
        let line = started.line("listening on ").await;
        let (_, url) = line.split_once("listening on ").unwrap();
        let end = |letter: char| letter == '"' || letter.is_whitespace();
        let url = url.split(end).next().unwrap();
        started.router = Running::elsewhere(url);
        started
    }

    /// Reads the log up to the next line that contains `part`.
    pub async fn line(&mut self, part: &str) -> String {
        soon(async {
            loop {
                let line = self.lines.next_line().await.unwrap();
                let line = line.expect("the log ended");
                if line.contains(part) {
                    return line;
                }
            }
        })
        .await
    }

    pub async fn signal(&self, name: &str) {
        let pid = self.child.id().unwrap().to_string();
        let status = Command::new("kill").args([name, &pid]).status().await;
        assert!(status.unwrap().success());
    }
}
