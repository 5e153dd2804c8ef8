//! The facts about devices that programs read from sysfs: a tree of files, and the GID tables in it.
#![forbid(unsafe_code)]

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
};

use super::{behaviour::OutOfBand, calls::node_guid, state::State};

/// Firmware version of every device.
pub(super) const FIRMWARE: &str = "0.0.77";
/// Where Linux hosts keep files in memory.
const MEMORY_FOLDER: &str = "/dev/shm";
/// How the kernel names the type of a RoCE v2 GID.
const ROCE_V2: &str = "RoCE v2";
/// How the kernel names the type of the others.
const ROCE_V1: &str = "IB/RoCE v1";

/// The network interface of a device.
pub(super) fn netdev(index: usize) -> String {
    format!("eth{}", index + 1)
}

/// One entry of a GID table.
pub(super) struct GidEntry {
    pub(super) raw: [u8; 16],
    /// `None`: the kernel has no type for it (iWARP).
    pub(super) kind: Option<&'static str>,
}

impl GidEntry {
    /// Whether it is the one entry that carries this fabric's traffic.
    pub(super) fn is_usable_ipv4(&self) -> bool {
        self.kind == Some(ROCE_V2) && self.raw[10..12] == [0xff, 0xff]
    }
}

/// The GID table of a device's port. On RoCE the IPv4-mapped "RoCE v2" entry lies at an index that differs per device,
/// after link-local ones and before the same address as "IB/RoCE v1".
pub(super) fn gid_table(state: &State, index: usize) -> Vec<GidEntry> {
    let device = &state.devices[index];
    let Some(first) = state.behaviour.roce_gid_index else {
        return vec![GidEntry {
            raw: device.gid(false),
            kind: None,
        }];
    };
    let at = match (index % 2, first) {
        (0, _) => first,
        (_, 0 | 1) => first + 1,
        (_, _) => first - 1,
    };
    let mut link_local = [0; 16];
    link_local[..2].copy_from_slice(&[0xfe, 0x80]);
    link_local[8..].copy_from_slice(&node_guid(state, index).to_be_bytes());
    let mut table: Vec<GidEntry> = (0..at)
        .map(|entry| GidEntry {
            raw: link_local,
            kind: Some(if entry == 0 { ROCE_V1 } else { ROCE_V2 }),
        })
        .collect();
    let raw = device.gid(true);
    for kind in [ROCE_V2, ROCE_V1] {
        table.push(GidEntry {
            raw,
            kind: Some(kind),
        });
    }
    table
}

/// A folder like `/sys`, removed when dropped.
#[derive(Debug)]
pub(super) struct Sysfs {
    root: PathBuf,
}

impl Sysfs {
    /// A new, empty folder.
    pub(super) fn new() -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!(
            "kvt-fake-sysfs-{}-{}",
            process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        // In memory where that is possible: a test makes and reads hundreds of files.
        let in_memory = Self::at(Path::new(MEMORY_FOLDER).join(&name));
        in_memory.or_else(|_| Self::at(std::env::temp_dir().join(&name)))
    }

    fn at(root: PathBuf) -> io::Result<Self> {
        // One that an earlier process of this number has left is not ours to trust.
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        fs::create_dir(&root)?;
        Ok(Self { root })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Writes what the kernel would show of these devices.
    pub(super) fn fill(&self, state: &State, names: &[String]) -> io::Result<()> {
        for (index, name) in names.iter().enumerate() {
            self.fill_device(state, index, name)?;
        }
        let module = self.root.join("module").join(state.behaviour.driver);
        let is_erdma = state.behaviour.driver == "erdma";
        if is_erdma {
            let mode = match state.behaviour.out_of_band {
                OutOfBand::ReadyAtRtr | OutOfBand::Full => "Y",
                OutOfBand::RefusedAtRtr(_) | OutOfBand::RefusedAtRts(_) => "N",
            };
            put(&module.join("parameters"), "compat_mode", mode)?;
        }
        Ok(())
    }

    fn fill_device(&self, state: &State, index: usize, name: &str) -> io::Result<()> {
        let pci = format!("0000:{:02x}:00.0", index + 1);
        let hardware = self.root.join("devices").join("pci0000:00").join(&pci);
        put(&hardware, "vendor", "0x1ded")?;
        put(&hardware, "device", "0x107f")?;
        // eRDMA cards often do not know their node.
        put(&hardware, "numa_node", "-1")?;
        let driver = self
            .root
            .join("bus/pci/drivers")
            .join(state.behaviour.driver);
        fs::create_dir_all(&driver)?;
        symlink(&driver, hardware.join("driver"))?;
        let netdev = netdev(index);
        let mac = state.devices[index].mac.map(|byte| format!("{byte:02x}"));
        put(
            &hardware.join("net").join(&netdev),
            "address",
            &mac.join(":"),
        )?;
        put(&hardware.join("net").join(&netdev), "mtu", "8500")?;
        let interfaces = self.root.join("class/net");
        fs::create_dir_all(&interfaces)?;
        symlink(hardware.join("net").join(&netdev), interfaces.join(&netdev))?;

        let class = self.root.join("class/infiniband").join(name);
        let node = if state.behaviour.looks_iwarp {
            "4: RNIC"
        } else {
            "1: CA"
        };
        put(&class, "node_type", node)?;
        put(&class, "fw_ver", FIRMWARE)?;
        put(
            &class,
            "node_guid",
            &words(&node_guid(state, index).to_be_bytes()),
        )?;
        symlink(&hardware, class.join("device"))?;
        let port = class.join("ports/1");
        put(&port, "state", "4: ACTIVE")?;
        put(&port, "link_layer", "Ethernet")?;
        put(&port, "rate", "100 Gb/sec (4X EDR)")?;
        for (at, entry) in gid_table(state, index).iter().enumerate() {
            let at = at.to_string();
            put(&port.join("gids"), &at, &words(&entry.raw))?;
            if let Some(kind) = entry.kind {
                put(&port.join("gid_attrs/types"), &at, kind)?;
            }
            // For iWARP the kernel names no interface here.
            if !state.behaviour.looks_iwarp {
                put(&port.join("gid_attrs/ndevs"), &at, &netdev)?;
            }
        }
        let verbs = self.root.join("class/infiniband_verbs");
        put(&verbs.join(format!("uverbs{index}")), "ibdev", name)
    }

    /// Follows a port's state.
    pub(super) fn set_port(&self, name: &str, up: bool) -> io::Result<()> {
        let port = self
            .root
            .join("class/infiniband")
            .join(name)
            .join("ports/1");
        put(&port, "state", if up { "4: ACTIVE" } else { "1: DOWN" })
    }
}

impl Drop for Sysfs {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.root) {
            tracing::debug!(%error, "a fake sysfs tree stays behind");
        }
    }
}

fn put(folder: &Path, file: &str, text: &str) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    fs::write(folder.join(file), format!("{text}\n"))
}

/// Bytes as sysfs prints GIDs and GUIDs: groups of four hexadecimal digits.
fn words(bytes: &[u8]) -> String {
    let pair = |pair: &[u8]| {
        pair.iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    bytes.chunks(2).map(pair).collect::<Vec<_>>().join(":")
}
