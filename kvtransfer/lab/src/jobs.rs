//! What the lab runs: one table. Adding a job is adding an entry.

/// Where a job's command comes from.
#[derive(Debug)]
pub(crate) enum Source {
    /// A line for the guest's shell.
    Line(&'static str),
    /// Every test target of kvtransfer whose name begins so; each is a job of its own, under its own name.
    TestTargets(&'static str),
    /// The unit tests of kvtransfer's library below this path that are marked ignored.
    UnitTests(&'static str),
}

/// One job, or one family of test targets.
#[derive(Debug)]
pub(crate) struct Job {
    /// The name for `--only` and in the report.
    pub(crate) name: &'static str,
    /// What it shows.
    pub(crate) about: &'static str,
    /// Its command.
    pub(crate) source: Source,
    /// Binaries of the workspace that it runs, as package and target; they are built and lie on the guest's `PATH`.
    pub(crate) binaries: &'static [(&'static str, &'static str)],
    /// The same, built for speed.
    pub(crate) released: &'static [(&'static str, &'static str)],
    /// Why it runs only if it is named, if so.
    pub(crate) on_request: Option<&'static str>,
    /// Seconds until it is killed. Under emulation everything takes about ten times as long.
    pub(crate) limit_s: u64,
}

/// The variable by which a test knows that software RDMA devices are there and must be used.
pub(crate) const LAB_VARIABLE: &str = "KVTRANSFER_RDMA_LAB";

/// They fail on wrong bytes only, which the tests look at too.
const FIGURES: &str = "figures, from a release build; name it with --only";

/// All jobs, in the order in which they run.
pub(crate) const JOBS: [Job; 11] = [
    Job {
        name: "devices",
        about: "the devices as verbs shows them",
        source: Source::Line(
            "set -o pipefail; ibv_devinfo -v | grep -E 'hca_id|transport|max_mr_size|max_qp_wr|max_sge:|max_cqe|\
             state:|active_mtu|GID\\[' && rdma link show",
        ),
        binaries: &[],
        released: &[],
        on_request: None,
        limit_s: 30,
    },
    Job {
        name: "rping-siw",
        about: "iWARP connects siw1 to siw0 through the connection manager",
        source: Source::Line(
            "rdma-lab pair --ready cm:7174 --server 'rping -s -a 10.77.0.1 -C 3' \
             --client 'rping -c -v -a 10.77.0.1 -I 10.77.1.1 -C 3 -S 32'",
        ),
        binaries: &[],
        released: &[],
        on_request: None,
        limit_s: 60,
    },
    Job {
        name: "perftest-siw",
        about: "iWARP writes: bandwidth, then latency",
        source: Source::Line(
            "rdma-lab pair --ready cm:18515 --server 'ib_write_bw -R -d siw0 -s 65536 -n 200 -F' \
             --client 'ib_write_bw -R -d siw0 -s 65536 -n 200 -F 10.77.0.1' && \
             rdma-lab pair --ready cm:18515 --server 'ib_write_lat -R -d siw0 -s 64 -n 200 -F' \
             --client 'ib_write_lat -R -d siw0 -s 64 -n 200 -F 10.77.0.1'",
        ),
        binaries: &[],
        released: &[],
        on_request: None,
        limit_s: 90,
    },
    Job {
        name: "perftest-rxe",
        about: "RoCE writes from rxe1 to rxe0, connected out of band: bandwidth, then latency",
        source: Source::Line(
            "rdma-lab pair --ready tcp:18515 --server 'ib_write_bw -d rxe0 -x 1 -s 65536 -n 100 -F' \
             --client 'ib_write_bw -d rxe1 -x 1 -s 65536 -n 100 -F 10.77.2.1' && \
             rdma-lab pair --ready tcp:18515 --server 'ib_write_lat -d rxe0 -x 1 -s 64 -n 200 -F' \
             --client 'ib_write_lat -d rxe1 -x 1 -s 64 -n 200 -F 10.77.2.1'",
        ),
        binaries: &[],
        released: &[],
        on_request: None,
        limit_s: 90,
    },
    Job {
        name: "rping-rxe",
        about: "RoCE connects rxe1 to rxe0 through the connection manager",
        source: Source::Line(
            "rdma-lab pair --ready cm:7174 --server 'rping -s -a 10.77.2.1 -C 3' \
             --client 'rping -c -v -a 10.77.2.1 -I 10.77.2.2 -C 3 -S 32'",
        ),
        binaries: &[],
        released: &[],
        on_request: None,
        limit_s: 60,
    },
    Job {
        name: "kvtransfer-unit",
        about: "unit tests of the verbs transport that need a device",
        source: Source::UnitTests("transport::verbs"),
        binaries: &[],
        released: &[],
        on_request: None,
        limit_s: 120,
    },
    Job {
        name: "rdma-tests",
        about: "kvtransfer's integration tests over verbs",
        source: Source::TestTargets("rdma_"),
        binaries: &[],
        released: &[],
        on_request: None,
        limit_s: 400,
    },
    Job {
        name: "demo-verbs-rxe",
        about: "a prefill/decode cluster whose KV cache travels over RoCE, connected out of band",
        source: Source::Line(
            "demo --quick --path verbs --rdma-devices rxe0,rxe1 --rdma-connector compat --any-ports",
        ),
        binaries: &[("kvtransfer-examples", "demo")],
        released: &[],
        on_request: None,
        limit_s: 90,
    },
    Job {
        name: "demo-verbs-siw",
        about: "the same over iWARP, connected through the connection manager",
        source: Source::Line(
            "demo --quick --path verbs --rdma-devices siw0,siw1 --rdma-connector standard --any-ports",
        ),
        binaries: &[("kvtransfer-examples", "demo")],
        released: &[],
        on_request: None,
        limit_s: 90,
    },
    Job {
        name: "kvbench-verbs-rxe",
        about: "our rates and latencies beside perftest's over RoCE; fails on wrong bytes only",
        source: Source::Line(
            "set -o pipefail; kvbench --path verbs --rdma-devices rxe1,rxe0 --mib 4 --rounds 3 --samples 40 \
             | tee $LAB_OUT/kvbench-rxe.jsonl",
        ),
        binaries: &[],
        released: &[("kvtransfer-benches", "kvbench")],
        on_request: Some(FIGURES),
        limit_s: 180,
    },
    Job {
        name: "kvbench-verbs-siw",
        about: "the same over iWARP",
        source: Source::Line(
            "set -o pipefail; kvbench --path verbs --rdma-devices siw1,siw0 --mib 4 --rounds 3 --samples 40 \
             | tee $LAB_OUT/kvbench-siw.jsonl",
        ),
        binaries: &[],
        released: &[("kvtransfer-benches", "kvbench")],
        on_request: Some(FIGURES),
        limit_s: 180,
    },
];

/// How many tests of a target run at once. Most tests wait for timers and handshakes half of their time; those that take
/// devices away from others must be alone.
pub(crate) fn threads_of(target: &str) -> &'static str {
    match target {
        "rdma_conformance" => "--test-threads=3",
        _ => "--test-threads=1",
    }
}

/// The jobs that show that the lab itself works, without anything of kvtransfer.
pub(crate) const SELF_TEST: [&str; 4] = ["rping-siw", "perftest-siw", "perftest-rxe", "rping-rxe"];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::protocol::is_word;

    #[test]
    fn names_are_words_of_their_own() {
        let names: BTreeSet<_> = JOBS.iter().map(|job| job.name).collect();
        assert_eq!(names.len(), JOBS.len());
        assert!(names.iter().all(|name| is_word(name)));
        assert!(SELF_TEST.iter().all(|name| names.contains(name)));
    }
}
