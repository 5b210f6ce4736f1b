"""Verifiers of generators: replies are data, whatever they say, and what a verifier cannot score is counted."""

import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reasoning_gym.factory import DATASETS, create_dataset

from lab_helpers import make_llama
from lora_lite.lab.findings.circumstances import scored
from lora_lite.lab.studies.bench import replies
from lora_lite.lab.tasks import gym, verifier_process, verifiers
from lora_lite.lab.tasks import task as tasks
from lora_lite.lab.tasks.catalogue import load_task, mixture
from lora_lite.lab.tasks.task import Example, Task, TaskError, VerifierError
from lora_lite.lab.training import evaluate as lab
from lora_lite.lab.training import examples as report
from lora_lite.lab.training.evaluate import Evaluation, evaluate

EVALUATING = [
    "binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24",
    "simple_integration", "spiral_matrix", "string_insertion",
]  # fmt: skip
WRITES = "__import__('pathlib').Path({!r}).write_text('x')"
REFUSED = {  # of the generators that cannot be tasks, why
    "composite": "Must specify at least one dataset",
    "complex_arithmetic": "takes the reply 'nan' for right",
    "game_of_life_halting": "takes the reply 'I do not know' for right",
    "puzzle24": "whatever the question",
    **dict.fromkeys(
        ("graph_color", "rubiks_cube", "boxnet", "rush_hour", "propositional_logic"), "gives no answer text"
    ),
}


def entry_of(name: str, seed: int = 0) -> Any:
    return create_dataset(name, seed=seed, size=1)[0]


def score(name: str, reply: str, entry: Any = None) -> float:
    return verifiers.VERIFIERS.score(name, {}, entry or entry_of(name), reply)


def worker(name: str) -> int:
    """The process that reads the replies of a generator, after one reply."""
    score(name, "1")
    process = verifiers.VERIFIERS._process
    assert process is not None
    return process.pid


# ---- replies that act


@pytest.mark.parametrize("name", EVALUATING)
def test_a_reply_is_never_executed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    entry = entry_of(name)
    for target in ("x", str(tmp_path / "x")):
        code = WRITES.format(target)
        for reply in (code, f"[{code}]", f"[[{code}]]"):
            try:
                assert score(name, reply, entry) < 0.1
            except VerifierError as error:
                assert "refused: code that names '__import__'" in str(error)
    assert not list(tmp_path.iterdir())
    assert score(name, entry["answer"], entry) == 1.0


@pytest.mark.parametrize(
    "reply",
    [
        "x.func", "x.__class__", "(lambda: 1)()", "[y for y in (1,)]", "open('/etc/passwd').read()", "lambdify(x, '1')",
        "sympify('__import__(\"os\").system(\"true\")')", "Symbol('x').subs(x, 1)", "preview(x)", "exit()", "[" * 5000,
        "9" * 100_000, "\x00", "\ud800", "x" * 1_000_000,
    ],
)  # fmt: skip
def test_only_mathematics_is_evaluated(reply: str) -> None:
    with contextlib.suppress(VerifierError):
        assert score("simple_integration", reply) == 0.0
    entry = entry_of("simple_integration")
    assert score("simple_integration", entry["answer"], entry) == 1.0


@pytest.mark.parametrize("name", ["simple_integration", "intermediate_integration"])
def test_wrong_and_right_mathematics_get_scores(name: str) -> None:
    entry = entry_of(name, seed=5)
    symbol = entry["metadata"]["variable"]
    for wrong in ("0", symbol, f"sin({symbol}) + log({symbol}) + C", "nan"):  # sympy makes code of its own for these
        assert score(name, wrong, entry) == 0.0
    for right in (f"{entry['answer']} + 3", f"sqrt(4) - 2 + {entry['answer']}"):
        assert score(name, right, entry) == 1.0


def test_a_reply_that_computes_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifiers, "SECONDS", 0.5)
    for name in ("n_queens", "countdown"):
        before = worker(name)
        with pytest.raises(VerifierError, match=r"no score after 0\.5 s|process died"):
            score(name, "9**9**9**9")
        entry = entry_of(name)
        assert score(name, entry["answer"], entry) == 1.0 and worker(name) == before  # only its child was ended


def test_a_reply_that_takes_all_memory_is_ended() -> None:
    for name, reply in (("spiral_matrix", "[['a'] * 10**10]"), ("n_queens", "[['Q'] * 10**10]")):
        try:
            assert score(name, reply) < 0.1
        except VerifierError as error:
            assert any(word in str(error) for word in ("MemoryError", "process died", "no score after"))


def test_the_process_is_started_again_after_it_was_killed() -> None:
    before = worker("gcd")
    os.kill(before, signal.SIGKILL)
    entry = entry_of("gcd")
    for _ in range(2):  # the first may find out that it is gone
        try:
            found = score("gcd", entry["answer"], entry)
        except VerifierError as error:
            assert "died" in str(error)
    assert found == 1.0 and worker("gcd") != before


# ---- the second barrier, for code that runs all the same


def locked(act: Callable[[], Any]) -> str:
    """What comes of an act in a locked-up process: "done", or what was refused."""
    answers, answer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            guard = verifier_process.lock_up(answer)
            try:
                act()
            except BaseException as error:
                os.write(answer, (guard.refused or repr(error)).encode())
            else:
                os.write(answer, b"done")
        finally:
            os._exit(0)
    os.close(answer)
    with os.fdopen(answers, "rb") as pipe:
        told = pipe.read().decode()
    os.waitpid(child, 0)
    return told


def acts(folder: Path) -> dict[str, tuple[Callable[[], Any], str]]:
    import ctypes
    import pathlib
    import shutil
    import socket
    import subprocess

    path = folder / "x"
    return {
        "write": (lambda: path.write_text("x"), "open for writing"),
        "append": (lambda: open("x", "a"), "open for writing"),
        "low level": (lambda: os.open(str(path), os.O_CREAT | os.O_WRONLY), "open for writing"),
        "module for writing": (lambda: os.open(pathlib.__file__, os.O_RDWR), "open for writing"),
        "private file": (lambda: open("/etc/passwd"), "open '/etc/passwd'"),
        "folder": (lambda: os.mkdir(path), "os.mkdir"),
        "removal": (lambda: os.remove(folder / "kept"), "os.remove"),
        "tree": (lambda: shutil.rmtree(folder), "shutil.rmtree"),
        "rename": (lambda: os.rename(folder / "kept", path), "os.rename"),
        "ctypes": (lambda: ctypes.CDLL(None), "ctypes.dlopen"),
        "subprocess": (lambda: subprocess.run(["true"]), "subprocess.Popen"),
        "shell": (lambda: os.system("true"), "os.system"),
        "exec": (lambda: os.execv("/bin/true", ["true"]), "os.exec"),
        "fork": (lambda: os.fork(), "os.fork"),
        "kill": (lambda: os.kill(os.getppid(), 0), "os.kill"),
        "socket": (lambda: socket.socket(), "socket.__new__"),
        "hook": (lambda: sys.addaudithook(print), "sys.addaudithook"),
    }


def test_the_locked_process_refuses_files_processes_and_network(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    for name, (act, refused) in acts(tmp_path).items():
        told = locked(act)
        assert refused in told, (name, told)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    if sys.platform == "linux":
        assert locked(lambda: bytearray(2 * verifier_process.MEMORY)) == "MemoryError()"
    assert locked(lambda: __import__("colorsys")) == "done"  # it may read modules, or nothing would work


# ---- nonsense


@pytest.mark.parametrize("name", ["game_of_life_halting", "complex_arithmetic", "puzzle24"])
def test_generators_whose_verifiers_take_nonsense_are_refused(name: str) -> None:
    with pytest.raises(TaskError, match=f"{name}.*{REFUSED[name]}.*choose another task"):
        load_task(name)


def test_a_reply_that_breaks_a_verifier_scores_zero_and_is_told() -> None:
    task = load_task("coin_flip")
    example = task.examples("test", 1)[0]
    assert task.score(example, "1e999") == 0.0
    found, why = task.assess(example, "1e999")
    assert found == 0.0 and "the verifier of 'coin_flip' gave no score: OverflowError" in why
    both = mixture([task, load_task("gcd")])
    assert both.assess(example, "1e999") == (found, why)
    assert task.assess(example, example.answer) == (1.0, "") == both.assess(example, example.answer)


@pytest.mark.parametrize("reply", ["0", "0.0", "-0", "0,", "0e5", "0/1", "+0_0"])
def test_a_number_that_is_not_the_answer_is_not_right(reply: str) -> None:
    task = load_task("coin_flip")
    for example in task.examples("test", 5):
        assert task.score(example, reply) < tasks.RIGHT, example.answer
        assert task.score(example, example.answer) == 1.0


# ---- counting


def broken(answers: list[str]) -> tuple[Task, list[Example]]:
    """A task whose verifier fails at the answer "bad"."""

    def verify(example: Example, answer: str) -> float:
        if example.answer == "bad":
            raise VerifierError("the verifier of 't' gave no score: it broke")
        return 1.0

    examples = [Example(f"question {i}", answer, "t") for i, answer in enumerate(answers)]
    return tasks.from_examples("t", examples, verify, max_new_tokens=2), examples


def test_failures_are_counted_and_the_others_go_on(tokenizer: Any) -> None:
    task, examples = broken(["good", "bad", "good", "bad"])
    found = evaluate(make_llama(), tokenizer, task, examples, progress=False)
    assert found.failures == 2 and found.accuracy == 0.5
    assert [bool(record.failure) for record in found.records] == [False, True, False, True]
    assert lab.judge(task, examples[1], "x") == (0.0, False)
    assert lab.record_of(task, examples[1], "x").failure.endswith("it broke")


def test_a_study_tells_how_many_replies_got_no_score() -> None:
    failing = lab.Record("q", "a", "r", 0.0, False, failure="it broke")
    record = replies(Evaluation((failing, failing, lab.Record("q", "a", "r", 1.0, True)), 1.0, 3))
    assert record["verifier_failures"] == 2
    older = {key: value for key, value in record.items() if key != "verifier_failures"}
    assert scored([older, {"reason": "failed"}]) == (3, 0)
    assert scored([older, record]) == (6, 2)


def test_a_run_prints_how_many_replies_got_no_score() -> None:
    failing = lab.Record("q", "a", "r", 0.0, False, failure="it broke")
    fine = lab.Record("q", "a", "r", 1.0, True)
    before, after = Evaluation((failing, failing), 1.0, 2), Evaluation((fine, fine), 1.0, 2)
    assert report.unscored(before, after) == [
        "replies without a score from the verifier, counted as wrong: 2 before, 0 after; the first: it broke"
    ]
    assert report.unscored(after, after) == []


# ---- all of them


@pytest.mark.slow
def test_every_generator_takes_its_own_answers_or_is_refused_with_the_reason() -> None:
    refused = {}
    for name in DATASETS:
        try:
            task = gym.gym_task(name)
        except TaskError as error:
            refused[name] = str(error)
            continue
        drawn = list(itertools.islice(filter(None, task.source("test", 0)), 2))
        assert len(drawn) == 2, name
        for example in drawn:
            assert task.assess(example, example.answer) == (1.0, ""), name
            assert task.score(example, WRITES.format("x")) < tasks.RIGHT, name
            assert task.score(example, "I do not know") < tasks.RIGHT, name
    assert refused.keys() == REFUSED.keys()
    assert all(REFUSED[name] in reason for name, reason in refused.items())
