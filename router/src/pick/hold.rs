//! Requests that wait for a worker with room: the most important first, then first come, first served.
//!
//! What waits here asks again whenever something ends ([`Hold::ring`]), one after the other in this order, and the first one
//! that gets no place ends the round: what does not fit one does not fit the next. Only a request that may go to fewer workers
//! than most ([`Ask::Later::narrow`]) does not stand in the way of others.
#![forbid(unsafe_code)]

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

/// The order: highest priority first, then by arrival.
type Turn = (Reverse<i64>, u64);

/// The hold is full of requests that are at least as important.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// What came of asking for a place.
#[derive(Debug)]
pub enum Ask<T> {
    /// Waiting is over.
    Answer(T),
    /// Not yet.
    Later {
        /// Ask again after this time, even if nothing ends.
        retry_after: Duration,
        /// Others may find a place where this one did not.
        narrow: bool,
    },
}

#[derive(Debug, Default)]
struct State {
    waiting: BTreeMap<Turn, Arc<Notify>>,
    arrivals: u64,
    /// Who is asking now.
    asking: Option<Turn>,
    /// Something ended since this round began.
    again: bool,
}

impl State {
    /// Lets the first one after `turn` ask, or begins a new round if that was missed, or ends the round.
    fn go_on(&mut self, after: Option<Turn>) {
        let next = after.and_then(|turn| {
            let behind = (Bound::Excluded(turn), Bound::Unbounded);
            let (turn, bell) = self.waiting.range(behind).next()?;
            Some((*turn, Arc::clone(bell)))
        });
        let next = next.or_else(|| {
            let missed = std::mem::take(&mut self.again);
            self.first().filter(|_| missed)
        });
        self.asking = next.as_ref().map(|(turn, _)| *turn);
        if let Some((_, bell)) = next {
            bell.notify_one();
        }
    }

    fn first(&self) -> Option<(Turn, Arc<Notify>)> {
        let (turn, bell) = self.waiting.first_key_value()?;
        Some((*turn, Arc::clone(bell)))
    }

    fn ring(&mut self) {
        self.again = true;
        if self.asking.is_none() {
            self.go_on(None);
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Hold {
    most: usize,
    state: Mutex<State>,
}

impl Hold {
    /// Room for `most` requests.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    /// Something ended: those who wait ask again.
    pub fn ring(&self) {
        let mut state = self.lock();
        if !state.waiting.is_empty() {
            state.ring();
        }
    }

    /// Asks until there is an answer. Dropping the future gives the place in the order up.
    ///
    /// # Errors
    /// [`Full`], at once or, when a more important request comes, later.
    pub async fn wait<T>(&self, priority: i64, mut ask: impl FnMut() -> Ask<T>) -> Result<T, Full> {
        let overtakes = {
            let state = self.lock();
            let first = state.waiting.first_key_value();
            first.is_none_or(|((first, _), _)| Reverse(priority) < *first)
        };
        if overtakes && let Ask::Answer(answer) = ask() {
            return Ok(answer);
        }
        let place = self.sit(priority)?;
        // Whatever ended since it asked is not missed.
        self.ring();
        let mut retry = None;
        loop {
            let rings = place.bell.notified();
            let rung = match retry.take() {
                Some(pause) => tokio::time::timeout(pause, rings).await.is_ok(),
                None => {
                    rings.await;
                    true
                }
            };
            if !rung {
                self.ring();
                continue;
            }
            let (is_shed, is_asking) = {
                let state = self.lock();
                (
                    !state.waiting.contains_key(&place.turn),
                    state.asking == Some(place.turn),
                )
            };
            if is_shed {
                return Err(Full);
            }
            if !is_asking {
                continue;
            }
            match ask() {
                Ask::Answer(answer) => return Ok(answer),
                Ask::Later {
                    retry_after,
                    narrow,
                } => {
                    retry = Some(retry_after);
                    self.lock().go_on(narrow.then_some(place.turn));
                }
            }
        }
    }

    fn sit(&self, priority: i64) -> Result<Place<'_>, Full> {
        let mut state = self.lock();
        if state.waiting.len() >= self.most {
            let last = state.waiting.last_entry().ok_or(Full)?;
            if last.key().0 <= Reverse(priority) {
                return Err(Full);
            }
            let (turn, bell) = last.remove_entry();
            bell.notify_one();
            if state.asking == Some(turn) {
                state.go_on(None);
            }
        }
        state.arrivals += 1;
        let turn = (Reverse(priority), state.arrivals);
        let bell = Arc::new(Notify::new());
        state.waiting.insert(turn, Arc::clone(&bell));
        drop(state);
        Ok(Place {
            hold: self,
            turn,
            bell,
        })
    }
}

/// A place in the order.
struct Place<'a> {
    hold: &'a Hold,
    turn: Turn,
    bell: Arc<Notify>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut state = self.hold.lock();
        let was_first = state
            .waiting
            .first_key_value()
            .is_some_and(|(first, _)| *first == self.turn);
        state.waiting.remove(&self.turn);
        if state.asking == Some(self.turn) {
            state.go_on(Some(self.turn));
        } else if was_first {
            // It may have been what all others waited behind.
            state.ring();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::task::JoinHandle;

    use super::*;

    /// Asks for one of `places`; with `narrow`, for one of `narrow_places`.
    fn take(places: &AtomicUsize) -> Option<usize> {
        places
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(1)
            })
            .ok()
    }

    async fn queued(
        hold: &Arc<Hold>,
        places: &Arc<AtomicUsize>,
        priority: i64,
        narrow: bool,
    ) -> JoinHandle<Result<(), Full>> {
        let (here, places, before) = (Arc::clone(hold), Arc::clone(places), hold.waiting());
        let task = tokio::spawn(async move {
            let ask = || match take(&places) {
                Some(_) => Ask::Answer(()),
                None => Ask::Later {
                    retry_after: Duration::from_secs(3600),
                    narrow,
                },
            };
            here.wait(priority, ask).await
        });
        while hold.waiting() == before && !task.is_finished() {
            tokio::task::yield_now().await;
        }
        task
    }

    async fn settle() {
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_most_important_goes_first() {
        let (hold, places) = (Arc::new(Hold::new(10)), Arc::new(AtomicUsize::new(0)));
        let mut waiting = Vec::new();
        for (name, priority) in [("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1)] {
            waiting.push((name, queued(&hold, &places, priority, false).await));
        }
        let mut order = Vec::new();
        while !waiting.is_empty() {
            places.store(1, Ordering::Relaxed);
            hold.ring();
            settle().await;
            let at = waiting.iter().position(|(_, task)| task.is_finished());
            let (name, task) = waiting.remove(at.unwrap());
            assert!(waiting.iter().all(|(_, task)| !task.is_finished()));
            task.await.unwrap().unwrap();
            order.push(name);
        }
        assert_eq!(order, ["b", "d", "a", "c", "e"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_hold_sheds_the_least_important() {
        let (hold, places) = (Arc::new(Hold::new(2)), Arc::new(AtomicUsize::new(0)));
        let low = queued(&hold, &places, -1, false).await;
        let normal = queued(&hold, &places, 0, false).await;
        for priority in [-1, -5] {
            let refused = queued(&hold, &places, priority, false).await;
            assert_eq!(refused.await.unwrap(), Err(Full));
        }
        // The one that is shed makes room, so the count does not change.
        let high = tokio::spawn({
            let (hold, places) = (Arc::clone(&hold), Arc::clone(&places));
            async move {
                let ask = || match take(&places) {
                    Some(_) => Ask::Answer(()),
                    None => Ask::Later {
                        retry_after: Duration::from_secs(3600),
                        narrow: false,
                    },
                };
                hold.wait(9, ask).await
            }
        });
        assert_eq!(low.await.unwrap(), Err(Full));
        places.store(2, Ordering::Relaxed);
        hold.ring();
        high.await.unwrap().unwrap();
        normal.await.unwrap().unwrap();
        assert_eq!(hold.waiting(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn one_ring_serves_as_many_as_there_are_places() {
        let (hold, places) = (Arc::new(Hold::new(10)), Arc::new(AtomicUsize::new(0)));
        let mut waiting = Vec::new();
        for _ in 0..5 {
            waiting.push(queued(&hold, &places, 0, false).await);
        }
        places.store(3, Ordering::Relaxed);
        hold.ring();
        settle().await;
        assert_eq!(hold.waiting(), 2);
        // Whoever goes away does not take the turn along.
        let left = waiting.iter().position(|task| !task.is_finished()).unwrap();
        waiting[left].abort();
        settle().await;
        places.store(1, Ordering::Relaxed);
        hold.ring();
        settle().await;
        assert_eq!(hold.waiting(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_narrow_request_does_not_stand_in_the_way() {
        let (hold, free) = (Arc::new(Hold::new(10)), Arc::new(AtomicUsize::new(0)));
        let none = Arc::new(AtomicUsize::new(0));
        let narrow = queued(&hold, &none, 9, true).await;
        let wide = queued(&hold, &free, 0, false).await;
        free.store(1, Ordering::Relaxed);
        hold.ring();
        wide.await.unwrap().unwrap();
        assert!(!narrow.is_finished());
        none.store(1, Ordering::Relaxed);
        hold.ring();
        narrow.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn time_alone_makes_it_ask_again() {
        let hold = Hold::new(1);
        let mut asked = 0;
        let answer = hold.wait(0, || {
            asked += 1;
            if asked < 4 {
                Ask::Later {
                    retry_after: Duration::from_millis(100),
                    narrow: false,
                }
            } else {
                Ask::Answer(asked)
            }
        });
        assert_eq!(answer.await, Ok(4));
        assert_eq!(Hold::new(0).wait(9, never).await, Err(Full));
    }

    fn never() -> Ask<()> {
        Ask::Later {
            retry_after: Duration::from_secs(1),
            narrow: false,
        }
    }
}
