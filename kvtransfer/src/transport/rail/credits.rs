//! Who may send a frame through a queue pair, and when.
//!
//! A SEND that finds no posted receive kills the queue pair on iWARP and eRDMA, and waits for ever on RoCE. So each end
//! tells the other how many receives it has posted, sends no more frames than that, and tells how many it has posted
//! again. The last one is kept for returning credits: else two ends that both have something to say, and no credit to say
//! it with, would wait for each other for ever.
#![forbid(unsafe_code)]

/// The credits of one end of a queue pair.
#[derive(Debug)]
pub(super) struct Credits {
    /// Receives of the peer that our frames may still use.
    available: u16,
    /// All that the peer posted.
    granted: u16,
    /// Receives that we have posted again and not told yet.
    owed: u16,
    /// All that we posted.
    receives: u16,
}

/// The peer returned more credits than it was owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it returned {returned} credits with {available} of {granted} unused")]
pub(super) struct TooManyCredits {
    returned: u16,
    available: u16,
    granted: u16,
}

impl Credits {
    /// Nothing sent yet: the peer has `granted` receives posted, this end `receives`.
    pub(super) fn new(granted: u16, receives: u16) -> Self {
        Self {
            available: granted,
            granted,
            owed: 0,
            receives,
        }
    }

    /// Whether a frame of any kind may be sent, so many more after it being promised already.
    pub(super) fn can_send(&self, promised: u16) -> bool {
        self.available > promised.saturating_add(RESERVE)
    }

    /// Takes a credit for a frame; what it returns goes along.
    pub(super) fn send(&mut self) -> u16 {
        debug_assert!(self.available > 0, "no frame without a credit");
        self.available = self.available.saturating_sub(1);
        std::mem::take(&mut self.owed)
    }

    /// Whether credits must be returned by a frame of their own: half of our receives lie idle. It may use the reserve.
    pub(super) fn must_return(&self) -> bool {
        self.owed >= self.receives.div_ceil(2).max(1) && self.available > 0
    }

    /// A frame came, and its receive has been posted again.
    ///
    /// # Errors
    /// It returned more than it had: the peer broke the protocol.
    pub(super) fn received(&mut self, returned: u16) -> Result<(), TooManyCredits> {
        let (available, granted) = (self.available, self.granted);
        match available.checked_add(returned) {
            Some(sum) if sum <= granted => self.available = sum,
            _ => {
                return Err(TooManyCredits {
                    returned,
                    available,
                    granted,
                });
            }
        }
        self.owed = self.owed.saturating_add(1);
        Ok(())
    }
}

/// Credits that only a frame that returns credits may use.
const RESERVE: u16 = 1;

#[cfg(test)]
mod tests {
    use super::Credits;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    #[test]
    fn more_credits_than_were_granted_are_refused() {
        let mut credits = Credits::new(4, 4);
        assert_eq!(credits.send(), 0);
        assert!(credits.received(1).is_ok());
        assert!(credits.received(1).is_err());
        assert!(credits.received(u16::MAX).is_err());
    }

    /// Two ends and the frames between them, each way in order.
    struct Pair {
        ends: [Credits; 2],
        wires: [VecDeque<u16>; 2],
        posted: [u16; 2],
        to_say: [u32; 2],
    }

    impl Pair {
        fn say(&mut self, end: usize) {
            let (free, must) = (self.ends[end].can_send(0), self.ends[end].must_return());
            if free && self.to_say[end] > 0 {
                self.to_say[end] -= 1;
            } else if !must {
                return;
            }
            let returned = self.ends[end].send();
            self.wires[end].push_back(returned);
        }

        fn hear(&mut self, end: usize) {
            let from = 1 - end;
            if let Some(returned) = self.wires[from].pop_front() {
                assert!(
                    self.wires[from].len() < usize::from(self.posted[end]),
                    "no receive was posted"
                );
                self.ends[end].received(returned).expect("honest credits");
            }
        }
    }

    proptest! {
        /// However the two ends take turns, no frame finds an empty receive queue, and everything is said in the end.
        #[test]
        fn no_frame_is_lost_and_nobody_waits_for_ever(
            a in 4..40_u16, b in 4..40_u16,
            say in prop::array::uniform2(0..200_u32),
            turns in prop::collection::vec((any::<bool>(), any::<bool>()), 0..400),
        ) {
            let mut pair = Pair {
                ends: [Credits::new(b, a), Credits::new(a, b)],
                wires: [VecDeque::new(), VecDeque::new()],
                posted: [a, b],
                to_say: say,
            };
            for (end, says) in turns {
                if says { pair.say(end.into()) } else { pair.hear(end.into()) }
            }
            for _ in 0..4_000 {
                for end in 0..2 {
                    pair.say(end);
                    pair.hear(end);
                }
            }
            prop_assert_eq!(pair.to_say, [0, 0]);
        }
    }
}
