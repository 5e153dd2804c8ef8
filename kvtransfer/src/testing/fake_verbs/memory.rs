//! Registered memory: keys, bounds, and the copying that a NIC would do.
#![expect(
    unsafe_code,
    reason = "a NIC reads and writes raw addresses, so its stand-in does too"
)]

use std::{collections::BTreeMap, ops::Range, ptr};

use crate::transport::verbs::sys;

/// Most regions of one device; a key has 24 bits of slot number, and this many is more than any test registers.
const REGIONS_MAX: usize = 1 << 20;
/// Bits of a key below the slot number.
const KEY_BITS: u32 = 8;

/// A range of memory that a device may touch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    pub(super) pd: u32,
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) access: u32,
    pub(super) key: u32,
}

/// Why memory refused an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Key,
    Bounds,
    Domain,
    Access,
}

/// One entry of a scatter/gather list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) key: u32,
}

/// Where the bytes of a message come from.
#[derive(Clone, Debug)]
pub(super) enum Payload {
    /// Registered memory, read when the message is sent.
    Gather(Vec<Segment>),
    /// Bytes taken when the work request was posted (inline) or left the NIC (zombies).
    Bytes(Vec<u8>),
}

impl Payload {
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Gather(list) => list.iter().map(|segment| u64::from(segment.len)).sum(),
            Self::Bytes(bytes) => bytes.len() as u64,
        }
    }
}

/// What one device may touch.
#[derive(Debug, Default)]
pub(super) struct RegionTable {
    slots: Vec<Option<Region>>,
    /// Freed slots, last freed first out: the next registration gets the key of the last deregistration.
    free: Vec<usize>,
    uses: BTreeMap<usize, u8>,
    pub(super) registered_bytes: u64,
}

impl RegionTable {
    /// Adds a region; `None` when the table is full. `region.key` is filled in.
    pub(super) fn add(&mut self, mut region: Region, keys_repeat: bool) -> Option<Region> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.slots.len() < REGIONS_MAX => {
                self.slots.push(None);
                self.slots.len() - 1
            }
            None => return None,
        };
        let uses = self.uses.entry(slot).or_insert(0);
        let low = if keys_repeat { 0 } else { u32::from(*uses) };
        *uses = uses.wrapping_add(1);
        let number = u32::try_from(slot + 1).expect("invariant: REGIONS_MAX is below 2^24");
        region.key = (number << KEY_BITS) | low;
        self.registered_bytes += region.len;
        self.slots[slot] = Some(region);
        Some(region)
    }

    fn slot_of(key: u32) -> Option<usize> {
        usize::try_from(key >> KEY_BITS).ok()?.checked_sub(1)
    }

    /// Removes the region with this key; false when there is none.
    pub(super) fn remove(&mut self, key: u32) -> bool {
        let Some(slot) = Self::slot_of(key) else {
            return false;
        };
        let Some(entry) = self.slots.get_mut(slot) else {
            return false;
        };
        if entry.is_none_or(|region| region.key != key) {
            return false;
        }
        self.registered_bytes -= entry.take().map_or(0, |region| region.len);
        self.free.push(slot);
        true
    }

    /// Regions of this protection domain.
    pub(super) fn count_in(&self, pd: u32) -> usize {
        let here = |region: &&Region| region.pd == pd;
        self.slots.iter().flatten().filter(here).count()
    }

    /// Whether `pd` may touch `len` bytes at `addr` with this key and these rights.
    pub(super) fn check(
        &self,
        pd: u32,
        key: u32,
        range: (u64, u64),
        rights: u32,
    ) -> Result<(), Refusal> {
        let (addr, len) = range;
        let region = Self::slot_of(key)
            .and_then(|slot| self.slots.get(slot))
            .and_then(Option::as_ref)
            .filter(|region| region.key == key)
            .ok_or(Refusal::Key)?;
        if region.pd != pd {
            return Err(Refusal::Domain);
        }
        let offset = addr.checked_sub(region.start).ok_or(Refusal::Bounds)?;
        let end = offset.checked_add(len).ok_or(Refusal::Bounds)?;
        if end > region.len {
            return Err(Refusal::Bounds);
        }
        if region.access & rights != rights {
            return Err(Refusal::Access);
        }
        Ok(())
    }

    /// Checks every segment of a list.
    pub(super) fn check_all(&self, pd: u32, list: &[Segment], rights: u32) -> Result<(), Refusal> {
        list.iter().try_for_each(|segment| {
            self.check(
                pd,
                segment.key,
                (segment.addr, u64::from(segment.len)),
                rights,
            )
        })
    }
}

/// The rights that a region gets on a device that forces remote writes.
pub(super) fn effective_access(asked: u32, forces_remote_write: bool) -> u32 {
    if forces_remote_write {
        asked | sys::IBV_ACCESS_LOCAL_WRITE | sys::IBV_ACCESS_REMOTE_WRITE
    } else {
        asked
    }
}

/// Memory that must not change any more, because its transfer has ended.
#[derive(Debug, Default)]
pub(super) struct WatchList {
    ranges: BTreeMap<u64, Range<u64>>,
    next: u64,
}

impl WatchList {
    pub(super) fn add(&mut self, range: Range<u64>) -> u64 {
        self.next += 1;
        self.ranges.insert(self.next, range);
        self.next
    }

    pub(super) fn remove(&mut self, id: u64) {
        self.ranges.remove(&id);
    }

    pub(super) fn touches(&self, addr: u64, len: u64) -> bool {
        len > 0
            && self
                .ranges
                .values()
                .any(|range| addr < range.end && addr.saturating_add(len) > range.start)
    }
}

/// Copies `len` bytes between two addresses of this process.
///
/// # Safety
/// Both ranges must be mapped, the target writable, until the call returns. Whoever registered them promised that
/// until deregistration, and the caller has just found both in the tables of regions, under the fabric's lock.
unsafe fn copy(from: u64, to: u64, len: u64) {
    let from = ptr::with_exposed_provenance::<u8>(usize::try_from(from).unwrap_or(0));
    let to = ptr::with_exposed_provenance_mut::<u8>(usize::try_from(to).unwrap_or(0));
    let len = usize::try_from(len).unwrap_or(0);
    if len > 0 {
        // SAFETY: the caller vouches for both ranges; `copy` allows them to overlap.
        unsafe { ptr::copy(from, to, len) };
    }
}

/// The bytes of a checked gather list, as they leave the NIC.
///
/// # Safety
/// As for [`scatter`]: every segment lies in a registered region.
pub(super) unsafe fn snapshot(list: &[Segment]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for segment in list {
        let start = bytes.len();
        bytes.resize(start + segment.len as usize, 0);
        let to = bytes[start..].as_mut_ptr().expose_provenance() as u64;
        // SAFETY: the source is a registered range by this function's contract, the target was just allocated.
        unsafe { copy(segment.addr, to, u64::from(segment.len)) };
    }
    bytes
}

/// Moves a payload into a list of ranges, filling one after the other, as far as both reach.
///
/// # Safety
/// Every segment of `payload` and every target must have passed [`RegionTable::check`] under the fabric's lock, which is
/// held until the call returns, so that no range is deregistered meanwhile.
pub(super) unsafe fn scatter(payload: &Payload, targets: &[Segment]) {
    let inline;
    let sources: &[Segment] = match payload {
        Payload::Gather(list) => list,
        Payload::Bytes(bytes) => {
            inline = [Segment {
                addr: bytes.as_ptr().expose_provenance() as u64,
                len: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
                key: 0,
            }];
            &inline
        }
    };
    let mut targets = targets.iter().copied();
    let Some(mut target) = targets.next() else {
        return;
    };
    for source in sources {
        let mut done = 0;
        while done < source.len {
            if target.len == 0 {
                let Some(next) = targets.next() else { return };
                target = next;
                continue;
            }
            let len = target.len.min(source.len - done);
            let from = source.addr + u64::from(done);
            // SAFETY: both ranges lie inside segments that the caller has checked.
            unsafe { copy(from, target.addr, u64::from(len)) };
            done += len;
            target.addr += u64::from(len);
            target.len -= len;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(start: u64) -> Region {
        Region {
            pd: 1,
            start,
            len: 100,
            access: sys::IBV_ACCESS_REMOTE_WRITE,
            key: 0,
        }
    }

    #[test]
    fn a_freed_slot_is_handed_out_again_with_its_old_key_or_a_new_one() {
        for keys_repeat in [true, false] {
            let mut table = RegionTable::default();
            let first = table.add(region(0x1000), keys_repeat).expect("room").key;
            assert!(table.remove(first));
            assert!(!table.remove(first), "a region is removed once");
            let second = table.add(region(0x9000), keys_repeat).expect("room").key;
            assert_eq!(first == second, keys_repeat);
            let rights = sys::IBV_ACCESS_REMOTE_WRITE;
            let at_old_key = table.check(1, first, (0x9000, 100), rights);
            assert_eq!(at_old_key.is_ok(), keys_repeat);
        }
    }

    #[test]
    fn bounds_domains_and_rights_are_checked_without_overflow() {
        let mut table = RegionTable::default();
        let key = table.add(region(0x1000), true).expect("room").key;
        let write = sys::IBV_ACCESS_REMOTE_WRITE;
        let read = sys::IBV_ACCESS_REMOTE_READ;
        let check = |pd, key, at, rights| table.check(pd, key, at, rights);
        assert_eq!(check(1, key, (0x1000, 100), write), Ok(()));
        assert_eq!(check(1, key, (0x1000, 101), write), Err(Refusal::Bounds));
        assert_eq!(check(1, key, (0xfff, 1), write), Err(Refusal::Bounds));
        assert_eq!(
            check(1, key, (0x1010, u64::MAX), write),
            Err(Refusal::Bounds)
        );
        assert_eq!(check(2, key, (0x1000, 1), write), Err(Refusal::Domain));
        assert_eq!(check(1, key, (0x1000, 1), read), Err(Refusal::Access));
        assert_eq!(check(1, 0, (0x1000, 1), write), Err(Refusal::Key));
        assert_eq!(check(1, u32::MAX, (0x1000, 1), write), Err(Refusal::Key));
    }
}
