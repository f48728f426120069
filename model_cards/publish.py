r"""Check a model's folder, or a corpus, and upload it to the Hub in one commit.

    python model_cards/publish.py model_cards/NAME --repo ORG/NAME --dry-run
    python model_cards/publish.py model_cards/NAME --repo ORG/NAME --private --revision v1
    python model_cards/publish.py corpus --repo ORG/NAME

A folder with `corpus.json` is a dataset. The repository holds exactly the files of the folder afterwards: what it held
beside them is removed by the same commit, and stays in its history. `--dry-run` does everything but the upload. The
code in a model's folder is run, in a process without this package, to see that it loads and embeds.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import CommitInfo, DatasetCard, HfApi, ModelCard, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from data_processing.open_corpus import CORPUS_FILE
from model_cards import model_checks
from model_cards.card_facts import ModelFolder
from model_cards.model_index import eval_results
from train.pushing import NotPushedError, pushing

MODEL, DATASET = "model", "dataset"


def kind_of(folder: Path) -> str:
    """`"dataset"` for a corpus, `"model"` for anything else."""
    return DATASET if (folder / CORPUS_FILE).exists() else MODEL


def check_folder(folder: Path, kind: str, repo: str) -> Iterator[str]:
    """Everything that can be checked here, telling what holds, one sentence at a time.

    Raises:
        ValueError, OSError: what does not hold, in one sentence.
    """
    if kind == DATASET:
        from model_cards.corpus_checks import check_corpus_folder  # the libraries of `data` are not needed for a model

        yield from check_corpus_folder(folder)
    else:
        yield from model_checks.check_model_folder(folder)
    yield check_card(folder, kind, repo)


def published_files(folder: Path, kind: str) -> list[Path]:
    """What would be uploaded."""
    if kind == DATASET:
        from model_cards.corpus_checks import published_files as of_corpus

        return of_corpus(folder)
    return model_checks.published_files(folder)


def check_card(folder: Path, kind: str, repo: str) -> str:
    """The metadata of `README.md`, as far as it can be checked without the Hub.

    Raises:
        ValueError: no metadata, a field that is missing, or numbers that are not those of the results.
    """
    text = (folder / "README.md").read_text(encoding="utf-8")
    try:
        card = (DatasetCard if kind == DATASET else ModelCard)(text)
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The metadata of {folder / 'README.md'} cannot be read ({reason}): write it anew.") from error
    if not text.startswith("---"):
        raise ValueError(f"{folder / 'README.md'} has no metadata: python model_cards/card.py writes a model's card.")
    needed = ("license", "configs") if kind == DATASET else ("license", "library_name", "pipeline_tag", "tags")
    missing = [name for name in needed if not card.data.get(name)]
    if missing:
        raise ValueError(f"The metadata of {folder / 'README.md'} lacks {', '.join(missing)}.")
    if kind == DATASET:
        return "the card has its metadata"
    facts = ModelFolder(folder)
    if facts.options.repo != repo:
        raise ValueError(
            f"The card is that of {facts.options.repo}, to be published as {repo}: write it anew, python "
            f"model_cards/card.py {folder} --repo {repo}."
        )
    told = sorted(map(repr, card.data.eval_results or []))
    if told != sorted(map(repr, eval_results(facts))):
        raise ValueError(
            f"The model-index of {folder / 'README.md'} is not that of its results: write the card anew, python "
            f"model_cards/card.py {folder}."
        )
    return f"the card's model-index has {len(told)} metrics, those of its results"


def upload(folder: Path, kind: str, repo: str, private: bool, revision: str | None) -> CommitInfo:
    """Upload the folder's files in one commit.

    Raises:
        ValueError: the Hub does not accept the card's metadata, or the repository is there already and not private.
        NotPushedError: anything else; the repository's files are what they were.
    """
    api = HfApi()
    with pushing(f"{folder} is not published, and what {repo} held is unchanged"):
        validate_metadata((folder / "README.md").read_text(encoding="utf-8"), kind)
        api.create_repo(repo, private=private, repo_type=kind, exist_ok=True)
        if private and not api.repo_info(repo, repo_type=kind).private:
            raise ValueError(
                f"{repo} is there already, and public: --private makes a new repository a private one; change it on "
                f"{constants.ENDPOINT}, or leave --private out."
            )
        if revision is not None:
            api.create_branch(repo, branch=revision, repo_type=kind, exist_ok=True)
        return api.upload_folder(
            repo_id=repo,
            repo_type=kind,
            folder_path=folder,
            revision=revision,
            allow_patterns=[path.relative_to(folder).as_posix() for path in published_files(folder, kind)],
            delete_patterns="*",
            commit_message=f"Publish {folder.resolve().name}",
        )


def validate_metadata(card: str, kind: str) -> None:
    """Ask the Hub, before anything is made there, whether it accepts a card's metadata.

    `RepoCard.validate` of huggingface_hub 1 asks huggingface.co whatever HF_ENDPOINT says.

    Raises:
        ValueError: it does not.
    """
    address, told = f"{constants.ENDPOINT}/api/validate-yaml", {"content": card, "repoType": kind}
    response = get_session().post(address, json=told, headers=build_hf_headers())
    if response.status_code == 400:
        errors = "; ".join(" ".join(str(error.get("message")).split()) for error in response.json().get("errors", []))
        raise ValueError(f"{constants.ENDPOINT} does not accept the metadata of README.md: {errors}.")
    hf_raise_for_status(response)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="Folder of a model, or a corpus.")
    parser.add_argument("--repo", required=True, help="ORG/NAME on the Hub.")
    parser.add_argument("--type", choices=(MODEL, DATASET), help="Default: dataset where there is a corpus.json.")
    parser.add_argument("--private", action="store_true", help="Where the repository is new, make it a private one.")
    parser.add_argument("--revision", help="Branch to commit to, made where it is missing; default: main.")
    parser.add_argument("--dry-run", action="store_true", help="Check, and tell what would be uploaded.")
    arguments = parser.parse_args(argv)
    folder, repo = arguments.folder, arguments.repo
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    validate_repo_id(repo)
    if repo.count("/") != 1:
        raise ValueError(f"--repo is {repo!r}: expected ORG/NAME.")
    kind = arguments.type or kind_of(folder)
    for sentence in check_folder(folder, kind, repo):
        print(f"ok: {sentence}")
    where = f"{kind} {repo}, branch {arguments.revision or 'main'}{', private' if arguments.private else ''}"
    files = published_files(folder, kind)
    if arguments.dry_run:
        print(f"Would be uploaded in one commit to {where}:")
        for path in files:
            print(f"{path.stat().st_size:>14,}  {path.relative_to(folder).as_posix()}")
        return
    commit = upload(folder, kind, repo, arguments.private, arguments.revision)
    print(f"{len(files)} files are in {where}, as {repo}@{commit.oid}: {commit.commit_url}")


def command_line(argv: list[str] | None = None) -> int:
    """`main`, with one sentence in place of a traceback; returns the exit status."""
    try:
        main(argv)
    except (ValueError, OSError, ImportError, HFValidationError) as error:
        # A bar of an upload that broke off stands on the line.
        new_line = "\n" if isinstance(error, NotPushedError) else ""
        print(f"{new_line}error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
