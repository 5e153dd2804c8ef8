//! Which ports the processes get.

use std::net::TcpListener;

use anyhow::{Context as _, bail};

use super::say;

/// What to do about a port that is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// Say so and take another one.
    Preferred,
    /// Fail.
    Strict,
    /// Let the system choose in any case.
    Any,
}

/// Hands out ports, none twice. Each is held until all are handed out, so that the system does not choose one again.
#[derive(Debug)]
pub(super) struct Ports {
    wish: Wish,
    held: Vec<TcpListener>,
}

impl Ports {
    pub(super) const fn new(wish: Wish) -> Self {
        Self {
            wish,
            held: Vec::new(),
        }
    }

    /// A port for `purpose`, `preferred` if it is free.
    pub(super) fn take(&mut self, purpose: &str, preferred: u16) -> anyhow::Result<u16> {
        if self.wish != Wish::Any {
            match TcpListener::bind(("127.0.0.1", preferred)) {
                Ok(listener) => return self.hold(listener),
                Err(error) if self.wish == Wish::Strict => {
                    bail!("port {preferred} ({purpose}) cannot be used: {error}")
                }
                Err(_) => {}
            }
        }
        let listener =
            TcpListener::bind(("127.0.0.1", 0)).context("the system has no free port")?;
        let port = self.hold(listener)?;
        if self.wish == Wish::Preferred {
            say(format_args!(
                "port {preferred} ({purpose}) is in use; {port} instead"
            ));
        }
        Ok(port)
    }

    /// The first free port above `after`, for `purpose`.
    pub(super) fn take_next(&mut self, purpose: &str, after: u16) -> anyhow::Result<u16> {
        if self.wish == Wish::Any {
            return self.take(purpose, after);
        }
        let free = (after.saturating_add(1)..=u16::MAX)
            .find_map(|port| TcpListener::bind(("127.0.0.1", port)).ok());
        match free {
            Some(listener) => self.hold(listener),
            None => bail!("no port above {after} ({purpose}) is free"),
        }
    }

    fn hold(&mut self, listener: TcpListener) -> anyhow::Result<u16> {
        let port = listener.local_addr().context("a broken socket")?.port();
        self.held.push(listener);
        Ok(port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_is_replaced_or_refused() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let other = Ports::new(Wish::Preferred).take("router", port).unwrap();
        assert_ne!(other, port);
        let error = Ports::new(Wish::Strict).take("router", port).unwrap_err();
        assert!(
            error.to_string().contains(&format!("port {port} (router)")),
            "{error}"
        );
        drop(taken);
        assert_eq!(Ports::new(Wish::Strict).take("router", port).unwrap(), port);
        // What one process got, the next does not.
        let mut ports = Ports::new(Wish::Preferred);
        let first = ports.take("first", port).unwrap();
        assert!(ports.take_next("second", first).unwrap() > first);
        assert_ne!(ports.take("third", first).unwrap(), first);
    }
}
