"""SeqBoat against formulas written out element by element, finite differences, and its other forms."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from provenn.contracts import BadInput, Form, FunctionCase, ModuleCase
from provenn.contracts.watch import plain_signatures
from provenn.core.experiment.seeding import seeded
from provenn.core.sequences.scans import linear_recurrence
from provenn.nn import (
    GatedAttentionUnit,
    MultiHeadEMA,
    SeqBoat,
    SeqBoatLayer,
    SparseModularActivation,
    compress,
    extract,
)
from provenn.nn._seqboat_ssm import S4D

TIME = 11


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sizable(module, factor=10.0):
    """Enlarge the weights, which start so small that attention and router hardly matter, and move what starts at 0."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.is_meta or "ssm" in name or "norm" in name or "temperature" in name:
                continue
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)
            elif parameter.std() < 0.05:
                parameter.mul_(factor * (4 if "gamma" in name else 1))
    return module


def layer(**options):
    return sizable(SeqBoatLayer(6, 4, 8, **{"ndim": 3, "window": 3, "max_positions": 16, **options}))


def model(**options):
    return sizable(SeqBoat(3, 6, 2, 2, **{"zdim": 4, "hdim": 8, "ndim": 3, "window": 3, **options}))


def unit(**options):
    return sizable(GatedAttentionUnit(6, **{"zdim": 4, "hdim": 8, "window": 3, "max_positions": 16, **options}))


def double(make, seed=0, **options):
    with seeded(seed):
        return make(**options).double()


# The suites.


def sequences(features):
    return lambda generator, dtype, batch: (
        torch.randn(batch, TIME, features, generator=generator, dtype=torch.float64).to(dtype),
    )


def padded(generator, dtype, batch):
    (x,) = sequences(6)(generator, dtype, batch)
    ends = torch.arange(batch)[:, None] * 3 + 5
    return x, torch.arange(TIME).expand(batch, -1) >= ends


def stepwise(module, inputs):
    state, outputs = None, []
    for x in inputs[0].unbind(1):
        y, state = module.step(x, state)
        outputs.append(y)
    return torch.stack(outputs, 1)


def unit_stepwise(module, inputs):
    state, outputs = None, []
    for time, x in enumerate(inputs[0].unbind(1)):
        h, state = module.step(x, torch.full((len(x),), time), torch.ones(len(x), dtype=torch.bool), state)
        outputs.append(h)
    return torch.stack(outputs, 1)


def masked(module, inputs):
    for part in module.modules():
        if isinstance(part, SparseModularActivation):
            part.packing = False
    return module(*inputs)


def recurrent(module, inputs):
    """The averages by the recurrence h ← q h + pβ x, in both directions where there are two."""
    x = inputs[0]
    p = module.delta.sigmoid()
    q = 1 - p * module.alpha.sigmoid()
    total = x * module.omega
    for direction in range(2 if module.bidirectional else 1):
        rows = slice(6 * direction, 6 * direction + 6)
        signal = x.flip(1) if direction else x
        entering = (p * module.beta)[rows] * signal[..., None]
        h = linear_recurrence(q[rows].expand(len(x), x.shape[1], -1, -1), entering, method="sequential")
        y = (h * module.gamma[rows]).sum(-1) / math.sqrt(module.ndim)
        total = total + (y.flip(1) if direction else y)
    return total


DATA_DEPENDENT = "the packed length depends on the data; packing=False compiles and exports"
STEPS, MASKED = Form("step by step", stepwise), Form("masked", masked)


def bad(argument, call, error=ValueError):
    return BadInput(argument, call, error)


def sma(**options):
    return SparseModularActivation(nn.Linear(6, 4), 6, **options)


CASES = [
    ModuleCase(
        part="provenn.nn.MultiHeadEMA",
        make=lambda **options: MultiHeadEMA(6, 3, **options),
        inputs=sequences(6),
        causal_dim=1,
        forms=(STEPS, Form("recurrent", recurrent)),
        bad_input=(
            bad("dim", lambda: MultiHeadEMA(0)),
            bad("ndim", lambda: MultiHeadEMA(4, 0)),
            bad("ndim", lambda: MultiHeadEMA(4, 2.0), TypeError),
            bad("x", lambda: MultiHeadEMA(4)(torch.zeros(2, 5, 3))),
            bad("x", lambda: MultiHeadEMA(4).step(torch.zeros(2, 5, 4))),
        ),
    ),
    ModuleCase(
        part="provenn.nn.MultiHeadEMA",
        label="bidirectional",
        make=lambda: MultiHeadEMA(6, 3, bidirectional=True),
        inputs=sequences(6),
        forms=(Form("recurrent", recurrent),),
        bad_input=(bad("x", lambda: MultiHeadEMA(4)(torch.zeros(5, 4))),),
    ),
    ModuleCase(
        part="provenn.nn.GatedAttentionUnit",
        make=unit,
        inputs=sequences(6),
        causal_dim=1,
        forms=(Form("step by step", unit_stepwise),),
        bad_input=(
            bad("window", lambda: unit(window=0)),
            bad("window", lambda: unit(window=None, rel_pos_bias="local")),
            bad("zdim", lambda: unit(zdim=3, rel_pos_bias="rotary")),
            bad("attn", lambda: unit(attn="relu")),
            bad("rel_pos_bias", lambda: unit(rel_pos_bias="t5")),
            bad("attention_dropout", lambda: unit(attention_dropout=1.0)),
            bad("max_positions", lambda: unit()(torch.zeros(1, 17, 6))),
            bad("x", lambda: unit()(torch.zeros(1, 7, 5))),
        ),
    ),
    *(
        ModuleCase(
            part="provenn.nn.GatedAttentionUnit",
            label=f"{attn}, {kind}, window {window}",
            make=lambda attn=attn, kind=kind, window=window: unit(attn=attn, rel_pos_bias=kind, window=window),
            inputs=sequences(6),
            causal_dim=1,
            forms=(Form("step by step", unit_stepwise),),
            bad_input=(bad("window", lambda: unit(window=0)),),
        )
        for attn, kind, window in (("relu2", "local", 2), ("softmax", "rotary", None), ("relu2", "simple", None))
    ),
    ModuleCase(
        part="provenn.nn.SparseModularActivation",
        make=sma,
        inputs=sequences(6),
        causal_dim=1,
        compile=False,
        compile_reason=DATA_DEPENDENT,
        export=False,
        export_reason=DATA_DEPENDENT,
        forms=(MASKED,),
        bad_input=(
            bad("num_modules", lambda: sma(num_modules=2)),
            bad("num_modules", lambda: sma(num_modules=0)),
            bad("init_temp_scale", lambda: sma(init_temp_scale=0.0)),
            bad("dim", lambda: SparseModularActivation(nn.Identity(), 0)),
            bad("logits", lambda: sma(projection=False)(torch.zeros(1, 2, 6))),
            bad("logits", lambda: sma()(torch.zeros(1, 2, 6), torch.zeros(1, 2, 3))),
            bad("x", lambda: sma()(torch.zeros(1, 2, 5))),
        ),
    ),
    ModuleCase(
        part="provenn.nn.SparseModularActivation",
        label="two modules, masked",
        make=lambda: SparseModularActivation([nn.Linear(6, 4), nn.Linear(6, 4)], 6, 2, packing=False),
        inputs=sequences(6),
        causal_dim=1,
        bad_input=(bad("num_modules", lambda: sma(num_modules=2)),),
    ),
    ModuleCase(
        part="provenn.nn.SeqBoatLayer",
        make=layer,
        inputs=sequences(6),
        causal_dim=1,
        compile=False,
        compile_reason=DATA_DEPENDENT,
        export=False,
        export_reason=DATA_DEPENDENT,
        forms=(STEPS, MASKED),
        bad_input=(
            bad("window", lambda: layer(window=0)),
            bad("d_model", lambda: SeqBoatLayer(0)),
            bad("ssm", lambda: layer(ssm="s5")),
            bad("norm", lambda: layer(norm="rmsnorm")),
            bad("dropout", lambda: layer(dropout=1.0)),
            bad("init_temp_scale", lambda: layer(init_temp_scale=-1.0)),
            bad("ndim", lambda: layer(ssm="s4d", ndim=3)),
            bad("max_positions", lambda: layer()(torch.zeros(1, 17, 6))),
            bad("padding_mask", lambda: layer()(torch.zeros(1, 4, 6), torch.zeros(1, 5, dtype=torch.bool))),
            bad("x", lambda: layer()(torch.zeros(1, 4, 5))),
        ),
    ),
    ModuleCase(
        part="provenn.nn.SeqBoatLayer",
        label="masked",
        make=lambda: layer(packing=False, norm="scalenorm"),
        inputs=sequences(6),
        causal_dim=1,
        bad_input=(bad("window", lambda: layer(window=0)),),
    ),
    ModuleCase(
        part="provenn.nn.SeqBoatLayer",
        label="bidirectional, padded",
        make=lambda: layer(bidirectional=True, attn="relu2", rel_pos_bias="local", prenorm=False),
        inputs=padded,
        compile=False,
        compile_reason=DATA_DEPENDENT,
        export=False,
        export_reason=DATA_DEPENDENT,
        forms=(MASKED,),
        bad_input=(bad("window", lambda: layer(window=0)),),
    ),
    ModuleCase(
        part="provenn.nn.SeqBoat",
        make=model,
        inputs=sequences(3),
        causal_dim=1,
        compile=False,
        compile_reason=DATA_DEPENDENT,
        export=False,
        export_reason=DATA_DEPENDENT,
        forms=(STEPS, MASKED),
        bad_input=(
            bad("d_input", lambda: SeqBoat(0, 6, 2)),
            bad("d_model", lambda: SeqBoat(3, 0, 2)),
            bad("n_layers", lambda: SeqBoat(3, 6, 0)),
            bad("d_output", lambda: SeqBoat(3, 6, 1, 0)),
            bad("pool", lambda: SeqBoat(3, 6, 1, pool="max")),
            bad("window", lambda: model(window=0)),
            bad("x", lambda: model()(torch.zeros(1, 4, 6))),
        ),
    ),
    ModuleCase(
        part="provenn.nn.SeqBoat",
        label="SeqBoat-full, S4D, rotary",
        make=lambda: model(window=None, ssm="s4d", ndim=4, rel_pos_bias="rotary"),
        inputs=sequences(3),
        causal_dim=1,
        compile=False,
        compile_reason=DATA_DEPENDENT,
        export=False,
        export_reason=DATA_DEPENDENT,
        forms=(STEPS, MASKED),
        bad_input=(bad("d_input", lambda: SeqBoat(0, 6, 2)),),
    ),
    FunctionCase(
        part="provenn.nn.compress",
        call=lambda: compress(torch.ones(2, 3, 4), torch.tensor([[True, False, True]] * 2)),
        bad_input=(
            bad("active", lambda: compress(torch.ones(2, 3, 4), torch.ones(2, 4, dtype=torch.bool))),
            bad("x", lambda: compress(torch.ones(2, 0, 4), torch.ones(2, 0, dtype=torch.bool))),
        ),
    ),
    FunctionCase(
        part="provenn.nn.extract",
        call=lambda: extract(torch.ones(2, 3, 4), torch.tensor([[0, 1, 3, 2]] * 2)),
        bad_input=(bad("index", lambda: extract(torch.ones(2, 3, 4), torch.tensor([[0, 1]]))),),
    ),
]


# Packing.


MASKS = {
    "unequal": [[1, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 1, 0, 1, 0]],
    "none": [[0] * 5] * 3,
    "all": [[1] * 5] * 3,
    "all and none": [[1] * 5, [0] * 5, [0, 0, 0, 0, 1]],
}


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
def test_extract_inverts_compress_on_the_selected(rows):
    active = torch.tensor(rows).bool()
    x = normal(3, 5, 2)
    packed = compress(x, active)
    assert torch.equal(extract(packed.values, packed.index), x * active[..., None])
    assert packed.values.shape[1] == max(1, max(sum(row) for row in rows))
    for values, positions, mask, row, whole in zip(packed.values, packed.positions, packed.mask, rows, x, strict=True):
        chosen = [place for place, one in enumerate(row) if one]
        assert positions[mask].tolist() == chosen
        assert mask.tolist() == [slot < len(chosen) for slot in range(len(mask))]
        assert torch.equal(values[: len(chosen)], whole[chosen])
        assert not values[len(chosen) :].any()


def test_what_is_not_selected_reaches_neither_values_nor_gradients():
    x = normal(1, 4, 2)
    x[0, 0] = math.nan
    x.requires_grad_()
    packed = compress(x, torch.tensor([[False, True, False, True]]))
    extract(packed.values, packed.index).sum().backward()
    assert x.grad.tolist() == [[[0, 0], [1, 1], [0, 0], [1, 1]]]


# The router.


def test_decision_and_confidence():
    part = double(sma, init_temp_scale=0.5)
    assert part.log_temperature.item() == pytest.approx(math.log(0.5 * math.sqrt(6)))
    u = normal(50, 2)
    p = torch.softmax(u / (0.5 * math.sqrt(6)), -1)
    active, confidence = part.route(u)
    assert torch.equal(active[:, 0], p.argmax(-1) == 1)
    assert torch.allclose(confidence[:, 0], p.amax(-1))
    assert part.route(torch.tensor([-math.inf, math.inf]))[1].item() == 1
    assert not part.route(torch.zeros(2))[0].any()


def test_several_modules_may_share_an_element():
    inner = [nn.Linear(6, 4), nn.Linear(6, 4)]
    part = SparseModularActivation(inner, 6, 2, projection=False).double()
    x, u = normal(2, 7, 6), normal(2, 7, 4, seed=1)
    expected = torch.zeros(2, 7, 4, dtype=torch.float64)
    for number, one in enumerate(inner):
        p = torch.softmax(u[..., 2 * number : 2 * number + 2] / math.sqrt(6), -1)
        on = p[..., 1] > p[..., 0]
        expected += torch.where(on[..., None], p[..., 1:] * one(x), 0)
    assert torch.allclose(part(x, u), expected)
    assert part.last_activation.shape == (2,)


class Counting(nn.Module):
    """Remembers what it was called with."""

    def forward(self, x):
        self.seen = x.shape
        return x


def test_modules_run_on_the_selected_alone():
    inner = Counting()
    part = SparseModularActivation(inner, 6, projection=False)
    u = torch.full((2, 10, 2), 0.0)
    u[0, [2, 5, 7], 1] = 1
    u[1, 9, 1] = 1
    part(torch.ones(2, 10, 6), u)
    assert inner.seen == (2, 3, 6)
    assert part.last_activation.item() == pytest.approx(4 / 20)
    padding = torch.zeros(2, 10, dtype=torch.bool)
    padding[:, 6:] = True
    part(torch.ones(2, 10, 6), u, padding)
    assert inner.seen == (2, 2, 6)
    assert part.last_activation.item() == pytest.approx(2 / 12)


@pytest.mark.parametrize("packing", [True, False])
def test_the_router_learns_by_the_confidence_alone(packing):
    """∂out/∂c is the module's output where it is selected and 0 elsewhere; u and t by finite differences."""
    inner = nn.Linear(6, 6).double()
    part = SparseModularActivation(inner, 6, projection=False, packing=packing).double()
    x, u = normal(2, 5, 6), normal(2, 5, 2, seed=1).requires_grad_()
    weight = normal(2, 5, 6, seed=2)
    (part(x, u) * weight).sum().backward()
    active, confidence = part.route(u.detach())
    by_confidence = (inner(x) * weight).sum(-1) * active[..., 0]
    slope = confidence * (1 - confidence) / math.sqrt(6)
    expected = (by_confidence * slope[..., 0])[..., None] * torch.tensor([-1.0, 1.0])
    assert torch.allclose(u.grad, expected)
    assert u.grad[~active[..., 0]].abs().max() == 0
    assert torch.autograd.gradcheck(lambda logits: part(x, logits), (u,))
    gradient, step, found = part.log_temperature.grad.clone(), 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            part.log_temperature += sign * step
            found.append((part(x, u) * weight).sum())
            part.log_temperature -= sign * step
    assert gradient.item() == pytest.approx(((found[0] - found[1]) / (2 * step)).item(), rel=1e-6)


# The moving average.


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_average_by_its_definition(bidirectional):
    part = double(lambda: MultiHeadEMA(2, 3, bidirectional))
    x = normal(1, 6, 2)
    y = part(x)
    p, q = part.delta.sigmoid(), 1 - part.delta.sigmoid() * part.alpha.sigmoid()

    def tap(channel, lag):
        terms = p * part.beta * q**lag * part.gamma / math.sqrt(3)
        return terms[channel].sum()

    for channel in range(2):
        for t in range(6):
            value = part.omega[channel] * x[0, t, channel]
            value = value + sum(tap(channel, t - s) * x[0, s, channel] for s in range(t + 1))
            if bidirectional:
                value = value + sum(tap(2 + channel, s - t) * x[0, s, channel] for s in range(t, 6))
            assert y[0, t, channel].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12)


def test_a_compiled_average_takes_one_length_after_another():
    average = double(MultiHeadEMA, dim=3)
    torch.compiler.reset()
    with plain_signatures(), torch.no_grad():
        compiled = torch.compile(average, backend="eager", fullgraph=True)
        for batch, length in ((2, 9), (3, 5)):  # the second makes sizes symbols
            x = normal(batch, length, 3)
            torch.testing.assert_close(compiled(x), average(x), rtol=0, atol=1e-12)


def test_starts_of_the_average():
    with seeded(0):
        part = MultiHeadEMA(200, 4)
    assert part.beta.mean(0).sign().tolist() == [1, -1, 1, -1]
    assert (part.beta.abs() - 1).abs().max() <= 0.04 + 1e-6
    assert part.alpha.abs().max() <= 0.4
    assert 0.15 < part.delta.std() < 0.2  # 0.88 of 0.2, for a normal distribution cut off at two deviations


def test_s4d_by_its_recurrence_and_its_modes():
    part = double(lambda: S4D(4, 6))
    x = normal(2, 9, 4)
    step = part.log_step.exp()[:, None]
    a = torch.complex(-part.log_decay.exp(), part.frequency)
    state, outputs = torch.zeros(2, 4, 3, dtype=torch.complex128), []
    for one in x.unbind(1):  # the bilinear rule, solved for the new state at the mean of both ends' slopes
        state = (state * (1 + step * a / 2) + step * one[..., None]) / (1 - step * a / 2)
        outputs.append(2 * (torch.view_as_complex(part.output) * state).sum(-1).real + part.omega * one)
    assert torch.allclose(part(x), torch.stack(outputs, 1), atol=1e-12)
    assert torch.allclose(part.frequency[2], math.pi * torch.arange(3, dtype=torch.float64))
    assert torch.allclose(part.frequency[0], 6 / math.pi * torch.tensor([5, 1, 0.2], dtype=torch.float64))


@pytest.mark.parametrize("kind", [MultiHeadEMA, S4D])
def test_padding_enters_no_other_output(kind):
    part = double(lambda: kind(4, 4, bidirectional=True))
    x, mask = normal(1, 8, 4), torch.zeros(1, 8, dtype=torch.bool)
    mask[0, 5:] = True
    assert torch.allclose(part(x, mask)[:, :5], part(x[:, :5]))


# Attention, element by element.


def by_hand(part, x, positions, bidirectional):
    """The unit on one sequence, written out query by query."""
    z, gate, v = F.silu(x @ part.in_proj.weight.T + part.in_proj.bias).split([4, 8, 8], -1)
    q, k = z * part.gamma[0] + part.beta[0], z * part.gamma[1] + part.beta[1]
    if part.rel_pos_bias == "rotary":
        turned = []
        for rows in (q, k):
            pairs = torch.view_as_complex(rows.unflatten(-1, (2, 2)).contiguous())
            angle = torch.tensor([[p * 10000.0 ** (-m / 2) for m in range(2)] for p in positions], dtype=torch.float64)
            turned.append(torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2))
        q, k = turned
    rows = []
    for i in range(len(x)):
        reach = part.window if part.window is not None else len(x)
        seen = [j for j in range(len(x)) if i - reach <= j <= (i + reach if bidirectional else i)]
        scores = []
        for j in seen:
            if part.attn == "softmax":
                score = q[i] @ k[j] / 2
            else:
                count = len(x) if bidirectional else i + 1
                count = count if part.window is None else part.window * (1 + bidirectional)
                score = q[i] @ k[j] / count
            if part.rel_pos_bias == "simple":
                score = score + part.position_bias[positions[j] - positions[i] + part.max_positions - 1]
            elif part.rel_pos_bias == "local":
                score = score + part.position_bias[j - i + part.window]
            scores.append(score)
        scores = torch.stack(scores)
        weights = torch.softmax(scores, 0) if part.attn == "softmax" else scores.clamp(min=0) ** 2
        rows.append(weights @ v[seen])
    return (torch.stack(rows) * gate) @ part.out_proj.weight.T + part.out_proj.bias


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("attn", ["softmax", "relu2"])
@pytest.mark.parametrize(
    ("kind", "window"), [("simple", 3), ("local", 2), ("rotary", 4), ("simple", None), ("simple", 30), ("local", 9)]
)
def test_attention_by_hand_on_packed_elements(kind, window, attn, bidirectional):
    part = double(unit, attn=attn, bidirectional=bidirectional, rel_pos_bias=kind, window=window, max_positions=40)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.mul_(3)  # so that scores matter
    counts, x = (10, 7, 0), normal(3, 10, 6)
    mask = torch.arange(10) < torch.tensor(counts)[:, None]
    positions = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(s))[:10] for s in range(3)])
    positions = positions.sort(1).values * mask
    found = part(x * mask[..., None], positions, mask)
    assert found.isfinite().all()
    for row, count in enumerate(counts[:2]):
        expected = by_hand(part, x[row, :count], positions[row, :count].tolist(), bidirectional)
        assert torch.allclose(found[row, :count], expected, atol=1e-11)


def test_step_of_a_unit_keeps_a_window_of_its_own_for_each_sequence():
    part = double(unit, window=2)
    x, active = normal(2, 9, 6), normal(2, 9, seed=3) > 0
    state, outputs = None, []
    for time in range(9):
        h, state = part.step(x[:, time], torch.full((2,), time), active[:, time], state)
        outputs.append(h)
    assert state.keys.shape == (2, 2, 4)
    for row in range(2):
        chosen = active[row].nonzero()[:, 0].tolist()
        expected = by_hand(part, x[row, chosen], chosen, False)
        assert torch.allclose(torch.stack(outputs, 1)[row, chosen], expected, atol=1e-11)


# The layer.


def routed(part, margin):
    """Make the router's logits constant."""
    with torch.no_grad():
        part.proj.weight[:2] = 0
        part.proj.bias[:2] = torch.tensor([-margin / 2, margin / 2])
    return part


def dense_parts(part, x):
    m = F.silu(part.ssm(part.norm(x)))
    return m, m @ part.proj.weight[2:].T + part.proj.bias[2:]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_all_on_is_dense_attention(bidirectional):
    part = routed(double(layer, window=20, bidirectional=bidirectional), 1e4)
    x = normal(2, TIME, 6)
    m, linear = dense_parts(part, x)
    h = torch.stack([by_hand(part.gau, row, range(TIME), bidirectional) for row in m])
    assert torch.allclose(part(x), F.silu(linear + h + x), atol=1e-6)
    assert part.last_activation == 1


def test_all_off_leaves_the_linear_branch_and_no_gradient_in_attention():
    part = routed(double(layer), -1e4)
    x = normal(2, TIME, 6)
    y = part(x)
    assert torch.allclose(y, F.silu(dense_parts(part, x)[1] + x), atol=1e-12)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in part.gau.parameters())
    assert part.last_activation == 0


def test_nothing_revives_a_router_that_selects_nothing():
    """The paper's gradient runs through the confidence of what is selected: without any the router gets none."""
    part = routed(double(layer), -1e-6)
    part(normal(2, TIME, 6)).square().sum().backward()
    assert not part.proj.weight.grad[:2].any()
    assert not part.proj.bias.grad[:2].any()
    assert not part.sma.log_temperature.grad.any()
    assert part.proj.weight.grad[2:].any()


def test_routers_start_without_a_preference():
    """Half of the elements is active on average; a single start may be far from it, and where all elements are alike
    it is all or none."""
    x, alike = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(0)), torch.ones(1, 64, 32).cumsum(2)
    rates, ends = [], []
    for seed in range(60):
        with seeded(seed):
            part = SeqBoatLayer(32, 8, 8, window=4, rel_pos_bias="local")
        part(x)
        rates.append(part.last_activation.item())
        ends.append(part.sma.route(part._route(part.ssm(part.norm(alike)))[1])[0][0, 32:].float().mean().item())
    # A rate deviates by 0.15, their mean by 0.02; an end is a coin, their mean deviates by 0.065.
    assert sum(rates) / 60 == pytest.approx(0.5, abs=0.08)
    assert set(ends) == {0.0, 1.0}
    assert sum(ends) / 60 == pytest.approx(0.5, abs=0.2)


def test_the_confidence_scales_attention():
    part = routed(double(layer, window=20), 0.7)
    x = normal(1, 5, 6)
    m, linear = dense_parts(part, x)
    confidence = 1 / (1 + math.exp(-0.7 / math.sqrt(6)))
    expected = F.silu(linear + confidence * by_hand(part.gau, m[0], range(5), False) + x)
    assert torch.allclose(part(x), expected, atol=1e-11)


@pytest.mark.parametrize("kind", ["simple", "local", "rotary"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_layer_on_a_mixed_selection(kind, bidirectional):
    """Positions stay original, the window counts selected elements, each row has its own selection."""
    part = double(layer, window=2, bidirectional=bidirectional, rel_pos_bias=kind, max_positions=40)
    x = normal(3, 30, 6)
    y = part(x)
    m, linear = dense_parts(part, x)
    u = m @ part.proj.weight[:2].T + part.proj.bias[:2]
    p = torch.softmax(u / math.sqrt(6), -1)
    sizes = []
    for row in range(3):
        chosen = (p[row, :, 1] > p[row, :, 0]).nonzero()[:, 0].tolist()
        sizes.append(len(chosen))
        added = linear[row].clone()
        added[chosen] += p[row, chosen, 1:] * by_hand(part.gau, m[row, chosen], chosen, bidirectional)
        assert torch.allclose(y[row], F.silu(added + x[row]), atol=1e-10)
    assert 3 < min(sizes) < max(sizes) < 30


def test_a_layer_does_less_work_in_both_passes_the_fewer_it_selects():
    part = double(layer, window=8, rel_pos_bias="local")
    m = normal(1, 128, 6).requires_grad_()
    work = {}
    for every in (1, 2, 4, 8):
        active = torch.arange(128) % every == 0
        logits = torch.stack((~active, active), -1).double()[None]
        with FlopCounterMode(display=False) as counter:
            part.sma(m, logits).square().sum().backward()
        work[every] = counter.get_total_flops()
    assert work[1] > 1.7 * work[2] > 1.7**2 * work[4] > 1.7**3 * work[8]


def test_a_row_of_padding_stays_finite():
    part = double(layer, bidirectional=True)
    x = normal(2, TIME, 6).requires_grad_()
    mask = torch.zeros(2, TIME, dtype=torch.bool)
    mask[1] = True
    y = part(x, mask)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in part.parameters())
    assert model(pool="mean")(torch.ones(1, 4, 3), torch.ones(1, 4, dtype=torch.bool)).isfinite().all()


def test_padding_changes_nothing_before_it():
    part = double(layer, bidirectional=True, rel_pos_bias="local")
    x, mask = normal(2, TIME, 6), torch.arange(TIME).expand(2, -1) >= 7
    assert torch.allclose(part(x, mask)[:, :7], part(x[:, :7]), atol=1e-12)
    pooled = double(model, pool="mean", bidirectional=True)
    tokens = normal(2, TIME, 3)
    assert torch.allclose(pooled(tokens, mask), pooled(tokens[:, :7]), atol=1e-12)


def test_a_window_of_packed_elements_reaches_far():
    """One slot back may be any time ago, and all that lies between counts for nothing."""
    part = double(unit, window=1)
    active = torch.zeros(1, 16, dtype=torch.bool)
    active[0, [0, 15]] = True
    x = normal(1, 16, 6)
    packed = compress(x, active)
    changed = compress(x.index_fill(1, torch.tensor([0]), 3.0), active)
    rest = packed._asdict()
    assert rest["positions"].tolist() == [[0, 15]]
    one, other = (extract(part(p.values, p.positions, p.mask), p.index)[0, 15] for p in (packed, changed))
    assert (one - other).abs().max() > 1e-4


def test_dropout_falls_on_both_branches_only_in_causal_layers():
    x = torch.zeros(1, 400, 6)
    for bidirectional in (False, True):
        with seeded(0):
            part = routed(SeqBoatLayer(6, 4, 8, ndim=3, bidirectional=bidirectional, dropout=0.5), -1e4).train()
            part.proj.bias.data[2:] = 5.0
            dropped = part(x).eq(0).double().mean()  # SiLU(0) where the linear branch was dropped
        assert dropped.item() == pytest.approx(0 if bidirectional else 0.5, abs=0.05)


@pytest.mark.parametrize("name", ["layernorm", "batchnorm", "scalenorm"])
@pytest.mark.parametrize("prenorm", [True, False])
def test_norms(name, prenorm):
    part = double(layer, norm=name, prenorm=prenorm).train()
    x = 5 + 3 * normal(4, TIME, 6)
    normalised = part.norm(x) if prenorm else part(x)
    if name == "batchnorm":
        assert torch.allclose(normalised.mean((0, 1)), torch.zeros(6).double(), atol=1e-9)
    elif name == "layernorm":
        assert torch.allclose(normalised.mean(-1), torch.zeros(4, TIME).double(), atol=1e-9)
    else:
        assert torch.allclose(normalised.square().mean(-1), torch.ones(4, TIME).double(), atol=1e-3)


def test_starts_of_a_layer():
    with seeded(0):
        part = SeqBoatLayer(64)
    assert part.gau.hdim == 128
    assert part.gau.window == 128
    for weight in (part.proj.weight, part.gau.in_proj.weight, part.gau.out_proj.weight, part.gau.gamma):
        assert weight.abs().max() <= 0.04
        assert 0.015 < weight.std() < 0.02
    assert not part.proj.bias.any()
    assert part(normal(2, 99, 64).float()).shape == (2, 99, 64)
    assert 0 < part.last_activation < 1


def test_step_needs_causality_and_no_pool():
    for call in (
        lambda: layer(bidirectional=True).step(torch.zeros(1, 6)),
        lambda: MultiHeadEMA(4, bidirectional=True).step(torch.zeros(1, 4)),
        lambda: model(pool="mean").step(torch.zeros(1, 3)),
        lambda: unit(bidirectional=True).step(torch.zeros(1, 6), torch.zeros(1).long(), torch.ones(1).bool()),
    ):
        with pytest.raises(RuntimeError, match="step needs"):
            call()
    part, state = layer(max_positions=2), None
    for _ in range(2):
        _, state = part.step(torch.zeros(1, 6), state)
    with pytest.raises(ValueError, match="max_positions"):
        part.step(torch.zeros(1, 6), state)


def test_kernels_keep_their_precision_under_autocast():
    part = MultiHeadEMA(6, 3)
    plain = part.kernel(50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(part.kernel(50), plain)
        assert layer()(torch.randn(2, TIME, 6)).isfinite().all()


def test_the_average_of_the_peer():
    """mega-pytorch writes the decay as (1 − a) d, shared by the channels; with p = 1 ours can be any number."""
    peer = pytest.importorskip("mega_pytorch.mega_pytorch").MultiHeadedEMA(dim=6, heads=3).double()
    part = MultiHeadEMA(6, 3).double()
    with torch.no_grad():
        rise, damping = peer.alphas.sigmoid(), peer.dampen_factors.sigmoid()
        part.delta.fill_(30.0)
        part.alpha.copy_(torch.logit(1 - (1 - rise) * damping).expand(6, 3))
        part.beta.copy_((rise[:, None] * peer.expansion).T)
        part.gamma.copy_(math.sqrt(3) * peer.reduction.T)
        part.omega.zero_()
    x = normal(2, 20, 6)
    assert torch.allclose(part(x), peer(x), atol=1e-10)
