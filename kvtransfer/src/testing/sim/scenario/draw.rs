//! Draws deployments, rooms and faults.

use std::{collections::HashMap, time::Duration};

use super::Weather;
use crate::{
    testing::{
        model::Model,
        sim::{Dice, Handle, LaneSpec, LinkSpec, NetSpec},
    },
    transfer::NodeConfig,
    wire::lane::PayloadMode,
};

/// How a deployment is cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    pub(super) source_tp: u32,
    pub(super) source_pp: u32,
    pub(super) target_tp: u32,
}

/// One request.
#[derive(Clone, Debug, Default)]
pub(super) struct RoomPlan {
    pub(super) number: u64,
    pub(super) prefix_tokens: u32,
    /// KV pages per chunk; the last chunk also carries states and aux.
    pub(super) chunks: Vec<usize>,
    pub(super) states: usize,
    pub(super) has_aux: bool,
    pub(super) send_timeout: Duration,
    pub(super) receive_timeout: Duration,
    /// Items per component, by rank; drawn when the room begins.
    pub(super) items: HashMap<usize, Vec<Vec<i32>>>,
    pub(super) senders: HashMap<usize, Handle>,
    pub(super) receivers: HashMap<usize, Handle>,
}

impl RoomPlan {
    pub(super) fn pages(&self) -> usize {
        self.chunks.iter().sum()
    }

    /// The items of one chunk.
    pub(super) fn chunk(&self, rank: usize, index: usize) -> (Vec<Vec<i32>>, bool) {
        let items = &self.items[&rank];
        let start: usize = self.chunks[..index].iter().sum();
        let last = index + 1 == self.chunks.len();
        let Some(kv) = items.first() else {
            return (Vec::new(), last);
        };
        let mut lists = vec![kv[start..start + self.chunks[index]].to_vec()];
        if last {
            lists.extend(items[1..].iter().cloned());
        }
        (lists, last)
    }
}

pub(super) fn model(dice: &mut Dice) -> (Model, Cut) {
    let is_latent = dice.chance(25);
    let model = Model {
        is_latent,
        heads: dice.pick(&[1, 2, 4]),
        layers: 2,
        page_size: dice.pick(&[1, 2, 4]),
        head_bytes: dice.within(1, 24),
        pages: 24,
        has_state: dice.chance(60),
        aux_bytes: dice.within(1, 40),
        slots: 8,
    };
    let cut = Cut {
        source_tp: dice.pick(&[1, 1, 2]),
        source_pp: dice.pick(&[1, 1, 1, 2]),
        target_tp: dice.pick(&[1, 1, 2]),
    };
    (model, cut)
}

pub(super) fn node(dice: &mut Dice, weather: Weather) -> NodeConfig {
    let mut node = NodeConfig {
        first_epoch: dice.pick(&[0, 1, u32::MAX - 1, u32::MAX]),
        ..NodeConfig::default()
    };
    if weather.is_rough() {
        node.orphan_ttl = Duration::from_millis(dice.within(2, 40));
        node.heartbeat = Duration::from_millis(dice.within(10, 30));
        node.peer_silence_max = Duration::from_millis(dice.within(60, 200));
    } else {
        node.orphan_ttl = Duration::from_secs(5);
    }
    node.ebb_max = Duration::from_micros(dice.pick(&[300, 2_000, 10_000]));
    if dice.chance(30) {
        // Three windows are what one chunk takes.
        node.queue_windows_max = usize::try_from(dice.within(3, 6)).unwrap_or(3);
    }
    if weather.is_rough() && dice.chance(25) {
        node.transfers_max = usize::try_from(dice.within(1, 3)).unwrap_or(1);
        node.orphans_max = usize::try_from(dice.within(1, 2)).unwrap_or(1);
    }
    node
}

fn net(dice: &mut Dice) -> NetSpec {
    NetSpec {
        latency: Duration::from_micros(dice.pick(&[1, 20, 500])),
        jitter: Duration::from_micros(dice.pick(&[0, 10, 300, 2_000])),
        rate: dice.pick(&[1_000_000, 50_000_000, 1_000_000_000]),
        piece_bytes: dice.pick(&[64, 300, 2_000]),
        capacity: dice.pick(&[500, 4_000, 100_000]),
    }
}

pub(super) fn link(dice: &mut Dice, weather: Weather) -> LinkSpec {
    let modes = [
        PayloadMode::Inline,
        PayloadMode::Pull,
        PayloadMode::Ring,
        PayloadMode::Write,
    ];
    let mode = match weather {
        Weather::Cards => PayloadMode::Write,
        _ => dice.pick(&modes),
    };
    let least = if weather == Weather::Lanes { 2 } else { 1 };
    let batch_bytes = dice.pick(&[100, 700, 3_000, 1 << 20]);
    // A ring's slots are real memory here.
    let batch_bytes = match mode {
        PayloadMode::Ring => batch_bytes.min(3_000),
        _ => batch_bytes,
    };
    let lanes = (0..dice.within(least, 3)).map(|_| LaneSpec {
        mode,
        batch_bytes,
        window: usize::try_from(dice.within(1, 6)).unwrap_or(1),
        net: net(dice),
    });
    let lanes = lanes.collect();
    let mut control = net(dice);
    if weather == Weather::Cards && dice.chance(50) {
        // A failure is heard of long after a lost queue pair has been made anew.
        control.latency = Duration::from_millis(dice.within(2, 25));
    }
    LinkSpec { control, lanes }
}

pub(super) fn room(dice: &mut Dice, weather: Weather, index: usize, model: &Model) -> RoomPlan {
    let mut chunks: Vec<usize> = (0..dice.within(1, 4)).map(|_| dice.index(4)).collect();
    if dice.chance(10) {
        chunks = vec![0];
    }
    let timeout = |dice: &mut Dice| match weather {
        Weather::Storm | Weather::Cards => Duration::from_micros(dice.within(500, 80_000)),
        _ => Duration::from_secs(60),
    };
    RoomPlan {
        number: [index as u64 + 1, u64::MAX - index as u64][index % 2],
        prefix_tokens: u32::try_from(dice.within(0, 9)).unwrap_or(0),
        chunks,
        states: if model.has_state { dice.index(3) } else { 0 },
        has_aux: dice.chance(90),
        send_timeout: timeout(dice),
        receive_timeout: timeout(dice),
        ..RoomPlan::default()
    }
}
