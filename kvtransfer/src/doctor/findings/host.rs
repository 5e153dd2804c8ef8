//! Findings about the host as a whole.
#![forbid(unsafe_code)]

use super::{Finding, Level, bytes};
use crate::doctor::facts::{Device, Facts, HugePages, Limit};
use crate::doctor::rails::{Mode, Rail};
use crate::transport::verbs::select::MEMLOCK_MIN;

/// Ports that the eRDMA driver binds in every network namespace in compat mode (0x7790 ..= 0x779f).
pub const ERDMA_PORTS: (u16, u16) = (30_608, 30_623);
/// Kubernetes' default range of NodePorts.
const NODE_PORTS: (u16, u16) = (30_000, 32_767);
/// With 4 KiB pages a device registers about so much; larger hosts need huge pages for their pools.
const REGISTRABLE_4K: u64 = 96 << 30;

pub(super) fn libraries(facts: &Facts, rails: &[Rail], found: &mut Vec<Finding>) {
    let subject = "libraries";
    let package = "Install libibverbs1, ibverbs-providers and librdmacm1 in the image; for eRDMA from the vendor's \
                   eRDMA repository. Do not copy single libraries into the image: a bundled libibverbs finds no \
                   providers.";
    if let Some(problem) = facts.library_problem("libibverbs.so.1") {
        let why = format!("every verbs device is reached through it (the loader says: {problem})");
        found.push(Finding::not_ok(
            Level::Fail,
            subject,
            "no RDMA: libibverbs.so.1 not found",
            why,
            package,
        ));
    } else if facts
        .libraries
        .iter()
        .any(|library| library.soname == "libibverbs.so.1")
    {
        found.push(Finding::ok(subject, "libibverbs.so.1 is there", ""));
    }
    if let Some(problem) = facts.library_problem("librdmacm.so.1") {
        let needed = rails.iter().any(|rail| rail.mode.needs_cm());
        let level = if needed { Level::Fail } else { Level::Note };
        let why = format!(
            "eRDMA in standard mode and iWARP connect through it, other modes do not (the loader says: {problem})"
        );
        let what = "librdmacm.so.1 not found";
        found.push(Finding::not_ok(level, subject, what, why, package));
    }
}

pub(super) fn presence(facts: &Facts, found: &mut Vec<Finding>) {
    let unbound: Vec<_> = facts
        .erdma_functions
        .iter()
        .filter(|function| function.driver.is_none())
        .collect();
    if let Some(first) = unbound.first() {
        let what = format!(
            "{} eRDMA function(s) without a driver, the first at {}",
            unbound.len(),
            first.address
        );
        let why = "the instance has an elastic RDMA interface, but no module drives it";
        let fix = "modprobe erdma compat_mode=Y on a GPU node. If dmesg says `erdma: Unknown symbol \
                   ib_umem_get_peer`, the module was built for an OFED ib_core that is not running: reinstall the \
                   vendor's driver for the running stack.";
        found.push(Finding::not_ok(Level::Fail, "erdma", what, why, fix));
    }
    if !facts.devices.is_empty() {
        return;
    }
    let why = "kvtransfer would move everything over TCP";
    let fix = if !facts.has_module("ib_core") {
        "Load the driver of the NIC on the node (eRDMA: install the vendor's driver, modprobe erdma compat_mode=Y). An \
         instance needs an elastic RDMA interface (ERI) attached for that."
    } else if facts.container.netns_shared == Some(false) {
        "RDMA devices belong to single network namespaces here: move one into this one (rdma dev set NAME netns ...), \
         or rdma system set netns shared."
    } else {
        "The RDMA stack is loaded but drives no device: attach an ERI to the instance, and check dmesg for the driver."
    };
    found.push(Finding::not_ok(
        Level::Fail,
        "devices",
        "no RDMA device",
        why,
        fix,
    ));
}

pub(super) fn nodes(facts: &Facts, rails: &[Rail], found: &mut Vec<Finding>) {
    if facts.devices.is_empty() {
        return;
    }
    if !facts.has_module("ib_uverbs") && facts.nodes.is_empty() {
        found.push(Finding::not_ok(
            Level::Fail,
            "modules",
            "ib_uverbs is not loaded",
            "it makes the nodes through which user space reaches a device",
            "modprobe ib_uverbs on the node.",
        ));
    }
    if !rails.iter().any(|rail| rail.mode.needs_cm()) {
        return;
    }
    let node = facts.nodes.iter().find(|node| node.name == "rdma_cm");
    let what = match node {
        None => "/dev/infiniband/rdma_cm is missing".to_owned(),
        Some(node) => match &node.problem {
            Some(problem) => format!("/dev/infiniband/rdma_cm: {problem}"),
            None => return,
        },
    };
    let why = "eRDMA in standard mode and iWARP connect through it";
    let fix = "On the node: modprobe rdma_ucm. In a container the device plugin hands it in if the node has it \
               (otherwise --device /dev/infiniband/rdma_cm).";
    found.push(Finding::not_ok(Level::Fail, "modules", what, why, fix));
}

pub(super) fn memlock(facts: &Facts, found: &mut Vec<Finding>) {
    let subject = "memlock";
    let why = "queues, completion queues and every registered region are pinned memory; 64 KiB is not enough to create \
               a queue pair (ENOMEM)";
    let fix = "In Kubernetes: LimitMEMLOCK=infinity in containerd's systemd unit on the node (systemctl edit \
               containerd), then restart containerd and the pod; and capability IPC_LOCK. In Docker: --ulimit \
               memlock=-1. On a host: ulimit -l unlimited (limits.conf).";
    let (soft, hard) = (facts.memlock.soft, facts.memlock.hard);
    let limited = match soft {
        Limit::Unknown => return,
        Limit::Unlimited => {
            found.push(Finding::ok(subject, "memlock is unlimited", ""));
            return;
        }
        Limit::Bytes(limit) => limit,
    };
    let what = format!("memlock is {}, hard limit {}", bytes(limited), words(hard));
    if facts.memlock.ipc_lock {
        let why = "the process has CAP_IPC_LOCK, with which the kernel does not apply the limit; a process that drops \
                   the capability runs into it";
        found.push(Finding::not_ok(Level::Note, subject, what, why, fix));
        return;
    }
    let level = if limited < MEMLOCK_MIN {
        Level::Fail
    } else {
        Level::Warn
    };
    if hard == Limit::Unlimited {
        let fix = "ulimit -l unlimited before the engine starts: the hard limit allows it.";
        found.push(Finding::not_ok(level, subject, what, why, fix));
    } else {
        found.push(Finding::not_ok(level, subject, what, why, fix));
    }
}

fn words(limit: Limit) -> String {
    match limit {
        Limit::Unknown => "unknown".to_owned(),
        Limit::Unlimited => "unlimited".to_owned(),
        Limit::Bytes(count) => bytes(count),
    }
}

pub(super) fn hugepages(facts: &Facts, found: &mut Vec<Finding>) {
    if facts.devices.is_empty() {
        return;
    }
    let subject = "hugepages";
    let pools: Vec<_> = facts
        .hugepages
        .iter()
        .filter(|pool| pool.total > 0)
        .collect();
    if pools.is_empty() {
        if !facts.devices.iter().any(Device::is_erdma) {
            return;
        }
        let level = if facts.memory_bytes > REGISTRABLE_4K {
            Level::Warn
        } else {
            Level::Note
        };
        let why = "with 4 KiB pages about 96 to 128 GiB can be registered per eRDMA device, then registration fails; \
                   larger host pools need huge pages, and register faster with them";
        let fix = "For host pools above that: vm.nr_hugepages on the node (2 MiB pages suffice) and hugepages-2Mi in \
                   the pod. GPU memory needs none.";
        found.push(Finding::not_ok(level, subject, "no huge pages", why, fix));
        return;
    }
    let list = |pool: &&HugePages| {
        let size = bytes(pool.page_bytes);
        format!("{} of {} pages of {size} free", pool.free, pool.total)
    };
    let what: Vec<_> = pools.iter().map(list).collect();
    found.push(Finding::ok(subject, what.join(", "), ""));
}

pub(super) fn namespaces(facts: &Facts, found: &mut Vec<Finding>) {
    if facts.container.netns_shared == Some(false) {
        let what = "RDMA devices are exclusive to network namespaces";
        let why = "a pod sees only devices that were moved into its network namespace";
        let fix = "If pods miss their devices: rdma system set netns shared on the node (netns_mode=1 of ib_core), or \
                   hostNetwork: true.";
        found.push(Finding::not_ok(Level::Note, "netns", what, why, fix));
    }
}

fn overlaps(left: (u16, u16), right: (u16, u16)) -> bool {
    left.0 <= right.1 && right.0 <= left.1
}

pub(super) fn ports(facts: &Facts, rails: &[Rail], found: &mut Vec<Finding>) {
    let subject = "ports";
    if !rails.iter().any(|rail| rail.mode == Mode::ErdmaCompat) {
        return;
    }
    let (first, last) = ERDMA_PORTS;
    let why = "the eRDMA driver takes TCP ports 30608 to 30623 in every network namespace for its own connections";
    if let Some(port) = facts.ports.busy.first() {
        let what = format!("TCP port {port} is in use by another socket");
        let fix = format!(
            "Move that service off {first} to {last} (ss -tnap shows it), then reload the driver."
        );
        found.push(Finding::not_ok(Level::Warn, subject, what, why, fix));
    }
    let reserved = |range: &(u16, u16)| range.0 <= first && last <= range.1;
    let is_reserved = facts.ports.reserved.iter().any(reserved);
    if let Some(range) = facts.ports.ephemeral
        && overlaps(range, ERDMA_PORTS)
        && !is_reserved
    {
        let what = format!(
            "outgoing connections may use the driver's ports (range {} to {})",
            range.0, range.1
        );
        let fix = format!("sysctl -w net.ipv4.ip_local_reserved_ports={first}-{last}");
        found.push(Finding::not_ok(Level::Warn, subject, what, why, fix));
    }
    if facts.container.kubernetes {
        let what = format!(
            "the driver's ports lie in Kubernetes' NodePort range ({} to {})",
            NODE_PORTS.0, NODE_PORTS.1
        );
        let why =
            "a NodePort service on one of them is not reachable, or takes the driver's packets";
        let fix = format!(
            "Give no service a nodePort of {first} to {last} (kubectl get services -A | grep -E ':30(60[89]|61[0-9]|62[0-3])')."
        );
        found.push(Finding::not_ok(Level::Note, subject, what, why, fix));
    }
}

pub(super) fn cut(facts: &Facts, found: &mut Vec<Finding>) {
    for what in &facts.cut {
        let why = "what lies behind the bound was not judged";
        let fix = "Send us the report if something you need is missing from it.";
        found.push(Finding::not_ok(
            Level::Warn,
            "report",
            what.clone(),
            why,
            fix,
        ));
    }
}
