"""The programs of the suites continual and sentence, on toys."""

import re
import sysconfig
import zipfile

import pytest
import torch
import yaml
from transformers import BertConfig, BertModel

from benchmarks import continual, sentence
from benchmarks.folder import Folder
from benchmarks.program import Progress
from tying.advice import Plan
from tying.callbacks import AnchorTying, Fisher
from tying.errors import ConfigurationError
from tying.hard import audit
from tying.models import MLP, Classifier
from tying.weights.calibration import input_scales


def started(path):
    """Return the progress of a run that has just begun, or goes on in the same folder."""
    return Progress(Folder(path / "run"))


class Digits(continual.PermutedMNIST):
    def load(self):
        drawn = torch.Generator().manual_seed(0)
        labels = torch.arange(160) % 10
        strokes = torch.rand(10, 28, 28, 1, generator=drawn) < 0.1
        images = strokes[labels] & (torch.rand(160, 28, 28, 1, generator=drawn) < 0.3)
        return dict.fromkeys(("train", "test"), (255 * images.to(torch.uint8), labels))


def learn(progress, importance=None, strength=0.0, validation=0.0, **arguments):
    torch.manual_seed(0)
    model = Classifier(MLP([784, 8, 10]), optimizer="adamw", lr=0.01, schedule="constant")
    anchor = AnchorTying(["network.**"], strength, importance=importance)
    given = {"epochs": 3, **arguments}
    return continual.run(progress, model, Digits("nowhere", batch_size=16, validation=validation), anchor, **given)


def test_tasks_are_permutations_of_the_same_images():
    data = Digits("nowhere", validation=0.2, seed=3)
    first, second, again = (data.of_task(task) for task in (0, 1, 0))
    assert first._splits is second._splits
    assert sorted(first.order.tolist()) == [*range(784)]
    assert torch.equal(first.order, again.order)
    assert not torch.equal(first.order, second.order)
    assert not torch.equal(first.order, Digits("nowhere", seed=4).of_task(0).order)


def test_tasks_are_learnt_one_after_the_other(tmp_path):
    """Nothing is pulled in the first; what is frozen afterwards forgets nothing; killed between tasks is the same."""
    plain = learn(started(tmp_path / "plain"))
    assert [sorted(name for name in row if name.startswith("test/task")) for row in plain.rows] == [
        ["test/task 1"],
        ["test/task 1", "test/task 2"],
        ["test/task 1", "test/task 2", "test/task 3"],
    ]
    assert [row["step"] for row in plain.rows] == [30, 60, 90]
    last = plain.rows[-1]
    assert last["test/accuracy"] == pytest.approx(sum(last[f"test/task {k}"] for k in (1, 2, 3)) / 3)
    lost = sum(plain.rows[k - 1][f"test/task {k}"] - last[f"test/task {k}"] for k in (1, 2)) / 2
    assert plain.metrics["test/forgetting"] == pytest.approx(lost)
    assert lost > 0

    importance = Fisher(batches=4)
    held = learn(started(tmp_path / "held"), importance, strength=1e3)
    assert [*(tmp_path / "held").rglob("importance.png")]  # and not where the command runs
    assert held.rows[0]["test/task 1"] == plain.rows[0]["test/task 1"]
    assert held.metrics["test/forgetting"] < lost / 2
    learn(started(tmp_path / "parts"), importance, strength=1e3, tasks=2)
    resumed = learn(started(tmp_path / "parts"), importance, strength=1e3)
    alike = [{name: value for name, value in row.items() if name != "seconds"} for row in held.rows]
    assert [{name: value for name, value in row.items() if name != "seconds"} for row in resumed.rows] == alike
    for name, value in held.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_held_out_images_are_for_a_search(tmp_path):
    outcome = learn(started(tmp_path), tasks=1, epochs=1, validation=0.2)
    assert outcome.rows[0]["step"] == 8
    assert outcome.rows[0]["val/accuracy"] == outcome.rows[0]["val/task 1"]
    assert outcome.metrics == {"test/forgetting": 0.0, "val/forgetting": 0.0}


class Random(sentence.Encoder):
    """A transformer that has been trained as little as its tokenizer, and looks trained."""

    description = "random weights"

    def load(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
        model = BertModel(BertConfig(vocab_size=64, max_position_embeddings=8, **sizes), add_pooling_layer=False)
        for weight in model.parameters():
            weight.data.add_(0.3 * torch.randn_like(weight))
        return model

    def tokenize(self, texts, length):
        ids = torch.tensor([[ord(letter) % 64 for letter in text[:length].ljust(length)] for text in texts])
        return {"input_ids": ids, "attention_mask": (ids != ord(" ")).long()}


@pytest.fixture
def _texts(monkeypatch):
    texts = (*(f"{number:>3} {'word' * (number % 5)} {chr(97 + number % 26)}" for number in range(40)),)
    monkeypatch.setattr(sentence, "docstrings", lambda: texts)
    monkeypatch.setattr(sentence, "MEASURED_EVERY", 20)


SMALL = {
    "steps": 30,
    "batch_size": 4,
    "length": 8,
    "held_out": 2,
    "calibration": 2,
    "rate": 5e-3,
    "group": 4,
    "advised_steps": 2,
}


@pytest.mark.usefixtures("_texts")
@pytest.mark.parametrize("method", ["hard", "relaxed", "low rank", "advised"])
def test_half_of_the_weights_is_left_and_distilled(method, tmp_path):
    outcome = sentence.run(started(tmp_path), Random(), method, **SMALL)
    metrics = {**outcome.rows[-1], **outcome.metrics}
    assert [row["step"] for row in outcome.rows] == [0, 20, 30]
    assert metrics["remaining"] <= 0.5
    assert metrics["remaining"] > 0.4
    assert metrics["test/error"] < metrics["before/error"]
    assert metrics["test/cosine"] > metrics["before/cosine"]
    assert metrics["before/error"] == outcome.rows[0]["test/error"]
    kinds = {name: value for name, value in metrics.items() if name.startswith("advice/")}
    assert ("advice/hard" in kinds) == (method == "advised")
    if method == "hard":
        assert metrics["remaining"] == 0.5
        assert len(audit(outcome.model).groups) == 12
    if method == "advised":
        first = re.search(r"by\n([a-z ]+?)  ", (tmp_path / "run" / "advice" / "advice.txt").read_text())[1]
        assert kinds["advice/first"] == kinds[f"advice/{first}"] == min(kinds.values())
        assert kinds["advice/second"] == sorted(kinds.values())[2]


@pytest.mark.usefixtures("_texts")
def test_low_rank_is_nearest_as_the_inputs_see_it():
    """Nearer in the outputs of the layers than by an SVD of the weight, and of the rank that it says."""
    teacher = sentence.Embedding(Random().load()).eval()
    batches = [Random().tokenize([*sentence.docstrings()[:8]], 8)]
    plan = sentence.plan_of("low rank", teacher, 0.5, 3)
    names = [name for names in plan.low_rank.values() for name in names]
    assert len(names) == 24
    scales = input_scales(teacher, names, batches)
    weights = {name: teacher.get_parameter(name).detach().clone() for name in names}
    errors = []
    for calibrated in (True, False):
        student = sentence.Embedding(Random().load()).eval()
        sentence.apply(plan, student, batches) if calibrated else plan.apply(student)
        found = {name: student.get_submodule(name.removesuffix(".weight")).weight.detach() for name in names}
        errors.append({name: float(((found[name] - weights[name]) * scales[name]).norm()) for name in names})
    assert all(errors[0][name] <= errors[1][name] * (1 + 1e-5) for name in names)
    assert sum(errors[0].values()) < 0.99 * sum(errors[1].values())


@pytest.mark.parametrize(
    ("method", "budget", "group", "remaining"),
    [
        ("hard", 0.5, 3, 0.5),
        ("hard", 0.4, 3, 0.25),
        ("relaxed", 0.75, 3, (2 * 2048 + 3 * (4 * 2 * 32 + 2 * 2 * 48)) / (4 * 2048)),
        ("low rank", 0.5, 3, (4 * 4 * 32 + 2 * 5 * 48) / 2048),
    ],
)
def test_plans_leave_what_they_say(method, budget, group, remaining):
    """Of blocks of 4 · 16² + 2 · 16 · 32 weights: shared ones, and ranks of 32 and 48 weights each."""
    model = sentence.Embedding(Random().load())
    before = sentence.count_of(model)
    plan = sentence.plan_of(method, model, budget, group)
    plan.apply(model)
    assert before == 4 * 2048
    assert sentence.count_of(model) / before == pytest.approx(remaining, abs=1e-12)


@pytest.mark.parametrize(("method", "budget"), [("relaxed", 0.25), ("hard", 0.2), ("low rank", 0.01)])
def test_plans_that_do_not_fit(method, budget):
    with pytest.raises(ConfigurationError, match=f"budget={budget} is too small for {method} of 4 blocks, 4 at a time"):
        sentence.plan_of(method, sentence.Embedding(Random().load()), budget, 4)


def test_docstrings_are_those_of_the_library(tmp_path, monkeypatch):
    long = "says a little more than most of them do"
    (tmp_path / "test").mkdir()
    (tmp_path / "one.py").write_text(f'"""{long}, once."""\ndef f():\n    """{long}, twice."""\n')
    (tmp_path / "two.py").write_text(f'class A:\n    """{long}, once."""\ndef f():\n    """Short."""\n')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test" / "three.py").write_text(f'"""{long}, never."""')
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert sentence.docstrings.__wrapped__() == (f"{long}, once.", f"{long}, twice.")


def test_the_wheel_is_read_as_it_is(tmp_path, monkeypatch):
    """Its archive holds a model and a tokenizer; without it, the error says what to install."""
    with monkeypatch.context() as patch:
        patch.setattr(sentence, "find_spec", lambda name: None)
        with pytest.raises(ConfigurationError, match=re.escape("pip install 'tying[sentence]'")):
            sentence.MiniLM()
    from safetensors.torch import save
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    model = Random().load()
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "tie": 1, "weights": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    (tmp_path / "all_minilm_l6_v2").mkdir()
    (tmp_path / "all_minilm_l6_v2" / "__init__.py").write_text("raise ImportError('it is not imported')")
    with zipfile.ZipFile(tmp_path / "all_minilm_l6_v2" / "model.zip", "w") as archive:
        archive.writestr("config.json", model.config.to_json_string())
        archive.writestr("model.safetensors", save({**model.state_dict(), "pooler.dense.bias": torch.zeros(16)}))
        archive.writestr("tokenizer.json", tokenizer.to_str())
    monkeypatch.syspath_prepend(tmp_path)
    wheel = sentence.MiniLM()
    batch = wheel.tokenize(["tie weights", "tie other weights well"], 3)
    assert batch["input_ids"].tolist() == [[1, 2, 0], [1, 0, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    embedding, expected = (sentence.Embedding(one).eval() for one in (wheel.load(), model))
    assert torch.equal(embedding(**batch), expected(**batch))
    short = {name: values[:1, :2] for name, values in batch.items()}
    assert torch.allclose(embedding(**short), embedding(**batch)[:1], atol=1e-6)  # padding has no say


def test_a_plan_of_several_ranks_is_written():
    """As for blocks whose weights have several shapes: callbacks of one class then have names of their own."""
    relaxed = {rank: (f"network.{rank}.weight ~ network.{rank + 2}.weight",) for rank in (1, 3)}
    written = yaml.safe_load(Plan("relaxed", relaxed=relaxed).yaml())["trainer"]["callbacks+"]
    assert [callback["init_args"]["name"] for callback in written] == ["rank_1", "rank_3"]
    assert [callback["class_path"] for callback in written] == ["tying.callbacks.RelaxedTying"] * 2
