//! Looks at a host. Nothing is judged here, and nothing on the host is changed.
//!
//! Everything but addresses, libraries and what devices say of themselves comes from files below one root, so that a host mounted somewhere (a debug
//! pod's `/host`, a tree made by a test) is looked at in the same way.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::facts::{Facts, Library, Netdev};

mod addresses;
mod devices;
mod gpus;
mod libraries;
mod limits;
mod tree;
mod verbs;

use tree::Tree;

/// The verbs libraries, as they are asked for.
pub const SONAMES: [&str; 2] = ["libibverbs.so.1", "librdmacm.so.1"];

/// Where to look.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
    /// Addresses by interface; `None`: not known.
    addresses: Option<Vec<(String, IpAddr)>>,
    libraries: Vec<Library>,
    /// Whether the devices are opened through the libraries.
    opens_devices: bool,
}

impl Host {
    /// This host, as this process sees it. Opens the verbs libraries and, in [`collect`], the devices, which it tries out
    /// with small queue pairs of its own.
    pub fn this() -> Self {
        Self {
            root: PathBuf::from("/"),
            addresses: addresses::of_this_namespace(),
            libraries: verbs::libraries(),
            opens_devices: true,
        }
    }

    /// A host whose `/sys`, `/proc`, `/dev`, `/etc` and libraries lie below `root`. Addresses of its interfaces are not
    /// known; libraries are looked for by name, not opened.
    pub fn below(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            addresses: None,
            libraries: libraries::find(root),
            opens_devices: false,
        }
    }

    /// Says which addresses the interfaces have.
    pub fn with_addresses(mut self, addresses: Vec<(String, IpAddr)>) -> Self {
        self.addresses = Some(addresses);
        self
    }
}

/// Collects everything about a host. What cannot be read is left at its "not seen" value.
pub fn collect(host: &Host) -> Facts {
    let tree = Tree::new(&host.root);
    let mut facts = Facts {
        program: env!("CARGO_PKG_VERSION").to_owned(),
        hostname: tree.text("proc/sys/kernel/hostname").unwrap_or_default(),
        kernel: tree.text("proc/sys/kernel/osrelease").unwrap_or_default(),
        libraries: host.libraries.clone(),
        ..Facts::default()
    };
    facts.netdevs = netdevs(&tree, host.addresses.as_deref());
    facts.modules = devices::modules(&tree);
    facts.compat_mode = match tree
        .text("sys/module/erdma/parameters/compat_mode")
        .as_deref()
    {
        Some("Y" | "1") => Some(true),
        Some("N" | "0") => Some(false),
        _ => None,
    };
    facts.devices = devices::devices(&tree, &facts.netdevs, &facts.modules);
    if host.opens_devices {
        verbs::look(&mut facts.devices);
    }
    facts.nodes = devices::nodes(&tree);
    facts.providers = devices::providers(&tree);
    facts.erdma_functions = devices::erdma_functions(&tree);
    facts.memlock = limits::memlock(&tree);
    facts.hugepages = limits::hugepages(&tree);
    facts.memory_bytes = limits::memory_bytes(&tree);
    facts.container =
        limits::container(&tree, std::env::var_os("KUBERNETES_SERVICE_HOST").is_some());
    facts.ports = limits::ports(&tree);
    facts.gpus = gpus::gpus(&tree);
    facts.nvidia = gpus::driver(&tree);
    if host.opens_devices && !facts.gpus.is_empty() && !facts.devices.is_empty() {
        facts.gpu_direct = gpus::tried();
    }
    facts.cut = tree.cut();
    facts
}

fn netdevs(tree: &Tree, addresses: Option<&[(String, IpAddr)]>) -> Vec<Netdev> {
    let read = |name: String| {
        let file = |file: &str| tree.text(&format!("sys/class/net/{name}/{file}"));
        let own = |all: &[(String, IpAddr)]| {
            let mine = all.iter().filter(|(owner, _)| *owner == name);
            mine.map(|(_, address)| *address).collect()
        };
        Some(Netdev {
            mtu: file("mtu")?.parse().ok()?,
            mac: file("address").unwrap_or_default(),
            operstate: file("operstate").unwrap_or_default(),
            addresses: addresses.map(own),
            name,
        })
    };
    let names = tree.names("sys/class/net");
    names.into_iter().filter_map(read).collect()
}
