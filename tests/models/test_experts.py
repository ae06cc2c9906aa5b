"""Adapters leave routers alone, and say what they cannot do with experts' weights."""

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import nn
from transformers.models.llama4.modeling_llama4 import Llama4Router

from vlmdpo.config import TrainConfig
from vlmdpo.errors import ConfigError
from vlmdpo.memory.architecture import count_adapter_parameters
from vlmdpo.models.experts import expert_parameters, router_layers
from vlmdpo.models.families import linear_layers
from vlmdpo.tiny import random_models
from vlmdpo.training.arguments import lora_config, say_what_lora_leaves


def routed():
    """A tiny LLaVA with Llama 4's router, which returns a tuple, and a gate of four experts."""
    model, _ = random_models.make("llava")
    text = model.config.get_text_config()
    text.num_local_experts, text.num_experts_per_tok = 4, 2
    layer = model.model.language_model.layers[0]
    layer.mlp.router = Llama4Router(text)
    layer.mlp.gate = nn.Linear(32, 4)
    return model


def adapted(model, **options):
    made = get_peft_model(model, lora_config(TrainConfig(**options), model))
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
        for name, _ in made.named_parameters()
        if "lora_A" in name
    }


def test_all_linear_leaves_routers_alone():
    model = routed()
    mlp = "model.language_model.layers.0.mlp"
    assert router_layers(model) == [f"{mlp}.router", f"{mlp}.gate"]
    layers = adapted(routed())
    assert f"{mlp}.up_proj" in layers
    assert not layers & {f"{mlp}.router", f"{mlp}.gate", "lm_head"}
    assert layers == set(linear_layers(model, "all"))
    plain, _ = random_models.make("llava")
    assert adapted(plain) == layers


def test_a_router_that_returns_a_tuple_is_left_alone_even_by_name():
    assert adapted(routed(), lora_target_modules="router,gate,q_proj") == {
        "model.language_model.layers.0.mlp.gate",
        *(f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)),
        *(f"model.vision_tower.encoder.layers.{i}.self_attn.q_proj" for i in (0, 1)),
    }


def test_counts_of_estimates_are_those_of_the_adapter():
    model = routed()
    made = get_peft_model(routed(), lora_config(TrainConfig(lora_r=4), model))
    trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert count_adapter_parameters(model, 4, "all") == trained


@pytest.fixture
def experts():
    return random_models.make("qwen3_vl_moe")[0]


def test_experts_are_said_and_adapted_by_name(experts, capfd):
    names = list(expert_parameters(experts))
    assert names[0].endswith("mlp.experts.gate_up_proj")
    config = lora_config(TrainConfig(), experts)
    say_what_lora_leaves(config, experts)
    assert "experts.down_proj,experts.gate_up_proj" in "".join(capfd.readouterr().err.split())
    assert not config.target_parameters
    options = {"lora_target_modules": "experts.down_proj,q_proj", "lora_dropout": 0.0}
    layers = adapted(experts, **options)
    assert {name.rsplit(".", 1)[-1] for name in layers} == {"q_proj", "experts"}


@pytest.mark.parametrize(
    ("more", "words"), [({}, "--lora-dropout: PEFT cannot"), ({"use_dora": True}, "--use-dora: ")]
)
def test_what_peft_cannot_do_with_experts(experts, more, words):
    more = {"lora_dropout": 0.0, **more} if more else more
    with pytest.raises(ConfigError, match=words):
        lora_config(TrainConfig(lora_target_modules="experts.down_proj", **more), experts)


def test_a_quantized_layer_counts_as_a_linear_one():
    class Quantized(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden.to(torch.float32))

    model, _ = random_models.make("llava")
    model.model.language_model.layers[0].mlp.up_proj = Quantized(32, 64)
    assert router_layers(model) == []
    assert isinstance(model, tf.LlavaForConditionalGeneration)
