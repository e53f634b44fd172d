"""Two checkouts of Cineline in one run, their engines side by side and taking turns: what a change costs.

python benchmarks/old_and_new.py --old /path/to/other/checkout schedule --pp 4 --in-flight 3
python benchmarks/old_and_new.py --old /path/to/other/checkout line --pp 2 --in-flight 3 --pairs 8
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent


def serve(case: dict[str, Any]) -> None:
    """In a checkout's own process: an engine; for each line that comes in, the requests once, and the seconds."""
    from cineline import Engine, ParallelConfig, VideoRequest
    from cineline.bench.sleeping import SleepingSpec

    prompt, scale, pp = "a red square moving left on a blue background", float(case["guidance"]), case["pp"]
    request = VideoRequest(prompt=prompt, num_inference_steps=case["steps"], guidance_scale=scale, decode=False)
    model: Any = case["folder"]
    if model is None:
        model = SleepingSpec(pp, case["stage_s"], case["hidden_bytes"])
    else:
        request = request.model_copy(update={"height": 512, "width": 512, "num_frames": 21})
    count = case["in_flight"]
    with Engine(
        model, ParallelConfig(pp=pp), device="cpu", in_flight=count, pin_cores=case["folder"] is not None
    ) as engine:
        engine.submit(request.model_copy(update={"num_inference_steps": 1})).result(600)
        for _ in sys.stdin:
            started = time.monotonic()
            for handle in [engine.submit(request.model_copy(update={"seed": seed})) for seed in range(count)]:
                handle.result(3600)
            print(time.monotonic() - started, flush=True)


@contextmanager
def checkout(folder: Path, case: dict[str, Any]) -> Iterator[Callable[[], float]]:
    """An engine of that checkout; called, it runs the requests once and gives the seconds."""
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    if case["folder"] is not None:
        environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, __file__, "--serve", json.dumps(case)]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None

    def run() -> float:
        process.stdin.write("run\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        return float(process.stdout.readline())  # type: ignore[union-attr]

    try:
        yield run
    finally:
        process.stdin.close()
        process.wait(60)


def main() -> None:
    from cineline.bench.measure import Summary, interleave, ratios
    from cineline.bench.report import machine, report
    from cineline.families.wan.random_checkpoint import RandomConfig, save_random_checkpoint

    options = _options()
    case: dict[str, Any] = {"pp": options.pp, "in_flight": options.in_flight, "guidance": 4, "folder": None}
    with ExitStack() as stack:
        if options.what == "line":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
            save_random_checkpoint(folder, RandomConfig("ti2v", layers=8, heads=4, head_dim=128, ffn_dim=2048))
            case |= {"folder": str(folder), "steps": options.steps or 4}
        else:
            case |= {"stage_s": 0.05, "hidden_bytes": 3_000_000, "steps": options.steps or 40}
        both = {"old": options.old.resolve(), "new": HERE}
        arms = {name: stack.enter_context(checkout(path, case)) for name, path in both.items()}
        for run in arms.values():
            run()
        runs = interleave(arms, options.pairs, partial(print, file=sys.stderr, flush=True))
    seconds = {name: Summary.of([run.seconds for run in own]) for name, own in runs.items()}
    rows = [[name, str(seconds[name]), *_limit(case, runs[name])] for name in runs]
    rows.append(["old / new, pair by pair", str(ratios(runs["old"], runs["new"])), ""])
    rows.append(["old / new, medians", f"{seconds['old'].median / seconds['new'].median:.3f}", ""])
    facts = machine("cpu") | {"command": " ".join(["python", *sys.argv])}
    plain = {name: [run.__dict__ for run in own] for name, own in runs.items()}
    title = f"{options.what}: P={options.pp}, M={options.in_flight}, {options.pairs} pairs"
    report(title, ["", "s", "% of the limit"], rows, {"machine": facts, "case": case, "runs": plain}, options.json)


def _limit(case: dict[str, Any], runs: Any) -> list[str]:
    """Sleeping stages: the share of 2MP / max(2M, P + 1) that is reached."""
    if case["folder"] is not None:
        return [""]
    from cineline.bench.measure import Summary
    from cineline.schedule.scheduler import speed_up_limit

    alone = case["in_flight"] * case["steps"] * 2 * case["pp"] * case["stage_s"]
    limit = float(speed_up_limit(case["pp"], case["in_flight"], 2))
    return [str(Summary.of([100 * alone / run.seconds / limit for run in runs]))]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["schedule", "line"], help="sleeping stages, or real compute (8 x 512, fp32)")
    parser.add_argument("--old", type=Path, required=True, help="the other checkout")
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--in-flight", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of a request (40 sleeping, 4 real)")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the runs there")
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(json.loads(sys.argv[2]))
    else:
        main()
