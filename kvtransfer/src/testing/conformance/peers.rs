//! Connections: who may connect, what survives a lost lane, a lost peer, a restart (promises P2, P5, P7).

use std::time::Duration;

use super::{Bench, Deal, Fabric, SOON};
use crate::{
    error::TransferError,
    layout::{Layout, Shard},
    testing::{model::Model, sim::RankSpec},
    transfer::NodeConfig,
};

/// The path that was asked for is the path that is taken and shown.
pub fn path_is_named<F: Fabric>() {
    let mut bench = Bench::<F>::duo(&Model::default());
    let (path, wanted) = bench.fabric.path(1, 0);
    assert_eq!(path, wanted);
}

/// The refusal of two ranks whose layouts do not fit.
fn refusal<F: Fabric>(source: (Layout, Vec<usize>), target: (Layout, Vec<usize>)) -> String {
    let ranks = [source, target].map(|(layout, regions)| RankSpec {
        layout,
        regions,
        node: NodeConfig::default(),
    });
    let mut fabric = F::start(ranks.to_vec());
    let refused = fabric.connect(1, 0).expect_err("the layouts do not fit");
    assert!(!fabric.is_connected(1, 0), "a refused peer is no peer");
    refused
}

/// P7: each mismatch is refused at connect, in a sentence that names both values.
pub fn wrong_layouts<F: Fabric>() {
    let model = Model::default();
    let whole = |model: &Model| model.rank(Shard::ONE, Shard::ONE);
    let (with_pages, with_heads, with_items) = (
        Model {
            page_size: 8,
            ..model.clone()
        },
        Model {
            heads: 2,
            ..model.clone()
        },
        Model {
            head_bytes: 12,
            ..model.clone()
        },
    );
    let mut with_dtype = whole(&model);
    with_dtype.0.kv_dtype = "float8_e4m3fn".into();
    let mut named = whole(&model);
    let mut otherwise = whole(&model);
    for (layout, ids) in [
        (&mut named.0, [0, 1, 0, 1]),
        (&mut otherwise.0, [0, 1, 0, 0]),
    ] {
        for (entry, id) in layout.components[0].entries.iter_mut().zip(ids) {
            entry.layer_id = Some(id);
        }
    }
    let plain = || whole(&model);
    let cases = [
        (plain(), whole(&with_pages), ["4", "8"]),
        (plain(), whole(&with_heads), ["4", "2"]),
        (plain(), whole(&with_items), ["256", "192"]),
        (plain(), with_dtype, ["bfloat16", "float8_e4m3fn"]),
        // Which layer is named first is the plan's choice: 0 has 2 buffers against 3, 1 has 2 against 1.
        (named, otherwise, ["2", "buffers"]),
    ];
    for (source, target, words) in cases {
        let sentence = refusal::<F>(source, target);
        // The address in front has digits of its own.
        let reason = sentence.split(" refused: ").last().unwrap_or(&sentence);
        let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
        let named: Vec<&str> = reason.split(|letter| !is_word(letter)).collect();
        for word in words.iter().chain(&["source", "target"]) {
            assert!(named.contains(word), "{word:?} is not in {reason:?}");
        }
    }
}

/// P5: the same peer connects again: the old connection is replaced, its rooms fail, new ones work.
pub fn reconnect<F: Fabric>() {
    let model = Model::default();
    let mut bench = Bench::<F>::duo(&model);
    let receive = bench.receive(&Deal::new(&model, 50, &[4]));
    let send = bench.send(50);
    bench.fabric.wait_ready(&send).expect("it is granted");
    bench.fabric.connect(1, 0).expect("it connects again");
    for side in [&send, &receive] {
        let end = bench.fabric.wait(side, SOON).expect("in time");
        let error = end.expect_err("its connection is gone");
        let is_lost = matches!(
            error,
            TransferError::PeerLost { .. } | TransferError::PeerFailed { .. }
        );
        assert!(is_lost, "{error}");
    }
    bench.run(&Deal::new(&model, 51, &[4]));
}

/// P2, P5: the sender's process is replaced by another at the same address.
pub fn restart<F: Fabric>() {
    let model = Model::default();
    let mut bench = Bench::<F>::duo(&model);
    let receive = bench.receive(&Deal::new(&model, 52, &[4]));
    bench.fabric.restart(0);
    let end = bench.fabric.wait(&receive, SOON).expect("in time");
    assert!(
        matches!(end, Err(TransferError::PeerLost { .. })),
        "{end:?}"
    );
    bench
        .fabric
        .connect(1, 0)
        .expect("the new process is welcome");
    bench.run(&Deal::new(&model, 53, &[4]));
}

/// P2: an engine that shuts down ends its transfers, and those of its peers.
pub fn shutdown<F: Fabric>() {
    let model = Model::default();
    let mut bench = Bench::<F>::duo(&model);
    let receive = bench.receive(&Deal::new(&model, 54, &[4]));
    let send = bench.send(54);
    bench.fabric.wait_ready(&send).expect("it is granted");
    bench.fabric.shut_down(0);
    let end = bench.fabric.wait(&send, SOON).expect("in time");
    assert_eq!(end, Err(TransferError::Shutdown));
    let end = bench.fabric.wait(&receive, SOON).expect("in time");
    let error = end.expect_err("its sender is gone");
    let is_told = matches!(
        error,
        TransferError::PeerFailed { .. } | TransferError::PeerLost { .. }
    );
    assert!(is_told, "{error}");
}

/// P5: after the first lane is gone, rooms of any size take the other one at once.
pub fn rooms_after_a_lost_lane<F: Fabric>() {
    let model = Model::default();
    for rank in [0, 1] {
        let mut bench = Bench::<F>::duo(&model);
        bench.run(&Deal::new(&model, 57, &[1]));
        bench.fabric.reset_lane(rank, 1 - rank, 0);
        bench.fabric.pass(Duration::from_millis(30));
        for number in 58..62 {
            bench.run(&Deal::new(&model, number, &[1, 0]));
        }
    }
}

fn lose_a_lane<F: Fabric>(rank: usize) {
    let model = Model {
        pages: 512,
        page_size: 16,
        head_bytes: 64,
        ..Model::default()
    };
    let mut bench = Bench::<F>::duo(&model);
    for (number, lane) in [(55, 1), (56, 0)] {
        // The second time there is one lane left: the connection must be made anew for it.
        if lane == 0 {
            bench.fabric.connect(1, 0).expect("it connects again");
        }
        let deal = Deal::new(&model, number, &[200, 150, 150]);
        bench.fill(number);
        bench.fill_rank(1, 2);
        let receive = bench.receive(&deal);
        let send = bench.send(number);
        bench.fabric.wait_ready(&send).expect("it is granted");
        for (index, chunk) in deal.pushes().iter().enumerate() {
            if index == 1 {
                bench.fabric.pass(Duration::from_micros(100));
                bench.fabric.reset_lane(rank, 1 - rank, lane);
            }
            bench.fabric.push(&send, chunk).expect("it is taken");
        }
        for side in [&send, &receive] {
            let end = bench.fabric.wait(side, SOON).expect("in time");
            end.expect("the other lane takes over");
        }
        bench.check(1, &deal, number, 2);
    }
}

/// P5: a lane dies at the sender in the middle of a room; its batches go over the other one.
pub fn lost_lane<F: Fabric>() {
    lose_a_lane::<F>(0);
}

/// P5: the same, noticed by the receiver first.
pub fn lost_lane_of_the_receiver<F: Fabric>() {
    lose_a_lane::<F>(1);
}
