"""An adapter's file merged into a model's folder, one layer in memory at a time: a new folder, without adapters."""

import copy
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_lite.errors import CheckpointError
from lora_lite.files.atomic import expanded
from lora_lite.files.base_check import cosine, refuse_other_layers, refuse_other_values
from lora_lite.files.checkpoint import room_for
from lora_lite.files.file_targets import add_to_layer
from lora_lite.files.format import File, read
from lora_lite.interop.folder_copy import add_tensors, copy_folder, new_sibling
from lora_lite.interop.merged_logits import LogitError, compare_folders
from lora_lite.interop.safetensors_folder import CONFIG, SafetensorsFolder, open_folder, read_json
from lora_lite.interop.skeleton import Names, skeleton
from lora_lite.layers.linear import is_linear
from lora_lite.merging.fold import Fold, fold_layers
from lora_lite.runtime.base_values import sampled_places
from lora_lite.runtime.coefficient import scale

IN_MEMORY = "merge it in memory instead: ll.load, ll.merge(model, keep=False), model.save_pretrained"


@dataclass(frozen=True)
class MergedFolder:
    """What merging into a folder wrote, and how well it agrees.

    Attributes:
        folder: where.
        rounding: ||stored W' - exact W'|| / ||exact W'|| of each adapted layer, by path: the rounding to its dtype.
        replaced: the other tensors that the adapter's file holds new values of (`train_also`, running averages).
        untied: the names that got a tensor of their own, for one of the layers that shared it was changed.
        left_out: files of the folder that were not copied, being other copies of the unmerged weights.
        agreement: the outputs of base and adapter against those of the merged folder; None where not compared.
        unchecked: why they were not compared, "" where they were.
    """

    folder: str
    rounding: dict[str, float]
    replaced: tuple[str, ...]
    untied: tuple[str, ...]
    left_out: tuple[str, ...]
    agreement: LogitError | None = field(default=None)
    unchecked: str = ""

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest rounding, and that."""
        return max(self.rounding.items(), key=lambda each: each[1])

    @property
    def mean(self) -> float:
        """The mean rounding of a layer."""
        return sum(self.rounding.values()) / len(self.rounding)

    def __str__(self) -> str:
        path, rounding = self.worst
        lines = [
            f"{self.folder}: {len(self.rounding)} layers merged; rounding of a weight (||W' stored - W'|| / ||W'||) "
            f"{self.mean:.2g} on average, at most {rounding:.2g} ({path})"
        ]
        lines += [f"replaced as well: {', '.join(self.replaced)}"] if self.replaced else []
        lines += [f"no longer tied: {', '.join(self.untied)}"] if self.untied else []
        lines += [f"not copied (weights without the adapter): {', '.join(self.left_out)}"] if self.left_out else []
        return "\n".join([*lines, f"not checked: {self.unchecked}" if self.unchecked else str(self.agreement)])


@torch.no_grad()
def merge_folder(
    folder: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    c: float = 1.0,
    check: bool = True,
    trust_remote_code: bool = False,
) -> MergedFolder:
    """Merge an adapter's file into a copy of a model's folder, which transformers loads without this library.

    The files of weights are copied, and each adapted layer is read, folded in fp64 and written back at its place, in
    the dtype that it had. Beside one layer, only the adapter is in memory. Tokenizer, configs and code are copied.

    Args:
        folder: the base: a folder of transformers with safetensors, one file or shards.
        adapter: the file that `ll.save` wrote.
        out: a new or empty folder; it appears when it is whole, also after Ctrl-C.
        c: the coefficient to merge at. `train_also` weights are merged as trained at any.
        check: load both afterwards, if memory allows, and compare their outputs.
        trust_remote_code: run the code that the folder brings along.

    Returns:
        `MergedFolder`, whose text says what was written and how large the measured errors are.

    Raises:
        FileNotFoundError, CheckpointError: no folder or file, or one that is damaged, pickled, or does not fit the
            other; `out` holds files. BaseMismatchError: another base. NotAffineError, TargetError, StateError: layers
            that no plain weights equal, or outputs that differ by more than rounding. Nothing is then written.
    """
    with new_sibling(out) as scratch:
        source = open_folder(folder)
        model = skeleton(source.where, trust_remote_code)
        room = replace(room_for(model), buffers=len(list(model.named_buffers())))
        file = read(expanded(adapter), room)
        merging = _Merging(source, model, file, Names(model, source))
        merging.refuse_another_base()
        left_out = copy_folder(source, scratch)
        done = merging.write(open_folder(scratch), c)
        done = replace(done, folder=str(out), left_out=tuple(left_out))
        if not check:
            return replace(done, unchecked="not asked for")
        agreement, unchecked = compare_folders(type(model), source, file.where, scratch, c)
        return replace(done, agreement=agreement, unchecked=unchecked)


@dataclass(frozen=True)
class _Merging:
    """A merge of a file into a copy of a folder. model: the folder's, on the meta device."""

    source: SafetensorsFolder
    model: nn.Module
    file: File
    names: Names

    def refuse_another_base(self) -> None:
        """Compare the folder with what the file remembers of its base, a layer at a time."""
        modules = dict(self.model.named_modules())
        for path in self.file.targets:
            if path not in modules or not is_linear(modules[path]):
                raise self.file.error(f"the model has no linear layer {path}; the file fits another architecture")
            if set(dict(modules[path].named_parameters())) - {"weight", "bias"} or list(modules[path].buffers()):
                raise self.file.error(f"{path}, a {type(modules[path]).__name__}, holds more than W and b; {IN_MEMORY}")
            self.names.require(f"{path}.weight", modules[path].weight.shape, IN_MEMORY)  # type: ignore[arg-type, union-attr]
        sketches, sampled = self.file.base
        progress = tqdm(self.file.targets, desc="comparing", unit="layer", leave=False, delay=1)
        cosines = {path: cosine(self._alone(path).get_submodule(path), path, sketches[path]) for path in progress}
        refuse_other_layers(self.file.where, cosines, "give the model that it was trained on")
        here = {}
        for key, (_, dims) in sampled.items():
            stored = self.names.find(key)
            if stored is not None and self.source.tensors[stored].shape == dims:
                places = sampled_places(torch.Size(dims).numel()).tolist()
                here[key] = self.source.values_at(stored, places), dims
        refuse_other_values(self.file.where, here, sampled)

    def write(self, out: SafetensorsFolder, c: float) -> MergedFolder:
        """Write what changes into a copy of the folder."""
        added: dict[str, Tensor] = {}
        untied: list[str] = []
        rounding: dict[str, float] = {}
        for path in tqdm(self.file.targets, desc="merging", unit="layer", leave=False, delay=1):
            fold = self._fold(path, c)
            rounding[path] = fold.rounding
            for key, value in ((f"{path}.weight", fold.W), (f"{path}.bias", fold.b)):
                if value is not None:
                    untied += self._untie(key, added)
                    self._put(key, value, out, added)
        values = [(key, f"also.{key}") for key in self.file.also] + [
            (key, f"buffer.{key}") for key in self.file.buffers
        ]
        for key, name in values:
            self._replace(key, self.file.tensors[name], out)
        if added:
            add_tensors(out, added)
        if untied:
            _untie_config(out.where)
        return MergedFolder(
            str(out.where), rounding, tuple(key for key, _ in values), tuple(sorted(untied)), left_out=()
        )

    def _alone(self, path: str) -> nn.Module:
        """A module that holds nothing but the layer, at its path, with the folder's values."""
        layer = copy.deepcopy(self.model.get_submodule(path))
        for key, p in list(layer.named_parameters()):
            stored = self.names.require(f"{path}.{key}", p.shape, IN_MEMORY)
            setattr(layer, key, nn.Parameter(self.source.read(stored), requires_grad=False))
        root = above = nn.Module()
        *parents, last = path.split(".")
        for part in parents:
            above.add_module(part, nn.Module())
            above = above.get_submodule(part)
        above.add_module(last, layer)
        return root.eval()

    def _fold(self, path: str, c: float) -> Fold:
        root = self._alone(path)
        state = add_to_layer(root, self.file, path)
        with scale(root, c):
            fold = fold_layers(root, state, None)[path]
        if fold.b is not None and root.get_submodule(path).bias is None:
            raise CheckpointError(
                f"{path}: the adapter changes its bias, and the architecture has no place for one, so no merged folder "
                "computes it; use the model with the adapter (ll.load), or ll.export_peft"
            )
        return fold

    def _untie(self, key: str, added: dict[str, Tensor]) -> list[str]:
        """Give each module that shares a parameter, which one of them is to change, a tensor; the name of that one."""
        others = [name for name in self.names.tied(key) if name not in self.names.aliases(key)]
        for name in others:
            if self.names.own(name) is None and name.rpartition(".")[0] not in self.file.targets:
                stored = self.names.find(name)
                assert stored is not None  # found as that of `key` before
                added[self.names.new(name)] = self.source.read(stored)
        return [key] if others else []

    def _put(self, key: str, value: Tensor, out: SafetensorsFolder, added: dict[str, Tensor]) -> None:
        """Write a merged value to its place, or have it added, where it shared that of another name."""
        own = self.names.own(key)
        if own is not None:
            out.write(own, value)
        else:
            added[self.names.new(key)] = value

    def _replace(self, key: str, value: Tensor, out: SafetensorsFolder) -> None:
        """Write a value of the file to wherever the folder stores it."""
        if key not in self.names:
            raise self.file.error(f"holds {key}, which the model has not; it fits another architecture")
        stored = [own for name in self.names.tied(key) if (own := self.names.own(name)) is not None]
        for each in stored or [self.names.require(key, value.shape, IN_MEMORY)]:
            dtype = self.source.tensors[each].dtype
            if dtype is not None and not torch.isfinite(value.to(dtype)).all():
                raise self.file.error(f"{key} has values beyond what the folder's {dtype} holds; {IN_MEMORY}")
            out.write(each, value)


def _untie_config(where: Path) -> None:
    """Say in the config that the weights are not tied, so that both are read."""
    config = read_json(where / CONFIG)
    for part in config.values():
        if isinstance(part, dict) and part.get("tie_word_embeddings"):
            part["tie_word_embeddings"] = False
    config["tie_word_embeddings"] = False
    (where / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
