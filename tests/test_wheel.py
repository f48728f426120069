"""The wheel: what is in it, and that it works where the tree is not."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from anndata import AnnData, read_h5ad
from check_wheel import HEAVY, ROOT, binaries, build_wheel, import_report, run

import modeling_stimg


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="hatchling builds the wheel: pip install -e '.[dev]'")
    return build_wheel(sys.executable, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone, and behind it the packages of the present one, but not the tree."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    # .pth files in a folder that is named in one are not read, so that an editable install stays unknown.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", binaries(folder) / "python", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    return folder


def test_the_wheel_holds_the_library_its_licence_and_its_command(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        told = Parser().parsestr(archive.read(metadata).decode())
        commands = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    info = metadata.removesuffix("METADATA")
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "modeling_stimg").rglob("*.py")}
    assert {name for name in names if not name.startswith(info)} == library | {"modeling_stimg/py.typed"}
    assert {name.removeprefix(info) for name in names if name.startswith(info)} == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }
    assert (told["Name"], told["Version"]) == ("stimg", modeling_stimg.__version__)
    assert "stimg = modeling_stimg.cli:main" in commands
    assert {"plot", "domains", "dev"} <= set(told.get_all("Provides-Extra"))


def test_importing_what_is_installed_loads_nothing_heavy(environment: Path, tmp_path: Path):
    python = binaries(environment) / "python"
    report = import_report(python, tmp_path)
    assert environment in Path(report["file"]).parents
    milliseconds = {part: round(1000 * report[part]) for part in ("bare", "asked", "own")}
    print(f"import modeling_stimg: {milliseconds} ms")
    assert report["new"] == ["modeling_stimg"], "everything else is imported where it is used"
    # transformers imports scipy by itself, where it is there.
    assert set(report["loaded"]) & set(HEAVY) <= {"scipy"}


def test_the_installed_command_embeds_a_slide(
    environment: Path, checkpoint: Path, slides: dict[str, AnnData], tmp_path: Path
):
    slides["square"].write_h5ad(tmp_path / "slide.h5ad")
    command = binaries(environment) / "stimg"
    run(command, "embed", "slide.h5ad", "--model", checkpoint, "--output", "x.h5ad", "--device", "cpu", cwd=tmp_path)
    embedding = read_h5ad(tmp_path / "x.h5ad").obsm["X_stimg"]
    assert embedding.shape == (slides["square"].n_obs, 32)
    assert "reconstruct" in run(command, "--help", cwd=tmp_path).stdout
    # From another folder, the recipes are not there.
    look = "import importlib.util; print([importlib.util.find_spec(n) for n in ('data_processing', 'train', 'eval')])"
    assert run(binaries(environment) / "python", "-c", look, cwd=tmp_path).stdout.strip() == "[None, None, None]"
