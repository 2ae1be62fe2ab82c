"""Peers in torch on tiny stand-ins: what they step by is the clipped sum, and is noised.

Skipped where a peer is not installed.
"""

import copy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
PACKAGES = {"opacus_ghost": "opacus", "fastdp": "fastDP"}
MODELS = ("gpt2-tiny", "vit-tiny", "llama-tiny-lora")
BATCH, PHYSICAL = 8, 4
HALF_ULP = 2.0**-9  # of bfloat16, relative

# What a peer calls that is old, or too many times, is the peer's.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", params=PACKAGES)
def method(request):
    for package in ("torch", PACKAGES[request.param]):
        pytest.importorskip(package, exc_type=ModuleNotFoundError)
    return request.param


@pytest.fixture(scope="module")
def bench():
    pytest.importorskip("torch", exc_type=ModuleNotFoundError)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import train_torch

        yield train_torch


def _setting(bench, name, length=8):
    import torch

    torch.manual_seed(0)
    model = bench.MODELS[name]()
    return model, bench.examples_of(model, BATCH, length, "cpu")


def _stepped_by(bench, method, model, examples, noise, **options):
    """The gradients that AdamW is given, as they would be without the division by the batch."""
    step, optimizer = bench.step_on(method, model, examples, PHYSICAL, noise, **options)
    found = []

    def keep(optimizer, *_):
        parameters = optimizer.param_groups[0]["params"]
        found.extend(parameter.grad.detach().clone() * BATCH for parameter in parameters)

    optimizer.register_step_pre_hook(keep)
    step()
    return found


def _clipped_sum(bench, model, examples, dtype):
    """(the sum, the norms of all examples), each example on its own, clipped in float64."""
    import torch

    model = copy.deepcopy(model).to(dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total, norms = [torch.zeros_like(own, dtype=torch.float64) for own in trained], []
    for inputs, targets in zip(*examples, strict=True):
        logits = model(inputs[None].to(dtype) if inputs.is_floating_point() else inputs[None])[0]
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        loss = torch.nn.functional.cross_entropy(logits, targets)
        gradient = [leaf.double() for leaf in torch.autograd.grad(loss, trained)]
        norms.append(_norm(gradient))
        for known, leaf in zip(total, gradient, strict=True):
            known += leaf * min(1.0, bench.CLIP / norms[-1])
    return total, norms


def _norm(leaves):
    return sum(float(leaf.double().square().sum()) for leaf in leaves) ** 0.5


def _distance(one, other):
    return _norm([a.double() - b for a, b in zip(one, other, strict=True)])


@pytest.mark.parametrize("length", [8, 64])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_by_the_clipped_sum(bench, method, name, length):
    """In two passes; the error is within twice that of bfloat16 example by example.

    With what rounding an example's norm, factor and scaled gradients adds, half a unit each.
    """
    import torch

    model, examples = _setting(bench, name, length)
    exact, norms = _clipped_sum(bench, model, examples, torch.float64)
    naive, _ = _clipped_sum(bench, model, examples, torch.bfloat16)
    found = _stepped_by(bench, method, model, examples, 0.0)
    rounding = 3 * HALF_ULP * sum(min(norm, bench.CLIP) for norm in norms)
    assert _distance(found, exact) <= 2 * _distance(naive, exact) + rounding


@pytest.mark.parametrize("length", [8, 64])
@pytest.mark.parametrize("name", MODELS)
def test_fastdp_in_float32_is_exact(bench, name, length):
    """But for the 1e-6 that it adds to a norm, and rounding of each norm, factor and product."""
    pytest.importorskip("fastDP", exc_type=ModuleNotFoundError)
    import torch

    model, examples = _setting(bench, name, length)
    exact, norms = _clipped_sum(bench, model, examples, torch.float64)
    naive, _ = _clipped_sum(bench, model, examples, torch.float32)
    found = _stepped_by(bench, "fastdp", model, examples, 0.0, dtype=torch.float32)
    added = (1e-6 + 3 * 2.0**-24) * sum(min(norm, bench.CLIP) for norm in norms)
    assert _distance(found, exact) <= 2 * _distance(naive, exact) + added


@pytest.mark.parametrize("name", MODELS)
def test_noise_is_added_once_a_step(bench, method, name):
    """Its standard deviation is that asked for, within five of its own standard errors."""
    import torch

    model, examples = _setting(bench, name)
    # On a CPU, torch draws bfloat16 normals from uniforms of 8 bits, 1 % too narrow.
    options = {"dtype": torch.float32} if method == "fastdp" else {}
    still = _stepped_by(bench, method, copy.deepcopy(model), examples, 0.0, **options)
    noised = _stepped_by(bench, method, model, examples, 3.0, **options)
    noise = torch.cat([(a - b).flatten() for a, b in zip(noised, still, strict=True)]).double()
    assert abs(float(noise.std()) / (3.0 * bench.CLIP) - 1.0) <= 5 / (2 * len(noise)) ** 0.5


@pytest.mark.parametrize("name", MODELS)
def test_a_step_moves_every_parameter(bench, method, name):
    """Those that AdamW steps, and the model runs on what they are after."""
    model, examples = _setting(bench, name)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step, optimizer = bench.step_on(method, model, examples, PHYSICAL)
    stepped = optimizer.param_groups[0]["params"]
    before = [parameter.detach().clone() for parameter in stepped]
    step()
    for old, new, used in zip(before, stepped, own, strict=True):
        assert (old != new).any() and (new.to(used.dtype) == used).all()


def test_steps_are_timed(bench, method):
    row = bench.timed(method, "gpt2-tiny", 8, 8, 0.01, "cpu")
    assert row["milliseconds"] > 0.0 and {"8", "4"} <= set(row["tried"]) <= {"8", "4", "2"}
    assert row["tried"][str(row["micro_batch"])] == row["milliseconds"]


def test_smaller_parts_are_tried_until_one_is_slower_by_a_fifth(bench, monkeypatch):
    times = {16: 10.0, 8: 9.0, 4: 10.5, 2: 11.0}
    monkeypatch.setattr(bench, "_measured_afresh", lambda *given: {"milliseconds": times[given[4]]})
    row = bench.timed("opacus_ghost", "any", 8, 16, 1.0, "cpu")
    assert row["micro_batch"] == 8
    assert row["tried"] == {"16": 10.0, "8": 9.0, "4": 10.5, "2": 11.0}
    times[4] = 11.0
    row = bench.timed("opacus_ghost", "any", 8, 16, 1.0, "cpu")
    assert row["tried"] == {"16": 10.0, "8": 9.0, "4": 11.0}


def test_fastdp_refuses_layers_that_it_would_not_train(bench):
    pytest.importorskip("fastDP", exc_type=ModuleNotFoundError)
    with pytest.raises(NotImplementedError, match="RMSNorm"):
        bench.timed("fastdp", "llama-tiny", 8, 8, 0.01, "cpu")
