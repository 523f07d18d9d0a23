"""The corpus that the tiny policy is taught on: python -m pytest tests/test_tiny_policy.py"""

import ast
import contextlib
import random
from dataclasses import replace
from types import SimpleNamespace

import mini_mlebench as bench
import numpy as np
import pytest
import tiny_policy as tiny

from buffer import Task
from rollout import encode_chat, extract_code, task_messages
from sandbox import Sandbox


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return tiny.make_worlds(random.Random(3), 40, tmp_path_factory.mktemp("worlds"))


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(slots=2, timeout=30, cpu_seconds=20) as sandbox:
        yield sandbox


def test_the_corpus_shares_nothing_with_the_mini_competitions(worlds):
    names = {c for spec, _ in worlds
             for c in (spec.id_column, spec.target, *spec.features, *map(str, spec.labels))}
    assert not {n for n in names if not n.isdigit()} & bench.all_column_names()
    mini = {sentence.strip() for spec in bench.SPECS
            for sentence in (*spec.story.split("."), spec.title) if sentence.strip()}
    corpus = {sentence.strip() for spec, _ in worlds
              for sentence in (*spec.story.split("."), spec.title) if sentence.strip()}
    assert not mini & corpus
    assert not {spec.id for spec, _ in worlds} & {spec.id for spec in bench.SPECS}
    rows = {tuple(r) for spec in bench.SPECS
            for r in bench.build_files(spec).train.astype(str).to_numpy()[:, 1:]}
    for spec, _ in worlds:
        assert not rows & {tuple(r) for r in bench.build_files(spec).train.astype(str).to_numpy()[:, 1:]}


@pytest.mark.parametrize("spelt", [True, False])
def test_scripts_without_mistakes_are_valid(worlds, sandbox, spelt):
    """Each model family once a metric would take long; each world meets some of them."""
    rng = random.Random(int(spelt))
    for spec, competition in worlds[:14]:
        script = replace(tiny.draw_parent(rng, spec), spelt=spelt)
        run = sandbox.run(competition, script.source(spec, rng))
        assert run.valid, f"{spec.metric} {script}\n{run.stderr_tail}{run.reason}"
        assert run.validation_score is not None


def test_every_model_of_the_grammar_exists():
    """Class and arguments, for classes and for numbers; scikit-learn checks them when fitting."""
    from sklearn import (discriminant_analysis, dummy, ensemble, linear_model, naive_bayes,  # noqa: F401
                         neighbors, neural_network, svm, tree)

    for kind, families in (("Classifier", tiny.CLASSIFIERS), ("Regressor", tiny.REGRESSORS)):
        for _, module, name, choices in families:
            for arguments in choices:
                model = eval(f"{module}.{tiny.spell(name, arguments).replace('Kind', kind)}")
                model._validate_params()


@pytest.mark.parametrize("mistake, outcome", [
    ("file", "FileNotFoundError"), ("import", "NameError"), ("column", "Error"),
    ("variable", "X_tset"), ("length", "Error"), ("fit", "NotFitted"),
    ("index", "columns"), ("save", "submission.csv")])
def test_a_mistake_has_its_consequence(worlds, sandbox, mistake, outcome):
    rng = random.Random(0)
    spec, competition = next(w for w in worlds if w[0].metric == "rmse")
    script = tiny.Script(False, (("tree", "DecisionTreeKind(max_depth=3)"),), (), "0",
                         frozenset([mistake]))
    run = sandbox.run(competition, script.source(spec, rng))
    assert not run.valid
    assert outcome in run.stderr_tail + run.reason


def test_a_draft_is_of_one_plain_model_and_arguments_move_by_one_place(worlds):
    rng = random.Random(6)
    spec = next(spec for spec, _ in worlds if spec.labels)
    plain = {(module, tiny.spell(name, a)) for _, module, name, arguments in tiny.CLASSIFIERS
             for a in arguments[:2]}
    drafts = [tiny.answer_to("draft", None, spec, 0.1, rng).models for _ in range(400)]
    assert {model for models in drafts for model in models} == plain
    assert {len(models) for models in drafts} == {1}
    tuned = {tiny.tune_model(rng, spec, ("svm", tiny.spell("SVC", "C=1"))) for _ in range(50)}
    assert tuned == {("svm", f"SVC(C={c}, probability=True, random_state=0)") for c in ("0.1", "3")}
    last = tiny.tune_model(rng, spec, ("naive_bayes", "GaussianNB(var_smoothing=0.1)"))
    assert last == ("naive_bayes", "GaussianNB()")
    only = ("discriminant_analysis", "LinearDiscriminantAnalysis()")
    assert tiny.tune_model(rng, spec, only) == only


def test_an_improvement_changes_one_thing_and_a_repair_drops_the_mistakes(worlds):
    rng, changes = random.Random(4), set()
    for _ in range(300):
        spec, _ = rng.choice(worlds)
        parent = tiny.draw_parent(rng, spec, frozenset(["save"]))
        assert tiny.answer_to("debug", parent, spec, 0.0, rng) == replace(
            parent, mistakes=frozenset())
        better = tiny.answer_to("improve", parent, spec, 0.0, rng)
        old, new = parent.models, better.models
        same = sum(a == b for a, b in zip(old, new))
        changed = ((old != new) + (parent.steps != better.steps), len(new) - len(old),
                   max(len(old), len(new)) - same)
        assert changed in {(1, 0, 0), (1, 0, 1), (1, 1, 1), (1, -1, 1)}, (parent, better)
        changes.add(changed)
        assert (better.spelt, better.fill) == (parent.spelt, parent.fill) and not better.mistakes
        assert 1 <= len(new) <= 3
    assert len(changes) == 4  # steps, a model, one more, one less


def test_lessons_are_parts_of_scripts_then_whole_ones(worlds):
    lessons = tiny.make_lessons(random.Random(5), worlds, 30, 20)
    assert len(lessons) == 50
    for index, (text, answer) in enumerate(lessons[:30]):
        assert text.startswith("X_test = X_test.fillna(") and "model = ensemble.Voting" in answer
        ast.parse(answer)
        old, _, word = text.removesuffix("\n").rpartition("\n")
        assert word == ("copy", "improve")[index % 2] and (answer == old + "\n") == (index % 2 == 0)
    for text, answer in lessons[30:]:
        code, reason = extract_code(answer)
        assert text == f"{answer}\ncopy\n" and "sub.to_csv" in code and not reason


def test_answers_are_found_by_the_rollout_and_parse(worlds):
    rng = random.Random(1)
    for spec, _ in worlds:
        source = tiny.Script.draw(rng, spec, 0.2).source(spec, rng)
        code, reason = extract_code(f"```python\n{source}```")
        assert code == source and not reason
        ast.parse(code)


def test_tokenizer_round_trip_and_chat_template(worlds):
    rng = random.Random(2)
    texts = [tiny.Script.draw(rng, spec, 0.1).source(spec, rng) for spec, _ in worlds]
    tokenizer = tiny.make_tokenizer(texts, 600)
    foreign = "```python\nprint('Grüße', 12)\n```\n"
    assert tokenizer.decode(tokenizer.encode(foreign)) == foreign
    spec, competition = worlds[0]
    ids = encode_chat(tokenizer, task_messages(competition, Task.root(spec.id), tiny.BUDGET))
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>user\n") and text.endswith("<|im_start|>assistant\n")
    assert f"Metric: {bench.METRICS[spec.metric].plain}" in text


def test_teaching_lowers_the_loss(tmp_path):
    from learner import Sequence

    tokenizer = tiny.make_tokenizer(["a b c"], 300)
    tiny.make_model(tokenizer, 64, 1, 0).save_pretrained(tmp_path)
    family = [Sequence(np.arange(10, dtype=np.int32), 2, np.zeros(8, np.float32), 0.0)]
    assert tiny.teach(tmp_path, [family] * 60, 1, 3e-3) < 0.5  # it starts at log(300) = 5.7


def test_a_machine_without_isolation_is_told_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "make_worlds", lambda *_: 1 / 0)
    monkeypatch.setattr(tiny, "Sandbox", lambda **_: contextlib.nullcontext(
        SimpleNamespace(problem="no Landlock")))
    assert tiny.main(["--out", str(tmp_path / "policy")]) == 3
    assert "cannot be isolated here: no Landlock; --unsafe" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--answers=0"], "--answers 0: at least 1"), (["--batch-tokens=-1"], "--batch-tokens -1"),
    (["--hidden=100"], "a multiple of 64"), (["--out=/dev/null/x"], "--out /dev/null/x: ")])
def test_bad_flags_are_refused_before_anything_is_made(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "Sandbox", lambda **_: 1 / 0)
    with pytest.raises(SystemExit) as ended:
        tiny.main([f"--out={tmp_path / 'policy'}", *flags])
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_out_is_replaced_last_and_only_by_a_model_that_was_taught(tmp_path, monkeypatch, capsys):
    """`make data` takes a config.json that is there for a policy that was taught."""
    out = tmp_path / "policy"

    def make():
        return tiny.main(["--out", str(out), "--hidden=64", "--layers=1", "--vocabulary=300",
                          "--batch-tokens=1", "--lessons=0"])

    examples = [([{"role": "user", "content": "a"}], ["b c", "d"])] * 3
    for name, fake in {"make_worlds": lambda *_: [], "make_examples": lambda *_: examples,
                       "Sandbox": lambda **_: contextlib.nullcontext(
                           SimpleNamespace(problem=""))}.items():
        monkeypatch.setattr(tiny, name, fake)
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit) as ended:
        make()
    assert ended.value.code == 2 and "no model directory" in capsys.readouterr().err
    assert (out / "thesis.txt").read_text() == "years of work"

    (out / "thesis.txt").unlink()
    taught = tiny.teach
    monkeypatch.setattr(tiny, "teach", lambda *_: 1 / 0)
    for there in (set(), {"config.json", "tokenizer.json"}):
        for name in there:
            (out / name).write_text("old")
        with pytest.raises(ZeroDivisionError):
            make()
        assert {path.name for path in out.iterdir()} == there
    monkeypatch.setattr(tiny, "teach", taught)
    assert make() == 0
    assert (out / "config.json").read_text() != "old" and (out / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
