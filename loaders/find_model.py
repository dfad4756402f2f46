"""Where a model is that a user names: a folder, or a repository in the Hugging Face hub's cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_model(model: str | os.PathLike[str]) -> Path:
    """The checkpoint that `model` names. Nothing is downloaded.

    Args:
        model: a checkpoint's folder or file; a repository's folder in the hub's cache, which holds
            `snapshots/<commit>`; or the id ("org/name") of a repository that is in the cache.

    Returns:
        An existing path: for a repository its snapshot of `main`, or the only one.

    Raises:
        FileNotFoundError: there is no such thing; the message says what to do.
        ValueError: a repository has several snapshots, none of them `main`.
    """
    text = os.fspath(model)
    try:
        path = Path(text).expanduser()
        exists = path.exists()
    except (RuntimeError, OSError, ValueError) as error:  # "~nobody", a name too long, a NUL
        raise FileNotFoundError(f"{text!r} is no path: {error}") from error
    if exists:
        is_repository = (path / "snapshots").is_dir() and not (path / "config.json").exists()
        return _snapshot(path) if is_repository else path
    if _ID.fullmatch(text):
        return _cached(text)
    raise FileNotFoundError(f"{text!r} does not exist: give the folder of a downloaded checkpoint")


def _snapshot(repository: Path) -> Path:
    """The snapshot to use of a repository's folder in the cache."""
    snapshots = sorted(p for p in (repository / "snapshots").iterdir() if p.is_dir())
    main = repository / "refs" / "main"
    commit = main.read_text().strip() if main.is_file() else None
    wanted = [p for p in snapshots if p.name == commit] or snapshots
    if not wanted:
        raise FileNotFoundError(f"{repository} has no snapshot: its download has not finished")
    if len(wanted) > 1:
        names = ", ".join(f"snapshots/{p.name}" for p in wanted)
        raise ValueError(f"{repository} has several snapshots: give one of {names}")
    return wanted[0]


def _cached(repository: str) -> Path:
    """The folder of a repository's snapshot in the hub's cache."""
    try:
        from huggingface_hub import constants, try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f"{repository!r} does not exist here, and ids of the Hugging Face hub need "
            'huggingface_hub: pip install "hybrid-moe[transformers]"'
        ) from None
    try:
        config = try_to_load_from_cache(repository, "config.json")
    except HFValidationError:  # no id: then it was meant as a folder
        config = None
    if isinstance(config, str):
        return Path(config).parent
    raise FileNotFoundError(
        f"{repository!r} is neither a folder here nor a model in the Hugging Face cache "
        f"({constants.HF_HUB_CACHE}); `hf download {repository}` gets it, if it is an id"
    )
