//! The door of the scheduler: a bounded register of live requests, aborts, and the bell.
//!
//! A request is *live* from its submission until the scheduler has let go of all it held, which for a cancelled
//! transfer is later than its answer. The number of live requests is bounded, and their rooms are unique. Ids are
//! unique among unanswered requests: who has seen an answer may use its id again at once.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::job::Job;
use crate::pd::{Doorbell, Room};

/// Why a job was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Too many live requests: try later.
    #[error("The request queue is full ({live_max} live requests).")]
    Full {
        /// The bound.
        live_max: usize,
    },
    /// The id is in use.
    #[error("Duplicate request id: {0}")]
    DuplicateId(String),
    /// The room is in use.
    #[error("Duplicate bootstrap_room: {0} belongs to a live request")]
    DuplicateRoom(Room),
    /// The scheduler has stopped.
    #[error("The worker is shutting down.")]
    Stopped,
}

/// What the scheduler finds when it looks.
#[derive(Debug)]
pub(super) struct Inbox {
    /// New jobs, oldest first.
    pub(super) jobs: Vec<Job>,
    /// Ids to abort.
    pub(super) aborts: Vec<Target>,
    /// Whether to end; once true it stays true.
    pub(super) stop: bool,
}

/// Whom an abort means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Everyone.
    All,
    /// One request, or all members of a batch.
    Request(String),
}

impl Target {
    /// Whether it means the request `rid`: the id itself, or `id_N` for the members of a batch.
    #[must_use]
    pub fn matches(&self, rid: &str) -> bool {
        match self {
            Self::All => true,
            Self::Request(id) => rid.strip_prefix(id.as_str()).is_some_and(|rest| {
                let member = rest.strip_prefix('_').unwrap_or_default();
                rest.is_empty()
                    || (!member.is_empty() && member.bytes().all(|b| b.is_ascii_digit()))
            }),
        }
    }
}

/// Shared by the server's handlers (which submit) and the scheduler (which takes).
#[derive(Debug)]
pub struct Mailbox {
    live_max: usize,
    state: Mutex<State>,
    changed: Condvar,
    retired: Condvar,
}

#[derive(Debug, Default)]
struct State {
    jobs: Vec<Job>,
    aborts: Vec<Target>,
    stop: bool,
    live: usize,
    ids: BTreeSet<String>,
    rooms: BTreeSet<Room>,
    rung: bool,
    closed: bool,
}

/// Aborts waiting to be seen. More than that in one step of the scheduler are dropped: the client may ask again.
const ABORTS_MAX: usize = 1024;

impl Mailbox {
    /// A mailbox that accepts up to `live_max` live requests.
    #[must_use]
    pub fn new(live_max: usize) -> Arc<Self> {
        Arc::new(Self {
            live_max,
            state: Mutex::default(),
            changed: Condvar::new(),
            retired: Condvar::new(),
        })
    }

    /// Submits a batch: all of it or nothing.
    ///
    /// # Errors
    /// See [`SubmitError`].
    pub fn submit(&self, jobs: Vec<Job>) -> Result<(), SubmitError> {
        let mut state = self.state();
        if state.closed || state.stop {
            return Err(SubmitError::Stopped);
        }
        if state.live + jobs.len() > self.live_max {
            return Err(SubmitError::Full {
                live_max: self.live_max,
            });
        }
        let (mut ids, mut rooms) = (BTreeSet::new(), BTreeSet::new());
        for job in &jobs {
            if state.ids.contains(&job.rid) || !ids.insert(job.rid.clone()) {
                return Err(SubmitError::DuplicateId(job.rid.clone()));
            }
            let Some(room) = job.bootstrap.as_ref().map(|b| b.room) else {
                continue;
            };
            if state.rooms.contains(&room) || !rooms.insert(room) {
                return Err(SubmitError::DuplicateRoom(room));
            }
        }
        state.live += jobs.len();
        state.ids.append(&mut ids);
        state.rooms.append(&mut rooms);
        state.jobs.extend(jobs);
        drop(state);
        self.ring();
        Ok(())
    }

    /// Aborts what `target` means. Unknown ids are ignored, as in SGLang.
    pub fn abort(&self, target: Target) {
        let mut state = self.state();
        let known = match &target {
            Target::All => true,
            Target::Request(_) => state.ids.iter().any(|rid| target.matches(rid)),
        };
        if known && !state.aborts.contains(&target) && state.aborts.len() < ABORTS_MAX {
            state.aborts.push(target);
        }
        drop(state);
        self.ring();
    }

    /// Makes the scheduler look now.
    pub fn ring(&self) {
        self.state().rung = true;
        self.changed.notify_one();
    }

    /// A bell for the transfer link.
    #[must_use]
    pub fn doorbell(self: &Arc<Self>) -> Doorbell {
        let mailbox = Arc::downgrade(self);
        Doorbell::new(move || {
            if let Some(mailbox) = mailbox.upgrade() {
                mailbox.ring();
            }
        })
    }

    /// Asks the scheduler to abort everything and end.
    pub fn stop(&self) {
        self.state().stop = true;
        self.ring();
    }

    /// Whether the scheduler takes requests.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let state = self.state();
        !state.closed && !state.stop
    }

    /// Live requests.
    #[must_use]
    pub fn live(&self) -> usize {
        self.state().live
    }

    /// Waits until rung, at most `patience`, and takes everything.
    pub(super) fn take(&self, patience: Duration) -> Inbox {
        let mut state = self.state();
        if !state.rung && !patience.is_zero() {
            state = self
                .changed
                .wait_timeout_while(state, patience, |s| !s.rung)
                .map_or_else(|e| e.into_inner().0, |(state, _)| state);
        }
        state.rung = false;
        Inbox {
            jobs: std::mem::take(&mut state.jobs),
            aborts: std::mem::take(&mut state.aborts),
            stop: state.stop,
        }
    }

    /// The request is about to be answered: its id may be used again.
    pub(super) fn free_id(&self, rid: &str) {
        self.state().ids.remove(rid);
    }

    /// Ends a request's life: its room may be used again.
    pub(super) fn retire(&self, room: Option<Room>) {
        let mut state = self.state();
        state.live -= 1;
        if let Some(room) = room {
            state.rooms.remove(&room);
        }
        drop(state);
        self.retired.notify_all();
    }

    /// Waits until no request is live, at most `patience`. Returns whether that is so.
    #[must_use]
    pub fn wait_until_idle(&self, patience: Duration) -> bool {
        let busy = |state: &mut State| state.live > 0;
        let waited = self
            .retired
            .wait_timeout_while(self.state(), patience, busy);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.live == 0
    }

    /// The scheduler is gone; jobs that it never saw are dropped, which their readers notice.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.jobs.clear();
        state.live = 0;
        state.ids.clear();
        state.rooms.clear();
        drop(state);
        self.retired.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every critical section leaves the sets consistent, so a panic elsewhere does not spoil them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::job::Sampling;
    use super::*;
    use crate::pd::Bootstrap;

    fn job(rid: &str, room: Option<u64>) -> Job {
        let sampling = Sampling {
            max_new_tokens: 1,
            temperature: 0.0,
            seed: 0,
            stop: vec![],
            ignore_eos: false,
        };
        let (events, _) = tokio::sync::mpsc::channel(sampling.events_max());
        let bootstrap = room.map(|n| Bootstrap {
            host: "localhost".to_owned(),
            port: 1,
            room: Room::new(n).expect("valid"),
        });
        Job {
            rid: rid.to_owned(),
            prompt: vec![1],
            sampling,
            bootstrap,
            events,
        }
    }

    #[test]
    fn live_requests_are_bounded_and_unique() {
        let mailbox = Mailbox::new(3);
        assert_eq!(mailbox.submit(vec![job("a", Some(1))]), Ok(()));
        assert_eq!(
            mailbox.submit(vec![job("a", Some(2))]),
            Err(SubmitError::DuplicateId("a".to_owned()))
        );
        let room = Room::new(1).expect("valid");
        assert_eq!(
            mailbox.submit(vec![job("b", Some(1))]),
            Err(SubmitError::DuplicateRoom(room))
        );
        // Inside one batch too; and a refused batch leaves nothing behind.
        assert_eq!(
            mailbox.submit(vec![job("b", Some(9)), job("c", Some(9))]),
            Err(SubmitError::DuplicateRoom(Room::new(9).expect("valid")))
        );
        assert_eq!(mailbox.live(), 1);
        assert_eq!(
            mailbox.submit(vec![job("b", Some(9)), job("c", Some(8))]),
            Ok(())
        );
        assert_eq!(
            mailbox.submit(vec![job("d", None)]),
            Err(SubmitError::Full { live_max: 3 })
        );
        // Taking a job does not end its life; retiring does.
        assert_eq!(mailbox.take(Duration::ZERO).jobs.len(), 3);
        assert_eq!(
            mailbox.submit(vec![job("d", None)]),
            Err(SubmitError::Full { live_max: 3 })
        );
        // An answered request frees its id, but is live until it holds nothing.
        mailbox.free_id("a");
        let full = Err(SubmitError::Full { live_max: 3 });
        assert_eq!(mailbox.submit(vec![job("a", None)]), full);
        mailbox.retire(Some(room));
        assert_eq!(mailbox.submit(vec![job("d", Some(1))]), Ok(()));
    }

    #[test]
    fn a_stop_is_seen_again_and_refuses_newcomers() {
        let mailbox = Mailbox::new(3);
        mailbox.stop();
        assert!(mailbox.take(Duration::ZERO).stop);
        assert!(mailbox.take(Duration::ZERO).stop);
        assert_eq!(
            mailbox.submit(vec![job("a", None)]),
            Err(SubmitError::Stopped)
        );
    }

    #[test]
    fn aborts_are_bounded_and_name_batches() {
        let target = Target::Request("req".to_owned());
        for (rid, hit) in [
            ("req", true),
            ("req_0", true),
            ("req_12", true),
            ("req_", false),
            ("req_x", false),
        ] {
            assert_eq!(target.matches(rid), hit, "{rid}");
        }
        assert!(!target.matches("request"));
        let mailbox = Mailbox::new(2000);
        for i in 0..ABORTS_MAX + 10 {
            mailbox
                .submit(vec![job(&format!("r{i}"), None)])
                .expect("room for all");
            mailbox.abort(Target::Request(format!("r{i}")));
        }
        mailbox.abort(Target::Request("nobody".to_owned()));
        assert_eq!(mailbox.take(Duration::ZERO).aborts.len(), ABORTS_MAX);
    }

    #[test]
    fn a_bell_wakes_a_sleeping_scheduler() {
        let mailbox = Mailbox::new(1);
        let bell = mailbox.doorbell();
        let sleeper = {
            let mailbox = mailbox.clone();
            std::thread::spawn(move || mailbox.take(Duration::from_secs(3600)).jobs.len())
        };
        bell.ring();
        assert_eq!(sleeper.join().expect("no panic"), 0);
    }
}
