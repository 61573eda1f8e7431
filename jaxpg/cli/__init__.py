"""The command line: train, eval, study, list.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (143 if terminated).
"""

import sys
import traceback
from collections.abc import Sequence

from jaxpg._checks import check_choice
from jaxpg._version import __version__
from jaxpg.algos.registry import RECIPES
from jaxpg.cli.evaluate import eval_command
from jaxpg.cli.study import study_command
from jaxpg.cli.train import train_command
from jaxpg.cli.words import UsageError
from jaxpg.systems.registry import SYSTEMS
from jaxpg.train import distributed

__all__ = ["main"]

USAGE = """\
usage: jaxpg COMMAND [OPTIONS]

Policy gradients in JAX.

commands:
  train [ALGORITHM]        train a policy (default: reinforce on CartPole-v1)
  train SYSTEM             train a system that has no environment
  train --resume RUN       continue an interrupted or finished run
  train --distributed      as one of several processes, usually on several hosts
  eval RUN                 evaluate a trained policy on whole episodes, or a system
  study KIND               measure estimators: variance, off-policy, learning,
                           batch-size
  list envs|algorithms|systems
                           what there is to choose from

options:
  --version                print the version
  -h, --help               print this; 'jaxpg COMMAND --help' tells more

Any command takes --debug, which shows the traceback of an error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: its words; None takes them from the process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words)
    except UsageError as error:
        return _complain(error, 2, debug)
    except SystemExit as error:  # tyro has printed its help or its complaint
        return int(error.code or 0)
    except KeyboardInterrupt:
        return _complain(KeyboardInterrupt("interrupted"), 130, debug)
    except Exception as error:
        return _complain(error, 1, debug)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] in ("--version", "-V"):
        print(f"jaxpg {__version__}")
        return 0
    commands = {
        "train": train_command,
        "eval": eval_command,
        "study": study_command,
        "list": _list,
    }
    try:
        check_choice("command", words[0], commands)
    except ValueError as error:
        raise UsageError(error) from error
    return commands[words[0]](words[1:])


def _complain(error: BaseException, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    message = str(error) or type(error).__name__
    if told := distributed.explain(message):
        print(f"jaxpg: error: {told}", file=sys.stderr)
    distributed.give_up(message, code)
    return code


def _list(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    what = words[0] if len(words) == 1 else ""
    if what == "algorithms":
        for name, recipe in RECIPES.items():
            print(f"{name:<12} {recipe.summary}")
        return 0
    if what == "envs":
        from jaxpg import envs

        for name in envs.names():
            problem = envs.load_problem(name)
            print(name if problem is None else f"{name}  (cannot load: {problem})")
        return 0
    if what == "systems":
        for name, system in SYSTEMS.items():
            print(f"{name:<16} {system.summary}")
        return 0
    raise UsageError(
        "list what? choose one of: jaxpg list envs, jaxpg list algorithms, "
        "jaxpg list systems"
    )
