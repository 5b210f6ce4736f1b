"""`generate` and `chat`: what is said at each coefficient, what is remembered, how it stops, and what is refused."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import lora_lite as ll
from adapter_files import forged, parts
from helpers import perturb
from lab_helpers import make_llama, make_tokenizer, save_tiny
from lora_lite import cli
from lora_lite.lab.models.embedded import CONVERSION, EMBEDDED
from lora_lite.lab.talking import trained as finding
from lora_lite.lab.talking.dialogue import interruptible
from lora_lite.lab.talking.replies import Decoding, reply
from lora_lite.lab.tasks.task import Example
from lora_lite.lab.training.data import prompt_ids, render_prompt

NEW = 6  # tokens a reply
POSITIONS = 70  # with room for a turn or two
SHORT = ["--dtype", "float32", "--max-new-tokens", str(NEW)]
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def save_adapter(folder: Path, model: LlamaForCausalLM | None = None) -> Path:
    """An adapter of the tiny model, that changes what it says."""
    model = model or make_llama()
    perturb(ll.attach(model, ll.LoRAConfig(r=4)).targets.values(), 0.3)
    path = ll.save(model, folder / "adapter.safetensors")
    ll.detach(model)
    return path


@pytest.fixture
def run(tmp_path: Path, model: str) -> Path:
    """The folder of a run on the tiny model, which its record names."""
    save_adapter(tmp_path / "run")
    record(tmp_path / "run", model, {"instruction": "Short.", "chat": True})
    return tmp_path / "run"


def record(run: Path, model: object, prompts: object) -> None:
    (run / "result.json").write_text(json.dumps({"run": {"model": model}, "data": {"prompts": prompts}}))


@pytest.fixture
def talk(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict, str, str]]:
    """A command on the run: (its line of JSON, the rest of its output, its remarks)."""

    def call(command: str, *flags: str, typed: str = "", code: int = 0) -> tuple[dict, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert cli.main([command, "--json", str(run), *SHORT, *flags]) == code
        shown = capsys.readouterr()
        *lines, last = shown.out.splitlines(keepends=True) or [""]
        return json.loads(last or "{}"), "".join(lines), shown.err

    return call


def greedy(folder: str, ids: list[int], c: float | None, run: Path | None = None) -> str:
    """What transformers' own generate says; with the adapter at c, or on the bare base."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if run is not None:
        ll.load(model, run / "adapter.safetensors")
        ll.scale(model, c or 0.0)
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW, pad_token_id=257
    )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def ids_of(folder: str, question: str, instruction: str = "Short.", **options: Any) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return prompt_ids(tokenizer, Example(question, "", "", instruction), **options)


# ---- generate


def test_each_coefficient_says_what_the_model_says_at_it(talk: Callable, run: Path, model: str) -> None:
    said, shown, remarks = talk("generate", "Why?", "--c", "-1,0,1")
    texts = [each["text"] for each in said["replies"]]
    ids = ids_of(model, "Why?")
    assert texts == [greedy(model, ids, c, run) for c in (-1, 0, 1)]
    assert texts[1] == greedy(model, ids, None)
    assert len(set(texts)) == 3
    assert [each["c"] for each in said["replies"]] == [-1, 0, 1]
    assert re.findall("^c = (.*):$", shown, flags=re.MULTILINE) == ["-1", "0", "1"]
    assert said["model"] == model and said["prompt"] == "Why?" and said["system"] == "Short."
    assert "system message 'Short.': as in training" in remarks


def test_one_coefficient_gives_the_reply_alone(talk: Callable, run: Path) -> None:
    said, shown, _ = talk("generate", "Why?")
    assert [each["c"] for each in said["replies"]] == [1] and "c =" not in shown
    assert not STEERING.search(shown)


def test_a_prompt_comes_from_a_pipe_too(talk: Callable) -> None:
    expected = talk("generate", "One\ntwo")[0]
    assert expected == talk("generate", typed="One\ntwo\n")[0] == talk("generate", "-", typed="One\ntwo")[0]


def test_samples_follow_the_seed_and_leave_the_global_generator_alone(talk: Callable) -> None:
    before = torch.get_rng_state()
    first, again, other = (
        talk("generate", "Why?", "--temperature", "1", "--seed", seed, "--c", c)[0]["replies"]
        for seed, c in (("1", "0,1"), ("1", "1"), ("2", "1"))
    )
    assert first[1] == again[0] != other[0]
    assert torch.equal(before, torch.get_rng_state())


def test_the_way_of_training_is_followed_where_it_is_known_and_else_said_not_to_be(
    talk: Callable, run: Path, model: str
) -> None:
    expected = {
        "Short.": talk("generate", "Why?")[0]["replies"],
        "": talk("generate", "Why?", "--system", "")[0]["replies"],
        "plain": talk("generate", "Why?", "--plain")[0]["replies"],
    }
    assert len({json.dumps(each) for each in expected.values()}) == 3
    for unknown in ("{", "[]", json.dumps({"run": {"model": 3}, "data": {"prompts": None}}), None):
        (run / "result.json").unlink()
        if unknown is not None:
            (run / "result.json").write_text(unknown)
        else:
            record(run, model, None)
        said, _, remarks = talk("generate", "Why?", "--model", model)
        assert said["replies"] == expected[""] and "nothing here says how training wrote its own" in remarks
    record(run, model, {"instruction": "", "chat": False})
    said, _, remarks = talk("generate", "Why?")
    assert said["replies"] == expected["plain"] and said["chat"] is False
    assert "without a chat template: as in training" in remarks
    assert "was trained on plain prompts" in talk("generate", "Why?", "--system", "x", code=1)[2]


def test_a_model_without_a_chat_template_is_talked_to_and_that_is_said(talk: Callable, tmp_path: Path) -> None:
    bare = save_tiny(tmp_path / "bare", chat=None)
    said, _, remarks = talk("generate", "Why?", "--model", bare, "--c", "0")
    tokens = AutoTokenizer.from_pretrained(bare)("Why?\nShort.\n")["input_ids"]
    assert said["replies"][0]["text"] == greedy(bare, tokens, None) and "it has no chat template" in remarks


# ---- chat


def test_a_chat_remembers_and_goes_on_from_the_first_coefficient(talk: Callable, model: str) -> None:
    said, _, _ = talk("chat", "--c", "1,0", typed="One\nTwo\n/reset\nTwo\n/c 0\nThree\n")
    first, second, afresh, last = said["turns"]
    assert [len(turn["replies"]) for turn in said["turns"]] == [2, 2, 2, 1]
    history = [("One", first["replies"][0]["text"])]
    assert second["replies"][1]["text"] == greedy(model, ids_of(model, "Two", history=history), None)
    assert afresh["replies"][1]["text"] == greedy(model, ids_of(model, "Two"), None)
    history = [("Two", afresh["replies"][0]["text"])]
    assert last["replies"][0]["text"] == greedy(model, ids_of(model, "Three", history=history), None)


def test_lines_that_cannot_be_followed_are_said_and_the_chat_goes_on(talk: Callable) -> None:
    typed = "/c much\n/c nan\n/what now\n/c\n/help\n\n /what\n" + "x" * 3000 + "\nOne\n/quit\nnever said\n"
    said, _, remarks = talk("chat", typed=typed, code=1)
    assert [turn["prompt"] for turn in said["turns"]] == [" /what", "One"] and said["failures"] == 4
    for words in (
        "c = 'much': give a number", "c = 'nan'", "there is no /what; /help", "c = 1\n", "/reset   forget",
        "and the model has 2048 positions: shorten the prompt, or lower --max-new-tokens",
    ):  # fmt: skip
        assert words in remarks


def test_the_oldest_turns_are_forgotten_where_the_model_has_no_room(talk: Callable, model: str) -> None:
    path = Path(model) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": POSITIONS}))
    said, _, remarks = talk("chat", "--c", "0", typed="One\nTwo\nThree\n")
    assert len(said["turns"]) == 3 and said["failures"] == 0 and "oldest of the turns are forgotten" in remarks
    history = [(turn["prompt"], turn["replies"][0]["text"]) for turn in said["turns"][:2]]
    fitting = [ids for at in range(3) if len(ids := ids_of(model, "Three", history=history[at:])) + NEW <= POSITIONS]
    assert said["turns"][2]["replies"][0]["text"] == greedy(model, fitting[0], None) and len(fitting) < 3


def test_what_was_said_is_rendered_with_its_names_of_control_tokens_as_letters() -> None:
    tokenizer, history = make_tokenizer(), [("a <eos>", "b"), ("c", "<pad>")]
    expected = "<system>S\n<user>a <eos>\n<assistant>b\n<user>c\n<assistant><pad>\n<user>d\n<assistant>"
    assert render_prompt(tokenizer, "d", "S", history=history) == expected
    ids = prompt_ids(tokenizer, Example("d", "", "", "S"), history)
    assert tokenizer.decode(ids) == expected and max(ids) < 256
    plain = render_prompt(make_tokenizer(None), "d", "S", history=history[:1])
    assert plain == "a <eos>\nS\nb\nd\nS\n"
    assert render_prompt(tokenizer, "d", "", False, [("2+2=", " 4")]) == "2+2= 4\nd"


def test_a_template_without_system_message_has_the_instruction_in_the_first_turn() -> None:
    template = "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
    shown = render_prompt(make_tokenizer(template), "b", "Short.", history=[("a", "r")])
    assert shown == "<user>a\nShort.<assistant>r<user>b"


def test_text_comes_in_parts_that_no_later_token_changes(llama: LlamaForCausalLM) -> None:
    ll.attach(llama, ll.LoRAConfig(r=2))
    tokenizer = make_tokenizer()
    said = list(tokenizer("é\n x € ")["input_ids"])

    class Says(LlamaForCausalLM):
        """Says one text, whatever it is asked."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits[:] = 0
            out.logits[..., said[len(parts_of_ids)]] = 1
            parts_of_ids.append(0)
            return out

    parts_of_ids: list[int] = []
    llama.__class__ = Says
    parts: list[str] = []
    found = reply(llama, tokenizer, [1, 2], 1.0, Decoding(len(said)), parts.append)
    assert parts == ["é", "\n", " ", "x", " ", "€", " "] and found.text == "é\n x € "
    assert found.tokens == len(said) and found.cut_off


# ---- interruptions and pipes


def hostile(folder: Path) -> str:
    """A model that says ESC and "[" for ever, in a folder with an adapter of it."""
    model, tokenizer = make_llama(), make_tokenizer()
    escape, bracket = tokenizer("\x1b[")["input_ids"]
    with torch.no_grad():
        model.lm_head.weight[:] = 0
        model.lm_head.weight[escape] = 1
        model.lm_head.weight[bracket] = -1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_adapter(folder, model)
    record(folder, str(folder), None)
    return str(folder)


def test_ctrl_c_stops_a_reply_and_not_the_chat_in_a_pipe(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lora_lite.cli", "chat", hostile(tmp_path / "model"), "--json"]
    chat = subprocess.Popen(
        [*command, "--max-new-tokens", "2000"], stdin=-1, stdout=-1, stderr=-1, text=True, encoding="utf-8", bufsize=1
    )
    with chat:
        assert chat.stdin and chat.stdout
        chat.stdin.write("One\n")
        chat.stdin.flush()
        begun = chat.stdout.read(8)  # while the reply comes
        chat.send_signal(signal.SIGINT)
        rest, remarks = chat.communicate("/c 0\n", timeout=120)
    *lines, last = (begun + rest).splitlines()
    [turn] = json.loads(last)["turns"]
    assert chat.returncode == 0 and turn["replies"][0]["stopped"] and 1 <= turn["replies"][0]["tokens"] < 2000
    assert "(stopped)" in remarks and "c = 0\n" in remarks
    assert re.fullmatch(r"> (\\x1b|\[)+\n> > ", "\n".join(lines)) and "\\x1b" in lines[0]
    assert not STEERING.search(begun + rest) and "Traceback" not in remarks


def test_the_first_interruption_is_counted_and_the_second_acts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible() as pressed:
        assert not pressed()
        os.kill(os.getpid(), signal.SIGINT)
        assert pressed()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_input_that_is_no_text_is_a_sentence(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("chat", "generate"):
        for errors in ("strict", "surrogateescape"):
            stdin = io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8", errors=errors)
            monkeypatch.setattr(sys, "stdin", stdin)
            with contextlib.redirect_stderr(io.StringIO()) as told:
                assert cli.main([command, str(run), *SHORT]) == 1
            assert "is no text in utf-8" in told.getvalue().splitlines()[-1]


# ---- what is refused


def damaged(run: Path) -> None:
    path = run / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def not_finite(run: Path) -> None:
    path = run / "adapter.safetensors"
    header, tensors = parts(path.read_bytes())
    next(value for key, value in tensors.items() if key.endswith(".A"))[0, 0] = float("inf")
    path.write_bytes(forged(header, tensors))


def another_base(run: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = type(make_llama())(make_llama().config)
        for parameter in other.parameters():
            torch.nn.init.normal_(parameter)
    save_adapter(run, other)


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        (damaged, [], "is no whole safetensors file"),
        (not_finite, [], ".lora.A is not finite (1 such tensors)"),
        (lambda run: (run / "adapter.safetensors").write_text("{}"), [], "is no whole safetensors file"),
        (lambda run: (run / "adapter.safetensors").unlink(), [], "holds no adapter.safetensors: give a file"),
        (lambda run: None, ["--trust-remote-code"], "give the model with --model as well"),
    ],
)
def test_a_file_is_checked_before_its_model_is_read(
    change: Callable, flags: list[str], words: str, talk: Callable, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(run)
    monkeypatch.setattr(finding, "load_model", lambda *args: pytest.fail("the model was read"))
    remarks = talk("generate", "Why?", *flags, code=1)[2]
    assert words in remarks and len(remarks.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        (another_base, [], "was trained on another base model"),
        (another_base, [], "give the right one with --model"),
        (lambda run: (run / "result.json").unlink(), [], "if it has another one here, give that with --model"),
        (lambda run: None, ["--c", "1e30"], "at c = 1e+30 the model's outputs are beyond"),
        (lambda run: None, ["--plain", "--system", "x"], "--system has no place in a plain prompt"),
        (lambda run: None, ["--device", "nowhere"], "--device nowhere: cannot be used here"),
    ],
)
def test_what_cannot_be_said_is_a_sentence(
    change: Callable, flags: list[str], words: str, talk: Callable, run: Path
) -> None:
    change(run)
    assert words in talk("generate", "Why?", *flags, code=1)[2]


def test_an_empty_prompt_is_refused(talk: Callable) -> None:
    assert "the prompt is empty" in talk("generate", typed="\n", code=1)[2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--c", "1;0"], "c = '1;0': give a number"), (["--c", "inf"], "c = 'inf': give a number"),
        (["--temperature", "-1"], "temperature = -1.0: must be 0"),
        (["--max-new-tokens", "0"], "max_new_tokens = 0: must be an integer >= 1"),
        (["--seed", "-1"], "seed = -1"), (["--no-such-flag"], "--no-such-flag"),
    ],
)  # fmt: skip
def test_flags_that_are_not_understood_exit_with_2(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "none.safetensors", "Why?", *flags])
    assert stopped.value.code == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    told = capsys.readouterr().out
    assert stopped.value.code == 0 and f"lora-lite {command} runs/demo-lora" in told and "--c " in told


@pytest.mark.slow
def test_the_embedded_model_is_known_by_its_name(
    smollm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = smollm
    path = save_adapter(tmp_path, model)
    assert ll.files.description.describe(path)["base"]["name"] == CONVERSION
    assert cli.main(["generate", "--json", str(path), "Name a colour.", "--c", "0,1", *SHORT]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    prompt = torch.tensor([prompt_ids(tokenizer, Example("Name a colour.", "", "", ""))])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW)
    base, adapted = said["replies"]
    assert said["model"] == EMBEDDED and base["text"] != adapted["text"]
    assert base["text"] == tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
