"""The survey's networks and trainings against torch's layers, formulas written out, finite differences and RTRL."""

import math
import re
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from provenn.contracts import (
    BadInput,
    FunctionCase,
    ModuleCase,
    ProbeCase,
    SamplerCase,
    Symmetry,
    TrainerCase,
)
from provenn.contracts.cases_results import Expectation
from provenn.core.experiment.seeding import seeded
from provenn.nn import (
    GRU,
    TBPTT,
    BiRNN,
    ElmanRNN,
    GradientFlow,
    JordanRNN,
    NTMCell,
    PeepholeLSTM,
    SequenceModel,
    SequenceTask,
    TBPTTResult,
    adding,
    bleu,
    delayed_xor,
    embedded_reber,
    gradient_flow,
    gradient_norm_penalty,
    rtrl_gradient,
    temporal_order,
)
from provenn.nn import copy as copy_task
from provenn.nn._rnn_review_ntm import address, write


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(kind, *arguments, seed=0, **options):
    with seeded(seed):
        return kind(*arguments, **options).double()


def everywhere(x):
    """A mask that hides nothing, and makes a network loop in Python instead of calling torch's kernel."""
    return torch.ones(x.shape[:2], dtype=torch.bool)


# The suites.


def sequences(generator, dtype, batch):
    return (torch.randn(batch, 5, 4, generator=generator, dtype=torch.float64).to(dtype),)


def masked(generator, dtype, batch):
    lengths = torch.tensor([5, 2, 4])[:batch]
    return (*sequences(generator, dtype, batch), None, torch.arange(5) < lengths[:, None])


def forced(generator, dtype, batch):
    targets = torch.randn(batch, 5, 2, generator=generator, dtype=torch.float64).to(dtype)
    return (*sequences(generator, dtype, batch), None, None, targets)


def written(generator, dtype, batch):
    return (*sequences(generator, dtype, batch), None, None, None, 7)


def captioned(generator, dtype, batch):
    return sequences(generator, dtype, batch)[0][:, 0], None, None, None, 7


def bad(argument, call, error=ValueError):
    return BadInput(argument, call, error)


X = torch.zeros(2, 5, 4)


def bad_calls(make):
    """What every recurrent module refuses."""
    return (
        bad("x", lambda: make()(torch.zeros(2, 0, 4))),
        bad("x", lambda: make()(torch.zeros(2, 5, 3))),
        bad("x", lambda: make()(torch.zeros(5, 4))),
        bad("state", lambda: make()(X, make().initial_state(3, X))),
        bad("state", lambda: make()(X, make().initial_state(2, X)[:0])),
        bad("mask", lambda: make()(X, None, torch.ones(2, 4, dtype=torch.bool))),
        bad("mask", lambda: make()(X, None, torch.ones(2, 5)), TypeError),
    )


def elman(**options):
    return ElmanRNN(4, 6, 2, output="softmax", **options)


def jordan(**options):
    return JordanRNN(4, 6, 2, **options)


def lstm(**options):
    return PeepholeLSTM(4, 6, **options)


def gru():
    return GRU(4, 6)


def ntm(**options):
    return NTMCell(4, 2, 6, 7, 8, **options)


def tied():
    cell = lstm()
    return BiRNN(cell, cell)


def bidirectional():
    return BiRNN(gru(), elman(), 2, output="softmax")


REVERSAL = Symmetry(
    "reversed time swaps the halves",
    before=lambda inputs: (inputs[0].flip(1),),
    after=lambda output: (
        torch.cat((output[0][..., 6:], output[0][..., :6]), -1).flip(1),
        (*output[1][2:], *output[1][:2]),
    ),
)


def translator(**options):
    return SequenceModel(gru(), "encoder_decoder", 4, decoder=gru(), **options)


def tagger():
    return SequenceModel(ElmanRNN(4, 6, activation="tanh"), "many_to_many", 2)


def training_data(generator):
    x = torch.randn(12, 5, 4, generator=generator)
    return x, torch.randint(2, (12, 5), generator=generator), torch.rand(12, 5, generator=generator) < 0.7


def trainer(model, seed, **options):
    return TBPTT(model, 2, 3, seed=seed, epochs=4, batch_size=5, lr=0.3, **options)


def flow_by_jacobians(model, data):
    """Norms of products of one-step Jacobians, from the last output back."""
    model = model.double()
    U, V = model.cell.weight_hh, model.out_proj.weight
    states = [torch.zeros(len(data), 6, dtype=torch.float64)]
    for x in data.double().unbind(1):
        states.append(torch.tanh(x @ model.cell.weight_ih.T + states[-1] @ U.T + model.cell.bias))
    error = V.sum(0).expand(len(data), -1)
    norms = [error.norm(dim=1).mean().item()]
    for h in states[:1:-1]:
        error = (error * (1 - h**2)) @ U
        norms.append(error.norm(dim=1).mean().item())
    return {"norms": tuple(norms[::-1]), "spectral_radius": {"U": torch.linalg.eigvals(U).abs().max().item()}}


def packed(task):
    return torch.cat([task.inputs.flatten(1), task.targets.flatten(1).to(task.inputs), task.mask.to(task.inputs)], 1)


def sampler_case(task, steps, width, *known, **options):
    return SamplerCase(
        part=f"provenn.nn.{task.__name__}",
        make=lambda: task,
        shape=(width,),
        sample=lambda sampler, n, generator: packed(sampler(n, steps, generator, **options)),
        expectations=tuple(Expectation(name, of, lambda value=value: torch.tensor(value)) for name, of, value in known),
        bad_input=(
            bad("n", lambda: task(-1, steps)),
            bad("T", lambda: task(2, 0)),
            bad("T", lambda: task(2, 4.0), TypeError),
        ),
    )


def elman_refusals():
    return (
        bad("input_size", lambda: ElmanRNN(0, 6)),
        bad("hidden_size", lambda: ElmanRNN(4, 2.0), TypeError),
        bad("output_size", lambda: ElmanRNN(4, 6, 0)),
        bad("output_size", lambda: ElmanRNN(4, 6, output="softmax")),
        bad("activation", lambda: elman(activation="gelu")),
        bad("output", lambda: ElmanRNN(4, 6, 2, output="logits")),
        bad("identity_scale", lambda: elman(identity_scale=math.nan)),
        bad("x", lambda: elman().step(X)),
    )


CASES = [
    ModuleCase(
        part="provenn.nn.ElmanRNN",
        make=elman,
        inputs=masked,
        causal_dim=1,
        bad_input=elman_refusals() + bad_calls(elman),
    ),
    ModuleCase(
        part="provenn.nn.ElmanRNN",
        label="torch's kernel",
        make=lambda: ElmanRNN(4, 6, activation="tanh"),
        inputs=sequences,
        causal_dim=1,
        bad_input=bad_calls(elman)[:1],
    ),
    ModuleCase(
        part="provenn.nn.JordanRNN",
        make=jordan,
        inputs=masked,
        causal_dim=1,
        bad_input=(
            bad("decay", lambda: jordan(decay=1.5)),
            bad("activation", lambda: jordan(activation="gelu")),
            bad("output", lambda: jordan(output="logits")),
            bad("output_size", lambda: JordanRNN(4, 6, 2.0), TypeError),
            bad("targets", lambda: jordan()(X, targets=torch.zeros(2, 5, 3))),
            *bad_calls(jordan),
        ),
    ),
    ModuleCase(
        part="provenn.nn.JordanRNN",
        label="teacher forcing",
        make=jordan,
        inputs=forced,
        causal_dim=1,
        bad_input=bad_calls(jordan)[:1],
    ),
    ModuleCase(
        part="provenn.nn.PeepholeLSTM",
        make=lstm,
        inputs=masked,
        causal_dim=1,
        bad_input=(
            bad("forget_bias", lambda: lstm(forget_bias=math.inf)),
            bad("forget_bias", lambda: lstm(forget_bias="1"), TypeError),
            bad("hidden_size", lambda: PeepholeLSTM(4, 0)),
            *bad_calls(lstm),
        ),
    ),
    ModuleCase(
        part="provenn.nn.PeepholeLSTM",
        label="torch's kernel",
        make=lambda: lstm(peepholes=False),
        inputs=sequences,
        causal_dim=1,
        bad_input=bad_calls(lstm)[:1],
    ),
    ModuleCase(
        part="provenn.nn.PeepholeLSTM",
        label="1997",
        make=lambda: lstm(peepholes=True, forget_gate=False, truncated_gradient=True),
        inputs=sequences,
        causal_dim=1,
        bad_input=bad_calls(lstm)[:1],
        excluded={"gradcheck": "the gradient is truncated on purpose"},
    ),
    ModuleCase(
        part="provenn.nn.GRU",
        make=gru,
        inputs=sequences,
        causal_dim=1,
        bad_input=(bad("hidden_size", lambda: GRU(4, 0)), *bad_calls(gru)),
    ),
    ModuleCase(
        part="provenn.nn.BiRNN",
        make=tied,
        inputs=sequences,
        symmetries=(REVERSAL,),
        bad_input=(
            bad("x", lambda: tied().step(X[:, 0])),
            bad("forward_cell", lambda: BiRNN(nn.LSTM(4, 6), lstm()), TypeError),
            bad("backward_cell", lambda: BiRNN(lstm(), tied())),
            bad("backward_cell", lambda: BiRNN(lstm(), GRU(3, 6))),
            bad("output", lambda: BiRNN(lstm(), lstm(), 2, output="logits")),
            bad("output_size", lambda: BiRNN(lstm(), lstm(), output="softmax")),
            *bad_calls(tied),
        ),
    ),
    ModuleCase(
        part="provenn.nn.BiRNN",
        label="softmax, mask",
        make=bidirectional,
        inputs=masked,
        bad_input=bad_calls(bidirectional),
    ),
    ModuleCase(
        part="provenn.nn.NTMCell",
        make=ntm,
        inputs=sequences,
        causal_dim=1,
        bad_input=(
            bad("slots", lambda: NTMCell(4, 2, 6, 2, 8)),
            bad("width", lambda: NTMCell(4, 2, 6, 7, 0)),
            bad("read_heads", lambda: ntm(read_heads=0)),
            bad("write_heads", lambda: ntm(write_heads=0)),
            bad("controller", lambda: ntm(controller="gru")),
            bad("output_size", lambda: NTMCell(4, 2.0), TypeError),
            *bad_calls(ntm),
        ),
    ),
    ModuleCase(
        part="provenn.nn.NTMCell",
        label="LSTM, two heads",
        make=lambda: ntm(controller="lstm", read_heads=2, write_heads=2),
        inputs=masked,
        causal_dim=1,
        bad_input=bad_calls(ntm)[:1],
    ),
    ModuleCase(
        part="provenn.nn.SequenceModel",
        make=tagger,
        inputs=sequences,
        causal_dim=1,
        bad_input=(
            bad("mode", lambda: SequenceModel(gru(), "many", 2)),
            bad("output_size", lambda: SequenceModel(gru(), "many_to_one", 0)),
            bad("dropout", lambda: SequenceModel(gru(), "many_to_one", 2, dropout=1.0)),
            bad("output", lambda: SequenceModel(gru(), "many_to_one", 2, output="tanh")),
            bad("cell", lambda: SequenceModel(nn.GRU(4, 6), "many_to_one", 2), TypeError),
            bad("cell", lambda: SequenceModel(tied(), "one_to_many", 2)),
            bad("decoder", lambda: SequenceModel(gru(), "encoder_decoder", 2)),
            bad("decoder", lambda: SequenceModel(gru(), "many_to_one", 2, decoder=gru())),
            bad("decoder", lambda: SequenceModel(gru(), "encoder_decoder", 2, decoder=lstm())),
            bad("decoder", lambda: SequenceModel(gru(), "encoder_decoder", 2, decoder=nn.GRU(4, 6)), TypeError),
            bad("reverse_source", lambda: SequenceModel(gru(), "many_to_one", 2, reverse_source=True)),
            bad("mode", lambda: translator().step(X[:, 0])),
            bad("targets", lambda: tagger()(X, targets=torch.zeros(2, 5, 2))),
            bad("length", lambda: translator()(X)),
            bad("length", lambda: translator()(X, length=0)),
            bad("targets", lambda: translator()(X, targets=torch.zeros(2, 5, 3))),
            bad("mask", lambda: SequenceModel(gru(), "one_to_many", 2)(X[:, 0], None, everywhere(X), None, 3)),
            bad("x", lambda: SequenceModel(gru(), "one_to_many", 2)(X, length=3)),
            bad("x", lambda: translator()(torch.zeros(2, 0, 4), length=3)),
        ),
    ),
    ModuleCase(
        part="provenn.nn.SequenceModel",
        label="encoder and decoder",
        make=lambda: translator(reverse_source=True),
        inputs=written,
        bad_input=bad_calls(gru)[:1],
    ),
    ModuleCase(
        part="provenn.nn.SequenceModel",
        label="one to many, dropout",
        make=lambda: SequenceModel(gru(), "one_to_many", 2, output="softmax", dropout=0.5),
        inputs=captioned,
        training_equals_eval=False,
        training_equals_eval_reason="it drops units in training",
        bad_input=bad_calls(gru)[:1],
    ),
    TrainerCase(
        part="provenn.nn.TBPTT",
        make=lambda model, seed: trainer(model, seed, penalty=0.01),
        model=lambda: SequenceModel(ElmanRNN(4, 6), "many_to_many", 2, dropout=0.2),
        data=training_data,
        rounds=4,
        bad_input=(
            bad("k1", lambda: TBPTT(tagger(), 0, 3)),
            bad("k1", lambda: TBPTT(tagger(), 4, 3)),
            bad("k2", lambda: TBPTT(tagger(), 1, 2.0), TypeError),
            bad("clip", lambda: TBPTT(tagger(), 1, 2, 0.0)),
            bad("loss", lambda: TBPTT(tagger(), 1, 2, loss="hinge")),
            bad("clip_by", lambda: TBPTT(tagger(), 1, 2, clip_by="l1")),
            bad("penalty", lambda: TBPTT(tagger(), 1, 2, penalty=-1.0)),
            bad("lr", lambda: TBPTT(tagger(), 1, 2, lr=0.0)),
            bad("model", lambda: TBPTT(nn.GRU(4, 6), 1, 2), TypeError),
            bad("model", lambda: TBPTT(tied(), 1, 2)),
            bad("model", lambda: TBPTT(SequenceModel(gru(), "many_to_one", 2), 1, 2)),
            bad("x", lambda: trainer(tagger(), 0).fit(X[:, :0], torch.zeros(2, 0, dtype=torch.int64))),
            bad("y", lambda: trainer(tagger(), 0).fit(X, torch.zeros(2, 4, dtype=torch.int64))),
            bad(
                "target_mask",
                lambda: trainer(tagger(), 0).fit(X, torch.zeros(2, 5, dtype=torch.int64), everywhere(X)[:, 1:]),
            ),
        ),
    ),
    FunctionCase(
        part="provenn.nn.rtrl_gradient",
        call=lambda: rtrl_gradient(tagger(), lambda y, t: y.sum(), X),
        bad_input=(
            bad("model", lambda: rtrl_gradient(nn.GRU(4, 6), lambda y, t: y.sum(), X), TypeError),
            bad("model", lambda: rtrl_gradient(tied(), lambda y, t: y.sum(), X)),
            bad("x", lambda: rtrl_gradient(tagger(), lambda y, t: y.sum(), X[:, :0])),
            bad("state", lambda: rtrl_gradient(gru(), lambda y, t: y.sum(), X, (torch.zeros(3, 6),))),
            bad("model", lambda: rtrl_gradient(SequenceModel(gru(), "many_to_many", 2, dropout=0.5), None, X)),
        ),
    ),
    FunctionCase(
        part="provenn.nn.gradient_norm_penalty",
        call=lambda: gradient_norm_penalty(tagger(), X + 1, lambda y: y.sum()).backward(),
        bad_input=(
            bad("model", lambda: gradient_norm_penalty(nn.GRU(4, 6), X, torch.sum), TypeError),
            bad("x", lambda: gradient_norm_penalty(tagger(), X[:, :0], torch.sum)),
            bad("mask", lambda: gradient_norm_penalty(tagger(), X, torch.sum, None, everywhere(X)[:, 1:])),
        ),
    ),
    ProbeCase(
        part="provenn.nn.gradient_flow",
        run=gradient_flow,
        model=tagger,
        data=lambda generator: torch.randn(3, 8, 4, generator=generator),
        brute_force=flow_by_jacobians,
        bad_input=(
            bad("model", lambda: gradient_flow(nn.GRU(4, 6), X), TypeError),
            bad("model", lambda: gradient_flow(tied(), X)),
            bad("x", lambda: gradient_flow(tagger(), X[:, :0])),
        ),
    ),
    FunctionCase(
        part="provenn.nn.bleu",
        call=lambda: bleu([["a", "b"]], [[["a", "b"]]]),
        bad_input=(
            bad("candidates", lambda: bleu([], [])),
            bad("candidates", lambda: bleu(["a b"], [[["a"]]]), TypeError),
            bad("references", lambda: bleu([["a"]], [])),
            bad("references", lambda: bleu([["a"]], [[]])),
            bad("references", lambda: bleu([["a"]], [["a"]]), TypeError),
            bad("max_n", lambda: bleu([["a"]], [[["a"]]], 0)),
        ),
    ),
    FunctionCase(
        part="provenn.nn.GradientFlow",
        call=lambda: GradientFlow((1.0,), {"h": (1.0,)}, {"U": 1.0}, 1.0),
        bad_input_reason="it holds what gradient_flow found",
    ),
    FunctionCase(
        part="provenn.nn.TBPTTResult",
        call=lambda: TBPTTResult([], nn.Identity()),
        bad_input_reason="it holds what TBPTT made",
    ),
    FunctionCase(
        part="provenn.nn.SequenceTask",
        call=lambda: SequenceTask(X, X, everywhere(X), everywhere(X)),
        bad_input_reason="it holds what a sampler drew",
    ),
    sampler_case(
        adding,
        4,
        16,
        ("means", lambda s: s, [0.5, 0.5] * 4 + [0.0] * 3 + [1.0] + [1.0] * 4),
        ("second moments", lambda s: s**2, [1 / 3, 0.5] * 4 + [0.0] * 3 + [7 / 6] + [1.0] * 4),
    ),
    sampler_case(
        copy_task,
        1,
        18,
        ("means", lambda s: s, [0.5, 0.5, 0, 0, 0, 1, 0, 0, 0] + [0, 0, 0, 0, 0.5, 0.5] + [1.0] * 3),
        ("a bit and its copy", lambda s: s[:, :1] * s[:, 13:15], [0.5, 0.25]),
        bits=2,
    ),
    sampler_case(
        temporal_order,
        10,
        100,
        ("first", lambda s: s[:, 8:16], [0.0] * 6 + [0.5, 0.5]),
        ("classes", lambda s: torch.stack((s[:, 89], s[:, 89] ** 2), 1), [1.5, 3.5]),
        ("a distractor", lambda s: s[:, 16:24], [0, 0, 0.25, 0.25, 0.25, 0.25, 0, 0]),
    ),
    sampler_case(
        delayed_xor,
        4,
        16,
        ("bits", lambda s: s[:, [0, 2, 7]], [0.0, 0.0, 1.0]),
        ("answer", lambda s: s[:, 8:12], [0, 0, 0, 0.5]),
        ("it takes both", lambda s: torch.stack([s[:, 0] * s[:, 11], s[:, 0] * s[:, 2] * s[:, 11]], 1), [0.0, -0.5]),
    ),
    sampler_case(
        embedded_reber,
        10,
        150,
        # Inside: BTXSE and BPVVE, 1/8 each; BTSXSE, BPTVVE and BPVPSE, 1/16 each; longer ones are drawn again.
        ("lengths", lambda s: s[:, 140:], [1.0] * 9 + [3 / 7]),
        ("second symbol", lambda s: s[:, 7:14], [0, 0.5, 0, 0, 0.5, 0, 0]),
        ("second moments", lambda s: s[:, 7:14] ** 2, [0, 0.5, 0, 0, 0.5, 0, 0]),
    ),
]


# What the networks compute.

TWINS = [
    (nn.LSTM, PeepholeLSTM, {}),
    (nn.GRU, GRU, {}),
    (nn.RNN, ElmanRNN, {"nonlinearity": "tanh"}),
    (nn.RNN, ElmanRNN, {"nonlinearity": "relu"}),
]


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(("theirs", "ours", "options"), TWINS)
def test_equals_the_layer_of_torch_it_is_made_from(theirs, ours, options, kernel):
    layer = made(theirs, 4, 6, batch_first=True, **options)
    module = ours.from_torch(layer)
    x = normal(3, 9, 4)
    start = made(theirs, 4, 6, batch_first=True, **options)(normal(3, 2, 4, seed=1))[1]
    flat = start if isinstance(start, tuple) else (start,)
    expected, after = layer(x, start)
    found, state = module(x, tuple(one[0] for one in flat), None if kernel else everywhere(x))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for one, other in zip(state, after if isinstance(after, tuple) else (after,), strict=True):
        torch.testing.assert_close(one, other[0], rtol=0, atol=1e-12)
    by_theirs = torch.autograd.grad(expected.square().sum(), layer.weight_ih_l0)[0]
    by_ours = torch.autograd.grad(found.square().sum(), module.weight_ih)[0]
    order = [0, 1, 3, 2] if ours is PeepholeLSTM else range(len(by_ours) // 6)
    torch.testing.assert_close(by_ours, torch.cat([by_theirs.split(6)[i] for i in order]))


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        (PeepholeLSTM, nn.LSTM(4, 6, num_layers=2)),
        (PeepholeLSTM, nn.LSTM(4, 6, proj_size=2)),
        (GRU, nn.GRU(4, 6, bidirectional=True)),
        (ElmanRNN, nn.RNN(4, 6, bias=False)),
    ],
)
def test_other_layers_of_torch_are_refused(kind, layer):
    with pytest.raises(ValueError, match="one layer"):
        kind.from_torch(layer)
    with pytest.raises(TypeError, match="must be a torch"):
        kind.from_torch(nn.Linear(2, 2))


def scalar_lstm(module, x):
    """One cell of one sample, number by number; peepholes of i and f see the state before, that of o the new one."""
    sigma = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    w, u, b = ([row.tolist() for row in one] for one in (module.weight_ih, module.weight_hh, module.bias[:, None]))
    p = [0.0] * len(b) if module.peephole is None else [row.item() for row in module.peephole]
    h = s = 0.0
    found = []
    for value in x.tolist():
        z = [w[k][0] * value + u[k][0] * h + b[k][0] for k in range(len(b))]
        names = dict(zip("ifog" if len(b) == 4 else "iog", range(len(b)), strict=True))
        i = sigma(z[names["i"]] + p[names["i"]] * s)
        f = sigma(z[names["f"]] + p[names["f"]] * s) if "f" in names else 1.0
        s = math.tanh(z[names["g"]]) * i + s * f
        o = sigma(z[names["o"]] + p[names["o"]] * s)
        h = math.tanh(s) * o
        found.append(h)
    return found


@pytest.mark.parametrize("forget_gate", [True, False])
@pytest.mark.parametrize("peepholes", [True, False])
@pytest.mark.parametrize("truncated_gradient", [True, False])
def test_the_lstm_of_every_year_is_its_formula(forget_gate, peepholes, truncated_gradient):
    module = made(
        PeepholeLSTM, 1, 1, forget_gate=forget_gate, peepholes=peepholes, truncated_gradient=truncated_gradient
    )
    x = normal(8)
    found, _ = module(x[None, :, None])
    assert found.flatten().tolist() == pytest.approx(scalar_lstm(module, x), abs=1e-12)


def test_the_forget_bias_starts_where_it_is_told():
    for bias in (1.0, -2.0):
        module = lstm(forget_bias=bias)
        assert module.bias[6:12].tolist() == [bias] * 6
        assert (module.bias[:6].abs() < 0.5).all()


def test_open_forget_gates_and_closed_inputs_keep_the_state():
    module = made(PeepholeLSTM, 4, 6, peepholes=False)
    with torch.no_grad():
        module.bias[:6] = -1e4
        module.bias[6:12] = 1e4
    start = normal(3, 6), normal(3, 6, seed=1)
    _, (_, s) = module(normal(3, 50, 4), start)
    assert torch.equal(s, start[1])


@pytest.mark.parametrize("peepholes", [True, False])
def test_the_carousel_of_1997_carries_errors_without_change(peepholes):
    module = made(PeepholeLSTM, 4, 6, forget_gate=False, peepholes=peepholes, truncated_gradient=True)
    x, h = normal(1, 30, 4), normal(1, 6)
    jacobian = torch.autograd.functional.jacobian(lambda s: module(x, (h, s))[1][1], normal(1, 6, seed=1))
    assert torch.equal(jacobian[0, :, 0], torch.eye(6, dtype=torch.float64))
    with_gates = made(PeepholeLSTM, 4, 6, forget_gate=False, peepholes=peepholes)
    jacobian = torch.autograd.functional.jacobian(lambda s: with_gates(x, (h, s))[1][1], normal(1, 6, seed=1))
    assert not torch.allclose(jacobian[0, :, 0], torch.eye(6, dtype=torch.float64))


def test_truncated_errors_reach_an_input_only_through_its_own_cell():
    module = made(PeepholeLSTM, 4, 6, truncated_gradient=True, peepholes=True)
    x = normal(1, 7, 4).requires_grad_()
    outputs, (_, s) = module(x)
    found = torch.autograd.grad(outputs[0, -1].sum(), x)[0][0, 3]
    before, state = module(x[:, :3])
    after = [module(x[:, : t + 1])[1] for t in range(7)]
    z = module.weight_ih @ x[0, 3] + module.weight_hh @ before[0, -1] + module.bias
    i, f, _, g = z.split(6)
    i = torch.sigmoid(i + module.peephole[0] * state[1][0])
    f = torch.sigmoid(f + module.peephole[1] * state[1][0])
    g = torch.tanh(g)
    wi, wf, _, wg = module.weight_ih.split(6)
    ds = (i * (1 - g**2))[:, None] * wg + (g * i * (1 - i))[:, None] * wi
    ds = ds + (state[1][0] * f * (1 - f))[:, None] * wf
    forget = torch.ones(6, dtype=torch.float64)
    for t in range(4, 7):
        z = module.weight_ih @ x[0, t] + module.weight_hh @ after[t - 1][0][0] + module.bias
        forget = forget * torch.sigmoid(z[6:12] + module.peephole[1] * after[t - 1][1][0])
    z = module.weight_ih @ x[0, 6] + module.weight_hh @ after[5][0][0] + module.bias
    o = torch.sigmoid(z[12:18] + module.peephole[2] * s[0])
    torch.testing.assert_close(found, ((o * (1 - torch.tanh(s[0]) ** 2) * forget)[:, None] * ds).sum(0))


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_jordan_units_collect_decaying_outputs(decay):
    module = made(JordanRNN, 4, 6, 2, decay=decay)
    x = normal(3, 5, 4)
    y, (c, last) = module(x)
    for t in range(5):
        collected = sum((decay**k * y[:, t - 1 - k] for k in range(t)), torch.zeros(3, 2, dtype=torch.float64))
        h = torch.sigmoid(x[:, t] @ module.weight_ih.T + collected @ module.weight_ch.T + module.bias)
        torch.testing.assert_close(y[:, t], h @ module.weight_ho.T + module.bias_o)
    torch.testing.assert_close(c, collected)
    assert torch.equal(last, y[:, -1])


def test_teacher_forcing_feeds_the_targets():
    module = made(JordanRNN, 4, 6, 2)
    x, targets = normal(3, 5, 4), normal(3, 5, 2, seed=1)
    free, _ = module(x)
    torch.testing.assert_close(module(x, targets=free)[0], free)
    forced, (_, last) = module(x, targets=targets)
    assert torch.equal(last, targets[:, -1])
    assert torch.equal(forced[:, 0], free[:, 0])
    assert not torch.allclose(forced[:, 1], free[:, 1])
    # A target acts from the next step on, and the last one in this sequence never.
    changed = targets.clone()
    changed[:, 2] += 1
    again = module(x, targets=changed)[0]
    assert torch.equal(again[:, :3], forced[:, :3])
    assert not torch.allclose(again[:, 3], forced[:, 3])


def test_relu_with_a_scaled_identity():
    module = ElmanRNN(4, 6, activation="relu", identity_scale=0.5).double()
    _, (h,) = module(torch.zeros(1, 3, 4, dtype=torch.float64), (torch.ones(1, 6, dtype=torch.float64),))
    torch.testing.assert_close(h, torch.full((1, 6), 0.125, dtype=torch.float64))


def test_outputs_of_an_elman_network_are_softmax_of_its_units():
    module = made(ElmanRNN, 4, 6, 2, output="softmax")
    bare = made(ElmanRNN, 4, 6)
    bare.load_state_dict({name: one for name, one in module.state_dict().items() if "out_proj" not in name})
    x = normal(3, 5, 4)
    h = bare(x)[0]
    first = torch.sigmoid(x[:, 0] @ module.weight_ih.T + module.bias)
    torch.testing.assert_close(h[:, 0], first)
    torch.testing.assert_close(
        h[:, 1], torch.sigmoid(x[:, 1] @ module.weight_ih.T + first @ module.weight_hh.T + module.bias)
    )
    torch.testing.assert_close(module(x)[0], torch.softmax(h @ module.out_proj.weight.T + module.out_proj.bias, -1))


# One interface.

CELLS = {
    "elman": elman,
    "elman by torch": lambda: ElmanRNN(4, 6, activation="relu"),
    "jordan": jordan,
    "lstm": lstm,
    "lstm by torch": lambda: lstm(peepholes=False),
    "1997": lambda: lstm(forget_gate=False, truncated_gradient=True),
    "gru": gru,
    "ntm": ntm,
    "ntm, lstm": lambda: ntm(controller="lstm", read_heads=2, write_heads=2),
}
cells = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS.keys())


@cells
def test_steps_and_pieces_give_the_whole(cell):
    module, x = made(cell), normal(3, 6, 4)
    whole, after = module(x)
    state, outputs = None, []
    for t in range(6):
        output, state = module.step(x[:, t], state)
        outputs.append(output)
    torch.testing.assert_close(torch.stack(outputs, 1), whole)
    first, state_of_first = module(x[:, :2])
    rest, last = module(x[:, 2:], state_of_first)
    torch.testing.assert_close(torch.cat((first, rest), 1), whole)
    for one, other, third in zip(last, after, state, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(third, other)
    torch.testing.assert_close(module.features(after), whole[:, -1])


ALL = {**CELLS, "blstm": tied, "bidirectional": bidirectional}


@pytest.mark.parametrize("cell", ALL.values(), ids=ALL.keys())
def test_padding_changes_nothing(cell):
    module, x = made(cell), normal(3, 4, 4)
    outputs, state = module(x)
    holes = torch.tensor([False, True, True, False, True, True, False, False])
    padded = normal(3, 8, 4, seed=1)
    padded[:, holes] = x
    found, after = module(padded, None, holes.expand(3, 8))
    torch.testing.assert_close(found[:, holes], outputs)
    assert not found[:, ~holes].any()
    for one, other in zip(after, state, strict=True):
        torch.testing.assert_close(one, other)


def test_the_backward_half_reads_from_the_end():
    ahead, back = made(gru), made(elman, seed=1)
    x = normal(3, 5, 4)
    y, state = BiRNN(ahead, back)(x)
    torch.testing.assert_close(y[..., :6], ahead(x)[0])
    torch.testing.assert_close(y[:, 1, 6:], back(x[:, 1:].flip(1))[0][:, -1])
    torch.testing.assert_close(state[1], back(x.flip(1))[1][0])
    both = made(BiRNN, ahead, back, 2, output="softmax")
    torch.testing.assert_close(both(x)[0], torch.softmax(both.out_proj(y), -1))


@cells
def test_runs_under_autocast(cell):
    module, x = made(cell).float(), normal(3, 5, 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for mask in (None, everywhere(x)):
            outputs, state = module(x, None, mask)
            (outputs.float().sum() + sum(one.float().sum() for one in state)).backward()
    torch.testing.assert_close(outputs.float(), module(x)[0], rtol=0.1, atol=0.1)
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


# Models.


def test_many_to_one_reads_after_the_last_input():
    x, mask = normal(3, 5, 4), torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    for cell in (lstm, ntm, tied, jordan):
        one = made(SequenceModel, cell(), "many_to_one", 2)
        y, _ = one(x, None, mask)
        for sample, length in enumerate((5, 2, 4)):
            alone, _ = one(x[sample : sample + 1, :length])
            torch.testing.assert_close(y[sample : sample + 1], alone)
    many = made(SequenceModel, made(lstm), "many_to_many", 2)
    one = SequenceModel(many.cell, "many_to_one", 2).double()
    one.load_state_dict(many.state_dict())
    torch.testing.assert_close(one(x)[0], many(x)[0][:, -1])


def test_without_a_readout_the_outputs_are_the_cells():
    cell, x = made(jordan), normal(3, 5, 4)
    assert torch.equal(SequenceModel(cell, "many_to_many")(x)[0], cell(x)[0])
    captions = made(SequenceModel, cell, "one_to_many")
    assert captions(x[:, 0], length=6)[0].shape == (3, 6, 2)


@pytest.mark.parametrize("output", ["linear", "softmax"])
def test_one_to_many_feeds_its_outputs_back(output):
    model = made(SequenceModel, gru(), "one_to_many", 2, output=output)
    first = normal(3, 4)
    y, _ = model(first, length=4)
    x, state = first, None
    for t in range(4):
        h, state = model.cell.step(x, state)
        now = model.out_proj(h)
        now = now.softmax(-1) if output == "softmax" else now
        torch.testing.assert_close(y[:, t], now)
        x = model.feedback(now)
    torch.testing.assert_close(model(first, targets=y)[0], y)
    other = model(first, targets=y + 1)[0]
    torch.testing.assert_close(other[:, 0], y[:, 0])
    assert not torch.allclose(other[:, 1], y[:, 1])


def test_the_decoder_starts_from_the_encoders_state():
    model = made(translator)
    x, mask = normal(3, 5, 4), torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
    y, _ = model(x, length=4)
    _, state = model.cell(x)
    h, state = model.decoder.step(torch.zeros(3, 4, dtype=torch.float64), state)
    torch.testing.assert_close(y[:, 0], model.out_proj(h))
    h, _ = model.decoder.step(model.feedback(y[:, 0]), state)
    torch.testing.assert_close(y[:, 1], model.out_proj(h))
    torch.testing.assert_close(model(x, targets=y)[0], y)
    backward = made(translator, reverse_source=True)
    backward.load_state_dict(model.state_dict())
    torch.testing.assert_close(backward(x.flip(1), length=4)[0], y)
    short = backward(x[1:2, :2], length=3)[0]
    torch.testing.assert_close(backward(x, mask=mask, length=3)[0][1:2], short)


def test_dropout_leaves_recurrent_connections_alone():
    cell = made(ElmanRNN, 4, 6, activation="identity")
    model = SequenceModel(cell, "many_to_many", 2, dropout=0.5).double().train()
    with torch.no_grad():
        cell.weight_ih.zero_()
    x, start = normal(3, 5, 4), (normal(3, 6),)
    with seeded(0):
        y, (h,) = model(x, start)
    expected, (state,) = model.eval()(x, start)
    assert torch.equal(h, state)
    assert not torch.allclose(y, expected)
    with torch.no_grad():
        nn.init.ones_(cell.weight_ih)
    with seeded(0):
        _, (h,) = model.train()(x, start)
    assert not torch.allclose(h, model.eval()(x, start)[1][0])


# Gradients through time.


def numeric_gradient(module, loss, eps=1e-6):
    found = {}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            slopes = torch.zeros_like(parameter)
            for place in range(parameter.numel()):
                flat, sides = parameter.view(-1), []
                start = flat[place].item()
                for sign in (1, -1):
                    flat[place] = start + sign * eps
                    sides.append(loss().item())
                flat[place] = start
                slopes.view(-1)[place] = (sides[0] - sides[1]) / (2 * eps)
            found[name] = slopes
    return found


RTRL = {
    "elman": (lambda: ElmanRNN(2, 4, 2), True),
    "jordan": (lambda: JordanRNN(2, 4, 2), True),
    "lstm": (lambda: PeepholeLSTM(2, 4), True),
    "1997": (lambda: PeepholeLSTM(2, 4, forget_gate=False, truncated_gradient=True), False),
    "gru in a model": (lambda: SequenceModel(GRU(2, 4), "many_to_many", 2), True),
    "ntm": (lambda: NTMCell(2, 2, 3, 3, 2), False),
}


@pytest.mark.parametrize(("make", "numeric"), RTRL.values(), ids=RTRL.keys())
def test_back_propagation_equals_real_time_learning_and_finite_differences(make, numeric):
    model, x = made(make), normal(2, 6, 2)
    targets = normal(2, 6, model.output_size, seed=1)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)

    def loss():
        return (weights * (model(x)[0] - targets).square().sum((0, 2))).sum()

    names = [name for name, _ in model.named_parameters()]
    through_time = dict(zip(names, torch.autograd.grad(loss(), list(model.parameters())), strict=True))
    real_time = rtrl_gradient(model, lambda y, t: weights[t] * (y - targets[:, t]).square().sum(), x)
    assert set(real_time) == set(names)
    for name in names:
        torch.testing.assert_close(real_time[name], through_time[name], rtol=1e-8, atol=1e-10)
    for name, slopes in (numeric_gradient(model, loss) if numeric else {}).items():
        torch.testing.assert_close(through_time[name], slopes, rtol=1e-6, atol=1e-6)


def linear_elman(U):
    module = made(ElmanRNN, 4, len(U), activation="identity")
    with torch.no_grad():
        module.weight_hh.copy_(U)
    return module


def test_errors_of_a_linear_network_are_powers_of_its_matrix():
    U = normal(5, 5) / 2
    module, x = linear_elman(U), normal(2, 7, 4)
    v = normal(5, seed=2)
    jacobian = torch.autograd.functional.jacobian(lambda h: module(x[:1], (h,))[1][0], normal(1, 5, seed=1))
    torch.testing.assert_close(jacobian[0, :, 0], torch.linalg.matrix_power(U, 7))
    flow = gradient_flow(module, x, lambda y: (y * v).sum())
    expected = [(torch.linalg.matrix_power(U.T, 7 - t) @ v).norm().item() for t in range(1, 8)]
    assert flow.norms == pytest.approx(expected, rel=1e-10)
    assert flow.components == {"h": flow.norms}
    assert flow.spectral_radius["U"] == pytest.approx(torch.linalg.eigvals(U).abs().max().item())


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.1])
def test_the_fitted_rate_is_the_factor_of_a_step(factor):
    rotation = torch.linalg.qr(normal(5, 5))[0]
    module = linear_elman(factor * rotation)
    flow = gradient_flow(module.float(), normal(1, 200, 4))  # 0.5²⁰⁰ is no number of float32's
    assert flow.rate == pytest.approx(factor, rel=1e-5)
    assert flow.spectral_radius["U"] == pytest.approx(factor, rel=1e-5)
    assert flow.norms[0] == pytest.approx(5**0.5 * factor**199, rel=1e-3)


def test_the_flow_of_an_lstm_has_both_components():
    module, x = made(lstm), normal(1, 4, 4)
    flow = gradient_flow(module, x)
    h, s = (one.detach().requires_grad_() for one in module(x[:, :2])[1])
    by_h, by_s = torch.autograd.grad(module(x[:, 2:], (h, s))[0][:, -1].sum(), (h, s))
    assert flow.components["h"][1] == pytest.approx(by_h.norm().item())
    assert flow.components["s"][1] == pytest.approx(by_s.norm().item())
    assert flow.norms[1] == pytest.approx(torch.cat((by_h, by_s)).norm().item())
    assert set(flow.spectral_radius) == set("ifog")


def test_the_carousel_keeps_the_flow():
    module = made(PeepholeLSTM, 4, 6, forget_gate=False, peepholes=False, truncated_gradient=True)
    *norms, last = gradient_flow(module, normal(1, 100, 4)).components["s"]
    assert max(norms) == pytest.approx(min(norms), rel=1e-12)
    assert last == 0  # the last output is of h


def penalised_by_hand(model, x, v):
    """Ω of the loss Σ v·h sample by sample and step by step: errors by a run from each state, Jacobians of steps."""
    total = 0.0
    for b in range(len(x)):
        states = [model.initial_state(1, x)]
        for t in range(x.shape[1]):
            states.append(model.step(x[b : b + 1, t], states[-1])[1])
        for t in range(1, x.shape[1]):
            above = tuple(one.detach().requires_grad_() for one in states[t + 1])
            value = (above[0] * v[b, t]).sum()
            if t + 1 < x.shape[1]:
                value = value + (model(x[b : b + 1, t + 1 :], above)[0] * v[b, t + 1 :]).sum()
            error = torch.autograd.grad(value, above, allow_unused=True)
            error = torch.cat([torch.zeros_like(s) if e is None else e for e, s in zip(error, above, strict=True)], 1)
            J = one_step_jacobian(model, x[b : b + 1, t], states[t])
            total += ((error @ J).norm() / error.norm() - 1) ** 2 / len(x)
    return total


def one_step_jacobian(model, x, state):
    sizes = [one.shape[1] for one in state]

    def step(flat):
        return torch.cat(model.step(x, flat.split(sizes, 1))[1], 1)

    return torch.autograd.functional.jacobian(step, torch.cat(state, 1).detach())[0, :, 0]


@pytest.mark.parametrize("cell", [lambda: ElmanRNN(4, 6), lambda: PeepholeLSTM(4, 6), lambda: GRU(4, 6)])
def test_the_penalty_is_its_formula(cell):
    model, x = made(cell), normal(2, 5, 4)
    v = normal(2, 5, model.output_size, seed=3)
    found = gradient_norm_penalty(model, x, lambda y: (y * v).sum())
    expected = penalised_by_hand(model, x, v)
    assert found.item() == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.3])
def test_the_penalty_of_a_scaled_rotation_and_its_gradient(factor):
    rotation = torch.linalg.qr(normal(5, 5))[0]
    module, x = linear_elman(factor * rotation), normal(3, 8, 4)
    penalty = gradient_norm_penalty(module, x, lambda y: y[:, -1].sum())
    assert penalty.item() == pytest.approx(7 * (factor - 1) ** 2, abs=1e-12)
    slope = (torch.autograd.grad(penalty, module.weight_hh)[0] * rotation).sum()
    assert slope.item() == pytest.approx(14 * (factor - 1), abs=1e-9)


def test_masked_steps_are_not_penalised():
    module, x = made(ElmanRNN, 4, 6), normal(2, 5, 4)
    v = normal(2, 5, 6, seed=3)
    padded = torch.cat((x, normal(2, 3, 4, seed=4)), 1)
    mask = torch.arange(8).expand(2, 8) < 5
    found = gradient_norm_penalty(module, padded, lambda y: (y[:, :5] * v).sum(), None, mask)
    assert found.item() == pytest.approx(gradient_norm_penalty(module, x, lambda y: (y * v).sum()).item())
    assert gradient_norm_penalty(module, x[:, :1], torch.sum) == 0


# Training.


def windows_by_hand(model, x, y, k1, k2):
    """The truncated gradient: for every window, a run without gradients to its start, then one with."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    steps, scored = x.shape[1], 0
    for end in [*range(k1, steps, k1), steps]:
        start = max(0, end - k2)
        state = model.initial_state(len(x), x)
        with torch.no_grad():
            for t in range(start):
                _, state = model.step(x[:, t], state)
        loss = 0
        for t in range(start, end):
            out, state = model.step(x[:, t], state)
            loss = loss + (out - y[:, t]).square().mean() / steps if t >= scored else loss
        for one, more in zip(
            total, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True), strict=True
        ):
            one += 0 if more is None else more
        scored = end
    return total


@pytest.mark.parametrize(("k1", "k2"), [(1, 1), (1, 3), (2, 2), (2, 3), (3, 7), (4, 5), (10, 10), (3, 20)])
@pytest.mark.parametrize("cell", [lstm, jordan])
def test_truncated_gradients_are_those_of_the_windows(cell, k1, k2):
    model = made(SequenceModel, cell(), "many_to_many", 2)
    x, y = normal(3, 10, 4), normal(3, 10, 2, seed=1)
    loss, found = TBPTT(model, k1, k2, loss="mse").gradient(x, y)
    assert loss.item() == pytest.approx((model(x)[0] - y).square().mean().item())
    for one, other in zip(found.values(), windows_by_hand(model, x, y, k1, k2), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("k1", [1, 3, 10])
def test_windows_as_long_as_the_sequence_are_back_propagation_through_time(k1):
    model = made(SequenceModel, lstm(), "many_to_many", 2)
    x, y = normal(3, 10, 4), torch.randint(2, (3, 10), generator=torch.Generator().manual_seed(0))
    loss = nn.functional.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
    expected = torch.autograd.grad(loss, list(model.parameters()))
    value, found = TBPTT(model, k1, 10).gradient(x, y)
    assert value.item() == pytest.approx(loss.item())
    for one, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("k1", "k2"), [(1, 4), (4, 4), (3, 5)])
def test_errors_reach_exactly_so_far_back(k1, k2):
    model = made(SequenceModel, lstm(), "many_to_many", 2)
    x = normal(2, 12, 4).requires_grad_()
    y = torch.zeros(2, 12, dtype=torch.int64)
    asked = torch.arange(12).expand(2, 12) == 11
    part = TBPTT(model, k1, k2)
    reached = torch.zeros(12)
    for loss, _ in part._losses(*part._data(x, y, asked, None)):
        reached += torch.autograd.grad(loss, x)[0].abs().sum((0, 2))
    assert (reached[: 12 - k2] == 0).all()
    assert (reached[12 - k2 :] > 0).all()


def test_padding_changes_no_loss_and_no_gradient():
    model = made(tagger)
    x, y = normal(3, 6, 4), torch.randint(2, (3, 6), generator=torch.Generator().manual_seed(0))
    part = TBPTT(model, 2, 3, penalty=0.1)
    longer = torch.cat((x, normal(3, 4, 4, seed=1)), 1), torch.cat((y, torch.ones_like(y[:, :4])), 1)
    mask = torch.arange(10).expand(3, 10) < 6
    value, gradients = part.gradient(x, y)
    padded, others = part.gradient(*longer, mask=mask)
    assert padded.item() == pytest.approx(value.item())
    for one, other in zip(gradients.values(), others.values(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("clip_by", ["norm", "value"])
def test_one_clipped_step(clip_by):
    model, x, y = made(tagger), 5 * normal(4, 5, 4), normal(4, 5, 2, seed=1) * 50
    _, gradients = TBPTT(model, 5, 5, loss="mse").gradient(x, y)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    bound = 0.3
    TBPTT(model, 5, 5, bound, loss="mse", clip_by=clip_by, lr=0.1, epochs=1, batch_size=4).fit(x, y)
    step = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    g = torch.cat([one.flatten() for one in gradients.values()])
    assert g.norm() > bound
    clipped = g * bound / g.norm() if clip_by == "norm" else g.clamp(-bound, bound)
    torch.testing.assert_close(step, -0.1 * clipped, rtol=1e-5, atol=1e-9)
    cosine = nn.functional.cosine_similarity(step, -g, dim=0)
    assert (cosine > 1 - 1e-9) == (clip_by == "norm")


def test_windows_without_a_target_take_no_step():
    model, x = made(tagger), normal(4, 8, 4)
    y, asked = torch.zeros(4, 8, dtype=torch.int64), torch.arange(8).expand(4, 8) == 7
    steps = []

    class Counted(torch.optim.SGD):
        def step(self, closure=None):
            steps.append(1)
            return super().step(closure)

    TBPTT(model, 2, 4, optimizer=Counted, epochs=1, batch_size=4).fit(x, y, asked)
    assert len(steps) == 1
    TBPTT(model, 2, 4, optimizer=Counted, epochs=1, batch_size=4).fit(x, y)
    assert len(steps) == 5


def test_training_learns_the_delayed_exclusive_or_only_within_its_windows():
    task = delayed_xor(128, 8, torch.Generator().manual_seed(0))
    rights = {}
    for k2 in (8, 4):
        with seeded(1):
            model = SequenceModel(PeepholeLSTM(2, 8, peepholes=False), "many_to_many", 2)
        fit = TBPTT(model, 4, k2, optimizer=torch.optim.Adam, lr=0.03, epochs=40)
        fit.fit(task.inputs, task.targets, task.target_mask)
        said = model(task.inputs)[0][:, -1].argmax(-1)
        rights[k2] = (said == task.targets[:, -1]).double().mean().item()
    assert rights[8] > 0.95
    assert rights[4] < 0.8


# The neural Turing machine.


@given(st.integers(0, 2**31), st.floats(0, 1e3), st.floats(0, 1), st.floats(1, 100))
def test_attention_is_a_distribution(seed, strength, gate, sharpening):
    at = normal(2, 3, 5, seed=seed).softmax(-1)
    scalar = lambda value: torch.full((2, 3, 1), value, dtype=torch.float64)  # noqa: E731
    shift = (5 * normal(2, 3, 3, seed=seed)).softmax(-1)
    w = address(normal(2, 5, 4), at, normal(2, 3, 4, seed=1), scalar(strength), scalar(gate), shift, scalar(sharpening))
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 3, dtype=torch.float64))


def single(value):
    return torch.tensor(value, dtype=torch.float64).view(1, 1, -1)


@pytest.mark.parametrize(("shift", "moved"), [([1.0, 0, 0], -1), ([0, 1.0, 0], 0), ([0, 0, 1.0], 1)])
def test_closed_gates_rotate_attention(shift, moved):
    at = normal(1, 1, 6).softmax(-1)
    w = address(normal(1, 6, 4), at, normal(1, 1, 4), single(3.0), single(0.0), single(shift), single(1.0))
    torch.testing.assert_close(w, at.roll(moved, -1))


def test_addressing_is_its_formula():
    memory, key, at = normal(1, 4, 3), normal(1, 1, 3, seed=1), normal(1, 1, 4, seed=2).softmax(-1)
    beta, g, s, gamma = 2.5, 0.3, [0.2, 0.5, 0.3], 1.7
    w = address(memory, at, key, single(beta), single(g), single(s), single(gamma))[0, 0]
    cosines = [nn.functional.cosine_similarity(key[0, 0], row, dim=0).item() for row in memory[0]]
    content = [math.exp(beta * c) for c in cosines]
    gated = [g * c / sum(content) + (1 - g) * old for c, old in zip(content, at[0, 0].tolist(), strict=True)]
    moved = [sum(gated[(i - d) % 4] * s[d + 1] for d in (-1, 0, 1)) for i in range(4)]
    sharp = [m**gamma for m in moved]
    assert w.tolist() == pytest.approx([v / sum(sharp) for v in sharp], rel=1e-9)


def test_writing_at_one_slot_replaces_it():
    memory, added = normal(1, 4, 3), normal(1, 1, 3, seed=1)
    at = single([0.0, 1.0, 0, 0])
    after = write(memory, at, torch.ones(1, 1, 3, dtype=torch.float64), added)
    torch.testing.assert_close(after[0, 1], added[0, 0])
    assert torch.equal(after[0, [0, 2, 3]], memory[0, [0, 2, 3]])
    torch.testing.assert_close((at @ after)[0, 0], added[0, 0])


def test_two_heads_erase_before_they_add():
    memory, w = normal(1, 4, 3), normal(1, 2, 4, seed=1).softmax(-1)
    e, a = torch.sigmoid(normal(1, 2, 3, seed=2)), normal(1, 2, 3, seed=3)
    after = write(memory, w, e, a)
    for i in range(4):
        for j in range(3):
            kept = memory[0, i, j] * (1 - w[0, 0, i] * e[0, 0, j]) * (1 - w[0, 1, i] * e[0, 1, j])
            assert after[0, i, j].item() == pytest.approx(
                (kept + w[0, 0, i] * a[0, 0, j] + w[0, 1, i] * a[0, 1, j]).item()
            )


def test_a_machine_reads_what_it_has_just_written():
    module, x = made(ntm), normal(3, 5, 4)
    y, (memory, w, reads, h) = module(x)
    torch.testing.assert_close(w.sum(-1), torch.ones(3, 2, dtype=torch.float64))
    torch.testing.assert_close(reads, (w[:, :1] @ memory)[:, 0])
    torch.testing.assert_close(y[:, -1], module.out_proj(torch.cat((h, reads), 1)))
    start = module.initial_state(2, x)
    assert (start[0] == 1e-6).all()
    assert start[1].argmax(-1).eq(0).all()
    assert (start[1].sum(-1) == 1).all()


# Tasks and scores.


def test_adding_asks_for_the_sum_of_the_marked():
    task = adding(200, 7, torch.Generator().manual_seed(0))
    for x, y, asked in zip(task.inputs, task.targets, task.target_mask, strict=True):
        marked = x[:, 1].nonzero().flatten().tolist()
        assert len(marked) == 2
        assert marked[0] < 3 <= marked[1]
        assert asked.nonzero().flatten().tolist() == [6]
        assert y[6, 0].item() == pytest.approx(x[marked, 0].sum().item(), rel=1e-6)
    assert {6, 3} <= set(task.inputs[:, :, 1].nonzero()[:, 1].tolist())


def test_copy_asks_for_the_items_in_silence():
    task = copy_task(20, 3, torch.Generator().manual_seed(0), bits=2)
    assert torch.equal(task.targets[:, 4:], task.inputs[:, :3, :2])
    assert not task.inputs[:, 4:].any()
    assert torch.equal(task.inputs[:, :, 2], (torch.arange(7) == 3).float().expand(20, 7))
    assert torch.equal(task.target_mask, (torch.arange(7) >= 4).expand(20, 7))


def test_temporal_order_names_the_order():
    task = temporal_order(300, 60, torch.Generator().manual_seed(0))
    places = defaultdict(set)
    for x, y in zip(task.inputs.argmax(-1).tolist(), task.targets[:, -1].tolist(), strict=True):
        (first, a), (second, b) = [(t, "XY"[s - 6]) for t, s in enumerate(x) if s >= 6]
        assert y == ["XX", "XY", "YX", "YY"].index(a + b)
        assert (x[0], x[-1]) == (0, 1)
        assert all(2 <= s < 6 for t, s in enumerate(x[:-1]) if t not in (0, first, second))
        places[0].add(first)
        places[1].add(second)
    assert places == {0: set(range(6, 12)), 1: set(range(24, 30))}


REBER = re.compile(r"B(?:(?:TS*X|PT*VP)(?:XT*VP)*(?:S|XT*VV)|PT*VV)E")


def test_reber_strings_are_those_of_the_grammar():
    task = embedded_reber(1500, 30, torch.Generator().manual_seed(0))
    follows, said = defaultdict(set), defaultdict(set)
    lengths = task.mask.sum(1).tolist()
    assert min(lengths) == 9
    assert max(lengths) <= 30
    for x, y, asked, length in zip(task.inputs, task.targets, task.target_mask, lengths, strict=True):
        assert not x[length:].any()
        assert torch.equal(asked, torch.arange(30) < length - 1)
        word = "".join("BTSXPVE"[i] for i in x[:length].argmax(-1))
        assert (word[0], word[-1]) == ("B", "E")
        assert word[1] == word[-2]
        assert word[1] in "TP"
        assert REBER.fullmatch(word[2:-2])
        for t in range(length - 1):
            legal = {symbol for symbol, flag in zip("BTSXPVE", y[t], strict=True) if flag}
            assert word[t + 1] in legal
            if t < 5:
                follows[word[: t + 1]].add(word[t + 1])
                said[word[: t + 1]] |= legal
    assert follows == said
    torch.testing.assert_close(embedded_reber(0, 9).inputs, torch.zeros(0, 9, 7))


def words(*sentences):
    return [sentence.split() for sentence in sentences]


def test_bleu_of_the_same_of_others_and_of_shorter_ones():
    assert bleu(words("the cat sat on the mat"), [words("the cat sat on the mat")]) == 1
    assert bleu(words("the cat sat"), [words("the cat sat")]) == 1
    assert bleu(words("a b c d e"), [words("f g h i j")]) == 0
    assert bleu(words("a b c d"), [words("a b c d e f")]) == pytest.approx(math.exp(1 - 6 / 4))
    assert bleu(words("a b c d e f g"), [words("a b c d e f")]) < 1
    assert bleu([[]], [words("a")]) == 0
    # Each word counts as often as a reference has it: 2 of 7.
    assert bleu(words("the the the the the the the"), [words("the cat is on the mat x")], 1) == pytest.approx(2 / 7)
    # Of two references equally near the shorter one counts, and so there is no penalty.
    assert bleu(words("a b c d e"), [words("a b c d", "a b c d e f")]) == 1


def test_bleu_agrees_with_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    draws = torch.Generator().manual_seed(0)

    def sentence():
        return [f"w{i}" for i in torch.randint(4, (int(torch.randint(5, 15, (), generator=draws)),), generator=draws)]

    for _ in range(20):
        candidates = [sentence() for _ in range(5)]
        references = [[sentence() for _ in range(2)] for _ in range(5)]
        streams = [[" ".join(row[i]) for row in references] for i in range(2)]
        theirs = sacrebleu.corpus_bleu(
            [" ".join(one) for one in candidates], streams, smooth_method="none", tokenize="none", force=True
        )
        assert 100 * bleu(candidates, references) == pytest.approx(theirs.score, rel=1e-9)
