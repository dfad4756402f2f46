"""llama.cpp through its C interface, by the bindings of the same source distribution.

`LLAMA_CPP_PACKAGE` is the folder of llama-cpp-python's module and `LLAMA_CPP_LIB_PATH` that of the
libraries (`make bench-peers-install` builds them). Only the module with the C interface is
imported: the package around it wants a web framework's parts.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
from peer.interface import UnavailableError

from whole_model.clock import TokenClock
from whole_model.interface import Engine

LONGEST_PREFILL = 1024
"""Tokens with which a cache is filled: it can only be filled by computing, at some 20 tokens a
second."""


def _bindings() -> Any:
    package = types.ModuleType("llama_cpp")
    package.__path__ = [os.environ["LLAMA_CPP_PACKAGE"]]
    sys.modules["llama_cpp"] = package
    return importlib.import_module("llama_cpp.llama_cpp")


class LlamaCpp(Engine):
    """llama.cpp as it comes: weights repacked where it has kernels for that, flash attention where
    it chooses it, a cache of 16-bit floats."""

    def __init__(
        self, folder: Path, weights: list[Path], dense: str, threads: int, context: int
    ) -> None:
        self._llama = llama = _bindings()
        self._quiet = llama.llama_log_callback(lambda *_: None)
        llama.llama_log_set(self._quiet, None)
        llama.llama_backend_init()
        paths = (ctypes.c_char_p * len(weights))(*(str(file).encode() for file in weights))
        options = llama.llama_model_default_params()
        self._model = llama.llama_model_load_from_splits(paths, len(weights), options)
        if not self._model:
            raise UnavailableError(f"llama.cpp does not load {weights[0]}")
        settings = llama.llama_context_default_params()
        settings.n_ctx = min(context, LONGEST_PREFILL + 256)
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, settings)
        if not self._context:
            raise UnavailableError(f"llama.cpp makes no context of {context} tokens")
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self.generate([1] * 8, 4, TokenClock(None))

    @property
    def label(self) -> str:
        package = Path(os.environ["LLAMA_CPP_PACKAGE"], "__init__.py").read_text()
        found = re.search(r'__version__ = "(.+?)"', package)
        return f"llama.cpp of llama-cpp-python {found[1] if found else '?'}"

    def generate(self, prompt: list[int], new: int, clock: TokenClock) -> list[int]:
        llama = self._llama
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        clock.start()
        for at in range(0, len(prompt), 512):
            self._decode(prompt[at : at + 512])
        tokens = [self._likeliest()]
        clock.token()
        while len(tokens) < new:
            self._decode(tokens[-1:])
            tokens.append(self._likeliest())
            clock.token()
        clock.finish()
        return tokens

    def generate_behind(self, context: int, token: int, new: int, clock: TokenClock) -> list[int]:
        if context > LONGEST_PREFILL:
            raise UnavailableError(f"computing the keys of {context} tokens takes too long")
        return self.generate([token] * (context + 1), new, clock)

    def _decode(self, ids: list[int]) -> None:
        array = (ctypes.c_int32 * len(ids))(*ids)
        batch = self._llama.llama_batch_get_one(array, len(ids))
        status = self._llama.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returns {status}")

    def _likeliest(self) -> int:
        logits = self._llama.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())
