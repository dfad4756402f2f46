"""What a user may name a model by, and that every door takes the same names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from hybrid_moe.integrations.transformers.registration import from_pretrained
from hybrid_moe.loaders.find_model import find_model
from tests.hybrid_moe.command import PROMPT, run, write_model

ID = "org/Tiny-MoE.v1"
COMMIT = "0123abc"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def repository(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in the hub's cache as Transformers leaves it: links to blobs."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    made = tmp_path / f"models--{ID.replace('/', '--')}"
    snapshot = made / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, made / "blobs")
    for file in (made / "blobs").iterdir():
        (snapshot / file.name).symlink_to(file)
    (made / "refs").mkdir()
    (made / "refs" / "main").write_text(COMMIT)
    return made


def test_names_of_one_model(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = repository / "snapshots" / COMMIT
    for name in (ID, repository, f"{repository}/", snapshot):
        assert find_model(name) == snapshot
    file = snapshot / "model.safetensors"
    assert find_model(file) == file
    monkeypatch.setenv("HOME", str(repository.parent))
    assert find_model(f"~/{repository.name}") == snapshot
    monkeypatch.chdir(repository.parent)
    Path(ID).mkdir(parents=True)  # what is here comes before what is in the cache
    assert find_model(ID) == Path(ID)


def test_the_snapshot_of_a_repository(repository: Path) -> None:
    snapshots = repository / "snapshots"
    (snapshots / "older").mkdir()
    assert find_model(repository) == snapshots / COMMIT
    (repository / "refs" / "main").write_text("gone")
    with pytest.raises(ValueError, match=f"several snapshots.*snapshots/{COMMIT}, snapshots/older"):
        find_model(repository)
    shutil.rmtree(snapshots / COMMIT)
    assert find_model(repository) == snapshots / "older"
    (snapshots / "older").rmdir()
    with pytest.raises(FileNotFoundError, match="not finished"):
        find_model(repository)


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/absent", "hf download org/absent"),
        ("absent", "neither a folder here nor a model in the Hugging Face cache"),
        ("..", None),
        ("-rf", "neither a folder"),
        ("a/b/c", "does not exist: give the folder"),
        ("/no/where", "does not exist: give the folder"),
        ("", None),
        ("x" * 5000, "no path: .*too long"),
        ("a\0b", "is no path|does not exist"),
        ("~no-such-user-here/x", "is no path"),
    ],
)
def test_what_is_nowhere(name: str, message: str | None) -> None:
    if message is None:
        assert find_model(name).is_dir()
        return
    with pytest.raises(FileNotFoundError, match=message):
        find_model(name)


COMMANDS: dict[str, Callable[[object, Path], tuple[object, ...]]] = {
    "generate": lambda model, out: (
        "generate", "--model", model, "--prompt", PROMPT, "--threads", 1, "--max-new-tokens", 1,
    ),
    "convert": lambda model, out: ("convert", "--model", model, "--out", out, "--threads", 1),
    "inspect": lambda model, out: ("inspect", model),
    "plan": lambda model, out: (
        "plan", model, "--ram-bandwidth", 20, "--gmacs", 60, "--ram", "64GB",
    ),
    "serve": lambda model, out: (
        "serve", "--dry-run", "--model", model, "--ram-bandwidth", 20, "--gmacs", 60,
        "--ram", "64GB",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_every_name(command: str, repository: Path, tmp_path: Path) -> None:
    for number, model in enumerate((ID, repository)):
        result = run(*COMMANDS[command](model, tmp_path / f"out{number}"))
        assert result.exit_code == 0, result.output
    result = run(*COMMANDS[command]("org/absent", tmp_path / "out"))
    assert result.exit_code == 2 and "hf download org/absent" in result.stderr


@pytest.mark.usefixtures("repository")
def test_from_pretrained_takes_an_id() -> None:
    model = from_pretrained(ID, "BF16", threads=1, progress=False)
    config = json.loads((find_model(ID) / "config.json").read_text())
    assert model.config.hidden_size == config["hidden_size"]
