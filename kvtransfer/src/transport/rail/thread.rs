//! The thread of a rail: it owns every queue pair of one device, and nobody else destroys one.
//!
//! It looks at the completion queues while there is work, then arms them and sleeps until one of them, a request of another
//! thread, a word of a peer, an event of the device or a deadline wakes it. A thread that waits for its own small transfer
//! may take its place for some microseconds ([`QueuePairLane::drive`]): what has to be locked is the whole core, so there
//! is one owner at any time.

use std::{
    os::fd::{AsFd, AsRawFd},
    sync::{Arc, PoisonError, TryLockError, atomic::Ordering},
    thread,
    time::Duration,
};

use mio::{Events, Interest, Poll, Token, unix::SourceFd};

use super::{
    Rail,
    lane::{LaneIo, Phase, QueuePairLane},
    requests::{Key, Request},
};
use crate::{
    clock,
    time::Time,
    transport::verbs::{context::EventTarget, events},
};

pub(super) const WAKE: Token = Token(0);
const EVENTS: Token = Token(1);
/// Tokens of a queue pair: completions, the connection beside it, rdma_cm.
const TOKENS: usize = 3;
const FIRST: usize = 2;

/// Longest sleep: a bound on what a lost wake-up could cost.
const SLEEP_MAX: Duration = Duration::from_secs(1);

/// While another thread drives, the rail's thread looks so often whether it still does.
const DRIVEN_SLEEP: Duration = Duration::from_millis(1);

/// While there is work, descriptors are looked at so often: a queue pair that is waited for may have died, and only an event
/// of the device or a word of the peer says so.
const LOOK_PERIOD: Duration = Duration::from_micros(200);

#[derive(Default)]
struct Place {
    life: u32,
    lane: Option<Box<LaneIo>>,
}

/// Every queue pair of a rail.
#[derive(Default)]
pub(super) struct Core {
    places: Vec<Place>,
}

/// What a look at every queue pair found.
#[derive(Clone, Copy, Debug, Default)]
struct Turn {
    /// Something happened.
    has_moved: bool,
    /// Something happened a moment ago at a queue pair: more may come.
    is_busy: bool,
}

impl Core {
    fn lanes(&mut self) -> impl Iterator<Item = &mut Box<LaneIo>> {
        self.places
            .iter_mut()
            .filter_map(|place| place.lane.as_mut())
    }

    fn find(&mut self, key: Key) -> Option<&mut Box<LaneIo>> {
        let place = self.places.get_mut(key.place as usize)?;
        place.lane.as_mut().filter(|_| place.life == key.life)
    }

    /// A place for a queue pair to come.
    pub(super) fn reserve(&mut self) -> Key {
        let taken = |place: &Place| place.lane.is_some() || place.life % 2 == 1;
        let index = self.places.iter().position(|place| !taken(place));
        let index = index.unwrap_or_else(|| {
            self.places.push(Place::default());
            self.places.len() - 1
        });
        let place = &mut self.places[index];
        // Odd while it is taken.
        place.life = place.life.wrapping_add(1);
        Key {
            place: u32::try_from(index)
                .expect("invariant: devices have fewer than 2^32 queue pairs"),
            life: place.life,
        }
    }

    /// Gives a place back.
    pub(super) fn release(&mut self, key: Key) {
        if let Some(place) = self.places.get_mut(key.place as usize)
            && place.life == key.life
        {
            place.lane = None;
            place.life = place.life.wrapping_add(1);
        }
    }

    /// Whether a queue pair is on its way here.
    fn awaits_lane(&self) -> bool {
        let is_reserved = |place: &Place| place.lane.is_none() && place.life % 2 == 1;
        self.places.iter().any(is_reserved)
    }

    fn next_timeout(&mut self, rail: &Rail) -> Time {
        let heartbeat = rail.settings.heartbeat;
        let next = self.lanes().map(|lane| lane.next_timeout(heartbeat));
        next.min().unwrap_or(Time::NEVER)
    }

    /// Looks at every queue pair that is not asleep.
    fn turn(&mut self, rail: &Rail, now: Time) -> Turn {
        let mut turn = Turn::default();
        let (drain, spin) = (rail.settings.drain, rail.settings.spin);
        for place in &mut self.places {
            let Some(lane) = &mut place.lane else {
                continue;
            };
            let kicked = lane.handle.kicked.swap(false, Ordering::SeqCst);
            let is_due = lane.is_due(now, rail.settings.heartbeat);
            if lane.is_armed && !kicked && !is_due {
                continue;
            }
            if is_due {
                lane.on_time(now, rail.settings.heartbeat, drain);
            }
            let moved = lane.poll(now).and_then(|polled| {
                lane.report(kicked);
                Ok(lane.pump(rail, now)? || polled)
            });
            match moved {
                Ok(moved) => turn.has_moved |= moved,
                Err(reason) => {
                    turn.has_moved = true;
                    lane.drain(now, drain, reason);
                }
            }
            turn.has_moved |= lane.destroy_if_drained(now);
            turn.is_busy |= now < lane.last_active + spin;
            if lane.is_settled()
                && let Some(lane) = place.lane.take()
            {
                turn.has_moved = true;
                place.life = place.life.wrapping_add(1);
                lane.settle();
            }
        }
        turn
    }

    /// Arms every completion queue that is awake. Returns whether one of them had something after all.
    fn arm(&mut self, now: Time, drain: Duration) -> bool {
        let mut has_moved = false;
        for lane in self.lanes().filter(|lane| !lane.is_armed) {
            let armed = match &lane.wires {
                Some(wires) => wires.cq.arm(false).map_err(|error| error.to_string()),
                None => Ok(()),
            };
            // What completed before it was armed makes no event.
            match armed.and_then(|()| lane.poll(now)) {
                Ok(moved) => {
                    lane.is_armed = !moved;
                    has_moved |= moved;
                }
                Err(reason) => {
                    has_moved = true;
                    lane.drain(now, drain, reason);
                }
            }
        }
        has_moved
    }
}

impl Rail {
    /// Runs until the rail is stopped or its device lost, and its last queue pair is gone.
    pub(super) fn run(self: &Arc<Self>, mut poll: Poll) {
        let mut events = Events::with_capacity(256);
        let event_fd = self.context.async_fd().as_raw_fd();
        let listened =
            poll.registry()
                .register(&mut SourceFd(&event_fd), EVENTS, Interest::READABLE);
        if let Err(error) = listened {
            tracing::warn!(rail = self.name, %error, "events of the device are not seen");
        }
        let mut looked_at = Time(0);
        loop {
            let mut core = self.lock();
            self.apply(&mut core, &poll);
            let is_lost = self.is_lost.load(Ordering::SeqCst) && !core.awaits_lane();
            let is_ending = is_lost || self.is_stopped.load(Ordering::SeqCst);
            if is_ending && core.lanes().next().is_none() {
                let requests = self.lock_requests();
                if requests.is_empty() {
                    self.is_over.store(true, Ordering::SeqCst);
                    return;
                }
                continue;
            }
            let is_driven = self.drivers.load(Ordering::SeqCst) > 0;
            if !is_driven {
                let now = clock::now();
                let turn = core.turn(self, now);
                if turn.has_moved || turn.is_busy {
                    drop(core);
                    if now >= looked_at + LOOK_PERIOD {
                        looked_at = now;
                        self.look(&mut poll, &mut events, Duration::ZERO);
                    } else if !turn.has_moved {
                        thread::yield_now();
                    }
                    continue;
                }
                if core.arm(now, self.settings.drain) {
                    continue;
                }
            }
            let until = core.next_timeout(self);
            drop(core);
            self.sleep(&mut poll, &mut events, until, is_driven);
        }
    }

    /// Waits for what the descriptors say, and deals with it.
    fn look(&self, poll: &mut Poll, events: &mut Events, wait: Duration) {
        events.clear();
        if let Err(error) = poll.poll(events, Some(wait))
            && error.kind() != std::io::ErrorKind::Interrupted
        {
            tracing::error!(rail = self.name, %error, "the rail's thread cannot sleep");
            thread::sleep(DRIVEN_SLEEP);
        }
        self.is_asleep.store(false, Ordering::SeqCst);
        let mut core = self.lock();
        self.wake(&mut core, events);
    }

    fn sleep(&self, poll: &mut Poll, events: &mut Events, until: Time, is_driven: bool) {
        let most = if is_driven { DRIVEN_SLEEP } else { SLEEP_MAX };
        self.is_asleep.store(true, Ordering::SeqCst);
        // A request made after this sees that the thread sleeps; one made before is seen here.
        let has_requests = !self.lock_requests().is_empty();
        let wait = until.since(clock::now()).min(most);
        let wait = if has_requests { Duration::ZERO } else { wait };
        self.look(poll, events, wait);
    }

    /// Deals with what woke the thread.
    fn wake(&self, core: &mut Core, events: &Events) {
        let (now, drain) = (clock::now(), self.settings.drain);
        for event in events {
            let token = event.token();
            if token == EVENTS {
                self.on_device_events(core, now);
            }
            let Some(number) = token.0.checked_sub(FIRST) else {
                continue;
            };
            let place = core.places.get_mut(number / TOKENS);
            let Some(lane) = place.and_then(|place| place.lane.as_mut()) else {
                continue;
            };
            match number % TOKENS {
                0 => {
                    lane.is_armed = false;
                    if let Some(wires) = &lane.wires
                        && let Err(error) = wires.cq.drain_events()
                    {
                        lane.drain(now, drain, error.to_string());
                    }
                }
                1 => {
                    lane.is_armed = false;
                    lane.on_side(now, drain);
                }
                _ => {
                    lane.is_armed = false;
                    lane.on_connection(now, drain);
                }
            }
        }
    }

    fn on_device_events(&self, core: &mut Core, now: Time) {
        loop {
            let event = match self.context.next_event() {
                Ok(Some(event)) => event,
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(rail = self.name, %error, "reading the device's events");
                    return;
                }
            };
            let words = events::words(event.kind);
            tracing::info!(rail = self.name, kind = event.kind, target = ?event.target, words, "device event");
            let reason = format!("{}: {words}", self.name);
            let is_hit = |lane: &LaneIo| match (event.target, &lane.wires) {
                (_, None) => false,
                (EventTarget::Qp(number), Some(wires)) => {
                    events::kills_queue_pair(event.kind) && wires.qp.qp_num() == number
                }
                (EventTarget::Cq(key), Some(wires)) => wires.cq.key() == key,
                (EventTarget::Port(_) | EventTarget::Device, Some(_)) => {
                    events::kills_device(event.kind)
                }
            };
            for lane in core.lanes().filter(|lane| is_hit(lane)) {
                lane.is_armed = false;
                lane.drain(now, self.settings.drain, reason.clone());
            }
            if events::loses_device(event.kind) {
                self.is_lost.store(true, Ordering::SeqCst);
            }
        }
    }

    /// Does what other threads have asked for.
    fn apply(&self, core: &mut Core, poll: &Poll) {
        let requests = std::mem::take(&mut *self.lock_requests());
        if requests.is_empty() {
            return;
        }
        let (now, drain) = (clock::now(), self.settings.drain);
        for request in requests {
            match request {
                Request::Adopt(mut lane) => {
                    if self.is_lost.load(Ordering::SeqCst) {
                        lane.drain(now, drain, self.lost());
                    }
                    adopt(core, poll, lane);
                }
                Request::Kick(key) => {
                    if let Some(lane) = core.find(key) {
                        lane.is_armed = false;
                        lane.handle.kicked.store(true, Ordering::SeqCst);
                    }
                }
                Request::Fence(key, reason) => {
                    if let Some(lane) = core.find(key) {
                        lane.is_armed = false;
                        lane.drain(now, drain, reason);
                    }
                }
                Request::Close(key) => {
                    if let Some(lane) = core.find(key) {
                        lane.is_armed = false;
                        lane.is_closing = true;
                        lane.drain(now, drain, "the peer is gone".to_owned());
                    }
                }
            }
        }
    }

    /// Asks the rail's thread for something.
    pub(super) fn request(&self, request: Request) {
        let mut requests = self.lock_requests();
        if self.is_over.load(Ordering::SeqCst) {
            // A queue pair that comes too late is destroyed with its request, by who brought it.
            drop(requests);
            drop(request);
            return;
        }
        requests.push(request);
        drop(requests);
        if self.is_asleep.load(Ordering::SeqCst)
            && let Err(error) = self.waker.wake()
        {
            tracing::error!(rail = self.name, %error, "waking the rail's thread");
        }
    }
}

fn adopt(core: &mut Core, poll: &Poll, lane: Box<LaneIo>) {
    let key = lane.handle.key;
    let first = FIRST + key.place as usize * TOKENS;
    let registry = poll.registry();
    let listen = |fd: i32, token: usize| {
        let listened = registry.register(&mut SourceFd(&fd), Token(token), Interest::READABLE);
        if let Err(error) = listened {
            // Its deadlines still end it.
            tracing::warn!(%error, "a descriptor of a queue pair is not listened to");
        }
    };
    if let Some(wires) = &lane.wires {
        if let Some(fd) = wires.cq.fd() {
            listen(fd.as_raw_fd(), first);
        }
        if let Some(connection) = &wires.connection {
            listen(connection.channel.fd().as_raw_fd(), first + 2);
        }
    }
    listen(lane.side.socket.as_fd().as_raw_fd(), first + 1);
    if let Some(place) = core.places.get_mut(key.place as usize)
        && place.life == key.life
    {
        place.lane = Some(lane);
    }
}

impl QueuePairLane {
    /// Posts in the calling thread if nobody else has the rail. Returns whether it did.
    pub(crate) fn try_pump(&self) -> bool {
        let mut core = match self.rail.core.try_lock() {
            Ok(core) => core,
            Err(TryLockError::Poisoned(core)) => core.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        let now = clock::now();
        let Some(lane) = core.find(self.key) else {
            return false;
        };
        if let Err(reason) = lane.pump(&self.rail, now) {
            lane.drain(now, self.rail.settings.drain, reason);
        }
        matches!(lane.phase, Phase::Up)
    }

    /// Takes the place of the rail's thread while the lane's batches are unanswered, for some microseconds. Returns false if
    /// no answer came: then the rail's thread goes on and wakes the caller.
    pub(crate) fn drive(&self) -> bool {
        let rail = &self.rail;
        if rail.settings.spin.is_zero() {
            return false;
        }
        if rail.drivers.fetch_add(1, Ordering::SeqCst) > 0 {
            rail.drivers.fetch_sub(1, Ordering::SeqCst);
            return false;
        }
        let until = clock::now() + rail.settings.spin * 4;
        // Whether an answer came, and whether the rail's thread must look because nothing else would wake it.
        let (has_answer, is_left, core) = loop {
            let now = clock::now();
            let mut core = rail.core.lock().unwrap_or_else(PoisonError::into_inner);
            let before = core.find(self.key).map(|lane| (lane.acked, lane.given));
            let Some((acked, given)) = before.filter(|(acked, given)| acked < given) else {
                // Answered meanwhile, or the queue pair is gone.
                break (true, true, core);
            };
            if let Some(lane) = core.find(self.key) {
                lane.is_armed = false;
            }
            core.turn(rail, now);
            let after = core.find(self.key).map_or(given, |lane| lane.acked);
            // A queue pair that ended meanwhile counts as answered: its failure has woken the caller.
            if after > acked {
                break (true, self.leave(&mut core, now), core);
            }
            if now >= until {
                break (false, true, core);
            }
            drop(core);
            std::hint::spin_loop();
        };
        // Under the lock: an event that comes now must find the rail's thread in charge again.
        rail.drivers.fetch_sub(1, Ordering::SeqCst);
        drop(core);
        if is_left {
            self.kick();
        }
        has_answer
    }

    /// Arms what was looked at here, so that the rail's thread may go on sleeping: waking it costs more than the whole
    /// transfer. Returns whether it must be woken even so.
    fn leave(&self, core: &mut Core, now: Time) -> bool {
        let has_moved = core.arm(now, self.rail.settings.drain);
        let is_sleeping = core
            .lanes()
            .all(|lane| lane.is_armed && matches!(lane.phase, Phase::Up) && !lane.has_work());
        has_moved || !is_sleeping
    }
}
