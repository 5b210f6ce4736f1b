"""What `numeric` must never take for right, and what it must not take for wrong."""

import json
from pathlib import Path

import pytest

from lora_lite.lab.scoring.final_numbers import reference_amount
from lora_lite.lab.scoring.scoring import finder, numeric
from lora_lite.lab.tasks.catalogue import load_task
from lora_lite.lab.tasks.task import TaskError


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("2 million", "2 thousand"),
        ("2 million", "2"),
        ("1.5k", "1.5"),
        ("$3bn", "$3mn"),
        ("$5", "5 cents"),
        ("5 cents", "$5"),
        ("3√2", "5√2"),
        (r"3\sqrt{2}", r"5\sqrt{2}"),
        ("√2", "2"),
        ("2+3i", "5+3i"),
        ("3i", "3"),
        ("2π", "2"),
        ("1±2", "2±2"),
        ("±2", "2"),
        ("(1, 2)", "(3, 2)"),
        ("[1,2,3]", "[9,9,3]"),
        ("x=3, y=4", "x=9, y=4"),
        ("x=3 y=4", "x=3 y=9"),
        ("3-5", "2-5"),
        ("3 to 5", "2 to 5"),
        ("3 or 5", "2 or 5"),
        ("> 5", "5"),
        ("3 feet 5 inches", "2 feet 5 inches"),
        ("5 and a half", "5"),
        ("minus 5", "5"),
        ("x + 3", "y + 3"),
        ("x^2 + 3", "3"),
        ("B2", "C2"),
        ("12,5", "5"),
        ("The answer is: (1, 2)", "The answer is: (1, 3)"),
        (r"So it is \boxed{(1, 2)}", r"So it is \boxed{(1, 3)}"),
        ("#### 3-5", "#### 3-6"),
    ],
)
def test_different_answers_are_not_the_same(reference: str, answer: str) -> None:
    assert numeric(reference, answer) == 0.0
    assert not finder("numeric")(reference, answer)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("2 million", "2000000"),
        ("1.5k", "1,500"),
        ("1/2 million", "500 thousand"),
        ("2 hundred thousand", "200,000"),
        ("$5", "5"),
        ("$5", "500 cents"),
        ("5 dollars", "500 cents"),
        ("18", "18 cents"),
        ("18 cents", "18"),
        ("5 km", "It is 5 km."),
        ("5 m²", "It is 5 m^2."),
        ("5 m2", "5"),
        ("**18** eggs", "18"),
        ("50%", "50"),
        ("x = 3", "3"),
        ("3 + 5 = 8 eggs", "8"),
        ("7", "Therefore, the final answer is 7. I checked 3 times."),
        ("7", "**Final answer:** 7\nI checked 3 times."),
        ("7", "My answer is 7, and I checked 3 times."),
        ("8", "The answer is 5 + 3, which is 8"),
        ("8", "The answer is 5 + 3, or 8."),
        ("8", "The answer is 16 divided by 2, so 8"),
        ("8", "The answer is 5 eggs + 3 eggs, so she has 8 of 12"),
        ("8", "The answer is 7 + 1 ≈ 8"),
        ("8", "The answer is 3 + 5 is 8"),
        ("8", "The answer is 16:2=8"),
        ("3:45", "The answer is 3:45, so 15 minutes before 4"),
        ("8", "5 + 3, or 8."),
        ("8", "16:2=8"),
        (r"The answer is: $\boxed{\frac{5}{6}}$.", "5/6"),
        ("The answer is 5. I checked it 3 times.", "5"),
    ],
)
def test_the_same_answer_is_right_however_it_is_said(reference: str, answer: str) -> None:
    assert numeric(reference, answer) == 1.0


@pytest.mark.parametrize("text", ["18", "-$1,234.50", "1 1/2", "3:45 pm", "2024-03-15", "18 dollars a day", "= 18"])
def test_a_plain_reference_is_its_number(text: str) -> None:
    assert reference_amount(text) is not None and numeric(text, text) == 1.0


def test_a_reference_that_is_no_single_number_is_refused_with_its_row(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": "3 feet 5 inches"} for i in range(60)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(TaskError, match=r"do not get the full score .*'3 feet 5 inches', to the question"):
        load_task(f"{tmp_path / 'mine.jsonl'}:score=numeric")
