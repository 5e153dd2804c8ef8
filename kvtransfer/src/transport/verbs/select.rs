//! Which devices serve which GPU, from SGLang's `ib_device` setting, and whether each can be used at all.
//!
//! SGLang (`disaggregation/utils.py` and `mooncake_transfer_engine.py`) takes one name, names with commas, a JSON map
//! from GPU to names, or the path of a file with such a map. A name that this host lacks is an error that says what it
//! has, instead of a silent fall back to TCP.
#![forbid(unsafe_code)]

use std::{collections::BTreeMap, fmt::Write as _, net::Ipv4Addr};

use super::{
    device::{GidEntry, Transport},
    error::memlock_fix,
    sys,
};

/// Most names for one GPU: a host has a few adapters near each.
pub(crate) const NAMES_MAX: usize = 16;
/// Most GPUs in a map.
pub(crate) const GPUS_MAX: usize = 64;
/// Longest setting or file, in bytes.
pub(crate) const TEXT_MAX: usize = 64 << 10;
/// Below this limit on locked memory, in bytes, not even a queue pair can be made (64 KiB is a common default).
pub(crate) const MEMLOCK_MIN: u64 = 16 << 20;

/// The kind of GID that eRDMA's compat mode and RoCE connect by.
const ROCE_V2: &str = "RoCE v2";

/// Why the setting cannot be followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum SelectError {
    /// The setting or the file has too many of something.
    #[error("ib_device has {asked} {what}, the limit is {limit}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        asked: usize,
        /// The bound.
        limit: usize,
    },
    /// A list without a name in it.
    #[error("ib_device {0:?} names no device")]
    Empty(String),
    /// Not JSON, though it looked like it.
    #[error("ib_device is not a valid JSON map of GPU to devices: {0}")]
    Json(String),
    /// A key of the map is not a GPU's number.
    #[error("ib_device maps {0:?}, which is not a GPU's number")]
    Gpu(String),
    /// The map has no entry for this GPU.
    #[error("ib_device names no devices for GPU {gpu}; it has GPUs {present:?}")]
    NoGpu {
        /// The GPU asked for.
        gpu: u32,
        /// Those there are.
        present: Vec<u32>,
    },
    /// A device that this host lacks or that cannot be used.
    #[error("{reason}. {present}")]
    Unusable {
        /// Which, and why.
        reason: String,
        /// What this host has, each with its verdict.
        present: String,
    },
}

/// The `ib_device` setting, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum IbDevice {
    /// No setting: any usable device.
    Any,
    /// The same devices for every GPU.
    Same(Vec<String>),
    /// Devices by GPU.
    PerGpu(BTreeMap<u32, Vec<String>>),
}

impl IbDevice {
    /// Whether the setting names a file, whose text [`Self::parse`] then wants.
    pub(crate) fn is_file(setting: &str) -> bool {
        setting.trim().ends_with(".json")
    }

    /// Reads the setting, or the text of the file that it names.
    pub(crate) fn parse(text: &str) -> Result<Self, SelectError> {
        bound("bytes", text.len(), TEXT_MAX)?;
        let text = text.trim();
        if text.is_empty() {
            return Ok(Self::Any);
        }
        if text.starts_with('{') {
            return Self::parse_map(text);
        }
        Ok(Self::Same(names(text)?))
    }

    fn parse_map(text: &str) -> Result<Self, SelectError> {
        let raw: BTreeMap<String, String> =
            serde_json::from_str(text).map_err(|error| SelectError::Json(error.to_string()))?;
        bound("GPUs", raw.len(), GPUS_MAX)?;
        let mut map = BTreeMap::new();
        for (key, list) in raw {
            let gpu = key
                .trim()
                .parse()
                .map_err(|_| SelectError::Gpu(key.clone()))?;
            if map.insert(gpu, names(&list)?).is_some() {
                return Err(SelectError::Json(format!("GPU {gpu} is there twice")));
            }
        }
        if map.is_empty() {
            return Err(SelectError::Empty(text.to_owned()));
        }
        Ok(Self::PerGpu(map))
    }

    /// The names for one GPU; `None` when any device will do.
    pub(crate) fn for_gpu(&self, gpu: u32) -> Result<Option<&[String]>, SelectError> {
        match self {
            Self::Any => Ok(None),
            Self::Same(names) => Ok(Some(names)),
            Self::PerGpu(map) => match map.get(&gpu) {
                Some(names) => Ok(Some(names)),
                None => Err(SelectError::NoGpu {
                    gpu,
                    present: map.keys().copied().collect(),
                }),
            },
        }
    }
}

fn names(list: &str) -> Result<Vec<String>, SelectError> {
    let mut found: Vec<String> = Vec::new();
    for name in list
        .split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
    {
        if !found.iter().any(|known| known == name) {
            found.push(name.to_owned());
        }
        bound("devices for a GPU", found.len(), NAMES_MAX)?;
    }
    if found.is_empty() {
        return Err(SelectError::Empty(list.to_owned()));
    }
    Ok(found)
}

fn bound(what: &'static str, asked: usize, limit: usize) -> Result<(), SelectError> {
    if asked > limit {
        return Err(SelectError::TooMany { what, asked, limit });
    }
    Ok(())
}

/// A device with what its usability depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// The kernel's name.
    pub(crate) name: String,
    /// How it connects.
    pub(crate) transport: Transport,
    /// `ibv_port_state` of its port; `None` when it could not be asked.
    pub(crate) port_state: Option<u32>,
    /// `IBV_LINK_LAYER_*` of its port.
    pub(crate) link_layer: u8,
    /// The filled entries of its GID table.
    pub(crate) gids: Vec<GidEntry>,
}

/// What all devices of a host depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostLimits {
    /// Locked memory in bytes; `None` for no limit.
    pub(crate) memlock: Option<u64>,
    /// Whether librdmacm is there with its device node.
    pub(crate) has_cm: bool,
}

/// Whether a device can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It can, with this GID where it connects out of band.
    Usable {
        /// The entry to connect by; `None` for iWARP, which connects by address.
        gid: Option<GidEntry>,
    },
    /// It cannot: why, and what to do.
    Refused(String),
}

impl Candidate {
    /// Whether the device can be used on a host of such `limits`, for the address `wanted` if there is one.
    pub(crate) fn verdict(&self, limits: HostLimits, wanted: Option<Ipv4Addr>) -> Verdict {
        match self.examine(limits, wanted) {
            Ok(gid) => Verdict::Usable { gid },
            Err(reason) => Verdict::Refused(reason),
        }
    }

    fn examine(
        &self,
        limits: HostLimits,
        wanted: Option<Ipv4Addr>,
    ) -> Result<Option<GidEntry>, String> {
        match self.port_state {
            Some(sys::IBV_PORT_ACTIVE) => {}
            Some(state) => {
                return Err(format!(
                    "its port is {}: bring its network interface up",
                    port_state_words(state)
                ));
            }
            None => return Err("its port could not be queried".to_owned()),
        }
        if limits.memlock.is_some_and(|limit| limit < MEMLOCK_MIN) {
            return Err(memlock_fix(limits.memlock));
        }
        match self.transport {
            Transport::Other(number) => Err(format!(
                "its transport ({number}) is neither InfiniBand, RoCE nor iWARP"
            )),
            Transport::Iwarp if !limits.has_cm => Err(
                "it connects by rdma_cm only, which this host or pod lacks: install librdmacm1 and give it \
                 /dev/infiniband/rdma_cm, or put the erdma driver in compat mode"
                    .to_owned(),
            ),
            Transport::Iwarp => Ok(None),
            Transport::Ib if self.link_layer == sys::IBV_LINK_LAYER_INFINIBAND => self
                .gids
                .first()
                .cloned()
                .map(Some)
                .ok_or_else(|| "its port has no GID".to_owned()),
            Transport::Ib => choose_gid(&self.gids, wanted).cloned().map(Some),
        }
    }
}

/// The GID to connect by: of type "RoCE v2", with an IPv4 address, and with `wanted` if that is given. Its index says
/// nothing: it differs between the devices of one host.
pub(crate) fn choose_gid(gids: &[GidEntry], wanted: Option<Ipv4Addr>) -> Result<&GidEntry, String> {
    let mut mapped = gids.iter().filter(|gid| gid.ipv4().is_some()).peekable();
    if mapped.peek().is_none() {
        return Err(
            "its port has no GID with an IPv4 address: give its network interface one".to_owned(),
        );
    }
    let mut routable = mapped.filter(|gid| gid.kind == ROCE_V2).peekable();
    if routable.peek().is_none() {
        return Err(format!(
            "none of its GIDs with an IPv4 address is of type {ROCE_V2:?}"
        ));
    }
    let Some(wanted) = wanted else {
        return routable
            .next()
            .ok_or_else(|| "its GIDs changed meanwhile".to_owned());
    };
    let present: Vec<_> = routable.clone().filter_map(GidEntry::ipv4).collect();
    routable
        .find(|gid| gid.ipv4() == Some(wanted))
        .ok_or_else(|| {
            format!("none of its {ROCE_V2:?} GIDs has the address {wanted}, only {present:?}")
        })
}

fn port_state_words(state: u32) -> &'static str {
    match state {
        sys::IBV_PORT_DOWN => "down",
        sys::IBV_PORT_INIT => "not configured yet (INIT)",
        sys::IBV_PORT_ARMED => "not active yet (ARMED)",
        sys::IBV_PORT_ACTIVE => "active",
        _ => "in an unknown state",
    }
}

/// A device that was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    /// Its name.
    pub(crate) name: String,
    /// The GID to connect by; `None` for iWARP.
    pub(crate) gid: Option<GidEntry>,
}

/// The devices for `gpu`: those of the setting, all of which must be usable, or else every usable one.
///
/// `address` gives the address that a device must have, where the caller knows it.
pub(crate) fn choose(
    setting: &IbDevice,
    gpu: u32,
    candidates: &[Candidate],
    limits: HostLimits,
    address: impl Fn(&str) -> Option<Ipv4Addr>,
) -> Result<Vec<Chosen>, SelectError> {
    let verdict = |candidate: &Candidate| candidate.verdict(limits, address(&candidate.name));
    let unusable = |reason| SelectError::Unusable {
        reason,
        present: describe(candidates, verdict),
    };
    let Some(names) = setting.for_gpu(gpu)? else {
        let usable: Vec<_> = candidates
            .iter()
            .filter_map(|candidate| chosen(candidate, verdict(candidate)).ok())
            .collect();
        if usable.is_empty() {
            return Err(unusable("no RDMA device can be used".to_owned()));
        }
        return Ok(usable);
    };
    names
        .iter()
        .map(|name| {
            let candidate = candidates
                .iter()
                .find(|candidate| candidate.name == *name)
                .ok_or_else(|| {
                    unusable(format!("ib_device names {name}, which this host lacks"))
                })?;
            chosen(candidate, verdict(candidate))
                .map_err(|why| unusable(format!("ib_device names {name}, but {why}")))
        })
        .collect()
}

fn chosen(candidate: &Candidate, verdict: Verdict) -> Result<Chosen, String> {
    match verdict {
        Verdict::Usable { gid } => Ok(Chosen {
            name: candidate.name.clone(),
            gid,
        }),
        Verdict::Refused(why) => Err(why),
    }
}

/// What this host has, each device with its verdict.
fn describe(candidates: &[Candidate], verdict: impl Fn(&Candidate) -> Verdict) -> String {
    if candidates.is_empty() {
        return "This host has no RDMA device".to_owned();
    }
    let mut text = "This host has: ".to_owned();
    for (index, candidate) in candidates.iter().enumerate() {
        let separator = if index == 0 { "" } else { "; " };
        let words = match verdict(candidate) {
            Verdict::Usable { .. } => "usable".to_owned(),
            Verdict::Refused(why) => why,
        };
        // Writing to a String does not fail.
        let _ = write!(text, "{separator}{} ({words})", candidate.name);
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FINE: HostLimits = HostLimits {
        memlock: None,
        has_cm: true,
    };

    fn gid(index: u8, address: [u8; 4], kind: &str) -> GidEntry {
        let mut gid = [0; 16];
        gid[10] = 0xff;
        gid[11] = 0xff;
        gid[12..].copy_from_slice(&address);
        GidEntry {
            index,
            gid,
            kind: kind.to_owned(),
            netdev: None,
        }
    }

    fn link_local(index: u8) -> GidEntry {
        let mut gid = [1; 16];
        gid[0] = 0xfe;
        gid[1] = 0x80;
        GidEntry {
            index,
            gid,
            kind: ROCE_V2.to_owned(),
            netdev: None,
        }
    }

    fn erdma(name: &str, index: u8, last: u8) -> Candidate {
        Candidate {
            name: name.to_owned(),
            transport: Transport::Ib,
            port_state: Some(sys::IBV_PORT_ACTIVE),
            link_layer: sys::IBV_LINK_LAYER_ETHERNET,
            gids: vec![
                link_local(0),
                gid(index, [10, 0, 0, last], "IB/RoCE v1"),
                gid(index + 1, [10, 0, 0, last], ROCE_V2),
            ],
        }
    }

    fn pick(setting: &str, gpu: u32, candidates: &[Candidate]) -> Result<Vec<String>, String> {
        let setting = IbDevice::parse(setting).map_err(|error| error.to_string())?;
        let chosen = choose(&setting, gpu, candidates, FINE, |_| None);
        chosen
            .map(|chosen| chosen.into_iter().map(|device| device.name).collect())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn every_form_of_sglangs_setting_is_followed() {
        let host = [erdma("erdma_0", 1, 1), erdma("erdma_1", 0, 2)];
        let both = Ok(vec!["erdma_0".to_owned(), "erdma_1".to_owned()]);
        let second = Ok(vec!["erdma_1".to_owned()]);
        assert_eq!(pick("", 0, &host), both);
        assert_eq!(pick("erdma_1", 5, &host), second);
        assert_eq!(pick(" erdma_0 , erdma_1,", 5, &host), both);
        assert_eq!(pick("erdma_1,erdma_1", 0, &host), second);
        let map = r#"{"0": "erdma_0, erdma_1", "1": "erdma_1"}"#;
        assert_eq!(pick(map, 0, &host), both);
        assert_eq!(pick(map, 1, &host), second);
        assert_eq!(
            pick(map, 2, &host),
            Err("ib_device names no devices for GPU 2; it has GPUs [0, 1]".to_owned())
        );
        assert!(IbDevice::is_file("/etc/ib_map.json "));
        assert!(!IbDevice::is_file("erdma_0"));
    }

    #[test]
    fn a_wrong_setting_is_an_error_and_not_a_device() {
        for wrong in [
            ",",
            "{}",
            "{",
            r#"{"x": "a"}"#,
            r#"{"0": ""}"#,
            r#"{"0": 1}"#,
        ] {
            assert!(IbDevice::parse(wrong).is_err(), "{wrong}");
        }
        assert!(IbDevice::parse(r#"{"0": "a", " 0": "b"}"#).is_err());
        let many = (0..=NAMES_MAX).map(|n| format!("d{n}")).collect::<Vec<_>>();
        assert!(IbDevice::parse(&many[..NAMES_MAX].join(",")).is_ok());
        assert!(IbDevice::parse(&many.join(",")).is_err());
        let map = |gpus: usize| {
            let entries: Vec<_> = (0..gpus).map(|gpu| format!("\"{gpu}\": \"a\"")).collect();
            IbDevice::parse(&format!("{{{}}}", entries.join(",")))
        };
        assert!(map(GPUS_MAX).is_ok());
        assert!(map(GPUS_MAX + 1).is_err());
        assert!(IbDevice::parse(&"a".repeat(TEXT_MAX)).is_ok());
        assert!(IbDevice::parse(&"a".repeat(TEXT_MAX + 1)).is_err());
    }

    #[test]
    fn an_unknown_device_is_answered_with_what_there_is() {
        let mut down = erdma("erdma_1", 0, 2);
        down.port_state = Some(sys::IBV_PORT_DOWN);
        let host = [erdma("erdma_0", 1, 1), down];
        assert_eq!(
            pick("mlx5_0", 0, &host).expect_err("not there"),
            "ib_device names mlx5_0, which this host lacks. This host has: erdma_0 (usable); erdma_1 (its port is \
             down: bring its network interface up)"
        );
        assert_eq!(
            pick("erdma_0", 0, &[]).expect_err("not there"),
            "ib_device names erdma_0, which this host lacks. This host has no RDMA device"
        );
        assert_eq!(pick("", 0, &host), Ok(vec!["erdma_0".to_owned()]));
        let error = pick("erdma_0,erdma_1", 0, &host).expect_err("one is down");
        assert!(error.starts_with("ib_device names erdma_1, but its port is down"));
    }

    #[test]
    fn each_reason_to_refuse_is_said_with_its_fix() {
        let refuse = |candidate: &Candidate, limits| match candidate.verdict(limits, None) {
            Verdict::Refused(why) => why,
            Verdict::Usable { .. } => panic!("it was accepted"),
        };
        let fine = erdma("erdma_0", 1, 1);
        let low = HostLimits {
            memlock: Some(65536),
            ..FINE
        };
        assert!(refuse(&fine, low).contains("64 KiB: raise it"));
        let enough = HostLimits {
            memlock: Some(MEMLOCK_MIN),
            ..FINE
        };
        assert!(matches!(fine.verdict(enough, None), Verdict::Usable { .. }));
        let mut odd = fine.clone();
        odd.transport = Transport::Other(3);
        assert!(refuse(&odd, FINE).contains("transport (3)"));
        odd.transport = Transport::Iwarp;
        odd.gids.clear();
        assert!(matches!(
            odd.verdict(FINE, None),
            Verdict::Usable { gid: None }
        ));
        let no_cm = HostLimits {
            has_cm: false,
            ..FINE
        };
        assert!(refuse(&odd, no_cm).contains("rdma_cm"));
        odd.transport = Transport::Ib;
        assert!(refuse(&odd, FINE).contains("no GID with an IPv4 address"));
        odd.gids = vec![gid(1, [10, 0, 0, 1], "IB/RoCE v1")];
        assert!(refuse(&odd, FINE).contains("RoCE v2"));
        odd.port_state = None;
        assert!(refuse(&odd, FINE).contains("could not be queried"));
        odd.port_state = Some(99);
        assert!(refuse(&odd, FINE).contains("unknown state"));
    }

    proptest! {
        // Whatever the order of the table, the entry of the wanted address and type is found by what it is.
        #[test]
        fn a_gid_is_chosen_by_address_and_type_never_by_index(
            at in 0usize..4,
            others in prop::collection::vec((any::<[u8; 4]>(), any::<bool>()), 3),
        ) {
            let wanted = [10, 1, 2, 3];
            let mut gids: Vec<_> = others
                .iter()
                .filter(|(address, _)| *address != wanted)
                .map(|&(address, v2)| gid(0, address, if v2 { ROCE_V2 } else { "IB/RoCE v1" }))
                .collect();
            gids.insert(0, gid(0, wanted, "IB/RoCE v1"));
            let at = at.min(gids.len());
            gids.insert(at, gid(0, wanted, ROCE_V2));
            for (index, entry) in gids.iter_mut().enumerate() {
                entry.index = u8::try_from(index).expect("few");
            }
            let chosen = choose_gid(&gids, Some(Ipv4Addr::from(wanted))).expect("it is there");
            prop_assert_eq!(usize::from(chosen.index), at);
            prop_assert!(choose_gid(&gids, Some(Ipv4Addr::LOCALHOST)).is_err()
                || others.iter().any(|(address, v2)| *v2 && *address == [127, 0, 0, 1]));
        }
    }
}
