"""Sigmoid attention against numbers by hand, torch's own attention, and the formulas of the authors' module."""

import itertools
import math

import pytest
import torch
from torch import nn

from provenn.claims import Evidence
from provenn.claims.claim import Trial
from provenn.claims.nn import sigmoid_attention as claim
from provenn.contracts import BadInput, FunctionCase, ModuleCase, ProbeCase, Symmetry
from provenn.contracts.watch import plain_signatures
from provenn.core.experiment.seeding import seeded
from provenn.nn import SigmoidAttention, attention_regularity, replace_attention
from provenn.nn._sigmoid_attention_baselines import ReluAttention, SoftmaxAttention
from provenn.nn._sigmoid_attention_regularity import AttentionRegularity, sigmoid_bound
from provenn.nn.functional import sigmoid_attention

BACKENDS = ("reference", "blocked")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def heads(*lead, queries=5, keys=7, head=4, value=3, seed=0):
    return normal(*lead, queries, head, seed=seed), normal(*lead, keys, head, seed=seed + 1), normal(
        *lead, keys, value, seed=seed + 2
    )  # fmt: skip


def logistic(x):
    return 1 / (1 + math.exp(-x))


def layer(*arguments, seed=0, kind=SigmoidAttention, **options):
    with seeded(seed):
        made = kind(*arguments, **options).double()
        for parameter in made.parameters():  # biases and norms too, so that nothing is lost unseen
            if parameter.ndim == 1:
                nn.init.normal_(parameter, std=0.5)
    return made


# The suites.


def self_attention(generator, dtype, batch):
    x = torch.randn(batch, 5, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x, x.clone(), x.clone()


def without_weights(generator, dtype, batch):
    return *self_attention(generator, dtype, batch), None, False


ORDER = torch.tensor([3, 0, 4, 1, 2])
PERMUTATION = Symmetry(
    "permutation of the tokens",
    before=lambda inputs: tuple(x[:, ORDER] if isinstance(x, torch.Tensor) else x for x in inputs),
    after=lambda output: (output[0][:, ORDER], output[1][:, ORDER][:, :, ORDER]),
)
KEYS_ALONE = Symmetry(
    "permutation of the keys",
    before=lambda inputs: (inputs[0], inputs[1][:, ORDER], inputs[2][:, ORDER]),
    after=lambda output: (output[0], output[1][:, :, ORDER]),
)


def bad_layer(argument, error=ValueError, **options):
    return BadInput(argument, lambda: SigmoidAttention(**{"embed_dim": 8, "num_heads": 2, **options}), error)


def bad_call(argument, error=ValueError, shape=(2, 5, 8), **inputs):
    def call():
        x = torch.zeros(shape)
        given = {"query": x, "key": x, "value": x, **inputs}
        SigmoidAttention(8, 2)(**given)

    return BadInput(argument, call, error)


BAD_LAYERS = (
    bad_layer("embed_dim", embed_dim=9),
    bad_layer("embed_dim", embed_dim=0),
    bad_layer("num_heads", num_heads=0),
    bad_layer("num_heads", TypeError, num_heads=2.0),
    bad_layer("bias", bias="log_n"),
    bad_layer("bias", bias=math.nan),
    bad_layer("backend", backend="flash"),
    bad_layer("max_length", max_length=0),
    bad_layer("temperature", temperature=math.inf),
    bad_layer("dropout", dropout=1.0),
    bad_layer("layer_scale", layer_scale=math.nan),
    bad_layer("rope", embed_dim=6, rope=True),
    bad_call("query", shape=(2, 2, 5, 8)),
    bad_call("key", key=torch.zeros(3, 5, 8)),
    bad_call("attn_mask", attn_mask=torch.zeros(5, 4, dtype=torch.bool)),
    bad_call("attn_mask", TypeError, attn_mask=torch.zeros(5, 5, dtype=torch.int64)),
    bad_call("key_padding_mask", key_padding_mask=torch.zeros(2, 4, dtype=torch.bool)),
    bad_call("key_padding_mask", TypeError, key_padding_mask=torch.zeros(2, 5, dtype=torch.uint8)),
)


def bad_operands(argument, error=ValueError, **changes):
    def call():
        q, k, v = (x.float() for x in heads(2, 3))
        sigmoid_attention(**{"q": q, "k": k, "v": v, **changes})

    return BadInput(argument, call, error)


BAD_OPERANDS = (
    bad_operands("k", k=torch.zeros(2, 3, 7, 5)),
    bad_operands("k", k=torch.zeros(2, 1, 7, 4)),
    bad_operands("v", v=torch.zeros(2, 3, 6, 3)),
    bad_operands("v", TypeError, v=torch.zeros(2, 3, 7, 3, dtype=torch.float64)),
    bad_operands("mask", TypeError, mask=torch.zeros(5, 7, dtype=torch.int64)),
    bad_operands("mask", mask=torch.zeros(7, 5, dtype=torch.bool)),
    bad_operands("bias", bias="log"),
    bad_operands("bias", bias=math.nan),
    bad_operands("bias", bias=torch.zeros(3)),
    bad_operands("backend", backend="cuda"),
    bad_operands("alibi_slopes", alibi_slopes=torch.zeros(2)),
    bad_operands("alibi_slopes", alibi_slopes=torch.zeros(3, requires_grad=True)),
    bad_operands("dropout_p", dropout_p=1.0),
    bad_operands("dropout_p", dropout_p=0.1, backend="blocked"),
)


def tiny_layer():
    return SigmoidAttention(3, 1)


def jacobian_norms(model, radii, attend):
    """Singular values of the whole Jacobian, with the probe's own tokens."""
    model = model.double()
    generator = torch.Generator().manual_seed(0)
    x = nn.functional.normalize(torch.randn(2, 4, 3, generator=generator, dtype=torch.float64), dim=-1)
    x = x * torch.rand(2, 4, 1, generator=generator, dtype=torch.float64) ** (1 / 3)
    found = []
    for radius in radii:
        row = []
        for draw in x:
            jacobian = torch.autograd.functional.jacobian(lambda y: attend(model, y), radius * draw)
            row.append(torch.linalg.matrix_norm(jacobian.reshape(12, 12), 2).item())
        found.append(tuple(row))
    return tuple(found)


def one_head(phi):
    """Single-head self-attention written out, as a function of a model's weights."""

    def attend(model, x):
        q, k, v = (x @ p.weight.T + p.bias for p in (model.q_proj, model.k_proj, model.v_proj))
        return phi(q @ k.T / 3**0.5, len(x)) @ v @ model.out_proj.weight.T + model.out_proj.bias

    return attend


ONE_HEAD = {
    "sigmoid": one_head(lambda s, n: torch.sigmoid(s - math.log(n))),
    "softmax": one_head(lambda s, n: torch.softmax(s, dim=-1)),
    "relu": one_head(lambda s, n: torch.relu(s) / n),
}


def probe(model, radii):
    return attention_regularity(
        model, radii, tokens=4, draws=2, activations=("sigmoid", "softmax", "relu"), tolerance=0.0, iterations=2000
    )


def encoder():
    inner = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(inner, 2, enable_nested_tensor=True)


CASES = [
    ModuleCase(
        part="provenn.nn.SigmoidAttention",
        make=lambda **options: SigmoidAttention(8, 2, **options),
        inputs=self_attention,
        symmetries=(PERMUTATION, KEYS_ALONE),
        bad_input=BAD_LAYERS,
    ),
    ModuleCase(
        part="provenn.nn.SigmoidAttention",
        label="language model",
        make=lambda: SigmoidAttention(
            8, 2, "visible", qk_norm=True, causal=True, alibi=True, rope=True, layer_scale=0.5, out_norm=True
        ),
        inputs=self_attention,
        causal_dim=1,
        bad_input=BAD_LAYERS[:1],
    ),
    ModuleCase(
        part="provenn.nn.SigmoidAttention",
        label="blocked",
        make=lambda: SigmoidAttention(8, 2, "learnable", causal=True, alibi=True, backend="blocked"),
        inputs=without_weights,
        causal_dim=1,
        bad_input=BAD_LAYERS[:1],
    ),
    FunctionCase(
        part="provenn.nn.functional.sigmoid_attention",
        call=lambda: sigmoid_attention(*heads(2, 3), is_causal=True),
        bad_input=BAD_OPERANDS,
    ),
    ProbeCase(
        part="provenn.nn.attention_regularity",
        run=probe,
        model=tiny_layer,
        data=lambda generator: (0.5, 5.0),
        brute_force=lambda model, radii: {
            "radius": radii,
            "norms": {name: jacobian_norms(model, radii, attend) for name, attend in ONE_HEAD.items()},
        },
        bad_input=(
            BadInput("module", lambda: attention_regularity(nn.Linear(2, 2)), TypeError),
            BadInput("module", lambda: attention_regularity(SigmoidAttention(4, 1, kdim=3))),
            BadInput("radius_grid", lambda: attention_regularity(tiny_layer(), ())),
            BadInput("radius_grid", lambda: attention_regularity(tiny_layer(), (0.0,))),
            BadInput("tokens", lambda: attention_regularity(tiny_layer(), tokens=0)),
            BadInput("draws", lambda: attention_regularity(tiny_layer(), draws=0)),
            BadInput("iterations", lambda: attention_regularity(tiny_layer(), iterations=0)),
            BadInput("tolerance", lambda: attention_regularity(tiny_layer(), tolerance=-1.0)),
            BadInput("activations", lambda: attention_regularity(tiny_layer(), activations=("gelu",))),
        ),
    ),
    FunctionCase(
        part="provenn.nn.replace_attention",
        call=lambda: replace_attention(encoder()),
        bad_input=(
            BadInput("model", lambda: replace_attention("model"), TypeError),
            BadInput("model", lambda: replace_attention(nn.Linear(2, 2))),
            BadInput("model", lambda: replace_attention(nn.MultiheadAttention(4, 2, add_bias_kv=True))),
            BadInput("model", lambda: replace_attention(nn.MultiheadAttention(4, 2, add_zero_attn=True))),
            BadInput("bias", lambda: replace_attention(encoder(), bias="none")),
            BadInput("depth", lambda: replace_attention(encoder(), depth=2), TypeError),
        ),
    ),
]


# What sigmoid attention computes.


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_scores_average_the_values_times_n_over_n_plus_one(backend):
    _, k, v = heads(2, keys=7)
    output = sigmoid_attention(torch.zeros(2, 5, 4, dtype=torch.float64), k, v, backend=backend)
    torch.testing.assert_close(output, (v.mean(dim=-2, keepdim=True) * 7 / 8).expand(2, 5, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_default_scale_and_bias_come_from_head_and_keys(backend):
    # Different numbers of queries, keys, features: the bias must use the keys, the scale the features.
    q, k, v = heads(queries=2, keys=3, head=5, value=1)
    for i in range(2):
        terms = (logistic((q[i] @ k[j]).item() / math.sqrt(5) - math.log(3)) * v[j].item() for j in range(3))
        assert sigmoid_attention(q, k, v, backend=backend)[i].item() == pytest.approx(sum(terms), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_minus_infinity_leaves_nothing(backend):
    q, k, v = (x.requires_grad_() for x in heads(2))
    output = sigmoid_attention(q, k, v, bias=-math.inf, backend=backend)
    assert not output.any()
    gradients = torch.autograd.grad(output.sum(), (q, k, v))
    assert not any(one.any() for one in gradients)


def test_identical_keys_weigh_the_same():
    module = layer(8, 2)
    x, key = normal(1, 5, 8), normal(1, 1, 8, seed=1).expand(1, 6, 8)
    weights = module(x, key, normal(1, 6, 8, seed=2))[1]
    torch.testing.assert_close(weights, weights[..., :1].expand(1, 5, 6))
    assert not torch.allclose(weights[0, 0], weights[0, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_adds_its_own_term_and_nothing_else(backend):
    q, k, v = heads(2)
    before = sigmoid_attention(q, k[:, :-1], v[:, :-1], bias=-2.0, backend=backend)
    after = sigmoid_attention(q, k, v, bias=-2.0, backend=backend)
    term = torch.sigmoid(q @ k[:, -1:].mT / 2 - 2) * v[:, -1:]
    torch.testing.assert_close(after - before, term)
    softmax = [nn.functional.scaled_dot_product_attention(q, k[:, :n], v[:, :n]) for n in (6, 7)]
    assert not torch.allclose(softmax[1] - softmax[0], torch.softmax(q @ k.mT / 2, -1)[..., -1:] * v[:, -1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_decoding_with_a_cache_is_an_exact_sum(backend, chunk):
    q, k, v = heads(2, 3, queries=9, keys=9)
    options = {"bias": -math.log(9), "backend": backend}
    slopes = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64)
    whole = sigmoid_attention(q, k, v, is_causal=True, alibi_slopes=slopes, **options)
    for start in range(0, 9, chunk):  # new queries, all keys so far: the last query stands at the last key
        end = start + chunk
        step = sigmoid_attention(
            q[..., start:end, :], k[..., :end, :], v[..., :end, :], is_causal=True, alibi_slopes=slopes, **options
        )
        torch.testing.assert_close(step, whole[..., start:end, :])
    parts = [sigmoid_attention(q, k[..., j : j + 3, :], v[..., j : j + 3, :], **options) for j in (0, 3, 6)]
    torch.testing.assert_close(sum(parts), sigmoid_attention(q, k, v, **options))


@pytest.mark.parametrize("options", [{"rope": True}, {"alibi": True}, {}])
def test_the_layer_decodes_token_by_token(options):
    module = layer(8, 2, causal=True, max_length=6, **options)
    x = normal(2, 6, 8)
    whole = module(x, x, x)[0]
    for end in range(1, 7):
        step = module(x[:, end - 1 : end], x[:, :end], x[:, :end])[0]
        torch.testing.assert_close(step[:, 0], whole[:, end - 1])


def test_approaches_softmax_at_rate_one_over_n():
    # Scores with Σ eˢ = n: softmax's weight is eˢ/n =: p, sigmoid's is p/(1 + p), so they differ by p²/(1 + p).
    largest = {}
    for n in (100, 1000, 10_000):
        scores = normal(n)
        scores = scores - scores.logsumexp(0) + math.log(n)
        weights = layer_weights(scores, bias=-math.log(n))
        softmax = scores.softmax(0)
        relative = (softmax - weights) / softmax
        torch.testing.assert_close(relative, softmax / (1 + softmax), rtol=1e-6, atol=1e-12)
        largest[n] = relative.median().item()
    assert largest[100] / largest[1000] == pytest.approx(10, rel=0.2)
    assert largest[1000] / largest[10_000] == pytest.approx(10, rel=0.2)


def layer_weights(scores, bias):
    """The weights of one query, read off as outputs for one-hot values, in chunks of keys."""
    q, k = torch.ones(1, 1, dtype=torch.float64), scores[:, None]
    parts = [
        sigmoid_attention(q, k[start : start + 100], torch.eye(100, dtype=torch.float64), bias=bias, scale=1.0)[0]
        for start in range(0, len(scores), 100)
    ]
    return torch.cat(parts)


# Masks and the bias.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", ["-log_n", "visible", -1.0, torch.tensor(-1.0, dtype=torch.float64)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_hidden_keys_weigh_nothing_and_get_no_gradient(backend, bias, kind):
    q, k, v = (x.requires_grad_() for x in heads(2))
    visible = torch.tensor([True, False, True, True, False, True, True])
    mask = visible if kind == torch.bool else torch.zeros(7, dtype=kind).masked_fill(~visible, -math.inf)
    output = sigmoid_attention(q, k, v, mask, bias=bias, backend=backend)
    count = {"-log_n": -math.log(7), "visible": -math.log(5)}.get(bias, -1.0) if isinstance(bias, str) else -1.0
    seen = sigmoid_attention(q, k[:, visible], v[:, visible], bias=count, backend=backend)
    torch.testing.assert_close(output, seen)
    for gradient in torch.autograd.grad(output.square().sum(), (k, v)):
        assert not gradient[:, ~visible].any()
        assert gradient[:, visible].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", ["-log_n", "visible", -1.0])
@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_a_query_that_sees_nothing_gets_zero(backend, bias, kind):
    q, k, v = (x.requires_grad_() for x in heads(2))
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    if kind != torch.bool:
        mask = torch.zeros(5, 7, dtype=kind).masked_fill(~mask, -math.inf)
    output = sigmoid_attention(q, k, v, mask, bias=bias, backend=backend)
    assert not output[:, 2].any()
    assert output[:, [0, 1, 3, 4]].all()
    gradients = torch.autograd.grad(output.square().sum(), (q, k, v))
    assert all(one.isfinite().all() for one in gradients)
    assert not gradients[0][:, 2].any()


def test_more_queries_than_keys_leave_the_first_without_a_key():
    q, k, v = heads(queries=5, keys=3)
    output = sigmoid_attention(q, k, v, is_causal=True, bias="visible")
    assert not output[:2].any()
    torch.testing.assert_close(output[2], torch.sigmoid(q[2] @ k[0] / 2) * v[0])


def test_visible_counts_neither_padding_nor_the_future():
    x = normal(1, 4, 8)
    padded = torch.cat([x, normal(1, 3, 8, seed=9)], dim=1)
    padding = torch.tensor([[False] * 4 + [True] * 3])
    for causal in (False, True):
        module = layer(8, 2, bias="visible", causal=causal)
        alone, beside = module(x, x, x)[0], module(padded, padded, padded, key_padding_mask=padding)[0][:, :4]
        torch.testing.assert_close(alone, beside)
        by_length = layer(8, 2, causal=causal)
        changed = by_length(padded, padded, padded, key_padding_mask=padding)[0][:, :4]
        assert not torch.allclose(by_length(x, x, x)[0], changed)  # −log n counts the padding, as documented


def test_visible_under_causality_is_minus_log_of_the_place():
    q, k, v = heads(queries=6, keys=6)
    output = sigmoid_attention(q, k, v, bias="visible", is_causal=True)
    for i in range(6):
        alone = sigmoid_attention(q[i : i + 1], k[: i + 1], v[: i + 1])  # −log(i + 1)
        torch.testing.assert_close(output[i : i + 1], alone)


def test_max_length_keeps_the_bias_at_any_length():
    q, k, v = heads(1, 2, queries=3, keys=3, value=4)
    for length, bias in ((None, -math.log(3)), (10, -math.log(10))):
        module = SigmoidAttention(8, 2, max_length=length)
        wanted = sigmoid_attention(q, k, v, bias=bias)
        torch.testing.assert_close(module.attend(q, k, v, None, False, False)[0], wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_learned_bias_starts_at_minus_ten_and_learns(backend):
    module = layer(8, 2, bias="learnable", backend=backend)
    assert module.learned_bias.item() == -10
    assert "learned_bias" in dict(module.named_parameters())
    x = normal(2, 5, 8)

    def loss():
        return module(x, x, x, need_weights=False)[0].square().sum()

    (gradient,) = torch.autograd.grad(loss(), module.learned_bias)
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            module.learned_bias += step
        values.append(loss().item())
    assert gradient.item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_scales_scores_and_slopes_but_not_the_bias(backend):
    q, k, v = heads(1, 2, value=4)
    module = SigmoidAttention(8, 2, bias=-1.5, alibi=True, temperature=0.7, backend=backend)
    rows, columns = torch.arange(2, 7)[:, None], torch.arange(7)
    slopes = torch.tensor([2.0**-4, 2.0**-8])[:, None, None]
    scores = math.exp(0.7) * (q @ k.mT / 2 - slopes * (rows - columns).abs()) - 1.5
    torch.testing.assert_close(module.attend(q, k, v, None, False, False)[0], torch.sigmoid(scores) @ v)


# The layer around it.


def test_norm_and_scale_on_the_output():
    plain, dressed = layer(8, 2), layer(8, 2, layer_scale=1.0, out_norm=True)
    dressed.load_state_dict(plain.state_dict() | {k: dressed.state_dict()[k] for k in
                            ("gamma", "out_norm.weight", "out_norm.bias")})  # fmt: skip
    x = normal(2, 5, 8)
    y = plain(x, x, x)[0]
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    wanted = (y * dressed.out_norm.weight + dressed.out_norm.bias) * dressed.gamma
    torch.testing.assert_close(dressed(x, x, x)[0], wanted)


def test_stabilisers_start_as_the_authors():
    module = SigmoidAttention(8, 2, layer_scale=1e-4, qk_norm=True, out_norm=True)
    torch.testing.assert_close(module.gamma, torch.full((8,), 1e-4))
    assert module.q_norm.normalized_shape == module.k_norm.normalized_shape == (4,)
    assert module.out_norm.normalized_shape == (8,)
    assert module.q_norm is not module.k_norm


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("rope", "alibi"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_authors_module(backend, qk_norm, rope, alibi, causal):
    # Its formula in its own order: one packed projection; norms per head; rotation as complex products; ALiBi; mask;
    # temperature; bias; σ. Its ALiBi is signed, j − i: the same as the distance where no query looks ahead.
    if alibi and not causal:
        pytest.skip("the authors' module adds a positive bias to later keys there, their kernel the distance")
    module = layer(12, 3, qk_norm=qk_norm, rope=rope, alibi=alibi, causal=causal, temperature=0.3, backend=backend)
    x = normal(2, 6, 12)
    packed = torch.cat([p.weight for p in (module.q_proj, module.k_proj, module.v_proj)])
    packed_bias = torch.cat([p.bias for p in (module.q_proj, module.k_proj, module.v_proj)])
    q, k, v = (x @ packed.T + packed_bias).reshape(2, 6, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = module.q_norm(q), module.k_norm(k)
    if rope:
        angles = torch.outer(torch.arange(6).double(), 10000 ** (-torch.arange(0, 4, 2).double() / 4))
        turn = torch.polar(torch.ones_like(angles), angles)
        q, k = (torch.view_as_real(torch.view_as_complex(y.reshape(2, 3, 6, 2, 2)) * turn).flatten(3) for y in (q, k))
    scores = q * 4**-0.5 @ k.mT
    if alibi:
        slopes = torch.tensor([2.0**-4, 2.0**-8, 2.0**-2], dtype=torch.float64)[:, None, None]
        scores = scores + slopes * (torch.arange(6) - torch.arange(6)[:, None])
    if causal:
        scores = scores.masked_fill(~torch.ones(6, 6).tril().bool(), -torch.finfo(scores.dtype).max)
    weights = torch.sigmoid(scores * math.exp(0.3) - math.log(6))
    wanted = (weights @ v).transpose(1, 2).reshape(2, 6, 12) @ module.out_proj.weight.T + module.out_proj.bias
    torch.testing.assert_close(module(x, x, x, need_weights=False)[0], wanted)


def test_weights_come_averaged_or_by_head_and_need_not_sum_to_one():
    module = layer(8, 2)
    x = normal(2, 5, 8)
    by_head = module(x, x, x, average_attn_weights=False)[1]
    assert by_head.shape == (2, 2, 5, 5)
    torch.testing.assert_close(module(x, x, x)[1], by_head.mean(1))
    assert module(x, x, x, need_weights=False)[1] is None
    assert not torch.allclose(by_head.sum(-1), torch.ones(()).double())
    values = module.v_proj(x).unflatten(-1, (2, 4)).transpose(1, 2)
    torch.testing.assert_close(module(x, x, x)[0], module.out_proj((by_head @ values).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_operands_have_their_weights_in_float32(backend, autocast):
    # 4096 equal keys, so that errors add up. Their score, −8.198, would be rounded to −8.1875 in bfloat16, and the sum
    # be off by 1 %; the output's own rounding is at most 2⁻⁸.
    dtype = torch.float32 if autocast else torch.bfloat16
    q, k, v = (torch.full(shape, value).bfloat16().to(dtype) for shape, value in
               (((1, 1), 0.4), ((4096, 1), 0.3), ((4096, 1), 1.0)))  # fmt: skip
    score = (q[0].double() * k[0].double()).item() - math.log(4096)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = sigmoid_attention(q, k, v, scale=1.0, backend=backend)
    assert output.dtype == torch.bfloat16
    assert output.item() == pytest.approx(4096 * logistic(score), rel=2**-8)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "rope": True}])
def test_autocast_reaches_the_layer(options):
    module = layer(8, 2, **options)
    x = normal(2, 5, 8)
    exact, exact_weights = module(x, x, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, weights = module.float()(x.float(), x.float(), x.float())
        quick = module(x.float(), x.float(), x.float(), need_weights=False)[0]
    assert output.dtype == quick.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), exact, rtol=0.03, atol=0.03)
    torch.testing.assert_close(weights.double(), exact_weights, rtol=0.03, atol=0.01)
    torch.testing.assert_close(quick, output)


def test_dropout_in_training_alone():
    module = layer(8, 2, dropout=0.5)
    x = normal(1, 5, 8)
    plain = module.eval()(x, x, x, need_weights=False)[0]
    weights = module.eval()(x, x, x, average_attn_weights=False)[1]
    with seeded(0):
        draws = torch.stack([module.train()(x, x, x, need_weights=False)[0] for _ in range(2000)])
        dropped = module.train()(x, x, x, average_attn_weights=False)[1]
    spread = draws.std(dim=0) / 2000**0.5
    assert ((draws.mean(dim=0) - plain).abs() < 5 * spread).all()
    assert spread.min() > 0
    kept = dropped != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(dropped[kept], 2 * weights[kept])


# The layer's plumbing, by its softmax twin against torch's own module.


def twins(**options):
    with seeded(1):
        torchs = nn.MultiheadAttention(8, 2, **options).double().eval()
        for parameter in torchs.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter)
    ours = replace_attention(torchs)
    twin = SoftmaxAttention(8, 2, batch_first=torchs.batch_first, kdim=torchs.kdim, vdim=torchs.vdim,
                            projection_bias=torchs.in_proj_bias is not None).double().eval()  # fmt: skip
    twin.load_state_dict(ours.state_dict())
    return torchs, twin


MASKS = {
    "none": {},
    "padding": {"key_padding_mask": torch.tensor([[False] * 6, [False, True, False, False, True, True]])},
    "additive padding": {"key_padding_mask": normal(2, 6)},
    "square": {"attn_mask": torch.ones(6, 6).triu(1).bool()},
    "causal hint": {"attn_mask": torch.ones(6, 6).triu(1).bool(), "is_causal": True},
    "additive": {"attn_mask": normal(6, 6, seed=1)},
    "by head": {"attn_mask": normal(4, 6, 6, seed=2) > 0.8},
    "both": {
        "key_padding_mask": torch.tensor([[False] * 6, [False, False, False, False, True, True]]),
        "attn_mask": torch.ones(6, 6).triu(1).bool(),
    },
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 3, "vdim": 5}])
def test_takes_what_torchs_module_takes(mask, batch_first, options):
    torchs, twin = twins(batch_first=batch_first, **options)
    sizes = (8, torchs.kdim, torchs.vdim)
    shape = (2, 6) if batch_first else (6, 2)
    inputs = [normal(*shape, size, seed=place) for place, size in enumerate(sizes)]
    for average in (False, True):
        wanted = torchs(*inputs, **MASKS[mask], average_attn_weights=average)
        torch.testing.assert_close(twin(*inputs, **MASKS[mask], average_attn_weights=average), wanted)
    torch.testing.assert_close(twin(*inputs, **MASKS[mask], need_weights=False)[0], wanted[0])


def test_takes_one_sequence_without_a_batch():
    torchs, twin = twins(batch_first=True)
    x, keys = normal(6, 8), normal(4, 8, seed=1)
    hidden = torch.tensor([False, False, True, False])
    torch.testing.assert_close(
        twin(x, keys, keys, key_padding_mask=hidden), torchs(x, keys, keys, key_padding_mask=hidden)
    )


def test_starts_from_torchs_distribution():
    with seeded(0):
        torchs, ours = nn.MultiheadAttention(256, 4), SigmoidAttention(256, 4)
    packed = torch.cat([p.weight for p in (ours.q_proj, ours.k_proj, ours.v_proj)])
    assert packed.abs().max().item() == pytest.approx(torchs.in_proj_weight.abs().max().item(), rel=1e-3)
    assert packed.std().item() == pytest.approx(torchs.in_proj_weight.std().item(), rel=0.02)
    assert not any(p.bias.any() for p in (ours.q_proj, ours.k_proj, ours.v_proj, ours.out_proj))


def test_softmax_twin_survives_a_query_that_sees_nothing():
    twin = layer(8, 2, kind=SoftmaxAttention)
    x = normal(1, 5, 8).requires_grad_()
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    hidden[2] = True
    output, weights = twin(x, x, x, attn_mask=hidden)
    assert not weights[0, 2].any()
    assert torch.autograd.grad(output.square().sum(), x)[0].isfinite().all()


def test_relu_twin_divides_by_the_number_of_keys():
    twin = layer(8, 1, kind=ReluAttention)
    x, keys = normal(1, 3, 8), normal(1, 5, 8, seed=1)
    q, k = twin.q_proj(x), twin.k_proj(keys)
    output, weights = twin(x, keys, keys)
    torch.testing.assert_close(weights, torch.relu(q @ k.mT / 8**0.5) / 5)
    torch.testing.assert_close(output, twin.out_proj(weights @ twin.v_proj(keys)))


def test_is_causal_applies_without_a_mask_and_yields_to_one_of_another_shape():
    module, causal = layer(8, 2), layer(8, 2, causal=True)
    x, keys = normal(2, 5, 8), normal(2, 7, 8, seed=1)
    torch.testing.assert_close(module(x, x, x, is_causal=True), causal(x, x, x))
    torch.testing.assert_close(module(x, keys, keys, is_causal=True), causal(x, keys, keys))
    first = torch.ones(5, 7).triu(1).bool()  # torch's own: the first query stands at the first key
    torch.testing.assert_close(
        module(x, keys, keys, attn_mask=first, is_causal=True), module(x, keys, keys, attn_mask=first)
    )


# Replacement.


@pytest.mark.parametrize("padded", [False, True])
def test_a_replaced_encoder_computes_sigmoid_attention_in_every_mode(padded):
    # In eval mode torch's encoder would skip the layer and run fused softmax attention on its weights.
    with seeded(0):
        model = encoder().double()
    replaced = replace_attention(model)
    x = normal(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    training, original = (
        replaced.train()(x, src_key_padding_mask=padding),
        model.train()(x, src_key_padding_mask=padding),
    )
    assert not torch.allclose(training, original)
    with torch.no_grad():
        evaluated = replaced.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(evaluated, training)
    y = x
    hidden = None if padding is None else padding[:, None, None]
    for block, old in zip(replaced.layers, model.layers, strict=True):
        q, k, v = (y @ old.self_attn.in_proj_weight.T + old.self_attn.in_proj_bias).chunk(3, -1)
        q, k, v = (z.unflatten(-1, (2, 4)).transpose(1, 2) for z in (q, k, v))
        weights = torch.sigmoid(q @ k.mT / 2 - math.log(5))
        weights = weights if hidden is None else weights.masked_fill(hidden, 0.0)
        attended = old.self_attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
        y = block.norm1(y + attended)
        y = block.norm2(y + block.linear2(torch.relu(block.linear1(y))))
    torch.testing.assert_close(evaluated, y)


def test_replacement_keeps_what_it_says_and_leaves_the_original():
    with seeded(0):
        attention = nn.MultiheadAttention(8, 2, dropout=0.25, batch_first=True, dtype=torch.float64).eval()
    attention.in_proj_weight.requires_grad_(False)
    model = nn.ModuleDict({"one": attention, "same": attention, "other": nn.Linear(2, 2)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    replaced = replace_attention(model, bias=-3.0, qk_norm=True, rope=True)
    assert torch.equal(state, torch.random.get_rng_state())
    assert type(model["one"]) is nn.MultiheadAttention
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    made = replaced["one"]
    assert made is replaced["same"]
    assert (made.bias, made.rope, made.dropout, made.batch_first, made.training) == (-3.0, True, 0.25, True, False)
    assert made.q_proj.weight.dtype == torch.float64
    assert isinstance(made.q_norm, nn.LayerNorm)
    assert not made.k_proj.weight.requires_grad
    assert made.k_proj.bias.requires_grad
    with torch.no_grad():
        made.q_proj.weight.zero_()
    assert attention.in_proj_weight.any()


def test_replacement_of_attention_itself():
    assert isinstance(replace_attention(nn.MultiheadAttention(8, 2)), SigmoidAttention)
    assert not replace_attention(nn.MultiheadAttention(8, 2)).batch_first


class Doubled(nn.MultiheadAttention):
    """Attention that computes something else than torch's."""

    def forward(self, query, *args, **options):
        return super().forward(2 * query, *args, **options)


class Small(nn.MultiheadAttention):
    """Torch's attention with sizes of its own."""

    def __init__(self):
        super().__init__(8, 2)


def test_replacement_leaves_subclasses_that_compute_something_else():
    replaced = replace_attention(nn.ModuleList([Doubled(8, 2), Small()]))
    assert [type(module) for module in replaced] == [Doubled, SigmoidAttention]
    with pytest.raises(ValueError, match="at least one"):
        replace_attention(Doubled(8, 2))


class SelfAttention(nn.Module):
    def __init__(self, *args):
        super().__init__()
        self.attention = SigmoidAttention(*args).double()

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("bias", ["-log_n", "visible"])
def test_one_graph_serves_all_lengths_and_batches(bias):
    model, graphs = SelfAttention(8, 2, bias), []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    with plain_signatures(), torch.no_grad():
        compiled = torch.compile(model, backend=counting, fullgraph=True, dynamic=True)
        free = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
        exported = torch.export.export(model, (normal(3, 7, 8),), dynamic_shapes=free).module()
        for batch, length in ((3, 7), (2, 5), (4, 12), (5, 3)):
            x = normal(batch, length, 8)
            for other in (compiled, exported):
                torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-12)
    assert len(graphs) == 1


def test_shapes_are_known_without_values():
    layer, x = SigmoidAttention(8, 2, device="meta"), torch.empty(3, 7, 8, device="meta")
    output, weights = layer(x, x, x)
    assert (output.shape, weights.shape) == (x.shape, (3, 7, 7))


# Back ends.


def test_auto_holds_all_weights_only_if_they_fit_in_a_block():
    q, k, v = heads(1, 1, queries=1500, keys=1500, head=2, value=2)
    for length, second_derivative in ((100, True), (1500, False)):
        cut = [x[:, :, :length].requires_grad_() for x in (q, k, v)]
        output = sigmoid_attention(*cut)
        torch.testing.assert_close(output, sigmoid_attention(*cut, backend="reference"))
        (gradient,) = torch.autograd.grad(output.sum(), cut[0], create_graph=True)
        if second_derivative:
            gradient.sum().backward()
        else:
            with pytest.raises(RuntimeError, match="second derivative"):
                gradient.sum().backward()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_triton_without_cuda_is_refused_by_name():
    with pytest.raises(RuntimeError, match="triton"):
        sigmoid_attention(*heads(2), backend="triton")
    x = torch.zeros(1, 3, 8)
    with pytest.raises(RuntimeError, match="triton"):
        SigmoidAttention(8, 2, backend="triton")(x, x, x, need_weights=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("head", [32, 64, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding", "additive"])
@pytest.mark.parametrize("bias", ["number", "by row"])
def test_triton_agrees_with_the_reference(head, dtype, tolerance, causal, mask, bias):
    q, k, v = (x.to("cuda", dtype).requires_grad_() for x in heads(2, 3, queries=77, keys=100, head=head, value=head))
    masks = {"none": None, "padding": normal(2, 1, 1, 100).cuda() > 0, "additive": normal(3, 77, 100).float().cuda()}
    rows = normal(3, 77, 1).float().cuda().requires_grad_()
    slopes = torch.tensor([0.5, 0.25, 0.125], device="cuda")
    arguments = (masks[mask], rows if bias == "by row" else -2.0)
    options = {"is_causal": causal, "alibi_slopes": slopes}
    wanted_of = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = sigmoid_attention(*wanted_of, *arguments, backend="reference", **options)
    found = sigmoid_attention(q, k, v, *arguments, backend="triton", **options)
    weight = normal(*wanted.shape, seed=5).cuda()
    extra = [rows] if bias == "by row" else []
    expected = torch.autograd.grad(wanted, [*wanted_of, *extra], weight)
    gradients = torch.autograd.grad(found, [q, k, v, *extra], weight.to(dtype))
    for one, other in zip((found, *gradients), (wanted, *expected), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


# Regularity.


@pytest.mark.parametrize(
    "options", [{}, {"rope": True}, {"alibi": True, "causal": True}, {"layer_scale": 0.5}, {"temperature": 0.5}]
)
def test_the_papers_bound_holds(options):
    with seeded(0):
        module = SigmoidAttention(8, 2, **options)
    report = attention_regularity(module, (0.5, 3.0, 20.0), tokens=6, draws=3)
    for norms, bounds in zip(report.norms["sigmoid"], report.bound, strict=True):
        for norm, bound in zip(norms, bounds, strict=True):
            assert 0 < norm <= bound


def test_the_bound_is_the_theorems_for_one_head():
    # Written out with the extremes over pairs of tokens found one by one.
    with seeded(0):
        module = SigmoidAttention(4, 1, bias=-1.0).double()
    x = 2 * normal(1, 5, 4)
    w_q, w_k, w_v, w_o = (p.weight for p in (module.q_proj, module.k_proj, module.v_proj, module.out_proj))
    values = [logistic((a @ w_q.T @ w_k @ b).item() / 2 - 1) for a, b in itertools.product(x[0], x[0])]

    def norm(matrix):
        return torch.linalg.svdvals(matrix)[0].item()

    square = sum((row @ row).item() for row in x[0]) / 5
    sup, slope = 5 * max(values), 5 * max(p * (1 - p) for p in values)
    wanted = norm(w_o) * norm(w_v) * (sup + 2 * slope * norm(w_q.T @ w_k) / 2 * square)
    assert sigmoid_bound(module, x).item() == pytest.approx(wanted, rel=1e-9)


def test_no_bound_where_the_theorem_does_not_apply():
    with seeded(0):
        layers = [SigmoidAttention(8, 2, qk_norm=True), SigmoidAttention(8, 2, out_norm=True), SigmoidAttention(8, 2)]
    nn.init.ones_(layers[2].k_proj.bias)
    for module in layers:
        assert attention_regularity(module, (1.0,), tokens=3, draws=1).bound is None


def test_reads_torchs_attention():
    with seeded(0):
        torchs = nn.MultiheadAttention(3, 1, dtype=torch.float64)
    report = attention_regularity(
        torchs, (2.0,), tokens=4, draws=1, activations=("softmax",), tolerance=0.0, iterations=2000
    )
    generator = torch.Generator().manual_seed(0)
    x = nn.functional.normalize(torch.randn(1, 4, 3, generator=generator, dtype=torch.float64), dim=-1)
    x = 2 * x * torch.rand(1, 4, 1, generator=generator, dtype=torch.float64) ** (1 / 3)
    jacobian = torch.autograd.functional.jacobian(lambda y: torchs(y, y, y)[0], x[0]).reshape(12, 12)
    assert report.norms["softmax"][0][0] == pytest.approx(torch.linalg.svdvals(jacobian)[0].item(), rel=1e-6)
    assert report.bound is None  # of sigmoid's norm, which was not asked for


def test_tokens_lie_in_the_ball_and_scale_with_it():
    # Weights so small that attention is nearly linear: norms at both radii agree, so the tokens are only scaled.
    module = layer(3, 1, projection_bias=False)
    with torch.no_grad():
        module.q_proj.weight.mul_(1e-6)
    norms = attention_regularity(module, (0.1, 1.0), tokens=5, draws=2, activations=("sigmoid",)).norms["sigmoid"]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    again = AttentionRegularity.from_json(
        attention_regularity(module, (0.1,), tokens=5, generator=torch.Generator().manual_seed(3)).to_json()
    )
    assert again.radius == (0.1,)


# Universal approximation, in small: what the constructive proof is built from.


def test_two_sigmoid_heads_make_a_selective_shift():
    # σ(c(x − a)) − σ(c(x − b)) is 1 on (a, b) and 0 outside, so two heads with opposite values move the tokens of one
    # interval and leave the rest.
    tokens = torch.tensor([[0.1], [0.9], [1.1], [1.9], [2.1], [3.0]], dtype=torch.float64)
    keys, values = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    steps = [sigmoid_attention(tokens, keys, values, bias=-200.0 * edge, scale=200.0) for edge in (1.0, 2.0)]
    torch.testing.assert_close(
        (steps[0] - steps[1])[:, 0], torch.tensor([0, 0, 1, 1, 0, 0.0], dtype=torch.float64), rtol=0, atol=1e-8
    )


def test_a_layer_tells_every_token_in_every_context_apart():
    # A contextual map: over all multisets of three tokens from a vocabulary of five, no two (token, context) pairs
    # leave x + attn(x) at the same place, and equal tokens of one context do.
    module = layer(4, 2, seed=3)
    vocabulary = normal(5, 4, seed=4)
    places = {}
    for context in itertools.combinations_with_replacement(range(5), 3):
        x = vocabulary[list(context)].unsqueeze(0)
        output = (x + module(x, x, x)[0])[0]
        for token, place in zip(context, output, strict=True):
            torch.testing.assert_close(places.setdefault((token, context), place), place)
    found = torch.stack(list(places.values()))
    assert torch.pdist(found).min() > 1e-4


# The claim.


def evidence(accuracy, loss, share):
    """Figures of (sigmoid, softmax, b = 0) over three seeds, and the share of lower Jacobian norms."""
    figures = {("regularity", claim.SIGMOID): {"share_lower": [share] * 3}}
    for arm, one, other in zip(claim.ARMS, accuracy, loss, strict=True):
        figures["vision", arm] = {"test_accuracy": [one - 0.004, one, one + 0.004]}
        figures["language", arm] = {"test_loss": [other + 0.01, other, other - 0.01]}
    return Evidence.of(figures)


@pytest.mark.parametrize(
    ("accuracy", "loss", "share", "outcome"),
    [
        ((0.40, 0.409, 0.35), (2.00, 1.98, 2.20), 0.95, "reproduced"),
        ((0.40, 0.391, 0.35), (2.00, 2.02, 2.20), 0.90, "reproduced"),
        ((0.40, 0.40, 0.35), (2.00, 2.00, 2.20), 0.89, "partly"),
        ((0.40, 0.40, 0.41), (2.00, 2.00, 2.20), 0.95, "partly"),
        ((0.40, 0.40, 0.35), (2.00, 2.00, 1.99), 0.95, "partly"),
        ((0.40, 0.40, 0.45), (2.00, 2.00, 1.90), 0.0, "partly"),
        # Parity is asked for both ways: a sigmoid that is better by more than the margin is no match either.
        ((0.40, 0.42, 0.35), (2.00, 2.00, 2.20), 0.95, "not reproduced"),
        ((0.40, 0.38, 0.35), (2.00, 2.00, 2.20), 0.95, "not reproduced"),
        ((0.40, 0.40, 0.35), (2.00, 1.96, 2.20), 0.95, "not reproduced"),
        ((0.40, 0.40, 0.35), (2.00, 2.04, 2.20), 0.95, "not reproduced"),
    ],
)
def test_judge(accuracy, loss, share, outcome):
    assert claim.judge(evidence(accuracy, loss, share)).outcome == outcome


@pytest.mark.parametrize("arm", claim.ARMS)
def test_arms_differ_in_activation_and_bias_alone(arm):
    with seeded(0):
        made = claim.attention_of(arm, 8, 2, 16, qk_norm=True, causal=True, alibi=True)
    with seeded(0):
        method = claim.attention_of(claim.SIGMOID, 8, 2, 16, qk_norm=True, causal=True, alibi=True)
    for name, value in method.state_dict().items():
        assert torch.equal(made.state_dict()[name], value)
    q, k, v = heads(1, 2, queries=4, keys=4, value=4)
    scores = q @ k.mT / 2 - torch.tensor([2.0**-4, 2.0**-8])[:, None, None] * (
        torch.arange(4)[:, None] - torch.arange(4)
    )
    scores = scores.masked_fill(~torch.ones(4, 4).tril().bool(), -math.inf)
    weights = {
        claim.SIGMOID: torch.sigmoid(scores - math.log(16)),
        claim.SOFTMAX: scores.softmax(-1),
        claim.UNBIASED: torch.sigmoid(scores),
    }[arm]
    torch.testing.assert_close(made.attend(q, k, v, None, True, False)[0], weights @ v)


def test_regularity_counts_paired_draws():
    budget = {"dim": 8, "heads": 2, "tokens": 4, "draws": 3}
    events = list(claim.run(Trial("regularity", claim.SIGMOID, 0, "small", budget)))
    metrics = {event.name: event.value for event in events if hasattr(event, "name")}
    lower = 0
    for draw in range(3):
        with seeded(0, "weights", draw):
            module = SigmoidAttention(8, 2)
        tokens = torch.Generator().manual_seed(claim.derive_seed(0, "tokens", draw))
        norms = attention_regularity(module, (5.0,), tokens=4, draws=1, generator=tokens).norms
        lower += norms["sigmoid"][0][0] < norms["softmax"][0][0]
    assert metrics["share_lower"] == lower / 3
    # σ(s) ≈ ½ against 1/n: without the bias a layer's output starts about n/2 times as large.
    assert metrics["initial_norm_over_softmax, b = 0"] == pytest.approx(2, rel=0.3)
    assert metrics["initial_norm_over_softmax, b = -log n"] == pytest.approx(0.9, rel=0.3)
