"""Hard attention: the sensor, the canvases, and who is blamed for what."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.systems.attention_models import attention_loss, make_learner
from jaxpg.systems.attention_settings import HardAttentionSettings
from jaxpg.systems.canvases import draw_canvases, fixed_canvases
from jaxpg.systems.digits import Digits, load_digits
from jaxpg.systems.glimpses import look, make_eye
from jaxpg.systems.hard_attention import hard_attention, share_of_room

SMALL = {
    "num_glimpses": 3,
    "glimpse": 8,
    "scales": 2,
    "features": 8,
    "memory": 8,
    "batch_size": 16,
    "placements": 1,
    "canvas": 12,
    "num_pieces": 1,
}


def crop_by_hand(canvas, place, size, scales):
    squares = []
    for factor in (2**i for i in range(scales)):
        wide = size * factor
        middle = [
            (p + 1) / 2 * (n - 1) for p, n in zip(place, canvas.shape, strict=True)
        ]
        row, column = (int(np.floor(m - (wide - 1) / 2 + 0.5)) for m in middle)
        padded = np.pad(canvas, wide)
        square = padded[row + wide : row + 2 * wide, column + wide : column + 2 * wide]
        squares.append(square.reshape(size, factor, size, factor).mean((1, 3)))
    return np.stack(squares)


@pytest.mark.parametrize(
    "place", [(0.0, 0.0), (-1.0, -1.0), (1.0, 0.3), (-0.2, 1.0), (0.5, -0.77)]
)
def test_the_sensor_is_a_crop_by_hand_edges_included(place):
    canvas = np.random.default_rng(0).random((11, 14)).astype(np.float32)
    seen = look(jnp.asarray(canvas), jnp.array(place, jnp.float32), 4, 3)
    np.testing.assert_allclose(seen, crop_by_hand(canvas, place, 4, 3), atol=1e-6)


@pytest.fixture(scope="module")
def marked():
    """Digits whose pixels tell which digit and which pixel they are."""
    images = np.arange(1, 1 + 5 * 16).reshape(5, 4, 4).astype(np.float32) / 100
    return Digits(images, np.arange(5, dtype=np.int32))


def test_a_canvas_holds_its_digit_untouched_and_else_only_clutter(marked):
    which = jnp.array([3, 0, 4, 4, 1])
    clutter = jnp.full((2, 4, 4), 7.0)
    drawn = draw_canvases(
        jax.random.key(0), marked, which, clutter, size=9, num_pieces=3, piece=3
    )
    assert drawn.labels.tolist() == which.tolist()
    for image, digit, (row, column) in zip(
        np.array(drawn.images), which, np.asarray(drawn.corners), strict=True
    ):
        np.testing.assert_array_equal(
            image[row : row + 4, column : column + 4], marked.images[digit]
        )
        image[row : row + 4, column : column + 4] = 0.0
        assert set(np.unique(image)) <= {0.0, 7.0}
    assert (np.asarray(drawn.images) == 7.0).any()


def test_digits_come_to_lie_everywhere_up_to_both_edges(marked):
    which = jnp.zeros(300, jnp.int32)
    blank = jnp.zeros((1, 4, 4))
    corners = draw_canvases(
        jax.random.key(1), marked, which, blank, size=6, num_pieces=1, piece=2
    ).corners
    assert {tuple(c) for c in np.asarray(corners).tolist()} == set(
        itertools.product(range(3), range(3))
    )


@pytest.mark.parametrize(
    ("spread", "found"),
    [(0.0, {3}), (0.5, {1, 2, 3, 4, 5}), (1.0, {0, 1, 2, 3, 4, 5, 6})],
)
def test_digits_are_spread_from_the_middle_evenly_on_both_sides(marked, spread, found):
    which, blank = jnp.zeros(4000, jnp.int32), jnp.zeros((1, 4, 4))
    corners = np.asarray(
        draw_canvases(
            *(jax.random.key(2), marked, which, blank),
            **{"size": 10, "num_pieces": 1, "piece": 2, "spread": spread},
        ).corners
    )
    assert set(corners.ravel().tolist()) == found
    assert corners.mean() == pytest.approx(3.0, abs=0.1)
    if spread == 1.0:
        counts = np.bincount(corners.ravel(), minlength=7)
        assert abs(counts - 8000 / 7).max() < 4.5 * np.sqrt(8000 / 7)


def test_training_spreads_its_digits_over_the_updates_that_are_set():
    def share(spread_updates, count):
        settings = HardAttentionSettings(spread_updates=spread_updates)
        return float(share_of_room(settings, jnp.array(count, jnp.int32)))

    assert share(9, 0) == pytest.approx(0.1) and share(9, 4) == pytest.approx(0.5)
    assert share(9, 9) == 1.0 == share(9, 500) == share(0, 0)


def test_fixed_canvases_are_the_same_each_time(marked):
    make = functools.partial(
        fixed_canvases, marked, jnp.ones((1, 4, 4)), 2, size=8, piece=2
    )
    np.testing.assert_array_equal(make(seed=1).images, make(seed=1).images)
    assert (make(seed=1).images != make(seed=2).images).any()
    assert make(seed=1).labels.tolist() == [0, 1, 2, 3, 4] * 2


def test_what_does_not_fit_on_a_canvas_is_refused(marked):
    which, clutter = jnp.zeros(1, jnp.int32), jnp.zeros((1, 4, 4))
    with pytest.raises(ValueError, match=r"canvas size is 3, needs .* fit on it"):
        draw_canvases(jax.random.key(0), marked, which, clutter, size=3)
    with pytest.raises(ValueError, match=r"spread is 1.5, needs .* share of the room"):
        draw_canvases(jax.random.key(0), marked, which, clutter, piece=2, spread=1.5)
    with pytest.raises(ValueError, match=r"piece is 5, needs .* cut from a digit"):
        draw_canvases(jax.random.key(0), marked, which, clutter, size=9, piece=5)


# --- gradients


@pytest.fixture(scope="module")
def eye():
    return make_eye(num_glimpses=3, size=8, scales=2, features=6, memory=5, std=0.3)


@pytest.fixture(scope="module")
def params(eye):
    return eye.init(jax.random.key(0))


@pytest.fixture(scope="module")
def canvas():
    return jax.random.uniform(jax.random.key(5), (9, 9))


def norms(tree):
    return {
        name: float(sum(jnp.sum(x**2) for x in jax.tree.leaves(part)))
        for name, part in tree.items()
    }


LABEL = jnp.array(2, jnp.int32)


def test_the_sensor_passes_no_gradient_to_its_place(canvas):
    def ink(place):
        return jnp.sum(look(canvas, place, 4, 2) ** 2)

    assert ink(jnp.zeros(2)) != ink(jnp.ones(2))
    np.testing.assert_array_equal(jax.grad(ink)(jnp.full(2, 0.1)), jnp.zeros(2))


@pytest.mark.parametrize("credit", ["reward", "likelihood"])
@pytest.mark.thinned(2)
def test_the_estimate_moves_the_places_and_fits_the_baseline(
    eye, params, canvas, credit
):
    loss = attention_loss(eye, credit, 1.0)
    gradient, (_, error) = jax.grad(loss, has_aux=True)(
        params, jax.random.key(1), canvas, LABEL
    )
    found = norms(gradient)
    assert error > 0.0 and all(found[name] > 0.0 for name in params)


def test_the_location_learns_from_the_score_alone(eye, params, canvas):
    """Equal to sum_t dlog p(l_t) (cost - baseline), written without the operator."""
    key = jax.random.key(1)
    loss = attention_loss(eye, "reward", 1.0)
    gradient, (logits, _) = jax.grad(loss, has_aux=True)(params, key, canvas, LABEL)
    wrong = float(jnp.argmax(logits) != LABEL)

    def scores(params):
        total = []

        def draw(key, distribution, baseline):
            value = jax.lax.stop_gradient(distribution.sample(key))
            total.append(distribution.log_prob(value) * (wrong - 0.0))
            return value

        with jax.disable_jit():
            eye.gaze(params, key, canvas, draw)
        return sum(total)

    assert wrong == 1.0, "else there is nothing to compare"
    expected = jax.grad(scores)(params)["location"]
    for ours, theirs in zip(
        jax.tree.leaves(gradient["location"]), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_baseline_alone_feels_its_error(eye, params, canvas):
    """With cost weight 0 the score has nothing to say but the baseline's own value."""
    shifted = jax.tree.map(lambda x: x, params)
    shifted["baseline"] = jax.tree.map(lambda x: x + 0.5, params["baseline"])

    def gradient(weight, params):
        loss = attention_loss(eye, "reward", weight)
        return jax.grad(loss, has_aux=True)(params, jax.random.key(1), canvas, LABEL)[0]

    plain, other = gradient(1.0, params), gradient(1.0, shifted)
    # Only the score's weight, and so only what lies before a place, may change with it.
    assert norms(other)["baseline"] != pytest.approx(norms(plain)["baseline"])
    for ours, theirs in zip(
        jax.tree.leaves(other["core"]["read"]),
        jax.tree.leaves(plain["core"]["read"]),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    # A baseline that is exact leaves places nothing to learn and has nothing to learn.
    exact = gradient(0.0, params)
    assert norms(exact)["baseline"] == 0.0 and norms(exact)["location"] == 0.0


# --- the system


@pytest.mark.parametrize(
    "model", ["attention", "random-glimpses", "convolutional", "fully-connected"]
)
@pytest.mark.thinned(2)
def test_every_model_answers(model):
    learner = make_learner(
        HardAttentionSettings(model=model, credit="likelihood", **SMALL)
    )
    params = learner.init(jax.random.key(0))
    canvas = jax.random.uniform(jax.random.key(1), (12, 12))
    logits = learner.predict(params, jax.random.key(2), canvas)
    assert logits.shape == (10,) and bool(jnp.all(jnp.isfinite(logits)))
    loss, (_, error) = learner.loss(params, jax.random.key(2), canvas, LABEL)
    assert jnp.isfinite(loss) and (error > 0.0) == (model == "attention")


@pytest.mark.parametrize(("credit", "cost"), [("reward", 0.9), ("likelihood", 2.3026)])
@pytest.mark.thinned(2)
def test_places_are_first_expected_to_cost_what_a_guess_does(credit, cost):
    learner = make_learner(HardAttentionSettings(credit=credit, **SMALL))
    expected = []

    def choose(key, distribution, baseline):
        expected.append(float(baseline))
        return distribution.mode()

    with jax.disable_jit():
        params, key = learner.init(jax.random.key(0)), jax.random.key(1)
        learner.eye.gaze(params, key, jnp.ones((12, 12)), choose)
    assert expected == pytest.approx([cost] * (SMALL["num_glimpses"] - 1), abs=1e-4)


def test_random_glimpses_are_anywhere_and_owe_nothing_to_the_network():
    learner = make_learner(HardAttentionSettings(model="random-glimpses", **SMALL))
    canvas = jnp.zeros((12, 12))
    places = [
        learner.eye.gaze(
            learner.init(jax.random.key(seed)),
            jax.random.key(9),
            canvas,
            learner.choose,
        ).places
        for seed in (0, 1)
    ]
    np.testing.assert_array_equal(*places)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_it_learns_on_tiny_canvases(tmp_path):
    """Digits of 8 x 8 on 10 x 10, no clutter: far above chance in a few seconds."""
    settings = HardAttentionSettings(
        **(
            SMALL
            | {"canvas": 10, "num_pieces": 0, "scales": 1}
            | {"features": 48, "memory": 48, "batch_size": 32}
        ),
        learning_rate=3e-3,
        decay_updates=400,
        spread_updates=100,
    )
    system = hard_attention(settings)
    state = system.init(jax.random.key(0))

    @jax.jit
    def many(state):
        keys = jax.random.split(jax.random.key(1), 400)
        return jax.lax.scan(lambda s, k: system.update(k, s), state, keys)[0]

    before = system.evaluate(jax.random.key(2), state)["accuracy"]
    state = many(state)
    after = system.evaluate(jax.random.key(2), state)["accuracy"]
    assert before < 0.3 and after > 0.7, "chance is 0.1, three seeds reached 0.82"
    system.picture(jax.tree.map(lambda x: x, state), tmp_path / "paths.png")
    assert (tmp_path / "paths.png").stat().st_size > 5000


def test_validation_digits_are_neither_trained_on_nor_the_test():
    data = load_digits()
    system = hard_attention(HardAttentionSettings(held_out="validation", **SMALL))
    found = jax.eval_shape(
        system.evaluate,
        jax.random.key(0),
        jax.eval_shape(system.init, jax.random.key(0)),
    )
    assert set(found) == {"accuracy", "cross_entropy"} and len(data.test.labels) == 359


def test_settings_that_make_no_sense_are_refused():
    for changes, told in [
        ({"num_glimpses": 1}, "there is no place to choose"),
        ({"std": 0.0}, "std is 0.0"),
        ({"placements": 0}, "placements is 0"),
        ({"spread_updates": -1}, "spread_updates is -1"),
        ({"glimpse": 7}, "glimpse is 7"),
    ]:
        with pytest.raises(ValueError, match=told):
            HardAttentionSettings(**changes)
