"""A GGUF file -> a session of llama.cpp on the CPU, through the C API that llama-cpp-python binds.

Settings are those of llama-bench: flash attention where llama.cpp chooses it, repacked weights, a window
cache no longer than it must be.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from v4graph.errors import EngineError

INSTALL = (
    "CMAKE_ARGS=-DGGML_NATIVE=ON "
    "pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36 gguf==0.19.0"
)
_ERROR = 4  # ggml_log_level


def missing() -> str:
    """Return a sentence that says how to install llama.cpp, or nothing where it is there."""
    absent = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if not absent:
        return ""
    return (
        f"llama.cpp is left out: no Python package {' and '.join(absent)} here; `{INSTALL}` "
        "compiles it for this machine (needs cmake and a C++ compiler; 6 minutes on 2 cores)."
    )


@functools.cache
def library() -> Any:
    """Return llama-cpp-python's module of C functions, its log cut down to errors."""
    api: Any = importlib.import_module("llama_cpp")

    def show(level: int, text: bytes, _data: object) -> None:
        if level == _ERROR:
            sys.stderr.write(text.decode(errors="replace"))

    # Kept with the module, since the callback must live as long as the library may call it.
    api.show_errors = api.llama_log_callback(show)
    api.llama_log_set(api.show_errors, None)
    return api


class LlamaSession:
    """One sequence; `exact` computes attention without flash attention and keeps its cache in float32."""

    def __init__(self, path: Path, *, capacity: int, threads: int, exact: bool = False) -> None:
        """Load the model and make room for `capacity` tokens.

        Raises:
            EngineError: llama.cpp refuses the file; its own words are on stderr.
        """
        api = self._api = library()
        self._model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not self._model:
            raise EngineError(f"{path}: llama.cpp does not load this file; its reason is on stderr above.")
        parameters = api.llama_context_default_params()
        parameters.n_ctx = capacity
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.swa_full = False
        if exact:
            parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
            parameters.type_k = parameters.type_v = api.GGML_TYPE_F32
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise EngineError(f"{path}: llama.cpp makes no context of {capacity} tokens; see stderr above.")
        self._tokens = (ctypes.c_int32 * capacity)()
        self._row = ctypes.c_float * api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))

    def reset(self) -> None:
        """Forget every token."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)

    def append(self, ids: npt.NDArray[np.int64]) -> Any:
        """Append ids [1, S]; return the last one's logits [V], which the next call overwrites.

        Few steps in Python, as they count into llama.cpp's time: 10 us of a token.
        """
        api, count = self._api, ids.shape[1]
        self._tokens[:count] = ids[0].tolist()
        status = api.llama_decode(self._context, api.llama_batch_get_one(self._tokens, count))
        if status:
            raise EngineError(f"llama_decode fails with status {status}; its reason is on stderr above.")
        logits = api.llama_get_logits_ith(self._context, -1)
        return self._row.from_address(ctypes.addressof(logits.contents))

    def close(self) -> None:
        """Free the model; the session is of no use afterwards."""
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)


def quantise(source: Path, target: Path) -> None:
    """Write `source` with Q8_0 matrices and MXFP4 experts, as `llama-quantize SOURCE TARGET MXFP4_MOE` does.

    Raises:
        EngineError: llama.cpp refuses the file; its own words are on stderr.
    """
    api = library()
    partial = target.with_name(f".{target.name}.partial")
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = api.LLAMA_FTYPE_MOSTLY_MXFP4_MOE
    if api.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(parameters)):
        raise EngineError(f"{source}: llama.cpp does not quantise this file; its reason is on stderr above.")
    partial.rename(target)
