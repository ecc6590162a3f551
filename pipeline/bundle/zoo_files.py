"""The rules of MONAI's model zoo for the files of a bundle: names, texts, weights, large files.

Nothing is downloaded. The rules are those of `ci/verify_bundle.py`, `ci/utils.py` and
`CONTRIBUTING.md` in github.com/Project-MONAI/model-zoo, as of October 2024.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.bundle.findings import Finding, Level
from pipeline.bundle.foreign.files import WEIGHTS, read_mapping
from pipeline.config import BundlePaths
from pipeline.errors import ConfigError

LARGE_FILES = ("large_files.yml", "large_files.yaml", "large_files.json")
MAX_MIB = 25  # the zoo's limit of a single file, which is that of an upload to GitHub
HASH_TYPES = ("md5", "sha1", "sha256", "sha512")
DEFAULT_HASH = "md5"  # MONAI's, where only `hash_val` is given
WEAK_HASHES = ("md5", "sha1")  # two files with one of these can be made on purpose
BUNDLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
BUNDLE_NAME_RULE = "letters, digits, _ and -, a letter or digit first"


@dataclass(frozen=True, kw_only=True, slots=True)
class LargeFile:
    """A file that the zoo downloads, as large_files.yml lists it.

    Attributes:
        path: relative to the bundle, with `/` between folders.
        url: address.
        hash_val: expected hash, hexadecimal, lower case; empty without one.
        hash_type: kind of the hash, lower case.
    """

    path: str
    url: str
    hash_val: str
    hash_type: str


def file_findings(paths: BundlePaths) -> Iterator[Finding]:
    """Yield what is wrong with the texts of a bundle, with its name and with its unit test."""
    yield from _text_findings(
        paths, paths.licence, "the licence of the weights", "add the text of the licence"
    )
    yield from _text_findings(
        paths,
        paths.readme,
        "model, data, scores and limits in Markdown",
        "write it; the zoo's docs/readme_template.md lists the sections",
    )
    name = paths.folder.resolve().name
    if not BUNDLE_NAME.fullmatch(name):
        yield Finding(
            level="advice",
            where=name,
            found="the name of the folder has other characters",
            expected=BUNDLE_NAME_RULE,
            action="rename the folder",
        )
    yield from _unit_test_findings(paths)


def _text_findings(paths: BundlePaths, path: Path, content: str, action: str) -> Iterator[Finding]:
    """Yield an error if a text that the zoo requires is missing or empty."""
    where = path.relative_to(paths.folder).as_posix()
    if path.is_file():
        if not path.read_bytes().strip():
            yield Finding(
                level="error", where=where, found="empty", expected=content, action=action
            )
        return
    found = "missing"
    similar = _similar_name(path)
    if similar:
        found, action = f"missing, but {similar} is there", f"rename it to {path.name}"
    yield Finding(level="error", where=where, found=found, expected=content, action=action)


def _similar_name(path: Path) -> str | None:
    """Return a file in the same folder whose name differs by case or ending only, if any."""
    if not path.parent.is_dir():
        return None
    names = sorted(other.name for other in path.parent.iterdir() if other.is_file())
    return next((name for name in names if Path(name).stem.lower() == path.stem.lower()), None)


def zoo_checkout(paths: BundlePaths) -> Path | None:
    """Return the folder of the checkout of the zoo that a bundle lies in; None elsewhere."""
    models = paths.folder.resolve().parent
    return models.parent if (models / "model_info.json").is_file() else None


def _unit_test_findings(paths: BundlePaths) -> Iterator[Finding]:
    """Yield advice if the bundle lies in a checkout of the zoo that has no unit test of it.

    The zoo keeps unit tests outside of the bundles.
    """
    checkout = zoo_checkout(paths)
    if checkout is None or not (checkout / "ci" / "unit_tests").is_dir():
        return
    name = f"ci/unit_tests/test_{paths.folder.resolve().name}.py"
    if not (checkout / name).is_file():
        yield Finding(
            level="advice",
            where=name,
            found="missing",
            expected="a test that builds and runs the workflows on random volumes",
            action="add it to the zoo, outside of the bundle",
        )


def weights_findings(paths: BundlePaths) -> Iterator[Finding]:
    """Yield what is wrong with the presence of the weights."""
    if paths.weights.is_file():
        return
    where = paths.weights.relative_to(paths.folder).as_posix()
    listed = [PurePosixPath(file.path) for file in _readable_large_files(paths)]
    if PurePosixPath(where) in listed:
        yield Finding(
            level="advice",
            where=where,
            found="not downloaded; the list of large files has its address",
            action=download_command(paths),
        )
        return
    others = [path.as_posix() for path in listed if path.suffix.lower() in WEIGHTS]
    for path in sorted(paths.models.rglob("*")):
        if path.suffix.lower() in WEIGHTS and path.is_file():
            others.append(path.relative_to(paths.folder).as_posix())
    if others:
        yield Finding(
            level="advice",
            where=where,
            found=f"missing; the weights are {', '.join(dict.fromkeys(others))}",
            expected="weights under this name, where other tools look for them",
            action=(
                "rename them, or have the zoo add the bundle to exclude_verify_preferred_files_list"
            ),
        )
        return
    yield Finding(
        level="error",
        where=where,
        found="missing",
        expected="the weights, or an entry in large_files.yml",
        action="train the bundle or put its weights there",
    )


def download_command(paths: BundlePaths) -> str:
    """Return the command by which MONAI downloads the large files of a bundle."""
    return f"python -m monai.bundle download_large_files --bundle_path {paths.folder}"


def large_file_findings(paths: BundlePaths) -> Iterator[Finding]:
    """Yield what is wrong with the list of large files, and the large files that are not in it."""
    names = [name for name in LARGE_FILES if (paths.folder / name).is_file()]
    if len(names) > 1:
        yield Finding(
            level="error",
            where=", ".join(names),
            found="several lists of large files, of which only one is read",
            expected=LARGE_FILES[0],
            action="join them",
        )
    files = large_files(paths)
    for file in files:
        yield from _entry_findings(paths, names[0], file)
    weak = [file.path for file in files if file.hash_type in WEAK_HASHES or not file.hash_val]
    if weak:
        yield Finding(
            level="advice",
            where=names[0],
            found=f"no SHA-256 for {', '.join(weak)}",
            expected="hash_val and hash_type: sha256, so that nobody can replace the file",
            action="add what `sha256sum FILE` prints",
        )
    yield from _size_findings(paths, {file.path for file in files})


def _entry_findings(paths: BundlePaths, name: str, file: LargeFile) -> Iterator[Finding]:
    """Yield what is wrong with one entry of the list of large files, called `name`."""
    where = f"{name}, {file.path}"
    parts = PurePosixPath(file.path).parts
    if not parts or parts[0] == "/" or ".." in parts or "\\" in file.path:
        yield Finding(
            level="error",
            where=where,
            found=f"path {file.path!r} leads out of the bundle",
            expected="a path in the bundle, such as models/model.pt",
        )
        return
    if not file.url.startswith(("https://", "http://")):
        yield Finding(
            level="error",
            where=where,
            found=f"url is {file.url!r}",
            expected="a public address, https://…",
            action="upload the file and give its address",
        )
    if file.hash_val and file.hash_type not in HASH_TYPES:
        yield Finding(
            level="error",
            where=where,
            found=f"hash_type is {file.hash_type!r}",
            expected=f"one of {', '.join(HASH_TYPES)}",
        )
        return
    path = paths.folder / file.path
    if not file.hash_val or not path.is_file():
        return
    actual = _hash(path, file.hash_type)
    if actual != file.hash_val:
        yield Finding(
            level="error",
            where=where,
            found=f"the file here has the {file.hash_type} {actual}",
            expected=file.hash_val,
            action="upload this file and give its hash, or download the listed one",
        )


def _hash(path: Path, kind: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _size_findings(paths: BundlePaths, listed: set[str]) -> Iterator[Finding]:
    """Yield the files above the zoo's limit that are not in the list of large files.

    Outside of a checkout of the zoo a large file harms nobody, so that it is advice there.
    """
    level: Level = "error" if zoo_checkout(paths) is not None else "advice"
    for path in sorted(paths.folder.rglob("*")):
        name = path.relative_to(paths.folder).as_posix()
        if name in listed or not path.is_file():
            continue
        mib = path.stat().st_size / 2**20
        if mib > MAX_MIB:
            yield Finding(
                level=level,
                where=name,
                found=f"{mib:.0f} MiB",
                expected=f"at most {MAX_MIB} MiB per file in the zoo",
                action=f"upload it elsewhere and list it in {LARGE_FILES[0]}",
            )


def large_files(paths: BundlePaths) -> list[LargeFile]:
    """Return the files that the list of large files names; none without such a list.

    Raises:
        ConfigError: the list cannot be read, or an entry has no path or address.
    """
    path = next(
        (paths.folder / name for name in LARGE_FILES if (paths.folder / name).is_file()), None
    )
    if path is None:
        return []
    entries = read_mapping(path).get("large_files")
    if not isinstance(entries, list):
        raise ConfigError(
            f"{path.name}: the key large_files is {type(entries).__name__}; expected a list of "
            "entries with path and url"
        )
    return [_entry(f"{path.name}: large_files[{i}]", entry) for i, entry in enumerate(entries)]


def _entry(where: str, entry: Any) -> LargeFile:
    """Return an entry of the list of large files."""
    content: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {}
    for key in ("path", "url"):
        if not isinstance(content.get(key), str) or not content[key]:
            raise ConfigError(f"{where}: {key} is missing; expected path and url of a file")
    return LargeFile(
        path=content["path"],
        url=content["url"],
        # a hash of digits only is a number in YAML
        hash_val=str(content.get("hash_val") or "").lower(),
        hash_type=str(content.get("hash_type") or DEFAULT_HASH).lower(),
    )


def _readable_large_files(paths: BundlePaths) -> list[LargeFile]:
    """Return the files in the list of large files; none if it cannot be read."""
    try:
        return large_files(paths)
    except ConfigError:
        return []  # the check of the list reports it
