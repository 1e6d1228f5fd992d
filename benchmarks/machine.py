"""What a benchmark ran on."""

import os
import platform
import re
from pathlib import Path


def cpu() -> str:
    """The CPU's name, its cores, and those of its extensions that decide how fast products are."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    fields = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in info.read_text().splitlines() if ":" in line)
    extensions = [flag for flag in fields.get("flags", "").split() if flag.startswith(("amx", "avx512"))]
    return (
        f"{fields.get('model name', platform.machine())} (family {fields.get('cpu family')}, model "
        f"{fields.get('model')}), {os.cpu_count()} cores, {', '.join(extensions) or 'neither AVX-512 nor AMX'}"
    )
