"""What a model cannot take is one sentence before the first step: too many tokens, and tokens of another model."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MptConfig, MptForCausalLM

import lora_lite as ll
from lab_helpers import make_llama, make_tokenizer
from lora_lite.lab.training.data import DataError, Encoded
from lora_lite.lab.training.evaluate import answer_loss_of, generate
from lora_lite.lab.training.limits import POSITIONS, require_positions
from lora_lite.lab.training.loop import TrainingError, train
from lora_lite.lab.training.progress import TrainConfig
from training_runs import CONFIG, make_items


def test_mpts_positions_are_known() -> None:
    model = MptForCausalLM(MptConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=64, vocab_size=258)).eval()
    with pytest.raises(DataError, match="longest prompt with its reply takes 68 tokens, and the model has 64 posi"):
        generate(model, make_tokenizer(), [[1] * 60], 8)
    assert len(generate(model, make_tokenizer(), [[1] * 56], 8)) == 1


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_have_many_names(name: str) -> None:
    model = make_llama()
    model.config.max_position_embeddings = 0  # none
    setattr(model.config, name, 16)
    require_positions(model, 16, "it")
    with pytest.raises(DataError, match="has 16 positions"):
        require_positions(model, 17, "it")


def test_blooms_length_is_no_bound() -> None:
    config = BloomConfig(vocab_size=258, hidden_size=16, n_layer=1, n_head=2)
    config.seq_length = 16
    assert len(generate(BloomForCausalLM(config).eval(), make_tokenizer(), [[1] * 20], 2)) == 1


def test_a_token_that_the_embedding_lacks_is_a_sentence() -> None:
    model, item = make_llama(vocab_size=200), Encoded((1, 2), (201,))
    with pytest.raises(DataError, match="have token 201, and the model's embedding has 200 rows: the tokenizer is of"):
        answer_loss_of(model, [item], 0)
    with pytest.raises(DataError, match="have token 201"):
        generate(model, make_tokenizer(), [[1, 201]], 2)
    ll.attach(model, CONFIG)
    with pytest.raises(DataError, match="have token 201"):
        train(model, [item], 0, TrainConfig(steps=1))


def test_a_base_whose_own_loss_is_not_finite_is_told() -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    ll.attach(model, CONFIG)
    with pytest.raises(TrainingError, match="the base's own loss is nan, without any adapter: its weights are damaged"):
        train(model, make_items(), 0, TrainConfig(steps=1))
