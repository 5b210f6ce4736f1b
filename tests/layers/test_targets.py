"""Which layers a config selects: names, layer indices and exclusions first, then roles by shape."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from helpers import tiny_llama
from lora_lite.layers.targets import candidates, near_misses, role, select, uncovered
from zoo import ARCHITECTURES

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def chosen(model: nn.Module, **fields: Any) -> set[str]:
    """The last names of the targets."""
    return {path.rsplit(".", 1)[-1] for path in select(model, ll.LoRAConfig(**fields))}


def paths(model: nn.Module, **fields: Any) -> list[str]:
    return list(select(model, ll.LoRAConfig(**fields)))


class Block(nn.Module):
    """d -> d layers of many names, one d -> 3d, one 3d -> d and one 3d -> 3d."""

    NAMES = ("q_proj", "o_proj", "out_proj", "c_proj", "fc2", "query", "dense", "gate", "wo", "w1")

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        for name in self.NAMES:
            setattr(self, name, nn.Linear(d, d))
        self.up, self.down, self.mixing = nn.Linear(d, 3 * d), nn.Linear(3 * d, d), nn.Linear(3 * d, 3 * d)


def test_no_filter_takes_every_reader_and_writer() -> None:
    model = tiny_llama()
    assert chosen(model) == {*ATTENTION, *MLP}
    assert len(paths(model)) == 14
    assert paths(model) == [c.path for c in candidates(model) if c.path != "lm_head"]  # in the model's order


def test_names_are_whole_parts_and_regexes_are_searched() -> None:
    model = tiny_llama()
    assert chosen(model, target_names=("q_proj", r"mlp\.down")) == {"q_proj", "down_proj"}
    assert chosen(model, target_names=("self_attn",)) == set(ATTENTION)
    assert paths(model, target_names=(r"layers\.1\.self_attn\.k_proj$",)) == ["model.layers.1.self_attn.k_proj"]


def test_layer_index_is_the_first_integer_of_the_path() -> None:
    model = tiny_llama(num_hidden_layers=3)
    found = paths(model, target_names=("q_proj",), layers=(0, 2))
    assert found == ["model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"]
    nested = nn.ModuleDict({"blocks": nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))])})
    assert paths(nested, target_roles=(), layers=(0,)) == ["blocks.0.0", "blocks.0.1"]


@pytest.mark.parametrize("name", ["layers.1", "layers.1.", "model.layers.1", "1"])
def test_a_plain_name_is_whole_parts(name: str) -> None:
    model = tiny_llama(num_hidden_layers=12)
    assert {path.split(".")[2] for path in paths(model, target_names=(name,))} == {"1"}
    assert {path.split(".")[2] for path in paths(model, target_names=(r"layers\.1",))} == {"1", "10", "11"}
    kept = {path.split(".")[2] for path in paths(model, exclude_names=(name, "lm_head"))}
    assert kept == {str(index) for index in range(12)} - {"1"}


def test_a_name_within_parts_is_answered_with_the_regex() -> None:
    model = ARCHITECTURES["phi3"].make()
    words = r"'v_proj' matches no linear layer; it is no whole part of a path, but lies within qkv_proj \(2 times\)"
    with pytest.raises(ll.TargetError, match=words + r".*regex '\.\*v_proj'"):
        select(model, ll.LoRAConfig(target_names=("v_proj",)))
    assert chosen(model, target_names=(".*v_proj",)) == {"qkv_proj"}
    assert chosen(model, target_names=("qkv_proj",)) == {"qkv_proj"}
    parts = nn.ModuleDict({"a": nn.Linear(2, 2), "norm1": nn.LayerNorm(2)})
    with pytest.raises(ll.TargetError, match=r"train_also: 'norm' matches no parameter; .* lies within norm1"):
        ll.attach(parts, ll.LoRAConfig(target_names=("a",)), train_also=("norm",))
    for bad in ("(", "a{99999999999}", "(" * 3000, "(" * 5000 + ")" * 5000):
        with pytest.raises(ll.TargetError, match=r"train_also: .*regular expression"):
            ll.attach(parts, ll.LoRAConfig(target_names=("a",)), train_also=(bad,))
        with pytest.raises(ValueError, match=r"target_names: .*regular expression"):
            ll.LoRAConfig(target_names=(bad,))


def test_t5_k_and_o_are_the_attentions_layers() -> None:
    assert len(paths(ARCHITECTURES["t5"].make(), target_names=("k", "o"))) == 12


@pytest.mark.parametrize(
    ("arch", "names", "expected"),
    [
        ("llama", ("q_proj", "lm_head"), {"q_proj", "lm_head"}),
        ("llama", (r"(q_proj|lm_head)$",), {"q_proj", "lm_head"}),
        ("deepseek_v3", ("q_b_proj", "kv_b_proj"), {"q_b_proj", "kv_b_proj"}),
        ("mamba", ("x_proj",), {"x_proj"}),
        ("llava", ("vision_tower",), {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    ],
)
def test_what_is_named_is_adapted_whatever_the_defaults(arch: str, names: tuple[str, ...], expected: set[str]) -> None:
    model = ARCHITECTURES[arch].make()
    assert chosen(model, target_names=names) == expected
    with pytest.raises(ll.TargetError):  # roles that are given act on names as well, and a name never ends empty
        select(model, ll.LoRAConfig(target_names=names, target_roles=("inner",), d_model=5, exclude_names=(r"\w",)))


def test_a_name_that_ends_empty_beside_another_is_an_error() -> None:
    model = ARCHITECTURES["mamba"].make()
    with pytest.raises(ll.TargetError, match=r"target_names has 'x_proj', but .* leave out every layer of that name"):
        select(model, ll.LoRAConfig(target_names=("in_proj", "x_proj"), target_roles=("reader", "writer")))


@pytest.mark.parametrize(("vision", "text"), [(24, 32), (32, 24), (64, 32)])
def test_d_model_is_each_towers_own(vision: int, text: int) -> None:
    arch = ARCHITECTURES["clip"]
    settings = {
        key: {**arch.settings[f"{key}_config"], "hidden_size": width}
        for key, width in (("vision", vision), ("text", text))
    }
    model = replace(arch, settings={f"{key}_config": value for key, value in settings.items()} | {"projection_dim": 8})
    assert len(paths(model.make())) == 26


def test_d_model_is_each_stages_own() -> None:
    settings = {**ARCHITECTURES["swin"].settings, "depths": [1, 1, 1], "num_heads": [2, 2, 2]}
    model = replace(ARCHITECTURES["swin"], settings=settings).make()  # widths 16, 32 and 64 = 4 x 16
    found = paths(model)
    assert found == [c.path for c in candidates(model)] and len(found) == 3 * 6 + 2 + 1
    readers = paths(model, target_roles=("reader",))
    assert "swin.encoder.layers.0.blocks.0.mlp.fc1" in readers
    assert "swin.encoder.layers.0.blocks.0.mlp.fc2" not in readers


def test_a_model_within_a_sequential_knows_its_width_and_layers() -> None:
    model = nn.Sequential(bert(), nn.Linear(32, 2))
    assert "1" in paths(model)
    first = paths(model, layers=(0,))
    assert len(first) == 6 and all(path.startswith("0.bert.encoder.layer.0.") for path in first)
    assert paths(model, layers=(1,)) == [path.replace("layer.0", "layer.1") for path in first]


def test_layer_index_without_and_with_repeated_blocks() -> None:
    block = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())  # noqa: E731
    stack = nn.Sequential(block(), block())
    assert paths(stack, target_roles=(), layers=(1,)) == ["1.0"]
    assert paths(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), target_roles=(), layers=(1,)) == ["1"]
    towers = nn.ModuleDict({"0": stack, "7": nn.ModuleList([block()])})
    assert paths(towers, target_roles=(), layers=(0,)) == ["0.0.0", "7.0.0"]


def test_what_was_left_out_and_matched_is_said() -> None:
    model = ARCHITECTURES["mamba"].make()
    words = r"4 linear layers left out by default, for instance backbone\.layers\.0\.mixer\.x_proj \(64 -> 10\)"
    with pytest.warns(ll.LoraLiteWarning, match=words):
        att = ll.attach(model, ll.LoRAConfig())
    assert len(att.left_out) == 4 and "4 linear layers left out, for instance backbone.layers.0" in att.summary()
    ll.detach(model)
    assert not ll.attach(model, ll.LoRAConfig(target_roles=("reader", "writer"))).left_out  # asked for
    ll.detach(model)
    att = ll.attach(model, ll.LoRAConfig(target_names=("in_proj", r"mixer\.x")))
    assert att.matched == {"in_proj": 2, r"mixer\.x": 2} and "'in_proj' 2 layers" in att.summary()
    llama = tiny_llama()
    with pytest.warns(ll.LoraLiteWarning, match="1 linear layers left out by default, for instance lm_head"):
        ll.attach(llama, ll.LoRAConfig(target_names=(".*",)))


def test_exclusion_wins_over_names() -> None:
    model = tiny_llama()
    assert chosen(model, target_names=("proj$",), exclude_names=("mlp", "lm_head")) == set(ATTENTION)
    with pytest.raises(ll.TargetError, match=r"exclude_names = .*'q_proj'.* leaves out every match \(.*q_proj"):
        select(model, ll.LoRAConfig(target_names=("q_proj",), exclude_names=("q_proj",)))


def test_an_exclusion_may_name_a_part_without_linear_layers_inside() -> None:
    assert "k_proj" in chosen(tiny_llama(), exclude_names=("input_layernorm",))
    with pytest.raises(ll.TargetError, match="exclude_names: 'vision_tower' matches no"):
        select(tiny_llama(), ll.LoRAConfig(exclude_names=("vision_tower",)))


def test_roles_by_shape_and_square_ties_by_name() -> None:
    block = Block()
    roles = {c.path: role(c, 8) for c in candidates(block)}
    writers = {"o_proj", "out_proj", "c_proj", "fc2", "wo", "down"}
    assert {path for path, found in roles.items() if found == "writer"} == writers
    assert roles["mixing"] == "inner"
    assert {path for path, found in roles.items() if found == "reader"} == {*roles} - writers - {"mixing"}
    for one in ("reader", "writer", "inner"):
        picked = paths(block, target_roles=(one,), d_model=8)
        assert picked == [path for path, found in roles.items() if found == one]


def test_names_do_not_decide_where_shapes_do() -> None:
    block = nn.ModuleDict({"o_proj": nn.Linear(8, 24), "q_proj": nn.Linear(24, 8)})
    assert paths(block, target_roles=("writer",), d_model=8) == ["q_proj"]
    assert paths(block, target_roles=("reader",), d_model=8) == ["o_proj"]


@pytest.mark.parametrize(
    "name", ["attention.dense", "attn.proj", "layer.0.attention.output.dense", "self_attn.to_out.0"]
)
def test_usual_names_of_square_writers(name: str) -> None:
    model = nn.Module()
    *parents, last = name.split(".")
    at = model
    for part in parents:
        at.add_module(part, nn.Module())
        at = at.get_submodule(part)
    at.add_module(last, nn.Linear(8, 8))
    assert paths(model, target_roles=("writer",), d_model=8) == [name]


def test_d_model_comes_from_the_config_or_is_given() -> None:
    model = tiny_llama()
    assert chosen(model, target_roles=("writer",)) == {"o_proj", "down_proj"}
    # Told that the stream is as wide as the MLP, the roles change: what writes there is gate and up.
    assert chosen(model, target_roles=("writer",), d_model=64) == {"gate_proj", "up_proj"}


def test_d_model_unknown() -> None:
    with pytest.raises(ll.TargetError, match=r"Block\.config does not say d_model .*hidden_size.*LoRAConfig\(d_model="):
        select(Block(), ll.LoRAConfig())
    assert len(paths(Block(), target_roles=())) == len(Block.NAMES) + 3


def test_a_typo_is_answered_with_near_misses() -> None:
    with pytest.raises(
        ll.TargetError, match=r"LoRAConfig\.target_names: 'q_prj' matches no linear layer; near misses: q_proj"
    ):
        select(tiny_llama(), ll.LoRAConfig(target_names=("q_prj",)))
    # One that matches does not excuse one that does not.
    with pytest.raises(ll.TargetError, match=r"'dwon_proj' matches no .* near misses: down_proj"):
        select(tiny_llama(), ll.LoRAConfig(target_names=("q_proj", "dwon_proj")))


def test_a_name_like_no_other_is_answered_with_the_names_there_are() -> None:
    with pytest.raises(ll.TargetError, match=r"'zzz' matches no linear layer; the names here are .*down_proj.*v_proj"):
        select(tiny_llama(), ll.LoRAConfig(target_names=("zzz",)))
    assert near_misses("zzz", ["a.0", "a.1"]) == "the names here are a.0, a.1"  # bare numbers say nothing


def test_layers_out_of_range() -> None:
    with pytest.raises(ll.TargetError, match=r"LoRAConfig\.layers: no layer \[7\]; the indices are 0 to 1"):
        select(tiny_llama(), ll.LoRAConfig(layers=(0, 7)))
    with pytest.raises(ll.TargetError, match=r"no layer \[0\]; the indices are none: no path has an integer"):
        select(Block(), ll.LoRAConfig(layers=(0,), d_model=8))


def test_nothing_left_says_why() -> None:
    with pytest.raises(ll.TargetError, match=r"no target has a role in \('inner',\) \(.*q_proj: reader.*add the role"):
        select(tiny_llama(), ll.LoRAConfig(target_roles=("inner",)))
    model = nn.ModuleDict(
        {"a": nn.ModuleList([nn.Linear(4, 4)]), "b": nn.ModuleList([nn.Embedding(2, 2), nn.Linear(4, 4)])}
    )
    with pytest.raises(ll.TargetError, match="target_names and layers leave nothing of 2 linear layers"):
        select(model, ll.LoRAConfig(target_names=("^a",), layers=(1,), target_roles=()))
    with pytest.raises(ll.TargetError, match="LayerNorm has no linear layer"):
        select(nn.LayerNorm(3), ll.LoRAConfig())


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("field", ["target_names", "target_roles", "exclude_names"])
def test_a_string_is_no_tuple_of_strings(field: str) -> None:
    with pytest.raises(ValueError, match=rf"LoRAConfig\.{field} = 'writer': must be a tuple of strings"):
        ll.LoRAConfig(**{field: "writer"})


def bert(**changes: Any) -> nn.Module:
    arch = ARCHITECTURES["bert"]
    return replace(arch, settings={**arch.settings, **changes}).make()


class EmbedOut(nn.Module):
    """A model that calls its head `embed_out`, and tells of it in the way of transformers."""

    def __init__(self, tie_word_embeddings: bool) -> None:
        super().__init__()
        self.embed_in, self.mlp, self.embed_out = nn.Embedding(61, 32), nn.Linear(32, 64), nn.Linear(32, 61, bias=False)
        if tie_word_embeddings:
            self.embed_out.weight = self.embed_in.weight
        self.config = SimpleNamespace(hidden_size=32)

    def get_output_embeddings(self) -> nn.Module:
        return self.embed_out


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_never_adapted_unasked(tied: bool) -> None:
    heads = {"lm_head": tiny_llama, "cls.predictions.decoder": bert, "embed_out": EmbedOut}
    for head, make in heads.items():
        model = make(tie_word_embeddings=tied)
        for fields in ({}, {"target_roles": ()}, {"target_names": (".",), "target_roles": ()}):
            assert head not in paths(model, **fields)
        with pytest.raises(ll.TargetError, match=f"exclude_names = .* leaves out every match .{head}"):
            select(model, ll.LoRAConfig(target_names=(head,), exclude_names=("lm_head",)))
        assert paths(model, target_names=(head,)) == [head]  # a name that is given goes before the default
        assert head in paths(model, exclude_names=(), target_roles=())
        assert paths(model, target_names=(head,), exclude_names=()) == [head]


def test_the_head_of_a_model_within_another_is_not_adapted_either() -> None:
    wrapped = nn.ModuleDict({"policy": EmbedOut(False), "value": nn.Linear(32, 1)})
    assert paths(wrapped, target_roles=()) == ["policy.mlp", "value"]
    assert "policy.embed_out" in paths(wrapped, target_roles=(), exclude_names=())


def test_conv1d_of_gpt2() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=61, n_positions=16)).eval()
    # Its weights are stored the other way round: c_fc is (32, 128), and the MLP's c_proj, which writes, (128, 32).
    assert paths(model, target_roles=("writer",)) == ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj"]
    assert paths(model, target_roles=("reader",)) == ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"]
    shapes = {
        path: tuple(a.A.shape) + tuple(a.B.shape) for path, a in ll.attach(model, ll.LoRAConfig(r=3)).targets.items()
    }
    assert shapes["transformer.h.0.mlp.c_fc"] == (3, 32, 128, 3)
    assert shapes["transformer.h.0.mlp.c_proj"] == (3, 128, 32, 3)


class Experts(nn.Module):
    """A fused mixture of experts beside a plain layer, a convolution and a reparametrised layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(4, 8, 16))
        self.scale = nn.Parameter(torch.zeros(1, 1, 8))
        self.conv = nn.Conv1d(8, 8, 3)
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3))
        self.plain = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) + torch.einsum("bi,eio->bo", x, self.gate_up)[:, :8]


def test_fused_experts_are_named_as_out_of_reach() -> None:
    model = nn.Sequential(Experts())
    assert uncovered(model) == {"0.gate_up": 4 * 8 * 16}
    with pytest.warns(ll.LoraLiteWarning, match=r"fused 3-D weights stay without an adapter, .*0\.gate_up$"):
        att = ll.attach(model, ll.LoRAConfig(target_roles=()))
    assert att.uncovered == {"0.gate_up": 512}
    share = 100 * 512 / att.base_size
    assert f"out of reach of hooks: {share:.3g}% of the base (0.gate_up" in att.summary()


class Router(nn.Linear):
    """Returns a tuple, as some mixtures' routers do, although it is an `nn.Linear`."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return torch.topk(super().forward(x), 2)


def test_a_router_that_returns_a_tuple_is_no_target() -> None:
    model = nn.ModuleDict({"router": Router(8, 4), "plain": nn.Linear(8, 4)})
    assert paths(model, target_roles=()) == ["plain"]


def test_overlapping_configs_are_refused() -> None:
    model = tiny_llama()
    with pytest.raises(
        ll.TargetError, match=r"layers\.0\.self_attn\.v_proj is selected by configs 0 and 1; make them disj"
    ):
        ll.attach(model, [ll.LoRAConfig(target_names=("q_proj", "v_proj")), ll.IA3Config(target_names=("v_proj",))])
    with pytest.raises(ValueError, match="at least one config"):
        ll.attach(model, [])


def test_every_method_finds_its_own_default_targets() -> None:
    model = tiny_llama()
    expected = {"ia3": {"k_proj", "v_proj"}, "ia3_ff": {"down_proj"}, "sspace": {"o_proj", "down_proj"}}
    for name, cls in ll.methods().items():
        cfg = cls.tiny()
        found = {path.rsplit(".", 1)[-1] for path in select(model, cfg)}
        assert found == expected.get(name, {*ATTENTION, *MLP})
