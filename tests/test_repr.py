"""What public objects say of themselves: at most three lines, what was chosen and no more, and no address of memory."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from public_for_tests import public_names

import jbilevel as jb
from jbilevel import alternating, task
from jbilevel._core.brief import label
from jbilevel._training.fingerprint import describe

THREE_LINES = 3 * 120
PARAMS, BATCH = jnp.array(0.0), jnp.ones((3, 2))


def energy(p, x, d):
    return 0.5 * jnp.sum((x - d) ** 2) + 0.5 * jnp.exp(p) * jnp.sum(x**2)


def start(p, d):
    return jnp.zeros_like(d)


def pair(p, d):
    return jnp.zeros_like(d), jnp.zeros_like(d)


def linear(p, x, d):
    return x


def prox(p, v, step, d):
    return v / (1 + step)


def distance(p, x, d):
    return jnp.sum((x - d) ** 2)


def network(p, x):
    return p * x


def regularizer(p, x):
    return jnp.sum(x**4)


@dataclasses.dataclass(frozen=True)
class Turns(alternating.Batches):
    def of_task(self, x, batch):
        return batch

    def of_reconstruction(self, task_params, batch):
        return batch


@dataclasses.dataclass(frozen=True)
class Own(jb.Problem):
    """A class of a user, who has not heard of reprs."""

    energy: object
    weight: float = 1.0

    def view(self, params, data):
        return jb.SmoothView(partial(self.energy, params, data=data), jb.Constants())

    def start(self, params, data):
        return jnp.zeros_like(data)


class Plain(jb.Problem):
    """One that is no dataclass."""

    view = start = None


SMOOTH = jb.SmoothProblem(energy, start, strong_convexity=1.0)
SADDLE = jb.SaddleProblem(linear, prox, prox, pair, mu_primal=1.0, mu_dual=1.0, norm=1.0)
SPARSE = jb.WeightedL1Problem(energy, start, groups=0)
TV = jb.regularizers.SmoothedTV(eps=0.01)
SCAN = jb.operators.ParallelBeam((8, 8), [0.1 * k for k in range(12)], 12)
STEPS = jb.operators.Gradient((4, 4))
ORACLE = jb.implicit.Oracle(SMOOTH, distance)
EXACT = jb.explicit.Oracle(network)
MASK = jb.operators.Mask(np.eye(4))
CRR = jb.regularizers.CRR(widths=(4, 8), sizes=(3, 5), potential="huber")
ADAM = optax.adam(1e-3)
ADAM_SAID = "GradientTransformationExtraArgs(...)"
DISTANCE = "SmoothProblem(energy, start, strong_convexity=1.0), distance"

# Said by each in full: first what has no default, then what was chosen.
SAID = [
    (SMOOTH, "SmoothProblem(energy, start, strong_convexity=1.0)"),
    (jb.SmoothProblem(lambda *_: 0.0, start, mixed_norm=1 / 3), "SmoothProblem(<lambda>, start, mixed_norm=0.333333)"),
    (SADDLE, "SaddleProblem(linear, prox, prox, pair, mu_primal=1.0, mu_dual=1.0, norm=1.0)"),
    (SPARSE, "WeightedL1Problem(energy, start, groups=0)"),
    (Own(energy, 2.0), "Own(energy, weight=2.0)"),
    (Plain(), "Plain(...)"),
    (jb.variational(None, TV), "VariationalProblem(None, SmoothedTV(eps=0.01))"),
    (jb.variational(None, regularizer, ridge=0.5), "VariationalProblem(None, regularizer, ridge=0.5)"),
    (
        jb.variational(SCAN, TV, operator_norm=10.0),
        "VariationalProblem(ParallelBeam((8, 8), tuple of 12, 12), SmoothedTV(eps=0.01), operator_norm=10.0)",
    ),
    (
        jb.variational(None, jb.regularizers.TV(width=0.1), nonnegative=True),
        "VariationalSaddle(None, TV(width=0.1), nonnegative=True)",
    ),
    (ORACLE, f"implicit.Oracle({DISTANCE})"),
    (
        jb.implicit.Oracle(
            jb.variational(None, TV),
            jb.losses.squared_error(),
            in_axes={"y": 0, "x": None},
            chunk=None,
            correct=True,
            linear_solver=jb.solvers.MINRES(),
        ),
        "implicit.Oracle(VariationalProblem(...), ImageLoss(_half_square), in_axes={'x': None, 'y': 0}, chunk=None, "
        "correct=True, linear_solver=MINRES())",
    ),
    (
        jb.piggyback.Oracle(SADDLE, distance, mode="simultaneous"),
        "piggyback.Oracle(SaddleProblem(linear, prox, prox, pair, mu_primal=1.0, mu_dual=1.0, norm=1.0), distance, "
        "mode='simultaneous')",
    ),
    (
        jb.nonsmooth.Oracle(SPARSE, distance, damping=0.1),
        "nonsmooth.Oracle(WeightedL1Problem(energy, start, groups=0), distance, damping=0.1)",
    ),
    (jb.unroll.Oracle(SMOOTH, distance, steps=10), f"unroll.Oracle({DISTANCE}, steps=10)"),
    (jb.unroll.OneStep(SMOOTH, distance, step=0.1), f"OneStep({DISTANCE}, step=0.1)"),
    (EXACT, "explicit.Oracle(network)"),
    (
        jb.MAID(ORACLE, projection=partial(jb.prox.box, lower=0.0), window=0.5),
        "MAID(implicit.Oracle(...), projection=box, window=0.5)",
    ),
    (jb.HOAG(EXACT), "HOAG(explicit.Oracle(network))"),
    (jb.QuasiNewton(EXACT), "QuasiNewton(explicit.Oracle(network))"),
    (jb.Stochastic(EXACT), "Stochastic(explicit.Oracle(network))"),
    (jb.Stochastic(EXACT, ADAM), f"Stochastic(explicit.Oracle(network), optimizer={ADAM_SAID})"),
    (jb.NBA(EXACT), "NBA(explicit.Oracle(network))"),
    (jb.FirstOrder(EXACT, ADAM, tol=1e-3), f"FirstOrder(explicit.Oracle(network), {ADAM_SAID}, tol=0.001)"),
    (
        alternating.Alternating(EXACT, jb.HOAG(EXACT), jb.FirstOrder(EXACT, ADAM), batches=Turns()),
        "Alternating(explicit.Oracle(network), HOAG(...), FirstOrder(...), batches=Turns())",
    ),
    (Turns(), "Turns()"),
    (jb.losses.Segmentation(iou=0.0, ignore=255), "Segmentation(iou=0.0, ignore=255)"),
    (jb.losses.huber(delta=0.2, part=(0, 0)), "ImageLoss(_huber, scale=0.2, part=(0, 0))"),
    (jb.losses.Adversarial(TV, penalty=5.0), "Adversarial(SmoothedTV(eps=0.01), penalty=5.0)"),
    (jb.losses.DenoisingScore(TV), "DenoisingScore(SmoothedTV(eps=0.01))"),
    (jb.nets.JointLoss(network, network, jb.losses.dice, 0.5), "JointLoss(network, network, dice, 0.5)"),
    (
        task.Pipeline(SMOOTH, network, jb.losses.dice),
        "Pipeline(SmoothProblem(energy, start, strong_convexity=1.0), network, dice)",
    ),
    (TV, "SmoothedTV(eps=0.01)"),
    (SCAN, "ParallelBeam((8, 8), tuple of 12, 12)"),
    (SCAN.T, "Transpose(ParallelBeam((8, 8), tuple of 12, 12))"),
    (SCAN.T @ SCAN, "Composition(Transpose(...), ParallelBeam((8, 8), tuple of 12, 12))"),
    (MASK, "Mask(bool[4,4])"),
    (2.0 * STEPS, "Scaled(Gradient((4, 4), axes=(0, 1)), 2.0)"),
    (jb.operators.stack([MASK, MASK]), "Stack((Mask(bool[4,4]), Mask(bool[4,4])))"),
    (jb.operators.stack([MASK] * 9), "Stack(tuple of 9)"),
    (jb.operators.Blur((7, 11), np.ones((3, 5))), "Blur((7, 11), float64[3,5])"),
    (CRR, "CRR(widths=(4, 8), sizes=(3, 5), potential='huber')"),
    (jb.regularizers.WCRR(), "WCRR()"),
    (jb.regularizers.FoE(), "FoE()"),
    (jb.regularizers.ICNN(), "ICNN()"),
    (jb.regularizers.LearnedTV(sums="free"), "LearnedTV(sums='free')"),
    (jb.regularizers.TGV(), "TGV()"),
    (jb.regularizers.WeightedTV(), "WeightedTV()"),
    (jb.solvers.CG(), "CG()"),
    (jb.solvers.Diagonal(network), "Diagonal(network)"),
    (jb.solvers.CG(preconditioner=jb.solvers.Diagonal(network)), "CG(preconditioner=Diagonal(network))"),
    (jb.solvers.AGD(smoothness=2.0), "AGD(smoothness=2.0)"),
    (jb.solvers.External(network), "External(network)"),
    (jb.solvers.Optax(ADAM), f"Optax({ADAM_SAID})"),
    (jb.Constants(1.0, np.ones(3, np.float32)), "Constants(strong_convexity=1.0, smoothness=float32[3])"),
    (jb.SaddleConstants(linear_mixed=0.0), "SaddleConstants(linear_mixed=0.0)"),
    (jb.Warm(jnp.ones((3, 2), jnp.float32), None), "Warm(x=float32[3,2], adjoint=None)"),
    (jb.Validation(ORACLE, BATCH), "Validation(implicit.Oracle(...), every=1, patience=None, value=inf, step=None)"),
]


@pytest.mark.parametrize("thing, words", SAID, ids=[words.split("(")[0] for _, words in SAID])
def test_what_was_chosen_is_said_and_nothing_else(thing, words):
    assert repr(thing) == words


@pytest.fixture(scope="module")
def computed() -> list:
    """Results, states and views, and what a run and a task return."""
    scalars = BATCH[:, 0]
    state = jax.eval_shape(jb.MAID(ORACLE).init, PARAMS, BATCH)
    fit = jb.fit(jb.HOAG(EXACT), PARAMS, scalars, steps=1)
    averaged = jb.FirstOrder(EXACT, ADAM, average=0.5).init(PARAMS, scalars)
    turns = alternating.AlternatingState(
        params=PARAMS, warm=None, tol=0.1, adjoint_tol=0.1, reconstruction=state, task=averaged
    )
    mini = jb.Stochastic(EXACT, ADAM).init(PARAMS, scalars)
    hypergradient, info = EXACT(PARAMS, scalars), jb.SolveInfo.exact(1.0)
    return [
        hypergradient,
        jax.eval_shape(ORACLE, PARAMS, BATCH),
        EXACT.value(PARAMS, scalars),
        info,
        info.evaluations,
        hypergradient.warm,
        jb.Sample(PARAMS, hypergradient.warm, info, info),
        jb.StepInfo(**{name: np.float32(0.1) for name in jb.StepInfo._fields} | {"status": np.int32(3)}),
        state,
        fit.state,
        jax.eval_shape(jb.NBA(EXACT).init, PARAMS, scalars),
        averaged,
        averaged.average,
        turns,
        jax.eval_shape(jb.QuasiNewton(EXACT).init, PARAMS, scalars),
        jax.eval_shape(jb.Stochastic(EXACT).init, PARAMS, scalars),
        mini,
        mini.probes,
        fit,
        jb.TaskAdapted(PARAMS, PARAMS, fit, task.Pipeline(SMOOTH, network, jb.losses.dice)),
        SMOOTH.view(PARAMS, BATCH[0]),
        SADDLE.view(PARAMS, BATCH[0]),
        SPARSE.view(PARAMS, BATCH),
        TV.saddle(jnp.zeros(1)),
        jb.operators.dot_test(STEPS),
        *plain_objects(),
    ]


def plain_objects() -> list:
    """Those of which nothing but the length is looked at."""
    solvers = [getattr(jb.solvers, name) for name in ("ForwardBackward", "LBFGS", "NewtonCG", "NonmonotoneAPG", "PDHG")]
    operators = jb.operators
    angles = tuple(0.1 * k for k in range(100))
    ridges = TV.ridges(TV.init(weight=0.5), (8, 8))
    return [
        *(solver() for solver in solvers),
        jb.solvers.MINRES(),
        jb.regularizers.TV(),
        ridges,
        *ridges.terms,
        operators.ConeBeam((4, 8, 8), angles, (4, 12), source_origin=20.0, origin_detector=10.0),
        operators.FanBeam((8, 8), angles, 12, source_origin=20.0, origin_detector=10.0),
        operators.ParallelBeam3D((4, 8, 8), angles, (4, 12)),
        operators.DownSample((8, 8), 2),
        STEPS,
        operators.UndersampledFourier((8, 8), np.ones((8, 8)), coils=np.ones((3, 8, 8))),
        operators.Wavelet((8, 8)),
    ]


def test_results_fit_three_lines(computed):
    for thing in computed:
        words = repr(thing)
        assert words.startswith(f"{label(thing)}(") and words.endswith(")"), words
        assert len(words) <= THREE_LINES and "\n" not in words and "0x" not in words, words


def test_nothing_is_longer_however_much_was_chosen():
    named = {name: partial(distance, 0.0, 0.0) for name in jb.Constants._fields}
    problem = jb.SmoothProblem(energy, start, **named)
    oracle = jb.implicit.Oracle(problem, distance, in_axes={f"entry {k}": k for k in range(50)}, error_steps=3)
    numbers = {f.name: 0.123456789 for f in dataclasses.fields(jb.MAID) if f.default == 0.5}
    for thing in (problem, oracle, jb.MAID(oracle, projection=partial(distance), **numbers)):
        assert len(repr(thing)) <= THREE_LINES and "\n" not in repr(thing)


def test_numbers_of_a_batch_and_of_a_traced_one():
    info = jb.SolveInfo(
        jnp.array([0, 3, 0]),
        jnp.array([2, 500, 3]),
        residual=jnp.array([0.0, 0.5, 1e-9]),
        error=jnp.array([jnp.inf] * 3),
        evaluations=jb.Work(0, jnp.array([1, 2, 3]), 7),
    )
    assert repr(info) == (
        "SolveInfo(status=2 CONVERGED and 1 MAX_STEPS, steps=2 to 500, residual=0 to 0.5, error=inf, "
        "evaluations=Work(values=0, gradients=1 to 3, products=7))"
    )
    words = []
    jax.jit(lambda info: words.append(repr(info)))(info)
    words.append(repr(jax.eval_shape(lambda: info)))
    assert words[0] == words[1] and words[0].startswith(
        "SolveInfo(status=int64[3], steps=int64[3], residual=float64[3]"
    )


def test_runs_are_told_apart_by_more_than_these_words():
    """Checkpoints name the run they are of: there nothing is left out, not even inside functions of a problem."""
    masks = [np.eye(4), np.eye(4)[::-1]]
    projections = [partial(jb.prox.box, TV), partial(jb.prox.box, jb.regularizers.SmoothedTV(eps=0.01, eps_max=2.0))]
    for form in ("smooth", "saddle"):
        oracles = [jb.variational(jb.operators.Mask(m), TV, form=form).oracle(distance) for m in masks]
        first, second = (jb.FirstOrder(oracle, ADAM) for oracle in oracles)
        assert repr(first) == repr(second) and describe(first) != describe(second)
    one, other = (jb.FirstOrder(EXACT, ADAM, projection=projection) for projection in projections)
    assert repr(one) == repr(other) and describe(one) != describe(other)
    again = jb.FirstOrder(EXACT, ADAM, projection=partial(jb.prox.box, jb.regularizers.SmoothedTV(eps=0.01)))
    assert describe(one) == describe(again) and "0x" not in str(describe(one))


# Public classes without a line above, each with the reason.
ELSEWHERE = {
    "ConvergenceError": "errors say their sentence",
    "Status": "enumerations say their name",
    "FitStatus": "enumerations say their name",
    "nets.ConvNet": "Flax shows its modules",
    "nets.LPD": "Flax shows its modules",
    "nets.ResNet": "Flax shows its modules",
    "nets.UNet": "Flax shows its modules",
    "operators.Astra": "its package is not installed everywhere; the repr is that of `LinearOperator`",
}


def test_every_public_class_is_looked_at(computed):
    seen = [type(thing) for thing, _ in SAID] + [type(thing) for thing in computed]
    missing = [
        public.name
        for public in public_names()
        if isinstance(public.thing, type)
        and not public.name.startswith("data.")  # arrays of readers, shown as NumPy shows them
        and not any(issubclass(kind, public.thing) for kind in seen)
    ]
    assert sorted(missing) == sorted(ELSEWHERE)
