import pytest

import lora_lite as ll
from lora_lite.lab.studies.arms import ArmError, parse_arms, trained


def names(text: str) -> list[str]:
    return [arm.name for arm in parse_arms(text)]


@pytest.mark.parametrize(
    ("text", "arms"),
    [
        ("lora", ["lora"]),
        ("lora, dora", ["lora", "dora"]),
        (
            "lora,antipasto_arrow[block=8,32]",
            ["lora", "antipasto_arrow[block=8]", "antipasto_arrow[block=32]"],
        ),
        ("lora[r=2,4,alpha=8.0]", ["lora[r=2,alpha=8.0]", "lora[r=4,alpha=8.0]"]),
        ("antipasto_rot[rotate_basis=none,V]", ["antipasto_rot[rotate_basis=none]", "antipasto_rot[rotate_basis=V]"]),
        ("antipasto[basis=svd,corda:power=1.0]", ["antipasto[basis=svd]", "antipasto[basis=corda:power=1.0]"]),
        ("lora[target_names=('q_proj','v_proj')]", ["lora[target_names=('q_proj', 'v_proj')]"]),
        ("ia3+ia3_ff", ["ia3+ia3_ff"]),
        ("lora[r=2,4]+ia3_ff", ["lora[r=2]+ia3_ff", "lora[r=4]+ia3_ff"]),
    ],
)
def test_lines_of_arms(text: str, arms: list[str]) -> None:
    assert names(text) == arms


def test_settings_reach_the_configs() -> None:
    arms = parse_arms("lora[r=2,4,alpha=8.0],antipasto[basis=corda:power=1.0]", {"layers": (1,)})
    assert [cfg for arm in arms[:2] for cfg in arm.configs] == [
        ll.LoRAConfig(r=r, alpha=8.0, layers=(1,)) for r in (2, 4)
    ]
    assert str(arms[2].configs[0].basis) == str(ll.AntiPaSTOConfig(basis="corda:power=1.0").basis)
    assert arms[0].with_seed(3)[0].seed == 3


def test_all_is_every_trained_method() -> None:
    assert names("all") == trained() and "sspace" not in trained()


def test_methods_with_targets_of_their_own_keep_them() -> None:
    common = {"target_names": ("q_proj",), "layers": (0,)}
    lora, ia3 = parse_arms("lora,ia3", common)
    assert lora.configs[0].target_names == ("q_proj",)
    assert ia3.configs[0].target_names == ll.IA3Config().target_names and ia3.configs[0].layers == (0,)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no method in"),
        ("lorra", "'lorra' is no method; the methods are antipasto"),
        ("sspace", "is not trained"),
        ("lora,lora", "'lora' comes twice"),
        ("lora[rank=4]", "lora has no setting rank; it has alpha"),
        ("lora[r=0]", "LoRAConfig.r = 0: must be an integer >= 1"),
        ("lora[r=x]", "LoRAConfig.r = 'x'"),
        ("lora[4]", "'4' is not setting=value"),
        ("lora[r=4,r=8]", "r comes twice"),
        ("lora[r=4", "is not a method"),
        ("lora[seed=4]", "has no setting seed"),
    ],
)
@pytest.mark.usefixtures("as_installed")
def test_what_cannot_be_read_says_why(text: str, words: str) -> None:
    with pytest.raises(ArmError) as raised:
        parse_arms(text)
    assert words in str(raised.value)


def test_a_million_arms_are_refused_before_they_are_made() -> None:
    values = ",".join(map(str, range(1, 1001)))
    for line in (
        f"lora[r={values},alpha={values}]",
        "+".join(["lora[r=1,2,3,4,5,6,7,8,9,10]"] * 6),
        f"lora[r={values}],dora",
    ):
        with pytest.raises(ArmError, match="more than 1,000"):
            parse_arms(line)
    with pytest.raises(ArmError, match="letters"):
        parse_arms("lora," * 10**6)
    with pytest.raises(ArmError, match="nested"):
        parse_arms("lora[r=" + "-" * 10_000 + "1]")
