//! What adapters do with posted work requests: move bytes, complete, refuse, retry, die.
#![expect(
    unsafe_code,
    reason = "executing a WRITE is copying between registered raw memory"
)]

use super::{
    QueuePairId,
    behaviour::{EmptyReceive, RefusedWrite},
    counters::Violation,
    events::Completion,
    memory::{self, Payload, Refusal, Segment},
    queue::{Hardware, Operation, RecvRequest, SendRequest},
    state::{Mode, State},
};
use crate::transport::verbs::sys;

impl Operation {
    /// The opcode of its completion.
    pub(super) fn completion_opcode(self) -> u32 {
        match self {
            Self::Write { .. } => sys::IBV_WC_RDMA_WRITE,
            Self::Send { .. } => sys::IBV_WC_SEND,
            Self::Read { .. } => sys::IBV_WC_RDMA_READ,
        }
    }
}

/// What came of trying to execute the oldest work request of a queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attempt {
    /// It was executed, with whatever result.
    Done,
    /// No answer; it stays.
    Stalled,
    /// There was nothing to try.
    Nothing,
}

/// How an executed work request ended, when the queue pair survives or not.
enum Outcome {
    Success(u64),
    /// The sender sees success, and then both ends die (iWARP).
    SilentDeath(u64),
    /// The sender sees this status and its queue pair dies.
    Status(u32),
    /// The sender sees this status; the target's queue pair dies too.
    BothDie(u32),
    Stalled,
}

impl State {
    /// Executes what can be executed, unless the test steps by hand.
    pub(super) fn pump(&mut self, id: QueuePairId) {
        if self.mode == Mode::Auto {
            while self.attempt(id) == Attempt::Done {}
        }
    }

    /// After something changed that others may have waited for.
    pub(super) fn pump_all(&mut self) {
        if self.mode == Mode::Auto {
            self.run();
        }
    }

    /// After a queue pair got able to receive (a receive was posted, it reached RTR): its peer may go on.
    pub(super) fn pump_peer(&mut self, id: QueuePairId) {
        if let Some(remote) = self.queue(id).and_then(|queue| queue.remote) {
            self.pump(remote);
        }
    }

    /// Executes until nothing moves; how many work requests ended.
    pub(super) fn run(&mut self) -> u64 {
        let mut ended = 0;
        while self.step_once() {
            ended += 1;
        }
        ended
    }

    /// Executes the oldest work request that can be executed, in the order of posting over the whole fabric.
    pub(super) fn step_once(&mut self) -> bool {
        let mut fronts: Vec<(u64, Option<QueuePairId>)> = Vec::new();
        for (device, content) in self.devices.iter().enumerate() {
            for (&number, queue) in &content.queues {
                if let Some(request) = queue.waiting.front() {
                    fronts.push((request.order, Some(QueuePairId { device, number })));
                }
            }
        }
        fronts.extend(self.zombies.front().map(|zombie| (zombie.order, None)));
        fronts.sort_unstable();
        fronts.into_iter().any(|(_, front)| match front {
            Some(id) => self.attempt(id) == Attempt::Done,
            None => self.land_zombie(),
        })
    }

    /// Lets virtual time pass: requests without an answer for long enough end with `RETRY_EXC_ERR`.
    pub(super) fn tick(&mut self, steps: u64) {
        self.step += steps;
        let mut expired = Vec::new();
        for (device, content) in self.devices.iter().enumerate() {
            for (&number, queue) in &content.queues {
                let due = |since: u64| self.step >= since + self.behaviour.retry_steps;
                if queue.stalled_at.is_some_and(due) && !queue.waiting.is_empty() {
                    expired.push(QueuePairId { device, number });
                }
            }
        }
        for id in expired {
            self.expire(id);
        }
    }

    fn expire(&mut self, id: QueuePairId) {
        let waits_for_receive = self.behaviour.empty_receive == EmptyReceive::Retries
            && self.target_of(id).is_some_and(|target| {
                self.path_is_up(id.device, target.device)
                    && self
                        .queue(target)
                        .is_some_and(|queue| queue.received.is_empty())
            });
        let Some(queue) = self.queue_mut(id) else {
            return;
        };
        if waits_for_receive && queue.rnr_forever {
            return;
        }
        let Some(request) = queue.waiting.pop_front() else {
            return;
        };
        let status = if waits_for_receive {
            sys::IBV_WC_RNR_RETRY_EXC_ERR
        } else {
            sys::IBV_WC_RETRY_EXC_ERR
        };
        self.finish_send(id, &request, status, 0);
        self.fail_queue(id);
        self.disconnect_queue(id);
    }

    /// The queue pair that would answer this one, if it is connected to it and able to.
    fn target_of(&self, id: QueuePairId) -> Option<QueuePairId> {
        let queue = self.queue(id)?;
        let remote = queue.remote?;
        let target = self.queue(remote)?;
        let hears = match target.hardware {
            Hardware::Receives | Hardware::Ready => true,
            Hardware::Idle | Hardware::Dead => false,
        };
        let is_same = queue.pinned.is_none_or(|serial| serial == target.serial);
        (hears && is_same && target.remote == Some(id)).then_some(remote)
    }

    fn attempt(&mut self, id: QueuePairId) -> Attempt {
        let Some(queue) = self.queue(id) else {
            return Attempt::Nothing;
        };
        if queue.hardware != Hardware::Ready || queue.waiting.is_empty() {
            return Attempt::Nothing;
        }
        if self.passive_sends_too_early(id) {
            self.violate(Violation::PassiveSentFirst { queue: id });
            self.kill_connect(id);
            return Attempt::Nothing;
        }
        let target = self
            .target_of(id)
            .filter(|target| self.path_is_up(id.device, target.device));
        let Some(target) = target else {
            return self.stall(id);
        };
        let serial = self.queue(target).map(|queue| queue.serial);
        let Some(queue) = self.queue_mut(id) else {
            return Attempt::Nothing;
        };
        queue.pinned = serial;
        let Some(request) = queue.waiting.pop_front() else {
            return Attempt::Nothing;
        };
        let outcome = match self.injected_failure(id) {
            Some((status, lands)) => {
                if lands {
                    self.execute(id, target, &request);
                }
                Outcome::Status(status)
            }
            None => self.execute(id, target, &request),
        };
        if matches!(outcome, Outcome::Stalled) {
            if let Some(queue) = self.queue_mut(id) {
                queue.waiting.push_front(request);
            }
            return self.stall(id);
        }
        self.conclude(id, target, &request, &outcome);
        Attempt::Done
    }

    fn stall(&mut self, id: QueuePairId) -> Attempt {
        let step = self.step;
        if let Some(queue) = self.queue_mut(id) {
            queue.stalled_at.get_or_insert(step);
        }
        Attempt::Stalled
    }

    fn injected_failure(&mut self, id: QueuePairId) -> Option<(u32, bool)> {
        let queue = self.queue_mut(id)?;
        let (left, status, lands) = queue.injected.failure?;
        if left == 0 {
            queue.injected.failure = None;
            return Some((status, lands));
        }
        queue.injected.failure = Some((left - 1, status, lands));
        None
    }

    fn conclude(
        &mut self,
        id: QueuePairId,
        target: QueuePairId,
        request: &SendRequest,
        outcome: &Outcome,
    ) {
        if let Some(queue) = self.queue_mut(id) {
            queue.stalled_at = None;
        }
        match *outcome {
            Outcome::Success(len) => {
                self.finish_send(id, request, sys::IBV_WC_SUCCESS, len);
            }
            Outcome::SilentDeath(len) => {
                self.finish_send(id, request, sys::IBV_WC_SUCCESS, len);
                self.kill(target, sys::IBV_EVENT_QP_FATAL);
                self.kill(id, sys::IBV_EVENT_QP_FATAL);
                self.disconnect_queue(id);
            }
            Outcome::Status(status) => {
                self.finish_send(id, request, status, 0);
                self.fail_queue(id);
                self.disconnect_queue(id);
            }
            Outcome::BothDie(status) => {
                self.finish_send(id, request, status, 0);
                self.kill(target, sys::IBV_EVENT_QP_ACCESS_ERR);
                self.fail_queue(id);
                self.disconnect_queue(id);
            }
            Outcome::Stalled => {}
        }
    }

    /// A queue pair dies by itself, and its owner hears of it as an asynchronous event.
    pub(super) fn kill(&mut self, id: QueuePairId, event: u32) {
        self.fail_queue(id);
        self.queue_event(id, event);
    }

    fn execute(&mut self, id: QueuePairId, target: QueuePairId, request: &SendRequest) -> Outcome {
        let len = request.payload.len();
        if len > u64::from(self.behaviour.message_bytes_max) {
            return Outcome::Status(sys::IBV_WC_LOC_LEN_ERR);
        }
        if let (Payload::Gather(list), false) = (
            &request.payload,
            matches!(request.operation, Operation::Read { .. }),
        ) && !self.local_list_is_valid(id, list, 0)
        {
            return Outcome::Status(sys::IBV_WC_LOC_PROT_ERR);
        }
        match request.operation {
            Operation::Write { addr, key, imm } => {
                self.execute_write(target, request, (addr, key), imm)
            }
            Operation::Send { imm } => match self.forged(id, request) {
                Some(forged) => self.execute_send(target, &forged, imm),
                None => self.execute_send(target, request, imm),
            },
            Operation::Read { addr, key } => self.execute_read(id, target, request, (addr, key)),
        }
    }

    fn execute_write(
        &mut self,
        target: QueuePairId,
        request: &SendRequest,
        (addr, key): (u64, u32),
        imm: Option<u32>,
    ) -> Outcome {
        let len = request.payload.len();
        let has_receive = self
            .queue(target)
            .is_some_and(|queue| !queue.received.is_empty());
        if imm.is_some() && !has_receive && self.behaviour.empty_receive == EmptyReceive::Retries {
            return Outcome::Stalled;
        }
        // An empty WRITE with immediate data touches no memory, so its key is not looked at.
        if len > 0
            && let Err(refusal) = self.place(target, &request.payload, addr, key)
        {
            self.count_refusal(refusal);
            return match self.behaviour.refused_write {
                RefusedWrite::Silent => Outcome::SilentDeath(len),
                RefusedWrite::RemoteAccess => Outcome::BothDie(sys::IBV_WC_REM_ACCESS_ERR),
            };
        }
        let Some(imm) = imm else {
            return Outcome::Success(len);
        };
        let Some(receive) = self.take_receive(target) else {
            return self.no_receive(len);
        };
        let opcode = sys::IBV_WC_RECV_RDMA_WITH_IMM;
        self.complete_receive(target, &receive, (opcode, len), Some(imm), request);
        Outcome::Success(len)
    }

    /// Writes bytes into the target's memory, if it lets them in.
    pub(super) fn place(
        &mut self,
        target: QueuePairId,
        payload: &Payload,
        addr: u64,
        key: u32,
    ) -> Result<(), Refusal> {
        let len = payload.len();
        let pd = self.queue(target).map_or(0, |queue| queue.pd);
        let regions = &self.devices[target.device].regions;
        regions.check(pd, key, (addr, len), sys::IBV_ACCESS_REMOTE_WRITE)?;
        if self.watches.touches(addr, len) {
            self.counters.late_writes += 1;
        }
        self.counters.bytes_written += len;
        let mut rest = len;
        let mut targets = Vec::with_capacity(1);
        while rest > 0 {
            let piece = u32::try_from(rest).unwrap_or(u32::MAX);
            targets.push(Segment {
                addr: addr + (len - rest),
                len: piece,
                key,
            });
            rest -= u64::from(piece);
        }
        // SAFETY: the target was checked above and the payload by `execute` or when it was copied, under the lock that
        // `&mut self` proves is held; regions stay registered until it is released.
        unsafe { memory::scatter(payload, &targets) };
        Ok(())
    }

    fn count_refusal(&mut self, refusal: Refusal) {
        let counter = match refusal {
            Refusal::Key => &mut self.counters.refused_key,
            Refusal::Bounds => &mut self.counters.refused_bounds,
            Refusal::Domain => &mut self.counters.refused_domain,
            Refusal::Access => &mut self.counters.refused_access,
        };
        *counter += 1;
    }

    fn take_receive(&mut self, target: QueuePairId) -> Option<RecvRequest> {
        self.queue_mut(target)?.received.pop_front()
    }

    /// What a test has made of a SEND.
    fn forged(&mut self, id: QueuePairId, request: &SendRequest) -> Option<SendRequest> {
        let forgery = self.queue_mut(id)?.injected.forgery?;
        let bytes = match &request.payload {
            Payload::Bytes(bytes) => bytes.clone(),
            // SAFETY: the list was checked under the lock that `&mut self` proves is held.
            Payload::Gather(list) => unsafe { memory::snapshot(list) },
        };
        forgery(&bytes).map(|bytes| SendRequest {
            payload: Payload::Bytes(bytes),
            ..request.clone()
        })
    }

    fn no_receive(&mut self, len: u64) -> Outcome {
        match self.behaviour.empty_receive {
            EmptyReceive::Kills => {
                self.counters.empty_receives += 1;
                Outcome::SilentDeath(len)
            }
            EmptyReceive::Retries => Outcome::Stalled,
        }
    }

    fn execute_send(
        &mut self,
        target: QueuePairId,
        request: &SendRequest,
        imm: Option<u32>,
    ) -> Outcome {
        let len = request.payload.len();
        let Some(receive) = self.take_receive(target) else {
            return self.no_receive(len);
        };
        let room: u64 = receive.list.iter().map(|part| u64::from(part.len)).sum();
        let writable = self.local_list_is_valid(target, &receive.list, sys::IBV_ACCESS_LOCAL_WRITE);
        if len > room || !writable {
            let status = if writable {
                sys::IBV_WC_LOC_LEN_ERR
            } else {
                sys::IBV_WC_LOC_PROT_ERR
            };
            self.fail_receive(target, &receive, status);
            return match self.behaviour.refused_write {
                RefusedWrite::Silent => Outcome::SilentDeath(len),
                RefusedWrite::RemoteAccess if writable => {
                    Outcome::BothDie(sys::IBV_WC_REM_INV_REQ_ERR)
                }
                RefusedWrite::RemoteAccess => Outcome::BothDie(sys::IBV_WC_REM_OP_ERR),
            };
        }
        // SAFETY: both lists were checked under the lock that `&mut self` proves is held.
        unsafe { memory::scatter(&request.payload, &receive.list) };
        self.counters.bytes_sent += len;
        self.complete_receive(target, &receive, (sys::IBV_WC_RECV, len), imm, request);
        Outcome::Success(len)
    }

    fn execute_read(
        &mut self,
        id: QueuePairId,
        target: QueuePairId,
        request: &SendRequest,
        (addr, key): (u64, u32),
    ) -> Outcome {
        let Payload::Gather(list) = &request.payload else {
            return Outcome::Status(sys::IBV_WC_LOC_QP_OP_ERR);
        };
        let sinks = if self.behaviour.read_uses_first_sge {
            list.get(..1).unwrap_or_default()
        } else {
            list
        };
        let len: u64 = sinks.iter().map(|part| u64::from(part.len)).sum();
        let rights = if self.behaviour.read_sink_needs_remote_write {
            sys::IBV_ACCESS_LOCAL_WRITE | sys::IBV_ACCESS_REMOTE_WRITE
        } else {
            sys::IBV_ACCESS_LOCAL_WRITE
        };
        if !self.local_list_is_valid(id, sinks, rights) {
            return Outcome::Status(sys::IBV_WC_LOC_PROT_ERR);
        }
        let pd = self.queue(target).map_or(0, |queue| queue.pd);
        let regions = &self.devices[target.device].regions;
        let readable = regions.check(pd, key, (addr, len), sys::IBV_ACCESS_REMOTE_READ);
        let Ok(source_len) = u32::try_from(len) else {
            return Outcome::Status(sys::IBV_WC_LOC_LEN_ERR);
        };
        if readable.is_err() {
            return Outcome::BothDie(sys::IBV_WC_REM_ACCESS_ERR);
        }
        let source = Payload::Gather(vec![Segment {
            addr,
            len: source_len,
            key,
        }]);
        // SAFETY: the sinks and the source were checked under the lock that `&mut self` proves is held.
        unsafe { memory::scatter(&source, sinks) };
        Outcome::Success(len)
    }

    fn complete_receive(
        &mut self,
        target: QueuePairId,
        receive: &RecvRequest,
        (opcode, len): (u32, u64),
        imm: Option<u32>,
        request: &SendRequest,
    ) {
        let Some(queue) = self.queue(target) else {
            return;
        };
        let completion = Completion {
            wr_id: receive.wr_id,
            status: sys::IBV_WC_SUCCESS,
            opcode,
            byte_len: u32::try_from(len).unwrap_or(u32::MAX),
            imm,
            queue: target.number,
            peer_queue: queue.remote.map_or(0, |remote| remote.number),
            queue_serial: queue.serial,
            send_index: None,
            solicited: request.solicited,
        };
        self.complete(target, completion);
    }

    fn fail_receive(&mut self, target: QueuePairId, receive: &RecvRequest, status: u32) {
        let Some(queue) = self.queue(target) else {
            return;
        };
        let completion = Completion {
            wr_id: receive.wr_id,
            status,
            opcode: sys::IBV_WC_RECV,
            byte_len: 0,
            imm: None,
            queue: target.number,
            peer_queue: queue.remote.map_or(0, |remote| remote.number),
            queue_serial: queue.serial,
            send_index: None,
            solicited: true,
        };
        self.complete(target, completion);
    }
}
