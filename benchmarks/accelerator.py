"""All that an accelerator should be asked, within ten minutes.

    pip install -e '.[test,cuda13]'
    PUREJAXRL=checkout python benchmarks/accelerator.py

    tests        of gradients, rollouts, estimators and algorithms, on the device
    throughput   PPO and REINFORCE on CartPole, 2^11 to 2^17 environments
    peers        PPO at 2048 environments beside PureJaxRL, in turns; without a checkout
                 in the environment variable PUREJAXRL this part is left out

Each part is a process with a time limit of its own; one that fails or is cut off leaves
the others alone, and what it had stored stays. Writes results/accelerator-NAME.json,
with the machine and the end of what each part printed; the parts store their own
results beside it. `--allow-cpu` is for trying the script itself.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from jaxpg.train.provenance import write_json_atomically

HERE = Path(__file__).resolve().parent
TESTS = ["gradients", "rollout", "estimators", "moments", "fisher", "ppo", "trpo"]
LINES = 12


class Part(NamedTuple):
    """A process of its own.

    Attributes:
        words: of its command, after Python.
        seconds: after so many it is ended.
    """

    words: list[str]
    seconds: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--allow-cpu", action="store_true")
    parser.add_argument("--only", nargs="+", choices=["tests", "throughput", "peers"])
    options = parser.parse_args()
    machine = describe()
    if machine["backend"] == "cpu" and not options.allow_cpu:
        sys.exit(
            "JAX sees no accelerator here, only the CPU; install jaxpg[cuda13] (or "
            "cuda12, tpu), or give --allow-cpu to try the script"
        )
    parts = {
        name: part
        for name, part in plan(small=machine["backend"] == "cpu").items()
        if options.only is None or name in options.only
    }
    found: dict[str, Any] = {}
    for name, part in parts.items():
        print(f"== {name}, at most {part.seconds} s", flush=True)
        found[name] = outcome(part)
        print("\n".join(found[name]["end_of_output"]), flush=True)
        kind = machine["device_kind"].lower().replace(" ", "-")
        path = HERE / "results" / f"accelerator-{kind}.json"
        written = {"date": time.strftime("%Y-%m-%d"), "provenance": machine}
        write_json_atomically(path, written | {"parts": found})
    print(f"stored in {path.name}")


def plan(*, small: bool) -> dict[str, Part]:
    """The parts; `small` ones only show that they run."""
    sizes = [str(2**n) for n in ([6] if small else range(11, 18))]
    speed = [str(HERE / "throughput.py"), "--quick", "--num-devices", "1"]
    files = [str(HERE.parent / "tests" / f"test_{name}.py") for name in TESTS]
    pytest = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    parts = {
        "tests": Part([*pytest, *(files[:1] if small else files)], 200),
        "throughput": Part([*speed, "--out", "accelerated", "--num-envs", *sizes], 240),
    }
    if "PUREJAXRL" in os.environ:
        compared = [str(HERE / "peers.py"), "--libraries", "jaxpg", "PureJaxRL"]
        work = ["--methods", "ppo", "--num-envs", sizes[0], "--rounds", "3"]
        parts["peers"] = Part([*compared, *work, "--out", "accelerated-peers"], 160)
    return parts


def outcome(part: Part) -> dict[str, Any]:
    """Run a part to its end or to its limit."""
    began = time.perf_counter()
    # Several processes hold the device in turns, and some at once.
    environ = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    process = subprocess.Popen(
        [sys.executable, *part.words],
        env=environ,
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=part.seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # with what it started itself
        output, _ = process.communicate()
    output = output.replace(str(HERE.parent), ".")
    return {
        "return_code": process.returncode,
        "seconds": round(time.perf_counter() - began, 1),
        "end_of_output": output.splitlines()[-LINES:],
    }


def describe() -> dict[str, Any]:
    """Versions and devices, asked by a process that lets the device go again."""
    asked = "import json; from jaxpg.train.provenance import describe as d; print("
    words = [sys.executable, "-c", asked + "json.dumps(d()))"]
    return json.loads(subprocess.check_output(words, text=True).splitlines()[-1])


if __name__ == "__main__":
    main()
