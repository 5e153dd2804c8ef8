//! Everything a fabric holds, behind one lock.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{
    QueuePairId,
    behaviour::Behaviour,
    connect::ConnectionTable,
    counters::{Counters, QueueCounters, VIOLATIONS_KEPT_MAX, Violation},
    events::{Completion, CompletionQueue, EventQueue},
    memory::{RegionTable, Segment, WatchList},
    queue::{Hardware, QueuePair, SendRequest},
};
use crate::transport::verbs::sys;

/// When posted work requests are executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// When they are posted, as far as the network lets them.
    Auto,
    /// When the test says so: [`super::Fabric::step`], [`super::Fabric::run`].
    Manual,
}

/// An asynchronous event of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AsyncEvent {
    pub(super) kind: u32,
    pub(super) about: About,
}

/// What an asynchronous event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum About {
    /// A queue pair: number, address of the C structure.
    Queue(u32, usize),
    /// A completion queue: number, address of the C structure.
    Completions(u32, usize),
    Port,
    Device,
}

/// A WRITE that left its queue pair before that was destroyed.
#[derive(Debug)]
pub(super) struct Zombie {
    pub(super) order: u64,
    pub(super) from: QueuePairId,
    pub(super) target: QueuePairId,
    pub(super) target_serial: u64,
    pub(super) addr: u64,
    pub(super) key: u32,
    pub(super) bytes: Vec<u8>,
}

/// One adapter.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) regions: RegionTable,
    pub(super) domains: BTreeSet<u32>,
    pub(super) queues: BTreeMap<u32, QueuePair>,
    pub(super) completions: BTreeMap<u32, CompletionQueue>,
    pub(super) channels: BTreeMap<u32, EventQueue<u32>>,
    pub(super) events: EventQueue<AsyncEvent>,
    pub(super) port_up: bool,
    pub(super) removed: bool,
    /// The host is stopped: it polls nothing and hears nothing. The adapter goes on.
    pub(super) frozen: bool,
    /// Contexts that users have open.
    pub(super) contexts: u32,
    pub(super) next_queue: u32,
    pub(super) next_handle: u32,
    /// IPv4 address, host byte order.
    pub(super) address: u32,
    pub(super) mac: [u8; 6],
}

impl Device {
    pub(super) fn new(index: usize) -> std::io::Result<Self> {
        let low = u8::try_from(index).unwrap_or(u8::MAX);
        Ok(Self {
            regions: RegionTable::default(),
            domains: BTreeSet::new(),
            queues: BTreeMap::new(),
            completions: BTreeMap::new(),
            channels: BTreeMap::new(),
            events: EventQueue::new()?,
            port_up: true,
            removed: false,
            frozen: false,
            contexts: 0,
            next_queue: FIRST_QUEUE,
            next_handle: 1,
            address: u32::from_be_bytes([127, 0, FABRIC_SUBNET, low.wrapping_add(1)]),
            mac: [0x00, 0x16, 0x3e, 0, 0, low.wrapping_add(1)],
        })
    }

    pub(super) fn new_handle(&mut self) -> u32 {
        self.next_handle += 1;
        self.next_handle
    }

    /// Objects that are alive.
    pub(super) fn objects(&self) -> usize {
        self.domains.len() + self.queues.len() + self.completions.len() + self.channels.len()
    }

    /// A number for a new queue pair: cyclic in 24 bits, never one in use, zero and one are special.
    pub(super) fn new_queue_number(&mut self) -> u32 {
        loop {
            let number = self.next_queue;
            self.next_queue = if number >= QUEUE_NUMBERS - 1 {
                FIRST_QUEUE
            } else {
                number + 1
            };
            if !self.queues.contains_key(&number) {
                return number;
            }
        }
    }

    /// The device's GID: its IPv4 address mapped, or its MAC and nothing else.
    pub(super) fn gid(&self, roce: bool) -> [u8; 16] {
        let mut gid = [0; 16];
        if roce {
            gid[10..12].fill(0xff);
            gid[12..].copy_from_slice(&self.address.to_be_bytes());
        } else {
            gid[..6].copy_from_slice(&self.mac);
        }
        gid
    }
}

/// The first queue pair number that users get.
const FIRST_QUEUE: u32 = 2;
/// Queue pair numbers have 24 bits.
const QUEUE_NUMBERS: u32 = 1 << 24;
/// Third byte of the devices' addresses, 127.0.77.x: loopback, and recognisable in a log.
const FABRIC_SUBNET: u8 = 77;

/// A whole fabric.
#[derive(Debug)]
pub(super) struct State {
    pub(super) behaviour: Behaviour,
    pub(super) devices: Vec<Device>,
    pub(super) mode: Mode,
    /// Virtual time: how often the fabric was stepped.
    pub(super) step: u64,
    next_order: u64,
    next_serial: u64,
    /// Pairs of devices that do not hear each other, smaller index first.
    pub(super) cut: BTreeSet<(usize, usize)>,
    pub(super) zombies: VecDeque<Zombie>,
    pub(super) watches: WatchList,
    pub(super) connections: ConnectionTable,
    /// Counts of queue pairs that are gone, and of the fabric itself.
    pub(super) counters: Counters,
    pub(super) violations: Vec<Violation>,
}

impl State {
    pub(super) fn new(behaviour: Behaviour, devices: usize) -> std::io::Result<Self> {
        Ok(Self {
            behaviour,
            devices: (0..devices).map(Device::new).collect::<Result<_, _>>()?,
            mode: Mode::Auto,
            step: 0,
            next_order: 0,
            next_serial: 0,
            cut: BTreeSet::new(),
            zombies: VecDeque::new(),
            watches: WatchList::default(),
            connections: ConnectionTable::default(),
            counters: Counters::default(),
            violations: Vec::new(),
        })
    }

    pub(super) fn new_order(&mut self) -> u64 {
        self.next_order += 1;
        self.next_order
    }

    pub(super) fn new_serial(&mut self) -> u64 {
        self.next_serial += 1;
        self.next_serial
    }

    pub(super) fn violate(&mut self, violation: Violation) {
        self.counters.violations += 1;
        if self.violations.len() < VIOLATIONS_KEPT_MAX {
            self.violations.push(violation);
        }
    }

    pub(super) fn queue(&self, id: QueuePairId) -> Option<&QueuePair> {
        self.devices.get(id.device)?.queues.get(&id.number)
    }

    pub(super) fn queue_mut(&mut self, id: QueuePairId) -> Option<&mut QueuePair> {
        self.devices.get_mut(id.device)?.queues.get_mut(&id.number)
    }

    /// Whether two devices hear each other.
    pub(super) fn path_is_up(&self, one: usize, other: usize) -> bool {
        let alive = |device: usize| {
            self.devices
                .get(device)
                .is_some_and(|device| device.port_up && !device.removed)
        };
        alive(one) && alive(other) && !self.cut.contains(&(one.min(other), one.max(other)))
    }

    /// The sum of all counters.
    pub(super) fn sum(&self) -> Counters {
        let mut sum = self.counters;
        for queue in self
            .devices
            .iter()
            .flat_map(|device| device.queues.values())
        {
            sum.queues.add(&queue.counters);
        }
        sum
    }

    /// Puts an asynchronous event of a queue pair in front of its device's listener.
    pub(super) fn queue_event(&mut self, id: QueuePairId, kind: u32) {
        let Some(device) = self.devices.get_mut(id.device) else {
            return;
        };
        if let Some(queue) = device.queues.get(&id.number) {
            let about = About::Queue(id.number, queue.handle);
            device.events.push(AsyncEvent { kind, about });
        }
    }

    /// Puts a completion in its queue, unless a test wants it lost.
    pub(super) fn complete(&mut self, id: QueuePairId, completion: Completion) {
        let Some(device) = self.devices.get_mut(id.device) else {
            return;
        };
        let Some(queue) = device.queues.get_mut(&id.number) else {
            return;
        };
        let is_send = completion.send_index.is_some();
        if is_send {
            queue.counters.send_completions += 1;
        } else {
            queue.counters.recv_completions += 1;
        }
        if let Some(left) = &mut queue.injected.dropped_completion {
            if *left == 0 {
                queue.injected.dropped_completion = None;
                self.counters.completions_lost += 1;
                return;
            }
            *left -= 1;
        }
        let number = if is_send {
            queue.send_cq
        } else {
            queue.recv_cq
        };
        self.enqueue(id.device, number, completion);
    }

    /// Puts a completion in a completion queue and wakes who waits for it.
    pub(super) fn enqueue(&mut self, index: usize, number: u32, completion: Completion) {
        let device = &mut self.devices[index];
        let Some(completions) = device.completions.get_mut(&number) else {
            return;
        };
        let urgent = completion.solicited || completion.status != sys::IBV_WC_SUCCESS;
        match completions.push(completion, urgent, self.behaviour.completes_when_armed) {
            Ok(false) => {}
            Ok(true) => {
                let channel = completions.channel;
                if let Some(channel) = channel.and_then(|number| device.channels.get_mut(&number)) {
                    channel.push(number);
                }
            }
            Err(()) => {
                let capacity = completions.capacity;
                let about = About::Completions(number, completions.handle);
                let kind = sys::IBV_EVENT_CQ_ERR;
                device.events.push(AsyncEvent { kind, about });
                self.counters.completions_lost += 1;
                self.violate(Violation::CompletionQueueOverrun {
                    device: index,
                    capacity,
                });
            }
        }
    }

    /// Moves a queue pair into error: nothing more leaves it, and what it holds is flushed where stacks flush.
    pub(super) fn fail_queue(&mut self, id: QueuePairId) {
        let flushes = self.behaviour.flushes;
        let Some(queue) = self.queue_mut(id) else {
            return;
        };
        queue.state = sys::IBV_QPS_ERR;
        queue.hardware = Hardware::Dead;
        queue.stalled_at = None;
        if flushes {
            self.flush(id);
        }
    }

    /// Completes everything a queue pair holds with `WR_FLUSH_ERR`.
    pub(super) fn flush(&mut self, id: QueuePairId) {
        let Some(queue) = self.queue_mut(id) else {
            return;
        };
        let sends = std::mem::take(&mut queue.waiting);
        let receives = std::mem::take(&mut queue.received);
        for request in sends {
            self.finish_send(id, &request, sys::IBV_WC_WR_FLUSH_ERR, 0);
        }
        let Some(serial) = self.queue(id).map(|queue| queue.serial) else {
            return;
        };
        for receive in receives {
            let completion = Completion {
                wr_id: receive.wr_id,
                status: sys::IBV_WC_WR_FLUSH_ERR,
                opcode: sys::IBV_WC_RECV,
                byte_len: 0,
                imm: None,
                queue: id.number,
                peer_queue: 0,
                queue_serial: serial,
                send_index: None,
                solicited: true,
            };
            self.complete(id, completion);
        }
    }

    /// Ends an executed (or flushed) send work request: its completion, if it asked for one or failed.
    pub(super) fn finish_send(
        &mut self,
        id: QueuePairId,
        request: &SendRequest,
        status: u32,
        byte_len: u64,
    ) {
        let Some(queue) = self.queue_mut(id) else {
            return;
        };
        queue.send.executed(request.index);
        if !request.signalled && status == sys::IBV_WC_SUCCESS {
            return;
        }
        let completion = Completion {
            wr_id: request.wr_id,
            status,
            opcode: request.operation.completion_opcode(),
            byte_len: u32::try_from(byte_len).unwrap_or(u32::MAX),
            imm: None,
            queue: id.number,
            peer_queue: queue.remote.map_or(0, |remote| remote.number),
            queue_serial: queue.serial,
            send_index: Some(request.index),
            solicited: false,
        };
        self.complete(id, completion);
    }

    /// Freezes or thaws a host.
    pub(super) fn set_frozen(&mut self, index: usize, frozen: bool) {
        let Some(device) = self.devices.get_mut(index) else {
            return;
        };
        device.frozen = frozen;
        device.events.set_frozen(frozen);
        for channel in device.channels.values_mut() {
            channel.set_frozen(frozen);
        }
        self.connections.set_frozen(index, frozen);
    }

    /// Remembers what a queue pair counted after it is gone.
    pub(super) fn bury(&mut self, counters: &QueueCounters) {
        self.counters.queues.add(counters);
    }

    /// Whether a list may be read or written by this queue pair's own device.
    pub(super) fn local_list_is_valid(
        &self,
        id: QueuePairId,
        list: &[Segment],
        rights: u32,
    ) -> bool {
        let Some(pd) = self.queue(id).map(|queue| queue.pd) else {
            return false;
        };
        let regions = &self.devices[id.device].regions;
        regions.check_all(pd, list, rights).is_ok()
    }
}
