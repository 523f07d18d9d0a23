"""Teach a tiny language model, from scratch, to write scikit-learn scripts that sometimes work.

    python examples/tiny_policy.py --out data/policy        # 6 minutes on two quick cores

What it is: a Qwen3 of about 2 million parameters with its own tokenizer and chat template, a
drop-in for any Hugging Face causal model, so that the whole of AceGRPO (vLLM, sandbox, FSDP,
weight updates) runs on a laptop. It has learnt one thing: the shape of a short scikit-learn
script, for prompts exactly as rollout.py builds them, for all three operators.

What it is not: a language model. It cannot read a description beyond the metric, the task kind
and a few words; it knows some twenty estimators and a dozen ways to go wrong. It was taught
mistakes on purpose: of its first drafts two in five were valid, 1 % won a medal (see README). That
is the room that reinforcement learning has. It says nothing about what AceGRPO does for a real model.

How it is taught (everything here is [ours]):

1. `make_worlds`    random competitions; their names mean nothing but are spelt like English, and
                    nothing is shared with the mini benchmark
2. `Script`         a grammar: model, hyper-parameters, preprocessing, mistakes -> source
3. `make_examples`  draft, improve and debug answers. Failing parents are executed in the real
                    sandbox, so that debug prompts hold real tracebacks
4. `make_lessons`   first of all, copying and improving parts of scripts, copying whole ones
5. `make_tokenizer`, `teach`: byte-level BPE over whole lines, next-token prediction on answers
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mini_mlebench as bench  # noqa: E402
from buffer import Task, Trace  # noqa: E402
from learner import Sequence  # noqa: E402
from rollout import PromptBudget, encode_chat, record_run, task_messages  # noqa: E402
from sandbox import Competition, Sandbox  # noqa: E402

# The budget of train.py's tiny preset: the policy is taught what it will be asked.
BUDGET = PromptBudget(description=600, preview=240, output=300)

# ---------------------------------------------------------------------------------------------
# 1. Random competitions


ONSETS = (3 * "b c d f g h k l m n p r s t v w " + "j y z "
          "bl br ch cl cr dr fl fr gl gr pl pr qu sc sh sk sl sp st sw th tr wh").split()
VOWELS = "a e i o u a e i o u a e i o ai ea ee io oo ou y".split()
CODAS = (*[""] * 12, *"b d g k l m n p r s t x ck ct ld ll nd ng nt rd rt ss st".split())
GLUE = "the the the of a and in is to with by from that which for on are as at its when".split()


def nonsense(rng: random.Random, taken: set[str]) -> str:
    """A pronounceable word that is not in `taken`, which it then joins. It means nothing, but is
    spelt like English, so that the tokenizer and the policy are at ease with real names."""
    while True:
        word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
                       for _ in range(rng.choice((1, 2, 2, 2, 3))))
        if word not in taken and len(word) > 3:
            taken.add(word)
            return word


def make_story(rng: random.Random) -> str:
    """One or two sentences without meaning."""
    sentences = []
    for _ in range(rng.choice((1, 2, 2))):
        words = [rng.choice(GLUE) if rng.random() < 0.4 else nonsense(rng, set())
                 for _ in range(rng.randint(4, 12))]
        words[rng.randrange(len(words))] += rng.choice(("", "", ",", ";"))
        sentences.append(" ".join(words).capitalize() + ".")
    return " ".join(sentences)


def make_world(rng: random.Random, number: int, taken: set[str]) -> bench.Spec:
    """One random competition. Names and story mean nothing; the data have some structure."""
    # Half of the worlds are regressions: with all metrics alike the policy, when in doubt, takes
    # numbers for classes.
    regression = rng.random() < 0.5
    metric = rng.choice([name for name, m in bench.METRICS.items()
                         if (m.form == "number") == regression])
    classes = 0 if regression else 2 if metric in ("f1", "roc_auc") else rng.choice((2, 3, 3, 4))
    if classes == 2 and metric != "accuracy":
        labels = (0, 1)
    elif rng.random() < 0.5:
        labels = tuple(range(classes))
    else:
        labels = tuple(sorted(nonsense(rng, taken) for _ in range(classes)))
    count = rng.randint(4, 14)
    texts = rng.choice((0, 0, 1, 2))
    holes = rng.choice((0, 0, 1, 2))

    def make(generator, n):
        x = generator.normal(size=(n, count))
        weights = generator.normal(size=count) * (generator.random(count) < 0.6)
        signal = x @ weights + np.sin(2 * x[:, 0]) * 2 + x[:, 1] * x[:, 2]
        signal = (signal + generator.normal(size=n) * signal.std()) / signal.std()
        columns = [x[:, k] * 10.0 ** generator.integers(-1, 3) + generator.integers(0, 9)
                   for k in range(count)]
        for k in range(texts):
            words = np.array([nonsense(rng, set()) for _ in range(3)], object)
            columns[k] = words[np.digitize(x[:, k], (-0.5, 0.5))]
        for k in range(count - holes, count):
            columns[k][generator.random(n) < 0.1] = np.nan
        if regression:
            return bench.Table(columns, signal * 7 + 30)
        edges = np.quantile(signal, np.linspace(0, 1, classes + 1)[1:-1])
        return bench.Table(columns, np.digitize(signal, edges))

    def name():
        word = nonsense(rng, taken)
        return word + rng.choice(("", "", f"_{nonsense(rng, taken)}", f"_{rng.randint(1, 9)}"))

    word = nonsense(rng, taken)
    return bench.Spec(
        id=f"world-{number}", split="corpus", title=f"{word.title()} {nonsense(rng, taken)}",
        story=make_story(rng),
        origin=rng.choice(("generated", "real")), metric=metric, id_column=name(),
        id_format=rng.choice(("{:d}", "{:d}", word[:2].upper() + "-{:04d}")), target=name(),
        features=tuple(name() for _ in range(count)),
        rows=(rng.randrange(150, 300, 10), rng.randrange(60, 120, 10)), labels=labels, make=make)


def make_worlds(rng: random.Random, count: int, folder: Path) -> list[tuple]:
    """(Spec, Competition) pairs, written below `folder` like any other competition."""
    # The corpus must share no name with the competitions that the policy is tried on.
    taken, worlds = set(bench.all_column_names()), []
    for number in tqdm(range(count), desc="random competitions", unit=""):
        spec = make_world(rng, number, taken)
        best = (0.1, 0.5, 0.9) if not bench.METRICS[spec.metric].lower_is_better else (9, 5, 1)
        bench.write_competition(spec, folder, number, dict(zip(("dummy", "forest", "best"), best)))
        worlds.append((spec, Competition.load(folder / spec.id)))
    return worlds


# ---------------------------------------------------------------------------------------------
# 2. The grammar of scripts

# Model families: weight in the corpus, module, class (Kind is Classifier or Regressor), arguments
# from plain to tuned: a draft takes one of the first PLAIN, an improvement moves to a neighbour.
# Weak families weigh more: which ones are good is left to reinforcement learning to find out.
PLAIN = 2
FAMILIES = [
    (10, "dummy", "DummyKind", [""]),
    (16, "tree", "DecisionTreeKind", ["max_depth=2", "max_depth=3", "max_depth=5", "max_depth=8"]),
    (16, "neighbors", "KNeighborsKind", ["1", "3", "8", "20", "20, weights=\"distance\""]),
    (6, "ensemble", "AdaBoostKind", ["n_estimators=10", "n_estimators=25", "n_estimators=50"]),
    (5, "ensemble", "RandomForestKind",
     ["n_estimators=10, max_depth=3", "n_estimators=10", "n_estimators=30", "n_estimators=80"]),
    (4, "ensemble", "ExtraTreesKind",
     ["n_estimators=10, max_depth=3", "n_estimators=10", "n_estimators=30", "n_estimators=80"]),
    (4, "ensemble", "GradientBoostingKind",
     ["n_estimators=5", "n_estimators=20", "n_estimators=50", "n_estimators=50, learning_rate=0.2",
      "n_estimators=80, learning_rate=0.2, subsample=0.5"]),
    (3, "neural_network", "MLPKind",
     ["hidden_layer_sizes=(8,), max_iter=50", "hidden_layer_sizes=(32,), max_iter=150",
      "hidden_layer_sizes=(32,), solver=\"lbfgs\", alpha=3"]),
    (4, "ensemble", "HistGradientBoostingKind",
     ["max_iter=5", "max_iter=20", "max_iter=60", "max_iter=60, max_leaf_nodes=8"]),
]
CLASSIFIERS = FAMILIES + [
    (14, "naive_bayes", "GaussianNB", ["", "var_smoothing=0.1"]),
    (8, "linear_model", "LogisticRegression",
     ["C=0.001, max_iter=500", "C=0.01, max_iter=500", "C=0.1, max_iter=500", "C=1, max_iter=500"]),
    (4, "discriminant_analysis", "LinearDiscriminantAnalysis", [""]),
    (4, "discriminant_analysis", "QuadraticDiscriminantAnalysis",
     ["reg_param=0.9", "reg_param=0.5", "reg_param=0.2", "reg_param=0.05"]),
    (5, "svm", "SVC", ["C=0.01", "C=0.1", "C=1", "C=3", "C=10"]),
]
REGRESSORS = FAMILIES + [
    (8, "linear_model", "Ridge", ["1000", "50", "3", "0.1"]),
    (5, "linear_model", "Lasso", ["3", "0.3", "0.03"]),
    (3, "linear_model", "HuberRegressor", ["max_iter=500"]),
    (6, "svm", "SVR", ["C=0.1", "C=1", "C=10", "C=100", "C=1000, gamma=0.03"]),
]
# Preprocessing before the model.
STEPS = [
    (6, ()),
    (4, ("StandardScaler()",)),
    (2, ("MinMaxScaler()",)),
    (2, ("StandardScaler()", "PolynomialFeatures(2)", "StandardScaler()")),
    (2, ("StandardScaler()", "SplineTransformer()")),
    (2, ("QuantileTransformer(n_quantiles=100, output_distribution=\"normal\")",)),
]
# Realistic mistakes. Some crash, some make the submission invalid, some only cost score.
MISTAKES = (
    "file",  # a data file that does not exist
    "import",  # the import of the model's module is missing
    "column",  # a misspelt column name
    "keep_id",  # the id stays among the features
    "keep_target",  # the target stays among the training features; the test rows have 0 there
    "impute",  # missing values stay
    "encode",  # text columns stay
    "form",  # labels where probabilities are asked, or the other way round
    "kind",  # a regressor for classes, a classifier for numbers
    "variable",  # a name that was never assigned
    "length",  # predictions for training rows, not for the test rows
    "index",  # the data frame's index becomes a column of the submission
    "save",  # the submission is written under another name
    "fit",  # the model is never fitted
)


# Whole modules: which estimator is used is then decided in one place of the script.
IMPORTS = (
    "import pandas as pd",
    "from sklearn import ensemble, linear_model, neighbors, svm, tree",
    "from sklearn import discriminant_analysis, dummy, naive_bayes, neural_network",
    "from sklearn import metrics, model_selection, preprocessing",
)


def pick(rng: random.Random, weighted: list[tuple]):
    return rng.choices(weighted, [w for w, *_ in weighted])[0]


def spell(name: str, arguments: str) -> str:
    """A model's class with all its arguments."""
    fixed = {"SVC": "probability=True, random_state=0"}.get(name, "random_state=0")
    if name in ("DummyKind", "KNeighborsKind", "GaussianNB", "SVR", "HuberRegressor",
                "LinearDiscriminantAnalysis", "QuadraticDiscriminantAnalysis"):
        fixed = ""
    return f"{name}({', '.join(filter(None, (arguments, fixed)))})"


def draw_model(rng: random.Random, spec: bench.Spec, plain: bool = True) -> tuple[str, str]:
    """(module, class with arguments)."""
    _, module, name, arguments = pick(rng, CLASSIFIERS if spec.labels else REGRESSORS)
    return module, spell(name, rng.choice(arguments[:PLAIN] if plain else arguments))


def tune_model(rng: random.Random, spec: bench.Spec, model: tuple[str, str]) -> tuple[str, str]:
    """The model with the next arguments or the ones before; itself where there are no others."""
    module, text = model
    name = text.partition("(")[0]
    arguments = next(f[3] for f in (CLASSIFIERS if spec.labels else REGRESSORS) if f[2] == name)
    spelt = [spell(name, a) for a in arguments]
    at = spelt.index(text)
    beside = spelt[max(at - 1, 0):at] + spelt[at + 1:at + 2]
    return module, rng.choice(beside or spelt)


@dataclass(frozen=True)
class Script:
    """One script of the grammar, before it is spelt out for a competition."""

    spelt: bool  # the target's name is spelt out, else taken from the tables
    models: tuple[tuple[str, str], ...]  # (module, class with arguments), averaged if several; in
    # the class Kind stands for Classifier or Regressor
    steps: tuple[str, ...]
    fill: str
    mistakes: frozenset[str]

    @classmethod
    def draw(cls, rng: random.Random, spec: bench.Spec, rate: float) -> "Script":
        """A random script of one plain model; each mistake is made with probability `rate`."""
        return cls(
            spelt=rng.random() < 0.2, models=(draw_model(rng, spec),), steps=pick(rng, STEPS)[1],
            fill=rng.choice(("X.median()", "X.mean()", "0")),
            mistakes=frozenset(m for m in MISTAKES if rng.random() < rate))

    def modelling(self, kind: str) -> list[str]:
        """The lines between the table and the cross-validation; kind: Classifier or Regressor."""
        lines = [] if "impute" in self.mistakes else [
            f"X_test = X_test.fillna({self.fill})", f"X = X.fillna({self.fill})"]
        for step in self.steps:
            lines += [f"step = preprocessing.{step}.fit(X)",
                      "X, X_test = step.transform(X), step.transform(X_test)"]
        lines.append("models = {}")
        for name, (module, model) in zip("abc", self.models):
            lines.append(f'models["{name}"] = {module}.{model.replace("Kind", kind)}')
        soft = ', voting="soft"' if kind == "Classifier" else ""
        return [*lines, f"model = ensemble.Voting{kind}(list(models.items()){soft})"]

    def source(self, spec: bench.Spec, rng: random.Random) -> str:
        """The script for one competition."""
        wrong = self.mistakes.__contains__
        metric = bench.METRICS[spec.metric]
        multi = len(spec.submission_columns) > 2
        kind = "Classifier" if spec.labels else "Regressor"
        if wrong("kind"):
            kind = "Regressor" if spec.labels else "Classifier"
        probability = (metric.form == "probability") != (wrong("form") and bool(spec.labels))
        method = "predict_proba" if probability else "predict"
        # Of two classes the second one's probability.
        column = "[:, 1]" if probability and not (multi and metric.form == "probability") else ""
        function = {"accuracy": "accuracy_score", "f1": "f1_score", "roc_auc": "roc_auc_score",
                    "log_loss": "log_loss", "rmse": "root_mean_squared_error",
                    "mae": "mean_absolute_error"}[spec.metric]
        imports = [line for line in IMPORTS if not (wrong("import") and self.models[0][0] in line)]
        train_file = rng.choice(("train.csv", "input/training.csv")) if wrong("file") \
            else "input/train.csv"
        lines = [
            # Say first what the task is: the policy reads the prompt once, where it is nearest.
            f"# {spec.kind}, {metric.plain}",
            *imports, "",
            f'train = pd.read_csv("{train_file}")',
            'test = pd.read_csv("input/test.csv")',
            'sub = pd.read_csv("input/sample_submission.csv")',
            "id_col = sub.columns[0]",
        ]
        if self.spelt:
            lines.append(f'target = "{spec.target}"')
        else:
            lines.append("target = [c for c in train.columns if c not in test.columns][0]")
        if wrong("column"):
            lines[-1] = rng.choice(('target = "target"', 'target = "label"',
                                    "target = test.columns[-1]"))
        dropped = [c for c in ("id_col", "target")
                   if not wrong({"id_col": "keep_id", "target": "keep_target"}[c])]
        lines += [
            "y = train[target]",
            f"X = train.drop(columns=[{', '.join(dropped)}])" if dropped else "X = train",
            "X_test = test" if wrong("keep_id") else "X_test = test.drop(columns=[id_col])",
        ]
        if not wrong("encode"):
            lines += ["X = pd.get_dummies(X)",
                      "X_test = pd.get_dummies(X_test).reindex(columns=X.columns, fill_value=0)"]
        lines += self.modelling(kind)
        lines += [
            # All rows judge: a hold-out of 50 is too few to choose the best of twenty scripts by.
            "pred = model_selection.cross_val_predict("
            f'model, X, y, cv=4, method="{method}"){column}',
            f'print("validation score:", metrics.{function}(y, pred))',
        ]
        if not wrong("fit"):
            lines.append("model.fit(X, y)")
        rows = "X_tset" if wrong("variable") else "X[1:]" if wrong("length") else "X_test"
        place = "sub[sub.columns[1:]]" if multi and probability else "sub[target]"
        name = "output.csv" if wrong("save") else "submission.csv"
        lines += [
            f"{place} = model.{method}({rows}){column}",
            f'sub.to_csv("{name}")' if wrong("index") else f'sub.to_csv("{name}", index=False)',
        ]
        return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------
# 3. and 4. Examples: prompts as in training, answers from the grammar. Lessons


def make_examples(rng: random.Random, worlds: list, count: int, answers: int, rate: float,
                  sandbox: Sandbox) -> list[tuple[list[dict], list[str]]]:
    """(chat messages, answers) pairs: two fifths each of draft and improve, one of debug.

    Failing parents are executed, so that a debug prompt shows what the sandbox says; an improve
    prompt shows a validation score only, for which any number will do.
    """
    failures = []
    for _ in range(max(1, count // 10)):  # each serves several prompts
        spec, competition = rng.choice(worlds)
        mistakes = frozenset(rng.sample(MISTAKES, rng.choice((1, 1, 2))))
        parent = draw_parent(rng, spec, mistakes)
        failures.append((spec, competition, parent, parent.source(spec, rng)))
    with ThreadPoolExecutor(2) as pool:
        runs = list(tqdm(pool.map(lambda f: sandbox.run(f[1], f[3]), failures),
                         total=len(failures), desc="failing scripts", unit=""))

    examples = []
    for index in range(count):
        spec, competition = rng.choice(worlds)
        operator = ("draft", "improve", "draft", "improve", "debug")[index % 5]
        parent, trace = None, None
        if operator == "improve":
            parent = draw_parent(rng, spec)
            trace = Trace(f"t{index}", "", competition.id, "draft", code=parent.source(spec, rng),
                          valid=True, validation_score=rng.choice((1, 30)) * rng.random())
        elif operator == "debug":
            choice = rng.randrange(len(failures))
            spec, competition, parent, source = failures[choice]
            trace = Trace(f"t{index}", "", competition.id, "draft", code=source)
            record_run(trace, runs[choice], competition)
            operator = "improve" if trace.valid else "debug"  # some mistakes only cost score
        task = Task(f"{competition.id}/{operator}", competition.id, operator, parent=trace)
        texts = [answer_to(operator, parent, spec, rate, rng).source(spec, rng)
                 for _ in range(answers)]
        examples.append((task_messages(competition, task, BUDGET),
                         [f"```python\n{text}```" for text in texts]))
    return examples


def answer_to(operator: str, parent: Script | None, spec: bench.Spec, rate: float,
              rng: random.Random) -> Script:
    """What AIDE asks a language model for. A draft is simple, "without ensembling or
    hyper-parameter optimization": one model with plain arguments. Improve changes one thing of its
    parent, as likely for the worse as for the better: a model's arguments by one place, a model
    (against a plain one), the steps, or how many models there are. Debug drops the parent's
    mistakes. Each may make mistakes of its own."""
    answer = Script.draw(rng, spec, rate)
    if operator == "draft":
        return answer
    answer = replace(answer, spelt=parent.spelt, fill=parent.fill)
    models, steps = parent.models, parent.steps
    while operator == "improve" and (models, steps) == (parent.models, parent.steps):
        change = rng.choice(("arguments", "arguments", "model", "steps", "blend"))
        at = rng.randrange(len(models))
        if change == "arguments":
            models = (*models[:at], tune_model(rng, spec, models[at]), *models[at + 1:])
        elif change == "model":
            models = (*models[:at], draw_model(rng, spec), *models[at + 1:])
        elif change == "steps":
            steps = pick(rng, STEPS)[1]
        elif len(models) < 3:
            models = (*models, draw_model(rng, spec))
        else:
            models = models[:-1]
    return replace(answer, models=models, steps=steps)


def draw_parent(rng: random.Random, spec: bench.Spec, mistakes: frozenset = frozenset()) -> Script:
    """A script as an agent has it after some steps: up to three models, any arguments."""
    models = (draw_model(rng, spec, plain=False) for _ in range(rng.choice((1, 1, 2, 3))))
    return replace(Script.draw(rng, spec, 0.0), models=tuple(models), mistakes=mistakes)


def make_lessons(rng: random.Random, worlds: list, parts: int, scripts: int
                 ) -> list[tuple[str, str]]:
    """(text, answer) pairs without a task: parts of scripts, every other one to be copied, the next
    to be improved; then whole scripts to be copied.

    They teach to look things up in the parent, and to change one of them. From whole prompts alone
    that was not learnt: a few lines among four hundred tokens are too little to begin with. The
    policy then wrote a new draft whatever it was asked, so that a buffer of parents could be worth
    nothing.
    """
    lessons = []
    for index in range(parts + scripts):
        spec, _ = rng.choice(worlds)
        parent = draw_parent(rng, spec)
        kind = "Classifier" if spec.labels else "Regressor"
        text, word = "\n".join(parent.modelling(kind)), "copy"
        answer = text + "\n"
        if index >= parts:
            text = answer = f"```python\n{parent.source(spec, rng)}```"
        elif index % 2:
            better, word = answer_to("improve", parent, spec, 0.0, rng), "improve"
            answer = "\n".join(better.modelling(kind)) + "\n"
        lessons.append((f"{text}\n{word}\n", answer))
    return lessons


# ---------------------------------------------------------------------------------------------
# 5. Tokenizer and model

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(texts: list[str], vocabulary: int):
    """Byte-level BPE with a chat template. Merges may span a whole line and its end, but not a
    quotation mark: the fixed lines of the corpus become a token or two each, which is what makes
    two cores enough."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r'[^\n"]*"|[^\n"]*\n+|[^\n"]+'), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE, model_max_length=2048, clean_up_tokenization_spaces=False)


def make_model(tokenizer, hidden: int, layers: int, seed: int):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64, head_dim=32, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def muon_step(weights: list, momenta: list, rate: float) -> None:
    """One step of Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): the momentum
    of each matrix, made orthogonal. torch.optim.Muon does the same in bfloat16: on a CPU without
    AVX-512 that takes thirty times as long, and teaching more than twenty minutes."""
    import torch

    with torch.no_grad():
        for weight, momentum in zip(weights, momenta):
            momentum.lerp_(weight.grad, 0.05)
            x = weight.grad.lerp(momentum, 0.95)
            tall = len(x) > x.shape[1]
            x = x.T if tall else x
            x = x / x.norm().clamp(min=1e-7)
            for _ in range(5):  # Newton-Schulz: all singular values towards 1
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            weight.mul_(1 - 0.01 * rate)
            scale = rate * max(1, weight.shape[0] / weight.shape[1]) ** 0.5
            weight.sub_(scale * (x.T if tall else x))


def teach(directory: Path, families: list[list[Sequence]], tokens_per_batch: int,
          learning_rate: float) -> float:
    """One pass of next-token prediction on the answers, in the order of the families, with the
    learner's own packed model: a family is the answers to one prompt, and the prompt is computed
    once for all of them. What is left at the end, less than a batch, is not taught.

    Reads and writes the model in `directory`; returns the mean loss of the last tenth, nat/token.
    Raises ValueError when there is not one batch.
    """
    import torch

    from learner import LearnerConfig, MicroBatch, load_policy

    device = torch.device("cpu")
    policy = load_policy(directory, LearnerConfig(max_response_tokens=1), device, None)
    batches, batch, size = [], [], 0
    for family in families:
        batch += family
        size += len(family[0].tokens) + sum(len(s.tokens) - s.prompt_length for s in family[1:])
        if size >= tokens_per_batch:
            batches.append(batch)
            batch, size = [], 0
    if not batches:
        raise ValueError(f"--batch-tokens {tokens_per_batch}: all answers together are less; lower "
                         "it, or raise --prompts")
    # Muon for the matrices inside the layers, AdamW for the rest: in the same 40 seconds, on an
    # earlier corpus, AdamW alone ended at 51 nats an answer, the two together at 35.
    inside = [p for n, p in policy.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in policy.named_parameters() if p.ndim != 2 or ".layers." not in n]
    adam = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    momenta = [torch.zeros_like(p) for p in inside]
    warmup, losses = 20, []
    bar = tqdm(batches, desc="teaching", unit="batch")
    for step, batch in enumerate(bar):
        scale = min((step + 1) / warmup, 0.02 + 0.98 * (1 - step / len(batches)))
        adam.param_groups[0]["lr"] = learning_rate * scale
        logprobs, _ = policy(MicroBatch.build(batch, device))  # (answer tokens,)
        loss = -logprobs.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        adam.step()
        muon_step(inside, momenta, 10 * learning_rate * scale)
        policy.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
    policy.model.save_pretrained(directory)
    return float(np.mean(losses[-max(len(losses) // 10, 1):]))


def is_replaceable(out: Path) -> bool:
    """An empty directory, or one of a model; nothing else may be lost."""
    files = {path.name for path in out.iterdir()} if out.is_dir() else {""}
    return not files or {"config.json", "tokenizer.json"} <= files


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description="Teach a tiny Qwen3 to write scikit-learn scripts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", required=True,
                        help="directory of the model; one that is there is replaced")
    parser.add_argument("--prompts", type=int, default=2200, help="prompts")
    parser.add_argument("--answers", type=int, default=5, help="answers to each prompt")
    parser.add_argument("--lessons", type=int, default=1500,
                        help="scripts to copy before the prompts; as many again come among the "
                             "prompts, and before all else seven times as many parts of scripts, "
                             "half to copy, half to improve")
    parser.add_argument("--worlds", type=int, default=600, help="random competitions")
    parser.add_argument("--mistakes", type=float, default=0.05,
                        help="rate of each of the mistakes in an answer")
    parser.add_argument("--hidden", type=int, default=192, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=3, help="decoder layers")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens")
    parser.add_argument("--batch-tokens", type=int, default=1000, help="tokens a batch")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unsafe", action="store_true", help="run without sandbox isolation")
    args = parser.parse_args(argv)
    for name in ("prompts", "answers", "worlds", "hidden", "layers", "vocabulary", "batch_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    if args.hidden % 64:
        parser.error(f"--hidden {args.hidden}: a multiple of 64")
    started = time.monotonic()
    import torch

    torch.set_num_threads(min(len(os.sched_getaffinity(0)), 8))
    rng = random.Random(args.seed)
    out = Path(args.out).resolve()
    new = out.with_name(f"{out.name}.new")  # renamed at the end: `out` is never half taught
    if out.exists() and not is_replaceable(out):
        parser.error(f"--out {out} is there and is no model directory: give another one")
    try:  # not at the end, when all the work is done
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {out}: {error.strerror}; give another directory")
    with tempfile.TemporaryDirectory() as folder, Sandbox(slots=2, unsafe=args.unsafe) as sandbox:
        if sandbox.problem:
            print(f"tiny_policy.py: scripts cannot be isolated here: {sandbox.problem}; --unsafe "
                  "runs them without isolation", file=sys.stderr)
            return 3
        worlds = make_worlds(rng, args.worlds, Path(folder))
        examples = make_examples(rng, worlds, args.prompts, args.answers, args.mistakes, sandbox)
        lessons = make_lessons(rng, worlds, 7 * args.lessons, 2 * args.lessons)
    texts = [m["content"] for messages, _ in examples[:1500] for m in messages]
    texts += [answer for _, answers in examples[:1500] for answer in answers]
    tokenizer = make_tokenizer(texts, args.vocabulary)

    def family(prompt: list[int], answers: list[str]) -> list[Sequence]:
        encoded = [tokenizer.encode(answer) + [tokenizer.eos_token_id] for answer in answers]
        return [Sequence(np.array(prompt + ids, np.int32), len(prompt),
                         np.zeros(len(ids), np.float32), 0.0) for ids in encoded]

    prompts = [family(encode_chat(tokenizer, messages), answers)
               for messages, answers in tqdm(examples, desc="tokenizing", unit="")]
    lessons = [family(tokenizer.encode(text), [answer]) for text, answer in lessons]
    first, later = lessons[:8 * args.lessons], lessons[8 * args.lessons:] + prompts
    rng.shuffle(later)
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
    model = make_model(tokenizer, args.hidden, args.layers, args.seed)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    lengths = [len(s.tokens) - s.prompt_length for family in prompts for s in family]
    print(f"{model.num_parameters() / 1e6:.2f}M parameters; {len(prompts)} prompts of "
          f"{np.mean([f[0].prompt_length for f in prompts]):.0f} tokens, {len(lengths)} answers "
          f"of {np.mean(lengths):.0f} tokens", flush=True)
    try:
        loss = teach(new, first + later, args.batch_tokens, args.learning_rate)
    except ValueError as error:
        parser.error(str(error))
    if out.exists():
        shutil.rmtree(out)
    new.rename(out)
    print(f"wrote {out}: loss {loss:.3f} nat/token, {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
