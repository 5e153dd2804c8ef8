//! The doctor asks a running engine: what it shows to whom, and what the command says of it.

use std::net::TcpListener;
use std::process::Command;

use kvtransfer::config::EngineConfig;
use kvtransfer::doctor::engine::look;
use kvtransfer::doctor::exchange::ExchangeError;

#[path = "doctor/engine.rs"]
mod one;

fn listening() -> EngineConfig {
    let mut config = EngineConfig::default();
    config.listen = Some("127.0.0.1:0".parse().expect("an address"));
    config
}

#[test]
fn an_engine_shows_its_devices_to_those_who_know_its_token() {
    let mut config = listening();
    config.token = Some("open sesame".into());
    let engine = one::engine(config);
    let address = engine.local_addr().expect("it listens").to_string();
    for wrong in ["", "open", "open sesame "] {
        let refused = look(&address, wrong);
        assert!(
            matches!(&refused, Err(ExchangeError::Engine(why)) if why.contains("token")),
            "{refused:?}"
        );
    }
    let face = look(&address, "open sesame").expect("it answers");
    assert!(face.rails.is_empty(), "{face:?}");
    assert!(!face.refusal.is_empty(), "it says why it has none");
    // Who only looked is no peer.
    assert!(engine.peers().is_empty());
}

#[test]
fn other_services_are_told_from_engines() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    std::thread::spawn(move || {
        // Closes every connection at once.
        while let Ok((stream, _)) = listener.accept() {
            drop(stream);
        }
    });
    assert!(matches!(look(&address, ""), Err(ExchangeError::NoDoctor)));
}

#[test]
fn the_command_says_what_it_compared_and_what_it_did_not_try() {
    let engine = one::engine(listening());
    let address = engine.local_addr().expect("it listens").to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_kvtransfer"))
        .args(["doctor", "--peer", &address])
        .output()
        .expect("a process");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    for words in [
        &format!("no RDMA path to {address}"),
        "the engine uses no RDMA device",
        "no bytes were sent over it",
        "doctor --serve",
        "is on this host",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
}
