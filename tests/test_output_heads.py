"""Output heads of all families: what the table says of the logits is what the stock model does."""

from __future__ import annotations

import re

import pytest
import torch

from minitron_hf.distillation.parallel import LossRequest, distilling_forward, forward_of_backbone
from minitron_hf.families import spec_for
from minitron_hf.losses.fused import next_token_positions
from minitron_hf.losses.heads import check_output_head, output_head
from minitron_hf.losses.signals import DenseSignal
from pocket import POCKETS, pocket_config, pocket_model, pocket_tokens

#: Fields that may change the logits: scales, and caps, which are None where there is none.
ABOUT_LOGITS = re.compile(r"logit|lm_head")


def unusual(name: str) -> dict[str, float]:
    """Values that no default hides behind, for every field of a pocket's config that may change the logits."""
    fields = pocket_config(name).to_dict()
    return {
        field: 0.7 if "cap" not in field else 1.5
        for field, value in fields.items()
        if ABOUT_LOGITS.search(field) and not isinstance(value, bool | list | dict | str) and "num_" not in field
    }


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", POCKETS)
def test_every_family_passes_the_trainers_check_of_the_head(name: str):
    """A family that scaled or bounded its logits without its table's saying so would prune, and not be distilled."""
    model = pocket_model(name, dtype=torch.float32, **unusual(name))
    with torch.no_grad():  # large logits, so that a wrong scale or cap cannot hide
        head = model.get_output_embeddings()
        head.weight.mul_(20)
    check_output_head(model)


def test_known_scales_and_caps():
    """Written down by hand from the modelling code: model type → factor on the logits, with the fields at 0.7.

    Families that are not listed are judged by their stock model alone, in the test above.
    """
    expected = {
        **dict.fromkeys(["cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "falcon_h1", "hyperclovax"], 0.7),
        **dict.fromkeys(["granite", "granite_swa", "granitemoe", "granitemoe_swa"], 1 / 0.7),
        **dict.fromkeys(["granitemoehybrid", "granitemoeshared"], 1 / 0.7),
        "minicpm3": 9 / 36,
    }
    capped = {"beam", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "nanochat", "vaultgemma"}
    for name in POCKETS:
        config = pocket_config(name, **unusual(name))
        rules = spec_for(config).logits
        if config.model_type in expected:
            assert rules.scale(config) == pytest.approx(expected[config.model_type]), name
        if config.model_type in capped:
            assert rules.cap(config) == 1.5, name


def test_a_cap_that_a_config_leaves_out_is_none():
    model = pocket_model("gemma2", dtype=torch.float32, final_logit_softcapping=None)
    assert output_head(model).softcap is None
    check_output_head(model)


@pytest.mark.parametrize("name", ["llama", "llama4_text", "modernbert-decoder"])
def test_the_loss_is_that_of_the_models_logits(name: str):
    """Also where a module stands before the output projection, or the backbone is named by no base model."""
    teacher, student = pocket_model(name), pocket_model(name, seed=1)
    tokens = pocket_tokens(2, 9)
    positions, targets = next_token_positions(tokens)
    with forward_of_backbone(teacher):
        states = teacher(input_ids=tokens).last_hidden_state.flatten(0, 1)[positions]
    request = LossRequest(DenseSignal(states, output_head(teacher)), positions, targets, {})
    found = distilling_forward(type(student))(student, input_ids=tokens, distillation=request)
    expected = []
    for model in (teacher, student):
        logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)[positions]
        expected.append(logits.double().log_softmax(-1))
    kl = (expected[0].exp() * (expected[0] - expected[1])).sum(-1)
    torch.testing.assert_close(found["kl"].double(), kl, rtol=1e-4, atol=1e-5)
    found["total"].sum().backward()
    trained = {path for path, parameter in student.named_parameters() if parameter.grad is not None}
    assert trained == {path for path, parameter in student.named_parameters() if parameter.requires_grad}
