//! Two doctors talk: one serves, the other asks for its facts and measures the TCP path to it.
//!
//! After an 8-byte greeting both ways, the server sends its facts (a length and JSON), then obeys messages of one byte
//! (what), four bytes (how many follow, big-endian) and the bytes: `e` sends them back, `s` drops them and answers
//! nothing, `q` answers how many bytes of `s` came, `t` is an order of an RDMA trial and answered with a length and a
//! reply. Every length and wait is bounded on both sides.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::facts::Facts;
use super::findings::PeerPath;
use super::rails::{Rail, rails};
use super::steps::{Figure, Outcome, Step};
use super::trial::client::Trial;
use super::trial::server::Obedient;
use crate::clock;

/// What both say first; the digit is the version of this protocol.
const GREETING: [u8; 8] = *b"KVTDOC1\n";
/// Most bytes of a host's facts: 4096 interfaces with names and addresses stay below it.
pub const FACTS_BYTES_MAX: usize = 4 << 20;
/// Most bytes of a message; the size at which bandwidth is measured.
const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// How long either side waits for the other. A healthy peer answers within milliseconds.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(5);
/// Most doctors that are served at a time; each costs a thread and a message buffer.
const CALLERS_MAX: usize = 8;
/// Round trips of which the median is taken.
const ROUND_TRIPS: usize = 500;
/// How long bandwidth is measured.
const BANDWIDTH_TIME: Duration = Duration::from_secs(1);

/// Why a peer could not be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExchangeError {
    /// The name has no address.
    #[error("cannot resolve {0}")]
    Resolve(String),
    /// Nobody answers at all.
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    /// The connection broke, or the peer did not answer in time.
    #[error("the connection broke: {0}")]
    Socket(#[from] io::Error),
    /// Something else answers.
    #[error("what listens there is no doctor")]
    NoDoctor,
    /// An engine answers, and does not want to be looked at.
    #[error("the engine there refuses: {0}")]
    Engine(String),
    /// A length beyond its bound.
    #[error("the peer announces {got} bytes, at most {max} are taken")]
    TooLong {
        /// What it announced.
        got: u64,
        /// What is taken.
        max: usize,
    },
    /// Its facts are no JSON that this version understands.
    #[error("the peer's facts cannot be read: {0}")]
    Facts(#[from] serde_json::Error),
}

/// A doctor that others may ask.
#[derive(Debug)]
pub struct Served {
    listener: TcpListener,
    facts: Arc<Vec<u8>>,
    rails: Arc<Vec<Rail>>,
    callers: Arc<AtomicUsize>,
}

impl Served {
    /// Listens at an address with what was seen here.
    ///
    /// # Errors
    /// The address cannot be listened on, or the facts are longer than [`FACTS_BYTES_MAX`].
    pub fn bind(addr: SocketAddr, facts: &Facts) -> Result<Self, ExchangeError> {
        let rails = Arc::new(rails(facts));
        let facts = serde_json::to_vec(facts)?;
        bounded(facts.len() as u64, FACTS_BYTES_MAX)?;
        Ok(Self {
            listener: TcpListener::bind(addr)?,
            facts: Arc::new(facts),
            rails,
            callers: Arc::default(),
        })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// What the system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves callers until accepting fails.
    ///
    /// # Errors
    /// Why no further caller can be accepted.
    pub fn run(&self) -> io::Result<()> {
        loop {
            let (stream, peer) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error),
            };
            // Only this thread adds, so a slot that is seen free stays free until it is taken here.
            if self.callers.load(Ordering::Acquire) >= CALLERS_MAX {
                tracing::warn!(%peer, "turned away: {CALLERS_MAX} callers are served already");
                continue;
            }
            self.callers.fetch_add(1, Ordering::AcqRel);
            let slot = Slot(Arc::clone(&self.callers));
            let (facts, rails) = (Arc::clone(&self.facts), Arc::clone(&self.rails));
            let serve = move || {
                let _slot = slot;
                match serve_one(stream, &facts, &rails) {
                    Ok(()) => tracing::info!(%peer, "asked and answered"),
                    Err(error) => tracing::warn!(%peer, %error, "caller dropped"),
                }
            };
            std::thread::Builder::new()
                .name("doctor-caller".to_owned())
                .spawn(serve)?;
        }
    }
}

/// A place among the callers, given back when its thread ends.
struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

pub(super) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(WAIT_MAX))?;
    stream.set_write_timeout(Some(WAIT_MAX))?;
    stream.set_nodelay(true)
}

fn bounded(got: u64, max: usize) -> Result<usize, ExchangeError> {
    usize::try_from(got)
        .ok()
        .filter(|len| *len <= max)
        .ok_or(ExchangeError::TooLong { got, max })
}

fn serve_one(mut stream: TcpStream, facts: &[u8], rails: &[Rail]) -> Result<(), ExchangeError> {
    prepare(&stream)?;
    let mut greeting = [0; GREETING.len()];
    stream.read_exact(&mut greeting)?;
    if greeting != GREETING {
        return Err(ExchangeError::NoDoctor);
    }
    let len = u32::try_from(facts.len()).expect("invariant: bind checked the length");
    stream.write_all(&GREETING)?;
    stream.write_all(&len.to_be_bytes())?;
    stream.write_all(facts)?;
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    let mut sunk = 0_u64;
    let mut obedient = Obedient::default();
    loop {
        let mut head = [0; 5];
        match stream.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let [what, len @ ..] = head;
        let len = bounded(u32::from_be_bytes(len).into(), MESSAGE_BYTES_MAX)?;
        stream.read_exact(&mut buffer[..len])?;
        match what {
            b'e' => stream.write_all(&buffer[..len])?,
            b's' => sunk += len as u64,
            b'q' => stream.write_all(&sunk.to_be_bytes())?,
            b't' => {
                let reply = obedient.obey(rails, &buffer[..len]);
                let len =
                    u32::try_from(reply.len()).expect("invariant: a reply is some hundred bytes");
                stream.write_all(&len.to_be_bytes())?;
                stream.write_all(&reply)?;
            }
            _ => return Err(ExchangeError::NoDoctor),
        }
    }
}

/// A connection to a doctor on another host.
pub struct Caller {
    line: Line,
    facts: Facts,
    /// The pair of devices to try, ours with all that is known of it; `None`: no pair, or one that cannot be tried.
    pair: Result<(Rail, String), String>,
    trial: Option<Trial>,
}

impl Caller {
    /// Connects to `host:port` and takes the peer's facts.
    ///
    /// # Errors
    /// [`ExchangeError`]
    pub fn connect(peer: &str) -> Result<Self, ExchangeError> {
        let unresolved = || ExchangeError::Resolve(peer.to_owned());
        let mut addrs = peer.to_socket_addrs().map_err(|_| unresolved())?;
        let addr = addrs.next().ok_or_else(unresolved)?;
        let mut stream =
            TcpStream::connect_timeout(&addr, WAIT_MAX).map_err(ExchangeError::Connect)?;
        prepare(&stream)?;
        stream.write_all(&GREETING)?;
        let mut greeting = [0; GREETING.len()];
        match stream.read_exact(&mut greeting) {
            Ok(()) if greeting == GREETING => {}
            // An engine or a web server closes the connection, waits for more, or answers in its own words.
            _ => return Err(ExchangeError::NoDoctor),
        }
        let mut len = [0; 4];
        stream.read_exact(&mut len)?;
        let len = bounded(u32::from_be_bytes(len).into(), FACTS_BYTES_MAX)?;
        let mut text = vec![0; len];
        stream.read_exact(&mut text)?;
        Ok(Self {
            line: Line { stream, owed: 0 },
            facts: serde_json::from_slice(&text)?,
            pair: Err("no pair of devices was chosen".to_owned()),
            trial: None,
        })
    }

    /// What the peer saw on its host.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Says over which devices the RDMA steps go: the first pair of the path.
    pub fn choose(&mut self, path: &PeerPath, rails: &[Rail]) {
        let ours = |name: &String| rails.iter().find(|rail| rail.device == *name);
        let first = path
            .pairs
            .iter()
            .find_map(|(local, remote)| Some((ours(local)?.clone(), remote.clone())));
        self.pair = first.ok_or_else(|| "no device reaches one of the peer's".to_owned());
    }

    /// Performs one step.
    pub fn perform(&mut self, step: Step) -> Outcome {
        match step {
            Step::TcpLatency => tcp_outcome(self.line.latency()),
            Step::TcpBandwidth => tcp_outcome(self.line.bandwidth()),
            rdma => self.try_rdma(rdma),
        }
    }

    fn try_rdma(&mut self, step: Step) -> Outcome {
        let (rail, remote) = match &self.pair {
            Ok(pair) => pair,
            Err(why) => return Outcome::NotRun { why: why.clone() },
        };
        let opened = match self.trial.take() {
            Some(trial) => Ok(trial),
            None => Trial::open(&mut self.line, rail, remote),
        };
        let line = &mut self.line;
        let result = opened.and_then(|mut trial| Ok((trial.perform(line, step)?, trial)));
        match result {
            Ok((outcome, trial)) => {
                self.trial = Some(trial);
                outcome
            }
            // The queue pairs are in an unknown state: the next step makes new ones.
            Err(error) => Outcome::Failed {
                why: format!("{} to {remote}: {error}", rail.device),
                fix: "Check on both nodes: all TCP between the interfaces allowed by security groups, equal MTUs, \
                      routes that leave by the right interface, and dmesg for the driver's words."
                    .to_owned(),
            },
        }
    }
}

fn tcp_outcome(result: Result<Vec<Figure>, ExchangeError>) -> Outcome {
    match result {
        Ok(figures) => Outcome::Passed(figures),
        Err(error) => Outcome::Failed {
            why: error.to_string(),
            fix: "Check that security groups and network policies let this TCP port through both ways, and that \
                  the peer's doctor is still running (its log says why it dropped a caller)."
                .to_owned(),
        },
    }
}

impl fmt::Debug for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Caller")
            .field("peer", &self.line.stream)
            .field("pair", &self.pair)
            .finish_non_exhaustive()
    }
}

/// The connection itself.
pub(super) struct Line {
    stream: TcpStream,
    /// Orders whose reply was not read.
    owed: u32,
}

impl Line {
    /// Gives an order of a trial; its reply comes later.
    pub(super) fn order(&mut self, order: &[u8]) -> Result<(), ExchangeError> {
        bounded(order.len() as u64, MESSAGE_BYTES_MAX)?;
        // A step that failed half-way left its reply unread.
        while self.owed > 0 {
            self.reply()?;
        }
        self.message(b't', order)?;
        self.owed += 1;
        Ok(())
    }

    /// The reply to an order.
    pub(super) fn reply(&mut self) -> Result<Vec<u8>, ExchangeError> {
        let mut len = [0; 4];
        self.stream.read_exact(&mut len)?;
        let len = bounded(u32::from_be_bytes(len).into(), MESSAGE_BYTES_MAX)?;
        let mut reply = vec![0; len];
        self.stream.read_exact(&mut reply)?;
        self.owed = self.owed.saturating_sub(1);
        Ok(reply)
    }

    fn message(&mut self, what: u8, bytes: &[u8]) -> io::Result<()> {
        let len = u32::try_from(bytes.len()).expect("invariant: messages are at most 64 KiB");
        let [a, b, c, d] = len.to_be_bytes();
        let head = [what, a, b, c, d];
        // One buffer, hence one packet for small messages: two writes would measure the kernel's coalescing.
        let mut all = Vec::with_capacity(head.len() + bytes.len());
        all.extend_from_slice(&head);
        all.extend_from_slice(bytes);
        self.stream.write_all(&all)
    }

    fn latency(&mut self) -> Result<Vec<Figure>, ExchangeError> {
        let sent = [0x5a; 64];
        let mut times = Vec::with_capacity(ROUND_TRIPS);
        for _ in 0..ROUND_TRIPS {
            let start = clock::now();
            self.message(b'e', &sent)?;
            let mut back = [0; 64];
            self.stream.read_exact(&mut back)?;
            times.push(clock::now().since(start));
            if back != sent {
                return Err(ExchangeError::NoDoctor);
            }
        }
        Ok(Figure::quantiles(times))
    }

    fn bandwidth(&mut self) -> Result<Vec<Figure>, ExchangeError> {
        let bytes = vec![0xa5; MESSAGE_BYTES_MAX];
        let mut sent = 0_u64;
        let start = clock::now();
        while clock::now().since(start) < BANDWIDTH_TIME {
            self.message(b's', &bytes)?;
            sent += bytes.len() as u64;
        }
        self.message(b'q', &[])?;
        let mut sunk = [0; 8];
        self.stream.read_exact(&mut sunk)?;
        // Only what the peer says it received counts.
        let sunk = u64::from_be_bytes(sunk);
        if sunk != sent {
            return Err(ExchangeError::NoDoctor);
        }
        Ok(vec![Figure::rate(sunk, clock::now().since(start))])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve() -> SocketAddr {
        let addr = SocketAddr::from(([127, 0, 0, 1], 0));
        let served = Served::bind(addr, &Facts::default()).unwrap();
        let addr = served.local_addr().unwrap();
        // The thread lives as long as the test's process: a doctor serves until it is killed.
        std::thread::spawn(move || served.run());
        addr
    }

    /// Answers one caller with these bytes and closes.
    fn impostor(answer: Vec<u8>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut greeting = [0; GREETING.len()];
            stream.read_exact(&mut greeting).unwrap();
            stream.write_all(&answer).unwrap();
        });
        addr.to_string()
    }

    #[test]
    fn tcp_steps_measure_and_others_are_refused() {
        let mut caller = Caller::connect(&serve().to_string()).unwrap();
        assert_eq!(*caller.facts(), Facts::default());
        let Outcome::Passed(figures) = caller.perform(Step::TcpLatency) else {
            panic!("latency");
        };
        assert!(figures[0].value > 0.0 && figures[0].value <= figures[1].value);
        let Outcome::Passed(figures) = caller.perform(Step::TcpBandwidth) else {
            panic!("bandwidth");
        };
        assert!(figures[0].value > 0.0);
        assert!(matches!(
            caller.perform(Step::BadKey),
            Outcome::NotRun { .. }
        ));
    }

    #[test]
    fn callers_beyond_the_bound_are_turned_away_and_places_come_back() {
        let addr = serve();
        let mut held: Vec<_> = (0..CALLERS_MAX)
            .map(|_| Caller::connect(&addr.to_string()).unwrap())
            .collect();
        assert!(Caller::connect(&addr.to_string()).is_err(), "one too many");
        held.clear();
        let mut tries = (0..1000).map(|_| Caller::connect(&addr.to_string()));
        assert!(tries.any(|caller| caller.is_ok()), "a place comes back");
    }

    #[test]
    fn hostile_callers_are_dropped() {
        let addr = serve();
        let after = |bytes: &[u8]| {
            let mut stream = TcpStream::connect(addr).unwrap();
            stream.set_read_timeout(Some(WAIT_MAX * 2)).unwrap();
            stream.write_all(bytes).unwrap();
            let mut rest = Vec::new();
            // A reset is as good an end as a close.
            let _ = stream.read_to_end(&mut rest);
            rest
        };
        assert_eq!(after(b"GET / HTTP/1.1\r\n\r\n"), b"");
        let long = [GREETING.as_slice(), b"e\x00\x01\x00\x01"].concat();
        assert!(after(&long).starts_with(&GREETING), "facts, then the end");
        let unknown = [GREETING.as_slice(), b"z\x00\x00\x00\x00"].concat();
        assert!(after(&unknown).starts_with(&GREETING));
        assert!(
            Caller::connect(&addr.to_string()).is_ok(),
            "others are served on"
        );
    }

    #[test]
    fn hostile_servers_are_refused() {
        let refused = |answer: &[u8]| Caller::connect(&impostor(answer.to_vec())).unwrap_err();
        assert!(matches!(
            refused(b"HTTP/1.1 400 Bad"),
            ExchangeError::NoDoctor
        ));
        let long = u32::try_from(FACTS_BYTES_MAX + 1).unwrap().to_be_bytes();
        let long = [GREETING.as_slice(), &long].concat();
        assert!(matches!(refused(&long), ExchangeError::TooLong { .. }));
        let garbage = [GREETING.as_slice(), b"\0\0\0\x03{!}"].concat();
        assert!(matches!(refused(&garbage), ExchangeError::Facts(_)));
        let short = [GREETING.as_slice(), b"\0\0\0\x09{}"].concat();
        assert!(matches!(refused(&short), ExchangeError::Socket(_)));
        assert!(matches!(
            Caller::connect("host.invalid:1").unwrap_err(),
            ExchangeError::Resolve(_)
        ));
    }
}
