"""What a machine offers. Memory that is kept: the same array again takes no page faults. In a process of its own."""

import subprocess
import sys

import pytest

from train import arguments

CODE = """
import resource, torch
from modeling_stimg.host import keep_freed_memory
kept = keep_freed_memory()
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16_000_000)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, min(faults))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone")
def test_freed_memory_is_reused_where_the_c_library_can():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    kept, faults = run.stdout.split()
    if kept == "False":
        pytest.skip("another C library")
    assert int(faults) < 1000, "64 MB are 15,625 pages"


@pytest.mark.parametrize("able", [True, False])
def test_bf16_stays_where_the_cpu_has_it(able: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arguments, "multiplies_bfloat16", lambda: able)
    *_, training = arguments.parse_arguments(["--use_cpu", "true", "--bf16", "true"])
    assert training.bf16 == able
    assert training.mixed_precision == ("bf16" if able else "no")
