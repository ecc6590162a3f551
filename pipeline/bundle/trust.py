"""Trust in bundles that someone else wired.

MONAI evaluates the wiring of a bundle: a string that starts with `$` runs as Python, and `_target_`
calls whatever it names. volseg's own wiring is known by its hash and evaluated always; any other is
evaluated only where the user trusts it. The other files of a bundle are data: spec, run and card
are read as plain YAML and never given to MONAI's parser. volseg's wiring imports nothing from a
bundle, so a `scripts` package next to it, or further configurations, are never read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import BundlePaths
from pipeline.errors import ConfigError
from pipeline.io import sha256
from pipeline.log import LOGGER
from pipeline.types import PathOrStr

CONFIGURATIONS = (".json", ".yaml", ".yml")
# Python also runs compiled files, those in `__pycache__` included
SCRIPTS = (".py", ".pyc", ".pyd", ".so")
# How many files an error names
NAMED_FILES = 8
# What MONAI's parser acts on where a string starts with it: expressions, references and macros
ACTIVE_PREFIXES = ("$", "@", "%")


def code_hash(root: PathOrStr) -> str:
    """Return the SHA-256 over every configuration and script of a bundle, hexadecimal.

    It covers names and contents of all files that can run code, wherever they are in the folder;
    symbolic links are followed. Weights and images do not count.

    Args:
        root: the bundle's folder.

    Raises:
        ConfigError: a file cannot be read.
    """
    folder = Path(root)
    digest = hashlib.sha256()
    for name in sorted(_code_files(folder)):
        try:
            content = sha256(folder / name)
        except OSError as error:
            raise ConfigError(
                f"{folder / name}: cannot be read ({error.strerror}); every configuration and "
                "script of a bundle must be readable"
            ) from error
        # no name contains a null character, so that two lists of files never hash alike
        digest.update(os.fsencode(name) + b"\0" + content.encode() + b"\n")
    return digest.hexdigest()


def _code_files(root: Path) -> Iterator[str]:
    """Yield the paths, relative to a bundle, of its configurations and scripts."""
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder further up
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()  # which of two links to one folder is followed must not vary
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() in CONFIGURATIONS + SCRIPTS and path.is_file():
                yield path.relative_to(root).as_posix()


def foreign_files(root: PathOrStr, wiring: Sequence[Path]) -> list[str]:
    """Return the files of a bundle that may hold code and are not volseg's, relative to it.

    Args:
        root: the bundle's folder.
        wiring: its wiring that volseg did not write.
    """
    paths = BundlePaths(root)
    data = {paths.spec, paths.single_fold_spec, paths.run, paths.card, paths.splits, paths.metadata}
    data |= {paths.inference, paths.train}
    found = [path.relative_to(paths.folder).as_posix() for path in wiring]
    for name in sorted(_code_files(paths.folder)):
        path = paths.folder / name
        is_code = path.suffix.lower() in SCRIPTS or path.parent == paths.configs
        if is_code and path not in data and name not in found:
            found.append(name)
    return found


def require_trust(root: PathOrStr, wiring: Sequence[Path], *, trust: bool) -> None:
    """Raise an error unless a bundle that volseg did not wire is trusted; log one line if it is.

    Args:
        root: the bundle's folder.
        wiring: its wiring that volseg did not write, at least one file.
        trust: whether the user trusts the bundle.

    Raises:
        ConfigError: the bundle is not trusted; the message names it, its files and their hash.
    """
    origin, digest = Path(root).resolve(), code_hash(root)
    if trust:
        LOGGER.info(
            "%s: trusted, runs its own wiring; its configurations and scripts have SHA-256 %s",
            origin,
            digest,
        )
        return
    files = foreign_files(root, wiring)
    named = ", ".join(files[:NAMED_FILES])
    if len(files) > NAMED_FILES:
        named += f" and {len(files) - NAMED_FILES} more"
    raise ConfigError(
        f"{origin}: volseg did not write {named} (SHA-256 over all configurations and scripts: "
        f"{digest}). Such a bundle is code that can do whatever you can: look at these files, then "
        "open it with --trust (trust=True in Python). That also holds for wiring that you edited "
        f"yourself; `volseg bundle refresh --overwrite {root}` replaces it by volseg's own."
    )


def check_plain(content: Any, where: str) -> None:
    """Raise an error if MONAI's parser would act on a part of what should be data.

    Args:
        content: of a JSON or YAML file: mappings, lists and values.
        where: path to the content in the message.

    Raises:
        ConfigError: a string is an expression, a reference or a macro, or a key is one of MONAI's.
    """
    if isinstance(content, str) and content.startswith(ACTIVE_PREFIXES):
        raise ConfigError(
            f"{where}: {content!r} starts with {content[0]}, which MONAI's parser would act on; "
            "expected plain text, so choose another name or wording"
        )
    if isinstance(content, Mapping):
        if "_target_" in content:
            raise ConfigError(f"{where}: contains _target_, expected plain data without code")
        for key, value in content.items():
            check_plain(value, f"{where}.{key}")
    elif isinstance(content, list | tuple):
        for i, value in enumerate(content):
            check_plain(value, f"{where}[{i}]")
