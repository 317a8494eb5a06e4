"""What is freed is kept: the same block again costs no page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
from fedsplit.engines.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = b"x" * 50_000_000
del block
before = faults()
block = b"x" * 50_000_000
print(faults() - before)
"""


def faults_of_a_second_block(how: str) -> int:
    return int(subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_a_freed_block_is_kept_for_the_next_one() -> None:
    assert faults_of_a_second_block("keep") < 100 < 10_000 < faults_of_a_second_block("leave")
