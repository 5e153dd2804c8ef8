//! Prefill and decode workers with real engines in one process, over the loopback interface: what a pair answers is what
//! one worker answers, whatever moves the bytes and whatever breaks.

mod faults;
mod worker;

use serde_json::{Value, json};
use worker::{Pair, Worker, generate, prompt};

const PATHS: [(&str, &str); 3] = [("tcp", "tcp"), ("pull", "shm-pull"), ("ring", "shm-ring")];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_generates_what_one_worker_generates() {
    let single = Worker::start(&[]).await;
    let bodies: Vec<Value> = [1, 16, 17, 90]
        .into_iter()
        .map(|len| generate(&prompt(len, 3), 10))
        .collect();
    let mut expected = Vec::new();
    for body in &bodies {
        expected.push(single.post("/generate", body).await);
    }
    for (path, name) in PATHS {
        for (prefill_tp, decode_tp) in [("1", "1"), ("2", "1"), ("1", "2")] {
            let pair = Pair::start(
                &[
                    "--tp",
                    prefill_tp,
                    "--chunked-prefill-size",
                    "24",
                    "--transfer-path",
                    path,
                ],
                &["--tp", decode_tp, "--transfer-path", path],
            )
            .await;
            for (body, (_, expected)) in bodies.iter().zip(&expected) {
                let (first, answer) = pair.ask(body).await;
                let setting = (path, prefill_tp, decode_tp);
                assert_eq!(
                    answer["output_ids"], expected["output_ids"],
                    "{setting:?}: {answer}"
                );
                assert_eq!(answer["text"], expected["text"], "{setting:?}");
                assert_eq!(
                    first["output_ids"][0], expected["output_ids"][0],
                    "{setting:?}"
                );
            }
            let peers = pair.decode.paths().await;
            assert!(
                !peers.is_empty() && peers.iter().all(|p| p == name),
                "{peers:?}"
            );
            pair.assert_idle().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_decode_has_cached_is_not_moved_again() {
    for (prefill_tp, decode_tp) in [("1", "1"), ("2", "1"), ("1", "2")] {
        let single = Worker::start(&[]).await;
        let pair = Pair::start(
            &["--tp", prefill_tp, "--chunked-prefill-size", "16"],
            &["--tp", decode_tp],
        )
        .await;
        let long = prompt(70, 9);
        let mut moved = Vec::new();
        // 48 tokens are three pages; 70 share them and need two more; 64 are all there, so that only the row travels.
        for (length, cached) in [(48, 0), (70, 48), (64, 64)] {
            let body = generate(&long[..length], 8);
            let expected = single.post("/generate", &body).await.1;
            let (_, answer) = pair.ask(&body).await;
            assert_eq!(
                answer["output_ids"], expected["output_ids"],
                "{length} {answer}"
            );
            assert_eq!(
                answer["meta_info"]["decode_prefix_tokens"], cached,
                "{answer}"
            );
            moved.push(
                pair.decode.last_transfer().await["bytes"]
                    .as_u64()
                    .expect("a number"),
            );
        }
        // Two layers, keys and values, 16 tokens of 4 heads of 32 elements of 4 bytes.
        let page = 2 * 2 * 16 * 4 * 32 * 4;
        let row = 3 * 64 * decode_tp.parse::<u64>().expect("a number");
        assert_eq!(
            moved,
            [3 * page + row, 2 * page + row, row],
            "{prefill_tp} {decode_tp}"
        );
        let sent = pair.prefill.last_transfer().await;
        assert_eq!((&sent["bytes"], &sent["ok"]), (&json!(row), &json!(true)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_rooms_at_once_over_two_prefills() {
    let single = Worker::start(&[]).await;
    let pair = Pair::start(&["--tp", "2"], &[]).await;
    let second = Worker::prefill(&["--chunked-prefill-size", "16"]).await;
    let bodies: Vec<Value> = (0..12)
        .map(|salt| generate(&prompt(20 + 7 * salt as usize, salt), 6))
        .collect();
    let asking = bodies.iter().enumerate().map(|(i, body)| {
        let prefill = if i % 2 == 0 { &pair.prefill } else { &second };
        pair.ask_over(prefill, body)
    });
    let answers = futures_util::future::join_all(asking).await;
    for (body, (_, answer)) in bodies.iter().zip(answers) {
        let expected = single.post("/generate", body).await.1;
        assert_eq!(answer["output_ids"], expected["output_ids"], "{answer}");
    }
    let addresses = pair.decode.paths().await;
    assert_eq!(
        addresses.len(),
        3,
        "two ranks of one prefill, one of the other"
    );
    pair.assert_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn telemetry_metrics_and_server_info_tell_the_same() {
    let pair = Pair::start(&["--tp", "2", "--telemetry-port", "0"], &["--tp", "2"]).await;
    pair.ask(&generate(&prompt(40, 1), 4)).await;
    let bytes = pair.decode.last_transfer().await["bytes"]
        .as_u64()
        .expect("a number");
    let info = pair.prefill.get("/server_info").await.1;
    let plane = &info["kvtransfer"];
    assert_eq!(plane["registered"], true);
    let telemetry = plane["telemetry"].as_str().expect("it was asked for");
    std::net::TcpStream::connect(telemetry).expect("the telemetry stream listens");
    assert_eq!(plane["ranks"].as_array().map(Vec::len), Some(2));
    assert!(
        plane["ranks"][1]["peers"][0]["handshake_ms"]
            .as_f64()
            .is_some_and(|ms| ms > 0.0)
    );
    let total: u64 = plane["ranks"]
        .as_array()
        .expect("ranks")
        .iter()
        .flat_map(|rank| rank["rails"].as_array().expect("rails"))
        .map(|rail| rail["bytes_total"].as_u64().expect("a number"))
        .sum();
    assert_eq!(total, bytes);
    assert_eq!(
        info["disaggregation_bootstrap_port"],
        pair.prefill.bootstrap_port()
    );
    let (status, page) = pair.prefill.get("/metrics").await;
    let page = page.as_str().expect("text").to_owned();
    assert!(
        status.is_success() && page.contains("rail=\"tp1/"),
        "{page}"
    );
    assert!(pair.prefill.get("/ready").await.0.is_success());
    let decode = pair.decode.get("/server_info").await.1;
    assert_eq!(
        decode["kvtransfer"]["telemetry"],
        Value::Null,
        "nothing listens unasked"
    );
    let single = Worker::start(&[]).await;
    assert_eq!(single.get("/metrics").await.0, 404);
    assert_eq!(
        single.get("/server_info").await.1["kvtransfer"],
        Value::Null
    );
}
