//! Limits of the process and the host: pinned memory, huge pages, ports, containers.

use super::tree::Tree;
use crate::doctor::facts::{Container, HugePages, Limit, Memlock, Ports};
use crate::doctor::findings::ERDMA_PORTS;

/// Bit of `CAP_IPC_LOCK` in a capability mask.
const CAP_IPC_LOCK: u32 = 14;

pub(super) fn memlock(tree: &Tree) -> Memlock {
    let text = tree.text("proc/self/limits").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"));
    let mut values = line.unwrap_or_default().split_whitespace().map(limit);
    let mask = tree
        .text("proc/self/status")
        .and_then(|text| {
            let line = text.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
            u64::from_str_radix(line.trim(), 16).ok()
        })
        .unwrap_or(0);
    Memlock {
        soft: values.next().unwrap_or_default(),
        hard: values.next().unwrap_or_default(),
        ipc_lock: mask >> CAP_IPC_LOCK & 1 == 1,
    }
}

fn limit(word: &str) -> Limit {
    match word {
        "unlimited" => Limit::Unlimited,
        number => number.parse().map_or(Limit::Unknown, Limit::Bytes),
    }
}

pub(super) fn hugepages(tree: &Tree) -> Vec<HugePages> {
    let folder = "sys/kernel/mm/hugepages";
    let read = |name: String| {
        let kib: u64 = name
            .strip_prefix("hugepages-")?
            .strip_suffix("kB")?
            .parse()
            .ok()?;
        let count = |file: &str| {
            let text = tree.text(&format!("{folder}/{name}/{file}"))?;
            text.parse().ok()
        };
        Some(HugePages {
            page_bytes: kib.checked_mul(1024)?,
            total: count("nr_hugepages")?,
            free: count("free_hugepages")?,
        })
    };
    tree.names(folder).into_iter().filter_map(read).collect()
}

pub(super) fn memory_bytes(tree: &Tree) -> u64 {
    let text = tree.text("proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

pub(super) fn container(tree: &Tree, has_service_host: bool) -> Container {
    let files = [
        (".dockerenv", "/.dockerenv exists"),
        ("run/.containerenv", "/run/.containerenv exists"),
        (
            "var/run/secrets/kubernetes.io",
            "a Kubernetes service account is mounted",
        ),
    ];
    let found = files.into_iter().find(|(file, _)| tree.has(file));
    let in_pod = has_service_host || tree.has("var/run/secrets/kubernetes.io");
    let hint = found.map(|(_, words)| words.to_owned());
    let hint =
        hint.or_else(|| has_service_host.then(|| "KUBERNETES_SERVICE_HOST is set".to_owned()));
    let netns_shared = match tree
        .text("sys/module/ib_core/parameters/netns_mode")
        .as_deref()
    {
        Some("Y" | "1") => Some(true),
        Some("N" | "0") => Some(false),
        _ => None,
    };
    Container {
        kubernetes: in_pod,
        hint,
        netns_shared,
    }
}

pub(super) fn ports(tree: &Tree) -> Ports {
    let folder = "proc/sys/net/ipv4";
    let ephemeral = tree
        .text(&format!("{folder}/ip_local_port_range"))
        .and_then(|text| {
            let mut ends = text.split_whitespace().map(str::parse);
            Some((ends.next()?.ok()?, ends.next()?.ok()?))
        });
    let reserved = tree
        .text(&format!("{folder}/ip_local_reserved_ports"))
        .unwrap_or_default()
        .split(',')
        .filter_map(range)
        .collect();
    let mut busy: Vec<_> = ["proc/net/tcp", "proc/net/tcp6"]
        .iter()
        .flat_map(|file| local_ports(&tree.text(file).unwrap_or_default()))
        .filter(|port| (ERDMA_PORTS.0..=ERDMA_PORTS.1).contains(port))
        .collect();
    busy.sort_unstable();
    busy.dedup();
    Ports {
        ephemeral,
        reserved,
        busy,
    }
}

fn range(text: &str) -> Option<(u16, u16)> {
    match text.split_once('-') {
        Some((first, last)) => Some((first.trim().parse().ok()?, last.trim().parse().ok()?)),
        None => {
            let port = text.trim().parse().ok()?;
            Some((port, port))
        }
    }
}

/// Local ports of the sockets in a table like `/proc/net/tcp`. Sockets of the kernel itself (the driver's own) and those
/// that only wait out their time have no inode and are left out.
fn local_ports(table: &str) -> Vec<u16> {
    let port = |line: &str| {
        let mut fields = line.split_whitespace();
        let local = fields.nth(1)?;
        fields.nth(7).filter(|inode| *inode != "0")?;
        u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()
    };
    table.lines().skip(1).filter_map(port).collect()
}
