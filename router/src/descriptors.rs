//! File descriptors, of which a request under way takes up to three: its client's connection and those of its two legs.
#![forbid(unsafe_code)]

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What a request takes for as long as it lasts: prefill's leg is over when decode's begins to tell tokens.
const PER_REQUEST: usize = 2;

/// Listeners, probes, telemetry, idle connections and requests whose prefill leg is under way.
const SPARE: usize = 1024;

/// Takes as many file descriptors as this process may have, because the limit that shells and service managers set for
/// programs that do not ask (1024) is reached with some hundred requests. Tells how many that are; none: no limit.
///
/// # Errors
/// When the system does not allow it.
pub fn raise() -> std::io::Result<Option<u64>> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        let current = maximum;
        setrlimit(Resource::Nofile, Rlimit { current, maximum })?;
    }
    Ok(maximum)
}

/// Warns if `allowed` descriptors are too few for `requests` at a time.
pub fn warn_if_few(allowed: Option<u64>, requests: usize) {
    let needed = needed(requests);
    if let Some(allowed) = allowed.filter(|allowed| *allowed < needed) {
        tracing::warn!(
            allowed,
            needed,
            "too few file descriptors for --max-concurrent-requests {requests}: raise the hard limit (ulimit -Hn)"
        );
    }
}

fn needed(requests: usize) -> u64 {
    requests.saturating_mul(PER_REQUEST).saturating_add(SPARE) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_what_may_be() {
        let allowed = raise().unwrap();
        let now = getrlimit(Resource::Nofile);
        assert_eq!((now.current, now.maximum), (allowed, allowed));
        assert_eq!(needed(10_000), 21_024);
        assert_eq!(needed(usize::MAX), u64::MAX);
    }
}
