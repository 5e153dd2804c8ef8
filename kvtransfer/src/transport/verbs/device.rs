//! Which adapters this host has, and what the kernel says of each in sysfs.
#![expect(unsafe_code, reason = "the list of devices is a C array")]

use std::{
    ffi::{CStr, c_char, c_int},
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use super::{
    error::VerbsError,
    library::Library,
    sys::{self, ibv_device},
};

/// Most devices that are looked at. A host has one or two per GPU, at most a few dozen.
pub(crate) const DEVICES_MAX: usize = 64;

/// Most entries of a port's GID table that are looked at: a queue pair names its entry in eight bits.
pub(crate) const GIDS_MAX: usize = 256;

/// How a device speaks to its peers, which decides how connections are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Transport {
    /// InfiniBand, RoCE, and eRDMA in compat mode: queue pairs are connected out of band.
    Ib,
    /// iWARP (siw) and eRDMA in standard mode: queue pairs are connected by rdma_cm only.
    Iwarp,
    /// Something else (usnic, or the number the provider gave); not usable here.
    Other(i32),
}

impl Transport {
    fn from_raw(raw: c_int) -> Self {
        match raw {
            sys::IBV_TRANSPORT_IB => Self::Ib,
            sys::IBV_TRANSPORT_IWARP => Self::Iwarp,
            other => Self::Other(other),
        }
    }
}

/// A device of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DeviceInfo {
    /// The kernel's name, "erdma_0".
    pub(crate) name: String,
    /// How it connects.
    pub(crate) transport: Transport,
    /// `ibv_node_type`.
    pub(crate) node_type: i32,
    /// The node's GUID, in host order.
    pub(crate) node_guid: u64,
    /// The kernel driver, "erdma"; a software device has none.
    pub(crate) driver: Option<String>,
    /// The firmware, as the driver words it.
    pub(crate) firmware: Option<String>,
    /// The NUMA node of the slot. eRDMA devices often have none (the kernel says -1).
    pub(crate) numa_node: Option<u32>,
    /// The device's place in the PCI tree, for finding the nearest GPU.
    pub(crate) pci_path: Option<PathBuf>,
    /// Whether the erdma driver runs in compat mode; `None` when it is not loaded or has no such mode.
    pub(crate) compat_mode: Option<bool>,
}

/// One entry of a port's GID table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GidEntry {
    /// Its index, which differs from device to device.
    pub(crate) index: u8,
    /// The GID, as on the wire.
    pub(crate) gid: [u8; 16],
    /// "RoCE v2", "IB/RoCE v1"; empty where the kernel does not say.
    pub(crate) kind: String,
    /// The network interface behind it.
    pub(crate) netdev: Option<String>,
}

impl GidEntry {
    /// The IPv4 address in a v4-mapped GID.
    pub(crate) fn ipv4(&self) -> Option<Ipv4Addr> {
        match self.gid {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => {
                Some(Ipv4Addr::new(a, b, c, d))
            }
            _ => None,
        }
    }
}

/// The host's devices.
///
/// A host without any gives an empty list, and one whose kernel has no uverbs an error (`ENOSYS`).
pub(crate) fn list(library: &Library) -> Result<Vec<DeviceInfo>, VerbsError> {
    with_list(library, |devices| {
        devices
            .iter()
            .map(|&device| describe(library, device))
            .collect()
    })
}

/// Runs `body` over the library's devices, which live until it returns.
pub(super) fn with_list<R>(
    library: &Library,
    body: impl FnOnce(&[*mut ibv_device]) -> R,
) -> Result<R, VerbsError> {
    let mut count: c_int = 0;
    // SAFETY: the count is ours; the call has no other condition.
    let list = unsafe { (library.verbs.ibv_get_device_list)(&raw mut count) };
    if list.is_null() {
        return Err(VerbsError::last("ibv_get_device_list"));
    }
    let count = usize::try_from(count).unwrap_or(0).min(DEVICES_MAX);
    // SAFETY: the library returned an array of at least `count` pointers, ours until it is freed below.
    let devices = unsafe { std::slice::from_raw_parts(list, count) };
    let result = body(devices);
    // SAFETY: the array came from ibv_get_device_list and nothing refers to it any more.
    unsafe { (library.verbs.ibv_free_device_list)(list) };
    Ok(result)
}

/// The kernel's name of a device.
///
/// # Safety
/// `device` must be alive: in a list that was not freed, or opened.
pub(super) unsafe fn name(device: *mut ibv_device) -> String {
    // SAFETY: the caller vouches for the device; the name is copied.
    let raw = unsafe { (*device).name };
    text(&raw)
}

/// The text of a C array, up to its zero or its end.
pub(super) fn text(raw: &[c_char]) -> String {
    let bytes: Vec<u8> = raw.iter().map(|&byte| byte.cast_unsigned()).collect();
    match CStr::from_bytes_until_nul(&bytes) {
        Ok(text) => text.to_string_lossy().into_owned(),
        Err(_) => String::from_utf8_lossy(&bytes).into_owned(),
    }
}

fn describe(library: &Library, device: *mut ibv_device) -> DeviceInfo {
    // SAFETY: `with_list` keeps the device alive while this runs.
    let name = unsafe { name(device) };
    // SAFETY: as above.
    let transport = unsafe { (*device).transport_type };
    // SAFETY: as above.
    let node_type = unsafe { (*device).node_type };
    // SAFETY: as above.
    let guid = unsafe { (library.verbs.ibv_get_device_guid)(device) };
    let folder = folder(&library.sysfs, &name);
    DeviceInfo {
        transport: Transport::from_raw(transport),
        node_type,
        node_guid: u64::from_be(guid),
        driver: link_name(&folder.join("device/driver")),
        firmware: line(&folder.join("fw_ver")),
        numa_node: line(&folder.join("device/numa_node")).and_then(|node| node.parse().ok()),
        pci_path: fs::canonicalize(folder.join("device")).ok(),
        compat_mode: line(&library.sysfs.join("module/erdma/parameters/compat_mode"))
            .filter(|_| name.starts_with("erdma"))
            .map(|mode| mode == "Y" || mode == "1"),
        name,
    }
}

fn folder(sysfs: &Path, device: &str) -> PathBuf {
    sysfs.join("class/infiniband").join(device)
}

fn line(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned()).filter(|line| !line.is_empty())
}

fn link_name(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

/// The filled entries of a port's GID table, from sysfs: verbs itself does not tell the types on every rdma-core.
pub(crate) fn gids(sysfs: &Path, device: &str, port: u8) -> Vec<GidEntry> {
    let port = folder(sysfs, device).join("ports").join(port.to_string());
    (0..=u8::MAX)
        .filter_map(|index| gid_entry(&port, index))
        .take(GIDS_MAX)
        .collect()
}

fn gid_entry(port: &Path, index: u8) -> Option<GidEntry> {
    let entry = index.to_string();
    let gid = parse_gid(&line(&port.join("gids").join(&entry))?)?;
    if gid == [0; 16] {
        return None;
    }
    let attributes = port.join("gid_attrs");
    Some(GidEntry {
        index,
        gid,
        kind: line(&attributes.join("types").join(&entry)).unwrap_or_default(),
        netdev: line(&attributes.join("ndevs").join(&entry)),
    })
}

/// Eight groups of four hexadecimal digits, as the kernel prints a GID.
fn parse_gid(text: &str) -> Option<[u8; 16]> {
    let mut gid = [0; 16];
    let mut groups = text.split(':');
    for pair in gid.chunks_exact_mut(2) {
        let group = groups.next().filter(|group| group.len() == 4)?;
        pair.copy_from_slice(&u16::from_str_radix(group, 16).ok()?.to_be_bytes());
    }
    groups.next().is_none().then_some(gid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gids_are_read_with_their_type_and_interface() {
        let root = std::env::temp_dir().join(format!("kvt-gids-{}", std::process::id()));
        let port = root.join("class/infiniband/erdma_0/ports/1");
        for folder in ["gids", "gid_attrs/types", "gid_attrs/ndevs"] {
            fs::create_dir_all(port.join(folder)).expect("a folder");
        }
        fs::write(
            port.join("gids/0"),
            "0000:0000:0000:0000:0000:0000:0000:0000\n",
        )
        .expect("a file");
        fs::write(
            port.join("gids/2"),
            "0000:0000:0000:0000:0000:ffff:0a00:0107\n",
        )
        .expect("a file");
        fs::write(port.join("gid_attrs/types/2"), "RoCE v2\n").expect("a file");
        fs::write(port.join("gid_attrs/ndevs/2"), "eth1\n").expect("a file");
        let found = gids(&root, "erdma_0", 1);
        fs::remove_dir_all(&root).expect("ours to remove");
        assert_eq!(found.len(), 1, "an all-zero entry is an empty one");
        assert_eq!(found[0].index, 2);
        assert_eq!(found[0].ipv4(), Some(Ipv4Addr::new(10, 0, 1, 7)));
        assert_eq!(found[0].kind, "RoCE v2");
        assert_eq!(found[0].netdev.as_deref(), Some("eth1"));
    }

    #[test]
    fn what_is_not_a_gid_is_refused() {
        for text in [
            "",
            "::1",
            "0000:0000:0000:0000:0000:ffff:0a00",
            "0000:0000:0000:0000:0000:ffff:0a00:0107:0000",
            "+000:0000:0000:0000:0000:ffff:0a00:zzzz",
        ] {
            assert_eq!(parse_gid(text), None, "{text}");
        }
    }

    #[test]
    fn a_host_without_devices_lists_none_or_says_why() {
        let Ok(library) = Library::open() else {
            // Without the library there is nothing to list; library.rs tests that message.
            return;
        };
        match list(&library) {
            Ok(devices) => assert!(devices.len() <= DEVICES_MAX),
            Err(error) => assert!(error.to_string().contains("ibv_get_device_list"), "{error}"),
        }
    }
}
