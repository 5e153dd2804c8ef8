//! A peer whose process is stopped: its connections stand, and only a probe tells.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, ChildStdin, ChildStdout, Stdio},
};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use crate::build::{Language, command, compile};

/// A program that is spoken to by lines. Ends with the test, however that ends.
struct Spoken {
    child: Child,
    hears: ChildStdin,
    says: BufReader<ChildStdout>,
}

impl Spoken {
    fn start(arguments: &[&str]) -> Self {
        let program = compile("tests/c/client.cpp", Language::Cpp, "frozen");
        let mut command = command(&program);
        let command = command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().expect("it was just compiled");
        let hears = child.stdin.take().expect("it is piped");
        let says = BufReader::new(child.stdout.take().expect("it is piped"));
        Self { child, hears, says }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.says.read_line(&mut line).expect("it speaks text");
        line.trim_end().to_owned()
    }

    fn ask(&mut self) -> String {
        self.hears.write_all(b"\n").expect("it reads");
        self.line()
    }

    /// Stops it, and returns when none of its threads runs any more: a signal that was sent is not yet one that has worked.
    fn freeze(&self) {
        self.signal(Signal::STOP);
        let pid = Pid::from_child(&self.child);
        let (_, status) = waitpid(Some(pid), WaitOptions::UNTRACED)
            .expect("it is ours")
            .expect("it was waited for");
        assert!(status.stopped(), "it ended: {status:?}");
    }

    fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it is ours");
    }
}

impl Drop for Spoken {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_frozen_peer_does_not_answer_a_probe_and_a_thawed_one_does() {
    let mut served = Spoken::start(&["serve"]);
    let address = served.line();
    let mut probing = Spoken::start(&["probe", &address]);
    assert_eq!(probing.ask(), "KVT_OK: it worked");
    served.freeze();
    assert_eq!(
        probing.ask(),
        "KVT_PEER_LOST: the connection to the peer ended, or it stopped answering"
    );
    served.thaw();
    assert_eq!(probing.ask(), "KVT_OK: it worked");
    assert!(probing.child.wait().expect("it is ours").success());
    served.hears.write_all(b"\n").expect("it reads");
    assert!(served.child.wait().expect("it is ours").success());
}
