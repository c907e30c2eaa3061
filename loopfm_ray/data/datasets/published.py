"""Read published text files as they are: found together, checked against their layout, streamed in typed blocks.

A byte order mark, either line end and blank lines are tolerated. Anything else that does not fit its layout is one error with
file, line, column, what was found and what was expected.
"""

import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from loopfm_ray.errors import ConfigError, DataError, SchemaError

__all__ = [
    "BLOCK_BYTES",
    "Cell",
    "Layout",
    "PublishedFile",
    "bad_cell",
    "find_files",
    "folder_files",
    "missing_files",
    "read_layout",
    "read_table",
    "require_files",
]

# Any: pyarrow ships no types.
Array = Any
Table = Any
Cell = Literal["key", "category", "label", "integer", "real", "number", "keys"]
BLOCK_BYTES = 1024 * 1024
"""Text parsed at a time; Arrow reads up to 32 such blocks ahead, whatever it is told about threads."""
_ARCHIVES = (".zip", ".whl")
_EXPECTED = {
    "key": "a key",
    "label": "0 or 1",
    "integer": "a whole number",
    "real": "a finite number",
    "number": "a finite number or nothing",
}


@dataclass(frozen=True)
class Layout:
    """The columns of a published file, in order, and how its text is written.

    Kinds of a column: `key` (text, required), `category` (text or nothing), `label` (0 or 1), `integer`, `real` (both
    required), `number` (or nothing) and `keys` (a list).
    """

    name: str
    columns: dict[str, Cell]
    delimiter: str = ","
    has_header: bool = True
    encoding: str = "utf8"
    list_separator: str = "^"
    missing: tuple[str, ...] = ("",)
    """Words that stand for no value."""
    names: dict[str, str] = field(default_factory=dict)
    """What columns are called once read, where that differs."""


@dataclass(frozen=True)
class PublishedFile:
    """A file on disk, or one inside a zip archive or wheel."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}!{self.member}"

    def open(self) -> IO[bytes]:
        """Open the bytes of the file."""
        if self.member is None:
            return self.path.open("rb")
        with zipfile.ZipFile(self.path) as archive:
            return archive.open(self.member)

    def line_of(self, number: int) -> int:
        """Return the line, counted from 1, of the text line `number`, counted from 0 without blank ones."""
        with self.open() as lines:
            filled = (line for line, text in enumerate(lines, start=1) if text.strip(b"\r\n"))
            return next(line for index, line in enumerate(filled) if index == number)


def find_files(root: str, names: Sequence[str]) -> dict[str, PublishedFile]:
    """Return those of the files `names` that are in a directory, or anywhere in a zip archive or wheel, by name.

    Raises:
        ConfigError: `root` is neither, or the archive holds a name twice.
    """
    path = Path(root)
    if path.is_dir():
        found = {name: PublishedFile(path / name) for name in names}
        return {name: file for name, file in found.items() if file.path.is_file()}
    if path.suffix not in _ARCHIVES or not path.is_file():
        raise ConfigError(
            f"data.path is {root}, expected a directory with the published files, or a .zip or .whl that holds them"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except zipfile.BadZipFile as error:
        raise ConfigError(f"{path} is no zip archive: {error}; download it again") from error
    inside: dict[str, PublishedFile] = {}
    for name in names:
        matches = [member for member in members if member.rpartition("/")[2] == name]
        if len(matches) > 1:
            raise ConfigError(
                f"{path} holds {name} more than once: {matches}; unpack it and give a directory"
            )
        if matches:
            inside[name] = PublishedFile(path, matches[0])
    return inside


def folder_files(root: str) -> dict[str, list[int]]:
    """Return size and time of change (ns) of each file of a directory, or of the one archive.

    Raises:
        ConfigError: `root` is neither.
    """
    path = Path(root)
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    if not path.exists():
        raise ConfigError(
            f"data.path is {root}, expected a directory with the published files, or a .zip or .whl that holds them"
        )
    found = {str(file): file.stat() for file in files}
    return {name: [one.st_size, one.st_mtime_ns] for name, one in found.items()}


def require_files(root: str, names: Sequence[str], where: str) -> dict[str, PublishedFile]:
    """Return all of the files `names`, by name.

    Raises:
        ConfigError: some are missing; the message names them together and says where people get them.
    """
    files = find_files(root, names)
    missing = [name for name in names if name not in files]
    if missing:
        raise missing_files(root, missing, where)
    return files


def missing_files(root: str, missing: Sequence[str], where: str) -> ConfigError:
    """Return the error that names all files that `root` lacks and where people get them."""
    return ConfigError(f"{root} lacks {', '.join(missing)}; {where}")


def bad_cell(
    file: PublishedFile, layout: Layout, row: int, column: str, words: tuple[str, str]
) -> DataError:
    """Return the error for one value; `row` counts data rows from 0, `words` are what was found and expected."""
    line = file.line_of(row + layout.has_header)
    return DataError(
        f"{file}, line {line}, column {column!r}: found {words[0]}, expected {words[1]} ({layout.name});"
        " compare the file with the published one, and download it again if it is damaged"
    )


def read_layout(
    file: PublishedFile,
    layout: Layout,
    columns: Sequence[str] | None = None,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[int, Table]]:
    """Yield `(first row, block)` over the file; a block has the `columns` (all if None) with the types of their kinds.

    Types: text for `key` and `category`, float32 for `label`, int64, float64, and lists of text.

    Raises:
        SchemaError: the header is not that of the layout.
        DataError: a row or value is malformed, or there are no rows.
    """
    wanted = list(layout.columns) if columns is None else list(columns)
    invalid: list[tuple[int, int, str]] = []
    first_row = 0
    with file.open() as raw:
        names = _header(raw, file, layout) if layout.has_header else list(layout.columns)
        for batch in _batches(raw, file, layout, (names, wanted, block_bytes), invalid):
            if invalid:
                break
            out = {}
            for name in wanted:
                values = _typed(batch.column(name), name, layout, (file, first_row))
                out[layout.names.get(name, name)] = values
            if batch.num_rows:
                yield first_row, pa.table(out)
            first_row += batch.num_rows
    if invalid:
        number, num_found, text = invalid[0]
        raise DataError(
            f"{file}, line {file.line_of(number)}: found {num_found} columns in {text[:80]!r}, expected"
            f" {len(names)}: {names} ({layout.name}); compare the line with the published file"
        )
    if first_row == 0:
        raise DataError(f"{file} holds no rows; expected {layout.name}, download it again")


def read_table(file: PublishedFile, layout: Layout, columns: Sequence[str] | None = None) -> Table:
    """Return all rows of a small file at once."""
    return pa.concat_tables([block for _, block in read_layout(file, layout, columns)])


def _header(raw: IO[bytes], file: PublishedFile, layout: Layout) -> list[str]:
    """Read past the header; return its names in the file's order, as the layout writes them."""
    line = raw.readline()
    while line and not line.strip(b"\r\n"):
        line = raw.readline()
    text = line.decode(layout.encoding, errors="replace")
    found = [name.strip().strip('"') for name in text.lstrip("\ufeff").split(layout.delimiter)]
    known = {name.strip(): name for name in layout.columns}
    missing = [name for name in known if name not in found]
    unknown = [name for name in found if name not in known]
    if missing or unknown or len(found) != len(known):
        raise SchemaError(
            f"{file}: the header is {found}, expected that of {layout.name}: {list(layout.columns)};"
            f" missing {missing}, unknown {unknown}: is this the published file?"
        )
    return [known[name] for name in found]


def _batches(
    raw: IO[bytes],
    file: PublishedFile,
    layout: Layout,
    read: tuple[list[str], list[str], int],
    invalid: list[tuple[int, int, str]],
) -> Iterator[Any]:
    """Yield batches of text columns; rows with another number of columns go to `invalid`, by line without blank ones."""
    names, wanted, block_bytes = read
    if len(layout.delimiter) > 1:  # only the small files of MovieLens-1M
        raw = io.BytesIO(raw.read().replace(layout.delimiter.encode(), b"\x1f"))

    def note(row: Any) -> str:
        if not invalid:
            number = row.number - 1 + layout.has_header
            invalid.append((number, row.actual_columns, row.text))
        return "skip"

    try:
        yield from pa_csv.open_csv(
            raw,
            read_options=pa_csv.ReadOptions(
                use_threads=False,
                block_size=block_bytes,
                column_names=names,
                encoding=layout.encoding,
            ),
            parse_options=pa_csv.ParseOptions(
                delimiter=layout.delimiter if len(layout.delimiter) == 1 else "\x1f",
                quote_char='"' if layout.delimiter == "," else False,
                invalid_row_handler=note,
            ),
            convert_options=pa_csv.ConvertOptions(
                include_columns=wanted,
                column_types=dict.fromkeys(names, pa.string()),
                strings_can_be_null=True,
                quoted_strings_can_be_null=True,
                null_values=list(layout.missing),
            ),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        if "Empty CSV" not in str(error):
            raise DataError(f"{file} can not be read as {layout.name}: {error}") from error


def _typed(text: Array, column: str, layout: Layout, where: tuple[PublishedFile, int]) -> Array:
    kind = layout.columns[column]
    if kind == "category":
        return text
    if kind == "keys":
        lists = pc.split_pattern(text.fill_null(""), layout.list_separator)
        empty = pa.scalar([], lists.type)
        return pc.if_else(pc.fill_null(pc.equal(text, ""), True), empty, lists)
    values, is_bad = _CASTS[kind](text)
    row = pc.index(is_bad, True).as_py()
    if row >= 0:
        found = text[row].as_py()
        words = ("nothing" if found is None else repr(found), _EXPECTED[kind])
        raise bad_cell(where[0], layout, where[1] + row, column, words)
    return values


def _as_key(text: Array) -> tuple[Array, Array]:
    return text, text.is_null()


def _as_label(text: Array) -> tuple[Array, Array]:
    place = pc.index_in(text, pa.array(["0", "1", "0.0", "1.0"]))
    values = pc.bit_wise_and(place, 1).cast(pa.float32())
    return values, place.is_null()


def _as_number(text: Array) -> tuple[Array, Array]:
    values = _parsed(text, pa.float64())
    is_finite = pc.fill_null(pc.is_finite(values), False)
    return values, pc.and_(text.is_valid(), pc.invert(is_finite))


def _as_real(text: Array) -> tuple[Array, Array]:
    values, is_bad = _as_number(text)
    return values, pc.or_(is_bad, text.is_null())


def _as_integer(text: Array) -> tuple[Array, Array]:
    values = _parsed(text, pa.int64())
    if not values.null_count:
        return values, values.is_null()
    # pandas and RecBole write whole numbers as 881250949.0
    numbers = _parsed(text, pa.float64())
    is_whole = pc.fill_null(pc.equal(numbers, pc.floor(numbers)), False)
    is_whole = pc.and_(is_whole, pc.fill_null(pc.less(pc.abs(numbers), 2.0**53), False))
    whole = pc.if_else(is_whole, numbers, 0.0).cast(pa.int64())
    return pc.coalesce(values, whole), pc.and_(values.is_null(), pc.invert(is_whole))


def _parsed(text: Array, kind: Any) -> Array:
    """Return the numbers of a text column, null where the text is none."""
    try:
        return text.cast(kind)
    except pa.ArrowInvalid:
        series = pl.Series(pl.from_arrow(text))
        return series.cast(_POLARS[kind], strict=False).to_arrow()


_POLARS = {pa.int64(): pl.Int64(), pa.float64(): pl.Float64()}
_CASTS: dict[str, Callable[[Array], tuple[Array, Array]]] = {
    "key": _as_key,
    "label": _as_label,
    "integer": _as_integer,
    "real": _as_real,
    "number": _as_number,
}
