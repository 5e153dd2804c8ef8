//! The `kvtransfer bootstrap` command as an operator meets it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

fn command(arguments: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_kvtransfer"))
        .arg("bootstrap")
        .args(arguments)
        .env("KVTRANSFER_LOG", "info")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary of this crate")
}

#[test]
fn it_says_where_it_listens_and_stops_on_sigterm() {
    let mut child = command(&["--host", "127.0.0.1", "--port", "0"]);
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    log.read_line(&mut line).unwrap();
    let addr = line
        .trim()
        .rsplit_once("local_addr=")
        .expect("the address in the first line")
        .1;
    let mut stream = TcpStream::connect(addr).unwrap();
    stream
        .write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(
        reply.starts_with("HTTP/1.1 200") && reply.ends_with("OK"),
        "{reply}"
    );
    let killed = Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(killed.success());
    assert!(child.wait().unwrap().success(), "SIGTERM is a clean stop");
    let mut rest = String::new();
    log.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("SIGTERM"), "{rest}");
}

#[test]
fn mistakes_are_sentences() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for (arguments, expected) in [
        (
            vec!["--host", "127.0.0.1", "--port", &port],
            "is in use: stop the process",
        ),
        (
            vec!["--token-file", "/nowhere/token"],
            "cannot read /nowhere/token",
        ),
        (
            vec!["--tls-cert", "/nowhere/c", "--tls-key", "/nowhere/k"],
            "cannot read /nowhere/c",
        ),
        (vec!["--client-ca", "x"], "--tls-cert"),
    ] {
        let output = command(&arguments).wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && text.contains(expected),
            "{arguments:?}: {text}"
        );
    }
}

#[test]
fn help_teaches() {
    let output = command(&["--help"]).wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    for part in [
        "Examples:",
        "curl http",
        "[default: 8998]",
        "KVTRANSFER_BOOTSTRAP_PORT",
        "--client-ca",
        "SIGTERM",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}
