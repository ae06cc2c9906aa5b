"""Parts of models, held to the module trees of all families."""

import pytest
from torch import nn

from vlmdpo.models import families
from vlmdpo.tiny import random_models

CONNECTORS = {
    "idefics2": {"connector"},
    "idefics3": {"connector"},
    "smolvlm": {"connector"},
    "llava_next": {"multi_modal_projector", "image_newline"},
    "llava_onevision": {"multi_modal_projector", "image_newline"},
    "gemma3n": {"embed_vision", "embed_audio"},
    "gemma4": {"embed_vision", "embed_audio"},
    "gemma4_moe": {"embed_vision"},
    "qwen2_vl": {"visual.merger"},
    "qwen2_5_vl": {"visual.merger"},
    "qwen3_vl": {"visual.merger", "visual.deepstack_merger_list"},
    "qwen3_vl_moe": {"visual.merger", "visual.deepstack_merger_list"},
    "qwen3_5": {"visual.merger"},
    "qwen3_5_moe": {"visual.merger"},
    "glm4v": {"visual.merger"},
    "glm46v": {"visual.merger"},
    "ovis2": {"visual_embeddings_table"},
    "deepseek_vl": {"aligner"},
    "minicpm_v": {"merger"},  # vit_merger lies between layers of the tower
    "kimi_k25": {"mm_projector"},
}
# All others call it so.
PROJECTOR = {"multi_modal_projector"}


@pytest.mark.parametrize("family", sorted(set(random_models.available()) - {"llama4"}))
def test_parts_are_those_of_the_module_tree(family):
    model, _ = random_models.make(family)
    backbone = model.model
    expected = dict.fromkeys(families.PARTS, 0)
    counted = set()

    def count(part, parameters):
        for parameter in parameters:
            if id(parameter) not in counted:
                counted.add(id(parameter))
                expected[part] += parameter.numel()

    count("head", model.get_output_embeddings().parameters())
    count("head", backbone.get_input_embeddings().parameters())
    count("language", backbone.get_decoder().parameters())
    connectors = CONNECTORS.get(family, PROJECTOR)
    for name in connectors:
        found = backbone
        for step in name.split("."):
            found = getattr(found, step)
        count("connector", [found] if isinstance(found, nn.Parameter) else found.parameters())
    count("vision", model.parameters())  # what is left
    found = dict.fromkeys(families.PARTS, 0)
    for part, _, parameter in families.parameters_by_part(model):
        found[part] += parameter.numel()
    assert found == expected
    assert all(found.values())
    assert sum(found.values()) == sum(p.numel() for p in model.parameters())
    # LoRA's scope: the language model's linear layers, and those of the connectors.
    language = families.linear_layers(model, "language")
    assert language
    assert all(isinstance(backbone.get_submodule(n.partition(".")[2]), nn.Linear) for n in language)
    more = set(families.linear_layers(model, "connector")) - set(language)
    assert {name.partition(".")[2] for name in more} == {
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(tuple(connectors))
    }
