//! What a device can do, found by trying: what devices report is wrong where it matters.
//!
//! eRDMA says that a request has one element and takes six; a provider's inline limit is not reported at all. So small
//! queue pairs are made with falling sizes (erdma.md §2.4). The result is kept per device and firmware.
#![expect(unsafe_code, reason = "one probe calls with a descriptor that is none")]

use std::{
    ptr,
    sync::{Arc, PoisonError},
    time::Duration,
};

use super::{
    chain::{CHAIN_SGES_MAX, Chain, Flags, RemotePlace, Sge, WR_BYTES_MAX},
    context::{Context, DeviceLimits, PortFacts},
    cq::{Completion, Cq, POLL_MAX},
    device::Transport,
    error::VerbsError,
    mr::{Access, Mr},
    pd::Pd,
    qp::{LocalPath, Qp, QpAddress, QpCaps},
    sys,
};
use crate::clock;

/// Alibaba's PCI vendor number.
pub(crate) const VENDOR_ALIBABA: u32 = 0x1ded;

/// Elements to try, most first: eRDMA and siw have 6.
const SGE_LADDER: [u32; 4] = [6, 4, 2, 1];
/// Inline bytes to try, most first: eRDMA has 96.
const INLINE_LADDER: [u32; 4] = [96, 64, 32, 0];
/// Requests of the queue pairs made for trying.
const TRIAL_WRS: u32 = 16;
/// How long a loopback request may take. Software devices need milliseconds.
const LOOPBACK_TIMEOUT: Duration = Duration::from_millis(500);
/// Devices whose capabilities are kept; more than [`super::device::DEVICES_MAX`], for firmware changes.
const PROBED_MAX: usize = 128;

/// A capability and why we believe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found<T> {
    /// What it is.
    pub(crate) value: T,
    /// Why.
    pub(crate) reason: String,
}

impl<T> Found<T> {
    fn new(value: T, reason: impl Into<String>) -> Self {
        Self {
            value,
            reason: reason.into(),
        }
    }
}

/// What a device can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Capabilities {
    /// Elements of a send request.
    pub(crate) send_sge: Found<u32>,
    /// Inline bytes of a request.
    pub(crate) inline_bytes: Found<u32>,
    /// Whether WRITE with immediate works.
    pub(crate) immediate: Found<bool>,
    /// Bytes of a request.
    pub(crate) wr_bytes_max: Found<u64>,
    /// Whether dma-bufs can be registered.
    pub(crate) dmabuf: Found<bool>,
}

/// A device's capabilities with what they were found on.
pub(crate) struct Probed {
    name: String,
    vendor_id: u32,
    part_id: u32,
    firmware: String,
    capabilities: Capabilities,
}

/// Finds out what the device behind `context` can do, on `port`; once per device and firmware.
pub(crate) fn capabilities(context: &Arc<Context>, port: u8) -> Result<Capabilities, VerbsError> {
    let limits = context.limits()?;
    let name = &context.info().name;
    let same = |probed: &Probed| {
        probed.name == *name
            && probed.vendor_id == limits.vendor_id
            && probed.part_id == limits.part_id
            && probed.firmware == limits.firmware
    };
    // Held while probing, so that a device is not probed twice at once.
    let mut kept = context
        .library()
        .probed
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if let Some(probed) = kept.iter().find(|probed| same(probed)) {
        return Ok(probed.capabilities.clone());
    }
    let capabilities = probe(context, port, &limits)?;
    if kept.len() == PROBED_MAX {
        kept.remove(0);
    }
    kept.push(Probed {
        name: name.clone(),
        vendor_id: limits.vendor_id,
        part_id: limits.part_id,
        firmware: limits.firmware,
        capabilities: capabilities.clone(),
    });
    Ok(capabilities)
}

fn probe(
    context: &Arc<Context>,
    port: u8,
    limits: &DeviceLimits,
) -> Result<Capabilities, VerbsError> {
    let facts = context.port(port)?;
    let pd = Pd::create(context)?;
    let cq = Cq::create(context, 2 * TRIAL_WRS, false, 0)?;
    let try_qp = |sges: u32, inline_bytes: u32| {
        let qp = Qp::create(&pd, &cq, &cq, trial_caps(sges, inline_bytes))?;
        // Some providers grant less than was asked instead of refusing.
        if qp.reported_inline_bytes() < inline_bytes {
            return Err(VerbsError::call("ibv_create_qp", libc::EINVAL));
        }
        Ok(())
    };
    let transport = context.info().transport;
    let send_sge = send_sge(transport, limits.max_sge, |sges| try_qp(sges, 0))?;
    let inline_bytes = ladder(&INLINE_LADDER, |bytes| try_qp(send_sge.value, bytes))?;
    let rule = immediate_by_rule(transport, limits.vendor_id);
    let immediate = if rule.value && transport == Transport::Ib {
        confirm_immediate(&pd, &cq, port, &facts, rule)
    } else {
        rule
    };
    Ok(Capabilities {
        send_sge,
        inline_bytes,
        immediate,
        wr_bytes_max: wr_bytes_max(facts.max_message_bytes),
        dmabuf: dmabuf(&pd),
    })
}

fn trial_caps(max_send_sge: u32, max_inline_bytes: u32) -> QpCaps {
    QpCaps {
        max_send_wr: TRIAL_WRS,
        max_recv_wr: TRIAL_WRS,
        max_send_sge,
        max_inline_bytes,
        wr_bytes_max: WR_BYTES_MAX,
    }
}

/// The elements of a request: believed where devices are honest, tried where they are not.
fn send_sge(
    transport: Transport,
    reported: u32,
    attempt: impl FnMut(u32) -> Result<(), VerbsError>,
) -> Result<Found<u32>, VerbsError> {
    // uverbs reports the lesser of send and receive elements, so 1 is the receive side's on eRDMA.
    if transport == Transport::Ib && reported > 1 {
        let limit = u32::try_from(CHAIN_SGES_MAX).unwrap_or(u32::MAX);
        let reason = format!("the device reports {reported}");
        return Ok(Found::new(reported.min(limit), reason));
    }
    let mut found = ladder(&SGE_LADDER, attempt)?;
    found.reason = format!("{} (the device reports {reported})", found.reason);
    Ok(found)
}

/// The first rung on which `attempt` does not say that its argument is invalid.
fn ladder(
    rungs: &[u32],
    mut attempt: impl FnMut(u32) -> Result<(), VerbsError>,
) -> Result<Found<u32>, VerbsError> {
    let mut refused = None;
    for &rung in rungs {
        match attempt(rung) {
            Ok(()) => {
                return Ok(Found::new(
                    rung,
                    format!("a queue pair with {rung} was made"),
                ));
            }
            Err(error) => match error.errno() {
                Some(libc::EINVAL | libc::EOPNOTSUPP) => refused = Some(error),
                _ => return Err(error),
            },
        }
    }
    Err(refused.unwrap_or(VerbsError::Misuse("a ladder has no rungs")))
}

fn immediate_by_rule(transport: Transport, vendor_id: u32) -> Found<bool> {
    match transport {
        Transport::Ib => Found::new(true, "InfiniBand and RoCE have it"),
        Transport::Iwarp if vendor_id == VENDOR_ALIBABA => {
            Found::new(true, "eRDMA has it in standard mode too")
        }
        Transport::Iwarp => Found::new(false, "iWARP has no WRITE with immediate"),
        Transport::Other(number) => Found::new(false, format!("unknown transport {number}")),
    }
}

/// Tries a WRITE with immediate from a queue pair to itself. If that cannot be set up, the rule stands.
fn confirm_immediate(
    pd: &Arc<Pd>,
    cq: &Arc<Cq>,
    port: u8,
    facts: &PortFacts,
    rule: Found<bool>,
) -> Found<bool> {
    match loopback(pd, cq, port, facts) {
        Ok(()) => Found::new(true, "a loopback WRITE with immediate arrived"),
        Err(Loopback::Refused(error)) => {
            Found::new(false, format!("a loopback post was refused: {error}"))
        }
        Err(Loopback::Unclear(why)) => Found::new(
            rule.value,
            format!("{}; not confirmed by loopback: {why}", rule.reason),
        ),
    }
}

/// Why a loopback request did not arrive.
enum Loopback {
    /// The device refused the opcode.
    Refused(VerbsError),
    /// Something else stood in the way.
    Unclear(String),
}

impl From<VerbsError> for Loopback {
    fn from(error: VerbsError) -> Self {
        Self::Unclear(error.to_string())
    }
}

/// Memory that the loopback request reads and writes.
struct Bounce(Box<[u8; 128]>);

fn loopback(pd: &Arc<Pd>, cq: &Arc<Cq>, port: u8, facts: &PortFacts) -> Result<(), Loopback> {
    let gids = pd.context().gids(port);
    let gid = gids
        .iter()
        .find(|gid| gid.ipv4().is_some() && gid.kind == "RoCE v2")
        .or_else(|| gids.first().filter(|_| facts.lid != 0))
        .ok_or_else(|| Loopback::Unclear("the port has no usable GID".to_owned()))?;
    let mut bounce = Bounce(Box::new([0; 128]));
    let address = bounce.0.as_mut_ptr().expose_provenance() as u64;
    // SAFETY: the bytes outlive the registration, which is dropped before them, and are not touched meanwhile.
    let mr = unsafe { Mr::register(pd, address, 128, Access::WriteTarget) }?;
    // Declared after the region, so that it is destroyed before it.
    let mut qp = Qp::create(pd, cq, cq, trial_caps(1, 0))?;
    let psn = 0;
    let path = LocalPath {
        port,
        gid_index: gid.index,
        mtu: facts.active_mtu,
        psn,
    };
    let itself = QpAddress {
        gid: gid.gid,
        lid: facts.lid,
        qp_num: qp.qp_num(),
        psn,
    };
    qp.enter_init(port)?;
    qp.post_recv(1, address, 64, mr.lkey())?;
    qp.enter_rtr(&path, &itself)?;
    qp.enter_rts(&path)?;
    let mut chain = Chain::new(1, 1, 64);
    let from = Sge {
        address,
        bytes: 64,
        lkey: mr.lkey(),
    };
    let to = RemotePlace {
        address: address + 64,
        rkey: mr.rkey(),
    };
    let flags = Flags {
        signalled: true,
        solicited: false,
    };
    chain
        .write_with_imm(2, &[from], to, 7, flags)
        .map_err(|error| Loopback::Unclear(error.to_string()))?;
    qp.post(&mut chain)
        .map_err(|error| match error.source.errno() {
            Some(libc::EINVAL | libc::EOPNOTSUPP) => Loopback::Refused(error.source),
            _ => Loopback::Unclear(error.to_string()),
        })?;
    await_immediate(cq, qp.qp_num())
}

fn await_immediate(cq: &Cq, qp_num: u32) -> Result<(), Loopback> {
    let started = clock::now();
    let mut completions = [Completion::default(); POLL_MAX];
    loop {
        let count = cq.poll(&mut completions)?;
        for completion in completions[..count]
            .iter()
            .filter(|done| done.qp_num == qp_num)
        {
            if !completion.status().is_success() {
                return Err(Loopback::Unclear(completion.status().to_string()));
            }
            if completion.opcode == sys::IBV_WC_RECV_RDMA_WITH_IMM {
                return Ok(());
            }
        }
        if clock::now().since(started) > LOOPBACK_TIMEOUT {
            return Err(Loopback::Unclear("nothing arrived".to_owned()));
        }
        std::thread::yield_now();
    }
}

fn wr_bytes_max(max_message_bytes: u32) -> Found<u64> {
    let reason = format!("the port's longest message is {max_message_bytes} bytes, ours 1 GiB");
    Found::new(u64::from(max_message_bytes).clamp(1, WR_BYTES_MAX), reason)
}

/// Registers a dma-buf whose descriptor is none: only a provider that knows the call looks at the descriptor.
fn dmabuf(pd: &Pd) -> Found<bool> {
    let verbs = &pd.context().library().verbs;
    let Some(register) = verbs.ibv_reg_dmabuf_mr else {
        return Found::new(false, "this libibverbs is older than ibv_reg_dmabuf_mr");
    };
    let access = sys::IBV_ACCESS_LOCAL_WRITE.cast_signed();
    // SAFETY: the domain is alive; descriptor -1 names no memory.
    let raw = unsafe { register(pd.raw(), 0, 4096, 0, -1, access) };
    let error = VerbsError::last("ibv_reg_dmabuf_mr");
    if !ptr::eq(raw, ptr::null_mut()) {
        // SAFETY: the registration is ours and freed once.
        let code = unsafe { (verbs.ibv_dereg_mr)(raw) };
        return Found::new(
            false,
            format!("the provider registered descriptor -1 (freeing it: {code})"),
        );
    }
    dmabuf_verdict(error.errno())
}

fn dmabuf_verdict(errno: Option<i32>) -> Found<bool> {
    match errno {
        Some(libc::EBADF) => Found::new(true, "the provider looked at the descriptor (EBADF)"),
        Some(libc::EOPNOTSUPP | libc::EPROTONOSUPPORT) => Found::new(
            false,
            "the provider or the kernel driver has no dma-buf registration",
        ),
        other => Found::new(
            false,
            format!(
                "registering no dma-buf failed unexpectedly (errno {})",
                other.unwrap_or(0)
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refuse_above(limit: u32) -> impl FnMut(u32) -> Result<(), VerbsError> {
        move |asked| {
            if asked > limit {
                Err(VerbsError::call("ibv_create_qp", -libc::EINVAL))
            } else {
                Ok(())
            }
        }
    }

    #[test]
    fn a_device_that_says_one_element_is_tried_and_an_honest_one_believed() {
        let found = |transport, reported, real| {
            send_sge(transport, reported, refuse_above(real)).map(|found| found.value)
        };
        assert_eq!(found(Transport::Ib, 1, 6), Ok(6), "eRDMA compat");
        assert_eq!(found(Transport::Iwarp, 1, 6), Ok(6), "eRDMA standard");
        assert_eq!(found(Transport::Iwarp, 6, 3), Ok(2), "between two rungs");
        assert_eq!(found(Transport::Ib, 1, 1), Ok(1));
        assert_eq!(found(Transport::Ib, 32, 0), Ok(16), "rxe, never tried");
        assert_eq!(found(Transport::Ib, 13, 0), Ok(13));
    }

    #[test]
    fn a_ladder_ends_in_its_first_good_rung_or_the_last_refusal() {
        assert_eq!(
            ladder(&INLINE_LADDER, refuse_above(95)).map(|found| found.value),
            Ok(64)
        );
        let refused = ladder(&SGE_LADDER, refuse_above(0)).expect_err("none fits");
        assert_eq!(refused.errno(), Some(libc::EINVAL));
        let mut attempts = 0;
        let starved = ladder(&SGE_LADDER, |_| {
            attempts += 1;
            Err(VerbsError::call("ibv_create_qp", libc::ENOMEM))
        });
        assert_eq!(
            starved.expect_err("no memory").errno(),
            Some(libc::ENOMEM),
            "too little locked memory is not a small device"
        );
        assert_eq!(attempts, 1);
    }

    #[test]
    fn rules_follow_transport_and_vendor() {
        assert!(immediate_by_rule(Transport::Ib, 0).value);
        assert!(immediate_by_rule(Transport::Iwarp, VENDOR_ALIBABA).value);
        assert!(!immediate_by_rule(Transport::Iwarp, 0x0062_6d74).value);
        assert!(!immediate_by_rule(Transport::Other(3), VENDOR_ALIBABA).value);
        assert_eq!(wr_bytes_max(8 << 20).value, 8 << 20);
        assert_eq!(wr_bytes_max(u32::MAX).value, 1 << 30);
        assert_eq!(wr_bytes_max(0).value, 1);
        assert!(dmabuf_verdict(Some(libc::EBADF)).value);
        assert!(!dmabuf_verdict(Some(libc::EOPNOTSUPP)).value);
        assert!(!dmabuf_verdict(Some(libc::EINVAL)).value);
    }
}
