"""Subsampled attention against attention written out, counts over many draws, and torch's own dense attention."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from provenn.contracts import BadInput, FunctionCase, ModuleCase, ProbeCase, Symmetry, TrainerCase
from provenn.contracts.watch import plain_signatures
from provenn.core.experiment.accounting import TensorMemory, multiply_accumulates
from provenn.core.experiment.seeding import derive_seed, seeded
from provenn.nn import SubEnsemble, SubsampledAttention, SubsampledTraining, convert_to_ssa, pathway_probe
from provenn.nn._stochastic_subsampled_attention_convert import choose_pathway, sampling


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(sparsity=4, bias="none", seed=0, embed_dim=8, **options):
    with seeded(seed):
        made = SubsampledAttention(embed_dim, 2, sparsity, bias, **options).double()
        for parameter in made.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, std=0.5)
    made.pathway_seed = 7
    return made


class Classifier(nn.Module):
    """Two layers of attention, so that pathways have two subsets."""

    def __init__(self, classes=3, dim=8, sparsity=4, **options):
        super().__init__()
        self.layers = nn.ModuleList(SubsampledAttention(dim, 2, sparsity, **options) for _ in range(2))
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        for one in self.layers:
            x = x + one(x, x, x, need_weights=False)[0]
        return self.head(x.mean(dim=1))


def tokens(generator, dtype, batch):
    x = torch.randn(batch, 6, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x, x.clone(), x.clone()


ORDER = torch.tensor([3, 0, 4, 1, 5, 2])
PERMUTATION = Symmetry(
    "permutation of the tokens",
    before=lambda inputs: tuple(x[:, ORDER] for x in inputs),
    after=lambda output: (output[0][:, ORDER], output[1][:, ORDER][:, :, ORDER]),
)


def bad_layer(argument, error=ValueError, **options):
    return BadInput(argument, lambda: SubsampledAttention(**{"embed_dim": 8, "num_heads": 2, **options}), error)


def bad_call(argument, error=ValueError, call=None, shape=(2, 6, 8), **options):
    def act():
        x = torch.zeros(shape)
        inputs = {"query": x, "key": x, "value": x, **(call or {})}
        SubsampledAttention(**{"embed_dim": 8, "num_heads": 2, **options})(**inputs)

    return BadInput(argument, act, error)


def no_bias(i, j):
    return 0.0 * (i - j)


BAD_LAYERS = (
    bad_layer("embed_dim", embed_dim=9),
    bad_layer("num_heads", num_heads=0),
    bad_layer("sparsity", sparsity=0),
    bad_layer("sparsity", TypeError, sparsity=2.5),
    bad_layer("bias", bias="near"),
    bad_layer("sigma", sigma=-1.0),
    bad_layer("sigma", sigma=math.nan),
    bad_layer("implementation", implementation="flash"),
    bad_layer("implementation", implementation="fused"),
    bad_layer("implementation", implementation="fused", include_self=False, rel_bias=no_bias),
    bad_layer("implementation", implementation="fused", include_self=False, attn_mask=no_bias),
    bad_layer("implementation", implementation="fused", include_self=False, causal=True),
    bad_layer("eval_samples", eval_samples=-1),
    bad_layer("dropout", dropout=1.0),
    bad_layer("grid", grid=(3, 5)),
    bad_layer("grid", grid=(0, 5)),
    bad_call("grid", grid=(4, 4)),
    bad_call("sparsity", strict=True),
    bad_call("key", call={"key": torch.zeros(2, 5, 8), "value": torch.zeros(2, 5, 8)}),
    bad_call("implementation", implementation="fused", include_self=False),
    bad_call("attn_mask", TypeError, call={"attn_mask": torch.zeros(6, 6, dtype=torch.int64)}),
)


def classifier():
    return Classifier().double()


def encoder():
    inner = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(inner, 2, enable_nested_tensor=True)


def probe_data(generator):
    x = torch.randn(10, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (10,), generator=generator)


def brute_force(model, data):
    """Sub-models by the mask implementation, losses and correlations written out."""
    x, y = data
    dense = model.eval()(x).softmax(-1)
    members = []
    for one in range(4):
        for place, module in enumerate(model.layers):
            module.implementation, module.eval_samples = "mask", 1
            module.pathway_seed = derive_seed(0, "pathway", one, place)
        members.append(model(x).softmax(-1))
    rows = range(len(y))
    grown = [sum(members[: size + 1]) / (size + 1) for size in range(4)]
    wrong = [(one.argmax(-1) != y).double() for one in members]
    pairs = [
        torch.corrcoef(torch.stack([wrong[a], wrong[b]]))[0, 1].item()
        for a in range(4) for b in range(a)
        if wrong[a].std() > 0 and wrong[b].std() > 0
    ]  # fmt: skip

    def loss(p):
        return -sum(math.log(p[row, y[row]].item()) for row in rows) / len(y)

    return {
        "dense_loss": loss(dense),
        "dense_accuracy": (dense.argmax(-1) == y).double().mean().item(),
        "losses": tuple(loss(one) for one in members),
        "accuracies": tuple((one.argmax(-1) == y).double().mean().item() for one in members),
        "ensemble_losses": tuple(loss(one) for one in grown),
        "error_correlation": sum(pairs) / len(pairs) if pairs else math.nan,
    }


def trainer(model, seed=0, **options):
    return SubsampledTraining(model, 4, 0.25, epochs=4, batch_size=4, lr=1e-2, seed=seed, **options)


def training_data(generator):
    return torch.randn(12, 8, 8, generator=generator), torch.randint(3, (12,), generator=generator)


SAMPLES = "in training a query sees a random part of the sources"
CASES = [
    ModuleCase(
        part="provenn.nn.SubsampledAttention",
        make=lambda **options: SubsampledAttention(8, 2, **options),
        inputs=tokens,
        symmetries=(PERMUTATION,),
        training_equals_eval=False,
        training_equals_eval_reason=SAMPLES,
        bad_input=BAD_LAYERS,
    ),
    ModuleCase(
        part="provenn.nn.SubsampledAttention",
        label="causal, local",
        make=lambda: SubsampledAttention(8, 2, 3, "local", causal=True, moving_windows=True),
        inputs=tokens,
        causal_dim=1,
        training_equals_eval=False,
        training_equals_eval_reason=SAMPLES,
        bad_input=BAD_LAYERS[:1],
    ),
    ModuleCase(
        part="provenn.nn.SubEnsemble",
        make=lambda: SubEnsemble(Classifier(), 3),
        inputs=lambda generator, dtype, batch: tokens(generator, dtype, batch)[:1],
        compile=False,
        compile_reason="the sub-models are drawn from generators of their own, which torch.compile does not trace",
        export=False,
        export_reason="the sub-models are drawn from generators of their own, which torch.export does not trace",
        bad_input=(
            BadInput("model", lambda: SubEnsemble("model"), TypeError),
            BadInput("model", lambda: SubEnsemble(nn.Linear(2, 2))),
            BadInput("m", lambda: SubEnsemble(Classifier(), 0)),
            BadInput("m", lambda: SubEnsemble(Classifier(), 2.0), TypeError),
            BadInput("average", lambda: SubEnsemble(Classifier(), 2, "mean")),
        ),
    ),
    TrainerCase(
        part="provenn.nn.SubsampledTraining",
        make=trainer,
        model=Classifier,
        data=training_data,
        rounds=4,
        bad_input=(
            BadInput("model", lambda: SubsampledTraining(nn.Linear(2, 2))),
            BadInput("model", lambda: SubsampledTraining(None), TypeError),
            BadInput("sparsity", lambda: SubsampledTraining(Classifier(), 0)),
            BadInput("sparsity", lambda: SubsampledTraining(Classifier(), lambda t: 0).prepare(0, 10)),
            BadInput("dense_finetune_fraction", lambda: SubsampledTraining(Classifier(), 4, 1.5)),
            BadInput("lr", lambda: SubsampledTraining(Classifier(), lr=0.0)),
            BadInput("finetune_lr_factor", lambda: SubsampledTraining(Classifier(), finetune_lr_factor=0.0)),
            BadInput("batch_size", lambda: SubsampledTraining(Classifier(), batch_size=0)),
            BadInput("epochs", lambda: SubsampledTraining(Classifier(), epochs=0)),
            BadInput("seed", lambda: SubsampledTraining(Classifier(), seed=0.5), TypeError),
            BadInput("targets", lambda: trainer(Classifier()).fit(torch.zeros(3, 8, 8), torch.zeros(2).long())),
        ),
    ),
    FunctionCase(
        part="provenn.nn.convert_to_ssa",
        call=lambda: convert_to_ssa(encoder()),
        bad_input=(
            BadInput("model", lambda: convert_to_ssa("model"), TypeError),
            BadInput("model", lambda: convert_to_ssa(nn.Linear(2, 2))),
            BadInput("model", lambda: convert_to_ssa(nn.MultiheadAttention(4, 2, add_bias_kv=True))),
            BadInput("model", lambda: convert_to_ssa(nn.MultiheadAttention(4, 2, add_zero_attn=True))),
            BadInput("model", lambda: convert_to_ssa(nn.MultiheadAttention(4, 2, kdim=3))),
            BadInput("sparsity", lambda: convert_to_ssa(encoder(), 0)),
            BadInput("depth", lambda: convert_to_ssa(encoder(), depth=2), TypeError),
        ),
    ),
    ProbeCase(
        part="provenn.nn.pathway_probe",
        run=lambda model, data: pathway_probe(model, data, 4),
        model=classifier,
        data=probe_data,
        brute_force=brute_force,
        bad_input=(
            BadInput("model", lambda: pathway_probe(nn.Linear(2, 2), probe_data(torch.Generator()))),
            BadInput("model", lambda: pathway_probe("model", probe_data(torch.Generator())), TypeError),
            BadInput("m", lambda: pathway_probe(classifier(), probe_data(torch.Generator()), 0)),
            BadInput(
                "data", lambda: pathway_probe(classifier(), (torch.zeros(3, 8, 8).double(), torch.zeros(2).long()))
            ),
        ),
    ),
]


def projected(module, x):
    split = (module.num_heads, module.head_dim)
    return (p(x).unflatten(-1, split).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))


def written_out(module, x, sets, bias=None):
    """Attend query by query over its set of sources, head by head."""
    q, k, v = projected(module, x)
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        for i, seen in enumerate(sets):
            seen = sorted(seen)
            scores = (k[:, head, seen] @ q[:, head, i].unsqueeze(-1)).squeeze(-1) / math.sqrt(module.head_dim)
            if bias is not None:
                scores = scores + torch.tensor([bias(i, j) for j in seen], dtype=x.dtype)
            out[:, head, i] = (scores.softmax(-1).unsqueeze(-1) * v[:, head, seen]).sum(1)
    return module.out_proj(out.transpose(1, 2).flatten(2))


def sets_of(module, count, causal=False):
    """The sources of every query, from the drawn windows."""
    subset = module.draw(count, torch.Generator().manual_seed(7))
    sets = [set() for _ in range(count)]
    for queries, sources in zip(subset.queries.tolist(), subset.sources.tolist(), strict=True):
        for i in queries:
            if i < count:
                sets[i] = {j for j in sources if j < count and (not causal or j <= i)} | {i}
    return sets


# What a call computes.


@pytest.mark.parametrize(
    "options", [{}, {"bias": "local"}, {"moving_windows": True}, {"bias": "local", "grid": (3, 4)}]
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", ["gather", "mask"])
def test_a_call_attends_to_its_subset_alone(options, causal, implementation):
    module, x = layer(3, causal=causal, implementation=implementation, **options), normal(2, 12, 8)
    wanted = written_out(module, x, sets_of(module, 12, causal))
    torch.testing.assert_close(module(x, x, x, need_weights=False)[0], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [13, 3, 1])
@pytest.mark.parametrize("implementation", ["gather", "mask"])
def test_lengths_that_s_does_not_divide_are_padded(count, implementation):
    module, x = layer(4, implementation=implementation), normal(2, count, 8)
    wanted = written_out(module, x, sets_of(module, count))
    torch.testing.assert_close(module(x, x, x, need_weights=False)[0], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("tolerance", "dtype"), [(1e-10, torch.float64), (1e-5, torch.float32)])
@pytest.mark.parametrize("bias", ["none", "local"])
def test_gather_equals_mask_with_gradients(bias, tolerance, dtype):
    x = normal(2, 13, 8).to(dtype)
    hide = torch.rand(13, 13, generator=torch.Generator().manual_seed(1)) < 0.3
    pad = torch.zeros(2, 13, dtype=torch.bool).index_fill(1, torch.tensor([2, 11]), True)
    found = []
    for implementation in ("gather", "mask"):
        module = layer(4, bias, implementation=implementation, rel_bias=lambda i, j: -0.1 * (i - j).abs()).to(dtype)
        given = x.clone().requires_grad_()
        out = module(given, given, given, key_padding_mask=pad, attn_mask=hide, need_weights=False)[0]
        out.square().sum().backward()
        found.append([out, given.grad, *(p.grad for p in module.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1, other.abs().max().item()))


@pytest.mark.parametrize("options", [{"moving_windows": True}, {}])
def test_masks_and_biases_follow_original_indices(options):
    def bias(i, j):
        return math.sin(3 * i + 5 * j)

    def forbidden(i, j):
        return (7 * i + 3 * j) % 4 == 1

    module = layer(
        3, rel_bias=lambda i, j: torch.sin((3 * i + 5 * j).double()), attn_mask=forbidden, **options
    )  # fmt: skip
    x = normal(2, 12, 8)
    sets = [{j for j in seen if not forbidden(i, j)} for i, seen in enumerate(sets_of(module, 12))]
    keep = [i for i, seen in enumerate(sets) if seen]
    wanted = written_out(module, x, [seen or {0} for seen in sets], bias)
    found = module(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(found[:, keep], wanted[:, keep], rtol=0, atol=1e-12)
    given = torch.tensor([[forbidden(i, j) for j in range(12)] for i in range(12)])
    plain = layer(3, **options)
    floats = torch.tensor([[bias(i, j) for j in range(12)] for i in range(12)], dtype=x.dtype)
    floats = floats.masked_fill(given, -math.inf)
    torch.testing.assert_close(plain(x, x, x, attn_mask=floats, need_weights=False)[0], found, rtol=0, atol=1e-12)


def test_a_mask_of_every_sample_and_head():
    module, x = layer(3), normal(2, 12, 8)
    mask = (torch.rand(4, 12, 12, generator=torch.Generator().manual_seed(2)) < 0.5) & ~torch.eye(12).bool()
    weights = module(x, x, x, attn_mask=mask, average_attn_weights=False)[1]
    assert not weights.flatten(0, 1)[mask].any()
    gathered = module(x, x, x, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(gathered, module(x, x, x, attn_mask=mask)[0], rtol=0, atol=1e-12)


def test_a_bias_may_be_learned_and_differ_between_heads():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(normal(2, 25))

        def forward(self, i, j):
            return self.table[:, (i - j) + 12]

    module, x = layer(4, rel_bias=Table()), normal(2, 13, 8)  # padded: indices past the end must not be looked up
    one, other = module(x, x, x, need_weights=False)[0], module(x, x, x)[0]
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert torch.autograd.grad(one.square().sum(), module.rel_bias.table)[0].any()


def test_a_query_without_an_admissible_source_attends_to_itself():
    # Causal, and windows of one: most sources lie in the future, or are another token.
    module, x = layer(12, causal=True), normal(1, 12, 8)
    value = module.out_proj(module.v_proj(x))
    found = module(x, x, x, need_weights=False)[0]
    alone = [i for i, seen in enumerate(sets_of(module, 12, True)) if seen == {i}]
    assert 0 < len(alone) < 12
    torch.testing.assert_close(found[:, alone], value[:, alone])
    without = layer(12, causal=True, include_self=False)
    empty = without(x, x, x, need_weights=False)[0]
    nothing = torch.isclose(empty, without.out_proj.bias).all(-1)[0]
    assert nothing.sum() >= 3
    assert empty.isfinite().all()


def test_the_own_source_counts_once():
    module, x = layer(1), normal(1, 6, 8)
    module.sparsity = 2
    weights = module(x, x, x)[1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 6).double())
    sizes = [len(seen) for seen in sets_of(module, 6)]
    assert (weights[0] > 0).sum(-1).tolist() == sizes
    assert set(sizes) == {3, 4}


# s = 1.


def test_without_sparsity_it_is_dense_attention():
    module, x = layer(1, implementation="mask"), normal(2, 10, 8)
    q, k, v = projected(module, x)
    plain = (q @ k.mT / math.sqrt(4)).softmax(-1) @ v
    assert torch.equal(module(x, x, x)[0], module.out_proj(plain.transpose(1, 2).flatten(2)))
    torchs = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(module.attend(q, k, v, None, False, False)[0], torchs, rtol=0, atol=1e-12)
    module.implementation = "gather"
    torch.testing.assert_close(module.attend(q, k, v, None, False, False)[0], torchs, rtol=0, atol=1e-12)
    subset = module.draw(10)
    gathered = module._gathered(q, k, v, None, False, subset)  # one window of all, in a random order
    torch.testing.assert_close(gathered, torchs, rtol=0, atol=1e-12)


def test_the_fused_kernel_agrees():
    x = normal(2, 12, 8)
    outputs = [
        layer(3, implementation=name, include_self=False)(x, x, x, need_weights=False)[0]
        for name in ("fused", "gather")
    ]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    fused, plain = (layer(3, implementation=name, include_self=False).eval() for name in ("fused", "mask"))
    torch.testing.assert_close(fused(x, x, x, need_weights=False)[0], plain(x, x, x)[0], rtol=0, atol=1e-12)


# The draws.


def test_every_pair_is_met_with_probability_one_in_s():
    module, draws = layer(3), 3000
    generator = torch.Generator().manual_seed(0)
    met = torch.zeros(12, 12)
    for _ in range(draws):
        queries, sources = module.draw(12, generator)
        assert sources.flatten().sort().values.tolist() == list(range(12))  # every source once
        assert queries.flatten().tolist() == list(range(12))
        met[queries[:, :, None], sources[:, None, :]] += 1
    error = math.sqrt(1 / 3 * 2 / 3 / draws)
    # 144 dependent pairs: 3 standard errors for their spread, 4.5 for the worst.
    assert (met / draws - 1 / 3).abs().max() < 4.5 * error
    assert ((met / draws - 1 / 3).abs() < 3 * error).float().mean() > 0.98


def test_local_draws_hold_near_sources_and_become_uniform():
    def near(sigma):
        module, generator = layer(4, "local", sigma=sigma), torch.Generator().manual_seed(0)
        found = [module.draw(64, generator) for _ in range(200)]
        return sum(((s // 16) == (q // 16)).double().mean().item() for q, s in found) / 200

    shares = [near(sigma) for sigma in (0.0, 0.25, 1.0, 100.0)]
    assert shares[0] == 1
    assert shares[1] > shares[2] + 0.1 > shares[3] + 0.2
    assert shares[3] == pytest.approx(1 / 4, abs=0.02)


def test_the_noise_of_local_draws_is_in_windows():
    # A source k places past a border of two windows, σ = 1: its noise is k · ξ, so it enters the first with Φ(−1),
    # against a border that moves little when windows are large.
    module, generator = layer(2, "local", sigma=0.1), torch.Generator().manual_seed(0)
    draws = torch.stack([module.draw(400, generator).sources[0] for _ in range(400)])
    inside = (draws == 220).any(1).double().mean().item()  # 20 past the border of 200, noise of 20
    assert inside == pytest.approx(0.5 * math.erfc(1 / math.sqrt(2)), abs=0.06)


def test_local_without_noise_is_the_block_window():
    module = layer(3, "local", sigma=0.0)
    queries, sources = module.draw(12)
    assert sources.tolist() == queries.tolist() == torch.arange(12).reshape(3, 4).tolist()


def test_windows_of_a_grid_are_two_dimensional():
    queries, sources = layer(4, "local", sigma=0.0, grid=(4, 6)).draw(24)
    assert queries.tolist() == sources.tolist()
    assert queries[0].sort().values.tolist() == [0, 1, 2, 6, 7, 8]
    assert queries[3].sort().values.tolist() == [15, 16, 17, 21, 22, 23]
    noisy = layer(4, "local", sigma=0.7, grid=(4, 6)).draw(24)
    assert noisy.queries.tolist() == queries.tolist()
    assert noisy.sources.flatten().sort().values.tolist() == list(range(24))


def test_moving_windows_shift_queries_and_sources_together():
    module, generator = layer(3, "local", sigma=0.0, moving_windows=True), torch.Generator().manual_seed(0)
    starts = set()
    for _ in range(60):
        queries, sources = module.draw(12, generator)
        assert queries.tolist() == sources.tolist()
        start = queries[0, 0].item()
        assert queries.flatten().tolist() == [(start + one) % 12 for one in range(12)]
        starts.add(start)
    assert starts == {0, 1, 2, 3}


def test_layers_calls_and_steps_draw_anew_and_seeds_decide():
    module, x = layer(3), normal(2, 12, 8)
    first = module(x, x, x)[1]
    assert torch.equal(module(x, x, x)[1], first)  # a pathway is fixed
    module.pathway_seed = 8
    assert not torch.equal(module(x, x, x)[1] > 0, first > 0)
    module.pathway_seed = None
    with seeded(0):
        once, twice = module(x, x, x)[1], module(x, x, x)[1]
    with seeded(0):
        again = module(x, x, x)[1]
    assert torch.equal(once, again)
    assert not torch.equal(once > 0, twice > 0)
    layers = [layer(3), layer(3)]
    choose_pathway(layers, 0, "step", 5)
    kept = [one.pathway_seed for one in layers]
    assert kept[0] != kept[1]
    choose_pathway(layers, 0, "step", 5)
    assert kept == [one.pathway_seed for one in layers]
    choose_pathway(layers, 0, "step", 6)
    assert not set(kept) & {one.pathway_seed for one in layers}


def test_heads_and_batch_share_the_draw():
    module, x = layer(3), normal(3, 12, 8)
    seen = module(x, x, x, average_attn_weights=False)[1] > 0
    assert torch.equal(seen, seen[:1, :1].expand_as(seen))


@pytest.mark.parametrize("pathway", [None, 7])
def test_gradient_checkpointing_reuses_the_draw(pathway):
    module, x = layer(3), normal(2, 12, 8)
    module.pathway_seed = pathway

    def gradients(run):
        module.zero_grad()
        with seeded(1):
            run(lambda y: module(y, y, y, need_weights=False)[0].square().sum()).backward()
        return [p.grad.clone() for p in module.parameters()]

    plain = gradients(lambda act: act(x))
    kept = gradients(lambda act: checkpoint(act, x, use_reentrant=False))
    for one, other in zip(plain, kept, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", ["none", "local"])
def test_no_draw_looks_ahead(bias):
    module, x = layer(3, bias, causal=True, moving_windows=True), normal(1, 12, 8)
    for seed in range(20):
        module.pathway_seed = seed
        before = module(x, x, x, need_weights=False)[0]
        for start in range(1, 12):
            later = torch.cat([x[:, :start], normal(1, 12 - start, 8, seed=seed + 100)], dim=1)
            after = module(later, later, later, need_weights=False)[0]
            torch.testing.assert_close(after[:, :start], before[:, :start], rtol=0, atol=1e-12)


def test_permuting_tokens_masks_and_the_draw_together_commutes():
    # q, k, v of tokens in another order, with windows of the same tokens.
    module, x = layer(3), normal(2, 12, 8)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    where = order.argsort()
    subset = module.draw(12, torch.Generator().manual_seed(5))
    mask = torch.rand(12, 12, generator=torch.Generator().manual_seed(6)) < 0.8
    q, k, v = projected(module, x)
    plain = module._gathered(q, k, v, mask, False, subset)
    moved = type(subset)(where[subset.queries], where[subset.sources])
    heads = (one[:, :, order] for one in (q, k, v))
    found = module._gathered(*heads, mask[order][:, order], False, moved)
    torch.testing.assert_close(found, plain[:, :, order], rtol=0, atol=1e-12)


# Evaluation, dropout.


def test_dropout_acts_where_attention_is_dense_alone():
    x = normal(2, 12, 8)
    with_dropout, without = layer(3, dropout=0.5), layer(3)
    assert torch.equal(with_dropout(x, x, x)[0], without(x, x, x)[0])
    with_dropout.sparsity = without.sparsity = 1
    assert not torch.allclose(with_dropout(x, x, x)[0], without(x, x, x)[0])
    torch.testing.assert_close(with_dropout.eval()(x, x, x)[0], without(x, x, x)[0])


def test_evaluation_is_dense_until_asked_to_sample():
    module, x = layer(3).eval(), normal(2, 12, 8)
    q, k, v = projected(module, x)
    dense = module.out_proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x, x, x)[0], dense, rtol=0, atol=1e-12)
    module.eval_samples = 1
    torch.testing.assert_close(module(x, x, x)[0], written_out(module, x, sets_of(module, 12)), rtol=0, atol=1e-12)


def test_the_ensemble_in_a_layer_averages_its_outputs():
    module, x = layer(3, eval_samples=3).eval(), normal(2, 12, 8)
    generator = torch.Generator().manual_seed(7)
    q, k, v = projected(module, x)
    mean = sum(module._gathered(q, k, v, None, False, module.draw(12, generator)) for _ in range(3)) / 3
    wanted = module.out_proj(mean.transpose(1, 2).flatten(2))
    for need_weights in (False, True):
        torch.testing.assert_close(module(x, x, x, need_weights=need_weights)[0], wanted, rtol=0, atol=1e-12)


# Models.


def test_an_ensemble_of_one_is_one_pass():
    model, x = classifier().eval(), normal(5, 8, 8)
    with sampling(model) as layers:
        choose_pathway(layers, 3, "pathway", 0)
        wanted = model(x)
    torch.testing.assert_close(SubEnsemble(model, 1, seed=3)(x), wanted.log_softmax(-1))
    torch.testing.assert_close(SubEnsemble(model, 1, "logit", seed=3)(x), wanted)
    assert not torch.allclose(wanted, model(x))  # which is dense again
    assert all(one.pathway_seed is None and one.eval_samples == 0 for one in layers)


def test_an_ensemble_averages_probabilities_or_scores():
    model, x = classifier().eval(), normal(5, 8, 8)
    ensemble = SubEnsemble(model, 4)
    passes = ensemble.passes(x)
    assert len(torch.unique(passes[:, 0, 0])) == 4  # sub-models differ
    torch.testing.assert_close(ensemble(x).exp(), passes.softmax(-1).mean(0))
    torch.testing.assert_close(SubEnsemble(model, 4, "logit")(x), passes.mean(0))
    with seeded(0):
        random = [SubEnsemble(model, 2, seed=None)(x) for _ in range(2)]
    assert not torch.allclose(*random)


def test_jensen_on_every_batch():
    model = Classifier(sparsity=8).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    for seed in range(10):
        x, y = probe_data(torch.Generator().manual_seed(seed))
        ensemble = SubEnsemble(model, 5, seed=seed)
        mean = sum(nn.functional.cross_entropy(one, y) for one in ensemble.passes(x)) / 5
        assert nn.functional.cross_entropy(ensemble(x), y) <= mean + 1e-12


def test_conversion_keeps_the_function_and_the_weights():
    with seeded(0):
        model = encoder().double()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, std=0.5)
    model.layers[0].self_attn.in_proj_weight.requires_grad_(False)
    converted, x = convert_to_ssa(model, 3, bias="local").eval(), normal(2, 12, 8)
    torch.testing.assert_close(converted(x), model.eval()(x), rtol=0, atol=1e-12)
    assert converted.layers[1].self_attn.sparsity == 3
    assert converted.layers[1].self_attn.bias == "local"
    assert not converted.layers[0].self_attn.k_proj.weight.requires_grad
    assert isinstance(model.layers[0].self_attn, nn.MultiheadAttention)
    converted.train()
    with seeded(0):
        one, other = converted(x), converted(x)
    assert not torch.allclose(one, other)


class Doubled(nn.MultiheadAttention):
    """Attention that computes something else than torch's."""

    def forward(self, query, *args, **options):
        return super().forward(2 * query, *args, **options)


def test_conversion_leaves_subclasses_that_compute_something_else():
    model = nn.ModuleList([Doubled(8, 2), nn.MultiheadAttention(8, 2)])
    assert [type(module) for module in convert_to_ssa(model)] == [Doubled, SubsampledAttention]
    with pytest.raises(ValueError, match="over itself"):
        convert_to_ssa(Doubled(8, 2))


def test_conversion_leaves_attention_to_an_encoder_alone():
    decoder = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    converted = convert_to_ssa(decoder)
    assert isinstance(converted.self_attn, SubsampledAttention)
    assert isinstance(converted.multihead_attn, nn.MultiheadAttention)
    x, memory = normal(2, 8, 8).float(), normal(2, 5, 8, seed=1).float()
    torch.testing.assert_close(converted.eval()(x, memory), decoder.eval()(x, memory))


def test_training_ends_dense_and_puts_settings_back():
    model = Classifier()
    plan = SubsampledTraining(model, 4, 0.1, epochs=10)
    assert [plan.sparsity_at(step, 20) for step in (0, 17, 18, 19)] == [4, 4, 1, 1]
    assert [SubsampledTraining(model, 4, 0.0).sparsity_at(step, 20) for step in (0, 19)] == [4, 4]
    annealed = SubsampledTraining(model, lambda t: 8 if t < 0.5 else 2, 0.2)
    assert [annealed.sparsity_at(step, 10) for step in (0, 4, 5, 7, 8)] == [8, 8, 2, 2, 1]
    seen = []

    def loss(model, x, y):
        seen.append((model.layers[0].sparsity, model.layers[0].pathway_seed, model.layers[1].pathway_seed))
        return nn.functional.cross_entropy(model(x), y)

    trainer(model, loss=loss).fit(*training_data(torch.Generator().manual_seed(0)))
    assert [one[0] for one in seen] == [4] * 9 + [1] * 3
    assert len({seed for one in seen for seed in one[1:]}) == 24
    assert all(one.sparsity == 4 and one.pathway_seed is None for one in model.layers)


def test_the_dense_steps_have_the_low_rate():
    moved = []
    for factor in (1e-6, 1.0):
        with seeded(0):
            model = Classifier()
        states = []
        SubsampledTraining(model, 4, 0.5, epochs=2, batch_size=12, lr=1e-2, finetune_lr_factor=factor).fit(
            *training_data(torch.Generator().manual_seed(0)),
            progress=lambda epoch, model=model, states=states: states.append(model.head.weight.detach().clone()),
        )
        moved.append((states[1] - states[0]).abs().max().item())
    assert moved[0] < 1e-6 < 1e-3 < moved[1]


# Cost.


@pytest.mark.parametrize("sparsity", [4, 8])
def test_work_falls_by_s(sparsity):
    x = torch.zeros(1, 512, 16)
    q, k, v = projected(SubsampledAttention(16, 2), x)
    costs = []
    for s in (1, sparsity):
        module = SubsampledAttention(16, 2, s, causal=True)
        counted = multiply_accumulates(lambda module=module: module.attend(q, k, v, None, True, False))
        with FlopCounterMode(display=False) as flops:
            module.attend(q, k, v, None, True, False)
        assert flops.get_total_flops() == 2 * counted
        costs.append(counted)
    assert costs[0] == 2 * 512 * 512 * 16
    assert costs[0] == sparsity * costs[1]
    masked = SubsampledAttention(16, 2, sparsity, implementation="mask")
    assert multiply_accumulates(lambda: masked.attend(q, k, v, None, False, False)) == costs[0]  # no saving


@pytest.mark.parametrize(("sparsity", "least"), [(4, 3.8), (8, 7.0)])
def test_memory_falls_nearly_by_s(sparsity, least):
    # Gathered heads and the own sources' scores are held beside the N²/s scores.
    peaks = []
    for s in (1, sparsity):
        module = SubsampledAttention(16, 2, s, causal=True)
        q, k, v = (torch.zeros(1, 2, 1024, 8, requires_grad=True) for _ in range(3))
        with TensorMemory() as memory:
            module.attend(q, k, v, None, True, False)[0].sum().backward()
        peaks.append(memory.peak)
    assert least < peaks[0] / peaks[1] < sparsity * 1.3


def test_it_compiles_in_training_and_draws_anew():
    module, x = SubsampledAttention(8, 2, 3, "local", causal=True), normal(2, 12, 8).float()
    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with plain_signatures():
        outputs = []
        for seed, forward in ((0, module), (0, compiled), (1, compiled)):
            with seeded(seed):
                outputs.append(forward(x, x, x, need_weights=False)[0])
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])


def test_it_works_under_autocast():
    module, x = SubsampledAttention(8, 2), torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    module.pathway_seed = 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x, x, x, need_weights=False)[0]
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(x, x, x, need_weights=False)[0], rtol=0, atol=0.05)


@pytest.mark.parametrize("bias", ["none", "local"])
def test_subsets_are_drawn_whatever_the_default_device(bias):
    model, x = Classifier(bias=bias).double().train(), normal(2, 8, 8)

    def trained():
        with seeded(0):
            return model(x)

    expected, members = trained(), SubEnsemble(model, 3)(x)
    with torch.device("meta"):  # where what is made without a device would be, without values
        assert torch.equal(trained(), expected)
        assert torch.equal(SubEnsemble(model, 3)(x), members)
