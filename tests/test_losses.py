"""The fused loss against a naive float64 reference: full logits, plain softmax, autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers

from minitron_hf.errors import MismatchError, UnsupportedModelError
from minitron_hf.losses.chunks import default_chunk_size, even_slices
from minitron_hf.losses.fused import distillation_loss, next_token_positions
from minitron_hf.losses.heads import OutputHead, check_output_head, head_logits, output_head
from minitron_hf.losses.signals import DenseSignal, TopKSignal

NUM_TOKENS, VOCAB, HIDDEN, HIDDEN_T = 13, 29, 7, 11


def problem(*, bias=False, scale=1.0, softcap=None, scale_t=1.0, softcap_t=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    hidden, weight, bias_V = normal(NUM_TOKENS, HIDDEN), normal(VOCAB, HIDDEN) / 2, normal(VOCAB)
    # The teacher resembles the student, so that they agree on some tokens and not on others.
    hidden_t = torch.cat([hidden, normal(NUM_TOKENS, HIDDEN_T - HIDDEN)], 1)
    weight_t = torch.cat([weight, normal(VOCAB, HIDDEN_T - HIDDEN) / 4], 1)
    bias_t = bias_V + normal(VOCAB) / 4 if bias else None
    head_t = OutputHead(weight_t, bias_t, scale_t, softcap_t)
    head = OutputHead(weight.requires_grad_(), bias_V.requires_grad_() if bias else None, scale, softcap)
    labels = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)
    return hidden.requires_grad_(), head, DenseSignal(hidden_t.detach(), head_t), labels


def naive(
    hidden,
    head,
    teacher,
    labels,
    *,
    temperature=1.0,
    kd_weight=1.0,
    ce_weight=0.0,
    divergence="forward_kl",
    jsd_beta=0.5,
    top_k=None,
):
    """Total, KL and CE in float64 from explicit probabilities; nothing shared with the package.

    With `top_k`, of k + 1 outcomes, the last one being all other tokens together.
    """

    def logits(states, h):
        z = states.double() @ h.weight.double().T
        if h.bias is not None:
            z = z + h.bias.double()
        z = z * h.scale
        return z if h.softcap is None else h.softcap * torch.tanh(z / h.softcap)

    z_s, z_t = logits(hidden, head), logits(teacher.hidden, teacher.head)

    def softmax(z):
        e = torch.exp(z)
        return e / e.sum(1, keepdim=True)

    p, q = softmax(z_t / temperature), softmax(z_s / temperature)
    if top_k is not None:
        ordered = [x.gather(1, p.argsort(1, descending=True)) for x in (p, q)]
        rests = [x[:, top_k:].sum(1, keepdim=True) for x in ordered if top_k < VOCAB] or [p[:, :0]] * 2
        p, q = (torch.cat([x[:, :top_k], rest], 1) for x, rest in zip(ordered, rests, strict=True))
    m = jsd_beta * p + (1 - jsd_beta) * q

    def kl_of(a, b):
        return (a * torch.log(a / b)).sum(1)

    kl = kl_of(p, q)
    value = {
        "forward_kl": lambda: kl,
        "reverse_kl": lambda: kl_of(q, p),
        "jsd": lambda: jsd_beta * kl_of(p, m) + (1 - jsd_beta) * kl_of(q, m),
        "tv": lambda: (p - q).abs().sum(1) / 2,
        "mse": lambda: (z_t - z_s).square().mean(1),
        "cosine": lambda: 1 - (z_t * z_s).sum(1) / (z_t.square().sum(1) * z_s.square().sum(1)).sqrt(),
    }[divergence]()
    ce = -torch.log(softmax(z_s)[torch.arange(len(labels)), labels])
    total = (kd_weight * temperature**2 * value + ce_weight * ce).sum()
    return total, kl, ce, z_s.argmax(1) == z_t.argmax(1), value


def top_k_signal(teacher, k, temperature=1.0):
    """The k most likely tokens of a dense teacher, and how likely the others are together."""
    log_p = torch.log_softmax(head_logits(teacher.hidden, teacher.head) / temperature, -1)
    log_probs, tokens = log_p.sort(dim=-1, descending=True)
    return TopKSignal(tokens[:, :k], log_probs[:, :k], log_probs[:, k:].logsumexp(-1), VOCAB)


CASES = [
    {},
    {"bias": True},
    {"scale": 0.3, "scale_t": 1.7},
    {"softcap": 5.0, "softcap_t": 3.0},
    {"bias": True, "scale": 0.4, "softcap": 4.0, "scale_t": 2.0},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_accuracy_and_entropy_are_those_of_the_student_at_temperature_1(
    case, divergence, temperature, top_k, with_gradient
):
    hidden, head, teacher, labels = problem(**case)
    logits = head_logits(hidden, head).detach()
    labels = torch.where(torch.arange(len(labels)) % 2 == 0, logits.argmax(-1), labels)
    signal = teacher if top_k is None else top_k_signal(teacher, top_k, temperature)
    options = {"divergence": divergence, "temperature": temperature, "chunk_size": 5}
    with torch.set_grad_enabled(with_gradient):
        found = distillation_loss(hidden, head, signal, labels, **options)
    assert torch.equal(found.accuracy, logits.argmax(-1) == labels)
    assert 0 < found.accuracy.sum() < len(labels)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(found.entropy, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize(("kd_weight", "ce_weight"), [(1.0, 0.0), (0.7, 0.4), (0.0, 1.0)])
def test_values_and_gradients_equal_the_naive_reference(case, temperature, kd_weight, ce_weight):
    hidden, head, teacher, labels = problem(**case)
    options = {"temperature": temperature, "kd_weight": kd_weight, "ce_weight": ce_weight}
    inputs = [tensor for tensor in (hidden, head.weight, head.bias) if tensor is not None]

    expected = naive(hidden, head, teacher, labels, **options)
    expected_gradients = torch.autograd.grad(0.37 * expected[0], inputs)
    found = distillation_loss(hidden, head, teacher, labels, chunk_size=5, **options)
    gradients = torch.autograd.grad(0.37 * found.total, inputs)

    torch.testing.assert_close(found.total, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.kl, expected[1].detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found.ce, expected[2].detach(), rtol=1e-11, atol=1e-13)
    assert torch.equal(found.agreement, expected[3])
    assert expected[3].any()
    assert not expected[3].all()
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-12)


DIVERGENCES = [
    {"divergence": "reverse_kl"},
    {"divergence": "jsd"},
    {"divergence": "jsd", "jsd_beta": 0.1},
    {"divergence": "tv"},
    {"divergence": "mse"},
    {"divergence": "cosine"},
]


def require_equal(found, expected, inputs):
    """Values, and gradients of 0.37 times the total."""
    torch.testing.assert_close(found.total, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.divergence, expected[4].detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found.kl, expected[1].detach(), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found.ce, expected[2].detach(), rtol=1e-11, atol=1e-13)
    assert torch.equal(found.agreement, expected[3])
    references = torch.autograd.grad(0.37 * expected[0], inputs)
    for gradient, reference in zip(torch.autograd.grad(0.37 * found.total, inputs), references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: "-".join(map(str, d.values())))
@pytest.mark.parametrize(("kd_weight", "ce_weight"), [(0.7, 0.0), (0.7, 0.4)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_other_divergences_equal_the_naive_reference(case, divergence, kd_weight, ce_weight, temperature):
    if temperature != 1 and divergence["divergence"] in ("mse", "cosine"):
        pytest.skip("logits have no temperature")
    hidden, head, teacher, labels = problem(**case)
    options = {**divergence, "temperature": temperature, "kd_weight": kd_weight, "ce_weight": ce_weight}
    inputs = [tensor for tensor in (hidden, head.weight, head.bias) if tensor is not None]
    found = distillation_loss(hidden, head, teacher, labels, chunk_size=5, **options)
    require_equal(found, naive(hidden, head, teacher, labels, **options), inputs)


@pytest.mark.parametrize("k", [1, 4, VOCAB - 1, VOCAB])
@pytest.mark.parametrize("divergence", [{}, *DIVERGENCES[:4]], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_signals_equal_the_naive_reference(k, divergence, temperature):
    hidden, head, teacher, labels = problem(bias=True, scale=0.4, softcap=4.0)
    options = {**divergence, "temperature": temperature, "kd_weight": 0.7, "ce_weight": 0.4}
    signal = top_k_signal(teacher, k, temperature)
    found = distillation_loss(hidden, head, signal, labels, chunk_size=5, **options)
    require_equal(found, naive(hidden, head, teacher, labels, top_k=k, **options), [hidden, head.weight, head.bias])


@pytest.mark.parametrize("divergence", [{}, *DIVERGENCES[:4]], ids=str)
def test_top_k_approaches_the_whole_from_below(divergence):
    hidden, head, teacher, labels = problem(bias=True)
    whole = distillation_loss(hidden, head, teacher, labels, **divergence).divergence
    values = [
        distillation_loss(hidden, head, top_k_signal(teacher, k), labels, **divergence).divergence
        for k in range(1, VOCAB + 1)
    ]
    for smaller, larger in itertools.pairwise(values):
        assert (smaller <= larger + 1e-12).all()
    assert (values[0] < whole - 1e-3).any()
    torch.testing.assert_close(values[-1], whole, rtol=1e-12, atol=1e-12)


def test_logits_cannot_be_compared_with_probabilities():
    hidden, head, teacher, labels = problem()
    with pytest.raises(MismatchError, match=r"'mse' compares logits.*Use one of forward_kl, jsd, reverse_kl, tv"):
        distillation_loss(hidden, head, top_k_signal(teacher, 3), labels, divergence="mse")


@pytest.mark.parametrize("divergence", [{}, *DIVERGENCES], ids=str)
@pytest.mark.parametrize("top_k", [None, 3])
def test_gradient_is_zero_where_nothing_is_to_learn(divergence, top_k):
    if top_k and divergence.get("divergence") in ("mse", "cosine", "tv"):
        pytest.skip("a top-k signal has no logits, and total variation a kink where rounding decides")
    hidden, head, _, labels = problem(bias=True)
    itself = DenseSignal(hidden.detach(), OutputHead(head.weight.detach(), head.bias.detach()))
    signal = itself if top_k is None else top_k_signal(itself, top_k)
    loss = distillation_loss(hidden, head, signal, labels, **divergence)
    assert loss.divergence.abs().max() < 1e-13
    loss.total.backward()
    assert max(tensor.grad.abs().max() for tensor in (hidden, head.weight, head.bias)) < 1e-12


@pytest.mark.parametrize("divergence", DIVERGENCES[:4], ids=str)
def test_other_divergences_stay_finite_at_extreme_logits(divergence):
    hidden, head, teacher, labels = problem(dtype=torch.float32)
    far = DenseSignal(teacher.hidden * 1e3, teacher.head)
    loss = distillation_loss((hidden.detach() * 1e3).requires_grad_(), head, far, labels, **divergence)
    loss.total.backward()
    assert torch.isfinite(loss.divergence).all()
    assert torch.isfinite(head.weight.grad).all()
    assert (loss.divergence >= 0).all()


def test_gradient_is_the_slope():
    """Central differences, which share nothing with any formula."""
    hidden, head, teacher, labels = problem(bias=True, scale=0.5, softcap=6.0)
    options = {"temperature": 2.0, "kd_weight": 0.8, "ce_weight": 0.3}
    inputs = [hidden, head.weight, head.bias]
    gradients = torch.autograd.grad(distillation_loss(hidden, head, teacher, labels, **options).total, inputs)
    step = 1e-5
    for tensor, gradient in zip(inputs, gradients, strict=True):
        flat = tensor.detach().reshape(-1)
        for index in range(0, flat.numel(), 7):
            values = []
            for sign in (1, -1):
                original = flat[index].item()
                flat[index] = original + sign * step
                with torch.no_grad():
                    values.append(distillation_loss(hidden, head, teacher, labels, **options).total.item())
                flat[index] = original
            slope = (values[0] - values[1]) / (2 * step)
            assert slope == pytest.approx(gradient.reshape(-1)[index].item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 12, 13, 14, 1000])
def test_chunk_size_does_not_matter(chunk_size):
    hidden, head, teacher, labels = problem(bias=True)
    results = []
    for size in (chunk_size, None):
        loss = distillation_loss(hidden, head, teacher, labels, ce_weight=0.5, chunk_size=size)
        gradients = torch.autograd.grad(loss.total, [hidden, head.weight, head.bias])
        results.append((loss.total, loss.kl, loss.ce, *gradients))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_zero_where_student_is_teacher(dtype, temperature):
    hidden, head, _, labels = problem(bias=True, softcap=7.0, dtype=dtype)
    teacher = DenseSignal(hidden.detach(), OutputHead(head.weight.detach(), head.bias.detach(), softcap=7.0))
    loss = distillation_loss(hidden, head, teacher, labels, temperature=temperature)
    loss.total.backward()
    assert torch.equal(loss.kl, torch.zeros_like(loss.kl))
    assert loss.agreement.all()
    for tensor in (hidden, head.weight, head.bias):
        assert torch.count_nonzero(tensor.grad) == 0


def test_extreme_logits_stay_finite():
    hidden, head, teacher, labels = problem(dtype=torch.float32)
    loss = distillation_loss(
        (hidden.detach() * 1e3).requires_grad_(), head, DenseSignal(teacher.hidden * 1e3, teacher.head), labels
    )
    loss.total.backward()
    assert torch.isfinite(loss.kl).all()
    assert torch.isfinite(head.weight.grad).all()
    assert (loss.kl >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_by_rounding_only(dtype):
    hidden, head, teacher, labels = problem(bias=True, dtype=dtype)
    inputs = [hidden, head.weight, head.bias]
    loss = distillation_loss(hidden, head, teacher, labels, ce_weight=0.5, chunk_size=4)
    gradients = torch.autograd.grad(loss.total, inputs)
    expected = naive(hidden, head, teacher, labels, ce_weight=0.5)
    reference = torch.autograd.grad(expected[0], inputs)
    eps = torch.finfo(dtype).eps
    largest_logit = 20
    torch.testing.assert_close(loss.kl.double(), expected[1], rtol=0, atol=4 * eps * largest_logit)
    assert loss.kl.dtype == torch.float32
    for gradient, target in zip(gradients, reference, strict=True):
        assert gradient.dtype == dtype
        error = (gradient.double() - target.double()).norm() / target.double().norm()
        assert error < 4 * eps * largest_logit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tie_of_half_precision_logits_is_no_agreement(dtype):
    """The first of the tied tokens stands for all: logits are the hidden states here."""
    head = OutputHead(torch.eye(3, dtype=dtype))
    first, second, tied = [3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [3.0, 3.0, 0.0]
    teacher = torch.tensor([tied, tied, first, second, second], dtype=dtype)
    student = torch.tensor([second, first, tied, tied, second], dtype=dtype)
    found = distillation_loss(student, head, DenseSignal(teacher, head), torch.ones(5, dtype=torch.long))
    assert found.agreement.tolist() == [False, True, True, False, True]
    assert found.accuracy.tolist() == [True, False, False, False, True]


def test_gradients_of_a_bias_are_summed_in_float32():
    """The gradient of many tokens is the sum of the tokens' own, to more digits than the products have."""
    generator = torch.Generator().manual_seed(0)

    def quarters(*shape):  # products and sums of these are exact, whatever their order
        return torch.randint(-8, 9, shape, generator=generator) / 4

    hidden, weight, teacher = quarters(64, 4), quarters(VOCAB, 4), quarters(VOCAB, 4)

    def gradient(rows):
        bias = torch.zeros(VOCAB, requires_grad=True)
        signal = DenseSignal(hidden[rows], OutputHead(teacher))
        labels = torch.zeros(len(hidden[rows]), dtype=torch.long)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            distillation_loss(hidden[rows], OutputHead(weight, bias), signal, labels).total.backward()
        return bias.grad

    expected = torch.stack([gradient(slice(row, row + 1)) for row in range(64)]).double().sum(0)
    error = (gradient(slice(0, 64)).double() - expected).abs().max() / expected.abs().max()
    assert error < 0.1 * torch.finfo(torch.bfloat16).eps


def test_autocast_sets_the_dtype_of_the_products_and_keeps_float32_gradients():
    hidden, head, teacher, labels = problem(dtype=torch.float32)
    exact = distillation_loss(hidden, head, teacher, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distillation_loss(hidden, head, teacher, labels)
        itself = distillation_loss(hidden, head, DenseSignal(hidden.detach(), head), labels)
    assert torch.equal(itself.kl, torch.zeros_like(itself.kl))  # both heads run in the same precision
    (gradient,) = torch.autograd.grad(loss.total, [head.weight])
    assert gradient.dtype == torch.float32
    difference = (loss.kl - exact.kl).abs().max()
    assert 0 < difference < 4 * torch.finfo(torch.bfloat16).eps * 20


def test_float16_with_a_scaler_keeps_the_gradients_of_a_large_vocabulary():
    """Entries of q - p are near the smallest numbers of float16 then."""
    generator = torch.Generator().manual_seed(0)
    hidden, hidden_t = torch.randn(2, 16, 24, generator=generator)
    weight, weight_t = torch.randn(2, 20_000, 24, generator=generator) / 5
    hidden.requires_grad_()
    weight.requires_grad_()
    teacher, labels = DenseSignal(hidden_t, OutputHead(weight_t)), torch.arange(16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with torch.autocast("cpu", dtype=torch.float16):
        total = distillation_loss(hidden, OutputHead(weight), teacher, labels, ce_weight=0.3).total
    scaled = torch.autograd.grad(scaler.scale(total / 16), [hidden, weight])
    expected = naive(hidden, OutputHead(weight), teacher, labels, ce_weight=0.3)[0] / 16
    for gradient, reference in zip(scaled, torch.autograd.grad(expected, [hidden, weight]), strict=True):
        assert (gradient / 2**16 - reference).norm() < 5e-3 * reference.norm()


def test_jsd_in_float32_keeps_its_digits_at_a_large_vocabulary():
    """A softmax in float32 sums to 1 to five digits there, and the gradient is a small part of q."""
    generator = torch.Generator().manual_seed(0)
    hidden, hidden_t = torch.randn(2, 8, 64, generator=generator)
    weight, weight_t = torch.randn(2, 50_000, 64, generator=generator) * 3 / 8
    hidden.requires_grad_()
    weight.requires_grad_()
    labels = torch.arange(8)
    teacher = DenseSignal(hidden_t, OutputHead(weight_t))
    total = distillation_loss(hidden, OutputHead(weight), teacher, labels, divergence="jsd").total
    found = torch.autograd.grad(total, [hidden, weight])
    expected = naive(hidden, OutputHead(weight), teacher, labels, divergence="jsd")[0]
    for gradient, reference in zip(found, torch.autograd.grad(expected, [hidden, weight]), strict=True):
        assert (gradient - reference).norm() < 3e-5 * reference.norm()


def test_frozen_head_gets_no_gradient():
    hidden, head, teacher, labels = problem(bias=True)
    frozen = OutputHead(head.weight.detach(), head.bias.detach())
    (expected,) = torch.autograd.grad(distillation_loss(hidden, head, teacher, labels).total, [hidden])
    distillation_loss(hidden, frozen, teacher, labels).total.backward()
    torch.testing.assert_close(hidden.grad, expected)
    assert frozen.weight.grad is None


def test_frozen_backbone_still_trains_the_head():
    hidden, head, teacher, labels = problem()
    (expected,) = torch.autograd.grad(distillation_loss(hidden, head, teacher, labels).total, [head.weight])
    distillation_loss(hidden.detach(), head, teacher, labels).total.backward()
    torch.testing.assert_close(head.weight.grad, expected)


def test_tied_head_adds_both_gradients():
    _, _, teacher, labels = problem()
    embedding = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(VOCAB, (NUM_TOKENS,))
    head = OutputHead(embedding)
    distillation_loss(embedding[tokens].tanh(), head, teacher, labels).total.backward()
    (expected,) = torch.autograd.grad(naive(embedding[tokens].tanh(), head, teacher, labels)[0], [embedding])
    torch.testing.assert_close(embedding.grad, expected, rtol=1e-11, atol=1e-12)


def test_without_gradients_the_values_are_the_same():
    hidden, head, teacher, labels = problem(softcap=4.0)
    expected = distillation_loss(hidden, head, teacher, labels, temperature=2.0, ce_weight=1.0)
    with torch.no_grad():
        found = distillation_loss(hidden, head, teacher, labels, temperature=2.0, ce_weight=1.0)
    assert not found.total.requires_grad
    assert torch.equal(found.total, expected.total)
    assert torch.equal(found.kl, expected.kl)
    assert torch.equal(found.ce, expected.ce)


def test_no_tokens_is_a_zero_with_zero_gradients():
    hidden, head, teacher, labels = problem(bias=True)
    loss = distillation_loss(hidden[:0], head, DenseSignal(teacher.hidden[:0], teacher.head), labels[:0])
    loss.total.backward()
    assert loss.total.item() == 0
    assert torch.count_nonzero(head.weight.grad) == 0
    assert hidden.grad.shape == hidden.shape


def test_second_backward_is_refused():
    hidden, head, teacher, labels = problem()
    total = distillation_loss(hidden, head, teacher, labels).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


def test_unequal_vocabularies_are_refused_by_size():
    hidden, head, teacher, labels = problem()
    smaller = DenseSignal(teacher.hidden, OutputHead(teacher.head.weight[:-2]))
    with pytest.raises(MismatchError, match=f"{VOCAB - 2} tokens, the student's {VOCAB}"):
        distillation_loss(hidden, head, smaller, labels)


@pytest.mark.parametrize(("length", "largest"), list(itertools.product([0, 1, 7, 12, 100], [1, 5, 12, 200])))
def test_even_slices_cover_the_range_in_order(length, largest):
    slices = list(even_slices(length, largest))
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(length))
    sizes = [s.stop - s.start for s in slices]
    assert not sizes or (max(sizes) <= largest and max(sizes) - min(sizes) <= 1)
    assert sizes == sorted(sizes, reverse=True)  # buffers are sized by the first


@pytest.mark.parametrize(("num_tokens", "copies"), [(1024, 0.4), (8192, 0.06)])
@pytest.mark.parametrize("vocab_size", [32_000, 128_256, 256_000])
def test_chunks_of_both_models_are_a_small_part_of_all_logits(num_tokens, copies, vocab_size):
    largest = default_chunk_size(num_tokens, vocab_size, torch.device("cpu"))
    assert largest >= 128
    assert 2 * largest < copies * num_tokens


@pytest.mark.parametrize("num_tokens", [1024, 4096, 65_536])
@pytest.mark.parametrize("vocab_size", [32_000, 128_256, 256_000])
def test_half_precision_chunks_of_both_models_are_bounded(num_tokens, vocab_size):
    largest = default_chunk_size(num_tokens, vocab_size, torch.device("cpu"), torch.bfloat16)
    assert largest >= 128
    num_bytes = 2 * 2 * largest * vocab_size  # two models, two bytes
    assert num_bytes <= num_tokens * vocab_size * 4 / 4
    assert num_bytes <= 1.1e9


@pytest.mark.parametrize("vocab_size", [100, 32_000, 128_256, 256_000])
def test_chunks_are_large_enough_for_efficient_products(vocab_size):
    for device in (torch.device("cpu"), torch.device("cuda")):
        assert default_chunk_size(16, vocab_size, device) >= 128


def test_next_token_positions():
    labels = torch.tensor([[5, 6, -100, 7], [-100, -100, 8, -100]])
    positions, targets = next_token_positions(labels)
    # Row 0: position 0 predicts 6, position 2 predicts 7. Row 1: position 1 predicts 8. Nothing crosses the rows.
    assert positions.tolist() == [0, 2, 5]
    assert targets.tolist() == [6, 7, 8]


def pocket(model_type, **changes):
    common = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 32,
    }
    special = {
        "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 61},
        "gemma2": {**common, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 6},
        "cohere": {**{k: v for k, v in common.items() if k != "head_dim"}, "logit_scale": 0.25},
        "granite": {**{k: v for k, v in common.items() if k != "head_dim"}, "logits_scaling": 4.0},
    }
    config = transformers.AutoConfig.for_model(
        model_type, **{**special.get(model_type, common), "pad_token_id": 0, **changes}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():  # large weights, so that a wrong scale or cap cannot hide
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return model


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "cohere", "granite"])
def test_head_of_the_hidden_states_is_the_models_logits(model_type):
    model = pocket(model_type)
    tokens = torch.randint(61, (2, 9))
    expected = model(input_ids=tokens).logits
    hidden = model.base_model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(head_logits(hidden, output_head(model)), expected, rtol=1e-12, atol=1e-12)
    check_output_head(model)


def test_check_output_head_refuses_an_unknown_post_processing():
    model = pocket("granite")
    model.config.model_type = "granite_of_tomorrow"
    with pytest.raises(UnsupportedModelError, match="granite_of_tomorrow"):
        check_output_head(model, role="teacher")


def test_output_head_refuses_a_model_without_one():
    model = pocket("llama").model
    with pytest.raises(UnsupportedModelError, match="LlamaModel"):
        output_head(model)
