"""MovieLens: movie ratings with time, in the layouts of RecBole (100K) and GroupLens (100K, 1M).

F. Maxwell Harper and Joseph A. Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015. For research; not to be redistributed.
A rating of `min_rating` or more is a positive. People rate many films in one sitting, often within the same second, and most
have only one sitting: the log says when a film was rated, not when it was watched.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from loopfm_ray.data.canonical import BlockPlace, canonical_block
from loopfm_ray.data.config import ColumnsConfig, MovieLensConfig
from loopfm_ray.data.datasets.published import (
    Cell,
    Layout,
    PublishedFile,
    bad_cell,
    find_files,
    missing_files,
    read_layout,
    read_table,
)
from loopfm_ray.data.entities import EntitySource
from loopfm_ray.data.source import EventLog, LogFields
from loopfm_ray.types import MICROS_PER_S

__all__ = ["movielens_log"]

# Any: pyarrow ships no types.
Table = Any
_FLAG: Cell = "label"
_COLUMNS = ColumnsConfig(user="user", item="item", event_ts="at", label="label")
_ITEM_FIELDS = ("release_year", "genre", "genres")
_WHERE = (
    "expected ml-100k.inter, .item and .user of RecBole (pip download --no-deps recbole==1.2.1; give the wheel),"
    " or from grouplens.org/datasets/movielens u.data, u.item and u.user of MovieLens-100K,"
    " or ratings.dat, movies.dat and users.dat of MovieLens-1M; the archive itself will do"
)
_GENRES = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime",
    "Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery",
    "Romance", "Sci-Fi", "Thriller", "War", "Western",
]  # fmt: skip


@dataclass(frozen=True)
class _Edition:
    """Files and layouts of ratings, films and people; films are turned to item, release_year and `|`-joined genres."""

    ratings: tuple[str, Layout]
    films: tuple[str, Layout]
    people: tuple[str, Layout]
    to_films: Callable[[Table], Table]


def movielens_log(config: MovieLensConfig) -> EventLog:
    """Return the log of the ratings in `config.path`.

    Fields of an item: release_year, genre (the first) and genres (all of them as one key), and those of `config.items`. Fields of a
    user: gender, occupation and age.

    Raises:
        ConfigError: files are missing, or `config.items` has a field of these names.
        SchemaError, DataError: a file is not as published, or a film has no row in `config.items`.
    """
    edition, files = _find(config.path)
    films = edition.to_films(read_table(files[edition.films[0]], edition.films[1]))
    genres = films.column("genres")
    films = films.append_column("genre", pc.list_element(pc.split_pattern(genres, "|"), 0))
    people = read_table(files[edition.people[0]], edition.people[1])
    items = EntitySource.from_table(films, "item", _ITEM_FIELDS, ())
    if config.items is not None:
        items = items.joined(EntitySource.read(config.items), config.items.path)
    return EventLog(
        lambda: _blocks(files[edition.ratings[0]], edition.ratings[1], config),
        LogFields(),
        items,
        EntitySource.from_table(people, "user", ("gender", "occupation"), ("age",)),
    )


def _find(root: str) -> tuple[_Edition, dict[str, PublishedFile]]:
    best: list[str] = []
    for edition in _EDITIONS:
        names = [name for name, _ in (edition.ratings, edition.films, edition.people)]
        files = find_files(root, names)
        if len(files) == len(names):
            return edition, files
        if files and not best:
            best = [name for name in names if name not in files]
    raise missing_files(root, best or ["the files of MovieLens"], _WHERE)


def _blocks(file: PublishedFile, layout: Layout, config: MovieLensConfig) -> Iterator[Table]:
    for first_row, block in read_layout(file, layout):
        rating = block.column("rating").to_numpy()
        outside = np.flatnonzero((rating < 0.5) | (rating > 5))
        if len(outside):
            row = int(outside[0])
            words = (str(rating[row]), "a rating from 0.5 to 5")
            raise bad_cell(file, layout, first_row + row, "rating", words)
        rows = pa.table(
            {
                "user": block.column("user"),
                "item": block.column("item"),
                "at": pc.multiply(block.column("timestamp"), MICROS_PER_S),
                "label": (rating >= config.min_rating).astype(np.float32),
            }
        )
        delay_us = round(config.label_delay_s * MICROS_PER_S)
        yield canonical_block(rows, _COLUMNS, BlockPlace(str(file), first_row), delay_us)


def _films_of_recbole(films: Table) -> Table:
    genres = pc.replace_substring(films.column("class"), " ", "|")
    return pa.table(
        {
            "item": films.column("item"),
            "release_year": films.column("release_year"),
            "genres": genres,
        }
    )


def _films_of_100k(films: Table) -> Table:
    flags = np.column_stack([films.column(name).to_numpy() for name in _GENRES]) > 0
    genres = ["|".join(np.asarray(_GENRES)[row]) or None for row in flags]
    year = pc.utf8_slice_codeunits(films.column("release_date"), -4)
    return pa.table(
        {
            "item": films.column("item"),
            "release_year": year,
            "genres": pa.array(genres, pa.string()),
        }
    )


def _films_of_1m(films: Table) -> Table:
    year = pc.struct_field(
        pc.extract_regex(films.column("title"), r"\((?P<year>\d{4})\)\s*$"), "year"
    )
    return pa.table(
        {"item": films.column("item"), "release_year": year, "genres": films.column("genres")}
    )


_RATING: dict[str, Cell] = {"user": "key", "item": "key", "rating": "real", "timestamp": "integer"}
_GROUPLENS_100K = "MovieLens-100K by GroupLens"
_GROUPLENS_1M = "MovieLens-1M by GroupLens"
_EDITIONS = (
    _Edition(
        ratings=(
            "ml-100k.inter",
            Layout(
                "ml-100k.inter by RecBole",
                {
                    "user_id:token": "key",
                    "item_id:token": "key",
                    "rating:float": "real",
                    "timestamp:float": "integer",
                },
                "\t",
                names={
                    "user_id:token": "user",
                    "item_id:token": "item",
                    "rating:float": "rating",
                    "timestamp:float": "timestamp",
                },
            ),
        ),
        films=(
            "ml-100k.item",
            Layout(
                "ml-100k.item by RecBole",
                {
                    "item_id:token": "key",
                    "movie_title:token_seq": "category",
                    "release_year:token": "category",
                    "class:token_seq": "category",
                },
                "\t",
                names={
                    "item_id:token": "item",
                    "release_year:token": "release_year",
                    "class:token_seq": "class",
                },
            ),
        ),
        people=(
            "ml-100k.user",
            Layout(
                "ml-100k.user by RecBole",
                {
                    "user_id:token": "key",
                    "age:token": "number",
                    "gender:token": "category",
                    "occupation:token": "category",
                    "zip_code:token": "category",
                },
                "\t",
                names={
                    "user_id:token": "user",
                    "age:token": "age",
                    "gender:token": "gender",
                    "occupation:token": "occupation",
                },
            ),
        ),
        to_films=_films_of_recbole,
    ),
    _Edition(
        ratings=("u.data", Layout(f"u.data of {_GROUPLENS_100K}", _RATING, "\t", False)),
        films=(
            "u.item",
            Layout(
                f"u.item of {_GROUPLENS_100K}",
                {
                    "item": "key",
                    "title": "category",
                    "release_date": "category",
                    "video_release_date": "category",
                    "url": "category",
                    **dict.fromkeys(_GENRES, _FLAG),
                },
                "|",
                False,
                "latin-1",
            ),
        ),
        people=(
            "u.user",
            Layout(
                f"u.user of {_GROUPLENS_100K}",
                {
                    "user": "key",
                    "age": "number",
                    "gender": "category",
                    "occupation": "category",
                    "zip_code": "category",
                },
                "|",
                False,
            ),
        ),
        to_films=_films_of_100k,
    ),
    _Edition(
        ratings=("ratings.dat", Layout(f"ratings.dat of {_GROUPLENS_1M}", _RATING, "::", False)),
        films=(
            "movies.dat",
            Layout(
                f"movies.dat of {_GROUPLENS_1M}",
                {"item": "key", "title": "key", "genres": "category"},
                "::",
                False,
                "latin-1",
            ),
        ),
        people=(
            "users.dat",
            Layout(
                f"users.dat of {_GROUPLENS_1M}",
                {
                    "user": "key",
                    "gender": "category",
                    "age": "number",
                    "occupation": "category",
                    "zip_code": "category",
                },
                "::",
                False,
            ),
        ),
        to_films=_films_of_1m,
    ),
)
