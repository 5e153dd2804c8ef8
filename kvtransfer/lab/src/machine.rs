//! The virtual machine: QEMU with the image, watched until it ends or its time is over.
//!
//! The first serial port is the kernel's console and goes to a file; the second carries the guest's reports. So a
//! kernel message never lands in the middle of a report.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::{clock::Stopwatch, kernel::Kernel, protocol::Report};

/// Memory of the guest; the image takes its size twice while it is unpacked.
const MEMORY: &str = "2048M";
/// Lines that may wait for the runner.
const LINES_WAITING_MAX: usize = 256;
/// Longest line taken at once; the longest report is shorter.
const LINE_BYTES_MAX: u64 = 16 << 10;
/// How long the machine may take to switch off after its last report.
const END_LIMIT: Duration = Duration::from_secs(20);
/// Lines of the console that are shown after a crash.
const CONSOLE_LINES_SHOWN: usize = 60;

/// What the kernel says when something is broken in it. A machine that panics ends by itself.
const CRASHES: [&str; 6] = [
    "Kernel panic",
    "Oops:",
    "BUG:",
    "general protection fault",
    "unable to handle",
    "refcount_t:",
];

/// A running machine; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Machine {
    qemu: Child,
    lines: Receiver<String>,
    console: PathBuf,
    errors: PathBuf,
}

impl Machine {
    /// Boots the kernel with the image; logs go to `folder`.
    pub(crate) fn boot(kernel: &Kernel, image: &Path, folder: &Path) -> Result<Self> {
        let console = folder.join("console.log");
        let errors = folder.join("qemu.log");
        let stderr =
            File::create(&errors).with_context(|| format!("making {}", errors.display()))?;
        let mut port = std::ffi::OsString::from("file:");
        port.push(&console);
        let mut qemu = Command::new("setpriv")
            // If this process dies, however it dies, so does the machine.
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            // Emulation works everywhere, also where the lab itself runs in a virtual machine.
            .args([
                "-machine",
                "q35,accel=tcg,usb=off,vmport=off",
                "-cpu",
                "max",
                "-smp",
                "2",
            ])
            .args([
                "-m",
                MEMORY,
                "-nodefaults",
                "-display",
                "none",
                "-net",
                "none",
            ])
            .args(["-no-reboot", "-serial"])
            .arg(port)
            .args(["-serial", "stdio", "-append"])
            // A host with more to do than processors stalls a guest for seconds; only the limits here judge that.
            .arg(
                "console=ttyS0 quiet loglevel=5 panic=-1 oops=panic rdinit=/init nokaslr \
                 mitigations=off random.trust_cpu=on tsc=reliable no_timer_check \
                 nowatchdog rcupdate.rcu_cpu_stall_suppress=1",
            )
            .arg("-kernel")
            .arg(kernel.image())
            .arg("-initrd")
            .arg(image)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .context("starting QEMU")?;
        let (sender, lines) = sync_channel(LINES_WAITING_MAX);
        let stdout = qemu.stdout.take().context("QEMU's output")?;
        thread::spawn(move || read_lines(stdout, &sender));
        Ok(Self {
            qemu,
            lines,
            console,
            errors,
        })
    }

    /// Hands every report to `take` until the guest is done; an error if it crashed, or was not done in time.
    pub(crate) fn watch(
        mut self,
        limit: Duration,
        mut take: impl FnMut(Report) -> Result<()>,
    ) -> Result<()> {
        let watch = Stopwatch::start();
        let mut deadline = limit;
        let mut is_done = false;
        loop {
            match self.lines.recv_timeout(watch.left(deadline)) {
                Ok(line) => match Report::parse(&line) {
                    Some(Report::Broken { why }) => {
                        bail!("the guest did not start: {why}{}", self.tail())
                    }
                    Some(Report::Done) => {
                        is_done = true;
                        deadline = watch.elapsed() + END_LIMIT;
                    }
                    Some(report) => take(report)?,
                    None if line.trim().is_empty() => {}
                    None => crate::say(&format!("guest: {}", line.trim_end())),
                },
                Err(RecvTimeoutError::Timeout) => {
                    bail!(
                        "the machine was still running after {} s; ended{}",
                        deadline.as_secs(),
                        self.tail()
                    );
                }
                // QEMU has ended: its output is closed.
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let ended = self.qemu.wait().context("waiting for QEMU")?;
        let console = self.console_text();
        if let Some(line) = crash_in(&console) {
            bail!("the guest's kernel crashed: {line}{}", self.tail());
        }
        for line in console.lines().filter(|line| line.contains("WARNING:")) {
            crate::say(&format!("the guest's kernel warned: {line}"));
        }
        if !ended.success() || !is_done {
            let errors = fs::read_to_string(&self.errors).unwrap_or_default();
            bail!("the machine ended early ({ended}){}\n{errors}", self.tail());
        }
        Ok(())
    }

    fn console_text(&self) -> String {
        let bytes = fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The console's last lines, for an error.
    fn tail(&self) -> String {
        let console = self.console_text();
        let lines: Vec<&str> = console.lines().collect();
        let from = lines.len().saturating_sub(CONSOLE_LINES_SHOWN);
        if lines.is_empty() {
            return "; its console is empty".to_owned();
        }
        format!("\nthe console's last lines:\n{}", lines[from..].join("\n"))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only if it has ended already, which is what they are for.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn crash_in(console: &str) -> Option<&str> {
    console
        .lines()
        .find(|line| CRASHES.iter().any(|crash| line.contains(crash)))
}

fn read_lines(pipe: impl Read, lines: &SyncSender<String>) {
    let mut reader = BufReader::new(pipe);
    loop {
        let mut line = Vec::new();
        match reader
            .by_ref()
            .take(LINE_BYTES_MAX)
            .read_until(b'\n', &mut line)
        {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if lines
            .send(String::from_utf8_lossy(&line).into_owned())
            .is_err()
        {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_is_seen_in_the_console_and_ordinary_trouble_is_not() {
        let console = "[ 1.0] rdma_rxe: loaded\n[ 2.0] BUG: kernel NULL pointer dereference\n";
        assert!(crash_in(console).is_some_and(|line| line.contains("NULL")));
        assert_eq!(crash_in("[ 1.0] siw: module verification failed\n"), None);
    }
}
