"""`hybrid-moe profile` on a tiny checkpoint, and on the recorded routing of the small model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hybrid_moe
from hybrid_moe.cli.profile_texts import CHARACTERS, documents, pieces, prompt_ids, spread
from hybrid_moe.integrations.transformers.routing_hooks import recorded_routing, routed_model
from hybrid_moe.placement.routing_profile import PHASES, RoutedModel, RoutingProfile
from hybrid_moe.placement.routing_profile_file import read_routing_profile, write_routing_profile
from tests.hybrid_moe.command import CHARACTERS as VOCABULARY
from tests.hybrid_moe.command import PROMPT, run, write_model

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife. " * 3


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


class Chosen:
    """What routers choose, as Transformers' own router modules return it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.counts: Counter[tuple[str, int, int]] = Counter()
        self.tokens: Counter[tuple[str, int]] = Counter()
        gates = [m for name, m in model.named_modules() if name.endswith("mlp.gate")]
        for layer, gate in enumerate(gates):
            gate.register_forward_hook(lambda _m, _a, out, layer=layer: self._count(layer, out[2]))

    def _count(self, layer: int, ids: torch.Tensor) -> None:
        phase = "decode" if len(ids) == 1 else "prefill"  # prompts here are longer, and alone
        self.tokens[phase, layer] += len(ids)
        self.counts.update((phase, layer, int(e)) for e in ids.flatten())

    def check(self, profile: RoutingProfile) -> None:
        assert sum(self.counts.values()) == profile.by_phase.sum()
        for (phase, layer, expert), count in self.counts.items():
            assert profile.by_phase[PHASES.index(phase), layer, expert] == count
        for p, phase in enumerate(PHASES):
            assert profile.tokens[p] == self.tokens[phase, 0]


@pytest.mark.parametrize("how", ["hybrid_moe", "split", "eager", "by name"])
def test_every_way_of_running_experts_is_recorded(checkpoint: Path, how: str) -> None:
    model: Any
    if how in ("hybrid_moe", "split"):
        hot: dict[str, Any] = {"gpu_experts": 0.5, "gpu_backend": "torch"} if how == "split" else {}
        model = hybrid_moe.from_pretrained(checkpoint, "BF16", threads=1, progress=False, **hot)
    else:
        hybrid_moe.register()
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, experts_implementation="eager" if how == "eager" else "hybrid_moe"
        )
    ids = torch.tensor([[VOCABULARY.index(c) for c in PROMPT]])
    model.generate(ids, max_new_tokens=4, do_sample=False)  # before: not recorded
    chosen = Chosen(model)
    with recorded_routing(model) as recorder:
        model.generate(ids, max_new_tokens=6, do_sample=False)
    chosen.check(recorder.profile())
    assert recorder.profile().tokens.tolist() == [len(PROMPT), 5, 0]
    model.generate(ids, max_new_tokens=2, do_sample=False)  # afterwards: not recorded either
    assert recorder.profile().tokens.tolist() == [len(PROMPT), 5, 0]
    config = model.config
    assert routed_model(model) == RoutedModel(
        "qwen3_moe", config.hidden_size, config.num_experts, config.num_experts_per_tok,
        tuple(range(config.num_hidden_layers)),
    )  # fmt: skip


def test_a_model_without_experts() -> None:
    with pytest.raises(ValueError, match="Linear has no experts that Transformers dispatches"):
        routed_model(torch.nn.Linear(2, 2))


def test_measure_and_show(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    lines = [{"text": TEXT}, "a string", {"prompt": "and a prompt"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    out = tmp_path / "profile.json"
    words = ("--model", checkpoint, "--data", tmp_path / "a.txt", "--data", tmp_path / "b.jsonl",
             "--prompt", 40, "--tokens", 200, "--new-tokens", 3, "--temperature", 0,
             "--threads", 1, "--out", out)  # fmt: skip
    result = run("profile", *words)
    assert result.exit_code == 0, result.output
    profile = read_routing_profile(out)
    assert profile.source == "a.txt, b.jsonl"
    assert 0 < profile.tokens[0] <= 200
    assert profile.tokens[1:].tolist() == [5 * 3, 0]  # five prompts, three tokens each
    L, k = profile.shape[0], profile.model.top_k
    assert profile.counts.sum(1).tolist() == [profile.tokens.sum() * k] * L
    assert "15 tokens of decode" in result.stdout

    shown = run("profile", "show", out, env={"COLUMNS": "100"})
    assert shown.exit_code == 0, shown.output
    for said in ("a.txt, b.jsonl", "15 of decode", "balance", "hit rate", "layer 0"):
        assert said in shown.stdout
    heatmap = [line for line in shown.stdout.splitlines() if line.startswith("layer ")]
    assert [len(line.split()[-1]) <= profile.shape[1] for line in heatmap] == [True] * L


def test_prefill_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    out = tmp_path / "profile.json"
    result = run("profile", "--model", checkpoint, "--data", tmp_path / "a.txt", "--out", out,
                 "--new-tokens", 0, "--threads", 1)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert read_routing_profile(out).tokens.tolist() == [len(TEXT), 0, 0]


def test_a_dump_of_sglang(checkpoint: Path, tmp_path: Path) -> None:
    dump, out = tmp_path / "dump.pt", tmp_path / "profile.json"
    config = AutoConfig.from_pretrained(checkpoint)
    L, E, k = config.num_hidden_layers, config.num_experts, config.num_experts_per_tok
    counts = torch.zeros(3, L, E, dtype=torch.int32)
    counts[:2, :, :k] = 5
    torch.save({"rank": 0, "logical_count": counts}, dump)
    result = run("profile", "--model", checkpoint, "--data", dump, "--out", out)
    assert result.exit_code == 0, result.output
    profile = read_routing_profile(out)
    assert profile.tokens.tolist() == [0, 0, 10]
    assert profile.model.layers == tuple(range(L)) and profile.model.model_type == "qwen3_moe"
    assert "10 tokens of unknown" in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("profile",), "needs --model MODEL --data FILE --out profile.json"),
        (("profile", "--model", "M", "--data", "t.txt"), "needs --model"),
        (("profile", "--model", "M", "--data", "none.txt", "--out", "p.json"), "none.txt: No such"),
        (("profile", "--model", "M", "--data", "t.txt", "--out", "p.txt"), "name of a .json file"),
        (("profile", "--model", "M", "--data", "t.txt", "--out", "no/p.json"), "does not exist"),
        (("profile", "--model", "M", "--data", "t.md", "--out", "p.json"), "must be a .txt, a"),
        (("profile", "--model", "M", "--data", "empty.txt", "--out", "p.json"), "has no text"),
        (("profile", "--model", "M", "--data", "b.jsonl", "--out", "p.json"), "b.jsonl, line 2"),
        (("profile", "show", "none.json"), "none.json: No such file"),
        (("profile", "show", "t.txt"), "t.txt is not JSON"),
        (("profile", "show", "placement.json"), "is no routing profile"),
    ],
)
def test_what_is_wrong_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "t.txt": TEXT,
        "t.md": TEXT,
        "empty.txt": " \n",
        "b.jsonl": '"one"\n{"other": 1}\n',
        "placement.json": '{"0": [1]}',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())
    assert not (tmp_path / "p.json").exists()


def test_a_picture_and_a_missing_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    windows = rng.poisson(20, (4, 3, 8))
    by_phase = np.zeros((3, 3, 8), np.int64)
    by_phase[0] = windows.sum(0)
    made = RoutingProfile(
        RoutedModel("mixtral", 64, 8, 2, (1, 2, 4)), by_phase, np.array([240, 0, 0]),
        windows=windows, window_tokens=np.full(4, 60),
    )  # fmt: skip
    write_routing_profile(tmp_path / "p.json", made)
    result = run("profile", "show", tmp_path / "p.json", "--png", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    result = run("profile", "show", tmp_path / "p.json", "--png", tmp_path / "q.png")
    assert result.exit_code == 2
    assert 'pip install "hybrid-moe[plot]"' in result.output


# Texts ------------------------------------------------------------------------------------------


def words_of(pieces_: list[Any]) -> list[str]:
    return " ".join(pieces_).split()


@pytest.mark.parametrize("prompt", [1, 3, 50, 10_000])
def test_pieces_are_the_text(prompt: int) -> None:
    """Nothing is lost, and no piece is longer than its tokens may be."""
    found = pieces(iter([TEXT, "", "  \n", TEXT]), prompt)
    assert words_of(found) == TEXT.split() * 2 or prompt == 1  # words longer than 6 are cut
    assert "".join("".join(piece for piece in found if isinstance(piece, str)).split()) == "".join(
        (TEXT * 2).split()
    )
    assert max(len(piece) for piece in found) <= prompt * CHARACTERS


def test_pieces_are_spread() -> None:
    every: list[Any] = [str(n) for n in range(10)]
    assert spread(every, 3) == ["0", "3", "6"]
    assert spread(every, 20) == every


class Tokenizer:
    """One token a character."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


@pytest.fixture
def conversation(tmp_path: Path) -> Iterator[Any]:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    return documents(path)


def test_conversations(conversation: Iterator[Any]) -> None:
    (piece,) = pieces(conversation, 4)
    assert "".join(map(chr, prompt_ids(piece, Tokenizer(), 8))) == "<user>he"
    assert prompt_ids("hello", Tokenizer(), 2) == [ord("h"), ord("e")]
    with pytest.raises(ValueError, match="chat template does not take"):
        prompt_ids([{"no": "role"}], Tokenizer(), 8)
