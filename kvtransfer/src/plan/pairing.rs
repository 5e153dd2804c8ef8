//! Pairs the buffers of a source rank with those of a target rank, once, before any byte moves (promise P7).
//!
//! The result depends on nothing but the two layouts, so both ranks compute the same one, and a byte of a chunk is
//! named by its place in the stream rather than by an address (see `plan::stream`). Where several source ranks hold
//! the same bytes (replicated heads, a latent cache, aux rows), one of them moves them and the others get no pieces:
//! the union over all sources of a target covers every byte exactly once.
#![forbid(unsafe_code)]

use super::heads::{self, Cut, Share};
use super::matching::{self, EntryPair};
use super::mismatch::{End, LayoutMismatch};
use super::states::{self, Way};
use crate::layout::{Attention, Component, ComponentKind, Entry, IndexRule, Layout, RegionId};

/// How the memory of one source rank meets that of one target rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pairing {
    /// In the order of the layouts' components: KV, states, aux.
    pub components: Vec<ComponentPairing>,
}

/// The paired buffers of one component.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ComponentPairing {
    kind: ComponentKind,
    rule: IndexRule,
    pieces: Vec<Piece>,
    /// Bytes per item through each piece, ascending.
    ends: Vec<u64>,
    /// Bytes per item of every piece where they are all the same, else 0.
    uniform: u64,
    source_items: u64,
    target_items: u64,
}

/// One paired buffer. Each item moves `rows` rows of `row_len` bytes: a whole item is one row, a head slice has a row
/// per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where the bytes are read.
    pub source: Side,
    /// Where the bytes are written.
    pub target: Side,
    /// Rows per item, at least 1.
    pub rows: u32,
    /// Bytes per row, at least 1.
    pub row_len: u64,
}

/// One end of a piece. Row `r` of item `i` starts at `base + i * item_stride + r * row_stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Side {
    /// The region that holds the buffer.
    pub region: RegionId,
    /// Where the first wanted byte of item 0 lies in the region, head offset included.
    pub base: u64,
    /// Bytes from one item to the next.
    pub item_stride: u64,
    /// Bytes from one row to the next.
    pub row_stride: u64,
    /// Items in the buffer.
    pub item_count: u64,
}

/// Pairs two layouts.
///
/// # Errors
/// [`LayoutMismatch`], the first reason found why these ranks cannot exchange their memory.
pub fn pair(source: &Layout, target: &Layout) -> Result<Pairing, LayoutMismatch> {
    for (end, layout) in [(End::Source, source), (End::Target, target)] {
        layout
            .validate()
            .map_err(|error| LayoutMismatch::Invalid { end, error })?;
    }
    same_model(source, target)?;
    same_components(source, target)?;
    heads::ranks_meet(source.tp, target.tp)?;
    matching::layers_meet(source, target)?;
    let kv = heads::kv_share(source, target)?;
    let pair_one = |place| pair_component(source, target, place, kv);
    let components = (0..source.components.len())
        .map(pair_one)
        .collect::<Result<_, _>>()?;
    Ok(Pairing { components })
}

impl Pairing {
    /// One component of one item that moves these pieces.
    pub(super) fn of_pieces(pieces: Vec<Piece>) -> Self {
        let only = ComponentPairing::new(ComponentKind::Kv, pieces, 1, 1);
        Self {
            components: vec![only],
        }
    }
}

impl ComponentPairing {
    /// What the component is for.
    pub fn kind(&self) -> &ComponentKind {
        &self.kind
    }

    /// How the two sides' index lists must agree.
    pub fn index_rule(&self) -> IndexRule {
        self.rule
    }

    /// The paired buffers in stream order. Empty where another source rank moves this component's bytes.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Bytes that one item moves, all pieces together.
    pub fn item_bytes(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Indices that all buffers of that end can take, `0..item_count`.
    pub fn item_count(&self, end: End) -> u64 {
        match end {
            End::Source => self.source_items,
            End::Target => self.target_items,
        }
    }

    /// Bytes per item of the pieces before `piece`.
    pub(super) fn start_of(&self, piece: usize) -> u64 {
        if piece == 0 { 0 } else { self.ends[piece - 1] }
    }

    /// The piece that holds the stream byte `at` when every piece has `items` items; the piece count at the end of
    /// the stream. Constant time where all pieces have one length, else a binary search.
    pub(super) fn piece_at(&self, at: u64, items: u64) -> usize {
        if self.uniform > 0 && items > 0 {
            let piece = at / (self.uniform * items);
            return usize::try_from(piece)
                .unwrap_or(usize::MAX)
                .min(self.pieces.len());
        }
        self.ends.partition_point(|end| end * items <= at)
    }

    fn new(kind: ComponentKind, pieces: Vec<Piece>, source_items: u64, target_items: u64) -> Self {
        let mut total = 0;
        let mut ends = Vec::with_capacity(pieces.len());
        for piece in &pieces {
            total += piece.item_bytes();
            ends.push(total);
        }
        let first = pieces.first().map_or(0, Piece::item_bytes);
        let is_uniform = pieces.iter().all(|piece| piece.item_bytes() == first);
        let uniform = if is_uniform { first } else { 0 };
        Self {
            rule: kind.index_rule(),
            kind,
            pieces,
            ends,
            uniform,
            source_items,
            target_items,
        }
    }
}

impl Piece {
    /// Bytes that one item moves.
    #[must_use]
    pub fn item_bytes(&self) -> u64 {
        u64::from(self.rows) * self.row_len
    }

    /// Whether each item is one row that ends where the next item begins, on both sides.
    #[must_use]
    pub fn is_dense(&self) -> bool {
        let touches = |side: &Side| side.item_stride == self.row_len;
        self.rows == 1 && touches(&self.source) && touches(&self.target)
    }

    /// One end of it.
    #[must_use]
    pub fn side(&self, end: End) -> &Side {
        match end {
            End::Source => &self.source,
            End::Target => &self.target,
        }
    }
}

fn same_model(source: &Layout, target: &Layout) -> Result<(), LayoutMismatch> {
    if source.page_size != target.page_size {
        let (source_tokens, target_tokens) = (source.page_size, target.page_size);
        return Err(LayoutMismatch::PageSize {
            source_tokens,
            target_tokens,
        });
    }
    if source.kv_dtype != target.kv_dtype {
        let (source_dtype, target_dtype) = (source.kv_dtype.clone(), target.kv_dtype.clone());
        return Err(LayoutMismatch::KvDtype {
            source_dtype,
            target_dtype,
        });
    }
    if source.kv_layout != target.kv_layout {
        let (source_layout, target_layout) = (source.kv_layout.clone(), target.kv_layout.clone());
        return Err(LayoutMismatch::KvLayout {
            source_layout,
            target_layout,
        });
    }
    match (source.attention, target.attention) {
        (Attention::Latent, Attention::Latent) => Ok(()),
        (
            Attention::Heads {
                total_kv_heads: source_heads,
                ..
            },
            Attention::Heads {
                total_kv_heads: target_heads,
                ..
            },
        ) if source_heads == target_heads => Ok(()),
        (
            Attention::Heads {
                total_kv_heads: source_heads,
                ..
            },
            Attention::Heads {
                total_kv_heads: target_heads,
                ..
            },
        ) => Err(LayoutMismatch::TotalHeads {
            source_heads,
            target_heads,
        }),
        (from, to) => Err(LayoutMismatch::Attention {
            source_attention: attention_name(from),
            target_attention: attention_name(to),
        }),
    }
}

fn attention_name(attention: Attention) -> &'static str {
    match attention {
        Attention::Heads { .. } => "heads (MHA or GQA)",
        Attention::Latent => "a latent vector (MLA)",
    }
}

fn same_components(source: &Layout, target: &Layout) -> Result<(), LayoutMismatch> {
    for place in 0..source.components.len().max(target.components.len()) {
        let source_kind = source
            .components
            .get(place)
            .map(|component| &component.kind);
        let target_kind = target
            .components
            .get(place)
            .map(|component| &component.kind);
        if source_kind != target_kind {
            let (source_kind, target_kind) = (source_kind.cloned(), target_kind.cloned());
            return Err(LayoutMismatch::Components {
                place,
                source_kind,
                target_kind,
            });
        }
    }
    Ok(())
}

/// The buffers are matched for every rank, also for one that turns out to have nothing to move, so that all ranks of
/// a wrong deployment complain.
fn pair_component(
    source: &Layout,
    target: &Layout,
    place: usize,
    kv: Share,
) -> Result<ComponentPairing, LayoutMismatch> {
    let (from, to) = (&source.components[place], &target.components[place]);
    let kind = from.kind.clone();
    let (way, pairs) = match &kind {
        ComponentKind::Kv => (Way::Share(kv), kv_pairs(source, target, place)?),
        ComponentKind::State(name) => {
            let way = states::way(source, target, place, name, kv)?;
            let halves = states::has_halves(name, source.attention);
            (way, matching::main_pairs(source, target, place, halves)?)
        }
        ComponentKind::Aux => {
            let share = aux_share(source, target);
            (Way::Share(share), matching::aux_pairs(from, to))
        }
    };
    let mut pieces = Vec::with_capacity(pairs.len());
    for pair in pairs {
        match way {
            Way::Share(share) => pieces.extend(piece(from, to, pair, source.page_size, share)?),
            Way::Sliced => pieces.extend(states::slice_pieces(source, target, place, pair)?),
        }
    }
    Ok(ComponentPairing::new(
        kind,
        pieces,
        from.item_count(),
        to.item_count(),
    ))
}

fn kv_pairs(
    source: &Layout,
    target: &Layout,
    place: usize,
) -> Result<Vec<EntryPair>, LayoutMismatch> {
    let halves = matches!(source.attention, Attention::Heads { .. });
    let mut pairs = matching::main_pairs(source, target, place, halves)?;
    if matching::leads_stages(source, target) {
        let (from, to) = (&source.components[place], &target.components[place]);
        pairs.extend(matching::draft_pairs(from, to)?);
    }
    Ok(pairs)
}

/// All ranks that feed a target hold the same aux rows; SGLang lets each of them write, here one does.
fn aux_share(source: &Layout, target: &Layout) -> Share {
    let leads = heads::leads_block(source.tp, target.tp) && matching::leads_stages(source, target);
    if leads { Share::Whole } else { Share::Nothing }
}

/// The piece of one pair of entries, none if the pair is elided or another rank's.
fn piece(
    from: &Component,
    to: &Component,
    (source_entry, target_entry): EntryPair,
    page_size: u32,
    share: Share,
) -> Result<Option<Piece>, LayoutMismatch> {
    let (source, target) = (&from.entries[source_entry], &to.entries[target_entry]);
    let (source_len, target_len) = (source.item_len, target.item_len);
    let may_skip_target = target_len == 0 && states::may_target_elide(&from.kind);
    if source_len == 0 || may_skip_target {
        return Ok(None);
    }
    let component = || from.kind.clone();
    match share {
        Share::Nothing => Ok(None),
        Share::Whole if source_len == target_len => Ok(Some(Piece {
            source: whole_side(source),
            target: whole_side(target),
            rows: 1,
            row_len: source_len,
        })),
        Share::Whole => Err(LayoutMismatch::ItemLen {
            component: component(),
            source_entry,
            target_entry,
            source_len,
            target_len,
        }),
        Share::Cut(cut) => cut_piece(source, target, page_size, &cut)
            .map(Some)
            .ok_or_else(|| LayoutMismatch::HeadBytes {
                component: component(),
                source_entry,
                source_len,
                source_heads: cut.source_heads,
                target_entry,
                target_len,
                target_heads: cut.target_heads,
                page_size,
            }),
    }
}

fn whole_side(entry: &Entry) -> Side {
    let Entry {
        region,
        offset,
        item_len,
        item_count,
        ..
    } = *entry;
    Side {
        region,
        base: offset,
        item_stride: item_len,
        row_stride: item_len,
        item_count,
    }
}

/// A row per token. `None` if the pages do not divide into tokens and heads of one size on both ends.
fn cut_piece(source: &Entry, target: &Entry, page_size: u32, cut: &Cut) -> Option<Piece> {
    let head_len = head_len(source, page_size, cut.source_heads)?;
    if head_len != self::head_len(target, page_size, cut.target_heads)? {
        return None;
    }
    let side = |entry: &Entry, first: u32, held: u32| Side {
        region: entry.region,
        base: entry.offset + u64::from(first) * head_len,
        item_stride: entry.item_len,
        row_stride: u64::from(held) * head_len,
        item_count: entry.item_count,
    };
    Some(Piece {
        source: side(source, cut.source_first, cut.source_heads),
        target: side(target, cut.target_first, cut.target_heads),
        rows: page_size,
        row_len: u64::from(cut.heads) * head_len,
    })
}

/// Bytes of one head of one token.
fn head_len(entry: &Entry, page_size: u32, heads: u32) -> Option<u64> {
    let parts = u64::from(page_size) * u64::from(heads);
    let is_even = entry.item_len.is_multiple_of(parts);
    is_even.then_some(entry.item_len / parts)
}
