"""Where public slides lie: the rows of `sources.tsv`, checked.

A row is one slide, or one collection whose slides only the download shows (`contents`). An empty field is a fact that
nobody has checked, not a "no": a row without `url` says where to look (`notes`), and asks for the direct address.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

MANIFEST = Path(__file__).with_name("sources.tsv")
LAYOUTS = ("h5ad", "cellxgene", "space_ranger", "geo", "mtx", "zarr")
ROLES = ("corpus", "evaluation")
CONTENTS = ("slide", "collection")
EVALUATION_SETS = ("dlpfc", "lymph_node_a1", "lymph_node_d1", "colorectal", "breast", "tonsil", "her2", "heart")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CHECKSUM = re.compile(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}")
_SEPARATOR = "|"  # between the addresses of one slide; no address holds it unescaped


@dataclass(frozen=True)
class Source:
    """One row of the manifest.

    Attributes:
        id: names the slide, or the collection its slides; a safe file name.
        source: the archive's name.
        url: direct http(s) address, `file://` address or local path (`$VARIABLES` and `~` are expanded); empty where
            it is not known. A fragment names one file or folder inside of an archive: `https://.../all.zip#A1/outs`.
            Several files that make one slide are separated by `|`, a fragment is that of the first. An address may
            hold a password, so no text shows it.
        layout: one of `LAYOUTS`, how the files are laid out; empty where it is not known.
        checksum: `sha256:...` or `md5:...` of the file; empty where it is not known. One for each address.
        organism, organ, condition, technology, licence, citation, patient: what the slide is, as far as is known.
        role: "corpus" or "evaluation". A slide for evaluation is never trained on.
        evaluation_set: one of `EVALUATION_SETS`; empty for the corpus, and for what is only kept out of it.
        aliases: other ids under which the slide is known, separated by `|`: the guard against leaks knows them, too.
        labels: the rule that gives each spot its label, such as `obs["final_annot"]`.
        contents: "slide", or "collection" of slides whose number is not known before they are read.
        verified: "yes" where the download was really made and read, else "no".
        notes: what a person has to know.

    Raises:
        ValueError: a field that is none of these, in one sentence.
    """

    id: str
    source: str = ""
    url: str = field(default="", repr=False)
    layout: str = ""
    checksum: str = ""
    organism: str = ""
    organ: str = ""
    condition: str = ""
    technology: str = ""
    licence: str = ""
    citation: str = ""
    patient: str = ""
    role: str = "corpus"
    evaluation_set: str = ""
    aliases: str = ""
    labels: str = ""
    contents: str = "slide"
    verified: str = "no"
    notes: str = ""

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise ValueError(f"id is {self.id!r}: give a file name of letters, digits, '.', '_' and '-', at most 100")
        _check_choice("layout", self.layout, ("", *LAYOUTS))
        _check_choice("role", self.role, ROLES)
        _check_choice("contents", self.contents, CONTENTS)
        _check_choice("verified", self.verified, ("yes", "no"))
        _check_choice("evaluation_set", self.evaluation_set, ("", *EVALUATION_SETS))
        if self.role == "corpus" and self.evaluation_set:
            raise ValueError(f"role is 'corpus' with evaluation_set {self.evaluation_set!r}: say role evaluation")
        _check_addresses(_split(self.url))
        _check_checksums(_split(self.checksum), len(_split(self.url)))
        if ".." in PurePosixPath(self.member).parts or self.member.startswith("/"):
            raise ValueError(f"url names {self.member!r} inside of the archive: give a path below its top folder")

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses to fetch, without the fragment; empty where none is known."""
        return tuple(a if _scheme(a) == "" else a.partition("#")[0] for a in _split(self.url))

    @property
    def checksums(self) -> tuple[str, ...]:
        """One checksum for each of `addresses`, "" where it is not known."""
        return _split(self.checksum) or ("",) * len(_split(self.url))

    @property
    def names(self) -> tuple[str, ...]:
        """The id and the aliases."""
        return (self.id, *_split(self.aliases))

    @property
    def is_local(self) -> bool:
        """Whether the source is a path or a `file://` address, to be used where it lies."""
        return any(_scheme(address) in ("", "file") for address in self.addresses)

    @property
    def member(self) -> str:
        """The file or folder inside of the archive that is meant; "" for all of it."""
        remote = [a for a in _split(self.url) if _scheme(a)]
        return unquote(remote[0].partition("#")[2]) if remote else ""


def read_manifest(path: str | Path = MANIFEST) -> list[Source]:
    """The rows of a manifest, in their order.

    Args:
        path: tab-separated, UTF-8, with the fields of `Source` as header, in any order; optional ones may be left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row that is not as it should be, in one sentence that names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a manifest of sources, such as {MANIFEST.name}.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        # No quoting: notes and labels hold quotation marks, obs["label"].
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is no UTF-8 table with tabs ({error}): save it as tab-separated text.") from error
    if not lines:
        raise ValueError(f"{path} is empty: expected a header with the columns id, url, layout and others.")
    names = [name.strip() for name in lines[0][1]]
    _check_header(path, names)
    sources: list[Source] = []
    seen: dict[str, int] = {}  # ids in small letters: some file systems know no others
    for number, row in lines[1:]:
        if len(row) != len(names):
            raise ValueError(f"{path}, line {number}: {len(row)} fields for {len(names)} columns: separate by one tab.")
        try:
            source = Source(**dict(zip(names, (cell.strip() for cell in row), strict=True)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}.") from error
        first = seen.setdefault(source.id.casefold(), number)
        if first != number:
            raise ValueError(f"{path}, line {number}: id {source.id!r} is that of line {first}: give each row its own.")
        sources.append(source)
    return sources


def select(sources: Sequence[Source], ids: Sequence[str] | None = None, role: str | None = None) -> list[Source]:
    """Those of `sources` that are named and have this role, in their order; None leaves all.

    Raises:
        ValueError: an id that no source has, or an unknown role.
    """
    if role is not None:
        _check_choice("role", role, ROLES)
    missing = sorted(set(ids or ()) - {source.id for source in sources})
    if missing:
        raise ValueError(
            f"No source is called {', '.join(map(repr, missing))} among the {len(sources)} of the manifest: check ids."
        )
    return [s for s in sources if (ids is None or s.id in ids) and (role is None or s.role == role)]


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(_SEPARATOR)) if text.strip() else ()


def _scheme(address: str) -> str:
    """The scheme of an address, "" for a path."""
    return address.partition("://")[0].lower() if "://" in address else ""


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: give one of {', '.join(c or repr(c) for c in choices)}")


def _check_addresses(addresses: Sequence[str]) -> None:
    for address in addresses:
        scheme = _scheme(address)
        if not address:
            raise ValueError(f"url holds an empty address: separate several by one {_SEPARATOR!r}")
        if scheme not in ("", "http", "https", "file"):
            raise ValueError(f"url has scheme {scheme!r}: give an http or https address, a file:// address or a path")
        if scheme in ("http", "https"):
            try:
                host = urlsplit(address).hostname
            except ValueError:
                host = None
            if not host or re.search(r"\s", address):
                raise ValueError(f"url is no {scheme} address: give {scheme}://host/path without spaces")
        elif len(addresses) > 1:
            raise ValueError("url holds several addresses, one of them a path: give the folder that holds them all")


def _check_checksums(checksums: Sequence[str], num_addresses: int) -> None:
    if checksums and len(checksums) != num_addresses:
        raise ValueError(f"{len(checksums)} checksums for {num_addresses} addresses: give one for each")
    for checksum in checksums:
        if checksum and not _CHECKSUM.fullmatch(checksum):
            raise ValueError(
                f"checksum is {checksum[:80]!r}: give sha256: and 64, or md5: and 32 hexadecimal digits, small letters"
            )


def _check_header(path: Path, names: Sequence[str]) -> None:
    known = {f.name for f in fields(Source)}
    wrong = [name for name in names if name not in known or names.count(name) > 1]
    if wrong:
        raise ValueError(f"{path}: column {wrong[0]!r} is unknown or there twice: expected {', '.join(sorted(known))}.")
    missing = {"id", "url", "layout", "role"} - set(names)
    if missing:
        raise ValueError(f"{path}: column {min(missing)!r} is missing: id, url, layout and role must be there.")
