//! What real providers do with requests that a correct engine never makes, and at the limits of what it may make.

use super::{
    CAPS, CHUNK_BYTES, CompletionStatus, End, Flags, NOTICE, PATIENCE, REGION_BYTES, RemotePlace,
    connect_by_cm, connect_out_of_band, connect_with, library, next_event, sys,
};
use crate::{
    clock,
    transport::verbs::{
        chain::Chain,
        cm::PrivateData,
        context::Context,
        cq::{Completion, POLL_MAX},
        probe,
        qp::QpCaps,
    },
};

/// Receives that an end has posted.
const RECEIVES: usize = 8;
/// The id of a write that must fail; receives have others.
const PAST: u64 = 55;

/// The next completions of an end, as many as are asked for.
fn completions(end: &End, count: usize) -> Vec<Completion> {
    let started = clock::now();
    let mut all = Vec::new();
    let mut found = [Completion::default(); POLL_MAX];
    while all.len() < count {
        let got = end.cq.poll(&mut found).expect("polled");
        all.extend_from_slice(&found[..got]);
        let waited = clock::now().since(started);
        assert!(waited < PATIENCE, "{} of {count}: {all:?}", all.len());
        std::thread::yield_now();
    }
    all
}

fn send_notice(from: &mut End, id: u64) {
    let mut chain = Chain::new(1, 1, 1 << 20);
    let flags = Flags {
        signalled: true,
        solicited: true,
    };
    chain.send_inline(id, NOTICE, flags).expect("room");
    from.qp.post(&mut chain).expect("posted");
}

/// The last 64 bytes of the peer's memory, and 64 more.
fn write_past_the_end(from: &mut End, to: &End) {
    let last = to.target.place(REGION_BYTES as u64 - 64);
    let mut chain = Chain::new(1, 1, 1 << 20);
    let flags = Flags {
        signalled: true,
        solicited: false,
    };
    let sge = from.source.sge(0, 128);
    chain.write(PAST, &[sge], last, flags).expect("room");
    from.qp.post(&mut chain).expect("posted");
}

/// A key is good for its own chunk only, although the next chunk of the region lies right behind it.
fn write_into_the_next_chunk(from: &mut End, to: &End) {
    let inside = to.target.place(CHUNK_BYTES - 64);
    let mut chain = Chain::new(1, 1, 1 << 20);
    let flags = Flags {
        signalled: true,
        solicited: false,
    };
    let place = RemotePlace {
        address: inside.address,
        rkey: inside.rkey,
    };
    let sge = from.source.sge(0, 128);
    chain.write(PAST, &[sge], place, flags).expect("room");
    from.qp.post(&mut chain).expect("posted");
}

#[test]
#[ignore = "needs RDMA"]
fn rxe_refuses_a_write_past_the_memory() {
    for write in [write_past_the_end, write_into_the_next_chunk] {
        let (mut first, second) = connect_out_of_band("rxe0");
        write(&mut first, &second);
        let done = completions(&first, 1 + RECEIVES);
        assert_eq!(done[0].wr_id, PAST);
        let status = done[0].status();
        assert_eq!(
            status,
            CompletionStatus(sys::IBV_WC_REM_ACCESS_ERR),
            "{status}"
        );
        assert!(done[1..].iter().all(|flushed| flushed.status().is_flush()));
        assert_eq!(second.target.read(0, REGION_BYTES), vec![0; REGION_BYTES]);
    }
}

/// iWARP says nothing to the request itself; the connection dies, and everything that was posted comes back.
#[test]
#[ignore = "needs RDMA"]
fn siw_ends_the_connection_of_a_write_past_the_memory() {
    for write in [write_past_the_end, write_into_the_next_chunk] {
        let mut connected = connect_by_cm("siw0", "10.77.0.1", [b"", b""]);
        write(&mut connected.active, &connected.passive);
        next_event(&connected.active_channel, sys::RDMA_CM_EVENT_DISCONNECTED);
        let done = completions(&connected.active, 1 + RECEIVES);
        let flushed = done.iter().filter(|done| done.wr_id != PAST);
        assert!(
            flushed.clone().all(|done| done.status().is_flush()),
            "{done:?}"
        );
        assert_eq!(flushed.count(), RECEIVES);
        let target = &connected.passive.target;
        assert_eq!(target.read(0, REGION_BYTES), vec![0; REGION_BYTES]);
    }
}

#[test]
#[ignore = "needs RDMA"]
fn rxe_fails_a_send_that_finds_no_receive() {
    let (mut first, second) = connect_out_of_band("rxe0");
    for id in 0..RECEIVES as u64 {
        send_notice(&mut first, id);
        assert!(first.next().status().is_success(), "{id}");
    }
    assert_eq!(completions(&second, RECEIVES).len(), RECEIVES);
    send_notice(&mut first, 99);
    let failed = completions(&first, 1)[0];
    let status = failed.status();
    assert_eq!(
        (failed.wr_id, status.0),
        (99, sys::IBV_WC_RNR_RETRY_EXC_ERR),
        "{status}"
    );
}

#[test]
#[ignore = "needs RDMA"]
fn siw_ends_the_connection_of_a_send_that_finds_no_receive() {
    let mut connected = connect_by_cm("siw0", "10.77.0.1", [b"", b""]);
    for id in 0..RECEIVES as u64 {
        send_notice(&mut connected.active, id);
        assert!(connected.active.next().status().is_success(), "{id}");
        let taken = connected.passive.next();
        assert!(taken.status().is_success() && taken.is_receive());
    }
    send_notice(&mut connected.active, 99);
    next_event(&connected.active_channel, sys::RDMA_CM_EVENT_DISCONNECTED);
    let done = completions(&connected.active, 1 + RECEIVES);
    let receives = done.iter().filter(|done| done.wr_id != 99);
    assert!(
        receives.clone().all(|flushed| flushed.status().is_flush()),
        "{done:?}"
    );
    assert_eq!(receives.count(), RECEIVES);
}

/// Both sides' words arrive whole at the longest length that every transport carries, and one byte more is refused.
#[test]
#[ignore = "needs RDMA"]
fn private_data_has_its_limit_on_every_transport() {
    let longest: Vec<u8> = (1..=55).collect();
    for (device, address) in [("siw0", "10.77.0.1"), ("rxe0", "10.77.2.1")] {
        // Padding must not be taken for words, so words that end in zeroes are tried too.
        for words in [&longest[..], &[0; 55], &[], &[7, 0]] {
            drop(connect_by_cm(device, address, [words, words]));
        }
    }
    let refused = PrivateData::new(&[0; 56]).expect_err("too long");
    assert!(refused.to_string().contains("the limit is 55"), "{refused}");
}

/// The probe's number of elements is one that a WRITE can really have, although no device need say so.
#[test]
#[ignore = "needs RDMA"]
fn a_write_gathers_as_many_pieces_as_the_probe_says() {
    const PIECE: u32 = 100;
    for (device, address) in [("siw0", "10.77.0.1"), ("rxe0", "10.77.2.1")] {
        let context = Context::open_for_cm(&library(), device).expect("opened");
        let found = probe::capabilities(&context, 1).expect("probed");
        let most = found.send_sge.value;
        let caps = QpCaps {
            max_send_sge: most,
            ..CAPS
        };
        let mut connected = connect_with(device, address, [b"", b""], caps);
        let at = |piece: u32| u64::from(piece) * 3001;
        let from = &mut connected.active;
        let sges: Vec<_> = (0..most)
            .map(|piece| from.source.sge(at(piece), PIECE))
            .collect();
        let mut chain = Chain::new(1, sges.len(), 1 << 20);
        let flags = Flags {
            signalled: true,
            solicited: false,
        };
        let place = connected.passive.target.place(40);
        chain.write(1, &sges, place, flags).expect("room");
        from.qp.post(&mut chain).expect("posted");
        assert!(
            from.next().status().is_success(),
            "{most} pieces on {device}"
        );
        send_notice(from, 2);
        assert!(connected.passive.next().status().is_success());
        let piece = |piece: u32| {
            let at = usize::try_from(at(piece)).expect("small");
            connected.active.source.read(at, PIECE as usize)
        };
        let expected: Vec<u8> = (0..most).flat_map(piece).collect();
        let got = connected.passive.target.read(40, expected.len());
        assert_eq!(got, expected, "{most} pieces on {device}");
    }
}
