//! Index lists of state components in real rooms: cut to the shorter, equal or refused, left out.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use kvtransfer::{
    error::{SubmitError, TransferError},
    layout::{Component, ComponentKind, Entry, Layout, Shard, StateShape},
    testing::{
        conformance::{EngineFabric, Fabric, Receive, SOON, TcpPath, to_send},
        model::{META_REGION, Model},
        sim::RankSpec,
    },
    transfer::{Chunk, NodeConfig},
};

/// A model with one state of that type, of 8-byte slots, behind its own.
fn rank(state: &str) -> RankSpec {
    let (mut layout, mut regions): (Layout, Vec<usize>) =
        Model::default().rank(Shard::ONE, Shard::ONE);
    let offset = regions[1] as u64;
    regions[1] += 8 * 16;
    let entry = Entry {
        region: META_REGION,
        offset,
        item_len: 8,
        item_count: 16,
        layer_id: None,
    };
    layout.components.insert(
        2,
        Component {
            kind: ComponentKind::State(state.into()),
            entries: vec![entry],
            draft_entries: 0,
            state: StateShape::default(),
        },
    );
    RankSpec {
        layout,
        regions,
        node: NodeConfig::default(),
    }
}

/// Pushes `from` of the state where `to` was granted: what push said, and how the receiver's side ended.
fn room(state: &str, from: &[i32], to: &[i32]) -> Result<Result<Vec<u8>, String>, String> {
    let mut fabric = EngineFabric::<TcpPath>::start(vec![rank(state), rank(state)]);
    fabric.connect(1, 0).unwrap();
    let offset = rank(state).layout.components[2].entries[0].offset;
    let numbers: Vec<u8> = (0..16_u8).flat_map(|slot| [slot + 1; 8]).collect();
    fabric.write(0, META_REGION, offset, &numbers);
    let receive = Receive {
        room: 1,
        sources: vec![(0, false)],
        receivers_expected: 1,
        items: vec![vec![1], vec![], to.to_vec(), vec![2]],
        timeout: SOON,
    };
    let receive = match fabric.receive(1, &receive) {
        Ok(receive) => receive,
        Err(SubmitError::Items(why)) => return Err(why),
        Err(other) => panic!("{other}"),
    };
    let send = fabric.send(0, &to_send(1, SOON)).unwrap();
    send.wait_ready(SOON).unwrap();
    let lists: [&[i32]; 4] = [&[3], &[], from, &[0]];
    let chunk = Chunk {
        items: lists.into_iter().map(Arc::from).collect(),
        last: true,
    };
    match send.push(&chunk) {
        Ok(()) => {}
        Err(SubmitError::Items(why)) => {
            assert!(send.result().is_none(), "nothing was queued");
            send.cancel_with(&why);
            let end = receive.wait(SOON).unwrap();
            let Err(TransferError::PeerFailed { reason, .. }) = end else {
                panic!("{end:?}");
            };
            assert_eq!(reason, why);
            return Err(why);
        }
        Err(other) => panic!("{other}"),
    }
    Ok(receive
        .wait(SOON)
        .unwrap()
        .map_err(|error| error.to_string())
        .map(|_| {
            let slots = to.iter().map(|slot| {
                let at = offset + u64::try_from(*slot).unwrap() * 8;
                fabric.read(1, META_REGION, at, 1)[0]
            });
            slots.collect()
        }))
}

#[test]
fn lenient_lists_are_cut_to_the_shorter() {
    for state in ["dsa", "block_scale", "minimax_index_k"] {
        assert_eq!(room(state, &[4, 5, 6], &[1, 2]), Ok(Ok(vec![5, 6])));
        assert_eq!(room(state, &[4], &[1, 2]), Ok(Ok(vec![5, 0])));
        assert_eq!(room(state, &[], &[1]), Ok(Ok(vec![0])), "left out");
        assert_eq!(room(state, &[4], &[]), Ok(Ok(vec![])));
    }
}

#[test]
fn positional_lists_must_be_as_long_on_both_sides() {
    for state in ["qsa_pending", "swa_ring", "request_row", "dsa_tail"] {
        assert_eq!(room(state, &[4, 5], &[1, 2]), Ok(Ok(vec![5, 6])));
        assert_eq!(room(state, &[], &[1]), Ok(Ok(vec![0])), "left out");
        assert_eq!(
            room(state, &[4], &[1, 2]),
            Err(format!(
                "state {state}: the sender has 1 indices, the receiver granted 2; both must have as many, or the sender none"
            ))
        );
        assert_eq!(
            room(state, &[4, 5], &[1]),
            Err("component 2: the sender pushes 2 items, the receiver granted 1".into())
        );
    }
}

#[test]
fn a_mamba_state_has_one_slot_per_request() {
    assert_eq!(room("mamba", &[4], &[1]), Ok(Ok(vec![5])));
    let twice = Err("state mamba has one slot per request, 2 were named".to_owned());
    assert_eq!(room("mamba", &[4, 5], &[1, 2]), twice);
}
