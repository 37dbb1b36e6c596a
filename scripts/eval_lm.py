"""`attnzoo eval`: evaluates a checkpoint with lm-eval on tasks from local files."""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

# datasets, transformers and lm-eval read these at import.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
# Resample in this process, not in a pool: the samples are small.
os.environ.update(DISABLE_MULTIPROC="1")

import torch
import yaml

from attnzoo.checkpoint import find_checkpoint, load_model, load_tokenizer
from attnzoo.cli import carry_out
from attnzoo.report import Report
from attnzoo.types import parse_dtype
from scripts import arguments
from scripts.arguments import QUICK_LIMIT

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from scripts.lm_adapter import AdaptedLM

RESAMPLES = 1000
"""Bootstrap samples for standard errors of metrics that are not means."""


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads lm-eval's `!function` as None."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def check_package() -> None:
    """Raises ValueError if lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError("the package lm-eval is not installed; pip install 'attnzoo[eval]'") from None


def find_tasks(path: Path) -> tuple["TaskManager", list[str]]:
    """(manager, names) of the tasks and groups in a directory tree, or in one YAML file.

    Raises ValueError for a path without tasks, and for a file that lm-eval would silently ignore.
    """
    from lm_eval.tasks import TaskManager

    if path.is_dir():
        files, folder = sorted(path.rglob("*.yaml")), path
    elif path.is_file() and path.suffix == ".yaml":
        files, folder = [path], path.parent
    else:
        raise ValueError(f"--tasks: '{path}' is neither a directory nor a .yaml file")
    declared = {file.resolve(): name for file in files if (name := _declared(file)) is not None}
    if not declared:
        raise ValueError(f"--tasks: '{path}' holds no task: a .yaml file with a key `task` or `group`")
    manager = TaskManager(include_path=str(folder.resolve()), include_defaults=False)
    found = {
        Path(entry.yaml_path).resolve(): name
        for name, entry in manager.task_index.items()
        if entry.yaml_path is not None
    }
    for file, name in declared.items():
        if found.get(file) != name:
            raise ValueError(
                f"{file}: lm-eval does not find {name!r}; another file may have that name, or its `include:` is missing"
            )
    return manager, list(declared.values())


def _declared(path: Path) -> str | None:
    """The task or group that a file declares; None for a file that only others include. Raises ValueError."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not a task")
    name = content.get("group") or content.get("task")
    return name if isinstance(name, str) else None


def load_tasks(manager: "TaskManager", names: list[str]) -> list[Any]:
    """The tasks with their data. Raises ValueError that names the task and the error."""
    from lm_eval.api.group import Group

    loaded: dict[str, Any] = {}
    for name in names:
        file = manager.task_index[name].yaml_path
        assert file is not None
        try:
            with contextlib.chdir(file.parent):
                content = manager.load([name])
        except Exception as error:  # lm-eval, datasets or a task's own code may raise anything
            raise ValueError(f"task {name!r} ({file}) cannot be loaded: {type(error).__name__}: {error}") from error
        groups = content.get("groups", {})
        loaded |= {name: groups[name]} if name in groups else content["tasks"]
    inside = {child for group in loaded.values() if isinstance(group, Group) for child in group.child_names}
    return [item for name, item in loaded.items() if name not in inside]


def rows(results: dict[str, Any], truncated: dict[str, int]) -> list[dict[str, Any]]:
    """A row for each task and metric of lm-eval's results. truncated: requests that lost tokens, by task."""
    found = []
    for task, metrics in sorted(results["results"].items()):
        items = results["n-samples"].get(task, {}).get("effective", "")
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            found.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": chosen,
                    "value": value,
                    "stderr": error if isinstance(error, float) else "",
                    "items": items,
                    "shots": results["n-shot"].get(task, ""),
                    "truncated": truncated.get(task, 0),
                }
            )
    return found


@contextlib.contextmanager
def without_surroundings() -> Iterator[None]:
    """lm-eval asks git for the commit of the directory it is started in, whose complaints the user would see, and lists
    the machine's packages, which takes seconds. Reports say commit and versions by themselves."""
    from lm_eval import evaluator

    with (
        mock.patch.object(evaluator, "get_git_commit_hash", return_value=None),
        mock.patch.object(evaluator, "add_env_info", return_value=None),
    ):
        yield


def build_lm(options: argparse.Namespace) -> "AdaptedLM":
    """The checkpoint with lm-eval's interface. Raises ValueError."""
    from scripts.lm_adapter import AdaptedLM

    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {options.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    path = find_checkpoint(options.checkpoint)
    tokenizer = load_tokenizer(path)
    model = load_model(path, device=device, dtype=parse_dtype(options.dtype) if options.dtype else None)
    return AdaptedLM(
        model,
        tokenizer,
        max_length=options.max_length,
        batch_size=options.batch_size,
        chat=options.chat,
        seed=options.seed,
    )


def measure(options: argparse.Namespace, report: Report) -> None:
    """Evaluates, and adds rows to the report. Raises ValueError."""
    check_package()
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit={options.limit} must be at least 1")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise ValueError(f"--num-fewshot={options.num_fewshot} must be at least 0")
    limit = min(options.limit or QUICK_LIMIT, QUICK_LIMIT) if options.quick else options.limit
    manager, names = find_tasks(options.tasks)
    lm = build_lm(options)
    tasks = load_tasks(manager, names)
    from lm_eval import simple_evaluate

    start = time.perf_counter()
    with without_surroundings():
        results = simple_evaluate(
            model=lm,
            tasks=tasks,
            task_manager=manager,
            limit=limit,
            num_fewshot=options.num_fewshot,
            apply_chat_template=options.chat,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
        )
    seconds = time.perf_counter() - start
    report.versions["lm_eval"] = metadata.version("lm_eval")
    report.rows += rows(results, lm.truncated)
    dtype = str(lm.model.embedding.weight.dtype).removeprefix("torch.")
    print(f"{options.checkpoint}: {dtype}, at most {lm.max_length:,} tokens, {seconds:.1f} s")


def run(options: argparse.Namespace) -> int:
    """Evaluates and prints the results; returns the exit status. Raises ValueError."""
    report = Report.start(command=options.command, seed=options.seed, quick=options.quick)
    measure(options, report)
    report.print_table()
    if options.json:
        report.write(options.json)
    return report.exit_status()


def main(words: list[str] | None = None) -> int:
    """Runs `attnzoo eval`; returns the exit status."""
    return carry_out("attnzoo eval", arguments.evaluate, run, sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    sys.exit(main())
