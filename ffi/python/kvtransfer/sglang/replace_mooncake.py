"""`KVTRANSFER_REPLACE_MOONCAKE=1`: refused until the engine can write raw blocks for SGLang's Mooncake manager."""

from __future__ import annotations


class NotAvailableError(RuntimeError):
    """This build has no raw block writes."""


def install() -> None:
    """Raises `NotAvailableError`."""
    raise NotAvailableError(
        "KVTRANSFER_REPLACE_MOONCAKE=1 needs raw block writes, which this build of kvtransfer does not have: unset it and start "
        "SGLang with --disaggregation-transfer-backend kvtransfer"
    )
