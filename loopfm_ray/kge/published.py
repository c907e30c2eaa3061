"""The published graphs that `loopfm download-kg` knows: where their files are, and what tells that they are the right ones.

Five are verified by content: the digests (`digest.split_digest`) are those of `../shared/data/kg` and, for UMLS and Kinships, of
the wheel of pykeen 1.11.1. Of the others nothing but the published numbers of triples was at hand, so only these are checked.

Copies that look alike and are not are left out: `villmow/datasets_knowledge_embedding` writes WN18RR with names of synsets and
Kinships with the relation first, and pykeen counts FB15k-237, WN18RR and YAGO3-10 without the triples of unseen entities.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from loopfm_ray.errors import ConfigError
from loopfm_ray.kge.triples import SPLITS, Split

__all__ = ["GRAPHS", "PublishedGraph", "Source", "find_graph"]

_CODEX = "https://raw.githubusercontent.com/tsafavi/codex/master/data/triples"
_CONVE = "https://github.com/TimDettmers/ConvE/raw/master"
_OPENKE = "https://raw.githubusercontent.com/thunlp/OpenKE/3b7f0b19441f11d6bc9331e8d1001a056f759f00/benchmarks"
_PYKEEN = "https://raw.githubusercontent.com/pykeen/pykeen/master/src/pykeen/datasets"
_TEXT = ("train.txt", "valid.txt", "test.txt")
_NUMBERS = ("train2id.txt", "valid2id.txt", "test2id.txt", "entity2id.txt", "relation2id.txt")


@dataclass(frozen=True)
class Source:
    """One file to get."""

    url: str
    files: tuple[str, ...]
    """What is taken from it: the file itself, or members of a `.tar.gz` by their last name."""

    @property
    def is_archive(self) -> bool:
        """Whether it is a `.tar.gz`."""
        return self.url.endswith(".tar.gz")


@dataclass(frozen=True)
class PublishedGraph:
    """One published graph."""

    name: str
    """As papers write it."""
    sources: tuple[Source, ...]
    num_triples: Mapping[Split, int]
    """Published number of triples of each split."""
    digests: Mapping[Split, str] | None
    """`split_digest` of each split; None where the content was not at hand, so that the counts alone are checked."""
    credit: str
    """Who made it."""

    @property
    def folder(self) -> str:
        """Name of the directory that holds its files."""
        return self.name.lower()

    @property
    def files(self) -> tuple[str, ...]:
        """The files of that directory."""
        return tuple(name for source in self.sources for name in source.files)


def _texts(base: str) -> tuple[Source, ...]:
    return tuple(Source(f"{base}/{name}", (name,)) for name in _TEXT)


def _by_split(train: int, valid: int, test: int) -> Mapping[Split, int]:
    return MappingProxyType(dict(zip(SPLITS, (train, valid, test), strict=True)))


def _digests(train: str, valid: str, test: str) -> Mapping[Split, str]:
    return MappingProxyType(dict(zip(SPLITS, (train, valid, test), strict=True)))


_GRAPHS = (
    PublishedGraph(
        "FB15k-237",
        (Source(f"{_CONVE}/FB15k-237.tar.gz", _TEXT),),
        _by_split(272_115, 17_535, 20_466),
        _digests(
            "8d2a771809b0f38f2824c839f25ec57e3a187405049112751e72c82ee9eb3e12",
            "1c4febacc6daabc6f3f8e72650935126ef208b098be3a90a81780ba69401836d",
            "a7156e4560d173ee2e3e8504c490e95d14fa893f1863a6d584d2f5053489a647",
        ),
        "Toutanova and Chen 2015, from Freebase",
    ),
    PublishedGraph(
        "WN18RR",
        (Source(f"{_CONVE}/WN18RR.tar.gz", _TEXT),),
        _by_split(86_835, 3_034, 3_134),
        _digests(
            "70fbc1c7881f33bd10c77bb493127fad58e5720f260d39c137fc927ecfb5d7f6",
            "0f42971b8aa35b97350a9aec3e2015bdce5d33636ed2d5a5b9ea5b2ea5f36547",
            "92f29d2ed83e81896b91575792696fb4d79db289789128f4c1ddbb38b1a07350",
        ),
        "Dettmers et al. 2018, arXiv 1707.01476, from WordNet",
    ),
    PublishedGraph(
        "CoDEx-S",
        _texts(f"{_CODEX}/codex-s"),
        _by_split(32_888, 1_827, 1_828),
        _digests(
            "b474f0bcef256ff9a8e76bb7d2be459f45d5843b8557a29028e79cc10a2aeeee",
            "43eb7ccc5309081986df7dfa3d530a0609c4d75325831086038f7c3b131ed4f6",
            "29f42710dcab8551acf260d3bf84b22839fce48c47727cc173a5fb5c99e64822",
        ),
        "Safavi and Koutra 2020, arXiv 2009.07810, from Wikidata; MIT",
    ),
    PublishedGraph(
        "CoDEx-M",
        _texts(f"{_CODEX}/codex-m"),
        _by_split(185_584, 10_310, 10_311),
        None,
        "Safavi and Koutra 2020, arXiv 2009.07810, from Wikidata; MIT",
    ),
    PublishedGraph(
        "CoDEx-L",
        _texts(f"{_CODEX}/codex-l"),
        _by_split(551_193, 30_622, 30_622),
        None,
        "Safavi and Koutra 2020, arXiv 2009.07810, from Wikidata; MIT",
    ),
    PublishedGraph(
        "YAGO3-10",
        (Source(f"{_CONVE}/YAGO3-10.tar.gz", _TEXT),),
        _by_split(1_079_040, 5_000, 5_000),
        None,
        "Mahdisoltani et al. 2015, split by Dettmers et al. 2018, from YAGO3",
    ),
    PublishedGraph(
        "NELL-995",
        tuple(Source(f"{_OPENKE}/NELL-995/{name}", (name,)) for name in _NUMBERS),
        _by_split(149_678, 543, 3_992),
        None,
        "Xiong et al. 2017, arXiv 1707.06690; split by Nathani et al. 2019, arXiv 1906.01195",
    ),
    PublishedGraph(
        "UMLS",
        _texts(f"{_PYKEEN}/umls"),
        _by_split(5_216, 652, 661),
        _digests(
            "de6801fd5ca13372b5a0f314462fac674346badc292462c58e2f2852c147534f",
            "64c7771d5b5e2b5d76eaf93c758b45130c89cf419c5b963689956209ec213c95",
            "cc119a3289e7f3a4f389b9f9e42d76e36a305f48ae5292315cfd0488083a2e14",
        ),
        "McCray 2003; also in the wheel of pykeen under pykeen/datasets/umls",
    ),
    PublishedGraph(
        "Kinships",
        _texts(f"{_PYKEEN}/kinships"),
        _by_split(8_544, 1_068, 1_074),
        _digests(
            "ebbbfcdbc08e6e9c9c4f8a40e4eb60ac25e105d6f65bb7f4c7234cf9c5f4a539",
            "e4f7d94a2bc5373e7306edcc42458a99a9ef4218c7cd0137a47db10dd1c2b88b",
            "1d2f6e45db7d59ef6e92822f73fd4350cb0bfa2f043c3fa054aa05a0b4bdd821",
        ),
        "Denham 1973; also in the wheel of pykeen under pykeen/datasets/kinships",
    ),
)

GRAPHS: Mapping[str, PublishedGraph] = {graph.name: graph for graph in _GRAPHS}
"""By name, in the order of the papers that use them."""


def find_graph(name: str) -> PublishedGraph:
    """Return the graph of a name, written in small or large letters.

    Raises:
        ConfigError: there is none.
    """
    for graph in GRAPHS.values():
        if graph.folder == name.lower():
            return graph
    raise ConfigError(f"there is no published graph {name!r}; known are {', '.join(GRAPHS)}")
