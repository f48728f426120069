r"""The wheel in an environment of its own: core dependencies alone, none of the extras, and not the tree.

    python tests/check_wheel.py [--folder .cache/wheel]

Makes the environment from the pinned versions of `constraints.txt` (torch first), builds the wheel and installs it,
then runs `stimg --help`, `stimg inspect` and `stimg embed` on a tiny slide with a tiny model, asks for what needs
extras, and tells how long `import modeling_stimg` takes: the median of five processes. Needs a package index.
`test_wheel.py` checks the same in the present environment, without one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Of optional extras, or heavy: importing the package must not import them, beyond what transformers does by itself.
HEAVY = (
    "anndata",
    "datasets",
    "gradio",
    "h5py",
    "igraph",
    "matplotlib",
    "pandas",
    "pyarrow",
    "scipy",
    "sklearn",
    "zarr",
)

# In seconds, `bare`: torch and transformers, which imports its parts when they are asked for; `asked`: those that our
# files ask for, by their own import statements; `own`: the rest of `import modeling_stimg`.
REPORT = """
import ast, importlib.util, json, sys, time
from pathlib import Path
start = time.perf_counter()
import torch, transformers
bare = time.perf_counter()
folder = Path(importlib.util.find_spec("modeling_stimg").origin).parent
statements = [
    ast.unparse(node)
    for path in (folder / "__init__.py", *sorted(folder.glob("*_stimg.py")))
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "transformers"
]
parsed = time.perf_counter()
for statement in statements:
    exec(statement)
asked = time.perf_counter()
before = set(sys.modules)
import modeling_stimg
end = time.perf_counter()
print(json.dumps({
    "file": modeling_stimg.__file__,
    "new": sorted({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)),
    "loaded": sorted({name.split(".")[0] for name in sys.modules}),
    "bare": bare - start, "asked": asked - parsed, "own": end - asked,
}))
"""

# A slide of 100 spots and 60 genes, and a model that knows them.
TINY = """
import sys
from pathlib import Path
import anndata, numpy as np, pandas as pd, scipy.sparse as sp
from modeling_stimg import GeneVocabulary, STImageMAEConfig, STImageMAEForPreTraining, STPatchProcessor
folder = Path(sys.argv[1])
row, col = np.divmod(np.arange(100), 10)
counts = sp.csr_matrix(np.random.default_rng(0).poisson(2.0, (100, 60)).astype(np.float32))
obs = pd.DataFrame({"array_row": row, "array_col": col}, index=[f"spot_{i}" for i in range(100)])
slide = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"GENE{i}" for i in range(60)]))
slide.write_h5ad(folder / "slide.h5ad")
processor = STPatchProcessor(GeneVocabulary.from_slides([slide]), window_size=6, num_channels=32)
config = STImageMAEConfig(
    window_size=6, num_channels=32, vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
    intermediate_size=48, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=4,
    decoder_intermediate_size=24,
)
STImageMAEForPreTraining(config).save_pretrained(folder / "model")
processor.save_pretrained(folder / "model")
"""

# What an embedded slide holds.
LOOK = """
import sys, anndata
embedding = anndata.read_h5ad(sys.argv[1]).obsm["X_stimg"]
print(embedding.dtype, *embedding.shape)
"""


def plain_environment() -> dict[str, str]:
    """That of a user: nothing says where the tree is."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(*words: str | Path, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """A command from another folder than the tree's.

    Raises:
        RuntimeError: it ends with another exit status.
    """
    ended = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=plain_environment(), capture_output=True, text=True, check=False
    )
    if ended.returncode != status:
        raise RuntimeError(
            f"{' '.join(map(str, words))[:300]} ended with {ended.returncode}, expected {status}:\n"
            f"{ended.stderr[-3000:]}"
        )
    return ended


def build_wheel(python: str | Path, folder: Path) -> Path:
    """The wheel of the tree, built by hatchling, which that Python has."""
    subprocess.run(
        [python, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True, capture_output=True
    )
    (wheel,) = folder.glob("stimg-*.whl")
    return wheel


def binaries(environment: Path) -> Path:
    """Where an environment keeps its commands."""
    return environment / ("Scripts" if os.name == "nt" else "bin")


def import_report(python: Path, cwd: Path) -> dict:
    """What importing the package loads, and how long it takes (`REPORT`)."""
    return json.loads(run(python, "-c", REPORT, cwd=cwd).stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    """Make the environment and check the wheel in it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "wheel", help="Of the environment; made anew.")
    folder = parser.parse_args(argv).folder.resolve()
    venv, place = folder / "venv", folder / "place"
    place.mkdir(parents=True, exist_ok=True)
    run(sys.executable, "-m", "venv", "--clear", venv, cwd=place)
    python, stimg = binaries(venv) / "python", binaries(venv) / "stimg"
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    install = [*pip, "install", "--constraint", ROOT / "constraints.txt"]
    run(*install, "torch", cwd=place)
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT, cwd=place)
    (wheel,) = folder.glob("stimg-*.whl")
    run(*install, wheel, cwd=place)
    run(*pip, "check", cwd=place)

    reports = [import_report(python, place) for _ in range(6)][1:]  # the first one compiles
    if ROOT in Path(reports[0]["file"]).parents and venv not in Path(reports[0]["file"]).parents:
        raise RuntimeError(f"{reports[0]['file']} is imported: expected the one of the wheel")
    print("import modeling_stimg, median of 5 processes:")
    for part, told in (("bare", "torch, transformers"), ("asked", "parts of transformers"), ("own", "stimg itself")):
        print(f"  {told:<22}{1000 * statistics.median(report[part] for report in reports):7,.0f} ms")
    print(f"  packages beside those  {', '.join(reports[0]['new'])}")
    run(python, "-c", TINY, place, cwd=place)
    if "embed" not in run(stimg, "--help", cwd=place).stdout:
        raise RuntimeError("stimg --help does not list its commands")
    run(stimg, "inspect", "slide.h5ad", "--model", "model", cwd=place)
    embed = [stimg, "embed", "slide.h5ad", "--model", "model", "--output", "embedded.h5ad", "--device", "cpu"]
    print(run(*embed, cwd=place).stderr.strip().splitlines()[-1])
    print(run(python, "-c", LOOK, "embedded.h5ad", cwd=place).stdout.strip())
    print(run(*embed, "--plot", "map.png", cwd=place, status=2).stderr.strip())
    domains = [stimg, "domains", "embedded.h5ad", "--output", "domains.h5ad"]
    run(*domains, "--n-domains", "3", cwd=place)
    print(run(*domains, cwd=place, status=2).stderr.strip().splitlines()[-1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
