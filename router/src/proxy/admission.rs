//! How many requests may be at work, and who waits for a place.
//!
//! Places are handed out by priority, then by arrival. When the queue is full the request of the lowest priority is turned
//! away, which may be the one that just came: so load is shed from the bottom.
#![forbid(unsafe_code)]

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

/// Why a request got no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The queue is full of requests at least as important.
    QueueFull,
    /// No place became free in time.
    TooLate,
}

/// The order of the queue: highest priority first, then first come, first served.
type Turn = (Reverse<i64>, u64);

#[derive(Debug)]
struct Waiter {
    places: usize,
    tell: oneshot::Sender<Result<Permit, Refused>>,
}

#[derive(Debug)]
struct State {
    places: usize,
    queue_max: usize,
    taken: usize,
    arrivals: u64,
    waiting: BTreeMap<Turn, Waiter>,
}

/// The places of one router.
#[derive(Debug)]
pub struct Admission {
    state: Mutex<State>,
}

/// Places that belong to one request until this is dropped.
#[derive(Debug)]
pub struct Permit {
    admission: Arc<Admission>,
    places: usize,
}

/// Removes a waiter whose client has gone.
struct Leave<'a> {
    admission: &'a Arc<Admission>,
    turn: Turn,
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        let left = self.admission.lock().waiting.remove(&self.turn);
        if left.is_some() {
            // Those behind may need fewer places.
            self.admission.hand_out();
        }
    }
}

impl Admission {
    /// `places` for requests, `queue_max` of which may wait.
    pub fn new(places: usize, queue_max: usize) -> Self {
        Self {
            state: Mutex::new(State {
                places,
                queue_max,
                taken: 0,
                arrivals: 0,
                waiting: BTreeMap::new(),
            }),
        }
    }

    /// So many places and so much of a queue from now on. Those who have a place keep it, and so do those who wait.
    pub fn resize(self: &Arc<Self>, places: usize, queue_max: usize) {
        {
            let mut state = self.lock();
            state.places = places;
            state.queue_max = queue_max;
        }
        self.hand_out();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Places in use.
    pub fn taken(&self) -> usize {
        self.lock().taken
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    /// Takes `places` (a request that needs more than there are gets all), waiting for them if it must.
    ///
    /// # Errors
    /// [`Refused`]
    pub async fn enter(
        self: &Arc<Self>,
        places: usize,
        priority: i64,
        patience: Duration,
    ) -> Result<Permit, Refused> {
        let (turn, told, shed) = {
            let mut state = self.lock();
            let places = places.clamp(1, state.places);
            if state.waiting.is_empty() && state.taken + places <= state.places {
                state.taken += places;
                return Ok(Permit {
                    admission: Arc::clone(self),
                    places,
                });
            }
            let shed = if state.waiting.len() < state.queue_max {
                None
            } else {
                let last = state.waiting.last_entry().ok_or(Refused::QueueFull)?;
                if last.key().0 <= Reverse(priority) {
                    return Err(Refused::QueueFull);
                }
                Some(last.remove())
            };
            state.arrivals += 1;
            let turn = (Reverse(priority), state.arrivals);
            let (tell, told) = oneshot::channel();
            state.waiting.insert(turn, Waiter { places, tell });
            (turn, told, shed)
        };
        if let Some(waiter) = shed {
            // If its client has gone there is nobody to tell.
            let _ = waiter.tell.send(Err(Refused::QueueFull));
            // It may have been the one that all others wait behind.
            self.hand_out();
        }
        let _leave = Leave {
            admission: self,
            turn,
        };
        match tokio::time::timeout(patience, told).await {
            Ok(Ok(outcome)) => outcome,
            // The sender is only dropped unused when this waiter was removed, which only this function does.
            Ok(Err(_)) | Err(_) => Err(Refused::TooLate),
        }
    }

    /// Gives free places to those whose turn it is.
    fn hand_out(self: &Arc<Self>) {
        loop {
            let mut state = self.lock();
            let Some(first) = state.waiting.first_entry() else {
                return;
            };
            let (wanted, turn) = (first.get().places, *first.key());
            // There may be fewer than when it began to wait.
            let places = wanted.min(state.places);
            if state.taken + places > state.places {
                return;
            }
            state.taken += places;
            let waiter = state.waiting.remove(&turn);
            drop(state);
            let permit = Permit {
                admission: Arc::clone(self),
                places,
            };
            if let Some(waiter) = waiter {
                // A waiter that has gone returns the permit inside the error, whose drop hands the places on.
                drop(waiter.tell.send(Ok(permit)));
            }
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.lock().taken -= self.places;
        self.admission.hand_out();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn admission(places: usize, queue: usize) -> Arc<Admission> {
        Arc::new(Admission::new(places, queue))
    }

    /// Enters and waits until the request stands in the queue.
    async fn queued(
        admission: &Arc<Admission>,
        places: usize,
        priority: i64,
    ) -> tokio::task::JoinHandle<Result<Permit, Refused>> {
        let (here, before) = (Arc::clone(admission), admission.waiting());
        let waiting = tokio::spawn(async move { here.enter(places, priority, PATIENCE).await });
        while admission.waiting() == before && !waiting.is_finished() {
            tokio::task::yield_now().await;
        }
        waiting
    }

    #[tokio::test(start_paused = true)]
    async fn places_go_by_priority_then_arrival() {
        let admission = admission(1, 10);
        let mut held = admission.enter(1, 0, PATIENCE).await.unwrap();
        let mut queue = Vec::new();
        for (name, priority) in [("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1)] {
            queue.push((name, queued(&admission, 1, priority).await));
        }
        let mut order = Vec::new();
        while !queue.is_empty() {
            drop(held);
            loop {
                tokio::task::yield_now().await;
                if let Some(at) = queue.iter().position(|(_, waiting)| waiting.is_finished()) {
                    let (name, waiting) = queue.remove(at);
                    order.push(name);
                    held = waiting.await.unwrap().unwrap();
                    break;
                }
            }
            assert_eq!(admission.taken(), 1);
        }
        assert_eq!(order, ["b", "d", "a", "c", "e"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_queue_sheds_the_least_important() {
        let admission = admission(1, 2);
        let held = admission.enter(1, 0, PATIENCE).await.unwrap();
        let low = queued(&admission, 1, -1).await;
        let normal = queued(&admission, 1, 0).await;
        for priority in [-1, -5] {
            let refused = admission.enter(1, priority, PATIENCE).await;
            assert_eq!(refused.err(), Some(Refused::QueueFull));
        }
        let high = tokio::spawn({
            let admission = Arc::clone(&admission);
            async move { admission.enter(1, 9, PATIENCE).await }
        });
        assert_eq!(low.await.unwrap().err(), Some(Refused::QueueFull));
        drop(held);
        drop(high.await.unwrap().unwrap());
        drop(normal.await.unwrap().unwrap());
        assert_eq!((admission.taken(), admission.waiting()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever_and_the_gone_take_no_place() {
        let admission = admission(2, 8);
        let held = admission.enter(2, 0, PATIENCE).await.unwrap();
        let begin = tokio::time::Instant::now();
        let late = admission.enter(1, 0, Duration::from_secs(7)).await;
        assert_eq!(
            (late.err(), begin.elapsed().as_secs()),
            (Some(Refused::TooLate), 7)
        );
        let gone = queued(&admission, 2, 0).await;
        let next = queued(&admission, 1, 0).await;
        gone.abort();
        assert!(gone.await.is_err());
        assert_eq!(admission.waiting(), 1);
        drop(held);
        let permit = next.await.unwrap().unwrap();
        assert_eq!(admission.taken(), 1);
        drop(permit);
        // More than there is becomes all there is.
        assert_eq!(admission.enter(99, 0, PATIENCE).await.unwrap().places, 2);
        assert_eq!(admission.taken(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_number_of_places_can_change() {
        let admission = admission(2, 4);
        let first = admission.enter(2, 0, PATIENCE).await.unwrap();
        let second = queued(&admission, 2, 0).await;
        let third = queued(&admission, 1, 0).await;
        admission.resize(4, 0);
        let second = second.await.unwrap().unwrap();
        assert_eq!((admission.taken(), admission.waiting()), (4, 1));
        // The one who waits keeps its turn; nobody of its importance may join it.
        let refused = admission.enter(1, 0, PATIENCE).await;
        assert_eq!(refused.err(), Some(Refused::QueueFull));
        admission.resize(1, 4);
        let fourth = queued(&admission, 3, 0).await;
        drop((first, second));
        let third = third.await.unwrap().unwrap();
        assert_eq!((admission.taken(), admission.waiting()), (1, 1));
        drop(third);
        assert_eq!(fourth.await.unwrap().unwrap().places, 1);
        assert_eq!(admission.taken(), 0);
    }

    #[tokio::test]
    async fn without_a_queue_the_answer_is_immediate() {
        let admission = admission(1, 0);
        let _held = admission.enter(1, 0, PATIENCE).await.unwrap();
        let refused = admission.enter(1, 99, PATIENCE).await;
        assert_eq!(refused.err(), Some(Refused::QueueFull));
    }
}
