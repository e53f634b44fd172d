"""Two hosts in network namespaces, and what runs on both (`two_hosts.sh`)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

APART = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]

TORCHRUN = (
    f"exec {sys.executable} -m torch.distributed.run --nnodes 2 --node-rank $NODE --master-port 29500 "
    "--nproc-per-node {processes} --master-addr {master} {program}"
)
"""On each host; `processes` may depend on $NODE."""


def need_namespaces() -> None:
    """Skip the test where none can be made."""
    made = [*APART, "ip", "link", "add", "va", "type", "veth", "peer", "vb"]
    if subprocess.run(made, capture_output=True).returncode:
        pytest.skip("no network namespaces, or no veth, can be made here")


@contextmanager
def two_hosts(
    program: str,
    processes: str = "1",
    master: str = "$HOST",
    before: str = ":",
    environment: Mapping[str, str] | None = None,
    plugged: bool = False,
) -> Iterator[subprocess.Popen[str]]:
    """Both hosts' torchrun; killed in the end. Standard output is host 0's.

    Args:
        program: torchrun's last arguments. processes: on each host. master: its address. before: done first.
        plugged: whether a line on standard input unplugs the cable.
    """
    need_namespaces()
    command = f"{before}\n{TORCHRUN.format(processes=processes, master=master, program=program)}"
    own = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    with subprocess.Popen(
        [*APART, "bash", Path(__file__).parent / "two_hosts.sh", "bash", "-c", command],
        stdin=subprocess.PIPE if plugged else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=own | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **(environment or {})},
    ) as hosts:
        try:
            yield hosts
        finally:
            hosts.kill()


def names(folder: Path, *files: str) -> str:
    """The command that gives each host an /etc/hosts of its own, from these contents."""
    for number, content in enumerate(files):
        (folder / f"hosts-{number}").write_text(f"127.0.0.1 localhost\n{content}\n")
    return f"mount --bind {folder}/hosts-$NODE /etc/hosts"
