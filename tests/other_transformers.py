r"""The model, its processor, the Auto classes and the embedding with another version of transformers.

    python tests/other_transformers.py 5.17.0 [pytest arguments]

Makes a second environment beside the first, `.cache/transformers-5.17.0`: that version and whatever it needs in other
versions than are installed (found by pip; never torch, which transformers does not ask for), and behind them all
packages of the environment that runs this. Then runs the tests below in it, each in processes of that environment.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache"
FINISHED = ".finished"
# Not test_transformers_image_processor.py: the common tests that it fits into have another form in 5.17.
TESTS = (
    *("test_modeling.py", "test_processing.py", "test_embedding.py", "test_auto_classes.py", "test_trust.py"),
    *("test_reconstruction.py", "test_transformers_common.py", "test_publish.py", "test_card.py", "test_hub.py"),
    *("test_pretrain.py", "test_resume.py", "test_continue.py"),
)


def needed(version: str) -> list[str]:
    """Packages, as name==version, that the present environment lacks for that version of transformers.

    Raises:
        ValueError: pip finds none; the sentence is pip's last.
    """
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"]
    run = subprocess.run(
        [*pip, "--report", "-", f"transformers=={version}"], capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise ValueError((run.stderr.strip().splitlines() or ["pip failed and said nothing"])[-1])
    found = [item["metadata"] for item in json.loads(run.stdout)["install"]]
    return sorted(f"{item['name']}=={item['version']}" for item in found)


def make_environment(version: str) -> Path:
    """The environment's Python; made if it is not there, with what is needed found anew.

    Raises:
        ValueError: it cannot be had.
    """
    folder = CACHE / f"transformers-{version}"
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if (folder / FINISHED).exists():
        return python
    packages = needed(version)
    venv.create(folder, clear=True, symlinks=os.name != "nt", with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    if packages:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        run = subprocess.run([*pip, "--target", str(site), *packages], capture_output=True, text=True, check=False)
        if run.returncode:
            raise ValueError((run.stderr.strip().splitlines() or ["pip failed and said nothing"])[-1])
    # A path in a .pth file comes after the folder that holds it, so its own packages go before those of the first.
    (site / "first_environment.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    (folder / FINISHED).write_text("\n".join(packages) + "\n", encoding="utf-8")
    return python


def main(argv: list[str] | None = None) -> int:
    """Run the tests; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("version", help="Of transformers, such as 5.17.0.")
    arguments, further = parser.parse_known_args(argv)
    try:
        python = make_environment(arguments.version)
    except (ValueError, OSError) as error:
        print(f"error: no environment with transformers {arguments.version}: {error}", file=sys.stderr)
        return 2
    tell = "import transformers, huggingface_hub as h, torch; print('transformers', transformers.__version__, "
    tell += "'huggingface_hub', h.__version__, 'torch', torch.__version__)"
    subprocess.run([python, "-c", tell], check=True, cwd=ROOT)
    given = any(word.split("::")[0].endswith(".py") for word in further)
    tests = [] if given else [str(ROOT / "tests" / name) for name in TESTS]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([python, "-m", "pytest", *further, *tests], cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
