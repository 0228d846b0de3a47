"""Starts against their definitions: what they decompose, what they leave to be quantised, and how near that is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qlora_train.adapters.inits import factors as factors_module
from qlora_train.adapters.inits.factors import Factors, bottom_triples, split_evenly, top_triples
from qlora_train.adapters.inits.informed import (
    InputSketch,
    InputSpectrum,
    ThinGradient,
    eva,
    lora_ga,
    redistribute,
)
from qlora_train.adapters.inits.residual import Taken
from qlora_train.adapters.inits.spectral import loftq, milora, olora, pissa
from qlora_train.quant.bnb import QuantSettings, dequantize, quantize

NF4 = QuantSettings("nf4", double_quant=True, block_size=64, storage_dtype="uint8")
SHAPES = ((128, 192), (192, 128), (128, 128))
R = 8


def nf4(weight_OI: Tensor) -> Tensor:
    return dequantize(quantize(weight_OI, NF4))


def exact(weight_OI: Tensor) -> Tensor:
    return weight_OI


def heavy_tailed(num_out: int = 128, num_in: int = 192, seed: int = 0) -> Tensor:
    """A few strong directions on a heavy-tailed ground, as trained weights have them."""
    generator = torch.Generator().manual_seed(seed)
    ground = torch.randn(num_out, num_in, generator=generator) * torch.rand(num_out, num_in, generator=generator)
    left = torch.randn(num_out, 6, generator=generator)
    right = torch.randn(6, num_in, generator=generator)
    return (ground + 0.4 * left @ right) * 0.02


def error(candidate: Tensor, weight_OI: Tensor) -> float:
    return float((candidate - weight_OI).norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triples_equal_the_whole_decomposition(shape: tuple[int, int]) -> None:
    weight = heavy_tailed(*shape)
    singular = torch.linalg.svdvals(weight.double())
    for found, expected in ((top_triples(weight, R), singular[:R]), (bottom_triples(weight, R), singular[-R:])):
        left, values, right = found
        assert torch.allclose(values, expected, rtol=1e-6, atol=1e-9)
        eye = torch.eye(R, dtype=torch.float64)
        assert float((left.t() @ left - eye).abs().max()) < 1e-9
        assert float((right @ right.t() - eye).abs().max()) < 1e-9
        assert torch.allclose(left.t() @ weight.double() @ right.t(), torch.diag(values), atol=1e-9)


def test_the_iteration_for_large_weights_finds_the_same_space(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = heavy_tailed()
    exactly = top_triples(weight, 4)
    monkeypatch.setattr(factors_module, "EXACT_UP_TO", 1)
    before = torch.random.get_rng_state()
    iterated = top_triples(weight, 4)
    assert iterated[0].dtype == torch.float32, "negative control: the other path ran"
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.allclose(iterated[1].double(), exactly[1], rtol=1e-4)
    overlap = float((iterated[2].double() @ exactly[2].t()).square().sum()) / 4
    assert overlap > 0.9999


@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.25])
def test_pissa_takes_the_principal_part_and_leaves_the_rest(scaling: float) -> None:
    weight = heavy_tailed()
    started = pissa(weight, R, scaling, exact)
    assert started.taken is started.factors
    rest = Taken(started.factors, scaling).rest_of(weight)
    moved = started.factors.delta(scaling)
    assert error(rest + moved, weight) < 1e-6 * float(weight.norm())
    singular = torch.linalg.svdvals(weight.double())
    assert torch.allclose(torch.linalg.svdvals(moved.double())[:R], singular[:R], rtol=1e-5)
    assert float(torch.linalg.svdvals(rest.double())[0]) == pytest.approx(float(singular[R]), rel=1e-5)
    assert float(started.factors.lora_A.norm()) == pytest.approx(float(started.factors.lora_B.norm()), rel=1e-6)


def test_pissa_is_nearer_to_the_weight_than_nf4_and_from_a_quantised_weight_further() -> None:
    weight = heavy_tailed()
    plain = nf4(weight)

    def reached(source: Tensor, iters: int) -> float:
        started = pissa(source, R, 2.0, nf4, iters)
        return error(nf4(Taken(started.factors, 2.0).rest_of(source)) + started.factors.delta(2.0), weight)

    nf4_error, once, often = error(plain, weight), reached(weight, 1), reached(weight, 5)
    assert often < once < 0.97 * nf4_error
    assert reached(plain, 1) > nf4_error, "negative control: a start from the quantised weight must add error"


@pytest.mark.parametrize("scaling", [1.0, 2.0, 4.0])
def test_loftq_corrects_by_the_best_rank_r_matrix_whatever_the_scaling(scaling: float) -> None:
    weight = heavy_tailed()
    base = nf4(weight)
    started = loftq(weight, base, R, scaling, nf4)
    assert started.taken is None
    left = error(base + started.factors.delta(scaling), weight)
    tail = torch.linalg.svdvals((weight - base).double())[R:]
    assert left == pytest.approx(float(tail.norm()), rel=1e-5)
    assert left < error(base, weight)


def test_loftq_as_peft_scales_it_corrects_nothing_at_twice_the_scaling() -> None:
    """Negative control: without the division by s the correction counts s times; with s = 2 the gain is gone."""
    weight = heavy_tailed()
    base = nf4(weight)
    undivided = loftq(weight, base, R, 1.0, nf4).factors
    assert error(base + undivided.delta(2.0), weight) == pytest.approx(error(base, weight), rel=1e-5)


def test_loftq_of_several_rounds_is_nearer_and_says_what_it_took() -> None:
    weight = heavy_tailed()
    base = nf4(weight)
    once = loftq(weight, base, R, 2.0, nf4).factors
    started = loftq(weight, base, R, 2.0, nf4, iters=5)
    assert started.taken is not None
    rebuilt = nf4(Taken(started.taken, 2.0).rest_of(weight))
    assert error(rebuilt + started.factors.delta(2.0), weight) < error(base + once.delta(2.0), weight)
    tail = torch.linalg.svdvals((weight - rebuilt).double())[R:]
    assert error(rebuilt + started.factors.delta(2.0), weight) == pytest.approx(float(tail.norm()), rel=1e-5)


def test_milora_takes_the_minor_part() -> None:
    weight = heavy_tailed()
    started = milora(weight, R, 2.0)
    singular = torch.linalg.svdvals(weight.double())
    found = torch.linalg.svdvals(started.factors.delta(2.0).double())[:R]
    assert torch.allclose(found, singular[-R:], rtol=1e-4)
    principal = top_triples(weight, weight.shape[0] - R)[0]
    columns = started.factors.lora_B.double()
    assert float((principal.t() @ columns).abs().max()) < 1e-6 * float(columns.norm())
    norms = started.factors.lora_A.norm(dim=1).double().square() * 2.0
    assert torch.allclose(norms, singular[-R:], rtol=1e-5)


def test_olora_takes_the_first_rows_of_the_qr_decomposition() -> None:
    weight = heavy_tailed()
    started = olora(weight, R, 2.0)
    lora_A, lora_B = started.factors.lora_A, started.factors.lora_B
    assert float((lora_B.t() @ lora_B - torch.eye(R)).abs().max()) < 1e-5
    assert error(lora_B @ lora_A, lora_B @ (lora_B.t() @ weight)) < 1e-5
    assert float(lora_A.tril(-1)[:, :R].abs().max()) < 1e-7, "R is upper triangular"


def test_the_product_does_not_depend_on_the_order_of_its_sum() -> None:
    """The codes of a residual base are made from it, so it must come out to the bit wherever it is multiplied."""
    generator = torch.Generator().manual_seed(1)
    made = Factors(torch.randn(32, 256, generator=generator), torch.randn(256, 32, generator=generator))
    order = torch.randperm(32, generator=generator)
    shuffled = Factors(made.lora_A[order], made.lora_B[:, order])
    assert torch.equal(made.delta(2.0), shuffled.delta(2.0))
    in_float32 = made.lora_B @ made.lora_A, shuffled.lora_B @ shuffled.lora_A
    assert not torch.equal(*in_float32), "negative control: in float32 the order shows"


def thin(gradient: Tensor, q: int) -> ThinGradient:
    left, singular, right = torch.linalg.svd(gradient, full_matrices=False)
    return ThinGradient(left[:, :q], singular[:q], right[:q])


def one_step(factors: Factors, gradient: Tensor, scaling: float, lr: float) -> Tensor:
    """What a step of gradient descent on A and B does to the weight."""
    grad_A, grad_B = scaling * factors.lora_B.t() @ gradient, scaling * gradient @ factors.lora_A.t()
    moved = (factors.lora_B - lr * grad_B) @ (factors.lora_A - lr * grad_A)
    return scaling * (moved - factors.lora_B @ factors.lora_A)


def test_lora_ga_steps_along_the_best_approximation_of_the_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(96, 64, generator=generator, dtype=torch.float64)
    gradient += 3 * torch.randn(96, 6, generator=generator).double() @ torch.randn(6, 64, generator=generator).double()
    scaling, gamma, r = 2.0, 16.0, 4
    factors = lora_ga(thin(gradient, 2 * r), r, gamma).factors
    made = Factors(factors.lora_A.double(), factors.lora_B.double())
    size = 96**0.25 / gamma**0.5
    for matrix in (made.lora_A @ made.lora_A.t(), made.lora_B.t() @ made.lora_B):
        assert float((matrix - size**2 * torch.eye(r)).abs().max()) < 1e-6
    left, singular, right = torch.linalg.svd(gradient, full_matrices=False)
    best = left[:, : 2 * r] @ torch.diag(singular[: 2 * r]) @ right[: 2 * r]
    wanted = scaling**2 * size**2 * best
    for lr in (1e-5, 1e-6):  # what is left is of second order: a tenth of the rate leaves a tenth of it
        assert float((one_step(made, gradient, scaling, lr) + lr * wanted).norm() / (lr * wanted.norm())) < 300 * lr
    plain = Factors(torch.randn(r, 64, generator=generator).double(), torch.zeros(96, r).double())

    def alignment(factors: Factors) -> float:
        moved = one_step(factors, gradient, scaling, 1e-6)
        return -float((moved * gradient).sum() / (moved.norm() * gradient.norm()))

    assert alignment(made) > alignment(plain) + 0.1


def test_lora_ga_refuses_too_few_triples() -> None:
    with pytest.raises(ValueError, match="needs 8 triples"):
        lora_ga(thin(torch.randn(16, 16), 6), 4, 16.0)


def fed(sketch: InputSketch, batches: list[Tensor], passes: int) -> InputSpectrum:
    for index in range(passes):
        for batch in batches:
            sketch.add(batch)
        if index + 1 < passes:
            sketch.advance()
    return sketch.spectrum()


def test_input_directions_are_the_principal_components_of_all_batches() -> None:
    generator = torch.Generator().manual_seed(4)
    scales = torch.linspace(3, 0.1, 64)
    turned = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    rows = (torch.randn(400, 64, generator=generator) * scales) @ turned + 5.0
    spectrum = fed(InputSketch(64, 12, torch.device("cpu")), list(rows.split(100)), passes=10)
    centred = (rows - rows.mean(dim=0)).double()
    _, singular, right = torch.linalg.svd(centred, full_matrices=False)
    share = singular.square() / singular.square().sum()
    assert torch.allclose(spectrum.variance_frac[:4], share[:4], rtol=1e-3)
    overlap = float((spectrum.directions[:4].double() @ right[:4].t()).square().sum()) / 4
    assert overlap > 0.99
    uncentred = torch.linalg.svd(rows.double(), full_matrices=False)[2]
    assert float((spectrum.directions[0].double() @ uncentred[0]).abs()) < 0.9, (
        "negative control: the mean is no direction"
    )
    started = eva(spectrum, 4, 10)
    assert started.taken is None and not started.factors.lora_B.any()
    assert float((started.factors.lora_A @ started.factors.lora_A.t() - torch.eye(4)).abs().max()) < 1e-5


def test_ranks_go_where_the_variance_is() -> None:
    flat, steep = torch.full((16,), 1 / 16), 0.5 ** torch.arange(1, 17)
    spectra = {"flat": InputSpectrum(torch.eye(16), flat), "steep": InputSpectrum(torch.eye(16), steep)}
    assert redistribute(spectra, 4, 1.0) == {"flat": 4, "steep": 4}
    assert redistribute(spectra, 4, 1.9) == {"flat": 5, "steep": 3}  # 1/2, 1/4, 1/8, and five of 1/16
    flatter = {**spectra, "flat": InputSpectrum(torch.eye(16), flat * 9)}
    assert redistribute(flatter, 4, 2.0) == {"flat": 8, "steep": 1}, "no layer is left without a direction"


@pytest.mark.parametrize("find", [top_triples, bottom_triples])
def test_an_even_split_gives_the_product_back(find: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]) -> None:
    left, singular, right = find(heavy_tailed(), R)
    product = (left * singular) @ right
    assert torch.allclose(split_evenly(left, singular, right, 0.5).delta(0.5).double(), product, atol=1e-7)
