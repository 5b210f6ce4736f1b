"""The README.md of an exported folder: what it is, how it was checked, and how to load it."""

from collections.abc import Mapping
from typing import Any

from lora_lite.interop.peft_folder import MARK


def card(done: Any, base: str, settings: Mapping[str, Any]) -> str:
    """Markdown with the metadata that hubs read; `done` is an `Exported`."""
    server = [
        "",
        "Served by vLLM (rank up to its `--max-lora-rank`):",
        "",
        "```sh",
        f"vllm serve {base} --enable-lora --max-lora-rank {settings.get('r')} --lora-modules adapter=FOLDER",
        "```",
    ]
    return "\n".join(
        [
            "---",
            "library_name: peft",
            f"base_model: {base}",
            MARK,
            "---",
            "",
            f"# An adapter of {base}",
            "",
            *(f"- {line}" for line in str(done).replace(f"{done.folder}: ", "", 1).splitlines()),
            "",
            "```python",
            "from peft import PeftModel",
            'model = PeftModel.from_pretrained(base_model, "FOLDER")  # peft',
            'import lora_lite as ll; ll.import_peft(base_model, "FOLDER")  # lora-lite',
            "```",
            *([] if done.refused_by else server),
            "",
        ]
    )
