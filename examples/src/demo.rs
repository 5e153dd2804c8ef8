//! `cargo demo`: a prefill/decode cluster of real processes on this machine, asked and checked.
//!
//! Two prefill workers, one decode worker and the router start as child processes of this program (it starts itself
//! with the hidden commands `worker` and `router`), and one worker that does everything alone. Each request goes to the
//! router and to the single worker, and the two answers must be equal byte for byte: the text, the finish reason, the
//! token counts. Children end when their standard input closes, so they cannot outlive the demo however it ends.
#![forbid(unsafe_code)]

mod children;
mod cluster;
mod ports;
mod requests;
mod table;

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, ValueEnum as _};
use tokio::signal::unix::{SignalKind, signal};

use crate::model::ModelShape;
use crate::plane::{RdmaConnector, TransferPath};
use cluster::Cluster;

const EXAMPLES: &str = "\
What you see:
  1. five processes start: 2 prefill workers, 1 decode worker, the router, 1 worker that needs nobody
  2. requests stream through the router; each answer is compared with that of the single worker
  3. a table: which path the KV cache took, bytes, GB/s, handshake and time to first token
  4. the last line is `demo: ok`, or the reason why not and where the logs are (exit status 1)

Examples:
  cargo demo                              the above, about ten seconds
  cargo demo -- --keep                    leaves the cluster up and prints curl lines; ends with Ctrl-C
  cargo demo -- --transfer-path tcp       as if prefill and decode were on different hosts
  cargo demo -- --path verbs              over RDMA; without a usable device it says what is missing
  cargo demo -- --quick                   the same requests, shorter, of a smaller model
  cargo demo -- --prefill-tp 4,1 --decode-tp 2
                                          heads are cut and joined between ranks on the way

The model is a real transformer with random weights: its words mean nothing, but every one depends on every byte of the
KV cache, so a single lost or misplaced page would change them.";

/// Runs a prefill/decode cluster of real processes on this machine and checks its answers against one worker.
#[derive(Clone, Debug, Parser)]
#[command(name = "demo", version, after_help = EXAMPLES)]
pub struct Arguments {
    /// Leave the cluster up after the checks, until Ctrl-C.
    #[arg(long)]
    pub keep: bool,
    /// Tensor-parallel ranks of every worker; --prefill-tp and --decode-tp say it apart.
    #[arg(long, value_name = "RANKS")]
    pub tp: Option<u32>,
    /// Ranks of the first and the second prefill worker [default: 2,1].
    #[arg(long, value_name = "RANKS", value_delimiter = ',', num_args = 1..=2)]
    pub prefill_tp: Vec<u32>,
    /// Ranks of the decode worker [default: 1].
    #[arg(long, value_name = "RANKS")]
    pub decode_tp: Option<u32>,
    /// Ask the same kinds of requests of a smaller model and more briefly: for an emulator, which computes slowly.
    #[arg(long)]
    pub quick: bool,
    /// How KV travels between the workers.
    #[arg(long, visible_alias = "path", value_enum, default_value_t)]
    pub transfer_path: TransferPath,
    /// RDMA devices of every worker for `--path verbs`. Default: every usable one.
    #[arg(long, value_name = "LIST", default_value = "")]
    pub rdma_devices: String,
    /// How queue pairs are connected. Default: as the device's mode asks for.
    #[arg(long, value_enum)]
    pub rdma_connector: Option<RdmaConnector>,
    /// Port of the router.
    #[arg(long, default_value_t = 8080)]
    pub router_port: u16,
    /// Port of the first prefill's bootstrap registry; the second takes the next free one.
    #[arg(long, default_value_t = 34000)]
    pub bootstrap_port: u16,
    /// First port of the workers' HTTP servers.
    #[arg(long, default_value_t = 30000)]
    pub worker_port: u16,
    /// Fail if a port is taken, instead of choosing another one.
    #[arg(long, conflicts_with = "any_ports")]
    pub strict_ports: bool,
    /// Let the system choose every port.
    #[arg(long)]
    pub any_ports: bool,
    /// Folder for the logs of the processes; without it they go to a temporary one, which is removed if all is well.
    #[arg(long, value_name = "FOLDER")]
    pub logs: Option<PathBuf>,
}

impl Arguments {
    /// Ranks of both prefill workers.
    fn prefill_ranks(&self) -> [u32; 2] {
        match (self.prefill_tp[..].first(), self.prefill_tp.get(1), self.tp) {
            (Some(first), second, _) => [*first, *second.unwrap_or(first)],
            (None, _, Some(tp)) => [tp, tp],
            // One of each, so that the usual run joins heads of two ranks and moves whole pages too.
            (None, _, None) => [2, 1],
        }
    }

    /// The flags of every worker that say which model it has.
    fn model_flags(&self) -> Vec<String> {
        if !self.quick {
            return Vec::new();
        }
        let shape = ModelShape::small();
        let flags = [
            ("--layers", shape.layers),
            ("--hidden-size", shape.hidden),
            ("--q-heads", shape.q_heads),
            ("--kv-heads", shape.kv_heads),
            ("--head-dim", shape.head_dim),
            ("--intermediate-size", shape.ffn),
            ("--context-length", shape.context),
        ];
        let flags = flags.map(|(name, value)| [name.to_owned(), value.to_string()]);
        flags.into_iter().flatten().collect()
    }

    /// The flags of a worker that say how KV travels.
    fn path_flags(&self) -> Vec<String> {
        let name = |value: Option<clap::builder::PossibleValue>| {
            value.map_or_else(String::new, |value| value.get_name().to_owned())
        };
        let path = name(self.transfer_path.to_possible_value());
        let mut flags = vec!["--transfer-path".to_owned(), path];
        if !self.rdma_devices.is_empty() {
            flags.extend(["--rdma-devices".to_owned(), self.rdma_devices.clone()]);
        }
        if let Some(connector) = self.rdma_connector {
            let connector = name(connector.to_possible_value());
            flags.extend(["--rdma-connector".to_owned(), connector]);
        }
        flags
    }

    fn decode_ranks(&self) -> u32 {
        self.decode_tp.or(self.tp).unwrap_or(1)
    }
}

/// Runs the demo, or (as a child) one process of it.
#[must_use]
pub fn main_from_args(args: Vec<OsString>) -> ExitCode {
    let command = args.get(1).and_then(|arg| arg.to_str());
    let result = match command {
        Some(children::WORKER) => {
            die_with_parent();
            crate::main_from_args(args.into_iter().skip(1))
        }
        Some(children::ROUTER) => {
            die_with_parent();
            kvrouter::main_from_args(args.into_iter().skip(1))
        }
        _ => return demo(&Arguments::parse_from(args)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Ends this process when its standard input does: the parent holds the other end and may have been killed.
fn die_with_parent() {
    std::thread::spawn(|| {
        let mut rest = [0; 64];
        while !matches!(std::io::stdin().read(&mut rest), Ok(0) | Err(_)) {}
        std::process::exit(0);
    });
}

/// How the demo ended.
enum Ending {
    Checked,
    Interrupted,
}

fn demo(arguments: &Arguments) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            say(format_args!("demo: failed: no runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(checked_run(arguments)) {
        Ok(Ending::Checked) => {
            say("demo: ok");
            ExitCode::SUCCESS
        }
        Ok(Ending::Interrupted) => {
            say("\ndemo: interrupted; every process was ended");
            ExitCode::from(130)
        }
        Err(error) => {
            say(format_args!("demo: failed: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Runs everything. The cluster is ended on every way out: by its drop, panics included.
async fn checked_run(arguments: &Arguments) -> anyhow::Result<Ending> {
    let mut interrupts = signal(SignalKind::interrupt()).context("cannot watch SIGINT")?;
    let mut terminations = signal(SignalKind::terminate()).context("cannot watch SIGTERM")?;
    let interrupted = async {
        tokio::select! {
            _ = interrupts.recv() => {}
            _ = terminations.recv() => {}
        }
    };
    tokio::pin!(interrupted);
    let mut cluster = Cluster::plan(arguments)?;
    let working = async {
        cluster.start().await?;
        let rows = requests::ask_all(&cluster, arguments.quick).await;
        cluster.check_alive()?;
        table::print(&rows?);
        anyhow::Ok(())
    };
    let result = tokio::select! {
        result = working => result,
        () = &mut interrupted => {
            cluster.end();
            cluster.remove_logs();
            return Ok(Ending::Interrupted);
        }
    };
    if let Err(error) = result {
        cluster.end();
        return Err(error.context(format!("the logs are in {}", cluster.logs().display())));
    }
    if arguments.keep {
        cluster.print_how_to_ask();
        interrupted.await;
    }
    cluster.end();
    cluster.remove_logs();
    Ok(Ending::Checked)
}

/// Writes a line for the user. A closed standard output is no reason to leave children behind.
fn say(line: impl Display) {
    let _closed = writeln!(std::io::stdout(), "{line}");
}

/// Writes part of a line at once.
fn say_part(text: impl Display) {
    let mut out = std::io::stdout();
    let _closed = write!(out, "{text}").and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks(flags: &[&str]) -> ([u32; 2], u32) {
        let arguments = Arguments::parse_from([&["demo"], flags].concat());
        (arguments.prefill_ranks(), arguments.decode_ranks())
    }

    #[test]
    fn ranks_follow_the_flags() {
        assert_eq!(ranks(&[]), ([2, 1], 1));
        assert_eq!(ranks(&["--tp", "2"]), ([2, 2], 2));
        assert_eq!(
            ranks(&["--prefill-tp", "4,1", "--decode-tp", "2"]),
            ([4, 1], 2)
        );
        assert_eq!(ranks(&["--tp", "2", "--prefill-tp", "4"]), ([4, 4], 2));
    }

    #[test]
    fn workers_are_told_of_the_path_and_the_devices() {
        let flags =
            |flags: &[&str]| Arguments::parse_from([&["demo"], flags].concat()).path_flags();
        assert_eq!(flags(&[]), ["--transfer-path", "auto"]);
        let all = [
            "--path",
            "verbs",
            "--rdma-devices",
            "a,b",
            "--rdma-connector",
            "standard",
        ];
        let told = flags(&all);
        assert_eq!(told[1..], all[1..]);
        assert_eq!(told[0], "--transfer-path");
    }

    #[test]
    fn quick_workers_are_told_of_the_small_model() {
        let flags =
            |flags: &[&str]| Arguments::parse_from([&["demo"], flags].concat()).model_flags();
        assert!(flags(&[]).is_empty());
        let quick = [vec!["kvworker".to_owned()], flags(&["--quick"])].concat();
        let settings = crate::settings::Settings::parse_from(quick);
        assert_eq!(settings.model(), ModelShape::small());
        settings.check().expect("a model");
    }

    #[test]
    fn help_teaches_by_example() {
        let help = Arguments::try_parse_from(["demo", "--help"])
            .unwrap_err()
            .to_string();
        for words in ["cargo demo -- --keep", "demo: ok", "--prefill-tp 4,1"] {
            assert!(help.contains(words), "{help}");
        }
    }
}
