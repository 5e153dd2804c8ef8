//! Findings about devices, alone and beside each other, and about GPUs.
#![forbid(unsafe_code)]

use std::net::IpAddr;

use super::{Finding, Level, Wanted};
use crate::doctor::facts::{Device, Facts};
use crate::doctor::gpus::{Distance, GpuPath, Verdict};
use crate::doctor::rails::{Mode, Rail};

/// MTU of an elastic network interface with jumbo frames.
const MTU_JUMBO: u32 = 8500;
/// MTU without them.
const MTU_PLAIN: u32 = 1400;
/// From this interface MTU on a RoCE port carries 4096-byte packets.
const MTU_ROCE_4096: u32 = 4200;

pub(super) fn each(facts: &Facts, rails: &[Rail], wanted: Wanted<'_>, found: &mut Vec<Finding>) {
    let is_wanted = |name: &String| wanted.is_none_or(|wanted| wanted.contains(name));
    let has_other = |name: &str| {
        rails
            .iter()
            .any(|rail| rail.is_usable() && rail.device != name && is_wanted(&rail.device))
    };
    for name in wanted.unwrap_or_default() {
        if !rails.iter().any(|rail| &rail.device == name) {
            found.push(unknown(rails, name));
        }
    }
    for (device, rail) in facts.devices.iter().zip(rails) {
        if !is_wanted(&rail.device) {
            continue;
        }
        // A port that nobody cabled is no failure of a host with other rails, unless it was asked for.
        let level = if wanted.is_none() && has_other(&rail.device) {
            Level::Warn
        } else {
            Level::Fail
        };
        for refusal in &rail.refused {
            found.push(Finding::not_ok(
                level,
                &rail.device,
                refusal.what.clone(),
                refusal.why.clone(),
                refusal.fix.clone(),
            ));
        }
        if rail.is_usable() {
            found.push(usable(rail));
        }
        verbs(device, level, found);
        mtu(device, rail, found);
        address(facts, rail, found);
        mode(facts, rail, found);
    }
}

fn unknown(rails: &[Rail], name: &str) -> Finding {
    let why = if rails.is_empty() {
        "there is no RDMA device".to_owned()
    } else {
        let list = |rail: &Rail| match rail.refused.first() {
            None => format!("{} ({}, usable)", rail.device, rail.mode.words()),
            Some(refusal) => {
                format!("{} ({}: {})", rail.device, rail.mode.words(), refusal.what)
            }
        };
        let all: Vec<_> = rails.iter().map(list).collect();
        format!("present: {}", all.join(", "))
    };
    let what = "no device of this name";
    let fix = "Use a name from the list, or leave --device out to use every usable device.";
    Finding::not_ok(Level::Fail, name, what, why, fix)
}

fn usable(rail: &Rail) -> Finding {
    let connects = if rail.mode.needs_cm() {
        "connects with rdma_cm"
    } else {
        "connects by exchanging queue pair numbers over the control connection"
    };
    let why = match &rail.gid {
        Some(gid) => format!(
            "{connects}; GID index {} ({}): {}",
            gid.index, gid.gid, rail.gid_reason
        ),
        None => match rail.address {
            Some(address) => format!("{connects}, address {address}"),
            None => connects.to_owned(),
        },
    };
    let what = format!("usable, {}", rail.mode.words());
    Finding::ok(&rail.device, what, why)
}

fn verbs(device: &Device, level: Level, found: &mut Vec<Finding>) {
    if let Some(problem) = device
        .verbs
        .as_ref()
        .and_then(|verbs| verbs.problem.as_deref())
    {
        let why = "the engine opens and probes the device in the same way when it starts";
        let fix = "Put right what the other findings say about this device and about memlock; if nothing else is \
                   wrong, send us this report with dmesg.";
        let what = format!("libibverbs cannot use it: {problem}");
        found.push(Finding::not_ok(level, &device.name, what, why, fix));
    }
}

/// The trap: verbs states 1024 for both 1400 and 1500, and 4096 for all jumbo frames; only the interface tells.
fn mtu(device: &Device, rail: &Rail, found: &mut Vec<Finding>) {
    let Some(netdev) = &rail.netdev else { return };
    let active = device.verbs.as_ref().and_then(|verbs| verbs.active_mtu);
    match (device.is_erdma(), rail.netdev_mtu) {
        (_, None) if !rail.mode.needs_cm() => {
            let what = format!("its interface {netdev} is not in this network namespace");
            let why =
                "so its MTU and addresses cannot be checked from here; connections do not need it";
            let fix = format!(
                "Nothing if the node is known to be right; otherwise run this on the node: MTU of {netdev} must be \
                 {MTU_JUMBO} (jumbo frames) or {MTU_PLAIN}, the same on every node."
            );
            found.push(Finding::not_ok(Level::Note, &rail.device, what, why, fix));
        }
        (true, Some(mtu)) if mtu != MTU_JUMBO && mtu != MTU_PLAIN => {
            let states = active.map_or_else(String::new, |active| {
                format!("; verbs states {active}, which does not tell 1400 from 1500")
            });
            let what = format!("MTU of {netdev} is {mtu}{states}");
            let why = "with jumbo frames the vendor asks for 8500, without for 1400; unequal MTUs of \
                       two peers are said to break data consistency";
            let fix = format!(
                "ip link set {netdev} mtu {MTU_JUMBO} if the instance has jumbo frames, otherwise {MTU_PLAIN}; the \
                 same on every node, and before traffic starts."
            );
            found.push(Finding::not_ok(Level::Warn, &rail.device, what, why, fix));
        }
        (false, Some(mtu)) if rail.mode == Mode::Roce && mtu < MTU_ROCE_4096 => {
            let what = format!("MTU of {netdev} is {mtu}");
            let why = "RoCE packets then carry at most 1024 or 2048 bytes instead of 4096";
            let fix =
                format!("If the switches allow it: ip link set {netdev} mtu 9000 (on every node).");
            found.push(Finding::not_ok(Level::Note, &rail.device, what, why, fix));
        }
        _ => {}
    }
}

fn address(facts: &Facts, rail: &Rail, found: &mut Vec<Finding>) {
    let Some(gid) = &rail.gid else { return };
    let netdev = gid.netdev.as_deref().and_then(|name| facts.netdev(name));
    let Some((netdev, addresses)) =
        netdev.and_then(|netdev| netdev.addresses.as_ref().map(|all| (netdev, all)))
    else {
        return;
    };
    let Some(own) = gid.ipv4() else { return };
    if !addresses.contains(&IpAddr::V4(own)) {
        let what = format!(
            "GID {} says {own}, but {} does not have that address",
            gid.index, netdev.name
        );
        let why =
            "peers would connect to an address at which this device may not be reached any more";
        let fix = format!(
            "Give {} its address again (ip address show dev {}), or reload the driver.",
            netdev.name, netdev.name
        );
        found.push(Finding::not_ok(Level::Warn, &rail.device, what, why, fix));
    }
}

fn mode(facts: &Facts, rail: &Rail, found: &mut Vec<Finding>) {
    if rail.mode != Mode::ErdmaStandard {
        return;
    }
    let in_tree = facts.compat_mode.is_none();
    let has_gpus = !facts.gpus.is_empty();
    let why =
        "GPU instances run compat mode by default, and the two modes cannot talk to each other";
    let what = if in_tree {
        "standard mode, driver of the kernel itself (no compat mode, no peer memory)"
    } else {
        "standard mode (compat_mode=N)"
    };
    let fix = if in_tree {
        "To reach GPU instances: install the vendor's driver, which has compat mode (ACK: preferDriver compat, on GPU \
         nodes ofed)."
    } else {
        "To reach GPU instances: modprobe -r erdma; modprobe erdma compat_mode=Y, on every node (ACK: preferDriver \
         compat, on GPU nodes ofed)."
    };
    let level = if has_gpus { Level::Warn } else { Level::Note };
    found.push(Finding::not_ok(level, &rail.device, what, why, fix));
}

/// What matters only when there are several devices.
pub(super) fn together(rails: &[Rail], found: &mut Vec<Finding>) {
    let erdma = |rail: &&Rail| {
        matches!(
            rail.mode,
            Mode::ErdmaCompat | Mode::ErdmaStandard | Mode::ErdmaRoce
        )
    };
    let mut sizes = rails
        .iter()
        .filter(erdma)
        .filter_map(|rail| Some((rail, rail.netdev_mtu?)));
    let Some((first, mtu)) = sizes.next() else {
        return;
    };
    if let Some((other, different)) = sizes.find(|(_, other)| *other != mtu) {
        let what = format!(
            "{} has MTU {mtu}, {} has {different}",
            first.device, other.device
        );
        let why =
            "transfers are spread over both, and peers expect one MTU of all devices of a cluster";
        let fix = format!(
            "Set both interfaces to {MTU_JUMBO} (jumbo frames) or both to {MTU_PLAIN} (ip link set NAME mtu ...)."
        );
        found.push(Finding::not_ok(Level::Warn, "mtu", what, why, fix));
    }
}

pub(super) fn gpus(facts: &Facts, rails: &[Rail], verdicts: &[Verdict], found: &mut Vec<Finding>) {
    if facts.gpus.is_empty() || rails.is_empty() {
        return;
    }
    if facts.nvidia.is_none() {
        let what = format!(
            "{} GPU(s), but the NVIDIA driver is not loaded",
            facts.gpus.len()
        );
        let why = "GPU memory can be neither registered nor staged";
        let fix = "Install the NVIDIA driver on the node, or ignore this on a node that serves from host memory.";
        found.push(Finding::not_ok(Level::Warn, "gpus", what, why, fix));
        return;
    }
    for rail in rails {
        let mine: Vec<_> = verdicts
            .iter()
            .filter(|verdict| verdict.device == rail.device)
            .collect();
        let staged: Vec<_> = mine
            .iter()
            .filter(|verdict| verdict.path == GpuPath::Staged)
            .collect();
        let Some(first) = staged.first() else {
            let near = mine
                .iter()
                .filter(|verdict| verdict.distance <= Distance::SameRoot)
                .count();
            let what = format!(
                "GPU-Direct expected for {} GPU(s), {near} of them near it on PCI",
                mine.len()
            );
            let why = mine.first().map_or("", |verdict| verdict.reason.as_str());
            found.push(Finding::ok(&rail.device, what, why));
            continue;
        };
        let what = format!(
            "no GPU-Direct for {} of {} GPU(s): their memory goes through host memory",
            staged.len(),
            mine.len()
        );
        let fix = if facts.has_module("nvidia_peermem") {
            "Nothing if these GPUs cannot do better; otherwise use the open NVIDIA kernel modules and a device that \
             registers dma-bufs."
        } else {
            "modprobe nvidia_peermem on the node. It needs an ib_core with peer memory (OFED; ACK: preferDriver ofed) \
             that was there when the NVIDIA driver was built."
        };
        found.push(Finding::not_ok(
            Level::Warn,
            &rail.device,
            what,
            first.reason.clone(),
            fix,
        ));
    }
}
