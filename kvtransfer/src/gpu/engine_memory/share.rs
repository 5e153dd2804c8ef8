//! How an allocation is described to another engine of this host: the handle, and for virtual memory where its descriptors
//! are found. Whoever may read our process's memory (a condition of pulling) may also fetch descriptors from it, so none
//! has to be sent.
#![forbid(unsafe_code)]

use std::{
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{Arc, MutexGuard, PoisonError},
};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::Opened;
use crate::{
    gpu::{
        GpuError,
        ipc::{self, Exported, Handle, Mapping, PeerProcess},
        pointer,
    },
    memory::device::{SHARE_BYTES_MAX, Share},
};

/// A description: the process's cookie, its number, the count of descriptors, their numbers, the handle.
const FIXED_BYTES: usize = 16 + 4 + 2;

/// What stays open for peers.
pub(super) struct Export {
    descriptors: Vec<OwnedFd>,
    bytes: Vec<u8>,
}

fn exports(opened: &Opened) -> MutexGuard<'_, std::collections::HashMap<u64, Export>> {
    opened
        .exports
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

/// Describes the whole allocation that holds a range.
pub(super) fn export(opened: &Arc<Opened>, address: u64, len: u64) -> Result<Share, GpuError> {
    let facts = pointer::inspect(&opened.context, address)?;
    // Kinds that cannot be shared are refused by the export itself.
    let whole = facts.holds(address, len);
    let (base, bytes) = if whole {
        (facts.base, facts.len)
    } else {
        (address, len)
    };
    let mut exports = exports(opened);
    let known = exports.get(&facts.allocation);
    if let Some(known) = known.filter(|_| whole && facts.allocation != 0) {
        return Ok(Share {
            allocation: known.bytes.clone(),
            offset: address - base,
        });
    }
    let Exported {
        handle,
        descriptors,
    } = ipc::export(&opened.context, base, bytes)?;
    let mut allocation = opened.process.0.to_le_bytes().to_vec();
    allocation.extend_from_slice(&std::process::id().to_le_bytes());
    let count = u16::try_from(descriptors.len()).unwrap_or(u16::MAX);
    allocation.extend_from_slice(&count.to_le_bytes());
    for descriptor in &descriptors {
        allocation.extend_from_slice(&descriptor.as_raw_fd().to_le_bytes());
    }
    allocation.extend_from_slice(&handle.encode());
    if allocation.len() > SHARE_BYTES_MAX {
        return Err(GpuError::Limit {
            what: "bytes of a description (the allocation has many physical pieces)",
            asked: allocation.len() as u64,
            limit: SHARE_BYTES_MAX as u64,
        });
    }
    let export = Export {
        descriptors,
        bytes: allocation.clone(),
    };
    debug_assert!(
        export.descriptors.len() <= usize::from(count),
        "one number each"
    );
    exports.insert(facts.allocation, export);
    Ok(Share {
        allocation,
        offset: address - base,
    })
}

/// Closes what stayed open for peers: a descriptor keeps physical memory from being freed.
pub(super) fn forget(opened: &Opened) {
    exports(opened).clear();
}

/// Maps what a peer described.
pub(super) fn import(opened: &Arc<Opened>, bytes: &[u8]) -> Result<Mapping, GpuError> {
    let short = || GpuError::Peer("it is too short");
    let (fixed, rest) = bytes.split_first_chunk::<FIXED_BYTES>().ok_or_else(short)?;
    let (cookie, fixed) = fixed.split_first_chunk::<16>().ok_or_else(short)?;
    let (pid, count) = fixed.split_first_chunk::<4>().ok_or_else(short)?;
    let count = count.first_chunk::<2>().ok_or_else(short)?;
    let count = usize::from(u16::from_le_bytes(*count));
    let numbers = rest.get(..4 * count).ok_or_else(short)?;
    let handle = Handle::decode(&rest[4 * count..])?;
    if count != handle.descriptor_count() {
        return Err(GpuError::Peer("it names too few descriptors, or too many"));
    }
    let numbers = numbers.chunks_exact(4);
    let numbers = numbers.map(|n| i32::from_le_bytes([n[0], n[1], n[2], n[3]]));
    let descriptors = fetch(i32::from_le_bytes(*pid), numbers)?;
    let peer = PeerProcess(u128::from_le_bytes(*cookie));
    opened.imports.open(peer, &handle, descriptors)
}

/// Duplicates descriptors of another process of this user.
fn fetch(pid: i32, numbers: impl Iterator<Item = i32>) -> Result<Vec<OwnedFd>, GpuError> {
    let mut numbers = numbers.peekable();
    if numbers.peek().is_none() {
        return Ok(Vec::new());
    }
    let pid = Pid::from_raw(pid).filter(|pid| pid.as_raw_nonzero().get() > 0);
    let pid = pid.ok_or(GpuError::Peer("its process number is none"))?;
    let process = pidfd_open(pid, PidfdFlags::empty());
    let process = process.map_err(|error| GpuError::system("opening the peer's process", error))?;
    let fetched = numbers.map(|number| {
        let fetched = pidfd_getfd(&process, number, PidfdGetfdFlags::empty());
        fetched.map_err(|error| GpuError::system("fetching a descriptor of the peer", error))
    });
    fetched.collect()
}
