//! What is taken in of samples, and what is refused.

use kvrouter::schedule::board::IngestError;
use kvrouter::schedule::facts::{Facts, Role, WORKERS_MAX};
use kvrouter::schedule::sample::{LINKS_MAX, Link, SOURCES_MAX};
use kvrouter::schedule::{Board, BoardError, Sample, Settings};

use crate::fleet::{Fleet, facts, seconds};

#[test]
fn repeated_late_and_foreign_samples_are_refused() {
    let mut fleet = Fleet::new(Settings::default(), 1, 1);
    let id = fleet.prefills[0];
    let base = fleet.sample(id, 1.0);
    let mut send = |epoch, sequence, at| {
        fleet.board.ingest(&Sample {
            epoch,
            sequence,
            at: seconds(at),
            ..base
        })
    };
    assert_eq!(send(1, 5, 1.0), Ok(()));
    assert_eq!(send(1, 5, 1.1), Err(IngestError::Old));
    assert_eq!(send(1, 4, 1.1), Err(IngestError::Old));
    assert_eq!(send(2, 0, 1.2), Ok(()), "the engine was started again");
    assert_eq!(send(1, 9, 1.1), Err(IngestError::Old), "of the former life");
    fleet.board.leave(id);
    assert_eq!(fleet.board.ingest(&base), Err(IngestError::UnknownWorker));
}

#[test]
fn ranks_and_rails_are_added_up() {
    let mut board = Board::new(Settings::default());
    let p = board
        .join(Facts {
            senders: 2,
            ..facts("p".into(), Role::Prefill)
        })
        .unwrap();
    let d = board.join(facts("d".into(), Role::Decode)).unwrap();
    let link = |bytes, rate| Link {
        peer: d,
        bytes_queued: bytes,
        bytes_in_flight: 1,
        bytes_per_s: rate,
    };
    let mut send = |source, links: &[Link]| {
        let sample = Sample {
            worker: p,
            source,
            epoch: 1,
            sequence: 1,
            at: seconds(1.0),
            tells_rooms: true,
            links: Some(links),
            queues: None,
            pool: None,
        };
        board.ingest(&sample)
    };
    // Two ranks with two rails of 0.1 GB/s each: a request moves with 0.4 GB/s.
    send(0, &[link(10, 1e8), link(20, 1e8)]).unwrap();
    send(1, &[link(30, 1e8), link(40, 1e8)]).unwrap();
    let pair = board.pair(seconds(1.0), p, d).unwrap();
    assert_eq!((pair.bytes_queued, pair.bytes_in_flight), (100, 4));
    assert!((pair.bytes_per_s / 4e8 - 1.0).abs() < 1e-9, "{pair:?}");
    board.forget_source(p, 1);
    assert_eq!(board.pair(seconds(1.0), p, d).unwrap().bytes_queued, 30);
}

#[test]
fn everything_a_peer_can_grow_is_bounded() {
    let mut fleet = Fleet::new(Settings::default(), 1, 1);
    let id = fleet.prefills[0];
    let base = fleet.sample(id, 1.0);
    for source in 0..u32::try_from(SOURCES_MAX).unwrap() {
        fleet.board.ingest(&Sample { source, ..base }).unwrap();
    }
    let more = Sample {
        source: u32::MAX,
        ..base
    };
    assert_eq!(fleet.board.ingest(&more), Err(IngestError::TooMany));
    let link = Link {
        peer: fleet.decodes[0],
        bytes_queued: u64::MAX,
        bytes_in_flight: u64::MAX,
        bytes_per_s: f64::NAN,
    };
    let many = vec![link; LINKS_MAX + 1];
    let sample = Sample {
        links: Some(&many),
        sequence: 1000,
        ..base
    };
    assert_eq!(fleet.board.ingest(&sample), Err(IngestError::TooMany));
    // Nonsense within the bounds changes no prediction into nonsense.
    fleet
        .board
        .ingest(&Sample {
            links: Some(&many[1..]),
            sequence: 1001,
            ..base
        })
        .unwrap();
    let pair = fleet
        .board
        .pair(seconds(1.0), id, fleet.decodes[0])
        .unwrap();
    assert!(pair.bytes_per_s.is_finite() && pair.bytes_queued == u64::MAX);
    let mut board = Board::new(Settings::default());
    for index in 0..WORKERS_MAX {
        board
            .join(facts(format!("d{index}"), Role::Decode))
            .unwrap();
    }
    let join = |board: &mut Board, name: &str| board.join(facts(name.into(), Role::Decode));
    assert_eq!(join(&mut board, "more"), Err(BoardError::TooManyWorkers));
    assert!(matches!(
        join(&mut board, "d0"),
        Err(BoardError::NameTaken { .. })
    ));
    board.leave(board.named("d7").unwrap());
    join(&mut board, "more").unwrap();
    let bad = Facts {
        bytes_per_s: f64::NAN,
        ..facts("bad".into(), Role::Prefill)
    };
    assert!(matches!(board.join(bad), Err(BoardError::Facts { .. })));
}
