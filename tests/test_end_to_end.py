"""The real thing, small: vLLM, torchrun, sandboxed scripts, weight updates, kills and resumes.

    python -m pytest tests/test_end_to_end.py

The policy is taught in half a minute to write three kinds of scripts, of which one works: rewards
differ within groups, so every step really updates the weights.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
SECRET = "canary-5bd1c6"  # in the environment of every run
COMPETITIONS = {"train": ("rail-wear", "hive-swarms", "tide-mills"), "heldout": ("loom-breaks",)}


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A directory with competitions/{train,heldout} and policy/, as `make data` would write them."""
    import mini_mlebench as bench
    import tiny_policy as tiny
    from buffer import Task
    from learner import Sequence
    from rollout import encode_chat, task_messages
    from sandbox import Competition

    folder = tmp_path_factory.mktemp("world")
    references = bench.load_references(0)
    rng, families, texts = random.Random(0), [], []
    for spec in bench.SPECS:
        for split, names in COMPETITIONS.items():
            if spec.id in names:
                bench.write_competition(spec, folder / "competitions" / split, 0,
                                        references[spec.id])
                competition = Competition.load(folder / "competitions" / split / spec.id)
                messages = task_messages(competition, Task.root(spec.id), tiny.BUDGET)
                answers = []
                for index in range(8):
                    tree = (("tree", "DecisionTreeKind(max_depth=3)"),)
                    mistakes = frozenset([(), ("variable",), ("save",)][index % 3])
                    script = tiny.Script(False, tree, (), "0", mistakes)
                    answers.append(f"```python\n{script.source(spec, rng)}```")
                families.append((messages, answers))
                texts += [messages[0]["content"], *answers]
    tokenizer = tiny.make_tokenizer(texts, 768)
    model = tiny.make_model(tokenizer, hidden=128, layers=2, seed=0)
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    sequences = []
    for messages, answers in random.Random(0).sample(families * 60, 60 * len(families)):
        prompt = encode_chat(tokenizer, messages)
        ids = [tokenizer.encode(a) + [tokenizer.eos_token_id] for a in answers]
        sequences.append([Sequence(np.array(prompt + i, np.int32), len(prompt),
                                   np.zeros(len(i), np.float32), 0.0) for i in ids])
    loss = tiny.teach(folder / "policy", sequences, 1500, 3e-3)
    assert loss < 0.2, "the policy of the tests has not learnt its scripts"
    return folder


def arguments(world: Path, run_dir: Path, **flags) -> list[str]:
    values = dict(preset="tiny", model=world / "policy", run_dir=run_dir,
                  competitions=world / "competitions/train",
                  heldout=world / "competitions/heldout", steps=3, groups=3, responses=6,
                  eval_drafts=4, rollout_threads=4, checkpoint_every=1, max_model_len=1536,
                  max_response_tokens=192, learner_threads=1, engine_threads=1) | flags
    return [str(ROOT / "train.py")] + [
        part for name, value in values.items()
        for part in ("--" + name.replace("_", "-"), str(value))]


def torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
            "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
            "--log-dir=torchrun"]  # else it leaves a temporary folder


class Started:
    """A run in a session of its own, and a way to find whatever descends from it."""

    def __init__(self, command: list[str], log: Path):
        self.log, self.shm, self.time = log, shared_memory(), time.time()
        self.temporary = tempfile.mkdtemp(dir=log.parent)
        with open(log, "a") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent,
                start_new_session=True,
                env={**os.environ, "ACEGRPO_TEST": str(log), "OMP_NUM_THREADS": "1",
                     "SECRET_TOKEN": SECRET,
                     "TMPDIR": self.temporary,
                     # what vLLM compiles at its first start is kept for the next
                     "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor-tests"})

    def alive(self) -> list[psutil.Process]:
        """Processes that carry our mark in their environment, and sandbox processes, whose
        environment is empty, that belong to a marked one or have lost their owner."""
        found = []
        for process in psutil.process_iter():
            try:
                owner = process
                while "sandbox.py" in " ".join(owner.cmdline()):
                    owner = owner.parent()
                lost = owner.pid == 1 and process.create_time() > self.time and owner != process
                marked = owner.environ().get("ACEGRPO_TEST") == str(self.log)
                if (lost or marked) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, AttributeError):
                pass
        return found

    def finish(self, seconds: float) -> str:
        """Wait for a successful end; returns what was printed."""
        status = self.process.wait(seconds)
        text = self.log.read_text()
        assert status == 0, text[-3000:]
        return text

    def assert_nothing_stays(self) -> None:
        wait_until(lambda: not self.alive(), 30, f"the end of {self.alive()}", self.log)
        wait_until(lambda: not (left := shared_memory() - self.shm) or not (left - in_use(left)), 10,
                   f"clean shared memory {shared_memory() - self.shm}")
        def left_behind():  # torch keeps what it has compiled, for the next run
            return [n for n in os.listdir(self.temporary) if not n.startswith("torchinductor_")]

        wait_until(lambda: not left_behind(), 10, f"a clean temporary folder {left_behind()}")


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def in_use(names: set[str]) -> set[str]:
    """Those that a living process has mapped or knows by its arguments: another run's."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_text() + (process / "maps").read_text()
            found |= {name for name in names if name in text}
        except (OSError, UnicodeDecodeError):
            pass  # it has ended
    return found


def wait_until(condition, seconds: float, what: str, log: Path | None = None) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            tail = log.read_text()[-3000:] if log else ""
            pytest.fail(f"{what} did not happen within {seconds} s\n{tail}")
        time.sleep(0.2)


def rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    # What follows the last newline is torn, or nothing.
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def check_run(run_dir: Path, steps: int) -> None:
    metrics = rows(run_dir / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, steps + 1))
    trained = [m for m in metrics if m["logprob_gap"] is not None]
    assert trained, "no step changed the policy"
    assert all(m["logprob_gap"] < 1e-3 for m in trained)
    assert all(0 < m["entropy"] < 10 and np.isfinite(m["loss"]) for m in trained)
    assert max(m["staleness_max"] for m in metrics) <= 2
    evaluations = rows(run_dir / "eval.jsonl")
    assert {(e["when"], e["split"]) for e in evaluations} == {
        (when, split) for when in ("before", "after") for split in ("train", "heldout")}
    traces = rows(run_dir / "traces.jsonl")
    assert any(t["valid"] and t["human_rank"] > 0 for t in traces)
    assert any(t["status"] == "error" and "X_tset" in t["output"] for t in traces)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(run_dir / "policy").chat_template
    assert AutoModelForCausalLM.from_pretrained(run_dir / "policy").num_parameters() > 0


def test_torchrun_with_two_ranks(world, tmp_path):
    run = Started(torchrun(2) + arguments(world, tmp_path / "run"), tmp_path / "log")
    run.finish(300)
    check_run(tmp_path / "run", 3)
    run.assert_nothing_stays()
    for path in [run.log, *(tmp_path / "run").rglob("*")]:
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert (tmp_path / "run").stat().st_mode & 0o077 == 0
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2  # pruned to the last two


def test_kill_and_resume(world, tmp_path):
    """kill -9 of the single process in mid-run; the resumed run goes on from its checkpoint."""
    log, run_dir = tmp_path / "log", tmp_path / "run"
    run = Started([sys.executable] + arguments(world, run_dir, steps=40), log)
    wait_until(lambda: len(rows(run_dir / "metrics.jsonl")) >= 2, 200, "two steps", log)
    run.process.kill()
    run.process.wait()
    run.assert_nothing_stays()
    done = sorted(int(p.parent.name.split("_")[1]) for p in run_dir.glob("checkpoints/*/DONE"))
    saved = json.loads((run_dir / f"checkpoints/step_{done[-1]}/curriculum.json").read_text())
    assert saved["step"] == done[-1]
    finished = rows(run_dir / "groups.jsonl")

    steps = done[-1] + 2
    run = Started([sys.executable, str(ROOT / "train.py"), "--resume", str(run_dir),
                   "--steps", str(steps)], log)
    assert f"after step {done[-1]}" in run.finish(300)
    check_run(run_dir, steps)
    groups = rows(run_dir / "groups.jsonl")
    assert groups[:len(finished)] == finished and len(groups) > len(finished)  # nothing is lost
    assert [g["sequence"] for g in groups] == list(range(1, len(groups) + 1))
    assert {g["epoch"] for g in groups if "traces" in g} == {0, 1}
    versions = [m["policy_version"] for m in rows(run_dir / "metrics.jsonl")]
    assert versions == sorted(versions) and versions[-1] >= saved["version"]
    run.assert_nothing_stays()


def test_ctrl_c_cleans_up(world, tmp_path):
    log, run_dir = tmp_path / "log", tmp_path / "run"
    run = Started([sys.executable] + arguments(world, run_dir, steps=40, eval_drafts=0), log)
    # Two steps, so that the first step's checkpoint is complete and another may be under way.
    wait_until(lambda: len(rows(run_dir / "metrics.jsonl")) >= 2, 200, "two steps", log)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(60) == 130
    assert "--resume" in log.read_text()
    run.assert_nothing_stays()


@pytest.mark.parametrize("victim", ["torchrun", "learner", "rollout"])
def test_kill_9_under_torchrun_leaves_nothing(world, tmp_path, victim):
    log, run_dir = tmp_path / "log", tmp_path / "run"
    run = Started(torchrun(2) + arguments(world, run_dir, steps=40, eval_drafts=0), log)
    wait_until(lambda: len(rows(run_dir / "metrics.jsonl")) >= 1, 200, "a step", log)
    agent = psutil.Process(run.process.pid)
    ranks = {c.environ()["RANK"]: c for c in agent.children() if "RANK" in c.environ()}
    {"torchrun": agent, "learner": ranks["0"], "rollout": ranks["1"]}[victim].kill()
    assert run.process.wait(60) != 0
    run.assert_nothing_stays()


@pytest.mark.long
def test_two_learner_and_two_rollout_ranks(world, tmp_path):
    run = Started(torchrun(4) + arguments(world, tmp_path / "run", learner_ranks=2),
                  tmp_path / "log")
    run.finish(400)
    check_run(tmp_path / "run", 3)
    run.assert_nothing_stays()


@pytest.mark.long
def test_eight_ranks(world, tmp_path):
    run = Started(torchrun(8) + arguments(world, tmp_path / "run", steps=2, kv_cache_gib=0.1),
                  tmp_path / "log")
    run.finish(900)
    check_run(tmp_path / "run", 2)
    run.assert_nothing_stays()


# A node of its own: shared memory, a network with one wire to the other node, and (the second) an
# empty folder where the first has the run and the tests' files. Says what it leaves behind.
NODE = """
set -e
mount -t tmpfs tmpfs /dev/shm
if [ $NUMBER = 1 ]; then
    cp -r $WORLD /dev/shm/copy
    mount -t tmpfs tmpfs $BASE
    mkdir -p $WORLD $HOME_OF_RUN $TMPDIR
    mv /dev/shm/copy/* $WORLD
    rmdir /dev/shm/copy
fi
cd $HOME_OF_RUN
until ip link show wire >$HOME_OF_RUN/wire 2>&1; do sleep 0.1; done
ip address add 10.77.0.$((NUMBER + 1))/24 dev wire
ip link set lo up
ip link set wire up
export GLOO_SOCKET_IFNAME=wire
status=0
"$@" --node-rank=$NUMBER $ARGUMENTS || status=$?
for i in $(seq 100); do [ -z "$(ls -A /dev/shm)" ] || sleep 0.1; done
ls -A /dev/shm | sed "s/^/left behind: /"
exit $status
"""


@pytest.mark.long
def test_two_nodes_without_a_shared_directory(world, tmp_path, monkeypatch):
    """Two torchrun agents in mount and network namespaces of their own; rank 0 learns, an engine
    beside it and two on the other node roll out."""
    if subprocess.run(["unshare", "-n", "-m", "true"], capture_output=True).returncode:
        pytest.skip("namespaces cannot be made here (it takes root)")
    run_dir = tmp_path / "run"
    monkeypatch.setenv("WORLD", str(world))
    monkeypatch.setenv("BASE", str(world.parent))
    monkeypatch.setenv("HOME_OF_RUN", str(tmp_path))
    monkeypatch.setenv("ARGUMENTS", " ".join(
        arguments(world, run_dir, learner_ranks=1, kv_cache_gib=0.1)))
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2",
             "--master-addr=10.77.0.1", "--master-port=29400", "--log-dir=torchrun"]
    nodes = []
    for number in ("0", "1"):
        monkeypatch.setenv("NUMBER", number)
        nodes.append(Started(["unshare", "-n", "-m", "sh", "-c", NODE, "sh", *agent],
                             tmp_path / f"log{number}"))
    first, second = (str(node.process.pid) for node in nodes)
    wait_until(lambda: len({os.readlink(f"/proc/{pid}/ns/net")
                            for pid in ("self", first, second)}) == 3, 10, "two networks")
    subprocess.run(["ip", "link", "add", "wire", "netns", first, "type", "veth",
                    "peer", "name", "wire", "netns", second], check=True)
    for node in nodes:
        assert "left behind" not in node.finish(900)
    check_run(run_dir, 3)
    for node in nodes:
        node.assert_nothing_stays()


@pytest.mark.parametrize("tied", [True, False])
def test_engine_and_learner_agree_after_an_update(world, tmp_path, tied):
    """The trap: with tied embeddings an update without lm_head.weight leaves the old head."""
    from rollout import Engine, EngineConfig
    from learner import Learner, LearnerConfig, Sequence
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "policy", tie_word_embeddings=tied)
    shutil.copytree(world / "policy", tmp_path / "policy")
    (tmp_path / "policy/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "policy")
    learner = Learner(tmp_path / "policy", LearnerConfig(
        learning_rate=1e-2, loss="dapo", max_response_tokens=64))
    engine = Engine(tmp_path / "policy", EngineConfig(max_model_len=256, kv_cache_gib=0.1))
    try:
        tokens = [int(t) for t in np.random.default_rng(0).integers(3, 700, 60)]
        before = engine.score(tokens)
        assert np.abs(before - learner.score(tokens)).mean() < 1e-4
        behavior = before[19:]
        learner.step([Sequence(np.array(tokens, np.int32), 20, behavior, 1.0)])
        learner.publish(tmp_path / "v1")
        engine.load(tmp_path / "v1", 1)
        after = engine.score(tokens)
        assert np.abs(after - before).mean() > 0.05  # the step did change the policy
        assert np.abs(after - learner.score(tokens)).mean() < 1e-4
        for temperature in (1.0, 0.7):  # sampled log-probabilities are the learner's too
            completions, version = engine.generate(tokens[:20], 2, 8, temperature)
            assert version == 1
            for completion in completions:
                own = learner.score(tokens[:20] + completion.token_ids, temperature)[19:]
                assert np.abs(own - completion.logprobs).max() < 1e-3
    finally:
        engine.close()


def make_family(name: str, world: Path, directory: Path) -> None:
    """A random-init model of a family, with the tokenizer of the world's policy."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {"llama": {}, "gemma3_text": dict(
               sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
           # Experts of 48: vLLM's CPU kernel pads them to 64.
           "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
                             decoder_sparse_step=1, norm_topk_prob=True)}[name]
    shutil.copytree(world / "policy", directory, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(
        name, vocab_size=768, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, initializer_range=0.2,
        max_position_embeddings=256, **own)).save_pretrained(directory)


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_a_family_learns_publishes_and_samples(world, tmp_path, family):
    """Learner steps, publications and engine updates, twice: the engine follows each of them."""
    from rollout import Engine, EngineConfig
    from learner import Learner, LearnerConfig, Sequence

    make_family(family, world, tmp_path / "policy")
    learner = Learner(tmp_path / "policy", LearnerConfig(
        learning_rate=1e-2, loss="dapo", max_response_tokens=64))
    engine = Engine(tmp_path / "policy", EngineConfig(max_model_len=256, kv_cache_gib=0.1))
    try:
        tokens = [int(t) for t in np.random.default_rng(0).integers(3, 700, 60)]
        scores = [engine.score(tokens)]
        assert np.abs(scores[0] - learner.score(tokens)).max() < 1e-3
        for version in (1, 2):
            learner.step([Sequence(np.array(tokens, np.int32), 20, scores[-1][19:], 1.0)])
            learner.publish(tmp_path / "published")
            engine.load(tmp_path / "published", version)
            scores.append(engine.score(tokens))
            gap = np.abs(scores[-1] - learner.score(tokens)).max()
            print(f"{family}: largest difference at version {version} {gap:.1e} nat")
            assert gap < 1e-3
            assert np.abs(scores[-1] - scores[-2]).mean() > 0.05  # the step did change the policy
        completion = engine.generate(tokens[:20], 1, 16)[0][0]
        own = learner.score(tokens[:20] + completion.token_ids)[19:]
        assert np.abs(own - completion.logprobs).max() < 1e-3
    finally:
        engine.close()


# train.py with a learner that forgets the output head in all versions but the first.
SABOTAGE = """
import sys
import learner, train
published = learner.Learner._published

def forgetful(self, tensors):
    tensors = published(self, tensors)
    if self.version > 0:
        tensors.pop("lm_head.weight", None)
    return tensors

learner.Learner._published = forgetful
if __name__ == "__main__":
    train.leave(train.main(sys.argv[1:]))
"""


@pytest.mark.long
def test_weights_that_are_not_taken_over_stop_the_run(world, tmp_path):
    """The trap of tied embeddings, for real: the engine's old head is found by the probe."""
    (tmp_path / "sabotage.py").write_text(SABOTAGE)
    command = [sys.executable, str(tmp_path / "sabotage.py"),
               *arguments(world, tmp_path / "run", steps=8, eval_drafts=0, learning_rate=1e-2,
                          max_grad_norm=1.0, warmup_steps=0)[1:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        run = Started(command, tmp_path / "log")
    assert run.process.wait(400) == 2, run.log.read_text()[-3000:]
    assert "engine and learner disagree after the update to version" in run.log.read_text()
    run.assert_nothing_stays()


@pytest.mark.long
def test_an_evaluation_that_is_killed_goes_on(world, tmp_path):
    """kill -9 of rollout.py with the real engine: nothing stays, and no finished step is lost."""
    log, out = tmp_path / "log", tmp_path / "out"
    command = [sys.executable, str(ROOT / "rollout.py"), "--model", str(world / "policy"),
               "--competitions", str(world / "competitions/train"), "--steps", "6", "--seeds", "2",
               "--out", str(out / "report.json"), "--parallel", "3", "--kv-cache-gib", "0.1",
               "--max-model-len", "1536", "--max-response-tokens", "192"]

    def record():
        return {path: path.read_text().splitlines() for path in out.glob("*/*/steps.jsonl")}

    run = Started(command, log)
    wait_until(lambda: sum(map(len, record().values())) >= 8, 400, "eight steps", log)
    run.process.kill()
    run.process.wait()
    run.assert_nothing_stays()
    done = record()
    assert not (out / "report.json").exists() and sum(map(len, done.values())) < 36
    run = Started(command, log)
    run.finish(600)
    run.assert_nothing_stays()
    report = json.loads((out / "report.json").read_text())
    assert [row["steps"] for row in report["runs"]] == [6] * 6
    assert report["totals"]["valid_rate"]["mean"] > 0
    for path, lines in done.items():
        assert record()[path][:len(lines)] == lines
    for row, line in zip(report["runs"], rows(out / "submissions.jsonl")):
        assert row["valid"] == bool(line["submission_path"]) == bool(
            line["submission_path"] and os.path.isfile(line["submission_path"]))
