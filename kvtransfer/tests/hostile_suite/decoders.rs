//! The decoders alone: any bytes, cut anywhere, and every message back as it was.

use kvtransfer::{
    ids::{Epoch, InstanceId},
    wire::{
        control::{Control, ControlDecoder, FailureCode, Grant},
        lane::{Ack, AckStatus, BatchFields, BatchHeader, PayloadMode, Seal},
    },
};
use proptest::prelude::*;

use super::raw::{encoded, hello};

fn grant() -> impl Strategy<Value = Control> {
    let items = prop::collection::vec(prop::collection::vec(any::<i32>(), 0..40), 0..6);
    let numbers = (
        any::<u64>(),
        any::<u32>(),
        any::<u16>(),
        any::<bool>(),
        any::<u32>(),
    );
    (numbers, items).prop_map(
        |((room, epoch, receivers_expected, dummy, prefix_tokens), items)| {
            Control::Grant(Grant {
                room,
                epoch: Epoch(epoch),
                receivers_expected,
                dummy,
                prefix_tokens,
                items,
            })
        },
    )
}

fn message() -> impl Strategy<Value = Control> {
    let failed = (any::<u64>(), any::<u32>(), ".{0,80}").prop_map(|(room, epoch, reason)| {
        Control::RoomFailed {
            room,
            epoch: Epoch(epoch),
            code: FailureCode::Memory,
            reason,
        }
    });
    let open = (any::<[u8; 16]>(), any::<u64>(), 0..16_u8, any::<bool>());
    let token = prop::collection::vec(any::<u8>(), 0..512);
    let open =
        (open, token).prop_map(
            |((instance, link, lane, can_pull), token)| Control::LaneOpen {
                instance: InstanceId(instance),
                link,
                lane,
                token,
                can_pull,
            },
        );
    prop_oneof![
        grant(),
        failed,
        open,
        ".{0,80}".prop_map(|reason| Control::Reject { reason }),
        any::<bool>().prop_map(|can_pull| Control::LaneReady { can_pull }),
        any::<u64>().prop_map(|nonce| Control::Ping { nonce }),
        any::<u64>().prop_map(|nonce| Control::Pong { nonce }),
        (any::<u8>(), 1..=16_u8)
            .prop_map(|(instance, lanes)| { Control::Hello(Box::new(hello(instance, lanes))) }),
        (any::<u8>(), 1..=16_u8)
            .prop_map(|(instance, lanes)| { Control::Welcome(Box::new(hello(instance, lanes))) }),
    ]
}

fn mode() -> impl Strategy<Value = PayloadMode> {
    prop_oneof![
        Just(PayloadMode::Inline),
        Just(PayloadMode::Pull),
        Just(PayloadMode::Ring)
    ]
}

/// Everything that comes out of `bytes` given in pieces of `step`.
fn decode(bytes: &[u8], step: usize) -> Vec<Control> {
    let mut decoder = ControlDecoder::for_stranger();
    let mut heard = Vec::new();
    for part in bytes.chunks(step) {
        decoder.push(part);
        while let Some(message) = match decoder.next() {
            Ok(message) => message,
            Err(_) => return heard,
        } {
            heard.push(message);
        }
    }
    heard
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn messages_come_back_as_they_were(messages in prop::collection::vec(message(), 1..5), step in 1..5000_usize) {
        let bytes: Vec<u8> = messages.iter().flat_map(encoded).collect();
        prop_assert_eq!(decode(&bytes, step), messages);
    }

    #[test]
    fn any_bytes_are_a_message_or_an_error(
        message in message(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        step in 1..3000_usize,
    ) {
        let mut bytes = encoded(&message);
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        for heard in decode(&bytes, step) {
            // What was accepted is a message, so it survives the way out and back in.
            prop_assert_eq!(decode(&encoded(&heard), 1 << 20), vec![heard]);
        }
    }

    #[test]
    fn noise_is_no_message(bytes in prop::collection::vec(any::<u8>(), 0..300), step in 1..64_usize) {
        prop_assume!(!bytes.starts_with(b"KVTC"));
        prop_assert_eq!(decode(&bytes, step), vec![]);
    }

    #[test]
    fn headers_come_back_as_they_were(
        mode in mode(),
        last in any::<bool>(),
        component in any::<u8>(),
        (room, epoch, seq) in (any::<u64>(), any::<u32>(), 0..1_u32 << 20),
        (window_start, window_len) in (any::<u32>(), 0..=4096_u32),
        (offset, len, place) in (any::<u64>(), 0..=64_u64 << 20, any::<u64>()),
    ) {
        let fields = BatchFields {
            mode, last, component, room, epoch: Epoch(epoch), seq, window_start, window_len, offset, len, place,
        };
        let header = BatchHeader::new(fields);
        let back = BatchHeader::parse(&header.to_bytes()).expect("within the bounds");
        prop_assert_eq!(back, header);
        prop_assert_eq!((back.mode(), back.is_last(), back.epoch()), (mode, last, Epoch(epoch)));
        for status in [AckStatus::Placed, AckStatus::Discarded] {
            let ack = Ack::new(&header, status);
            prop_assert_eq!(Ack::parse(&ack.to_bytes()), Ok(ack));
            prop_assert_eq!(ack.status(), status);
        }
        for good in [true, false] {
            prop_assert_eq!(Seal::parse(&Seal::new(seq, good).to_bytes(), seq), Ok(good));
            prop_assert!(Seal::parse(&Seal::new(seq, good).to_bytes(), seq ^ 1).is_err());
        }
    }

    #[test]
    fn any_bytes_are_a_frame_or_an_error(bytes in any::<[[u8; 32]; 2]>(), fix in 0..3) {
        let mut header = [0; 64];
        header[..32].copy_from_slice(&bytes[0]);
        header[32..].copy_from_slice(&bytes[1]);
        if fix > 0 {
            header[..4].copy_from_slice(b"KVTB");
            header[4] = 1;
        }
        if let Ok(parsed) = BatchHeader::parse(&header) {
            prop_assert_eq!(parsed.to_bytes(), header);
        }
        let mut ack = bytes[0];
        if fix > 1 {
            ack[..8].copy_from_slice(b"KVTA\0\0\0\0");
        }
        if let Ok(parsed) = Ack::parse(&ack) {
            prop_assert_eq!(parsed.to_bytes(), ack);
        }
        let seal = bytes[0].first_chunk().expect("long enough");
        prop_assert!(Seal::parse(seal, 0).is_err() || bytes[0].starts_with(b"GOOD") || bytes[0].starts_with(b"VOID"));
    }
}
