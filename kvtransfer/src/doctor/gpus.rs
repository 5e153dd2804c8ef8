//! Judges (device, GPU) pairs: how bytes of that GPU would reach that device, as far as it can be said without trying.
//!
//! The engine decides by registering memory when it starts. This only says what to expect and what stands in the way.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use super::facts::{Device, Facts, Gpu};
use crate::gpu::verdict::GpuDirect;

/// How GPU memory reaches a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum GpuPath {
    /// The device registers a dma-buf that the driver exports.
    DmaBuf,
    /// The device registers the GPU pointer itself, through nvidia_peermem.
    Peermem,
    /// Through pinned host memory.
    Staged,
}

impl GpuPath {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::DmaBuf => "dma-buf",
            Self::Peermem => "peer memory",
            Self::Staged => "staged",
        }
    }
}

/// How near two PCI functions are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Distance {
    /// They share a bridge below the root complex.
    SameSwitch,
    /// They share the root complex only.
    SameRoot,
    /// Different root complexes, the same NUMA node.
    SameNode,
    /// Different NUMA nodes, or root complexes whose node is not known.
    Far,
    /// One of them is no PCI function.
    Unknown,
}

impl Distance {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::SameSwitch => "same PCI switch",
            Self::SameRoot => "same root complex",
            Self::SameNode => "same NUMA node",
            Self::Far => "across root complexes",
            Self::Unknown => "unknown",
        }
    }
}

/// What to expect of one pair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// RDMA device.
    pub device: String,
    /// PCI address of the GPU.
    pub gpu: String,
    /// The best path that nothing seen here rules out.
    pub path: GpuPath,
    /// Whether that path was tried; until then it is an expectation.
    pub is_proven: bool,
    /// Why that one, and why better ones are ruled out.
    pub reason: String,
    /// How near they are.
    pub distance: Distance,
}

/// Puts what was found by trying in the place of what was expected.
fn prove(verdicts: &mut [Verdict], proofs: &[GpuDirect]) {
    for verdict in verdicts {
        let proof = proofs.iter().find(|proof| {
            proof.device == verdict.device && proof.gpu.eq_ignore_ascii_case(&verdict.gpu)
        });
        if let Some(proof) = proof {
            verdict.path = proof.path;
            verdict.reason.clone_from(&proof.reason);
            verdict.is_proven = true;
        }
    }
}

/// First kernel that hands dma-bufs to RDMA devices.
const DMABUF_KERNEL: (u32, u32) = (5, 12);

/// Judges every pair of a host.
pub fn verdicts(facts: &Facts) -> Vec<Verdict> {
    let pairs = facts
        .devices
        .iter()
        .flat_map(|device| facts.gpus.iter().map(move |gpu| (device, gpu)));
    let mut verdicts: Vec<Verdict> = pairs
        .map(|(device, gpu)| verdict(facts, device, gpu))
        .collect();
    prove(&mut verdicts, &facts.gpu_direct);
    verdicts
}

fn verdict(facts: &Facts, device: &Device, gpu: &Gpu) -> Verdict {
    let no_dmabuf = against_dmabuf(facts, device);
    let no_peermem = against_peermem(facts, device, gpu);
    let (path, reason) = match (no_dmabuf, no_peermem) {
        (None, _) => (
            GpuPath::DmaBuf,
            "the device registers dma-bufs and the open NVIDIA modules export them".to_owned(),
        ),
        (Some(dmabuf), None) => (
            GpuPath::Peermem,
            format!("nvidia_peermem is loaded; no dma-buf: {dmabuf}"),
        ),
        (Some(dmabuf), Some(peermem)) => (
            GpuPath::Staged,
            format!("no dma-buf: {dmabuf}; no peer memory: {peermem}"),
        ),
    };
    Verdict {
        device: device.name.clone(),
        gpu: gpu.address().to_owned(),
        path,
        is_proven: false,
        reason,
        distance: distance(device, gpu),
    }
}

fn against_dmabuf(facts: &Facts, device: &Device) -> Option<String> {
    let Some(nvidia) = &facts.nvidia else {
        return Some("the NVIDIA driver is not loaded".to_owned());
    };
    if kernel_version(&facts.kernel).is_some_and(|version| version < DMABUF_KERNEL) {
        return Some(format!(
            "kernel {} is older than {}.{}",
            facts.kernel, DMABUF_KERNEL.0, DMABUF_KERNEL.1
        ));
    }
    if !nvidia.contains("Open Kernel Module") {
        return Some("the proprietary NVIDIA modules export none".to_owned());
    }
    match device.verbs.as_ref().and_then(|verbs| verbs.dmabuf) {
        Some(true) => None,
        Some(false) => Some(format!("{} registers none", device.name)),
        None => Some(format!("{} was not asked", device.name)),
    }
}

fn against_peermem(facts: &Facts, device: &Device, gpu: &Gpu) -> Option<String> {
    if !facts.has_module("nvidia_peermem") && !facts.has_module("nv_peer_mem") {
        return Some("nvidia_peermem is not loaded".to_owned());
    }
    if device.vendor.is_none() {
        return Some(format!("{} is a software device", device.name));
    }
    let is_consumer = gpu
        .model
        .as_deref()
        .is_some_and(|model| model.contains("GeForce"));
    (device.is_erdma() && is_consumer).then(|| {
        "consumer GPUs are reported to fail to register on eRDMA (ENOMEM or EFAULT)".to_owned()
    })
}

/// Major and minor of a kernel release.
fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|symbol: char| !symbol.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn distance(device: &Device, gpu: &Gpu) -> Distance {
    distance_between((&device.pci_path, device.numa), (&gpu.pci_path, gpu.numa))
}

/// How near two functions are, each by its PCI addresses from the root complex on and its NUMA node.
pub(crate) fn distance_between(
    (left, left_node): (&[String], Option<i32>),
    (right, right_node): (&[String], Option<i32>),
) -> Distance {
    if left.is_empty() || right.is_empty() {
        return Distance::Unknown;
    }
    let shared = left
        .iter()
        .zip(right)
        .take_while(|(left, right)| left == right)
        .count();
    let node = |numa: Option<i32>| numa.filter(|node| *node >= 0);
    match shared {
        2.. => Distance::SameSwitch,
        1 => Distance::SameRoot,
        _ if node(left_node).is_some() && node(left_node) == node(right_node) => Distance::SameNode,
        _ => Distance::Far,
    }
}
