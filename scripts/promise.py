"""Draws the README's figure: one variant, trained, served and compressed.

    python -m scripts.promise --run-dir runs/demo --json docs/results/promise.json     # measures, then draws
    python -m scripts.promise --draw                                                   # draws the stored report

The run is that of the demo (RCMHA, `make demo` or `make train`). Served: the engine continues prompts greedily, and the
parallel form that was trained computes the log probabilities of the same tokens. Compressed: half of each block of
validation text is read and compressed, and the other half is forced token by token. A policy that keeps everything must
give exactly the exact cache's results.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.checkpoint import load_model, load_tokenizer
from attnzoo.figures import panels, save
from attnzoo.files import output_file
from attnzoo.kvcache import build_cache
from attnzoo.models import DecoderLM
from attnzoo.models.decoder_lm import DecoderState
from attnzoo.report import Claim, Report
from attnzoo.tokenizer import Tokenizer
from scripts.ngram_baseline import texts
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import SamplingParams
from train.data.tokens import bits_per_byte
from train.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
STORED, FIGURE = ROOT / "docs" / "results" / "promise.json", ROOT / "docs" / "promise.png"
BLOCKS, SHOWN, ROUNDING = 24, 256, 1e-4
POLICIES = ("d2o", "streaming", "d2o+think")
RATIOS = (1.0, 0.7, 0.5, 0.35, 0.25)


def training_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Rows with the bits per byte of the run by step."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    bytes_per_token = summary["rows"][0]["train_bytes_per_token"]
    records = [
        r for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] in ("train", "eval") and r["loss"] is not None
    ]
    return [
        {
            "table": "trained",
            "kind": {"train": "training", "eval": "validation"}[r["kind"]],
            "step": r["step"],
            "bits per byte": round(r.get("bits_per_byte") or bits_per_byte(r["loss"], bytes_per_token), 4),
        }
        for r in records
        if r["kind"] == "eval" or r["step"] % 4 == 0
    ]


def validation_blocks(run_dir: Path, tokenizer: Tokenizer, length: int) -> tuple[Tensor, float]:
    """(`BLOCKS` blocks of `length` validation tokens, spread evenly; bytes per token of the validation text)."""
    _, validation = texts(str(run_dir / "config.yaml"))
    tokens = torch.tensor(tokenizer.encode(validation.decode("utf-8", "ignore")))
    starts = torch.linspace(0, len(tokens) - length, BLOCKS).long()
    return torch.stack([tokens[start : start + length] for start in starts]), len(validation) / len(tokens)


def logprobs(model: DecoderLM, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    """Log probabilities of the targets, [B, T]."""
    return model.logits(hidden_BTD).log_softmax(-1).gather(-1, targets_BT[..., None])[..., 0]


def served_rows(checkpoint: Path, model: DecoderLM, blocks_BT: Tensor) -> tuple[list[dict[str, Any]], float]:
    """(rows with served and parallel log probabilities of the engine's tokens, their largest difference)."""
    half = blocks_BT.shape[1] // 2
    engine = Engine(EngineConfig(checkpoint=str(checkpoint), max_num_seqs=8, pack_weights=False))
    params = SamplingParams(max_tokens=half, temperature=0.0, logprobs=0, ignore_eos=True)
    rows, worst = [], 0.0
    for prompt, done in zip(
        blocks_BT[:, :half].tolist(), engine.generate(blocks_BT[:, :half].tolist(), params), strict=True
    ):
        served = torch.tensor([entry.logprob for entry in done.logprobs or ()])
        whole = torch.tensor([[*prompt, *(entry.token for entry in done.logprobs or ())]])
        parallel = logprobs(model, model.hidden(whole[:, :-1]), whole[:, 1:])[0, half - 1 :]
        worst = max(worst, float((served - parallel).abs().max()))
        rows += [
            {"table": "served", "parallel": round(p, 5), "served": round(s, 5)}
            for p, s in zip(parallel.tolist(), served.tolist(), strict=True)
        ]
    return rows[:: max(1, len(rows) // SHOWN)], worst


def forced(model: DecoderLM, blocks_BT: Tensor, policy: str | None, options: dict[str, Any]) -> tuple[Tensor, int]:
    """(log probabilities of the blocks' second halves, largest state of one sequence after its prompt in bytes)."""
    half, length = blocks_BT.shape[1] // 2, blocks_BT.shape[1]
    cache = None if policy is None else build_cache(policy, options)

    def read(prompts_BT: Tensor) -> tuple[Tensor, DecoderState]:
        room = length if cache is None else half
        hidden_BTD, state = model.extend_hidden(prompts_BT, model.init_state(len(prompts_BT), room, cache=cache))
        return hidden_BTD[:, -1:], state if cache is None else model.compress(state)

    nbytes = max(read(block_1T)[1].nbytes() for block_1T in blocks_BT[:, :half].split(1))
    last_B1D, state = read(blocks_BT[:, :half])
    hidden = [last_B1D]
    for at in range(half, length - 1):
        last_B1D, state = model.extend_hidden(blocks_BT[:, at : at + 1], state)
        hidden.append(last_B1D)
    return logprobs(model, torch.cat(hidden, 1), blocks_BT[:, half:]), nbytes


def compressed_rows(model: DecoderLM, blocks_BT: Tensor, bytes_per_token: float) -> tuple[list[dict[str, Any]], float]:
    """(rows with bits per byte of each policy and ratio, largest difference of a policy that keeps everything)."""
    exact, _ = forced(model, blocks_BT, None, {})
    rows, worst = [], 0.0
    for policy in POLICIES:
        for ratio in RATIOS:
            options = {"keep_ratio": ratio, "min_tokens": 0, **({"channel_ratio": ratio} if "think" in policy else {})}
            values, nbytes = forced(model, blocks_BT, policy, options)
            if ratio == 1.0:
                worst = max(worst, float((values - exact).abs().max()))
            bits = bits_per_byte(-float(values.double().mean()), bytes_per_token)
            rows.append(
                {
                    "table": "compressed",
                    "policy": policy,
                    "ratio": ratio,
                    "bytes": nbytes,
                    "bits per byte": round(bits, 4),
                }
            )
    return rows, worst


@torch.inference_mode()
def measure(run_dir: Path) -> Report:
    """Measures all three parts on a run of the demo."""
    torch.set_num_threads(1)
    report = Report.start()
    checkpoint = run_dir / "export"
    model, tokenizer = load_model(checkpoint).eval(), load_tokenizer(checkpoint)
    blocks_BT, bytes_per_token = validation_blocks(run_dir, tokenizer, model.config.max_positions)
    report.rows += training_rows(run_dir)
    served, difference = served_rows(checkpoint, model, blocks_BT)
    compressed, lost = compressed_rows(model, blocks_BT, bytes_per_token)
    report.rows += [*served, *compressed]
    report.claims += [
        Claim(
            name="served against parallel, largest difference of log probabilities",
            expected=0.0,
            measured=difference,
            tolerance=ROUNDING,
        ),
        Claim(name="keeping everything against the exact cache, largest difference", expected=0.0, measured=lost),
    ]
    return report


def draw(report: dict[str, Any], path: Path) -> Path:
    """Draws the three panels of a stored report; returns the path."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        tables.setdefault(row["table"], []).append(row)
    figure, ((trained, served, compressed),) = panels(1, 3, width=4.2, height=3.4)
    for kind, style in (("training", "-"), ("validation", "o-")):
        rows = [row for row in tables["trained"] if row["kind"] == kind]
        trained.plot(
            [r["step"] for r in rows], [r["bits per byte"] for r in rows], style, label=kind, linewidth=1, markersize=3
        )
    trained.set(title="trained (parallel form)", xlabel="step", ylabel="bits per byte")
    trained.legend()
    worst = report["claims"][0]["measured"]
    ends = [min(row["parallel"] for row in tables["served"]), 0.0]
    served.plot(ends, ends, color="gray", linewidth=1)
    served.scatter([r["parallel"] for r in tables["served"]], [r["served"] for r in tables["served"]], s=8)
    served.set(
        title=f"served: largest difference {worst:.1e}",
        xlabel="log probability, parallel form",
        ylabel="log probability, served",
    )
    for policy in POLICIES:
        rows = [row for row in tables["compressed"] if row["policy"] == policy]
        compressed.plot(
            [r["bytes"] / 1024 for r in rows],
            [r["bits per byte"] for r in rows],
            "o-",
            label=policy,
            linewidth=1,
            markersize=3,
        )
    compressed.set(
        title="compressed: exact when all is kept", xlabel="KiB of state after the prompt", ylabel="bits per byte"
    )
    compressed.legend()
    figure.suptitle("One variant, written once: RCMHA")
    return save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    """Measures and draws; exit status 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="a finished run (default: %(default)s)")
    parser.add_argument("--json", default=STORED, help="the report (default: docs/results/promise.json)")
    parser.add_argument("--draw", action="store_true", help="only draw the stored report")
    chosen = parser.parse_args(arguments)
    status, stored = 0, Path(chosen.json)
    if not chosen.draw:
        stored = output_file(chosen.json, "--json")
        report = measure(chosen.run_dir)
        report.figures.append("docs/promise.png")
        report.write(stored)
        status = report.exit_status()
    print(draw(json.loads(stored.read_text(encoding="utf-8")), FIGURE))
    return status


if __name__ == "__main__":
    sys.exit(main())
