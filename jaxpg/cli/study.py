"""`jaxpg study`."""

import dataclasses
from pathlib import Path

from jaxpg._checks import check_choice
from jaxpg.cli.process import set_up_jax
from jaxpg.cli.words import UsageError, parse, value_of

__all__ = ["study_command"]

STUDY_HELP = """Study {summary}.

--quick begins from settings that finish within two minutes on two cores; other options
still hold. --resume FOLDER goes on with a study that was interrupted, with its own
settings. Leaves report.html, figures, results.csv and results.json."""


def study_command(words: list[str]) -> int:
    """Run a study, or go on with one."""
    from jaxpg.study.commands import STUDIES, defaults_of, run_study

    if not words or words[0] in ("-h", "--help"):
        print("usage: jaxpg study KIND [--quick] [OPTIONS]\n\nkinds:")
        for name, command in STUDIES.items():
            print(f"  {name:<12} {command.summary}")
        print("\n'jaxpg study KIND --help' tells more")
        return 0 if words else 2
    kind, *words = words
    try:
        check_choice("kind of study", kind, STUDIES)
        default = defaults_of(kind, value_of("--env", words, None), "--quick" in words)
    except ValueError as error:
        raise UsageError(error) from error
    options = dataclasses.make_dataclass(
        "StudyOptions",
        [
            ("config", STUDIES[kind].settings),
            ("quick", bool, False),
            ("resume", Path | None, None),
            ("compilation_cache", bool, True),
        ],
        frozen=True,
        kw_only=True,
        namespace={"__doc__": STUDY_HELP.format(summary=STUDIES[kind].summary)},
    )
    parsed = parse(options, words, f"jaxpg study {kind}", options(config=default))
    num_devices = getattr(parsed.config, "num_devices", None)
    set_up_jax(num_devices or 1, parsed.compilation_cache)
    return run_study(kind, parsed.config, parsed.resume)
