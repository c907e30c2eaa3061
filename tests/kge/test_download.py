"""Published graphs: got whole and right, or not at all; tried against a server of our own."""

import http.server
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loopfm_ray.cli import app
from loopfm_ray.errors import ConfigError, DataError, StoreError, UnreachableError
from loopfm_ray.kge.digest import graph_digest, split_digest
from loopfm_ray.kge.download import FetchLimits, check_graph, download_graph
from loopfm_ray.kge.published import GRAPHS, PublishedGraph, Source, find_graph
from loopfm_ray.kge.triples import SPLITS, read_triples
from tests.kge.graphs import shared_graph

TEXTS = {
    "train.txt": "a\tlikes\tb\nb\tlikes\tc é\nc é\tknows\ta\n",
    "valid.txt": "a\tknows\tb\n",
    "test.txt": "b\tknows\tc é\nc é\tlikes\ta\n",
}
QUICK = FetchLimits(num_tries=3, pause_s=0.0, timeout_s=5.0)


class Server:
    """A local HTTP server: `files` by name, or what `answers` does with the request in their place."""

    def __init__(self):
        self.files = {name: text.encode() for name, text in TEXTS.items()}
        self.answers = {}
        self.asked = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.lstrip("/")
                server.asked.append(name)
                if name in server.answers:
                    server.answers[name](self)
                elif name in server.files:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(server.files[name])))
                    self.end_headers()
                    self.wfile.write(server.files[name])
                else:
                    self.send_error(404)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server():
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def digests(tmp_path):
    folder = tmp_path / "right"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    graph = read_triples(folder)
    return {name: split_digest(graph, name) for name in SPLITS}


def published(base, digests, sources=None):
    texts = tuple(Source(f"{base}/{name}", (name,)) for name in TEXTS)
    counts = {"train": 3, "valid": 1, "test": 2}
    return PublishedGraph("Small", sources or texts, counts, digests, "nobody")


def packed(members):
    """Return a .tar.gz of names to bytes, or to the target of a link."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def assert_nothing_is_left(root):
    assert not root.exists() or list(root.iterdir()) == []


def test_files_appear_verified_and_are_not_got_again(server, digests, tmp_path):
    graph = published(server.base, digests)
    result = download_graph(graph, tmp_path / "kg", QUICK)
    expected = {"graph": "Small", "path": str(tmp_path / "kg/small")}
    counts = {"train": 3, "valid": 1, "test": 2, "verified": "content"}
    assert result == {**expected, **counts, "downloaded": True}
    assert [path.name for path in (tmp_path / "kg").iterdir()] == ["small"]
    for name, text in TEXTS.items():
        assert (tmp_path / "kg/small" / name).read_text(encoding="utf-8") == text
    again = download_graph(graph, tmp_path / "kg", QUICK)
    assert again == {**result, "downloaded": False}
    assert len(server.asked) == 3


def test_members_of_an_archive_are_found_in_any_folder(server, digests, tmp_path):
    members = [("./Release/README", b"read me")]
    members += [(f"./Release/{name}", text.encode()) for name, text in TEXTS.items()]
    server.files["small.tar.gz"] = packed(members)
    sources = (Source(f"{server.base}/small.tar.gz", tuple(TEXTS)),)
    download_graph(published(server.base, digests, sources), tmp_path / "kg", QUICK)
    names = sorted(path.name for path in (tmp_path / "kg/small").iterdir())
    assert names == sorted(TEXTS)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("../../train.txt", "/etc/passwd")], "one plain file train.txt"),
        ([("a/train.txt", b"x"), ("b/train.txt", b"y")], "one plain file train.txt"),
        ([("other.txt", b"x")], "one plain file train.txt"),
        (None, "no readable .tar.gz"),
    ],
)
def test_an_archive_that_is_not_as_expected_leaves_nothing(
    server, digests, tmp_path, members, expected
):
    server.files["small.tar.gz"] = b"<html>" if members is None else packed(members)
    sources = (Source(f"{server.base}/small.tar.gz", tuple(TEXTS)),)
    with pytest.raises(DataError, match=expected):
        download_graph(published(server.base, digests, sources), tmp_path / "kg", QUICK)
    assert_nothing_is_left(tmp_path / "kg")


def test_a_cut_archive_leaves_nothing(server, digests, tmp_path):
    whole = packed([(name, os.urandom(4096)) for name in TEXTS])
    server.files["small.tar.gz"] = whole[: len(whole) // 2]
    sources = (Source(f"{server.base}/small.tar.gz", tuple(TEXTS)),)
    with pytest.raises(DataError, match=r"no readable .tar.gz"):
        download_graph(published(server.base, digests, sources), tmp_path / "kg", QUICK)
    assert_nothing_is_left(tmp_path / "kg")


def test_a_member_outside_the_folder_is_written_inside_it(server, digests, tmp_path):
    """Only the last name counts, so a hostile path can not lead out."""
    members = [(f"../../{name}", text.encode()) for name, text in TEXTS.items()]
    server.files["small.tar.gz"] = packed(members)
    sources = (Source(f"{server.base}/small.tar.gz", tuple(TEXTS)),)
    download_graph(published(server.base, digests, sources), tmp_path / "deep/kg", QUICK)
    assert sorted(path.name for path in (tmp_path / "deep/kg/small").iterdir()) == sorted(TEXTS)
    assert not (tmp_path / "train.txt").exists()
    assert not (tmp_path / "deep/train.txt").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("train.txt", "a\tlikes\tb\n", "found .*'train': 1.* expected .*'train': 3"),
        ("valid.txt", "a\tknows\tc é\n", "the digest of valid is"),
        ("test.txt", "<html>moved</html>\n", "expected 3 columns"),
        ("test.txt", b"\xff\xfe\n", "does not hold Small as published"),
    ],
)
def test_wrong_content_is_refused_and_leaves_nothing(
    server, digests, tmp_path, name, content, expected
):
    server.files[name] = content if isinstance(content, bytes) else content.encode()
    with pytest.raises(DataError, match=expected) as error:
        download_graph(published(server.base, digests), tmp_path / "kg", QUICK)
    assert f"put train.txt, valid.txt, test.txt into {tmp_path / 'kg/small'}" in str(error.value)
    assert_nothing_is_left(tmp_path / "kg")


def test_without_a_digest_the_counts_are_what_is_verified(server, tmp_path):
    server.files["valid.txt"] = "a\tknows\tc é\n".encode()
    result = download_graph(published(server.base, None), tmp_path / "kg", QUICK)
    assert result["verified"] == "counts"


def test_a_missing_file_is_named_at_once_with_what_to_do(server, digests, tmp_path):
    del server.files["valid.txt"]
    with pytest.raises(
        StoreError, match=r"valid.txt can not be had: the server answers 404"
    ) as error:
        download_graph(published(server.base, digests), tmp_path / "kg", QUICK)
    assert f"{server.base}/test.txt -> test.txt" in str(error.value)
    assert server.asked == ["train.txt", "valid.txt"]
    assert_nothing_is_left(tmp_path / "kg")


def test_a_refused_connection_is_tried_again_and_then_told(digests, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    graph = published(f"http://127.0.0.1:{port}", digests)
    with pytest.raises(UnreachableError, match=r"can not be had after 3 tries.*refused"):
        download_graph(graph, tmp_path / "kg", QUICK)
    assert_nothing_is_left(tmp_path / "kg")


def test_what_passes_is_tried_again(server, digests, tmp_path):
    """A busy server, then one that breaks off, then the file."""

    def busy(request):
        server.answers["train.txt"] = broken
        request.send_error(503)

    def broken(request):
        del server.answers["train.txt"]
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        request.wfile.write(b"a\tlikes\tb\n")

    server.answers["train.txt"] = busy
    download_graph(published(server.base, digests), tmp_path / "kg", QUICK)
    assert server.asked == ["train.txt"] * 3 + ["valid.txt", "test.txt"]


def test_an_answer_without_end_is_cut_off(server, digests, tmp_path):
    def endless(request):
        request.send_response(200)
        request.end_headers()
        try:
            while True:
                request.wfile.write(b"a\tlikes\tb\n" * 1000)
        except OSError:
            pass

    server.answers["train.txt"] = endless
    limits = replace(QUICK, max_bytes=100_000)
    with pytest.raises(StoreError, match="larger than 100000 bytes"):
        download_graph(published(server.base, digests), tmp_path / "kg", limits)
    assert_nothing_is_left(tmp_path / "kg")


KILLED = """
import sys
from pathlib import Path
from loopfm_ray.kge.download import download_graph
from loopfm_ray.kge.published import PublishedGraph, Source
base, root = sys.argv[1:]
files = ("train.txt", "valid.txt", "test.txt")
sources = tuple(Source(f"{base}/{name}", (name,)) for name in files)
counts = {"train": 3, "valid": 1, "test": 2}
download_graph(PublishedGraph("Small", sources, counts, None, "nobody"), Path(root))
"""


def test_a_kill_half_way_leaves_nothing_that_a_reader_sees(server, digests, tmp_path):
    reached, go_on = threading.Event(), threading.Event()

    def stall(request):
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        request.wfile.write(b"a\tknows")
        request.wfile.flush()
        reached.set()
        go_on.wait(60)

    server.answers["valid.txt"] = stall
    root = tmp_path / "kg"
    command = [sys.executable, "-c", KILLED, server.base, str(root)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment)
    assert reached.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    go_on.set()
    assert not (root / "small").exists()
    assert [path.name.startswith(".small.tmp-") for path in root.iterdir()] == [True]
    del server.answers["valid.txt"]
    download_graph(published(server.base, digests), root, QUICK)
    assert [path.name for path in root.iterdir()] == ["small"]


def test_files_put_there_by_hand_are_verified(server, digests, tmp_path):
    folder = tmp_path / "kg/small"
    folder.mkdir(parents=True)
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    graph = published(server.base, digests)
    assert download_graph(graph, tmp_path / "kg", QUICK)["downloaded"] is False
    assert server.asked == []
    (folder / "test.txt").write_text("b\tknows\tc é\nc é\tlikes\tb\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"digest of test.*Remove or move {folder}"):
        download_graph(graph, tmp_path / "kg", QUICK)


def test_the_digest_follows_triples_and_nothing_else(tmp_path):
    def write(folder, texts):
        folder.mkdir()
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        return read_triples(folder)

    first = write(tmp_path / "a", TEXTS)
    lines = TEXTS["train.txt"].splitlines(keepends=True)
    turned = {**TEXTS, "train.txt": "".join(lines[::-1] + lines[:1])}
    assert graph_digest(write(tmp_path / "b", turned)) == graph_digest(first)
    tsv = {name.replace("txt", "tsv"): text for name, text in TEXTS.items()}
    assert graph_digest(write(tmp_path / "c", tsv)) == graph_digest(first)
    backwards = {**TEXTS, "valid.txt": "b\tknows\ta\n"}
    assert graph_digest(write(tmp_path / "d", backwards)) != graph_digest(first)
    swapped = {**TEXTS, "valid.txt": TEXTS["test.txt"], "test.txt": TEXTS["valid.txt"]}
    assert graph_digest(write(tmp_path / "e", swapped)) != graph_digest(first)


@pytest.mark.parametrize(
    ("folder", "name"),
    [("fb15k237", "FB15k-237"), ("wn18rr", "WN18RR"), ("codex_s", "CoDEx-S"), ("umls", "UMLS")],
)
def test_the_graphs_at_hand_are_the_published_ones(folder, name):
    assert GRAPHS[name].digests is not None
    check_graph(GRAPHS[name], shared_graph(folder))


def test_every_graph_of_the_table_is_whole():
    wanted = {"FB15k-237", "WN18RR", "CoDEx-S", "CoDEx-M", "CoDEx-L", "YAGO3-10", "NELL-995"}
    assert set(GRAPHS) == wanted | {"UMLS", "Kinships"}
    for graph in GRAPHS.values():
        assert set(graph.num_triples) == set(SPLITS)
        assert graph.digests is None or {len(text) for text in graph.digests.values()} == {64}
        assert all(source.url.startswith("https://") for source in graph.sources)
        assert len(set(graph.files)) == len(graph.files)
        stems = {name.removesuffix(".txt").removesuffix("2id") for name in graph.files}
        assert set(SPLITS) <= stems
    verified = {name for name, graph in GRAPHS.items() if graph.digests}
    assert verified == {"FB15k-237", "WN18RR", "CoDEx-S", "UMLS", "Kinships"}


def test_an_unknown_graph_is_named_with_those_that_are_known():
    assert find_graph("codex-s") is GRAPHS["CoDEx-S"]
    with pytest.raises(ConfigError, match=r"'FB15k'; known are FB15k-237, WN18RR"):
        find_graph("FB15k")


def test_the_command_prints_what_was_verified(server, digests, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "loopfm_ray.kge.published.GRAPHS", {"Small": published(server.base, digests)}
    )
    arguments = ["download-kg", "small", "--to", str(tmp_path / "kg"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert '"verified": "content"' in result.output
    assert (tmp_path / "kg/small/train.txt").is_file()
    unknown = CliRunner().invoke(app, ["download-kg", "nothing", "--to", str(tmp_path)])
    assert isinstance(unknown.exception, ConfigError)
