"""A reward model held as an adapter of the policy's backbone scores as it does on its own, and nowhere else."""

from pathlib import Path

import pytest
import torch

from model_cases import RAGGED
from tether.core.errors import UserError
from tether.models.adapters import adapter_parameters, add_adapter
from tether.models.load import load_backbone, load_scorer, save_scorer
from tether.models.roles import Policy, Scorer, new_head
from tether.models.shared import load_shared_scorer, save_adapter


def trained_scorer(folder: Path) -> Scorer:
    ours = load_backbone(str(folder))
    add_adapter(ours.hf, "reward", rank=2, alpha=4.0, last_layers=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter_parameters(ours.hf, "reward").values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return Scorer(backbone=ours, head=new_head(ours, zero=False), adapter="reward")


@torch.no_grad()
def test_scores_are_equal_on_a_shared_backbone_and_the_policy_is_untouched(tiny_model_folder: Path, tmp_path: Path):
    scorer = trained_scorer(tiny_model_folder)
    save_scorer(scorer, tmp_path)
    save_adapter(scorer, tmp_path)
    backbone = load_backbone(str(tiny_model_folder))
    policy = Policy(backbone=backbone)
    before = policy(RAGGED).logprobs
    shared = load_shared_scorer(tmp_path, backbone, "held")
    torch.testing.assert_close(shared(RAGGED).scores, scorer(RAGGED).scores)
    torch.testing.assert_close(shared(RAGGED).scores, load_scorer(str(tmp_path))(RAGGED).scores, atol=1e-5, rtol=1e-5)
    assert torch.equal(policy(RAGGED).logprobs, before)
    assert not any(p.requires_grad for p in adapter_parameters(backbone.hf, "held").values())


def test_other_weights_and_unadapted_reward_models_are_refused(tiny_model_folder: Path, tmp_path: Path):
    scorer = trained_scorer(tiny_model_folder)
    save_adapter(scorer, tmp_path)
    other = load_backbone(str(tiny_model_folder))
    with torch.no_grad():
        other.hf.get_input_embeddings().weight.add_(0.01)
    with pytest.raises(UserError, match="trained on weights"):
        load_shared_scorer(tmp_path, other, "held")
    with pytest.raises(UserError, match="not trained with LoRA"):
        load_shared_scorer(tmp_path / "nothing", other, "held")
