//! Two programs that talk to each other: a server, and a client once the server listens.

use std::{
    fs,
    process::{Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{command, wait_until};

/// How long a server may take to listen.
const LISTEN_LIMIT: Duration = Duration::from_secs(15);
/// How long a server may take to end after its client.
const END_LIMIT: Duration = Duration::from_secs(15);

/// A server, a client, and how to see that the server listens.
#[derive(Debug, clap::Args)]
pub(crate) struct Pair {
    /// `tcp:PORT` for a socket, `cm:PORT` for a listener of the RDMA connection manager
    #[arg(long)]
    ready: String,
    /// The server's command line, split at spaces
    #[arg(long)]
    server: String,
    /// The client's command line, split at spaces
    #[arg(long)]
    client: String,
}

/// Runs both; fails if either fails.
pub(crate) fn run(pair: &Pair) -> Result<()> {
    let (kind, port) = pair.ready.split_once(':').context("--ready is KIND:PORT")?;
    let port: u16 = port.parse().context("--ready is KIND:PORT")?;
    ensure!(
        ["tcp", "cm"].contains(&kind),
        "--ready is tcp:PORT or cm:PORT"
    );
    let mut server = spawnable(&pair.server)?
        // Both print the same figures; the client's are shown.
        .stdout(Stdio::null())
        .spawn()
        .context("starting the server")?;
    let client = wait_until("the server does not listen", LISTEN_LIMIT, || {
        listens(kind, port) || server.try_wait().is_ok_and(|ended| ended.is_some())
    })
    .and_then(|()| {
        spawnable(&pair.client)?
            .status()
            .context("starting the client")
    });
    // A server whose client failed may wait for another one forever.
    let is_served = client.as_ref().is_ok_and(ExitStatus::success);
    let end_limit = if is_served { END_LIMIT } else { Duration::ZERO };
    let waited = wait_until("the server is still running", end_limit, || {
        server.try_wait().is_ok_and(|ended| ended.is_some())
    });
    if waited.is_err() {
        server.kill().context("ending the server")?;
    }
    let server = server.wait().context("waiting for the server")?;
    let client = client?;
    if is_served {
        waited?;
    }
    if !client.success() || !server.success() {
        bail!("client: {client}, server: {server}");
    }
    Ok(())
}

fn spawnable(line: &str) -> Result<Command> {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().context("an empty command line")?);
    command.args(words).stdin(Stdio::null());
    Ok(command)
}

fn listens(kind: &str, port: u16) -> bool {
    if kind == "tcp" {
        let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(fs::read_to_string);
        return tables
            .iter()
            .flatten()
            .any(|table| tcp_listens(table, port));
    }
    command("rdma", &["resource", "show", "cm_id"]).is_ok_and(|text| cm_listens(&text, port))
}

/// Whether a table as `/proc/net/tcp` has a socket in state 0A, LISTEN, at the port.
fn tcp_listens(table: &str, port: u16) -> bool {
    let at = format!(":{port:04X}");
    table.lines().skip(1).any(|line| {
        let mut words = line.split_whitespace().skip(1);
        words.next().is_some_and(|local| local.ends_with(&at)) && words.nth(1) == Some("0A")
    })
}

fn cm_listens(text: &str, port: u16) -> bool {
    let at = format!(":{port}");
    text.lines().any(|line| {
        line.contains("state LISTEN") && line.split(' ').any(|word| word.ends_with(&at))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listening_socket_is_told_from_a_connected_one() {
        let table = "  sl  local_address rem_address   st tx_queue\n\
            \x20  0: 0100004D:4855 00000000:0000 0A 00000000\n\
            \x20  1: 0100004D:1C06 0100004D:9999 01 00000000\n";
        assert!(tcp_listens(table, 18517));
        assert!(!tcp_listens(table, 7174));
        assert!(!tcp_listens(table, 80));
    }

    #[test]
    fn a_listener_of_the_connection_manager_is_found() {
        let text = "link siw0 cm_idn 0 state LISTEN ps TCP pid 77 comm rping src-addr 10.77.0.1:7174 dst-addr 0.0.0.0:0 \n";
        assert!(cm_listens(text, 7174));
        assert!(!cm_listens(text, 174));
        assert!(!cm_listens(&text.replace("LISTEN", "CONNECT"), 7174));
    }
}
