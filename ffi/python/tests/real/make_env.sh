#!/usr/bin/env bash
# Makes a Python environment in which SGLang's real servers run without a GPU, and prints its python. About 2.6 GB, most of it torch.
#
#   make_env.sh [VERSION]     VERSION: an SGLang release, default 0.5.17
#
# torch is the real one, from its wheel; the CUDA libraries that it is linked against are made by absent_cuda.py. What SGLang imports
# and never calls on a CPU is stood in for by site/sitecustomize.py. The environment lies outside of the checkout and is used again.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
version="${1:-0.5.17}"
place="${KVTRANSFER_REAL_ENV:-${XDG_CACHE_HOME:-$HOME/.cache}/kvtransfer-sglang-real-$version}"
if [[ ! -e "$place/complete" ]]; then
    rm -rf "$place"
    python3 -m venv "$place" >&2
    pip=("$place/bin/python" -m pip --quiet --disable-pip-version-check --no-cache-dir install)
    # Without their dependencies, which are CUDA's: 3 GB that a CPU never calls.
    "${pip[@]}" --no-deps "sglang==$version" torch==2.11.0 triton==3.6.0 nvidia-cuda-runtime==13.0.96 apache-tvm-ffi==0.1.11 \
        compressed-tensors==0.20.0 gguf==0.17.1 >&2
    "$place/bin/python" "$here/absent_cuda.py" "$("$place/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" >&2
    "${pip[@]}" 'setuptools<82' sympy networkx jinja2 fsspec numpy transformers==5.12.1 tokenizers==0.22.2 safetensors sentencepiece \
        openai==2.6.1 fastapi==0.121.3 starlette==0.49.3 uvicorn uvloop python-multipart pyzmq aiohttp requests prometheus-client psutil \
        msgspec orjson pybase64 pydantic pillow dill distro einops interegular jsonschema loguru nvidia-ml-py partial-json-parser scipy \
        setproctitle tqdm watchfiles xxhash cloudpickle cffi >&2
    touch "$place/complete"
fi
echo "$place/bin/python"
