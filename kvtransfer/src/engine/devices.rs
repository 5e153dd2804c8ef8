//! A device's memory at an engine's edge: what peers are told of it, and theirs taken into use here.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use crate::{
    config::EngineConfig,
    layout::RegionId,
    memory::{
        Region,
        device::{Attached, Device},
    },
    plan::{mismatch::End, pairing::Pairing},
    transport::staging::Staging,
    wire::hello::{Place, RegionAddress, SHARES_MAX},
};

use super::{
    hub::Hub,
    link::{Agreement, Link},
};

/// How this engine's regions look to peers.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) places: Vec<Place>,
    pub(super) shares: Vec<Vec<u8>>,
}

/// The device of an engine's memory, if it has one.
pub(crate) struct DeviceSide {
    device: Option<Arc<dyn Device>>,
    staging: Option<Staging>,
    shared: RwLock<Arc<Shared>>,
}

impl DeviceSide {
    /// Looks at the regions.
    ///
    /// # Errors
    /// They lie on several devices.
    pub(super) fn new(config: &EngineConfig, regions: &[Arc<Region>]) -> Result<Self, String> {
        let device = device_of(regions)?;
        let bytes = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let (total, chunk) = (config.staging_bytes, config.staged_batch_bytes);
        let staging = |device| Staging::new(device, bytes(total), bytes(chunk));
        Ok(Self {
            staging: device.as_ref().map(staging),
            device,
            shared: RwLock::new(Arc::new(share(regions))),
        })
    }

    /// The device.
    pub(crate) fn device(&self) -> Option<&Arc<dyn Device>> {
        self.device.as_ref()
    }

    /// Pinned memory between the device and wires.
    pub(crate) fn staging(&self) -> Option<&Staging> {
        self.staging.as_ref()
    }

    /// What peers are told.
    pub(super) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The memory went away and came back: its allocations are others.
    pub(super) fn share_again(&self, regions: &[Arc<Region>]) {
        let shared = Arc::new(share(regions));
        *self.shared.write().unwrap_or_else(PoisonError::into_inner) = shared;
    }
}

/// The one device of some regions.
///
/// # Errors
/// They lie on several.
fn device_of(regions: &[Arc<Region>]) -> Result<Option<Arc<dyn Device>>, String> {
    let mut devices = regions.iter().filter_map(|region| region.on_device());
    let Some(device) = devices.next() else {
        return Ok(None);
    };
    let name = device.name();
    match devices.find(|other| other.name() != name) {
        None => Ok(Some(Arc::clone(device))),
        Some(other) => Err(format!(
            "the regions lie on {name} and on {}; start an engine for each device",
            other.name()
        )),
    }
}

/// Most bytes of all descriptions together: half of what a stranger may say.
const SHARE_BYTES_ALL_MAX: usize = 1 << 20;

/// Describes every region to processes of this host.
fn share(regions: &[Arc<Region>]) -> Shared {
    let mut known: HashMap<Vec<u8>, u32> = HashMap::new();
    let mut shared = Shared::default();
    let mut bytes = 0;
    for (number, region) in regions.iter().enumerate() {
        let Some(device) = region.on_device() else {
            shared.places.push(Place::Host);
            continue;
        };
        let place = match device.share(region.base_address(), region.len() as u64) {
            Ok(share) => {
                let next = u32::try_from(shared.shares.len()).unwrap_or(u32::MAX);
                let index = known.get(&share.allocation).copied();
                let fits = shared.shares.len() < SHARES_MAX
                    && bytes + share.allocation.len() <= SHARE_BYTES_ALL_MAX;
                if index.is_none() && fits {
                    bytes += share.allocation.len();
                    known.insert(share.allocation.clone(), next);
                    shared.shares.push(share.allocation);
                }
                let offset = share.offset;
                match index.or(fits.then_some(next)) {
                    Some(share) => Place::Shared { share, offset },
                    None => Place::Device,
                }
            }
            Err(error) => {
                tracing::warn!(region = number, %error, "peers on this host cannot copy from this memory; it is staged");
                Place::Device
            }
        };
        shared.places.push(place);
    }
    shared
}

/// A peer's regions in this process's view of the device.
#[derive(Debug)]
pub(crate) struct AttachedRegions {
    /// By region: where it begins. `None`: host memory.
    bases: Vec<Option<u64>>,
    /// Keeps them in use.
    _allocations: Vec<Arc<dyn Attached>>,
}

impl AttachedRegions {
    /// Where a peer's device region begins here.
    pub(crate) fn base(&self, region: u32) -> Option<u64> {
        self.bases.get(region as usize).copied().flatten()
    }
}

/// What is known of a peer's device memory.
#[derive(Clone, Debug)]
pub(crate) enum PeerMemory {
    /// Nothing is to be copied from device to device.
    Host,
    /// It can be copied from.
    Attached(Arc<AttachedRegions>),
    /// It cannot, in words.
    Refused(String),
}

/// Takes the peer's device memory into use, as far as what it sends lies there.
fn attach(hub: &Hub, agreement: &Agreement) -> PeerMemory {
    let by_address = agreement.by_address || hub.config.writable_by_address;
    let needed = match &agreement.incoming {
        _ if by_address => needs_all(hub, &agreement.regions),
        Ok(incoming) => needs(hub, incoming, &agreement.regions),
        Err(_) => Ok(false),
    };
    match needed {
        Ok(false) => PeerMemory::Host,
        Ok(true) => match attach_all(hub, agreement) {
            Ok(regions) => PeerMemory::Attached(Arc::new(regions)),
            Err(reason) => PeerMemory::Refused(reason),
        },
        Err(reason) => PeerMemory::Refused(reason),
    }
}

/// What both refusals say.
const MIXED: &str = "one side's memory is on a device and the other's is not";

/// The same where blocks may go from any region to any other.
///
/// # Errors
/// Some regions are in host memory and some are not.
fn needs_all(hub: &Hub, theirs: &[RegionAddress]) -> Result<bool, String> {
    let ours = hub.regions().iter();
    let mut ours = ours.map(|region| region.on_device().is_some());
    let mut theirs = theirs.iter().map(|region| region.place != Place::Host);
    let first = theirs.next().unwrap_or(false);
    if ours.all(|other| other == first) && theirs.all(|other| other == first) {
        Ok(first)
    } else {
        Err(MIXED.into())
    }
}

/// Whether device memory goes to device memory.
///
/// # Errors
/// Some bytes go between host and device memory, which no pull does.
fn needs(hub: &Hub, incoming: &Pairing, theirs: &[RegionAddress]) -> Result<bool, String> {
    let mut needed = false;
    let pieces = incoming
        .components
        .iter()
        .flat_map(|paired| paired.pieces());
    for piece in pieces {
        let source = piece.side(End::Source).region;
        let source = theirs.get(source.0 as usize).map(|region| region.place);
        let target = hub.region(piece.side(End::Target).region);
        let target = target.is_some_and(|region| region.on_device().is_some());
        let source = source.is_some_and(|place| place != Place::Host);
        if source != target {
            return Err(MIXED.into());
        }
        needed |= source;
    }
    Ok(needed)
}

fn attach_all(hub: &Hub, agreement: &Agreement) -> Result<AttachedRegions, String> {
    let device = hub.devices.device();
    let device = device.ok_or("this engine has no device memory")?;
    let mut allocations = Vec::with_capacity(agreement.shares.len());
    for share in agreement.shares.iter() {
        let attached = device.attach(share).map_err(|error| error.to_string())?;
        allocations.push(attached);
    }
    let base = |region: &RegionAddress| match region.place {
        Place::Host => Ok(None),
        Place::Device => Err("the peer's device memory is of a kind that cannot be shared".into()),
        Place::Shared { share, offset } => {
            let allocation: Option<&Arc<dyn Attached>> = allocations.get(share as usize);
            let allocation = allocation.ok_or("the peer names an allocation that is not there")?;
            let end = offset.checked_add(region.len);
            if end.is_none_or(|end| end > allocation.len()) {
                return Err(format!(
                    "the peer's region of {} bytes at {offset} does not fit its allocation of {}",
                    region.len,
                    allocation.len()
                ));
            }
            Ok(Some(allocation.address() + offset))
        }
    };
    let bases = agreement.regions.iter().map(base);
    Ok(AttachedRegions {
        bases: bases.collect::<Result<_, String>>()?,
        _allocations: allocations,
    })
}

impl Hub {
    /// Whether one side's bytes of a component lie on our device, wholly or in part.
    pub(crate) fn is_on_device(&self, pairing: &Pairing, component: usize, end: End) -> bool {
        let paired = pairing.components.get(component);
        let is_ours = |region: RegionId| {
            let region = self.region(region);
            region.is_some_and(|region| region.on_device().is_some())
        };
        self.devices.device().is_some()
            && paired.is_some_and(|paired| {
                let mut pieces = paired.pieces().iter();
                pieces.any(|piece| is_ours(piece.side(end).region))
            })
    }
}

impl Hub {
    /// Whether all of one side's bytes of a component lie on our device.
    pub(crate) fn is_all_on_device(&self, pairing: &Pairing, component: usize, end: End) -> bool {
        let paired = pairing.components.get(component);
        let is_ours = |region: RegionId| {
            let region = self.region(region);
            region.is_some_and(|region| region.on_device().is_some())
        };
        paired.is_some_and(|paired| {
            let mut pieces = paired.pieces().iter();
            pieces.all(|piece| is_ours(piece.side(end).region))
        })
    }
}

impl Link {
    /// The peer's device memory; taken into use at the first call.
    pub(super) fn peer_memory(&self, hub: &Hub) -> PeerMemory {
        let known = self.peer_memory.get_or_init(|| {
            let memory = attach(hub, &self.agreement);
            if let PeerMemory::Refused(reason) = &memory {
                tracing::info!(peer = %self.peer, reason, "device memory is staged for this peer");
            }
            memory
        });
        known.clone()
    }
}
