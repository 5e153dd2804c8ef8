//! RDMA devices, their nodes, modules and providers.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::net::Ipv6Addr;
use std::os::unix::fs::OpenOptionsExt as _;

use super::tree::Tree;
use crate::doctor::facts::{ALIBABA, Device, DeviceNode, Gid, Module, Netdev, PciFunction, Port};

/// Modules that say something about RDMA or GPU-Direct. `mlx_compat` tells the OFED stack from the kernel's own.
const MODULES: [&str; 16] = [
    "erdma",
    "ib_core",
    "ib_uverbs",
    "ib_umad",
    "mlx5_core",
    "mlx5_ib",
    "mlx_compat",
    "nv_peer_mem",
    "nvidia",
    "nvidia_peermem",
    "rdma_cm",
    "rdma_rxe",
    "rdma_ucm",
    "siw",
    "irdma",
    "bnxt_re",
];

/// PCI device of an eRDMA function.
const ERDMA_FUNCTION: u32 = 0x107f;

pub(super) fn modules(tree: &Tree) -> BTreeMap<String, Module> {
    let loaded = |name: &&str| tree.has(&format!("sys/module/{name}"));
    let read = |name: &str| {
        let version = tree.text(&format!("sys/module/{name}/version"));
        (name.to_owned(), Module { version })
    };
    MODULES
        .into_iter()
        .filter(|name| loaded(name))
        .map(read)
        .collect()
}

pub(super) fn devices(
    tree: &Tree,
    netdevs: &[Netdev],
    modules: &BTreeMap<String, Module>,
) -> Vec<Device> {
    let names = tree.names("sys/class/infiniband");
    let read = |name: String| device(tree, netdevs, modules, name);
    names.into_iter().map(read).collect()
}

fn device(
    tree: &Tree,
    netdevs: &[Netdev],
    modules: &BTreeMap<String, Module>,
    name: String,
) -> Device {
    let folder = format!("sys/class/infiniband/{name}");
    let node_type = tree
        .word(&format!("{folder}/node_type"))
        .unwrap_or_default();
    let driver = tree
        .link_name(&format!("{folder}/device/driver/module"))
        .or_else(|| tree.link_name(&format!("{folder}/device/driver")))
        .filter(|_| tree.has(&format!("{folder}/device/vendor")))
        .unwrap_or_else(|| software_driver(tree, &folder, &node_type, modules));
    let ports: Vec<_> = tree
        .names(&format!("{folder}/ports"))
        .iter()
        .filter_map(|number| Some(port(tree, &folder, number.parse().ok()?)))
        .collect();
    let numa = tree.text(&format!("{folder}/device/numa_node"));
    Device {
        node_type,
        driver_version: modules
            .get(&driver)
            .and_then(|module| module.version.clone()),
        firmware: tree.text(&format!("{folder}/fw_ver")).unwrap_or_default(),
        vendor: tree.number(&format!("{folder}/device/vendor")),
        pci_path: tree.pci_path(&format!("{folder}/device")),
        numa: numa.and_then(|node| node.parse().ok()),
        netdev: netdev(tree, &folder, &ports, netdevs),
        verbs: None,
        driver,
        ports,
        name,
    }
}

/// A software device has no PCI driver: the soft-RoCE one states its interface, the soft-iWARP one is the only RNIC
/// without hardware.
fn software_driver(
    tree: &Tree,
    folder: &str,
    node_type: &str,
    modules: &BTreeMap<String, Module>,
) -> String {
    let has = |name: &str| modules.contains_key(name);
    if node_type == "RNIC" && has("siw") {
        "siw".to_owned()
    } else if has("rdma_rxe") && tree.has(&format!("{folder}/parent")) {
        "rdma_rxe".to_owned()
    } else {
        String::new()
    }
}

fn port(tree: &Tree, folder: &str, number: u8) -> Port {
    let folder = format!("{folder}/ports/{number}");
    let mut gids: Vec<_> = tree
        .names(&format!("{folder}/gids"))
        .iter()
        .filter_map(|index| gid(tree, &folder, index.parse().ok()?))
        .collect();
    gids.sort_by_key(|gid| gid.index);
    Port {
        number,
        state: tree.word(&format!("{folder}/state")).unwrap_or_default(),
        link_layer: tree
            .text(&format!("{folder}/link_layer"))
            .unwrap_or_default(),
        rate: tree.text(&format!("{folder}/rate")).unwrap_or_default(),
        gids,
    }
}

fn gid(tree: &Tree, folder: &str, index: u16) -> Option<Gid> {
    let gid: Ipv6Addr = tree.text(&format!("{folder}/gids/{index}"))?.parse().ok()?;
    if gid.is_unspecified() {
        return None;
    }
    let attribute = |name: &str| tree.text(&format!("{folder}/gid_attrs/{name}/{index}"));
    Some(Gid {
        index,
        gid,
        kind: attribute("types").unwrap_or_default(),
        netdev: attribute("ndevs"),
    })
}

/// The interface that carries a device: what its GIDs say, then its `parent`, then the one interface of its PCI function,
/// then the one whose hardware address is the GID (iWARP and eRDMA in standard mode).
fn netdev(tree: &Tree, folder: &str, ports: &[Port], netdevs: &[Netdev]) -> Option<String> {
    let gids = || ports.iter().flat_map(|port| &port.gids);
    if let Some(name) = gids().find_map(|gid| gid.netdev.clone()) {
        return Some(name);
    }
    if let Some(name) = tree.text(&format!("{folder}/parent")) {
        return Some(name);
    }
    let own = tree.names(&format!("{folder}/device/net"));
    if let [name] = own.as_slice() {
        return Some(name.clone());
    }
    let of_gid = |gid: &Gid| {
        let mac: Vec<_> = gid.gid.octets()[..6]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let mac = mac.join(":");
        let owner = netdevs.iter().find(|netdev| netdev.mac == mac)?;
        Some(owner.name.clone())
    };
    gids().find_map(of_gid)
}

pub(super) fn nodes(tree: &Tree) -> Vec<DeviceNode> {
    let read = |name: String| {
        let device = tree.text(&format!("sys/class/infiniband_verbs/{name}/ibdev"));
        // Opening is the only test that also sees what a container's device rules refuse; it has no effect of its own.
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(tree.path(&format!("dev/infiniband/{name}")));
        DeviceNode {
            device,
            problem: opened.err().map(|error| error.to_string()),
            name,
        }
    };
    let is_ours = |name: &String| name.starts_with("uverbs") || name == "rdma_cm";
    let names = tree.names("dev/infiniband");
    names.into_iter().filter(is_ours).map(read).collect()
}

pub(super) fn providers(tree: &Tree) -> Option<Vec<String>> {
    if !tree.has("etc/libibverbs.d") {
        return None;
    }
    let mut providers = Vec::new();
    for file in tree.names("etc/libibverbs.d") {
        let text = tree
            .text(&format!("etc/libibverbs.d/{file}"))
            .unwrap_or_default();
        let named = |line: &str| {
            let (keyword, path) = line.trim().split_once(char::is_whitespace)?;
            let name = path.trim().rsplit('/').next()?;
            (keyword == "driver").then(|| name.to_owned())
        };
        providers.extend(text.lines().filter_map(named));
    }
    providers.sort();
    providers.dedup();
    Some(providers)
}

pub(super) fn erdma_functions(tree: &Tree) -> Vec<PciFunction> {
    let folder = |name: &str| format!("sys/bus/pci/devices/{name}");
    let is_erdma = |name: &String| {
        tree.number(&format!("{}/vendor", folder(name))) == Some(ALIBABA)
            && tree.number(&format!("{}/device", folder(name))) == Some(ERDMA_FUNCTION)
    };
    let read = |address: String| PciFunction {
        driver: tree.link_name(&format!("{}/driver", folder(&address))),
        address,
    };
    let names = tree.names("sys/bus/pci/devices");
    names.into_iter().filter(is_erdma).map(read).collect()
}
