"""Requests without end: memory and descriptors stay as they are. `make test-soak` runs ten thousand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_many_requests_leave_memory_flat_and_descriptors_as_they_were(count: int) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__).parent / "soak.py"), str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=True)
    parts = json.loads(done.stdout)
    descriptors = [[each[1] for each in part] for part in parts]
    memory = [sum(each[0] for each in part) for part in parts]
    print(f"{count} requests, MB of their own: {', '.join(f'{part / 1e6:.1f}' for part in memory)}")
    assert len(descriptors[0]) == 4  # engine, nursery, two ranks
    assert all(part == descriptors[0] for part in descriptors)
    assert max(memory) < 1.05 * min(memory)
