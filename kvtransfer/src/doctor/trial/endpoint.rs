//! One side's queue pairs and memory.
#![expect(unsafe_code, reason = "registers memory for the device")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use super::TrialError;
use super::wire::{Card, End, QUEUE_PAIRS, STARVED};
use crate::clock;
use crate::doctor::rails::Rail;
use crate::transport::verbs::chain::{Chain, Flags, RemotePlace, Sge};
use crate::transport::verbs::cm::{CmId, EventChannel};
use crate::transport::verbs::context::{Context, EventTarget};
use crate::transport::verbs::cq::{Completion, Cq, POLL_MAX};
use crate::transport::verbs::error::VerbsError;
use crate::transport::verbs::library::Library;
use crate::transport::verbs::mr::{Access, Mr};
use crate::transport::verbs::pd::Pd;
use crate::transport::verbs::probe::capabilities;
use crate::transport::verbs::qp::{LocalPath, PSN_MASK, Qp, QpAddress, QpCaps};

/// Bytes that the peer may write: enough for every queue pair's WRITEs of 64 KiB to have places of their own.
pub(super) const AREA_BYTES: usize = 1 << 20;
/// Bytes of a receive and of a notice.
pub(super) const NOTICE_BYTES: usize = 16;
/// Receives posted per queue pair. No trial has more than one notice on its way.
const RECEIVES: usize = 4;
/// Requests outstanding per queue pair.
pub(super) const SENDS: u32 = 16;
/// Most elements of a WRITE here.
pub(super) const ELEMENTS: u32 = 4;
/// How long anything is waited for; less than the exchange waits for an answer, so that the reason gets through.
pub(super) const PATIENCE: Duration = Duration::from_secs(3);
/// Marks the number of a receive.
const RECEIVE: u64 = 1 << 32;

/// Fields are dropped in order: queue pairs before the registration, that before its memory.
pub(super) struct Endpoint {
    qps: Vec<Qp>,
    /// rdma_cm's side of each queue pair, where it connects them.
    ids: Vec<CmId>,
    channel: Option<Arc<EventChannel>>,
    mr: Mr,
    pd: Arc<Pd>,
    memory: Box<[AtomicU8]>,
    cq: Arc<Cq>,
    context: Arc<Context>,
    path: LocalPath,
    gid: [u8; 16],
    lid: u16,
    caps: QpCaps,
    /// Completions that nobody has asked for yet; at most the completion queue's entries.
    waiting: VecDeque<Completion>,
}

impl Endpoint {
    /// An end whose queue pairs are connected by what two cards say.
    pub(super) fn open(rail: &Rail) -> Result<Self, TrialError> {
        let Some(gid) = rail.gid.as_ref().filter(|_| rail.is_usable()) else {
            let why = format!("{} cannot be used for queue pair numbers", rail.device);
            return Err(TrialError::Refused(why));
        };
        let mut endpoint = Self::unconnected(rail, Context::open)?;
        endpoint.gid = gid.gid.octets();
        endpoint.path.gid_index = u8::try_from(gid.index)
            .map_err(|_| TrialError::Refused("its GID's index is over 255".to_owned()))?;
        for _ in 0..QUEUE_PAIRS {
            let mut qp = Qp::create(&endpoint.pd, &endpoint.cq, &endpoint.cq, endpoint.caps)?;
            qp.enter_init(rail.port)?;
            endpoint.add(qp)?;
        }
        Ok(endpoint)
    }

    /// An end without queue pairs.
    pub(super) fn unconnected(
        rail: &Rail,
        open: impl Fn(&Arc<Library>, &str) -> Result<Arc<Context>, VerbsError>,
    ) -> Result<Self, TrialError> {
        if !rail.is_usable() {
            let why = format!("{} cannot be used", rail.device);
            return Err(TrialError::Refused(why));
        }
        let library = Library::open()?;
        let context = open(&library, &rail.device)?;
        let port = context.port(rail.port)?;
        let can = capabilities(&context, rail.port)?;
        let caps = QpCaps {
            max_send_wr: SENDS,
            max_recv_wr: u32::try_from(RECEIVES).expect("invariant: a few"),
            max_send_sge: can.send_sge.value.min(ELEMENTS),
            max_inline_bytes: can.inline_bytes.value.min(64),
            wr_bytes_max: can.wr_bytes_max.value,
        };
        let pd = Pd::create(&context)?;
        let entries = u32::try_from(QUEUE_PAIRS).expect("invariant: a few") * caps.completions();
        let cq = Cq::create(&context, entries, false, 0)?;
        let bytes = AREA_BYTES + QUEUE_PAIRS * RECEIVES * NOTICE_BYTES;
        let memory: Box<[AtomicU8]> = (0..bytes).map(|_| AtomicU8::new(0)).collect();
        let address = memory.as_ptr().expose_provenance() as u64;
        // SAFETY: the memory is owned by the endpoint, which drops the registration first; the device's writes meet
        // atomics only, never a plain reference.
        let mr = unsafe { Mr::register(&pd, address, bytes as u64, Access::WriteTarget) }?;
        let psn = u32::try_from(clock::now().nanos() & u64::from(PSN_MASK))
            .expect("invariant: masked to 24 bits");
        Ok(Self {
            qps: Vec::with_capacity(QUEUE_PAIRS),
            ids: Vec::new(),
            channel: None,
            mr,
            pd,
            memory,
            cq,
            context,
            path: LocalPath {
                port: rail.port,
                gid_index: 0,
                mtu: port.active_mtu,
                psn,
            },
            gid: [0; 16],
            lid: port.lid,
            caps,
            waiting: VecDeque::new(),
        })
    }

    /// Adds the next queue pair and posts its receives.
    fn add(&mut self, qp: Qp) -> Result<(), TrialError> {
        let index = self.qps.len();
        self.qps.push(qp);
        if index != STARVED {
            for slot in 0..RECEIVES {
                self.post_receive(index, slot)?;
            }
        }
        Ok(())
    }

    /// Makes the next queue pair on a connection of rdma_cm.
    pub(super) fn make(&mut self, id: &mut CmId) -> Result<(), TrialError> {
        let qp = id.create_qp(&self.pd, &self.cq, &self.cq, self.caps)?;
        self.add(qp)
    }

    /// Keeps the connection of the queue pair that was made last.
    pub(super) fn keep(&mut self, id: CmId) {
        self.ids.push(id);
    }

    /// Connections so far.
    pub(super) fn connections(&self) -> usize {
        self.ids.len()
    }

    /// Listens to what happens to the connections.
    pub(super) fn listen_to(&mut self, channel: Arc<EventChannel>) {
        self.channel = Some(channel);
    }

    pub(super) fn library(&self) -> &Arc<Library> {
        self.context.library()
    }

    /// This side, for a peer that is to use `device`.
    pub(super) fn card(&self, device: &str) -> Card {
        let end = |qp: &Qp| {
            End::from(QpAddress {
                gid: self.gid,
                lid: self.lid,
                qp_num: qp.qp_num(),
                psn: self.path.psn,
            })
        };
        Card {
            device: device.to_owned(),
            ends: if self.ids.is_empty() {
                self.qps.iter().map(end).collect()
            } else {
                Vec::new()
            },
            mtu: self.path.mtu,
            address: self.address(0),
            rkey: self.mr.rkey(),
        }
    }

    /// Connects every queue pair to the peer's of the same place.
    pub(super) fn connect(&mut self, peer: &Card) -> Result<(), TrialError> {
        if peer.ends.len() != QUEUE_PAIRS {
            let why = format!("{} queue pairs, not {QUEUE_PAIRS}", peer.ends.len());
            return Err(TrialError::Refused(why));
        }
        self.path.mtu = self.path.mtu.min(peer.mtu);
        for (qp, end) in self.qps.iter_mut().zip(&peer.ends) {
            qp.enter_rtr(&self.path, &QpAddress::from(end))?;
            qp.enter_rts(&self.path)?;
        }
        Ok(())
    }

    pub(super) fn elements(&self) -> usize {
        self.caps.max_send_sge as usize
    }

    fn address(&self, offset: usize) -> u64 {
        self.memory[offset..].as_ptr().expose_provenance() as u64
    }

    /// A piece of the area as an element.
    pub(super) fn piece(&self, offset: usize, bytes: usize) -> Sge {
        assert!(offset + bytes <= AREA_BYTES, "pieces lie in the area");
        Sge {
            address: self.address(offset),
            bytes: u32::try_from(bytes).expect("invariant: the area is 1 MiB"),
            lkey: self.mr.lkey(),
        }
    }

    pub(super) fn fill(&self, bytes: usize, byte: impl Fn(usize) -> u8) {
        for (offset, place) in self.memory[..bytes].iter().enumerate() {
            place.store(byte(offset), Ordering::Relaxed);
        }
    }

    /// The first of so many bytes that is not the expected one.
    pub(super) fn difference(&self, bytes: usize, byte: impl Fn(usize) -> u8) -> Option<usize> {
        let bytes = bytes.min(AREA_BYTES);
        let mut places = self.memory[..bytes].iter().enumerate();
        let found = places.find(|(offset, place)| place.load(Ordering::Relaxed) != byte(*offset));
        found.map(|(offset, _)| offset)
    }

    fn post_receive(&mut self, qp: usize, slot: usize) -> Result<(), TrialError> {
        let place = AREA_BYTES + (qp * RECEIVES + slot) * NOTICE_BYTES;
        let address = self.address(place);
        let bytes = u32::try_from(NOTICE_BYTES).expect("invariant: 16");
        let number = RECEIVE | (qp * RECEIVES + slot) as u64;
        let lkey = self.mr.lkey();
        self.qps[qp].post_recv(number, address, bytes, lkey)?;
        Ok(())
    }

    /// A chain that fits the queue pairs.
    pub(super) fn chain(&self) -> Chain {
        Chain::new(2, self.elements(), self.caps.wr_bytes_max)
    }

    /// Adds a notice, which completes here with the queue pair's number.
    pub(super) fn add_notice(&self, chain: &mut Chain, qp: usize) -> Result<(), TrialError> {
        let flags = Flags {
            signalled: true,
            solicited: false,
        };
        if self.caps.max_inline_bytes as usize >= NOTICE_BYTES {
            chain.send_inline(qp as u64, &[0; NOTICE_BYTES], flags)?;
        } else {
            chain.send(qp as u64, &[self.piece(0, NOTICE_BYTES)], flags)?;
        }
        Ok(())
    }

    /// Posts a WRITE of one piece, which completes here with the queue pair's number.
    pub(super) fn post_write(
        &mut self,
        qp: usize,
        piece: Sge,
        to: RemotePlace,
    ) -> Result<(), TrialError> {
        let mut chain = self.chain();
        let flags = Flags {
            signalled: true,
            solicited: false,
        };
        chain.write(qp as u64, &[piece], to, flags)?;
        self.post(qp, &mut chain)
    }

    pub(super) fn post(&mut self, qp: usize, chain: &mut Chain) -> Result<(), TrialError> {
        self.qps[qp].post(chain)?;
        Ok(())
    }

    /// Posts a notice alone.
    pub(super) fn notify(&mut self, qp: usize) -> Result<(), TrialError> {
        let mut chain = self.chain();
        self.add_notice(&mut chain, qp)?;
        self.post(qp, &mut chain)
    }

    /// Waits until a request of ours on this queue pair is done.
    pub(super) fn await_sent(&mut self, qp: usize) -> Result<(), TrialError> {
        let done = self.take("completion", |done| done.wr_id == qp as u64)?;
        check(&done)
    }

    /// Waits for a notice of the peer on this queue pair and posts its receive again.
    pub(super) fn await_notice(&mut self, qp: usize) -> Result<(), TrialError> {
        let first = RECEIVE | (qp * RECEIVES) as u64;
        let mine = first..first + RECEIVES as u64;
        let done = self.take("notice of the peer", |done| mine.contains(&done.wr_id))?;
        check(&done)?;
        let slot = usize::try_from(done.wr_id - first).expect("invariant: a few");
        self.post_receive(qp, slot)
    }

    /// Takes the first completion that fits; one of a failed request ends the wait at once.
    fn take(
        &mut self,
        what: &'static str,
        fits: impl Fn(&Completion) -> bool,
    ) -> Result<Completion, TrialError> {
        let deadline = clock::now() + PATIENCE;
        loop {
            if let Some(at) = self.waiting.iter().position(&fits) {
                return Ok(self
                    .waiting
                    .remove(at)
                    .expect("invariant: position is in the queue"));
            }
            if let Some(failed) = self.waiting.iter().find(|done| !done.status().is_success()) {
                return Err(TrialError::Completion(failed.status().to_string()));
            }
            if !self.poll()? {
                if clock::now() >= deadline {
                    return Err(TrialError::Nothing(what, PATIENCE.as_secs()));
                }
                std::thread::yield_now();
            }
        }
    }

    fn poll(&mut self) -> Result<bool, TrialError> {
        let mut batch = [Completion::default(); POLL_MAX];
        let count = self.cq.poll(&mut batch)?;
        self.waiting.extend(&batch[..count]);
        Ok(count > 0)
    }

    /// Watches a queue pair after a fault was provoked, until the device tells: by a failed completion or an event.
    pub(super) fn watch(&mut self, qp: usize) -> Result<(String, Option<Duration>), TrialError> {
        let start = clock::now();
        let mut said = Vec::new();
        loop {
            self.poll()?;
            while let Some(done) = self.waiting.pop_front() {
                if done.wr_id != qp as u64 {
                    continue;
                }
                said.push(format!("completion: {}", done.status()));
                if !done.status().is_success() {
                    return Ok((said.join(", "), Some(clock::now().since(start))));
                }
            }
            if let Some(what) = self.happened(qp)? {
                said.push(what);
                return Ok((said.join(", "), Some(clock::now().since(start))));
            }
            if clock::now().since(start) >= PATIENCE {
                said.push(format!("nothing else within {} s", PATIENCE.as_secs()));
                return Ok((said.join(", "), None));
            }
            std::thread::yield_now();
        }
    }
}

impl Endpoint {
    /// What the device or rdma_cm says of a queue pair, and of no other one.
    fn happened(&self, qp: usize) -> Result<Option<String>, TrialError> {
        let number = self.qps[qp].qp_num();
        while let Some(event) = self.context.next_event()? {
            if !matches!(event.target, EventTarget::Qp(other) if other != number) {
                return Ok(Some(format!("asynchronous event {}", event.kind)));
            }
        }
        let (Some(channel), Some(id)) = (&self.channel, self.ids.get(qp)) else {
            return Ok(None);
        };
        while let Some(event) = channel.next_event()? {
            if event.id == id.key() {
                return Ok(Some(format!("rdma_cm: {}", event.words())));
            }
        }
        Ok(None)
    }
}

fn check(done: &Completion) -> Result<(), TrialError> {
    if done.status().is_success() {
        Ok(())
    } else {
        Err(TrialError::Completion(done.status().to_string()))
    }
}
