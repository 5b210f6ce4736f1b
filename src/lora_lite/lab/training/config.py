"""What a training run is asked to do."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_lite.config import AdapterConfig
from lora_lite.files.atomic import expanded
from lora_lite.lab.models.devices import DTYPES
from lora_lite.lab.models.load import EMBEDDED
from lora_lite.lab.shared_flags import TrustRemoteCode, slug
from lora_lite.lab.training.data import MAX_LENGTH
from lora_lite.registry import method_of

NAMED = Path("runs/TASK-METHOD-MODEL")  # stands for a folder with these names
CALIBRATION_BATCHES = 8


def needs_data(methods: Sequence[AdapterConfig]) -> bool:
    """Whether one of the methods is calibrated on data."""
    return any(method_of(cfg).needs(cfg) for cfg in methods)


def described(cfg: AdapterConfig) -> dict[str, object]:
    """A method with all its settings, as records hold it: its name under "method", then the fields of its config."""
    return {"method": method_of(cfg).facts.name, **cfg.to_dict()}


@dataclass(frozen=True)
class RunConfig:
    """What to fine-tune, on what, and where to.

    Attributes:
        model: "smollm2" (embedded), a hub id or a local folder.
        task: "gsm8k", "metamath_gsm8k", a reasoning-gym task with parameters as in "gcd:max_value=100", several joined
            by "+", or your own questions and answers, "mine.jsonl" or "jsonl:path=mine.jsonl,score=numeric".
        quantization: of the base: "none", "4bit" or "8bit" (bitsandbytes).
        dtype: of the base: "float32", "bfloat16", or "auto": bfloat16 where the device computes in it.
        device: where to run. None: the GPU if there is one.
        train_examples: distinct examples to train on; all that there are where the task has fewer, which is said.
        test_examples: held-out items to measure on; all that there are where the task has fewer.
        calibration_batches: training batches that methods and bases which need data are calibrated on. Each is one
            forward pass; second moments are better estimated from 64.
        train_also: names or regexes of base parameters to train as well, such as a head or an embedding.
        reload_examples: items that the reloaded adapter must answer as the trained one did.
        max_length: longest example in tokens; longer ones are left out and counted.
        out: folder for the adapter, the checkpoints and the result; by default one named for what is asked.
        resume: go on from the last checkpoint in `out`.
        overwrite: give up what an earlier run left in `out`.
        report_to: trackers: "tensorboard", "wandb", "trackio"; through accelerate.
        probe: instead of training, find out in under a minute whether the method works on the model.
    """

    model: str = EMBEDDED
    task: str = ""
    quantization: str = "none"
    dtype: str = "auto"
    device: str | None = None
    train_examples: int = 640
    test_examples: int = 100
    calibration_batches: int = CALIBRATION_BATCHES
    reload_examples: int = 16
    train_also: tuple[str, ...] = ()
    max_length: int = MAX_LENGTH
    out: Path = NAMED
    resume: bool = False
    overwrite: bool = False
    trust_remote_code: TrustRemoteCode = False
    report_to: tuple[str, ...] = ()
    probe: bool = False

    def named(self, methods: Sequence[AdapterConfig]) -> "RunConfig":
        """The run with the folder that it writes to."""
        if self.out != NAMED:
            return self
        path = re.search(r"path=([^,]+)", self.task)
        task = Path(path[1] if path else self.task.partition(":")[0]).stem
        names = [task, "+".join(method_of(cfg).facts.name for cfg in methods), Path(self.model).name]
        return dataclasses.replace(self, out=NAMED.parent / "-".join(filter(None, map(slug, names))))

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", expanded(self.out))
        if self.resume and self.overwrite:
            raise ValueError("RunConfig.resume and overwrite exclude each other: one goes on, the other starts again")
        if self.dtype not in (*DTYPES, "auto"):
            raise ValueError(f"RunConfig.dtype = {self.dtype!r}: must be one of auto, {', '.join(DTYPES)}")
        for name in ("train_examples", "test_examples", "calibration_batches", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"RunConfig.{name} = {getattr(self, name)}: must be an integer >= 1")
        if not 0 <= self.reload_examples <= self.test_examples:
            raise ValueError(f"RunConfig.reload_examples = {self.reload_examples}: must be in [0, test_examples]")
