"""The oracle's table: exact bias and variance of every estimator on the mine.

    python benchmarks/oracle_table.py

All batches of N = 2 trajectories of `canonical_mdp` are enumerated in float64, so bias
and variance are exact numbers, not measurements. A row declares what it claims to
estimate; `tests/test_unbiased.py` holds every row to its claim, on this world and on
random ones, and the stored numbers to what the code gives.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import timing

from jaxpg import exact
from jaxpg.baselines import Baseline, constant_baseline, stateless
from jaxpg.credit import CreditConfig, credit_of
from jaxpg.envs import Discrete
from jaxpg.envs.tabular import TabularMDP, canonical_mdp
from jaxpg.estimators import (
    BASELINES,
    Estimator,
    EstimatorConfig,
    estimate_gradient,
    estimate_terms,
    make_estimator,
    summarize_batch,
)
from jaxpg.policies import tabular_policy

BATCH_SIZE = 2

UNBIASED = "unbiased"
BIASED = "biased"
SHRUNK = "shrunk by 1 - 1/N"
TARGET_STATES = "states of the target, values of the behaviour policy"
TARGET_VALUES = "states of the behaviour, values of the target policy"
BEHAVIOUR = "states and values of the behaviour policy"
FORGETFUL = "values discounted, states not"
LIMITS = {
    TARGET_STATES: ("target", "behaviour"),
    TARGET_VALUES: ("behaviour", "target"),
    BEHAVIOUR: ("behaviour", "behaviour"),
    FORGETFUL: ("target", "target"),
}


class Row(NamedTuple):
    """One estimator and what it is claimed to be."""

    credit: str
    baseline: str
    claim: str
    ratio: str = "none"
    settings: tuple[tuple[str, Any], ...] = ()
    standardize: bool = False

    @property
    def name(self) -> str:
        """Its parts in one line."""
        parts = [self.credit, self.baseline, self.ratio]
        parts += [f"{key}={value}" for key, value in self.settings]
        return ", ".join([*parts, "standardised"] if self.standardize else parts)

    @property
    def discount(self) -> float:
        """Of the credit, and of the objective that it is held against."""
        return dict(self.settings).get("discount", 1.0)


def leave_out_and_plain(credit: str, *names: str) -> list[Row]:
    """Baselines that are fitted on the batch, without and with one's own part."""
    return [
        row
        for name in names
        for row in (
            Row(credit, name, UNBIASED),
            Row(credit, f"{name}-plain", BIASED),
        )
    ]


TO_GO, TOTAL = "reward-to-go", "total-return"
FITTED = ("optimal", "optimal-time", "optimal-termwise", "per-parameter")
KEPT = (("discount", 0.7), ("keep_leading_discount", True))

ON_POLICY = [
    *(
        row
        for credit in (TOTAL, TO_GO)
        for row in (
            Row(credit, "none", UNBIASED),
            Row(credit, "constant", UNBIASED),
            Row(credit, "batch-mean", SHRUNK),
            Row(credit, "leave-one-out", UNBIASED),
            *leave_out_and_plain(credit, "time-dependent", *FITTED),
        )
    ),
    *leave_out_and_plain(TO_GO, "peters-schaal"),
    Row(TO_GO, "value", UNBIASED),
    Row(TO_GO, "linear", UNBIASED),
    Row(TO_GO, "linear-folds", UNBIASED),
    Row(TO_GO, "linear-plain", BIASED),
    Row(TO_GO, "value-network", UNBIASED),
    Row(TO_GO, "leave-one-out", BIASED, standardize=True),
    Row(TOTAL, "leave-one-out", UNBIASED, settings=(("discount", 0.7),)),
    Row(TO_GO, "none", FORGETFUL, settings=(("discount", 0.7),)),
    Row(TO_GO, "time-dependent", FORGETFUL, settings=(("discount", 0.7),)),
    Row(TO_GO, "batch-mean", BIASED, settings=KEPT),
    Row(TO_GO, "none", UNBIASED, settings=KEPT),
    Row(TO_GO, "time-dependent", UNBIASED, settings=KEPT),
    Row(TO_GO, "optimal-time", UNBIASED, settings=KEPT),
]


def off_policy(credit: str, ratio: str, limit: str) -> list[Row]:
    """A form of ratios: bare, with baselines, truncated, self-normalised."""
    rows = [
        Row(credit, baseline, limit, ratio)
        for baseline in ("none", "leave-one-out", "time-dependent", "optimal-time")
    ]
    rows.append(Row(credit, "none", BIASED, ratio, (("max_rho", 1.2),)))
    if ratio != "past-dropped":
        rows.append(Row(credit, "none", BIASED, ratio, (("self_normalize", True),)))
    return rows


OFF_POLICY = [
    *off_policy(TOTAL, "whole", UNBIASED),
    *off_policy(TO_GO, "whole", UNBIASED),
    *off_policy(TO_GO, "causal", UNBIASED),
    Row(TO_GO, "constant", BIASED, "causal", (("max_rho", 1.2),)),
    Row(TO_GO, "time-dependent", UNBIASED, "causal", KEPT),
    *off_policy(TO_GO, "future-dropped", TARGET_STATES),
    *off_policy(TO_GO, "past-dropped", TARGET_VALUES),
    *off_policy(TO_GO, "past-dropped-whole", TARGET_VALUES),
    *off_policy(TO_GO, "first-order", BEHAVIOUR),
]
TABLE = [*ON_POLICY, *OFF_POLICY]


class World(NamedTuple):
    """A small world, and two policies in it."""

    mdp: TabularMDP
    policy: Any
    target: Any
    behaviour: Any

    @property
    def policy_space(self) -> Discrete:
        """What the policies see."""
        emission = self.mdp.emission
        num_states = self.mdp.reward.shape[0]
        return Discrete(num_states if emission is None else emission.shape[1])


class Verdict(NamedTuple):
    """What the oracle says of one row."""

    mean: np.ndarray
    exact: np.ndarray
    limit: np.ndarray | None
    total_variance: float


def world_of(mdp: TabularMDP) -> World:
    """Two tabular policies of normal logits, the one that learns and one that acts."""
    space = World(mdp, None, None, None).policy_space
    policy = tabular_policy(space, Discrete(mdp.reward.shape[1]))
    obs = jnp.zeros((), jnp.int32)
    target, behaviour = (policy.init(jax.random.key(i), obs) for i in (1, 2))
    return World(mdp, policy, target, behaviour)


def judge(world: World, rows: list[Row], batch_size: int) -> list[Verdict]:
    """Exact mean and variance of each row; rows of one kind are enumerated together."""
    acts = world.target if rows[0].ratio == "none" else world.behaviour
    estimates = [make_estimate(world, row) for row in rows]

    def all_estimates(trajectories: Any) -> Any:
        ids = jnp.arange(batch_size, dtype=jnp.int32)[:, None]
        numbered = trajectories._replace(
            episode_id=jnp.broadcast_to(ids, trajectories.mask.shape)
        )
        return [estimate(numbered) for estimate in estimates]

    moments = exact.estimate_moments(
        all_estimates, world.mdp, world.policy, acts, batch_size
    )
    discounts = {row.discount for row in rows}
    targets = {discount: target_of(world, discount) for discount in discounts}
    return [
        Verdict(
            flat(mean),
            flat(targets[row.discount]),
            limit_of(world, row),
            float(flat(variance).sum()),
        )
        for row, mean, variance in zip(
            rows, moments.mean, moments.variance, strict=True
        )
    ]


def make_estimate(world: World, row: Row) -> Any:
    """The row's estimator as a function of a batch."""
    estimator, state = estimator_of(world, row)

    def estimate(trajectories: Any) -> Any:
        return estimate_gradient(estimator, world.target, state, trajectories)

    return estimate


def estimator_of(world: World, row: Row) -> tuple[Estimator, Any]:
    """The row's estimator, and the state of its baseline."""
    own = own_baseline(world, row)
    config = EstimatorConfig(
        credit=CreditConfig(credit=row.credit, ratio=row.ratio, **dict(row.settings)),
        baseline=row.baseline if own is None else "none",
        standardize=row.standardize,
    )
    estimator = make_estimator(
        config,
        world.policy,
        world.mdp.horizon,
        observation_space=world.policy_space,
        baseline=own,
    )
    state = estimator.baseline.init(jax.random.key(0), jnp.zeros((), jnp.int32))
    earlier = exact.enumerate_trajectories(world.mdp).trajectories
    if config.credit.ratio == "none":
        state, _ = estimator.baseline.fit(state, earlier, credit_of(earlier))
    return estimator, state


def own_baseline(world: World, row: Row) -> Baseline | None:
    """Baselines that have no name in `estimators`."""
    if row.baseline == "constant":
        return constant_baseline(0.8)
    if row.baseline == "value":
        values = exact.state_values(world.mdp, world.policy, world.target)
        return stateless(lambda params, summary, rows, _: values[rows.time, rows.obs])
    return None


def limit_variances(world: World, rows: list[Row]) -> list[float | None]:
    """Variance of one trajectory's term when the batch is so large that it knows all.

    What the baseline must know of the batch is replaced by its exact expectation; with
    it, leaving one's own part out or not is the same. None where weights are divided by
    a statistic of the whole batch, for then a trajectory has no term of its own.
    """
    known = [row for row in rows if not divides(row)]
    pairs = [
        estimator_of(world, row._replace(baseline=plain_twin(row.baseline)))
        for row in known
    ]
    acts = world.target if rows[0].ratio == "none" else world.behaviour

    def summaries_of(trajectories: Any) -> Any:
        return [summarize_batch(e, world.target, trajectories) for e, _ in pairs]

    summaries = exact.expected_estimate(summaries_of, world.mdp, world.policy, acts, 1)

    def terms(trajectories: Any) -> Any:
        return [
            estimate_terms(e, world.target, state, trajectories, summary=summary)
            for (e, state), summary in zip(pairs, summaries, strict=True)
        ]

    moments = exact.estimate_moments(terms, world.mdp, world.policy, acts, 1)
    variances = iter([float(flat(v).sum()) for v in moments.variance])
    return [None if divides(row) else next(variances) for row in rows]


def divides(row: Row) -> bool:
    """Whether its weights are divided by a statistic of the whole batch."""
    return row.standardize or dict(row.settings).get("self_normalize", False)


def plain_twin(baseline: str) -> str:
    """The same baseline with one's own part in it."""
    if baseline == "leave-one-out":
        return "batch-mean"
    if baseline == "linear-folds":
        return "linear-plain"
    plain = f"{baseline}-plain"
    return plain if plain in BASELINES else baseline


def target_of(world: World, discount: float) -> Any:
    """The exact gradient that rows of this discount are asked about."""
    return exact.policy_gradient(world.mdp, world.policy, world.target, discount)


def limit_of(world: World, row: Row) -> np.ndarray | None:
    """What a biased row is claimed to have for its mean, where theory says it."""
    if row.claim not in LIMITS:
        return None
    states, values = (getattr(world, who) for who in LIMITS[row.claim])
    return flat(
        exact.mixed_gradient(
            world.mdp, world.policy, world.target, states, values, row.discount
        )
    )


def flat(tree: Any) -> np.ndarray:
    """All numbers of a tree in one row."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    rows = report(world_of(canonical_mdp()))
    path = timing.save("oracle-table", {"batch_size": BATCH_SIZE, "rows": rows})
    for row in rows:
        limit = row["limit_variance"]
        limit = " " * 10 if limit is None else f"{limit:10.4f}"
        print(f"{row['bias']:8.4f} {row['variance']:10.4f} {limit}  {row['name']}")
    print(f"stored in {path.name}")


def report(world: World) -> list[dict[str, Any]]:
    """The whole table as it is stored."""
    return [
        line
        for rows in (ON_POLICY, OFF_POLICY)
        for line in lines_of(world, rows, judge(world, rows, BATCH_SIZE))
    ]


def lines_of(
    world: World, rows: list[Row], verdicts: list[Verdict]
) -> list[dict[str, Any]]:
    """Bias relative to the exact gradient's length; variances times N."""
    limits = limit_variances(world, rows)
    return [
        {
            "name": row.name,
            **row._asdict(),
            "bias": float(
                np.linalg.norm(verdict.mean - verdict.exact)
                / np.linalg.norm(verdict.exact)
            ),
            "variance": BATCH_SIZE * verdict.total_variance,
            "limit_variance": limit,
        }
        for row, verdict, limit in zip(rows, verdicts, limits, strict=True)
    ]


if __name__ == "__main__":
    main()
