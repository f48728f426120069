"""Where the library writes in an AnnData: every key of `obsm`, `obs` and `uns`, in one place.

    obsm["X_stimg"]                               the embedding, float32 (n_obs, width)
    obs["stimg_domain"]                           domains, categorical "0", "1", ...; "0" is the largest
    obs["stimg_bin"]                              of cells: which bin each lies in, int64 (`bin_cells`)
    uns["stimg_domain_colors"]                    their colours, where scanpy and squidpy look for them
    uns["stimg"]["embedding"]["X_stimg"]          how the embedding was made (`embedding_provenance`)
    uns["stimg"]["domains"]["stimg_domain"]       how the domains were found (`find_domains`)

Everything below `uns["stimg"]` is text, numbers and lists of numbers by name, so that it survives a .h5ad.
"""

from collections.abc import Mapping
from typing import Any

EMBEDDING = "X_stimg"
DOMAIN = "stimg_domain"
BIN = "stimg_bin"
UNS = "stimg"
OF_EMBEDDING = "embedding"
OF_DOMAINS = "domains"


def colours_key(domain_key: str) -> str:
    """Key in `uns` of the colours of a categorical column, as scanpy calls it."""
    return f"{domain_key}_colors"


def check_uns(uns: Mapping[str, Any]) -> None:
    """Raise ValueError where `uns["stimg"]` is taken by something else: told before the work, not after it."""
    for place, value in ((UNS, uns.get(UNS, {})), *((f"{UNS}/{k}", told(uns, k)) for k in (OF_EMBEDDING, OF_DOMAINS))):
        if not isinstance(value, Mapping):
            raise ValueError(
                f"uns[{place!r}] is a {type(value).__name__}: stimg writes there what it did; rename or remove it."
            )


def told(uns: Mapping[str, Any], kind: str) -> Any:
    """What `uns["stimg"]` tells of one kind (`OF_EMBEDDING`, `OF_DOMAINS`), by key; empty where it tells nothing."""
    section = uns.get(UNS, {})
    return section.get(kind, {}) if isinstance(section, Mapping) else {}


def tell(uns: Any, kind: str, key: str, what: Mapping[str, Any]) -> None:
    """Write what was done into `uns["stimg"][kind][key]`, in place of what stood there; the rest stays."""
    check_uns(uns)
    uns[UNS] = {**uns.get(UNS, {}), kind: {**told(uns, kind), key: dict(what)}}
