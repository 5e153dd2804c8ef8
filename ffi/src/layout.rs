//! The caller's description of its KV memory: buffers by address. Regions are made of them here.
#![expect(unsafe_code, reason = "C passes lists as raw pointers")]

use std::{ffi::c_char, ptr::NonNull, sync::Arc};

use kvt::{
    engine::Memory,
    gpu::CudaDevice,
    layout::{
        Attention, COMPONENTS_MAX, Component, ComponentKind, ENTRIES_MAX, Entry, Layout, RegionId,
        Shard, StateShape, StateSlice, name_ratio_layers,
    },
    memory::{Region, device::Device},
    wire::hello::REGIONS_MAX,
};

use crate::{
    argument::{list, one, text},
    regions::{Regions, Stretch},
    status::{Failure, KVT_BAD_LAYOUT, KVT_REGION, KVT_WRONG_ABI},
    version::KVT_ABI_VERSION,
};

/// `kvt_entry_t.memory`: ordinary memory of this process.
pub const KVT_HOST_MEMORY: i32 = 0;
/// `kvt_entry_t.memory`: memory of the CUDA device `device`.
pub const KVT_CUDA_MEMORY: i32 = 1;

/// `kvt_component_t.kind`: the paged KV cache; its items are pages. First, and exactly once.
pub const KVT_COMPONENT_KV: i32 = 0;
/// `kvt_component_t.kind`: a state component, by SGLang's name for it; its items are slots or pages.
pub const KVT_COMPONENT_STATE: i32 = 1;
/// `kvt_component_t.kind`: the metadata rows; its items are slots. Last, and at most once. The last entry's bytes become
/// visible last.
pub const KVT_COMPONENT_AUX: i32 = 2;

/// `kvt_component_t.kind`: memory that is only written and read by address (`kvt_engine_write`). It may stand anywhere, is
/// no component for lists of items, and `item_len` is not looked at. A layout with nothing else needs no other field but
/// `abi_version`.
pub const KVT_COMPONENT_MEMORY: i32 = 3;

/// `kvt_layout_t.attention`: keys and values per head; entries are all K layers, then all V layers, then the draft
/// model's.
pub const KVT_ATTENTION_HEADS: i32 = 0;
/// `kvt_layout_t.attention`: a latent cache (MLA), one entry per layer, the same on every tensor-parallel rank.
pub const KVT_ATTENTION_LATENT: i32 = 1;

/// A UTF-8 text of the caller's, read during the call only.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvt_text_t {
    /// First byte. May be NULL if `len` is 0.
    pub data: *const c_char,
    /// Bytes, without any NUL at the end.
    pub len: usize,
}

/// One buffer: `len / item_len` items of `item_len` bytes, back to back.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvt_entry_t {
    /// Where it starts.
    pub address: u64,
    /// Bytes. With 0 the entry is elided: it keeps its place in the order and has no bytes.
    pub len: u64,
    /// Bytes of one item: for KV, one page of one layer on this rank.
    pub item_len: u64,
    /// The model-wide layer number, or -1 where the pool does not name its layers. All entries of a component or none.
    pub layer_id: i64,
    /// `KVT_HOST_MEMORY` or `KVT_CUDA_MEMORY`.
    pub memory: i32,
    /// The CUDA device's number; not looked at for host memory.
    pub device: i32,
}

/// How one tensor of a "mamba" state is spread over tensor-parallel ranks.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvt_slice_t {
    /// Channels on this rank (SGLang's `state_dim_per_tensor`); 0 where every rank holds the whole tensor.
    pub dim: u32,
    /// Rows in front of the channels (SGLang's `state_slice_outer_counts`), at least 1.
    pub rows: u32,
    /// Channels of the whole model's sub-blocks where each is sharded by itself (SGLang's `state_conv_shard_groups`).
    pub groups: *const u32,
    /// How many; 0 where the channels are one block.
    pub groups_len: usize,
}

/// Buffers that share one list of item indices.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvt_component_t {
    /// `KVT_COMPONENT_KV`, `KVT_COMPONENT_STATE` or `KVT_COMPONENT_AUX`.
    pub kind: i32,
    /// How many of the last entries belong to a speculative draft model (KV only, else 0).
    pub draft_entries: u32,
    /// SGLang's name of a state component, such as "mamba"; empty for the others. The items of "dsa_tail" are the slots
    /// of its rings (`item_len` is a row's bytes divided by the ring's size), and its lists are SGLang's six numbers.
    pub name: kvt_text_t,
    /// The buffers, in the order both sides agree on.
    pub entries: *const kvt_entry_t,
    /// How many.
    pub entries_len: usize,
    /// For each entry of a "mamba" state, how it is spread. May be left out: then it cannot be re-cut for another
    /// tensor-parallel size.
    pub slices: *const kvt_slice_t,
    /// How many: `entries_len`, or 0.
    pub slices_len: usize,
    /// A state's page layout where it is not the layout's own (SGLang's `swa_kv_cache_layout`), else empty.
    pub page_layout: kvt_text_t,
}

/// What a rank's KV memory looks like. Read during `kvt_engine_new` only.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvt_layout_t {
    /// `KVT_ABI_VERSION`.
    pub abi_version: u32,
    /// Tokens per page.
    pub page_size: u32,
    /// Element type as SGLang spells it, such as "bfloat16".
    pub kv_dtype: kvt_text_t,
    /// Page layout, such as "nhd". Only "nhd" can be cut by heads, for unequal tensor parallelism.
    pub kv_layout: kvt_text_t,
    /// `KVT_ATTENTION_HEADS` or `KVT_ATTENTION_LATENT`.
    pub attention: i32,
    /// KV heads of the whole model; not looked at for a latent cache.
    pub total_kv_heads: u32,
    /// KV heads of this rank, at least 1; not looked at for a latent cache.
    pub rank_kv_heads: u32,
    /// This rank in its attention tensor-parallel group.
    pub tp_rank: u32,
    /// Ranks in that group.
    pub tp_size: u32,
    /// This rank in its pipeline-parallel group.
    pub pp_rank: u32,
    /// Ranks in that group.
    pub pp_size: u32,
    /// First layer held by this rank, draft layers not counted.
    pub first_layer: u32,
    /// One past the last layer held by this rank.
    pub end_layer: u32,
    /// 0.
    pub reserved: u32,
    /// KV first, then states, then aux.
    pub components: *const kvt_component_t,
    /// How many.
    pub components_len: usize,
    /// DeepSeek-V4: the compression ratio of every layer of the whole model. Buffers grouped by it are paired by layer
    /// then. NULL for other models.
    pub compression_ratios: *const u32,
    /// How many.
    pub compression_ratios_len: usize,
}

/// The library's view of the caller's memory; copies on its GPUs take at most `percent` of their multiprocessors.
///
/// # Safety
/// `layout` is NULL or points to a layout whose lists and texts are as long as they say and do not change during the
/// call; the buffers stay readable and writable until the engine that is made of them has shut down.
pub(crate) unsafe fn described(
    layout: *const kvt_layout_t,
    percent: u32,
) -> Result<(Memory, Layout), Failure> {
    // SAFETY: the caller's contract is ours.
    let layout = unsafe { one(layout, "layout") }?;
    if layout.abi_version != KVT_ABI_VERSION {
        let text = format!(
            "the caller was compiled with version {} of kvtransfer.h, this library has version {KVT_ABI_VERSION}: \
             install matching versions of both",
            layout.abi_version
        );
        return Err(Failure::new(KVT_WRONG_ABI, text));
    }
    // SAFETY: the caller's contract is ours.
    let given = unsafe {
        list(
            layout.components,
            layout.components_len,
            "layout.components",
        )
    }?;
    // SAFETY: the caller's contract is ours.
    let components = unsafe { read_components(given) }?;
    let regions = regions_of(&components)?;
    let memory = memory_over(&regions, percent)?;
    let is_raw =
        !components.is_empty() && components.iter().all(|component| component.kind.is_none());
    if is_raw {
        return Ok((memory, Layout::raw()));
    }
    let components = components.into_iter();
    let components = components.filter_map(|component| component.placed(&regions));
    // SAFETY: the caller's contract is ours.
    let layout = unsafe { layout_of(layout, components.collect()) }?;
    Ok((memory, layout))
}

/// The layout of these components.
///
/// # Safety
/// As for [`described`].
unsafe fn layout_of(layout: &kvt_layout_t, components: Vec<Component>) -> Result<Layout, Failure> {
    if layout.reserved != 0 {
        return Err(Failure::argument("`layout.reserved` must be 0"));
    }
    let attention = match layout.attention {
        KVT_ATTENTION_HEADS => Attention::Heads {
            total_kv_heads: layout.total_kv_heads,
            rank_kv_heads: layout.rank_kv_heads,
        },
        KVT_ATTENTION_LATENT => Attention::Latent,
        other => {
            let text = format!("`layout.attention` is {other}, no KVT_ATTENTION_ number");
            return Err(Failure::argument(text));
        }
    };
    // SAFETY: the caller's contract is ours.
    let kv_dtype = unsafe { text(layout.kv_dtype.data, layout.kv_dtype.len, "layout.kv_dtype") }?;
    // SAFETY: the caller's contract is ours.
    let kv_layout = unsafe {
        text(
            layout.kv_layout.data,
            layout.kv_layout.len,
            "layout.kv_layout",
        )
    }?;
    // SAFETY: the caller's contract is ours.
    let ratios = unsafe {
        list(
            layout.compression_ratios,
            layout.compression_ratios_len,
            "layout.compression_ratios",
        )
    }?;
    let mut layout = Layout {
        page_size: layout.page_size,
        kv_dtype: kv_dtype.to_owned(),
        kv_layout: kv_layout.to_owned(),
        attention,
        tp: Shard {
            rank: layout.tp_rank,
            size: layout.tp_size,
        },
        pp: Shard {
            rank: layout.pp_rank,
            size: layout.pp_size,
        },
        layers: layout.first_layer..layout.end_layer,
        components,
    };
    if !ratios.is_empty() {
        let layers = layout.layers.clone();
        for component in &mut layout.components {
            name_ratio_layers(component, ratios, layers.clone())
                .map_err(|error| Failure::new(KVT_BAD_LAYOUT, error.to_string()))?;
        }
    }
    Ok(layout)
}

/// A component whose entries are still addresses.
struct Described {
    /// `None` for memory without items.
    kind: Option<ComponentKind>,
    draft_entries: u32,
    entries: Vec<kvt_entry_t>,
    state: StateShape,
}

impl Described {
    /// The library's component, unless it is memory without items.
    fn placed(self, regions: &Regions) -> Option<Component> {
        let kind = self.kind?;
        let place = |entry: kvt_entry_t| {
            // An elided entry lies nowhere; the first region stands in for it.
            let (region, offset) = regions.find(entry.address).unwrap_or((0, 0));
            Entry {
                region: RegionId(u32::try_from(region).unwrap_or(u32::MAX)),
                offset,
                item_len: if entry.len == 0 { 0 } else { entry.item_len },
                item_count: entry.len.checked_div(entry.item_len).unwrap_or(0),
                layer_id: u32::try_from(entry.layer_id).ok(),
            }
        };
        Some(Component {
            kind,
            entries: self.entries.into_iter().map(place).collect(),
            draft_entries: self.draft_entries,
            state: self.state,
        })
    }
}

/// # Safety
/// As for [`described`].
unsafe fn read_components(given: &[kvt_component_t]) -> Result<Vec<Described>, Failure> {
    let mut components = Vec::with_capacity(given.len().min(COMPONENTS_MAX));
    for (at, component) in given.iter().enumerate() {
        let what = format!("component {at}'s name");
        // SAFETY: the caller's contract is ours.
        let name = unsafe { text(component.name.data, component.name.len, &what) }?;
        let kind = match component.kind {
            KVT_COMPONENT_KV => Some(ComponentKind::Kv),
            KVT_COMPONENT_STATE => Some(ComponentKind::State(name.to_owned())),
            KVT_COMPONENT_AUX => Some(ComponentKind::Aux),
            KVT_COMPONENT_MEMORY => None,
            other => {
                let text = format!("component {at} has kind {other}, no KVT_COMPONENT_ number");
                return Err(Failure::argument(text));
            }
        };
        let what = format!("component {at}'s entries");
        // SAFETY: the caller's contract is ours.
        let entries = unsafe { list(component.entries, component.entries_len, &what) }?;
        let called = kind
            .as_ref()
            .map_or_else(|| "memory".to_owned(), ToString::to_string);
        for (place, entry) in entries.iter().enumerate() {
            check_entry(
                entry,
                kind.is_some(),
                &format!("entry {place} of component {at} ({called})"),
            )?;
        }
        components.push(Described {
            kind,
            draft_entries: component.draft_entries,
            entries: entries.to_vec(),
            // SAFETY: the caller's contract is ours.
            state: unsafe { state_of(at, component) }?,
        });
    }
    Ok(components)
}

/// # Safety
/// As for [`described`].
unsafe fn state_of(at: usize, component: &kvt_component_t) -> Result<StateShape, Failure> {
    let what = format!("component {at}'s slices");
    // SAFETY: the caller's contract is ours.
    let given = unsafe { list(component.slices, component.slices_len, &what) }?;
    let mut slices = Vec::with_capacity(given.len().min(ENTRIES_MAX));
    for (place, slice) in given.iter().enumerate() {
        let what = format!("the groups of slice {place} of component {at}");
        // SAFETY: the caller's contract is ours.
        let groups = unsafe { list(slice.groups, slice.groups_len, &what) }?;
        slices.push(StateSlice {
            dim: slice.dim,
            rows: slice.rows,
            groups: groups.to_vec(),
        });
    }
    let (data, len) = (component.page_layout.data, component.page_layout.len);
    // SAFETY: the caller's contract is ours.
    let page_layout = unsafe { text(data, len, &format!("component {at}'s page layout")) }?;
    let page_layout = Some(page_layout).filter(|name| !name.is_empty());
    Ok(StateShape {
        slices,
        page_layout: page_layout.map(str::to_owned),
    })
}

fn check_entry(entry: &kvt_entry_t, has_items: bool, what: &str) -> Result<(), Failure> {
    match entry.memory {
        KVT_HOST_MEMORY => {}
        KVT_CUDA_MEMORY if entry.device >= 0 => {}
        KVT_CUDA_MEMORY => {
            let text = format!(
                "{what} is on CUDA device {}, no device's number",
                entry.device
            );
            return Err(Failure::argument(text));
        }
        other => {
            let text = format!("{what} has memory kind {other}, no KVT_..._MEMORY number");
            return Err(Failure::argument(text));
        }
    }
    if entry.layer_id < -1 || entry.layer_id > i64::from(u32::MAX) {
        let id = entry.layer_id;
        return Err(Failure::argument(format!(
            "{what} has layer id {id}; -1 is for none"
        )));
    }
    if has_items && entry.len > 0 && entry.item_len == 0 {
        let text = format!(
            "{what} has {} bytes of items without length; an elided entry has len 0",
            entry.len
        );
        return Err(Failure::new(KVT_BAD_LAYOUT, text));
    }
    Ok(())
}

fn regions_of(components: &[Described]) -> Result<Regions, Failure> {
    let mut stretches = Vec::new();
    for (at, component) in components.iter().enumerate() {
        for (place, entry) in component.entries.iter().enumerate() {
            if entry.len > 0 {
                let what = format!("entry {place} of component {at}");
                let gpu = u32::try_from(entry.device).ok();
                let gpu = gpu.filter(|_| entry.memory == KVT_CUDA_MEMORY);
                stretches.push(Stretch::new(entry.address, entry.len, gpu, &what)?);
            }
        }
    }
    let regions = Regions::covering(stretches)?;
    let count = regions.all().len();
    if count > REGIONS_MAX {
        let text = format!(
            "the layout's buffers are {count} separate stretches of memory, the limit is {REGIONS_MAX}"
        );
        return Err(Failure::new(KVT_BAD_LAYOUT, text));
    }
    Ok(regions)
}

fn memory_over(regions: &Regions, percent: u32) -> Result<Memory, Failure> {
    let mut memory = Memory::new();
    let mut devices: Vec<(u32, Arc<dyn Device>)> = Vec::new();
    for stretch in regions.all() {
        let impossible = || {
            let text = format!(
                "{:#x}..{:#x} is outside of this process",
                stretch.start, stretch.end
            );
            Failure::new(KVT_REGION, text)
        };
        let start = usize::try_from(stretch.start).map_err(|_| impossible())?;
        let len = usize::try_from(stretch.end - stretch.start).map_err(|_| impossible())?;
        if len > isize::MAX.unsigned_abs() {
            return Err(impossible());
        }
        if let Some(gpu) = stretch.gpu {
            let known = devices.iter().find(|(known, _)| *known == gpu);
            let device = match known {
                Some((_, device)) => Arc::clone(device),
                None => {
                    let opened = CudaDevice::open(gpu, percent);
                    let opened = opened.map_err(|error| {
                        Failure::new(KVT_REGION, format!("CUDA device {gpu}: {error}"))
                    })?;
                    let opened: Arc<dyn Device> = Arc::new(opened);
                    devices.push((gpu, Arc::clone(&opened)));
                    opened
                }
            };
            // SAFETY: as below, for memory of the device.
            let region = unsafe { Region::device(device, stretch.start, len) };
            let region = region.map_err(|error| Failure::new(KVT_REGION, error.to_string()))?;
            memory.add(region);
            continue;
        }
        // The caller's pointers arrive as numbers, so their provenance is exposed.
        let start = std::ptr::with_exposed_provenance_mut::<u8>(start);
        let start = NonNull::new(start).ok_or_else(impossible)?;
        // SAFETY: `kvt_engine_new`'s caller promised that the buffers stay usable until the engine has shut down; after
        // that the engine's regions are touched no more.
        memory.add(unsafe { Region::external(start, len) });
    }
    Ok(memory)
}

#[cfg(test)]
mod tests;
