//! A running engine as the peer. It takes no trial, because its devices are at work; but it shows what it would connect
//! with, and so which path this host and it would use.
#![forbid(unsafe_code)]

use std::io::{Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};

use super::exchange::{ExchangeError, WAIT_MAX, prepare};
use super::findings::{Finding, Level};
use super::rails::Rail;
use crate::clock;
use crate::wire::control::{Control, ControlDecoder};
use crate::wire::hello::Face;
use crate::wire::rdma::Connector;

/// Asks the engine at `host:port` for its face.
///
/// # Errors
/// [`ExchangeError::NoDoctor`] if no engine answers either, and why not otherwise.
pub fn look(peer: &str, token: &str) -> Result<Face, ExchangeError> {
    let unresolved = || ExchangeError::Resolve(peer.to_owned());
    let mut addrs = peer.to_socket_addrs().map_err(|_| unresolved())?;
    let addr = addrs.next().ok_or_else(unresolved)?;
    let mut stream = TcpStream::connect_timeout(&addr, WAIT_MAX).map_err(ExchangeError::Connect)?;
    prepare(&stream)?;
    let mut order = Vec::new();
    Control::Look(token.as_bytes().to_vec()).encode(&mut order);
    stream.write_all(&order)?;
    let mut decoder = ControlDecoder::for_stranger();
    let until = clock::now() + WAIT_MAX;
    loop {
        match decoder.next() {
            Ok(Some(Control::Seen(face))) => return Ok(*face),
            Ok(Some(Control::Reject { reason })) => return Err(ExchangeError::Engine(reason)),
            Ok(None) if clock::now() < until => {}
            _ => return Err(ExchangeError::NoDoctor),
        }
        let mut bytes = [0; 4096];
        // An engine that does not know the question closes the connection, as other services do.
        let got = stream.read(&mut bytes).unwrap_or(0);
        if got == 0 {
            return Err(ExchangeError::NoDoctor);
        }
        decoder.push(&bytes[..got]);
    }
}

/// Which path this host's devices and the engine's would use, and what of it was not tried.
pub fn judge(peer: &str, face: &Face, rails: &[Rail]) -> Vec<Finding> {
    let mut found = vec![path(peer, face, rails)];
    if crate::engine::boot_id().is_ok_and(|own| own == face.boot_id) {
        let what = format!("{peer} is on this host");
        let why = "unless they are switched off, same-host paths come before RDMA and TCP";
        found.push(Finding::ok("peer", what, why));
    }
    let what = format!(
        "{peer} is a running engine: the path was compared, but no bytes were sent over it"
    );
    let why = "an engine's devices are at work and take no trial";
    let fix = "For the trial, on that node: kvtransfer doctor --serve 0.0.0.0:PORT, and here --peer with that port.";
    found.push(Finding::not_ok(Level::Note, "peer", what, why, fix));
    found
}

/// Engines pair devices of the same connector, in order.
fn path(peer: &str, face: &Face, rails: &[Rail]) -> Finding {
    let fail = |why: String, fix: &str| {
        let what = format!("no RDMA path to {peer}: TCP would be used");
        Finding::not_ok(Level::Fail, "peer", what, why, fix)
    };
    if face.rails.is_empty() {
        let why = format!("the engine uses no RDMA device: {}", face.refusal);
        return fail(
            why,
            "Switch RDMA on in that engine, or put right what it says.",
        );
    }
    let usable: Vec<&Rail> = rails.iter().filter(|rail| rail.is_usable()).collect();
    if usable.is_empty() {
        let why = "no RDMA device of this host can be used".to_owned();
        return fail(why, "Put right what is said about this host's devices.");
    }
    let mut pairs = Vec::new();
    for connector in [Connector::Compat, Connector::Standard] {
        let ours = usable.iter().filter(|rail| connector_of(rail) == connector);
        let theirs = face.rails.iter().filter(|(_, their)| *their == connector);
        let both = ours.zip(theirs);
        pairs.extend(
            both.map(|(our, (their, _))| {
                format!("{} to {their} ({})", our.device, connector.name())
            }),
        );
    }
    if pairs.is_empty() {
        let (ours, theirs) = (connector_of(usable[0]), face.rails[0].1);
        let why = format!(
            "devices connect in {} mode here and in {} mode at the engine",
            ours.name(),
            theirs.name()
        );
        return fail(why, "Put both nodes' devices in one mode.");
    }
    let what = format!("RDMA path to the engine at {peer}: {}", pairs.join(", "));
    Finding::ok("peer", what, "they connect in the same way")
}

/// How an engine here would connect the device, unless its configuration says otherwise.
fn connector_of(rail: &Rail) -> Connector {
    if rail.mode.needs_cm() {
        Connector::Standard
    } else {
        Connector::Compat
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::rails::Mode;

    fn rail(device: &str, mode: Mode) -> Rail {
        Rail {
            device: device.to_owned(),
            mode,
            port: 1,
            gid: None,
            gid_reason: String::new(),
            address: None,
            netdev: None,
            netdev_mtu: None,
            refused: Vec::new(),
        }
    }

    fn face(rails: &[(&str, Connector)]) -> Face {
        Face {
            boot_id: [0; 16],
            rails: rails
                .iter()
                .map(|(name, how)| ((*name).to_owned(), *how))
                .collect(),
            refusal: "RDMA is off".to_owned(),
        }
    }

    #[test]
    fn devices_of_one_connector_are_paired_and_others_are_refused_in_words() {
        let ours = [rail("siw1", Mode::Iwarp), rail("rxe1", Mode::Roce)];
        let judged = |face: &Face, rails: &[Rail]| judge("a:1", face, rails);
        let both = face(&[("rxe0", Connector::Compat), ("siw0", Connector::Standard)]);
        let found = judged(&both, &ours);
        assert_eq!(found[0].level, Level::Ok);
        assert!(
            found[0]
                .what
                .ends_with("rxe1 to rxe0 (compat), siw1 to siw0 (standard)")
        );
        let last = found.last().expect("a note");
        assert!(last.level == Level::Note && last.what.contains("no bytes were sent"));
        let refused = |face: &Face, rails: &[Rail], words: &str| {
            let found = judged(face, rails);
            assert_eq!(found[0].level, Level::Fail);
            assert!(found[0].why.contains(words), "{found:?}");
        };
        refused(&face(&[]), &ours, "RDMA is off");
        refused(&both, &[], "no RDMA device of this host");
        let other = face(&[("siw0", Connector::Standard)]);
        refused(&other, &ours[1..], "compat mode here and in standard mode");
    }
}
