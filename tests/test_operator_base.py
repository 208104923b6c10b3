"""The operator contract: combinations, norms, the dot test, users' functions, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbilevel.operators import LinearOperator, dot_test, from_callbacks, from_functions, stack

rng = np.random.default_rng(0)
MATRIX = rng.standard_normal((3, 4))
OTHER = rng.standard_normal((3, 4))
UNITARY = np.linalg.qr(rng.standard_normal((4, 4)) + 1j * rng.standard_normal((4, 4)))[0]


def of(matrix, **options):
    """The operator of a dense matrix."""
    matrix = jnp.asarray(matrix)
    shapes = (matrix.shape[1],), (matrix.shape[0],)
    return from_functions(lambda x: matrix @ x, lambda y: matrix.T @ y, *shapes, **options)


A, B = of(MATRIX), of(OTHER)
C = of(UNITARY, in_kind="complex")


def dense(operator):
    return np.asarray(jax.vmap(operator)(jnp.eye(operator.in_shape[0]))).T


@pytest.mark.parametrize(
    "operator, expected",
    [
        (A.T, MATRIX.T),
        (A.H, MATRIX.T),
        (A + B, MATRIX + OTHER),
        (A - B, MATRIX - OTHER),
        (-A, -MATRIX),
        (2.5 * A, 2.5 * MATRIX),
        (np.float64(2.5) * A, 2.5 * MATRIX),
        (A * jnp.asarray(2.5), 2.5 * MATRIX),
        (A.T @ B, MATRIX.T @ OTHER),
        ((A @ B.T).T, OTHER @ MATRIX.T),
        (C.T, UNITARY.T),
        (C.H, UNITARY.conj().T),
        (((1 + 2j) * C).H, (1 - 2j) * UNITARY.conj().T),
        (C.H @ C, np.eye(4)),
    ],
)
def test_combinations_equal_those_of_matrices(operator, expected):
    np.testing.assert_allclose(dense(operator), expected, atol=1e-14)
    assert max(dot_test(operator)) < 1e-14


def test_transposes_and_adjoints_undo_themselves():
    for operator in (A, A @ B.T, A + B, 2.0 * A, C, C.H, stack([A, B]), A.batched(2)):
        assert operator.T.T == operator and operator.H.H == operator
        assert operator.T.in_shape == operator.out_shape


def test_a_stack_is_a_tuple_and_its_transpose_sums():
    both = stack([A, 2.0 * B.T @ B])
    x = jnp.asarray(rng.standard_normal((5, 4)))
    first, second = both(x)
    assert first.shape == (5, 3) and second.shape == (5, 4)
    back = both.T((first, second))
    np.testing.assert_allclose(back, first @ MATRIX + 2 * second @ (OTHER.T @ OTHER), atol=1e-13)
    assert max(dot_test(both)) < 1e-14
    np.testing.assert_allclose(both.norm(), np.linalg.norm(np.vstack([MATRIX, 2 * OTHER.T @ OTHER]), 2), rtol=1e-3)
    slope = jax.grad(lambda x: sum(jnp.sum(y**2) for y in both(x)))(x)
    np.testing.assert_allclose(slope, 2 * back, atol=1e-12)
    with pytest.raises(ValueError, match="tuple of 2"):
        both.T(first)


def test_a_real_operator_before_a_complex_one():
    real = of(rng.standard_normal((4, 4)))
    chain = C @ real
    assert chain.in_kind == "real" and chain.out_kind == "complex" and not jnp.iscomplexobj(chain.H(jnp.ones(4)))
    assert max(dot_test(chain)) < 1e-14
    with pytest.raises(ValueError, match="real B"):
        real @ C


def test_exactness_is_carried_on():
    rough = of(OTHER, exact_adjoint=False)
    for operator in (rough, rough.T, 2.0 * rough, A + rough, A.T @ rough, stack([A, rough]), rough.batched(3), -rough):
        assert not operator.exact_adjoint
    assert (A.T @ B).exact_adjoint


def test_norm_is_a_number_even_inside_jit_and_as_accurate_as_said():
    wide = np.random.default_rng(1).standard_normal((40, 60))
    exact = np.linalg.norm(wide, 2)
    for tol in (1e-2, 1e-6):
        assert exact * (1 - 1e-12) <= of(wide).norm(tol) <= exact * (1 + tol)
    scaled = jax.jit(lambda x: x / A.norm())(1.0)
    np.testing.assert_allclose(1 / scaled, np.linalg.norm(MATRIX, 2), rtol=1e-3)
    assert of(np.zeros((2, 2))).norm() == 0
    with pytest.raises(ValueError, match="finite"):
        of(np.full((2, 2), np.inf)).norm()
    with pytest.raises(ValueError, match="`tol`"):
        A.norm(0.0)


def test_dot_test_sees_a_wrong_transpose():
    wrong = from_functions(
        lambda x: jnp.asarray(MATRIX) @ x, lambda y: jnp.asarray(OTHER).T @ y, (4,), (3,), exact_adjoint=False
    )
    found = dot_test(wrong, jax.random.key(3))
    assert found.adjoint > 1e-3 and found.transpose > 0.1
    missing_conjugate = from_functions(
        lambda x: jnp.asarray(UNITARY) @ x,
        lambda y: jnp.asarray(UNITARY.conj().T) @ y,
        (4,),
        (4,),
        in_kind="complex",
        exact_adjoint=False,
    )
    assert min(dot_test(missing_conjugate)) > 1e-3


def test_callbacks_get_the_whole_batch_at_once():
    sizes = []

    def forward(x):
        assert type(x) is np.ndarray
        sizes.append(x.shape)
        return x @ MATRIX.T

    many = from_callbacks(forward, lambda y: y @ MATRIX, (4,), (3,), dtype="float64", batched=True)
    sizes.clear()  # of the dot tests
    x = jnp.asarray(rng.standard_normal((2, 5, 4)))
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(many), 1, 1))(x), x @ MATRIX.T, atol=1e-14)
    assert sizes == [(10, 4)]
    each = from_callbacks(lambda x: MATRIX @ x, lambda y: MATRIX.T @ y, (4,), (3,), dtype="float64")
    np.testing.assert_allclose(each(x), x @ MATRIX.T, atol=1e-14)
    assert dot_test(each).adjoint < 1e-15 and np.isnan(dot_test(each).transpose)


def test_callbacks_compute_in_their_own_precision():
    seen = []

    def forward(x):
        seen.append(x.dtype)
        return x + np.zeros(4)  # a careless host function: double precision whatever it got

    single = from_callbacks(forward, forward, (4,), (4,))
    assert single(jnp.ones(4)).dtype == jnp.float64 and seen[-1] == np.float32
    double = from_callbacks(forward, forward, (4,), (4,), dtype="float64", in_kind="complex")
    assert double(jnp.ones(4, jnp.float32)).dtype == jnp.complex64 and seen[-1] == np.complex128


def test_a_host_function_that_returns_another_shape():
    wrong = from_callbacks(lambda x: x, lambda y: y, (4,), (3,))
    with pytest.raises(Exception, match="declared is"):
        jax.block_until_ready(wrong(jnp.ones(4)))
    with pytest.raises(ValueError, match="`forward` must return"):
        from_functions(lambda x: x, None, (4,), (3,))(jnp.ones(4))


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda x: x * 1j, "returned complex.*`out_kind`"),
        (lambda x: np.array(["a"] * 4), "returned <U1"),
        (lambda x: np.where(x > 1, np.nan, x), "NaN or infinity for a sample that is finite"),
    ],
)
def test_a_host_function_that_returns_something_else(function, words):
    A = from_callbacks(function, function, (4,), (4,))
    with pytest.raises(Exception, match=words):
        jax.block_until_ready(A(jnp.arange(4.0)))


def test_a_bad_sample_passes_through_a_callback():
    A = from_callbacks(lambda x: 2 * x, lambda y: 2 * y, (2,), (2,))
    out = A(jnp.array([[1.0, jnp.nan], [3.0, 4.0]]))
    np.testing.assert_array_equal(out, [[2.0, np.nan], [6.0, 8.0]])


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: A(jnp.ones(3)), ValueError, r"shape \(4,\)"),
        (lambda: A(1.0), ValueError, r"shape \(4,\)"),
        (lambda: A(jnp.arange(4)), TypeError, "floating"),
        (lambda: A(jnp.ones(4) + 1j), TypeError, "real and imaginary"),
        (lambda: A @ A, ValueError, "in_shape"),
        (lambda: A + A.T, ValueError, "in_shape"),
        (lambda: A + C, ValueError, "out_shape|in_kind"),
        (lambda: 1j * A, ValueError, "must be real"),
        (lambda: float("nan") * A, ValueError, "finite"),
        (lambda: jax.jit(lambda s: (s * A)(jnp.ones(4)))(1.0), TypeError, r"s \* A\(x\)"),
        (lambda: jnp.ones(2) * A, TypeError, r"s \* A\(x\)"),
        (lambda: A @ jnp.ones(4), TypeError, "unsupported operand|matmul"),
        (lambda: A.batched(0), ValueError, "`n`"),
        (lambda: stack([]), ValueError, "`operators`"),
        (lambda: stack([A, A.T]), ValueError, "in_shape"),
        (lambda: from_functions(None, None, (3,), (3,)), TypeError, "`forward`"),
        (lambda: from_functions(jnp.sin, None, (3.5,), (3,)), ValueError, "`in_shape`"),
        (lambda: from_functions(jnp.sin, None, (3,), (3,), in_kind="quaternion"), ValueError, "`in_kind`"),
        (lambda: from_callbacks(np.sin, np.sin, (3,), (3,), dtype="int32"), ValueError, "`dtype`"),
        (lambda: from_callbacks(np.sin, 3, (3,), (3,)), TypeError, "`transpose`"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_an_operator_is_a_protocol_of_two_methods():
    """A user's own operator: a frozen dataclass with forward and transpose."""
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Flip(LinearOperator):
        n: int
        in_shape = out_shape = property(lambda self: (self.n,))

        def forward(self, x):
            return x[..., ::-1]

        transpose = forward

    assert max(dot_test(Flip(5))) < 1e-15
    assert Flip(5) == Flip(5) and Flip(5).norm() == pytest.approx(1.0)
    assert jax.vmap(Flip(5))(jnp.ones((2, 5))).shape == (2, 5)


def test_an_operator_without_a_transpose_is_refused_when_it_is_made():
    with pytest.raises(TypeError, match="Half needs a method `transpose"):

        class Half(LinearOperator):
            def forward(self, x):
                return x / 2


def test_optional_abilities_say_that_they_are_missing():
    with pytest.raises(ValueError, match="FromFunctions has no filtered backprojection"):
        A.fbp(jnp.ones(3))
    with pytest.raises(ValueError, match="Composition has no subsets"):
        (A @ B.T).subset(0, 2)
