"""Commands within a chat: lines that begin with a slash."""

from collections.abc import Callable
from typing import NamedTuple

from lora_lite.lab import terminal
from lora_lite.lab.errors import RunError
from lora_lite.lab.talking.dialogue import Dialogue, coefficients


def obey(dialogue: Dialogue, command: str, argument: str = "") -> None:
    """Do what a line of the chat that begins with a slash asks for. Raises EOFError to end the chat."""
    if command not in COMMANDS:
        raise RunError(f"there is no {command}; /help lists what there is, and a blank before it says it to the model")
    COMMANDS[command].act(dialogue, argument)


def set_coefficients(dialogue: Dialogue, argument: str) -> None:
    """Talk at other coefficients from now on; without an argument, say which they are."""
    try:
        dialogue.cs = coefficients(argument) if argument else dialogue.cs
    except ValueError as error:
        raise RunError(str(error)) from error
    terminal.remark(f"c = {', '.join(f'{c:g}' for c in dialogue.cs)}")
    if len(dialogue.cs) > 1:
        terminal.remark(f"each reply is shown for each; the chat goes on from that at c = {dialogue.cs[0]:g}")


def forget(dialogue: Dialogue, argument: str) -> None:
    """Begin again."""
    dialogue.reset()
    terminal.remark("what was said is forgotten")


def leave(dialogue: Dialogue, argument: str) -> None:
    """End as the input's end does."""
    raise EOFError


def explain(dialogue: Dialogue, argument: str) -> None:
    """List the commands."""
    lines = [f"{name:<8} {command.about}" for name, command in COMMANDS.items()]
    terminal.remark("\n".join([*lines, "Ctrl-C   stop a reply", "A blank before a slash says the line to the model."]))


class ChatCommand(NamedTuple):
    """A command within a chat: a line for /help, and what it does, given what stands behind its name."""

    about: str
    act: Callable[[Dialogue, str], None]


COMMANDS = {
    "/c": ChatCommand("set the coefficient, as in /c 0.5, or several, as in /c 1,0", set_coefficients),
    "/reset": ChatCommand("forget what was said", forget),
    "/help": ChatCommand("list these commands", explain),
    "/quit": ChatCommand("end the chat; so does Ctrl-D", leave),
}
