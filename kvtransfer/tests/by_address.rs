//! Writes to addresses of a peer, over every path: every byte lands or the call says why not (P1, P2, P3, P8).
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{thread, time::Duration};

use kvtransfer::{
    config::{EngineConfig, SameHost},
    engine::{Block, Engine, Memory, WriteError},
    error::{SubmitError, TransferError},
    ids::PeerId,
    layout::{Layout, RegionId, Shard},
    memory::Region,
    plan::blocks::BLOCKS_MAX,
    testing::{
        conformance::{FakeNetwork, SOON, wait_for},
        fake_verbs::Behaviour,
        model::Model,
    },
};

const LEN: usize = 1 << 20;

struct Pair {
    writer: Engine,
    written: Engine,
    peer: PeerId,
    // Dropped after the engines.
    network: Option<FakeNetwork>,
}

fn config(path: SameHost, network: Option<&FakeNetwork>, rank: usize) -> EngineConfig {
    let mut config = EngineConfig::default();
    config.listen = Some(([127, 0, 0, 1], 0).into());
    config.same_host = path;
    config.batch_bytes = 64 << 10;
    config.ring_bytes = 512 << 10;
    config.writable_by_address = true;
    if let Some(network) = network {
        config.rdma = network.rdma(rank);
    }
    config
}

/// Two regions of half the bytes each, side by side in number but not in memory.
fn memory() -> Memory {
    let mut memory = Memory::new();
    for _ in 0..2 {
        memory.add(Region::heap(LEN / 2).unwrap());
    }
    memory
}

fn pair_of(path: SameHost, network: Option<FakeNetwork>) -> Pair {
    let start = |rank| {
        let config = config(path, network.as_ref(), rank);
        Engine::start(config, memory(), Layout::raw()).unwrap()
    };
    let (writer, written) = (start(0), start(1));
    let info = writer.connect(written.local_addr().unwrap(), SOON).unwrap();
    Pair {
        peer: info.peer,
        writer,
        written,
        network,
    }
}

fn every_path() -> Vec<(&'static str, Pair)> {
    let fake = |behaviour: Behaviour| Some(FakeNetwork::new(&behaviour, 2, 1));
    vec![
        ("tcp", pair_of(SameHost::Off, None)),
        ("shm-ring", pair_of(SameHost::RingOnly, None)),
        ("shm-pull", pair_of(SameHost::PullOnly, None)),
        (
            "verbs",
            pair_of(SameHost::Off, fake(Behaviour::erdma_compat())),
        ),
        (
            "verbs",
            pair_of(SameHost::Off, fake(Behaviour::erdma_standard())),
        ),
    ]
}

fn image(engine: &Engine) -> Vec<u8> {
    let mut all = Vec::new();
    for region in 0..2 {
        let mut bytes = vec![0; LEN / 2];
        engine
            .region(RegionId(region))
            .unwrap()
            .read_at(0, &mut bytes)
            .unwrap();
        all.extend(bytes);
    }
    all
}

fn fill(engine: &Engine, salt: u8) {
    for region in 0..2_u8 {
        let bytes: Vec<u8> = (0..LEN / 2)
            .map(|at| (at.wrapping_mul(31) >> 3).to_le_bytes()[0] ^ salt ^ region)
            .collect();
        engine
            .region(RegionId(region.into()))
            .unwrap()
            .write_at(0, &bytes)
            .unwrap();
    }
}

/// The address of byte `at` of both regions taken as one.
fn address(engine: &Engine, at: usize) -> u64 {
    let (region, offset) = (at / (LEN / 2), at % (LEN / 2));
    let region = RegionId(u32::try_from(region).unwrap());
    engine.region(region).unwrap().base_address() + offset as u64
}

/// Writes runs (from, to, length) and checks that they and nothing else changed.
fn check(pair: &Pair, runs: &[(usize, usize, usize)]) {
    fill(&pair.writer, 0x5A);
    fill(&pair.written, 0xA5);
    let (source, mut wanted) = (image(&pair.writer), image(&pair.written));
    let blocks: Vec<Block> = runs
        .iter()
        .map(|&(from, to, len)| Block {
            source_address: address(&pair.writer, from),
            target_address: address(&pair.written, to),
            len: len as u64,
        })
        .collect();
    let summary = pair.writer.write(pair.peer, &blocks, SOON).unwrap();
    let bytes: usize = runs.iter().map(|run| run.2).sum();
    assert_eq!(summary.bytes, bytes as u64);
    for &(from, to, len) in runs {
        wanted[to..to + len].copy_from_slice(&source[from..from + len]);
    }
    let got = image(&pair.written);
    let wrong = got.iter().zip(&wanted).filter(|(got, want)| got != want);
    assert_eq!(wrong.count(), 0, "wrong bytes");
    assert_eq!(image(&pair.writer), source, "the source is read only");
}

#[test]
fn scattered_blocks_land_where_they_were_sent_and_nowhere_else() {
    for (name, pair) in every_path() {
        let info = pair.writer.peers();
        assert_eq!(info[0].path, name);
        let odd: Vec<_> = (0..500)
            .map(|i| (i * 700 + 3, (499 - i) * 900 + 1, i % 600 + 1))
            .collect();
        check(&pair, &odd);
        check(&pair, &[(0, LEN / 2, LEN / 2), (LEN / 2, 0, LEN / 2)]);
        check(&pair, &[(1, 2, 3), (7, 7, 0)]);
        check(&pair, &[]);
    }
}

#[test]
fn more_blocks_than_one_room_holds_go_in_several() {
    for (_, pair) in every_path() {
        let many: Vec<_> = (0..2 * BLOCKS_MAX + 5)
            .map(|i| (i * 16, (i * 16 + 8) % LEN, 4))
            .collect();
        check(&pair, &many);
    }
}

#[test]
fn many_threads_write_at_once() {
    for (_, pair) in every_path() {
        fill(&pair.writer, 1);
        fill(&pair.written, 2);
        let part = LEN / 64;
        thread::scope(|scope| {
            for worker in 0..64 {
                let pair = &pair;
                scope.spawn(move || {
                    for step in 0..4 {
                        let at = worker * part + step * part / 4;
                        let block = Block {
                            source_address: address(&pair.writer, at),
                            target_address: address(&pair.written, at),
                            len: (part / 4) as u64,
                        };
                        pair.writer.write(pair.peer, &[block], SOON).unwrap();
                    }
                });
            }
        });
        assert!(image(&pair.writer) == image(&pair.written), "all of it");
    }
}

fn refusal(writer: &Engine, peer: PeerId, block: Block) -> String {
    match writer.write(peer, &[block], SOON) {
        Err(WriteError::Refused(error)) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_cannot_be_written_is_refused_with_its_address() {
    let pair = pair_of(SameHost::Off, None);
    let before = image(&pair.written);
    let good = Block {
        source_address: address(&pair.writer, 0),
        target_address: address(&pair.written, 0),
        len: 64,
    };
    let far = Block {
        target_address: 0x1000,
        ..good
    };
    let sentence = refusal(&pair.writer, pair.peer, far);
    assert_eq!(
        sentence,
        "block 0: 64 bytes at 0x1000 are not inside the memory that the peer has registered"
    );
    let own = Block {
        source_address: address(&pair.writer, LEN - 1),
        ..good
    };
    let sentence = refusal(&pair.writer, pair.peer, own);
    assert!(
        sentence.contains("63 bytes at") && sentence.contains("this engine"),
        "{sentence}"
    );
    assert_eq!(
        refusal(&pair.writer, PeerId(99), good),
        SubmitError::UnknownPeer.to_string()
    );
    assert_eq!(image(&pair.written), before);
}

#[test]
fn memory_is_not_writable_by_address_unless_its_engine_says_so() {
    let mut closed = config(SameHost::Off, None, 1);
    closed.writable_by_address = false;
    let model = Model::default().rank(Shard::ONE, Shard::ONE);
    let layouts = [Layout::raw(), model.0];
    // The writing side allows it, so unlike layouts may meet; the other still cannot be written.
    for layout in layouts {
        let mut memory = Memory::new();
        for len in &model.1 {
            memory.add(Region::heap(*len).unwrap());
        }
        let written = Engine::start(closed.clone(), memory, layout).unwrap();
        let writer = Engine::start(
            config(SameHost::Off, None, 0),
            self::memory(),
            Layout::raw(),
        );
        let writer = writer.unwrap();
        let info = writer.connect(written.local_addr().unwrap(), SOON).unwrap();
        let block = Block {
            source_address: address(&writer, 0),
            target_address: written.region(RegionId(0)).unwrap().base_address(),
            len: 8,
        };
        let sentence = refusal(&writer, info.peer, block);
        assert!(sentence.contains("writable_by_address"), "{sentence}");
        // The other direction is allowed.
        let back = written.peers()[0].peer;
        let block = Block {
            source_address: block.target_address,
            target_address: block.source_address,
            len: 8,
        };
        assert_eq!(written.write(back, &[block], SOON).unwrap().bytes, 8);
    }
}

#[test]
fn a_write_that_times_out_has_stopped_when_it_says_so() {
    let network = FakeNetwork::new(&Behaviour::erdma_compat(), 2, 1);
    let pair = pair_of(SameHost::Off, Some(network));
    fill(&pair.writer, 3);
    let block = Block {
        source_address: address(&pair.writer, 0),
        target_address: address(&pair.written, 0),
        len: (LEN / 2) as u64,
    };
    let fabric = pair.network.as_ref().unwrap().fabric();
    // The written side's card answers nothing: no batch is acknowledged.
    fabric.hold_completions(1, true);
    let error = pair
        .writer
        .write(pair.peer, &[block], Duration::from_millis(100))
        .unwrap_err();
    let WriteError::Failed(TransferError::Timeout { .. }) = error else {
        panic!("{error:?}");
    };
    let owned = image(&pair.written);
    fabric.hold_completions(1, false);
    // New queue pairs come; what was given up does not.
    wait_for("another write", || {
        pair.writer.write(pair.peer, &[], SOON).ok()
    });
    let again = Block {
        source_address: address(&pair.writer, LEN / 2),
        target_address: address(&pair.written, LEN / 2),
        len: 4096,
    };
    pair.writer.write(pair.peer, &[again], SOON).unwrap();
    assert!(
        image(&pair.written)[..LEN / 2] == owned[..LEN / 2],
        "late bytes"
    );
}

#[test]
fn a_write_to_an_engine_that_goes_away_is_not_called_settled() {
    let network = FakeNetwork::new(&Behaviour::erdma_compat(), 2, 1);
    let pair = pair_of(SameHost::Off, Some(network));
    let block = Block {
        source_address: address(&pair.writer, 0),
        target_address: address(&pair.written, 0),
        len: (LEN / 2) as u64,
    };
    let fabric = pair.network.as_ref().unwrap().fabric();
    fabric.hold_completions(1, true);
    thread::scope(|scope| {
        let write = scope.spawn(|| pair.writer.write(pair.peer, &[block], SOON));
        wait_for("the room", || {
            (pair.written.snapshot().rooms.len() == 1).then_some(())
        });
        pair.written.shut_down();
        let error = write.join().unwrap().unwrap_err();
        let owned = image(&pair.written);
        fabric.hold_completions(1, false);
        if matches!(error, WriteError::Unsettled { .. }) {
            assert!(error.to_string().contains("has not confirmed"), "{error}");
        } else {
            // The peer could still confirm that nothing moves any more: then it must be so.
            assert!(matches!(error, WriteError::Failed(_)), "{error:?}");
            assert!(image(&pair.written) == owned, "late bytes");
        }
    });
}
