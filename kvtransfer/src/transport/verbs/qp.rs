//! Queue pairs: one reliable connection each.
//!
//! A queue pair is never recycled (eRDMA ignores a reset): it is made, connected, used, moved to the error state and
//! destroyed. Its sizes are those we asked for; what the provider reports counts in units of its own.
#![expect(unsafe_code, reason = "calls into libibverbs")]

use std::{
    cell::Cell,
    marker::PhantomData,
    mem,
    ptr::{self, NonNull},
    sync::Arc,
};

use super::{
    chain::Chain,
    cm::IdHandle,
    cq::Cq,
    error::{VerbsError, check, check_pointer},
    pd::Pd,
    sys::{self, ibv_gid, ibv_qp, ibv_qp_attr, ibv_qp_cap, ibv_qp_init_attr, ibv_recv_wr, ibv_sge},
};

/// Packet sequence numbers have 24 bits.
pub(crate) const PSN_MASK: u32 = 0x00ff_ffff;

/// Waiting for an acknowledgement, as 4.096 µs · 2^n: about 67 ms. eRDMA ignores it.
const ACK_TIMEOUT: u8 = 14;
/// Retransmissions before the connection is given up.
const RETRY_COUNT: u8 = 7;
/// Waits for a receive before the connection is given up. Credits see to it that there is one; 7 would wait for ever.
const RNR_RETRY_COUNT: u8 = 6;
/// How long the peer waits for our receive, as the header's code: 12 is 0.64 ms.
const MIN_RNR_TIMER: u8 = 12;
/// READs in flight; we post none, but some providers refuse zero.
const READS_MAX: u8 = 1;
/// Hops of a routed packet.
const HOP_LIMIT: u8 = 64;

/// How large a queue pair is. All of them are counts or bytes that we chose and keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QpCaps {
    /// Requests outstanding in the send queue.
    pub(crate) max_send_wr: u32,
    /// Receives outstanding; at least one (eRDMA refuses none).
    pub(crate) max_recv_wr: u32,
    /// Elements of a send request; receives have one.
    pub(crate) max_send_sge: u32,
    /// Inline bytes of a request.
    pub(crate) max_inline_bytes: u32,
    /// Bytes of a request.
    pub(crate) wr_bytes_max: u64,
}

impl QpCaps {
    /// Entries that a queue pair of this size needs in its completion queue, if it has only one.
    pub(crate) fn completions(&self) -> u32 {
        self.max_send_wr.saturating_add(self.max_recv_wr)
    }

    pub(super) fn raw(&self) -> ibv_qp_cap {
        ibv_qp_cap {
            max_send_wr: self.max_send_wr,
            max_recv_wr: self.max_recv_wr,
            max_send_sge: self.max_send_sge,
            max_recv_sge: 1,
            max_inline_data: self.max_inline_bytes,
        }
    }
}

/// One end of a connection that is made out of band; exchanged with the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QpAddress {
    /// The port's GID.
    pub(crate) gid: [u8; 16],
    /// InfiniBand's local address; zero on Ethernet.
    pub(crate) lid: u16,
    /// The queue pair's number.
    pub(crate) qp_num: u32,
    /// The first packet's number; 24 bits.
    pub(crate) psn: u32,
}

/// Where our end of a connection leaves the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LocalPath {
    /// The port, from 1.
    pub(crate) port: u8,
    /// Our GID's index, found by address and type.
    pub(crate) gid_index: u8,
    /// `ibv_mtu`: the lesser of both ends'.
    pub(crate) mtu: u32,
    /// Our first packet's number.
    pub(crate) psn: u32,
}

/// Why a chain was not posted as a whole. The queue pair should be given up unless nothing was accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{accepted} work requests were accepted, then: {source}")]
pub(crate) struct PostError {
    /// Requests, from the head, that the adapter took and will carry out or flush.
    pub(crate) accepted: usize,
    /// Why the next was refused.
    pub(crate) source: VerbsError,
}

/// Who made the queue pair, and so who destroys it.
enum Owner {
    Verbs,
    Cm(Arc<IdHandle>),
}

/// A queue pair. It may move between threads but is used by one at a time.
pub(crate) struct Qp {
    raw: NonNull<ibv_qp>,
    qp_num: u32,
    caps: QpCaps,
    reported_inline_bytes: u32,
    owner: Owner,
    send_cq: Arc<Cq>,
    recv_cq: Arc<Cq>,
    pd: Arc<Pd>,
    _one_thread_at_a_time: PhantomData<Cell<()>>,
}

// SAFETY: libibverbs does not tie queue pairs to threads; every call below takes `&mut self` or only reads.
unsafe impl Send for Qp {}

impl Qp {
    /// Makes a queue pair, to be connected out of band.
    pub(crate) fn create(
        pd: &Arc<Pd>,
        send_cq: &Arc<Cq>,
        recv_cq: &Arc<Cq>,
        caps: QpCaps,
    ) -> Result<Self, VerbsError> {
        Self::build(pd, send_cq, recv_cq, caps, Owner::Verbs, |attributes| {
            let verbs = &pd.context().library().verbs;
            // SAFETY: the domain and the queues are alive, and kept so by the result.
            let raw = unsafe { (verbs.ibv_create_qp)(pd.raw(), attributes) };
            check_pointer("ibv_create_qp", raw)
        })
    }

    /// Makes the queue pair of an rdma_cm connection, whose states librdmacm drives.
    pub(super) fn create_on(
        id: &Arc<IdHandle>,
        pd: &Arc<Pd>,
        send_cq: &Arc<Cq>,
        recv_cq: &Arc<Cq>,
        caps: QpCaps,
    ) -> Result<Self, VerbsError> {
        let owner = Owner::Cm(Arc::clone(id));
        Self::build(pd, send_cq, recv_cq, caps, owner, |attributes| {
            // SAFETY: the domain and the queues are alive, and kept so by the result.
            unsafe { id.create_qp(pd, attributes) }
        })
    }

    fn build(
        pd: &Arc<Pd>,
        send_cq: &Arc<Cq>,
        recv_cq: &Arc<Cq>,
        caps: QpCaps,
        owner: Owner,
        create: impl FnOnce(*mut ibv_qp_init_attr) -> Result<NonNull<ibv_qp>, VerbsError>,
    ) -> Result<Self, VerbsError> {
        if caps.max_send_wr == 0 || caps.max_recv_wr == 0 || caps.max_send_sge == 0 {
            return Err(VerbsError::Misuse(
                "a queue pair needs at least one send, one receive and one element",
            ));
        }
        let device = pd.context().raw();
        if send_cq.context().raw() != device || recv_cq.context().raw() != device {
            return Err(VerbsError::Misuse(
                "a queue pair's completion queues are on another device",
            ));
        }
        send_cq.reserve(caps.max_send_wr)?;
        if let Err(error) = recv_cq.reserve(caps.max_recv_wr) {
            send_cq.release(caps.max_send_wr);
            return Err(error);
        }
        let mut attributes = ibv_qp_init_attr {
            qp_context: ptr::null_mut(),
            send_cq: send_cq.raw(),
            recv_cq: recv_cq.raw(),
            srq: ptr::null_mut(),
            cap: caps.raw(),
            qp_type: sys::IBV_QPT_RC,
            sq_sig_all: 0,
        };
        let raw = create(&raw mut attributes).inspect_err(|_| {
            send_cq.release(caps.max_send_wr);
            recv_cq.release(caps.max_recv_wr);
        })?;
        // SAFETY: the queue pair was just made; its number never changes.
        let qp_num = unsafe { (*raw.as_ptr()).qp_num };
        Ok(Self {
            raw,
            qp_num,
            caps,
            reported_inline_bytes: attributes.cap.max_inline_data,
            owner,
            send_cq: Arc::clone(send_cq),
            recv_cq: Arc::clone(recv_cq),
            pd: Arc::clone(pd),
            _one_thread_at_a_time: PhantomData,
        })
    }

    /// Its number, which the peer and completions name it by.
    pub(crate) fn qp_num(&self) -> u32 {
        self.qp_num
    }

    /// Its size, as asked for.
    pub(crate) fn caps(&self) -> QpCaps {
        self.caps
    }

    /// The inline bytes that the provider wrote back when it made the queue pair. Only the probe looks at them.
    pub(super) fn reported_inline_bytes(&self) -> u32 {
        self.reported_inline_bytes
    }

    /// From new to INIT: receives can be posted.
    pub(crate) fn enter_init(&mut self, port: u8) -> Result<(), VerbsError> {
        let mut attributes = blank_attributes();
        attributes.qp_state = sys::IBV_QPS_INIT;
        attributes.port_num = port;
        attributes.qp_access_flags = sys::IBV_ACCESS_LOCAL_WRITE | sys::IBV_ACCESS_REMOTE_WRITE;
        let mask = sys::IBV_QP_STATE
            | sys::IBV_QP_PKEY_INDEX
            | sys::IBV_QP_PORT
            | sys::IBV_QP_ACCESS_FLAGS;
        self.modify(attributes, mask)
    }

    /// From INIT to RTR: packets of `peer` are accepted. On eRDMA this connects both directions.
    pub(crate) fn enter_rtr(
        &mut self,
        path: &LocalPath,
        peer: &QpAddress,
    ) -> Result<(), VerbsError> {
        let mut attributes = blank_attributes();
        attributes.qp_state = sys::IBV_QPS_RTR;
        attributes.path_mtu = path.mtu;
        attributes.dest_qp_num = peer.qp_num;
        attributes.rq_psn = peer.psn & PSN_MASK;
        attributes.max_dest_rd_atomic = READS_MAX;
        attributes.min_rnr_timer = MIN_RNR_TIMER;
        attributes.ah_attr.grh.dgid = ibv_gid { raw: peer.gid };
        attributes.ah_attr.grh.sgid_index = path.gid_index;
        attributes.ah_attr.grh.hop_limit = HOP_LIMIT;
        attributes.ah_attr.is_global = 1;
        attributes.ah_attr.dlid = peer.lid;
        attributes.ah_attr.port_num = path.port;
        let mask = sys::IBV_QP_STATE
            | sys::IBV_QP_AV
            | sys::IBV_QP_PATH_MTU
            | sys::IBV_QP_DEST_QPN
            | sys::IBV_QP_RQ_PSN
            | sys::IBV_QP_MAX_DEST_RD_ATOMIC
            | sys::IBV_QP_MIN_RNR_TIMER;
        self.modify(attributes, mask)
    }

    /// From RTR to RTS: sends can be posted.
    pub(crate) fn enter_rts(&mut self, path: &LocalPath) -> Result<(), VerbsError> {
        let mut attributes = blank_attributes();
        attributes.qp_state = sys::IBV_QPS_RTS;
        attributes.sq_psn = path.psn & PSN_MASK;
        attributes.timeout = ACK_TIMEOUT;
        attributes.retry_cnt = RETRY_COUNT;
        attributes.rnr_retry = RNR_RETRY_COUNT;
        attributes.max_rd_atomic = READS_MAX;
        let mask = sys::IBV_QP_STATE
            | sys::IBV_QP_SQ_PSN
            | sys::IBV_QP_TIMEOUT
            | sys::IBV_QP_RETRY_CNT
            | sys::IBV_QP_RNR_RETRY
            | sys::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify(attributes, mask)
    }

    /// To the error state: whatever is posted is flushed (on older eRDMA stacks, without a completion).
    pub(crate) fn enter_error(&mut self) -> Result<(), VerbsError> {
        let mut attributes = blank_attributes();
        attributes.qp_state = sys::IBV_QPS_ERR;
        self.modify(attributes, sys::IBV_QP_STATE)
    }

    fn modify(&mut self, mut attributes: ibv_qp_attr, mask: i32) -> Result<(), VerbsError> {
        let verbs = &self.pd.context().library().verbs;
        // SAFETY: the queue pair is alive and ours; the mask names fields that were set.
        let code = unsafe { (verbs.ibv_modify_qp)(self.raw.as_ptr(), &raw mut attributes, mask) };
        check("ibv_modify_qp", code)
    }

    /// Posts a chain with one doorbell.
    ///
    /// The caller counts what is outstanding ([`super::slots::Slots`]): providers do not notice an overfull queue.
    /// What the elements name is reached by their keys alone, so it is the registrations' contracts that keep the
    /// memory valid; the chain itself is read before this returns.
    pub(crate) fn post(&mut self, chain: &mut Chain) -> Result<(), PostError> {
        self.admit(chain).map_err(|source| PostError {
            accepted: 0,
            source,
        })?;
        let head = chain.link();
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is alive and used by this thread alone; the chain is linked, non-empty and untouched
        // until the call returns. Elements are covered by the contracts of Mr::register.
        let code = unsafe { sys::ibv_post_send(self.raw.as_ptr(), head, &raw mut bad) };
        check("ibv_post_send", code).map_err(|source| PostError {
            accepted: chain.accepted_before(bad),
            source,
        })
    }

    /// Whether the queue pair can take such a chain at all.
    fn admit(&self, chain: &Chain) -> Result<(), VerbsError> {
        let demands = chain.demands();
        let limit = |what, asked: u64, limit: u64| {
            if asked > limit {
                Err(VerbsError::Limit { what, asked, limit })
            } else {
                Ok(())
            }
        };
        if chain.is_empty() {
            return Err(VerbsError::Misuse("an empty chain cannot be posted"));
        }
        let caps = &self.caps;
        limit("requests", chain.len() as u64, caps.max_send_wr.into())?;
        limit("elements", demands.sges.into(), caps.max_send_sge.into())?;
        limit(
            "inline bytes",
            demands.inline_bytes.into(),
            caps.max_inline_bytes.into(),
        )?;
        limit("bytes of a request", demands.bytes, caps.wr_bytes_max)
    }

    /// Posts a receive of `bytes` at `address`. The caller counts receives: at most `max_recv_wr` outstanding.
    pub(crate) fn post_recv(
        &mut self,
        wr_id: u64,
        address: u64,
        bytes: u32,
        lkey: u32,
    ) -> Result<(), VerbsError> {
        let mut sge = ibv_sge {
            addr: address,
            length: bytes,
            lkey,
        };
        let mut wr = ibv_recv_wr {
            wr_id,
            next: ptr::null_mut(),
            sg_list: &raw mut sge,
            num_sge: 1,
        };
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is alive and used by this thread alone; request and element are read before the call
        // returns. The buffer is covered by the contract of Mr::register.
        let code = unsafe { sys::ibv_post_recv(self.raw.as_ptr(), &raw mut wr, &raw mut bad) };
        check("ibv_post_recv", code)
    }
}

impl Drop for Qp {
    fn drop(&mut self) {
        // The gates keep both queues from being polled meanwhile. They are taken in one order everywhere, and once if
        // both queues are one.
        let (first, second) = if self.send_cq.key() <= self.recv_cq.key() {
            (&self.send_cq, &self.recv_cq)
        } else {
            (&self.recv_cq, &self.send_cq)
        };
        let first_gate = first.gate();
        let second_gate = (!Arc::ptr_eq(first, second)).then(|| second.gate());
        match &self.owner {
            Owner::Verbs => {
                let verbs = &self.pd.context().library().verbs;
                // SAFETY: the queue pair is ours, destroyed once, and no other thread uses it.
                let code = unsafe { (verbs.ibv_destroy_qp)(self.raw.as_ptr()) };
                if let Err(error) = check("ibv_destroy_qp", code) {
                    tracing::error!(%error, qp_num = self.qp_num, "a queue pair was not destroyed: its peer may still write");
                }
            }
            // SAFETY: as above; the id is kept alive by the handle.
            Owner::Cm(id) => unsafe { id.destroy_qp() },
        }
        drop(second_gate);
        drop(first_gate);
        self.send_cq.release(self.caps.max_send_wr);
        self.recv_cq.release(self.caps.max_recv_wr);
    }
}

fn blank_attributes() -> ibv_qp_attr {
    // SAFETY: the struct is integers; zero is valid for each.
    unsafe { mem::zeroed() }
}
