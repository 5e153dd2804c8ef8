//! Leases and generations in virtual time.

use serde_json::json;

use super::super::row::RankKey;
use super::*;

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Rank `tp` of `tp_size` on a host of its own.
fn row(tp_size: u32, tp: u32, port: u16) -> Row {
    let body = json!({
        "attn_tp_size": tp_size, "attn_tp_rank": tp, "attn_cp_size": 1, "attn_cp_rank": 0,
        "attn_dp_size": 1, "attn_dp_rank": 0, "pp_size": 1, "pp_rank": 0,
        "system_dp_size": 1, "system_dp_rank": 0, "rank_ip": "10.0.0.1", "rank_port": port,
        "page_size": 64, "kv_cache_dtype": "torch.bfloat16",
    });
    Row::parse(body.to_string().as_bytes()).unwrap()
}

fn put(registry: &mut Registry, row: Row, lease: Lease, now: u64) -> Registered {
    registry.register(row, lease, None, at(now)).unwrap()
}

fn put_all(registry: &mut Registry, tp_size: u32, first_port: u16, lease: Lease, now: u64) {
    for tp in 0..tp_size {
        let port = first_port + u16::try_from(tp).unwrap();
        put(registry, row(tp_size, tp, port), lease, now);
    }
}

/// (generation, TP size, rows, ready) of the live generation.
fn state(registry: &mut Registry, now: u64) -> Option<(u64, u32, usize, bool)> {
    registry.live(at(now)).map(|(number, live)| {
        (
            number,
            live.topology.attn_tp_size,
            live.row_count(),
            live.is_ready(),
        )
    })
}

fn serials(registry: &Registry) -> HashSet<u64> {
    registry
        .live
        .iter()
        .flat_map(|live| live.rows.values())
        .map(|entry| entry.serial)
        .collect()
}

const LEASE: Lease = Lease::For(Duration::from_secs(30));

#[test]
fn partial_restart_replaces_the_row_and_counts_it_once() {
    let mut registry = Registry::new(RegistryLimits::default());
    put(&mut registry, row(2, 0, 4000), Lease::Permanent, 0);
    for port in 4000..4010 {
        put(&mut registry, row(2, 0, port), Lease::Permanent, 1);
    }
    assert_eq!(
        state(&mut registry, 1),
        Some((1, 2, 1, false)),
        "one rank, however often it registers"
    );
    put(&mut registry, row(2, 1, 5000), Lease::Permanent, 2);
    put(&mut registry, row(2, 1, 5001), Lease::Permanent, 3);
    assert_eq!(state(&mut registry, 3), Some((1, 2, 2, true)));
    let (_, live) = registry.live(at(3)).unwrap();
    let key = RankKey {
        dp: 0,
        cp: 0,
        tp: 1,
        pp: 0,
    };
    assert_eq!(
        live.rank(key).unwrap().rank_port,
        5001,
        "the last writer wins"
    );
}

#[test]
fn stock_rows_never_expire() {
    let mut registry = Registry::new(RegistryLimits::default());
    put_all(&mut registry, 2, 4000, Lease::Permanent, 0);
    assert_eq!(state(&mut registry, 1_000_000_000), Some((1, 2, 2, true)));
    assert_eq!(
        registry.probe(at(1_000_000_000)),
        None,
        "and nobody looks for their owners without a reason"
    );
}

#[test]
fn leased_rows_end_unless_renewed_and_a_new_topology_follows() {
    let mut registry = Registry::new(RegistryLimits::default());
    put_all(&mut registry, 2, 4000, LEASE, 0);
    put(&mut registry, row(2, 0, 4000), LEASE, 20);
    assert_eq!(state(&mut registry, 29), Some((1, 2, 2, true)));
    assert_eq!(
        state(&mut registry, 30),
        Some((1, 2, 1, false)),
        "rank 1 did not renew"
    );
    assert_eq!(state(&mut registry, 50), None);
    put_all(&mut registry, 4, 6000, LEASE, 51);
    assert_eq!(state(&mut registry, 51), Some((2, 4, 4, true)));
}

#[test]
fn a_stray_instance_never_displaces_a_leased_one() {
    let mut registry = Registry::new(RegistryLimits::default());
    put_all(&mut registry, 4, 4000, LEASE, 0);
    assert_eq!(
        put(&mut registry, row(1, 0, 9000), Lease::Permanent, 1),
        Registered::Parked
    );
    for now in [1, 20, 40, 60] {
        put_all(&mut registry, 4, 4000, LEASE, now);
        assert_eq!(
            registry.probe(at(now)),
            None,
            "a lease vouches for its rank"
        );
        assert_eq!(state(&mut registry, now), Some((1, 4, 4, true)));
    }
}

#[test]
fn a_stray_row_never_displaces_stock_ranks_that_listen() {
    let mut registry = Registry::new(RegistryLimits::default());
    put_all(&mut registry, 4, 4000, Lease::Permanent, 0);
    put(&mut registry, row(1, 0, 9000), Lease::Permanent, 1);
    let probe = registry.probe(at(2)).unwrap();
    assert_eq!(probe.rows.len(), 4);
    assert_eq!(probe.control, Some("10.0.0.1:9000".parse().unwrap()));
    // Three of four are gone: the fourth still vouches for the instance.
    let mut dead = serials(&registry);
    let survivor = *dead.iter().next().unwrap();
    dead.remove(&survivor);
    registry.mark_dead(&dead, at(3));
    assert_eq!(state(&mut registry, 3), Some((1, 4, 4, true)));
    // The evidence grows old before the fourth dies.
    registry.mark_dead(&HashSet::from([survivor]), at(3) + DEATH_EVIDENCE_TTL);
    assert_eq!(state(&mut registry, 64), Some((1, 4, 4, true)));
    // The stray row is forgotten in the end.
    assert_eq!(registry.parked_count(), 1);
    assert_eq!(state(&mut registry, 601), Some((1, 4, 4, true)));
    assert_eq!(registry.parked_count(), 0);
    assert_eq!(registry.probe(at(601)), None);
}

#[test]
fn a_full_restart_of_stock_ranks_becomes_a_new_generation() {
    let mut registry = Registry::new(RegistryLimits::default());
    put_all(&mut registry, 4, 4000, Lease::Permanent, 0);
    put(&mut registry, row(2, 0, 7000), Lease::Permanent, 100);
    assert_eq!(
        registry.probe(at(100)),
        None,
        "an incomplete successor is no reason to look"
    );
    put(&mut registry, row(2, 1, 7001), Lease::Permanent, 101);
    assert_eq!(state(&mut registry, 101), Some((1, 4, 4, true)));
    let dead = registry
        .probe(at(102))
        .unwrap()
        .rows
        .into_iter()
        .map(|(serial, _)| serial)
        .collect();
    registry.mark_dead(&dead, at(102));
    assert_eq!(state(&mut registry, 102), Some((2, 2, 2, true)));
    assert_eq!(registry.parked_count(), 0);
}

#[test]
fn reused_addresses_prove_a_restart_without_probes() {
    let mut registry = Registry::new(RegistryLimits::default());
    put_all(&mut registry, 2, 4000, Lease::Permanent, 0);
    put_all(&mut registry, 4, 4000, Lease::Permanent, 1);
    assert_eq!(state(&mut registry, 1), Some((2, 4, 4, true)));
}

#[test]
fn a_lone_stray_gives_way_to_the_first_complete_instance_but_not_the_reverse() {
    let mut registry = Registry::new(RegistryLimits::default());
    put(&mut registry, row(8, 3, 9000), Lease::Permanent, 0);
    put_all(&mut registry, 2, 4000, Lease::Permanent, 1);
    assert_eq!(state(&mut registry, 1), Some((2, 2, 2, true)));

    let mut starting = Registry::new(RegistryLimits::default());
    put(&mut starting, row(4, 0, 4000), Lease::Permanent, 0);
    put(&mut starting, row(4, 1, 4001), Lease::Permanent, 0);
    put(&mut starting, row(1, 0, 9000), Lease::Permanent, 1);
    assert_eq!(
        state(&mut starting, 1),
        Some((1, 4, 2, false)),
        "a starting instance keeps its place"
    );
}

#[test]
fn withdrawal_removes_only_the_owners_row() {
    let mut registry = Registry::new(RegistryLimits::default());
    put_all(&mut registry, 2, 4000, LEASE, 0);
    put(&mut registry, row(2, 0, 5000), LEASE, 1);
    assert_eq!(
        put(&mut registry, row(2, 0, 4000), Lease::Withdraw, 2),
        Registered::Withdrawn
    );
    assert_eq!(
        state(&mut registry, 2),
        Some((1, 2, 2, true)),
        "the predecessor's farewell is late"
    );
    put(&mut registry, row(2, 0, 5000), Lease::Withdraw, 3);
    assert_eq!(state(&mut registry, 3), Some((1, 2, 1, false)));
    put(&mut registry, row(2, 1, 4001), Lease::Withdraw, 4);
    assert_eq!(state(&mut registry, 4), None);
}

#[test]
fn a_contested_generation_of_dead_ranks_ends() {
    let mut registry = Registry::new(RegistryLimits::default());
    put_all(&mut registry, 2, 4000, Lease::Permanent, 0);
    let mut other = row(2, 0, 7000);
    other.decode_allocation_policy = Some("prefill_complete".to_owned());
    let refused = registry.register(other.clone(), Lease::Permanent, None, at(10));
    assert_eq!(refused, Err(Refusal::AllocationPolicy));
    let probe = registry.probe(at(11)).unwrap();
    assert_eq!((probe.rows.len(), probe.control), (2, None));
    registry.mark_dead(&serials(&registry), at(12));
    assert_eq!(state(&mut registry, 12), None);
    assert_eq!(
        registry.register(other, Lease::Permanent, None, at(13)),
        Ok(Registered::Live)
    );
    assert_eq!(state(&mut registry, 13), Some((2, 2, 1, false)));
}

#[test]
fn parked_generations_are_bounded_and_the_oldest_gives_way() {
    let mut registry = Registry::new(RegistryLimits::default());
    put_all(&mut registry, 2, 4000, LEASE, 0);
    for stray in 0..20 {
        let size = 3 + u32::try_from(stray).unwrap();
        put(&mut registry, row(size, 0, 9000), Lease::Permanent, stray);
        assert!(registry.parked_count() <= PARKED_MAX);
    }
    assert_eq!(state(&mut registry, 20), Some((1, 2, 2, true)));
    assert_eq!(
        state(&mut registry, 30).unwrap().1,
        22,
        "the newest parked one takes the empty place"
    );
}

#[test]
fn leases_are_parsed_and_bounded() {
    assert_eq!(Lease::parse(None), Ok(Lease::Permanent));
    assert_eq!(Lease::parse(Some("0")), Ok(Lease::Withdraw));
    assert_eq!(Lease::parse(Some(" 30 ")), Ok(LEASE));
    for text in ["", "-1", "1.5", "3601", "x", "99999999999999999999"] {
        assert_eq!(Lease::parse(Some(text)), Err(LeaseError), "{text:?}");
    }
}

#[test]
fn the_combined_identity_changes_with_any_rank() {
    let mut registry = Registry::new(RegistryLimits::default());
    let mut named = |tp: u32, port: u16, name: Option<&str>| {
        registry
            .register(
                row(2, tp, port),
                Lease::Permanent,
                name.map(str::to_owned),
                at(0),
            )
            .unwrap();
        registry
            .live(at(0))
            .unwrap()
            .1
            .instance()
            .map(str::to_owned)
    };
    assert_eq!(named(0, 1, None), None);
    assert_eq!(named(0, 1, Some("a")).as_deref(), Some("a"));
    assert_eq!(named(1, 2, Some("a")).as_deref(), Some("a"));
    let mixed = named(1, 2, Some("b")).unwrap();
    assert!(mixed.starts_with("ranks-"), "{mixed}");
    assert_ne!(named(1, 2, Some("c")).unwrap(), mixed);
    assert_eq!(named(1, 2, Some("b")).unwrap(), mixed);
}
