from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from phantom import nifti, save

from pipeline.errors import ConfigError
from pipeline.io.discovery import NamedFile, named_files
from pipeline.io.formats import image_suffix
from pipeline.io.writer import as_nibabel, write_labels

NAMES = [
    "a.nii.gz",
    "b.nii",
    "c.mha",
    "d.nrrd",
    "e.hdr",
    "e.img",
    "f.txt",
    "g",
    ".h.nii.gz",
    "i.mgz",
]
FOLDERS = ["x", "y z", ".hidden", "p.nii.gz", "q[1]"]


def make_tree(root: Path, source: random.Random, depth: int = 0) -> None:
    """Make a random tree of files, folders and links: good, broken, and in circles."""
    root.mkdir(parents=True, exist_ok=True)
    for name in source.sample(NAMES, source.randrange(1, 6)):
        (root / name).write_bytes(b"")
    if depth < 3:
        for name in source.sample(FOLDERS, source.randrange(0, 3)):
            make_tree(root / name, source, depth + 1)
    links = {
        "up": root.parent,
        "self": root / "self",
        "broken.nii.gz": root / "nothing",
        "broken": root / "nothing",
        "broken.txt": root / "nothing",
        "file.nii.gz": root / "a.nii.gz",
    }
    for name in source.sample(sorted(links), source.randrange(0, 4)):
        if not (root / name).is_symlink():
            (root / name).symlink_to(links[name])
    if source.random() < 0.3 and not (root / "pipe.nii.gz").exists():
        os.mkfifo(root / "pipe.nii.gz")


def found(item: object) -> dict[Path, tuple[str, str]]:
    """Return path → name and problem."""
    try:
        files = named_files(str(item))
    except ConfigError as error:
        assert "no image files there" in str(error)
        return {}
    assert len({file.path for file in files}) == len(files)
    return {file.path: (file.name, file.problem) for file in files}


@pytest.mark.parametrize("seed", range(25))
def test_a_folder_and_globs_find_the_same(seed: int, tmp_path: Path) -> None:
    """Each file once, with the same name and the same problem, whatever the tree."""
    root = tmp_path / "tree"
    make_tree(root, random.Random(seed))
    whole = found(root)
    assert found(f"{root}/*") == whole
    assert found(f"{root}/**") == whole
    suffixed = {path: value for path, value in whole.items() if path.name.endswith(".nii.gz")}
    by_name = found(f"{root}/**/*.nii.gz")
    assert {path: value for path, value in by_name.items() if not value[1]} == {
        path: value
        for path, value in whole.items()
        if not value[1] and any(part.endswith(".nii.gz") for part in path.relative_to(root).parts)
    }
    assert set(suffixed) <= set(by_name)
    # a folder that cannot be searched may hold what a pattern asks for
    assert all(path in whole for path in by_name)


@pytest.mark.parametrize("seed", range(10))
def test_every_image_below_a_folder_is_found_once(seed: int, tmp_path: Path) -> None:
    """Compared to `os.walk`, which is another implementation, in a tree without links."""
    root = tmp_path / "tree"
    make_tree(root, random.Random(seed))
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_symlink():
            path.unlink()
    expected = set()
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder) / name
            hidden = name.startswith(".") or name.endswith(".img")
            if image_suffix(path) and not hidden:
                expected.add(path)
    assert set(found(root)) == expected


def test_names_are_the_paths_below_what_was_given(tmp_path: Path) -> None:
    """Without the suffix; below a glob, from its first part with a wildcard on."""
    path = save(tmp_path / "in" / "sub-1" / "anat" / "T1w.nii.gz")
    for item, name in {
        path: "T1w",
        tmp_path / "in": "sub-1/anat/T1w",
        tmp_path / "in" / "*": "sub-1/anat/T1w",
        tmp_path / "in" / "sub-*" / "anat": "sub-1/anat/T1w",
        tmp_path / "*" / "sub-1" / "anat" / "*.nii.gz": "in/sub-1/anat/T1w",
        tmp_path / "**" / "T1w*": "in/sub-1/anat/T1w",
        tmp_path / "in" / "sub-1" / ".." / "sub-1" / "*": "anat/T1w",
    }.items():
        (file,) = named_files(item)
        assert (file.name, file.problem) == (name, "")
        assert file.path.samefile(path)


def test_parents_after_a_wildcard_are_refused(tmp_path: Path) -> None:
    """The outputs would lie outside of the output folder."""
    save(tmp_path / "in" / "a.nii.gz")
    for pattern in ("*/../in/*.nii.gz", "i*/..", "**/../*"):
        with pytest.raises(ConfigError, match=r"`\.\.` after a wildcard"):
            named_files(f"{tmp_path}/{pattern}")


def test_what_a_glob_does_not_match_is_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sub-*/anat` does not look into folders of other names, which may be slow or closed."""
    save(tmp_path / "sub-1" / "anat" / "a.nii.gz")
    save(tmp_path / "other" / "b.nii.gz")
    save(tmp_path / "sub-1" / "func" / "c.nii.gz")
    original, searched = Path.iterdir, []

    def iterdir(self: Path) -> Iterator[Path]:
        searched.append(self.name)
        return original(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert [file.name for file in named_files(f"{tmp_path}/sub-*/anat/*")] == ["sub-1/anat/a"]
    assert searched == [tmp_path.name, "sub-1", "anat"]


def test_a_folder_that_cannot_be_searched_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason; the files of the others are found as well."""
    save(tmp_path / "good" / "a.nii.gz")
    save(tmp_path / "closed" / "b.nii.gz")
    original = Path.iterdir

    def iterdir(self: Path) -> Iterator[Path]:
        if self.name == "closed":
            raise PermissionError(13, "Permission denied")
        return original(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    for item in (tmp_path, f"{tmp_path}/*", f"{tmp_path}/**/*.nii.gz"):
        closed, good = named_files(item)
        assert (good.name, good.problem) == ("good/a", "")
        assert (closed.name, closed.problem) == (
            "closed",
            "this folder cannot be searched: Permission denied",
        )


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    """A folder that is linked twice is searched twice, because its files have two names."""
    path = save(tmp_path / "real" / "a.nii.gz")
    root = tmp_path / "in"
    root.mkdir()
    (root / "one").symlink_to(tmp_path / "real")
    (root / "two").symlink_to(tmp_path / "real")
    (root / "file.nii.gz").symlink_to(path)
    (tmp_path / "real" / "back").symlink_to(root)
    files = {file.name: file.problem for file in named_files(root)}
    assert {name for name, problem in files.items() if not problem} == {"file", "one/a", "two/a"}
    assert {name for name, problem in files.items() if "leads back" in problem} == {
        "one/back",
        "two/back",
    }


def test_broken_links_are_found_where_they_may_lead_to_images(tmp_path: Path) -> None:
    """Those of other files are not; the message says where they lead."""
    for name in ("a.nii.gz", "folder", "notes.txt"):
        (tmp_path / name).symlink_to(tmp_path / "none" / name)
    assert [(file.name, file.problem) for file in named_files(tmp_path)] == [
        (
            name,
            f"this link leads to {tmp_path}/none/{full}: No such file or directory "
            "(was the data fetched?)",
        )
        for name, full in (("a", "a.nii.gz"), ("folder", "folder"))
    ]


def test_special_files_are_found_with_a_problem(tmp_path: Path) -> None:
    """Reading a pipe would wait for ever."""
    os.mkfifo(tmp_path / "a.nii.gz")
    (file,) = named_files(tmp_path)
    assert file.problem == "this is neither a file nor a folder"


def test_a_pair_is_one_input(tmp_path: Path) -> None:
    """Whichever of its files is named."""
    for name in ("a.hdr", "a.img", "b.hdr.gz", "b.img.gz"):
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in named_files(tmp_path)] == ["a", "b"]
    for name in ("a.img", "a.hdr"):
        assert named_files(tmp_path / name) == [NamedFile("a", tmp_path / "a.hdr")]


def test_results_are_left_out_of_folders_and_globs_only(tmp_path: Path) -> None:
    """A label map that is named itself is an input."""
    image = nifti()
    write_labels(
        tmp_path / "a_seg.nii.gz",
        as_nibabel((image.get_fdata() > 100).astype("uint8"), image.affine),
    )
    save(tmp_path / "b_seg.nii.gz")
    for item in (tmp_path, f"{tmp_path}/*"):
        assert [file.name for file in named_files(item)] == ["b_seg"]
    assert [file.name for file in named_files(tmp_path / "a_seg.nii.gz")] == ["a_seg"]


def test_a_name_with_wildcards_that_exists_is_itself(tmp_path: Path) -> None:
    """`scan[1].nii.gz` is a file before it is a pattern."""
    path = save(tmp_path / "scan[1].nii.gz")
    assert [file.path for file in named_files(path)] == [path]
