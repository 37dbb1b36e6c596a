"""Another library's caches beside ours: the same tokens, its answers, its scores, and its failures."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from attnzoo.kvcache import build_cache
from attnzoo.tasks.text import text_example
from scripts.arguments import KVPRESS as PEER
from scripts.bench_cache import PEER as SCRIPT
from scripts.bench_cache import main
from scripts.caches.models import prose, random_reader
from scripts.caches.peer import PRESSES, Exchange, PeerError, peer_logits, run_peer, work_items
from scripts.caches.peer_scores import agreement, compare_scores
from scripts.caches.protocol import forced_logits
from scripts.caches.quality import longest_prompt
from scripts.caches.retrieval import make_batches
from scripts.caches.table import peer_claim

ECHO = """
import json, sys
work = json.load(open(sys.argv[1]))
right = [[index % 2 == 0 for index in range(len(item["spans"]))] for item in work["items"]]
found = {"right": right, "nbytes": [len(item["prompt"]) for item in work["items"]]}
json.dump({press: found for press in work["presses"]}, open(sys.argv[2], "w"))
"""


def test_the_peer_gets_the_same_tokens_and_its_answers_find_their_conditions(tmp_path):
    reader = random_reader()
    batches = make_batches(lambda task, seed: text_example(reader.encode, task, 300, seed), ["recall"], 2, 2, 2)
    script = tmp_path / "echo.py"
    script.write_text(ECHO, encoding="utf-8")
    scores = run_peer(Exchange(Path(sys.executable), script, tmp_path), batches, 0.25)
    assert set(scores) == set(PRESSES)
    score = scores["SnapKVPress"]
    assert score.accuracy(condition="inside") == score.accuracy(condition="outside") == 1.0
    assert score.accuracy(condition="second") == 0.0
    work = json.loads((tmp_path / "work.json").read_text(encoding="utf-8"))
    assert work["ratio"] == 0.75
    assert len(work["items"]) == 8
    for item in work_items([batches["recall", 0][0][0]]):
        first, second = batches["recall", 0][0][0].questions[:2]
        answers = [item["forced"][start:end] for start, end in item["spans"]]
        assert answers[0] == list(first.answer)
        assert answers[1:] in ([], [list(second.answer)])


def test_a_peer_that_fails_says_why(tmp_path):
    reader = random_reader()
    batches = make_batches(lambda task, seed: text_example(reader.encode, task, 300, seed), ["recall"], 1, 1, 1)
    script = tmp_path / "fails.py"
    script.write_text("import no_such_package_of_anyone", encoding="utf-8")
    with pytest.raises(PeerError, match="No module named 'no_such_package_of_anyone'"):
        run_peer(Exchange(Path(sys.executable), script, tmp_path), batches, 0.5)
    with pytest.raises(PeerError, match="cannot be run"):
        run_peer(Exchange(tmp_path / "nothing", script, tmp_path), batches, 0.5)


@pytest.mark.heavy
def test_a_peer_that_fails_does_not_lose_what_was_measured(tmp_path, capsys):
    report = tmp_path / "report.json"
    nothing = tmp_path / "python"
    options = ["--quick", "--sections", "text", "--run-dir", str(tmp_path / "run"), "--json", str(report)]
    assert main([*options, "--kvpress-python", str(nothing)]) == 1
    assert "kvpress is left out" in capsys.readouterr().err
    content = json.loads(report.read_text(encoding="utf-8"))
    assert {"text", "fidelity"} <= {row["table"] for row in content["rows"]}
    assert content["command"][-2:] == ["--kvpress-python", "ENVIRONMENT/bin/python"]


@pytest.mark.slow
@pytest.mark.skipif(PEER not in os.environ, reason=f"{PEER} names no Python of an environment with kvpress")
def test_kvpress_scores_and_answers_as_we_do(tmp_path):
    """Channels in ThinKPress's order, tokens with SnapKVPress's scores; nothing dropped, and answers are ours."""
    reader = random_reader()
    exchange = Exchange(Path(os.environ[PEER]), SCRIPT, tmp_path)
    exchange.export(reader.model)
    batches = make_batches(lambda task, seed: text_example(reader.encode, task, 300, seed), ["recall"], 1, 3, 3)
    found = compare_scores(exchange, longest_prompt(batches))
    assert found.channels == found.same_rank == 64
    assert found.difference < 1e-6
    texts_NT = prose(reader.encode, 2, 60)
    full_NTV = forced_logits(reader.model, texts_NT, 40, build_cache("full"))
    for press, logits_NTV in peer_logits(exchange, texts_NT, 40, 1.0).items():
        torch.testing.assert_close(logits_NTV, full_NTV, msg=press)


def test_the_peer_claim_needs_the_mean_of_the_best_press():
    assert peer_claim("text", 0.5, "SnapKVPress", 0.5).holds
    assert not peer_claim("text", 0.5, "SnapKVPress", 0.51).holds


def test_scores_agree_when_they_are_the_same_up_to_a_factor():
    """Queries of 4 heads on 2 kv heads, scored here as kvpress documents it: means over window, group and keys."""
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 4, 32, 8), torch.randn(1, 2, 41, 8)
    think = queries.square().mean(2).view(1, 2, 2, 8).mean(2) * keys.square().mean(2)
    at = torch.arange(41)
    logits = queries @ keys.repeat_interleave(2, dim=1).mT / 8**0.5
    shares = logits.masked_fill(at > at[9:, None], -torch.inf).softmax(-1)[..., :9]
    pooled = F.avg_pool1d(shares.mean(2), 5, stride=1, padding=2).view(1, 2, 2, 9).mean(2)
    rank = think.argsort(-1).argsort(-1)
    found = {"queries.0": queries, "keys.0": keys, "rank.0": rank, "snapkv.0": pooled}
    same = agreement(found)
    assert (same.channels, same.same_rank, same.tokens) == (16, 16, 18)
    assert same.difference < 1e-6
    other = agreement({**found, "rank.0": rank.flip(-1), "snapkv.0": pooled.flip(-1)})
    assert other.same_rank < 16
    assert other.difference > 0.01
