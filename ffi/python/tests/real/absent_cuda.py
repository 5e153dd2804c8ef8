"""Empty CUDA libraries for a torch that never meets a GPU: `absent_cuda.py SITE_PACKAGES`.

The torch wheel for Linux is linked against gigabytes of CUDA libraries, which it loads with its first import and which a server
with `--device cpu` never calls. For every one of them but the runtime (that one is small, and torch calls it while it is
loaded) this makes a library that has the names torch asks for; whichever is called returns an error number.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

# CUDA's and NCCL's numbers for "unknown error" and "internal error"; not 0 is what counts.
ERROR = 999
CUDA_NAME = re.compile(r"lib(cu|nv|nccl)")
SYMBOL = re.compile(r"(?:FUNC|NOTYPE|OBJECT)\s+(?:GLOBAL|WEAK)\s+DEFAULT\s+UND\s+(\w+)(?:@([\w.]+))?")
# What unversioned names begin with, by library.
PREFIXES = {"nccl": "libnccl", "nvrtc": "libnvrtc", "cuFile": "libcufile", "cusparseLt": "libcusparseLt", "curand": "libcurand"}


def needed(library: Path) -> list[str]:
    """The CUDA libraries that a library is linked against."""
    text = subprocess.run(["readelf", "-d", str(library)], check=True, capture_output=True, text=True).stdout
    return [name for name in re.findall(r"NEEDED\).*\[(.*)\]", text) if CUDA_NAME.match(name)]


def versions(library: Path) -> dict[str, str]:
    """Which library each symbol version belongs to."""
    text = subprocess.run(["readelf", "-V", str(library)], check=True, capture_output=True, text=True).stdout
    found, current = {}, ""
    for file, version in re.findall(r"File: (\S+)|Name: (\S+)", text):
        current = file or current
        if version:
            found[version] = current
    return found


def main() -> None:
    folder = Path(sys.argv[1]) / "torch" / "lib"
    wanted: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for library in folder.glob("*.so"):
        names = needed(library)
        for name in names:
            wanted[name][""].update()
        of_version = versions(library)
        text = subprocess.run(["readelf", "--dyn-syms", "-W", str(library)], check=True, capture_output=True, text=True).stdout
        for symbol, version in SYMBOL.findall(text):
            if version:
                owner = of_version.get(version, "")
            else:
                start = next((stem for prefix, stem in PREFIXES.items() if symbol.startswith(prefix)), "no library")
                owner = next((name for name in names if name.startswith(f"{start}.")), "")
            if owner in names:
                wanted[owner][version].add(symbol)
    for name, by_version in wanted.items():
        if not name.startswith(("libcudart.", "libcuda.")):
            build(folder / name, by_version)


def build(target: Path, by_version: dict[str, set[str]]) -> None:
    """One library with the symbols, under their versions."""
    symbols = sorted(set().union(*by_version.values()))
    with tempfile.TemporaryDirectory() as scratch:
        source, script = Path(scratch, "empty.c"), Path(scratch, "versions")
        source.write_text("".join(f"int {symbol}(void) {{ return {ERROR}; }}\n" for symbol in symbols))
        script.write_text("".join(f"{v} {{ global: {'; '.join(sorted(s))}; }};\n" for v, s in by_version.items() if v and s))
        command = ["gcc", "-w", "-shared", "-fPIC", "-fno-builtin", f"-Wl,-soname,{target.name}", "-o", str(target), str(source)]
        if script.read_text():
            command.append(f"-Wl,--version-script={script}")
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
