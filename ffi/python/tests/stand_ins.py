"""Stand-ins for the modules that SGLang imports and its PD classes never call on host buffers.

Importing SGLang pulls torch, triton and transformers in at module level: gigabytes of CUDA wheels, for classes that move
plain addresses. `install()` puts a finder in front of Python's own that answers for those names, and for the parts of
SGLang that need them, with modules whose every attribute is a class which can be subclassed, called, subscripted, entered
and used as a decorator. What is under test (`sglang.srt.disaggregation`, its bootstrap, plug-in and argument code) is real.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, Sequence

# Distributions that are absent on purpose; a name stands for its whole tree.
ABSENT = (
    "torch", "torchvision", "torchaudio", "triton", "transformers", "IPython", "cuda", "pynvml", "torch_memory_saver",
    "tqdm", "huggingface_hub", "safetensors", "xgrammar", "outlines", "sgl_kernel", "flashinfer", "compressed_tensors",
    "gguf", "einops", "setproctitle", "uvloop", "partial_json_parser", "sentencepiece", "tiktoken", "openai", "zstandard",
    "openai_harmony", "interegular", "llguidance", "soundfile", "modelscope", "watchfiles", "kernels", "tvm_ffi", "numba",
    "scipy", "pandas", "av", "decord", "decord2", "opentelemetry", "prometheus_fastapi_instrumentator", "uvicorn", "anthropic",
    "sglang.srt.utils.hf_transformers_patches", "sglang.srt.configs", "sglang.srt.layers", "sglang.srt.lora", "sglang.kernels", "sglang.jit_kernel", "smg_grpc_servicer",
    "sglang_router", "quack", "apache_tvm_ffi", "grpc", "torchcodec", "torchao", "timm", "nvidia", "tokenspeed", "mistral_common",
)  # fmt: skip

# What SGLang asks for to find out where it runs: no accelerator, of no vendor.
NOWHERE = ("torch.npu", "torch.musa", "torch.hpu", "torch_npu", "torch_musa", "sglang.kernels.npu")


class StandInMeta(type):
    """Makes the class itself answer for every attribute, so that `torch.nn.Module.register` style chains resolve."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        if name in ("is_available", "is_initialized", "is_compiled"):
            return lambda *_args, **_kwargs: False
        if name in ("device_count", "current_device"):
            return lambda *_args, **_kwargs: 0
        made = StandInMeta(name, (StandIn,), {"__module__": cls.__module__})
        setattr(cls, name, made)
        return made

    def __or__(cls, _other: Any) -> Any:
        return cls

    def __ror__(cls, _other: Any) -> Any:
        return cls

    def __getitem__(cls, _key: Any) -> Any:
        return cls

    def __iter__(cls) -> Any:
        return iter(())

    def __len__(cls) -> int:
        return 0

    def __contains__(cls, _value: Any) -> bool:
        return False

    def __bool__(cls) -> bool:
        return True

    def __int__(cls) -> int:
        return 0

    def __lt__(cls, _other: Any) -> bool:
        return False

    def __ge__(cls, _other: Any) -> bool:
        return True


class StandIn(metaclass=StandInMeta):
    """An attribute of a module that is not there: accepts everything, does nothing."""

    def __new__(cls, *args: Any, **_kwargs: Any) -> Any:
        # Used as a decorator, it must hand the decorated thing back.
        if cls.__init__ is StandIn.__init__ and len(args) == 1 and callable(args[0]):
            return args[0]
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def __get_pydantic_core_schema__(cls, *_args: Any) -> Any:
        """SGLang's request models name types of absent modules; nothing of them is checked here."""
        from pydantic_core import core_schema

        return core_schema.any_schema()

    def __call__(self, *args: Any, **_kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return StandIn()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_exc: Any) -> None:
        return None

    def __iter__(self) -> Any:
        return iter(())

    def __getitem__(self, _key: Any) -> Any:
        return self

    def __int__(self) -> int:
        return 0


class StandInModule(ModuleType):
    """A module all of whose attributes exist."""

    __path__: list[str] = []
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        if f"{self.__name__}.{name}" in NOWHERE:
            raise AttributeError(name)
        made = StandInMeta(name, (StandIn,), {"__module__": self.__name__})
        if name in ("is_available", "is_initialized"):
            return lambda *_args, **_kwargs: False
        if name == "device_count":
            return lambda *_args, **_kwargs: 0
        setattr(self, name, made)
        return made


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the absent modules; leaves every other name to Python."""

    def __init__(self, absent: Sequence[str], refused: Sequence[str]) -> None:
        super().__init__()
        self._absent = absent
        self._refused = refused

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in self._refused):
            if any(fullname.startswith(f"{name}.") for name in self._absent):
                # Its parent is a stand-in, whose path leads nowhere.
                raise ModuleNotFoundError(f"{fullname} is absent on purpose", name=fullname)
            return None
        if not any(fullname == name or fullname.startswith(f"{name}.") for name in self._absent):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandInModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "torch":
            module.finfo = module.iinfo = _number_facts  # type: ignore[attr-defined]
        elif module.__name__ == "torch.version":
            module.cuda = module.hip = module.musa = None  # type: ignore[attr-defined]


def _number_facts(_dtype: Any) -> Any:
    """What `torch.finfo` answers: SGLang computes constants from it at import time."""
    return SimpleNamespace(min=-1.0, max=1.0, eps=1e-6, bits=16)


def install(absent: Sequence[str] = ABSENT, refused: Sequence[str] = NOWHERE) -> None:
    """Puts the finder first. Call before the first import of SGLang; a second call does nothing."""
    if any(isinstance(finder, StandInFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, StandInFinder(absent, refused))
    if not hasattr(logging.Logger, "warning_once"):
        # transformers adds this to every logger, and SGLang relies on it.
        logging.Logger.warning_once = logging.Logger.warning  # type: ignore[attr-defined]
        logging.Logger.info_once = logging.Logger.info  # type: ignore[attr-defined]
