//! What is encoded is decoded again, and what is damaged is refused without a panic (promise P3).

use crate::{
    ids::{Epoch, InstanceId},
    layout::{RegionId, Shard, StateSlice},
    plan::{
        blocks::BLOCKS_MAX,
        descriptor::{Descriptor, Place},
    },
    testing::{model::Model, sim::Dice},
    wire::{
        WireError,
        blocks::{WRITE_MILLIS_MAX, WriteOpen},
        control::{Control, ControlDecoder, FailureCode, GRANT_ITEMS_MAX, Grant, REASON_BYTES_MAX},
        hello::{self, Face, Hello, HostIdentity, RegionAddress},
        lane::{
            Ack, AckStatus, BATCH_BYTES_MAX, BATCHES_MAX, BatchFields, BatchHeader,
            NULL_BATCH_BYTES_MAX, PULL_BATCH_BYTES_MAX, PayloadMode, Seal, WINDOW_ITEMS_MAX,
        },
        rdma::{
            Connector, Endpoint, Frame, Immediate, LANDING_BYTES_MAX, Landing, QpEnd, QpOpen,
            QpTerms, RailOffer,
        },
    },
};

fn hello() -> Hello {
    let (mut layout, regions) = Model::default().rank(Shard::ONE, Shard::ONE);
    layout.components[1].state.page_layout = Some("hnd".into());
    layout.components[1].state.slices = vec![
        StateSlice {
            dim: 0,
            rows: 1,
            groups: Vec::new(),
        },
        StateSlice {
            dim: 16,
            rows: 2,
            groups: vec![8, 16, 24],
        },
    ];
    layout.components[0].entries[1].layer_id = Some(u32::MAX);
    Hello {
        instance: InstanceId([1; 16]),
        generation: u64::MAX,
        link: 3,
        lanes: 16,
        token: b"secret".to_vec(),
        host: HostIdentity {
            boot_id: [2; 16],
            user_id: 1000,
            socket_name: "kvtransfer-x".into(),
            probe_address: 4,
            probe_cookie: [5; 16],
        },
        regions: regions
            .iter()
            .map(|len| RegionAddress {
                base: 1 << 40,
                len: *len as u64,
                place: hello::Place::Shared {
                    share: 0,
                    offset: 7,
                },
            })
            .collect(),
        shares: vec![vec![7; 64]],
        by_address: true,
        null_wire: false,
        layout,
        rails: vec![rail()],
    }
}

fn rail() -> RailOffer {
    RailOffer {
        name: "erdma_0".into(),
        connector: Connector::Standard,
        imm: true,
        message_bytes_max: u64::MAX,
        chunk_bytes: 1 << 31,
        rkeys: vec![0, u32::MAX],
        staged: vec![0, 9],
    }
}

fn terms(end: QpEnd) -> QpTerms {
    QpTerms {
        end,
        receives: 64,
        slots: (u64::MAX, 7),
        landing: Landing {
            address: u64::MAX - u64::from(LANDING_BYTES_MAX),
            rkey: 3,
            bytes: LANDING_BYTES_MAX,
        },
    }
}

fn grant(items: Vec<Vec<i32>>) -> Control {
    Control::Grant(Grant {
        room: u64::MAX,
        epoch: Epoch(u32::MAX),
        receivers_expected: 3,
        dummy: true,
        prefix_tokens: 17,
        items,
    })
}

fn room_failed(code: FailureCode, reason: &str) -> Control {
    Control::RoomFailed {
        room: 1,
        epoch: Epoch(0),
        code,
        reason: reason.into(),
    }
}

fn face() -> Face {
    Face {
        boot_id: [4; 16],
        rails: vec![
            ("erdma_0".into(), Connector::Compat),
            ("siw0".into(), Connector::Standard),
        ],
        refusal: "keines".into(),
    }
}

fn messages() -> Vec<Control> {
    let codes = [
        FailureCode::Cancelled,
        FailureCode::Timeout,
        FailureCode::Misbehaved,
        FailureCode::DuplicateRoom,
        FailureCode::NoSender,
        FailureCode::ItemMismatch,
        FailureCode::Memory,
        FailureCode::Shutdown,
        FailureCode::Busy,
        FailureCode::OtherPeer,
    ];
    let mut all = vec![
        Control::Hello(Box::new(hello())),
        Control::Welcome(Box::new(hello())),
        Control::Reject {
            reason: "größer".into(),
        },
        Control::LaneOpen {
            instance: InstanceId([9; 16]),
            link: 8,
            lane: 15,
            token: vec![0, 255],
            can_pull: true,
        },
        Control::LaneReady { can_pull: false },
        grant(vec![vec![0, -1, i32::MAX], vec![], vec![7]]),
        grant(Vec::new()),
        Control::RoomStopped {
            room: 2,
            epoch: Epoch(u32::MAX),
            batches: 3,
        },
        Control::QpOpen(Box::new(QpOpen {
            instance: InstanceId([9; 16]),
            link: 8,
            lane: 15,
            token: vec![0, 255],
            rail: 7,
            peer_rail: 0,
            terms: terms(QpEnd::Standard {
                address: [10, 0, 0, 1],
                port: 0,
                token: 0,
            }),
        })),
        Control::QpReady(terms(QpEnd::Compat(Endpoint {
            qpn: (1 << 24) - 1,
            psn: 0,
            gid: [3; 16],
            lid: 4,
            mtu: 5,
        }))),
        Control::QpUp,
        Control::QpDown {
            reason: "transport retry counter exceeded".into(),
            answered: u64::MAX,
            answers: vec![Ack::new(&batch_header(), AckStatus::Placed); 3],
        },
        Control::WriteOpen(Box::new(write_open(2, WRITE_MILLIS_MAX))),
        Control::WriteClose { room: u64::MAX },
        Control::WriteClosed { room: 1 },
        Control::Ping { nonce: 1 },
        Control::Look(vec![0, 255]),
        Control::Seen(Box::new(face())),
        Control::Pong { nonce: u64::MAX },
    ];
    all.extend(codes.map(|code| room_failed(code, code.name())));
    all
}

fn write_open(blocks: usize, timeout_ms: u32) -> WriteOpen {
    let place = |region, offset| Place {
        region: RegionId(region),
        offset,
    };
    let block = Descriptor {
        source: place(1, 2),
        target: place(u32::MAX, u64::MAX),
        len: 3,
    };
    WriteOpen {
        room: 4,
        timeout_ms,
        blocks: vec![block; blocks],
    }
}

#[test]
fn lists_of_blocks_and_their_deadlines_are_bounded() {
    let heard = |open: WriteOpen| {
        let mut bytes = Vec::new();
        Control::WriteOpen(Box::new(open)).encode(&mut bytes);
        let mut decoder = trusting();
        decoder.push(&bytes);
        decoder.next()
    };
    assert!(heard(write_open(BLOCKS_MAX, 1)).is_ok());
    let many = heard(write_open(BLOCKS_MAX + 1, 1));
    assert!(matches!(many, Err(WireError::TooLong { .. })), "{many:?}");
    for millis in [0, WRITE_MILLIS_MAX + 1] {
        let odd = heard(write_open(1, millis));
        assert!(matches!(odd, Err(WireError::Value { .. })), "{odd:?}");
    }
}

fn trusting() -> ControlDecoder {
    let mut decoder = ControlDecoder::for_stranger();
    decoder.trust();
    decoder
}

#[test]
fn every_message_survives_any_cut_of_the_stream() {
    let mut bytes = Vec::new();
    let sent = messages();
    sent.iter().for_each(|message| message.encode(&mut bytes));
    let mut dice = Dice::new(11);
    for most in [1, 7, 64, bytes.len()] {
        let (mut decoder, mut got, mut rest) = (trusting(), Vec::new(), &bytes[..]);
        while !rest.is_empty() {
            let len = (1 + dice.index(most)).min(rest.len());
            decoder.push(&rest[..len]);
            rest = &rest[len..];
            while let Some(message) = decoder.next().unwrap() {
                got.push(message);
            }
        }
        assert_eq!(got, sent);
        assert_eq!(decoder.pending(), 0);
    }
}

#[test]
fn a_long_refusal_is_cut_between_characters() {
    let face = |refusal: String| {
        Control::Seen(Box::new(Face {
            boot_id: [4; 16],
            rails: Vec::new(),
            refusal,
        }))
    };
    // The bound falls into the middle of the last character.
    let (mut bytes, mut decoder) = (Vec::new(), trusting());
    face("x".repeat(2047) + "ü").encode(&mut bytes);
    decoder.push(&bytes);
    assert_eq!(decoder.next().unwrap(), Some(face("x".repeat(2047))));
}

#[test]
fn damaged_messages_are_refused_or_read_but_never_panic() {
    let mut dice = Dice::new(12);
    let mut refused = 0;
    for message in messages() {
        let mut good = Vec::new();
        message.encode(&mut good);
        for _ in 0..300 {
            let mut bytes = good.clone();
            for _ in 0..dice.within(1, 3) {
                let at = dice.index(bytes.len());
                bytes[at] = dice.within(0, 255).to_le_bytes()[0];
            }
            let mut decoder = trusting();
            decoder.push(&bytes);
            refused += u32::from(decoder.next().is_err());
        }
    }
    assert!(refused > 1_000, "{refused}");
}

#[test]
fn a_grant_at_its_bound_passes_and_one_above_does_not() {
    let decode = |message: &Control| {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let mut decoder = trusting();
        decoder.push(&bytes);
        decoder.next()
    };
    let half = vec![1; GRANT_ITEMS_MAX / 2];
    let full = grant(vec![half.clone(), half.clone()]);
    assert_eq!(decode(&full).unwrap(), Some(full));
    let over = decode(&grant(vec![half.clone(), half, vec![1]]));
    assert!(matches!(over, Err(WireError::TooLong { .. })), "{over:?}");
}

#[test]
fn a_long_reason_is_cut_between_characters() {
    let long = "ü".repeat(REASON_BYTES_MAX);
    let mut bytes = Vec::new();
    room_failed(FailureCode::Busy, &format!("x{long}")).encode(&mut bytes);
    let mut decoder = trusting();
    decoder.push(&bytes);
    let Some(Control::RoomFailed { reason, .. }) = decoder.next().unwrap() else {
        panic!("another message");
    };
    assert_eq!(reason.len(), REASON_BYTES_MAX - 1);
}

fn fields() -> BatchFields {
    BatchFields {
        mode: PayloadMode::Ring,
        last: true,
        component: 63,
        room: u64::MAX,
        epoch: Epoch(u32::MAX),
        seq: BATCHES_MAX - 1,
        window_start: 1 << 20,
        window_len: WINDOW_ITEMS_MAX,
        offset: u64::MAX,
        len: BATCH_BYTES_MAX,
        place: u64::MAX,
    }
}

#[test]
fn headers_seals_and_acks_survive_the_wire() {
    for (mode, last) in [
        (PayloadMode::Inline, false),
        (PayloadMode::Pull, true),
        (PayloadMode::Ring, false),
    ] {
        let header = BatchHeader::new(BatchFields {
            mode,
            last,
            ..fields()
        });
        let got = BatchHeader::parse(&header.to_bytes()).unwrap();
        assert_eq!((got, got.mode(), got.is_last()), (header, mode, last));
        assert_eq!(got.epoch(), Epoch(u32::MAX));
        for status in [AckStatus::Placed, AckStatus::Discarded] {
            let ack = Ack::new(&header, status);
            let got = Ack::parse(&ack.to_bytes()).unwrap();
            assert_eq!((got, got.status()), (ack, status));
        }
    }
    for good in [true, false] {
        let seal = Seal::new(5, good).to_bytes();
        assert_eq!(Seal::parse(&seal, 5), Ok(good));
        assert!(Seal::parse(&seal, 6).is_err(), "another batch's seal");
    }
}

#[test]
fn every_flipped_bit_of_a_header_is_noticed() {
    let good = BatchHeader::new(fields()).to_bytes();
    for bit in 0..BatchHeader::LEN * 8 {
        let mut bytes = good;
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(BatchHeader::parse(&bytes).is_err(), "bit {bit}");
    }
}

#[test]
fn header_lengths_are_bounded() {
    let over = [
        BatchFields {
            len: BATCH_BYTES_MAX + 1,
            ..fields()
        },
        BatchFields {
            len: PULL_BATCH_BYTES_MAX + 1,
            mode: PayloadMode::Pull,
            ..fields()
        },
        BatchFields {
            len: NULL_BATCH_BYTES_MAX + 1,
            mode: PayloadMode::Null,
            ..fields()
        },
        BatchFields {
            window_len: WINDOW_ITEMS_MAX + 1,
            ..fields()
        },
        BatchFields {
            seq: BATCHES_MAX,
            ..fields()
        },
    ];
    for fields in over {
        let refused = BatchHeader::parse(&BatchHeader::new(fields).to_bytes());
        assert!(
            matches!(refused, Err(WireError::TooLong { .. })),
            "{refused:?}"
        );
    }
}

fn batch_header() -> BatchHeader {
    BatchHeader::new(BatchFields {
        mode: PayloadMode::Write,
        last: true,
        component: 1,
        room: 5,
        epoch: Epoch(6),
        seq: 7,
        window_start: 8,
        window_len: 9,
        offset: 10,
        len: 11,
        place: 0,
    })
}

#[test]
fn frames_of_a_queue_pair_survive_and_damaged_ones_are_refused() {
    let header = batch_header();
    let frames = [
        (
            Frame::Hello {
                failures_told: u64::MAX,
            },
            16,
        ),
        (Frame::Batch(header), 72),
        (Frame::Ack(Ack::new(&header, AckStatus::Discarded)), 40),
        (Frame::Credit, 8),
        (Frame::Heartbeat, 8),
    ];
    for (frame, len) in frames {
        let mut bytes = [0; Frame::LEN_MAX];
        assert_eq!(frame.encode(513, &mut bytes), len);
        assert_eq!(Frame::parse(&bytes[..len]), Ok((frame, 513)));
        for cut in (0..Frame::LEN_MAX).filter(|cut| *cut != len) {
            assert!(
                Frame::parse(&bytes[..cut]).is_err(),
                "{frame:?} cut at {cut}"
            );
        }
        for bit in 0..64 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            // Whatever it is taken for, it is not an accident: a kind of the same length, or other credits.
            let _ = Frame::parse(&damaged[..len]);
        }
    }
}

#[test]
fn immediate_data_holds_a_slot_and_credits() {
    for (slot, credits) in [(0, 0), (1, 2), (u16::MAX, 0), (0, u16::MAX)] {
        let immediate = Immediate { slot, credits };
        assert_eq!(Immediate::from_bits(immediate.to_bits()), immediate);
    }
}

#[test]
fn a_rail_must_offer_a_key_for_every_chunk() {
    let lengths = [1, 1 << 31, (1 << 31) + 1, 0];
    let mut offer = rail();
    offer.staged.clear();
    offer.rkeys = vec![0; 4];
    assert_eq!(offer.check(lengths.into_iter()), Ok(()));
    offer.rkeys.push(0);
    assert!(offer.check(lengths.into_iter()).is_err());
    offer.rkeys.truncate(4);
    offer.chunk_bytes += 1;
    assert!(
        offer.check(lengths.into_iter()).is_err(),
        "not a power of two"
    );
}

#[test]
fn a_rail_offers_no_keys_for_regions_out_of_reach() {
    let lengths = [1, 1 << 31, (1 << 31) + 1, 0];
    let mut offer = rail();
    offer.staged = vec![0, 2];
    offer.rkeys = vec![0];
    assert_eq!(offer.check(lengths.into_iter()), Ok(()));
    assert!(offer.reaches(1) && offer.reaches(3) && !offer.reaches(2));
    for wrong in [vec![2, 0], vec![0, 0], vec![0, 2, 4], vec![u32::MAX]] {
        offer.staged = wrong;
        let refused = offer.check(lengths.into_iter());
        assert!(refused.is_err(), "{:?}", offer.staged);
    }
}

#[test]
fn landing_memory_is_bounded_and_does_not_wrap_around() {
    let open = |landing| {
        let end = QpEnd::Standard {
            address: [1, 2, 3, 4],
            port: 1,
            token: 2,
        };
        let mut bytes = Vec::new();
        let mut terms = terms(end);
        terms.landing = landing;
        Control::QpReady(terms).encode(&mut bytes);
        let mut decoder = ControlDecoder::for_stranger();
        decoder.push(&bytes);
        decoder
            .next()
            .map(|message| assert!(message.is_some(), "all of it is there"))
    };
    let at = |address, bytes| Landing {
        address,
        rkey: 1,
        bytes,
    };
    assert!(open(at(0, LANDING_BYTES_MAX)).is_ok());
    assert!(open(at(0, LANDING_BYTES_MAX + 1)).is_err());
    assert!(open(at(u64::MAX - 9, 9)).is_ok());
    assert!(open(at(u64::MAX - 9, 10)).is_err());
}
