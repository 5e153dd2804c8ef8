//! perftest as the reference: both of its processes started here, its answer read from the client's table.
#![forbid(unsafe_code)]

use std::{
    io::Read as _,
    net::{IpAddr, TcpListener},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail};
use kvtransfer::clock;

use super::Ends;

/// How long one run may take.
const RUN_MAX: Duration = Duration::from_secs(60);
/// How long a server may take to listen.
const LISTEN_MAX: Duration = Duration::from_secs(15);
/// Between two attempts of a client whose server does not listen yet.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(30);
/// Bytes of perftest's "MB": figures of rates are multiples of it.
const MIB: f64 = 1_048_576.0;

/// One of perftest's programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tool {
    /// `ib_write_bw`: GB/s (1e9).
    WriteRate,
    /// `ib_write_lat`: typical microseconds of one way.
    WriteLatency,
    /// `ib_send_lat`: the same.
    SendLatency,
}

impl Tool {
    fn program(self) -> &'static str {
        match self {
            Self::WriteRate => "ib_write_bw",
            Self::WriteLatency => "ib_write_lat",
            Self::SendLatency => "ib_send_lat",
        }
    }

    /// The figure of a row: `#bytes #iterations peak average` in MiB/s, or `#bytes #iterations min max typical`.
    fn figure(self, row: &[f64]) -> Option<f64> {
        match self {
            Self::WriteRate => Some(row.get(3)? * MIB / 1e9),
            Self::WriteLatency | Self::SendLatency => row.get(4).copied(),
        }
    }
}

impl Tool {
    /// The figure for messages of `bytes` in the tool's table.
    ///
    /// # Errors
    /// There is none, or one that no device has: where the clock does not advance as perftest expects (it counts processor
    /// cycles), it prints `inf` or zero, and a ratio to that would look like a result.
    fn read(self, text: &str, bytes: usize) -> anyhow::Result<f64> {
        let figure = row(text, bytes).and_then(|row| self.figure(&row));
        let figure = figure.with_context(|| format!("no row for messages of {bytes} bytes"))?;
        anyhow::ensure!(
            figure.is_finite() && figure > 0.0,
            "its figure for messages of {bytes} bytes is {figure}, which says that its clock does not work here; run it again"
        );
        Ok(figure)
    }
}

/// Runs perftest between two devices.
pub(super) struct Perftest {
    server: Vec<String>,
    client: Vec<String>,
    /// What the client connects to.
    address: IpAddr,
}

impl Perftest {
    pub(super) fn new(ends: &Ends) -> anyhow::Result<Self> {
        let (from, to) = (&ends.from, &ends.to);
        let address = |rail: &kvtransfer::doctor::rails::Rail| {
            let name = &rail.device;
            rail.address
                .with_context(|| format!("{name} has no address"))
        };
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let arguments = |rail: &kvtransfer::doctor::rails::Rail| -> Vec<String> {
            match &rail.gid {
                _ if ends.is_standard => words(&["-d", &rail.device, "-R"]),
                Some(gid) => words(&["-d", &rail.device, "-x", &gid.index.to_string()]),
                None => words(&["-d", &rail.device]),
            }
        };
        let mut client = arguments(from);
        let mut reached = IpAddr::from([127, 0, 0, 1]);
        if ends.is_standard {
            reached = address(to)?;
            let source = address(from)?.to_string();
            client.extend(["--source_ip".to_owned(), source]);
        }
        Ok(Self {
            server: arguments(to),
            client,
            address: reached,
        })
    }

    /// One run. The unit is the tool's.
    pub(super) fn run(&self, tool: Tool, bytes: usize, iterations: usize) -> anyhow::Result<f64> {
        let port = free_port()?;
        let run = [
            "-F",
            "-s",
            &bytes.to_string(),
            "-n",
            &iterations.to_string(),
            "-p",
            &port.to_string(),
        ]
        .map(str::to_owned);
        let mut command = Command::new(tool.program());
        command.args(&self.server).args(&run);
        let mut server = Running::start(command)?;
        let deadline = clock::now() + LISTEN_MAX;
        loop {
            let mut command = Command::new(tool.program());
            command.args(&self.client).args(&run);
            command.arg(self.address.to_string());
            let (is_success, text) = Running::start(command)?.finish(RUN_MAX)?;
            if is_success {
                server.finish(RUN_MAX)?;
                return tool
                    .read(&text, bytes)
                    .with_context(|| format!("{} printed\n{text}", tool.program()));
            }
            if server.has_ended()? || clock::now() >= deadline {
                let (_, served) = server.end()?;
                bail!(
                    "{} failed; client:\n{text}\nserver:\n{served}",
                    tool.program()
                );
            }
            thread::sleep(ATTEMPT_PAUSE);
        }
    }
}

/// A port that nobody uses now.
fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").context("looking for a free port")?;
    Ok(listener.local_addr()?.port())
}

/// The row of the table whose first figure is the message size.
fn row(text: &str, bytes: usize) -> Option<Vec<f64>> {
    let rows = text.lines().filter_map(|line| {
        let row: Result<Vec<f64>, _> = line.split_whitespace().map(str::parse).collect();
        row.ok()
    });
    rows.filter(|row| row.len() >= 4)
        .find(|row| (row[0] - bytes as f64).abs() < 0.5)
}

/// A process whose output is collected. Dropping it ends it.
struct Running {
    child: Child,
    output: Receiver<String>,
}

impl Running {
    fn start(mut command: Command) -> anyhow::Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {command:?} (package perftest)"))?;
        let (sender, output) = channel();
        let pipes = (child.stdout.take(), child.stderr.take());
        thread::spawn(move || {
            let mut text = String::new();
            if let (Some(mut out), Some(mut errors)) = pipes {
                // The table first; a failure's few lines fit into the other pipe meanwhile.
                let _ = out.read_to_string(&mut text);
                let _ = errors.read_to_string(&mut text);
            }
            let _ = sender.send(text);
        });
        Ok(Self { child, output })
    }

    fn has_ended(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for the end: whether it succeeded, and what it said.
    fn finish(&mut self, limit: Duration) -> anyhow::Result<(bool, String)> {
        match self.output.recv_timeout(limit) {
            Ok(text) => Ok((self.child.wait()?.success(), text)),
            Err(RecvTimeoutError::Timeout) => {
                self.child.kill()?;
                bail!("perftest did not end within {limit:?}")
            }
            Err(RecvTimeoutError::Disconnected) => bail!("perftest's output was lost"),
        }
    }

    fn end(&mut self) -> anyhow::Result<(bool, String)> {
        // It may have ended by itself.
        let _ = self.child.kill();
        self.finish(RUN_MAX)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // By its own number, which nobody else has waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::{Tool, row};

    #[test]
    fn the_figures_are_read_from_perftests_tables() {
        let rate = " #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]\n \
                    65536      100              30.51              29.80  \t\t   0.000477\n";
        let row_of_rate = row(rate, 65536).expect("a row");
        let figure = Tool::WriteRate.figure(&row_of_rate).expect("a figure");
        assert!((figure - 0.031_247_565).abs() < 1e-6, "{figure}");
        assert!(row(rate, 4096).is_none());
        let latency = " #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]   \
                       99% percentile[usec]   99.9% percentile[usec] \n \
                       64      200          38.20          512.00       41.50     \t       44.10        \t8.00\t\t90.00  512.00\n";
        let row_of_latency = row(latency, 64).expect("a row");
        let figure = Tool::WriteLatency
            .figure(&row_of_latency)
            .expect("a figure");
        assert!((figure - 41.5).abs() < 1e-9);
        assert!(row("---- 64 words", 64).is_none());
    }

    #[test]
    fn a_figure_that_no_device_has_is_an_error() {
        let rate = |figure: &str| {
            let text = format!(
                " 65536      100              inf              {figure}  \t\t   0.000477\n"
            );
            Tool::WriteRate.read(&text, 65536)
        };
        assert!(rate("29.80").is_ok());
        for figure in ["inf", "nan", "0.00", "-1.0"] {
            let error = rate(figure).expect_err(figure).to_string();
            assert!(error.contains("its clock does not work"), "{error}");
        }
        let error = Tool::WriteRate.read("", 64).expect_err("no row");
        assert!(error.to_string().contains("no row"), "{error}");
    }
}
