//! One generation of a prefill instance: the rows that agree on a topology.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::python_text::dump_string;
use super::registry::{DEATH_EVIDENCE_TTL, Lease, Refusal};
use super::row::{KnownKeys, RankKey, Row, SpecLayout, Topology};

/// What the registry remembers of one rank.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Address decode ranks connect to.
    pub rank_ip: String,
    /// Port of the rank's control socket.
    pub rank_port: u16,
    /// Identity of the process, if it named one.
    pub instance: Option<String>,
    /// When the row ends unless it is renewed; `None` for ranks that never renew (stock SGLang).
    pub(super) expires: Option<Duration>,
    /// When a probe last showed that nobody listens there.
    pub(super) found_dead: Option<Duration>,
    /// Unique per write, so that a late probe result cannot hit a renewed row.
    pub(super) serial: u64,
}

impl Entry {
    /// The rank's socket, when its address is literal (names are not resolved).
    #[must_use]
    pub fn socket(&self) -> Option<SocketAddr> {
        let ip: IpAddr = self.rank_ip.trim_matches(['[', ']']).parse().ok()?;
        Some(SocketAddr::new(ip, self.rank_port))
    }

    pub(super) fn is_found_dead(&self, now: Duration) -> bool {
        self.found_dead
            .is_some_and(|at| now.saturating_sub(at) < DEATH_EVIDENCE_TTL)
    }
}

/// Rows of one topology. First writer wins for what the instance is, last writer for where a rank is.
#[derive(Clone, Debug)]
pub struct Generation {
    pub(super) topology: Topology,
    follow_bootstrap_room: bool,
    enable_dsa_cache_layer_split: bool,
    enable_kv_cache_sharding: bool,
    prefill_http_port: Option<i64>,
    policy: Option<String>,
    spec_layout: Option<SpecLayout>,
    knows: KnownKeys,
    pub(super) rows: BTreeMap<RankKey, Entry>,
    pub(super) last_write: Duration,
    pub(super) was_ready: bool,
    instance: Option<String>,
    instance_is_stale: bool,
}

impl Generation {
    pub(super) fn new(row: &Row, now: Duration) -> Self {
        Self {
            topology: row.topology.clone(),
            follow_bootstrap_room: row.follow_bootstrap_room,
            enable_dsa_cache_layer_split: row.enable_dsa_cache_layer_split,
            enable_kv_cache_sharding: row.enable_kv_cache_sharding,
            prefill_http_port: row.prefill_http_port,
            policy: row.decode_allocation_policy.clone(),
            spec_layout: row.spec_layout.clone(),
            knows: row.knows,
            rows: BTreeMap::new(),
            last_write: now,
            was_ready: false,
            instance: None,
            instance_is_stale: true,
        }
    }

    /// Whether every rank of the topology has a row. Distinct ranks are counted, not registrations.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.rows.len() as u64 >= self.topology.rank_count()
    }

    /// Rows held.
    #[must_use]
    pub fn row_count(&self) -> usize {
        self.rows.len()
    }

    /// The row of a rank.
    #[must_use]
    pub fn rank(&self, key: RankKey) -> Option<&Entry> {
        self.rows.get(&key)
    }

    /// Whether any row starts with these ranks, in the order dp, cp, tp, pp.
    pub(super) fn has_rank_under(&self, prefix: &[u32]) -> bool {
        let at = |level: usize| prefix.get(level).copied().unwrap_or(0);
        let first = RankKey {
            dp: at(0),
            cp: at(1),
            tp: at(2),
            pp: at(3),
        };
        self.rows.range(first..).next().is_some_and(|(key, _)| {
            let found = [key.dp, key.cp, key.tp, key.pp];
            found.get(..prefix.len()) == Some(prefix)
        })
    }

    /// Writes a row whose topology agrees, in SGLang's order of checks.
    pub(super) fn admit(
        &mut self,
        row: Row,
        expires: Option<Duration>,
        instance: Option<String>,
        serial: u64,
        now: Duration,
    ) -> Result<(), Refusal> {
        if self.spec_layout != row.spec_layout {
            return Err(Refusal::SpecLayout);
        }
        if self.policy != row.decode_allocation_policy {
            return Err(Refusal::AllocationPolicy);
        }
        self.topology.kv_cache_dtype = self
            .topology
            .kv_cache_dtype
            .take()
            .or(row.topology.kv_cache_dtype);
        self.topology.kv_layout = self.topology.kv_layout.take().or(row.topology.kv_layout);
        self.prefill_http_port = self.prefill_http_port.or(row.prefill_http_port);
        self.knows = self.knows.or(row.knows);
        let entry = Entry {
            rank_ip: row.rank_ip,
            rank_port: row.rank_port,
            instance,
            expires,
            found_dead: None,
            serial,
        };
        self.rows.insert(row.key, entry);
        self.last_write = now;
        self.was_ready |= self.is_ready();
        self.instance_is_stale = true;
        Ok(())
    }

    /// Removes the rank's row if it still is the one at this address; a successor's row stays.
    pub(super) fn withdraw(&mut self, row: &Row) -> bool {
        let is_same = self
            .rows
            .get(&row.key)
            .is_some_and(|entry| entry.rank_ip == row.rank_ip && entry.rank_port == row.rank_port);
        if is_same {
            self.rows.remove(&row.key);
            self.instance_is_stale = true;
        }
        is_same
    }

    /// Drops rows whose lease has ended; says whether any was.
    pub(super) fn expire(&mut self, now: Duration) -> bool {
        let before = self.rows.len();
        self.rows
            .retain(|_, entry| entry.expires.is_none_or(|at| now < at));
        self.instance_is_stale |= self.rows.len() != before;
        self.rows.len() != before
    }

    /// Whether nothing of this generation can still be alive, given who registered after it.
    pub(super) fn is_dead_beside(&self, successor: Option<&Self>, now: Duration) -> bool {
        let taken: HashSet<(&str, u16)> = successor
            .into_iter()
            .flat_map(|other| other.rows.values())
            .map(|entry| (entry.rank_ip.as_str(), entry.rank_port))
            .collect();
        self.rows.values().all(|entry| {
            entry.is_found_dead(now) || taken.contains(&(entry.rank_ip.as_str(), entry.rank_port))
        })
    }

    /// The server-info reply, byte for byte as `json.dumps(PrefillServerInfo)` prints it in the release of the ranks: a key that
    /// none of them used is left out.
    #[must_use]
    pub fn server_info(&self) -> String {
        let topology = &self.topology;
        let mut out = format!(
            "{{\"attn_tp_size\": {}, \"attn_cp_size\": {}, \"dp_size\": {}, \"pp_size\": {}, \"page_size\": {}, \
             \"kv_cache_dtype\": ",
            topology.attn_tp_size,
            topology.attn_cp_size,
            topology.dp_size,
            topology.pp_size,
            topology.page_size,
        );
        dump_optional(&mut out, topology.kv_cache_dtype.as_deref());
        dump_flag(
            &mut out,
            "follow_bootstrap_room",
            self.follow_bootstrap_room,
        );
        if self.knows.enable_dsa_cache_layer_split {
            let split = self.enable_dsa_cache_layer_split;
            dump_flag(&mut out, "enable_dsa_cache_layer_split", split);
        }
        if let Some(layout) = &self.spec_layout {
            out.push_str(", \"dsv41_spec_layout\": ");
            out.push_str(layout.as_text());
        }
        if let Some(layout) = &topology.kv_layout {
            out.push_str(", \"kv_layout\": ");
            dump_string(&mut out, layout);
        }
        if self.knows.decode_allocation_policy {
            out.push_str(", \"decode_allocation_policy\": ");
            dump_optional(&mut out, self.policy.as_deref());
        }
        if self.knows.enable_kv_cache_sharding {
            let sharding = self.enable_kv_cache_sharding;
            dump_flag(&mut out, "enable_kv_cache_sharding", sharding);
        }
        if self.knows.prefill_http_port {
            out.push_str(", \"prefill_http_port\": ");
            match self.prefill_http_port {
                Some(port) => out.push_str(&port.to_string()),
                None => out.push_str("null"),
            }
        }
        out.push_str(
            ", \"target_tp_rank\": null, \"target_tp_ranks\": null, \"target_cp_ranks\": null, \
             \"target_pp_ranks\": null, \"required_dst_info_num\": null, \"required_prefill_response_num\": null}",
        );
        out
    }

    /// One identity for the whole instance: the ranks' common one, or a digest that changes when any rank's does.
    pub fn instance(&mut self) -> Option<&str> {
        if self.instance_is_stale {
            self.instance = self.combined_instance();
            self.instance_is_stale = false;
        }
        self.instance.as_deref()
    }

    fn combined_instance(&self) -> Option<String> {
        let mut named = self
            .rows
            .iter()
            .filter_map(|(key, entry)| Some((key, entry.instance.as_deref()?)));
        let (_, first) = named.next()?;
        if named.all(|(_, instance)| instance == first) {
            return Some(first.to_owned());
        }
        // FNV-1a: nobody gains by a collision, and the digest must not differ between builds.
        let mut digest: u64 = 0xcbf2_9ce4_8422_2325;
        for (key, entry) in &self.rows {
            let place = [key.dp, key.cp, key.tp, key.pp].map(u32::to_le_bytes);
            let name = entry.instance.as_deref().unwrap_or_default().bytes();
            for byte in place.into_iter().flatten().chain(name).chain([0xff]) {
                digest = (digest ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        }
        Some(format!("ranks-{digest:016x}"))
    }
}

impl Lease {
    /// When a row written `now` under this lease ends.
    pub(super) fn ends(self, now: Duration) -> Option<Duration> {
        match self {
            Self::For(term) => Some(now.saturating_add(term)),
            Self::Permanent | Self::Withdraw => None,
        }
    }
}

fn dump_optional(out: &mut String, text: Option<&str>) {
    match text {
        Some(text) => dump_string(out, text),
        None => out.push_str("null"),
    }
}

fn dump_flag(out: &mut String, key: &str, flag: bool) {
    write!(out, ", \"{key}\": {flag}").expect("invariant: writing to a String cannot fail");
}
