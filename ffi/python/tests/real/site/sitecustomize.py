"""Python runs this before anything else in every process of a server: packages that SGLang imports and never calls here."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import stand_ins

sys.path.pop()
stand_ins.install(
    ("flashinfer", "xgrammar", "IPython", "soundfile", "zstandard", "sgl_kernel", "torchvision", "torchaudio"),
    refused=("flashinfer.norm",),
)
