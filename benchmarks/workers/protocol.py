"""How a worker of `peers.py` talks: one line of JSON in, one line of JSON out.

A worker builds and compiles its training program once, says so, and then waits. So
programs of different libraries, each in an environment of its own, are timed in turns
without compiling again, and only one of them works at a time. It imports nothing of
jaxpg, for it runs where jaxpg is not installed.
"""

import json
import os
import resource
import sys
import time
import types
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple


class Work(NamedTuple):
    """What every library is asked to do.

    Attributes:
        method: "ppo"; "one-step": one gradient step per batch of segments; or
            "reinforce": the same without a critic, and on whole episodes, where the
            library does so; "reinforce-trained" where these are long.
        env: environment, by its gymnax or Gymnasium name.
        num_envs: environments side by side.
        num_steps: decisions of each for an update.
        num_updates: updates of one call.
        num_epochs: passes over a batch.
        num_minibatches: gradient steps of a pass.
        learning_rate: of Adam, falling linearly to zero over the updates.
        num_devices: host devices, for a library that shares work between them.
    """

    method: str
    env: str = "CartPole-v1"
    num_envs: int = 2048
    num_steps: int = 128
    num_updates: int = 1
    num_epochs: int = 4
    num_minibatches: int = 4
    learning_rate: float = 2.5e-4
    num_devices: int = 1

    @property
    def steps_per_update(self) -> int:
        """Decisions of one update."""
        return self.num_envs * self.num_steps


class Job(NamedTuple):
    """A compiled training program.

    Attributes:
        compile_seconds: tracing, lowering and compiling it.
        run: trains for the work's number of updates, and waits until it is done.
        learn: `learn(seed)`: mean return of the episodes that ended in each update, or
            None where none did.
        packages: whose versions are worth telling.
        steps: decisions of one `run`, where they are not fixed by the work.
    """

    compile_seconds: float
    run: Callable[[], Any]
    learn: Callable[[int], list[float | None]]
    packages: tuple[str, ...]
    steps: Callable[[], int] | None = None


def serve(build: Callable[[Work], Job]) -> None:
    """Build the work given as the first argument, then answer until the input ends."""
    work = Work(**json.loads(sys.argv[1]))
    # Libraries print what they like: answers alone go where the parent listens.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = build(work)
    job.run()

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields | {"peak_mib": peak_mib()}) + "\n")
        answers.flush()

    versions = {name: version(name) for name in job.packages}
    answer(compile_seconds=job.compile_seconds, versions=versions)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "learn":
            answer(returns=job.learn(order["seed"]))
            continue
        began = time.perf_counter()
        job.run()
        seconds = time.perf_counter() - began
        steps = job.steps() if job.steps else work.num_updates * work.steps_per_update
        answer(seconds=seconds, steps=steps)


def peak_mib() -> float:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def mean_or_none(values: Any, where: Any) -> float | None:
    """Mean over what is marked; None where nothing is."""
    return float(values[where].mean()) if where.any() else None


def stand_in(name: str, **attributes: Any) -> None:
    """An empty module for an import that the measured code does not use."""
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def checkout(variable: str, *below: str) -> str:
    """Put a folder of a checkout, named by an environment variable, on the path."""
    folder = os.path.join(os.environ[variable], *below)
    sys.path.insert(0, folder)
    return folder


class OldStep:
    """A gymnax 1 environment as gymnax 0 had it: five values, with a bare `done`."""

    def __init__(self, env: Any) -> None:
        self._env = env

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._env, name)

    def step(self, key: Any, state: Any, action: Any, params: Any = None) -> Any:
        """Step, with both kinds of ends in one flag."""
        found = self._env.step(key, state, action, params)
        obs, state, reward, terminated, truncated, info = found
        done = terminated | truncated
        return obs, state, reward, done, {"discount": info["discount"]}


def make_old_gymnax() -> None:
    """Let `gymnax.make` give environments with the old step."""
    import gymnax

    make = gymnax.make

    def make_old(name: str, **settings: Any) -> Any:
        env, params = make(name, **settings)
        return OldStep(env), params

    gymnax.make = make_old
