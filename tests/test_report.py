"""The HTML page of a run, looked at by a real browser.   python -m pytest tests/test_report.py

The browser tests need Chromium or one of its family, see tests/browser.py; without one they are
skipped and the rest still runs. SCREENSHOTS=folder keeps pictures of the page.
"""

import base64
import dataclasses
import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import report as module
from browser import Browser, find_browser
from report import main
from test_plot import write_run

from buffer import EvolvingBuffer, Group, Trace
from train import Config

COMPETITIONS = ["iris", "<b>wine</b>"]
# What a policy may write in the hope that a reader's browser runs it.
HOSTILE = ("# <!-- </script><script>document.title = 'broken out'</script>\n"
           "# <img src=x onerror=\"document.title = 'broken out'\"> & ]]> \u2028 \x00 {{}} ${1}\n")
READY = "document.body?.dataset.ready"


def make_run(directory: Path, steps=4, groups=4, responses=6, script="", seed=0,
             crossover=False) -> Path:
    """A run with a real buffer's log: scripts of random reward; the drafts, then any task."""
    write_run(directory, steps, evaluated=True)
    (directory / "config.json").write_text(json.dumps(dataclasses.asdict(Config())))
    rng = np.random.default_rng(seed)
    buffer = EvolvingBuffer(COMPETITIONS, crossover=crossover, log_path=directory / "groups.jsonl")
    for number in range(steps * groups):
        pick = number if number < len(COMPETITIONS) else rng.integers(len(buffer))
        task = list(buffer.tasks.values())[pick]
        traces = []
        for i in range(responses):
            name, base = f"{number}-{i}", max(round(rng.uniform(-0.5, 1), 3), 0.0)
            traces.append(Trace(
                f"trace{name}", task.id, task.competition_id, task.operator, task.depth,
                task.parent and task.parent.id, code=f"{HOSTILE}{script}model = Model('{name}')\n",
                code_key=name, status="ok" if base else "error", valid=base > 0, base_reward=base,
                reward=base, human_rank=base, medal="gold" if base > 0.9 else "none",
                output=f"</pre>output of {name}", score=base or float("nan")))
        buffer.add(Group(task, traces, handout_version=number // groups))
    buffer.close()
    return directory


def embedded(page: Path) -> dict:
    """The data that a page carries."""
    packed = re.search(r'<script id="data" type="text/plain">([^<]*)</script>', page.read_text())
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "<i>run")


@pytest.fixture(scope="module")
def page(run):
    out = run.parent / "report.html"
    assert main([str(run), "--out", str(out)]) == 0
    return out


# ------------------------------------------------------------------------------- what is embedded


def test_the_page_holds_every_trace_and_how_one_grew_from_another(run, page):
    data = embedded(page)
    log = [json.loads(line) for line in open(run / "groups.jsonl")]
    logged = [trace for record in log for trace in record["traces"]]
    traces, groups = data["traces"], data["groups"]
    assert traces["id"] == [trace["id"] for trace in logged] and len(logged) == 96
    assert [data["texts"][k] for k in traces["code"]] == [trace["code"] for trace in logged]
    for i, trace in enumerate(logged):
        parent = groups["parent"][traces["group"][i]]
        assert (traces["id"][parent] if parent >= 0 else None) == trace["parent_id"]
        assert data["competitions"][groups["competition"][traces["group"][i]]] == \
            trace["competition_id"]
    assert sum(traces["opened"]) == sum(len(record["admitted"]) for record in log) > 20
    assert max(groups["parent"]) > 0 and data["metrics"]["step"] == [1, 2, 3, 4]
    for c, i in enumerate(data["best"]):
        own = [t["human_rank"] for t in logged if t["competition_id"] == data["competitions"][c]]
        assert traces["human_rank"][i] == max(own)


def test_what_a_policy_wrote_cannot_leave_its_place(page):
    text = page.read_text()
    assert "broken out" not in text and "Model(" not in text  # only inside base64
    assert "<i>run" not in text and "AceGRPO: &lt;i&gt;run" in text
    assert text.count("</script>") == 2
    assert not re.search(r'(src|href)=|https?:(?!//www\.w3\.org/2000/svg)', text)  # no network


def test_evicted_tasks_are_told(tmp_path):
    run = make_run(tmp_path / "run", steps=1)
    first, second = [json.loads(line) for line in open(run / "groups.jsonl")][:2]
    gone = module.child_id(Trace.from_json(first["traces"][first["admitted"][0]]))
    first |= {"handout_version": 9}  # it came back before a group that was handed out earlier
    second |= {"evicted": [gone], "handout_version": 7}
    removed = {"sequence": 3, "removed": module.child_id(
        Trace.from_json(second["traces"][second["admitted"][0]]))}
    (run / "groups.jsonl").write_text("\n".join(map(json.dumps, [first, second, removed])) + "\n")
    data = module.load_groups(run / "groups.jsonl")
    assert [group["version"] for group in data["groups"]] == [9, 7]
    assert [(t["id"], t["evicted"]) for t in data["traces"] if t["evicted"] is not None] == [
        (first["traces"][first["admitted"][0]]["id"], 9),
        (second["traces"][second["admitted"][0]]["id"], 9)]


def test_texts_that_do_not_fit_are_left_out_the_least_wanted_first(run, tmp_path, capsys):
    out = tmp_path / "small.html"
    assert main([str(run), "--out", str(out), "--text-mb", "0.006"]) == 0
    data = embedded(out)
    assert sum(map(len, data["texts"])) <= 6000
    code, parents = data["traces"]["code"], set(data["groups"]["parent"]) - {-1}
    kept = sum(place is not None for place in code)
    assert 0 < kept < 40 and f"96 traces, the scripts of {kept}" in capsys.readouterr().out
    assert all(code[i] is not None for i in list(parents)[:5])
    long = {"code": "x" * 50_000, "output": ""}
    assert len(module.embed_texts([0], [long], 1e9)[0][0]) < 20_100


@pytest.mark.parametrize("break_it, message", [
    (lambda run: (run / "groups.jsonl").unlink(), "groups.jsonl: no such file"),
    (lambda run: (run / "groups.jsonl").write_text(""), "no group is finished"),
    (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl: no such file"),
    (lambda run: (run / "config.json").write_text("{"), "config.json"),
    (lambda run: (run / "eval.jsonl").write_text("[]\n"), "eval.jsonl, line 1: not an object"),
    (lambda run: (run / "groups.jsonl").write_bytes(b"\xff\n{}\n"), "line 1: not JSON"),
    (lambda run: (run / "groups.jsonl").write_text('{"traces": []}\n'), "buffer writes (KeyError"),
    (lambda run: (run / "report.html").mkdir(), "cannot write")])
def test_errors_are_one_line_and_status_2(tmp_path, capsys, break_it, message):
    run = make_run(tmp_path / "run", steps=1)
    break_it(run)
    assert main([str(run), "--out", str(run / "report.html")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_evaluation_that_says_not_when_is_left_out(tmp_path):
    run = make_run(tmp_path / "run", steps=1)
    (run / "eval.jsonl").write_text('{"split": "train"}\n')
    assert main([str(run), "--out", str(tmp_path / "report.html")]) == 0
    assert embedded(tmp_path / "report.html")["evals"] == []


# ---------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (binary := find_browser()):
        pytest.skip("no browser: install chromium, or name one in CHROMIUM")
    with Browser(binary, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def opened(browser, page):
    browser.errors.clear()
    browser.requests.clear()
    browser.open(page, READY)
    yield browser
    assert browser.errors == []
    assert browser.requests == [page.resolve().as_uri()]  # and nothing from anywhere else
    assert browser.js("document.title") == "AceGRPO: <i>run"  # no script has broken out


def code_on_page(browser) -> str:
    return browser.js("[...document.querySelectorAll('#code div')].map(d => d.textContent)"
                      ".join('\\n')") + "\n"


def shown_trace(browser) -> str:
    return browser.js("document.querySelector('#detail > p:last-child').textContent"
                      ".match(/trace ([^;]+)/)[1]")


@pytest.fixture(scope="module")
def logged(run):
    """Trace id -> trace, of the buffer's log."""
    return {trace["id"]: trace for line in open(run / "groups.jsonl")
            for trace in json.loads(line)["traces"]}


def nodes_on_page(browser) -> list[str]:
    return browser.js("[...document.querySelectorAll('.node')].map(n => n.dataset.trace)")


def test_a_click_on_a_node_shows_its_code_output_and_grade(opened, logged):
    """What is shown is what the log holds, letter by letter."""
    names = nodes_on_page(opened)
    assert len(names) > 10
    for name in names[::3]:
        opened.click(f'[data-trace="{name}"]')
        trace = logged[name]
        assert shown_trace(opened) == name and code_on_page(opened) == trace["code"]
        assert opened.js("document.querySelector('#output').textContent") == trace["output"]
        facts = opened.js("document.querySelector('.facts').textContent")
        assert f"reward{trace['reward']:g}of the outcome" in facts
        assert f"status{'valid' if trace['valid'] else 'error'}ran" in facts
    if folder := os.environ.get("SCREENSHOTS"):
        opened.screenshot(Path(folder) / "report.png", full=True)


def test_a_click_on_a_sibling_shows_a_trace_that_is_no_node(opened, logged):
    for number in range(1, 5):
        opened.click(f".strip button:nth-child({number})")
        assert code_on_page(opened) == logged[shown_trace(opened)]["code"]
        if shown_trace(opened) not in nodes_on_page(opened):
            break
    else:
        pytest.fail("every trace of this group is a node")


def test_the_tree_is_walked_with_the_keyboard(opened, logged):
    """Right: to a child, left: back to the parent; down and up: to the neighbours."""
    nodes = nodes_on_page(opened)
    parent = next(logged[name]["parent_id"] for name in nodes if logged[name]["parent_id"])
    opened.click(f'[data-trace="{parent}"]')
    opened.press("ArrowRight")
    child = shown_trace(opened)
    assert logged[child]["parent_id"] == parent
    opened.press("ArrowLeft")
    assert shown_trace(opened) == parent
    assert opened.js("document.activeElement.dataset.trace") == parent
    opened.press("Home")
    seen = []
    for key in ("ArrowDown", "ArrowDown", "ArrowUp"):
        opened.press(key)
        seen.append(shown_trace(opened))
    assert seen == [nodes[1], nodes[2], nodes[1]]


def test_the_slider_takes_the_tree_back_to_an_earlier_version(opened):
    visible = ("[...document.querySelectorAll('.node')].filter(n => "
               "n.getAttribute('display') === 'inline').length")
    counts = [opened.js(visible)]
    opened.js("document.querySelector('#version').focus()")
    for _ in range(3):
        opened.press("ArrowLeft")
        counts.append(opened.js(visible))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1] > 0
    assert opened.js("document.querySelector('#shown').textContent").startswith("version 0: ")
    opened.click("#play")  # and it grows again, up to the last version
    grown = "+document.querySelector('#version').value === 3"
    assert opened.js(f"""new Promise(done => setInterval(() => {grown} && done(true), 50))""")
    assert opened.js(visible) == counts[0]


def test_the_other_panels(opened):
    """Another competition from the table of best scripts, heat map, time, before and after."""
    for number, name in enumerate(sorted(COMPETITIONS)):
        opened.js(f"document.querySelectorAll('#scripts button')[{number}].focus()")
        opened.press("Enter")
        assert opened.js("document.querySelector('#detail h3').textContent").startswith(name)
    titles = opened.js("[...document.querySelectorAll('.cell')].map(c => c.textContent)")
    assert len(titles) == 3 * 2 * 4  # operators, competitions, versions
    assert sum(int(re.search(r": (\d+) group", t)[1]) for t in titles) == 16
    bar = opened.js("[...document.querySelectorAll('.step rect')].slice(0, 5)"
                    ".map(r => +r.getAttribute('height'))")
    assert np.array(bar) / bar[0] == pytest.approx([1, 0.1, 0.5, 3, 2], rel=1e-6)  # seconds_*
    cells = opened.js("[...document.querySelectorAll('tr.sum td')].map(c => c.textContent)")
    assert cells[1:5] == ["20%", "80%", "10%", "40%"]
    opened.js("document.querySelector('#main svg').focus()")
    opened.press("ArrowLeft")
    assert "step 3: " in opened.js("document.querySelector('#main figcaption').textContent")


def test_a_run_with_crossover_has_its_marks_and_its_panel(browser, tmp_path):
    """The operator that is off by default: squares in the tree, a fourth panel in the heat map."""
    run = make_run(tmp_path / "run", steps=8, crossover=True)
    data = module.report(run, tmp_path / "report.html")
    crossed = [i for i, group in enumerate(data["traces"]["group"])
               if data["operators"][data["groups"]["operator"][group]] == "crossover"]
    opened = {data["groups"]["parent"][data["traces"]["group"][i]] for i in crossed}
    assert crossed and all(data["traces"]["opened"][i] for i in opened)
    browser.errors.clear()
    browser.open(tmp_path / "report.html", READY)
    assert browser.errors == []
    assert browser.js("document.querySelectorAll('.cell').length") == 4 * 2 * 8
    right = browser.js("Math.max(...[...document.querySelectorAll('.cell')].map("
                       "c => c.getBoundingClientRect().right))")
    assert right <= browser.js("document.querySelector('#heat svg').getBoundingClientRect().right")
    colors = browser.js("[...document.querySelectorAll('.edge')]"
                        ".map(e => e.getAttribute('stroke'))")
    assert set(colors) <= set(data["colors"]["operators"].values())


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_has_just_begun(browser, tmp_path, steps):
    run = make_run(tmp_path / "run", steps=steps, groups=1)
    (run / "eval.jsonl").unlink()
    (run / "config.json").unlink()
    module.report(run, tmp_path / "report.html")
    browser.errors.clear()
    browser.open(tmp_path / "report.html", READY)
    assert browser.errors == [] and code_on_page(browser).startswith(HOSTILE[:60])


def test_a_long_run_stays_small_and_is_drawn(browser, tmp_path):
    """54 steps of 8 groups of 12 traces, scripts of 2 kB."""
    lines = [f"value_{i} = frame['column_{i}'].fillna({i})\n" for i in range(40)]
    run = make_run(tmp_path / "run", 54, 8, 12, script="".join(lines))
    data = module.report(run, tmp_path / "report.html")
    assert len(data["traces"]["id"]) == 5184
    assert (tmp_path / "report.html").stat().st_size < 1e6
    browser.open(tmp_path / "report.html", READY)
    print(f"drawn {browser.js('performance.now()'):.0f} ms after the navigation")
    assert browser.js("document.querySelectorAll('.node').length") > 300
