//! A chain of work requests, built in place and handed to the adapter with one doorbell.
//!
//! The arrays are allocated once and used again for every chain. The links between requests and elements are set just
//! before the post, so that a chain may be moved while it is built.
#![expect(unsafe_code, reason = "raw requests are zeroed and linked by pointers")]

use std::{ffi::c_int, mem, ptr};

use super::sys::{self, ibv_send_wr, ibv_send_wr_rdma, ibv_send_wr_target, ibv_sge};

/// Most requests of a chain (erdma.md §3: 16 to 64 pay off).
pub(crate) const CHAIN_WRS_MAX: usize = 64;

/// Most elements of a request.
pub(crate) const CHAIN_SGES_MAX: usize = 16;

/// Most inline bytes of a chain; eRDMA takes 96 in a request.
pub(crate) const CHAIN_INLINE_MAX: usize = 256;

/// The longest request in bytes: providers add element lengths in 32 bits, some in signed ones (erdma.md §3).
pub(crate) const WR_BYTES_MAX: u64 = 1 << 30;

/// One piece of registered local memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sge {
    /// Its address.
    pub(crate) address: u64,
    /// Its length in bytes.
    pub(crate) bytes: u32,
    /// The local key that covers it.
    pub(crate) lkey: u32,
}

/// A place in the peer's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RemotePlace {
    /// Its address.
    pub(crate) address: u64,
    /// The remote key that covers it.
    pub(crate) rkey: u32,
}

/// How a request completes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flags {
    /// Make a completion here.
    pub(crate) signalled: bool,
    /// Wake the peer if it waits for solicited completions.
    pub(crate) solicited: bool,
}

impl Flags {
    fn bits(self) -> u32 {
        let mut bits = 0;
        if self.signalled {
            bits |= sys::IBV_SEND_SIGNALED;
        }
        if self.solicited {
            bits |= sys::IBV_SEND_SOLICITED;
        }
        bits
    }
}

/// Why a request was not added. The chain is as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ChainError {
    /// The chain has as many requests, elements or inline bytes as it can.
    #[error("the chain is full")]
    Full,
    /// More elements than a request of this chain may have.
    #[error("{0} elements in a request, the limit is {1}")]
    Elements(usize, usize),
    /// No bytes, or more than a request may have.
    #[error("{0} bytes in a request; it must have 1 to {1}")]
    Bytes(u64, u64),
}

/// What the chain asks of a queue pair; compared with its capabilities at the post.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Demands {
    /// The most elements of a request.
    pub(crate) sges: u32,
    /// The most inline bytes of a request.
    pub(crate) inline_bytes: u32,
    /// The most bytes of a request.
    pub(crate) bytes: u64,
    /// Whether a WRITE with immediate is in it.
    pub(crate) immediate: bool,
}

/// Where a request's elements lie.
#[derive(Clone, Copy, Default)]
struct Part {
    first_sge: usize,
    /// Where the inline bytes lie, for a request that has them.
    inline_at: Option<usize>,
}

/// A chain under construction.
pub(crate) struct Chain {
    wrs: Box<[ibv_send_wr]>,
    parts: Box<[Part]>,
    sges: Box<[ibv_sge]>,
    inline: Box<[u8; CHAIN_INLINE_MAX]>,
    wr_count: usize,
    sge_count: usize,
    inline_count: usize,
    sges_per_wr: usize,
    wr_bytes: u64,
    demands: Demands,
}

// SAFETY: the pointers in the requests point into the chain's own arrays, are set under `&mut self` just before each
// post and are not used afterwards.
unsafe impl Send for Chain {}

impl Chain {
    /// Room for `wrs` requests of at most `sges_per_wr` elements and `wr_bytes` bytes each. Each is cut to its limit.
    pub(crate) fn new(wrs: usize, sges_per_wr: usize, wr_bytes: u64) -> Self {
        let wrs = wrs.clamp(1, CHAIN_WRS_MAX);
        let sges_per_wr = sges_per_wr.clamp(1, CHAIN_SGES_MAX);
        let empty = ibv_sge {
            addr: 0,
            length: 0,
            lkey: 0,
        };
        Self {
            wrs: vec![blank_wr(); wrs].into(),
            parts: vec![Part::default(); wrs].into(),
            sges: vec![empty; wrs * sges_per_wr].into(),
            inline: Box::new([0; CHAIN_INLINE_MAX]),
            wr_count: 0,
            sge_count: 0,
            inline_count: 0,
            sges_per_wr,
            wr_bytes: wr_bytes.clamp(1, WR_BYTES_MAX),
            demands: Demands::default(),
        }
    }

    /// How many requests it has.
    pub(crate) fn len(&self) -> usize {
        self.wr_count
    }

    /// Whether it has none.
    pub(crate) fn is_empty(&self) -> bool {
        self.wr_count == 0
    }

    /// How many more requests fit.
    pub(crate) fn room(&self) -> usize {
        self.wrs.len() - self.wr_count
    }

    /// Empties it, to build the next.
    pub(crate) fn clear(&mut self) {
        self.wr_count = 0;
        self.sge_count = 0;
        self.inline_count = 0;
        self.demands = Demands::default();
    }

    /// What it asks of a queue pair.
    pub(crate) fn demands(&self) -> Demands {
        self.demands
    }

    /// Adds a WRITE that gathers `sges` to `to`.
    pub(crate) fn write(
        &mut self,
        wr_id: u64,
        sges: &[Sge],
        to: RemotePlace,
        flags: Flags,
    ) -> Result<(), ChainError> {
        self.gather(sys::IBV_WR_RDMA_WRITE, wr_id, sges, flags)?;
        self.aim(to, 0);
        Ok(())
    }

    /// Adds a WRITE that also takes a receive of the peer and brings it `imm`.
    pub(crate) fn write_with_imm(
        &mut self,
        wr_id: u64,
        sges: &[Sge],
        to: RemotePlace,
        imm: u32,
        flags: Flags,
    ) -> Result<(), ChainError> {
        self.gather(sys::IBV_WR_RDMA_WRITE_WITH_IMM, wr_id, sges, flags)?;
        self.aim(to, imm.to_be());
        self.demands.immediate = true;
        Ok(())
    }

    /// Adds a SEND that gathers `sges`.
    pub(crate) fn send(
        &mut self,
        wr_id: u64,
        sges: &[Sge],
        flags: Flags,
    ) -> Result<(), ChainError> {
        self.gather(sys::IBV_WR_SEND, wr_id, sges, flags)
    }

    /// Adds a SEND of `bytes`, which are copied now and travel in the request itself.
    pub(crate) fn send_inline(
        &mut self,
        wr_id: u64,
        bytes: &[u8],
        flags: Flags,
    ) -> Result<(), ChainError> {
        let count = u32::try_from(bytes.len())
            .ok()
            .filter(|&count| count > 0 && bytes.len() <= CHAIN_INLINE_MAX)
            .ok_or(ChainError::Bytes(
                bytes.len() as u64,
                CHAIN_INLINE_MAX as u64,
            ))?;
        let at = self.inline_count;
        if self.room() == 0 || bytes.len() > CHAIN_INLINE_MAX - at {
            return Err(ChainError::Full);
        }
        self.inline[at..at + bytes.len()].copy_from_slice(bytes);
        self.inline_count += bytes.len();
        let first_sge = self.sge_count;
        self.sges[first_sge] = ibv_sge {
            addr: 0,
            length: count,
            lkey: 0,
        };
        self.sge_count += 1;
        self.demands.inline_bytes = self.demands.inline_bytes.max(count);
        self.demands.sges = self.demands.sges.max(1);
        let part = Part {
            first_sge,
            inline_at: Some(at),
        };
        let bits = flags.bits() | sys::IBV_SEND_INLINE;
        self.push(sys::IBV_WR_SEND, wr_id, 1, bits, part);
        Ok(())
    }

    fn gather(
        &mut self,
        opcode: u32,
        wr_id: u64,
        sges: &[Sge],
        flags: Flags,
    ) -> Result<(), ChainError> {
        if sges.len() > self.sges_per_wr {
            return Err(ChainError::Elements(sges.len(), self.sges_per_wr));
        }
        let bytes: u64 = sges.iter().map(|sge| u64::from(sge.bytes)).sum();
        // An element of no bytes would mean 2 GiB to some adapters.
        if bytes == 0 || bytes > self.wr_bytes || sges.iter().any(|sge| sge.bytes == 0) {
            return Err(ChainError::Bytes(bytes, self.wr_bytes));
        }
        if self.room() == 0 {
            return Err(ChainError::Full);
        }
        let first_sge = self.sge_count;
        for (to, sge) in self.sges[first_sge..].iter_mut().zip(sges) {
            *to = ibv_sge {
                addr: sge.address,
                length: sge.bytes,
                lkey: sge.lkey,
            };
        }
        self.sge_count += sges.len();
        // `sges_per_wr` is at most CHAIN_SGES_MAX.
        let count = u32::try_from(sges.len()).unwrap_or(u32::MAX);
        self.demands.sges = self.demands.sges.max(count);
        self.demands.bytes = self.demands.bytes.max(bytes);
        let part = Part {
            first_sge,
            inline_at: None,
        };
        self.push(opcode, wr_id, count, flags.bits(), part);
        Ok(())
    }

    fn push(&mut self, opcode: u32, wr_id: u64, sges: u32, send_flags: u32, part: Part) {
        debug_assert!(self.wr_count < self.wrs.len(), "the callers leave room");
        let wr = &mut self.wrs[self.wr_count];
        *wr = blank_wr();
        wr.wr_id = wr_id;
        wr.opcode = opcode;
        wr.num_sge = sges.cast_signed() as c_int;
        wr.send_flags = send_flags;
        self.parts[self.wr_count] = part;
        self.wr_count += 1;
    }

    /// Gives the request just added its target.
    fn aim(&mut self, to: RemotePlace, imm_data: u32) {
        let wr = &mut self.wrs[self.wr_count - 1];
        wr.imm_data = imm_data;
        wr.wr = ibv_send_wr_target {
            rdma: ibv_send_wr_rdma {
                remote_addr: to.address,
                rkey: to.rkey,
            },
        };
    }

    /// Links the requests and elements; the head, null for an empty chain. Valid until the chain is touched again.
    pub(super) fn link(&mut self) -> *mut ibv_send_wr {
        let inline = self.inline.as_ptr().expose_provenance() as u64;
        for part in &self.parts[..self.wr_count] {
            if let Some(at) = part.inline_at {
                self.sges[part.first_sge].addr = inline + at as u64;
            }
        }
        let sges = self.sges.as_mut_ptr();
        // All requests are reached through one pointer, so that no later reference invalidates an earlier link.
        let wrs = self.wrs.as_mut_ptr();
        let mut next = ptr::null_mut();
        for (index, part) in self.parts[..self.wr_count].iter().enumerate().rev() {
            let wr = wrs.wrapping_add(index);
            // SAFETY: `wr_count` is at most the number of requests, and nothing else refers to them now.
            unsafe { (*wr).sg_list = sges.wrapping_add(part.first_sge) };
            // SAFETY: as above.
            unsafe { (*wr).next = next };
            next = wr;
        }
        next
    }

    /// How many requests precede `bad`, the first that was refused.
    ///
    /// A provider that did not name one of this chain's may have taken any of them; then all count as accepted, since
    /// memory that may be in use must not be given back.
    pub(super) fn accepted_before(&self, bad: *const ibv_send_wr) -> usize {
        (0..self.wr_count)
            .find(|&index| ptr::eq(&raw const self.wrs[index], bad))
            .unwrap_or(self.wr_count)
    }
}

fn blank_wr() -> ibv_send_wr {
    // SAFETY: the request is integers, pointers that may be null, and unions of these.
    unsafe { mem::zeroed() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLACE: RemotePlace = RemotePlace {
        address: 0x1000,
        rkey: 9,
    };
    const SIGNALLED: Flags = Flags {
        signalled: true,
        solicited: true,
    };

    fn sge(bytes: u32) -> Sge {
        Sge {
            address: 0x7000,
            bytes,
            lkey: 3,
        }
    }

    /// Follows the links as an adapter would: each request with its elements.
    fn walk(chain: &mut Chain) -> Vec<(ibv_send_wr, Vec<ibv_sge>)> {
        let mut next = chain.link();
        let mut seen = Vec::new();
        while !next.is_null() {
            // SAFETY: the chain was just linked and is not touched while this runs.
            let wr = unsafe { *next };
            let count = usize::try_from(wr.num_sge).expect("a count");
            // SAFETY: as above.
            let sges = unsafe { std::slice::from_raw_parts(wr.sg_list, count) }.to_vec();
            seen.push((wr, sges));
            next = wr.next;
        }
        seen
    }

    #[test]
    fn a_chain_reads_back_as_it_was_built_even_after_a_move() {
        let mut chain = Chain::new(4, 6, 1 << 20);
        chain
            .write(1, &[sge(100), sge(200)], PLACE, Flags::default())
            .expect("room");
        chain.send_inline(2, b"notice", SIGNALLED).expect("room");
        let mut moved = Box::new(chain);
        let seen = walk(&mut moved);
        assert_eq!(seen.len(), 2);
        assert_eq!(seen[0].0.wr_id, 1);
        assert_eq!(seen[0].0.send_flags, 0);
        // SAFETY: a WRITE has this target.
        let target = unsafe { seen[0].0.wr.rdma };
        assert_eq!((target.remote_addr, target.rkey), (0x1000, 9));
        assert_eq!(seen[0].1.iter().map(|sge| sge.length).sum::<u32>(), 300);
        let (last, inline) = &seen[1];
        assert_eq!(
            last.send_flags,
            sys::IBV_SEND_INLINE | sys::IBV_SEND_SIGNALED | sys::IBV_SEND_SOLICITED
        );
        let from =
            ptr::with_exposed_provenance::<u8>(usize::try_from(inline[0].addr).expect("fits"));
        // SAFETY: the element points at the chain's inline bytes.
        let bytes = unsafe { std::slice::from_raw_parts(from, 6) };
        assert_eq!(bytes, b"notice");
        assert_eq!(
            moved.demands(),
            Demands {
                sges: 2,
                inline_bytes: 6,
                bytes: 300,
                immediate: false
            }
        );
    }

    #[test]
    fn bounds_refuse_and_leave_the_chain_as_it_was() {
        let mut chain = Chain::new(2, 2, 1000);
        let none = Flags::default();
        let three = [sge(1), sge(1), sge(1)];
        assert_eq!(
            chain.write(0, &three, PLACE, none),
            Err(ChainError::Elements(3, 2))
        );
        assert_eq!(
            chain.write(0, &[], PLACE, none),
            Err(ChainError::Bytes(0, 1000))
        );
        assert_eq!(
            chain.write(0, &[sge(600), sge(401)], PLACE, none),
            Err(ChainError::Bytes(1001, 1000))
        );
        assert_eq!(
            chain.write(0, &[sge(5), sge(0)], PLACE, none),
            Err(ChainError::Bytes(5, 1000))
        );
        assert_eq!(
            chain.send_inline(0, &[0; CHAIN_INLINE_MAX + 1], none),
            Err(ChainError::Bytes(257, 256))
        );
        assert!(chain.is_empty());
        chain.send_inline(0, &[0; 200], none).expect("room");
        assert_eq!(
            chain.send_inline(1, &[0; 100], none),
            Err(ChainError::Full),
            "the inline bytes are used up"
        );
        chain.send(1, &[sge(1)], none).expect("room");
        assert_eq!(chain.send(2, &[sge(1)], none), Err(ChainError::Full));
        assert_eq!(chain.room(), 0);
        chain.clear();
        assert_eq!(chain.demands(), Demands::default());
        assert!(chain.link().is_null());
        let longest = Chain::new(1, 99, u64::MAX);
        assert_eq!(longest.wr_bytes, WR_BYTES_MAX);
        assert_eq!(longest.sges_per_wr, CHAIN_SGES_MAX);
    }

    proptest! {
        #[test]
        fn every_refused_request_is_found_and_strangers_count_as_all_accepted(count in 1..=CHAIN_WRS_MAX) {
            let mut chain = Chain::new(CHAIN_WRS_MAX, 1, 100);
            for wr_id in 0..count {
                chain
                    .write_with_imm(wr_id as u64, &[sge(1)], PLACE, 77, Flags::default())
                    .expect("room");
            }
            let seen = walk(&mut chain);
            prop_assert_eq!(seen.len(), count);
            prop_assert!(seen.iter().all(|(wr, _)| wr.imm_data == 77u32.to_be()));
            let head = chain.link();
            for index in 0..count {
                prop_assert_eq!(chain.accepted_before(head.wrapping_add(index)), index);
            }
            prop_assert_eq!(chain.accepted_before(ptr::null()), count);
        }
    }
}
