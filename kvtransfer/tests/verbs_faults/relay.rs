//! A stretch of network between two engines that a test can stall: what goes in comes out when it is let go.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex},
    thread,
};

#[derive(Default)]
struct Valve {
    is_stalled: Mutex<bool>,
    changed: Condvar,
}

impl Valve {
    fn pass(&self) {
        let stalled = self.is_stalled.lock().expect("no test panics here");
        drop(
            self.changed
                .wait_while(stalled, |stalled| *stalled)
                .expect("no test panics here"),
        );
    }
}

/// Relays TCP connections to an address until the test's process ends or both sides close.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    valve: Arc<Valve>,
}

impl Relay {
    pub(crate) fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let valve = Arc::new(Valve::default());
        let inner = Arc::clone(&valve);
        thread::spawn(move || {
            while let Ok((near, _)) = listener.accept() {
                let Ok(far) = TcpStream::connect(target) else {
                    continue;
                };
                for stream in [&near, &far] {
                    stream.set_nodelay(true).expect("a TCP stream");
                }
                let copies = near.try_clone().and_then(|n| Ok((n, far.try_clone()?)));
                let (near_copy, far_copy) = copies.expect("descriptors");
                for (from, to) in [(near, far_copy), (far, near_copy)] {
                    let valve = Arc::clone(&inner);
                    thread::spawn(move || copy(from, to, &valve));
                }
            }
        });
        Self { address, valve }
    }

    /// Holds back all that is not through yet, or lets it go.
    pub(crate) fn stall(&self, stalled: bool) {
        *self.valve.is_stalled.lock().expect("no test panics here") = stalled;
        self.valve.changed.notify_all();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stall(false);
    }
}

fn copy(mut from: TcpStream, mut to: TcpStream, valve: &Valve) {
    let mut bytes = [0; 4096];
    while let Ok(got @ 1..) = from.read(&mut bytes) {
        valve.pass();
        if to.write_all(&bytes[..got]).is_err() {
            break;
        }
    }
    valve.pass();
    let _ = to.shutdown(Shutdown::Write);
}
