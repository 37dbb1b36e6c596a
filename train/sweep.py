"""Runs `attnzoo compare` as trials of Ray Tune, in parallel over variants, seeds and settings.

    python -m train.sweep text=input.txt variants=mha,rcmha seeds=3 --run-dir runs/sweep
    python -m train.sweep tables=parameters --grid lr=1e-3,3e-3 --asha       # stops the worse trials early
    python -m train.sweep --address auto                                     # join the cluster of this machine

One trial is one variant with one seed, on one CPU; it writes the same file as `compare`. The same command resumes a
sweep that was stopped; finished trials are not repeated. All machines of a cluster need attnzoo, and must see the same
run directory and text. Only this file in train/ imports Ray.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import secrets
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

from attnzoo.errors import complain
from attnzoo.files import output_file, user_path, write_atomic
from attnzoo.report import Report, format_table
from attnzoo.settings import check_new
from scripts.compare import CompareConfig, Comparison, Hooks, Run, parse_settings, run_one
from scripts.compare.statistics import interval
from scripts.compare.text import STDLIB

QUALITY = ("bits_per_character", "accuracy", "mixed_accuracy")
REPORTS = 10
"""Number of validation losses that a trial reports."""

GOES_ON = "interrupted; finished trials are kept, and the same command resumes the sweep"
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a local Ray then uses loopback
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # they would need tensorboardX
    "OMP_NUM_THREADS": "1",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Exit status: 0 if all trials ended (or ASHA stopped them), 1 if one failed, 2 for wrong usage,
    130 after Ctrl-C."""
    chosen = _parse(arguments)
    try:
        if chosen.json is not None:
            output_file(chosen.json, "--json")
        trials = plan(chosen.settings, chosen.grid, Path(chosen.run_dir).resolve(), chosen.asha)
        _same_sweep(Path(chosen.run_dir).resolve(), trials, chosen.asha)
        results = run_trials(trials, chosen)
    except (ValueError, ConnectionError) as error:
        return complain("train.sweep", str(error))
    except KeyboardInterrupt:
        print(GOES_ON, file=sys.stderr)
        return 130
    report = Report.start(command=["python", "-m", "train.sweep", *(sys.argv[1:] if arguments is None else arguments)])
    report.rows = table(results)
    print(format_table(report.rows))
    if chosen.json is not None:
        report.write(output_file(chosen.json, "--json"))
    failed = [result for result in results if result["problem"]]
    for result in failed:
        print(f"train.sweep: {result['name']}: {result['problem']}", file=sys.stderr)
    if not failed and not chosen.asha and not all(result["ended"] for result in results):
        print(GOES_ON, file=sys.stderr)
        return 130
    return int(bool(failed))


def plan(settings: list[str], grid: list[str], run_dir: Path, asha: bool) -> dict[str, dict[str, Any]]:
    """The trials by name: configuration, run, and directory of the result file of each.

    grid: words such as "lr=1e-3,3e-3"; every combination is a comparison in its own directory. Raises ValueError for
    wrong settings.
    """
    choices, keys = [], set[str]()
    for word in grid:
        key, equals, values = word.partition("=")
        check_new(key, keys, "--grid ")
        keys.add(key)
        if not equals or not values:
            raise ValueError(f"--grid {word!r} is not of the form key=value,value, for example lr=1e-3,3e-3")
        choices.append([f"{key}={value}" for value in values.split(",")])
    settings = [word for word in settings if word.partition("=")[0].strip() not in keys]  # the grid's come instead
    trials = {}
    for point in itertools.product(*choices):
        config = parse_settings([*settings, *point])
        if asha and not set(config.tables) <= {"parameters", "flops"}:
            raise ValueError(
                f"--asha compares validation losses of a text, and tables={','.join(config.tables)} asks for more: set "
                "tables=parameters or tables=flops"
            )
        if config.text != STDLIB:
            config = dataclasses.replace(config, text=str(user_path(config.text, "text").resolve()))
        comparison = Comparison(config)
        files = {comparison.name(run): run for run in comparison.plan()}
        place = "_".join(point) or "runs"
        for name, run in files.items():
            trials[" ".join([*point, name])] = {
                "point": " ".join(point),
                "config": comparison.config.to_dict(),
                "run": dataclasses.asdict(run),
                "directory": str(run_dir / place),
            }
    return trials


def trial(config: dict[str, Any]) -> None:
    """The function that Ray's workers run: one run, which reports its validation losses to Tune."""
    from ray import tune

    settings = _read(Path(config["sweep"]))["trials"][config["trial"]]
    comparison, run = Comparison(CompareConfig.from_dict(settings["config"])), Run(**settings["run"])
    steps = comparison.steps(run)

    def watch(step: int, loss: float) -> None:
        tune.report({"step": step, "validation_loss": loss})

    hooks = Hooks(watch=watch, watch_every=max(1, steps // REPORTS))
    results = run_one(comparison, run, Path(settings["directory"]), hooks)["results"]
    quality = {key: results[key] for key in QUALITY if key in results}
    loss = results.get("loss", results.get("train_loss", math.nan))
    tune.report({"step": steps, "validation_loss": loss, "ended": True, **quality})


def run_trials(trials: dict[str, dict[str, Any]], chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts or joins Ray, runs the trials or resumes the sweep, and returns the last result of every trial."""
    run_dir = Path(chosen.run_dir).resolve()
    ray = start_ray(chosen.address, chosen.cpus)
    from ray import tune
    from ray.tune.logger import JsonLoggerCallback

    work = tune.with_resources(trial, {"cpu": 1})
    try:
        path = str(run_dir / "tune")
        if tune.Tuner.can_restore(path):
            print(f"going on with the sweep in {run_dir}", file=sys.stderr)
            tuner = tune.Tuner.restore(path, trainable=work, restart_errored=True)
        else:
            steps = max(CompareConfig.from_dict(t["config"]).steps for t in trials.values())
            tuner = tune.Tuner(
                work,
                param_space={"trial": tune.grid_search(list(trials)), "sweep": str(run_dir)},
                tune_config=tune.TuneConfig(
                    metric="validation_loss", mode="min", scheduler=_asha(steps) if chosen.asha else None
                ),
                run_config=tune.RunConfig(
                    name="tune", storage_path=str(run_dir), verbose=1, callbacks=[JsonLoggerCallback()]
                ),
            )
        with contextlib.redirect_stdout(sys.stderr):  # Tune's tables are progress, not the result
            grid = tuner.fit()
        results = [grid[i] for i in range(len(grid))]
        last = {r.config["trial"]: (r.metrics or {}, r.error) for r in results if r.config}
    finally:
        ray.shutdown()
    return [_outcome(name, settings, *last.get(name, ({}, None))) for name, settings in trials.items()]


def start_ray(address: str, cpus: int | None) -> Any:
    """Connects Ray and returns its module. address: "local" starts a Ray on loopback with token authentication; others
    are addresses of a cluster. Raises ConnectionError if no cluster answers there.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address == "local":
        os.environ.pop("RAY_ADDRESS", None)
        if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # for this cluster only; not stored
    elif address != "auto":
        _reachable(address)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's deprecation warnings
        import ray

        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        if address == "local":
            ray.init(num_cpus=cpus, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        else:
            ray.init(address=address, **quiet)
    return ray


def _reachable(address: str) -> None:
    """Raises ConnectionError at once if no one answers, where Ray would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        raise ConnectionError(f"no Ray cluster answers at --address {address}; use local to start one") from None


def table(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each variant and setting: quality with confidence intervals over the seeds that ended."""
    rows = []
    groups = dict.fromkeys((r["point"], r["table"], r["variant"], r["form"]) for r in results)
    for point, kind, variant, form in groups:
        same = [r for r in results if (r["point"], r["table"], r["variant"], r["form"]) == (point, kind, variant, form)]
        ended = [r for r in same if r["ended"]]
        row = {"settings": point, "table": kind, "variant": " ".join(filter(None, (variant, form)))}
        for key in QUALITY:
            values = [r[key] for r in ended if key in r]
            row[key.replace("_", " ")] = interval(values) if values else ""
        row |= {"ended": len(ended), "not ended": len(same) - len(ended), "steps": max(r["step"] for r in same)}
        rows.append(row)
    return [{key: value for key, value in row.items() if any(other[key] != "" for other in rows)} for row in rows]


def _asha(steps: int) -> Any:
    from ray.tune.schedulers import ASHAScheduler

    # A run reports REPORTS times; at each rung a third of the trials goes on. max_t is one more than the steps, because
    # Tune would stop a trial that reaches it before its last evaluation.
    return ASHAScheduler(time_attr="step", max_t=steps + 1, grace_period=max(1, steps // REPORTS), reduction_factor=3)


def _outcome(name: str, settings: dict[str, Any], metrics: dict[str, Any], error: Any) -> dict[str, Any]:
    quality = {key: metrics[key] for key in QUALITY if key in metrics}
    return {
        "name": name,
        "point": settings["point"],
        **settings["run"],
        "step": metrics.get("step", 0),
        "ended": bool(metrics.get("ended")),
        "problem": None if error is None else str(error).strip().splitlines()[-1],
        **quality,
    }


def _same_sweep(run_dir: Path, trials: dict[str, dict[str, Any]], asha: bool) -> None:
    """Writes the sweep's settings into `run_dir`. Raises ValueError if it holds a sweep with other settings."""
    path, content = run_dir / "sweep.json", {"asha": asha, "trials": trials}
    if path.is_file():
        if _read(run_dir) != content:
            raise ValueError(f"{run_dir} holds a sweep of other settings; choose another --run-dir, or remove it")
        return
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def _read(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "sweep.json").read_text(encoding="utf-8"))
    return content


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as for attnzoo compare")
    parser.add_argument("--grid", action="append", default=[], metavar="key=a,b", help="values of a setting to compare")
    parser.add_argument("--asha", action="store_true", help="stop the worse trials early (ASHA, arXiv 1810.05934)")
    parser.add_argument("--run-dir", default="runs/sweep", help="default: %(default)s")
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS", "local"),
        help="local, auto or HOST:PORT of a cluster (default: RAY_ADDRESS, else local)",
    )
    parser.add_argument("--cpus", type=int, help="CPUs of a local Ray, and so trials at a time (default: all cores)")
    parser.add_argument("--json", metavar="PATH", help="write the final table to this file as a report")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    from train.sweep import main as imported_main  # workers find `trial` by its module, which is not __main__

    sys.exit(imported_main())
