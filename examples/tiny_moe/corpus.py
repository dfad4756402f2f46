"""The books: public-domain English novels that Debian packages carry, obtained by package name.

`read_books(split)` downloads the packages with `apt-get download` (no root is needed, nothing is
installed), reads the text out of them and returns clean prose: one paragraph a line, no wrapped
lines, no front matter, no chapter headings. Whole books are held out: no word of them reaches the
tokenizer or the training.

    python corpus.py --out books/       # writes one .txt per book and prints a table
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("tiny_moe.corpus")

CACHE = Path.home() / ".cache" / "tiny_moe"
AUSTEN = ("r-cran-janeaustenr", "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
TWAIN = (
    "golang-github-klauspost-compress-dev",
    "usr/share/gocode/src/github.com/klauspost/compress/testdata/Mark.Twain-Tom.Sawyer.txt",
)


@dataclass(frozen=True)
class Book:
    """One book and where it comes from.

    Attributes:
        key: its name in results and file names.
        title: as it stands in the package's text, in any case.
        author: who wrote it, and when it was first published.
        source: Debian package, and the file of that package which holds the text.
        split: "train", or "heldout" for a book that training never sees.
        sha256: of the clean text in UTF-8, so that a package whose text changed is noticed.
    """

    key: str
    title: str
    author: str
    source: tuple[str, str]
    split: str
    sha256: str


BOOKS: tuple[Book, ...] = (
    Book(
        "emma",
        "EMMA",
        "Jane Austen, 1815",
        AUSTEN,
        "train",
        "3ecfae5758d6b25c9624203f6feb8deff8fe323823ea62f470fc29091459dbd6",
    ),
    Book(
        "mansfield_park",
        "MANSFIELD PARK",
        "Jane Austen, 1814",
        AUSTEN,
        "train",
        "140cb8dd42e93966f41c26ca2e3739f5721ba7154b39a9076a022d862866cc92",
    ),
    Book(
        "northanger_abbey",
        "NORTHANGER ABBEY",
        "Jane Austen, 1817",
        AUSTEN,
        "train",
        "b708f14ca33bd4282431c7f6a888e1ede20b135c263b0cdb4e8b1b26be4a3313",
    ),
    Book(
        "pride_prejudice",
        "PRIDE AND PREJUDICE",
        "Jane Austen, 1813",
        AUSTEN,
        "train",
        "eaa94544bb57de7a1e7e9823ef185e7ee52d14d376d55b525054511124ad75de",
    ),
    Book(
        "sense_sensibility",
        "SENSE AND SENSIBILITY",
        "Jane Austen, 1811",
        AUSTEN,
        "train",
        "2eb1caec3efaab92237495a249680f9b3f94daa109662b39c1ea80e0540b25e6",
    ),
    Book(
        "persuasion",
        "PERSUASION",
        "Jane Austen, 1817",
        AUSTEN,
        "heldout",
        "bd278b646a6a46d51e505c1094068e38abc07dde9d57383c4bd9ecd449a934a4",
    ),
    Book(
        "tom_sawyer",
        "TOM SAWYER",
        "Mark Twain, 1876",
        TWAIN,
        "heldout",
        "4a72d6e3529737ac53540a609bc4717a6836a72fcdcf95c317b4537852f05e27",
    ),
)


def read_books(split: str, cache: Path = CACHE) -> dict[str, str]:
    """Clean text of every book of `split` ("train" or "heldout") by its key.

    Packages are fetched once into `cache`.

    Raises:
        ValueError: no book has that split, or a package's file no longer holds a title.
        RuntimeError: apt-get or dpkg-deb is missing or fails; the message has their words.
    """
    wanted = [book for book in BOOKS if book.split == split]
    if not wanted:
        raise ValueError(f"unknown split {split!r}: 'train' and 'heldout' exist")
    return {book.key: read_book(book, cache) for book in wanted}


def read_book(book: Book, cache: Path = CACHE) -> str:
    """Clean text of one book; raises as `read_books` does."""
    package, member = book.source
    path = fetch_member(package, member, cache)
    raws = list(r_strings(path)) if path.suffix == ".rdb" else [path.read_text("utf-8")]
    raw = next((t for t in raws if book.title in t[:600].upper().replace("T O M", "TOM")), None)
    if raw is None:
        raise ValueError(f"{member} of package {package} holds no book titled {book.title!r}")
    text = clean(raw)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest != book.sha256:
        log.warning("%s differs from the text the results were made with: %s", book.key, digest)
    return text


def fetch_member(package: str, member: str, cache: Path) -> Path:
    """Path of one file of a Debian package, downloaded and unpacked below `cache` once."""
    folder = cache / package
    path = folder / member
    if path.exists():
        return path
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"{tool} is needed to fetch package {package}: use a Debian system")
    folder.mkdir(parents=True, exist_ok=True)
    _tool(folder, "apt-get", "download", package)
    (archive,) = folder.glob("*.deb")
    _tool(folder, "dpkg-deb", "--extract", archive.name, ".")
    archive.unlink()
    if not path.exists():
        raise RuntimeError(f"package {package} has no file {member}")
    return path


def _tool(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed ('apt-get update' as root makes the package lists): "
            + done.stderr.strip()
        )


def r_strings(path: Path) -> Iterator[str]:
    """Each character vector of an R lazy-load database as one text, an element a line.

    The file is a row of records: big-endian length of the data, then the data under zlib. The
    data is R's XDR serialization (R Internals, 1.8), version 3, whose header ends with the name
    of the native encoding; then the type word (16, a character vector), its length, and for each
    element its flags, its length (-1 for NA) and its bytes.
    """
    rest = path.read_bytes()
    while rest:
        inflate = zlib.decompressobj()
        data = inflate.decompress(rest[4:])
        if not rest.startswith(struct.pack(">I", len(data))) or not data.startswith(b"X\n"):
            raise ValueError(f"{path}: not an R lazy-load database compressed by zlib")
        rest = inflate.unused_data
        (encoding,) = struct.unpack_from(">i", data, 14)
        kind, count = struct.unpack_from(">Ii", data, 18 + encoding)
        if kind != 16:
            raise ValueError(f"{path}: a record has R type {kind & 255}, not a character vector")
        at, lines = 26 + encoding, []
        for _ in range(count):
            _, length = struct.unpack_from(">Ii", data, at)
            at += 8
            lines.append(data[at : at + max(length, 0)].decode("utf-8"))
            at += max(length, 0)
        yield "\n".join(lines)


HEADING = re.compile(r"(CHAPTER|VOLUME) +[0-9IVXLC]+\.?", re.IGNORECASE)
END = re.compile(r"FINIS|THE END|A NOTE ON THE TEXT|END OF THE PROJECT GUTENBERG.*", re.IGNORECASE)


def clean(raw: str) -> str:
    """Prose of `raw`: one paragraph a line, from the first chapter heading to the end mark."""
    lines = [line.strip() for line in raw.splitlines()]
    start = next(i for i, line in enumerate(lines) if HEADING.fullmatch(line))
    stop = next((i for i, line in enumerate(lines) if END.fullmatch(line)), len(lines))
    body = ["" if HEADING.fullmatch(line) else line for line in lines[start:stop]]
    paragraphs = re.split(r"\n{2,}", "\n".join(body).replace("_", ""))
    return "".join(" ".join(p.split()) + "\n" for p in paragraphs if p.strip(" \n*"))


def main() -> None:
    """Command line: writes the books and prints what each one is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for one .txt per book")
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    for book in BOOKS:
        text = read_book(book, args.cache)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{book.key}.txt").write_text(text, "utf-8")
        size, digest = len(text.encode()), hashlib.sha256(text.encode()).hexdigest()
        print(f"{book.split:8} {book.key:18} {size:8} bytes  {digest}  {book.author}")


if __name__ == "__main__":
    main()
