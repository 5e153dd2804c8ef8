//! The introduction: who an engine is, what its memory looks like, and by which same-host paths it can be reached.

use super::{
    WireError,
    codec::{Reader, Writer},
    rdma::{Connector, RAILS_MAX, RailOffer},
};
use crate::{
    ids::InstanceId,
    layout::{
        Attention, Component, ComponentKind, Entry, Layout, RegionId, SLICE_GROUPS_MAX, Shard,
        StateShape, StateSlice,
    },
    memory::device::SHARE_BYTES_MAX,
};

/// Most bytes of a bearer token.
pub const TOKEN_BYTES_MAX: usize = 512;
/// Most lanes of one peer.
pub const LANES_MAX: u8 = 16;
/// Most regions of one engine: a region per layer and buffer of a deep model, with room to spare.
pub const REGIONS_MAX: usize = 8192;
/// Most allocations of one engine's device that it shares: K and V of 1024 layers. Together they fit a stranger's message.
pub const SHARES_MAX: usize = 2048;
/// Most components of a layout; SGLang 0.5.23 knows 13 state types.
pub const COMPONENTS_MAX: usize = 64;
/// Most entries of a component: K and V of 1024 layers, and drafts.
pub const ENTRIES_MAX: usize = 4096;
/// Most bytes of a name (dtype, page layout, state type).
pub const NAME_BYTES_MAX: usize = 64;

/// Where an engine runs, for finding out whether a peer shares the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostIdentity {
    /// `/proc/sys/kernel/random/boot_id`: the same on every process of one boot of one kernel.
    pub boot_id: [u8; 16],
    /// Effective user id: another user's memory cannot be read.
    pub user_id: u32,
    /// Name of the abstract Unix socket on which this engine takes same-host lanes; empty if it takes none.
    pub socket_name: String,
    /// Address of 16 bytes that a same-host peer reads to prove that it can read this process.
    pub probe_address: u64,
    /// What it must find there.
    pub probe_cookie: [u8; 16],
}

/// Where a region's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the owner's process.
    Host,
    /// On its device, in an allocation that other processes cannot use.
    Device,
    /// On its device, in an allocation that processes of the same host can use.
    Shared {
        /// Index in [`Hello::shares`].
        share: u32,
        /// Where the region begins in that allocation, in bytes.
        offset: u64,
    },
}

/// A registered region as a peer must know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionAddress {
    /// Virtual address in the owner's process (for same-host pulls), or on its device.
    pub base: u64,
    /// Bytes.
    pub len: u64,
    /// Where they are.
    pub place: Place,
}

/// First message each way on a control stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Who is speaking.
    pub instance: InstanceId,
    /// When its process started (Unix nanoseconds): a larger one at the same address is a restart.
    pub generation: u64,
    /// Drawn by the dialling side: joins lanes to their control stream.
    pub link: u64,
    /// Data lanes the dialling side will open, or the accepting side allows.
    pub lanes: u8,
    /// Bearer token, empty if none.
    pub token: Vec<u8>,
    /// Where it runs.
    pub host: HostIdentity,
    /// Its regions, indexed by [`RegionId`].
    pub regions: Vec<RegionAddress>,
    /// Allocations of its device that processes of the same host can use, in the device's own description.
    pub shares: Vec<Vec<u8>>,
    /// Whether its peers may write to any address in them.
    pub by_address: bool,
    /// Whether its data connections carry no bytes (measurements only).
    pub null_wire: bool,
    /// What lies in the regions.
    pub layout: Layout,
    /// Its RDMA devices, empty if it uses none.
    pub rails: Vec<RailOffer>,
}

impl Hello {
    pub(super) fn write(&self, w: &mut Writer<'_>) {
        w.raw(&self.instance.0);
        w.u64(self.generation);
        w.u64(self.link);
        w.u8(self.lanes);
        w.count(self.token.len());
        w.raw(&self.token);
        w.raw(&self.host.boot_id);
        w.u32(self.host.user_id);
        w.text(&self.host.socket_name);
        w.u64(self.host.probe_address);
        w.raw(&self.host.probe_cookie);
        w.u8(u8::from(self.by_address) | u8::from(self.null_wire) << 1);
        w.count(self.shares.len());
        for share in &self.shares {
            w.count(share.len());
            w.raw(share);
        }
        w.count(self.regions.len());
        for region in &self.regions {
            write_region(w, region);
        }
        w.count(self.rails.len());
        for rail in &self.rails {
            rail.write(w);
        }
        write_layout(w, &self.layout);
    }

    pub(super) fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let instance = InstanceId(r.id()?);
        let generation = r.u64()?;
        let link = r.u64()?;
        let lanes = r.u8()?;
        if lanes == 0 || lanes > LANES_MAX {
            return Err(WireError::Value {
                what: "lane count",
                got: lanes.into(),
            });
        }
        let token = r.bytes("token", TOKEN_BYTES_MAX)?;
        let host = HostIdentity {
            boot_id: r.id()?,
            user_id: r.u32()?,
            socket_name: r.text("socket name", 100)?,
            probe_address: r.u64()?,
            probe_cookie: r.id()?,
        };
        let flags = r.u8()?;
        if flags > 3 {
            return Err(WireError::Value {
                what: "hello flags",
                got: flags.into(),
            });
        }
        let shares: Vec<_> = (0..r.count("share count", SHARES_MAX, 4)?)
            .map(|_| r.bytes("share", SHARE_BYTES_MAX))
            .collect::<Result<_, WireError>>()?;
        let regions = (0..r.count("region count", REGIONS_MAX, 17)?)
            .map(|_| read_region(r, shares.len()))
            .collect::<Result<_, WireError>>()?;
        let rails = (0..r.count("rail count", RAILS_MAX, 22)?)
            .map(|_| RailOffer::read(r))
            .collect::<Result<_, WireError>>()?;
        let layout = read_layout(r)?;
        Ok(Self {
            instance,
            generation,
            link,
            lanes,
            token,
            host,
            regions,
            shares,
            by_address: flags & 1 != 0,
            null_wire: flags & 2 != 0,
            rails,
            layout,
        })
    }
}

fn write_region(w: &mut Writer<'_>, region: &RegionAddress) {
    w.u64(region.base);
    w.u64(region.len);
    match region.place {
        Place::Host => w.u8(0),
        Place::Device => w.u8(1),
        Place::Shared { share, offset } => {
            w.u8(2);
            w.u32(share);
            w.u64(offset);
        }
    }
}

fn read_region(r: &mut Reader<'_>, shares: usize) -> Result<RegionAddress, WireError> {
    let (base, len) = (r.u64()?, r.u64()?);
    let place = match r.u8()? {
        0 => Place::Host,
        1 => Place::Device,
        2 => {
            let (share, offset) = (r.u32()?, r.u64()?);
            if share as usize >= shares {
                return Err(WireError::Value {
                    what: "share index",
                    got: share.into(),
                });
            }
            Place::Shared { share, offset }
        }
        got => {
            return Err(WireError::Value {
                what: "place of a region",
                got: got.into(),
            });
        }
    };
    Ok(RegionAddress { base, len, place })
}

/// Most bytes of the reason against RDMA that a [`Face`] tells; a longer one is cut.
const REFUSAL_BYTES_MAX: usize = 2048;

/// What an engine shows to somebody who only looks: how it would connect, and nothing that gives access to memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Face {
    /// As in [`HostIdentity`].
    pub boot_id: [u8; 16],
    /// Its RDMA devices and how each connects.
    pub rails: Vec<(String, Connector)>,
    /// Why it uses no RDMA device, empty if it does.
    pub refusal: String,
}

impl Face {
    pub(super) fn write(&self, w: &mut Writer<'_>) {
        w.raw(&self.boot_id);
        w.count(self.rails.len());
        for (name, connector) in &self.rails {
            w.text(name);
            connector.write(w);
        }
        let most = self.refusal.len().min(REFUSAL_BYTES_MAX);
        let mut ends = (0..=most).rev();
        let end = ends.find(|end| self.refusal.is_char_boundary(*end));
        w.text(&self.refusal[..end.unwrap_or(0)]);
    }

    pub(super) fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            boot_id: r.id()?,
            rails: (0..r.count("rail count", RAILS_MAX, 5)?)
                .map(|_| Ok((r.text("device name", NAME_BYTES_MAX)?, Connector::read(r)?)))
                .collect::<Result<_, WireError>>()?,
            refusal: r.text("refusal", REFUSAL_BYTES_MAX)?,
        })
    }
}

fn write_shard(w: &mut Writer<'_>, shard: Shard) {
    w.u32(shard.rank);
    w.u32(shard.size);
}

fn read_shard(r: &mut Reader<'_>) -> Result<Shard, WireError> {
    Ok(Shard {
        rank: r.u32()?,
        size: r.u32()?,
    })
}

fn write_layout(w: &mut Writer<'_>, layout: &Layout) {
    w.u32(layout.page_size);
    w.text(&layout.kv_dtype);
    w.text(&layout.kv_layout);
    let (total, rank) = match layout.attention {
        Attention::Heads {
            total_kv_heads,
            rank_kv_heads,
        } => (total_kv_heads, rank_kv_heads),
        Attention::Latent => (0, 0),
    };
    w.u32(total);
    w.u32(rank);
    write_shard(w, layout.tp);
    write_shard(w, layout.pp);
    w.u32(layout.layers.start);
    w.u32(layout.layers.end);
    w.count(layout.components.len());
    for component in &layout.components {
        match &component.kind {
            ComponentKind::Kv => w.u8(0),
            ComponentKind::Aux => w.u8(1),
            ComponentKind::State(name) => {
                w.u8(2);
                w.text(name);
            }
        }
        w.u32(component.draft_entries);
        w.count(component.entries.len());
        for entry in &component.entries {
            w.u32(entry.region.0);
            w.u64(entry.offset);
            w.u64(entry.item_len);
            w.u64(entry.item_count);
            w.u8(u8::from(entry.layer_id.is_some()));
            w.u32(entry.layer_id.unwrap_or(0));
        }
        write_shape(w, &component.state);
    }
}

fn read_layout(r: &mut Reader<'_>) -> Result<Layout, WireError> {
    let page_size = r.u32()?;
    let kv_dtype = r.text("dtype name", NAME_BYTES_MAX)?;
    let kv_layout = r.text("page layout name", NAME_BYTES_MAX)?;
    let (total_kv_heads, rank_kv_heads) = (r.u32()?, r.u32()?);
    let attention = if total_kv_heads == 0 {
        Attention::Latent
    } else {
        Attention::Heads {
            total_kv_heads,
            rank_kv_heads,
        }
    };
    let (tp, pp) = (read_shard(r)?, read_shard(r)?);
    let layers = r.u32()?..r.u32()?;
    let components = (0..r.count("component count", COMPONENTS_MAX, 9)?)
        .map(|_| read_component(r))
        .collect::<Result<_, _>>()?;
    Ok(Layout {
        page_size,
        kv_dtype,
        kv_layout,
        attention,
        tp,
        pp,
        layers,
        components,
    })
}

fn read_component(r: &mut Reader<'_>) -> Result<Component, WireError> {
    let kind = match r.u8()? {
        0 => ComponentKind::Kv,
        1 => ComponentKind::Aux,
        2 => ComponentKind::State(r.text("state type", NAME_BYTES_MAX)?),
        got => {
            return Err(WireError::Value {
                what: "component kind",
                got: got.into(),
            });
        }
    };
    let draft_entries = r.u32()?;
    let entries = (0..r.count("entry count", ENTRIES_MAX, 33)?)
        .map(|_| {
            let region = RegionId(r.u32()?);
            let (offset, item_len, item_count) = (r.u64()?, r.u64()?, r.u64()?);
            let named = r.u8()? != 0;
            let layer = r.u32()?;
            let layer_id = named.then_some(layer);
            Ok(Entry {
                region,
                offset,
                item_len,
                item_count,
                layer_id,
            })
        })
        .collect::<Result<_, WireError>>()?;
    let state = read_shape(r)?;
    Ok(Component {
        kind,
        entries,
        draft_entries,
        state,
    })
}

fn write_shape(w: &mut Writer<'_>, shape: &StateShape) {
    w.text(shape.page_layout.as_deref().unwrap_or(""));
    w.count(shape.slices.len());
    for slice in &shape.slices {
        w.u32(slice.dim);
        w.u32(slice.rows);
        w.count(slice.groups.len());
        slice.groups.iter().for_each(|group| w.u32(*group));
    }
}

fn read_shape(r: &mut Reader<'_>) -> Result<StateShape, WireError> {
    let page_layout = r.text("state page layout name", NAME_BYTES_MAX)?;
    let page_layout = (!page_layout.is_empty()).then_some(page_layout);
    let slices = (0..r.count("slice count", ENTRIES_MAX, 12)?)
        .map(|_| {
            let (dim, rows) = (r.u32()?, r.u32()?);
            let groups = (0..r.count("sub-block count", SLICE_GROUPS_MAX, 4)?)
                .map(|_| r.u32())
                .collect::<Result<_, WireError>>()?;
            Ok(StateSlice { dim, rows, groups })
        })
        .collect::<Result<_, WireError>>()?;
    Ok(StateShape {
        slices,
        page_layout,
    })
}
