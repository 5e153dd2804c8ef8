//! What we use of `infiniband/verbs.h` and `rdma/rdma_cma.h`, declared by hand: layouts, numbers and the inline calls.
//!
//! Generated bindings would need the headers and libclang in every build and would turn enums that devices fill in
//! into Rust enums, where an unknown value is undefined behaviour; here they are plain integers. The layouts follow
//! rdma-core 44, whose ABI newer versions keep. `kvtransfer/oracle` includes this file and compares every size, offset
//! and number with the `rdma-sys` crate, so it names nothing outside core, std and libc.
#![expect(non_camel_case_types, reason = "the names are those of the C headers")]
#![expect(unsafe_code, reason = "the inline calls go through function pointers")]

use std::ffi::{c_char, c_int, c_uint, c_void};

use libc::{pthread_cond_t, pthread_mutex_t, sockaddr_storage};

/// A slot of a table of function pointers that we never call; only its place counts.
pub(crate) type unused_fn = Option<unsafe extern "C" fn()>;

/// Length of a device's name (`IBV_SYSFS_NAME_MAX`).
pub(crate) const IBV_SYSFS_NAME_MAX: usize = 64;
/// Length of a path in sysfs (`IBV_SYSFS_PATH_MAX`).
pub(crate) const IBV_SYSFS_PATH_MAX: usize = 256;

/// `ibv_node_type`: an InfiniBand or RoCE adapter.
pub(crate) const IBV_NODE_CA: c_int = 1;
/// `ibv_node_type`: an iWARP adapter.
pub(crate) const IBV_NODE_RNIC: c_int = 4;
/// `ibv_transport_type`: InfiniBand and RoCE.
pub(crate) const IBV_TRANSPORT_IB: c_int = 0;
/// `ibv_transport_type`: iWARP.
pub(crate) const IBV_TRANSPORT_IWARP: c_int = 1;

/// An adapter, as `ibv_get_device_list` reports it. Lives in the library.
#[repr(C)]
pub(crate) struct ibv_device {
    pub(crate) _ops: [unused_fn; 2],
    pub(crate) node_type: c_int,
    pub(crate) transport_type: c_int,
    /// Name of the kernel's device, "erdma_0".
    pub(crate) name: [c_char; IBV_SYSFS_NAME_MAX],
    /// Name of the character device, "uverbs0".
    pub(crate) dev_name: [c_char; IBV_SYSFS_NAME_MAX],
    /// The `infiniband_verbs` class device in sysfs.
    pub(crate) dev_path: [c_char; IBV_SYSFS_PATH_MAX],
    /// The `infiniband` class device in sysfs.
    pub(crate) ibdev_path: [c_char; IBV_SYSFS_PATH_MAX],
}

/// `poll_cq` of a provider: how many completions it wrote, or below zero.
pub(crate) type poll_cq_fn = unsafe extern "C" fn(*mut ibv_cq, c_int, *mut ibv_wc) -> c_int;
/// `req_notify_cq` of a provider.
pub(crate) type req_notify_cq_fn = unsafe extern "C" fn(*mut ibv_cq, c_int) -> c_int;
/// `post_send` of a provider.
pub(crate) type post_send_fn =
    unsafe extern "C" fn(*mut ibv_qp, *mut ibv_send_wr, *mut *mut ibv_send_wr) -> c_int;
/// `post_recv` of a provider.
pub(crate) type post_recv_fn =
    unsafe extern "C" fn(*mut ibv_qp, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> c_int;

/// The provider's table inside a context. Only the calls of the data path are reached through it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_context_ops {
    /// `query_device` to `dereg_mr`, of the old ABI.
    pub(crate) _compat_query_device: [unused_fn; 7],
    pub(crate) alloc_mw: unused_fn,
    pub(crate) bind_mw: unused_fn,
    pub(crate) dealloc_mw: unused_fn,
    pub(crate) _compat_create_cq: unused_fn,
    pub(crate) poll_cq: Option<poll_cq_fn>,
    pub(crate) req_notify_cq: Option<req_notify_cq_fn>,
    /// `cq_event` to `destroy_srq`, of the old ABI.
    pub(crate) _compat_cq_event: [unused_fn; 7],
    pub(crate) post_srq_recv: unused_fn,
    /// `create_qp` to `destroy_qp`, of the old ABI.
    pub(crate) _compat_create_qp: [unused_fn; 4],
    pub(crate) post_send: Option<post_send_fn>,
    pub(crate) post_recv: Option<post_recv_fn>,
    /// `create_ah` to `async_event`, of the old ABI.
    pub(crate) _compat_create_ah: [unused_fn; 5],
}

/// An opened adapter.
#[repr(C)]
pub(crate) struct ibv_context {
    pub(crate) device: *mut ibv_device,
    pub(crate) ops: ibv_context_ops,
    pub(crate) cmd_fd: c_int,
    pub(crate) async_fd: c_int,
    pub(crate) num_comp_vectors: c_int,
    pub(crate) mutex: pthread_mutex_t,
    pub(crate) abi_compat: *mut c_void,
}

/// A GID: 16 bytes, as they go on the wire.
///
/// In C a union with two big-endian 64-bit words, from which it has its alignment.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ibv_gid {
    pub(crate) raw: [u8; 16],
}

/// What `ibv_query_device` reports.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_device_attr {
    pub(crate) fw_ver: [c_char; 64],
    /// Big-endian.
    pub(crate) node_guid: u64,
    /// Big-endian.
    pub(crate) sys_image_guid: u64,
    pub(crate) max_mr_size: u64,
    pub(crate) page_size_cap: u64,
    pub(crate) vendor_id: u32,
    pub(crate) vendor_part_id: u32,
    pub(crate) hw_ver: u32,
    pub(crate) max_qp: c_int,
    pub(crate) max_qp_wr: c_int,
    pub(crate) device_cap_flags: c_uint,
    pub(crate) max_sge: c_int,
    pub(crate) max_sge_rd: c_int,
    pub(crate) max_cq: c_int,
    pub(crate) max_cqe: c_int,
    pub(crate) max_mr: c_int,
    pub(crate) max_pd: c_int,
    pub(crate) max_qp_rd_atom: c_int,
    pub(crate) max_ee_rd_atom: c_int,
    pub(crate) max_res_rd_atom: c_int,
    pub(crate) max_qp_init_rd_atom: c_int,
    pub(crate) max_ee_init_rd_atom: c_int,
    pub(crate) atomic_cap: c_int,
    pub(crate) max_ee: c_int,
    pub(crate) max_rdd: c_int,
    pub(crate) max_mw: c_int,
    pub(crate) max_raw_ipv6_qp: c_int,
    pub(crate) max_raw_ethy_qp: c_int,
    pub(crate) max_mcast_grp: c_int,
    pub(crate) max_mcast_qp_attach: c_int,
    pub(crate) max_total_mcast_qp_attach: c_int,
    pub(crate) max_ah: c_int,
    pub(crate) max_fmr: c_int,
    pub(crate) max_map_per_fmr: c_int,
    pub(crate) max_srq: c_int,
    pub(crate) max_srq_wr: c_int,
    pub(crate) max_srq_sge: c_int,
    pub(crate) max_pkeys: u16,
    pub(crate) local_ca_ack_delay: u8,
    pub(crate) phys_port_cnt: u8,
}

/// `ibv_port_state`: no link.
pub(crate) const IBV_PORT_DOWN: c_uint = 1;
/// `ibv_port_state`: link, not yet configured.
pub(crate) const IBV_PORT_INIT: c_uint = 2;
/// `ibv_port_state`: configured, not yet active.
pub(crate) const IBV_PORT_ARMED: c_uint = 3;
/// `ibv_port_state`: carries traffic.
pub(crate) const IBV_PORT_ACTIVE: c_uint = 4;
/// `ibv_mtu`: 256 bytes.
pub(crate) const IBV_MTU_256: c_uint = 1;
/// `ibv_mtu`: 512 bytes.
pub(crate) const IBV_MTU_512: c_uint = 2;
/// `ibv_mtu`: 1024 bytes.
pub(crate) const IBV_MTU_1024: c_uint = 3;
/// `ibv_mtu`: 2048 bytes.
pub(crate) const IBV_MTU_2048: c_uint = 4;
/// `ibv_mtu`: 4096 bytes.
pub(crate) const IBV_MTU_4096: c_uint = 5;
/// Link layer: not said.
pub(crate) const IBV_LINK_LAYER_UNSPECIFIED: u8 = 0;
/// Link layer: InfiniBand.
pub(crate) const IBV_LINK_LAYER_INFINIBAND: u8 = 1;
/// Link layer: Ethernet.
pub(crate) const IBV_LINK_LAYER_ETHERNET: u8 = 2;

/// What `ibv_query_port` reports.
///
/// The exported symbol fills the struct only up to `flags` (`_compat_ibv_port_attr`); the header's inline call fills
/// the rest through the extended table. We call the symbol on a zeroed struct, which every version of the library
/// keeps within these bounds; `port_cap_flags2` then stays zero.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_port_attr {
    pub(crate) state: c_uint,
    pub(crate) max_mtu: c_uint,
    pub(crate) active_mtu: c_uint,
    pub(crate) gid_tbl_len: c_int,
    pub(crate) port_cap_flags: u32,
    pub(crate) max_msg_sz: u32,
    pub(crate) bad_pkey_cntr: u32,
    pub(crate) qkey_viol_cntr: u32,
    pub(crate) pkey_tbl_len: u16,
    pub(crate) lid: u16,
    pub(crate) sm_lid: u16,
    pub(crate) lmc: u8,
    pub(crate) max_vl_num: u8,
    pub(crate) sm_sl: u8,
    pub(crate) subnet_timeout: u8,
    pub(crate) init_type_reply: u8,
    pub(crate) active_width: u8,
    pub(crate) active_speed: u8,
    pub(crate) phys_state: u8,
    pub(crate) link_layer: u8,
    pub(crate) flags: u8,
    pub(crate) port_cap_flags2: u16,
}

/// Asynchronous event: a completion queue overran or failed.
pub(crate) const IBV_EVENT_CQ_ERR: u32 = 0;
/// Asynchronous event: a queue pair failed.
pub(crate) const IBV_EVENT_QP_FATAL: u32 = 1;
/// Asynchronous event: the peer's request was invalid.
pub(crate) const IBV_EVENT_QP_REQ_ERR: u32 = 2;
/// Asynchronous event: the peer's request broke a protection.
pub(crate) const IBV_EVENT_QP_ACCESS_ERR: u32 = 3;
/// Asynchronous event: the first bytes came before RTS.
pub(crate) const IBV_EVENT_COMM_EST: u32 = 4;
/// Asynchronous event: the send queue drained.
pub(crate) const IBV_EVENT_SQ_DRAINED: u32 = 5;
/// Asynchronous event: the path migrated.
pub(crate) const IBV_EVENT_PATH_MIG: u32 = 6;
/// Asynchronous event: the path failed to migrate.
pub(crate) const IBV_EVENT_PATH_MIG_ERR: u32 = 7;
/// Asynchronous event: the adapter failed.
pub(crate) const IBV_EVENT_DEVICE_FATAL: u32 = 8;
/// Asynchronous event: a port came up.
pub(crate) const IBV_EVENT_PORT_ACTIVE: u32 = 9;
/// Asynchronous event: a port went down.
pub(crate) const IBV_EVENT_PORT_ERR: u32 = 10;
/// Asynchronous event: a port's LID changed.
pub(crate) const IBV_EVENT_LID_CHANGE: u32 = 11;
/// Asynchronous event: a port's P_Key table changed.
pub(crate) const IBV_EVENT_PKEY_CHANGE: u32 = 12;
/// Asynchronous event: a port's subnet manager changed.
pub(crate) const IBV_EVENT_SM_CHANGE: u32 = 13;
/// Asynchronous event: a shared receive queue failed.
pub(crate) const IBV_EVENT_SRQ_ERR: u32 = 14;
/// Asynchronous event: a shared receive queue ran low.
pub(crate) const IBV_EVENT_SRQ_LIMIT_REACHED: u32 = 15;
/// Asynchronous event: the last receive of a failed queue pair was taken.
pub(crate) const IBV_EVENT_QP_LAST_WQE_REACHED: u32 = 16;
/// Asynchronous event: the subnet manager asks for registration.
pub(crate) const IBV_EVENT_CLIENT_REREGISTER: u32 = 17;
/// Asynchronous event: a port's GID table changed.
pub(crate) const IBV_EVENT_GID_CHANGE: u32 = 18;
/// Asynchronous event: a work queue failed.
pub(crate) const IBV_EVENT_WQ_FATAL: u32 = 19;

/// What an asynchronous event is about.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) union ibv_async_event_element {
    pub(crate) cq: *mut ibv_cq,
    pub(crate) qp: *mut ibv_qp,
    pub(crate) other: *mut c_void,
    pub(crate) port_num: c_int,
}

/// An asynchronous event of an adapter.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_async_event {
    pub(crate) element: ibv_async_event_element,
    pub(crate) event_type: u32,
}

/// A protection domain.
#[repr(C)]
pub(crate) struct ibv_pd {
    pub(crate) context: *mut ibv_context,
    pub(crate) handle: u32,
}

/// A registered region.
#[repr(C)]
pub(crate) struct ibv_mr {
    pub(crate) context: *mut ibv_context,
    pub(crate) pd: *mut ibv_pd,
    pub(crate) addr: *mut c_void,
    pub(crate) length: usize,
    pub(crate) handle: u32,
    pub(crate) lkey: u32,
    pub(crate) rkey: u32,
}

/// The adapter may write the region.
pub(crate) const IBV_ACCESS_LOCAL_WRITE: u32 = 1;
/// The peer may write the region.
pub(crate) const IBV_ACCESS_REMOTE_WRITE: u32 = 1 << 1;
/// The peer may read the region.
pub(crate) const IBV_ACCESS_REMOTE_READ: u32 = 1 << 2;
/// The peer may change the region atomically.
pub(crate) const IBV_ACCESS_REMOTE_ATOMIC: u32 = 1 << 3;
/// PCIe may reorder the region's writes (an optional bit: masked where the kernel does not know it).
pub(crate) const IBV_ACCESS_RELAXED_ORDERING: u32 = 1 << 20;

/// A completion channel.
#[repr(C)]
pub(crate) struct ibv_comp_channel {
    pub(crate) context: *mut ibv_context,
    pub(crate) fd: c_int,
    pub(crate) refcnt: c_int,
}

/// A completion queue.
#[repr(C)]
pub(crate) struct ibv_cq {
    pub(crate) context: *mut ibv_context,
    pub(crate) channel: *mut ibv_comp_channel,
    pub(crate) cq_context: *mut c_void,
    pub(crate) handle: u32,
    pub(crate) cqe: c_int,
    pub(crate) mutex: pthread_mutex_t,
    pub(crate) cond: pthread_cond_t,
    pub(crate) comp_events_completed: u32,
    pub(crate) async_events_completed: u32,
}

/// Completion status: done.
pub(crate) const IBV_WC_SUCCESS: u32 = 0;
/// Completion status: a local length was wrong.
pub(crate) const IBV_WC_LOC_LEN_ERR: u32 = 1;
/// Completion status: the queue pair refused the request.
pub(crate) const IBV_WC_LOC_QP_OP_ERR: u32 = 2;
/// Completion status: the end-to-end context refused the request.
pub(crate) const IBV_WC_LOC_EEC_OP_ERR: u32 = 3;
/// Completion status: a local key does not cover the buffer.
pub(crate) const IBV_WC_LOC_PROT_ERR: u32 = 4;
/// Completion status: thrown away because the queue pair failed before.
pub(crate) const IBV_WC_WR_FLUSH_ERR: u32 = 5;
/// Completion status: a memory window could not be bound.
pub(crate) const IBV_WC_MW_BIND_ERR: u32 = 6;
/// Completion status: the answer made no sense.
pub(crate) const IBV_WC_BAD_RESP_ERR: u32 = 7;
/// Completion status: the local buffer of a remote write was protected.
pub(crate) const IBV_WC_LOC_ACCESS_ERR: u32 = 8;
/// Completion status: the peer found the request invalid.
pub(crate) const IBV_WC_REM_INV_REQ_ERR: u32 = 9;
/// Completion status: the peer's key does not cover the target.
pub(crate) const IBV_WC_REM_ACCESS_ERR: u32 = 10;
/// Completion status: the peer failed to carry the request out.
pub(crate) const IBV_WC_REM_OP_ERR: u32 = 11;
/// Completion status: the peer never answered.
pub(crate) const IBV_WC_RETRY_EXC_ERR: u32 = 12;
/// Completion status: the peer never had a receive ready.
pub(crate) const IBV_WC_RNR_RETRY_EXC_ERR: u32 = 13;
/// Completion status: reliable datagram domain violated.
pub(crate) const IBV_WC_LOC_RDD_VIOL_ERR: u32 = 14;
/// Completion status: reliable datagram request invalid.
pub(crate) const IBV_WC_REM_INV_RD_REQ_ERR: u32 = 15;
/// Completion status: the peer aborted.
pub(crate) const IBV_WC_REM_ABORT_ERR: u32 = 16;
/// Completion status: invalid end-to-end context.
pub(crate) const IBV_WC_INV_EECN_ERR: u32 = 17;
/// Completion status: end-to-end context in the wrong state.
pub(crate) const IBV_WC_INV_EEC_STATE_ERR: u32 = 18;
/// Completion status: the adapter failed.
pub(crate) const IBV_WC_FATAL_ERR: u32 = 19;
/// Completion status: the answer came too late.
pub(crate) const IBV_WC_RESP_TIMEOUT_ERR: u32 = 20;
/// Completion status: another error.
pub(crate) const IBV_WC_GENERAL_ERR: u32 = 21;

/// Completion opcode: a SEND.
pub(crate) const IBV_WC_SEND: u32 = 0;
/// Completion opcode: a WRITE, with or without immediate.
pub(crate) const IBV_WC_RDMA_WRITE: u32 = 1;
/// Completion opcode: a READ.
pub(crate) const IBV_WC_RDMA_READ: u32 = 2;
/// Completion opcode: a receive; also the bit that every receive has.
pub(crate) const IBV_WC_RECV: u32 = 1 << 7;
/// Completion opcode: the peer's WRITE with immediate took a receive.
pub(crate) const IBV_WC_RECV_RDMA_WITH_IMM: u32 = (1 << 7) + 1;
/// Completion flag: `imm_data` is valid.
pub(crate) const IBV_WC_WITH_IMM: u32 = 1 << 1;

/// A work completion.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_wc {
    pub(crate) wr_id: u64,
    pub(crate) status: u32,
    pub(crate) opcode: u32,
    pub(crate) vendor_err: u32,
    pub(crate) byte_len: u32,
    /// Big-endian. In C a union with `invalidated_rkey`.
    pub(crate) imm_data: u32,
    pub(crate) qp_num: u32,
    pub(crate) src_qp: u32,
    pub(crate) wc_flags: c_uint,
    pub(crate) pkey_index: u16,
    pub(crate) slid: u16,
    pub(crate) sl: u8,
    pub(crate) dlid_path_bits: u8,
}

/// The global part of an address.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_global_route {
    pub(crate) dgid: ibv_gid,
    pub(crate) flow_label: u32,
    pub(crate) sgid_index: u8,
    pub(crate) hop_limit: u8,
    pub(crate) traffic_class: u8,
}

/// The address of a peer.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_ah_attr {
    pub(crate) grh: ibv_global_route,
    pub(crate) dlid: u16,
    pub(crate) sl: u8,
    pub(crate) src_path_bits: u8,
    pub(crate) static_rate: u8,
    pub(crate) is_global: u8,
    pub(crate) port_num: u8,
}

/// How large a queue pair is.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ibv_qp_cap {
    pub(crate) max_send_wr: u32,
    pub(crate) max_recv_wr: u32,
    pub(crate) max_send_sge: u32,
    pub(crate) max_recv_sge: u32,
    pub(crate) max_inline_data: u32,
}

/// `ibv_qp_type`: reliable connection.
pub(crate) const IBV_QPT_RC: c_uint = 2;

/// What `ibv_create_qp` is asked for.
#[repr(C)]
pub(crate) struct ibv_qp_init_attr {
    pub(crate) qp_context: *mut c_void,
    pub(crate) send_cq: *mut ibv_cq,
    pub(crate) recv_cq: *mut ibv_cq,
    pub(crate) srq: *mut c_void,
    pub(crate) cap: ibv_qp_cap,
    pub(crate) qp_type: c_uint,
    pub(crate) sq_sig_all: c_int,
}

/// `ibv_modify_qp` mask: `qp_state`.
pub(crate) const IBV_QP_STATE: c_int = 1;
/// `ibv_modify_qp` mask: `qp_access_flags`.
pub(crate) const IBV_QP_ACCESS_FLAGS: c_int = 1 << 3;
/// `ibv_modify_qp` mask: `pkey_index`.
pub(crate) const IBV_QP_PKEY_INDEX: c_int = 1 << 4;
/// `ibv_modify_qp` mask: `port_num`.
pub(crate) const IBV_QP_PORT: c_int = 1 << 5;
/// `ibv_modify_qp` mask: `ah_attr`.
pub(crate) const IBV_QP_AV: c_int = 1 << 7;
/// `ibv_modify_qp` mask: `path_mtu`.
pub(crate) const IBV_QP_PATH_MTU: c_int = 1 << 8;
/// `ibv_modify_qp` mask: `timeout`.
pub(crate) const IBV_QP_TIMEOUT: c_int = 1 << 9;
/// `ibv_modify_qp` mask: `retry_cnt`.
pub(crate) const IBV_QP_RETRY_CNT: c_int = 1 << 10;
/// `ibv_modify_qp` mask: `rnr_retry`.
pub(crate) const IBV_QP_RNR_RETRY: c_int = 1 << 11;
/// `ibv_modify_qp` mask: `rq_psn`.
pub(crate) const IBV_QP_RQ_PSN: c_int = 1 << 12;
/// `ibv_modify_qp` mask: `max_rd_atomic`.
pub(crate) const IBV_QP_MAX_QP_RD_ATOMIC: c_int = 1 << 13;
/// `ibv_modify_qp` mask: `min_rnr_timer`.
pub(crate) const IBV_QP_MIN_RNR_TIMER: c_int = 1 << 15;
/// `ibv_modify_qp` mask: `sq_psn`.
pub(crate) const IBV_QP_SQ_PSN: c_int = 1 << 16;
/// `ibv_modify_qp` mask: `max_dest_rd_atomic`.
pub(crate) const IBV_QP_MAX_DEST_RD_ATOMIC: c_int = 1 << 17;
/// `ibv_modify_qp` mask: `dest_qp_num`.
pub(crate) const IBV_QP_DEST_QPN: c_int = 1 << 20;

/// `ibv_qp_state`: new.
pub(crate) const IBV_QPS_RESET: c_uint = 0;
/// `ibv_qp_state`: receives can be posted.
pub(crate) const IBV_QPS_INIT: c_uint = 1;
/// `ibv_qp_state`: ready to receive.
pub(crate) const IBV_QPS_RTR: c_uint = 2;
/// `ibv_qp_state`: ready to send.
pub(crate) const IBV_QPS_RTS: c_uint = 3;
/// `ibv_qp_state`: the send queue drains.
pub(crate) const IBV_QPS_SQD: c_uint = 4;
/// `ibv_qp_state`: the send queue failed.
pub(crate) const IBV_QPS_SQE: c_uint = 5;
/// `ibv_qp_state`: failed; everything posted is flushed.
pub(crate) const IBV_QPS_ERR: c_uint = 6;

/// What `ibv_modify_qp` changes.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_qp_attr {
    pub(crate) qp_state: c_uint,
    pub(crate) cur_qp_state: c_uint,
    pub(crate) path_mtu: c_uint,
    pub(crate) path_mig_state: c_uint,
    pub(crate) qkey: u32,
    pub(crate) rq_psn: u32,
    pub(crate) sq_psn: u32,
    pub(crate) dest_qp_num: u32,
    pub(crate) qp_access_flags: c_uint,
    pub(crate) cap: ibv_qp_cap,
    pub(crate) ah_attr: ibv_ah_attr,
    pub(crate) alt_ah_attr: ibv_ah_attr,
    pub(crate) pkey_index: u16,
    pub(crate) alt_pkey_index: u16,
    pub(crate) en_sqd_async_notify: u8,
    pub(crate) sq_draining: u8,
    pub(crate) max_rd_atomic: u8,
    pub(crate) max_dest_rd_atomic: u8,
    pub(crate) min_rnr_timer: u8,
    pub(crate) port_num: u8,
    pub(crate) timeout: u8,
    pub(crate) retry_cnt: u8,
    pub(crate) rnr_retry: u8,
    pub(crate) alt_port_num: u8,
    pub(crate) alt_timeout: u8,
    pub(crate) rate_limit: u32,
}

/// A queue pair.
#[repr(C)]
pub(crate) struct ibv_qp {
    pub(crate) context: *mut ibv_context,
    pub(crate) qp_context: *mut c_void,
    pub(crate) pd: *mut ibv_pd,
    pub(crate) send_cq: *mut ibv_cq,
    pub(crate) recv_cq: *mut ibv_cq,
    pub(crate) srq: *mut c_void,
    pub(crate) handle: u32,
    pub(crate) qp_num: u32,
    pub(crate) state: c_uint,
    pub(crate) qp_type: c_uint,
    pub(crate) mutex: pthread_mutex_t,
    pub(crate) cond: pthread_cond_t,
    pub(crate) events_completed: u32,
}

/// One piece of local memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ibv_sge {
    pub(crate) addr: u64,
    pub(crate) length: u32,
    pub(crate) lkey: u32,
}

/// `ibv_wr_opcode`: WRITE.
pub(crate) const IBV_WR_RDMA_WRITE: c_uint = 0;
/// `ibv_wr_opcode`: WRITE that takes a receive at the peer.
pub(crate) const IBV_WR_RDMA_WRITE_WITH_IMM: c_uint = 1;
/// `ibv_wr_opcode`: SEND.
pub(crate) const IBV_WR_SEND: c_uint = 2;
/// `ibv_wr_opcode`: SEND with four bytes in the completion.
pub(crate) const IBV_WR_SEND_WITH_IMM: c_uint = 3;
/// `ibv_wr_opcode`: READ.
pub(crate) const IBV_WR_RDMA_READ: c_uint = 4;
/// Send flag: wait for earlier READs.
pub(crate) const IBV_SEND_FENCE: c_uint = 1;
/// Send flag: make a completion.
pub(crate) const IBV_SEND_SIGNALED: c_uint = 1 << 1;
/// Send flag: wake the peer's solicited-only waiter.
pub(crate) const IBV_SEND_SOLICITED: c_uint = 1 << 2;
/// Send flag: copy the bytes at the post.
pub(crate) const IBV_SEND_INLINE: c_uint = 1 << 3;

/// The target of a WRITE or READ.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ibv_send_wr_rdma {
    pub(crate) remote_addr: u64,
    pub(crate) rkey: u32,
}

/// The target of an atomic operation; unused, it gives the union its size.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_send_wr_atomic {
    pub(crate) remote_addr: u64,
    pub(crate) compare_add: u64,
    pub(crate) swap: u64,
    pub(crate) rkey: u32,
}

/// What a request is aimed at, by its opcode.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) union ibv_send_wr_target {
    pub(crate) rdma: ibv_send_wr_rdma,
    pub(crate) atomic: ibv_send_wr_atomic,
}

/// How a memory window is bound; unused, it gives the last union of a request its size.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_mw_bind_info {
    pub(crate) mr: *mut ibv_mr,
    pub(crate) addr: u64,
    pub(crate) length: u64,
    pub(crate) mw_access_flags: c_uint,
}

/// The last part of a request: in C a union of this and the fields of segmentation offload. Unused.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_send_wr_bind_mw {
    pub(crate) mw: *mut c_void,
    pub(crate) rkey: u32,
    pub(crate) bind_info: ibv_mw_bind_info,
}

/// A request of the send queue.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_send_wr {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut Self,
    pub(crate) sg_list: *mut ibv_sge,
    pub(crate) num_sge: c_int,
    pub(crate) opcode: c_uint,
    pub(crate) send_flags: c_uint,
    /// Big-endian. In C a union with `invalidate_rkey`.
    pub(crate) imm_data: u32,
    pub(crate) wr: ibv_send_wr_target,
    /// `qp_type.xrc.remote_srqn`, the union's only member.
    pub(crate) remote_srqn: u32,
    pub(crate) bind_mw: ibv_send_wr_bind_mw,
}

/// A request of the receive queue.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct ibv_recv_wr {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut Self,
    pub(crate) sg_list: *mut ibv_sge,
    pub(crate) num_sge: c_int,
}

/// `rdma_port_space`: connections, with the port numbers of TCP.
pub(crate) const RDMA_PS_TCP: c_uint = 0x0106;

/// Connection event: `rdma_resolve_addr` is done.
pub(crate) const RDMA_CM_EVENT_ADDR_RESOLVED: u32 = 0;
/// Connection event: `rdma_resolve_addr` failed.
pub(crate) const RDMA_CM_EVENT_ADDR_ERROR: u32 = 1;
/// Connection event: `rdma_resolve_route` is done.
pub(crate) const RDMA_CM_EVENT_ROUTE_RESOLVED: u32 = 2;
/// Connection event: `rdma_resolve_route` failed.
pub(crate) const RDMA_CM_EVENT_ROUTE_ERROR: u32 = 3;
/// Connection event: a peer asks for a connection.
pub(crate) const RDMA_CM_EVENT_CONNECT_REQUEST: u32 = 4;
/// Connection event: the peer answered and we own the queue pair's states.
pub(crate) const RDMA_CM_EVENT_CONNECT_RESPONSE: u32 = 5;
/// Connection event: connecting failed.
pub(crate) const RDMA_CM_EVENT_CONNECT_ERROR: u32 = 6;
/// Connection event: nobody answered.
pub(crate) const RDMA_CM_EVENT_UNREACHABLE: u32 = 7;
/// Connection event: the peer said no.
pub(crate) const RDMA_CM_EVENT_REJECTED: u32 = 8;
/// Connection event: connected.
pub(crate) const RDMA_CM_EVENT_ESTABLISHED: u32 = 9;
/// Connection event: disconnected.
pub(crate) const RDMA_CM_EVENT_DISCONNECTED: u32 = 10;
/// Connection event: the adapter went away.
pub(crate) const RDMA_CM_EVENT_DEVICE_REMOVAL: u32 = 11;
/// Connection event: joined a multicast group.
pub(crate) const RDMA_CM_EVENT_MULTICAST_JOIN: u32 = 12;
/// Connection event: failed to join a multicast group.
pub(crate) const RDMA_CM_EVENT_MULTICAST_ERROR: u32 = 13;
/// Connection event: the address moved to another adapter.
pub(crate) const RDMA_CM_EVENT_ADDR_CHANGE: u32 = 14;
/// Connection event: the queue pair's number may be used again.
pub(crate) const RDMA_CM_EVENT_TIMEWAIT_EXIT: u32 = 15;

/// Where connection events arrive.
#[repr(C)]
pub(crate) struct rdma_event_channel {
    pub(crate) fd: c_int,
}

/// The InfiniBand part of an address.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct rdma_ib_addr {
    pub(crate) sgid: ibv_gid,
    pub(crate) dgid: ibv_gid,
    pub(crate) pkey: u16,
}

/// Both ends of a connection. In C each address is a union whose largest member is `sockaddr_storage`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct rdma_addr {
    pub(crate) src_storage: sockaddr_storage,
    pub(crate) dst_storage: sockaddr_storage,
    pub(crate) ibaddr: rdma_ib_addr,
}

/// The route of a connection.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct rdma_route {
    pub(crate) addr: rdma_addr,
    pub(crate) path_rec: *mut c_void,
    pub(crate) num_paths: c_int,
}

/// A connection, listener or request.
#[repr(C)]
pub(crate) struct rdma_cm_id {
    pub(crate) verbs: *mut ibv_context,
    pub(crate) channel: *mut rdma_event_channel,
    pub(crate) context: *mut c_void,
    pub(crate) qp: *mut ibv_qp,
    pub(crate) route: rdma_route,
    pub(crate) ps: c_uint,
    pub(crate) port_num: u8,
    pub(crate) event: *mut rdma_cm_event,
    pub(crate) send_cq_channel: *mut ibv_comp_channel,
    pub(crate) send_cq: *mut ibv_cq,
    pub(crate) recv_cq_channel: *mut ibv_comp_channel,
    pub(crate) recv_cq: *mut ibv_cq,
    pub(crate) srq: *mut c_void,
    pub(crate) pd: *mut ibv_pd,
    pub(crate) qp_type: c_uint,
}

/// What is said when connecting and accepting.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct rdma_conn_param {
    pub(crate) private_data: *const c_void,
    pub(crate) private_data_len: u8,
    pub(crate) responder_resources: u8,
    pub(crate) initiator_depth: u8,
    pub(crate) flow_control: u8,
    pub(crate) retry_count: u8,
    pub(crate) rnr_retry_count: u8,
    pub(crate) srq: u8,
    pub(crate) qp_num: u32,
}

/// The parameters of a datagram event; unused, it gives the event's union its size.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct rdma_ud_param {
    pub(crate) private_data: *const c_void,
    pub(crate) private_data_len: u8,
    pub(crate) ah_attr: ibv_ah_attr,
    pub(crate) qp_num: u32,
    pub(crate) qkey: u32,
}

/// The parameters of a connection event.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) union rdma_cm_event_param {
    pub(crate) conn: rdma_conn_param,
    pub(crate) ud: rdma_ud_param,
}

/// A connection event.
#[repr(C)]
pub(crate) struct rdma_cm_event {
    pub(crate) id: *mut rdma_cm_id,
    pub(crate) listen_id: *mut rdma_cm_id,
    pub(crate) event: u32,
    pub(crate) status: c_int,
    pub(crate) param: rdma_cm_event_param,
}

/// Posts a chain to a queue pair's send queue (`ibv_post_send`, an inline function of the header).
///
/// Returns zero, or an error number of either sign; `*bad` is then the first request that was not taken.
///
/// # Safety
/// `qp` must be a live queue pair that no other thread uses during the call; `wr` the head of a chain of valid
/// requests, and `bad` writable. The memory of every element that is not inline must stay valid until its request has
/// completed or the queue pair is destroyed.
pub(crate) unsafe fn ibv_post_send(
    qp: *mut ibv_qp,
    wr: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: the caller passes a live queue pair.
    let context = unsafe { (*qp).context };
    // SAFETY: a queue pair's context outlives it.
    let post = unsafe { (*context).ops.post_send };
    match post {
        // SAFETY: the caller vouches for the chain; the pointer is the provider's own.
        Some(post) => unsafe { post(qp, wr, bad) },
        None => {
            // SAFETY: the caller vouches that `bad` may be written.
            unsafe { *bad = wr };
            libc::EOPNOTSUPP
        }
    }
}

/// Posts a chain to a queue pair's receive queue (`ibv_post_recv`).
///
/// Returns zero, or an error number of either sign; `*bad` is then the first request that was not taken.
///
/// # Safety
/// As for [`ibv_post_send`]; the buffers must stay writable until their receives complete or the queue pair is
/// destroyed.
pub(crate) unsafe fn ibv_post_recv(
    qp: *mut ibv_qp,
    wr: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: the caller passes a live queue pair.
    let context = unsafe { (*qp).context };
    // SAFETY: a queue pair's context outlives it.
    let post = unsafe { (*context).ops.post_recv };
    match post {
        // SAFETY: the caller vouches for the chain; the pointer is the provider's own.
        Some(post) => unsafe { post(qp, wr, bad) },
        None => {
            // SAFETY: the caller vouches that `bad` may be written.
            unsafe { *bad = wr };
            libc::EOPNOTSUPP
        }
    }
}

/// Takes up to `entries` completions (`ibv_poll_cq`). Returns how many, or below zero.
///
/// # Safety
/// `cq` must be a live completion queue; `wc` must have room for `entries` completions. No queue pair of `cq` may be
/// destroyed during the call.
pub(crate) unsafe fn ibv_poll_cq(cq: *mut ibv_cq, entries: c_int, wc: *mut ibv_wc) -> c_int {
    // SAFETY: the caller passes a live completion queue.
    let context = unsafe { (*cq).context };
    // SAFETY: a completion queue's context outlives it.
    let poll = unsafe { (*context).ops.poll_cq };
    match poll {
        // SAFETY: the caller vouches for the queue and the array; the pointer is the provider's own.
        Some(poll) => unsafe { poll(cq, entries, wc) },
        None => -libc::EOPNOTSUPP,
    }
}

/// Asks for one event on the queue's channel (`ibv_req_notify_cq`). Returns zero or an error number of either sign.
///
/// # Safety
/// `cq` must be a live completion queue.
pub(crate) unsafe fn ibv_req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    // SAFETY: the caller passes a live completion queue.
    let context = unsafe { (*cq).context };
    // SAFETY: a completion queue's context outlives it.
    let arm = unsafe { (*context).ops.req_notify_cq };
    match arm {
        // SAFETY: the queue is live; the pointer is the provider's own.
        Some(arm) => unsafe { arm(cq, solicited_only) },
        None => libc::EOPNOTSUPP,
    }
}

// The sizes of rdma-core 44 on a 64-bit host; the oracle compares every field.
#[cfg(target_pointer_width = "64")]
const _: () = {
    assert!(size_of::<ibv_device>() == 664, "ibv_device");
    assert!(size_of::<ibv_context_ops>() == 256, "ibv_context_ops");
    assert!(size_of::<ibv_context>() == 328, "ibv_context");
    assert!(size_of::<ibv_device_attr>() == 232, "ibv_device_attr");
    assert!(size_of::<ibv_port_attr>() == 52, "ibv_port_attr");
    assert!(size_of::<ibv_mr>() == 48, "ibv_mr");
    assert!(size_of::<ibv_cq>() == 128, "ibv_cq");
    assert!(size_of::<ibv_wc>() == 48, "ibv_wc");
    assert!(size_of::<ibv_qp>() == 160, "ibv_qp");
    assert!(size_of::<ibv_qp_init_attr>() == 64, "ibv_qp_init_attr");
    assert!(size_of::<ibv_qp_attr>() == 144, "ibv_qp_attr");
    assert!(size_of::<ibv_send_wr>() == 128, "ibv_send_wr");
    assert!(size_of::<ibv_recv_wr>() == 32, "ibv_recv_wr");
    assert!(size_of::<rdma_cm_id>() == 416, "rdma_cm_id");
    assert!(size_of::<rdma_cm_event>() == 80, "rdma_cm_event");
    assert!(size_of::<rdma_conn_param>() == 24, "rdma_conn_param");
};
