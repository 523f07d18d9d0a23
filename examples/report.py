"""A run as one HTML page: curves, the tree of traces, the sampler, the time, the best scripts.

    python examples/report.py RUN_DIR --out report.html

The page needs no network, no server and no library: it opens from disk. It shows what training did,
not only how well: click a node of the tree and read the script that the policy wrote, what it
printed when it ran, how it was graded, and what was made of it afterwards.

It reads metrics.jsonl and eval.jsonl (as plot.py does), groups.jsonl (the buffer's log: every
trace, which traces became tasks, which tasks were evicted) and config.json; also of a run that is
still going. The layout, the drawing and the texts are in report_page.html beside this file.

Size: every trace is on the page as a row of numbers. Scripts and outputs are embedded once each,
compressed, up to --text-mb before compression; the traces that matter most come first: those that
were built on, the best of each competition, those that became tasks. The page says what is missing.

Safety: a policy wrote the scripts. They travel as base64, in which no `</script>` can be spelt, the
page only ever inserts them as text, and its content security policy forbids it any connection.

Exit status 2, with one line on stderr, when the run has nothing to show or the page cannot be
written.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import html
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plot  # noqa: E402
from buffer import OPERATORS, Trace, child_id  # noqa: E402
from plot import PlotError, load_config, load_run, read_jsonl  # noqa: E402

PAGE = Path(__file__).with_name("report_page.html")
LONGEST = 20_000  # characters of one script or output
COLORS = {"ink": plot.INK, "muted": plot.MUTED, "grid": plot.GRID, "before": plot.BEFORE,
          "after": plot.AFTER, "stages": plot.STAGES}


# ----------------------------------------------------------------------------- the run as columns


def load_groups(path: Path) -> dict:
    """groups.jsonl as columns: one entry a group in `groups`, one a trace in `traces`.

    Traces refer to one another by position. `parent` of a group is the trace that its task starts
    from (of a crossover: the better one), -1 for a draft; `opened` of a trace: it became a task;
    `evicted`: the learner version, as far as the log knows it, at which the buffer let its improve
    or debug task go, null while it holds it.

    Raises PlotError when there is no group to show.
    """
    if not path.is_file():
        raise PlotError(f"{path}: no such file; name a run directory of train.py")
    records = read_jsonl(path)
    groups, traces = [], []
    position: dict[str, int] = {}  # trace id -> its place in `traces`
    opener: dict[str, int] = {}  # task id -> the trace that opened it
    version = 0  # the newest that a group was handed out at: they come back in another order
    for record in records:
        version = max(version, record.get("handout_version", 0))
        gone = record.get("evicted", [record.get("removed")])
        for task_id in gone:
            if task_id in opener:
                traces[opener.pop(task_id)]["evicted"] = version
        if "traces" not in record:
            continue  # a task was taken out, nothing else
        task = record["task"]
        parent = position.get(record["traces"][0]["parent_id"], -1)
        groups.append({"competition": task["competition_id"], "operator": task["operator"],
                       "depth": task["depth"], "parent": parent,
                       "version": record["handout_version"],
                       "first": len(traces), "count": len(record["traces"])})
        crossed = [entry[0] for entry in record["admitted"] if not isinstance(entry, int)]
        for place, trace in enumerate(record["traces"]):
            position[trace["id"]] = len(traces)
            if place in record["admitted"]:
                opener[child_id(Trace.from_json(trace))] = len(traces)
            traces.append(trace | {"group": len(groups) - 1, "evicted": None,
                                   "opened": place in record["admitted"] + crossed})
    if not groups:
        raise PlotError(f"{path}: no group is finished yet")
    return {"groups": groups, "traces": traces}


def best_traces(groups: list[dict], traces: list[dict]) -> dict[str, int]:
    """Competition -> position of its valid trace with the best human rank; the earliest of equals.

    >>> groups = [{"competition": "iris"}]
    >>> traces = [{"group": 0, "valid": v, "human_rank": r} for v, r in
    ...           [(False, 0.0), (True, 0.4), (True, 0.6), (True, 0.6)]]
    >>> best_traces(groups, traces)
    {'iris': 2}
    """
    best: dict[str, int] = {}
    for i, trace in enumerate(traces):
        name = groups[trace["group"]]["competition"]
        if trace["valid"] and (name not in best
                               or trace["human_rank"] > traces[best[name]]["human_rank"]):
            best[name] = i
    return best


def embed_texts(order: list[int], traces: list[dict],
                budget: float) -> tuple[list[str], list[list]]:
    """The scripts and outputs of the traces, each text once, in this order until `budget` is full.

    Returns:
        texts; and for each trace [script, output] as positions in texts, None where it did not fit.

    >>> traces = [{"code": "a = 1", "output": ""}, {"code": "b = 22", "output": ""}]
    >>> embed_texts([1, 0], traces, budget=8)
    (['b = 22', ''], [[None, 1], [0, 1]])
    """
    texts: dict[str, int] = {}
    used, places = 0, [[None, None] for _ in traces]
    for i in order:
        for field, key in enumerate(("code", "output")):
            text = traces[i][key]
            if len(text) > LONGEST:
                text = f"{text[:LONGEST]}\n[{len(text) - LONGEST} characters more]"
            if text not in texts and used + len(text) <= budget:
                texts[text] = len(texts)
                used += len(text)
            places[i][field] = texts.get(text)
    return list(texts), places


def collect(directory: Path, text_mb: float) -> dict:
    """Everything that the page shows, as JSON types. Raises PlotError with a one-line message."""
    run = load_run(directory, "")
    path = directory / "groups.jsonl"
    try:
        log = load_groups(path)
    except (LookupError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise PlotError(f"{path}: not what train.py's buffer writes ({what})") from None
    groups, traces = log["groups"], log["traces"]
    best = best_traces(groups, traces)
    built_on = {group["parent"] for group in groups}
    order = sorted(range(len(traces)), key=lambda i: (
        i not in built_on, i not in best.values(), not traces[i]["opened"], -traces[i]["reward"]))
    texts, places = embed_texts(order, traces, text_mb * 1e6)
    for trace, (code, output) in zip(traces, places, strict=True):
        trace["code"], trace["output"] = code, output
    competitions = sorted({group["competition"] for group in groups})
    ran = {group["operator"] for group in groups}
    operators = [op for op in OPERATORS if op != "crossover" or op in ran]  # it is off by default
    for group in groups:
        group["competition"] = competitions.index(group["competition"])
        group["operator"] = operators.index(group["operator"])
    return {
        "name": run.name,
        "config": load_config(directory / "config.json"),
        "metrics": columns(run.rows, run.rows[-1]),
        "evals": [row for row in run.evals if row.get("when") in ("before", "after")],
        "competitions": competitions,
        "operators": operators,
        "groups": columns(groups, groups[0]),
        "traces": columns(traces, (
            "id", "group", "opened", "evicted", "reward", "base_reward", "valid", "status", "medal",
            "human_rank", "score", "validation_score", "seconds", "reason", "code", "output")),
        "best": [best.get(name) for name in competitions],
        "texts": texts,
        "colors": COLORS | {"operators": {op: plot.OPERATORS[op] for op in operators}},
    }


def columns(rows: list[dict], names) -> dict[str, list]:
    """Rows to columns: a name once instead of once a row. Floats keep five digits."""
    def plain(value):
        if isinstance(value, float):
            return float(f"{value:.5g}") if value == value and abs(value) < 1e300 else None
        return int(value) if isinstance(value, bool) else value

    return {name: [plain(row.get(name)) for row in rows] for name in names}


# ----------------------------------------------------------------------------------- the HTML page


def render(data: dict) -> str:
    packed = gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0)
    page = PAGE.read_text()
    page = page.replace("<!--TITLE-->", html.escape(f"AceGRPO: {data['name']}"))
    return page.replace("<!--DATA-->", base64.b64encode(packed).decode())


def report(directory: Path | str, out: Path | str, text_mb: float = 24.0) -> dict:
    """Write the page of a run; returns its data. Raises PlotError with a one-line message."""
    data = collect(Path(directory), text_mb)
    try:
        Path(out).write_text(render(data))
    except OSError as error:
        raise PlotError(f"cannot write {out}: {error.strerror}") from None
    return data


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN_DIR", help="run directory of train.py")
    parser.add_argument("--out", default="report.html", help="the page (default: %(default)s)")
    parser.add_argument("--text-mb", type=float, default=24.0, metavar="MB",
                        help="scripts and outputs embedded, before compression "
                             "(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        data = report(args.run, args.out, args.text_mb)
    except PlotError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    codes = data["traces"]["code"]
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.2f} MB, {len(codes)} traces, the "
          f"scripts of {sum(code is not None for code in codes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
