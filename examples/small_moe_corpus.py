"""The text that trains the small model: which files of this machine, under which licence."""

from __future__ import annotations

import gzip
import html
import json
import lzma
import random
import re
import subprocess
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_KIND_BYTES = 7_500_000
MIN_DOCUMENT_BYTES = 400
SHINGLE_WORDS = 6


def read_plain(path: Path) -> str:
    return path.read_bytes().decode(errors="ignore").replace("\r\n", "\n")


def read_page(path: Path) -> str:
    """The text of an HTML page, without its head and navigation."""
    page = read_plain(path)
    page = re.sub(r"(?s)<(head|script|style)\b.*?</\1>", "", page)
    page = re.sub(r'(?s)<ul class="docnav[^>]*>.*?</ul>|<div class="nav\w+">.*?</table>', "", page)
    page = re.sub(r"(?s)^.*?(?=<h1|<div class=\"body\")", "", page, count=1)
    page = re.sub(r"</?(p|div|li|h\d|tr|pre|dt|dd|section)\b[^>]*>", "\n\n", page)
    page = re.sub(r"<br\b[^>]*>", "\n", page)
    text = html.unescape(re.sub(r"<[^>]*>", "", page)).replace("¶", "")
    paragraphs = (re.sub(r"[ \t]+", " ", part.strip()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(textwrap.fill(p, 80) if len(p) > 80 else p for p in paragraphs if p)


def read_manual(path: Path) -> str:
    """A manual page, set in lines of 78 characters."""
    command = ["groff", "-K", "utf8", "-mandoc", "-Tutf8", "-rLL=78n", "-rHY=0"]
    command += ["-P-c", "-P-b", "-P-o", "-P-u"]
    source = gzip.decompress(path.read_bytes())
    page = subprocess.run(command, input=source, capture_output=True, check=True).stdout
    return re.sub(r"(?<=\S) {2,}", " ", page.decode(errors="ignore"))


@dataclass(frozen=True)
class Source:
    """Files of one kind of text under one licence."""

    kind: str
    package: str
    licence: str
    folder: str
    patterns: tuple[str, ...]
    read: Callable[[Path], str] = read_plain
    max_bytes: int = MAX_KIND_BYTES


_MANUAL_PARTS = ("library", "howto", "tutorial", "faq", "using", "whatsnew")
_HANDBOOK = "/usr/share/doc/debian-handbook/html"
_HANDBOOK_LICENCE = "GPL-2.0-or-later or CC-BY-SA-3.0"
_STDLIB = sysconfig.get_path("stdlib")
# "*" stands for the version in the folder of python3-doc.
SOURCES = (
    Source("python", "the Python that runs this", "PSF-2.0", _STDLIB, ("*.py", "[a-z]*/**/*.py")),
    Source(
        "english",
        "python3-doc",
        "PSF-2.0",
        "/usr/share/doc",
        tuple(f"python3.*/html/_sources/{part}/*.rst.txt" for part in _MANUAL_PARTS),
        max_bytes=5_000_000,
    ),
    Source(
        "english", "debian-handbook", _HANDBOOK_LICENCE, _HANDBOOK, ("en-US/*.html",), read_page
    ),
    Source(
        "english",
        "debian-reference-en",
        "GPL-2.0-or-later",
        "/usr/share/debian-reference",
        ("*.en.html",),
        read_page,
    ),
    Source(
        "english",
        "developers-reference",
        "GPL-2.0-or-later",
        "/usr/share/developers-reference",
        ("_sources/*.rst.txt",),
    ),
    Source(
        "english",
        "debian-policy",
        "GPL-2.0-or-later",
        "/usr/share/doc/debian-policy/policy.html",
        ("*.html",),
        read_page,
    ),
    Source("c", "libdpdk-dev", "BSD-3-Clause", "/usr/include/dpdk", ("**/*.h",)),
    Source("c", "libstb-dev", "MIT or Unlicense", "/usr/include/stb", ("*.h",)),
    Source(
        "c",
        "linux-libc-dev",
        "GPL-2.0 with Linux-syscall-note",
        "/usr/include",
        ("linux/**/*.h", "asm-generic/*.h", "sound/*.h"),
    ),
    Source("french", "debian-handbook", _HANDBOOK_LICENCE, _HANDBOOK, ("fr-FR/*.html",), read_page),
    Source(
        "french",
        "debian-reference-fr",
        "GPL-2.0-or-later",
        "/usr/share/debian-reference",
        ("*.fr.html",),
        read_page,
    ),
    Source(
        "french",
        "developers-reference-fr",
        "GPL-2.0-or-later",
        "/usr/share/developers-reference/fr",
        ("*.html",),
        read_page,
    ),
    Source(
        "french",
        "manpages-fr",
        "GPL-3.0-or-later and those of the pages translated",
        "/usr/share/man/fr",
        ("man[1578]/*.gz",),
        read_manual,
    ),
)
# No file of these names trains, wherever it lies: their text is what texts.py reads.
HELD_OUT_NAMES = (
    "topics.py",
    "stb_sprintf.h",
    "sect.debian-internals.html",
    "sect.foundation-documents.html",
    "sect.follow-debian-news.html",
    "sect.release-lifecycle.html",
)
_LEFT_OUT_FOLDERS = {"test", "tests", "encodings", "site-packages", "dist-packages"}


def list_files(source: Source) -> list[Path]:
    """The files of a source that training may read, in a fixed random order."""
    from equipoise.bundled.texts import HELD_OUT_MODULES

    held_out = {*HELD_OUT_NAMES, *(f"{name}.py" for name in HELD_OUT_MODULES)}
    folder = Path(source.folder)
    found = {path for pattern in source.patterns for path in folder.glob(pattern)}
    files = sorted(
        path
        for path in found
        if path.name not in held_out
        and not _LEFT_OUT_FOLDERS.intersection(path.relative_to(folder).parts)
    )
    if not files:
        raise SystemExit(f"No {source.kind} text in {folder}: install {source.package}")
    random.Random(0).shuffle(files)
    return files


def list_shingles(text: str) -> list[int]:
    words = re.findall(r"\w+", text)
    count = len(words) - SHINGLE_WORDS + 1
    return [hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(count)]


def is_english(paragraph: str) -> bool:
    english = len(re.findall(r"\b(?:the|of|and|is|to|this|with)\b", paragraph))
    return english > len(re.findall(r"\b(?:le|la|les|de|des|et|un|une|est|pour)\b", paragraph))


def repeats(text: str, seen: set[int]) -> bool:
    """Whether a third of the text, and more than a common phrase, has been seen."""
    shingles = list_shingles(text)
    return sum(s in seen for s in shingles) > max(4, len(shingles) // 3)


def read_documents(source: Source, held_out: set[int]) -> Iterator[str]:
    """Documents of a source, each once, without paragraphs that are held out."""
    seen: set[int] = set()
    for path in list_files(source):
        kept = []
        for paragraph in re.split(r"\n\s*\n", source.read(path).replace("\0", "")):
            untranslated = source.kind == "french" and is_english(paragraph)
            if not untranslated and not repeats(paragraph, held_out):
                kept.append(paragraph.rstrip())
        document = "\n\n".join(kept).strip("\n") + "\n"
        if len(document) >= MIN_DOCUMENT_BYTES and not repeats(document, seen):
            seen.update(list_shingles(document))
            yield document


def gather_corpus(out: Path) -> None:
    """Write each kind's text for training and held-out text, and where it came from."""
    from equipoise.bundled.texts import KINDS, read_kind

    out.mkdir(parents=True, exist_ok=True)
    held_out = {shingle for kind in KINDS for shingle in list_shingles(read_kind(kind))}
    manifest: dict[str, Any] = {"kinds": list(KINDS), "sources": [], "bytes": {}}
    for kind in KINDS:
        parts: list[bytes] = []
        for source in (s for s in SOURCES if s.kind == kind):
            room = min(source.max_bytes, MAX_KIND_BYTES - sum(map(len, parts)))
            taken = 0
            for document in read_documents(source, held_out):
                if taken >= room:
                    break
                parts.append(document.encode() + b"\0")
                taken += len(parts[-1])
            entry = {"kind": kind, "package": source.package, "licence": source.licence}
            manifest["sources"].append({**entry, "bytes": taken})
            print(f"{kind}: {taken:,} bytes of {source.package} ({source.licence})", flush=True)
        random.Random(0).shuffle(parts)
        texts = {"train": b"".join(parts), "heldout": read_kind(kind).encode()}
        for part, text in texts.items():
            (out / f"{kind}.{part}.xz").write_bytes(lzma.compress(text, preset=9))
        manifest["bytes"][kind] = {part: len(text) for part, text in texts.items()}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def read_corpus(folder: Path, part: str) -> dict[str, bytes]:
    """Each kind's text: of the part "train", where zero bytes end documents, or "heldout"."""
    kinds = json.loads((folder / "manifest.json").read_text())["kinds"]
    return {kind: lzma.decompress((folder / f"{kind}.{part}.xz").read_bytes()) for kind in kinds}
