"""Studies made up for the tests of pages and pictures: whole, partial, nasty. Seeded; no number means anything."""

import dataclasses
import random

from lora_lite.lab.findings.findings import (
    BASE,
    Change,
    Cost,
    Failure,
    Finding,
    Findings,
    Item,
    Machine,
    Missing,
    Reply,
    Setup,
)
from lora_lite.lab.numerals import Interval

BASE_MACS = 134_000_000
# arm -> accuracy, trained values, stored bytes, added MACs, time of a step
ARMS = {
    "lora": (0.655, 4_884_480, 19_700_000, 4_884_480, 1.12),
    "dora": (0.661, 5_003_000, 20_100_000, 4_990_000, 1.31),
    "pissa": (0.647, 9_768_960, 78_200_000, 19_537_920, 1.19),
    "delora": (0.602, 4_886_000, 19_900_000, 4_884_480, 1.22),
    "hra": (0.588, 2_304_000, 9_300_000, 4_610_000, 1.36),
    "eva": (0.667, 4_884_480, 19_700_000, 4_884_480, 1.12),
    "ia3": (0.214, 23_040, 97_000, 23_040, 1.01),
    "ia3_ff": (0.188, 46_080, 189_000, 46_080, 1.02),
    "road": (0.541, 230_400, 930_000, 345_600, 1.09),
    "lora_xs": (0.476, 53_760, 10_900_000, 8_010_000, 1.14),
    "antipasto": (0.609, 49_920, 156_900_000, 78_000_000, 1.42),
    "antipasto_rot": (0.611, 149_760, 157_300_000, 78_400_000, 1.77),
    "antipasto_ablate": (0.304, 50_130, 156_900_000, 78_100_000, 1.44),
    "antipasto_corda": (0.597, 49_920, 156_900_000, 78_000_000, 1.43),
    "antipasto_asvd": (0.613, 49_920, 156_900_000, 78_000_000, 1.42),
    "antipasto_dplr": (0.649, 910_000, 160_300_000, 78_900_000, 1.58),
    "antipasto_arrow": (0.628, 61_440, 157_000_000, 78_100_000, 1.47),
}


SETUP = Setup(
    examples=192, too_long=0, empty=0, validation_examples=64, rates=3, rate_ratio=4.0, rate_factor=5.0, warmup=0.1,
    final_rate=0.05, clip=1.0, seeds=3, longest_example=512, longest_reply=19, layers=None,
    targets=("reader", "writer"), own_targets=("ia3",), workload=None, fingerprints={"test": "0123456789abcdef"},
)  # fmt: skip


def interval(draw: random.Random, mean: float, half: float) -> Interval:
    return Interval(mean, mean - half * draw.uniform(0.9, 1.1), mean + half * draw.uniform(0.9, 1.1))


def cost(draw: random.Random, facts: tuple, data: bool) -> Cost:
    _, trainable, stored, macs, step = facts
    attach = {
        "calibration": draw.uniform(6, 9) if data else 0.0,
        "factorisation": 0.4,
        "build": draw.uniform(0.02, 0.1),
    }
    attach["factorisation"] = draw.uniform(9, 14) if stored > 1e8 else 0.0
    return Cost(
        trainable=trainable, stored_bytes=stored, macs_token=macs, macs_step=trainable // 3, base_macs_token=BASE_MACS,
        forward=interval(draw, 0.98 * step, 0.03), step=interval(draw, step, 0.05),
        tokens_per_second=draw.uniform(60, 90) / step, peak_memory_mb=2729 + trainable / 4e4 + draw.uniform(0, 40),
        base_peak_memory_mb=2650.0, attach_seconds=attach, load_seconds=draw.uniform(0.1, 0.6),
    )  # fmt: skip


def finding(arm: str, facts: tuple, seeds: int = 3, steps: int = 120) -> Finding:
    draw = random.Random(arm)
    mean, method = facts[0], arm.partition("[")[0]
    against = interval(draw, mean - ARMS["lora"][0], 0.032)
    verdict = "baseline" if arm == "lora" else "tie"
    if arm != "lora" and against.excludes(0):
        verdict = "better" if against.mean > 0 else "worse"
    middle = 2e-4 if facts[1] > 1e6 else 5e-3
    start = draw.uniform(2.2, 2.5)
    end = 1.4 - mean
    rates = {middle / 3: end + draw.uniform(0.05, 0.3), middle: end + 0.02, middle * 3: end + draw.uniform(-0.05, 0.3)}
    if arm == "hra":
        rates[middle * 3] = None
    rate = min((key for key, value in rates.items() if value is not None), key=lambda key: rates[key] or 9)
    edge = "highest" if rate == max(rates) else "lowest" if rate == min(rates) else ""
    curves = {
        seed: [end + (start - end) * 0.97**step + draw.gauss(0, 0.06) for step in range(steps)] for seed in range(seeds)
    }
    return Finding(
        arm=arm, method=method, title=f"The paper of {method}", arxiv="2106.09685", seeds=tuple(range(seeds)),
        wanted_seeds=3, rates=rates, rate=rate, edge=edge, accuracy=interval(draw, mean, 0.035),
        by_seed={seed: mean + draw.uniform(-0.02, 0.02) for seed in range(seeds)},
        against=Interval(0, 0, 0) if arm == "lora" else against, verdict=verdict,
        alone=None if arm == "lora" else against,
        seen=0.123 if verdict == "tie" else None,
        p=None if arm == "lora" else 0.01 if verdict != "tie" else 0.4, places=(1, 17), mentioned=mean + 0.05,
        cut_off=0.01, validation_loss=interval(draw, rates[rate] or 0, 0.02), curves=curves,
        forgetting={
            "general text": Change(3.412, interval(draw, 3.412 + draw.uniform(-0.01, 0.2), 0.02)),
            "gcd": Change(1.204, interval(draw, 1.204 + draw.uniform(-0.1, 0.1), 0.05)),
        },
        cost=cost(draw, facts, method in ("eva", "antipasto_corda", "antipasto_asvd")),
        failures=(Failure(arm, "rate", "LoraLiteError: not finite at step 41", 6e-4),) if arm == "hra" else (),
    )  # fmt: skip


def placed(arms: list[Finding]) -> tuple[Finding, ...]:
    """With the places that the intervals allow, in the order that `Findings` asks for."""
    known = [arm for arm in arms if arm.accuracy]
    ranked = []
    for arm in arms:
        places = None
        if arm.accuracy:
            above = sum(other.accuracy.low > arm.accuracy.high for other in known if other.accuracy)
            below = sum(other.accuracy.high < arm.accuracy.low for other in known if other.accuracy)
            places = (above + 1, len(known) - below)
        ranked.append(dataclasses.replace(arm, places=places))
    return tuple(sorted(ranked, key=lambda arm: (arm.places or (99, 99), arm.arm)))


def items(arms: list[str], count: int = 4) -> tuple[Item, ...]:
    draw = random.Random(0)
    words = ["north", "apple", "seven", "quiet", "river", "stone", "paper", "cloud"]
    found = []
    for _ in range(count):
        asked = draw.sample(words, 4)
        right, wrong = ", ".join(reversed(asked)), ", ".join(asked)
        replies = tuple(Reply(arm, *((right, 1.0) if draw.random() < 0.6 else (wrong, 0.2))) for arm in arms)
        prompt = f"Reverse this list of words: {', '.join(asked)}\nAnswer with the words alone.\nAnswer:"
        found.append(Item(prompt, right, replies))
    return tuple(found)


def whole(names: dict[str, tuple] | None = None) -> Findings:
    """Everything measured, for all arms of ARMS or those given."""
    names = ARMS if names is None else names
    arms = placed([finding(arm, facts) for arm, facts in names.items()])
    bare = dataclasses.replace(
        finding("lora", ARMS["lora"]), arm=BASE, method=BASE, title="the frozen base", arxiv="", seeds=(), rates={},
        wanted_seeds=0, rate=None, edge="", accuracy=Interval(0.02, 0.004, 0.047), by_seed={}, against=None, verdict="",
        p=None, places=None, mentioned=0.031, cut_off=0.44, validation_loss=Interval(2.31, 2.31, 2.31), curves={},
        forgetting={"general text": Change(3.412, Interval(3.412, 3.412, 3.412))}, cost=None, failures=(),
    )  # fmt: skip
    return Findings(
        name="catalogue", about="Which method learns to reverse lists of words best, at an equal budget?",
        task=r"word_sequence_reversal:drop=^.*after the comma\.\s*,min_words=3,max_words=5", model="smollm2",
        quantization="none", dtype="float32", baseline="lora", items=150, steps=120, batch_size=8,
        setup=SETUP,
        base=bare, arms=arms, examples=items(["base", *names]),
        task_notes=("One task and one small model: another may order the methods otherwise.",),
        machines=(Machine(9, "AMD EPYC, 2 cores (2 threads)", "Linux x86_64", {"torch": "2.13.0"}, "81f7d12", False),),
        command="lora-lite study catalogue --out results/catalogue",
    )  # fmt: skip


def partial() -> Findings:
    """Begun only: one arm measured, one being tuned, one untouched; no cost anywhere."""
    study = whole({"lora": ARMS["lora"], "dora": ARMS["dora"], "ia3": ARMS["ia3"]})
    nothing = {
        "seeds": (), "accuracy": None, "by_seed": {}, "against": None, "verdict": "", "p": None, "places": None,
        "mentioned": None, "cut_off": None, "validation_loss": None, "curves": {}, "forgetting": {},
        "rate": None, "edge": "",
    }  # fmt: skip
    arms = []
    for arm in study.arms:
        if arm.arm == "dora":
            arm = dataclasses.replace(
                arm, **nothing, rates={1e-4: 1.3}, missing=Missing("dora", (2e-4, 4e-4), seeds=(1, 2, 3))
            )
        elif arm.arm == "ia3":
            arm = dataclasses.replace(arm, **nothing, rates={}, missing=Missing("ia3", (1e-4, 2e-4, 4e-4)))
        arms.append(dataclasses.replace(arm, cost=None))
    return dataclasses.replace(study, arms=tuple(arms), base=None, examples=())


def nothing() -> Findings:
    """Declared, and nothing measured yet."""
    study = partial()
    arms = []
    for arm in study.arms:
        arm = dataclasses.replace(
            arm, accuracy=None, against=None, verdict="", p=None, places=None, rates={}, rate=None, edge=""
        )
        arms.append(dataclasses.replace(arm, seeds=(), by_seed={}, validation_loss=None, curves={}, forgetting={}))
    return dataclasses.replace(study, arms=tuple(arms))


def nasty() -> Findings:
    """Markup, quotes and dollars wherever text comes from outside; numbers that are none."""
    attack = "</script><script>window.attacked = true</script><img src=x onerror='window.attacked = true'>\"&amp; $x^2$"
    study = whole({"lora": ARMS["lora"], "ia3": ARMS["ia3"], "road": ARMS["road"]})
    replies = (Reply("lora", attack, 1.0), Reply("ia3", "", 0.0), Reply("road", "word " * 3000, 0.0))
    arms = list(study.arms)
    strange = Interval(float("nan"), float("nan"), float("inf"))
    name = "ia3[target_names=('<b>$k$</b>',)]"
    for index, arm in enumerate(arms):
        if arm.arm == "ia3":
            rates = dict.fromkeys(arm.rates, float("inf")) | {1e-3: 1.0}
            arms[index] = dataclasses.replace(arm, arm=name, title=attack, validation_loss=strange, rates=rates)
        if arm.arm == "road":
            curves = {0: [float("nan")] * 30, 1: [1.0, float("inf"), 0.5]}
            failures = (Failure("road", "seed", attack, 1),)
            arms[index] = dataclasses.replace(arm, arxiv="javascript:alert(1)", curves=curves, failures=failures)
    return dataclasses.replace(
        study, name=attack, about=attack, setup=dataclasses.replace(SETUP, targets=(attack,)), task_notes=(attack,),
        machines=(Machine(1, attack, attack, {attack: attack}, "", True),), command=attack, task=attack,
        arms=tuple(arms), examples=(Item(attack, attack, replies),), cost_devices=(attack, "another"),
        base_failure=Failure(BASE, "base", attack),
    )  # fmt: skip


def many() -> Findings:
    """25 arms, several of them settings of one method."""
    names = {f"antipasto_arrow[block={block}]": facts for block, facts in enumerate(list(ARMS.values())[:8])}
    return whole(ARMS | names)


def thin() -> Findings:
    """One arm with one seed and no verdict, a tie far from zero, an interval of a loss below zero, rates at edges."""
    study = whole({arm: ARMS[arm] for arm in ("lora", "dora", "hra", "road")})
    common = {"wanted_seeds": 3, "places": (1, 4), "failures": ()}
    changes = {
        "lora": {"edge": "highest"},
        "dora": {
            "verdict": "tie",
            "p": 0.2324,
            "against": Interval(-0.427, -0.888, 0.067),
            "edge": "lowest",
            "seen": 0.5,
        },
        "hra": {"seeds": (1,), "by_seed": {1: 0.6}, "verdict": "", "p": None, "edge": "", "alone": None, "seen": None},
        "road": {"verdict": "worse", "p": 2.4e-10, "against": Interval(-0.114, -0.15, -0.08), "edge": ""},
    }
    arms = [dataclasses.replace(arm, **common, **changes[arm.arm]) for arm in study.arms]
    arms = [
        dataclasses.replace(arm, validation_loss=Interval(2.661, -4.862, 10.184)) if arm.arm == "dora" else arm
        for arm in arms
    ]
    setup = dataclasses.replace(SETUP, workload=(4, 64, 7))
    return dataclasses.replace(study, arms=tuple(arms), setup=setup, task_notes=("A note of the task.",))


def unlearnt() -> Findings:
    """Trained, and no arm above the base."""
    study = whole({arm: ARMS[arm] for arm in ("lora", "ia3", "antipasto")})
    low = Interval(0.03, 0.01, 0.08)
    arms = [dataclasses.replace(arm, accuracy=low, verdict=arm.verdict and "tie") for arm in study.arms]
    arms = [dataclasses.replace(arm, verdict="baseline") if arm.arm == "lora" else arm for arm in arms]
    return dataclasses.replace(study, arms=tuple(arms))
