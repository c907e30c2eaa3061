"""Published text files: what is tolerated, and one clear error for each thing that is wrong."""

import os
import zipfile
from pathlib import Path

import pytest

from loopfm_ray.data.config import KuaiVideoConfig
from loopfm_ray.data.datasets.published import (
    Layout,
    PublishedFile,
    find_files,
    folder_files,
    missing_files,
    read_layout,
    read_table,
)
from loopfm_ray.data.log import log_files
from loopfm_ray.errors import ConfigError, DataError, SchemaError

LAYOUT = Layout(
    "train.csv of Toy_x1",
    {
        "who": "key",
        "clk": "label",
        "at": "integer",
        "lag": "real",
        "price": "number",
        "brand ": "category",
        "seen": "keys",
    },
    missing=("", "NULL"),
    names={"brand ": "brand"},
)
HEADER = "who,clk,at,lag,price,brand ,seen"
ROWS = ["u1,1,10,0.5,2.5,b1,a^b", "u2,0,11.0,-1,,NULL,", "u3,1.0,-12,1e3,7,,c"]


def write(folder: Path, *lines: str, end: str = "\n", start: bytes = b"") -> PublishedFile:
    path = folder / "train.csv"
    path.write_bytes(start + end.join([*lines, ""]).encode())
    return PublishedFile(path)


GOOD = {
    "who": ["u1", "u2", "u3"],
    "clk": [1.0, 0.0, 1.0],
    "at": [10, 11, -12],
    "lag": [0.5, -1.0, 1000.0],
    "price": [2.5, None, 7.0],
    "brand": ["b1", None, None],
    "seen": [["a", "b"], [], ["c"]],
}


@pytest.mark.parametrize(
    ("end", "start"), [("\n", b""), ("\r\n", b""), ("\n", b"\xef\xbb\xbf"), ("\n\n", b"\n")]
)
def test_line_ends_byte_order_marks_and_blank_lines_do_not_matter(
    tmp_path: Path, end: str, start: bytes
) -> None:
    file = write(tmp_path, HEADER, *ROWS, end=end, start=start)
    assert read_table(file, LAYOUT).to_pydict() == GOOD


def test_columns_are_found_by_name_and_unwanted_ones_are_left_out(tmp_path: Path) -> None:
    file = write(tmp_path, "clk,who,at,lag,price,brand,seen", "1,u1,10,0.5,2.5,b1,a^b")
    assert read_table(file, LAYOUT, ["who", "brand "]).to_pydict() == {
        "who": ["u1"],
        "brand": ["b1"],
    }


def test_blocks_count_their_rows_over_the_file(tmp_path: Path) -> None:
    rows = [f"u{n},0,{n},1,1,b,x^{n}" for n in range(3000)]
    file = write(tmp_path, HEADER, *rows)
    blocks = list(read_layout(file, LAYOUT, block_bytes=4096))
    assert len(blocks) > 5
    starts = [first for first, _ in blocks]
    sizes = [block.num_rows for _, block in blocks]
    assert starts == [sum(sizes[:n]) for n in range(len(sizes))]
    times = [at for _, block in blocks for at in block.column("at").to_pylist()]
    assert times == list(range(3000))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (",0,1,1,1,b,", ("'who'", "nothing", "a key")),
        ("u,2,1,1,1,b,", ("'clk'", "'2'", "0 or 1")),
        ("u,,1,1,1,b,", ("'clk'", "nothing", "0 or 1")),
        ("u,0,noon,1,1,b,", ("'at'", "'noon'", "a whole number")),
        ("u,0,1.5,1,1,b,", ("'at'", "'1.5'", "a whole number")),
        ("u,0,,1,1,b,", ("'at'", "nothing", "a whole number")),
        ("u,0,1,nan,1,b,", ("'lag'", "'nan'", "a finite number")),
        ("u,0,1,,1,b,", ("'lag'", "nothing", "a finite number")),
        ("u,0,1,1,inf,b,", ("'price'", "'inf'", "a finite number or nothing")),
        ("u,0,1,1,cheap,b,", ("'price'", "'cheap'", "a finite number or nothing")),
        ("u,0,1,1,1,b", ("6 columns", "expected 7", "'u,0,1,1,1,b'")),
        ("u,0,1,1,1,b,a,b", ("8 columns", "expected 7")),
    ],
)
@pytest.mark.parametrize("block_bytes", [2048, 1 << 20])
def test_a_wrong_row_is_named_with_file_line_and_column(
    tmp_path: Path, text: str, words: tuple[str, ...], block_bytes: int
) -> None:
    good = [f"u{n},0,{n},1,1,b,x^{n}" for n in range(1000)]
    file = write(tmp_path, HEADER, "", *good, text, *good)  # with the blank one, line 1003
    with pytest.raises(DataError) as caught:
        list(read_layout(file, LAYOUT, block_bytes=block_bytes))
    for word in ("train.csv", "line 1003", "train.csv of Toy_x1", *words):
        assert word in str(caught.value)


def test_another_header_names_the_layout_and_what_differs(tmp_path: Path) -> None:
    file = write(tmp_path, "who,clk,time,lag,price,brand,seen", "u,0,1,1,1,b,")
    with pytest.raises(SchemaError) as caught:
        list(read_layout(file, LAYOUT))
    for word in ("train.csv of Toy_x1", "missing ['at']", "unknown ['time']"):
        assert word in str(caught.value)


@pytest.mark.parametrize("lines", [(), (HEADER,)])
def test_a_file_without_rows_is_an_error(tmp_path: Path, lines: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"no rows|header"):
        list(read_layout(write(tmp_path, *lines), LAYOUT))


def test_bytes_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    file = write(tmp_path, HEADER)
    file.path.write_bytes(HEADER.encode() + b"\nu\xff\xfe,0,1,1,1,b,\n")
    with pytest.raises(DataError, match=r"train\.csv can not be read as train.csv of Toy_x1"):
        list(read_layout(file, LAYOUT))


def test_files_are_found_in_folders_and_archives(tmp_path: Path) -> None:
    write(tmp_path, HEADER, *ROWS)
    assert list(find_files(str(tmp_path), ["train.csv", "test.csv"])) == ["train.csv"]
    archive = tmp_path / "toy.whl"
    with zipfile.ZipFile(archive, "w") as out:
        out.write(tmp_path / "train.csv", "a/b/train.csv")
    found = find_files(str(archive), ["train.csv", "test.csv"])
    assert read_table(found["train.csv"], LAYOUT).to_pydict() == GOOD
    assert str(found["train.csv"]) == f"{archive}!a/b/train.csv"
    with zipfile.ZipFile(archive, "a") as out:
        out.write(tmp_path / "train.csv", "c/train.csv")
    with pytest.raises(ConfigError, match="more than once"):
        find_files(str(archive), ["train.csv"])


def test_places_that_hold_nothing_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a directory"):
        find_files(str(tmp_path / "nowhere"), ["a"])
    (tmp_path / "bad.zip").write_text("no zip")
    with pytest.raises(ConfigError, match="no zip archive"):
        find_files(str(tmp_path / "bad.zip"), ["a"])
    assert "lacks a.csv, b.csv; get them at X" in str(
        missing_files("d", ["a.csv", "b.csv"], "get them at X")
    )


def test_files_of_a_folder_or_archive_tell_when_they_change(tmp_path: Path) -> None:
    file = write(tmp_path, HEADER, *ROWS)
    (tmp_path / "parts").mkdir()
    first = folder_files(str(tmp_path))
    assert first == {str(file.path): [file.path.stat().st_size, file.path.stat().st_mtime_ns]}
    assert folder_files(str(file.path)) == first
    os.utime(file.path, ns=(0, 1))
    assert folder_files(str(tmp_path)) != first
    with pytest.raises(ConfigError, match="expected a directory with the published files"):
        folder_files(str(tmp_path / "other"))


def test_the_log_of_a_published_data_set_tells_when_its_files_change(tmp_path: Path) -> None:
    file = write(tmp_path, HEADER)
    config = KuaiVideoConfig(path=str(tmp_path))
    first = log_files(config)
    assert list(first) == [str(file.path)]
    write(tmp_path, HEADER, *ROWS)
    assert log_files(config) != first
