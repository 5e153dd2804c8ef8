//! Judges single devices: which mode it is in, which GID would be used, and whether kvtransfer can use it at all.
#![forbid(unsafe_code)]

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

use super::facts::{Device, Facts, Gid, Port};
use crate::transport::verbs::device::GidEntry;
use crate::transport::verbs::select;

/// What a device looks like to verbs, which decides how connections are made and who can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Mode {
    /// eRDMA that looks like RoCE (`compat_mode=Y`): what GPU instances run.
    ErdmaCompat,
    /// eRDMA that looks like iWARP (`compat_mode=N`, or the in-tree driver): what CPU instances run.
    ErdmaStandard,
    /// Newer eRDMA hardware whose own protocol is RoCE v2, without the compat parameter.
    ErdmaRoce,
    /// RoCE of another vendor, or the software one (rxe).
    Roce,
    /// InfiniBand.
    InfiniBand,
    /// iWARP of another vendor, or the software one (siw).
    Iwarp,
    /// None of these.
    Unknown,
}

impl Mode {
    /// The mode of a device, given what the erdma module says about itself.
    pub fn of(device: &Device, compat_mode: Option<bool>) -> Self {
        let layer = device
            .ports
            .first()
            .map_or("", |port| port.link_layer.as_str());
        match (device.is_erdma(), device.node_type.as_str(), layer) {
            (true, "RNIC", _) => Self::ErdmaStandard,
            (true, "CA", _) if compat_mode == Some(true) => Self::ErdmaCompat,
            (true, "CA", _) => Self::ErdmaRoce,
            (false, "RNIC", _) => Self::Iwarp,
            (false, "CA", "InfiniBand") => Self::InfiniBand,
            (false, "CA", "Ethernet") => Self::Roce,
            _ => Self::Unknown,
        }
    }

    /// The mode in words.
    pub fn words(self) -> &'static str {
        match self {
            Self::ErdmaCompat => "eRDMA compat",
            Self::ErdmaStandard => "eRDMA standard",
            Self::ErdmaRoce => "eRDMA RoCE",
            Self::Roce => "RoCE",
            Self::InfiniBand => "InfiniBand",
            Self::Iwarp => "iWARP",
            Self::Unknown => "unknown",
        }
    }

    /// Whether connections are made with rdma_cm, in the network namespace of the process; otherwise kvtransfer
    /// exchanges queue pair numbers over its own control connection.
    pub fn needs_cm(self) -> bool {
        matches!(self, Self::ErdmaStandard | Self::Iwarp)
    }

    /// What speaks the same protocol on the wire. eRDMA's is Alibaba's own, and its two modes do not mix.
    pub fn wire(self) -> Wire {
        match self {
            Self::ErdmaCompat => Wire::ErdmaCompat,
            Self::ErdmaStandard => Wire::ErdmaStandard,
            Self::ErdmaRoce | Self::Roce => Wire::RoceV2,
            Self::InfiniBand => Wire::InfiniBand,
            Self::Iwarp => Wire::Iwarp,
            Self::Unknown => Wire::Unknown,
        }
    }
}

/// A protocol on the wire; only equal ones can talk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Wire {
    /// eRDMA, both ends in compat mode.
    ErdmaCompat,
    /// eRDMA, both ends in standard mode.
    ErdmaStandard,
    /// RoCE v2 over UDP.
    RoceV2,
    /// InfiniBand.
    InfiniBand,
    /// iWARP over TCP.
    Iwarp,
    /// Not known.
    Unknown,
}

/// What kvtransfer would do with one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rail {
    /// Name of the device.
    pub device: String,
    /// Its mode.
    pub mode: Mode,
    /// Port that would be used: the first active one, otherwise the first.
    pub port: u8,
    /// GID that would be used, where connections need one.
    pub gid: Option<Gid>,
    /// Why that one, or why none.
    pub gid_reason: String,
    /// Address that peers would connect to.
    pub address: Option<IpAddr>,
    /// Interface that carries the traffic.
    pub netdev: Option<String>,
    /// MTU of that interface in bytes, if it is in this network namespace.
    pub netdev_mtu: Option<u32>,
    /// Why the device cannot be used, each reason with its fix; empty: it can.
    pub refused: Vec<Refusal>,
}

impl Rail {
    /// Whether kvtransfer can use the device.
    pub fn is_usable(&self) -> bool {
        self.refused.is_empty()
    }
}

/// One reason against a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// What is wrong.
    pub what: String,
    /// Why that matters.
    pub why: String,
    /// What to do.
    pub fix: String,
}

/// Judges every device of a host.
pub fn rails(facts: &Facts) -> Vec<Rail> {
    let judge = |device| rail(facts, device);
    facts.devices.iter().map(judge).collect()
}

fn rail(facts: &Facts, device: &Device) -> Rail {
    let mode = Mode::of(device, facts.compat_mode);
    let active = device.ports.iter().find(|port| port.state == "ACTIVE");
    let port = active.or(device.ports.first());
    let (gid, gid_reason) = match port {
        Some(port) if !mode.needs_cm() => choose_gid(facts, port),
        Some(_) => (None, "rdma_cm connects by address, not by GID".to_owned()),
        None => (None, "the device has no port".to_owned()),
    };
    let netdev = gid.as_ref().and_then(|gid| gid.netdev.clone());
    let netdev = netdev.or_else(|| device.netdev.clone());
    let seen = netdev.as_deref().and_then(|name| facts.netdev(name));
    let own = seen
        .and_then(|netdev| netdev.addresses.as_deref())
        .unwrap_or_default();
    let address = match &gid {
        Some(gid) => gid.ipv4().map(IpAddr::V4),
        None => own.iter().copied().find(IpAddr::is_ipv4),
    };
    let mut rail = Rail {
        device: device.name.clone(),
        mode,
        port: port.map_or(0, |port| port.number),
        gid,
        gid_reason,
        address,
        netdev_mtu: seen.map(|netdev| netdev.mtu),
        netdev,
        refused: Vec::new(),
    };
    refuse_port(&mut rail, port);
    refuse_address(facts, &mut rail);
    refuse_node(facts, device, &mut rail);
    refuse_provider(facts, device, &mut rail);
    rail
}

fn refuse(rail: &mut Rail, what: impl Into<String>, why: &str, fix: impl Into<String>) {
    rail.refused.push(Refusal {
        what: what.into(),
        why: why.to_owned(),
        fix: fix.into(),
    });
}

fn refuse_port(rail: &mut Rail, port: Option<&Port>) {
    if rail.mode == Mode::Unknown {
        let why = "kvtransfer knows RoCE, InfiniBand, iWARP and eRDMA";
        refuse(
            rail,
            "the device is of no known kind",
            why,
            "Leave it out with --device.",
        );
    }
    let state = port.map_or("missing", |port| port.state.as_str());
    if state != "ACTIVE" {
        let netdev = rail
            .netdev
            .clone()
            .unwrap_or_else(|| "its interface".to_owned());
        let fix = if rail.mode == Mode::InfiniBand {
            "Check the cable and the subnet manager.".to_owned()
        } else {
            format!(
                "ip link set {netdev} up, and check that the interface is attached to the instance."
            )
        };
        let why = "a port carries traffic only when it is ACTIVE";
        refuse(rail, format!("its port is {state}"), why, fix);
    }
}

fn refuse_address(facts: &Facts, rail: &mut Rail) {
    if rail.mode.needs_cm() {
        let looked = facts
            .netdevs
            .iter()
            .any(|netdev| netdev.addresses.is_some());
        if looked && rail.address.is_none() {
            let why = "rdma_cm resolves and binds addresses of the process's own network namespace";
            let netdev = rail.netdev.as_deref().unwrap_or("its interface");
            let fix = format!(
                "In a pod: hostNetwork: true, or the ENI inside the pod. On a host: give {netdev} an IPv4 address \
                 (ip -4 address show)."
            );
            refuse(
                rail,
                "its interface has no IPv4 address in this network namespace",
                why,
                fix,
            );
        }
    } else if rail.gid.is_none() && !matches!(rail.mode, Mode::InfiniBand | Mode::Unknown) {
        let why = rail.gid_reason.clone();
        let netdev = rail.netdev.as_deref().unwrap_or("its interface");
        let fix = format!(
            "Give {netdev} an IPv4 address (the instance's private address of that ENI) and bring it up; the driver \
             then adds the GID."
        );
        refuse(rail, "no usable GID", &why, fix);
    }
}

fn refuse_node(facts: &Facts, device: &Device, rail: &mut Rail) {
    let why = "user space reaches the device through its uverbs node only";
    let fix = "In a pod: request aliyun/erdma: 1 (or your device plugin's resource), not a hostPath. In a plain \
               container: --device /dev/infiniband/uverbsN. On a host: modprobe ib_uverbs, and read-write permission \
               for this user.";
    let mine = facts
        .nodes
        .iter()
        .find(|node| node.device.as_deref() == Some(&device.name));
    match mine {
        None => refuse(rail, "it has no node in /dev/infiniband", why, fix),
        Some(node) => {
            if let Some(problem) = &node.problem {
                refuse(
                    rail,
                    format!("/dev/infiniband/{}: {problem}", node.name),
                    why,
                    fix,
                );
            }
        }
    }
}

/// Provider of rdma-core for a kernel module, where the names differ.
fn provider_of(driver: &str) -> &str {
    match driver {
        "rdma_rxe" => "rxe",
        "mlx5_core" | "mlx5_ib" => "mlx5",
        "mlx4_core" | "mlx4_ib" => "mlx4",
        other => other,
    }
}

fn refuse_provider(facts: &Facts, device: &Device, rail: &mut Rail) {
    let Some(providers) = &facts.providers else {
        return;
    };
    let provider = provider_of(&device.driver);
    let known = !device.driver.is_empty();
    if known && !providers.iter().any(|name| name == provider) {
        let why = "without it libibverbs does not see the device at all";
        let fix = if device.is_erdma() {
            "Install libibverbs1, ibverbs-providers and librdmacm1 of the vendor's eRDMA repository in the image \
             (Ubuntu 22.04's own packages have no eRDMA provider)."
        } else {
            "Install ibverbs-providers (Debian, Ubuntu) or rdma-core (RPM) in the image."
        };
        let what = format!(
            "libibverbs has no provider `{provider}` (/etc/libibverbs.d has {})",
            list(providers)
        );
        refuse(rail, what, why, fix);
    }
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

/// Picks the GID as the engine does: by type and address; an index means nothing, it differs between devices of one host.
fn choose_gid(facts: &Facts, port: &Port) -> (Option<Gid>, String) {
    if port.link_layer == "InfiniBand" {
        let first = port.gids.first().cloned();
        return (first, "InfiniBand: the first GID of the port".to_owned());
    }
    let entry = |gid: &Gid| {
        let index = u8::try_from(gid.index).ok()?;
        Some(GidEntry {
            index,
            gid: gid.gid.octets(),
            kind: gid.kind.clone(),
            netdev: gid.netdev.clone(),
        })
    };
    let entries: Vec<_> = port.gids.iter().filter_map(entry).collect();
    let original = |chosen: &GidEntry| {
        let index = u16::from(chosen.index);
        port.gids.iter().find(|gid| gid.index == index).cloned()
    };
    let own = port.gids.iter().filter_map(|gid| own_address(facts, gid));
    for address in own {
        if let Ok(chosen) = select::choose_gid(&entries, Some(address)) {
            let netdev = chosen.netdev.as_deref().unwrap_or("the interface");
            let reason = format!("RoCE v2, and its IPv4 address is one of {netdev}'s");
            return (original(chosen), reason);
        }
    }
    match select::choose_gid(&entries, None) {
        Ok(chosen) => {
            let reason =
                "RoCE v2 with an IPv4 address; no interface here has that address to compare with";
            (original(chosen), reason.to_owned())
        }
        Err(reason) => (None, reason),
    }
}

/// The IPv4 address of a GID, if its interface is here and has it.
fn own_address(facts: &Facts, gid: &Gid) -> Option<Ipv4Addr> {
    let own = gid.ipv4()?;
    let netdev = facts.netdev(gid.netdev.as_deref()?)?;
    let addresses = netdev.addresses.as_deref()?;
    addresses.contains(&IpAddr::V4(own)).then_some(own)
}
