//! The side that obeys.
#![forbid(unsafe_code)]

use super::TrialError;
use super::door::Listener;
use super::endpoint::{AREA_BYTES, Endpoint};
use super::wire::{Order, Reply, TRAFFIC, pattern};
use crate::doctor::rails::Rail;

/// Most SENDs answered for one order; bounds how long a caller holds this side.
const ANSWERS_MAX: usize = 10_000;

/// What one caller has here.
#[derive(Default)]
pub(in crate::doctor) struct Obedient {
    /// Waits to be connected.
    listener: Option<Listener>,
    endpoint: Option<Endpoint>,
}

impl Obedient {
    /// Carries out an order and words the reply. Nothing in an order ends the connection: the reply says what is wrong.
    pub(in crate::doctor) fn obey(&mut self, rails: &[Rail], order: &[u8]) -> Vec<u8> {
        let reply = match serde_json::from_slice(order) {
            Ok(order) => self
                .carry_out(rails, order)
                .unwrap_or_else(|error| Reply::Failed(error.to_string())),
            Err(error) => Reply::Failed(format!("the order cannot be read: {error}")),
        };
        serde_json::to_vec(&reply).expect("invariant: a reply is plain data")
    }

    fn carry_out(&mut self, rails: &[Rail], order: Order) -> Result<Reply, TrialError> {
        if let Order::Open(card) = &order {
            let rail = self.begin(rails, &card.device)?;
            let mut endpoint = Endpoint::open(rail)?;
            endpoint.connect(card)?;
            let reply = Reply::Opened(endpoint.card(&card.device));
            self.endpoint = Some(endpoint);
            return Ok(reply);
        }
        if let Order::Listen { device } = &order {
            let listener = Listener::start(self.begin(rails, device)?)?;
            let reply = Reply::Listens(listener.door());
            self.listener = Some(listener);
            return Ok(reply);
        }
        if let Order::Admit = order {
            let listener = self.listener.take();
            let endpoint = listener.ok_or_else(|| refused("nobody listens"))?.admit()?;
            let reply = Reply::Opened(endpoint.card(""));
            self.endpoint = Some(endpoint);
            return Ok(reply);
        }
        let Some(endpoint) = &mut self.endpoint else {
            return Err(refused("nothing is open"));
        };
        match order {
            Order::Open(_) | Order::Listen { .. } | Order::Admit => {
                unreachable!("handled above")
            }
            Order::Compare { bytes } if bytes <= AREA_BYTES => {
                endpoint.await_notice(0)?;
                Ok(match endpoint.difference(bytes, pattern) {
                    Some(offset) => Reply::Differs(offset),
                    None => Reply::Done,
                })
            }
            Order::Answer { count } if count <= ANSWERS_MAX => {
                for _ in 0..count {
                    endpoint.await_notice(0)?;
                    endpoint.notify(0)?;
                    endpoint.await_sent(0)?;
                }
                Ok(Reply::Done)
            }
            Order::Await { queue_pairs } if queue_pairs <= TRAFFIC => {
                for qp in 0..queue_pairs {
                    endpoint.await_notice(qp)?;
                }
                Ok(Reply::Done)
            }
            _ => Err(refused("more than is allowed")),
        }
    }
}

impl Obedient {
    /// The device for a new endpoint. The old queue pairs go first: a caller never has two sets.
    fn begin<'a>(&mut self, rails: &'a [Rail], device: &str) -> Result<&'a Rail, TrialError> {
        (self.listener, self.endpoint) = (None, None);
        let rail = rails.iter().find(|rail| rail.device == device);
        rail.ok_or_else(|| refused("no such device"))
    }
}

fn refused(why: &str) -> TrialError {
    TrialError::Refused(why.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(obedient: &mut Obedient, order: &[u8]) -> Reply {
        serde_json::from_slice(&obedient.obey(&[], order)).unwrap()
    }

    #[test]
    fn orders_out_of_place_and_garbage_are_answered_in_words() {
        let mut obedient = Obedient::default();
        let failed = |reply: Reply, why: &str| {
            let is_so = matches!(&reply, Reply::Failed(words) if words.contains(why));
            assert!(is_so, "{reply:?}");
        };
        failed(reply(&mut obedient, b"{"), "cannot be read");
        failed(
            reply(&mut obedient, br#"{"compare":{"bytes":9}}"#),
            "nothing is open",
        );
        let open = br#"{"open":{"device":"x","ends":[],"mtu":5,"address":0,"rkey":0}}"#;
        failed(reply(&mut obedient, open), "no such device");
        let listen = br#"{"listen":{"device":"x"}}"#;
        failed(reply(&mut obedient, listen), "no such device");
        failed(reply(&mut obedient, br#""admit""#), "nobody listens");
    }

    #[test]
    fn the_pattern_shows_a_shift_by_a_page_or_a_packet() {
        for shift in [1, 64, 256, 1024, 4096, 65_536] {
            assert_ne!(pattern(0), pattern(shift));
        }
    }
}
