//! How a device behaves where devices differ: every difference is a field, and a preset is a set of fields.
#![forbid(unsafe_code)]

/// How a send queue counts what it holds and when it lets go of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendQueueRule {
    /// eRDMA's user provider: space is counted in 32-byte blocks, a work request takes one to four of them, "full" is
    /// tested before the request's size is known (so the queue *can* overrun), and space comes back only when a
    /// signalled completion is polled.
    Blocks,
    /// mlx5: space is counted in work requests, and comes back only when a signalled completion is polled.
    Requests,
    /// siw and rxe: space comes back as soon as a work request has been executed, signalled or not. This hides bugs.
    Lenient,
}

/// What connects queue pairs out of band, through `ibv_modify_qp` alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutOfBand {
    /// RoCE: INIT, RTR and RTS each do what the specification says, and the attribute masks are checked.
    Full,
    /// eRDMA "compat": INIT does nothing, RTR already moves the hardware to RTS, RTS and RESET do nothing.
    ReadyAtRtr,
    /// siw: RTR fails with this errno (61, ENODATA).
    RefusedAtRtr(i32),
    /// eRDMA "standard": RTR says yes and does nothing, RTS fails with this errno (22, EINVAL).
    RefusedAtRts(i32),
}

/// What the sender of a WRITE that the target's memory refuses gets to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedWrite {
    /// iWARP: the WRITE completes with success; then the connection dies.
    Silent,
    /// RoCE: `IBV_WC_REM_ACCESS_ERR`, then the rest is flushed.
    RemoteAccess,
}

/// What a message does that finds no posted receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmptyReceive {
    /// iWARP and eRDMA: no RNR. The sender's message completes with success and the connection dies.
    Kills,
    /// RoCE: the sender waits and retries; with `rnr_retry` 7 for ever, with less until the retries are used up.
    Retries,
}

/// What `ibv_reg_dmabuf_mr` answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaBuf {
    /// Imports the buffer: an open fd is accepted, a bad one is EBADF (which is how a probe recognises support).
    Supported,
    /// The provider has no such operation: EOPNOTSUPP.
    NotSupported,
    /// A provider that knows the call and refuses the buffer: EINVAL.
    Invalid,
}

/// What `librdmacm` does on these devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CmRules {
    /// Most bytes of private data in `rdma_connect`, bytes; more is EINVAL.
    pub connect_private_max: u8,
    /// Most bytes of private data in `rdma_accept`, bytes.
    pub accept_private_max: u8,
    /// Most bytes of private data in `rdma_reject`, bytes.
    pub reject_private_max: u8,
    /// True on InfiniBand and RoCE: the other side always sees the full size, zero-padded. On iWARP it sees exactly
    /// the bytes that were sent.
    pub pads_private: bool,
    /// True on eRDMA "standard": a passive side that sends before the active side has taken its ESTABLISHED event
    /// kills the connect.
    pub passive_first_kills: bool,
}

/// How a device behaves. Build one from a preset and change the fields that a test is about.
#[derive(Clone, Debug)]
pub struct Behaviour {
    /// Devices are named `<this>_0`, `<this>_1`, ….
    pub name_stem: &'static str,
    /// The kernel driver that sysfs names.
    pub driver: &'static str,
    /// `vendor_id` of `ibv_query_device`.
    pub vendor_id: u32,
    /// `vendor_part_id` of `ibv_query_device`.
    pub part_id: u32,
    /// True: `transport_type` IWARP and `node_type` RNIC, otherwise IB and CA.
    pub looks_iwarp: bool,
    /// Index of the IPv4-mapped RoCE v2 GID on the first device; the next device has it one lower or higher, so that a
    /// hard-coded index fails. `None`: one GID, the MAC in its first bytes.
    pub roce_gid_index: Option<u32>,
    /// How send queues count.
    pub send_queue: SendQueueRule,
    /// `max_sge` as `ibv_query_device` reports it.
    pub reported_sge_max: u32,
    /// Scatter/gather entries that a send work request may really have.
    pub send_sge_max: u32,
    /// Scatter/gather entries that a receive may have.
    pub recv_sge_max: u32,
    /// True: a READ uses its first entry and ignores the others.
    pub read_uses_first_sge: bool,
    /// True: the sink of a READ must be remotely writable (strict iWARP).
    pub read_sink_needs_remote_write: bool,
    /// Most inline bytes of a work request; `create_qp` refuses more.
    pub inline_max: u32,
    /// Most work requests of a send or receive queue.
    pub queue_depth_max: u32,
    /// Smallest receive queue that `create_qp` accepts, work requests (eRDMA: 1).
    pub recv_depth_min: u32,
    /// Most bytes of one message, as the port reports them.
    pub message_bytes_max: u32,
    /// Most bytes of one memory region.
    pub region_bytes_max: u64,
    /// Most bytes that may be registered on a device, as a memlock limit would have it (ENOMEM). `None`: no limit.
    pub locked_bytes_max: Option<u64>,
    /// True: posting returns negative errno values (eRDMA, siw).
    pub negative_errno: bool,
    /// True: WRITE_WITH_IMM and SEND_WITH_IMM exist; otherwise posting them is EINVAL.
    pub immediate: bool,
    /// Out-of-band connecting.
    pub out_of_band: OutOfBand,
    /// `librdmacm`; `None`: it is not there (its table is absent).
    pub cm: Option<CmRules>,
    /// What a refused WRITE looks like to its sender.
    pub refused_write: RefusedWrite,
    /// What happens to a message without a receive.
    pub empty_receive: EmptyReceive,
    /// True: a queue pair in error completes what it holds with `WR_FLUSH_ERR`. Old eRDMA stacks do not.
    pub flushes: bool,
    /// True: a completion that comes while nobody has armed its queue is seen once somebody has. That is the moment for which
    /// one must poll again after arming, here every time.
    pub completes_when_armed: bool,
    /// True: a target in the ERR state refuses writes. False: only destroying it does (the careful assumption).
    pub error_state_fences: bool,
    /// True: every region is remotely writable, whatever was asked (eRDMA "compat").
    pub forces_remote_write: bool,
    /// True: a key is its slot number shifted by eight bits and nothing else, so that a region registered into a freed
    /// slot gets the old region's key (eRDMA). False: the low byte changes with every use of the slot.
    pub keys_repeat: bool,
    /// True: WRITEs that were posted and not yet executed when their queue pair is destroyed are "on the wire", and
    /// land later unless the target is gone.
    pub zombies: bool,
    /// What `ibv_reg_dmabuf_mr` answers.
    pub dmabuf: DmaBuf,
    /// True: addresses of a [`FakeDevice`](crate::testing::fake_device::FakeDevice) can be registered as they are, as with a
    /// peer-memory module; otherwise that is EFAULT.
    pub peer_memory: bool,
    /// Steps after which a work request that gets no answer completes with `RETRY_EXC_ERR`.
    pub retry_steps: u64,
    /// True: work requests complete at once and nothing is copied, looked up or watched: for measuring what a post
    /// costs on our side.
    pub null: bool,
}

/// The most inline bytes of an eRDMA send work request (kernel driver, `erdma_qp_validate_cap`).
const ERDMA_INLINE_MAX: u32 = 96;
/// Deepest queue of eRDMA, work requests.
const ERDMA_DEPTH_MAX: u32 = 8192;
/// Largest region seen on eRDMA, bytes (64 GiB).
const ERDMA_REGION_MAX: u64 = 64 << 30;
/// Steps without an answer before a retry counter is used up, unless a test says otherwise.
const RETRY_STEPS: u64 = 24;

impl Behaviour {
    /// eRDMA as GPU nodes run it ("compat"): looks like RoCE, connects out of band, behaves like iWARP.
    #[must_use]
    pub fn erdma_compat() -> Self {
        Self {
            name_stem: "erdma",
            driver: "erdma",
            vendor_id: 0x1ded,
            part_id: 0x107f,
            looks_iwarp: false,
            roce_gid_index: Some(2),
            send_queue: SendQueueRule::Blocks,
            reported_sge_max: 1,
            send_sge_max: 6,
            recv_sge_max: 1,
            read_uses_first_sge: true,
            read_sink_needs_remote_write: false,
            inline_max: ERDMA_INLINE_MAX,
            queue_depth_max: ERDMA_DEPTH_MAX,
            recv_depth_min: 1,
            message_bytes_max: u32::MAX,
            region_bytes_max: ERDMA_REGION_MAX,
            locked_bytes_max: None,
            negative_errno: true,
            immediate: true,
            out_of_band: OutOfBand::ReadyAtRtr,
            cm: None,
            refused_write: RefusedWrite::Silent,
            empty_receive: EmptyReceive::Kills,
            flushes: false,
            completes_when_armed: false,
            error_state_fences: false,
            forces_remote_write: true,
            keys_repeat: true,
            zombies: true,
            dmabuf: DmaBuf::NotSupported,
            peer_memory: false,
            retry_steps: RETRY_STEPS,
            null: false,
        }
    }

    /// eRDMA as CPU nodes run it ("standard"): iWARP, `rdma_cm` only.
    #[must_use]
    pub fn erdma_standard() -> Self {
        Self {
            looks_iwarp: true,
            roce_gid_index: None,
            out_of_band: OutOfBand::RefusedAtRts(libc::EINVAL),
            cm: Some(CmRules {
                connect_private_max: 255,
                accept_private_max: 255,
                reject_private_max: 255,
                pads_private: false,
                passive_first_kills: true,
            }),
            read_sink_needs_remote_write: true,
            forces_remote_write: false,
            ..Self::erdma_compat()
        }
    }

    /// Like siw, the kernel's software iWARP: no immediate data, lenient queues, `rdma_cm` only.
    #[must_use]
    pub fn siw() -> Self {
        Self {
            name_stem: "siw",
            driver: "siw",
            vendor_id: 0x0062_6d74,
            part_id: 0,
            send_queue: SendQueueRule::Lenient,
            reported_sge_max: 6,
            recv_sge_max: 6,
            recv_depth_min: 0,
            inline_max: 236,
            keys_repeat: false,
            immediate: false,
            flushes: true,
            error_state_fences: true,
            out_of_band: OutOfBand::RefusedAtRtr(libc::ENODATA),
            cm: Some(CmRules {
                connect_private_max: 251,
                accept_private_max: 251,
                reject_private_max: 251,
                pads_private: false,
                passive_first_kills: false,
            }),
            read_sink_needs_remote_write: false,
            ..Self::erdma_standard()
        }
    }

    /// Like a RoCE device (rxe, mlx5): what the InfiniBand specification says.
    #[must_use]
    pub fn roce() -> Self {
        Self {
            name_stem: "rxe",
            driver: "rdma_rxe",
            vendor_id: 0x00ff_ffff,
            part_id: 1,
            looks_iwarp: false,
            roce_gid_index: Some(1),
            send_queue: SendQueueRule::Requests,
            reported_sge_max: 32,
            send_sge_max: 32,
            recv_sge_max: 32,
            read_uses_first_sge: false,
            read_sink_needs_remote_write: false,
            inline_max: 400,
            queue_depth_max: 16384,
            recv_depth_min: 0,
            message_bytes_max: 8 << 20,
            region_bytes_max: u64::MAX,
            locked_bytes_max: None,
            negative_errno: false,
            immediate: true,
            out_of_band: OutOfBand::Full,
            cm: Some(CmRules {
                connect_private_max: 56,
                accept_private_max: 196,
                reject_private_max: 148,
                pads_private: true,
                passive_first_kills: false,
            }),
            refused_write: RefusedWrite::RemoteAccess,
            empty_receive: EmptyReceive::Retries,
            flushes: true,
            completes_when_armed: false,
            error_state_fences: true,
            forces_remote_write: false,
            keys_repeat: false,
            zombies: true,
            dmabuf: DmaBuf::Supported,
            peer_memory: false,
            retry_steps: RETRY_STEPS,
            null: false,
        }
    }

    /// eRDMA "compat" whose hardware does nothing: for measuring what posting and polling cost on our side.
    #[must_use]
    pub fn null() -> Self {
        Self {
            null: true,
            ..Self::erdma_compat()
        }
    }
}
