"""bench, study, cost and report, as their user sees them: output, last line, exit code, files."""

import json
from pathlib import Path

import pytest

from lab_helpers import save_tiny
from lora_lite import cli
from lora_lite.lab.studies.study import study_names

SMALL = [
    "--task", "gcd", "--validation-examples", "4", "--test-examples", "4", "--seeds", "1", "--rates", "1", "--steps",
    "2", "--batch-size", "2", "--general-windows", "0", "--other-task", "", "--max-new-tokens", "4", "--no-costs",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local model folder."""
    save_tiny(tmp_path / "model")
    return tmp_path


def bench(folder: Path, *flags: str) -> int:
    return cli.main(["bench", "--json", "--model", str(folder / "model"), "--out", str(folder / "out"), *SMALL, *flags])


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_bench_measures_and_makes_a_page_and_report_makes_it_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(folder, "--methods", "ia3,lora[r=1,2]", "--baseline", "lora[r=1]", "--tsv", str(folder / "a.tsv")) == 0
    printed = last_line(capsys)
    assert printed["accuracy"].keys() == {"ia3", "lora[r=1]", "lora[r=2]"} and printed["missing"] == 0
    page = (folder / "out" / "index.html").read_text()
    assert "lora[r=2]" in page and "http" not in page.split("<style>")[1].split("</style>")[0]
    assert len((folder / "a.tsv").read_text().splitlines()) == 1 + 1 + 3 * 2
    plan = json.loads((folder / "out" / "study.json").read_text())
    assert plan["command"].startswith("lora-lite bench --model") and "'lora[r=1]'" in plan["command"]

    (folder / "out" / "index.html").unlink()
    assert cli.main(["report", "--json", str(folder / "out"), "--tsv", str(folder / "b.tsv")]) == 0
    assert last_line(capsys) == printed and (folder / "out" / "index.html").read_text() == page
    assert (folder / "a.tsv").read_text() == (folder / "b.tsv").read_text()


def test_a_failed_arm_exits_with_1_and_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(folder, "--methods", "lora,lora[r=4000000000000]", "--no-page") == 1
    printed = capsys.readouterr().out
    assert (
        "failed: lora[r=4000000000000]: learning rate 0.0002: " in printed and "every learning rate failed" in printed
    )
    assert not (folder / "out" / "index.html").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--methods", "lorra"], "'lorra' is no method"),
        (["--methods", "lora[rank=2]"], "lora has no setting rank"),
        (["--task", "gdc"], "did you mean gcd"),
        (["--max-length", "3"], "longer than 3"),
        (["--report-to", "notes"], "no such tracker"),
    ],
)
def test_what_bench_cannot_do_says_why(
    flags: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(folder, *flags) == 1
    assert words in capsys.readouterr().err and not (folder / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "0.1"], "lr and seed are set by the study"),
        (["--baseline", "dora", "--methods", "lora"], "baseline = 'dora' is none of the arms lora"),
        (["--seeds", "0"], "seeds = 0: must be an integer >= 1"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_flags_of_bench_that_are_not_understood_exit_with_2(
    flags: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench(folder, *flags)
    assert stopped.value.code == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split()) and not (folder / "out").exists()


@pytest.mark.slow
def test_study_lists_what_there_is_and_takes_the_flags_of_bench(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["study", "--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in study_names())
    flags = ["--json", "--smoke", "--model", str(folder / "model"), "--out", str(folder / "out"), *SMALL, "--no-page"]
    assert cli.main(["study", "rotation_axis", *flags, "--layers", "0", "1"]) == 0
    assert last_line(capsys)["accuracy"].keys() == {
        f"antipasto_rot[rotate_basis={basis}]" for basis in ("none", "V", "U", "both")
    }
    with pytest.raises(SystemExit) as stopped:
        cli.main(["study", "no_such"])
    assert stopped.value.code == 2


def test_cost_from_shapes_and_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cost", "--json", "--shapes", "--model", str(folder / "model"), "--methods", "lora[r=1,2]"]) == 0
    found = last_line(capsys)
    assert found["lora[r=2]"]["trainable"] == 2 * found["lora[r=1]"]["trainable"] > 0


@pytest.mark.parametrize("command", ["bench", "study", "cost", "report"])
def test_report_and_others_explain_themselves(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main([command, "--help"])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 0 and len(capsys.readouterr().out) > 200


def test_report_of_an_empty_folder_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "study.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [b"{}", b"[]", b"", b"{", b"\xff", b"[" * 100_000, b'{"study": {}}', b'{"study": {"seeds": "3"}}', b"NaN"],
)
def test_a_damaged_plan_is_a_sentence(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.json").write_bytes(content)
    assert cli.main(["report", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("lora-lite: LedgerError: ") and len(told.splitlines()) == 1 and "study.json" in told
