"""Flags, and what they mean to every process."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

PATHS = ("auto", "tcp", "shm")


@dataclass(frozen=True)
class Shape:
    """A Qwen3 of some size. Several query heads share a KV head."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int


SIZES = {
    "tiny": Shape(layers=3, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=256),
    "small": Shape(layers=8, hidden=512, heads=8, kv_heads=4, head_dim=64, intermediate=1536, vocab=4096),
    # Qwen3-0.6B but for its vocabulary, of which random weights would make no use: 112 KiB of KV per token.
    "0.6b": Shape(layers=28, hidden=1024, heads=16, kv_heads=8, head_dim=128, intermediate=3072, vocab=8192),
}


@dataclass(frozen=True)
class Settings:
    """What all processes must agree on."""

    shape: Shape
    model: str
    """"transformers", "plain" or "numpy"; "auto" until `driver` has looked what there is."""
    device: str
    """"cuda" or "cpu"."""
    prefill_gpu: int
    decode_gpu: int
    page_size: int
    pages: int
    """Of each process's pool."""
    chunk: int
    """Tokens of a prompt that are computed at a time; whole pages."""
    longest: int
    """Tokens of the longest sequence, the new ones included."""
    new_tokens: int
    seed: int
    copy_percent: int
    """Share of a GPU's multiprocessors that kvtransfer's copies may take."""
    timeout: float
    """Seconds within which any one transfer, and any answer of a process, must come."""


@dataclass(frozen=True)
class Run:
    """What the driver alone must know."""

    settings: Settings
    paths: tuple[str, ...]
    prompts: int
    longest: int
    in_flight: int
    warm_ups: int
    controls: int
    json: str


def pages_of(tokens: int, page_size: int) -> int:
    """Pages that so many tokens fill, the last perhaps in part."""
    return -(-tokens // page_size)


def parse(arguments: list[str] | None = None) -> Run:
    """Reads the command line; refuses what cannot work with a sentence."""
    parser = argparse.ArgumentParser(
        prog="torch_pd", description="PD disaggregation of a PyTorch model by kvtransfer; see README.md."
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--prefill-gpu", type=int, default=0)
    add("--decode-gpu", type=int, default=0)
    add(
        "--model",
        choices=("auto", "transformers", "plain", "numpy"),
        default="auto",
        help="whose Qwen3; auto: transformers' if installed",
    )
    add("--size", choices=tuple(SIZES), help="default: 0.6b on a GPU, tiny on a CPU")
    for name in asdict(SIZES["tiny"]):
        add(f"--{name.replace('_', '-')}", type=int, help="instead of the size's")
    add("--page-size", type=int, default=16, help="tokens per page")
    add("--pages", type=int, help="of each pool; default: what the requests in flight need, and a quarter more")
    add("--chunk", type=int, help="tokens of chunked prefill; default: about 2048 on a GPU, 64 on a CPU")
    add("--prompts", type=int, default=20)
    add("--longest", type=int, help="tokens of the longest prompt; default: 32768 on a GPU, 300 on a CPU")
    add("--new-tokens", type=int, default=16)
    add("--in-flight", type=int, default=1, help="requests at a time; more than 1 makes the times wait for each other")
    add("--path", default="auto", help="auto (the best), tcp, shm; several with commas are run one after the other")
    add("--copy-percent", type=int, default=8, help="of a GPU's multiprocessors, for copies")
    add("--warm-ups", type=int, default=2, help="prompts per path that count for tokens but not for times")
    add("--controls", type=int, default=4, help="prompts per path that lose a page on purpose and must be found out")
    add("--seed", type=int, default=1)
    add("--timeout", type=float, default=120, help="seconds for one transfer, and for one answer of a process")
    add("--json", default="", help="write every request's times to this file")
    flags = parser.parse_args(arguments)
    on_gpu = flags.device == "cuda"
    given = {name: getattr(flags, name) for name in asdict(SIZES["tiny"]) if getattr(flags, name) is not None}
    shape = Shape(**{**asdict(SIZES[flags.size or ("0.6b" if on_gpu else "tiny")]), **given})
    page = flags.page_size
    if page < 1:
        parser.error("--page-size must be 1 or more")
    chunk = flags.chunk or max(page, (2048 if on_gpu else 64) // page * page)
    longest = flags.longest or (32768 if on_gpu else 300)
    paths = tuple(flags.path.split(","))
    request = pages_of(longest + flags.new_tokens, page)
    pages = flags.pages or flags.in_flight * request * 5 // 4 + 16

    refusals = [
        (bool(set(paths) - set(PATHS)), f"--path {flags.path}: each must be one of {', '.join(PATHS)}"),
        (chunk < 1 or chunk % page != 0, f"--chunk {chunk} must be whole pages of {page} tokens"),
        (shape.heads % shape.kv_heads != 0, f"--heads {shape.heads} must be a multiple of --kv-heads {shape.kv_heads}"),
        (pages < request, f"--pages {pages} cannot hold one prompt of {longest} tokens, which needs {request}"),
        (flags.new_tokens < 2, "--new-tokens must be 2 or more: the first comes from prefill"),
        (min(flags.prompts, longest, flags.in_flight) < 1, "--prompts, --longest and --in-flight must be 1 or more"),
        (min(flags.warm_ups, flags.controls) < 0, "--warm-ups and --controls cannot be negative"),
        (flags.model == "numpy" and on_gpu, "--model numpy runs with --device cpu only"),
    ]  # fmt: skip
    for is_wrong, sentence in refusals:
        if is_wrong:
            parser.error(sentence)
    common: dict[str, Any] = {
        name: getattr(flags, name)
        for name in ("model", "device", "prefill_gpu", "decode_gpu", "page_size", "new_tokens", "seed", "copy_percent", "timeout")
    }
    settings = Settings(shape=shape, pages=pages, chunk=chunk, longest=longest + flags.new_tokens, **common)
    return Run(settings, paths, flags.prompts, longest, flags.in_flight, flags.warm_ups, flags.controls, flags.json)
