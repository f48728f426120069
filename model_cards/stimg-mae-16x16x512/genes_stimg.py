# Copyright 2026 The stimg authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""GeneVocabulary: which gene a name means, whatever kind of name a slide uses."""

import csv
import gzip
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)

GENES_FILE = "genes.json"
GENES_FORMAT = 1
PAD_NAME = "[PAD]"
# What a corpus tells of every gene, one value each.
STATISTICS = ("mean", "deviation", "share")
MIN_MATCHED_GENES = 50
MIN_MATCHED_SHARE = 0.05
# Columns of `adata.var` in which readers and archives keep the names that are not the index.
VAR_ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id")
VAR_NAME_COLUMNS = ("gene_name", "gene_names", "feature_name", "gene_symbol", "symbol")

_ENSEMBL = re.compile(r"ENS[A-Z]*G\d{11}(\.\d+)?$")
_VERSION = re.compile(r"^(ENS[A-Z]*G\d{11})\.\d+$")
# What symbols look like: human ones are capitals and digits, mouse's start with a capital alone (Actb, mt-Nd1). A
# reference of two genomes puts the genome before the name (GRCh38_ENSG00000075624, mm10___Actb).
_MOUSE_SYMBOL = re.compile(r"(?:[A-Z]|mt-[A-Z])[a-z0-9]*[a-z][A-Za-z0-9.-]*$")
_GENOME = re.compile(r"(GRC[hmr]\d+|hg\d+|mm\d+|rn\d+)_+")


def strip_version(name: str) -> str:
    """`ENSG00000141736.14` -> `ENSG00000141736`; a symbol such as `AL627309.1` keeps its dot."""
    return _VERSION.sub(r"\1", name) if "." in name else name


def is_ensembl(name: str) -> bool:
    """Whether `name` is an Ensembl gene id, with or without version suffix."""
    return name.startswith("ENS") and _ENSEMBL.match(name) is not None


@dataclass(frozen=True)
class SlideGenes:
    """The names that a slide gives its genes; "" where it gives none.

    Attributes:
        ids: Ensembl ids without version, from `var["gene_ids"]` and its like, or from `var_names`.
        symbols: from `var["gene_name"]` and its like, or from `var_names`.
    """

    ids: list[str]
    symbols: list[str]

    @classmethod
    def of(cls, adata: Any) -> "SlideGenes":
        """Read `var_names` and `var` of an AnnData. An id column that holds anything but Ensembl ids is passed over."""
        index = [str(n) for n in adata.var_names]
        columns = {
            kind: next((_strings(adata.var[c]) for c in names if c in adata.var), index)
            for kind, names in (("ids", VAR_ID_COLUMNS), ("symbols", VAR_NAME_COLUMNS))
        }
        # Gene by gene: references use the id as the name of a gene that has no symbol.
        ids = [
            strip_version(name) if is_ensembl(name) else strip_version(other) if is_ensembl(other) else ""
            for name, other in zip(columns["ids"], index, strict=True)
        ]
        symbols = [
            name if name and not is_ensembl(name) else "" if is_ensembl(other) else other
            for name, other in zip(columns["symbols"], index, strict=True)
        ]
        return cls(ids, symbols)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def by_id(self) -> bool:
        """Whether most genes have an Ensembl id."""
        return bool(np.mean([gene != "" for gene in self.ids] or [0.0]) > 0.5)

    @property
    def looks_like_mouse(self) -> bool:
        """Whether most genes are named as mouse genes are: `ENSMUSG...`, or symbols such as `Actb`."""
        named = [gene.startswith("ENSMUSG") for gene in self.ids if gene]
        named = named or [_MOUSE_SYMBOL.match(symbol) is not None for symbol in self.symbols if symbol]
        return bool(np.mean(named or [False]) > 0.5)

    @property
    def genomes(self) -> list[str]:
        """Names of genomes that stand before names of genes, where several were read together."""
        return sorted({found[1] for found in map(_GENOME.match, (*self.ids, *self.symbols)) if found})

    @property
    def example(self) -> str:
        """One name, for messages."""
        return next((n for pair in zip(self.ids, self.symbols, strict=True) for n in pair if n), "no name")


def _strings(column: Any) -> list[str]:
    """A column as str, missing values as ""."""
    missing = column.isna().to_numpy()
    return ["" if gone else str(value) for value, gone in zip(column.to_numpy(object), missing, strict=True)]


@dataclass(frozen=True)
class GeneMatch:
    """How a slide's genes met the vocabulary. `ids`: int64 (n_vars,), -1 where unknown."""

    ids: np.ndarray

    @property
    def num_matched(self) -> int:
        """Columns of the slide that are genes of the vocabulary."""
        return int((self.ids >= 0).sum())

    @property
    def num_genes(self) -> int:
        """Columns of the slide."""
        return len(self.ids)

    def __str__(self) -> str:
        return f"matched {self.num_matched:,} of {self.num_genes:,} genes"


class GeneVocabulary:
    """The genes that a model knows, in a fixed order; a gene's number is its row in the embedding table.

    A gene's identity is its Ensembl id where one is known, else its symbol. Symbols that stand for several Ensembl
    ids are `ambiguous`: they never resolve to an id, and are entries of their own where a slide used them.

    Args:
        gene_ids: identity of every gene, distinct.
        gene_names: symbol of every gene (empty string: none); `None`: the identities.
        aliases: further name -> identity.
        ambiguous: symbols that must not resolve through `gene_names`.
        mean, deviation: float (len,) corpus mean and floored standard deviation of a gene's log1p values.
        share: float (len,) share of a spot's counts that the corpus expects in each gene, were all of them measured.

    Raises:
        ValueError: no genes, repeated identities, or lengths that disagree.
    """

    def __init__(
        self,
        gene_ids: Sequence[str],
        gene_names: Sequence[str] | None = None,
        aliases: Mapping[str, str] | None = None,
        ambiguous: Iterable[str] = (),
        mean: np.ndarray | None = None,
        deviation: np.ndarray | None = None,
        share: np.ndarray | None = None,
    ):
        self.gene_ids = [str(g) for g in gene_ids]
        self.gene_names = list(self.gene_ids) if gene_names is None else [str(n) for n in gene_names]
        self.aliases = dict(aliases or {})
        self.ambiguous = sorted(set(ambiguous))
        if not self.gene_ids:
            raise ValueError("A gene vocabulary needs at least one gene: got none.")
        if len(self.gene_names) != len(self.gene_ids):
            raise ValueError(f"{len(self.gene_ids)} gene ids but {len(self.gene_names)} gene names: expected one each.")
        repeated = [g for g, n in Counter(self.gene_ids).items() if n > 1]
        if repeated:
            raise ValueError(f"{len(repeated)} gene ids occur twice, e.g. {repeated[0]!r}: every gene is listed once.")
        self.mean = self._statistic("mean", mean)
        self.deviation = self._statistic("deviation", deviation)
        self.share = self._statistic("share", share)
        self._lookup = self._build_lookup()

    def _statistic(self, name: str, values: np.ndarray | None) -> np.ndarray | None:
        if values is None:
            return None
        values = np.asarray(values, dtype=np.float32)
        if values.shape != (len(self.gene_ids),) or not np.isfinite(values).all():
            raise ValueError(f"{name} has shape {values.shape}: expected a finite value for each of {len(self)} genes.")
        if name == "share" and values.min() < 0:
            raise ValueError(f"share holds {values.min():.3g}: expected shares of all counts, none below 0.")
        return values

    def _build_lookup(self) -> dict[str, int]:
        lookup = {gene: i for i, gene in enumerate(self.gene_ids)}
        blocked = set(self.ambiguous) | {n for n, k in Counter(self.gene_names).items() if k > 1}
        for i, name in enumerate(self.gene_names):
            if name and name not in blocked:
                lookup.setdefault(name, i)
        for alias, gene in self.aliases.items():
            if gene in lookup and alias not in blocked:
                lookup.setdefault(alias, lookup[gene])
        return lookup

    # ---------------------------------------------------------------- making one

    @classmethod
    def from_table(cls, path: str | os.PathLike) -> "GeneVocabulary":
        """All genes of a TSV with the columns `gene_id`, `gene_name` and optionally `aliases` (separated by `|`).

        Raises:
            ValueError: the columns are missing, or a gene id is listed twice.
        """
        opener = gzip.open if str(path).endswith(".gz") else open
        try:
            with opener(path, "rt", encoding="utf-8", newline="") as file:
                rows = csv.DictReader(file, delimiter="\t")
                columns = list(rows.fieldnames or ())
                lines = list(rows) if {"gene_id", "gene_name"} <= set(columns) else None
        except (UnicodeDecodeError, csv.Error, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"{os.path.basename(path)} is no gene table ({error}): expected text with the columns 'gene_id' and "
                "'gene_name', tab-separated."
            ) from error
        if lines is None:
            raise ValueError(
                f"{os.path.basename(path)} has the columns {columns}: a gene table needs 'gene_id' and 'gene_name', "
                "tab-separated."
            )
        genes = [
            (strip_version(r["gene_id"] or ""), r["gene_name"] or "", (r.get("aliases") or "").split("|"))
            for r in lines
        ]
        ids, names, aliases = zip(*genes, strict=True) if genes else ((), (), ())
        counts = Counter(n for n in names if n)
        pairs = [(a.strip(), g) for g, more in zip(ids, aliases, strict=True) for a in more if a.strip()]
        alias_counts = Counter(a for a, _ in pairs)
        return cls(
            ids,
            names,
            aliases={a: g for a, g in pairs if alias_counts[a] == 1},
            ambiguous=(n for n, k in counts.items() if k > 1),
        )

    @classmethod
    def from_slides(
        cls, slides: Iterable[Any], table: "GeneVocabulary | str | os.PathLike | None" = None
    ) -> "GeneVocabulary":
        """The union of the genes measured on `slides`, sorted by identity.

        Args:
            slides: AnnDatas.
            table: a gene table (`from_table`) that tells which symbol is which Ensembl id.

        Raises:
            ValueError: some slides name genes by Ensembl id and others by symbol, and there is no table.
        """
        if table is not None and not isinstance(table, GeneVocabulary):
            table = cls.from_table(table)
        names: dict[str, str] = {}
        kinds: dict[bool, int] = {}
        for number, adata in enumerate(slides):
            genes = SlideGenes.of(adata)
            for gene, name in _identities(genes, table):
                if not names.get(gene):
                    names[gene] = name
            kinds.setdefault(genes.by_id, number)
        if table is None and len(kinds) == 2:
            raise ValueError(
                f"Slide {kinds[True]} names its genes by Ensembl id and slide {kinds[False]} by symbol: pass "
                "`table`, a TSV with gene_id and gene_name, so that one gene gets one identity."
            )
        ids = sorted(names)
        repeated = {n for n, k in Counter(n for n in names.values() if n).items() if k > 1}
        vocabulary = cls(
            ids,
            [names[g] for g in ids],
            aliases={} if table is None else {a: g for a, g in table.aliases.items() if g in names},
            ambiguous=repeated | (set() if table is None else set(table.ambiguous)),
        )
        kept = [g for g in vocabulary.ambiguous if g in names]
        if kept:
            logger.warning(
                f"{len(kept)} symbols stand for several Ensembl ids and stay symbols, e.g. {', '.join(kept[:3])}."
            )
        return vocabulary

    def with_statistics(
        self, mean: np.ndarray | None = None, deviation: np.ndarray | None = None, share: np.ndarray | None = None
    ) -> "GeneVocabulary":
        """The same genes with the given corpus statistics, each float (len,); those not given stay as they are."""
        given = {"mean": mean, "deviation": deviation, "share": share}
        statistics = {name: getattr(self, name) if value is None else value for name, value in given.items()}
        return GeneVocabulary(self.gene_ids, self.gene_names, self.aliases, self.ambiguous, **statistics)

    def extended_by(self, other: "GeneVocabulary") -> tuple["GeneVocabulary", np.ndarray]:
        """These genes with their numbers, followed by those of `other` that are not among them; no statistics.

        A name that means a gene here keeps its meaning, so that what was read with these genes is read alike.

        Returns:
            the vocabulary, and int64 (len(other),), the number in it of every gene of `other`.
        """
        numbers = self._numbers(
            SlideGenes(
                [strip_version(g) if is_ensembl(g) else "" for g in other.gene_ids],
                ["" if is_ensembl(n) else n for n in map(_symbol, other.gene_ids, other.gene_names)],
            )
        )
        new = np.flatnonzero(numbers < 0)
        numbers[new] = len(self) + np.arange(len(new))
        names = ["" if other.gene_names[i] in self._lookup else other.gene_names[i] for i in new]
        vocabulary = GeneVocabulary(
            [*self.gene_ids, *(other.gene_ids[i] for i in new)],
            [*self.gene_names, *names],
            {**other.aliases, **self.aliases},
            {*self.ambiguous, *(name for name in other.ambiguous if name not in self._lookup)},
        )
        return vocabulary, numbers

    # ---------------------------------------------------------------- asking it

    def __len__(self) -> int:
        return len(self.gene_ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GeneVocabulary) and self.to_json() == other.to_json()

    __hash__ = None

    def __repr__(self) -> str:
        return f"GeneVocabulary({len(self)} genes, e.g. {', '.join(self.gene_ids[:3])})"

    @property
    def pad_id(self) -> int:
        """The number that stands for no gene: `len(vocabulary)`."""
        return len(self.gene_ids)

    def encode(self, names: Iterable[str]) -> np.ndarray:
        """Numbers of genes given by Ensembl id or symbol, version suffix ignored.

        Returns:
            int64 (number of names,), -1 where unknown or ambiguous.
        """
        lookup = self._lookup
        numbers = [lookup[name] if name in lookup else lookup.get(strip_version(name), -1) for name in map(str, names)]
        return np.array(numbers, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Identities of gene numbers; `pad_id` becomes `"[PAD]"`.

        Raises:
            ValueError: a number outside 0 … `pad_id`.
        """
        numbers = np.asarray(ids, dtype=np.int64).reshape(-1)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() <= self.pad_id:
            raise ValueError(
                f"Gene numbers from {numbers.min()} to {numbers.max()}: expected 0 to {self.pad_id} (padding)."
            )
        return [self.gene_ids[i] if i < len(self) else PAD_NAME for i in numbers]

    def match(self, adata: Any) -> GeneMatch:
        """Number of every gene of a slide, from the most precise name that is known.

        Raises:
            ValueError: fewer than 50 genes, or fewer than 5 % of the slide's, are known.
        """
        genes = SlideGenes.of(adata)
        match = GeneMatch(self._numbers(genes))
        if match.num_matched < max(MIN_MATCHED_GENES, MIN_MATCHED_SHARE * match.num_genes):
            raise ValueError(
                f"The slide {match} with the vocabulary (e.g. {genes.example!r} against {self.gene_ids[0]!r}): at "
                f"least {MIN_MATCHED_GENES} genes and {MIN_MATCHED_SHARE:.0%} must match; {self._advice(genes)}."
            )
        return match

    def _advice(self, genes: SlideGenes) -> str:
        """What to do about a slide whose genes are not known."""
        own = SlideGenes([gene if is_ensembl(gene) else "" for gene in self.gene_ids], self.gene_names)
        if genes.looks_like_mouse and not own.looks_like_mouse:
            return (
                "they look like genes of the mouse, and the model knows human ones: take a model of mouse slides, or "
                "name each gene by its human orthologue"
            )
        if genes.genomes:
            return (
                f"names start with a genome ({', '.join(genes.genomes)}): keep the genes of one genome, and take that "
                "off their names"
            )
        return "name genes by human Ensembl id or symbol in var_names or var['gene_ids']"

    @cached_property
    def _known_by_id(self) -> np.ndarray:
        """bool (genes + 1,): by an Ensembl id; the last is for no gene, -1."""
        return np.array([*map(is_ensembl, self.gene_ids), False])

    def _numbers(self, genes: SlideGenes) -> np.ndarray:
        """Numbers int64 (n,) of genes by their most precise name, -1 where unknown."""
        ids = self.encode(genes.ids)
        # A symbol speaks for a gene only where no Ensembl id contradicts it: the slide gives none, or the vocabulary
        # knows the gene by its symbol alone.
        by_symbol = self.encode(genes.symbols)
        given = np.array([gene != "" for gene in genes.ids], dtype=bool)
        known_by_id = self._known_by_id[by_symbol]
        return np.where((ids < 0) & ~(given & known_by_id), by_symbol, ids)

    # ---------------------------------------------------------------- files

    def to_json(self) -> str:
        """The content of `genes.json`: one line, the same for the same vocabulary."""
        content: dict[str, Any] = {"format": GENES_FORMAT, "gene_ids": self.gene_ids, "gene_names": self.gene_names}
        if self.aliases:
            content["aliases"] = dict(sorted(self.aliases.items()))
        if self.ambiguous:
            content["ambiguous"] = self.ambiguous
        for name in STATISTICS:
            values = getattr(self, name)
            if values is not None:
                # Nine significant digits give every float32 back exactly.
                content[name] = [float(f"{v:.9g}") for v in values]
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"

    @property
    def sha256(self) -> str:
        """Fingerprint of `genes.json`, kept in `preprocessor_config.json`."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    @cached_property
    def ids_sha256(self) -> str:
        """Fingerprint of the genes and their order alone: what makes gene numbers mean the same."""
        return hashlib.sha256("\n".join(self.gene_ids).encode("utf-8")).hexdigest()

    def save(self, folder: str | os.PathLike) -> str:
        """Write `genes.json` into `folder`; returns its path."""
        path = os.path.join(folder, GENES_FILE)
        temporary = f"{path}.tmp{os.getpid()}"
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(self.to_json())
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike, sha256: str | None = None) -> "GeneVocabulary":
        """Read `genes.json`, and compare it with a fingerprint where one is given.

        Raises:
            ValueError: no gene vocabulary of a known format, or one that differs from its fingerprint.
        """
        with open(path, "rb") as file:
            raw = file.read()
        if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
            raise ValueError(
                f"{GENES_FILE} is not the file that the processor was saved with (its sha256 differs from "
                "preprocessor_config.json): the gene numbers would be wrong; download the model again."
            )
        try:
            content = json.loads(raw)
            if content.get("format") != GENES_FORMAT:
                raise ValueError(f"format {content.get('format')!r}, expected {GENES_FORMAT}")
            keys = ("gene_ids", "gene_names", "aliases", "ambiguous", *STATISTICS)
            return cls(**{k: content[k] for k in keys if k in content})
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError, KeyError) as error:
            raise ValueError(f"{GENES_FILE} holds no gene vocabulary ({error}): download the model again.") from error

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, sha256: str | None = None, **kwargs: Any
    ) -> "GeneVocabulary":
        """Read `genes.json` from a folder or a Hub repository; `kwargs` are those of `cached_file`."""
        return cls.load(cached_file(str(pretrained_model_name_or_path), GENES_FILE, **kwargs), sha256)


def _symbol(gene_id: str, name: str) -> str:
    """The symbol of a gene of a vocabulary: its name, or the identity of one that is known by its symbol alone."""
    return name or gene_id


def _identities(genes: SlideGenes, table: GeneVocabulary | None) -> list[tuple[str, str]]:
    """(identity, symbol) of every named gene of a slide, by the table where it knows the gene."""
    pairs = [(gene or symbol, symbol) for gene, symbol in zip(genes.ids, genes.symbols, strict=True)]
    if table is None:
        return [pair for pair in pairs if pair[0]]
    known = table.encode(gene or symbol for gene, symbol in zip(genes.ids, genes.symbols, strict=True))
    named = [(table.gene_ids[k], table.gene_names[k]) if k >= 0 else pair for k, pair in zip(known, pairs, strict=True)]
    return [pair for pair in named if pair[0]]


__all__ = ["GENES_FILE", "GeneMatch", "GeneVocabulary", "SlideGenes", "is_ensembl", "strip_version"]
