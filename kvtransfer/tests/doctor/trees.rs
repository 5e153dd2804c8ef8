//! Hosts made of files: what sysfs, procfs and `/dev` show on nodes of several kinds.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A folder that goes away with its value.
pub(crate) struct Tree {
    pub(crate) root: PathBuf,
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// An RDMA device to be made.
pub(crate) struct Made<'a> {
    pub(crate) name: &'a str,
    pub(crate) node_type: &'a str,
    pub(crate) driver: &'a str,
    pub(crate) vendor: &'a str,
    pub(crate) netdev: &'a str,
    pub(crate) mtu: u32,
    pub(crate) state: &'a str,
    /// Index, GID and type.
    pub(crate) gids: &'a [(u16, &'a str, &'a str)],
}

impl Tree {
    /// A host with nothing but the files that every Linux has; memory may be pinned without limit.
    pub(crate) fn empty() -> Self {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("doctor-{}-{number}", std::process::id()));
        let tree = Self { root };
        tree.file("proc/sys/kernel/hostname", "node-a\n");
        tree.file("proc/sys/kernel/osrelease", "5.10.134-16.al8.x86_64\n");
        tree.memlock("unlimited", "unlimited");
        tree.file("proc/meminfo", "MemTotal:       65536000 kB\n");
        tree.file("proc/sys/net/ipv4/ip_local_port_range", "32768\t60999\n");
        tree
    }

    pub(crate) fn file(&self, path: &str, text: &str) -> &Self {
        let path = self.root.join(path);
        fs::create_dir_all(path.parent().expect("below the root")).expect("a temporary folder");
        fs::write(path, text).expect("a temporary folder");
        self
    }

    pub(crate) fn remove(&self, path: &str) -> &Self {
        let path = self.root.join(path);
        if path.is_dir() {
            fs::remove_dir_all(path).expect("a temporary folder");
        } else {
            fs::remove_file(path).expect("a temporary folder");
        }
        self
    }

    /// A link at `path` that leads to `target`, both below the root.
    fn link(&self, path: &str, target: &str) {
        let place = self.root.join(path);
        if place.exists() {
            return;
        }
        fs::create_dir_all(place.parent().expect("below the root")).expect("a temporary folder");
        let up = "../".repeat(Path::new(path).components().count() - 1);
        symlink(format!("{up}{target}"), place).expect("a temporary folder");
    }

    pub(crate) fn memlock(&self, soft: &str, hard: &str) -> &Self {
        self.capabilities("0000000000000000");
        let text = format!(
            "Limit                     Soft Limit           Hard Limit           Units     \n\
             Max stack size            8388608              unlimited            bytes     \n\
             Max locked memory         {soft}              {hard}              bytes     \n"
        );
        self.file("proc/self/limits", &text)
    }

    pub(crate) fn capabilities(&self, mask: &str) -> &Self {
        self.file("proc/self/status", &format!("Name:\tx\nCapEff:\t{mask}\n"))
    }

    /// The libraries and the providers of an image.
    pub(crate) fn image(&self, providers: &[&str]) -> &Self {
        self.file("usr/lib64/libibverbs.so.1", "")
            .file("usr/lib64/librdmacm.so.1", "");
        for provider in providers {
            self.file(
                &format!("etc/libibverbs.d/{provider}.driver"),
                &format!("driver {provider}\n"),
            );
        }
        self
    }

    pub(crate) fn module(&self, name: &str) -> &Self {
        self.file(&format!("sys/module/{name}/refcnt"), "0\n")
    }

    pub(crate) fn netdev(&self, name: &str, mtu: u32, mac: &str) -> &Self {
        let folder = format!("sys/class/net/{name}");
        self.file(&format!("{folder}/mtu"), &format!("{mtu}\n"));
        self.file(&format!("{folder}/address"), &format!("{mac}\n"));
        self.file(&format!("{folder}/operstate"), "up\n")
    }

    /// A device with its port, GIDs, interface, uverbs node and PCI function.
    pub(crate) fn device(&self, number: usize, made: &Made<'_>) -> &Self {
        let is_hardware = !made.vendor.is_empty();
        let parent = if is_hardware {
            format!("sys/devices/pci0000:1{number}/0000:1{number}:01.0/0000:1{number}:02.0")
        } else {
            "sys/devices/virtual".to_owned()
        };
        let folder = format!("{parent}/infiniband/{}", made.name);
        self.link(&format!("sys/class/infiniband/{}", made.name), &folder);
        if is_hardware {
            self.link(&format!("{folder}/device"), &parent);
            self.file(&format!("{parent}/vendor"), &format!("{}\n", made.vendor));
            self.file(&format!("{parent}/numa_node"), "-1\n");
            self.link(
                &format!("{parent}/driver"),
                &format!("sys/bus/pci/drivers/{}", made.driver),
            );
            let module = format!("sys/bus/pci/drivers/{}/module", made.driver);
            if !self.root.join(&module).exists() {
                self.module(made.driver);
                self.link(&module, &format!("sys/module/{}", made.driver));
            }
        }
        self.module("ib_core").module("ib_uverbs");
        self.file(
            &format!("{folder}/node_type"),
            &format!("{}\n", made.node_type),
        );
        self.file(&format!("{folder}/fw_ver"), "1.2.3\n");
        let port = format!("{folder}/ports/1");
        self.file(&format!("{port}/state"), &format!("{}\n", made.state));
        self.file(&format!("{port}/link_layer"), "Ethernet\n");
        self.file(&format!("{port}/rate"), "100 Gb/sec (4X EDR)\n");
        let zero = "0000:0000:0000:0000:0000:0000:0000:0000\n";
        for index in 0..4 {
            self.file(&format!("{port}/gids/{index}"), zero);
        }
        for (index, gid, kind) in made.gids {
            self.file(&format!("{port}/gids/{index}"), &format!("{gid}\n"));
            if !kind.is_empty() {
                self.file(
                    &format!("{port}/gid_attrs/types/{index}"),
                    &format!("{kind}\n"),
                );
                self.file(
                    &format!("{port}/gid_attrs/ndevs/{index}"),
                    &format!("{}\n", made.netdev),
                );
            }
        }
        self.netdev(made.netdev, made.mtu, &format!("00:16:3e:00:00:0{number}"));
        self.file(&format!("dev/infiniband/uverbs{number}"), "");
        self.file(
            &format!("sys/class/infiniband_verbs/uverbs{number}/ibdev"),
            &format!("{}\n", made.name),
        )
    }

    /// A GPU beside the device `near`.
    pub(crate) fn gpu(&self, near: usize, model: &str) -> &Self {
        let address = format!("0000:1{near}:03.0");
        let folder = format!("sys/devices/pci0000:1{near}/0000:1{near}:01.0/{address}");
        self.file(&format!("{folder}/vendor"), "0x10de\n");
        self.file(&format!("{folder}/class"), "0x030200\n");
        self.link(&format!("sys/bus/pci/devices/{address}"), &folder);
        self.file(
            &format!("proc/driver/nvidia/gpus/{address}/information"),
            &format!("Model: \t\t {model}\nIRQ:   \t\t 12\n"),
        )
    }

    /// The NVIDIA driver.
    pub(crate) fn nvidia(&self, is_open: bool) -> &Self {
        let kind = if is_open {
            "Open Kernel Module"
        } else {
            "x86_64 Kernel Module"
        };
        self.module("nvidia").file(
            "proc/driver/nvidia/version",
            &format!("NVRM version: NVIDIA UNIX {kind}  570.86.15\nGCC version: 12\n"),
        )
    }
}

/// A GPU node of ACK: two ERIs in compat mode whose GIDs lie at different indexes.
pub(crate) fn erdma_compat(mtu: u32) -> Tree {
    let tree = Tree::empty();
    tree.image(&["erdma", "mlx5"])
        .file("sys/module/erdma/parameters/compat_mode", "Y\n")
        .file("sys/module/erdma/version", "0.2.37\n")
        .file("dev/infiniband/rdma_cm", "");
    let made = |name, netdev, gids| Made {
        name,
        node_type: "1: CA",
        driver: "erdma",
        vendor: "0x1ded",
        netdev,
        mtu,
        state: "4: ACTIVE",
        gids,
    };
    let first = [
        (0, "fe80:0000:0000:0000:0216:3eff:fe00:0000", "RoCE v2"),
        (1, "2408:4000:0000:0000:0000:0000:0000:0005", "RoCE v2"),
        (2, "0000:0000:0000:0000:0000:ffff:0a00:0005", "RoCE v2"),
    ];
    tree.device(0, &made("erdma_0", "eth1", &first));
    let second = [
        (0, "fe80:0000:0000:0000:0216:3eff:fe00:0001", "RoCE v2"),
        (1, "0000:0000:0000:0000:0000:ffff:0a00:0006", "RoCE v2"),
    ];
    tree.device(1, &made("erdma_1", "eth2", &second));
    tree
}

/// A CPU node of ACK: one ERI in standard mode.
pub(crate) fn erdma_standard() -> Tree {
    let tree = Tree::empty();
    tree.image(&["erdma"])
        .file("sys/module/erdma/parameters/compat_mode", "N\n")
        .file("dev/infiniband/rdma_cm", "");
    let made = Made {
        name: "erdma_0",
        node_type: "4: RNIC",
        driver: "erdma",
        vendor: "0x1ded",
        netdev: "eth1",
        mtu: 1400,
        state: "4: ACTIVE",
        gids: &[(0, "0016:3e00:0000:0000:0000:0000:0000:0000", "")],
    };
    tree.device(0, &made);
    tree
}

/// A node with two RoCE ports of ConnectX, the second without a cable.
pub(crate) fn connectx() -> Tree {
    let tree = Tree::empty();
    tree.image(&["mlx5"]);
    let v4 = "0000:0000:0000:0000:0000:ffff:c0a8:0001";
    let made = |name, netdev, state, gids| Made {
        name,
        node_type: "1: CA",
        driver: "mlx5_core",
        vendor: "0x15b3",
        netdev,
        mtu: 1500,
        state,
        gids,
    };
    let gids = [
        (0, "fe80:0000:0000:0000:0216:3eff:fe00:0000", "IB/RoCE v1"),
        (1, "fe80:0000:0000:0000:0216:3eff:fe00:0000", "RoCE v2"),
        (2, v4, "IB/RoCE v1"),
        (3, v4, "RoCE v2"),
    ];
    tree.device(0, &made("mlx5_0", "ens1", "4: ACTIVE", &gids));
    tree.device(1, &made("mlx5_1", "ens2", "1: DOWN", &[]));
    tree
}

/// Soft-iWARP.
pub(crate) fn siw() -> Tree {
    let tree = Tree::empty();
    tree.image(&["siw"])
        .module("siw")
        .file("dev/infiniband/rdma_cm", "");
    let made = Made {
        name: "siw0",
        node_type: "4: RNIC",
        driver: "",
        vendor: "",
        netdev: "dummy0",
        mtu: 1500,
        state: "4: ACTIVE",
        gids: &[(0, "0016:3e00:0000:0000:0000:0000:0000:0000", "")],
    };
    tree.device(0, &made);
    tree
}

/// Soft-RoCE.
pub(crate) fn rxe() -> Tree {
    let tree = Tree::empty();
    tree.image(&["rxe"]).module("rdma_rxe");
    let made = Made {
        name: "rxe0",
        node_type: "1: CA",
        driver: "",
        vendor: "",
        netdev: "dummy1",
        mtu: 9000,
        state: "4: ACTIVE",
        gids: &[
            (0, "fe80:0000:0000:0000:0216:3eff:fe00:0000", "RoCE v2"),
            (1, "0000:0000:0000:0000:0000:ffff:0a01:0001", "RoCE v2"),
        ],
    };
    tree.device(0, &made);
    tree.file("sys/devices/virtual/infiniband/rxe0/parent", "dummy1\n");
    tree
}
