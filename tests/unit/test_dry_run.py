"""`--dry-run` and the run itself refuse the same, before anything is prepared."""

from pathlib import Path

import pytest
import torch

from attnzoo.attention import ATTENTION
from attnzoo.checkpoint import save_model
from attnzoo.models import DecoderConfig, DecoderLM
from tests.helpers.clinical_files import write_stays
from tests.helpers.plain_modules import Mine, registered, variant_of
from tests.helpers.training import write_tiny
from train.data import DataConfig
from train.digests import digest_files, write_digests
from train.main import main
from train.run_directory import locked
from train.tokenizer import TokenizerConfig, ensure_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("dry"))


@pytest.fixture(scope="module")
def exported(tiny: Path) -> Path:
    """An export with another width."""
    from attnzoo.tokenizer import load_tokenizer

    path = ensure_tokenizer(
        TokenizerConfig(vocab_size=300), DataConfig(source=str(tiny.parent / "corpus.txt")), tiny.parent
    )
    torch.manual_seed(0)
    model = DecoderLM(
        DecoderConfig(vocab_size=300, model_dim=12, num_layers=1, attention={"kind": "mha", "num_heads": 2})
    )
    save_model(tiny.parent / "export", model, tokenizer=load_tokenizer(path))
    return tiny.parent / "export"


REFUSED = [
    (["data.sequence_length=17"], "data.sequence_length=17 is longer than model.max_positions=16"),
    (["data.source=nowhere.txt"], "data.source='nowhere.txt' does not exist"),
    (["data.source={dir}/tiny.yaml"], "unknown kind of file '.yaml'"),
    (["data.source={dir}/empty"], "holds no file of a known kind"),
    (["tokenizer.path=nowhere.model"], "nowhere.model"),
    (["tokenizer.path=~no_such_user/x"], "tokenizer.path='~no_such_user/x': there is no user '~no_such_user'"),
    (["data.source=~no_such_user/x"], "data.source='~no_such_user/x': there is no user"),
    (["checkpoint.resume=~no_such_user/x"], "checkpoint.resume='~no_such_user/x': there is no user"),
    (["checkpoint.init_from=~no_such_user/x"], "checkpoint='~no_such_user/x': there is no user"),
    (["checkpoint.init_from={dir}/nowhere"], "nowhere"),
    (["checkpoint.init_from={dir}/nowhere", "checkpoint.adopt_model=true"], "nowhere"),
    (["checkpoint.init_from={dir}/export"], "has model.model_dim=12 and this run has 24"),
    (["model.attention_impl=triton"], "impl='triton' on a CPU"),
    (["data.source=retrieval"], "data.sequence_length=16 is too short for data.source='retrieval'"),
    (
        [
            "checkpoint.init_from={dir}/export",
            "checkpoint.adopt_model=true",
            "lora.rank=2",
            "optim.name=adamw",
            "lora.targets=[querry]",
        ],
        "lora.targets: 'querry' is no linear map of this model",
    ),
    (["train.batch_size=7"], "train.batch_size=7 is not a multiple"),
    (["data.source='hub:'"], "data.source='hub:' names no dataset"),
    (["checkpoint.resume=/nope"], "checkpoint.resume=/nope: not auto, never, a checkpoint or a run directory"),
    (["checkpoint.resume=/nope", "checkpoint.fallback=true"], "checkpoint.resume=/nope: not auto"),
    (["run_dir=/dev/null"], "run_dir=/dev/null cannot be used as a directory"),
    (["run_dir=/dev/null/below"], "run_dir=/dev/null/below cannot be used as a directory"),
    (["run_dir={dir}/corpus.txt"], "corpus.txt cannot be used as a directory"),
    (["cache_dir=" + 300 * "x"], "cannot be used as a directory"),
    (["cache_dir=/dev/null"], "cache_dir=/dev/null cannot be used as a directory"),
    (["run_dir=/proc/none"], "run_dir=/proc/none cannot be used as a directory"),
    (["cache_dir=/proc/none/x", "run_dir={dir}/new"], "cache_dir=/proc/none/x cannot be used as a directory"),
    (["name=a b"], "name='a b' must be the name of a directory"),
    (["name="], "command line: name= has no value; write name=null for none"),
    (["cache_dir={dir}/corpus.txt/a/b"], "corpus.txt/a/b cannot be used as a directory"),
]


@pytest.mark.parametrize(("overrides", "expected"), REFUSED)
@pytest.mark.parametrize("dry", [True, False])
def test_both_refuse(
    tiny: Path,
    exported: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    expected: str,
    dry: bool,
) -> None:
    directory = exported.parent
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (directory / "empty").mkdir(exist_ok=True)
    given = [text.format(dir=directory) for text in overrides]
    before = sorted(path for path in directory.rglob("*"))
    assert main(["--config", str(tiny), *(["--dry-run"] if dry else []), *given]) == 2
    found = capfd.readouterr()
    assert found.err.startswith("train: ")
    assert found.err.count("\n") == 1
    assert expected in found.err
    assert sorted(path for path in directory.rglob("*")) == before, "something was prepared"


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (
            torch.ones(2, dtype=torch.complex64),
            "has dtype torch.complex64, which cannot be saved; keep it as real numbers",
        ),
        (torch.eye(2).to_sparse(), "has layout torch.sparse_coo, which cannot be saved; keep it as a dense tensor"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_variant_that_cannot_be_saved_is_refused_before_it_trains(
    tiny: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tensor: torch.Tensor,
    expected: str,
    dry: bool,
) -> None:
    class Unsaveable(ATTENTION.get("mha")):  # type: ignore[misc]
        """A buffer that no checkpoint holds, as a plug-in may have one."""

        def __init__(self, config: object) -> None:
            super().__init__(config)
            self.register_buffer("kept", tensor)

    monkeypatch.setitem(ATTENTION._items, "unsaveable", Unsaveable)
    options = ["model.attention={kind: unsaveable, num_heads: 2}", f"run_dir={tmp_path / 'run'}"]
    options += [f"cache_dir={tmp_path / 'cache'}", "train.steps=1"]
    assert main(["--config", str(tiny), *(["--dry-run"] if dry else []), *options]) == 2
    error = capfd.readouterr().err
    assert error.startswith("train: model.attention: blocks.0.attention.kept ")
    assert expected in error
    assert not list(tmp_path.iterdir()), "something was prepared"


class Pair(Mine):
    """Returns more than an output."""

    def forward(self, x):
        return super().forward(x), None


class Future(Mine):
    """Looks ahead."""

    def forward(self, x):
        return x + x.mean(1, keepdim=True)


class Keeps(Mine):
    """What no checkpoint would hold."""

    def __init__(self, model_dim: int) -> None:
        super().__init__(model_dim)
        self.mask = torch.ones(3)


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Pair, "Pair.forward returned tuple for x of [2, 37, 24]"),
        (Future, "Future.forward sees the future"),
        (Keeps, "keeps mask, a tensor that is neither a parameter nor a buffer"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_plain_module_that_is_no_variant_is_refused_before_it_trains(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], cls: type, expected: str, dry: bool
) -> None:
    options = [f"run_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}", "train.steps=1"]
    with registered():
        words = ["--config", str(tiny), *(["--dry-run"] if dry else []), f"model.attention={variant_of(cls)}"]
        assert main([*words, *options]) == 2
    error = capfd.readouterr().err
    assert error.startswith("train: model.attention: ")
    assert expected in error
    assert not list(tmp_path.iterdir()), "something was prepared"


def test_what_can_run_is_described(tiny: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["checkpoint.adopt_model=true", "lora.rank=2", "optim.name=adamw", "model.attention_impl=reference"]
    for given in ([], [f"checkpoint.init_from={exported}", *options]):
        assert main(["--config", str(tiny), "--dry-run", *given]) == 0
        assert "tokens per step: 128" in capsys.readouterr().out


FOREIGN = {
    "config.yaml": "mine\n",
    "metrics.jsonl": "mine\n",
    "samples.txt": "mine\n",
    "training.json": "{}\n",
    "loss.png": "mine\n",
    "export/notes.txt": "mine\n",
    "checkpoints/notes.txt": "mine\n",
    "tensorboard/notes.txt": "mine\n",
    "wandb/notes.txt": "mine\n",
    ".lock": "mine\n",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("dry", [True, False])
def test_files_of_the_user_are_not_written_over(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, dry: bool
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(FOREIGN[name])
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):  # a refusal leaves nothing that would let the next one pass
        assert main(["--config", str(tiny), *(["--dry-run"] if dry else []), f"run_dir={tmp_path}"]) == 2
        error = capfd.readouterr().err
        assert error.startswith(f"train: run_dir={tmp_path} holds {name.partition('/')[0]}, which no training run")
        assert "set another run_dir" in error
        assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / name).read_text() == FOREIGN[name]


def test_a_directory_of_a_run_is_taken_again(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also of one that was killed before its first checkpoint, beside other files, and a copy without hidden files."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()
    (run / "notes.txt").write_text("mine\n")
    with locked(run):
        pass
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).touch()
    step = copy / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    (step / "state.json").touch()
    write_digests(step, digest_files(step))
    (copy / "checkpoints" / "latest").write_text(step.name)
    (copy / "config.yaml").touch()
    for path in (run, copy):
        assert main(["--config", str(tiny), "--dry-run", f"run_dir={path}"]) == 0, capfd.readouterr().err


@pytest.mark.parametrize(
    "content",
    [bytes(range(128, 256)), b"5\n", b'"a"\n', b"[]\n", b'{"kind": "train"}\n', b'{"kind": [], "step": 1}\n'],
)
@pytest.mark.parametrize("dry", [True, False])
def test_metrics_of_another_kind_are_named(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, dry: bool
) -> None:
    with locked(tmp_path):
        pass
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert main(["--config", str(tiny), *(["--dry-run"] if dry else []), f"run_dir={tmp_path}"]) == 2
    error = capfd.readouterr().err
    assert f"train: {tmp_path / 'metrics.jsonl'} " in error
    assert "move it away, or set another run_dir" in error
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_a_checkpoint_that_is_in_the_way_is_told_by_both(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path):
        pass
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    for dry in ([], ["--dry-run"]):
        for resume, expected in (("never", "set run_dir to a new directory"), ("auto", "no file latest")):
            assert main(["--config", str(tiny), *dry, f"run_dir={tmp_path}", f"checkpoint.resume={resume}"]) == 2
            assert expected in capfd.readouterr().err


def test_stays_that_are_longer_than_the_model_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A clinical run said so at its first evaluation, after everything had been prepared."""
    words = [f"data.path={write_stays(tmp_path)}", "data.hours=12", "train.batch_size=32", "model.chunks=1"]
    begin = ["--config", "tscan-mortality.yaml", "--dry-run", *words, f"run_dir={tmp_path / 'run'}"]
    assert main(begin) == 0
    assert main([*begin, "model.chunk_hours=6"]) == 2
    told = "model.chunks=1 of model.chunk_hours=6 hold 6 hours, and a stay has 12; raise one of them, lower data.hours"
    assert told in capfd.readouterr().err
    assert main([*begin, "model.chunk_hours=6", "model.share_fusion=true"]) == 2  # one chunk has no fusion to share
    assert "share_fusion=true with at least model.chunks=2" in capfd.readouterr().err
    two = ["model.chunks=2" if word == "model.chunks=1" else word for word in begin]
    assert main([*two, "model.chunk_hours=3", "model.share_fusion=true"]) == 0
