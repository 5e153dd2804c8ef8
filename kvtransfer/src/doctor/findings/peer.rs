//! Findings about two hosts: what only shows when both are looked at.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use super::{Finding, Level};
use crate::doctor::facts::Facts;
use crate::doctor::rails::{Mode, Rail, Wire};

/// The path that two hosts would use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerPath {
    /// `rdma` or `tcp`.
    pub path: String,
    /// Pairs of devices, ours first, that can talk.
    pub pairs: Vec<(String, String)>,
    /// Why not better: one sentence per device of ours that reaches no device of the peer.
    pub refused: Vec<String>,
}

/// One of two hosts that are compared.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// What was seen there.
    pub facts: &'a Facts,
    /// Its devices, judged.
    pub rails: &'a [Rail],
}

/// Names the path between two hosts and finds what does not fit.
pub fn compare(local: Side<'_>, remote: Side<'_>) -> (PeerPath, Vec<Finding>) {
    let mut found = Vec::new();
    let path = pair(local, remote);
    if path.pairs.is_empty() {
        let why = if path.refused.is_empty() {
            "this host has no RDMA device".to_owned()
        } else {
            path.refused.join("; ")
        };
        let fix = fix_of(local, remote);
        let what = "no RDMA path to the peer: TCP would be used";
        found.push(Finding::not_ok(Level::Fail, "peer", what, why, fix));
    } else {
        let list: Vec<_> = path
            .pairs
            .iter()
            .map(|(ours, theirs)| format!("{ours} to {theirs}"))
            .collect();
        let what = format!("RDMA path to the peer: {}", list.join(", "));
        found.push(Finding::ok("peer", what, path.refused.join("; ")));
    }
    mtus(local, remote, &path, &mut found);
    versions(local.facts, remote.facts, &mut found);
    (path, found)
}

/// Pairs device after device: the n-th usable one here with the n-th usable one there that speaks its protocol.
fn pair(local: Side<'_>, remote: Side<'_>) -> PeerPath {
    let mut pairs = Vec::new();
    let mut refused = Vec::new();
    let mut taken = Vec::new();
    for ours in local.rails {
        if let Some(refusal) = ours.refused.first() {
            refused.push(format!("{}: {}", ours.device, refusal.what));
            continue;
        }
        let same = |theirs: &&Rail| theirs.is_usable() && theirs.mode.wire() == ours.mode.wire();
        let free = |theirs: &&Rail| !taken.contains(&theirs.device);
        let theirs = remote.rails.iter().filter(same).find(free);
        let theirs = theirs.or_else(|| remote.rails.iter().find(same));
        match theirs {
            Some(theirs) => {
                taken.push(theirs.device.clone());
                pairs.push((ours.device.clone(), theirs.device.clone()));
            }
            None => refused.push(format!(
                "{} ({}): {}",
                ours.device,
                ours.mode.words(),
                partner(ours, remote.rails)
            )),
        }
    }
    let path = if pairs.is_empty() { "tcp" } else { "rdma" };
    PeerPath {
        path: path.to_owned(),
        pairs,
        refused,
    }
}

/// Why no device of the peer answers ours.
fn partner(ours: &Rail, theirs: &[Rail]) -> String {
    let kin = theirs
        .iter()
        .find(|rail| rail.mode.wire() == ours.mode.wire());
    if let Some(kin) = kin {
        let what = kin
            .refused
            .first()
            .map_or("unusable", |refusal| refusal.what.as_str());
        return format!("the peer's {} is unusable: {what}", kin.device);
    }
    if theirs.is_empty() {
        return "the peer has no RDMA device".to_owned();
    }
    let mut modes: Vec<_> = theirs.iter().map(|rail| rail.mode.words()).collect();
    modes.dedup();
    format!(
        "the peer has {} only, which speaks another protocol",
        modes.join(", ")
    )
}

fn fix_of(local: Side<'_>, remote: Side<'_>) -> String {
    let wires = |side: Side<'_>| {
        let wires = side.rails.iter().map(|rail| rail.mode.wire());
        wires.collect::<Vec<_>>()
    };
    let (ours, theirs) = (wires(local), wires(remote));
    let mixed = |left: &[Wire], right: &[Wire]| {
        left.contains(&Wire::ErdmaCompat) && right.contains(&Wire::ErdmaStandard)
    };
    if mixed(&ours, &theirs) || mixed(&theirs, &ours) {
        return "Bring the standard side to compat mode: modprobe -r erdma; modprobe erdma compat_mode=Y (ACK: \
                preferDriver compat, on GPU nodes ofed)."
            .to_owned();
    }
    "Run kvtransfer doctor on both nodes and put right what it says about their devices.".to_owned()
}

fn mtus(local: Side<'_>, remote: Side<'_>, path: &PeerPath, found: &mut Vec<Finding>) {
    let mtu = |side: Side<'_>, name: &str| {
        let rail = side.rails.iter().find(|rail| rail.device == name);
        rail.and_then(|rail| rail.netdev_mtu)
    };
    for (ours, theirs) in &path.pairs {
        if let Some((here, there)) = mtu(local, ours).zip(mtu(remote, theirs))
            && here != there
        {
            let rail = local.rails.iter().find(|rail| &rail.device == ours);
            let is_erdma = rail
                .is_some_and(|rail| matches!(rail.mode, Mode::ErdmaCompat | Mode::ErdmaStandard));
            let level = if is_erdma { Level::Fail } else { Level::Warn };
            let what = format!("MTU of {ours} is {here}, the peer's {theirs} has {there}");
            let why = "verbs does not show it (1024 stands for both 1400 and 1500), and unequal MTUs are said to break data \
                       consistency";
            let fix = "The same MTU on both: 8500 with jumbo frames, otherwise 1400 (ip link set NAME mtu ...).";
            found.push(Finding::not_ok(level, "mtu", what, why, fix));
        }
    }
}

fn versions(local: &Facts, remote: &Facts, found: &mut Vec<Finding>) {
    if local.program != remote.program {
        let what = format!(
            "kvtransfer {} here, {} there",
            local.program, remote.program
        );
        let why = "the reports of two versions may not say the same";
        let fix = "Run one version on both nodes.";
        found.push(Finding::not_ok(Level::Note, "peer", what, why, fix));
    }
}
