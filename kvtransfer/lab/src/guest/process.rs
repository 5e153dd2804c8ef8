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

use super::stuck;
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
    /// The beginning of a line, whose rest may take a while.
    Part(String),
    Ended(std::io::Result<ExitStatus>),
}

/// What a job has printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Printed<'a> {
    /// A line.
    Line(&'a str),
    /// The beginning of one. The line comes later, as a whole.
    Part(&'a str),
}

/// Runs a job; hands each line that it prints to `print`.
pub(super) fn run(order: &Order, outputs: &Path, print: &dyn Fn(Printed<'_>)) -> Result<Ended> {
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
            let text = format!("lab: {program} does not start: {error}");
            print(Printed::Line(&text));
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
    let mut line = Vec::new();
    // An error is the end too: nothing more comes.
    while let Ok(new @ [_, ..]) = reader.fill_buf() {
        let end = new.iter().position(|byte| *byte == b'\n');
        let room = TEXT_BYTES_MAX - line.len();
        let text = &new[..end.unwrap_or(new.len()).min(room)];
        line.extend_from_slice(text);
        let is_whole = end == Some(text.len()) || line.len() == TEXT_BYTES_MAX;
        let taken = text.len() + usize::from(end == Some(text.len()));
        reader.consume(taken);
        let text = String::from_utf8_lossy(&line).into_owned();
        let event = if is_whole {
            line.clear();
            Event::Line(text)
        } else {
            Event::Part(text)
        };
        if lines.send(event).is_err() {
            return;
        }
    }
    if !line.is_empty() {
        let text = String::from_utf8_lossy(&line).into_owned();
        // Whether anybody listens to the rest makes no difference at the end.
        let _ = lines.send(Event::Line(text));
    }
}

/// Prints until the process has ended and its output too, or until the limit.
fn follow(
    events: &Receiver<Event>,
    order: &Order,
    group: u32,
    print: &dyn Fn(Printed<'_>),
) -> Result<Ended> {
    let watch = Stopwatch::start();
    let limit = Duration::from_secs(order.limit_s);
    let say = |text: &str| print(Printed::Line(text));
    let mut printed = 0;
    let mut ended = None;
    let mut deadline = limit;
    loop {
        match events.recv_timeout(watch.left(deadline)) {
            Ok(Event::Line(text)) => {
                let before = printed;
                printed += text.len() + 1;
                if printed <= OUTPUT_BYTES_MAX {
                    say(&text);
                } else if before <= OUTPUT_BYTES_MAX {
                    say(&format!(
                        "lab: more than {OUTPUT_BYTES_MAX} bytes; the rest is not shown"
                    ));
                }
            }
            // Each is one read of the pipe: what a job prints bit by bit costs its bound early, not a flood of reports.
            Ok(Event::Part(text)) => {
                printed += text.len() + 1;
                if printed <= OUTPUT_BYTES_MAX {
                    print(Printed::Part(&text));
                }
            }
            Ok(Event::Ended(status)) => {
                ended.get_or_insert(reason(status.context("waiting for a job")?));
                // Whoever it left behind holds its output open, and the next job's addresses.
                kill(group);
                deadline = watch.elapsed() + AFTERMATH;
            }
            Err(RecvTimeoutError::Timeout) if ended.is_none() => {
                say(&format!(
                    "lab: still running after {} s; killed",
                    order.limit_s
                ));
                say_threads(&stuck::threads(group), &say);
                kill(group);
                ended = Some(Ended::TimedOut);
                deadline = watch.elapsed() + AFTERMATH;
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                let left = stuck::threads(group);
                if ended == Some(Ended::TimedOut) && !left.is_empty() {
                    say(&format!(
                        "lab: {} s after the kill the kernel has not ended it; its threads, and the end of the kernel's log:",
                        AFTERMATH.as_secs()
                    ));
                    say_threads(&left, &say);
                    stuck::kernel_log().iter().for_each(|line| say(line));
                }
                return ended.context("a job's output ended before the job");
            }
        }
    }
}

/// Says what the threads of a job do: whether a program hangs or the kernel cannot be seen from outside.
fn say_threads(threads: &[stuck::Thread], say: &dyn Fn(&str)) {
    for thread in threads {
        thread.to_string().lines().for_each(say);
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
        let print = |printed: Printed<'_>| {
            if let Printed::Line(text) = printed {
                lines.borrow_mut().push(text.to_owned());
            }
        };
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
        let told = |word: &str| lines.iter().any(|line| line.contains(word));
        assert!(told("(sleep): state "), "{lines:?}");
        assert!(!told("has not ended it"), "{lines:?}");
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
    fn the_beginning_of_a_line_is_told_before_its_end() {
        let told = RefCell::new(Vec::new());
        let print = |printed: Printed<'_>| told.borrow_mut().push(format!("{printed:?}"));
        // The file is made by the test once it has heard the beginning.
        let script = "printf 'test one ... '; while [ ! -e \"$WORD\" ]; do sleep 0.01; done; echo ok; printf end";
        let word = std::env::temp_dir().join(format!("rdma-lab-part-{}", std::process::id()));
        let mut order = order(30, script);
        order.env = vec![("WORD".to_owned(), word.display().to_string())];
        let print = |printed: Printed<'_>| {
            print(printed);
            if printed == Printed::Part("test one ... ") {
                std::fs::write(&word, b"").expect("writable");
            }
        };
        let ended = run(&order, Path::new("/"), &print).expect("a shell runs");
        std::fs::remove_file(&word).expect("it was made");
        assert_eq!(ended, Ended::Exited(0));
        let told = told.into_inner();
        assert_eq!(told[0], r#"Part("test one ... ")"#);
        let lines: Vec<_> = told
            .iter()
            .filter(|text| text.starts_with("Line"))
            .collect();
        assert_eq!(lines, [r#"Line("test one ... ok")"#, r#"Line("end")"#]);
    }

    #[test]
    fn a_line_longer_than_a_report_comes_in_pieces() {
        let script = format!(
            "head -c {} /dev/zero | tr '\\0' 'x'; echo",
            2 * TEXT_BYTES_MAX + 5
        );
        let (_, lines) = run_here(&order(60, &script));
        let lens: Vec<usize> = lines.iter().map(String::len).collect();
        assert_eq!(lens, [TEXT_BYTES_MAX, TEXT_BYTES_MAX, 5]);
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
