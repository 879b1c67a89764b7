"""Comparing layers: networks of one size, equal data order, and what each network costs beside its score."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
import torch
from compare.planted_layers import TASK, Bounded, Counting, Huge, Layer, Paired, Refuses, Wide, late

from provenn.claims.workers import Inline
from provenn.compare.kinds.nn import unfit
from provenn.compare.layer_task import FIGURES, count_parameters, matching_width
from provenn.compare.plotting import draw
from provenn.compare.ranking import rank
from provenn.compare.reporting import as_csv, cells, write
from provenn.compare.running import Comparison, run_comparison


def compared(*parts: str, trials: int = 0, seeds: int = 1):
    names = tuple(f"compare.planted_layers.{part}" for part in parts)
    comparison = Comparison("nn", "compare.planted_layers.TASK", names, trials, seeds)
    return comparison, run_comparison(comparison, Inline())


def test_every_network_gets_the_width_nearest_to_the_budget() -> None:
    assert TASK.fitting_width(Layer) == 33  # 99 of 100 weights; the multiples of 4 beside it have 96 and 108
    assert TASK.fitting_width(Wide) == 9  # 108; 8 has 88, 12 has 180
    assert TASK.fitting_width(Paired) == TASK.fitting_width(late) == 34  # 102, as 33 is refused
    with pytest.raises(ValueError, match="no width comes near 100 parameters: width 4 has 4000"):
        TASK.fitting_width(Huge)


@pytest.mark.parametrize("budget", [50, 333, 1000, 2999])
def test_bisection_finds_what_a_search_through_all_widths_finds(budget: int) -> None:
    def count(width: int) -> int:
        return 3 * width + width * width // 50

    best = min(range(4, 1025, 4), key=lambda width: abs(count(width) - budget))
    assert abs(count(matching_width(count, budget)) - budget) == abs(count(best) - budget)


def test_a_budget_that_only_a_far_width_meets_is_refused() -> None:
    with pytest.raises(ValueError, match="no width"):
        matching_width(lambda width: width, 10_000)
    with pytest.raises(ValueError, match="budget"):
        matching_width(lambda width: width, 0)


def test_a_run_trains_scores_and_weighs() -> None:
    _, (layer, wide) = compared("Layer", "Wide", trials=2, seeds=2)
    for result, parameters in ((layer, 99), (wide, 108)):
        assert result.failure is None
        assert [run.steps for run in result.runs] == [6, 6]
        figures = result.runs[0].figures
        assert set(figures) == set(FIGURES)
        assert figures["parameters"] == parameters
        assert figures["MACs a sample"] == 0  # elementwise work is none
        assert figures["ms a batch"] > 0
        assert figures["peak MiB a step"] > 0
    # The factor starts at 1 and must reach 2; tuning is scored on shifted targets.
    assert all(0 < run.score < 100 for run in layer.runs)
    assert all(score > 1000 for _, score in layer.tried)
    # A seed decides the order, not the part: both have one factor, moved alike by Adam.
    assert layer.runs[0].score != layer.runs[1].score


def test_weighing_leaves_the_network_that_trains_as_it_was(monkeypatch) -> None:
    from provenn.compare.kinds.nn import run

    made = []
    task = replace(TASK, build=lambda part, width: made.append(part(width)) or made[-1])
    monkeypatch.setattr(type(task), "fitting_width", lambda self, part: 4)
    list(run(task.setup(1, "cpu", tuning=False), Counting, {}))
    weighed, trained = made
    assert True in weighed.calls
    assert False in weighed.calls
    assert len(trained.calls) == 7  # six steps, and the score


def test_a_layer_with_constraints_is_projected_after_every_step() -> None:
    from provenn.compare.kinds.nn import run

    setup = TASK.setup(1, "cpu", tuning=False)
    factors = {}
    for part in (Layer, Bounded):
        score = next(event.value for event in run(setup, part, {"lr": 0.2}) if getattr(event, "name", "") == "score")
        # The error is (factor − 2)² times the mean square of the inputs.
        factors[part] = 2 - (score / setup.split.x_test.square().mean().item()) ** 0.5
    assert factors[Bounded] == pytest.approx(1.5)
    assert factors[Layer] > 1.6


@pytest.mark.parametrize("part", [Layer, Bounded])
def test_a_task_may_shorten_gradients_and_not_lengthen_them(part, monkeypatch) -> None:
    from provenn.compare.kinds.nn import run

    norms = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, closure=None: norms.append(_norm(self)))
    for clip in (None, 0.5, 1e6):
        list(run(replace(TASK, clip=clip).setup(1, "cpu", tuning=False), part, {}))
    free, short, long = norms[:6], norms[6:12], norms[12:]
    assert min(free) > 1
    assert short == pytest.approx([0.5] * 6, rel=1e-4)
    assert long == free


def _norm(optimizer: torch.optim.Optimizer) -> float:
    gradients = [one.grad for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item()


def test_sequence_tasks_shorten_gradients() -> None:
    from provenn.compare.tasks import etth1_forecasting, sequential_digits, spoken_digits

    assert all(one.TASK.clip == 1 for one in (etth1_forecasting, sequential_digits, spoken_digits))


def test_what_does_not_fit_says_why() -> None:
    assert unfit(TASK, Layer) is None
    assert unfit(TASK, Refuses) == "width must be planted"
    assert unfit(TASK, torch.nn.Bilinear) == "also asks for 'in2_features' and 'out_features'"
    assert unfit(TASK, torch.nn.Dropout) == "dropout probability has to be between 0 and 1, but got 16"


def test_figures_are_shown_written_and_drawn(tmp_path) -> None:
    comparison, results = compared("Layer", "Refuses")
    rows = rank(results, maximize=False)
    text = cells(rows, FIGURES)
    assert text[0][6] == "99"
    assert text[1][6:] == ("", "", "", "")
    read = list(csv.DictReader(io.StringIO(as_csv(rows, FIGURES))))
    assert float(read[0]["parameters"]) == 99
    assert read[1]["parameters"] == ""
    paths = write(comparison, rows, tmp_path)
    page, plain = (next(path for path in paths if path.suffix == suffix).read_text() for suffix in (".html", ".json"))
    assert "MACs a sample" in page
    assert "elementwise work are not counted" in page
    assert json.loads(plain)["ranking"][0]["runs"][0]["figures"]["parameters"] == 99
    assert draw(rows, "error", False, None, None, "t", FIGURES) != draw(rows, "error", False, None, None, "t")


def gathers(layer: torch.nn.Module, width: int) -> torch.Tensor:
    """By how much the first half of what a sequence layer gives changes where the second half of its inputs does."""
    x = torch.randn(2, 12, width, generator=torch.Generator().manual_seed(0))
    other = torch.cat((x[:, :6], x[:, 6:] + 1), 1)
    outputs = [layer(part) for part in (x, other)]
    first, second = (one[0] if isinstance(one, tuple) else one for one in outputs)
    return first[:, :6] - second[:, :6]


@pytest.mark.parametrize(
    "name",
    ["LSSL", "SeqBoatLayer", "PLSTM1d", "ElmanRNN", "PeepholeLSTM", "ICLRNN", "SigmoidAttention", "MultiHeadEMA"],
)
def test_sequence_parts_fit_the_sequence_tasks(name: str) -> None:
    import provenn.nn
    from provenn.compare.task import Split
    from provenn.compare.tasks import sequential_digits
    from provenn.compare.tasks._sequences import sequence_layer

    part = getattr(provenn.nn, name)
    made_up = Split(*[torch.randn(3, 20, 1), torch.arange(3)] * 3)
    width = replace(sequential_digits.TASK, data=lambda: made_up).fitting_width(part)
    torch.manual_seed(0)
    network = sequential_digits.build(part, width).eval()
    assert network(torch.randn(3, 20, 1)).shape == (3, 10)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(10_000, rel=0.2)
    assert gathers(sequence_layer(part, width).eval(), width).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["lstm", "gru", "attention"])
def test_sequence_references_see_the_past_alone_and_attention_its_places(name: str) -> None:
    from provenn.compare.tasks._sequences import REFERENCES

    torch.manual_seed(0)
    layer = REFERENCES[name](8).eval()
    assert gathers(layer, 8).abs().max() < 1e-5
    x = torch.ones(1, 5, 8)
    mixed = layer(x)
    mixed = mixed[0] if isinstance(mixed, tuple) else mixed
    assert (mixed[:, 1:] - mixed[:, :-1]).abs().max() > 1e-4


def test_what_is_cubic_in_the_length_is_left_out_of_the_sequence_tasks() -> None:
    from provenn.compare.tasks.sequential_digits import build
    from provenn.nn import KroneckerAttention

    with pytest.raises(ValueError, match="cubic"):
        build(KroneckerAttention, 8)


def test_small_images_are_classified_by_networks_of_one_size() -> None:
    import provenn.nn
    from provenn.compare.tasks.small_images import REFERENCES, TASK, build, data

    names = ("AFKANLayer", "QuadraticLinear", "QuadraticConv2d", "EvoNorm2d", "RBFKANLayer")
    parts = {**{name: getattr(provenn.nn, name) for name in names}, **REFERENCES}
    sizes = {}
    for name, part in parts.items():
        network = build(part, TASK.fitting_width(part))
        assert network(torch.rand(2, 1, 8, 8)).shape == (2, 10)
        sizes[name] = count_parameters(network)
        # Pairs of channels bind some to even widths, and a width more is a large part of some KANs.
        assert sizes[name] == pytest.approx(6000, rel=0.08)
    assert sizes["batch-norm"] == pytest.approx(sizes["EvoNorm2d"], rel=0.02)
    with pytest.raises(ValueError, match="as a norm, dropout probability"):
        build(torch.nn.Dropout, 4)
    split = data()
    assert len(split.x_train) == 4000
    assert not torch.equal(split.x_train[:1000], split.x_train[1000:2000])


@pytest.mark.parametrize("name", ["STFT", "MelSpectrogram", "MFCC", "Gammatonegram", "CQT1992v2", "CQT2010v2", "VQT"])
def test_front_ends_fit_the_task_of_sounds(name: str) -> None:
    import provenn.nn.audio
    from provenn.compare.tasks.audio_features import build

    network = build(getattr(provenn.nn.audio, name), 8).eval()
    assert network(torch.randn(2, 8000)).shape == (2, 10)
    assert network(torch.zeros(2, 8000)).isfinite().all()


def test_what_spoken_digits_are_scaled_by_does_not_hear_the_clips_to_judge_by(monkeypatch) -> None:
    from types import SimpleNamespace

    import numpy as np

    from provenn.compare.tasks import spoken_digits

    take = np.arange(18)
    clips = np.random.default_rng(0).normal(size=(18, 8000)).astype(np.float32)
    splits = []
    for loudness in (1.0, 50.0):
        heard = np.where(take[:, None] < 10, loudness * clips, clips)
        sounds = SimpleNamespace(sample_rate=8000, y=take % 10, take=take, padded=lambda length, x=heard: x)
        monkeypatch.setattr(spoken_digits, "load", lambda name, sounds=sounds: sounds)
        splits.append(spoken_digits.data.__wrapped__())
    assert len(splits[0].x_train) == 8
    assert splits[0].x_train.std().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(splits[0].x_train, splits[1].x_train)


def test_forecasts_begin_at_the_last_value() -> None:
    from provenn.compare.tasks.etth1_forecasting import LastValue, _windows, build

    torch.manual_seed(0)
    network = build(LastValue, 8).eval()
    x = torch.randn(2, 96, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(x + 5), network(x) + 5)
    series = torch.arange(200.0)[:, None].expand(-1, 7)
    past, ahead = _windows(series)
    assert past.shape == (21, 96, 7)
    assert (ahead[:, 0] - past[:, -1] == 1).all()
    assert past[1, 0, 0] == 4


class GRU(torch.nn.Module):
    """A user's layer, named as one of this package that is made in another way; called with a width alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(x).cumsum(1)


class Shrinks(GRU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(x)[:, :1]


def test_a_users_layer_of_sequences_is_made_by_its_width_whatever_its_name() -> None:
    from provenn.compare.tasks._sequences import sequence_layer
    from provenn.compare.tasks.sequential_digits import build

    assert isinstance(sequence_layer(GRU, 8), GRU)
    assert build(GRU, 8)(torch.randn(3, 20, 1)).shape == (3, 10)
    with pytest.raises(ValueError, match=r"gives \(3, 1, 8\) for a sequence \(3, 20, 8\)"):
        build(Shrinks, 8)(torch.randn(3, 20, 1))


@pytest.mark.parametrize("part", [torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU])
def test_torchs_recurrent_layers_mix_steps_and_not_samples(part) -> None:
    from provenn.compare.tasks.sequential_digits import build

    torch.manual_seed(0)
    network = build(part, 8)
    x = torch.randn(3, 20, 1)
    torch.testing.assert_close(network(x)[:1], network(x[:1]))
    assert not torch.allclose(network(x), network(x.flip(1)), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("LSSLModel", "its layer LSSL fits"),
        ("ICLRNNCell", "is one step"),
        ("StructuredTransition", "a piece of LSSL"),
        ("InvariantMDS", "points without an order"),
        ("PLSTM2d", "a layer of grids"),
    ],
)
def test_what_is_no_layer_of_sequences_says_what_it_is(name: str, why: str) -> None:
    import provenn.nn
    from provenn.compare.tasks.sequential_digits import build

    with pytest.raises(ValueError, match=why):
        build(getattr(provenn.nn, name), 16)


class MyConv(torch.nn.Conv2d):
    pass


class MyDense(torch.nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)


class MyNorm(torch.nn.InstanceNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True)


@pytest.mark.parametrize(("part", "place"), [(MyConv, "_convolving"), (MyDense, "_linear"), (MyNorm, "_normalising")])
def test_a_users_layer_of_images_stands_where_it_can_be_called(part, place: str) -> None:
    from provenn.compare.tasks import small_images

    network = small_images.build(part, 8)
    assert any(isinstance(one, part) for one in network.modules())
    same = getattr(small_images, place)(part, 8)
    assert [type(one) for one in network.modules()] == [type(one) for one in same.modules()]
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("name", ["CosineHead", "EBVHead", "SimplexETFHead", "PLSTM2d", "TrActLinear", "TrActConv2d"])
def test_heads_grids_and_layers_of_other_areas_have_a_place_in_small_images(name: str) -> None:
    import provenn.nn
    import provenn.optim
    from provenn.compare.tasks.small_images import TASK, build

    part = getattr(provenn.optim if name.startswith("TrAct") else provenn.nn, name)
    network = build(part, TASK.fitting_width(part))
    assert sum(isinstance(one, part) for one in network.modules()) == (1 if name.endswith("Head") else 2)
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_scattering_is_a_front_end_that_is_blind_to_the_sign_and_hears_the_pitch() -> None:
    from provenn.compare.tasks.audio_features import Scattering
    from provenn.nn import GeneralizedScattering

    front = Scattering(GeneralizedScattering)
    time = torch.arange(8000) / 8000
    x = torch.stack([torch.sin(2 * torch.pi * pitch * time) for pitch in (500.0, 2000.0)])
    bands = front(x)
    assert bands.shape == (2, 40, 64)
    torch.testing.assert_close(bands, front(-x), atol=1e-4, rtol=1e-4)
    # The shifts are 100 Hz apart, and the first, at zero, is the low-pass.
    assert bands.mean(2).argmax(1).tolist() == [4, 19]


class NotBands(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_what_is_no_front_end_says_what_it_gives() -> None:
    from provenn.compare.tasks.audio_features import build

    with pytest.raises(ValueError, match=r"gives \(1, 8000\) for a clip \(1, 8000\), not \(1, bands, frames\)"):
        build(NotBands, 8)


def test_the_costs_have_a_table_of_their_own_on_the_terminal() -> None:
    from rich.console import Console

    from provenn.compare.reporting import figures_table, table

    comparison, results = compared("Layer", "Fades")
    rows = rank(results, maximize=False)
    console = Console(width=120, file=io.StringIO())
    console.print(figures_table(comparison, rows))
    shown = console.file.getvalue()
    assert all(name in shown for name in FIGURES)
    assert "99" in shown
    assert f"of {TASK.batch_size} samples in evaluation mode" in " ".join(shown.split())
    assert "Fades" not in shown
    assert len(table(comparison, rows).columns) == 6


class Scaled(torch.nn.Module):
    """Magnitudes in a unit of their own."""

    def __init__(self, unit: float = 1.0) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs().unflatten(1, (20, 400)) / self.unit


def test_the_unit_of_a_front_end_changes_nothing() -> None:
    from provenn.compare.tasks.audio_features import AudioNetwork

    networks = []
    for unit in (1.0, 1e-4, 300.0):
        torch.manual_seed(0)
        networks.append(AudioNetwork(Scaled(unit), 8).eval())
    x = 0.1 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    first, *others = (network(x) for network in networks)
    for other in others:
        torch.testing.assert_close(other, first)
    # Ten times as loud a noise as the faint one is far into the logarithm.
    assert networks[0].unit == pytest.approx(0.008, rel=0.05)
