use std::time::Duration;

use tokio::sync::mpsc;

use super::job::{Event, Outcome, Sampling};
use super::mailbox::SubmitError;
use super::*;
use crate::cache::RankShape;
use crate::cache::heap::heap_ranks;
use crate::model::ModelShape;
use crate::pd::loopback::Hub;
use crate::pd::{Bootstrap, DecodeLink, Doorbell, Grant, ReceiveState, Room, TransferError};
use crate::text::encode;

/// Long enough for any machine, short enough to end a broken test.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy)]
struct Config {
    tp: usize,
    page_size: usize,
    chunk: usize,
    pages: usize,
    running_max: usize,
    timeout: Duration,
}

const CONFIG: Config = Config {
    tp: 1,
    page_size: 16,
    chunk: 64,
    pages: 64,
    running_max: 8,
    timeout: PATIENCE,
};

fn model_shape() -> ModelShape {
    ModelShape {
        layers: 3,
        context: 512,
        ..ModelShape::default()
    }
}

fn start(config: Config, role: impl FnOnce(Vec<RankMemory>, Doorbell) -> Role) -> Scheduler {
    let shape = model_shape();
    let whole = RankShape {
        layers: shape.layers,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        page_size: config.page_size,
        pages: config.pages,
        aux_slots: config.running_max,
    };
    let ranks = heap_ranks(whole, config.tp);
    let mailbox = Mailbox::new(64);
    let role = role(ranks.clone(), mailbox.doorbell());
    let limits = Limits {
        chunk_tokens: config.chunk,
        running_max: config.running_max,
        transfer_timeout: config.timeout,
    };
    let model = Model::from_seed(shape, 42).expect("model");
    Scheduler::start(
        model,
        Plane {
            ranks,
            role,
            watch: None,
        },
        limits,
        mailbox,
    )
    .expect("thread")
}

fn null(config: Config) -> Scheduler {
    start(config, |_, _| Role::Null)
}

struct Pair {
    hub: Hub,
    prefill: Scheduler,
    decode: Scheduler,
}

fn pair(prefill: Config, decode: Config) -> Pair {
    let hub = Hub::default();
    let prefill = start(prefill, |ranks, bell| {
        Role::Prefill(Box::new(hub.prefill(ranks, bell)))
    });
    let decode = start(decode, |ranks, bell| {
        Role::Decode(Box::new(hub.decode(ranks, bell)))
    });
    Pair {
        hub,
        prefill,
        decode,
    }
}

impl Pair {
    fn run(&self, prompt: &[u32], sampling: &Sampling, number: u64) -> Answer {
        let first = submit(&self.prefill, "p", prompt, sampling, Some(number));
        let second = submit(&self.decode, "d", prompt, sampling, Some(number));
        let first = collect(first);
        let answer = collect(second);
        assert_eq!(
            first.tokens[..],
            answer.tokens[..1],
            "prefill answers with the first token"
        );
        self.assert_clean();
        answer
    }

    /// Both sides end up with nothing leased and no room open.
    fn assert_clean(&self) {
        for worker in [&self.prefill, &self.decode] {
            assert!(
                worker.mailbox().wait_until_idle(PATIENCE),
                "a request never ended"
            );
            eventually(|| worker.load().num_used_tokens == 0, "pages leaked");
        }
        assert_eq!(self.hub.open_rooms(), 0, "a room was never closed");
    }
}

fn sampling(max_new_tokens: usize) -> Sampling {
    Sampling {
        max_new_tokens,
        temperature: 0.0,
        seed: 0,
        stop: vec![],
        ignore_eos: false,
    }
}

fn bootstrap(number: u64) -> Bootstrap {
    let room = Room::new(number).expect("a valid room");
    Bootstrap {
        host: "localhost".to_owned(),
        port: 34000,
        room,
    }
}

fn submit(
    worker: &Scheduler,
    rid: &str,
    prompt: &[u32],
    sampling: &Sampling,
    room: Option<u64>,
) -> mpsc::Receiver<Event> {
    try_submit(worker, rid, prompt, sampling, room).expect("accepted")
}

fn try_submit(
    worker: &Scheduler,
    rid: &str,
    prompt: &[u32],
    sampling: &Sampling,
    room: Option<u64>,
) -> Result<mpsc::Receiver<Event>, SubmitError> {
    let (events, receiver) = mpsc::channel(sampling.events_max());
    let (rid, prompt, sampling) = (rid.to_owned(), prompt.to_vec(), sampling.clone());
    let bootstrap = room.map(bootstrap);
    worker.mailbox().submit(vec![Job {
        rid,
        prompt,
        sampling,
        bootstrap,
        events,
    }])?;
    Ok(receiver)
}

#[derive(Clone, Debug, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    text: String,
    outcome: Outcome,
}

fn collect(mut events: mpsc::Receiver<Event>) -> Answer {
    let (mut tokens, mut text) = (vec![], String::new());
    loop {
        match events.blocking_recv().expect("an outcome comes last") {
            Event::Token { id, text: piece } => {
                tokens.push(id);
                text.push_str(&piece);
            }
            Event::Tail(piece) => text.push_str(&piece),
            Event::Done(outcome) => {
                return Answer {
                    tokens,
                    text,
                    outcome,
                };
            }
        }
    }
}

fn reference(prompt: &[u32], sampling: &Sampling) -> Answer {
    let worker = null(CONFIG);
    collect(submit(&worker, "reference", prompt, sampling, None))
}

fn eventually(condition: impl Fn() -> bool, failure: &str) {
    let start = tokio::time::Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{failure}");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

/// A prompt of exactly `len` tokens.
fn prompt(len: usize, salt: u32) -> Vec<u32> {
    (0_u32..)
        .take(len)
        .map(|i| (i * 31 + salt * 7 + i * i % 11) % 96 + 32)
        .collect()
}

#[test]
fn a_pair_generates_what_one_worker_generates() {
    let prompts: Vec<Vec<u32>> = [1_u32, 15, 16, 17, 32, 90]
        .iter()
        .map(|len| prompt(*len as usize, *len))
        .collect();
    let expected: Vec<Answer> = prompts
        .iter()
        .map(|p| reference(p, &sampling(12)))
        .collect();
    let with = |tp, chunk| Config {
        tp,
        chunk,
        ..CONFIG
    };
    for (prefill, decode) in [
        (with(1, 512), with(1, 512)),
        (with(2, 16), with(1, 512)),
        (with(1, 7), with(2, 512)),
        (with(2, 1), with(2, 3)),
        (with(4, 50), with(1, 1)),
    ] {
        let pair = pair(prefill, decode);
        for (number, (prompt, expected)) in prompts.iter().zip(&expected).enumerate() {
            let answer = pair.run(prompt, &sampling(12), number as u64 + 1);
            let setting = (prefill.tp, prefill.chunk, decode.tp, prompt.len());
            assert_eq!(answer.tokens, expected.tokens, "{setting:?}");
            assert_eq!(answer.text, expected.text, "{setting:?}");
            assert_eq!(answer.outcome.finish, expected.outcome.finish);
            assert_eq!(answer.outcome.prompt_tokens, prompt.len());
        }
    }
}

#[test]
fn page_sizes_and_draws_and_stops_do_not_matter_either() {
    let prompt = prompt(50, 3);
    let free = reference(&prompt, &sampling(30));
    let middle: String = free.text.chars().skip(8).take(2).collect();
    let wishes = [
        Sampling {
            temperature: 0.8,
            seed: 5,
            ..sampling(20)
        },
        Sampling {
            stop: vec![middle.clone()],
            ..sampling(30)
        },
        sampling(1),
    ];
    for page_size in [1, 8, 64] {
        let config = Config {
            page_size,
            pages: 1024 / page_size,
            ..CONFIG
        };
        let pair = pair(Config { tp: 2, ..config }, config);
        for (number, wish) in wishes.iter().enumerate() {
            let expected = reference(&prompt, wish);
            let answer = pair.run(&prompt, wish, number as u64 + 1);
            assert_eq!(
                (&answer.tokens, &answer.text),
                (&expected.tokens, &expected.text)
            );
            assert_eq!(answer.outcome.finish, expected.outcome.finish);
        }
    }
    let stopped = reference(&prompt, &wishes[1]);
    assert_eq!(stopped.outcome.finish, Finish::StopText(middle.clone()));
    assert!(!stopped.text.contains(&middle) && free.text.starts_with(&stopped.text));
    assert_ne!(
        reference(&prompt, &wishes[0]).tokens[..20],
        free.tokens[..20]
    );
}

#[test]
fn a_damaged_page_in_transit_is_noticed_by_the_comparison() {
    let prompt = prompt(40, 1);
    let pair = pair(CONFIG, CONFIG);
    pair.hub.flip_next_page();
    let damaged = pair.run(&prompt, &sampling(24), 1);
    assert_ne!(damaged.tokens, reference(&prompt, &sampling(24)).tokens);
}

#[test]
fn what_decode_has_cached_is_not_moved_again() {
    let pair = pair(
        Config {
            tp: 2,
            chunk: 16,
            ..CONFIG
        },
        CONFIG,
    );
    let long = prompt(70, 9);
    let first = pair.run(&long[..48], &sampling(4), 1);
    assert_eq!(
        (pair.hub.pages_moved(), first.outcome.decode_prefix_tokens),
        (3, 0)
    );
    // 48 shared tokens are three whole pages; 70 tokens are five.
    let second = pair.run(&long, &sampling(12), 2);
    assert_eq!(
        (pair.hub.pages_moved(), second.outcome.decode_prefix_tokens),
        (3 + 2, 48)
    );
    assert_eq!(
        second.outcome.cached_tokens, 48,
        "prefill had them cached too"
    );
    assert_eq!(second.tokens, reference(&long, &sampling(12)).tokens);
    // Everything cached, page-aligned: only the aux row travels.
    let third = pair.run(&long[..64], &sampling(12), 3);
    assert_eq!(
        (pair.hub.pages_moved(), third.outcome.decode_prefix_tokens),
        (5, 64)
    );
    assert_eq!(third.tokens, reference(&long[..64], &sampling(12)).tokens);
}

#[test]
fn a_prefix_in_the_single_worker_s_cache_changes_nothing_but_the_count() {
    let worker = null(CONFIG);
    let prompt = prompt(70, 2);
    let ask = |rid| collect(submit(&worker, rid, &prompt, &sampling(8), None));
    let (first, second) = (ask("a"), ask("b"));
    assert_eq!(first.tokens, second.tokens);
    assert_eq!(
        (first.outcome.cached_tokens, second.outcome.cached_tokens),
        (0, 64)
    );
}

#[test]
fn many_requests_share_a_small_cache_and_all_finish() {
    let config = Config {
        pages: 8,
        running_max: 3,
        ..CONFIG
    };
    let pair = pair(config, config);
    let prompts: Vec<Vec<u32>> = (0_u32..10)
        .map(|i| prompt(20 + 3 * i as usize, i))
        .collect();
    let receivers: Vec<_> = prompts
        .iter()
        .enumerate()
        .map(|(i, p)| {
            let (rid, number) = (format!("r{i}"), Some(i as u64 + 1));
            let prefill = submit(&pair.prefill, &rid, p, &sampling(9), number);
            (prefill, submit(&pair.decode, &rid, p, &sampling(9), number))
        })
        .collect();
    for (prompt, (prefill, decode)) in prompts.iter().zip(receivers) {
        assert_eq!(collect(prefill).outcome.finish, Finish::Length);
        assert_eq!(
            collect(decode).tokens,
            reference(prompt, &sampling(9)).tokens
        );
    }
    pair.assert_clean();
}

#[test]
fn an_abort_is_answered_at_every_stage_and_memory_waits_for_the_fence() {
    let pair = pair(CONFIG, CONFIG);
    let requested = Finish::Aborted(Abort::Requested);
    let abort = |worker: &Scheduler, rid: &str| {
        worker.mailbox().abort(Target::Request(rid.to_owned()));
    };
    // Prefill waits for a decode that never comes, decode for a prefill that never comes.
    let prompt = prompt(40, 4);
    let lone = submit(&pair.prefill, "lone", &prompt, &sampling(4), Some(1));
    eventually(
        || pair.prefill.load().prefill_bootstrap_queue_reqs == 1,
        "not bootstrapping",
    );
    abort(&pair.prefill, "lone");
    assert_eq!(collect(lone).outcome.finish, requested);
    let lone = submit(&pair.decode, "lone", &prompt, &sampling(4), Some(2));
    eventually(
        || pair.decode.load().decode_prealloc_queue_reqs == 1,
        "not preallocated",
    );
    abort(&pair.decode, "lone");
    assert_eq!(collect(lone).outcome.finish, requested);
    pair.assert_clean();

    // Bytes in flight: both are answered at once, but decode's pages stay leased until nothing can land any more.
    pair.hub.hold();
    let first = submit(&pair.prefill, "p", &prompt, &sampling(4), Some(3));
    let second = submit(&pair.decode, "d", &prompt, &sampling(4), Some(3));
    eventually(
        || pair.prefill.load().prefill_inflight_queue_reqs == 1,
        "not inflight",
    );
    eventually(
        || pair.decode.load().decode_transfer_queue_reqs == 1,
        "not transferring",
    );
    abort(&pair.decode, "d");
    let answer = collect(second);
    assert_eq!(
        (answer.outcome.finish, answer.tokens.len()),
        (requested.clone(), 0)
    );
    abort(&pair.prefill, "p");
    assert_eq!(collect(first).outcome.finish, requested);
    assert_eq!(
        pair.decode.mailbox().live(),
        1,
        "the room is not fenced yet"
    );
    eventually(
        || pair.decode.load().decode_transfer_queue_reqs == 0,
        "still counted",
    );
    assert!(
        pair.decode.load().num_used_tokens > 0,
        "pages were reused under a transfer"
    );
    let again = try_submit(&pair.decode, "d2", &prompt, &sampling(4), Some(3));
    assert!(
        matches!(again, Err(SubmitError::DuplicateRoom(_))),
        "{again:?}"
    );
    pair.hub.resume();
    pair.assert_clean();

    // Generating.
    let first = submit(&pair.prefill, "p", &prompt, &sampling(400), Some(4));
    let mut second = submit(&pair.decode, "d", &prompt, &sampling(400), Some(4));
    assert!(matches!(second.blocking_recv(), Some(Event::Token { .. })));
    abort(&pair.decode, "d");
    let answer = collect(second);
    assert_eq!(answer.outcome.finish, requested);
    assert!(answer.outcome.completion_tokens < 400);
    assert_eq!(collect(first).outcome.finish, Finish::Length);
    pair.assert_clean();
}

#[test]
fn clients_that_leave_free_everything_they_held() {
    let pair = pair(CONFIG, CONFIG);
    let prompt = prompt(40, 5);
    drop(submit(
        &pair.prefill,
        "bootstrapping",
        &prompt,
        &sampling(4),
        Some(1),
    ));
    drop(submit(
        &pair.decode,
        "waiting",
        &prompt,
        &sampling(4),
        Some(2),
    ));
    pair.assert_clean();
    let first = submit(&pair.prefill, "p", &prompt, &sampling(400), Some(3));
    let mut second = submit(&pair.decode, "d", &prompt, &sampling(400), Some(3));
    assert!(second.blocking_recv().is_some());
    drop(second);
    assert_eq!(collect(first).outcome.finish, Finish::Length);
    pair.assert_clean();
}

#[test]
fn a_broken_transfer_reaches_both_clients_and_only_them() {
    let pair = pair(CONFIG, CONFIG);
    pair.hub.hold();
    let prompt = prompt(40, 6);
    let first = submit(&pair.prefill, "p", &prompt, &sampling(4), Some(1));
    let second = submit(&pair.decode, "d", &prompt, &sampling(4), Some(1));
    eventually(|| pair.hub.held_chunks() > 0, "nothing was pushed");
    pair.hub.sever(Room::new(1).expect("valid"), "cable cut");
    pair.hub.resume();
    for answer in [collect(first), collect(second)] {
        let Finish::Aborted(Abort::Transfer(TransferError::Peer { reason })) =
            answer.outcome.finish
        else {
            panic!("{answer:?}")
        };
        assert_eq!((reason.as_str(), answer.tokens.len()), ("cable cut", 0));
    }
    pair.assert_clean();
    assert_eq!(
        pair.run(&prompt, &sampling(4), 2).tokens,
        reference(&prompt, &sampling(4)).tokens
    );
}

#[test]
fn a_peer_that_never_comes_costs_the_timeout_and_no_more() {
    let config = Config {
        timeout: Duration::from_millis(50),
        ..CONFIG
    };
    let pair = pair(config, config);
    for worker in [&pair.prefill, &pair.decode] {
        let number = Some(pair.hub.open_rooms() as u64 + 1);
        let answer = collect(submit(
            worker,
            "alone",
            &prompt(20, 1),
            &sampling(4),
            number,
        ));
        let Finish::Aborted(Abort::Transfer(TransferError::Timeout { after, .. })) =
            answer.outcome.finish
        else {
            panic!("{answer:?}")
        };
        assert_eq!(after, config.timeout);
        assert!(worker.mailbox().wait_until_idle(PATIENCE));
    }
    pair.assert_clean();
}

/// Claims success without having written anything.
struct Liar;

impl DecodeLink for Liar {
    fn receive(&mut self, _grant: Grant, _timeout: Duration) -> Result<(), TransferError> {
        Ok(())
    }

    fn poll(&mut self, _room: Room) -> ReceiveState {
        ReceiveState::Received
    }

    fn cancel(&mut self, _room: Room) {}

    fn close(&mut self, _room: Room) {}
}

#[test]
fn success_without_the_room_s_row_is_corruption() {
    let worker = start(CONFIG, |_, _| Role::Decode(Box::new(Liar)));
    let answer = collect(submit(&worker, "d", &prompt(20, 1), &sampling(4), Some(77)));
    let corrupted = Abort::Corrupted {
        expected: 77,
        found: 0,
    };
    assert_eq!(answer.outcome.finish, Finish::Aborted(corrupted));
}

#[test]
fn stopping_answers_everyone() {
    let worker = null(CONFIG);
    let running = submit(&worker, "a", &encode("run"), &sampling(400), None);
    worker.mailbox().stop();
    assert_eq!(
        collect(running).outcome.finish,
        Finish::Aborted(Abort::ShuttingDown)
    );
    assert!(!worker.mailbox().is_open());
}
