//! The simulated transport as a fabric: time passes only when a case waits.
#![forbid(unsafe_code)]

use std::{collections::HashMap, marker::PhantomData, time::Duration};

use super::{Fabric, Outcome, PREFIX, Receive, SOON, room};
use crate::{
    error::{SubmitError, TransferError},
    layout::RegionId,
    testing::sim::{Handle, LaneSpec, LinkSpec, NetSpec, Notice, RankSpec, World},
    transfer::{Chunk, ReceiveRequest, SendRequest, Source},
    wire::lane::PayloadMode,
};

/// How payload travels.
pub trait Mode {
    /// The mode of every lane.
    const MODE: PayloadMode;
}

/// Payload follows its header.
pub struct Inline;
/// The receiver reads the sender's memory.
pub struct Pull;
/// Payload lies in a shared ring.
pub struct Ring;
/// The sender's card writes the receiver's memory.
pub struct Write;

impl Mode for Inline {
    const MODE: PayloadMode = PayloadMode::Inline;
}

impl Mode for Pull {
    const MODE: PayloadMode = PayloadMode::Pull;
}

impl Mode for Ring {
    const MODE: PayloadMode = PayloadMode::Ring;
}

impl Mode for Write {
    const MODE: PayloadMode = PayloadMode::Write;
}

/// Ranks in a [`World`].
pub struct SimFabric<M> {
    world: World,
    ready: HashMap<Handle, u32>,
    ended: HashMap<Handle, Outcome>,
    opened: Vec<Handle>,
    mode: PhantomData<M>,
}

impl<M: Mode> SimFabric<M> {
    fn take_notices(&mut self) {
        while let Some(notice) = self.world.notice() {
            match notice {
                Notice::Ready {
                    handle,
                    prefix_tokens,
                } => {
                    self.ready.insert(handle, prefix_tokens);
                }
                Notice::Ended { handle, result } => {
                    let earlier = self.ended.insert(handle, result);
                    assert!(earlier.is_none(), "{handle:?} ended twice");
                }
                Notice::Protocol { rank, reason } => panic!("rank {rank} was sent junk: {reason}"),
                Notice::PeerLost { .. } => {}
                Notice::Placed(placed) => {
                    let is_over = self.ended.contains_key(&placed.handle);
                    assert!(!is_over, "P1: bytes after the end: {placed:?}");
                }
            }
        }
    }

    /// Lets things happen until `done`, for at most `time`. Whether it came to that.
    fn until(&mut self, time: Duration, done: impl Fn(&Self) -> bool) -> bool {
        let end = self.world.now() + time;
        self.take_notices();
        while !done(self) && self.world.step(end) {
            self.take_notices();
        }
        done(self)
    }
}

impl<M: Mode> Fabric for SimFabric<M> {
    type Transfer = Handle;

    fn start(ranks: Vec<RankSpec>) -> Self {
        let mut world = World::new(7);
        for spec in ranks {
            world.add_rank(spec).expect("the layouts are valid");
        }
        Self {
            world,
            ready: HashMap::new(),
            ended: HashMap::new(),
            opened: Vec::new(),
            mode: PhantomData,
        }
    }

    fn path(&mut self, _from: usize, _to: usize) -> (String, &'static str) {
        ("sim".into(), "sim")
    }

    fn connect(&mut self, from: usize, to: usize) -> Result<(), String> {
        let lane = LaneSpec {
            mode: M::MODE,
            batch_bytes: 64 << 10,
            window: 8,
            net: NetSpec::default(),
        };
        let spec = LinkSpec {
            control: NetSpec::default(),
            lanes: vec![lane; 2],
        };
        self.world.connect(from, to, &spec).map(|_| ())
    }

    fn is_connected(&mut self, rank: usize, other: usize) -> bool {
        self.world.peer(rank, other).is_some()
    }

    fn write(&mut self, rank: usize, region: RegionId, offset: u64, bytes: &[u8]) {
        self.world.write(rank, region, offset, bytes);
    }

    fn read(&mut self, rank: usize, region: RegionId, offset: u64, len: u64) -> Vec<u8> {
        self.world.read(rank, region, offset, len).to_vec()
    }

    fn send(&mut self, rank: usize, request: &SendRequest) -> Result<Handle, SubmitError> {
        self.world
            .send(rank, request)
            .inspect(|handle| self.opened.push(*handle))
    }

    fn receive(&mut self, rank: usize, request: &Receive) -> Result<Handle, SubmitError> {
        let sources = request.sources.iter().map(|(other, dummy)| {
            let peer = self.world.peer(rank, *other);
            let dummy = *dummy;
            peer.map(|peer| Source { peer, dummy })
                .ok_or(SubmitError::UnknownPeer)
        });
        let request = ReceiveRequest {
            room: room(request.room),
            sources: sources.collect::<Result<_, _>>()?,
            receivers_expected: request.receivers_expected,
            prefix_tokens: PREFIX,
            items: request.items.iter().map(|l| l.as_slice().into()).collect(),
            timeout: request.timeout,
        };
        self.world
            .receive(rank, &request)
            .inspect(|handle| self.opened.push(*handle))
    }

    fn push(&mut self, transfer: &Handle, chunk: &Chunk) -> Result<(), SubmitError> {
        self.take_notices();
        if let Some(Err(error)) = self.ended.get(transfer) {
            return Err(SubmitError::Ended(error.clone()));
        }
        self.world.push(*transfer, chunk)
    }

    fn wait_ready(&mut self, transfer: &Handle) -> Result<u32, TransferError> {
        self.until(SOON, |s| {
            s.ready.contains_key(transfer) || s.ended.contains_key(transfer)
        });
        match (self.ended.get(transfer), self.ready.get(transfer)) {
            (Some(Err(error)), _) => Err(error.clone()),
            (_, Some(prefix_tokens)) => Ok(*prefix_tokens),
            _ => Err(TransferError::Timeout {
                stage: "waiting for the receiver's grant",
                elapsed: SOON,
            }),
        }
    }

    fn wait(&mut self, transfer: &Handle, timeout: Duration) -> Option<Outcome> {
        self.until(timeout, |s| s.ended.contains_key(transfer));
        self.ended.get(transfer).cloned()
    }

    fn cancel(&mut self, transfer: &Handle) {
        self.world.cancel(*transfer);
        // As the engine's does, it returns when no card can touch the pages any more.
        self.until(SOON, |s| !s.world.is_ebbing(*transfer));
    }

    fn pass(&mut self, time: Duration) {
        self.until(time, |_| false);
    }

    fn reset_lane(&mut self, rank: usize, other: usize, lane: u8) {
        if let Some(conn) = self.world.connection(rank, other) {
            self.world.reset_lane(conn, rank, usize::from(lane));
        }
    }

    fn shut_down(&mut self, rank: usize) {
        self.world.shut_down(rank, &self.opened);
    }

    fn restart(&mut self, rank: usize) {
        self.world.restart(rank);
    }

    fn late_messages(&mut self, rank: usize) -> u64 {
        self.world.late_messages(rank)
    }
}
