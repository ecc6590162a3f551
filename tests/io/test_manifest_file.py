from __future__ import annotations

import json
from pathlib import Path

import pytest
from phantom import parse_spec, save

from pipeline.errors import ConfigError
from pipeline.io.cases import find_cases
from pipeline.io.manifest_file import read_manifest

ONE, TWO = ["T1w"], ["T1w", "FLAIR"]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


FORMS: dict[str, str | bytes] = {
    "comma.csv": "case,image,site\nsub/a,x/a.nii.gz,A\nb,/data/b.nii,\n",
    "mark.csv": b"\xef\xbb\xbfcase,image,site\r\nsub/a,x/a.nii.gz,A\r\nb,/data/b.nii,\r\n",
    "spaces.csv": "case , image, site\n sub/a , x/a.nii.gz , A\nb,/data/b.nii,\n",
    "quoted.csv": '"case","image","site"\n"sub/a","x/a.nii.gz","A"\n"b","/data/b.nii",""\n',
    "order.csv": "site,image,case\nA,x/a.nii.gz,sub/a\n,/data/b.nii,b\n",
    "channel.csv": "case,T1w,site\nsub/a,x/a.nii.gz,A\nb,/data/b.nii,\n",
    "short.csv": "case,image,site\nsub/a,x/a.nii.gz,A\nb,/data/b.nii\n",
    "tabs.tsv": "case\timage\tsite\nsub/a\tx/a.nii.gz\tA\nb\t/data/b.nii\t\n",
    "UPPER.TSV": "case\timage\tsite\nsub/a\tx/a.nii.gz\tA\nb\t/data/b.nii\t\n",
    "lines.jsonl": '{"case": "sub/a", "image": "x/a.nii.gz", "site": "A"}\n\n'
    '{"image": "/data/b.nii", "case": "b", "site": null}\n',
    "mark.jsonl": b'\xef\xbb\xbf{"case": "sub/a", "image": "x/a.nii.gz", "site": "A"}\n'
    b'{"case": "b", "image": "/data/b.nii", "site": ""}',
}


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_say_the_same(name: str, tmp_path: Path) -> None:
    """Relative paths are relative to the file's folder, further columns are kept."""
    assert read_manifest(write(tmp_path, name, FORMS[name]), ONE) == [
        {"case": "sub/a", "image": f"{tmp_path}/x/a.nii.gz", "columns": {"site": "A"}},
        {"case": "b", "image": "/data/b.nii", "columns": {"site": ""}},
    ]


def test_one_column_per_channel(tmp_path: Path) -> None:
    """The images are in the order of the model's channels."""
    path = write(tmp_path, "a.csv", "FLAIR,case,T1w,age\nf.nii,a,t.nii,7\n")
    assert read_manifest(path, TWO) == [
        {"case": "a", "image": [f"{tmp_path}/t.nii", f"{tmp_path}/f.nii"], "columns": {"age": "7"}}
    ]


def test_a_case_is_named_by_its_first_image(tmp_path: Path) -> None:
    """Where no name is given, in the column or at all."""
    path = write(tmp_path, "a.csv", "image,case\nx/a.b.nii.gz,\ny/c.mha,d\n")
    assert [case["case"] for case in read_manifest(path, ONE)] == ["a.b", "d"]
    path = write(tmp_path, "b.csv", "T1w,FLAIR\nx/t.nii,x/f.nii\n,x/f2.nii\n")
    assert [case["case"] for case in read_manifest(path, TWO)] == ["t", "f2"]


def test_a_row_without_a_path_is_a_case_with_a_problem(tmp_path: Path) -> None:
    """So that it is not lost; the message has the line."""
    path = write(tmp_path, "a.csv", "case,T1w,FLAIR\na,t.nii,\nb,t.nii,f.nii\n")
    first, second = read_manifest(path, TWO)
    assert first["problem"] == f"{path}, line 2: no path for FLAIR"
    assert "problem" not in second


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "empty.csv": ("", "lists no case"),
    "header.csv": ("case,image\n", "lists no case"),
    "blank.jsonl": ("\n\n", "lists no case"),
    "columns.csv": ("case,path\na,b\n", "found the columns case, path, expected image"),
    "more.csv": ("case,image\na,b,c\n", "line 2: more fields than the header names"),
    "nothing.csv": ("case,image,x\n,,1\n", "line 2: neither a case nor an image is named"),
    "quote.csv": ('case,image\n"a,b\n', "line 2: "),
    "latin.csv": (b"case,image\n\xfc,b\n", "cannot be read as UTF-8 text"),
    "broken.jsonl": ('{"case": "a", "image": "b"}\n{"case"\n', "line 2: is not JSON"),
    "list.jsonl": ('["a"]\n', "line 1: expected an object"),
    "surrogate.jsonl": ('{"case": "\\ud800", "image": "b"}\n', "line 1: is no text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_understood_is_refused(name: str, tmp_path: Path) -> None:
    """The message has the file, and the line where there is one."""
    content, says = REFUSED[name]
    with pytest.raises(ConfigError) as raised:
        read_manifest(write(tmp_path, name, content), ONE)
    assert name in str(raised.value)
    assert says in str(raised.value)


def test_values_that_are_no_text_become_text(tmp_path: Path) -> None:
    """Numbers in JSON are names and columns as well."""
    path = write(tmp_path, "a.jsonl", json.dumps({"case": 17, "image": "b.nii", "age": 7.5}))
    assert read_manifest(path, ONE) == [
        {"case": "17", "image": f"{tmp_path}/b.nii", "columns": {"age": "7.5"}}
    ]


def test_manifests_and_files_can_be_given_together(tmp_path: Path) -> None:
    """A name that both have is refused."""
    image = save(tmp_path / "in" / "x.nii.gz")
    table = write(tmp_path, "a.csv", f"case,image\ny,{image}\n")
    cases = find_cases([tmp_path / "in", table], parse_spec())
    assert [case["case"] for case in cases] == ["x", "y"]
    table = write(tmp_path, "a.csv", f"case,image\nx,{image}\n")
    with pytest.raises(ConfigError, match="1 outputs would be written more than once"):
        find_cases([tmp_path / "in", table], parse_spec())
