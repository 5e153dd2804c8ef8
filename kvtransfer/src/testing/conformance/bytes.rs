//! Every byte goes where the layouts say, and nowhere else (promises P6 and P7).

use super::{Bench, Deal, Fabric};
use crate::{
    testing::model::{META_REGION, Model},
    transfer::NodeConfig,
};

fn sorted(len: usize) -> Vec<i32> {
    (0..).take(len).collect()
}

/// P7: pages that lie together.
pub fn contiguous<F: Fabric>() {
    let model = Model::default();
    let mut deal = Deal::new(&model, 1, &[20]);
    deal.from[0] = sorted(20);
    deal.to[0] = (30..50).collect();
    Bench::<F>::duo(&model).run(&deal);
}

/// P7: pages in any order, at other places than at the source.
pub fn scattered<F: Fabric>() {
    let model = Model::default();
    let deal = Deal::new(&model, 2, &[23]);
    Bench::<F>::duo(&model).run(&deal);
}

/// P7: from single tokens of one byte per head to pages larger than a socket buffer's share.
pub fn page_sizes<F: Fabric>() {
    for (page_size, head_bytes) in [(1, 1), (1, 512), (16, 7), (64, 128)] {
        let model = Model {
            page_size,
            head_bytes,
            ..Model::default()
        };
        Bench::<F>::duo(&model).run(&Deal::new(&model, 3, &[9]));
    }
}

/// P6: chunk after chunk, as a chunked prefill makes them.
pub fn many_chunks<F: Fabric>() {
    let model = Model::default();
    let deal = Deal::new(&model, 4, &[1, 5, 2, 1, 1, 7, 3, 4, 2, 1, 1, 9]);
    Bench::<F>::duo(&model).run(&deal);
}

/// P6: the last chunk brings no page, only states and aux; and a room that brings nothing but these.
pub fn zero_page_last_chunk<F: Fabric>() {
    let model = Model::default();
    let mut bench = Bench::<F>::duo(&model);
    bench.run(&Deal::new(&model, 5, &[6, 0]));
    bench.run(&Deal::new(&model, 6, &[0]));
}

/// P6: while a room moves, its room number is never seen before all of its pages and states.
pub fn states_and_aux_in_order<F: Fabric>() {
    let model = Model {
        pages: 256,
        head_bytes: 256,
        ..Model::default()
    };
    let mut bench = Bench::<F>::duo(&model);
    let deal = Deal::new(&model, 7, &[200]);
    let (salt, blank) = (77, 78);
    bench.fill(salt);
    bench.fill_rank(1, blank);
    let aux = bench.layouts[1].components.last().cloned();
    let entry = aux.and_then(|aux| aux.entries.last().copied());
    let entry = entry.expect("the model has an aux row");
    let slot = deal.to.last().map_or(0, |slots| slots[0]);
    let at = entry.offset + u64::from(slot.cast_unsigned()) * entry.item_len;
    let before = bench.fabric.read(1, META_REGION, at, entry.item_len);
    let receive = bench.receive(&deal);
    let send = bench.send(deal.room);
    bench.fabric.wait_ready(&send).expect("it is granted");
    for chunk in deal.pushes() {
        bench.fabric.push(&send, &chunk).expect("it is taken");
    }
    loop {
        let is_over = bench
            .fabric
            .wait(&receive, std::time::Duration::from_micros(5));
        let number = bench.fabric.read(1, META_REGION, at, entry.item_len);
        if number != before || is_over.is_some() {
            break;
        }
    }
    // The number is here, so everything else is, whether or not the end has been announced.
    let image = bench.image(1);
    let end = bench.fabric.wait(&receive, super::SOON);
    end.expect("it ends").expect("it succeeds");
    assert!(image == bench.image(1), "bytes came after the room number");
    bench.check(1, &deal, salt, blank);
}

/// P7: MLA.
pub fn latent<F: Fabric>() {
    let model = Model {
        is_latent: true,
        ..Model::default()
    };
    Bench::<F>::duo(&model).run(&Deal::new(&model, 8, &[11, 4]));
}

/// P7: two prefill ranks, each with half of the heads, feed one decode rank.
pub fn heads_two_to_one<F: Fabric>() {
    let model = Model::default();
    let deal = Deal::new(&model, 9, &[10, 3]);
    Bench::<F>::new(&model, (2, 1), 1, &NodeConfig::default()).run(&deal);
}

/// P7: one prefill rank cuts its heads for two decode ranks, and waits for both.
pub fn heads_one_to_two<F: Fabric>() {
    let model = Model::default();
    let deal = Deal::new(&model, 10, &[10, 3]);
    Bench::<F>::new(&model, (1, 1), 2, &NodeConfig::default()).run(&deal);
}

/// P7: two pipeline stages feed a decode rank that holds all layers.
pub fn stages_two_to_one<F: Fabric>() {
    let model = Model::default();
    let deal = Deal::new(&model, 11, &[10, 3]);
    Bench::<F>::new(&model, (1, 2), 1, &NodeConfig::default()).run(&deal);
}

/// P2: of two ranks with the same latent cache one sends, and the other, a dummy, concludes.
pub fn replicas_with_dummies<F: Fabric>() {
    let model = Model {
        is_latent: true,
        ..Model::default()
    };
    let mut bench = Bench::<F>::new(&model, (2, 1), 1, &NodeConfig::default());
    let dummies = bench.sources_of(2);
    assert_eq!(dummies, [(0, false), (1, true)]);
    bench.run(&Deal::new(&model, 12, &[8, 1]));
}

/// P7: windows that take many batches on both lanes.
pub fn larger_than_a_batch<F: Fabric>() {
    let model = Model {
        pages: 200,
        page_size: 16,
        head_bytes: 200,
        ..Model::default()
    };
    let mut bench = Bench::<F>::duo(&model);
    bench.run(&Deal::new(&model, 13, &[100, 90]));
}
