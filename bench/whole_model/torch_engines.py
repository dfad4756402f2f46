"""Transformers' `generate`, with our layers and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from peer.interface import UnavailableError

import hybrid_moe
from whole_model.clock import TokenClock
from whole_model.interface import Engine


class _Streamer:
    """Tells the clock of tokens; the first call brings the prompt."""

    def __init__(self, clock: TokenClock) -> None:
        self._clock = clock
        self._started = False

    def put(self, value: torch.Tensor) -> None:
        if self._started:
            self._clock.token()
        else:
            self._clock.start()
            self._started = True

    def end(self) -> None:
        self._clock.finish()


class _TransformersEngine(Engine):
    def __init__(
        self, folder: Path, weights: list[Path], dense: str, threads: int, context: int
    ) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._model: Any = self._load(folder, dense, threads)
        self._generate(torch.ones(1, 8, dtype=torch.int64), 4, TokenClock(None))

    def _load(self, folder: Path, dense: str, threads: int) -> Any:
        raise NotImplementedError

    def _generate(
        self, ids: torch.Tensor, new: int, clock: TokenClock, cache: Any = None
    ) -> tuple[list[int], Any]:
        given = {} if cache is None else {"past_key_values": cache}
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                streamer=_Streamer(clock),
                pad_token_id=0,
                return_dict_in_generate=True,
                **given,
            )
        return out.sequences[0, ids.shape[1] :].tolist(), out.past_key_values

    def generate(self, prompt: list[int], new: int, clock: TokenClock) -> list[int]:
        return self._generate(torch.tensor([prompt]), new, clock)[0]

    def generate_behind(self, context: int, token: int, new: int, clock: TokenClock) -> list[int]:
        _, cache = self._generate(torch.ones(1, 1, dtype=torch.int64), 2, TokenClock(None))
        held = cache.get_seq_length()
        config = self._model.config
        shape = (1, config.num_key_value_heads, context - held, config.head_dim)
        with torch.inference_mode():
            for layer in range(config.num_hidden_layers):
                keys, values = (torch.randn(shape).bfloat16() for _ in range(2))
                cache.update(keys, values, layer)
        ids = torch.full((1, context + 1), token)  # those in the cache are not looked at
        return self._generate(ids, new, clock, cache)[0]


class Ours(_TransformersEngine):
    """This package."""

    def _load(self, folder: Path, dense: str, threads: int) -> Any:
        return hybrid_moe.from_pretrained(folder, threads=threads, dense=dense, progress=False)

    @property
    def label(self) -> str:
        return f"hybrid_moe {hybrid_moe.__version__}"


class Eager(_TransformersEngine):
    """Transformers as it is, with everything in BF16."""

    def _load(self, folder: Path, dense: str, threads: int) -> Any:
        config = transformers.AutoConfig.from_pretrained(folder)
        options: dict[str, Any] = {}
        if config.model_type == "gpt_oss":
            options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
        elif hasattr(config, "hybrid_moe"):
            raise UnavailableError("Transformers reads no experts that `convert` wrote")
        with torch.device("meta"):
            plain = transformers.AutoConfig.from_pretrained(folder)
            del plain.quantization_config
            empty = transformers.AutoModelForCausalLM.from_config(plain)
        needed = 2 * sum(p.numel() for p in empty.parameters())
        if needed > psutil.virtual_memory().available:
            raise UnavailableError(f"{needed / 1e9:.0f} GB of BF16 weights do not fit")
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, experts_implementation="eager", **options
        )

    @property
    def label(self) -> str:
        return f"Transformers {transformers.__version__}, eager, BF16"
