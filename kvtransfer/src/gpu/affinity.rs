//! Which RDMA devices are near a GPU, by their places in the PCI tree.
#![forbid(unsafe_code)]

use std::{fs, path::Path};

use crate::doctor::gpus::{Distance, distance_between};

/// Most RDMA devices that are looked at; a host has one or two for each GPU.
const DEVICES_MAX: usize = 64;

/// The RDMA devices of a host, nearest to the GPU first. `root` is `/`, but for tests; `pci_address` is
/// [`DeviceFacts::pci_address`](super::DeviceFacts::pci_address).
#[must_use]
pub fn nearest(root: &Path, pci_address: &str) -> Vec<(String, Distance)> {
    let gpu = Place::of(&root.join("sys/bus/pci/devices").join(pci_address));
    let Ok(entries) = fs::read_dir(root.join("sys/class/infiniband")) else {
        return Vec::new();
    };
    let named = |entry: fs::DirEntry| entry.file_name().into_string().ok();
    let names = entries.flatten().take(DEVICES_MAX).filter_map(named);
    let judge = |name: String| {
        let device = Place::of(&root.join("sys/class/infiniband").join(&name).join("device"));
        let left = (device.path.as_slice(), device.numa);
        let distance = distance_between(left, (gpu.path.as_slice(), gpu.numa));
        (name, distance)
    };
    let mut found: Vec<_> = names.map(judge).collect();
    found.sort_by(|left, right| (left.1, &left.0).cmp(&(right.1, &right.0)));
    found
}

/// Where a PCI function is.
struct Place {
    /// From the root complex on.
    path: Vec<String>,
    numa: Option<i32>,
}

impl Place {
    fn of(folder: &Path) -> Self {
        let path = fs::canonicalize(folder).unwrap_or_default();
        let parts = path.iter().filter_map(|part| part.to_str());
        let path = parts
            .filter(|part| is_pci(part))
            .map(str::to_owned)
            .collect();
        let numa = fs::read_to_string(folder.join("numa_node")).unwrap_or_default();
        Self {
            path,
            numa: numa.trim().parse().ok(),
        }
    }
}

/// Whether a folder's name is a root complex (`pci0000:00`) or a function (`0000:11:00.0`).
fn is_pci(name: &str) -> bool {
    let name = name.strip_prefix("pci").unwrap_or(name);
    name.contains(':')
        && name
            .split([':', '.'])
            .all(|part| !part.is_empty() && part.chars().all(|symbol| symbol.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn devices_on_the_gpus_switch_come_first() {
        let root = std::env::temp_dir().join(format!("kvt-affinity-{}", std::process::id()));
        let devices = root.join("sys/devices");
        let function = |path: &str, numa: &str| {
            let folder = devices.join(path);
            fs::create_dir_all(&folder).expect("a temporary folder is writable");
            fs::write(folder.join("numa_node"), numa).expect("writable");
            folder
        };
        let gpu = function("pci0000:10/0000:10:01.0/0000:11:00.0", "0\n");
        fs::create_dir_all(root.join("sys/bus/pci/devices")).expect("writable");
        symlink(&gpu, root.join("sys/bus/pci/devices/0000:11:00.0")).expect("writable");
        for (name, path, numa) in [
            ("far_0", "pci0000:a0/0000:a0:01.0/0000:a1:00.0", "1"),
            ("root_0", "pci0000:10/0000:10:02.0/0000:12:00.0", "0"),
            ("switch_0", "pci0000:10/0000:10:01.0/0000:13:00.0", "0"),
            ("node_0", "pci0000:20/0000:20:01.0/0000:21:00.0", "0"),
        ] {
            let class = root.join("sys/class/infiniband").join(name);
            fs::create_dir_all(&class).expect("writable");
            symlink(function(path, numa), class.join("device")).expect("writable");
        }
        fs::create_dir_all(root.join("sys/class/infiniband/rxe0")).expect("writable");
        let found = nearest(&root, "0000:11:00.0");
        let expected = [
            ("switch_0", Distance::SameSwitch),
            ("root_0", Distance::SameRoot),
            ("node_0", Distance::SameNode),
            ("far_0", Distance::Far),
            ("rxe0", Distance::Unknown),
        ];
        assert_eq!(
            found,
            expected.map(|(name, distance)| (name.to_owned(), distance))
        );
        assert!(nearest(Path::new("/nowhere"), "0000:11:00.0").is_empty());
        fs::remove_dir_all(root).expect("made above");
    }
}
