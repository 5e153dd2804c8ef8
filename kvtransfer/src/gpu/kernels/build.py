#!/usr/bin/env python3
"""Builds copy.ptx80 and copy.ptx90 from copy.cu with NVRTC: the kernels for hosts that have a driver and no compiler.

    pip download --no-deps -d W nvidia-cuda-nvrtc-cu12==12.8.93 && unzip W/*.whl -d W
    LD_LIBRARY_PATH=W/nvidia/cuda_nvrtc/lib ./build.py

NVRTC 12.8 writes PTX that every driver since 12.8 can load. No GPU is needed. The first line of each file names the
source it was made of (FNV-1a, as in source.rs); a test compares it.
"""
import ctypes
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
OPTIONS = ["--std=c++17", "--device-as-default-execution-space"]


def build(nvrtc, source, arch, extra=()):
    """Returns (output, log)."""
    program = ctypes.c_void_p()
    made = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"copy.cu", 0, None, None)
    assert made == 0, made
    options = [option.encode() for option in [f"--gpu-architecture={arch}", *OPTIONS, *extra]]
    code = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if code:
        sys.exit(log.value.decode())
    kind = "CUBIN" if arch.startswith("sm_") else "PTX"
    getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    output = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{kind}")(program, output)
    return output.raw, log.value.decode()


def fingerprint(source):
    value = 0xCBF29CE484222325
    for byte in source:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def main():
    nvrtc = ctypes.CDLL("libnvrtc.so.12")
    source = (HERE / "copy.cu").read_bytes()
    digest = fingerprint(source)
    for arch, name in (("compute_80", "copy.ptx80"), ("compute_90", "copy.ptx90")):
        ptx, _ = build(nvrtc, source, arch)
        text = ptx.rstrip(b"\0").decode()
        (HERE / name).write_text(f"// of copy.cu {digest}\n{text}\n")
        print(name, len(text))
    for arch in ("sm_80", "sm_90"):
        _, log = build(nvrtc, source, arch, ("--ptxas-options=-v",))
        print(arch, log, sep="\n")


if __name__ == "__main__":
    main()
