//! NVIDIA GPUs and their driver.

use super::tree::Tree;
use crate::{
    doctor::facts::{Gpu, NVIDIA},
    gpu::{
        Context, Driver,
        verdict::{GpuDirect, probe},
    },
};

/// PCI classes of GPUs: VGA and 3D controllers.
const CLASSES: [u32; 2] = [0x0300, 0x0302];

pub(super) fn gpus(tree: &Tree) -> Vec<Gpu> {
    let folder = |name: &str| format!("sys/bus/pci/devices/{name}");
    let is_gpu = |name: &String| {
        let class = tree.number(&format!("{}/class", folder(name)));
        tree.number(&format!("{}/vendor", folder(name))) == Some(NVIDIA)
            && class.is_some_and(|class| CLASSES.contains(&(class >> 8)))
    };
    let read = |name: String| {
        let numa = tree.text(&format!("{}/numa_node", folder(&name)));
        let mut pci_path = tree.pci_path(&folder(&name));
        if pci_path.is_empty() {
            pci_path.push(name.clone());
        }
        Gpu {
            pci_path,
            model: model(tree, &name),
            numa: numa.and_then(|node| node.parse().ok()),
        }
    };
    let names = tree.names("sys/bus/pci/devices");
    names.into_iter().filter(is_gpu).map(read).collect()
}

fn model(tree: &Tree, address: &str) -> Option<String> {
    let text = tree.text(&format!("proc/driver/nvidia/gpus/{address}/information"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Model:"))?;
    Some(line.trim().to_owned())
}

/// The line that says whether the modules are the open ones.
pub(super) fn driver(tree: &Tree) -> Option<String> {
    let text = tree.text("proc/driver/nvidia/version")?;
    let line = text.lines().next()?;
    Some(line.trim().to_owned())
}

/// What registering some memory of each GPU with each RDMA device says. A GPU that cannot be used leaves nothing but a log line.
pub(super) fn tried() -> Vec<GpuDirect> {
    let driver = match Driver::open() {
        Ok(driver) => driver,
        Err(error) => {
            tracing::debug!(%error, "GPU-Direct is not tried");
            return Vec::new();
        }
    };
    let judge = |ordinal| {
        let context = Context::primary(ordinal).map_err(|error| error.to_string())?;
        probe(&context)
    };
    let mut found = Vec::new();
    for ordinal in 0..driver.device_count().unwrap_or(0) {
        match judge(ordinal) {
            Ok(verdicts) => found.extend(verdicts),
            Err(reason) => tracing::debug!(ordinal, reason, "GPU-Direct is not tried"),
        }
    }
    found
}
