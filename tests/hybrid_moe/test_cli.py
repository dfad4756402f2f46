"""The `hybrid-moe` command on tiny checkpoints."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid_moe
from hybrid_moe.cli.errors import explain
from hybrid_moe.cpu_kernels.ceilings import bandwidth
from hybrid_moe.cpu_kernels.dsl.tiers import choose_tier
from hybrid_moe.formats.tensors import CheckpointError
from hybrid_moe.integrations.transformers.gated_drafts import GatedDrafts
from hybrid_moe.integrations.transformers.registration import from_pretrained
from hybrid_moe.text import format_bytes, format_ranges
from tests.families import write_family
from tests.hybrid_moe.checkpoints import edit_tensors, save
from tests.hybrid_moe.command import CHARACTERS, PROMPT, run, write_model
from tests.hybrid_moe.tiny_models import build, greedy
from tests.machines import Machine

SMALL = Path(__file__).parents[2] / "examples" / "tiny_moe" / "model"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the bandwidth probe: the real ones are far beyond the caches."""
    real = bandwidth.ReadProbe
    monkeypatch.setattr(bandwidth, "ReadProbe", lambda pool: real(pool, 1 << 20, block=64 << 10))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def text_of(tokens: list[int]) -> str:
    """What the tokenizer makes of them; the tail of the vocabulary has no characters."""
    return "".join(CHARACTERS[t] for t in tokens if 0 < t < len(CHARACTERS))


@pytest.mark.parametrize("method", [None, "BF16", "mxfp4"])
def test_generate_streams_the_greedy_text(checkpoint: Path, method: str | None) -> None:
    given = ["--method", method] if method else []
    result = run("generate", "--model", checkpoint, "--prompt", PROMPT, "--threads", 1,
                 "--max-new-tokens", 12, *given)  # fmt: skip
    assert result.exit_code == 0, result.output
    model = from_pretrained(checkpoint, method or "BF16", threads=1, progress=False)
    ids = torch.tensor([[CHARACTERS.index(c) for c in PROMPT]])
    assert result.stdout == text_of(greedy(model, ids, 12)) + "\n"
    assert f"prefill {len(PROMPT)} tokens" in result.stderr
    assert "decode 11 tokens" in result.stderr and "tok/s" in result.stderr
    assert re.search(r"decode at .+ of the roofline \(0\.\d+ MB a token at \d", result.stderr)


@pytest.mark.parametrize("kind", ["model", "prompt"])
def test_generate_with_drafts(checkpoint: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text. A draft that is the model itself is always right, but does not pay: it is
    tried after 32 steps. Every step takes one second here."""
    seconds = itertools.count()
    monkeypatch.setattr(GatedDrafts.__init__, "__defaults__", (lambda: float(next(seconds)),))
    words = ("generate", "--model", checkpoint, "--prompt", PROMPT, "--threads", 1,
             "--max-new-tokens", 48)  # fmt: skip
    plain = run(*words)
    result = run(*words, "--draft", checkpoint if kind == "model" else "prompt")
    assert result.exit_code == 0, result.output
    assert result.stdout == plain.stdout and "drafted" not in plain.stderr
    counts = re.search(r"decode 47 tokens, .+, (\d+) of (\d+) drafted ones right", result.stderr)
    assert counts is not None, result.stderr
    if kind == "model":
        assert int(counts[1]) == int(counts[2]) > 0


def test_a_draft_that_cannot_be_one(checkpoint: Path, tmp_path: Path) -> None:
    words = ("generate", "--model", checkpoint, "--prompt", PROMPT, "--threads", 1)
    for draft, message in (
        (tmp_path, "no *.safetensors file"),
        (SMALL, "a draft needs the same tokenizer"),
    ):
        result = run(*words, "--draft", draft)
        assert result.exit_code == 2 and result.stdout == ""
        assert message in " ".join(result.stderr.split())


def test_generate_says_what_it_does(checkpoint: Path) -> None:
    """Steps and what runs on stderr, the text alone on stdout; in colour on a terminal."""
    words = ("generate", "--model", checkpoint, "--prompt", PROMPT, "--threads", 1,
             "--max-new-tokens", 12)  # fmt: skip
    plain, coloured = run(*words), run(*words, env={"FORCE_COLOR": "1", "COLUMNS": "200"})
    lines = plain.stderr.splitlines()
    steps = [line.rpartition(":")[0] for line in lines if re.fullmatch(r".*: \d+\.\d s", line)]
    assert steps == ["importing PyTorch and Transformers", "reading the configuration",
                     "measuring the memory", "loading the model", "compiling kernels",
                     "first token"]  # fmt: skip
    headline = next(line for line in lines if "ready in" in line)
    for fact in (str(checkpoint), "qwen3_moe", "2 layers of 8 experts, 3 per token", "BF16",
                 f"tier {choose_tier().name}", "1 thread;"):  # fmt: skip
        assert fact in headline
    assert "\x1b" not in plain.output
    assert "\x1b[32m" in coloured.stdout and "\x1b[1m" in coloured.stderr
    assert re.sub(r"\x1b\[\d*m", "", coloured.stdout) == plain.stdout


def test_generate_keeps_packed_experts(checkpoint: Path, tmp_path: Path) -> None:
    words = ("generate", "--model", checkpoint, "--prompt", PROMPT, "--threads", 1,
             "--max-new-tokens", 12)  # fmt: skip
    texts = [run(*words, *more).stdout for more in ((), *[("--cache", tmp_path / "cache")] * 2)]
    assert texts[0] and texts == [texts[0]] * 3
    assert len(list((tmp_path / "cache").iterdir())) == 2  # layers
    (tmp_path / "file").touch()
    refused = run(*words, "--cache", tmp_path / "file")
    assert refused.exit_code == 2 and "cannot be used" in refused.stderr


SPLIT = ("--gpu-experts", "50%", "--gpu-backend", "torch")


def test_generate_with_experts_in_slots(checkpoint: Path) -> None:
    """The same text, and how often experts were found on the GPU in place of a roofline that would
    count them to the CPU."""
    words = ("generate", "--model", checkpoint, "--prompt", PROMPT, "--threads", 1,
             "--max-new-tokens", 12)  # fmt: skip
    plain, split = run(*words), run(*words, *SPLIT)
    assert split.exit_code == 0, split.output
    assert split.stdout == plain.stdout
    pairs = 2 * 3 * (len(PROMPT) + 11)  # layers, experts a token; the last token is not read
    hits = rf"hot experts took (\d+\.\d) % of {pairs} calls; by layer .* at least, .* at most"
    found = re.search(hits, split.stderr)
    assert found is not None and 0 < float(found[1]) < 100
    assert "8 experts on cpu by torch" in split.stderr
    assert "roofline" not in split.stderr
    assert "hot experts" not in plain.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpu-experts", "150%"), "gpu_experts is '150%', a share must be between 0 and 1"),
        (("--gpu-experts", "8"), "gpu_experts is '8', and a number of experts"),
        (("--gpu-experts", "hot.json"), "gpu_experts is 'hot.json', which is no file"),
        (("--gpu-backend", "torch"), "gpu_backend is 'torch', but no expert is to be on a GPU"),
        ((*SPLIT[:3], "cuda"), "gpu_backend is 'cuda': choices are cute, torch"),
    ],
)
def test_generate_refuses_gpu_experts(
    checkpoint: Path, words: tuple[str, ...], message: str
) -> None:
    result = run("generate", "--model", checkpoint, "--prompt", PROMPT, "--threads", 1, *words)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr


def test_generate_keeps_pytorch_within_the_quota(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("generate", "--model", checkpoint, "--prompt", PROMPT, "--max-new-tokens", 1)
    Machine({0: "0-7"}, quota=1.0).pretend(tmp_path, monkeypatch)
    for before, given, after in ((4, (), 1), (1, (), 1), (4, ("--threads", 1), 1)):
        torch.set_num_threads(before)
        result = run(*words, *given)
        assert result.exit_code == 0, result.output
        assert torch.get_num_threads() == after


def test_generate_samples_by_seed(checkpoint: Path) -> None:
    def sample(seed: int) -> str:
        result = run("generate", "--model", checkpoint, "--prompt", PROMPT, "--threads", 1,
                     "--max-new-tokens", 16, "--temperature", 2.0, "--seed", seed)  # fmt: skip
        assert result.exit_code == 0, result.output
        return str(result.stdout)

    assert sample(1) == sample(1) != sample(2)


def test_one_token_has_no_decode_speed(checkpoint: Path) -> None:
    result = run("generate", "--model", checkpoint, "--prompt", PROMPT, "--threads", 1,
                 "--max-new-tokens", 1)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "prefill" in result.stderr and "decode" not in result.stderr


def test_convert_and_inspect(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "mxfp4"
    result = run("convert", "--model", checkpoint, "--out", out, "--method", "MXFP4",
                 "--threads", 1)  # fmt: skip
    assert result.exit_code == 0, result.output
    result = run("inspect", out, "--json")
    summary = json.loads(result.stdout)
    assert summary["formats"] == {"MXFP4": [0, 1]}
    assert summary["num_experts"] == 8 and summary["hidden"] == 64
    table = run("inspect", out)
    assert table.exit_code == 0
    for fact in ("qwen3_moe", "MXFP4", "8 per layer, 3 per token", "routed experts"):
        assert fact in table.stdout


def test_inspect_lists_draft_layers(tmp_path: Path) -> None:
    fixture = write_family("deepseek_v3_draft", tmp_path)
    result = run("inspect", fixture.directory, env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert re.search(r"draft layers +2 \(1\), not counted", result.stdout)
    assert "2, with experts: 1 (1)" in result.stdout
    plain = run("inspect", write_family("deepseek_v3", tmp_path / "plain").directory)
    assert "draft layers" not in plain.stdout


def test_convert_asks_where_gate_and_up_lie(tmp_path: Path) -> None:
    fixture = write_family("privacy_filter", tmp_path / "in")
    (fixture.directory / "config.json").unlink()
    arguments = ("convert", "--model", fixture.directory, "--out", tmp_path / "out")
    assert run(*arguments).exit_code != 0
    assert not (tmp_path / "out").exists()
    assert run(*arguments, "--gate-up-layout", "halves").exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_inspect_reports_problems(checkpoint: Path, tmp_path: Path) -> None:
    broken = save(build("qwen3_moe"), tmp_path)
    edit_tensors(broken, drop="model.layers.1.mlp.experts.3.up_proj.weight")
    result = run("inspect", broken)
    assert result.exit_code == 1
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in result.stderr


def test_doctor_json_and_table() -> None:
    result = run("doctor", "--json", "--no-bandwidth")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["versions"]["hybrid_moe"] == hybrid_moe.__version__
    assert report["cores"]["available"] >= 1
    assert report["gpu"]["reason"]
    table = run("doctor", "--no-bandwidth")
    assert "GPU kernels" in table.stdout
    assert report["isa"]["chosen"] in table.stdout and "NUMA node" in table.stdout


def test_errors_are_one_paragraph(checkpoint: Path, tmp_path: Path) -> None:
    generate = ("generate", "--prompt", PROMPT, "--model")
    for arguments, message in [
        ((*generate, tmp_path / "nowhere"), "nowhere"),
        ((*generate, checkpoint, "--method", "INT3"), "unknown method 'INT3'"),
        ((*generate, checkpoint, "--threads", 100_000), "100000 threads"),
        (("generate", "--model", checkpoint, "--prompt", ""), "the prompt is empty"),
        (("inspect", tmp_path / "nowhere"), "nowhere"),
        (("convert", "--model", checkpoint, "--out", checkpoint), "another directory"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        lines = [line for line in result.stderr.splitlines() if line.startswith("hybrid-moe: ")]
        assert len(lines) == 1 and message in lines[0]
        assert "Traceback" not in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    ("damage", "prompt", "env", "message"),
    [
        (lambda d: [f.unlink() for f in d.glob("token*")], "x", {}, "makes no token of the prompt"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "x", {}, "tokenizer in .* cannot be"),
        (lambda d: None, "\udcff", {}, "the prompt is no valid UTF-8"),
        (lambda d: None, "x", {"HYBRID_MOE_ISA": "quantum"}, "HYBRID_MOE_ISA=quantum: no such"),
    ],
)
def test_generate_finds_what_is_wrong_before_it_loads(
    checkpoint: Path, tmp_path: Path, damage: Any, prompt: str, env: dict[str, str], message: str
) -> None:
    directory = shutil.copytree(checkpoint, tmp_path / "model")
    damage(directory)
    result = run("generate", "--model", directory, "--prompt", prompt, env=env)
    assert result.exit_code == 2, result.output
    assert re.search(f"^hybrid-moe: .*{message}", result.stderr, re.MULTILINE)
    assert "ready" not in result.stderr


def test_a_reader_that_has_enough_is_no_error(checkpoint: Path) -> None:
    program = (
        "import os, sys\nfrom hybrid_moe.cli import main\n"
        "reader, writer = os.pipe()\nos.close(reader)\nos.dup2(writer, 1)\n"
        "sys.argv = ['hybrid-moe', 'generate', '--prompt', 'x', '--max-new-tokens', '4',\n"
        f"            '--threads', '1', '--model', {str(checkpoint)!r}]\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Broken pipe" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("arguments", "env"), [(["--debug"], {}), ([], {"HYBRID_MOE_DEBUG": "1"})])
def test_debug_keeps_the_exception(
    tmp_path: Path, arguments: list[str], env: dict[str, str]
) -> None:
    result = run(*arguments, "inspect", tmp_path / "nowhere", env=env)
    assert isinstance(result.exception, FileNotFoundError)


@pytest.mark.parametrize(
    ("error", "paragraph"),
    [
        (
            ModuleNotFoundError("No module named 'transformers'", name="transformers"),
            'transformers is not installed: pip install "hybrid-moe[transformers]"',
        ),
        (
            ModuleNotFoundError("No module named 'tomato'", name="tomato"),
            "No module named 'tomato'",
        ),
        (
            FileNotFoundError(2, "No such file or directory", "a/b"),
            "a/b: No such file or directory",
        ),
        (CheckpointError("first line\n  second line"), "first line second line"),
        (ValueError(), "ValueError"),
    ],
)
def test_explain(error: Exception, paragraph: str) -> None:
    assert explain(error) == paragraph


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"hybrid-moe {hybrid_moe.__version__}\n")


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom typer.testing import CliRunner\nfrom hybrid_moe.cli import app\n"
        "for words in ([], ['generate'], ['chat'], ['inspect'], ['plan'], ['serve']):\n"
        "    assert CliRunner().invoke(app, [*words, '--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'llvmlite'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_layout() -> None:
    assert format_ranges((0, 1, 2, 5)) == "0-2, 5"
    assert [format_bytes(n) for n in (512, 3 << 20, 5 << 30)] == ["0.5 KiB", "3.00 MiB", "5.00 GiB"]
