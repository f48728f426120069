"""Runs one of the suites beside this file where it belongs: inside the `tests` package of the installed transformers
version, which only the source distribution holds."""

import ast
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"
SUITES = Path(__file__).parent


def run_common_tests(suite: str, folder: Path, **environment: str) -> dict[str, int]:
    """Unpack transformers' tests and run a suite among them.

    Args:
        suite: name of a file beside this one.
        folder: an empty folder to unpack into.
        environment: variables for the run, besides the present ones.

    Returns:
        How many tests "passed" and were "skipped"; one that failed has failed the calling test.
    """
    tests = unpack_source_tests(folder)
    # The common tests take the model's name from the folder that a suite lies in.
    target = tests / "models" / "st_image_mae" / f"test_{suite}"
    target.write_text((SUITES / suite).read_text(encoding="utf-8"), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", str(target)],
        cwd=tests.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", run.stdout[-2000:])}
    print(suite, "with the common tests of transformers", transformers.__version__, counts)
    assert run.returncode == 0, run.stdout[-6000:]
    assert counts.get("failed", 0) == counts.get("error", 0) == 0
    return counts


def unpack_source_tests(folder: Path) -> Path:
    """The `tests` package of the installed transformers version, unpacked into `folder`."""
    name = f"transformers-{transformers.__version__}"
    archive = CACHE / f"{name}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        fetched = subprocess.run(
            [*command, "--dest", str(CACHE), f"transformers=={transformers.__version__}"],
            capture_output=True,
            text=True,
            check=False,
        )
        if not archive.exists():
            reason = (fetched.stderr.strip().splitlines() or ["no message"])[-1]
            pytest.skip(f"the source distribution of {name} could not be had: {reason}")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, [m for m in tar.getmembers() if m.name.startswith(f"{name}/tests/")], filter="data")
    tests = folder / name / "tests"
    add_missing_modules(tests)
    return tests


def add_missing_modules(tests: Path) -> None:
    """Write stand-ins for what the common tests import but the source distribution leaves out.

    A missing mixin (export, generation) becomes an empty class; anything else a function that fails when called.
    """
    for package in (tests, tests / "models", tests / "models" / "st_image_mae"):
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
    (tests.parent / "utils").mkdir(exist_ok=True)
    (tests.parent / "utils" / "fetch_hub_objects_for_ci.py").write_text("def url_to_local_path(url):\n    return url\n")
    for source in tests.glob("test_*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.ImportFrom) and node.level == 1 and node.module):
                continue
            target = tests.joinpath(*node.module.split(".")).with_suffix(".py")
            if target.exists() and not target.read_text(encoding="utf-8").startswith("# stand-in"):
                continue
            target.parent.mkdir(exist_ok=True)
            (target.parent / "__init__.py").touch()
            present = target.read_text(encoding="utf-8") if target.exists() else "# stand-in\n"
            for name in (alias.name for alias in node.names):
                if f" {name}" not in present:
                    present += stand_in(name)
            target.write_text(present, encoding="utf-8")


def stand_in(name: str) -> str:
    """Source of a class that holds nothing, or of a function that fails when called."""
    if name.endswith(("Mixin", "Tester")):
        return f"class {name}:\n    pass\n"
    if name.endswith("kwargs"):
        return f"{name} = {{}}\n".replace(f"{name} =", f"# {name}\n{name} =")
    return f"def {name}(*args, **kwargs):\n    raise NotImplementedError({name!r})\n"
