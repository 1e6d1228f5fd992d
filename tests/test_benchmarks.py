"""What the benchmarks' tables say of the machine they come from."""

from pathlib import Path

import pytest

from benchmarks.machine import cpu

CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""


@pytest.mark.skipif("model name" not in CPUINFO, reason="only x86 Linux names its CPU there")
def test_a_table_names_its_cpu_and_its_extensions():
    fields = {line.partition("\t")[0]: line.partition(": ")[2] for line in CPUINFO.splitlines()}
    assert fields["model name"].strip() in cpu()
    for extension in ("avx512f", "amx_tile"):
        assert (extension in cpu()) == (extension in fields["flags"].split())
