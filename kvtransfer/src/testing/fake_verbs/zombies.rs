//! WRITEs that outlive their queue pair: on the wire when it stopped, and landing later.
#![expect(unsafe_code, reason = "bytes on the wire are copied out of raw memory")]

use super::{
    QueuePairId,
    memory::{self, Payload},
    queue::{Hardware, Operation},
    state::{State, Zombie},
};

impl State {
    /// Puts copies of the WRITEs that a queue pair still holds on the wire, because it is about to stop.
    pub(super) fn release_zombies(&mut self, id: QueuePairId) {
        if !self.behaviour.zombies {
            return;
        }
        let Some(target) = self.queue(id).and_then(|queue| queue.remote) else {
            return;
        };
        let Some(target_serial) = self.queue(target).map(|queue| queue.serial) else {
            return;
        };
        let Some(queue) = self.queue(id) else {
            return;
        };
        if queue.hardware != Hardware::Ready {
            return;
        }
        for request in queue.waiting.clone() {
            let Operation::Write { addr, key, .. } = request.operation else {
                continue;
            };
            let bytes = match request.payload {
                Payload::Bytes(bytes) => bytes,
                Payload::Gather(list) => {
                    if !self.local_list_is_valid(id, &list, 0) {
                        continue;
                    }
                    // SAFETY: the list was checked under the lock that `&mut self` proves is held.
                    unsafe { memory::snapshot(&list) }
                }
            };
            self.zombies.push_back(Zombie {
                order: request.order,
                from: id,
                target,
                target_serial,
                addr,
                key,
                bytes,
            });
        }
    }

    /// The oldest WRITE on the wire arrives, if there is a path; false when nothing arrived.
    pub(super) fn land_zombie(&mut self) -> bool {
        let arrives = self
            .zombies
            .front()
            .is_some_and(|zombie| self.path_is_up(zombie.from.device, zombie.target.device));
        if !arrives {
            return false;
        }
        let Some(zombie) = self.zombies.pop_front() else {
            return false;
        };
        let is_open = self.queue(zombie.target).is_some_and(|queue| {
            queue.serial == zombie.target_serial
                && queue.remote == Some(zombie.from)
                && matches!(queue.hardware, Hardware::Receives | Hardware::Ready)
        });
        let payload = Payload::Bytes(zombie.bytes);
        if is_open
            && self
                .place(zombie.target, &payload, zombie.addr, zombie.key)
                .is_ok()
        {
            self.counters.zombies_landed += 1;
        } else {
            self.counters.zombies_refused += 1;
        }
        true
    }
}
