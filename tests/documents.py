"""What stands in the pages: code blocks, commands with their words, links and headings; and a folder to run them in."""

import argparse
import importlib
import inspect
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import typer

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Of the shell, and programs of others.
_OTHERS = {"export", "for", "done", "pip", "hf"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text and the line of the page on which the text begins."""

    language: str
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page that name a language."""
    return [Block(m[1], m[2], text[: m.start()].count("\n") + 2) for m in _BLOCK.finditer(text)]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of every command of a block of bash: lines that go on joined, variables 1, comments left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"\$\{.*?\}|\$\w+", "1", re.sub(r"(^|\s)#.*", "", line)))
        while words and (words[0] == "do" or re.fullmatch(r"[A-Z_]+=\S*", words[0])):
            words = words[1:]
        if words:
            yield words


def prose(text: str) -> str:
    """A page without its code, where brackets mean other things."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def links(text: str) -> list[str]:
    """Targets of all Markdown links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---------------------------------------------------------------- commands


class Parsed(Exception):
    """A parser took all words; nothing after it is to run."""


@pytest.fixture
def no_further_than_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """argparse raises `Parsed` where it would hand its result on. Parsers of a flag or two only look ahead."""
    parse = argparse.ArgumentParser.parse_known_args

    def parsed(self, args=None, namespace=None):
        found, rest = parse(self, args, namespace)
        if len(self._actions) <= 2:
            return found, rest
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parsed)


def check_command(words: Sequence[str]) -> None:
    """Fail unless a command of a page exists and takes its words; nothing is run.

    The fixture `no_further_than_parsing` has to be there.
    """
    program, *rest = words
    if program == "stimg":
        from modeling_stimg.cli import app

        _check_typer(typer.main.get_command(app), rest)
    elif program == "python":
        _check_script(rest[0], rest[1:])
    elif program == "accelerate":
        _check_launch(rest)
    elif program == "make":
        target = rest[0]
        assert re.search(rf"^{re.escape(target)}:", page("Makefile"), re.MULTILINE), (
            f"no target {target} in the Makefile"
        )
    else:
        assert program in _OTHERS, f"{program}: no command that this test knows"


def _check_launch(words: Sequence[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    parser = launch_command_parser()
    script = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "modeling_stimg.cli")
    parser.prog = "accelerate launch"
    with pytest.raises(Parsed):
        parser.parse_args(words[1 : script + 1])
    for place, word in enumerate(words[:script]):
        assert word != "--config_file" or (ROOT / words[place + 1]).is_file(), words[place + 1]
    if words[script] == "modeling_stimg.cli":
        check_command(["stimg", *words[script + 1 :]])
    else:
        _check_script(words[script], words[script + 1 :])


def _check_script(path: str, words: Sequence[str]) -> None:
    assert (ROOT / path).is_file(), f"there is no {path}"
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    if hasattr(module, "app"):
        _check_typer(typer.main.get_command(module.app), words)
    elif "argv" in inspect.signature(module.main).parameters:
        with pytest.raises(Parsed):
            module.main(list(words))
    else:
        app = typer.Typer()
        app.command()(module.main)
        _check_typer(typer.main.get_command(app), words)


def _check_typer(command: typer.core.TyperCommand, words: Sequence[str]) -> None:
    if hasattr(command, "commands"):
        assert words[0] in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    try:
        command.make_context(command.name, list(words))
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error of click, or of the copy of it that typer brings
            raise
        raise AssertionError(f"{' '.join(words)}: {error.format_message()}") from error


# ---------------------------------------------------------------- a folder in which everything is that pages name


def write_desk(folder: Path, model: Path, slides: Sequence) -> None:
    """What the pages name, written: a model under every name, slides in several formats, the project's own folders.

    Args:
        model: a checkpoint. slides: three staggered ones, whose genes the model knows.
    """
    import anndata

    for name in ("model_cards/stimg-mae-16x16x512", "ORG/NAME", "runs/mine"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(model)
    for name in ("train", "eval", "data_processing"):
        (folder / name).symlink_to(ROOT / name)
    first, second, third = slides
    write_outs(folder / "outs", first)
    first.write_h5ad(folder / "slide.h5ad")
    (folder / "slides").mkdir()
    second.write_h5ad(folder / "slides" / "a.h5ad")
    third.write_h5ad(folder / "slides" / "b.h5ad")
    anndata.concat({"a": second, "b": third}, label="sample", index_unique="-").write_h5ad(folder / "both.h5ad")
    normalised = second.copy()
    normalised.layers["counts"] = normalised.X.copy()
    normalised.X = normalised.X.log1p()
    normalised.write_h5ad(folder / "normalised.h5ad")
    cells = third.copy()
    jitter = np.random.default_rng(0).uniform(0, 30, (cells.n_obs, 2))
    cells.obsm["spatial"] = 60 * cells.obsm["spatial"] + jitter
    del cells.obs["array_row"], cells.obs["array_col"]
    cells.obs_names = [f"cell {i}" for i in range(cells.n_obs)]
    cells.write_h5ad(folder / "xenium.h5ad")


def write_outs(outs: Path, slide) -> None:
    """A Space Ranger output folder."""
    from slide_files import position_table, write_10x_h5, write_positions

    (outs / "spatial").mkdir(parents=True)
    genes = list(slide.var_names)
    features = {"id": genes, "name": genes, "feature_type": ["Gene Expression"] * len(genes)}
    write_10x_h5(outs / "filtered_feature_bc_matrix.h5", slide.X.astype(np.int32), list(slide.obs_names), features)
    write_positions(outs / "spatial" / "tissue_positions.csv", position_table(slide))


def run_command(words: Sequence[str]) -> subprocess.CompletedProcess:
    """`stimg ...` in this process; patterns of files are expanded as a shell does."""
    from command_line import stimg

    expanded: list[str] = []
    for word in words[1:]:
        expanded += sorted(map(str, Path().glob(word))) if "*" in word else [word]
    return stimg(*expanded)
