"""kvtransfer as a KV-transfer backend of SGLang: `--disaggregation-transfer-backend kvtransfer` on an unmodified SGLang.

`plugin.register` is what SGLang finds through the entry point group `sglang.srt.plugins`; see ffi/docs/sglang.md.
"""
