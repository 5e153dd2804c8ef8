"""SGLang's `KVArgs` as our layout, or a sentence that says why this model's memory cannot be moved.

`KVArgs` is an attribute bag, not a dataclass: what a release or a role does not set is not there, so everything is read with
a default. Refusals happen here, at start-up, not in the middle of a request.
"""

from __future__ import annotations

import logging
from typing import Any, Sequence

from ..layout import Component, Entry, Kind, Layout, Memory, Slice

logger = logging.getLogger("kvtransfer.sglang")

# State types whose items are whole slots, pages or rows on both sides, so that moving items by number is all there is to do
# (`mooncake/conn.py` maybe_send_extra: the generic path, and mamba at equal tensor parallelism). What unequal tensor
# parallelism makes of them is decided when two ranks' layouts meet, with a sentence of its own.
MOVED_AS_ITEMS = frozenset(
    {
        "mamba", "swa", "dsa", "qsa_pending", "qsa_compressed", "swa_ring", "c128_state", "request_row", "block_scale",
        "block_scale_swa", "minimax_index_k", "minimax_dense_kv", "nsa",
    }
)  # fmt: skip

# State types that are not moved, with the reason that the operator reads.
REFUSED = {
    "dsa_tail": "SGLang does not say at start-up how large its rings are; start it without the DSA key-pool compression that "
    "keeps a tail, or use another transfer backend",
}

class UnsupportedModelError(ValueError):
    """This model or parallel layout is not moved by this backend; the sentence says what and what to do."""


def layout_of(manager: Any) -> Layout:
    """The layout of one rank, from the manager's `kv_args` and parallel place.

    Raises `UnsupportedModelError`.
    """
    args = manager.kv_args
    _refuse_what_is_not_moved(manager)
    memory = _device_memory(manager)
    latent = bool(manager.is_mla_backend or manager.is_hybrid_mla_backend)
    draft = int(getattr(args, "num_draft_entries", 0) or 0)
    kv = Component(
        Kind.KV,
        _entries(args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens, getattr(args, "kv_layer_ids", None), memory),
        draft_entries=draft,
    )
    states = [
        Component(
            Kind.STATE,
            _state_entries(args, place, memory),
            name=_value(state),
            slices=_slices(args, place) if _value(state) == "mamba" else (),
            page_layout=(getattr(args, "swa_kv_cache_layout", None) or "") if _value(state) == "swa" else "",
        )
        for place, state in enumerate(getattr(args, "state_types", None) or [])
    ]
    aux = Component(Kind.AUX, _entries(args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens, None, (Memory.HOST, 0)))
    total, held = (None, None) if latent else _heads(manager)
    return Layout(
        page_size=int(args.page_size),
        kv_dtype=str(args.kv_cache_dtype_str),
        kv_layout=getattr(args, "kv_layout", None) or "nhd",
        components=[kv, *states, aux],
        total_kv_heads=total,
        rank_kv_heads=held,
        tp=(int(args.engine_rank) % manager.attn_tp_size, manager.attn_tp_size),
        pp=(manager.pp_rank or 0, manager.pp_size or 1),
        layers=_layers(manager, kv.entries[: len(kv.entries) - draft], latent),
        compression_ratios=tuple(getattr(args, "mla_compression_ratios", None) or ()),
    )


def buffers_of(layout: Layout) -> tuple[list[int], list[int]]:
    """Addresses and lengths of every buffer that holds KV or state: what SGLang frees when it pauses."""
    kept = [entry for part in layout.components if part.kind is not Kind.AUX for entry in part.entries if entry.length]
    return [entry.address for entry in kept], [entry.length for entry in kept]


def _refuse_what_is_not_moved(manager: Any) -> None:
    for state in getattr(manager.kv_args, "state_types", None) or []:
        name = _value(state)
        if name in REFUSED:
            raise UnsupportedModelError(f"the model keeps {name!r} state: {REFUSED[name]}")
        if name not in MOVED_AS_ITEMS:
            raise UnsupportedModelError(
                f"the model keeps {name!r} state, which this backend does not know; use another transfer backend"
            )
    if getattr(manager, "kv_shard_size", 1) > 1:
        raise UnsupportedModelError("--enable-kv-cache-sharding is not supported by this backend: remove it")
    if manager.attn_cp_size > 1 and manager.enable_all_cp_ranks_for_transfer:
        raise UnsupportedModelError(
            "this backend sends from context-parallel rank 0 only: unset SGLANG_DISAGGREGATION_ALL_CP_RANKS_TRANSFER, or use "
            "another transfer backend for a cache that is split over context-parallel ranks"
        )
    if getattr(manager, "dcp_size", 1) > 1:
        raise UnsupportedModelError("decode context parallelism is not supported by this backend: set its size to 1")


def _entries(
    addresses: Sequence[int],
    lengths: Sequence[int],
    item_lengths: Sequence[int],
    layer_ids: Sequence[int] | None,
    memory: tuple[Memory, int],
) -> list[Entry]:
    ids: Sequence[int | None] = list(layer_ids) if layer_ids else [None] * len(addresses)
    kind, device = memory
    return [
        Entry(int(address), int(length), int(item), None if layer is None else int(layer), kind, device)
        for address, length, item, layer in zip(addresses, lengths, item_lengths, ids, strict=True)
    ]


def _state_entries(args: Any, place: int, memory: tuple[Memory, int]) -> list[Entry]:
    ids = getattr(args, "state_layer_ids", None) or []
    return _entries(
        args.state_data_ptrs[place],
        args.state_data_lens[place],
        args.state_item_lens[place],
        ids[place] if place < len(ids) else None,
        memory,
    )


def _slices(args: Any, place: int) -> tuple[Slice, ...]:
    """How the tensors of a mamba state are sharded; nothing where the release or the pool does not say."""

    def of(name: str) -> Sequence[Any]:
        lists = getattr(args, name, None) or []
        return lists[place] if place < len(lists) and lists[place] else []

    dims, rows, groups = of("state_dim_per_tensor"), of("state_slice_outer_counts"), of("state_conv_shard_groups")
    if len(dims) != len(args.state_data_ptrs[place]):
        return ()
    return tuple(
        Slice(int(dim or 0), int(rows[at]) if at < len(rows) else 1, tuple(groups[at] or ()) if at < len(groups) else ())
        for at, dim in enumerate(dims)
    )


def _value(state: Any) -> str:
    return str(getattr(state, "value", state))


def _device_memory(manager: Any) -> tuple[Memory, int]:
    """KV and state live on the rank's device; `--device cpu` keeps them in host memory."""
    from sglang.srt.runtime_context import get_device

    device = str(get_device().device)
    if device == "cpu":
        return (Memory.HOST, 0)
    if device == "cuda":
        return (Memory.CUDA, int(getattr(manager.kv_args, "gpu_id", 0) or 0))
    raise UnsupportedModelError(f"--device {device} is not supported by this backend: it moves CUDA and host memory")


def _heads(manager: Any) -> tuple[int, int]:
    """KV heads of the model and of this rank. Decode ranks are not told (only with staging buffers), so they ask the model's
    configuration, which the scheduler has already built."""
    args = manager.kv_args
    total = int(getattr(args, "total_kv_head_num", 0) or 0)
    if total == 0:
        total = _heads_of_model(manager)
    return total, max(1, total // manager.attn_tp_size)


def _heads_of_model(manager: Any) -> int:
    try:
        return int(_model(manager).get_total_num_kv_heads())
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"the number of KV heads of the model cannot be found out: {error}") from error


def _layers(manager: Any, entries: list[Entry], latent: bool) -> tuple[int, int]:
    """First and one past the last layer. Pools that name their layers (hybrid models) are asked for the names; others hold
    one buffer per layer, or two of them: all K, then all V."""
    named = [entry.layer_id for entry in entries if entry.layer_id is not None]
    if named:
        return min(named), max(named) + 1
    start = _first_layer(manager)
    ratios = getattr(manager.kv_args, "mla_compression_ratios", None)
    if ratios:
        return start, int(getattr(manager.kv_args, "prefill_end_layer", None) or len(ratios))
    return start, start + (len(entries) if latent else len(entries) // 2)


def _first_layer(manager: Any) -> int:
    """The global number of this rank's first layer. Prefill ranks are told; a decode rank of a pipeline works it out as the
    model loader did."""
    told = getattr(manager.kv_args, "prefill_start_layer", None)
    if told is not None:
        return int(told)
    if (manager.pp_size or 1) == 1:
        return 0
    from sglang.srt.distributed.utils import get_pp_indices

    layers = int(_model(manager).num_hidden_layers)
    return int(get_pp_indices(layers, manager.pp_rank, manager.pp_size)[0])


def _model(manager: Any) -> Any:
    """The model's configuration, which the scheduler has already built."""
    own = getattr(manager.server_args, "get_model_config", None)
    if own is not None:
        return own()
    from sglang.srt.arg_groups.model_override_base import model_config_of

    return model_config_of(manager.server_args)
