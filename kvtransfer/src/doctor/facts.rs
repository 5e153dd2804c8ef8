//! What was seen on a host, unjudged. Plain data: it is sent to peers and kept in reports.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::gpu::verdict::GpuDirect;

/// Everything that was seen on one host. A missing field in a report of another version reads as "not seen".
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// Version of the kvtransfer that looked.
    pub program: String,
    /// Host name, in a pod the pod's.
    pub hostname: String,
    /// Kernel release, e.g. `5.10.134-16.al8.x86_64`.
    pub kernel: String,
    /// RDMA devices, by name.
    pub devices: Vec<Device>,
    /// Network interfaces of this network namespace.
    pub netdevs: Vec<Netdev>,
    /// Entries of `/dev/infiniband`.
    pub nodes: Vec<DeviceNode>,
    /// PCI functions that are eRDMA NICs, bound to a driver or not.
    pub erdma_functions: Vec<PciFunction>,
    /// Loaded kernel modules among those that matter here, by name.
    pub modules: BTreeMap<String, Module>,
    /// `compat_mode` of the erdma module; `None`: not loaded, or the in-tree driver, which has no such parameter.
    pub compat_mode: Option<bool>,
    /// The two verbs libraries.
    pub libraries: Vec<Library>,
    /// Providers that libibverbs is configured to load (`/etc/libibverbs.d`); `None`: there is no such folder.
    pub providers: Option<Vec<String>>,
    /// How much memory this process may pin.
    pub memlock: Memlock,
    /// Pools of huge pages, by size.
    pub hugepages: Vec<HugePages>,
    /// Memory of the host.
    pub memory_bytes: u64,
    /// What hints at a container.
    pub container: Container,
    /// What lies near the ports that the eRDMA driver takes.
    pub ports: Ports,
    /// NVIDIA GPUs.
    pub gpus: Vec<Gpu>,
    /// First line of the NVIDIA driver's version file.
    pub nvidia: Option<String>,
    /// How devices reach the GPUs' memory, tried with some of it; empty where nothing could be tried.
    pub gpu_direct: Vec<GpuDirect>,
    /// Lists that were longer than a bound and were cut there.
    pub cut: Vec<String>,
}

/// One RDMA device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Device {
    /// Name, e.g. `erdma_0`.
    pub name: String,
    /// `CA` or `RNIC`, as sysfs spells it after the number.
    pub node_type: String,
    /// Kernel module that drives it, e.g. `erdma`, `mlx5_core`, `siw`, `rdma_rxe`.
    pub driver: String,
    /// Version that the module states; in-tree modules often state none.
    pub driver_version: Option<String>,
    /// Firmware version; software devices have none or zeros.
    pub firmware: String,
    /// PCI vendor, e.g. `0x1ded`; `None` for a software device.
    pub vendor: Option<u32>,
    /// PCI addresses from the root to the device; empty for a software device.
    pub pci_path: Vec<String>,
    /// NUMA node; −1 or `None`: the platform does not say.
    pub numa: Option<i32>,
    /// Interface that carries it, where sysfs or the hardware address says so.
    pub netdev: Option<String>,
    /// Ports, by number.
    pub ports: Vec<Port>,
    /// What opening it through libibverbs showed; `None`: it was not opened.
    pub verbs: Option<Verbs>,
}

impl Device {
    /// Whether it is an Alibaba eRDMA NIC.
    pub fn is_erdma(&self) -> bool {
        self.driver == "erdma" || self.vendor == Some(ALIBABA)
    }
}

/// PCI vendor of Alibaba Cloud.
pub const ALIBABA: u32 = 0x1ded;
/// PCI vendor of NVIDIA.
pub const NVIDIA: u32 = 0x10de;

/// One port of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Port {
    /// Number, from 1.
    pub number: u8,
    /// State as sysfs spells it after the number: `ACTIVE`, `DOWN`, `INIT`, ...
    pub state: String,
    /// `Ethernet` or `InfiniBand`.
    pub link_layer: String,
    /// Rate as the driver states it. eRDMA always states 100 Gb/s, whatever the instance may use.
    pub rate: String,
    /// Entries of the GID table that are not zero.
    pub gids: Vec<Gid>,
}

/// One entry of a GID table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gid {
    /// Index in the table.
    pub index: u16,
    /// The GID, written as an IPv6 address.
    pub gid: Ipv6Addr,
    /// `RoCE v2`, `IB/RoCE v1`, or empty where the device has no types.
    pub kind: String,
    /// Interface of this entry.
    pub netdev: Option<String>,
}

impl Gid {
    /// The IPv4 address of an IPv4-mapped GID.
    pub fn ipv4(&self) -> Option<Ipv4Addr> {
        self.gid.to_ipv4_mapped()
    }
}

/// What libibverbs said about a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Verbs {
    /// Why it could not be opened or probed; then the rest is empty.
    pub problem: Option<String>,
    /// MTU of the port in bytes as verbs states it (256 ..= 4096).
    pub active_mtu: Option<u32>,
    /// Limits and abilities with the reason of each, in the order they were probed.
    pub probed: Vec<Probed>,
    /// Whether the device registers dma-bufs; `None`: not probed.
    pub dmabuf: Option<bool>,
}

/// One probed limit or ability.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Probed {
    /// What, e.g. `send SGE`.
    pub name: String,
    /// Its value, with unit.
    pub value: String,
    /// How it was found out.
    pub reason: String,
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Netdev {
    /// Name.
    pub name: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Hardware address, lower case with colons.
    pub mac: String,
    /// `up`, `down`, `unknown`, ...
    pub operstate: String,
    /// Its addresses; `None`: nobody looked.
    pub addresses: Option<Vec<IpAddr>>,
}

/// A device node below `/dev/infiniband`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceNode {
    /// Name: `uverbs0`, `rdma_cm`, ...
    pub name: String,
    /// RDMA device it belongs to, for `uverbsN`.
    pub device: Option<String>,
    /// Why it cannot be opened for reading and writing; `None`: it can.
    pub problem: Option<String>,
}

/// A PCI function.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PciFunction {
    /// Address, e.g. `0000:11:00.0`.
    pub address: String,
    /// Driver that is bound to it.
    pub driver: Option<String>,
}

/// A loaded kernel module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Module {
    /// Version, if it states one.
    pub version: Option<String>,
}

/// One of the libraries that are opened at run time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Library {
    /// Name that was asked for, e.g. `libibverbs.so.1`.
    pub soname: String,
    /// What the loader said; `None`: it is there.
    pub problem: Option<String>,
}

/// A resource limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// Nobody could read it.
    #[default]
    Unknown,
    /// No limit.
    Unlimited,
    /// So many bytes.
    Bytes(u64),
}

/// Limits on pinned memory of this process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memlock {
    /// The limit in force.
    pub soft: Limit,
    /// How far this process may raise it.
    pub hard: Limit,
    /// Whether the process has `CAP_IPC_LOCK`, with which the kernel does not apply the limit.
    pub ipc_lock: bool,
}

/// A pool of huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HugePages {
    /// Size of a page in bytes.
    pub page_bytes: u64,
    /// Pages in the pool.
    pub total: u64,
    /// Pages that are free.
    pub free: u64,
}

/// Hints at a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Container {
    /// Whether this runs in a Kubernetes pod.
    pub kubernetes: bool,
    /// What gave a container away, in words; `None`: nothing did.
    pub hint: Option<String>,
    /// Whether RDMA devices are shared by all network namespaces; `None`: the kernel does not say.
    pub netns_shared: Option<bool>,
}

/// Ports near those of the eRDMA driver.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ports {
    /// `ip_local_port_range`: first and last port that outgoing connections use.
    pub ephemeral: Option<(u16, u16)>,
    /// `ip_local_reserved_ports`: ranges that they do not use.
    pub reserved: Vec<(u16, u16)>,
    /// Ports of the driver's range on which a socket of this network namespace listens or is connected.
    pub busy: Vec<u16>,
}

/// An NVIDIA GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Gpu {
    /// PCI addresses from the root to the GPU.
    pub pci_path: Vec<String>,
    /// Model, where the driver says it.
    pub model: Option<String>,
    /// NUMA node; −1 or `None`: the platform does not say.
    pub numa: Option<i32>,
}

impl Gpu {
    /// Its own PCI address.
    pub fn address(&self) -> &str {
        self.pci_path.last().map_or("?", String::as_str)
    }
}

impl Facts {
    /// The interface with this name, if it is in this network namespace.
    pub fn netdev(&self, name: &str) -> Option<&Netdev> {
        self.netdevs.iter().find(|netdev| netdev.name == name)
    }

    /// Whether a kernel module is loaded (or built in with parameters).
    pub fn has_module(&self, name: &str) -> bool {
        self.modules.contains_key(name)
    }

    /// Why a library is not there; `None`: it is, or nobody looked.
    pub fn library_problem(&self, soname: &str) -> Option<&str> {
        let library = self
            .libraries
            .iter()
            .find(|library| library.soname == soname)?;
        library.problem.as_deref()
    }
}
