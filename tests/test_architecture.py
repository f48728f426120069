"""Who may import whom, and what the Hub files may import at all."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "modeling_stimg": {"modeling_stimg"},
    "data_processing": {"modeling_stimg", "data_processing"},
    "train": {"modeling_stimg", "data_processing", "train"},
    # Training baselines is the one thing that evaluation may ask of training.
    "eval": {"modeling_stimg", "data_processing", "eval"},
    "eval/baselines": {"modeling_stimg", "data_processing", "eval", "train"},
    # What is published tells of all the others.
    "model_cards": {"modeling_stimg", "data_processing", "train", "eval", "model_cards"},
    "docs": {"modeling_stimg", "data_processing", "docs"},
}
ROOMS = {"modeling_stimg", "data_processing", "train", "eval", "model_cards", "docs"}
# All of them come with transformers.
HUB_IMPORTS = {"numpy", "torch", "transformers", "huggingface_hub", "safetensors", "tqdm"}


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import statement of a file, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def python_files(folder: str) -> list[Path]:
    if folder == "model_cards":  # each folder in it is the content of a Hub repository
        return sorted((ROOT / folder).glob("*.py"))
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_import_only_what_they_may(room: str):
    assert python_files(room)
    for path in python_files(room):
        folder = path.parent.relative_to(ROOT).as_posix()
        allowed = ALLOWED.get(folder, ALLOWED[room])
        for level, module in imports(path):
            top = module.split(".")[0]
            assert level == 0 or room == "modeling_stimg", f"{path}: relative imports are for the library"
            assert top not in ROOMS or level or top in allowed, f"{path} imports {module}"


def test_hub_files_import_their_neighbours_and_what_comes_with_transformers_alone():
    files = sorted((ROOT / "modeling_stimg").glob("*_stimg.py"))
    assert len(files) >= 7
    for path in files:
        for level, module in imports(path):
            if level:
                assert level == 1, path
                assert module.endswith("_stimg"), f"{path} imports .{module}, which does not travel with the weights"
            else:
                top = module.split(".")[0]
                assert top in HUB_IMPORTS or top in sys.stdlib_module_names, f"{path} imports {module}"


def test_importing_the_package_leaves_the_heavy_libraries_alone():
    import subprocess

    code = """
import sys, modeling_stimg
print([m for m in ("anndata", "matplotlib", "pandas", "sklearn") if m in sys.modules])
import modeling_stimg.cli
print([m for m in ("anndata", "matplotlib", "pandas", "sklearn") if m in sys.modules])
modeling_stimg.pl.domains
print([m for m in ("anndata", "matplotlib", "sklearn") if m in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["[]"] * 3


def test_public_names_are_all_importable():
    import modeling_stimg

    for name in modeling_stimg.__all__:
        assert getattr(modeling_stimg, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        modeling_stimg.nonsense  # noqa: B018
