//! The lock between moving bytes of a transfer and ending it (promise P1).
#![forbid(unsafe_code)]

use std::sync::{
    PoisonError, RwLock, RwLockReadGuard,
    atomic::{AtomicU64, Ordering},
};

/// Open while the memory of a transfer may be touched. Closing waits for the system call that is touching it, which is
/// bounded: movers never block inside (`MSG_DONTWAIT`, pulls of a few MiB). Lanes of one transfer hold it together.
#[derive(Debug)]
pub struct Gate {
    open: RwLock<bool>,
    /// What a same-host receiver reads after a pull to learn that the pages it pulled were still good.
    cell: AtomicU64,
}

/// Proof that the gate is held open. Bytes may be moved until it is dropped.
#[derive(Debug)]
pub struct Pass<'a>(#[expect(dead_code, reason = "held, not read")] RwLockReadGuard<'a, bool>);

impl Gate {
    /// An open gate whose cell holds `token` (not zero).
    pub fn new(token: u64) -> Self {
        Self {
            open: RwLock::new(true),
            cell: AtomicU64::new(token),
        }
    }

    /// Holds the gate open, or `None` if the transfer has ended.
    pub fn pass(&self) -> Option<Pass<'_>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.then_some(Pass(open))
    }

    /// Closes the gate for good; when this returns, nobody holds it.
    pub fn close(&self) {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        *open = false;
        // Before the owner can reuse the pages: it learns of the end only after this call.
        self.cell.store(0, Ordering::SeqCst);
    }

    /// Address of the cell and the token in it, for a pull header.
    pub fn cell(&self) -> (u64, u64) {
        let address = std::ptr::from_ref(&self.cell).addr() as u64;
        (address, self.cell.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::Gate;
    use std::{
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        thread,
    };

    #[test]
    fn a_closed_gate_lets_nobody_pass_and_clears_its_token() {
        let gate = Gate::new(7);
        assert!(gate.pass().is_some());
        assert_eq!(gate.cell().1, 7);
        gate.close();
        assert!(gate.pass().is_none());
        assert_eq!(gate.cell().1, 0);
    }

    #[test]
    fn closing_waits_for_whoever_holds_it() {
        let gate = Arc::new(Gate::new(1));
        let moved = Arc::new(AtomicBool::new(false));
        let pass = gate.pass().expect("it is open");
        let closer = {
            let (gate, moved) = (Arc::clone(&gate), Arc::clone(&moved));
            thread::spawn(move || {
                gate.close();
                assert!(
                    moved.load(Ordering::SeqCst),
                    "closed while somebody was moving bytes"
                );
            })
        };
        // The closer may or may not have reached the lock; in both orders it must see the store.
        thread::yield_now();
        moved.store(true, Ordering::SeqCst);
        drop(pass);
        closer.join().expect("the closer saw the move");
    }
}
