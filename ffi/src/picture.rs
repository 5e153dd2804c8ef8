//! What an engine is and does, as JSON.
#![forbid(unsafe_code)]

use kvt::{
    engine::Engine,
    layout::{Attention, Component, RegionId},
    telemetry::snapshot::{RailStat, RoomRole, RoomStat},
};
use serde_json::{Map, Value, json};

/// The whole picture.
pub(crate) fn of(engine: &Engine) -> Value {
    let snapshot = engine.snapshot();
    let nothing = engine.null_counts();
    let address =
        |address: Option<std::net::SocketAddr>| address.map(|address| address.to_string());
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "abi_version": crate::version::KVT_ABI_VERSION,
        "instance": engine.instance().to_string(),
        "listen": address(engine.local_addr()),
        "bootstrap": address(engine.bootstrap_addr()),
        "telemetry": address(engine.telemetry_addr()),
        "metrics": address(engine.metrics_addr()),
        "layout": layout(engine),
        "is_memory_released": engine.is_memory_released(),
        "regions": regions(engine),
        "rdma": rdma(engine),
        "peers": peers(engine),
        "counters": {
            "malformed": engine.malformed(),
            "late_messages": engine.late_messages(),
            "null_wire": {
                "batches": nothing.batches,
                "bytes": nothing.bytes,
                "blocks": nothing.blocks,
                "wire_operations": nothing.wire_operations,
            },
            "completions_lost": engine.completions().lost(),
        },
        "monotonic_ns": snapshot.monotonic_ns,
        "rails": snapshot.rails.iter().map(rail).collect::<Vec<_>>(),
        "rooms": snapshot.rooms.iter().map(room).collect::<Vec<_>>(),
        "failures": counts(&snapshot.failures),
    })
}

fn layout(engine: &Engine) -> Value {
    let layout = engine.layout();
    let component = |component: &Component| {
        json!({
            "kind": component.kind.to_string(),
            "entries": component.entries.len(),
            "draft_entries": component.draft_entries,
            // Elided entries alone take any index.
            "items": Some(component.item_count()).filter(|count| *count < u64::MAX),
        })
    };
    let attention = match layout.attention {
        Attention::Heads {
            total_kv_heads,
            rank_kv_heads,
        } => {
            json!({ "kind": "heads", "total_kv_heads": total_kv_heads, "rank_kv_heads": rank_kv_heads })
        }
        Attention::Latent => json!({ "kind": "latent" }),
    };
    json!({
        "page_size": layout.page_size,
        "kv_dtype": layout.kv_dtype,
        "kv_layout": layout.kv_layout,
        "attention": attention,
        "tp": [layout.tp.rank, layout.tp.size],
        "pp": [layout.pp.rank, layout.pp.size],
        "layers": [layout.layers.start, layout.layers.end],
        "components": layout.components.iter().map(component).collect::<Vec<_>>(),
    })
}

/// Where a region's bytes are, in words.
fn memory_of(region: &kvt::memory::Region) -> String {
    let device = region.on_device();
    device.map_or_else(|| "host".to_owned(), |device| device.name())
}

fn regions(engine: &Engine) -> Vec<Value> {
    let known = (0..).map_while(|id| engine.region(RegionId(id)));
    let region = |region: &kvt::memory::Region| json!({ "address": region.base_address(), "len": region.len(), "memory": memory_of(region) });
    known.map(region).collect()
}

fn rdma(engine: &Engine) -> Vec<Value> {
    let (counts, direct) = (engine.rail_counts(), engine.gpu_direct());
    let device = counts.iter().map(|counts| {
        json!({
            "device": counts.device,
            "doorbells": counts.doorbells,
            "work_requests": counts.work_requests,
            "completions": counts.completions,
            "frames_received": counts.frames_received,
            "packed_batches": counts.packed_batches,
            "packed_bytes": counts.packed_bytes,
            "unpacked_batches": counts.unpacked_batches,
            "gpu_direct": direct.iter().filter(|verdict| verdict.device == counts.device).map(|verdict| json!({ "gpu": verdict.gpu, "path": verdict.path.words(), "reason": verdict.reason })).collect::<Vec<_>>(),
        })
    });
    device.collect()
}

fn peers(engine: &Engine) -> Vec<Value> {
    let peers = engine.peers();
    let peer = peers.iter().map(|peer| {
        json!({
            "peer": peer.peer.0,
            "instance": peer.instance.to_string(),
            "address": peer.address,
            "path": peer.path,
            "path_reason": peer.path_reason,
            "handshake_us": u64::try_from(peer.handshake.as_micros()).unwrap_or(u64::MAX),
        })
    });
    peer.collect()
}

fn rail(rail: &RailStat) -> Value {
    json!({
        "peer": rail.peer,
        "peer_addr": rail.peer_addr,
        "rail": rail.rail,
        "path": rail.path,
        "path_reason": rail.path_reason,
        "bytes_queued": rail.bytes_queued,
        "bytes_in_flight": rail.bytes_in_flight,
        "transfers_queued": rail.transfers_queued,
        "oldest_enqueued_ns": rail.oldest_enqueued_ns,
        "rate_bytes_per_s": rail.rate_bytes_per_s,
        "p50_ns": rail.p50_ns,
        "p99_ns": rail.p99_ns,
        "bytes_total": rail.bytes_total,
        "batches_total": rail.batches_total,
        "wire_operations_total": rail.wire_operations_total,
        "packed_batches_total": rail.packed_batches_total,
        "failures": counts(&rail.failures),
    })
}

fn room(room: &RoomStat) -> Value {
    let role = match room.role {
        RoomRole::Sender => "sender",
        RoomRole::Receiver => "receiver",
    };
    json!({
        "room": room.room,
        "role": role,
        "state": room.state,
        "peer": room.peer,
        "enqueued_ns": room.enqueued_ns,
        "first_byte_ns": room.first_byte_ns,
        "pushed_ns": room.pushed_ns,
        "done_ns": room.done_ns,
        "bytes": room.bytes,
        "failure": room.failure,
    })
}

fn counts(failures: &[(String, u64)]) -> Map<String, Value> {
    let counted = failures
        .iter()
        .map(|(reason, count)| (reason.clone(), json!(count)));
    counted.collect()
}
