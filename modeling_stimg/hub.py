"""A model or a corpus by its name: a folder, or a repository of the Hugging Face Hub at one of its revisions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .model_files import check_model_files, check_model_type, read_json

PROCESSOR_FILE = "preprocessor_config.json"
# All that the package reads of a repository; its code files are this package's own.
FILES = ("config.json", PROCESSOR_FILE, "genes.json", "pretraining.json")
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


# How the Hub calls what is called so here, and where its repositories of that kind are.
KINDS = {"model": ("model", ""), "corpus": ("dataset", "datasets/")}


# Of this checkout; an installed package has none.
PUBLISHED = Path(__file__).parents[1] / "model_cards" / "stimg-mae-16x16x512"


@dataclass(frozen=True)
class Found:
    """A model or a corpus on this machine.

    Attributes:
        name: the folder's own name, or the Hub id. folder: where its files are. commit: of the Hub; None of a folder.
    """

    name: str
    folder: Path
    commit: str | None = None

    @property
    def hub(self) -> str | None:
        """`ORG/NAME@COMMIT`, None of a folder: what to give to get the very same files again."""
        return None if self.commit is None else f"{self.name}@{self.commit}"


def find_model(given: str | None, revision: str | None = None, weights: bool = True) -> Found:
    """The model of a folder, or of the Hub, whose files are downloaded into the cache where they are not in it yet.

    Args:
        given: a folder, `ORG/NAME`, or `ORG/NAME@REVISION` with a branch, a tag or a commit id; None: the model that
            is published in this checkout.
        revision: the same, given apart. weights: whether they are needed.

    Raises:
        FileNotFoundError: no such folder or repository, or one without a model in it; or a private one.
        ValueError: a revision of a folder, or two of them; a model of another type, or damaged weights.
        OSError: the Hub cannot be reached, or refuses the token.
    """
    if given is None:
        if not (PUBLISHED / PROCESSOR_FILE).exists():
            raise ValueError(
                "No model is given, and this is no checkout with a published one: name a folder or a Hub id "
                "(ORG/NAME, ORG/NAME@REVISION)."
            )
        if revision is not None:
            raise ValueError(f"The revision {revision!r} is given without a model: only a Hub model has revisions.")
        given = str(PUBLISHED)
    found = find_files(given, FILES + WEIGHTS if weights else FILES, revision)
    _check(found.folder, given, weights)
    return found


def find_files(given: str, files: Sequence[str], revision: str | None = None, kind: str = "model") -> Found:
    """The files of a model or a corpus, unlooked at.

    Args:
        given, revision: as in `find_model`. files: patterns of what is needed of a repository. kind: one of `KINDS`.

    Raises:
        FileNotFoundError: no such folder or repository; or a private one. ValueError: a revision of a folder, or two
        of them. OSError: the Hub cannot be reached, or refuses the token.
    """
    folder = Path(given)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"{given} is a folder and has no revision {revision!r}: leave it out, or name a model of the Hub."
            )
        return Found(folder.resolve().name, folder)
    name, at, named = given.partition("@")
    if folder.is_absolute() or given.startswith(".") or not _REPOSITORY.fullmatch(name) or (at and not named):
        raise FileNotFoundError(
            f"There is no {kind} folder {given}: give a folder or a Hub id (ORG/NAME, ORG/NAME@REVISION)."
        )
    if named and revision is not None and named != revision:
        raise ValueError(f"{given} names a revision, and {revision!r} is another one: give one of them.")
    folder = _download(name, named or revision, files, kind)
    return Found(name, folder, folder.name)


def _check(folder: Path, given: str, weights: bool) -> None:
    """The folder has to hold a model of ours, as far as its files tell without being loaded."""
    if not (folder / PROCESSOR_FILE).exists():
        raise FileNotFoundError(
            f"{given} holds no {PROCESSOR_FILE}: expected a model folder, as train/run_pretrain.py writes it."
        )
    read_json(folder / PROCESSOR_FILE, given)
    if weights:
        check_model_files(folder, given)
    else:
        check_model_type(folder, given)


def _download(name: str, revision: str | None, files: Sequence[str], kind: str) -> Path:
    """The folder of a repository's snapshot; every way of not having one as one sentence."""
    shown = name if revision is None else f"{name}@{revision}"
    repo_type, place = KINDS[kind]
    try:
        return Path(snapshot_download(name, repo_type=repo_type, revision=revision, allow_patterns=list(files)))
    except GatedRepoError:
        raise FileNotFoundError(
            f"{name} is for those who asked for it: ask on {constants.ENDPOINT}/{place}{name}, then log in (hf auth "
            "login)."
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"There is no {kind} folder {name}, and no {repo_type} {name} on {constants.ENDPOINT}, or it is private: "
            "check the name, or log in (hf auth login, or HF_TOKEN) with a token that may read it."
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(
            f"{name} has no revision {revision!r}: expected a branch, a tag or a whole commit id."
        ) from None
    except LocalEntryNotFoundError as error:
        if is_offline_mode():
            raise FileNotFoundError(
                f"{shown} is not in the cache ({constants.HF_HUB_CACHE}), or not all of it, and HF_HUB_OFFLINE is set: "
                f"unset it once to download the {kind}, or give a folder."
            ) from None
        raise OSError(_not_reached(shown, error)) from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise OSError(
                f"{constants.ENDPOINT} refuses the token that is set: log in again (hf auth login), or mend HF_TOKEN."
            ) from None
        raise OSError(_not_reached(shown, error)) from None
    except HTTPError as error:
        raise OSError(_not_reached(shown, error)) from None


def _not_reached(shown: str, error: Exception) -> str:
    reason = error.__cause__ or error
    return (
        f"{shown} is no folder here, and could not be downloaded from {constants.ENDPOINT} ({type(reason).__name__}): "
        "look to the connection and give the same command again, which goes on where it was."
    )


__all__ = ["Found", "find_files", "find_model"]
