"""Experiment A: its parts, claims and figures."""

import math
from functools import partial
from pathlib import Path

from train.experiments.base import Experiment, ExperimentConfig, ExperimentPart, Judgement, Values
from train.experiments.figures import draw_iterations, draw_pairs, draw_shifts, draw_training
from train.experiments.icl_deep import induction, sine
from train.experiments.icl_gd import one_layer, softmax_heads, two_layers

SINE_STARTS = ("sine, trained", "sine, trained again")
"""Two random initialisations: some end in a local minimum with twice the loss, depending on rounding."""


def parts(config: ExperimentConfig) -> dict[str, ExperimentPart]:
    """The parts; for another variant only those of the claims about a layer as a black box."""
    found = {
        "one layer": ExperimentPart(one_layer, config.steps(2000)),
        "two layers": ExperimentPart(two_layers, config.steps(4000)),
    }
    if config.variant is None:
        found |= {
            "softmax, 1 head": ExperimentPart(partial(softmax_heads, heads=1), config.steps(3000)),
            "softmax, 2 heads": ExperimentPart(partial(softmax_heads, heads=2), config.steps(3000)),
            **{name: ExperimentPart(partial(sine, start=n), config.steps(2500)) for n, name in enumerate(SINE_STARTS)},
            "sine, constructed": ExperimentPart(partial(sine, constructed=True), config.steps(2500)),
            "pairs": ExperimentPart(induction, config.steps(1500)),
        }
    return found


def worst(ratios: list[float]) -> float:
    """The ratio farthest from 1; NaN if any ratio is not finite, so that a diverged run does not pass."""
    if any(not math.isfinite(ratio) for ratio in ratios):
        return math.nan
    return max(ratios, key=lambda ratio: abs(ratio - 1))


def judge(config: ExperimentConfig, values: dict[str, Values]) -> Judgement:
    """The claims A1 to A8; for another variant only A1, A3, A4 and A5."""
    out, one = Judgement(), values["one layer"]
    out.add("A1 loss of one trained layer / one step", 1.0, one["loss"] / one["gd"], 0.01)
    out.add("A1 loss of one step / closed form", 1.0, one["gd"] / one["optimum"], 0.05)
    out.add("A1 cosine of sensitivities", 0.99, one["cosine"], 0.0, "at_least")
    out.add("A1 mean difference of predictions", 0.05, one["difference"], 0.0, "at_most")
    if "mixed" in one:
        out.add("A1 last entry of W_VP times the scale of W_QK / -a*", 1.0, -one["learned_rate"] / one["rate"], 0.02)
        out.add("A1 zoo's layer against the Gram form, largest difference", 0.0, one["zoo_difference"], 1e-3)
        largest = max(one["mixed"]) / max(one["mixed"][0], one["mixed"][-1])
        out.add("A2 worst interpolated loss / the worse end", 1.0, largest, 0.0, "at_most")
    for what, tolerance in (("x range", 0.05), ("w scale", 0.01)):
        ratios = [row["trained / gd"] for row in one["shifts"] if row["tasks"].startswith(what)]
        out.add(f"A3 {what}: worst loss / one step", 1.0, worst(ratios), tolerance)
    ratios = [row["trained / gd"] for row in one["applied"]]
    out.add("A4 worst loss / damped descent, 1 to 50 applications", 1.0, worst(ratios), 0.03)
    out.table("A: out of distribution", one["shifts"])
    out.table("A: applied again and again", one["applied"])
    _judge_two_layers(out, values["two layers"])
    if config.variant is None:
        _judge_others(out, values)
    return out


def _judge_two_layers(out: Judgement, two: Values) -> None:
    out.add("A5 two recurrent layers / GD++", 1.0, two["loss"] / two["gd++"]["loss"], 0.01)
    out.add("A5 two recurrent layers / two steps of GD", 0.75, two["loss"] / two["gd"]["loss"], 0.0, "at_most")
    out.add("A5 cosine to GD++", 0.99, two["gd++"]["cosine"], 0.0, "at_least")
    out.add("A5 cosine to GD less cosine to GD++", 0.0, two["gd"]["cosine"] - two["gd++"]["cosine"], 0.0, "at_most")
    out.table(
        "A: two recurrent layers",
        [
            {"what": "two layers", "loss": two["loss"]},
            *({"what": name, "loss": two[name]["loss"], "cosine": two[name]["cosine"]} for name in ("gd", "gd++")),
        ],
    )


def _judge_others(out: Judgement, values: dict[str, Values]) -> None:
    gd, heads = values["one layer"]["gd"], [values[f"softmax, {n} head{'s' * (n > 1)}"]["loss"] for n in (1, 2)]
    out.add("A6 one softmax head / one step: fails", 1.150 / 0.8157, heads[0] / gd, 0.05)
    out.add("A6 two softmax heads / one step: near", 0.852 / 0.8157, heads[1] / gd, 0.02)
    starts, built = [values[name]["loss"] for name in SINE_STARTS], values["sine, constructed"]
    out.add("A7 sine: MLP and trained layer / MLP and constructed layer", 1.0, min(starts) / built["loss"], 0.1)
    out.add("A7 sine: constructed / predicting 0", 0.2, built["loss"] / built["null"], 0.0, "at_most")
    pairs = values["pairs"]
    out.add("A8 two layers on x, y tokens / one step", 1.0, pairs["loss"] / pairs["gd"], 0.02, "at_most")
    last = pairs["probes"][-1]
    out.add("A8 sensitivity of layer 1: next token over others", 5.0, last["next"] / last["others"], 0.0, "at_least")
    out.add("A8 sensitivity of layer 1: own token over others", 5.0, last["own"] / last["others"], 0.0, "at_least")
    first = pairs["probes"][0]
    out.add(
        "A8 sensitivity to the next token, at the end over the start",
        5.0,
        last["next"] / first["next"],
        0.0,
        "at_least",
    )
    out.table(
        "A: softmax, sine, pairs",
        [
            {"what": "one softmax head", "loss": heads[0], "compared with": gd},
            {"what": "two softmax heads", "loss": heads[1], "compared with": gd},
            *(
                {"what": f"sine, trained against constructed layer, start {n + 1}", "loss": loss}
                | {"compared with": built["loss"]}
                for n, loss in enumerate(starts)
            ),
            {"what": "x and y as tokens, two layers", "loss": pairs["loss"], "compared with": pairs["gd"]},
        ],
    )


def draw(values: dict[str, Values], directory: Path) -> list[Path]:
    """Draws training and interpolation, other distributions, iterations, and pairs."""
    files = [draw_training(values, directory), draw_shifts(values, directory), draw_iterations(values, directory)]
    return [*files, draw_pairs(values, directory)] if "pairs" in values else files


EXPERIMENT = Experiment("icl-gd", "A", "Transformers learn in-context by gradient descent", parts, judge, draw)
