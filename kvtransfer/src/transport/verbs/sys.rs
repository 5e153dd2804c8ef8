//! What we use of `infiniband/verbs.h` and `rdma/rdma_cma.h`, declared by hand: layouts, numbers and the inline calls.
//!
//! Generated bindings would need the headers and libclang in every build and would turn enums that devices fill in
//! into Rust enums, where an unknown value is undefined behaviour; here they are plain integers. The layouts follow
//! rdma-core 44, whose ABI newer versions keep. `kvtransfer/oracle` includes this file with its parts and compares every size, offset
//! and number with the `rdma-sys` crate, so they name nothing outside core, std and libc.
#![expect(non_camel_case_types, reason = "the names are those of the C headers")]

use std::ffi::{c_char, c_int, c_uint, c_void};

use libc::{pthread_cond_t, pthread_mutex_t};

// The paths are spelled out, since a file that is itself included by path looks for its modules elsewhere.
#[path = "sys/connection.rs"]
mod connection;
#[path = "sys/inline.rs"]
mod inline;
#[path = "sys/numbers.rs"]
mod numbers;

pub(crate) use connection::*;
pub(crate) use inline::*;
pub(crate) use numbers::*;

/// A slot of a table of function pointers that we never call; only its place counts.
pub(crate) type unused_fn = Option<unsafe extern "C" fn()>;

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
