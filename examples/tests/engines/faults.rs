//! What breaks between two workers is a sentence on the request that it hits, and nothing else.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use clap::Parser as _;
use hyper::StatusCode;
use kvworker::cache::PageIndex;
use kvworker::cache::aux::AuxSlot;
use kvworker::client::Client;
use kvworker::pd::{
    Bootstrap, Doorbell, Grant, ReceiveState, Role, Room, SendState, TransferError,
};
use kvworker::plane;
use kvworker::settings::Settings;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::worker::{PATIENCE, Pair, Worker, generate, next_room, prompt, routed};

fn message(answer: &(StatusCode, Value)) -> &str {
    assert_eq!(answer.0, StatusCode::INTERNAL_SERVER_ERROR, "{answer:?}");
    answer.1["message"].as_str().expect("a sentence")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_abort_ends_a_room_at_every_stage() {
    let slow = ["--chunked-prefill-size", "1", "--tp", "2"];
    let pair = Pair::start(&slow, &["--transfer-path", "tcp"]).await;
    let with_rid = |mut body: Value, rid: &str| {
        body["rid"] = json!(rid);
        body
    };
    let port = pair.prefill.bootstrap_port();
    let abort = json!({ "rid": "x" });
    // A prefill whose decode never comes.
    let body = with_rid(routed(&generate(&prompt(40, 4), 4), port, next_room()), "x");
    let aborting = async {
        pair.prefill
            .wait_load("/disaggregation/prefill_bootstrap_queue_reqs", 1)
            .await;
        pair.prefill.post("/abort_request", &abort).await;
    };
    let (answer, ()) = tokio::join!(pair.prefill.post("/generate", &body), aborting);
    assert_eq!(
        answer.1["meta_info"]["finish_reason"]["type"], "abort",
        "{answer:?}"
    );
    // A decode that lent its pages to a prefill that never comes.
    let body = with_rid(routed(&generate(&prompt(40, 4), 4), port, next_room()), "x");
    let aborting = async {
        pair.decode
            .wait_load("/disaggregation/decode_transfer_queue_reqs", 1)
            .await;
        pair.decode.post("/abort_request", &abort).await;
    };
    let (answer, ()) = tokio::join!(pair.decode.post("/generate", &body), aborting);
    assert_eq!(
        answer.1["meta_info"]["finish_reason"]["type"], "abort",
        "{answer:?}"
    );
    pair.assert_idle().await;
    // A prompt whose chunks are on their way, given up by either side: the other side is told.
    for (quitter, other) in [(&pair.decode, &pair.prefill), (&pair.prefill, &pair.decode)] {
        let body = routed(&generate(&prompt(600, 5), 4), port, next_room());
        let named = with_rid(body.clone(), "x");
        let aborting = async {
            pair.prefill.wait_load("/num_running_reqs", 1).await;
            quitter.post("/abort_request", &abort).await;
        };
        let legs = (
            quitter.post("/generate", &named),
            other.post("/generate", &body),
        );
        let (first, second, ()) = tokio::join!(legs.0, legs.1, aborting);
        assert_eq!(
            first.1["meta_info"]["finish_reason"]["type"], "abort",
            "{first:?}"
        );
        let text = message(&second);
        assert!(text.contains("the peer ended it (cancelled)"), "{text}");
        pair.assert_idle().await;
    }
    pair.ask(&generate(&prompt(40, 6), 4)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_room_without_the_other_side_ends_by_its_deadline() {
    let brief = ["--disaggregation-timeout-secs", "1"];
    let pair = Pair::start(&brief, &brief).await;
    let port = pair.prefill.bootstrap_port();
    let body = generate(&prompt(40, 4), 4);
    let alone = routed(&body, port, next_room());
    let lone = pair.prefill.post("/generate", &alone).await;
    assert!(
        message(&lone).contains("within 1s (stage: waiting for the receiver's grant)"),
        "{lone:?}"
    );
    let lone = pair
        .decode
        .post("/generate", &routed(&body, port, next_room()))
        .await;
    assert!(
        message(&lone).contains("within 1s (stage: waiting for the sender's first page)"),
        "{lone:?}"
    );
    // A registry that accepts and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = silent.local_addr().expect("bound").port();
    let lone = pair
        .decode
        .post("/generate", &routed(&body, port, next_room()))
        .await;
    assert!(
        message(&lone).contains("within 1s (stage: looking up the prefill)"),
        "{lone:?}"
    );
    pair.assert_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_that_cannot_be_used_is_named() {
    let body = generate(&prompt(40, 4), 4);
    let decode = Worker::decode(&[]).await;
    let free = TcpListener::bind("127.0.0.1:0")
        .expect("a port")
        .local_addr()
        .expect("bound")
        .port();
    let answer = decode
        .post("/generate", &routed(&body, free, next_room()))
        .await;
    let text = message(&answer);
    assert!(
        text.contains(&format!(
            "cannot connect to the bootstrap server at 127.0.0.1:{free}"
        )),
        "{text}"
    );
    for (flags, words) in [
        (&["--page-size", "8"][..], "page size"),
        (&["--tp", "2", "--kv-heads", "2"], "heads"),
    ] {
        let prefill = Worker::prefill(flags).await;
        let answer = decode
            .post(
                "/generate",
                &routed(&body, prefill.bootstrap_port(), next_room()),
            )
            .await;
        let text = message(&answer).to_lowercase();
        assert!(text.contains("refused") && text.contains(words), "{text}");
    }
    let other = Worker::prefill(&["--tp", "4"]).await;
    let three = [
        "--tp",
        "3",
        "--kv-heads",
        "6",
        "--q-heads",
        "6",
        "--hidden-size",
        "96",
    ];
    let odd = Worker::decode(&three).await;
    let answer = odd
        .post(
            "/generate",
            &routed(&body, other.bootstrap_port(), next_room()),
        )
        .await;
    assert!(
        message(&answer).contains("one must divide the other"),
        "{answer:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taken_bootstrap_port_is_named_and_both_sides_may_restart() {
    let mut pair = Pair::start(&[], &["--tp", "2"]).await;
    let body = generate(&prompt(50, 2), 6);
    let (_, expected) = pair.ask(&body).await;
    let port = pair.prefill.bootstrap_port().to_string();
    let taken = [
        "--disaggregation-mode",
        "prefill",
        "--disaggregation-bootstrap-port",
        &port,
    ];
    let error = Worker::try_start(&taken)
        .await
        .err()
        .expect("the port is taken");
    let error = format!("{error:#}");
    assert!(
        error.contains(&port) && error.contains("is in use"),
        "{error}"
    );

    pair.prefill.stop().await;
    pair.prefill = Worker::prefill_at(&port, &["--tp", "2"]).await;
    let (_, again) = pair.ask(&body).await;
    assert_eq!(again["output_ids"], expected["output_ids"]);

    pair.decode.stop().await;
    pair.decode = Worker::decode(&[]).await;
    let (_, again) = pair.ask(&body).await;
    assert_eq!(again["output_ids"], expected["output_ids"]);
    pair.assert_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefill_on_all_addresses_is_found_under_one_of_them() {
    let prefill = Worker::prefill(&["--host", "0.0.0.0"]).await;
    let pair = Pair {
        prefill,
        decode: Worker::decode(&[]).await,
    };
    pair.ask(&generate(&prompt(20, 1), 2)).await;
    let loopback = Worker::prefill(&["--host", "0.0.0.0", "--advertise-ip", "127.0.0.1"]).await;
    pair.ask_over(&loopback, &generate(&prompt(20, 2), 2)).await;
    let info = pair.decode.get("/server_info").await.1;
    let address = info["kvtransfer"]["ranks"][0]["peers"][1]["address"]
        .as_str()
        .expect("connected");
    assert!(address.starts_with("127.0.0.1:"), "{info}");
}

#[test]
fn links_refuse_rooms_beyond_their_bound() {
    let link = |mode| {
        let flags = ["kvworker", "--layers", "1", "--disaggregation-mode", mode];
        let settings = Settings::parse_from(
            flags
                .iter()
                .chain(&["--disaggregation-bootstrap-port", "0"]),
        );
        plane::build(&settings, Doorbell::new(|| ()))
            .expect("a plane")
            .role
    };
    let room = |number| Room::new(number).expect("valid");
    let full = TransferError::Full { rooms_max: 1024 };
    let Role::Prefill(mut prefill) = link("prefill") else {
        panic!("a prefill")
    };
    for number in 1..=1024 {
        prefill
            .open(room(number), PATIENCE)
            .expect("below the bound");
    }
    assert_eq!(prefill.open(room(2000), PATIENCE), Err(full.clone()));
    prefill.cancel(room(5));
    assert_eq!(
        prefill.poll(room(5)),
        SendState::Failed(TransferError::Cancelled)
    );
    prefill.close(room(5));
    prefill.open(room(2000), PATIENCE).expect("one was closed");

    let Role::Decode(mut decode) = link("decode") else {
        panic!("a decode")
    };
    let grant = |number| Grant {
        bootstrap: Bootstrap {
            host: "127.0.0.1".to_owned(),
            port: 1,
            room: room(number),
        },
        pages: vec![PageIndex(0)],
        aux: AuxSlot(0),
        prefix_tokens: 0,
    };
    for number in 1..=1024 {
        decode
            .receive(grant(number), PATIENCE)
            .expect("below the bound");
    }
    assert_eq!(decode.receive(grant(2000), PATIENCE), Err(full));
    decode.cancel(room(5));
    assert_eq!(
        decode.poll(room(5)),
        ReceiveState::Failed(TransferError::Cancelled)
    );
    decode.close(room(5));
    decode
        .receive(grant(2000), PATIENCE)
        .expect("one was closed");
}

/// A worker process, killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may be dead already.
        let _gone = self.0.kill();
        let _status = self.0.wait();
    }
}

async fn prefill_process(port: u16, bootstrap: u16) -> Process {
    let child = Command::new(env!("CARGO_BIN_EXE_kvworker"))
        .args([
            "--layers",
            "2",
            "--disaggregation-mode",
            "prefill",
            "--chunked-prefill-size",
            "1",
        ])
        .args([
            "--port",
            &port.to_string(),
            "--disaggregation-bootstrap-port",
            &bootstrap.to_string(),
        ])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("a process");
    let process = Process(child);
    let start = Instant::now();
    let url = format!("http://127.0.0.1:{port}/ready");
    while !Client::default()
        .get(&url)
        .await
        .is_ok_and(|(status, _)| status.is_success())
    {
        assert!(start.elapsed() < PATIENCE, "never ready");
        sleep(std::time::Duration::from_millis(10)).await;
    }
    process
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_prefill_fails_its_rooms_at_once_and_a_new_one_is_found() {
    let free = || {
        TcpListener::bind("127.0.0.1:0")
            .expect("a port")
            .local_addr()
            .expect("bound")
            .port()
    };
    let (port, bootstrap) = (free(), free());
    let mut process = prefill_process(port, bootstrap).await;
    let (decode, single) = (Worker::decode(&[]).await, Worker::start(&[]).await);
    let url = format!("http://127.0.0.1:{port}/generate");
    let body = routed(&generate(&prompt(800, 5), 4), bootstrap, next_room());
    let killing = async {
        decode
            .wait_load("/disaggregation/decode_transfer_queue_reqs", 1)
            .await;
        process.0.kill().expect("it lives");
        Instant::now()
    };
    let client = Client::default();
    let (_broken, answer, killed) = tokio::join!(
        client.post(&url, &body),
        decode.post("/generate", &body),
        killing
    );
    assert!(message(&answer).contains("lost the peer"), "{answer:?}");
    assert!(
        killed.elapsed().as_secs() < 5,
        "the loss was noticed by a timeout"
    );
    decode.wait_load("/num_used_tokens", 0).await;

    drop(process);
    let _process = prefill_process(port, bootstrap).await;
    let body = generate(&prompt(50, 5), 4);
    let expected = single.post("/generate", &body).await.1;
    let body = routed(&body, bootstrap, next_room());
    let (first, second) = tokio::join!(client.post(&url, &body), decode.post("/generate", &body));
    assert!(first.expect("an answer").0.is_success());
    assert_eq!(second.1["output_ids"], expected["output_ids"], "{second:?}");
}
