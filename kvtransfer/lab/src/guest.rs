//! What runs inside the machine: brings the devices up, runs the jobs one after the other, reports, and ends.

mod devices;
mod pair;
mod process;
mod stuck;

use std::{
    fs::{self, File},
    io::Write as _,
    iter,
    path::Path,
    process::{Command, Stdio},
    sync::Mutex,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

pub(crate) use pair::{Pair, run as run_pair};
use process::Printed;

use crate::{
    clock::Stopwatch,
    order::Order,
    protocol::{PART_BYTES, Report, is_word},
};

/// Where the image says what to do.
pub(crate) const ORDERS: &str = "/lab/orders";
/// Where the image says which modules to load, in order.
pub(crate) const MODULES: &str = "/lab/modules";
/// Below this, each job has a folder for files that the runner shall keep; its path is in the job's `LAB_OUT`.
const OUTPUTS: &str = "/lab/out";
/// Largest file that a job can hand out; a serial line is no place for more.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// The serial port for reports; the first one is the kernel's.
const PORT: &str = "/dev/ttyS1";

/// Writes reports to the serial port, whole lines at a time.
#[derive(Debug)]
struct Reporter(Mutex<File>);

impl Reporter {
    fn send(&self, report: &Report) {
        let line = report.line() + "\n";
        let mut port = self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        // Without its port the guest has nobody to tell; the runner's time limit ends it.
        let _ = port.write_all(line.as_bytes());
    }

    fn stage(&self, name: &str, seconds: f64) {
        let name = name.to_owned();
        self.send(&Report::Stage { name, seconds });
    }
}

/// Runs as the child of the guest's first process; returning from here switches the machine off.
pub(crate) fn run() -> Result<()> {
    for (kind, place) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/run"),
    ] {
        command("busybox", &["mount", "-t", kind, kind, place])?;
    }
    fs::create_dir_all("/dev/shm").context("making /dev/shm")?;
    command("busybox", &["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"])?;
    let port = File::options()
        .write(true)
        .open(PORT)
        .context("opening the serial port")?;
    let reporter = Reporter(Mutex::new(port));
    let started = start_and_run(&reporter);
    if let Err(error) = &started {
        let why = format!("{error:#}").replace('\n', "; ");
        reporter.send(&Report::Broken { why });
    }
    started
}

fn start_and_run(reporter: &Reporter) -> Result<()> {
    let uptime = fs::read_to_string("/proc/uptime").context("reading the uptime")?;
    let uptime = uptime.split(' ').next().and_then(|word| word.parse().ok());
    reporter.stage("kernel and image", uptime.unwrap_or_default());

    let watch = Stopwatch::start();
    let modules = fs::read_to_string(MODULES).context("reading the list of modules")?;
    for module in modules.lines() {
        // A module's file, and its parameters if it has any.
        let arguments: Vec<&str> = iter::once("insmod").chain(module.split(' ')).collect();
        command("busybox", &arguments)?;
    }
    reporter.stage("modules", watch.seconds());

    let watch = Stopwatch::start();
    devices::bring_up()?;
    reporter.stage("devices", watch.seconds());

    let orders = fs::read_to_string(ORDERS).context("reading the orders")?;
    for order in Order::parse_all(&orders)? {
        run_order(reporter, &order)?;
    }
    reporter.send(&Report::Done);
    Ok(())
}

fn run_order(reporter: &Reporter, order: &Order) -> Result<()> {
    let outputs = Path::new(OUTPUTS).join(&order.name);
    fs::create_dir_all(&outputs).context("making a job's output folder")?;
    let job = || order.name.clone();
    reporter.send(&Report::Started { job: job() });
    let watch = Stopwatch::start();
    let ended = process::run(order, &outputs, &|printed| {
        let job = job();
        reporter.send(&match printed {
            Printed::Line(text) => Report::Output {
                job,
                text: text.to_owned(),
            },
            Printed::Part(text) => Report::Part {
                job,
                text: text.to_owned(),
            },
        });
    })?;
    let seconds = watch.seconds();
    send_files(reporter, &order.name, &outputs)?;
    reporter.send(&Report::Job {
        job: job(),
        ended,
        seconds,
    });
    Ok(())
}

/// Sends what the job left in its folder; what cannot be sent is said in its output.
fn send_files(reporter: &Reporter, job: &str, folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).context("reading a job's output folder")? {
        let entry = entry.context("reading a job's output folder")?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let facts = entry.metadata().context("reading a job's output")?;
        if !facts.is_file() || facts.len() > FILE_BYTES_MAX || !is_word(&name) {
            let text = format!(
                "lab: {name} stays in the guest: only plain files of at most {FILE_BYTES_MAX} bytes leave it"
            );
            reporter.send(&Report::Output {
                job: job.to_owned(),
                text,
            });
            continue;
        }
        let bytes = fs::read(entry.path()).context("reading a job's output")?;
        let parts: Vec<&[u8]> = if bytes.is_empty() {
            vec![&[]]
        } else {
            bytes.chunks(PART_BYTES).collect()
        };
        for part in parts {
            reporter.send(&Report::File {
                job: job.to_owned(),
                name: name.clone(),
                bytes: part.to_vec(),
            });
        }
    }
    Ok(())
}

/// Runs a tool of the image; its output is part of the error.
fn command(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        // The first mounts come before there is a /dev/null.
        .stdin(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {program}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {}: {stderr}{stdout}", arguments.join(" "));
    }
    Ok(stdout.into_owned())
}

/// Looks again and again until something is there; the guest has no event to wait for in these cases.
fn wait_until(what: &str, limit: Duration, mut is_there: impl FnMut() -> bool) -> Result<()> {
    let watch = Stopwatch::start();
    while !is_there() {
        if watch.left(limit).is_zero() {
            bail!("{what} after {} s", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_files_leave_the_guest_whole_and_others_are_named() {
        let folder = std::env::temp_dir().join(format!("rdma-lab-{}", std::process::id()));
        let outputs = folder.join("outputs");
        fs::create_dir_all(outputs.join("a-folder")).expect("a temporary folder");
        let data: Vec<u8> = (0..PART_BYTES * 2 + 5)
            .map(|at| at.to_le_bytes()[0])
            .collect();
        fs::write(outputs.join("data.json"), &data).expect("writable");
        fs::write(outputs.join("empty"), b"").expect("writable");
        let large = File::create(outputs.join("large")).expect("writable");
        large.set_len(FILE_BYTES_MAX + 1).expect("sparse");
        let port = folder.join("port");
        let reporter = Reporter(Mutex::new(File::create(&port).expect("writable")));
        send_files(&reporter, "job", &outputs).expect("readable");

        let sent = fs::read_to_string(&port).expect("text");
        fs::remove_dir_all(&folder).expect("ours");
        let mut received = Vec::new();
        let mut kept_back = Vec::new();
        let mut has_empty = false;
        for report in sent.lines().filter_map(Report::parse) {
            match report {
                Report::File { name, bytes, .. } if name == "data.json" => received.extend(bytes),
                Report::File { name, bytes, .. } => {
                    has_empty |= name == "empty" && bytes.is_empty()
                }
                Report::Output { text, .. } => kept_back.push(text),
                report => panic!("unexpected: {report:?}"),
            }
        }
        assert_eq!(received, data);
        assert!(has_empty);
        kept_back.sort();
        assert_eq!(kept_back.len(), 2, "{kept_back:?}");
        assert!(kept_back[0].contains("a-folder") && kept_back[1].contains("large"));
    }
}
