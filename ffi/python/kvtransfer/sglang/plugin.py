"""The entry point of group `sglang.srt.plugins`: makes `--disaggregation-transfer-backend kvtransfer` known to SGLang.

SGLang calls `register` in the launcher and in every scheduler process. Three touches, none of a file of SGLang: the command
line's choices (its official extension point), a member of the closed enum `TransferBackend`, and a hook around
`get_kv_class`, which SGLang's own comments expect a backend to rebind.
"""

from __future__ import annotations

import logging
from typing import Any, Callable

from . import options, releases

logger = logging.getLogger("kvtransfer.sglang")

NAME = "kvtransfer"


class UnsupportedReleaseError(RuntimeError):
    """This SGLang release was not tested with this backend."""


def register() -> None:
    """Registers the backend. SGLang logs whatever is raised here and goes on; its command line then rejects the name.

    Raises `UnsupportedReleaseError` outside of the tested releases, `OptionError` for a `KVTRANSFER_*` variable that makes
    no sense. Both are also logged here, because SGLang's own line hides among a starting server's others.
    """
    import sglang

    try:
        settings = options.read_all()
        for name in options.unknown():
            logger.warning("%s is no option of kvtransfer and has no effect", name)
        why_not = releases.refusal(sglang.__version__)
        if why_not is not None and not settings["untested_sglang"]:
            raise UnsupportedReleaseError(why_not)
        if settings["replace_mooncake"]:
            from .replace_mooncake import install

            install()
            return
        _add_name()
    except Exception as error:
        logger.error("the KV transfer backend %r is not available: %s", NAME, error)
        raise


def _add_name() -> None:
    from sglang.srt.disaggregation.utils import TransferBackend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import DISAGG_TRANSFER_BACKEND_CHOICES, add_disagg_transfer_backend_choices

    if NAME not in DISAGG_TRANSFER_BACKEND_CHOICES:
        add_disagg_transfer_backend_choices([NAME])
    if NAME not in TransferBackend._value2member_map_:
        member = object.__new__(TransferBackend)
        member._name_, member._value_ = NAME.upper(), NAME
        member._sort_order_ = len(TransferBackend._member_names_)
        TransferBackend._member_map_[member._name_] = member
        TransferBackend._value2member_map_[NAME] = member
        TransferBackend._member_names_.append(member._name_)
        type.__setattr__(TransferBackend, member._name_, member)
    HookRegistry.register("sglang.srt.disaggregation.utils.get_kv_class", kv_class, HookType.AROUND)


def kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    """SGLang's class lookup with ours added."""
    if getattr(transfer_backend, "value", None) != NAME:
        return original(transfer_backend, class_type)
    if class_type.value == "kvargs":
        from sglang.srt.disaggregation.base import KVArgs

        return KVArgs
    # Imported late: the launcher asks for names long before anybody needs the engine.
    from .classes import BY_KIND

    return BY_KIND.get(class_type.value)
