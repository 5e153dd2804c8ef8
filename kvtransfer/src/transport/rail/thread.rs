//! The thread of a rail: it owns every queue pair of one device, and nobody else destroys one.
//!
//! It looks at the completion queues while there is work, then arms them and sleeps until one of them, a request of another
//! thread, a word of a peer, an event of the device or a deadline wakes it. A thread that waits for its own small transfer
//! may take its place for some microseconds (`drive`): what has to be locked is the whole core, so there is one owner at
//! any time. While threads do so again and again, this one stays *near*: it looks every few milliseconds, and the queues that
//! they leave are armed for frames that the peer marked only. So their answers make no event and wake nobody.

use std::{
    os::fd::{AsFd, AsRawFd},
    sync::{Arc, atomic::Ordering},
    thread,
    time::Duration,
};

use mio::{Events, Interest, Poll, Token, unix::SourceFd};

use super::{
    Rail,
    lane::{LaneIo, Watch},
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

/// While other threads drive, and for some looks after that, the rail's thread looks so often. It bounds how long an answer
/// lies there whose thread was expected to wait for it, and did not.
const NEAR_SLEEP: Duration = Duration::from_millis(4);

/// Looks without anybody having driven after which the rail's thread sleeps until something happens.
const NEAR_LOOKS: u32 = 3;

/// While there is work, descriptors are looked at so often: a queue pair that is waited for may have died, and only an event
/// of the device or a word of the peer says so.
const LOOK_PERIOD: Duration = Duration::from_micros(200);

/// Turns without a find between two yields: a yield is a system call, and where every processor spins it is what lets
/// the thread run that is waited for.
const TURNS_PER_YIELD: u32 = 32;

#[derive(Default)]
struct Place {
    life: u32,
    lane: Option<Box<LaneIo>>,
}

/// Every queue pair of a rail.
#[derive(Default)]
pub(super) struct Core {
    places: Vec<Place>,
    /// How often another thread has taken an answer in place of the rail's, or is about to.
    pub(super) drives: u64,
}

/// What the rail's thread listens with.
struct Ears {
    poll: Poll,
    events: Events,
    /// What was heard and not dealt with yet, each token once.
    heard: Vec<Token>,
}

/// What the rail's thread does between two turns while there is work.
#[derive(Default)]
struct Pace {
    looked_at: Option<Time>,
    empty_turns: u32,
}

impl Pace {
    fn is_time_to_look(&mut self, now: Time) -> bool {
        let is_time = self
            .looked_at
            .is_none_or(|before| now >= before + LOOK_PERIOD);
        if is_time {
            self.looked_at = Some(now);
        }
        is_time
    }

    fn spin(&mut self, has_moved: bool) {
        self.empty_turns = if has_moved { 0 } else { self.empty_turns + 1 };
        if self.empty_turns >= TURNS_PER_YIELD {
            self.empty_turns = 0;
            thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
}

impl Ears {
    /// Whether there is anything but completions of the queue pair that another thread looks at just now.
    fn has_urgent(&self, driven: u32) -> bool {
        let completions = Token(FIRST + driven as usize * TOKENS);
        self.heard.iter().any(|token| *token != completions)
    }
}

/// What a look at every queue pair found.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Turn {
    /// Something happened.
    has_moved: bool,
    /// Something happened a moment ago at a queue pair: more may come.
    is_busy: bool,
}

impl Core {
    pub(super) fn lanes(&mut self) -> impl Iterator<Item = &mut Box<LaneIo>> {
        self.places
            .iter_mut()
            .filter_map(|place| place.lane.as_mut())
    }

    pub(super) fn find(&mut self, key: Key) -> Option<&mut Box<LaneIo>> {
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

    /// Looks at every queue pair that is not asleep, and at the one that is driven.
    pub(super) fn turn(&mut self, rail: &Rail, now: Time, driven: Option<Key>) -> Turn {
        let mut turn = Turn::default();
        let (drain, spin) = (rail.settings.drain, rail.settings.spin);
        for place in &mut self.places {
            let Some(lane) = &mut place.lane else {
                continue;
            };
            let kicked = lane.handle.take_kick();
            let is_due = lane.is_due(now, rail.settings.heartbeat);
            let is_driven = driven == Some(lane.handle.key);
            if lane.is_asleep() && !kicked && !is_due && !is_driven {
                continue;
            }
            if is_due {
                lane.on_time(now, rail.settings.heartbeat, drain);
            }
            let moved = lane.poll(now).and_then(|polled| {
                lane.report(kicked);
                // Whatever could not be posted before waits for a completion, for a credit, or for a word of the node.
                let has_cause = lane.is_stirred || kicked || is_due;
                lane.is_hungry |= kicked || is_due;
                Ok(has_cause && lane.pump(rail, now)? || polled)
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
                lane.settle(now);
            }
        }
        turn
    }

    /// Arms every completion queue that is awake, or not as wakeful as it must be. Returns whether one of them had something
    /// after all.
    pub(super) fn arm(&mut self, now: Time, drain: Duration, is_near: bool) -> bool {
        let mut has_moved = false;
        for lane in self.lanes() {
            match lane.arm(now, is_near) {
                Ok(moved) => has_moved |= moved,
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
    pub(super) fn run(self: &Arc<Self>, poll: Poll) {
        let event_fd = self.context.async_fd().as_raw_fd();
        let listened =
            poll.registry()
                .register(&mut SourceFd(&event_fd), EVENTS, Interest::READABLE);
        if let Err(error) = listened {
            tracing::warn!(rail = self.name, %error, "events of the device are not seen");
        }
        let mut ears = Ears {
            poll,
            events: Events::with_capacity(256),
            heard: Vec::new(),
        };
        let mut pace = Pace::default();
        let (mut drives, mut quiet_looks) = (0, NEAR_LOOKS);
        loop {
            if let Some(driven) = self.driven()
                && self.lock_requests().is_empty()
                && !ears.has_urgent(driven)
            {
                // Whoever drives needs the lock more: it is not asked for.
                self.is_near.store(true, Ordering::SeqCst);
                self.sleep(&mut ears, Time::NEVER, NEAR_SLEEP);
                continue;
            }
            let mut core = self.lock();
            self.apply(&mut core, &ears.poll);
            self.wake(&mut core, &mut ears.heard);
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
            if self.driven().is_some() {
                // What there was to hear is marked in the lanes, where whoever drives sees it.
                continue;
            }
            let now = clock::now();
            let turn = core.turn(self, now, None);
            let has_driven = drives != core.drives;
            // It does not spin beside threads that drive: they look often enough.
            if turn.has_moved || (turn.is_busy && !has_driven) {
                drop(core);
                if pace.is_time_to_look(now) {
                    self.listen(&mut ears, Duration::ZERO);
                } else {
                    pace.spin(turn.has_moved);
                }
                continue;
            }
            drives = core.drives;
            quiet_looks = if has_driven {
                0
            } else {
                quiet_looks.saturating_add(1)
            };
            // Under the lock: who leaves a queue armed for marked frames only must find this thread near.
            let is_near = quiet_looks < NEAR_LOOKS;
            self.is_near.store(is_near, Ordering::SeqCst);
            if core.arm(now, self.settings.drain, is_near) {
                continue;
            }
            let until = core.next_timeout(self);
            drop(core);
            self.sleep(
                &mut ears,
                until,
                if is_near { NEAR_SLEEP } else { SLEEP_MAX },
            );
        }
    }

    /// The place of the queue pair for which another thread has them all.
    pub(super) fn driven(&self) -> Option<u32> {
        self.driver.load(Ordering::SeqCst).checked_sub(1)
    }

    /// Waits for what the descriptors say.
    fn listen(&self, ears: &mut Ears, wait: Duration) {
        let Ears {
            poll,
            events,
            heard,
        } = ears;
        events.clear();
        if let Err(error) = poll.poll(events, Some(wait))
            && error.kind() != std::io::ErrorKind::Interrupted
        {
            tracing::error!(rail = self.name, %error, "the rail's thread cannot sleep");
            thread::sleep(NEAR_SLEEP);
        }
        for event in &*events {
            let token = event.token();
            if token != WAKE && !heard.contains(&token) {
                heard.push(token);
            }
        }
    }

    fn sleep(&self, ears: &mut Ears, until: Time, most: Duration) {
        self.is_asleep.store(true, Ordering::SeqCst);
        // A request made after this sees that the thread sleeps; one made before is seen here.
        let has_requests = !self.lock_requests().is_empty();
        let wait = until.since(clock::now()).min(most);
        let wait = if has_requests { Duration::ZERO } else { wait };
        self.listen(ears, wait);
        self.is_asleep.store(false, Ordering::SeqCst);
    }

    /// Deals with what woke the thread.
    fn wake(&self, core: &mut Core, heard: &mut Vec<Token>) {
        if heard.is_empty() {
            return;
        }
        let (now, drain) = (clock::now(), self.settings.drain);
        for token in heard.drain(..) {
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
            lane.watch = Watch::Nothing;
            match number % TOKENS {
                0 => {
                    if let Some(wires) = &lane.wires
                        && let Err(error) = wires.cq.take_event()
                    {
                        lane.drain(now, drain, error.to_string());
                    }
                }
                1 => lane.on_side(now, drain),
                _ => lane.on_connection(now, drain),
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
                lane.watch = Watch::Nothing;
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
                        lane.watch = Watch::Nothing;
                        lane.handle.kicked.store(true, Ordering::SeqCst);
                    }
                }
                Request::Fence(key, reason) => {
                    if let Some(lane) = core.find(key) {
                        lane.watch = Watch::Nothing;
                        lane.drain(now, drain, reason);
                    }
                }
                Request::Close(key) => {
                    if let Some(lane) = core.find(key) {
                        lane.watch = Watch::Nothing;
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
        // It has a hello to say, or to wait for.
        lane.handle.kicked.store(true, Ordering::SeqCst);
        place.lane = Some(lane);
    }
}
