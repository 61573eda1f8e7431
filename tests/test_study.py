"""Studies as they are used: names, folders, resuming, reports, the command line."""

import json
import re

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxpg import exact
from jaxpg.cli import main
from jaxpg.estimators import BASELINES, estimate_gradient
from jaxpg.study import batch_size, curves, off_policy, subjects, variance
from jaxpg.study.bench import make_bench, reference_of
from jaxpg.study.commands import STUDIES, defaults_of
from jaxpg.study.naming import (
    ALL_ON_POLICY,
    RATIO_FORMS,
    estimator_name,
    expand_names,
    parse_estimator,
)
from jaxpg.study.progress import StudyProgress
from jaxpg.study.sampling import Sampler, cut_length
from jaxpg.study.settings import (
    BatchSizeConfig,
    LearningConfig,
    OffPolicyConfig,
    VarianceConfig,
)
from jaxpg.study.statistics import exact_reference
from jaxpg.study.store import Store, open_store, read_settings
from jaxpg.study.subjects import drifted, fresh_subject, mean_kl_of
from jaxpg.train.config import PolicyConfig, TrainConfig
from jaxpg.train.loop import train
from jaxpg.train.run import load_params, open_run
from jaxpg.train.sharding import place

# --- names


@pytest.mark.parametrize("name", [*ALL_ON_POLICY, *RATIO_FORMS])
def test_a_name_and_its_settings_are_one(name):
    assert estimator_name(parse_estimator(name)) == name


def test_parts_of_a_name_may_be_left_out():
    for short, full in {
        "leave-one-out": "reward-to-go/leave-one-out",
        "total-return": "total-return/none",
        "causal": "reward-to-go/none/causal",
        "optimal/first-order/max-rho=2": "reward-to-go/optimal/first-order/max-rho=2",
    }.items():
        assert expand_names((short,)) == (full,)
    both = expand_names(("default", "leave-one-out"))
    assert len(set(both)) == len(both) and "reward-to-go/leave-one-out" in both
    assert parse_estimator("reward-to-go", 0.9).credit.keep_leading_discount


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("leave-one-outt", "did you mean 'leave-one-out'"),
        ("reward-to-go/max-rho=big", "max-rho=NUMBER"),
        ("xyz", f"baselines none, {BASELINES[0]}"),
    ],
)
def test_unknown_names_list_the_choices(name, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_estimator(name)


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        (VarianceConfig, {"batch_sizes": (24,)}, "nearest are 16 and 32"),
        (VarianceConfig, {"num_trajectories": 16}, "sample as many"),
        (VarianceConfig, {"behaviour_kl": 0.0}, "behaviour_kl is 0.0"),
        (VarianceConfig, {"estimators": ()}, "estimators is empty"),
        (OffPolicyConfig, {"num_trajectories": 64}, "at least 8 batches"),
        (OffPolicyConfig, {"kls": ()}, "kls is empty"),
        (LearningConfig, {"num_seeds": 3}, "needs an even number"),
        (LearningConfig, {"estimators": ("causal",)}, "without ratios"),
        (BatchSizeConfig, {"num_episodes": 64}, "at least 4 updates"),
    ],
)
def test_wrong_settings_are_refused(settings, options, words):
    with pytest.raises(ValueError, match=words):
        settings(**options)


def test_wrong_subjects_are_refused():
    with pytest.raises(ValueError, match="did you mean 'CartPole-v1'"):
        fresh_subject("Cartpole")
    with pytest.raises(ValueError, match="take them out"):
        off_policy.study_off_policy(OffPolicyConfig(estimators=("optimal",)))


# --- trajectories and subjects


def mine():
    return fresh_subject("mine", seed=1)


def test_a_policy_at_any_stage_of_a_run(tmp_path):
    config = TrainConfig(
        num_envs=4,
        num_updates=2,
        checkpoint_every=1,
        num_seeds=2,
        num_devices=1,
        eval_episodes=0,
        policy=PolicyConfig(hidden=(3,)),
        runs_dir=tmp_path,
        name="run",
    )
    folder = train(config, show=False).folder
    subject = subjects.from_checkpoint(folder, update="1", member=1, max_steps=9)
    _, stored = load_params(open_run(folder, num_devices=1), "1")
    jax.tree.map(np.testing.assert_array_equal, subject.params, stored[1])
    assert subject.max_steps == 9
    assert subject.label == "CartPole-v1, after 1 updates of reinforce"
    with pytest.raises(ValueError, match=r"^member is 2, .* the run has no others"):
        subjects.from_checkpoint(folder, member=2)


def test_parts_and_chunks_are_the_same_trajectories():
    world = subjects.tabular_subject(
        subjects.tabular_world("mine")._replace(horizon=40)
    )
    whole, poor = (
        Sampler(world, world.params, jax.random.key(0), 64, place(1), memory)
        for memory in (2**20, 0)
    )
    rows, parts = whole.rows(1), whole.parts(1)
    assert len(parts) == 4 and len({part.mask.shape[0] for part in parts}) == 1
    lengths = [int(part.mask.shape[1]) for part in parts]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    found = np.concatenate([part.episode_id[:, 0] for part in parts])
    assert sorted(found) == list(range(64, 128))
    assert sum(int(part.mask.sum()) for part in parts) == int(rows.mask.sum())
    again = poor.rows(1, length=40)
    assert again.mask.shape == (64, 40)
    np.testing.assert_array_equal(again.reward[:, : rows.reward.shape[1]], rows.reward)
    assert int(again.mask.sum()) == int(rows.mask.sum())
    assert whole.statistics()["trajectories"] == 64
    assert cut_length(17, 500) == 32


def test_the_behaviour_policy_is_as_far_as_asked():
    away = drifted(mine(), 0.05, jax.random.key(0))
    measured = mean_kl_of(away, jax.random.split(jax.random.key(0))[1])(away.behaviour)
    np.testing.assert_allclose(measured, 0.05, rtol=1e-3)


def test_a_reference_batch_is_the_gradient():
    """A world whose tables the study is not told of."""
    subject = mine()._replace(mdp=None)
    config = VarianceConfig(
        num_trajectories=64,
        batch_sizes=(64,),
        chunk_size=64,
        reference_trajectories=4096,
        num_devices=1,
        estimators=("reward-to-go",),
    )

    class Nothing(Store):
        def __init__(self):
            pass

        def get(self, name):
            return None

        def put(self, name, cell):
            json.dumps(cell)

    bench = make_bench(config, subject)
    found = reference_of(bench, config, Nothing(), StudyProgress(False, 1.0, ""))
    mdp = subjects.tabular_world("mine")
    truth = exact.policy_gradient(mdp, subject.policy, subject.params)
    off = found.gradient - np.concatenate([x.ravel() for x in jax.tree.leaves(truth)])
    assert off @ off < 16.0 * found.error_sq < 0.05 * found.norm_sq
    along = off @ found.gradient / found.norm_sq
    assert abs(along) < 4.0 * found.along_error


# --- a study in its folder


def tiny(folder, **changes):
    small = {
        "env": "mine",
        "seed": 1,
        "batch_sizes": (4, 16),
        "num_trajectories": 256,
        "chunk_size": 8,
        "num_devices": 1,
        "estimators": ("reward-to-go", "batch-mean", "standardize", "causal"),
        "folder": folder,
    }
    return VarianceConfig(**(small | changes))


class Broken(Exception):
    pass


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A study that was stopped in its second cell, and then resumed."""
    folder = tmp_path_factory.mktemp("studies") / "interrupted"
    measure, calls = variance.measure_batches, []

    def breaks(*arguments, **options):
        calls.append(arguments[4])
        if len(calls) == 2:
            raise Broken
        return measure(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variance, "measure_batches", breaks)
        with pytest.raises(Broken):
            variance.study_variance(tiny(folder), show=False)
        first = (folder / "cells" / "size-0000004.json").read_bytes()
        result = variance.study_variance(tiny(folder), show=False)
    assert calls == [4, 16, 16], "the finished cell is not measured again"
    assert (folder / "cells" / "size-0000004.json").read_bytes() == first
    return result


@pytest.mark.exhaustive
def test_an_interrupted_study_is_the_whole_one(interrupted, tmp_path):
    whole = variance.study_variance(tiny(tmp_path / "whole"), show=False, report=False)

    def numbers(rows):
        timed = ("seconds", "variance_times_seconds")
        return [{k: v for k, v in row.items() if k not in timed} for row in rows]

    assert numbers(whole.rows) == numbers(interrupted.rows)
    assert read_settings(interrupted.folder, "variance", VarianceConfig) == tiny(None)


def test_what_does_not_fit_is_named_and_the_rest_goes_on(interrupted):
    left_out = " ".join(interrupted.notes)
    assert "causal was left out" in left_out and "--behaviour-kl" in left_out
    assert "measured up to N = 8" in left_out
    found = {(row["estimator"], row["batch_size"]) for row in interrupted.rows}
    assert ("reward-to-go/none/standardize", 4) in found
    assert ("reward-to-go/none/standardize", 16) not in found
    with pytest.raises(ValueError, match="no estimator is left"):
        make_bench(tiny(None, estimators=("causal",)), mine())


def test_a_row_has_everything(interrupted):
    row = next(r for r in interrupted.rows if r["estimator"].endswith("batch-mean"))
    for name in (
        *("variance", "bias", "bias_error", "snr", "cosine", "noise_scale"),
        *("seconds", "variance_times_seconds", "relative_variance_low", "error"),
        *("variance_low", "variance_high", "paired_bias_error", "bias_norm_sq"),
    ):
        assert np.isfinite(row[name]), name
    assert row["paired_bias"] == pytest.approx(-0.25, abs=0.1)
    total = sum(row["variance_by_block"].values())
    assert total == pytest.approx(row["variance"])
    line = next(x for x in interrupted.summary if x["exact_law"])
    assert line["critical_batch_size"] > 1


def test_the_report_stands_alone(interrupted):
    folder = interrupted.folder
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert len(re.findall(r"(?:src|href)=", page)) == page.count('src="data:')
    assert "batch-mean" in page and "jax 0" in page and "causal was left out" in page
    for name in ("variance", "cost", "bias", "signal", "blocks"):
        assert (folder / "figures" / f"{name}.svg").stat().st_size > 1000
    lines = (folder / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + len(interrupted.rows)
    stored = json.loads((folder / "results.json").read_text())
    assert stored["rows"] == interrupted.rows and stored["provenance"]["jax"]


def test_another_study_is_not_overwritten(interrupted, tmp_path):
    with pytest.raises(ValueError, match=r"seed was 1, now 2.*another --folder"):
        open_store(interrupted.folder, "variance", tiny(None, seed=2))
    with pytest.raises(ValueError, match="jaxpg study variance --resume"):
        read_settings(interrupted.folder, "learning", LearningConfig)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="holds no study"):
        open_store(tmp_path, "variance", tiny(None))


# --- ratios


def test_each_forms_limit_is_its_exact_mean(float64):
    """Against the enumeration of all trajectories of two decisions."""
    subject = drifted(fresh_subject("chain-2", seed=1), 0.2, jax.random.key(0))
    forms = [x for x in RATIO_FORMS if "max-rho" not in x and "self" not in x]
    bench = make_bench(tiny(None, estimators=tuple(forms)), subject)
    truth = exact.policy_gradient(subject.mdp, subject.policy, subject.params)
    reference = exact_reference(ravel_pytree(truth)[0])

    def estimates(rows):
        return [
            ravel_pytree(estimate_gradient(c.estimator, subject.params, (), rows))[0]
            for c in bench.contenders
        ]

    means = exact.expected_estimate(
        estimates, subject.mdp, subject.policy, subject.behaviour, 1
    )
    assert len(means) == len(forms) == 7
    for contender, mean in zip(bench.contenders, means, strict=True):
        limit = off_policy._limit(bench, contender, reference)
        np.testing.assert_allclose(limit, mean, rtol=1e-9, atol=1e-12)


@pytest.mark.exhaustive
def test_ratios_have_the_bias_and_growth_that_theory_says(tmp_path):
    config = OffPolicyConfig(
        kls=(0.02,),
        horizons=(2, 4),
        num_trajectories=4096,
        batch_size=16,
        chunk_size=1024,
        num_devices=1,
        estimators=("whole", "future-dropped", "first-order", "causal/self-normalize"),
        seed=3,
        folder=tmp_path / "ratios",
    )
    result = off_policy.study_off_policy(config, show=False)
    assert len(result.rows) == 8
    for row in result.rows:
        if row["exact_bias"] is not None:
            assert abs(row["bias"] - row["exact_bias"]) < 4.0 * row["bias_error"]
        assert 0.0 < row["ess"] <= 1.0
        assert row["kl_measured"] == pytest.approx(0.02, rel=0.5)
        assert row["weight_second_moment"] > 1.0
    later = {r["estimator"]: r for r in result.rows if r["horizon"] == 4}
    # 1/E[W^2] is the effective share of a whole trajectory's weight.
    whole = later["reward-to-go/none/whole"]
    assert whole["ess"] == pytest.approx(1 / whole["weight_second_moment"], rel=0.1)
    assert later["reward-to-go/none/first-order"]["exact_bias_norm"] > 0.0
    assert (result.folder / "report.html").exists()
    again = off_policy.study_off_policy(config, show=False, report=False)
    assert again.rows == result.rows


# --- learning


def test_seeds_are_put_together():
    values = np.array([[0.0, 1.0], [1.0, 1.0], [3.0, 1.0], [100.0, 1.0]])
    found = curves.over_seeds(values)
    assert found["iqm"] == [2.0, 1.0] and found["median"] == [2.0, 1.0]
    assert found["low"][0] <= 2.0 <= found["high"][0] and found["low"][1] == 1.0


def cell(returns):
    """Two step sizes; the second half of the seeds must not choose."""
    steps = (np.arange(1, 6) * np.ones((4, 1)) * 100).tolist()
    return {
        "estimator": "reward-to-go/none",
        "batch_size": 32,
        "rate": 50.0,
        "episodes": [32, 64, 96, 128, 160],
        "curves": {
            name: {"mean_return": x, "env_steps": steps} for name, x in returns.items()
        },
    }


def test_a_race_ends_at_the_running_mean():
    config = BatchSizeConfig(
        target_return=10.0, window=64, num_seeds=4, learning_rates=(0.1, 1.0)
    )
    good = [10.0, 0.0, 10.0, 10.0, 10.0]  # two updates at 10: the fourth
    best, never = [10.0] * 5, [0.0] * 5
    found = cell({"0.1": [good, good, good, never], "1": [never, best, best, best]})
    row = batch_size._raced(config, found)
    assert row["learning_rate"] == 0.1, "the half that is shown does not choose"
    assert (row["reached"], row["seeds"]) == (1, 2)
    assert row["updates"] is None and row["updates_low"] == 4.0
    assert row["episodes_low"] == 128.0 and row["seconds_low"] == 8.0


def test_the_noise_scales_curve_is_found_again():
    rows = [
        {"batch_size": n, "updates": 20.0 * (1.0 + 48.0 / n)} for n in (8, 32, 128, 512)
    ]
    found = batch_size._fit(rows, [{"noise_scale": 48.0}, {"noise_scale": None}])
    assert found["least_updates"] == pytest.approx(20.0)
    assert found["fitted_noise_scale"] == pytest.approx(48.0, rel=0.02)


# --- the command line


def test_every_study_is_listed_and_has_help(capsys):
    assert main(["study"]) == 2
    listing = capsys.readouterr().out
    assert all(name in listing for name in STUDIES)
    for name in STUDIES:
        assert main(["study", name, "--help"]) == 0
        said = capsys.readouterr().out
        assert "--quick" in said and "--resume" in said and "--folder" in said
        assert defaults_of(name, None, True) != defaults_of(name, None, False)


def test_wrong_words_end_with_a_sentence(capsys, tmp_path):
    assert main(["study", "varianz"]) == 2
    assert "did you mean 'variance'" in capsys.readouterr().err
    assert main(["study", "variance", "--resume", str(tmp_path)]) == 1
    assert "holds no study" in capsys.readouterr().err


def test_a_finished_study_shows_its_table_again(interrupted, capsys):
    before = dict(jax.config.values)
    words = ("--resume", str(interrupted.folder), "--no-compilation-cache")
    assert main(["study", "variance", *words]) == 0
    said = capsys.readouterr().out
    assert "reward-to-go/batch-mean" in said and "note: " in said
    assert said.splitlines()[-1] == f"report: {interrupted.folder / 'report.html'}"
    assert dict(jax.config.values) == before


@pytest.mark.slow
@pytest.mark.exhaustive
def test_learning_and_batch_sizes_leave_reports(tmp_path):
    from jaxpg.study.learning import study_learning

    shared = {
        "env": "CartPole-v1",
        "max_steps": 20,
        "learning_rates": (0.01, 0.03),
        "num_seeds": 2,
        "num_episodes": 32,
        "policy": defaults_of("learning", None, True).policy,
    }
    learned = study_learning(
        LearningConfig(
            **shared,
            estimators=("time-dependent",),
            batch_sizes=(8,),
            folder=tmp_path / "learning",
        ),
        show=False,
    )
    raced = batch_size.study_batch_size(
        BatchSizeConfig(
            **shared,
            batch_sizes=(8,),
            target_return=5.0,
            window=8,
            noise_trajectories=512,
            folder=tmp_path / "race",
        ),
        show=False,
    )
    assert learned.rows[0]["area_low"] <= learned.rows[0]["area_high"]
    assert raced.rows[0]["updates"] == 1.0
    assert len(raced.summary[0]["stages"]) == 4
    for result in (learned, raced):
        assert "data:image/png" in (result.folder / "report.html").read_text()
