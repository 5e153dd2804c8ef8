//! The doctor on hosts made of files: what it sees, what it says, and how its command ends.

use std::io::{BufRead as _, BufReader};
use std::net::IpAddr;
use std::process::{Command, Output, Stdio};

use kvtransfer::doctor::collect::{Host, collect};
use kvtransfer::doctor::facts::{Limit, Verbs};
use kvtransfer::doctor::findings::{Finding, Level};
use kvtransfer::doctor::gpus::{Distance, GpuPath};
use kvtransfer::doctor::rails::Mode;
use kvtransfer::doctor::report::Report;
use kvtransfer::gpu::verdict::GpuDirect;

#[path = "doctor/trees.rs"]
mod trees;

use trees::{Made, Tree};

fn report(tree: &Tree) -> Report {
    Report::of(collect(&Host::below(&tree.root)), None)
}

fn report_at(tree: &Tree, addresses: &[(&str, &str)]) -> Report {
    let own = |(name, address): &(&str, &str)| -> (String, IpAddr) {
        ((*name).to_owned(), address.parse().expect("an address"))
    };
    let addresses = addresses.iter().map(own).collect();
    let host = Host::below(&tree.root).with_addresses(addresses);
    Report::of(collect(&host), None)
}

/// The findings of a level, as one text.
fn said(report: &Report, level: Level) -> String {
    let words = |finding: &Finding| {
        let fix = finding.fix.as_deref().unwrap_or_default();
        format!(
            "{}: {} | {} | {fix}\n",
            finding.subject, finding.what, finding.why
        )
    };
    let of_level = report
        .findings
        .iter()
        .filter(|finding| finding.level == level);
    of_level.map(words).collect()
}

#[test]
fn an_erdma_gpu_node_has_two_rails_with_different_gid_indexes() {
    let tree = trees::erdma_compat(8500);
    let report = report_at(&tree, &[("eth1", "10.0.0.5"), ("eth2", "10.0.0.6")]);
    let seen: Vec<_> = report
        .rails
        .iter()
        .map(|rail| {
            let gid = rail.gid.as_ref().map(|gid| gid.index);
            (
                rail.device.as_str(),
                rail.mode,
                gid,
                rail.netdev_mtu,
                rail.is_usable(),
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("erdma_0", Mode::ErdmaCompat, Some(2), Some(8500), true),
            ("erdma_1", Mode::ErdmaCompat, Some(1), Some(8500), true),
        ],
        "{}",
        report.text()
    );
    assert!(report.rails[0].gid_reason.contains("one of eth1's"));
    assert_eq!(
        report.facts.devices[0].driver_version.as_deref(),
        Some("0.2.37")
    );
    assert_eq!(
        report.facts.devices[0].pci_path,
        ["pci0000:10", "0000:10:01.0", "0000:10:02.0"]
    );
    assert_eq!(said(&report, Level::Fail) + &said(&report, Level::Warn), "");
    assert!(
        report
            .text()
            .contains("2 of 2 RDMA device(s) usable: erdma_0, erdma_1")
    );
}

#[test]
fn a_gid_whose_address_the_interface_lost_is_a_warning() {
    let tree = trees::erdma_compat(8500);
    let report = report_at(&tree, &[("eth1", "10.0.0.77"), ("eth2", "10.0.0.6")]);
    let warned = said(&report, Level::Warn);
    assert!(
        warned.contains("GID 2 says 10.0.0.5, but eth1 does not have that address"),
        "{warned}"
    );
    assert!(!warned.contains("eth2"), "{warned}");
}

#[test]
fn a_standard_node_needs_rdma_cm_and_an_address_in_its_namespace() {
    let tree = trees::erdma_standard();
    let good = report_at(&tree, &[("eth1", "10.0.0.9")]);
    assert_eq!(good.rails[0].mode, Mode::ErdmaStandard);
    assert_eq!(
        good.rails[0].netdev.as_deref(),
        Some("eth1"),
        "found by the hardware address"
    );
    assert!(
        good.rails[0].is_usable() && !good.has_failed(),
        "{}",
        good.text()
    );
    assert!(said(&good, Level::Note).contains("standard mode (compat_mode=N)"));

    let no_address = report_at(&tree, &[("eth0", "10.0.0.1")]);
    assert!(said(&no_address, Level::Fail).contains("hostNetwork: true"));

    tree.remove("dev/infiniband/rdma_cm");
    let no_cm = report_at(&tree, &[("eth1", "10.0.0.9")]);
    assert!(said(&no_cm, Level::Fail).contains("modprobe rdma_ucm"));

    tree.remove("sys/module/erdma/parameters/compat_mode");
    let in_tree = report_at(&tree, &[("eth1", "10.0.0.9")]);
    assert!(said(&in_tree, Level::Note).contains("install the vendor's driver"));
}

#[test]
fn roce_takes_the_v2_entry_and_an_uncabled_port_fails_only_if_asked_for() {
    let tree = trees::connectx();
    let all = report(&tree);
    assert_eq!(all.rails[0].mode, Mode::Roce);
    assert_eq!(all.rails[0].gid.as_ref().map(|gid| gid.index), Some(3));
    assert!(!all.has_failed(), "{}", all.text());
    assert!(said(&all, Level::Warn).contains("mlx5_1: its port is DOWN"));
    assert!(said(&all, Level::Note).contains("MTU of ens1 is 1500"));

    let facts = collect(&Host::below(&tree.root));
    let wanted = ["mlx5_1".to_owned(), "mlx5_7".to_owned()];
    let asked = Report::of(facts, Some(&wanted));
    let failed = said(&asked, Level::Fail);
    assert!(failed.contains("mlx5_1: its port is DOWN"), "{failed}");
    assert!(
        failed.contains("mlx5_7: no device of this name | present: mlx5_0 (RoCE, usable)"),
        "{failed}"
    );
}

#[test]
fn without_a_v2_gid_with_an_ipv4_address_a_roce_device_is_refused() {
    let tree = trees::connectx();
    let port = "sys/class/infiniband/mlx5_0/ports/1";
    tree.file(
        &format!("{port}/gids/3"),
        "0000:0000:0000:0000:0000:0000:0000:0000\n",
    );
    let failed = said(&report(&tree), Level::Fail);
    assert!(failed.contains("mlx5_0: no usable GID"), "{failed}");
    assert!(
        failed.contains("none of its GIDs with an IPv4 address is of type \"RoCE v2\""),
        "{failed}"
    );
}

#[test]
fn software_devices_are_told_apart() {
    let siw = report_at(&trees::siw(), &[("dummy0", "10.1.0.1")]);
    assert_eq!(siw.rails[0].mode, Mode::Iwarp);
    assert_eq!(siw.facts.devices[0].driver, "siw");
    assert_eq!(siw.rails[0].address, Some("10.1.0.1".parse().unwrap()));
    assert!(siw.rails[0].is_usable(), "{}", siw.text());
    let rxe = report(&trees::rxe());
    assert_eq!(rxe.rails[0].mode, Mode::Roce);
    assert_eq!(rxe.facts.devices[0].driver, "rdma_rxe");
    assert_eq!(rxe.rails[0].gid.as_ref().map(|gid| gid.index), Some(1));
    assert!(!rxe.has_failed(), "{}", rxe.text());
}

#[test]
fn an_empty_host_says_what_is_missing() {
    let tree = Tree::empty();
    let failed = said(&report(&tree), Level::Fail);
    assert!(
        failed.contains("no RDMA: libibverbs.so.1 not found"),
        "{failed}"
    );
    assert!(failed.contains("no RDMA device"), "{failed}");
    let function = "sys/bus/pci/devices/0000:11:00.0";
    tree.file(&format!("{function}/vendor"), "0x1ded\n");
    tree.file(&format!("{function}/device"), "0x107f\n");
    let failed = said(&report(&tree), Level::Fail);
    assert!(
        failed.contains("without a driver, the first at 0000:11:00.0"),
        "{failed}"
    );
    assert!(failed.contains("ib_umem_get_peer"), "{failed}");
}

#[test]
fn a_pod_without_nodes_or_provider_is_told_what_to_request() {
    let tree = trees::erdma_compat(8500);
    tree.remove("dev/infiniband");
    let failed = said(&report(&tree), Level::Fail);
    assert!(
        failed.contains("erdma_1: it has no node in /dev/infiniband"),
        "{failed}"
    );
    assert!(failed.contains("aliyun/erdma: 1"), "{failed}");

    let tree = trees::erdma_compat(8500);
    tree.remove("etc/libibverbs.d/erdma.driver");
    let failed = said(&report(&tree), Level::Fail);
    assert!(
        failed.contains("no provider `erdma` (/etc/libibverbs.d has mlx5)"),
        "{failed}"
    );
}

#[test]
fn memlock_is_judged_with_the_capability_in_mind() {
    let tree = trees::erdma_compat(8500);
    tree.memlock("65536", "65536");
    let low = report(&tree);
    assert_eq!(low.facts.memlock.soft, Limit::Bytes(65_536));
    let failed = said(&low, Level::Fail);
    assert!(
        failed.contains("memlock is 64 KiB, hard limit 64 KiB"),
        "{failed}"
    );
    assert!(failed.contains("LimitMEMLOCK=infinity"), "{failed}");
    tree.memlock("16777215", "unlimited");
    assert!(said(&report(&tree), Level::Fail).contains("the hard limit allows it"));
    tree.memlock("16777216", "unlimited");
    assert!(said(&report(&tree), Level::Warn).contains("memlock is 16 MiB"));
    tree.memlock("65536", "65536")
        .capabilities("0000000000004000");
    let held = report(&tree);
    assert!(!held.has_failed() && said(&held, Level::Note).contains("CAP_IPC_LOCK"));
}

#[test]
fn the_interface_mtu_is_checked_because_verbs_does_not_show_it() {
    let here = trees::erdma_compat(1500);
    let mut report_here = report(&here);
    assert!(said(&report_here, Level::Warn).contains("MTU of eth1 is 1500"));
    let there = report(&trees::erdma_compat(8500));
    report_here.add_peer("b:1", there.facts, None, |_, _| Vec::new());
    let failed = said(&report_here, Level::Fail);
    assert!(
        failed.contains("MTU of erdma_0 is 1500, the peer's erdma_0 has 8500"),
        "{failed}"
    );

    let uneven = trees::erdma_compat(8500);
    uneven.netdev("eth2", 1400, "00:16:3e:00:00:01");
    assert!(said(&report(&uneven), Level::Warn).contains("erdma_0 has MTU 8500, erdma_1 has 1400"));
}

#[test]
fn the_path_to_a_peer_is_named_with_its_reasons() {
    let mut gpu_node = report(&trees::erdma_compat(8500));
    let cpu_node = report_at(&trees::erdma_standard(), &[("eth1", "10.0.0.9")]);
    let twin = report(&trees::erdma_compat(8500));

    let mut to_twin = gpu_node.clone();
    to_twin.add_peer("twin:1", twin.facts, None, |_, _| Vec::new());
    let pair = |name: &str| (name.to_owned(), name.to_owned());
    let path = &to_twin.peer.as_ref().unwrap().path;
    assert_eq!(path.path, "rdma");
    assert_eq!(path.pairs, [pair("erdma_0"), pair("erdma_1")]);
    assert!(!to_twin.has_failed());

    let mut one_rail = gpu_node.clone();
    let wanted = ["erdma_1".to_owned()];
    one_rail.add_peer("twin:1", to_twin.facts.clone(), Some(&wanted), |_, _| {
        Vec::new()
    });
    let pairs = &one_rail.peer.as_ref().unwrap().path.pairs;
    assert_eq!(*pairs, [("erdma_1".to_owned(), "erdma_0".to_owned())]);

    gpu_node.add_peer("cpu:1", cpu_node.facts, None, |_, _| Vec::new());
    assert_eq!(gpu_node.peer.as_ref().unwrap().path.path, "tcp");
    let failed = said(&gpu_node, Level::Fail);
    assert!(
        failed.contains("the peer has eRDMA standard only"),
        "{failed}"
    );
    assert!(failed.contains("modprobe erdma compat_mode=Y"), "{failed}");
}

#[test]
fn a_path_that_was_tried_takes_the_place_of_the_expected_one() {
    let tree = trees::erdma_compat(8500);
    tree.gpu(0, "NVIDIA L20").nvidia(true);
    let mut facts = collect(&Host::below(&tree.root));
    let expected = Report::of(facts.clone(), None);
    let first = &expected.gpus[0];
    assert!(!first.is_proven);
    facts.gpu_direct = vec![GpuDirect {
        device: first.device.clone(),
        gpu: first.gpu.to_uppercase(),
        path: GpuPath::Peermem,
        reason: "registered by its address".into(),
    }];
    let report = Report::of(facts, None);
    let proven = &report.gpus[0];
    assert_eq!((proven.path, proven.is_proven), (GpuPath::Peermem, true));
    assert_eq!(proven.reason, "registered by its address");
    assert!(report.gpus[1..].iter().all(|verdict| !verdict.is_proven));
    let text = report.text();
    let line = text.lines().find(|line| line.contains("peer memory"));
    assert!(line.is_some_and(|line| line.contains("yes")), "{text}");
    assert!(report.json().contains("registered by its address"));
}

#[test]
fn gpu_verdicts_name_the_best_path_that_is_left() {
    let tree = trees::erdma_compat(8500);
    tree.gpu(0, "NVIDIA L20").nvidia(true);
    let staged = report(&tree);
    assert_eq!(staged.gpus[0].path, GpuPath::Staged);
    assert_eq!(staged.gpus[0].distance, Distance::SameSwitch);
    assert_eq!(staged.gpus[1].distance, Distance::Far);
    assert!(
        staged.gpus[0].reason.contains("older than 5.12"),
        "{}",
        staged.gpus[0].reason
    );
    assert!(said(&staged, Level::Warn).contains("modprobe nvidia_peermem"));

    tree.module("nvidia_peermem");
    assert_eq!(report(&tree).gpus[0].path, GpuPath::Peermem);
    tree.gpu(0, "NVIDIA GeForce RTX 4090");
    let consumer = report(&tree);
    assert!(
        consumer.gpus[0].reason.contains("consumer GPUs"),
        "{}",
        consumer.gpus[0].reason
    );

    tree.file("proc/sys/kernel/osrelease", "6.8.0-45-generic\n");
    let mut facts = collect(&Host::below(&tree.root));
    let asked = |answer| {
        Some(Verbs {
            dmabuf: answer,
            ..Verbs::default()
        })
    };
    facts.devices[0].verbs = asked(Some(true));
    facts.devices[1].verbs = asked(Some(false));
    let probed = Report::of(facts, None);
    assert_eq!(probed.gpus[0].path, GpuPath::DmaBuf);
    assert!(
        probed.gpus[1].reason.contains("erdma_1 registers none"),
        "{}",
        probed.gpus[1].reason
    );
    tree.nvidia(false);
    let closed = report(&tree);
    assert!(
        closed.gpus[0].reason.contains("proprietary"),
        "{}",
        closed.gpus[0].reason
    );
}

#[test]
fn ports_of_the_driver_are_watched() {
    let tree = trees::erdma_compat(8500);
    tree.file("proc/sys/net/ipv4/ip_local_port_range", "1024 65535\n");
    // Port 30610 (0x7792) listens; 30611 belongs to the kernel (inode 0), as the driver's own do.
    tree.file(
        "proc/net/tcp",
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
         0: 00000000:7792 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1\n\
         1: 00000000:7793 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 0 1\n\
         2: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4712 1\n",
    );
    let clash = report(&tree);
    assert_eq!(clash.facts.ports.busy, [30_610]);
    let warned = said(&clash, Level::Warn);
    assert!(warned.contains("TCP port 30610 is in use"), "{warned}");
    assert!(
        warned.contains("ip_local_reserved_ports=30608-30623"),
        "{warned}"
    );
    tree.file(
        "proc/sys/net/ipv4/ip_local_reserved_ports",
        "80,30000-32767\n",
    );
    assert!(!said(&report(&tree), Level::Warn).contains("ip_local_reserved_ports"));
    tree.file("var/run/secrets/kubernetes.io/serviceaccount/token", "x");
    assert!(said(&report(&tree), Level::Note).contains("NodePort range"));
}

#[test]
fn every_finding_that_is_not_ok_has_a_fix() {
    let broken = trees::erdma_compat(1500);
    broken
        .remove("dev/infiniband")
        .remove("usr")
        .memlock("65536", "65536");
    broken.gpu(0, "NVIDIA L20");
    broken.file("sys/module/ib_core/parameters/netns_mode", "N\n");
    let all = [
        Tree::empty(),
        broken,
        trees::erdma_compat(8500),
        trees::erdma_standard(),
        trees::connectx(),
        trees::siw(),
        trees::rxe(),
    ];
    let mut counted = 0;
    for tree in &all {
        for finding in report(tree).findings {
            let is_fixable = finding.fix.as_ref().is_some_and(|fix| fix.len() > 10);
            assert_eq!(is_fixable, finding.level != Level::Ok, "{finding:?}");
            counted += 1;
        }
    }
    assert!(counted > 30, "only {counted} findings");
}

#[test]
fn reports_survive_json_and_other_versions() {
    let tree = trees::erdma_compat(8500);
    tree.gpu(1, "NVIDIA L20").nvidia(true);
    let report = report(&tree);
    let again: Report = serde_json::from_str(&report.json()).unwrap();
    assert_eq!(again, report);
    let foreign = r#"{"program":"9.9.9","devices":[{"name":"x","novelty":1}],"other":[]}"#;
    let facts: kvtransfer::doctor::facts::Facts = serde_json::from_str(foreign).unwrap();
    let strange = Report::of(facts, None);
    assert_eq!(strange.rails[0].mode, Mode::Unknown);
    assert!(said(&strange, Level::Fail).contains("x: the device is of no known kind"));
}

#[test]
fn long_lists_and_files_are_cut_and_said() {
    let tree = trees::rxe();
    for index in 0..4100 {
        tree.file(&format!("sys/class/net/veth{index}/mtu"), "1500\n");
    }
    tree.file("proc/net/tcp", &"x".repeat((8 << 20) + 1));
    let cut = report(&tree);
    assert!(cut.facts.netdevs.len() <= 4096);
    let warned = said(&cut, Level::Warn);
    assert!(
        warned.contains("sys/class/net has more than 4096 entries"),
        "{warned}"
    );
    assert!(warned.contains("proc/net/tcp is longer than"), "{warned}");
}

#[test]
fn nothing_seen_on_a_host_commands_a_terminal() {
    let tree = trees::rxe();
    tree.file("proc/sys/kernel/hostname", "a\u{1b}[2Jb\u{7}c");
    let text = report(&tree).text();
    assert!(text.contains("a?[2Jb?c"), "{text}");
    assert!(
        text.chars()
            .all(|symbol| symbol == '\n' || !symbol.is_control())
    );
}

#[test]
fn odd_files_do_not_panic() {
    let tree = trees::rxe();
    tree.device(
        3,
        &Made {
            name: "odd",
            node_type: "garbage",
            driver: "",
            vendor: "",
            netdev: "dummy9",
            mtu: 0,
            state: "",
            gids: &[(0, "not a gid", "RoCE v2"), (3, "::1", "")],
        },
    );
    tree.file("sys/class/infiniband/odd/fw_ver", &"9".repeat(100_000));
    let odd = report(&tree);
    assert_eq!(odd.rails[0].mode, Mode::Unknown);
    assert!(!odd.rails[0].is_usable() && odd.rails[1].is_usable());
}

fn doctor(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kvtransfer"))
        .arg("doctor")
        .args(arguments)
        .output()
        .expect("the binary of this crate")
}

#[test]
fn the_command_ends_with_0_1_or_2() {
    let good = trees::erdma_compat(8500);
    let root = good.root.to_str().unwrap();
    let fine = doctor(&["--root", root]);
    let text = String::from_utf8_lossy(&fine.stdout).into_owned();
    assert_eq!(fine.status.code(), Some(0), "{text}");
    assert!(text.contains("erdma_1  eRDMA compat"), "{text}");
    let json = doctor(&["--root", root, "--json"]);
    let report: Report = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(report.rails.len(), 2);
    assert_eq!(
        doctor(&["--root", root, "--device", "erdma_7"])
            .status
            .code(),
        Some(1)
    );
    let with = |filter: &str| doctor(&["--root", root, "--device", filter]).status.code();
    assert_eq!(with("erdma_1, erdma_0"), Some(0));
    assert_eq!(with(r#"{"0": "erdma_0", "1": "erdma_1"}"#), Some(0));
    assert_eq!(with(r#"{"0": "erdma_0", "1": "erdma_9"}"#), Some(1));
    assert_eq!(with(r#"{"gpu": "erdma_0"}"#), Some(2));
    assert_eq!(with("nowhere.json"), Some(2));
    good.file("map.json", r#"{"0": "erdma_0"}"#);
    assert_eq!(with(&format!("{root}/map.json")), Some(0));
    let bad = Tree::empty();
    assert_eq!(
        doctor(&["--root", bad.root.to_str().unwrap()])
            .status
            .code(),
        Some(1)
    );
    assert_eq!(
        doctor(&["--peer", "a:1", "--serve", "0.0.0.0:1"])
            .status
            .code(),
        Some(2)
    );
    assert_eq!(doctor(&["--nonsense"]).status.code(), Some(2));
}

#[test]
fn two_doctors_compare_their_hosts() {
    let (here, there) = (trees::rxe(), trees::rxe());
    there.file("proc/sys/kernel/hostname", "node-b\n");
    let mut served = Command::new(env!("CARGO_BIN_EXE_kvtransfer"))
        .args(["doctor", "--serve", "127.0.0.1:0", "--root"])
        .arg(&there.root)
        .env("KVTRANSFER_LOG", "info")
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary of this crate");
    let mut line = String::new();
    let mut log = BufReader::new(served.stderr.take().unwrap());
    log.read_line(&mut line).unwrap();
    let addr = line
        .trim()
        .rsplit_once("local_addr=")
        .expect("the address")
        .1
        .to_owned();
    let root = here.root.to_str().unwrap();
    let asked = doctor(&["--json", "--root", root, "--peer", &addr]);
    served.kill().unwrap();
    served.wait().unwrap();
    let report: Report = serde_json::from_slice(&asked.stdout).unwrap();
    let peer = report.peer.expect("the peer was asked");
    assert_eq!(
        (peer.path.path.as_str(), peer.facts.hostname.as_str()),
        ("rdma", "node-b")
    );
    let gone = doctor(&["--root", root, "--peer", &addr]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&gone.stdout).contains("doctor --serve"));
}
