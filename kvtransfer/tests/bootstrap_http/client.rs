//! Our own client against the server, and a restart of a stock instance as the server sees it.

use std::collections::HashMap;
use std::net::TcpListener;
use tokio::time::Instant;

use kvtransfer::bootstrap::RankKey;
use kvtransfer::serve::bootstrap_client::{
    BlockingBootstrapClient, BootstrapTarget, ClientError, RankAddress, RankRow,
};

use super::*;

fn rank_row(tp_size: u32, tp: u32, port: u16) -> RankRow {
    RankRow {
        attn_tp_size: tp_size,
        attn_tp_rank: tp,
        attn_cp_size: 1,
        attn_cp_rank: 0,
        attn_dp_size: 1,
        attn_dp_rank: 0,
        pp_size: 1,
        pp_rank: 0,
        system_dp_size: 1,
        system_dp_rank: 0,
        rank_ip: "127.0.0.1".to_owned(),
        rank_port: port,
        page_size: 64,
        kv_cache_dtype: Some("torch.bfloat16".to_owned()),
        kv_layout: None,
        dsv41_spec_layout: None,
        load_balance_method: "follow_bootstrap_room".to_owned(),
        enable_dsa_cache_layer_split: false,
        enable_kv_cache_sharding: false,
        prefill_http_port: Some(30000),
        decode_allocation_policy: "early".to_owned(),
    }
}

fn client(addr: SocketAddr) -> BlockingBootstrapClient {
    BlockingBootstrapClient::new(BootstrapTarget::new(addr.to_string())).unwrap()
}

#[test]
fn a_rank_registers_is_found_and_leaves() {
    let server = start(|_| {});
    let mut client = client(server.local_addr());
    client.wait(async |client| {
        let (lease, soon) = (Some(Duration::from_secs(60)), Duration::from_secs(10));
        client.health().await.unwrap();
        client.register(&rank_row(2, 0, 4001), lease, Some("pod-a"), soon).await.unwrap();
        let early = client.server_info().await.unwrap_err();
        assert!(matches!(&early, ClientError::NotReady { text } if text.contains("(1 workers registered)")));
        assert!(early.is_retryable());
        client.register(&rank_row(2, 1, 4002), lease, Some("pod-a"), soon).await.unwrap();
        let info = client.server_info().await.unwrap();
        assert_eq!((info.value.attn_tp_size, info.value.prefill_http_port), (2, Some(30000)));
        assert_eq!((info.generation, info.instance.as_deref()), (Some(1), Some("pod-a")));
        assert!(info.value.shape().follow_bootstrap_room);
        let found = client.rank(RankKey { dp: 0, cp: 0, tp: 1, pp: 0 }).await.unwrap();
        assert_eq!(found.value, RankAddress { rank_ip: "127.0.0.1".to_owned(), rank_port: 4002 });
        let missing = client.rank(RankKey { dp: 1, cp: 0, tp: 0, pp: 0 }).await.unwrap_err();
        assert!(matches!(missing, ClientError::Status { status: 404, .. }), "{missing}");
        client.register_dp_rank(u64::MAX, 3).await.unwrap();
        let ranks = client.query_dp_ranks(&[1, u64::MAX]).await.unwrap();
        assert_eq!(ranks, HashMap::from([(u64::MAX, 3)]));
        client.withdraw(&rank_row(2, 1, 4002)).await.unwrap();
        assert!(matches!(client.server_info().await, Err(ClientError::NotReady { .. })));
    });
}

#[test]
fn a_kept_connection_survives_a_restart_of_the_server() {
    let server = start(|_| {});
    let addr = server.local_addr();
    let mut client = client(addr);
    client.wait(async |client| client.health().await).unwrap();
    server.close();
    assert!(client.wait(async |client| client.health().await).is_err());
    let _next = start(|config| config.listen = addr);
    client.wait(async |client| client.health().await).unwrap();
}

#[test]
fn registering_nowhere_ends_by_the_callers_deadline_and_says_why() {
    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let started = Instant::now();
    let error = client(nobody)
        .wait(async |client| {
            client
                .register(&rank_row(1, 0, 1), None, None, Duration::from_millis(500))
                .await
        })
        .unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(5));
    let text = error.to_string();
    assert!(
        text.contains("failed after 1 attempts") && text.contains(&nobody.to_string()),
        "{text}"
    );
}

/// Listeners stand for the ranks' control sockets; dropping one is the death of its rank.
fn listening_ranks(addr: SocketAddr, tp_size: u32) -> Vec<TcpListener> {
    (0..tp_size)
        .map(|tp| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let body = row(tp_size, tp, listener.local_addr().unwrap().port(), "");
            assert_eq!(once(addr, "PUT", "/route", Some(&body)).status, 200);
            listener
        })
        .collect()
}

#[test]
fn a_restarted_stock_instance_takes_over_once_the_old_ranks_are_gone() {
    let server = start(|config| config.probe_interval = Some(Duration::from_millis(20)));
    let addr = server.local_addr();
    let mut client = client(addr);
    let mut info = || {
        client
            .wait(async |client| client.server_info().await)
            .unwrap()
    };
    let mut old = listening_ranks(addr, 4);
    let _new = listening_ranks(addr, 2);
    let survivor = old.pop();
    drop(old);
    // The survivor is seen to listen: wait for the probe's own connection, not for time to pass.
    survivor.as_ref().unwrap().accept().unwrap();
    assert_eq!(
        (info().value.attn_tp_size, info().generation),
        (4, Some(1)),
        "one rank of four still listens"
    );
    drop(survivor);
    let until = Instant::now() + Duration::from_secs(20);
    while info().value.attn_tp_size == 4 {
        assert!(
            Instant::now() < until,
            "the dead instance was never replaced"
        );
        std::thread::yield_now();
    }
    assert_eq!((info().value.attn_tp_size, info().generation), (2, Some(2)));
}
