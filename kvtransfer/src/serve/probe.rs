//! Finds out whether ranks that never renew their rows are still there: can their control socket be connected to?
//!
//! Only runs while the registry has a reason to ask (see `bootstrap::registry`, E4). A probe connects and closes; it
//! sends no byte.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::bootstrap::registry::Probe;

/// Longest wait for one connection. A living host on the same network answers in milliseconds.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Connections tried at a time, so that a large instance costs few file descriptors.
const CONNECTS_MAX: usize = 32;
/// Rows tried in a round; with [`CONNECTS_MAX`] a round takes at most 8 s. The rest waits for the next round.
const ROWS_PER_ROUND_MAX: usize = 256;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Finding {
    Listens,
    Refuses,
    Silent,
    /// The attempt failed on this side (no file descriptor, no route configured): evidence of nothing.
    Unknown,
}

/// Serials of the rows at whose address nobody listens.
pub(super) async fn find_dead(probe: Probe) -> HashSet<u64> {
    let silence_counts = match probe.control {
        Some(control) => connect(control).await == Finding::Listens,
        None => false,
    };
    let mut dead = HashSet::new();
    let rows: Vec<_> = probe.rows.into_iter().take(ROWS_PER_ROUND_MAX).collect();
    for batch in rows.chunks(CONNECTS_MAX) {
        let mut connects = JoinSet::new();
        for &(serial, addr) in batch {
            connects.spawn(async move { (serial, connect(addr).await) });
        }
        for (serial, finding) in connects.join_all().await {
            if finding == Finding::Refuses || (finding == Finding::Silent && silence_counts) {
                dead.insert(serial);
            }
        }
    }
    dead
}

async fn connect(addr: SocketAddr) -> Finding {
    match timeout(CONNECT_TIMEOUT, TcpStream::connect(addr)).await {
        Ok(Ok(_)) => Finding::Listens,
        Ok(Err(error)) => match error.kind() {
            ErrorKind::ConnectionRefused => Finding::Refuses,
            ErrorKind::HostUnreachable | ErrorKind::TimedOut => Finding::Silent,
            _ => Finding::Unknown,
        },
        Err(_) => Finding::Silent,
    }
}
