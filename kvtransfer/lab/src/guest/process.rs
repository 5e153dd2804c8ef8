//! One job's process: its output line by line, its limit, and the end of everything it started.

use std::{
    io::{BufRead as _, BufReader, Read},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    clock::Stopwatch,
    order::Order,
    protocol::{Ended, TEXT_BYTES_MAX},
};

/// Lines that may wait between a job and the serial port; a job that prints faster waits.
const LINES_WAITING_MAX: usize = 64;
/// What one job may print; a serial port carries it in seconds.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// How long output may still come once the job's processes are gone.
const AFTERMATH: Duration = Duration::from_secs(2);

/// What the threads around a process tell.
enum Event {
    Line(String),
    Ended(std::io::Result<ExitStatus>),
}

/// Runs a job; hands each line that it prints to `print`.
pub(super) fn run(order: &Order, outputs: &Path, print: &dyn Fn(&str)) -> Result<Ended> {
    let (program, arguments) = order
        .arguments
        .split_first()
        .context("a job without program")?;
    let spawned = Command::new(program)
        .args(arguments)
        .envs(order.env.iter().map(|(key, value)| (key, value)))
        .env("LAB_OUT", outputs)
        .current_dir(outputs)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Its own group, so that what it started can be ended with it.
        .process_group(0)
        .spawn();
    let child = match spawned {
        Ok(child) => child,
        Err(error) => {
            print(&format!("lab: {program} does not start: {error}"));
            return Ok(Ended::Exited(127));
        }
    };
    let group = child.id();
    let events = watch(child)?;
    follow(&events, order, group, print)
}

/// Starts the threads that read the job's output and wait for its end.
///
/// They are not joined: once the receiver is gone, nothing that they send blocks them.
fn watch(mut child: Child) -> Result<Receiver<Event>> {
    let (sender, receiver) = sync_channel(LINES_WAITING_MAX);
    let stdout = child.stdout.take().context("the job's output")?;
    let stderr = child.stderr.take().context("the job's errors")?;
    let from_stdout = sender.clone();
    let from_stderr = sender.clone();
    thread::spawn(move || read_lines(stdout, &from_stdout));
    thread::spawn(move || read_lines(stderr, &from_stderr));
    thread::spawn(move || {
        let status = child.wait();
        // Only a job that outlived its kill finds nobody listening.
        let _ = sender.send(Event::Ended(status));
    });
    Ok(receiver)
}

fn read_lines(pipe: impl Read, lines: &SyncSender<Event>) {
    let mut reader = BufReader::new(pipe);
    loop {
        let mut line = Vec::new();
        let mut limited = reader.by_ref().take(TEXT_BYTES_MAX as u64);
        match limited.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if line.ends_with(b"\n") {
            line.pop();
        }
        let text = String::from_utf8_lossy(&line).into_owned();
        if lines.send(Event::Line(text)).is_err() {
            return;
        }
    }
}

/// Prints until the process has ended and its output too, or until the limit.
fn follow(
    events: &Receiver<Event>,
    order: &Order,
    group: u32,
    print: &dyn Fn(&str),
) -> Result<Ended> {
    let watch = Stopwatch::start();
    let limit = Duration::from_secs(order.limit_s);
    let mut printed = 0;
    let mut ended = None;
    let mut deadline = limit;
    loop {
        match events.recv_timeout(watch.left(deadline)) {
            Ok(Event::Line(text)) => {
                let before = printed;
                printed += text.len() + 1;
                if printed <= OUTPUT_BYTES_MAX {
                    print(&text);
                } else if before <= OUTPUT_BYTES_MAX {
                    print(&format!(
                        "lab: more than {OUTPUT_BYTES_MAX} bytes; the rest is not shown"
                    ));
                }
            }
            Ok(Event::Ended(status)) => {
                ended.get_or_insert(reason(status.context("waiting for a job")?));
                // Whoever it left behind holds its output open, and the next job's addresses.
                kill(group);
                deadline = watch.elapsed() + AFTERMATH;
            }
            Err(RecvTimeoutError::Timeout) if ended.is_none() => {
                print(&format!(
                    "lab: still running after {} s; killed",
                    order.limit_s
                ));
                kill(group);
                ended = Some(Ended::TimedOut);
                deadline = watch.elapsed() + AFTERMATH;
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                return ended.context("a job's output ended before the job");
            }
        }
    }
}

fn reason(status: ExitStatus) -> Ended {
    match (status.code(), status.signal()) {
        (Some(code), _) => Ended::Exited(code),
        (None, signal) => Ended::Killed(signal.unwrap_or_default()),
    }
}

/// Kills a job's process group; that it is gone already is the usual case.
fn kill(group: u32) {
    let _ = Command::new("kill")
        .args(["-9", "--", &format!("-{group}")])
        .stderr(Stdio::null())
        .status();
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, path::Path};

    use super::*;

    fn order(limit_s: u64, script: &str) -> Order {
        Order {
            name: "job".to_owned(),
            limit_s,
            env: vec![("WORD".to_owned(), "from the order".to_owned())],
            arguments: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        }
    }

    fn run_here(order: &Order) -> (Ended, Vec<String>) {
        let lines = RefCell::new(Vec::new());
        let print = |text: &str| lines.borrow_mut().push(text.to_owned());
        let ended = run(order, Path::new("/"), &print).expect("a shell runs");
        (ended, lines.into_inner())
    }

    #[test]
    fn output_code_and_environment_are_the_jobs_own() {
        let (ended, lines) = run_here(&order(30, "echo \"$WORD\"; echo $LAB_OUT; exit 3"));
        assert_eq!(ended, Ended::Exited(3));
        assert_eq!(lines, ["from the order", "/"]);
    }

    #[test]
    fn a_signal_is_told_from_a_code() {
        let (ended, _) = run_here(&order(30, "kill -11 $$"));
        assert_eq!(ended, Ended::Killed(11));
    }

    #[test]
    fn a_missing_program_fails_its_job_only() {
        let mut order = order(30, "");
        order.arguments = vec!["/no/such/program".to_owned()];
        let (ended, lines) = run_here(&order);
        assert_eq!(ended, Ended::Exited(127));
        assert!(lines[0].contains("/no/such/program"), "{lines:?}");
    }

    #[test]
    fn a_job_at_its_limit_ends_with_all_it_started() {
        let (ended, lines) = run_here(&order(1, "sleep 600 & echo $!; sleep 600"));
        assert_eq!(ended, Ended::TimedOut);
        let child = Path::new("/proc").join(&lines[0]).join("cmdline");
        let left = std::fs::read_to_string(child).unwrap_or_default();
        assert!(!left.contains("sleep"), "{left}");
    }

    #[test]
    fn what_a_finished_job_left_behind_is_killed() {
        let (ended, lines) = run_here(&order(60, "sleep 600 & echo started"));
        assert_eq!(ended, Ended::Exited(0));
        assert_eq!(lines, ["started"]);
    }

    #[test]
    fn endless_output_is_cut_at_its_bound() {
        let script = format!("head -c {} /dev/zero | tr '\\0' 'x'", 2 * OUTPUT_BYTES_MAX);
        let (ended, lines) = run_here(&order(60, &script));
        assert_eq!(ended, Ended::Exited(0));
        let bytes: usize = lines.iter().map(String::len).sum();
        assert!(bytes <= OUTPUT_BYTES_MAX + 200, "{bytes}");
        let notes = lines
            .iter()
            .filter(|line| line.starts_with("lab: more than"));
        assert_eq!(notes.count(), 1);
    }
}
