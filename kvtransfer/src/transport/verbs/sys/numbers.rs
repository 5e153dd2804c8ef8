//! The numbers of `infiniband/verbs.h` and `rdma/rdma_cma.h`, as plain integers: devices may send others.
#![forbid(unsafe_code)]

use std::ffi::{c_int, c_uint};

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

/// `ibv_qp_type`: reliable connection.
pub(crate) const IBV_QPT_RC: c_uint = 2;

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
