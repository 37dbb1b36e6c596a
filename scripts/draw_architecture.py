"""Draws docs/architecture.svg, the imports between the parts of the project.

    python scripts/draw_architecture.py            # writes the picture
    python scripts/draw_architecture.py --check    # exit status 1 if the picture is out of date

An arrow from A to B means that files of A import files of B. Arrows that follow from other arrows are left out, and a
part stands above everything that it imports.
"""

import argparse
import ast
import sys
from collections import defaultdict
from collections.abc import Iterable
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "architecture.svg"
TOGETHER = {
    "foundations": (
        "interrupts",
        "errors",
        "files",
        "settings",
        "texts",
        "gguf_file",
        "types",
        "derived_memory",
        "registry",
    ),
    "reports": ("report", "intervals", "progress", "figures", "workers"),
    "front door": ("generation", "language_model", "loading"),
}
"""Modules of attnzoo that are one box."""
SAYS = {
    "foundations": "types, registry, files, errors",
    "ops": "operations on tensors",
    "kvcache": "full and compressed caches",
    "attention": "one variant, one file",
    "clinical": "patients: data, metrics",
    "incontext": "closed forms",
    "models": "decoder language model",
    "tokenizer": "text to ids and back",
    "checkpoint": "files of models",
    "front door": "load, generate, chat",
    "reports": "tables, claims, figures",
    "planner": "memory and time estimates",
    "profiling": "measured memory",
    "tasks": "generated tasks",
    "hf": "transformers",
    "export": "to transformers",
    "attention_page": "maps as a page",
    "cli": "the command",
    "apps": "finds train/, serve/, ...",
    "train": "DeepSpeed",
    "serve": "engine, HTTP, Ray Serve",
    "scripts": "measuring and maintaining",
}
SWEEP = ROOT / "train" / "sweep.py"
"""Runs a comparison of scripts/ as trials of Ray Tune; nothing imports it."""
WIDTH, BOX, HEIGHT, ROW = 1040, 178, 46, 92
COLUMNS = {
    **dict.fromkeys(("cli", "export", "hf"), 0),
    **dict.fromkeys(("serve", "attention_page", "front door", "apps", "checkpoint", "tokenizer"), 1),
    **dict.fromkeys(("scripts", "incontext", "models", "attention", "kvcache", "ops", "foundations"), 2),
    **dict.fromkeys(("train", "planner", "reports"), 3),
    **dict.fromkeys(("tasks", "profiling"), 4),
}
COLOURS = {"attnzoo": "#dfe9f7", "train": "#e3f2df", "serve": "#fbe9d7", "scripts": "#eeeeee"}


def box_of(module: str) -> str | None:
    """The box of a dotted module name; None for modules outside this project, and for attnzoo itself."""
    parts = module.split(".")
    if parts[0] in ("train", "serve", "scripts"):
        return parts[0]
    if parts[0] != "attnzoo" or len(parts) < 2 or parts[1] in ("__init__", "__main__"):
        return None
    return next((name for name, members in TOGETHER.items() if parts[1] in members), parts[1])


def imports(path: Path) -> Iterable[str]:
    """Yields the dotted names of the modules that a file imports, at any place."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges() -> dict[str, set[str]]:
    """The boxes that each box imports."""
    found: dict[str, set[str]] = defaultdict(set)
    modules = {
        path.stem for path in (ROOT / "attnzoo").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    for room in ("attnzoo", "train", "serve", "scripts"):
        for path in sorted((ROOT / room).rglob("*.py")):
            if path == SWEEP:
                continue
            own = box_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
            for name in imports(path) if own else ():
                parts = name.split(".")
                other = box_of(name) if parts[0] != "attnzoo" or (parts[1:2] and parts[1] in modules) else None
                found[own or ""] |= {other} - {own} if other else set()
    return {name: found.get(name, set()) for name in {*found, *(b for each in found.values() for b in each)}}


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The transitive reduction of the graph: without edges that a longer path implies."""

    def beyond(start: str) -> set[str]:
        return graph[start].union(*(beyond(name) for name in graph[start]))

    return {name: others - set().union(*(beyond(other) for other in others)) for name, others in graph.items()}


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """The row of each box, counted from below: just under the lowest box that imports it. Raises ValueError if boxes
    import one another in a circle."""
    depth: dict[str, int] = {}
    while len(depth) < len(graph):
        users = {name: [each for each in graph if name in graph[each]] for name in graph if name not in depth}
        ready = [name for name, each in users.items() if depth.keys() >= set(each)]
        if not ready:
            raise ValueError(f"{', '.join(sorted(users))} import each other in a circle")
        depth |= {name: max((depth[other] + 1 for other in users[name]), default=0) for name in ready}
    return {name: max(depth.values()) - found for name, found in depth.items()}


def places(graph: dict[str, set[str]]) -> dict[str, tuple[float, float]]:
    """The centre of each box, in the column of `COLUMNS`, else in the first free column of its row."""
    rows = levels(graph)
    found: dict[str, tuple[float, float]] = {}
    top, width = max(rows.values()), WIDTH / 5
    for row in range(top + 1):
        names = sorted((name for name in graph if rows[name] == row), key=lambda name: (name not in COLUMNS, name))
        taken: set[int] = set()
        for name in names:
            column = COLUMNS[name] if name in COLUMNS else min(set(range(len(graph))) - taken)
            taken.add(column)
            found[name] = (width * (column + 0.5), HEIGHT + (top - row) * ROW)
    return found


def _text(x: float, y: float, style: str, content: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle" {style}>{escape(content)}</text>'


def draw() -> str:
    """The picture as SVG."""
    graph = edges()
    levels(graph)  # raises for circles
    graph = reduced(graph)
    at = places(graph)
    high = max(y for _, y in at.values()) + HEIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {high:.0f}" font-family="sans-serif">',
        "<title>Who builds on whom in attnzoo</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#666"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{high:.0f}" fill="white"/>',
    ]
    for name in sorted(graph):
        for other in sorted(graph[name]):
            (x, y), (u, v) = at[name], at[other]
            start, end = y + HEIGHT / 2, v - HEIGHT / 2
            lines.append(  # straight down, and to the other column just above the box
                f'<path d="M{x:.0f} {start:.0f} L{x:.0f} {end - 42:.0f} C{x:.0f} {end - 12:.0f} {u:.0f} {end - 34:.0f} '
                f'{u:.0f} {end:.0f}" fill="none" stroke="#999" marker-end="url(#tip)"/>'
            )
    for name, (x, y) in sorted(at.items()):
        colour = COLOURS.get(name, COLOURS["attnzoo"])
        lines += [
            f'<rect x="{x - BOX / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{BOX}" height="{HEIGHT}" rx="6" '
            f'fill="{colour}" stroke="#556"/>',
            _text(x, y - 3, 'font-size="14" font-weight="bold"', name),
            _text(x, y + 14, 'font-size="10.5"', SAYS.get(name, "")),
        ]
    return "\n".join([*lines, "</svg>\n"])


def main() -> int:
    """Writes or checks the picture; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check only, write nothing")
    text = draw()
    if not parser.parse_args().check:
        PICTURE.write_text(text, encoding="utf-8")
        return 0
    if PICTURE.is_file() and PICTURE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/architecture.svg is not current; run python scripts/draw_architecture.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
