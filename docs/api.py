"""docs/api.md from the docstrings of everything that `modeling_stimg` offers; nothing of it is imported for that.

python docs/api.py
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_processing.writing import write_whole

if TYPE_CHECKING:
    from griffe import Class, Function, Module, Object

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_suffix(".md")
PACKAGE = "modeling_stimg"
# Chapters and what stands in them: names of `__all__`, and with dots what these refer to.
CHAPTERS = {
    "Slides": ("read_slide", "read_cells", "bin_cells"),
    "Embeddings and domains": ("embed_slide", "find_domains", "reconstruct_region"),
    "Maps": ("pl", "plot_domains"),
    "Slides as images": ("GeneVocabulary", "STPatchProcessor", "SlideImage"),
    "Models": ("STImageMAEConfig", "STImageMAEModel", "STImageMAEForPreTraining", "STFeatureExtractionPipeline"),
    "What the options mean": ("embedding_stimg.embed_image", "reconstruction_stimg.reconstruct_spots"),
}
_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):$")
_TITLES = {"Args": "Arguments"}
# Members that are shown though their names begin with an underscore.
_CALLED = ("__call__",)


def page() -> str:
    """The whole page.

    Raises:
        ValueError: a public name that no chapter has, or the other way round.
    """
    package = load_package()
    public = set(package.exports or ())
    chosen = {name for names in CHAPTERS.values() for name in names if "." not in name}
    if public != chosen:
        raise ValueError(f"CHAPTERS and __all__ differ in {sorted(map(str, public ^ chosen))}: name all, once.")
    lines = [
        "# API reference",
        "",
        f"Everything that `{PACKAGE}` offers; `import {PACKAGE}` also registers the model with transformers' Auto",
        "classes. Made from the docstrings by `python docs/api.py`: change those, not this page.",
        "[howto.md](howto.md) shows how the pieces go together.",
        "",
    ]
    for chapter, names in CHAPTERS.items():
        lines += [f"**{chapter}**: {', '.join(f'[`{_short(name)}`](#{_anchor(name)})' for name in names)}", ""]
    for chapter, names in CHAPTERS.items():
        lines += [f"## {chapter}", ""]
        for name in names:
            lines += of_object(name, resolved(package, name), public)
    return "\n".join(lines).rstrip() + "\n"


def load_package() -> "Module":
    """The package as griffe reads it, without importing it."""
    from griffe import GriffeLoader

    loader = GriffeLoader(search_paths=[ROOT])
    package = loader.load(PACKAGE)
    loader.resolve_aliases(implicit=True)
    return package


def resolved(package: "Module", name: str) -> "Object":
    """What a name of the package stands for."""
    found = package[name]
    return found.final_target if found.is_alias else found


def of_object(name: str, item: "Object", public: set[str]) -> list[str]:
    """Lines of a function, of a class with its methods, or of a module with its functions."""
    lines = [f"### {_short(name)}", ""]
    if item.is_module:
        lines += [*of_docstring(item, public), ""]
        for member in sorted(map(str, item.exports)):
            lines += [f"#### {name}.{member}", "", *signature(item[member], f"{name}.{member}")]
            lines += [*of_docstring(item[member], public - {name}), ""]
        return lines
    lines += [*signature(item, _short(name)), *of_docstring(item, public - {name}), ""]
    if item.is_class:
        for member in methods(item):
            called = f"{_short(name)}.{member.name}"
            lines += [f"#### {called}", "", *signature(member, called), *of_docstring(member, public - {name}), ""]
    return lines


def methods(item: "Class") -> Iterable[Any]:
    """Public methods and properties with a docstring, those of bases of this package too: as they stand in the code."""
    found: dict[str, Any] = {}
    for owner in (item, *item.mro()):
        if owner.canonical_path.startswith(PACKAGE):
            for member in owner.members.values():
                described = not member.is_alias and (member.is_function or member.is_attribute) and member.docstring
                if described and (not member.name.startswith("_") or member.name in _CALLED):
                    found.setdefault(member.name, member)
    return found.values()


def signature(item: Any, called: str) -> list[str]:
    """A code block: how something is called, with its annotations and defaults."""
    if item.is_attribute:
        annotation = f": {item.annotation}" if item.annotation else ""
        return ["```python", f"{called}{annotation}", "```", ""]
    function: Function | None = item.members.get("__init__") if item.is_class else item
    if function is None:
        fields = [m for m in item.members.values() if m.is_attribute and m.annotation]
        return block(called, [f"{field.name}: {field.annotation} = {field.value}" for field in fields], "")
    parameters, star = [], False
    for parameter in function.parameters:
        if parameter.name in ("self", "cls"):
            continue
        kind = parameter.kind.value
        if kind == "keyword-only" and not star:
            parameters.append("*")
        star = star or kind in ("keyword-only", "variadic positional")
        stars = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        annotation = f": {parameter.annotation}" if parameter.annotation is not None else ""
        default = "" if stars or parameter.default is None else f" = {parameter.default}"
        parameters.append(f"{stars}{parameter.name}{annotation}{default}")
    return block(called, parameters, f" -> {function.returns}" if function.returns and not item.is_class else "")


def block(called: str, parameters: list[str], returns: str) -> list[str]:
    """A call as code, a parameter a line where one line would be long."""
    line = f"{called}({', '.join(parameters)}){returns}"
    if len(line) > 100:
        line = f"{called}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){returns}"
    return ["```python", line, "```", ""]


def of_docstring(item: Any, public: set[str]) -> list[str]:
    """A docstring as Markdown: text as it stands, items of `Args:`, `Raises:` and `Attributes:` as lists.

    Raises:
        ValueError: there is none.
    """
    if item.docstring is None:
        raise ValueError(f"{item.canonical_path} has no docstring.")
    parameters = [p.name for p in item.parameters] if item.is_function or item.is_class else []
    lines, section, body = [], "", []

    def finish() -> None:
        text = _dedent(body)
        if section:
            lines.extend([f"**{_TITLES.get(section, section)}**", ""])
        lines.extend(text if section in ("", "Returns", "Yields") else list_items(text, parameters))
        lines.append("")

    for line in item.docstring.value.splitlines():
        found = _SECTION.match(line)
        if found:
            finish()
            section, body = found[1], []
        elif section and line and not line.startswith(" "):  # text after a section
            finish()
            section, body = "", [line]
        else:
            body.append(line)
    finish()
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    return linked(text, public).splitlines()


def list_items(lines: list[str], parameters: list[str]) -> list[str]:
    """`name: text` with continuation lines, as a list; what `Args` tell of a second one on the same line, by itself."""
    items: list[str] = []
    for line in lines:
        if line and not line.startswith(" "):
            items.append(line)
        elif line and items:
            items[-1] += f" {line.strip()}"
    names = "|".join(map(re.escape, parameters))
    split = [part for item in items for part in (re.split(rf"(?<=\.) (?=(?:{names}): )", item) if names else [item])]
    return [re.sub(r"^(\w[\w, ]*?)( \(.*?\))?: ", lambda m: f"- {_names(m[1])}{m[2] or ''}: ", item) for item in split]


def _names(text: str) -> str:
    """`a, b` with each name as code."""
    return ", ".join(f"`{name.strip()}`" for name in text.split(","))


def _dedent(lines: list[str]) -> list[str]:
    """Lines without the indentation that all of them share; empty ones at both ends are left out."""
    from textwrap import dedent

    return dedent("\n".join(lines)).strip("\n").splitlines()


def linked(text: str, public: set[str]) -> str:
    """Markdown in which the other names of the page are links."""
    there = {_short(name): _anchor(name) for names in CHAPTERS.values() for name in names}
    there = {name: anchor for name, anchor in there.items() if name in public or "." in _full(name)}
    names = "|".join(map(re.escape, there))
    return re.sub(rf"(?<!\[)`({names})`", lambda found: f"[`{found[1]}`](#{there[found[1]]})", text)


def _full(short: str) -> str:
    return next(name for names in CHAPTERS.values() for name in names if _short(name) == short)


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _anchor(name: str) -> str:
    return _short(name).lower()


def main(
    output: Annotated[Path, typer.Option(help="The page to write.")] = PAGE,
) -> None:
    """Write the API reference."""
    write_whole(output, page().encode())


if __name__ == "__main__":
    typer.run(main)
