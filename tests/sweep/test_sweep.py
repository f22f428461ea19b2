"""`vispruner sweep`: measurements that survive, statistics, and the report."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import torch
from PIL import Image
from support import environment

import vispruner
from vispruner import Budget, cli, embedded, sweep
from vispruner.cli.common import batch_inputs, load_model
from vispruner.embedded import scenes
from vispruner.sweep import Item, Measurement, Records, Subject
from vispruner.sweep.report import advice
from vispruner.sweep.scoring import exact_match
from vispruner.sweep.summary import name_of, summarize

TIMES = {"vision": 1.0, "prune": 1.0, "prefill": 3.0, "decode": 1.0, "total": 6.0, "first token": 5}
PROGRAM = "import sys; from vispruner import cli; sys.exit(cli.main())"


def measurement(answer: str = "red", first: float = 1.0, **changes: Any) -> Measurement:
    values: dict[str, Any] = {
        "answer": answer,
        "tokens": [5, 6],
        "log_probability": -0.5,
        "first_choices": first,
        "visual_tokens": 22,
        "cache_bytes": 1024,
        "milliseconds": dict(TIMES),
    }
    return Measurement(**{**values, **changes})


def item(picture: int, question: str = "?", answer: str | None = "red") -> Item:
    return Item(f"{picture}.png", picture.to_bytes(2, "big"), question, answer)


# -------------------------------------------------------------------------------- the measurements
def test_records_survive(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    with Records(path) as records:
        records.add("a", measurement())
        records.add("b", measurement("blue"))
    with path.open("ab") as file:  # a process that was killed while it wrote
        file.write(b'{"key": "c", "answer": "gr')
    with Records(path) as records:
        assert len(records) == 2
        assert records.get("b") == measurement("blue")
        assert records.get("c") is None
        records.add("c", measurement("green"))
    with Records(path) as records:
        assert records.get("c") == measurement("green")


@pytest.mark.parametrize("line", ["{}", "[]", "nothing", '{"key": "a"}', '{"key": "a", "x": 1}'])
def test_a_file_that_holds_something_else(tmp_path: Path, line: str) -> None:
    path = tmp_path / "measurements.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match="line 1 is not a measurement: move the file away"):
        Records(path)
    assert path.read_text() == line + "\n"


@pytest.mark.parametrize("fails", ["partly", "whole", "at the sync"])
def test_a_full_disk_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "measurements.jsonl"
    write = os.write

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Records(path) as records:
        records.add("a", measurement())
        if fails == "at the sync":
            monkeypatch.setattr(os, "fsync", full)
        else:
            partly = lambda fd, data: write(fd, data[:10])  # noqa: E731
            monkeypatch.setattr(os, "write", partly if fails == "partly" else full)
        with pytest.raises(OSError, match="No space left on device"):
            records.add("b", measurement("blue"))
        monkeypatch.undo()
        records.add("c", measurement("green"))
    with Records(path) as records:
        assert len(records) == 2
        assert records.get("c") == measurement("green")


# ------------------------------------------------------------------------------------ the data
def test_json_lines(tmp_path: Path) -> None:
    scenes.draw(0).image.save(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "question": "what?", "answer": "red"},
        {"image": "missing.png", "question": "what?"},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = sweep.read(str(path), None)
    assert (first.name, first.question, first.answer) == ("a.png", "what?", "red")
    assert first.source == tmp_path / "a.png"
    assert (second.source, second.answer) == (tmp_path / "missing.png", None)
    assert len({first.picture, second.picture}) == 2
    assert len(list(sweep.read(str(path), None, limit=1))) == 1


def test_line_separators_of_unicode_inside_a_text(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    questions = ["one\u2028two", "one\u2029two", "one\x85two"]
    entries = [{"image": "a.png", "question": question} for question in questions]
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    path.write_bytes("\r\n".join(lines).encode())
    assert [item.question for item in sweep.read(str(path), None)] == questions


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 1: no JSON"),
        ("[]", 'line 1: expected an object with "image"'),
        ('{"question": "what?"}', 'line 1: expected an object with "image"'),
        ('{"image": "a.png"}', 'line 1: expected "question"'),
        ('{"image": "a.png", "question": " "}', 'line 1: expected "question"'),
        ('{"image": "a.png", "question": "?", "answer": 3}', 'line 1: "answer" must be a text'),
        ('{"image": "a.png", "question": "\\ud800"}', 'line 1: expected "question"'),
        ('{"image": ' + "[" * 100_000, "line 1: cannot read the JSON"),
        # The first Pythons 3.10 have no limit of digits.
        ('{"image": ' + "1" * 5000 + "}", "line 1: (cannot read the JSON|expected an object)"),
        ("", "has no pictures"),
    ],
)
def test_wrong_data(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(line)
    with pytest.raises(sweep.DataError, match=complaint) as error:
        list(sweep.read(str(path), None))
    assert "\n" not in str(error.value)


def test_a_path_that_no_file_can_have(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"image": "a\\u0000b.png", "question": "what?"}')
    [item] = sweep.read(str(path), None)
    assert len(item.picture) == 16  # reported and skipped when it is read


def test_a_directory(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("b.png", "more/a.JPG", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    found = list(sweep.read(str(tmp_path), "what?"))
    assert [one.name for one in found] == ["b.png", "more/a.JPG"]
    assert {one.question for one in found} == {"what?"}


# -------------------------------------------------------------------------------- the statistics
@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [
        ("Red.", "red", 1),
        ("a red  circle", "the red circle", 1),
        ("reddish", "red", 0),
        ("", "", 1),
        ("", "A", 0),
        ("the", "A", 0),
        ("(a)", "A", 1),
        ("<", ">", 0),
        ("-5", "5", 0),
        ("\N{MINUS SIGN}5", "-5", 1),
        (".5", "5", 0),
        ("No.1", "no 1", 1),
        ("5.", "5", 1),
    ],
)
def test_exact_match(answer: str, right: str, score: float) -> None:
    assert exact_match(answer, right) == score


SCORERS = """
half = lambda answer, right: 0.5 + 0.5 * (answer == right)
def no_number(answer, right): return "right"
def above(answer, right): return 1.5
def below(answer, right): return -0.1
def nan(answer, right): return float("nan")
def one(answer): return 1.0
def fails(answer, right): raise KeyError("two\\nlines")
class Judge:
    judge = staticmethod(lambda answer, right: 1.0)
number = 3
"""


@pytest.fixture
def scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the current directory, of a name that no other test has imported."""
    (tmp_path / "own_scorers.py").write_text(SCORERS)
    (tmp_path / "broken_scorers.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("own_scorers", "broken_scorers"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("scorers")
def test_a_scorer_of_the_user() -> None:
    items = [item(0), item(1)]
    whole, pruned = [measurement()] * 2, [measurement(), measurement("blue")]
    before = list(sys.path)
    scorer = sweep.load_scorer("own_scorers:half")
    _, found = summarize(items, [(None, whole), (Budget(8), pruned)], scorer)
    assert (found.right, found.loss.mean) == (0.75, 25.0)
    assert sweep.load_scorer("own_scorers:Judge.judge")("a", "b") == 1
    assert sys.path == before


def test_a_scorer_is_called_once_for_equal_answers() -> None:
    asked: list[str] = []

    def scorer(answer: str, right: str) -> bool:
        asked.append(answer)
        return answer == right

    items = [item(0), item(1)]
    whole, pruned = [measurement()] * 2, [measurement(), measurement("blue")]
    summarize(items, [(None, whole), (Budget(8), pruned)], scorer)
    assert sorted(asked) == ["blue", "red"]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("half", "expected module:function, got 'half'"),
        ("own_scorers:", "expected module:function"),
        ("no_such_module:f", "cannot import no_such_module: ModuleNotFoundError"),
        ("broken_scorers:f", "cannot import broken_scorers: .*nothing_of_this_name"),
        ("own_scorers:f", "own_scorers has no f"),
        ("own_scorers:number", "own_scorers:number is not callable, it is of type int"),
        ("own_scorers:no_number", "must return a number from 0 to 1, got 'right'"),
        ("own_scorers:above", r"scorer\('.*', '.*'\) must return a number from 0 to 1, got 1.5"),
        ("own_scorers:below", "must return a number from 0 to 1, got -0.1"),
        ("own_scorers:nan", "must return a number from 0 to 1, got nan"),
        ("own_scorers:one", "raised TypeError: "),
        ("own_scorers:fails", "raised KeyError: "),
    ],
)
@pytest.mark.usefixtures("scorers")
def test_wrong_scorers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, complaint: str
) -> None:
    """The command says so in one line, before it measures anything."""
    assert run(tmp_path / "out", "--limit", "1", "--k", "8", "--scorer", name) == 2
    said = capsys.readouterr().err
    assert re.search(f"argument --scorer: .*{complaint}", said)
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_errors_are_clustered_by_picture() -> None:
    """Four copies of a question about a picture have no more information than one."""
    wrong = [True, False, False, True, False, False]
    for copies in (1, 4):
        items = [item(i, str(c)) for i in range(6) for c in range(copies)]
        whole = [measurement() for _ in items]
        pruned = [
            measurement("blue" if wrong[i] else "red") for i in range(6) for _ in range(copies)
        ]
        _, found = summarize(items, [(None, whole), (Budget(8), pruned)])
        assert found.loss.mean == pytest.approx(100 / 3)
        deviation = math.sqrt(sum((100 * w - 100 / 3) ** 2 for w in wrong) / 5)
        assert found.loss.error == pytest.approx(deviation / math.sqrt(6))
        assert (found.equal, found.right, found.pictures) == (pytest.approx(2 / 3), found.equal, 6)


def test_the_smallest_setting_within_the_tolerance() -> None:
    items = [item(i) for i in range(200)]
    whole = [measurement(visual_tokens=196) for _ in items]

    def pruned(tokens: int, wrong: int) -> list[Measurement]:
        answers = ["blue"] * wrong + ["red"] * (200 - wrong)
        return [measurement(a, visual_tokens=tokens) for a in answers]

    measured = [(Budget(k), pruned(k, wrong)) for k, wrong in ((8, 20), (16, 1), (32, 0))]
    summaries = summarize(items, [(None, whole), *measured])
    best = sweep.recommended(summaries, 1.0)
    assert best is not None
    assert best.budget == Budget(16)
    json.dumps([s.data() for s in summaries], allow_nan=False)
    assert 0.8 < best.probability_below(1.0) < 0.9  # 0.5 +- 0.5 points
    assert sweep.recommended(summaries, 0.0) is None
    # Without any difference the error is 0, but not everything is known.
    assert summaries[3].probability_below(1.0) == pytest.approx(1 - 0.99**201)


@pytest.mark.parametrize(("count", "sure"), [(2, "3 %. Use more pictures"), (400, "98 %.")])
def test_the_advice_says_how_sure_it_is(count: int, sure: str) -> None:
    items = [item(i) for i in range(count)]
    same = [measurement() for _ in items]
    summaries = summarize(items, [(None, same), (Budget(8), same)])
    said = advice(summaries[1], summaries, 1.0)
    assert f"with {count} pictures and {count} questions the probability of that is {sure}" in said
    assert ("more pictures" in said) == (count == 2)


def test_one_picture_tells_nothing_about_others() -> None:
    items = [item(1, "a"), item(1, "b")]
    both = [measurement(), measurement()]
    _, found = summarize(items, [(None, both), (Budget(8), [measurement("blue"), measurement()])])
    assert math.isinf(found.loss.error)
    assert found.data()["loss"] == {"mean": 50.0, "error": None, "questions": 2, "pictures": 1}


def test_without_right_answers_the_first_choices_count() -> None:
    items = [item(i, answer=None) for i in range(4)]
    whole = [measurement(first=1.0) for _ in items]
    pruned = [measurement("another", first=f) for f in (1.0, 0.5, 1.0, 0.5)]
    _, found = summarize(items, [(None, whole), (Budget(8), pruned)])
    assert (found.right, found.loss.mean, found.equal) == (None, 25.0, 0.0)


def test_only_questions_with_a_right_answer_are_judged() -> None:
    items = [item(0), item(1), item(2, answer=None)]
    whole = [measurement() for _ in items]
    pruned = [measurement(), measurement("blue"), measurement("blue")]
    _, found = summarize(items, [(None, whole), (Budget(8), pruned)])
    assert (found.right, found.loss.mean) == (0.5, 50.0)
    assert (found.questions, found.loss.questions, found.loss.pictures) == (3, 2, 2)


def test_names() -> None:
    assert name_of(None) == "unpruned"
    assert name_of(Budget(8)) == "k = 8"
    assert name_of(Budget(ratio=0.25, method="scope")) == "25 %, scope"
    assert name_of(Budget(8, step=4, method="vispruner")) == "k = 8, step 4"


# -------------------------------------------------------------------------------------- the model
@pytest.fixture(scope="module")
def subject() -> Subject:
    options = cli.parser().parse_args(["ask", "--device", "cpu"])
    model, processor = load_model(options, torch.device("cpu"))

    def inputs_of(items: Sequence[Item]) -> Any:
        try:
            images = [Image.open(io.BytesIO(bytes(i.source))).convert("RGB") for i in items]
        except OSError as error:
            raise sweep.DataError("cannot identify image file") from error
        questions = [item.question for item in items]
        return batch_inputs(processor, images, questions, torch.device("cpu"))

    return Subject(model, processor, inputs_of, embedded.path(), 16)


def measured(
    subject: Subject, one: Item, budget: Budget | None = None, whole: Measurement | None = None
) -> Measurement:
    (found,) = subject.measure([one], budget, whole and [whole])
    assert isinstance(found, Measurement)
    return found


def test_measurements(subject: Subject) -> None:
    (one, *_) = sweep.read(None, None, limit=1)
    whole = measured(subject, one)
    pruned = measured(subject, one, Budget(8), whole)
    assert whole.first_choices == 1.0  # its own answer
    assert (whole.visual_tokens, pruned.visual_tokens) == (196, 8)
    per_token = whole.cache_bytes / (whole.cache_bytes - pruned.cache_bytes) * (196 - 8)
    assert per_token == pytest.approx(round(per_token))  # the prompt's columns
    assert whole.log_probability >= pruned.log_probability
    # All tokens are retained: nothing changes.
    every = measured(subject, one, Budget(196), whole)
    assert every.log_probability == pytest.approx(whole.log_probability, abs=1e-5)
    assert (every.answer, every.first_choices) == (whole.answer, 1.0)


def test_the_forced_answer_has_the_probability_of_the_generated_one(subject: Subject) -> None:
    (one, *_) = sweep.read(None, None, limit=1)
    inputs, whole = subject.inputs_of([one]), measured(subject, one)
    with torch.no_grad():
        found = subject.model.generate(
            **inputs, max_new_tokens=16, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    chances = torch.stack(found.logits, dim=1).float().log_softmax(dim=-1)
    want = chances.gather(2, torch.tensor([whole.tokens]).unsqueeze(-1)).mean().item()
    assert whole.log_probability == pytest.approx(want, abs=1e-4)


def assert_close(one: Measurement, other: Measurement) -> None:
    """Equal except for times and the rounding of log-probabilities."""
    for name in ("answer", "tokens", "first_choices", "visual_tokens", "cache_bytes"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)


@pytest.mark.parametrize("budget", [None, Budget(8), Budget(ratio=0.3)])
def test_results_do_not_depend_on_the_batch(subject: Subject, budget: Budget | None) -> None:
    items = list(sweep.read(None, None, limit=2))[:5]
    items[1] = dataclasses.replace(items[1], question=" ".join(i.question for i in items[:3]))
    whole = [measured(subject, one) for one in items]
    # Answers of different lengths, also for the teacher forcing.
    whole = [dataclasses.replace(w, tokens=w.tokens[: 1 + n % 2]) for n, w in enumerate(whole)]
    alone = [measured(subject, one, budget, w) for one, w in zip(items, whole, strict=True)]
    for one, other in zip(alone, subject.measure(items, budget, whole), strict=True):
        assert isinstance(other, Measurement)
        assert_close(one, other)


def test_an_answer_has_no_placeholders(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model may generate one; the answer could not be read with the picture."""
    (one, *_) = sweep.read(None, None, limit=1)
    image = subject.model.config.image_token_id
    head = subject.model.get_output_embeddings()
    forward = head.forward

    def prefers(hidden: torch.Tensor) -> torch.Tensor:
        logits = forward(hidden).clone()
        logits[..., image] = 100.0
        return logits

    monkeypatch.setattr(head, "forward", prefers)
    whole = measured(subject, one)
    assert image not in whole.tokens
    assert whole.first_choices == 1.0
    assert measured(subject, one, Budget(8), whole).log_probability > -10


def test_a_bad_picture_in_a_batch(subject: Subject) -> None:
    good = list(sweep.read(None, None, limit=1))[:2]
    bad = Item("bad", b"no picture", "count:")
    one, failed, other = subject.measure([good[0], bad, good[1]], None)
    assert failed == sweep.Failed("cannot identify image file")
    for found, item_ in zip((one, other), good, strict=True):
        assert isinstance(found, Measurement)
        assert_close(found, measured(subject, item_))


def test_a_batch_that_does_not_fit(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its questions are asked one at a time."""
    items = list(sweep.read(None, None, limit=1))[:3]
    generate = subject.model.generate

    def limited(**call: Any) -> Any:
        if len(call["input_ids"]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return generate(**call)

    monkeypatch.setattr(subject.model, "generate", limited)
    for found, one in zip(subject.measure(items, None), items, strict=True):
        assert isinstance(found, Measurement)
        assert_close(found, measured(subject, one))


def test_keys(subject: Subject) -> None:
    one, other = item(1), item(2)
    keys = {
        subject.key(one, None),
        subject.key(other, None),
        subject.key(item(1, "else?"), None),
        subject.key(one, Budget(8)),
        subject.key(one, Budget(8, method="mmr")),
    }
    assert len(keys) == 5
    assert subject.key(item(1, answer="blue"), None) == subject.key(one, None)


# ------------------------------------------------------------------------------------ the command
def run(directory: Path, *arguments: str) -> int:
    return cli.main(["sweep", "--device", "cpu", "-o", str(directory), *arguments])


def numbers(directory: Path) -> list[dict[str, Any]]:
    """The results without times."""
    settings = json.loads((directory / "results.json").read_text())["settings"]
    return [{k: v for k, v in s.items() if k not in ("prefill", "first_token")} for s in settings]


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(tmp_path, "--limit", "2", "--k", "4,22", "--method", "vispruner,topk") == 0
    said = capsys.readouterr().out
    assert "unpruned" in said
    assert "smallest setting" in said or "try a larger k" in said
    page = (tmp_path / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")  # names of SVG's formats
    assert "https://" not in page
    assert "<svg" in page
    assert {"sweep.png", "sweep.svg", "results.json"} <= {p.name for p in tmp_path.iterdir()}
    before = numbers(tmp_path)
    assert [s["budget"] and s["budget"]["k"] for s in before] == [None, 4, 4, 22, 22]

    def never(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(Subject, "measure", never)
    assert run(tmp_path, "--limit", "2", "--k", "4,22", "--method", "vispruner,topk") == 0
    assert numbers(tmp_path) == before


def test_a_bad_picture_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        scenes.draw(number).image.save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    (tmp_path / "empty.png").touch()
    assert run(tmp_path / "out", "--data", str(tmp_path), "--question", "count:", "--k", "8") == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "skipped: broken.png: cannot read image broken.png: " in said
    assert "skipped: empty.png: cannot read image empty.png: " in said
    assert "BytesIO" not in said
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [s["pictures"] for s in found["settings"]] == [2, 2]
    assert len(found["skipped"]) == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--k", "0"], "--k: must be at least 1"),
        (["--k", "8,8"], "a setting occurs twice"),
        (["--k", "8,x"], "--k"),
        (["--ratio", "1.5"], "--ratio: must be in (0, 1]"),
        (["--k", "8", "--ratio", "0.5"], "not allowed with argument"),
        (["--method", "divprune"], "--method: must be one of vispruner, topk"),
        (["--tolerance", "-1"], "--tolerance: must be a finite number of at least 0, got -1"),
        (["--tolerance", "nan"], "--tolerance: must be a finite number of at least 0, got nan"),
        (["--tolerance", "inf"], "--tolerance: must be a finite number of at least 0, got inf"),
        (["--limit", "0"], "--limit"),
        (["--batch-size", "0"], "--batch-size: must be at least 1, got 0"),
        (["--batch-size", "2.5"], "--batch-size: invalid whole number value: '2.5'"),
        (["--timeout", "5"], "argument --timeout: not allowed without --server"),
        (["--question", "what?"], "argument --question: not allowed without --data"),
        (["--data", "nowhere"], "--data: nowhere is not a file or directory"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    try:
        status = run(tmp_path, *arguments)
    except SystemExit as error:  # from argparse
        status = int(str(error.code))
    assert status == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert len(said.splitlines()) == 1


def test_the_command_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results of batches, and of one question at a time, are the same."""
    options = ["--limit", "2", "--k", "8"]
    sizes = []
    measure = Subject.measure

    def counted(self: Subject, items: Sequence[Item], *others: Any) -> Any:
        sizes.append(len(items))
        return measure(self, items, *others)

    monkeypatch.setattr(Subject, "measure", counted)
    assert run(tmp_path / "batches", *options, "--batch-size", "5") == 0
    assert set(sizes) == {5, 2}
    assert run(tmp_path / "alone", *options) == 0
    assert len(numbers(tmp_path / "alone")) == 2
    for one, other in zip(numbers(tmp_path / "alone"), numbers(tmp_path / "batches"), strict=True):
        assert one.pop("log_probability") == pytest.approx(other.pop("log_probability"), abs=1e-4)
        assert one == other


def test_another_scorer_needs_no_new_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zero_scorer.py").write_text("score = lambda answer, right: 0.25")
    monkeypatch.chdir(tmp_path)
    options = ["--limit", "1", "--k", "8"]
    assert run(tmp_path / "out", *options) == 0
    assert [s["right"] for s in numbers(tmp_path / "out")] != [0.25, 0.25]
    monkeypatch.setattr(Subject, "measure", None)
    assert run(tmp_path / "out", *options, "--scorer", "zero_scorer:score") == 0
    assert [s["right"] for s in numbers(tmp_path / "out")] == [0.25, 0.25]


def child() -> dict[str, str]:
    """The environment of a process with the package that this one imports."""
    found = str(Path(vispruner.__file__).parents[1])
    return environment(PYTHONPATH=os.pathsep.join([found, environment()["PYTHONPATH"]]))


def assert_equal_numbers(one: Path, other: Path) -> None:
    """Bits of log-probabilities may depend on the number of threads of a process."""
    for a, b in zip(numbers(one), numbers(other), strict=True):
        assert a.pop("log_probability") == pytest.approx(b.pop("log_probability"), abs=1e-5)
        assert a == b


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Killed (-9) after its first measurement, it ends with the numbers of a run left alone."""
    options = ["--limit", "2", "--k", "8", "--device", "cpu"]
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", PROGRAM, "sweep", *options, "-o", str(killed)]
    process = subprocess.Popen(command, env=child(), stdout=subprocess.DEVNULL)
    records = killed / "measurements.jsonl"
    try:
        while process.poll() is None and not (records.exists() and b"\n" in records.read_bytes()):
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    first = records.read_bytes()
    whole = first[: first.rfind(b"\n") + 1]
    assert whole
    assert not (killed / "results.json").exists()
    assert run(killed, *options[:4]) == 0
    assert records.read_bytes().startswith(whole)
    assert run(tmp_path / "whole", *options[:4]) == 0
    assert_equal_numbers(killed, tmp_path / "whole")


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, in the middle of a batch."""
    options = ["--limit", "1", "--k", "8", "--batch-size", "4"]
    add, added = Records.add, []

    def interrupted(self: Records, key: str, one: Measurement) -> None:
        if len(added) == 6:
            raise KeyboardInterrupt
        add(self, key, one)
        added.append(key)

    monkeypatch.setattr(Records, "add", interrupted)
    assert run(tmp_path / "stopped", *options) == 130
    monkeypatch.undo()
    assert run(tmp_path / "stopped", *options) == 0
    assert run(tmp_path / "whole", *options) == 0
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    keys = [
        json.loads(line)["key"] for line in (tmp_path / "stopped" / "measurements.jsonl").open()
    ]
    assert len(keys) == len(set(keys)) == 12


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(tmp_path: Path) -> None:
    """It ends with the numbers of a run that was left alone."""
    options = ["--limit", "4", "--k", "8,22", "--device", "cpu"]
    assert run(tmp_path / "whole", *options[:4]) == 0
    command = [sys.executable, "-c", PROGRAM, "sweep", *options, "-o", str(tmp_path / "killed")]
    records = tmp_path / "killed" / "measurements.jsonl"
    lines = 0
    for _ in range(3):
        process = subprocess.Popen(
            command, env=child(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while process.poll() is None:
                now = records.read_bytes().count(b"\n") if records.exists() else 0
                if now >= lines + 3:
                    break
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
        finally:
            process.wait()
        now = records.read_bytes().count(b"\n")
        assert now >= lines
        lines = now
    assert subprocess.run(command, env=child(), capture_output=True).returncode == 0
    assert_equal_numbers(tmp_path / "killed", tmp_path / "whole")


class _Datasets:
    """In place of the package `datasets`."""

    rows: ClassVar[list[dict[str, Any]]] = []
    calls: ClassVar[list[Any]] = []

    @classmethod
    def load_dataset(cls, *names: str, split: str) -> list[dict[str, Any]]:
        cls.calls.append((*names, split))
        if split == "missing":
            raise ValueError("Unknown split \"missing\".\nShould be one of ['test'].")
        return cls.rows


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> type[_Datasets]:
    monkeypatch.setitem(sys.modules, "datasets", _Datasets)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    _Datasets.calls.clear()
    picture = Image.new("L", (8, 6), 7)
    _Datasets.rows = [
        {"image": picture, "question": "what?", "answer": 3},
        {"image": picture, "question": "why?"},
    ]
    return _Datasets


def test_a_dataset(datasets: type[_Datasets]) -> None:
    first, second = sweep.read("a/b", None)
    assert (first.name, first.question, first.answer) == ("a/b 0", "what?", "3")
    assert second.answer is None
    assert Image.open(io.BytesIO(cast("bytes", first.source))).size == (8, 6)
    assert len(list(sweep.read("a/b:validation", None, limit=1))) == 1
    assert len(list(sweep.read("a/b:large:validation", None))) == 2
    assert datasets.calls == [
        ("a/b", "test"), ("a/b", "validation"), ("a/b", "large", "validation")
    ]  # fmt: skip


def test_bad_datasets(datasets: type[_Datasets]) -> None:
    for source, message in (
        ("a/b:missing", 'cannot load the dataset a/b: Unknown split "missing". Should be one of'),
        ("a:b:c:d", "expected NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT, got 'a:b:c:d'"),
    ):
        with pytest.raises(sweep.DataError, match=re.escape(message)):
            list(sweep.read(source, None))
    datasets.rows = [{"picture": None, "question": "what?"}]
    with pytest.raises(sweep.DataError, match="got picture, question"):
        list(sweep.read("a/b", None))
