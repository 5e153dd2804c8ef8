//! A simulated process: a node, its memory, its gates.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
};

use super::world::Event;
use crate::{
    ids::{Epoch, InstanceId, PeerId, TransferId},
    layout::{Layout, RegionId},
    memory::Gate,
    time::Time,
    transfer::{Node, NodeConfig},
};

/// What a rank is made of.
#[derive(Clone, Debug)]
pub struct RankSpec {
    /// Its layout.
    pub layout: Layout,
    /// Bytes of its regions, in the order of their ids.
    pub regions: Vec<usize>,
    /// Its node's bounds.
    pub node: NodeConfig,
}

/// A transfer of one life of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Handle {
    /// The rank's index.
    pub rank: usize,
    /// Counts its restarts.
    pub life: u32,
    /// The node's number.
    pub id: TransferId,
}

pub(super) struct Rank {
    pub(super) spec: RankSpec,
    pub(super) node: Node,
    pub(super) life: u32,
    pub(super) instance: InstanceId,
    pub(super) is_alive: bool,
    pub(super) is_frozen: bool,
    pub(super) memory: Vec<Vec<u8>>,
    pub(super) gates: HashMap<TransferId, Arc<Gate>>,
    /// Transfers that have ended.
    pub(super) over: HashSet<TransferId>,
    /// Whose pages a card writes: (room, epoch) → the receiving transfer.
    pub(super) grants: HashMap<(u64, Epoch), TransferId>,
    /// Of the last grant sent.
    pub(super) last_epoch: Epoch,
    /// Validity cells by their virtual address.
    pub(super) cells: HashMap<u64, Arc<Gate>>,
    pub(super) cell_of: HashMap<TransferId, u64>,
    next_cell: u64,
    next_peer: u64,
    /// Peer → (connection, our side of it).
    pub(super) peers: HashMap<PeerId, (usize, usize)>,
    /// When the next tick event comes.
    pub(super) armed: Time,
    /// What happened while it was frozen.
    pub(super) backlog: VecDeque<Event>,
}

impl Rank {
    pub(super) fn new(index: usize, spec: RankSpec) -> Self {
        let memory = spec.regions.iter().map(|len| vec![0; *len]).collect();
        Self {
            node: Node::new(spec.node.clone()),
            spec,
            life: 0,
            instance: instance(index, 0),
            is_alive: true,
            is_frozen: false,
            memory,
            gates: HashMap::new(),
            over: HashSet::new(),
            grants: HashMap::new(),
            last_epoch: Epoch(0),
            cells: HashMap::new(),
            cell_of: HashMap::new(),
            next_cell: 1,
            next_peer: 1,
            peers: HashMap::new(),
            armed: Time::NEVER,
            backlog: VecDeque::new(),
        }
    }

    /// A new process at the same place, with memory full of somebody else's bytes.
    pub(super) fn restart(&mut self, index: usize) {
        self.life += 1;
        self.instance = instance(index, self.life);
        self.node = Node::new(self.spec.node.clone());
        self.is_alive = true;
        self.is_frozen = false;
        self.memory.iter_mut().for_each(|region| region.fill(0xEE));
        self.gates.clear();
        self.over.clear();
        self.grants.clear();
        self.cells.clear();
        self.cell_of.clear();
        self.peers.clear();
        self.armed = Time::NEVER;
        self.backlog.clear();
    }

    pub(super) fn new_peer(&mut self) -> PeerId {
        let peer = PeerId(self.next_peer);
        self.next_peer += 1;
        peer
    }

    /// Makes the gate of a transfer that was just opened.
    pub(super) fn add_gate(&mut self, id: TransferId) {
        let cell = self.next_cell;
        self.next_cell += 1;
        // The token differs from every address, so that mixing them up shows.
        let gate = Arc::new(Gate::new(cell << 20 | 1));
        self.gates.insert(id, Arc::clone(&gate));
        self.cells.insert(cell, gate);
        self.cell_of.insert(id, cell);
    }

    /// Closes the gate for good and frees its cell.
    pub(super) fn close_gate(&mut self, id: TransferId) {
        if let Some(gate) = self.gates.remove(&id) {
            gate.close();
        }
        if let Some(cell) = self.cell_of.remove(&id) {
            self.cells.remove(&cell);
        }
    }

    /// What a peer reads at a cell's address.
    pub(super) fn peek(&self, cell: u64) -> u64 {
        self.cells.get(&cell).map_or(0, |gate| gate.cell().1)
    }

    pub(super) fn bytes(&self, region: RegionId, offset: u64, len: u64) -> &[u8] {
        let (start, end) = bounds(offset, len);
        &self.memory[region.0 as usize][start..end]
    }

    pub(super) fn bytes_mut(&mut self, region: RegionId, offset: u64, len: u64) -> &mut [u8] {
        let (start, end) = bounds(offset, len);
        &mut self.memory[region.0 as usize][start..end]
    }
}

fn bounds(offset: u64, len: u64) -> (usize, usize) {
    let start = usize::try_from(offset).expect("invariant: simulated regions are small");
    let len = usize::try_from(len).expect("invariant: simulated regions are small");
    (start, start + len)
}

fn instance(index: usize, life: u32) -> InstanceId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&(index as u64).to_le_bytes());
    id[8..12].copy_from_slice(&life.to_le_bytes());
    InstanceId(id)
}
