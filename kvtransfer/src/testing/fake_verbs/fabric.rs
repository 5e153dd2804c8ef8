//! The handle by which a test drives a fabric: time, faults, and what was counted.
#![forbid(unsafe_code)]

use std::{ops::Range, sync::Arc};

use super::{
    QueuePairId,
    behaviour::Behaviour,
    counters::{Counters, QueueCounters, Violation, WatchCounters},
    events::Armed,
    queue::{Forgery, Hardware},
    shared::Shared,
    state::{About, AsyncEvent, Mode},
};
use crate::transport::verbs::sys;

/// Drives a fake fabric. Cheap to clone; all calls may be made from any thread, at any time.
///
/// Devices are named by their index, queue pairs by [`QueuePairId`].
#[derive(Clone, Debug)]
pub struct Fabric {
    pub(super) shared: Arc<Shared>,
    pub(super) names: Arc<[String]>,
}

/// Names memory that is being watched; see [`Fabric::watch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchId(u64);

impl Fabric {
    /// When posted work requests are executed. Changing to [`Mode::Auto`] executes what has been waiting.
    pub fn set_mode(&self, mode: Mode) {
        let mut state = self.shared.lock();
        state.mode = mode;
        state.pump_all();
    }

    /// Executes the oldest work request that can be executed; false when none can. Time passes by one step.
    pub fn step(&self) -> bool {
        let mut state = self.shared.lock();
        let moved = state.step_once();
        state.tick(1);
        moved
    }

    /// Executes until nothing moves; how many work requests ended.
    pub fn run(&self) -> u64 {
        self.shared.lock().run()
    }

    /// Lets so many steps of virtual time pass without executing anything: what has had no answer for
    /// [`Behaviour::retry_steps`] ends with `RETRY_EXC_ERR` (or `RNR_RETRY_EXC_ERR`).
    pub fn tick(&self, steps: u64) {
        self.shared.lock().tick(steps);
    }

    /// Work requests that were posted and not executed, and WRITEs on the wire.
    #[must_use]
    pub fn waiting(&self) -> usize {
        let state = self.shared.lock();
        let queues = state
            .devices
            .iter()
            .flat_map(|device| device.queues.values());
        queues.map(|queue| queue.waiting.len()).sum::<usize>() + state.zombies.len()
    }

    /// Changes how the fabric behaves from now on. What describes devices (names, GIDs, modes) is fixed by
    /// [`super::FakeVerbs::new`] and does not follow.
    pub fn adjust(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.shared.lock().behaviour);
    }

    // ---- the network and the hosts ----

    /// Cuts the path between two devices: nothing is answered, and after [`Behaviour::retry_steps`] retries are used up.
    pub fn cut(&self, one: usize, other: usize) {
        let pair = (one.min(other), one.max(other));
        self.shared.lock().cut.insert(pair);
    }

    /// Mends the path: what has not used up its retries goes on.
    pub fn mend(&self, one: usize, other: usize) {
        let mut state = self.shared.lock();
        state.cut.remove(&(one.min(other), one.max(other)));
        state.pump_all();
    }

    /// Takes a port down or up, with its asynchronous event; a device that is there twice gets no second event.
    pub fn set_port(&self, device: usize, up: bool) {
        let mut state = self.shared.lock();
        let Some(found) = state.devices.get_mut(device) else {
            return;
        };
        if found.port_up == up {
            return;
        }
        found.port_up = up;
        let kind = if up {
            sys::IBV_EVENT_PORT_ACTIVE
        } else {
            sys::IBV_EVENT_PORT_ERR
        };
        let about = About::Port;
        found.events.push(AsyncEvent { kind, about });
        state.pump_all();
        if let Some(name) = self.names.get(device)
            && let Err(error) = self.shared.sysfs.set_port(name, up)
        {
            tracing::warn!(%error, "the fake sysfs tree does not follow the port");
        }
    }

    /// Takes a device away: `DEVICE_FATAL`, every queue pair dies, every later call fails with EIO.
    pub fn remove_device(&self, device: usize) {
        let mut state = self.shared.lock();
        if device >= state.devices.len() || state.devices[device].removed {
            return;
        }
        let numbers: Vec<u32> = state.devices[device].queues.keys().copied().collect();
        for number in numbers {
            state.fail_queue(QueuePairId { device, number });
        }
        let found = &mut state.devices[device];
        found.removed = true;
        let kind = sys::IBV_EVENT_DEVICE_FATAL;
        let about = About::Device;
        found.events.push(AsyncEvent { kind, about });
        state.cm_device_removed(device);
    }

    /// Freezes a host (SIGSTOP, a stalled VM): it polls no completion and hears no event, while its adapter goes on
    /// letting writes in and executing what was posted.
    pub fn freeze(&self, device: usize) {
        self.shared.lock().set_frozen(device, true);
    }

    /// Thaws a host: it sees everything that has happened since.
    pub fn thaw(&self, device: usize) {
        self.shared.lock().set_frozen(device, false);
    }

    /// The number that the next queue pair of a device gets, if it is free: numbers are cyclic, and late completions
    /// of an old queue pair may carry the number of a new one.
    pub fn set_next_queue_number(&self, device: usize, number: u32) {
        if let Some(device) = self.shared.lock().devices.get_mut(device) {
            device.next_queue = number;
        }
    }

    // ---- faults of one queue pair ----

    /// Posting fails with this errno once so many more work requests have been accepted: in a chain of five, 2 takes
    /// two and points `bad_wr` at the third.
    pub fn fail_post(&self, queue: QueuePairId, accepted: u32, errno: i32) {
        if let Some(queue) = self.shared.lock().queue_mut(queue) {
            queue.injected.post_failure = Some((accepted, errno));
        }
    }

    /// Drops one completion after so many more.
    pub fn drop_completion(&self, queue: QueuePairId, after: u32) {
        if let Some(queue) = self.shared.lock().queue_mut(queue) {
            queue.injected.dropped_completion = Some(after);
        }
    }

    /// After so many more executed work requests, the next one ends with this status (`IBV_WC_*`, not zero) and its
    /// queue pair with it. `lands`: its bytes arrive all the same, as when only the answer is lost.
    pub fn fail_request(&self, queue: QueuePairId, after: u32, status: u32, lands: bool) {
        if let Some(queue) = self.shared.lock().queue_mut(queue) {
            queue.injected.failure = Some((after, status, lands));
        }
    }

    /// From now on SENDs of a queue pair carry what `forgery` makes of them, as if its owner meant harm.
    pub fn forge(&self, queue: QueuePairId, forgery: Forgery) {
        if let Some(queue) = self.shared.lock().queue_mut(queue) {
            queue.injected.forgery = Some(forgery);
        }
    }

    /// Kills a queue pair as its hardware would: `QP_FATAL`, and no more completions than the device flushes.
    pub fn kill(&self, queue: QueuePairId) {
        let mut state = self.shared.lock();
        state.kill(queue, sys::IBV_EVENT_QP_FATAL);
        state.disconnect_queue(queue);
    }

    /// Holds all completions of a device back, or lets them go: the work is done, and nobody is told.
    pub fn hold_completions(&self, device: usize, hold: bool) {
        let mut state = self.shared.lock();
        let Some(found) = state.devices.get_mut(device) else {
            return;
        };
        let mut due = Vec::new();
        for (&number, completions) in &mut found.completions {
            if hold {
                completions.held.get_or_insert_default();
            } else if let Some(held) = completions.held.take() {
                due.extend(held.into_iter().map(|completion| (number, completion)));
            }
        }
        for (number, completion) in due {
            state.enqueue(device, number, completion);
        }
    }

    // ---- what is there and what was seen ----

    /// Queue pairs of a device, by number.
    #[must_use]
    pub fn queues(&self, device: usize) -> Vec<QueuePairId> {
        let state = self.shared.lock();
        let found = state.devices.get(device);
        let numbers = found.into_iter().flat_map(|found| found.queues.keys());
        numbers
            .map(|&number| QueuePairId { device, number })
            .collect()
    }

    /// Whether a queue pair can send, whatever its owner thinks.
    #[must_use]
    pub fn is_ready(&self, queue: QueuePairId) -> bool {
        let state = self.shared.lock();
        state
            .queue(queue)
            .is_some_and(|queue| queue.hardware == Hardware::Ready)
    }

    /// Objects of a device that are alive, opened contexts included: none when every user is gone.
    #[must_use]
    pub fn objects(&self, device: usize) -> usize {
        let state = self.shared.lock();
        state
            .devices
            .get(device)
            .map_or(0, |found| found.objects() + found.contexts as usize)
    }

    /// Bytes of this process that no WRITE may touch any more, because their transfer has ended. WRITEs that land
    /// there all the same are counted in [`Counters::late_writes`].
    #[must_use]
    pub fn watch(&self, addresses: Range<u64>) -> WatchId {
        WatchId(self.shared.lock().watches.add(addresses))
    }

    /// The bytes belong to a new transfer.
    pub fn unwatch(&self, watch: WatchId) {
        self.shared.lock().watches.remove(watch.0);
    }

    /// Everything that was counted so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.lock().sum()
    }

    /// What a living queue pair has counted.
    #[must_use]
    pub fn queue_counters(&self, queue: QueuePairId) -> Option<QueueCounters> {
        let state = self.shared.lock();
        state.queue(queue).map(|queue| queue.counters)
    }

    /// How the completion queues of a device that are alive were looked at.
    #[must_use]
    pub fn watched(&self, device: usize) -> WatchCounters {
        let state = self.shared.lock();
        let found = state.devices.get(device).into_iter();
        let all = found.flat_map(|found| found.completions.values());
        all.fold(WatchCounters::default(), |sum, one| WatchCounters {
            polls: sum.polls + one.watched.polls,
            armed_for_any: sum.armed_for_any + one.watched.armed_for_any,
            armed_for_marked: sum.armed_for_marked + one.watched.armed_for_marked,
            events: sum.events + one.watched.events,
        })
    }

    /// Whether every completion queue of a device makes an event at its next completion, whatever that is.
    #[must_use]
    pub fn is_armed_for_any(&self, device: usize) -> bool {
        let state = self.shared.lock();
        let mut found = state.devices.get(device).into_iter();
        found.all(|found| {
            let mut queues = found.completions.values();
            queues.all(|queue| queue.armed == Armed::Any)
        })
    }

    /// What users of the library did that real hardware punishes, oldest first.
    #[must_use]
    pub fn violations(&self) -> Vec<Violation> {
        self.shared.lock().violations.clone()
    }

    /// For the end of a test: the fabric caught nobody.
    ///
    /// # Panics
    /// When it did, naming every violation, or when a WRITE landed in watched memory.
    #[track_caller]
    pub fn assert_clean(&self) {
        let (violations, counters) = (self.violations(), self.counters());
        assert!(
            violations.is_empty() && counters.violations == 0,
            "the fabric caught its user: {violations:#?}"
        );
        assert_eq!(counters.late_writes, 0, "bytes landed in watched memory");
    }
}
