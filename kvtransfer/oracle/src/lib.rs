//! Compares kvtransfer's hand-written verbs declarations with those of `rdma-sys`.
//!
//! rdma-sys is generated from the installed headers, but for the types with unions, which its authors wrote by hand: a
//! second opinion where it cannot be a proof. The tests also check that nothing in the file is left uncompared.
#![cfg(test)]

#[path = "../../src/transport/verbs/sys.rs"]
#[allow(dead_code, reason = "the file is here to be compared, not called")]
#[allow(
    unfulfilled_lint_expectations,
    reason = "this crate does not deny unsafe code"
)]
mod sys;

#[cfg(feature = "enumerate")]
#[path = "../../src/clock.rs"]
mod clock;
#[cfg(feature = "enumerate")]
mod enumerate;
#[cfg(feature = "enumerate")]
#[path = "../../src/time.rs"]
#[allow(dead_code, reason = "only what the probe needs is called")]
mod time;

/// The verbs layer, module by module, as `transport/verbs.rs` has them.
#[cfg(feature = "enumerate")]
#[path = "."]
#[allow(dead_code, reason = "only the enumeration is called")]
#[allow(
    unfulfilled_lint_expectations,
    reason = "this crate does not deny unsafe code"
)]
mod verbs {
    #[path = "../../src/transport/verbs/chain.rs"]
    pub(crate) mod chain;
    #[path = "../../src/transport/verbs/cm.rs"]
    pub(crate) mod cm;
    #[path = "../../src/transport/verbs/context.rs"]
    pub(crate) mod context;
    #[path = "../../src/transport/verbs/cq.rs"]
    pub(crate) mod cq;
    #[path = "../../src/transport/verbs/device.rs"]
    pub(crate) mod device;
    #[path = "../../src/transport/verbs/error.rs"]
    pub(crate) mod error;
    #[path = "../../src/transport/verbs/library.rs"]
    pub(crate) mod library;
    #[path = "../../src/transport/verbs/mr.rs"]
    pub(crate) mod mr;
    #[path = "../../src/transport/verbs/pd.rs"]
    pub(crate) mod pd;
    #[path = "../../src/transport/verbs/probe.rs"]
    pub(crate) mod probe;
    #[path = "../../src/transport/verbs/qp.rs"]
    pub(crate) mod qp;
    #[path = "../../src/transport/verbs/sys.rs"]
    pub(crate) mod sys;
}

use std::collections::BTreeSet;

/// The file and its parts as text, to see that nothing in them is missed.
const SOURCE: &str = concat!(
    include_str!("../../src/transport/verbs/sys.rs"),
    include_str!("../../src/transport/verbs/sys/connection.rs"),
    include_str!("../../src/transport/verbs/sys/numbers.rs"),
);

/// Numbers that rdma-sys does not have: enums without a name in the header.
const WITHOUT_A_RIVAL: [(&str, u64, u64); 5] = [
    ("IBV_SYSFS_NAME_MAX", sys::IBV_SYSFS_NAME_MAX as u64, 64),
    ("IBV_SYSFS_PATH_MAX", sys::IBV_SYSFS_PATH_MAX as u64, 256),
    (
        "IBV_LINK_LAYER_UNSPECIFIED",
        sys::IBV_LINK_LAYER_UNSPECIFIED as u64,
        0,
    ),
    (
        "IBV_LINK_LAYER_INFINIBAND",
        sys::IBV_LINK_LAYER_INFINIBAND as u64,
        1,
    ),
    (
        "IBV_LINK_LAYER_ETHERNET",
        sys::IBV_LINK_LAYER_ETHERNET as u64,
        2,
    ),
];

/// Compares size, alignment and every field's place and size; the names of what was compared.
macro_rules! layouts {
    ($($ours:ident as $theirs:ident { $($field:ident $(= $rival:ident)?),* })*) => {{
        let mut compared = BTreeSet::new();
        $(
            let name = stringify!($ours);
            assert_eq!(size_of::<sys::$ours>(), size_of::<rdma_sys::$theirs>(), "size of {name}");
            assert_eq!(align_of::<sys::$ours>(), align_of::<rdma_sys::$theirs>(), "alignment of {name}");
            $(
                let field = stringify!($field);
                assert_eq!(
                    std::mem::offset_of!(sys::$ours, $field),
                    rival_offset!($theirs, $field $(, $rival)?),
                    "offset of {name}.{field}"
                );
                compared.insert((name, field));
            )*
        )*
        compared
    }};
}

macro_rules! rival_offset {
    ($type:ident, $field:ident) => {
        std::mem::offset_of!(rdma_sys::$type, $field)
    };
    ($type:ident, $field:ident, $rival:ident) => {
        std::mem::offset_of!(rdma_sys::$type, $rival)
    };
}

/// Compares numbers that rdma-sys keeps in a module per enum.
macro_rules! numbers {
    ($compared:ident, $($module:ident { $($name:ident),* })*) => {$($(
        assert_eq!(i64::from(sys::$name), i64::from(rdma_sys::$module::$name), stringify!($name));
        $compared.insert(stringify!($name));
    )*)*};
}

/// Compares numbers that rdma-sys keeps in a type per mask.
macro_rules! masks {
    ($compared:ident, $($mask:ident { $($name:ident),* })*) => {$($(
        assert_eq!(i64::from(sys::$name), i64::from(rdma_sys::$mask::$name.0), stringify!($name));
        $compared.insert(stringify!($name));
    )*)*};
}

/// Compares asynchronous events, which rdma-sys has as a Rust enum.
macro_rules! events {
    ($compared:ident, $($name:ident),*) => {$(
        assert_eq!(sys::$name, rdma_sys::ibv_event_type::$name as u32, stringify!($name));
        $compared.insert(stringify!($name));
    )*};
}

#[test]
fn every_layout_is_the_same() {
    let compared = layouts! {
        ibv_device as ibv_device { _ops, node_type, transport_type, name, dev_name, dev_path, ibdev_path }
        ibv_context_ops as ibv_context_ops { _compat_query_device, alloc_mw, bind_mw, dealloc_mw, _compat_create_cq, poll_cq, req_notify_cq, _compat_cq_event, post_srq_recv, _compat_create_qp, post_send, post_recv, _compat_create_ah }
        ibv_context as ibv_context { device, ops, cmd_fd, async_fd, num_comp_vectors, mutex, abi_compat }
        ibv_gid as ibv_gid { raw }
        ibv_device_attr as ibv_device_attr { fw_ver, node_guid, sys_image_guid, max_mr_size, page_size_cap, vendor_id, vendor_part_id, hw_ver, max_qp, max_qp_wr, device_cap_flags, max_sge, max_sge_rd, max_cq, max_cqe, max_mr, max_pd, max_qp_rd_atom, max_ee_rd_atom, max_res_rd_atom, max_qp_init_rd_atom, max_ee_init_rd_atom, atomic_cap, max_ee, max_rdd, max_mw, max_raw_ipv6_qp, max_raw_ethy_qp, max_mcast_grp, max_mcast_qp_attach, max_total_mcast_qp_attach, max_ah, max_fmr, max_map_per_fmr, max_srq, max_srq_wr, max_srq_sge, max_pkeys, local_ca_ack_delay, phys_port_cnt }
        ibv_port_attr as ibv_port_attr { state, max_mtu, active_mtu, gid_tbl_len, port_cap_flags, max_msg_sz, bad_pkey_cntr, qkey_viol_cntr, pkey_tbl_len, lid, sm_lid, lmc, max_vl_num, sm_sl, subnet_timeout, init_type_reply, active_width, active_speed, phys_state, link_layer, flags, port_cap_flags2 }
        ibv_async_event_element as ibv_async_event_element_t { cq, qp, other = srq, port_num }
        ibv_async_event as ibv_async_event { element, event_type }
        ibv_pd as ibv_pd { context, handle }
        ibv_mr as ibv_mr { context, pd, addr, length, handle, lkey, rkey }
        ibv_comp_channel as ibv_comp_channel { context, fd, refcnt }
        ibv_cq as ibv_cq { context, channel, cq_context, handle, cqe, mutex, cond, comp_events_completed, async_events_completed }
        ibv_wc as ibv_wc { wr_id, status, opcode, vendor_err, byte_len, imm_data = imm_data_invalidated_rkey_union, qp_num, src_qp, wc_flags, pkey_index, slid, sl, dlid_path_bits }
        ibv_global_route as ibv_global_route { dgid, flow_label, sgid_index, hop_limit, traffic_class }
        ibv_ah_attr as ibv_ah_attr { grh, dlid, sl, src_path_bits, static_rate, is_global, port_num }
        ibv_qp_cap as ibv_qp_cap { max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data }
        ibv_qp_init_attr as ibv_qp_init_attr { qp_context, send_cq, recv_cq, srq, cap, qp_type, sq_sig_all }
        ibv_qp_attr as ibv_qp_attr { qp_state, cur_qp_state, path_mtu, path_mig_state, qkey, rq_psn, sq_psn, dest_qp_num, qp_access_flags, cap, ah_attr, alt_ah_attr, pkey_index, alt_pkey_index, en_sqd_async_notify, sq_draining, max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num, timeout, retry_cnt, rnr_retry, alt_port_num, alt_timeout, rate_limit }
        ibv_qp as ibv_qp { context, qp_context, pd, send_cq, recv_cq, srq, handle, qp_num, state, qp_type, mutex, cond, events_completed }
        ibv_sge as ibv_sge { addr, length, lkey }
        ibv_send_wr_rdma as rdma_t { remote_addr, rkey }
        ibv_send_wr_atomic as atomic_t { remote_addr, compare_add, swap, rkey }
        ibv_send_wr_target as wr_t { rdma, atomic }
        ibv_mw_bind_info as ibv_mw_bind_info { mr, addr, length, mw_access_flags }
        ibv_send_wr_bind_mw as bind_mw_t { mw, rkey, bind_info }
        ibv_send_wr as ibv_send_wr { wr_id, next, sg_list, num_sge, opcode, send_flags, imm_data = imm_data_invalidated_rkey_union, wr, remote_srqn = qp_type, bind_mw = bind_mw_tso_union }
        ibv_recv_wr as ibv_recv_wr { wr_id, next, sg_list, num_sge }
        rdma_event_channel as rdma_event_channel { fd }
        rdma_ib_addr as rdma_ib_addr { sgid, dgid, pkey }
        rdma_addr as rdma_addr { src_storage = src_addr_union, dst_storage = dst_addr_union, ibaddr = addr }
        rdma_route as rdma_route { addr, path_rec, num_paths }
        rdma_cm_id as rdma_cm_id { verbs, channel, context, qp, route, ps, port_num, event, send_cq_channel, send_cq, recv_cq_channel, recv_cq, srq, pd, qp_type }
        rdma_conn_param as rdma_conn_param { private_data, private_data_len, responder_resources, initiator_depth, flow_control, retry_count, rnr_retry_count, srq, qp_num }
        rdma_ud_param as rdma_ud_param { private_data, private_data_len, ah_attr, qp_num, qkey }
        rdma_cm_event_param as param_t { conn, ud }
        rdma_cm_event as rdma_cm_event { id, listen_id, event, status, param }
    };
    let mut declared = BTreeSet::new();
    let mut current = None;
    for line in SOURCE.lines() {
        let line = line.trim();
        let item = line
            .strip_prefix("pub(crate) struct ")
            .or_else(|| line.strip_prefix("pub(crate) union "));
        if let Some(item) = item {
            current = item.strip_suffix(" {");
        } else if let (Some(item), Some(field)) = (current, line.strip_prefix("pub(crate) ")) {
            if let Some((field, _)) = field.split_once(": ") {
                declared.insert((item, field));
            }
        } else if line == "}" {
            current = None;
        }
    }
    assert!(declared.len() > 200, "the file was not understood");
    let missed: Vec<_> = declared.symmetric_difference(&compared).collect();
    assert!(missed.is_empty(), "not compared: {missed:?}");
}

#[test]
fn every_number_is_the_same() {
    let mut compared = BTreeSet::new();
    numbers! { compared,
        ibv_node_type { IBV_NODE_CA, IBV_NODE_RNIC }
        ibv_transport_type { IBV_TRANSPORT_IB, IBV_TRANSPORT_IWARP }
        ibv_port_state { IBV_PORT_DOWN, IBV_PORT_INIT, IBV_PORT_ARMED, IBV_PORT_ACTIVE }
        ibv_mtu { IBV_MTU_256, IBV_MTU_512, IBV_MTU_1024, IBV_MTU_2048, IBV_MTU_4096 }
        ibv_wc_status { IBV_WC_SUCCESS, IBV_WC_LOC_LEN_ERR, IBV_WC_LOC_QP_OP_ERR, IBV_WC_LOC_EEC_OP_ERR, IBV_WC_LOC_PROT_ERR, IBV_WC_WR_FLUSH_ERR, IBV_WC_MW_BIND_ERR, IBV_WC_BAD_RESP_ERR, IBV_WC_LOC_ACCESS_ERR, IBV_WC_REM_INV_REQ_ERR, IBV_WC_REM_ACCESS_ERR, IBV_WC_REM_OP_ERR, IBV_WC_RETRY_EXC_ERR, IBV_WC_RNR_RETRY_EXC_ERR, IBV_WC_LOC_RDD_VIOL_ERR, IBV_WC_REM_INV_RD_REQ_ERR, IBV_WC_REM_ABORT_ERR, IBV_WC_INV_EECN_ERR, IBV_WC_INV_EEC_STATE_ERR, IBV_WC_FATAL_ERR, IBV_WC_RESP_TIMEOUT_ERR, IBV_WC_GENERAL_ERR }
        ibv_wc_opcode { IBV_WC_SEND, IBV_WC_RDMA_WRITE, IBV_WC_RDMA_READ, IBV_WC_RECV, IBV_WC_RECV_RDMA_WITH_IMM }
        ibv_qp_type { IBV_QPT_RC }
        ibv_qp_state { IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPS_SQD, IBV_QPS_SQE, IBV_QPS_ERR }
        ibv_wr_opcode { IBV_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_SEND, IBV_WR_SEND_WITH_IMM, IBV_WR_RDMA_READ }
        rdma_port_space { RDMA_PS_TCP }
        rdma_cm_event_type { RDMA_CM_EVENT_ADDR_RESOLVED, RDMA_CM_EVENT_ADDR_ERROR, RDMA_CM_EVENT_ROUTE_RESOLVED, RDMA_CM_EVENT_ROUTE_ERROR, RDMA_CM_EVENT_CONNECT_REQUEST, RDMA_CM_EVENT_CONNECT_RESPONSE, RDMA_CM_EVENT_CONNECT_ERROR, RDMA_CM_EVENT_UNREACHABLE, RDMA_CM_EVENT_REJECTED, RDMA_CM_EVENT_ESTABLISHED, RDMA_CM_EVENT_DISCONNECTED, RDMA_CM_EVENT_DEVICE_REMOVAL, RDMA_CM_EVENT_MULTICAST_JOIN, RDMA_CM_EVENT_MULTICAST_ERROR, RDMA_CM_EVENT_ADDR_CHANGE, RDMA_CM_EVENT_TIMEWAIT_EXIT }
    }
    masks! { compared,
        ibv_access_flags { IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_REMOTE_WRITE, IBV_ACCESS_REMOTE_READ, IBV_ACCESS_REMOTE_ATOMIC, IBV_ACCESS_RELAXED_ORDERING }
        ibv_wc_flags { IBV_WC_WITH_IMM }
        ibv_qp_attr_mask { IBV_QP_STATE, IBV_QP_ACCESS_FLAGS, IBV_QP_PKEY_INDEX, IBV_QP_PORT, IBV_QP_AV, IBV_QP_PATH_MTU, IBV_QP_TIMEOUT, IBV_QP_RETRY_CNT, IBV_QP_RNR_RETRY, IBV_QP_RQ_PSN, IBV_QP_MAX_QP_RD_ATOMIC, IBV_QP_MIN_RNR_TIMER, IBV_QP_SQ_PSN, IBV_QP_MAX_DEST_RD_ATOMIC, IBV_QP_DEST_QPN }
        ibv_send_flags { IBV_SEND_FENCE, IBV_SEND_SIGNALED, IBV_SEND_SOLICITED, IBV_SEND_INLINE }
    }
    events! { compared, IBV_EVENT_CQ_ERR, IBV_EVENT_QP_FATAL, IBV_EVENT_QP_REQ_ERR, IBV_EVENT_QP_ACCESS_ERR, IBV_EVENT_COMM_EST, IBV_EVENT_SQ_DRAINED, IBV_EVENT_PATH_MIG, IBV_EVENT_PATH_MIG_ERR, IBV_EVENT_DEVICE_FATAL, IBV_EVENT_PORT_ACTIVE, IBV_EVENT_PORT_ERR, IBV_EVENT_LID_CHANGE, IBV_EVENT_PKEY_CHANGE, IBV_EVENT_SM_CHANGE, IBV_EVENT_SRQ_ERR, IBV_EVENT_SRQ_LIMIT_REACHED, IBV_EVENT_QP_LAST_WQE_REACHED, IBV_EVENT_CLIENT_REREGISTER, IBV_EVENT_GID_CHANGE, IBV_EVENT_WQ_FATAL }
    for (name, ours, header) in WITHOUT_A_RIVAL {
        assert_eq!(ours, header, "{name}");
        compared.insert(name);
    }
    let declared: BTreeSet<_> = SOURCE
        .lines()
        .filter_map(|line| line.strip_prefix("pub(crate) const "))
        .filter_map(|rest| Some(rest.split_once(':')?.0))
        .collect();
    assert!(declared.len() > 100, "the file was not understood");
    let missed: Vec<_> = declared.symmetric_difference(&compared).collect();
    assert!(missed.is_empty(), "not compared: {missed:?}");
}
