"""What files, models and users say is shown as it is: no markup, no control sequence acts."""

import dataclasses
import io

import pytest
from rich.console import Console

import page_studies
from lora_lite import cli
from lora_lite.lab.commands.commands import slug
from lora_lite.lab.findings.findings import shown
from lora_lite.lab.report import tables
from lora_lite.printable import one_line, printable

HOSTILE = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202egnp.exe [/] [bold] :smile: \ud800"


def named(name: str) -> object:
    findings = page_studies.whole({key: page_studies.ARMS[key] for key in ("lora", "dora")})
    arms = tuple(dataclasses.replace(arm, arm=name if arm.arm == "dora" else arm.arm) for arm in findings.arms)
    return dataclasses.replace(findings, arms=arms, task="mine[x].jsonl:drop=x")


@pytest.mark.parametrize("name", ["lora[r=4]", "a[/]", "[bold]x", ":smile:", HOSTILE])
def test_names_in_a_terminals_table_are_shown_as_they_are(name: str) -> None:
    console = Console(width=400, file=io.StringIO())  # rich's markup is on
    console.print(tables.terminal(named(name), 400))  # type: ignore[arg-type]
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert one_line(name) in text and "mine[x].jsonl" in text
    assert not any(letter in text for letter in "\x1b\x07\x9b\u202e\ud800")


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("lora[r=4]", "lora[r=4]"), ("antipasto_arrow", "antipasto_arrow"), ("a|b", r"a\|b"), ("`x`", r"\`x\`"),
        ("<b>&", "&lt;b&gt;&amp;"), ("[x](http://y)", r"[x\](http://y)"), ("a\nb", r"a\\nb"), ("_x_", r"\_x\_"),
    ],
)  # fmt: skip
def test_names_in_markdown_are_no_markup(name: str, cell: str) -> None:
    assert tables.as_markdown(name) in (cell, cell.replace(r"\\n", r"\n"))
    assert all(line.count("\n") == 0 for line in tables.markdown(named(name)).splitlines())  # type: ignore[arg-type]


def test_control_characters_are_escapes_and_text_stays() -> None:
    assert printable("\x1b[2J\r\x7f\x85") == r"\x1b[2J\r\x7f\x85"
    kept = "plain é 漢 🙂 −1\n\ttab"
    assert printable(kept) == kept and one_line("a\nb") == r"a\nb"
    assert printable(HOSTILE).encode()


def test_findings_for_the_page_are_fit_to_be_shown() -> None:
    page = shown(named(HOSTILE))
    assert printable(HOSTILE) in [arm.arm for arm in page.arms]


def test_an_error_message_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "no-such\x1b[2J\x07"]) == 1
    told = capsys.readouterr().err
    assert r"no-such\x1b[2J\x07" in told and "\x1b" not in told and "Traceback" not in told


@pytest.mark.parametrize(("name", "folder"), [("a/b", "a-b"), ("../../etc", "etc"), ("/etc", "etc"), ("", "bench"),
                                              ("x\x1b[1m", "x-1m"), ("méthode.2", "méthode.2")])  # fmt: skip
def test_a_studys_name_as_a_folder(name: str, folder: str) -> None:
    assert (slug(name) or "bench") == folder
