//! Opening rails, and making queue pairs: out of band ([`Prepared::connect`]) or through `rdma_cm` ([`Prepared::dial`],
//! [`Listening`]).
#![expect(unsafe_code, reason = "registers memory that peers write")]

use std::{
    collections::VecDeque,
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    Rail, Rails,
    address::{interface_of, ipv4_of},
    arrive::receive_id,
    buffers::Buffers,
    credits::Credits,
    lane::{Connection, LaneIo, Phase, QueuePairLane, Side, Terms, Wires},
    requests::{Key, Request},
    targets::Targets,
    thread::{Core, WAKE},
};
use crate::{
    clock,
    config::RdmaConfig,
    engine::{hub::Hub, link::Link},
    ids::LaneId,
    memory::Region,
    plan::descriptor::Descriptor,
    time::Time,
    transfer::LaneSetup,
    transport::verbs::{
        chain::{CHAIN_WRS_MAX, Chain},
        cm::{CmEvent, CmId, EventChannel, PrivateData},
        context::Context,
        cq::Cq,
        device::{self, Transport},
        library::Library,
        mr::{Access, CHUNK_BYTES_MAX, RegisteredRegion},
        pd::Pd,
        probe,
        qp::{LocalPath, PSN_MASK, Qp, QpAddress, QpCaps},
        select::{Candidate, Chosen, HostLimits, IbDevice, choose},
        slots::Slots,
        sys,
    },
    wire::{
        control::ControlDecoder,
        lane::PayloadMode,
        rdma::{Connector, Endpoint, Frame, QpEnd, QpTerms, RAILS_MAX, RKEYS_MAX, RailOffer},
    },
};

/// The port that is used of a device; eRDMA devices have one, and others name their ports as devices of their own.
const PORT: u8 = 1;

/// Receives of one queue pair: the batches of a peer's window, the answers to ours, and some.
const RECEIVES: u16 = 64;

/// First word of the private data of a connection request: "KVTQ".
const REQUEST_MAGIC: [u8; 4] = *b"KVTQ";

/// Requests that may wait at a listener that expects one.
const BACKLOG: u16 = 8;

/// How long the passive side of an rdma_cm connection is given to resolve its peer.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(2);

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
        let candidates = candidates(library)?;
        let limits = HostLimits {
            memlock: crate::transport::verbs::error::memlock_limit(),
            has_cm: library.cm().is_ok(),
        };
        let chosen = choose(&setting, config.gpu, &candidates, limits, |_| None);
        let chosen = chosen.map_err(|error| error.to_string())?;
        let rails = (0..).zip(chosen.into_iter().take(RAILS_MAX));
        let rails = rails.map(|(number, chosen)| {
            Rail::open(config, library, number, &chosen, &candidates, memory)
                .map_err(|error| format!("{}: {error}", chosen.name))
        });
        Ok(Self {
            rails: rails.collect::<Result<_, _>>()?,
            refusal: String::new(),
        })
    }
}

/// Every device of the host with what the choice needs to know.
fn candidates(library: &Arc<Library>) -> Result<Vec<Candidate>, String> {
    let devices = device::list(library).map_err(|error| error.to_string())?;
    let candidates = devices.into_iter().map(|info| {
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
        number: u8,
        chosen: &Chosen,
        candidates: &[Candidate],
        memory: &[Arc<Region>],
    ) -> Result<Arc<Self>, String> {
        let words = |error: crate::transport::verbs::error::VerbsError| error.to_string();
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
        let regions = memory.iter().map(|region| register(&pd, region));
        let regions = regions.collect::<Result<Vec<_>, _>>()?;
        let keys = regions.iter().flatten().map(|region| region.rkeys().len());
        if keys.sum::<usize>() > RKEYS_MAX {
            return Err(format!(
                "the memory has more than {RKEYS_MAX} chunks; use fewer, larger regions"
            ));
        }
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
            number,
            connector,
            settings: config.clone(),
            pd,
            regions,
            _memory: memory.to_vec(),
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
            is_over: AtomicBool::new(false),
            drivers: AtomicU32::new(0),
            core: Mutex::new(Core::default()),
            context,
        });
        let worker = Arc::clone(&rail);
        let name = format!("kvt-rail-{}", rail.name);
        let started = std::thread::Builder::new()
            .name(name)
            .spawn(move || worker.run(poll));
        started.map_err(|error| format!("no thread for the rail: {error}"))?;
        tracing::info!(
            rail = rail.name, connector = connector.name(), address = %rail.address,
            sge = rail.capabilities.send_sge.value, inline = rail.capabilities.inline_bytes.value,
            imm = rail.capabilities.immediate.value, "rail opened"
        );
        Ok(rail)
    }

    pub(super) fn stop(&self) {
        self.is_stopped.store(true, Ordering::SeqCst);
        let _ = self.waker.wake();
    }

    fn caps(&self) -> QpCaps {
        QpCaps {
            max_send_wr: self.send_queue,
            max_recv_wr: RECEIVES.into(),
            max_send_sge: self.capabilities.send_sge.value,
            max_inline_bytes: self.capabilities.inline_bytes.value,
            wr_bytes_max: self.capabilities.wr_bytes_max.value,
        }
    }

    fn is_inline(&self) -> bool {
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

fn address_of(library: &Library, candidate: &Candidate, chosen: &Chosen) -> Option<Ipv4Addr> {
    let by_gid = chosen.gid.as_ref().and_then(device::GidEntry::ipv4);
    by_gid.or_else(|| {
        let interfaces = candidate.gids.iter().filter_map(|gid| {
            let named = gid.netdev.clone();
            named.or_else(|| interface_of(&library.sysfs, gid.gid))
        });
        interfaces.filter_map(|name| ipv4_of(library, &name)).next()
    })
}

/// A queue pair that is not the rail's yet. Dropping it destroys it.
pub(crate) struct Prepared {
    rail: Arc<Rail>,
    key: Key,
    /// Until they are the queue pair's.
    buffers: Option<Buffers>,
    slots: (u64, u32),
    wires: Option<Wires>,
    psn: u32,
}

/// What a queue pair is handed over with.
pub(crate) struct QpParts {
    pub(crate) hub: Arc<Hub>,
    pub(crate) link: Arc<Link>,
    pub(crate) lane: LaneId,
    pub(crate) socket: OwnedFd,
    pub(crate) decoder: ControlDecoder,
    /// The peer's end.
    pub(crate) terms: QpTerms,
    /// Which of the peer's rails it is on.
    pub(crate) offer: RailOffer,
    pub(crate) is_active: bool,
    pub(crate) path_reason: String,
    /// When it must have said hello.
    pub(crate) until: Time,
    /// Told when it has, or has failed.
    pub(crate) opened: Option<crossbeam_channel::Sender<Result<(), String>>>,
}

impl Prepared {
    /// A queue pair to be connected out of band.
    ///
    /// # Errors
    /// The device's answer, in words.
    pub(crate) fn compat(rail: &Arc<Rail>) -> Result<Self, String> {
        let words = |error: crate::transport::verbs::error::VerbsError| error.to_string();
        let mut prepared = Self::reserve(rail)?;
        let caps = rail.caps();
        let cq = Cq::create(&rail.context, caps.completions(), true, prepared.key.place)
            .map_err(words)?;
        let mut qp = Qp::create(&rail.pd, &cq, &cq, caps).map_err(words)?;
        qp.enter_init(PORT).map_err(words)?;
        prepared.fill(qp, None, cq)?;
        Ok(prepared)
    }

    fn reserve(rail: &Arc<Rail>) -> Result<Self, String> {
        let psn = crate::engine::hub::random().map_err(|error| error.to_string())?;
        let sends = u16::try_from(rail.send_queue).unwrap_or(u16::MAX);
        let buffers = Buffers::new(&rail.pd, RECEIVES, sends).map_err(|e| e.to_string())?;
        Ok(Self {
            rail: Arc::clone(rail),
            key: rail.lock().reserve(),
            slots: buffers.slots(),
            buffers: Some(buffers),
            wires: None,
            psn: u32::from_le_bytes(psn) & PSN_MASK,
        })
    }

    /// Adds frames' memory and posts every receive: the peer may send as soon as it is connected.
    fn fill(
        &mut self,
        mut qp: Qp,
        connection: Option<Connection>,
        cq: Arc<Cq>,
    ) -> Result<(), String> {
        let buffers = self.buffers.take().ok_or("a queue pair is made once")?;
        for index in 0..RECEIVES {
            let (address, bytes, lkey) = buffers.receive(index);
            let id = receive_id(self.key.life, index);
            qp.post_recv(id, address, bytes, lkey)
                .map_err(|e| e.to_string())?;
        }
        self.wires = Some(Wires {
            qp,
            connection,
            cq,
            buffers,
        });
        Ok(())
    }

    /// What the peer must know of this end.
    pub(crate) fn terms(&self) -> QpTerms {
        let rail = &self.rail;
        let end = match rail.connector {
            Connector::Compat => QpEnd::Compat(self.endpoint()),
            Connector::Standard => QpEnd::Standard {
                address: rail.address.octets(),
                port: 0,
                token: 0,
            },
        };
        terms(end, self.slots)
    }

    fn endpoint(&self) -> Endpoint {
        let rail = &self.rail;
        Endpoint {
            qpn: self.wires.as_ref().map_or(0, |wires| wires.qp.qp_num()),
            psn: self.psn,
            gid: rail.gid.as_ref().map_or([0; 16], |gid| gid.gid),
            lid: rail.lid,
            mtu: u8::try_from(rail.mtu).unwrap_or(1).clamp(1, 5),
        }
    }

    /// Connects it to the peer's end. On eRDMA both directions work at once; elsewhere this end may send when the peer has
    /// done the same.
    ///
    /// # Errors
    /// The device's answer, in words.
    pub(crate) fn connect(&mut self, peer: &Endpoint) -> Result<(), String> {
        let rail = &self.rail;
        let gid_index = rail.gid.as_ref().map_or(0, |gid| gid.index);
        let path = LocalPath {
            port: PORT,
            gid_index,
            mtu: rail.mtu.min(peer.mtu.into()),
            psn: self.psn,
        };
        let to = QpAddress {
            gid: peer.gid,
            lid: peer.lid,
            qp_num: peer.qpn,
            psn: peer.psn,
        };
        let wires = self.wires.as_mut().ok_or("the queue pair is gone")?;
        let connected = wires
            .qp
            .enter_rtr(&path, &to)
            .and_then(|()| wires.qp.enter_rts(&path));
        connected.map_err(|error| format!("{}: {error}", rail.name))
    }

    /// Before the peer's listener is known: nothing but a place.
    ///
    /// # Errors
    /// No memory for frames.
    pub(crate) fn standard(rail: &Arc<Rail>) -> Result<Self, String> {
        Self::reserve(rail)
    }

    /// Connects through rdma_cm to where the peer listens. Blocks until `deadline` at most.
    ///
    /// # Errors
    /// What rdma_cm said, in words.
    pub(crate) fn dial(
        &mut self,
        address: [u8; 4],
        port: u16,
        token: u64,
        deadline: Time,
    ) -> Result<(), String> {
        let rail = Arc::clone(&self.rail);
        let fail =
            |error: crate::transport::verbs::error::VerbsError| format!("{}: {error}", rail.name);
        let channel = EventChannel::open(rail.context.library()).map_err(fail)?;
        let mut id = CmId::create(&channel).map_err(fail)?;
        let from = SocketAddr::from((rail.address, 0));
        let to = SocketAddr::from((address, port));
        id.resolve_addr(Some(from), to, RESOLVE_TIMEOUT)
            .map_err(fail)?;
        await_event(&channel, sys::RDMA_CM_EVENT_ADDR_RESOLVED, deadline)?;
        id.resolve_route(RESOLVE_TIMEOUT).map_err(fail)?;
        await_event(&channel, sys::RDMA_CM_EVENT_ROUTE_RESOLVED, deadline)?;
        self.make(&mut id)?;
        id.connect(&request_data(token).map_err(fail)?)
            .map_err(fail)?;
        await_event(&channel, sys::RDMA_CM_EVENT_ESTABLISHED, deadline)?;
        self.keep(id, channel);
        Ok(())
    }

    /// Makes the queue pair of an rdma_cm id.
    fn make(&mut self, id: &mut CmId) -> Result<(), String> {
        let (rail, caps) = (Arc::clone(&self.rail), self.rail.caps());
        let words = |error: crate::transport::verbs::error::VerbsError| error.to_string();
        let cq =
            Cq::create(&rail.context, caps.completions(), true, self.key.place).map_err(words)?;
        let qp = id.create_qp(&rail.pd, &cq, &cq, caps).map_err(words)?;
        self.fill(qp, None, cq)
    }

    fn keep(&mut self, id: CmId, channel: Arc<EventChannel>) {
        if let Some(wires) = &mut self.wires {
            wires.connection = Some(Connection { id, channel });
        }
    }

    /// Gives the queue pair to the rail's thread, after `known` has made its handle known.
    ///
    /// # Errors
    /// It is not connected.
    pub(crate) fn adopt(
        mut self,
        parts: QpParts,
        known: impl FnOnce(&Arc<QueuePairLane>),
    ) -> Result<Arc<QueuePairLane>, String> {
        let wires = self.wires.take().ok_or("the queue pair is not connected")?;
        let rail = Arc::clone(&self.rail);
        let handle = Arc::new(QueuePairLane {
            id: parts.lane,
            key: self.key,
            rail: Arc::clone(&rail),
            kicked: AtomicBool::new(false),
            over: AtomicBool::new(false),
        });
        let lane = lane_io(&rail, &handle, wires, parts);
        known(&handle);
        rail.request(Request::Adopt(Box::new(lane)));
        // The place is the lane's now.
        self.key.life = self.key.life.wrapping_sub(1);
        Ok(handle)
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        self.wires = None;
        self.rail.lock().release(self.key);
    }
}

fn lane_io(rail: &Arc<Rail>, handle: &Arc<QueuePairLane>, wires: Wires, parts: QpParts) -> LaneIo {
    let (now, config) = (clock::now(), &rail.settings);
    let ours = rail.offers_immediate();
    let setup = LaneSetup {
        mode: PayloadMode::Write,
        path: "verbs",
        path_reason: parts.path_reason,
        batch_bytes: config.batch_bytes,
        window: config.window,
    };
    let terms = Terms {
        setup,
        targets: Targets::new(&parts.link.agreement.regions, &parts.offer),
        slots: (ours && parts.offer.imm).then_some(parts.terms.slots),
        peer_receives: parts.terms.receives,
        message_bytes_max: rail
            .capabilities
            .wr_bytes_max
            .value
            .min(parts.offer.message_bytes_max),
        peer_chunk_bytes: parts.offer.chunk_bytes,
        is_active: parts.is_active,
    };
    let sges_max = rail.capabilities.send_sge.value as usize;
    LaneIo {
        handle: Arc::clone(handle),
        _alive: parts.hub.lane_alive(),
        hub: parts.hub,
        peer: parts.link.peer,
        link: Arc::downgrade(&parts.link),
        wires: Some(wires),
        side: Side {
            socket: parts.socket,
            decoder: parts.decoder,
            peer_is_down: false,
            peer_reason: String::new(),
        },
        phase: Phase::Greeting {
            is_active: parts.is_active,
            has_spoken: false,
            until: parts.until,
        },
        is_closing: false,
        answer_hello: None,
        answered: 0,
        answers: VecDeque::new(),
        peer_answers: None,
        credits: Credits::new(terms.peer_receives, RECEIVES),
        sends: Slots::new(rail.send_queue, rail.send_queue, handle.key.life << 1),
        chain: Chain::new(CHAIN_WRS_MAX, sges_max, terms.message_bytes_max),
        descriptors: vec![Descriptor::EMPTY; CHAIN_WRS_MAX * 2].into(),
        descriptor_at: 0,
        descriptor_end: 0,
        writing: None,
        acks: VecDeque::new(),
        is_inline: rail.is_inline(),
        sges_max,
        frames_sent: 0,
        given: 0,
        acked: 0,
        reaped: 0,
        reported: 0,
        last_sent: now,
        last_heard: now,
        last_active: now,
        last_timed: now,
        is_armed: false,
        opened: parts.opened,
        terms,
    }
}

/// Waits for one connection through rdma_cm, on a port of its own that only the peer is told.
pub(crate) struct Listening {
    prepared: Prepared,
    channel: Arc<EventChannel>,
    listener: CmId,
    token: u64,
}

impl Listening {
    /// Listens on the rail's address.
    ///
    /// # Errors
    /// What rdma_cm said, in words.
    pub(crate) fn start(rail: &Arc<Rail>) -> Result<Self, String> {
        let fail =
            |error: crate::transport::verbs::error::VerbsError| format!("{}: {error}", rail.name);
        let token = crate::engine::hub::random().map_err(|error| error.to_string())?;
        let channel = EventChannel::open(rail.context.library()).map_err(fail)?;
        let mut listener = CmId::create(&channel).map_err(fail)?;
        listener
            .bind(SocketAddr::from((rail.address, 0)))
            .map_err(fail)?;
        listener.listen(BACKLOG).map_err(fail)?;
        Ok(Self {
            prepared: Prepared::reserve(rail)?,
            channel,
            listener,
            token: u64::from_le_bytes(token),
        })
    }

    /// What the peer must know.
    pub(crate) fn terms(&self) -> QpTerms {
        let end = QpEnd::Standard {
            address: self.prepared.rail.address.octets(),
            port: self.listener.local_port(),
            token: self.token,
        };
        terms(end, self.prepared.slots)
    }

    /// Takes the announced connection, and no other.
    ///
    /// # Errors
    /// It did not come until `deadline`, or the device's answer.
    pub(crate) fn accept(mut self, deadline: Time) -> Result<Prepared, String> {
        let name = self.prepared.rail.name.clone();
        let fail = |error: crate::transport::verbs::error::VerbsError| format!("{name}: {error}");
        let mut id = loop {
            let event = next_event(&self.channel, deadline)?;
            let expected = request_data(self.token).map_err(fail)?;
            if event.kind == sys::RDMA_CM_EVENT_CONNECT_REQUEST
                && let Some(id) = event.request
            {
                if event.private_data.as_ref().map(PrivateData::as_slice)
                    == Some(expected.as_slice())
                {
                    break id;
                }
                tracing::info!(rail = name, "a connection request that nobody announced");
                id.reject(&PrivateData::new(b"").map_err(fail)?)
                    .map_err(fail)?;
            }
        };
        self.prepared.make(&mut id)?;
        id.accept(&request_data(self.token).map_err(fail)?)
            .map_err(fail)?;
        await_event(&self.channel, sys::RDMA_CM_EVENT_ESTABLISHED, deadline)?;
        self.prepared.keep(id, self.channel);
        Ok(self.prepared)
    }
}

fn terms(end: QpEnd, slots: (u64, u32)) -> QpTerms {
    QpTerms {
        end,
        receives: RECEIVES,
        slots,
    }
}

/// What the private data of an announced connection holds: far below the 56 bytes that every transport carries.
fn request_data(token: u64) -> Result<PrivateData, crate::transport::verbs::error::VerbsError> {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&REQUEST_MAGIC);
    bytes[4..].copy_from_slice(&token.to_le_bytes());
    PrivateData::new(&bytes)
}

fn next_event(channel: &Arc<EventChannel>, deadline: Time) -> Result<CmEvent, String> {
    loop {
        if let Some(event) = channel.next_event().map_err(|error| error.to_string())? {
            return Ok(event);
        }
        let left = deadline.since(clock::now());
        if left.is_zero() {
            return Err("rdma_cm did not answer in time".into());
        }
        let wait = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let fd = channel.fd();
        let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
        let _ = poll(&mut fds, Some(&wait));
    }
}

fn await_event(channel: &Arc<EventChannel>, wanted: u32, deadline: Time) -> Result<(), String> {
    let event = next_event(channel, deadline)?;
    if event.kind == wanted {
        return Ok(());
    }
    let (words, status) = (event.words(), event.status);
    Err(format!("rdma_cm: {words} (status {status})"))
}
