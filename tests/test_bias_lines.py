"""What docstrings say of bias is what the oracle's table says.

Every public estimator has a `Bias:` entry, and where the table has rows that use it,
its first word is the table's verdict.
"""

import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path

import pytest

import jaxpg
from jaxpg import (
    baselines,
    credit,
    importance,
    linear_baselines,
    optimal,
    per_parameter,
    self_normalized,
    value_functions,
)

ROOT = Path(__file__).parent.parent
TABLE = json.loads((ROOT / "benchmarks/results/oracle-table.json").read_text())["rows"]

# Rooms whose public functions make credit, weights or gradients.
ROOMS = (
    "advantages",
    "baselines",
    "credit",
    "eligibility",
    "estimators",
    "fisher",
    "gradients",
    "groups",
    "importance",
    "linear_baselines",
    "optimal",
    "leave_out",
    "per_parameter",
    "proximal",
    "returns",
    "self_normalized",
    "streams",
    "surrogate",
    "trust_region",
    "value_functions",
)
# Parts, doors and records, which estimate nothing.
NO_ESTIMATORS = {
    "advantages": {"next_values_from", "with_values"},
    "baselines": {"check_enough", "level_by_time", "stateless"},
    "credit": {"held_finite", "mean_credit"},
    "eligibility": {"gpomdp_init", "merge_means"},
    "estimators": {"make_baseline", "make_estimator", "summarize_batch"},
    "gradients": {
        "check_rows",
        "map_over_chunks",
        "map_plainly",
        "sum_over_chunks",
        "weigh",
    },
    "groups": {"group_index"},
    "importance": {
        "effective_sample_size",
        "finite_log_rhos",
        "log_of_ratios",
        "log_ratios",
        "to_weights",
    },
    "leave_out": {
        "fold_of",
        "other_folds",
        "sums_at_starts",
        "sums_by_time",
        "sums_of_rows",
        "whole",
    },
    "linear_baselines": {
        "as_floats",
        "explained_with_offset",
        "polynomial_features",
        "solve_ridge",
        "squared_errors",
    },
    "optimal": {"decision_score_norms", "with_squares"},
    "per_parameter": {"per_parameter_summary"},
    "returns": {
        "at_episode_start",
        "leading_discounts",
        "step_discounts",
        "suffix_recurrence",
    },
    "streams": {"batch_source", "episode_source", "stream_summary"},
    "surrogate": {"cross_entropy", "magic_box", "squared_error"},
    "trust_region": {"normalize_by_kl", "scale_by_kl", "trust_region"},
    "value_functions": {"no_statistics", "take_in", "update_statistics"},
}


def bias_of(function):
    """The `Bias:` entry of a docstring, in one line; None without."""
    found = re.search(
        r"^Bias: (.*?)(?:\n\s*\n|\Z)",
        inspect.getdoc(function),
        re.DOTALL | re.MULTILINE,
    )
    return found and re.sub(r"\s+", " ", found[1])


FUNCTIONS = [
    (room, name)
    for room in ROOMS
    for name in importlib.import_module(f"jaxpg.{room}").__all__
    if inspect.isfunction(getattr(importlib.import_module(f"jaxpg.{room}"), name))
]


@pytest.mark.parametrize(("room", "name"), FUNCTIONS)
def test_every_estimator_says_how_biased_it_is(room, name):
    function = getattr(importlib.import_module(f"jaxpg.{room}"), name)
    if name not in NO_ESTIMATORS.get(room, set()):
        assert bias_of(function), f"{room}.{name} has no Bias: entry"


def test_every_room_was_thought_of():
    """A new room that speaks of bias belongs into `ROOMS`."""
    files = [x.name for x in pkgutil.iter_modules(jaxpg.__path__) if not x.ispkg]
    found = {
        name
        for name in files
        if "\n    Bias: " in (ROOT / "jaxpg" / f"{name}.py").read_text()
    }
    assert found <= {*ROOMS, "moments", "diagnostics", "drift", "policies", "rollout"}


# function -> which rows of the table are its own.
ROWS = {
    baselines.no_baseline: {"baseline": "none"},
    baselines.constant_baseline: {"baseline": "constant"},
    baselines.leave_one_out_baseline: {"baseline": "leave-one-out"},
    baselines.batch_mean_baseline: {"baseline": "batch-mean"},
    baselines.time_dependent_baseline: {"baseline": "time-dependent"},
    optimal.optimal_baseline: {"baseline": "optimal"},
    optimal.optimal_time_dependent_baseline: {"baseline": "optimal-time"},
    optimal.peters_schaal_baseline: {"baseline": "peters-schaal"},
    per_parameter.per_parameter_terms: {"baseline": "per-parameter"},
    linear_baselines.linear_baseline: {"baseline": "linear"},
    linear_baselines.plain_linear_baseline: {"baseline": "linear-plain"},
    value_functions.value_network_baseline: {"baseline": "value-network"},
    importance.episode_log_rhos: {"ratio": "whole", "baseline": "none"},
    importance.causal_weights: {"ratio": "causal", "baseline": "none"},
    importance.cumulative_log_rhos: {"ratio": "future-dropped", "baseline": "none"},
    importance.past_dropped_weights: {"ratio": "past-dropped", "baseline": "none"},
    importance.remaining_log_rhos: {"ratio": "past-dropped-whole", "baseline": "none"},
}
PLAIN = (
    baselines.time_dependent_baseline,
    optimal.optimal_baseline,
    optimal.optimal_time_dependent_baseline,
    optimal.peters_schaal_baseline,
    per_parameter.per_parameter_terms,
)


def verdicts(ratio="none", **wanted):
    """Whether the table's bare rows of that kind are unbiased: one verdict for all."""
    rows = [
        row
        for row in TABLE
        if row["ratio"] == ratio and not row["settings"] and not row["standardize"]
        if all(row[key] == value for key, value in wanted.items())
    ]
    assert rows, f"the table has no row of {wanted}"
    return {row["bias"] < 1e-10 for row in rows}


@pytest.mark.parametrize("function", ROWS, ids=lambda f: f.__name__)
def test_the_bias_that_is_declared_is_the_tables(function):
    text = bias_of(function)
    (is_unbiased,) = verdicts(**ROWS[function])
    says_unbiased = text.startswith(("unbiased", "none"))
    assert says_unbiased == is_unbiased, text


@pytest.mark.parametrize("function", PLAIN, ids=lambda f: f.__name__)
def test_the_plain_form_is_declared_biased_and_is(function):
    assert re.search(r"leave_one_out`.*without, ", bias_of(function))
    (is_unbiased,) = verdicts(baseline=ROWS[function]["baseline"] + "-plain")
    assert not is_unbiased


@pytest.mark.parametrize(
    ("function", "setting"),
    [
        (importance.truncate_log_rhos, "max_rho"),
        (self_normalized.self_normalize, "self_normalize"),
    ],
)
def test_changed_ratios_are_declared_biased_and_are(function, setting):
    assert bias_of(function).startswith("biased")
    rows = [row for row in TABLE if setting in dict(row["settings"])]
    assert len(rows) >= 6 and all(row["bias"] > 1e-3 for row in rows)


def test_credit_names_the_exact_forms():
    text = bias_of(credit.credit_of)
    exact = {
        row["ratio"]
        for row in TABLE
        if row["bias"] < 1e-10 and not row["settings"] and row["baseline"] == "none"
    }
    named = text[: text.index("; otherwise biased")]
    assert exact == {ratio for ratio in credit.RATIOS if f'"{ratio}"' in named}
