//! Opening rails: which devices, what they can do, and the engine's memory registered with each.
#![expect(unsafe_code, reason = "registers memory that peers write")]

use std::{
    net::Ipv4Addr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use super::{
    PORT, Rail, Rails, Slot,
    address::{interface_of, ipv4_of},
    counters::Counters,
    prepare::RECEIVES,
    thread::{Core, WAKE},
};
use crate::{
    config::RdmaConfig,
    gpu::verdict::{GpuDirect, GpuRange},
    memory::{
        Region,
        device::{Device, Visibility},
    },
    transport::verbs::{
        context::Context,
        device::{self, Transport},
        error::{VerbsError, memlock_limit},
        library::Library,
        mr::{Access, CHUNK_BYTES_MAX, RegisteredRegion},
        pd::Pd,
        probe,
        qp::QpCaps,
        select::{Candidate, Chosen, HostLimits, IbDevice, choose},
    },
    wire::rdma::{Connector, Frame, RAILS_MAX, RKEYS_MAX},
};

impl Rails {
    /// Opens the devices that the configuration names, and registers the engine's memory with each.
    ///
    /// # Errors
    /// A sentence that says what is missing and how to get it.
    pub(crate) fn open(
        config: &RdmaConfig,
        library: &Arc<Library>,
        memory: &[Arc<Region>],
    ) -> Result<Self, String> {
        let text = if IbDevice::is_file(&config.devices) {
            std::fs::read_to_string(&config.devices)
                .map_err(|error| format!("ib_device file {}: {error}", config.devices))?
        } else {
            config.devices.clone()
        };
        let setting = IbDevice::parse(&text).map_err(|error| error.to_string())?;
        let limits = HostLimits {
            memlock: memlock_limit(),
            has_cm: library.cm().is_ok(),
        };
        let choose_among = |candidates: &[Candidate]| {
            choose(&setting, config.gpu, candidates, limits, |name| {
                candidates
                    .iter()
                    .find(|known| known.name == name)
                    .and_then(|candidate| interface_address(library, candidate))
            })
            .map_err(|error| error.to_string())
        };
        // Opening a device costs time and memory, so at first only those that are named are asked. The refusal of one that is
        // not there or not usable describes all of them.
        let named = setting
            .for_gpu(config.gpu)
            .map_err(|error| error.to_string())?;
        let mut candidates = candidates(library, named)?;
        let chosen = match choose_among(&candidates) {
            Ok(chosen) => chosen,
            Err(_) if named.is_some() => {
                candidates = self::candidates(library, None)?;
                choose_among(&candidates)?
            }
            Err(refused) => return Err(refused),
        };
        let exports = Exports::new(memory);
        let rails = chosen.into_iter().take(RAILS_MAX).map(|chosen| {
            Rail::open(config, library, &chosen, &candidates, &exports)
                .map_err(|error| format!("{}: {error}", chosen.name))
        });
        Self::new(rails.collect::<Result<_, _>>()?)
    }
}

/// The named devices of the host, or all of them, with what the choice needs to know.
fn candidates(library: &Arc<Library>, named: Option<&[String]>) -> Result<Vec<Candidate>, String> {
    let devices = device::list(library).map_err(|error| error.to_string())?;
    let asked = |name: &String| named.is_none_or(|named| named.contains(name));
    let devices = devices.into_iter().filter(|info| asked(&info.name));
    let candidates = devices.map(|info| {
        let port = Context::open(library, &info.name).and_then(|context| context.port(PORT));
        let gids = device::gids(&library.sysfs, &info.name, PORT);
        Candidate {
            transport: info.transport,
            port_state: port.as_ref().ok().map(|port| port.state),
            link_layer: port.as_ref().map_or(0, |port| port.link_layer),
            gids,
            name: info.name,
        }
    });
    Ok(candidates.collect())
}

impl Rail {
    fn open(
        config: &RdmaConfig,
        library: &Arc<Library>,
        chosen: &Chosen,
        candidates: &[Candidate],
        memory: &Exports<'_>,
    ) -> Result<(Arc<Self>, mio::Poll), String> {
        let words = |error: VerbsError| error.to_string();
        let candidate = candidates.iter().find(|known| known.name == chosen.name);
        let candidate = candidate.ok_or("it has gone")?;
        let connector = connector_of(config, candidate.transport)?;
        let context = match connector {
            Connector::Standard => Context::open_for_cm(library, &chosen.name),
            Connector::Compat => Context::open(library, &chosen.name),
        };
        let context = context.map_err(words)?;
        let capabilities = probe::capabilities(&context, PORT).map_err(words)?;
        let (port, limits) = (
            context.port(PORT).map_err(words)?,
            context.limits().map_err(words)?,
        );
        let pd = Pd::create(&context).map_err(words)?;
        let Registered {
            regions,
            staged,
            verdicts,
        } = Registered::all(&pd, memory)?;
        let poll = mio::Poll::new().map_err(|error| error.to_string())?;
        let waker = mio::Waker::new(poll.registry(), WAKE).map_err(|error| error.to_string())?;
        let address = address_of(library, candidate, chosen);
        if connector == Connector::Standard && address.is_none() {
            return Err(
                "its network interface has no IPv4 address, which rdma_cm connects by".into(),
            );
        }
        let rail = Arc::new(Self {
            name: chosen.name.clone(),
            connector,
            settings: config.clone(),
            pd,
            regions,
            staged,
            verdicts,
            flushed: Arc::clone(&memory.flushed),
            _memory: memory.regions.to_vec(),
            chunk_bytes: CHUNK_BYTES_MAX,
            capabilities,
            gid: chosen.gid.clone(),
            address: address.unwrap_or(Ipv4Addr::UNSPECIFIED),
            mtu: port.active_mtu,
            lid: port.lid,
            send_queue: config.send_queue.min(limits.max_qp_wr.max(1)),
            requests: Mutex::default(),
            waker,
            is_asleep: AtomicBool::new(false),
            is_stopped: AtomicBool::new(false),
            is_lost: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
            driver: AtomicU32::new(0),
            is_near: AtomicBool::new(false),
            counters: Counters::default(),
            core: Mutex::new(Core::default()),
            context,
        });
        tracing::info!(
            rail = rail.name, connector = connector.name(), address = %rail.address,
            sge = rail.capabilities.send_sge.value, inline = rail.capabilities.inline_bytes.value,
            imm = rail.capabilities.immediate.value, "rail opened"
        );
        Ok((rail, poll))
    }

    /// Starts its thread. When that ends because the device is lost, it empties the slot: with its last user the rail's
    /// memory is deregistered and its device closed, which whoever takes the device away waits for.
    pub(super) fn start(self: Arc<Self>, poll: mio::Poll) -> Result<Arc<Slot>, String> {
        let name = format!("kvt-rail-{}", self.name);
        let slot = Arc::new(Slot::new(Some(Arc::clone(&self))));
        let ours = Arc::clone(&slot);
        let run = move || {
            self.run(poll);
            if self.is_lost.load(Ordering::SeqCst) {
                *ours.lock().unwrap_or_else(PoisonError::into_inner) = None;
            }
        };
        let started = std::thread::Builder::new().name(name).spawn(run);
        started.map_err(|error| format!("no thread for the rail: {error}"))?;
        Ok(slot)
    }

    pub(super) fn stop(&self) {
        self.is_stopped.store(true, Ordering::SeqCst);
        let _ = self.waker.wake();
    }

    pub(super) fn caps(&self) -> QpCaps {
        QpCaps {
            max_send_wr: self.send_queue,
            max_recv_wr: RECEIVES.into(),
            max_send_sge: self.capabilities.send_sge.value,
            max_inline_bytes: self.capabilities.inline_bytes.value,
            wr_bytes_max: self.capabilities.wr_bytes_max.value,
        }
    }

    pub(super) fn is_inline(&self) -> bool {
        self.capabilities.inline_bytes.value as usize >= Frame::LEN_MAX
    }
}

/// As the device's transport asks for, or the configuration says.
fn connector_of(config: &RdmaConfig, transport: Transport) -> Result<Connector, String> {
    let by_device = match transport {
        Transport::Iwarp => Connector::Standard,
        Transport::Ib | Transport::Other(_) => Connector::Compat,
    };
    match config.connector {
        Some(Connector::Compat) if transport == Transport::Iwarp => Err(
            "an iWARP device connects through rdma_cm only; leave the connector to the device"
                .into(),
        ),
        chosen => Ok(chosen.unwrap_or(by_device)),
    }
}

/// An engine's memory on its way to registrations: what lies on a device is exported once, for every rail.
struct Exports<'a> {
    regions: &'a [Arc<Region>],
    /// By region; `None` for host memory.
    ranges: Vec<Option<GpuRange>>,
    /// The device that some rail reaches and whose kernels see what was written only after a flush. The last batch of a room
    /// may come over another rail than those before it, so all rails share it.
    flushed: Arc<OnceLock<Arc<dyn Device>>>,
}

impl<'a> Exports<'a> {
    fn new(regions: &'a [Arc<Region>]) -> Self {
        let export = |region: &Arc<Region>| {
            let device = region.on_device().filter(|_| region.len() > 0)?;
            let (address, len) = (region.base_address(), region.len() as u64);
            Some(GpuRange::of(&**device, address, len))
        };
        let ranges = regions.iter().map(export).collect();
        Self {
            regions,
            ranges,
            flushed: Arc::default(),
        }
    }
}

/// An engine's memory, registered with one RDMA device as far as that reaches it.
#[derive(Default)]
struct Registered {
    regions: Vec<Option<RegisteredRegion>>,
    staged: Vec<u32>,
    /// Of a device's memory, by each path that was taken the first.
    verdicts: Vec<GpuDirect>,
}

impl Registered {
    fn all(pd: &Arc<Pd>, memory: &Exports<'_>) -> Result<Self, String> {
        let mut all = Self::default();
        for (number, (region, range)) in (0..).zip(memory.regions.iter().zip(&memory.ranges)) {
            let Some(range) = range else {
                all.regions.push(register(pd, region)?);
                continue;
            };
            // SAFETY: the rail keeps the region, and with it the allocation, for longer than the registration.
            let (registered, verdict) = unsafe { range.register(pd, Access::WriteTarget) };
            if registered.is_none() {
                all.staged.push(number);
            } else if let Some(device) = region.on_device()
                && device.visibility() == Visibility::AfterFlush
            {
                memory.flushed.get_or_init(|| Arc::clone(device));
            }
            all.regions.push(registered);
            if all.verdicts.iter().all(|known| known.path != verdict.path) {
                all.verdicts.push(verdict);
            }
        }
        let regions = all.regions.iter().flatten();
        if regions.map(|region| region.rkeys().len()).sum::<usize>() > RKEYS_MAX {
            return Err(format!(
                "the memory has more than {RKEYS_MAX} chunks; use fewer, larger regions"
            ));
        }
        Ok(all)
    }
}

/// Registers a region with a device, in chunks.
fn register(pd: &Arc<Pd>, region: &Arc<Region>) -> Result<Option<RegisteredRegion>, String> {
    let len = region.len() as u64;
    if len == 0 {
        return Ok(None);
    }
    let (base, access) = (region.base_address(), Access::WriteTarget);
    // SAFETY: the rail keeps the region alive for longer than the registration; nobody forms references to bytes of a
    // region, which is why peers may write it at any time.
    let registered = unsafe { RegisteredRegion::register(pd, base, len, CHUNK_BYTES_MAX, access) };
    match registered {
        Ok(registered) => Ok(Some(registered)),
        Err(error) => Err(format!("registering {len} bytes at {base:#x}: {error}")),
    }
}

/// The address to connect by: that of the chosen GID, else that of the interface behind the device.
fn address_of(library: &Library, candidate: &Candidate, chosen: &Chosen) -> Option<Ipv4Addr> {
    let by_gid = chosen.gid.as_ref().and_then(device::GidEntry::ipv4);
    by_gid.or_else(|| interface_address(library, candidate))
}

/// The IPv4 address of the network interface behind a device.
fn interface_address(library: &Library, candidate: &Candidate) -> Option<Ipv4Addr> {
    let interfaces = candidate.gids.iter().filter_map(|gid| {
        let named = gid.netdev.clone();
        named.or_else(|| interface_of(&library.sysfs, gid.gid))
    });
    interfaces.filter_map(|name| ipv4_of(library, &name)).next()
}
